"""The seam between the stages: per-timestep codes on disk, and how images become them."""

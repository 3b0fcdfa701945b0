"""The one training loop: its config, optimiser and log. It knows no task."""

"""`rdpm eval report`: what was read -> one page, or tables. Pure and torch-free; `engine.reporting` reads the files."""

"""`python -m rdpm_cli ...`, so that torchrun can start every command."""

from rdpm_cli.cli import main

main()

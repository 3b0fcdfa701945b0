"""`python -m rdpm_cli ...`, so that torchrun can start every command."""

import sys

if not sys.flags.safe_path:
    del sys.path[0]  # the working folder: a tokenize.py or queue.py in it is not the standard library's

from rdpm_cli.cli import main

main()

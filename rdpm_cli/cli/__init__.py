"""The command line: parse, call one engine function, print its result. No torch at import."""

from rdpm_cli.cli import commands as commands  # these two add the subcommands to the app
from rdpm_cli.cli import evaluation as evaluation
from rdpm_cli.cli.app import main as main

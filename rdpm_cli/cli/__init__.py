"""The front door: parse, call one engine function, print its result. No maths, no torch at import."""

from rdpm_cli.cli.app import main

__all__ = ["main"]

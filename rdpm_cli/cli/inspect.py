"""rdpm inspect"""

from typing import Annotated

import typer

from rdpm_cli.cli import options, report
from rdpm_cli.cli.app import app


@app.command()
def inspect(
    target: Annotated[
        str,
        typer.Argument(
            metavar="PATH|RECIPE",
            help="checkpoint, run, store, samples, images, recipe",
            autocompletion=options.recipe_names,
        ),
    ],
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Say what a file, folder or recipe is: kind, config, parameters, provenance, digests.

    Example: rdpm inspect imagenet256-d16 --json
    """
    report.begin(quiet)
    from rdpm_cli import engine

    report.show(engine.inspect(target), json)

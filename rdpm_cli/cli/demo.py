"""rdpm demo"""

from pathlib import Path
from typing import Annotated

import typer

from rdpm_cli.cli import options, report
from rdpm_cli.cli.app import app


@app.command()
def demo(
    overrides: options.DemoOverrides = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="folder of pictures, checkpoints, codes and samples")] = Path(
        "demo"
    ),
    seed: options.Seed = 0,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """The whole way on real handwritten digits, in minutes on a CPU: train, tokenize, sample, score.

    Example: rdpm demo --out demo
    """
    report.begin(quiet)
    from rdpm_cli import demo as tour

    report.show(tour.run(out, seed, overrides or []), json)

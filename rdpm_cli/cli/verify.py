"""rdpm verify"""

from pathlib import Path
from typing import Annotated

import typer

from rdpm_cli.cli import options, report
from rdpm_cli.cli.app import app
from rdpm_cli.errors import DamagedError


@app.command()
def verify(
    target: Annotated[Path, typer.Argument(metavar="STORE|CKPT", help="code store, or tokenizer, generator, judge")],
    decode: Annotated[
        int, typer.Option(min=0, max=16, help="decode so many images, and compare their PSNR with the recorded one")
    ] = 0,
    device: options.Device = "auto",
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Look at every byte of a store or checkpoint. Exit code 3, and the files by name, where one is damaged.

    Example: rdpm verify out/codes --decode 16
    """
    report.begin(quiet)
    from rdpm_cli import engine

    try:
        report.show(engine.verify(target, decode, device), json)
    except DamagedError as error:
        if json:
            report.show(engine.Result("damaged", {"store": str(target), "damaged": error.found}), json)
        raise

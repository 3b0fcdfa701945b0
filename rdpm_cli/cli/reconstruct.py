"""rdpm reconstruct"""

from pathlib import Path
from typing import Annotated

import typer

from rdpm_cli.cli import options, report
from rdpm_cli.cli.app import app


@app.command()
def reconstruct(
    images: Annotated[str, typer.Argument(metavar="IMAGES|CODES", help="images, or a code store to decode")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="folder of the PNGs")],
    tokenizer: options.Tokenizer = None,
    seed: options.Seed = 0,
    limit: options.Limit = None,
    device: options.Device = "auto",
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Pass images through the tokenizer and back: PNGs, a side-by-side grid, PSNR and SSIM.

    Example: rdpm reconstruct imagenet/ out/recon --limit 64
    """
    report.begin(quiet)
    from rdpm_cli import engine

    report.show(engine.reconstruct(images, out, tokenizer, seed=seed, limit=limit, device=device), json)

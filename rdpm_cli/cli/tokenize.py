"""rdpm tokenize"""

from pathlib import Path
from typing import Annotated

import typer

from rdpm_cli.cli import options, report
from rdpm_cli.cli.app import app


@app.command()
def tokenize(
    images: options.Images,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="folder of the code store")],
    tokenizer: options.Tokenizer = None,
    views: Annotated[int, typer.Option(min=1, help="noise draws an image")] = 1,
    flip: Annotated[bool, typer.Option("--flip", help="mirror the image in every second view")] = False,
    keep_latents: Annotated[bool, typer.Option("--keep-latents", help="store z too, for noise=fresh")] = False,
    shard_size: Annotated[int, typer.Option(min=1, help="images a shard")] = 4096,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Turn IMAGES into a store of per-timestep codes. The same command again resumes.

    Example: rdpm tokenize imagenet/ out/codes
    """
    report.begin(quiet)
    from rdpm_cli import engine

    result = engine.tokenize(
        images, out, tokenizer, views=views, flip=flip, keep_latents=keep_latents,
        seed=seed, shard_images=shard_size, device=device,
    )  # fmt: skip
    report.show(result, json)

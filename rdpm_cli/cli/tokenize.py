"""rdpm tokenize"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer

from rdpm_cli.cli import options, report
from rdpm_cli.cli.app import app


class Keep(StrEnum):
    """What a store may keep beside the codes."""

    latents = "latents"


@app.command()
def tokenize(
    images: options.Images,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="folder of the code store")],
    tokenizer: options.Tokenizer = None,
    views: Annotated[int, typer.Option(min=1, help="noise draws an image")] = 1,
    flip: Annotated[bool, typer.Option("--flip", help="mirror the image in every second view")] = False,
    keep: Annotated[Keep | None, typer.Option(help="store z too, for objective.noise=fresh")] = None,
    draft: Annotated[
        bool, typer.Option("--draft", help="decode large JPEGs at 1/2, 1/4 or 1/8: faster, other pixels")
    ] = False,
    shard_size: Annotated[int, typer.Option(min=1, help="images a shard")] = 4096,
    seed: options.Seed = 0,
    workers: Annotated[int | None, typer.Option(min=1, help="processes; default: one a core")] = None,
    on_bad: Annotated[
        Literal["stop", "skip"], typer.Option(help="at an image that cannot be read: stop, or leave it out")
    ] = "stop",
    max_bad: Annotated[float, typer.Option(min=0, max=1, help="share that --on-bad skip may leave out")] = 0.0001,
    dry_run: options.DryRun = False,
    precision: Annotated[
        Literal["fp32", "bf16"] | None, typer.Option(help="of the encoder, on a GPU; default there: bf16")
    ] = None,
    micro_batch: Annotated[int | None, typer.Option(min=1, help="images a forward pass, on a GPU")] = None,
    gpus: options.Gpus = None,
    device: options.Device = "auto",
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Turn IMAGES into a store of per-timestep codes. The same command again resumes.

    Example: rdpm tokenize imagenet/ out/codes
    """
    report.begin(quiet)
    from rdpm_cli import engine

    wanted = engine.StoreOptions(
        views=views, flip=flip, latents=keep is not None, draft=draft, seed=seed, shard_images=shard_size,
        precision=precision, micro_batch=micro_batch,
    )  # fmt: skip
    result = engine.tokenize(
        images, out, tokenizer, wanted, engine.Work(on_bad=on_bad, max_bad=max_bad),
        workers=workers, dry_run=dry_run, device=device, team=options.several(gpus),
    )  # fmt: skip
    report.show(result, json)

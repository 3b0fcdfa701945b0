"""rdpm sample"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from rdpm_cli.cli import options, report
from rdpm_cli.cli.app import app


class CfgSchedule(StrEnum):
    """How guidance changes with t."""

    constant = "constant"
    linear = "linear"


@app.command()
def sample(
    ckpt: Annotated[Path, typer.Option("--ckpt", metavar="FILE", help="generator checkpoint")],
    classes: Annotated[str, typer.Option(help="1,2,3 or 0-9 or all or name:goldfish")] = "all",
    per_class: Annotated[int, typer.Option(min=1, help="samples a class")] = 8,
    out: Annotated[Path, typer.Option(metavar="DIR", help="folder of the PNGs")] = Path("samples"),
    cfg: Annotated[float | None, typer.Option(min=0, help="guidance lambda; 0 = off")] = None,
    cfg_schedule: Annotated[CfgSchedule | None, typer.Option(help="linear: 0 at t = 1, lambda at t = T")] = None,
    tau: Annotated[
        float | None, typer.Option(help="inverse temperature; 1 samples exactly, larger is greedier")
    ] = None,
    skip_steps: Annotated[int | None, typer.Option(min=0, help="first steps without a network call")] = None,
    seed: options.Seed = 0,
    grid: Annotated[bool, typer.Option(help="labelled grid under previews/")] = True,
    gif: Annotated[bool, typer.Option("--gif", help="GIF of the T partial decodes under previews/")] = False,
    npz: Annotated[bool, typer.Option("--npz", help="also samples.npz in ADM's format")] = False,
    device: options.Device = "auto",
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Draw samples. Sampling options left out are those recorded in the checkpoint.

    Example: rdpm sample --ckpt d16.pt --classes 1,2,3 --per-class 8 --cfg 1.5
    """
    report.begin(quiet)
    from rdpm_cli import engine

    result = engine.sample(
        ckpt, classes, per_class, out, seed=seed, cfg=cfg, cfg_schedule=cfg_schedule and cfg_schedule.value, tau=tau,
        skip_steps=skip_steps, grid=grid, gif=gif, npz=npz, device=device,
    )  # fmt: skip
    report.show(result, json)

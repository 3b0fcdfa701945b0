"""rdpm sample"""

from pathlib import Path
from typing import Annotated, Literal

import typer

from rdpm_cli.cli import options, report
from rdpm_cli.cli.app import app
from rdpm_cli.config import MaskSchedule


@app.command()
def sample(
    ckpt: Annotated[Path, typer.Option("--ckpt", metavar="FILE", help="generator checkpoint")],
    classes: Annotated[str, typer.Option(help="1,2,3 or 0-9 or all or name:goldfish")] = "all",
    per_class: Annotated[int, typer.Option(min=1, help="samples a class")] = 8,
    out: Annotated[Path, typer.Option(metavar="DIR", help="folder of the PNGs")] = Path("samples"),
    cfg: Annotated[float | None, typer.Option(min=0, help="guidance lambda; 0 = off")] = None,
    cfg_schedule: Annotated[
        Literal["constant", "linear"] | None, typer.Option(help="linear: 0 at the first step, lambda at the last")
    ] = None,
    tau: Annotated[
        float | None, typer.Option(help="rdpm: inverse temperature; 1 samples exactly, larger is greedier")
    ] = None,
    skip_steps: Annotated[int | None, typer.Option(min=0, help="rdpm: first steps without a network call")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="resgen: forward passes, whatever the depth")] = None,
    schedule: Annotated[MaskSchedule | None, typer.Option(help="resgen: how many tokens are masked when")] = None,
    top_p: Annotated[float | None, typer.Option(help="resgen: components that hold this probability")] = None,
    z_temp: Annotated[float | None, typer.Option(min=0, help="resgen: factor of the drawn vector's scale")] = None,
    conf: Annotated[Literal["logp", "comp", "rand"] | None, typer.Option(help="resgen: what is revealed first")] = None,
    conf_temp: Annotated[float | None, typer.Option(min=0, help="resgen: noise on the confidence")] = None,
    conf_anneal: Annotated[
        bool | None, typer.Option("--conf-anneal/--no-conf-anneal", help="resgen: that noise falls to 0")
    ] = None,
    cfg_mode: Annotated[
        Literal["both", "logits"] | None, typer.Option(help="resgen: guide weights and means, or weights alone")
    ] = None,
    seed: options.Seed = 0,
    grid: Annotated[bool, typer.Option(help="labelled grid under previews/")] = True,
    gif: Annotated[bool, typer.Option("--gif", help="GIF of the T partial decodes under previews/")] = False,
    npz: Annotated[bool, typer.Option("--npz", help="also samples.npz in ADM's format")] = False,
    device: options.Device = "auto",
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Draw samples. Sampling options left out are those recorded in the checkpoint; each family has its own.

    Example: rdpm sample --ckpt d16.pt --classes 1,2,3 --per-class 8 --cfg 1.5
    """
    report.begin(quiet)
    from rdpm_cli import engine

    given = {
        "cfg": cfg, "cfg_schedule": cfg_schedule, "tau": tau, "skip_steps": skip_steps, "steps": steps,
        "schedule": schedule, "top_p": top_p, "z_temp": z_temp, "conf": conf, "conf_temp": conf_temp,
        "conf_anneal": conf_anneal, "cfg_mode": cfg_mode,
    }  # fmt: skip
    asked = {name: value for name, value in given.items() if value is not None}
    result = engine.sample(
        ckpt, classes, per_class, out, seed=seed, asked=asked, grid=grid, gif=gif, npz=npz, device=device
    )
    report.show(result, json)

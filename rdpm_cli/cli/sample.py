"""rdpm sample"""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from rdpm_cli.choices import CfgSchedule, Draw, MaskSchedule
from rdpm_cli.cli import options, report
from rdpm_cli.cli.app import app


@app.command()
def sample(
    ckpt: options.Ckpt,
    more: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="any other sampling option, e.g. precision=bf16 compile=graphs"),
    ] = None,
    classes: options.Classes = None,
    per_class: options.PerClass = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="folder of the samples")] = Path("samples"),
    preset: options.Preset = None,
    cfg: Annotated[float | None, typer.Option(min=0, help="guidance lambda; 0 = off")] = None,
    cfg_schedule: Annotated[
        CfgSchedule | None, typer.Option(help="of lambda over t; linear: 0 at t = 1, lambda at t = T")
    ] = None,
    cfg_power: Annotated[float | None, typer.Option(help="exponent of the power schedule")] = None,
    cfg_first: Annotated[int | None, typer.Option(min=1, help="first step of the interval schedule")] = None,
    cfg_last: Annotated[int | None, typer.Option(min=1, help="last step of the interval schedule")] = None,
    draw: Annotated[Draw | None, typer.Option(help="inverse: as gumbel, faster on a GPU")] = None,
    tau: Annotated[
        float | None, typer.Option(help="inverse temperature; 1 samples exactly, larger is greedier")
    ] = None,
    tau_end: Annotated[float | None, typer.Option(help="tau at t = T; it goes there linearly")] = None,
    top_k: Annotated[int | None, typer.Option(min=0, help="draw among the K likeliest codes; 0 = all")] = None,
    top_p: Annotated[float | None, typer.Option(help="draw among the fewest codes of this probability")] = None,
    skip_steps: Annotated[int | None, typer.Option(min=0, help="first steps without a network call")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="resgen: forward passes, whatever the depth")] = None,
    schedule: Annotated[MaskSchedule | None, typer.Option(help="resgen: how many tokens are masked when")] = None,
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
    init: Annotated[str | None, typer.Option(metavar="IMAGE", help="edit this image: a file, or SOURCE#N")] = None,
    mask: Annotated[str | None, typer.Option(metavar="MASK", help="draw --init anew where this is white")] = None,
    from_step: Annotated[int | None, typer.Option(metavar="K", help="draw --init anew from step K on")] = None,
    reject: Annotated[str | None, typer.Option(metavar="keep=RATE", help="keep=0.25: the best of 4 by --judge")] = None,
    judge: Annotated[
        str | None, typer.Option(metavar="FILE|NAME:FILE", help="judge.pt, or a torchvision classifier: resnet50:FILE")
    ] = None,
    png: Annotated[bool, typer.Option(help="a PNG a sample")] = True,
    npz: Annotated[bool, typer.Option("--npz", help="samples.npz in ADM's format")] = False,
    grid: Annotated[bool, typer.Option(help="labelled grid under previews/")] = True,
    gif: Annotated[bool, typer.Option("--gif", help="GIF and contact sheet of the T partial decodes")] = False,
    trajectory: Annotated[
        bool, typer.Option("--trajectory", help="norm, entropy and confidence at each t: JSON and curves")
    ] = False,
    shard: Annotated[str | None, typer.Option(metavar="I/N", help="only part I of N: 1/4 to 4/4")] = None,
    dry_run: options.DryRun = False,
    gpus: options.Gpus = None,
    device: options.Device = "auto",
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Draw samples. Sampling options left out are those recorded in the checkpoint.

    Each family has its own options. The same command again resumes.

    Example: rdpm sample --ckpt d16.pt --classes 1,2,3 --per-class 8 --cfg 1.5
    """
    report.begin(quiet)
    from rdpm_cli import engine

    named: dict[str, Any] = {
        "cfg": cfg, "cfg_schedule": cfg_schedule, "cfg_power": cfg_power, "cfg_first": cfg_first, "cfg_last": cfg_last,
        "draw": draw, "tau": tau, "tau_end": tau_end, "top_k": top_k, "top_p": top_p, "skip_steps": skip_steps,
        "steps": steps, "schedule": schedule, "z_temp": z_temp, "conf": conf, "conf_temp": conf_temp,
        "conf_anneal": conf_anneal, "cfg_mode": cfg_mode,
        "tau_schedule": None if tau_end is None else "linear",
    }  # fmt: skip
    asked = {name: value for name, value in named.items() if value is not None}
    result = engine.sample(
        ckpt, "all" if classes is None else classes, per_class or 8, out, seed=seed,
        sampling={**asked, **engine.key_values(more or ())}, preset=preset,
        outputs=engine.Outputs(png=png, npz=npz, grid=grid, gif=gif, trajectory=trajectory),
        edit=engine.ask_edit(init, mask, from_step), reject=engine.ask_reject(reject, judge),
        shard=shard, dry_run=dry_run, device=device, team=options.several(gpus),
    )  # fmt: skip
    report.show(result, json)

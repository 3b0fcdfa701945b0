"""rdpm train-gen"""

from pathlib import Path
from typing import Annotated

import typer

from rdpm_cli.cli import options, report
from rdpm_cli.cli.app import app


@app.command("train-gen")
def train_gen(
    codes: Annotated[Path, typer.Argument(metavar="CODES", help="code store written by rdpm tokenize")],
    overrides: options.Overrides = None,
    recipe: options.Recipe = "imagenet256-d16",
    out: options.RunFolder = None,
    seed: options.SeedOrNone = None,
    keep: options.Keep = None,
    gpus: options.Gpus = None,
    track: options.Track = None,
    dry_run: options.DryRun = False,
    gpu: options.Gpu = None,
    utilisation: options.Utilisation = None,
    print_config: options.PrintConfig = False,
    device: options.Device = "auto",
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Train a generator on CODES. The same command again resumes.

    Example: rdpm train-gen out/codes --recipe imagenet256-d16 --out runs/d16 train.batch=256
    """
    report.begin(quiet)
    from rdpm_cli import engine

    changes = options.changes(overrides, seed, keep)
    if print_config:
        result = engine.resolve(recipe, changes, "generator")
    elif hardware := options.hardware(dry_run, gpu, gpus, utilisation):
        result = engine.plan_generator(codes, out, recipe, changes, hardware)
    else:
        processes = options.several(gpus)
        result = engine.train_gen(codes, out, recipe, changes, device, processes, track)
    report.show(result, json)

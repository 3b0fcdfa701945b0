"""rdpm tune-sampling"""

from pathlib import Path
from typing import Annotated

import typer

from rdpm_cli.cli import options, report
from rdpm_cli.cli.app import app


@app.command()
def tune_sampling(
    ckpt: Annotated[Path, typer.Argument(metavar="CKPT", help="generator checkpoint")],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="the new checkpoint; default CKPT-tuned.pt")] = None,
    samples: Annotated[int, typer.Option(min=2, help="samples a candidate, balanced over classes")] = 500,
    budget: Annotated[int, typer.Option(min=1, help="candidates that are scored")] = 24,
    seed: options.Seed = 1,
    ref: options.Ref = None,
    extractor: options.Extractor = None,
    weights: options.Weights = None,
    device: options.Device = "auto",
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Search guidance, its schedule, tau and skipped steps; write a checkpoint that has the best as its defaults.

    All candidates share the noise of --seed.

    Example: rdpm tune-sampling d16.pt --samples 5000 --budget 24
    """
    report.begin(quiet)
    from rdpm_cli import engine

    result = engine.tune_sampling(
        ckpt, out, samples=samples, budget=budget, seed=seed, ref=ref, extractor=extractor, weights=weights,
        device=device,
    )  # fmt: skip
    report.show(result, json)

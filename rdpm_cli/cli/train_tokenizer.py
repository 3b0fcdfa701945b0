"""rdpm train-tokenizer"""

from rdpm_cli.cli import options, report
from rdpm_cli.cli.app import app


@app.command("train-tokenizer")
def train_tokenizer(
    images: options.Images,
    overrides: options.Overrides = None,
    recipe: options.Recipe = "imagenet256-tokenizer",
    out: options.RunFolder = None,
    from_weights: options.FromWeights = None,
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
    """Train a tokenizer on IMAGES. The same command again resumes.

    Example: rdpm train-tokenizer imagenet/ --recipe imagenet256-tokenizer --out runs/tok schedule.kind=sin
    """
    report.begin(quiet)
    from rdpm_cli import engine

    changes = options.changes(overrides, seed, keep)
    if print_config:
        result = engine.resolve(recipe, changes, "tokenizer")
    elif hardware := options.hardware(dry_run, gpu, gpus, utilisation):
        result = engine.plan_tokenizer(images, out, recipe, changes, hardware, from_weights)
    else:
        processes = options.several(gpus)
        result = engine.train_tokenizer(images, out, recipe, changes, device, from_weights, processes, track)
    report.show(result, json)

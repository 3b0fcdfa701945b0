"""Every subcommand, in the order of the data. Each imports its engine module inside, so that --help needs no torch."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from rdpm_cli.cli import app as cli
from rdpm_cli.cli.app import app, changes, command
from rdpm_cli.errors import DataError, UsageError

Format = Literal["html", "md", "csv", "json"]  # of a report
evaluation = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Scores that record how they were computed.")


@command(app, "demo --out demo")
def demo(
    overrides: cli.Overrides = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="folder of everything it makes")] = Path("demo"),
    seed: cli.Seed = 0,
) -> cli.Result:
    """From images to scores on real handwritten digits, in minutes on a CPU: train, tokenize, sample, score."""
    from rdpm_cli.engine import demo as engine

    return engine.run(out, seed, overrides or [])


@command(app, "train-tokenizer imagenet/ --recipe imagenet256-tokenizer --out runs/tok schedule.kind=sin")
def train_tokenizer(
    images: cli.Images,
    overrides: cli.Overrides = None,
    recipe: cli.Recipe = "imagenet256-tokenizer",
    out: cli.RunFolder = None,
    from_weights: cli.FromWeights = None,
    seed: cli.SeedOrNone = None,
    keep: cli.Keep = None,
    gpus: cli.Gpus = None,
    track: cli.Track = None,
    dry_run: cli.DryRun = False,
    gpu: cli.Gpu = None,
    utilisation: cli.Utilisation = None,
    print_config: cli.PrintConfig = False,
    device: cli.Device = "auto",
) -> cli.Result:
    """Train a tokenizer on IMAGES. The same command again resumes."""
    overrides = changes(overrides, seed, keep)
    if print_config:
        return _resolve(recipe, overrides, "tokenizer")
    if dry_run:
        from rdpm_cli.engine import plan

        return plan.plan_tokenizer(images, out, recipe, overrides, plan.Hardware.of(gpu, gpus, utilisation))
    from rdpm_cli.engine import tokenizer as engine

    return engine.train_tokenizer(images, out, recipe, overrides, device=device, from_weights=from_weights, track=track)


def _resolve(recipe: str, overrides: list[str], section: str) -> cli.Result:
    """The answer of --print-config."""
    from rdpm_cli.engine import look

    return look.resolve(recipe, overrides, section)


@command(app, "tokenize imagenet/ out/codes", several=True)
def tokenize(
    images: cli.Images,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="folder of the code store")],
    tokenizer: cli.Tokenizer = None,
    views: Annotated[int, typer.Option(min=1, help="noise draws an image")] = 1,
    flip: Annotated[bool, typer.Option("--flip", help="mirror the image in every second view")] = False,
    keep: Annotated[Literal["latents"] | None, typer.Option(help="store z too, for objective.noise=fresh")] = None,
    shard_size: Annotated[int, typer.Option(min=1, help="images a shard")] = 4096,
    seed: cli.Seed = 0,
    workers: Annotated[int | None, typer.Option(min=1, help="processes; default: one a core")] = None,
    on_bad: Annotated[Literal["stop", "skip"], typer.Option(help="stop at an unreadable image, or skip it")] = "stop",
    max_bad: Annotated[float, typer.Option(min=0, max=1, help="share that --on-bad skip may leave out")] = 0.0001,
    precision: Annotated[Literal["fp32", "bf16"] | None, typer.Option(help="on a GPU; default there: bf16")] = None,
    micro_batch: Annotated[int | None, typer.Option(min=1, help="images a forward pass, on a GPU")] = None,
    device: cli.Device = "auto",
) -> cli.Result:
    """Turn IMAGES into a store of the codes of every step. The same command again resumes."""
    from rdpm_cli.engine import tokenizer as engine

    options = engine.StoreOptions(
        views=views, flip=flip, latents=keep is not None, seed=seed, shard_images=shard_size, precision=precision,
        micro_batch=micro_batch,
    )  # fmt: skip
    return engine.tokenize(
        images, out, tokenizer, options, workers=workers, on_bad=on_bad, max_bad=max_bad, device=device
    )


@command(app, "reconstruct imagenet/ out/recon --limit 64")
def reconstruct(
    images: Annotated[str, typer.Argument(metavar="IMAGES|CODES", help="images, or a code store to decode")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="folder of the PNGs")],
    tokenizer: cli.Tokenizer = None,
    seed: cli.Seed = 0,
    limit: cli.Limit = None,
    device: cli.Device = "auto",
) -> cli.Result:
    """Pass images through the tokenizer and back: PNGs, a side-by-side grid, PSNR and SSIM."""
    from rdpm_cli.engine import tokenizer as engine

    return engine.reconstruct(images, out, tokenizer, seed=seed, limit=limit, device=device)


@command(app, "train-gen out/codes --recipe imagenet256-d16 --out runs/d16 train.batch=256")
def train_gen(
    codes: Annotated[Path, typer.Argument(metavar="CODES", help="code store written by rdpm tokenize")],
    overrides: cli.Overrides = None,
    recipe: cli.Recipe = "imagenet256-d16",
    out: cli.RunFolder = None,
    seed: cli.SeedOrNone = None,
    keep: cli.Keep = None,
    gpus: cli.Gpus = None,
    track: cli.Track = None,
    dry_run: cli.DryRun = False,
    gpu: cli.Gpu = None,
    utilisation: cli.Utilisation = None,
    print_config: cli.PrintConfig = False,
    device: cli.Device = "auto",
) -> cli.Result:
    """Train a generator on CODES. The same command again resumes."""
    overrides = changes(overrides, seed, keep)
    if print_config:
        return _resolve(recipe, overrides, "generator")
    if dry_run:
        from rdpm_cli.engine import plan

        return plan.plan_generator(codes, out, recipe, overrides, plan.Hardware.of(gpu, gpus, utilisation))
    from rdpm_cli.engine import generator as engine

    return engine.train_gen(codes, out, recipe, overrides, device=device, track=track)


SETTINGS = "any other sampling option of the family, e.g. precision=bf16 draw=inverse"
CFG_SCHEDULE = "of lambda over t: constant, linear (0 at t = 1, lambda at t = T), cosine, power, interval"


@command(app, "sample --ckpt d16.pt --classes 1,2,3 --per-class 8 --cfg 1.5", several=True)
def sample(
    ckpt: cli.Ckpt,
    settings: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help=SETTINGS)] = None,
    classes: cli.Classes = None,
    per_class: cli.PerClass = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="folder of the samples")] = Path("samples"),
    cfg: Annotated[float | None, typer.Option(min=0, help="guidance lambda; 0 = off")] = None,
    cfg_schedule: Annotated[str | None, typer.Option(help=CFG_SCHEDULE)] = None,
    tau: Annotated[float | None, typer.Option(help="inverse temperature; 1 samples exactly, larger: greedier")] = None,
    top_k: Annotated[int | None, typer.Option(min=0, help="draw among the K likeliest codes; 0 = all")] = None,
    top_p: Annotated[float | None, typer.Option(help="draw among the fewest codes of this probability")] = None,
    skip_steps: Annotated[int | None, typer.Option(min=0, help="first steps without a network pass")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="resgen: network passes, whatever the depth")] = None,
    preset: cli.Preset = None,
    seed: cli.Seed = 0,
    init: Annotated[str | None, typer.Option(metavar="IMAGE", help="edit this image: a file, or SOURCE#N")] = None,
    mask: Annotated[str | None, typer.Option(metavar="MASK", help="draw --init again where this is white")] = None,
    from_step: Annotated[int | None, typer.Option(metavar="K", help="draw --init again from step K on")] = None,
    reject: Annotated[str | None, typer.Option(metavar="keep=RATE", help="keep=0.25: the best of 4 by --judge")] = None,
    judge: Annotated[str | None, typer.Option(metavar="FILE", help="judge.pt of `rdpm eval judge`")] = None,
    npz: Annotated[bool, typer.Option("--npz", help="also samples.npz, in ADM's format")] = False,
    no_png: Annotated[bool, typer.Option("--no-png", help="no PNG a sample")] = False,
    grid: Annotated[bool, typer.Option(help="labelled grid under previews/")] = True,
    gif: Annotated[bool, typer.Option("--gif", help="GIF and contact sheet of the T partial decodes")] = False,
    shard: Annotated[str | None, typer.Option(metavar="I/N", help="only part I of N: 1/4 to 4/4")] = None,
    device: cli.Device = "auto",
) -> cli.Result:
    """Draw samples. Sampling options that are left out are those recorded in the checkpoint.

    Each family has options of its own, given as KEY=VALUE. The same command again resumes."""
    from rdpm_cli.engine import sample as engine

    options: dict[str, Any] = {
        "cfg": cfg, "cfg_schedule": cfg_schedule, "tau": tau, "top_k": top_k, "top_p": top_p, "skip_steps": skip_steps,
        "steps": steps,
    }  # fmt: skip
    sampling = {name: value for name, value in options.items() if value is not None}
    return engine.sample(
        ckpt, "all" if classes is None else classes, per_class or 8, out, seed=seed,
        sampling={**sampling, **engine.key_values(settings or ())}, preset=preset,
        outputs=engine.Outputs(png=not no_png, npz=npz, grid=grid, gif=gif),
        edit=engine.edit_options(init, mask, from_step), reject=engine.reject_options(reject, judge),
        shard=shard, device=device,
    )  # fmt: skip


@command(app, "tune-sampling d16.pt --samples 5000 --budget 24")
def tune_sampling(
    ckpt: Annotated[Path, typer.Argument(metavar="CKPT", help="generator checkpoint")],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="the new checkpoint; default CKPT-tuned.pt")] = None,
    samples: Annotated[int, typer.Option(min=2, help="samples a candidate, balanced over classes")] = 500,
    budget: Annotated[int, typer.Option(min=1, help="candidates to score")] = 24,
    seed: cli.Seed = 1,
    ref: cli.Ref = None,
    extractor: cli.Extractor = None,
    weights: cli.Weights = None,
    device: cli.Device = "auto",
) -> cli.Result:
    """Search guidance, its schedule, tau and skipped steps; write a checkpoint that has the best as its defaults.

    All candidates share the noise of --seed."""
    from rdpm_cli.engine import score, tune

    ruler = score.Ruler(extractor, weights)
    return tune.tune_sampling(ckpt, out, samples=samples, budget=budget, seed=seed, ref=ref, ruler=ruler, device=device)


# ---- eval ------------------------------------------------------------------------------------------------------------

METRICS = {
    "fid": "Fréchet distance to a reference: Inception by default, never silently another extractor.",
    "sfid": "Fréchet distance of spatial features (sFID), which only Inception has.",
    "is": "Inception Score: ADM's mean over 10 consecutive splits, and an order-free value; needs no reference.",
    "pr": "Precision and recall of the 3-nearest-neighbour manifolds, exact.",
    "kid": "Kernel distance (KID), with its spread over subsets.",
    "all": "Every score of images, from one pass over them.",
}
TARGET = "samples, images or .npz; or options of --ckpt"
FEATURES = "save the target's activations, or reuse them"
DRAWN = """With --ckpt instead of TARGET the samples are drawn without files in between, as --classes, --per-class,
--seed, --preset and any sampling option as KEY=VALUE say."""


def _add_metric(metric: str, summary: str) -> None:
    """Add `eval METRIC`. The commands differ only in what they compute."""

    def evaluate(
        arguments: Annotated[list[str] | None, typer.Argument(metavar="TARGET|[KEY=VALUE]...", help=TARGET)] = None,
        ref: cli.Ref = None,
        ckpt: cli.CkptOrNone = None,
        classes: cli.Classes = None,
        per_class: cli.PerClass = None,
        seed: cli.SeedOrNone = None,
        preset: cli.Preset = None,
        extractor: cli.Extractor = None,
        weights: cli.Weights = None,
        download: cli.Download = False,
        features: Annotated[Path | None, typer.Option(metavar="FILE.npz", help=FEATURES)] = None,
        subset: Annotated[int | None, typer.Option(min=2, help="fid: mean over balanced subsets of N images")] = None,
        ci: Annotated[bool, typer.Option("--ci", help="fid, is: 95% intervals, by leaving images out")] = False,
        resolution: cli.Resolution = None,
        device: cli.Device = "auto",
    ) -> cli.Result:
        from rdpm_cli.engine import sample, score

        drawing = {"--classes": classes, "--per-class": per_class, "--seed": seed, "--preset": preset}
        target: str | sample.Drawn
        if ckpt is None:
            target = _one_target(arguments or [], [name for name, value in drawing.items() if value is not None])
        else:
            target = sample.Drawn(ckpt, classes or "all", per_class or 8, seed or 0, tuple(arguments or []), preset)
        ruler = score.Ruler(extractor, weights, download, features)
        return score.eval_images(metric, target, ref, ruler, subset=subset, ci=ci, resolution=resolution, device=device)

    evaluate.__doc__ = f"{summary}\n\n{DRAWN}"
    reference = "" if metric == "is" else " --ref reference.npz"
    command(evaluation, f"eval {metric} samples/{reference}", metric, several=True)(evaluate)


def _one_target(arguments: list[str], drawing: list[str]) -> str:
    """The TARGET among the arguments. drawing: options that only --ckpt uses. Raises UsageError."""
    pairs = [word for word in arguments if "=" in word and not Path(word).exists()]
    if misplaced := [*drawing, *pairs]:  # ignoring them would score other samples than those asked for
        raise UsageError(f"{misplaced[0]} belongs to --ckpt", "give --ckpt FILE, or leave it out")
    if len(arguments) != 1:
        message = f"expected one TARGET, got {' '.join(arguments) or 'none'}"
        raise UsageError(message, "give samples, images or an .npz, or --ckpt FILE")
    return arguments[0]


for _metric, _summary in METRICS.items():
    _add_metric(_metric, _summary)


@command(evaluation, "eval reference imagenet/train imagenet256.npz --resolution 256", several=True)
def reference(
    images: cli.Images,
    out: Annotated[Path, typer.Argument(metavar="REF.npz", help="the file to write")],
    features: Annotated[int, typer.Option(min=4, help="images whose features it holds, for pr and kid")] = 10_000,
    resolution: cli.Resolution = None,
    extractor: cli.Extractor = None,
    weights: cli.Weights = None,
    download: cli.Download = False,
    device: cli.Device = "auto",
) -> cli.Result:
    """Statistics of IMAGES, cropped as in training, as an .npz for --ref that records its extractor."""
    from rdpm_cli.engine import score as engine

    ruler = engine.Ruler(extractor, weights, download)
    return engine.eval_reference(images, out, ruler, features=features, resolution=resolution, device=device)


@command(evaluation, "eval recon digits:heldout --tokenizer tokenizer.pt --seeds 4", several=True)
def recon(
    images: cli.Images,
    tokenizer: cli.Tokenizer = None,
    seed: cli.Seed = 0,
    seeds: Annotated[int, typer.Option(min=1, help="noise seeds to average over; rFID uses only the first")] = 4,
    limit: cli.Limit = None,
    extractor: cli.Extractor = None,
    weights: cli.Weights = None,
    download: cli.Download = False,
    lpips_alex: Annotated[Path | None, typer.Option(metavar="FILE", help="AlexNet weight file, for LPIPS")] = None,
    lpips_vgg: Annotated[Path | None, typer.Option(metavar="FILE", help="VGG16 weight file, for LPIPS")] = None,
    device: cli.Device = "auto",
) -> cli.Result:
    """rFID, PSNR, SSIM, LPIPS, MSE and latent error of reconstructions, with their spread over noise seeds.

    rFID and LPIPS need weights: if they are absent, the score is left out and names the file it needs."""
    from rdpm_cli.engine import score as engine

    return engine.eval_recon(
        images, tokenizer, seed=seed, seeds=seeds, limit=limit, ruler=engine.Ruler(extractor, weights, download),
        lpips={"alex": lpips_alex, "vgg": lpips_vgg}, device=device,
    )  # fmt: skip


@command(evaluation, "eval judge cifar10-train.zip runs/judge width=64", several=True)
def judge(
    images: cli.Images,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="run folder; the judge is OUT/judge.pt")],
    overrides: cli.Overrides = None,
    heldout: Annotated[str | None, typer.Option(metavar="IMAGES", help="default: a tenth of the images")] = None,
    recipe: cli.Recipe = "judge",
    seed: cli.SeedOrNone = None,
    resolution: cli.Resolution = None,
    print_config: cli.PrintConfig = False,
    device: cli.Device = "auto",
) -> cli.Result:
    """Train a small classifier of IMAGES that scores samples where Inception says little.

    Its accuracy on held-out images is in its file and next to every score it makes. The same command again resumes."""
    overrides = changes(overrides, seed)
    if print_config:
        return _resolve(recipe, overrides, "judge")
    from rdpm_cli.engine import score as engine

    return engine.eval_judge(images, out, recipe, overrides, heldout=heldout, resolution=resolution, device=device)


@command(evaluation, "eval report demo score.json -o report.html")
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUNS...", help="runs, stores, samples, .pt and score files")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="file to write; default report.FORMAT")] = None,
    form: Annotated[Format | None, typer.Option("--format", help="default: by the suffix of --out")] = None,
    title: Annotated[str | None, typer.Option(help="of the page")] = None,
) -> cli.Result:
    """One page of runs and their scores: provenance, scores, curves, pictures. It needs no network."""
    from rdpm_cli.engine import report as engine

    return engine.make_report(runs, out, form, title)


app.add_typer(evaluation, name="eval")


# ---- looking ---------------------------------------------------------------------------------------------------------


@command(app, "inspect imagenet256-d16 --json")
def inspect(target: cli.Target) -> cli.Result:
    """Describe a file, folder or recipe: kind, config, parameters, provenance, digests."""
    from rdpm_cli.engine import look

    return look.inspect(target)


@command(app, "verify out/codes")
def verify(
    target: Annotated[Path, typer.Argument(metavar="PATH", help="code store, samples, model file or training state")],
) -> cli.Result:
    """Compare the bytes of a store, model file or training state with their checksums. Exit code 3: they differ."""
    from rdpm_cli.engine import look

    return look.verify(target)


@app.command()
def doctor(json: cli.Json = False, quiet: cli.Quiet = False) -> None:
    """Report versions, devices, disk, weight files and extras, and how to fix what is missing. Exit code 3: not ready.

    Example: rdpm doctor --json
    """
    from rdpm_cli.engine import look

    result = look.doctor()
    cli.show(result, json)
    if broken := result.values["broken"]:
        raise DataError(f"not ready: {', '.join(broken)}", result.values["fix"][broken[0]])

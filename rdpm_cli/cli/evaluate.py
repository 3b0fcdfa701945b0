"""rdpm eval"""

from pathlib import Path
from typing import Annotated, Literal

import typer

from rdpm_cli.cli import options, report
from rdpm_cli.cli.app import app

group = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Scores that say what they were computed with.")
app.add_typer(group, name="eval")

METRICS = {
    "fid": "Fréchet distance to a reference: Inception by default, never silently another extractor.",
    "sfid": "Fréchet distance of spatial features (sFID): Inception alone has them.",
    "is": "Inception Score: ADM's mean over 10 consecutive splits, and an order-free value; needs no reference.",
    "pr": "Precision and recall of the 3-nearest-neighbour manifolds, exact.",
    "kid": "Kernel distance (KID), with its spread over subsets.",
    "all": "Every score of images, from one pass over them.",
}


def _command(metric: str, text: str) -> None:
    """Add `eval METRIC`: they differ in what they compute alone."""

    def command(
        args: Annotated[
            list[str] | None,
            typer.Argument(metavar="TARGET|[KEY=VALUE]...", help="samples, images or .npz; or options of --ckpt"),
        ] = None,
        ref: options.Ref = None,
        ckpt: options.CkptOrNone = None,
        classes: options.Classes = None,
        per_class: options.PerClass = None,
        seed: options.SeedOrNone = None,
        preset: options.Preset = None,
        extractor: options.Extractor = None,
        weights: options.Weights = None,
        download: options.Download = False,
        subset: Annotated[
            int | None, typer.Option(min=2, help="of fid: mean over balanced subsets of N images")
        ] = None,
        ci: Annotated[bool, typer.Option("--ci", help="of fid and is: 95% intervals, by leaving images out")] = False,
        resolution: options.Resolution = None,
        cache: options.Cache = True,
        gpus: options.Gpus = None,
        device: options.Device = "auto",
        json: options.Json = False,
        quiet: options.Quiet = False,
    ) -> None:
        report.begin(quiet)
        from rdpm_cli import engine

        drawing = {"--classes": classes, "--per-class": per_class, "--seed": seed, "--preset": preset}
        given = {name: value is not None for name, value in drawing.items()}
        target: str | engine.Drawn = options.one_target(args or [], ckpt, given)
        if ckpt is not None:
            target = engine.Drawn(ckpt, classes or "all", per_class or 8, seed or 0, tuple(args or []), preset)
        ruler = engine.Ruler(extractor, weights, download, cache)
        result = engine.eval_images(
            metric, target, ref, ruler, subset=subset, ci=ci, resolution=resolution, device=device,
            team=options.several(gpus),
        )  # fmt: skip
        report.show(result, json)

    command.__doc__ = f"""{text}

    With --ckpt in place of TARGET the samples are drawn without files between: --classes, --per-class, --seed, --preset
    and any sampling option as KEY=VALUE say which.

    Example: rdpm eval {metric} samples/{"" if metric == "is" else " --ref reference.npz"}
    """
    group.command(metric)(command)


for _metric, _text in METRICS.items():
    _command(_metric, _text)


@group.command()
def reference(
    images: options.Images,
    out: Annotated[Path, typer.Argument(metavar="REF.npz", help="what is written")],
    features: Annotated[int, typer.Option(min=4, help="images whose features it holds, for pr and kid")] = 10_000,
    resolution: options.Resolution = None,
    extractor: options.Extractor = None,
    weights: options.Weights = None,
    download: options.Download = False,
    cache: options.Cache = True,
    gpus: options.Gpus = None,
    device: options.Device = "auto",
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Statistics of IMAGES, cropped as in training, as an .npz for --ref. It says which extractor made it.

    Example: rdpm eval reference imagenet/train imagenet256.npz --resolution 256
    """
    report.begin(quiet)
    from rdpm_cli import engine

    ruler, team = engine.Ruler(extractor, weights, download, cache), options.several(gpus)
    result = engine.eval_reference(
        images, out, ruler, features=features, resolution=resolution, device=device, team=team
    )
    report.show(result, json)


@group.command()
def recon(
    images: options.Images,
    tokenizer: options.Tokenizer = None,
    seed: options.Seed = 0,
    seeds: Annotated[int, typer.Option(min=1, help="noise seeds to average over; rFID takes the first alone")] = 4,
    limit: options.Limit = None,
    extractor: options.Extractor = None,
    weights: options.Weights = None,
    download: options.Download = False,
    lpips_alex: Annotated[Path | None, typer.Option(metavar="FILE", help="AlexNet weight file, for LPIPS")] = None,
    lpips_vgg: Annotated[Path | None, typer.Option(metavar="FILE", help="VGG16 weight file, for LPIPS")] = None,
    gpus: options.Gpus = None,
    device: options.Device = "auto",
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """rFID, PSNR, SSIM, LPIPS, MSE and latent error of reconstructions, with their spread over noise seeds.

    rFID and LPIPS need weights: where they are absent, the score says so and which file it needs.

    Example: rdpm eval recon digits:heldout --tokenizer tokenizer.pt --seeds 4
    """
    report.begin(quiet)
    from rdpm_cli import engine

    result = engine.eval_recon(
        images,
        tokenizer,
        seed=seed,
        seeds=seeds,
        limit=limit,
        extractor=extractor,
        weights=weights,
        download=download,
        lpips_alex=lpips_alex,
        lpips_vgg=lpips_vgg,
        device=device,
        team=options.several(gpus),
    )
    report.show(result, json)


@group.command()
def judge(
    images: options.Images,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="run folder; the judge is OUT/judge.pt")],
    overrides: options.Overrides = None,
    heldout: Annotated[str | None, typer.Option(metavar="IMAGES", help="default: a tenth of the images")] = None,
    recipe: options.Recipe = "judge",
    seed: options.SeedOrNone = None,
    resolution: options.Resolution = None,
    print_config: options.PrintConfig = False,
    gpus: options.Gpus = None,
    device: options.Device = "auto",
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Train a small classifier of IMAGES, whose features and opinion score samples where Inception says little.

    Its accuracy on images that it has not seen is in its file, and beside every score it makes. The same command again
    resumes.

    Example: rdpm eval judge cifar10-train.zip runs/judge width=64
    """
    report.begin(quiet)
    from rdpm_cli import engine

    changes = options.changes(overrides, seed)
    if print_config:
        result = engine.resolve(recipe, changes, "judge")
    else:
        result = engine.eval_judge(
            images, out, recipe, changes, heldout=heldout, resolution=resolution, device=device,
            team=options.several(gpus),
        )  # fmt: skip
    report.show(result, json)


@group.command("report")
def make_report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUNS...", help="runs, stores, samples, .pt and score files")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="file to write; default report.FORMAT")] = None,
    form: Annotated[
        Literal["html", "md", "csv", "json"] | None, typer.Option("--format", help="default: by the suffix of --out")
    ] = None,
    title: Annotated[str | None, typer.Option(help="of the page")] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """One page of what was run and how it scores: provenance, scores, curves, pictures. It needs no network.

    Example: rdpm eval report demo score.json -o report.html
    """
    report.begin(quiet)
    from rdpm_cli import engine

    report.show(engine.make_report(runs, out, form, title), json)

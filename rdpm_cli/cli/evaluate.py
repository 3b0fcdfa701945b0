"""rdpm eval"""

from pathlib import Path
from typing import Annotated, Literal

import typer

from rdpm_cli.cli import options, report
from rdpm_cli.cli.app import app

group = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Scores that say what they were computed with.")
app.add_typer(group, name="eval")


@group.command()
def fid(
    target: Annotated[str, typer.Argument(metavar="TARGET", help="sample folder, or images")],
    ref: Annotated[str | None, typer.Option(help="reference images; default: recorded in the samples")] = None,
    extractor: Annotated[Path | None, typer.Option(help="a judge's checkpoint instead of Inception")] = None,
    weights: Annotated[Path | None, typer.Option(help="Inception weight file")] = None,
    subset: Annotated[int | None, typer.Option(min=2, help="mean over disjoint balanced subsets of N images")] = None,
    resolution: Annotated[int | None, typer.Option(min=1, help="crop size of a TARGET that is not samples")] = None,
    device: options.Device = "auto",
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Fréchet distance to a reference: Inception by default, never silently another extractor.

    Example: rdpm eval fid samples/
    """
    report.begin(quiet)
    from rdpm_cli import engine

    result = engine.eval_fid(
        target, ref, extractor=extractor, weights=weights, subset=subset, resolution=resolution, device=device
    )
    report.show(result, json)


@group.command()
def recon(
    images: options.Images,
    tokenizer: options.Tokenizer = None,
    seed: options.Seed = 0,
    seeds: Annotated[int, typer.Option(min=1, help="noise seeds to average over; rFID takes the first alone")] = 4,
    limit: options.Limit = None,
    extractor: Annotated[Path | None, typer.Option(help="a judge's checkpoint instead of Inception")] = None,
    weights: Annotated[Path | None, typer.Option(help="Inception weight file, for rFID")] = None,
    lpips_alex: Annotated[Path | None, typer.Option(help="AlexNet weight file, for LPIPS")] = None,
    lpips_vgg: Annotated[Path | None, typer.Option(help="VGG16 weight file, for LPIPS")] = None,
    device: options.Device = "auto",
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """rFID, PSNR, SSIM, LPIPS and MSE of reconstructions, with their spread over noise seeds.

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
        lpips_alex=lpips_alex,
        lpips_vgg=lpips_vgg,
        device=device,
    )
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

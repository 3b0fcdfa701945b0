"""eval fid, eval recon."""

from __future__ import annotations

from pathlib import Path

from rdpm_cli import progress
from rdpm_cli.engine.runs import Result, versions
from rdpm_cli.engine.tokenizing import find_tokenizer


def eval_fid(
    target: str,
    ref: str | None = None,
    *,
    extractor: Path | None = None,
    weights: Path | None = None,
    subset: int | None = None,
    resolution: int | None = None,
    device: str = "auto",
) -> Result:
    """Fréchet distance of samples, or of any images, to a reference."""
    from rdpm_cli.evaluation import evaluate, features
    from rdpm_cli.evaluation.reference import open_reference, open_target
    from rdpm_cli.training.distributed import process_group

    with process_group(device) as chosen:
        judge = features.make_extractor(extractor, weights, chosen)
        images = open_target(target, resolution)
        values = evaluate.frechet(judge, images, open_reference(ref, images), subset)
    return Result("score", {**values, "options": images.origin.get("options"), "versions": versions()})


def eval_recon(
    images: str,
    tokenizer: Path | None = None,
    *,
    seed: int = 0,
    seeds: int = 4,
    limit: int | None = None,
    extractor: Path | None = None,
    weights: Path | None = None,
    lpips_alex: Path | None = None,
    lpips_vgg: Path | None = None,
    device: str = "auto",
) -> Result:
    """Scores of reconstructions: means over noise seeds seed..seed+seeds-1, their spread; rFID of the first seed."""
    path = find_tokenizer(tokenizer)
    from rdpm_cli.images.sources import open_source, spread

    source = open_source(images)
    from rdpm_cli.evaluation import recon
    from rdpm_cli.tokenizer import model
    from rdpm_cli.training.distributed import process_group

    loaded, content = model.load(path)
    count, size = len(spread(len(source), limit)), loaded.cfg.autoencoder.resolution
    with process_group(device) as chosen:
        rulers = recon.find_rulers(
            count, size, chosen, extractor=extractor, weights=weights, lpips={"alex": lpips_alex, "vgg": lpips_vgg}
        )
        every = range(seed, seed + seeds)
        with progress.Bar("reconstruct", count, "images") as bar:
            values = recon.score(source, loaded.to(chosen), rulers, every, chosen, limit, bar.advance)
    values |= {"target": {"name": source.spec, "sha256": source.digest()}, "tokenizer": content["digest"]}
    values |= {"options": {"resolution": size, "limit": limit}, "versions": {**versions(), **_metric_versions()}}
    return Result("score", {"metric": "reconstruction", **values})


def _metric_versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("lpips", "torch-fidelity", "torchmetrics")}

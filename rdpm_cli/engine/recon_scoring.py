"""eval recon."""

from __future__ import annotations

from pathlib import Path

from rdpm_cli import progress
from rdpm_cli.engine.runs import Result, versions
from rdpm_cli.engine.tokenizing import find_tokenizer


def eval_recon(
    images: str,
    tokenizer: Path | None = None,
    *,
    seed: int = 0,
    seeds: int = 4,
    limit: int | None = None,
    extractor: Path | None = None,
    weights: Path | None = None,
    download: bool = False,
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
            count,
            size,
            chosen,
            extractor=extractor,
            weights=weights,
            download=download,
            lpips={"alex": lpips_alex, "vgg": lpips_vgg},
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

"""eval recon."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rdpm_cli.engine.runs import Result, versions
from rdpm_cli.engine.scoring import answer, by_team
from rdpm_cli.engine.tokenizing import find_tokenizer

if TYPE_CHECKING:
    from rdpm_cli.team import Team


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
    team: Team | None = None,
) -> Result:
    """Scores of reconstructions: means over noise seeds seed..seed+seeds-1, their spread; rFID of the first seed.

    team: as --gpus.
    """
    path = find_tokenizer(tokenizer)
    if team and team.processes > 1:
        return Result("score", by_team(team, device))
    from rdpm_cli.images.sources import open_source, spread

    source = open_source(images)
    from rdpm_cli.evaluation import recon
    from rdpm_cli.tokenizer import model
    from rdpm_cli.training.distributed import process_group

    loaded, content = model.load(path)
    count, size = len(spread(len(source), limit)), loaded.cfg.autoencoder.resolution
    with process_group(device, several=True) as chosen:
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
        values = recon.score(source, loaded.to(chosen), rulers, every, chosen, limit)
    if values is not None:
        values = {"metric": "reconstruction", **values}
        values |= {"target": {"name": source.spec, "count": count, "digest": source.digest()}}
        values |= {"tokenizer": content["digest"]}
        values |= {"options": {"resolution": size, "limit": limit}, "versions": {**versions(), **_metric_versions()}}
    return answer("score", values)


def _metric_versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("lpips", "torch-fidelity", "torchmetrics")}

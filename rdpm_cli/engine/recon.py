"""eval recon: scores of reconstructions, over several noise seeds."""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rdpm_cli.data.open import open_source
from rdpm_cli.data.pixels import Cut
from rdpm_cli.data.source import spread
from rdpm_cli.distributed import process_group
from rdpm_cli.engine.tokenizer import find_tokenizer
from rdpm_cli.evaluation import recon
from rdpm_cli.runs import Result, versions
from rdpm_cli.tokenizer import model
from rdpm_cli.tokenizer.losses import Net


def eval_recon(
    images: str, tokenizer: Path | None = None, *, seed: int = 0, seeds: int = 4, limit: int | None = None,
    extractor: str | Path | None = None, weights: Path | None = None, download: bool = False,
    lpips: Mapping[Net, Path | None] = {}, perturb: float = 0.0, cut: Cut = "round",
    device: str = "auto", reading: dict[str, Any] | None = None,
) -> Result:  # fmt: skip
    """Scores of reconstructions: means over noise seeds seed..seed+seeds-1 and their spread; rFID of the first seed.

    lpips: weight files of its networks. perturb: share of codes that neighbours replace."""
    path, source = find_tokenizer(tokenizer), open_source(images, **(reading or {}))
    loaded, content = model.load(path)
    count, size = len(spread(len(source), limit)), loaded.cfg.autoencoder.resolution
    with process_group(device, several=True) as rank_device:
        fid = "pfid" if perturb else "rfid"
        networks = recon.open_networks(count, size, rank_device, lpips, extractor, weights, download, fid)
        noise_seeds = range(seed, seed + seeds)
        loaded.to(rank_device)
        perturbed = recon.Perturb(perturb, loaded) if perturb else None
        record = recon.score(
            source, loaded, networks, noise_seeds, rank_device, limit, perturb=perturbed, cut=cut
        )  # fmt: skip
    if record is None:
        return Result("score")
    libraries = {name: version(name) for name in ("lpips", "torch-fidelity", "torchmetrics")}
    return Result("score", {
        "metric": "reconstruction", **record, "tokenizer": content["digest"],
        "target": {"name": source.spec, "count": count, "digest": source.digest()},
        "options": {
            "resolution": size, "limit": limit, **({} if cut == "round" else {"dtype_cut": cut}),
            **({"perturb": perturb, "neighbours": perturbed.neighbours} if perturbed else {}),
        },
        "versions": {**versions(), **libraries},
    })  # fmt: skip

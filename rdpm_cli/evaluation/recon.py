"""Scores of reconstructions: which can be computed here, over which noise seeds, and why the others are not."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from rdpm_cli import progress
from rdpm_cli.errors import AbsentWeightsError, DataError
from rdpm_cli.evaluation import evaluate, metrics
from rdpm_cli.evaluation.features import (
    Extractor,
    extract,
    identity,
    image_digests,
    is_published_inception,
    make_extractor,
)
from rdpm_cli.evaluation.scores import rank_notes
from rdpm_cli.images.sources import ImageSource, spread
from rdpm_cli.images.transform import Pixels
from rdpm_cli.step import gather, world
from rdpm_cli.tokenizer import perceptual
from rdpm_cli.tokenizer.model import Tokenizer
from rdpm_cli.tokenizer.perceptual import Net, Perceptual


@dataclass
class Rulers:
    """What needs weights. missing: a score's name -> why it is not computed."""

    extractor: Extractor | None = None
    perceptual: dict[Net, Perceptual] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def find_rulers(
    count: int,
    resolution: int,
    device: torch.device,
    *,
    extractor: Path | None = None,
    weights: Path | None = None,
    download: bool = False,
    lpips: Mapping[Net, Path | None] | None = None,
) -> Rulers:
    """What is here, for so many images of this size. A file that is named and absent, or does not fit, raises.

    download: fetch Inception's weights where they are absent.
    """
    rulers = Rulers()
    judge = _find_extractor(count, device, extractor, weights, download)
    if isinstance(judge, str):
        rulers.missing["rfid"] = judge
    else:
        rulers.extractor = judge
    for net in perceptual.BACKBONES:
        network = _find_lpips(net, resolution, lpips.get(net) if lpips else None)
        if isinstance(network, str):
            rulers.missing[f"lpips_{net}"] = network
        else:
            rulers.perceptual[net] = network.to(device)
    return rulers


def _find_extractor(
    count: int, device: torch.device, extractor: Path | None, weights: Path | None, download: bool
) -> Extractor | str:
    """The extractor, or why there is none."""
    if count < 2:
        why = f"a Fréchet distance needs at least 2 images, not {count}"
        if extractor or weights:
            raise DataError(why, "take more images")
        return why
    try:
        return make_extractor(extractor, weights, device, download)
    except AbsentWeightsError as error:
        return error.reason


def _find_lpips(net: Net, resolution: int, given: Path | None) -> Perceptual | str:
    """LPIPS with one backbone, or why there is none."""
    if given is None and resolution < perceptual.BACKBONES[net].smallest:
        return perceptual.too_small(net, resolution)
    try:
        return perceptual.load(net, given, f"--lpips-{net} FILE", f"leave --lpips-{net} out", resolution)
    except AbsentWeightsError as error:
        return error.reason


class RunningFrechet:
    """Fréchet distance of reconstructions to their originals, the same cropped uint8 inputs. Memory flat in N."""

    def __init__(self, extractor: Extractor) -> None:
        self.extractor = extractor
        self.sides: list[metrics.RunningStatistics] = []

    def add(self, originals: Pixels, recon: Pixels) -> None:
        """One batch, (B, H, W, 3) uint8 each."""
        found = [extract(self.extractor, side)["features"] for side in (originals, recon)]
        self.sides = self.sides or [metrics.RunningStatistics(part.shape[1]) for part in found]
        for side, part in zip(self.sides, found, strict=True):
            side.add(part)

    def merge(self, sides: list[metrics.RunningStatistics]) -> None:
        """Add what another process has summed."""
        if not self.sides:
            self.sides = sides
        elif sides:
            for own, other in zip(self.sides, sides, strict=True):
                own.merge(other)

    def result(self) -> tuple[str, float, list[str]]:
        """(name, value, notes). Only the published Inception's is called rfid."""
        theirs, ours = (side.statistics() for side in self.sides)
        name = "rfid" if is_published_inception(self.extractor) else "frechet_distance"
        notes = [self.extractor.note] if self.extractor.note else []
        notes += rank_notes(ours.count, len(ours.mean_D), "features")
        return name, metrics.frechet_distance(ours, theirs), notes


class _Sums:
    """What one process adds up of its share of the images."""

    def __init__(self, rulers: Rulers, seeds: range) -> None:
        self.distance = RunningFrechet(rulers.extractor) if rulers.extractor else None
        self.scores = [evaluate.ReconstructionScores(rulers.perceptual) for _ in seeds]
        self.digests: dict[int, list[bytes]] = {}  # of the originals, by index of a batch's first image

    def add(self, indices: list[int], originals: Pixels, recons: list[evaluate.Reconstruction]) -> None:
        """One batch under each seed."""
        self.digests[indices[0]] = image_digests(originals)
        if self.distance:
            self.distance.add(originals, recons[0].pixels)
        for one, recon in zip(self.scores, recons, strict=True):
            one.add(originals, recon.pixels, recon.latent_mse_B)

    def parts(self) -> _Parts:
        """For the first process, without the networks."""
        sides = self.distance.sides if self.distance else []
        return _Parts(self.digests, sides, [(one.sums, one.count) for one in self.scores])

    def merge(self, part: _Parts) -> None:
        """Add another process's."""
        self.digests |= part.digests
        if self.distance:
            self.distance.merge(part.sides)
        for one, (sums, count) in zip(self.scores, part.scores, strict=True):
            one.merge(sums, count)

    def sha256(self) -> str:
        """The identity of the originals, in order."""
        ordered = sorted(self.digests.items())
        return hashlib.sha256(b"".join(digest for _, found in ordered for digest in found)).hexdigest()


class _Parts(NamedTuple):
    """What processes tell the first one."""

    digests: dict[int, list[bytes]]
    sides: list[metrics.RunningStatistics]
    scores: list[tuple[dict[str, float], int]]


def score(
    source: ImageSource,
    tokenizer: Tokenizer,
    rulers: Rulers,
    seeds: range,
    device: torch.device,
    limit: int | None,
) -> dict[str, Any] | None:
    """Means over images and seeds, standard deviation over seeds; the Fréchet distance of the first seed alone.

    Several processes share the images; the first one answers, the others get None.
    """
    rank, processes = world()
    own, count = _Sums(rulers, seeds), len(spread(len(source), limit))
    with progress.Bar("reconstruct", count, "images") as bar:
        for indices, originals, recons in evaluate.reconstructions_by_seed(
            source, tokenizer, seeds, device, limit, (rank, processes)
        ):
            own.add(indices, originals, recons)
            bar.advance(min(len(indices) * processes, count - bar.done))
    found = gather(own.parts())
    if found is None:
        return None
    for part in found[1:]:
        own.merge(part)
    return _values(source, own, rulers, seeds)


def _values(source: ImageSource, found: _Sums, rulers: Rulers, seeds: range) -> dict[str, Any]:
    by_seed, count = [one.means() for one in found.scores], found.scores[0].count
    notes = [network.note for network in rulers.perceptual.values() if network.note]
    values: dict[str, Any] = {"n": count, "seed": seeds[0], "seeds": list(seeds), **dict.fromkeys(rulers.missing)}
    if found.distance:
        name, values[name], more = found.distance.result()
        notes += [*more, *([f"{name} is of seed {seeds[0]} alone"] if len(seeds) > 1 else [])]
    values |= {name: float(np.mean([one[name] for one in by_seed])) for name in by_seed[0]}
    spread_over = {name: float(np.std([one[name] for one in by_seed])) for name in by_seed[0]}
    return {
        **values,
        "not_computed": rulers.missing,
        "spread_over_seeds": spread_over if len(seeds) > 1 else None,
        "reference": {"name": source.spec, "count": count, "sha256": found.sha256()},
        "extractor": rulers.extractor and identity(rulers.extractor),
        "lpips": {net: {"name": one.name, "sha256": one.sha256} for net, one in rulers.perceptual.items()},
        "notes": notes,
    }

"""One pass over a set of images: everything that any score of it needs, by one or several processes.

Sets are taken in pieces of PIECE images, which are also what the cache keeps; rank r takes pieces r, r + size, ... What
the ranks have summed is merged in the first one.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rdpm_cli import progress
from rdpm_cli.errors import DataError
from rdpm_cli.evaluation import features
from rdpm_cli.evaluation.cache import Arrays, Cache
from rdpm_cli.evaluation.features import Extractor
from rdpm_cli.evaluation.metrics import RunningScore, RunningStatistics
from rdpm_cli.evaluation.reference import ImageSet, cut
from rdpm_cli.images.transform import Pixels
from rdpm_cli.step import gather, world

PIECE = 256  # images

Rows = list[tuple[int, NDArray[np.float32]]]  # place of the first image, values


@dataclass(frozen=True)
class Wanted:
    """What a pass is for, beside the statistics of the pooled features, which are always summed.

    kept: places of the images whose features are kept. score: the sums of the Inception Score. logits: all logits.
    """

    kept: Sequence[int] = ()
    spatial: bool = False
    score: bool = False
    logits: bool = False


@dataclass
class Seen:
    """What a pass found. sha256: of the pixels, image by image, in order."""

    count: int
    sha256: str
    pool: RunningStatistics
    spatial: RunningStatistics | None
    score: RunningScore | None
    features_ND: NDArray[np.float32]  # of the kept images
    logits_NK: NDArray[np.float32]  # empty unless wanted
    predicted_N: NDArray[np.int64] | None


def look(extractor: Extractor, images: ImageSet, wanted: Wanted, cache: Cache | None = None) -> Seen | None:
    """The pass. -> in the first process what was found, in the others None. Raises DataError for no images."""
    if not images.count:
        raise DataError(features.NO_IMAGES, "sample again, or name another folder")
    rank, size = world()
    own = cut(images.count, PIECE)[rank::size]
    sums = _Sums(extractor, images.count, wanted)
    with progress.Bar("look at", sum(map(len, own)), "images") as bar:
        for piece, pixels in zip(own, images.read(own), strict=True):
            sums.add(piece, *_activations(extractor, pixels, cache))
            bar.advance(len(piece))
    parts = gather(sums.found)
    return None if parts is None else _merge(parts, extractor, images.count)


def _activations(extractor: Extractor, pixels: Pixels, cache: Cache | None) -> tuple[list[bytes], Arrays]:
    """Digests of the images, and their activations, from the cache where it has them."""
    digests = features.image_digests(pixels)
    key = hashlib.sha256(b"".join(digests)).hexdigest()
    found = cache.get(key, len(pixels)) if cache else None
    if found is None:
        found = features.extract(extractor, pixels)
        if cache:
            cache.put(key, found)
    return digests, found


@dataclass
class _Found:
    """What a process has found so far."""

    digests: dict[int, list[bytes]] = field(default_factory=dict)  # by place of the first image
    features: Rows = field(default_factory=list)
    logits: Rows = field(default_factory=list)
    predicted: list[tuple[int, NDArray[np.int64]]] = field(default_factory=list)
    pool: RunningStatistics | None = None
    spatial: RunningStatistics | None = None
    score: RunningScore | None = None


class _Sums:
    """Adds pieces up."""

    def __init__(self, extractor: Extractor, count: int, wanted: Wanted) -> None:
        self.extractor, self.count, self.wanted = extractor, count, wanted
        self.kept = np.zeros(count, dtype=bool)
        self.kept[list(wanted.kept)] = True
        self.found = _Found()

    def add(self, piece: range, digests: list[bytes], values: Arrays) -> None:
        """One piece."""
        found, wanted, logits = self.found, self.wanted, values["logits"]
        found.digests[piece.start] = digests
        found.pool = found.pool or RunningStatistics(values["features"].shape[1])
        found.pool.add(values["features"])
        if wanted.spatial:
            found.spatial = found.spatial or RunningStatistics(values["spatial"].shape[1])
            found.spatial.add(values["spatial"])
        if wanted.score:
            found.score = found.score or RunningScore(self.count, logits.shape[1])
            found.score.add(piece.start, logits)
        if wanted.logits:
            found.logits.append((piece.start, logits))
        if (kept := self.kept[piece.start : piece.stop]).any():
            found.features.append((piece.start, values["features"][kept]))
        if self.extractor.class_names:
            found.predicted.append((piece.start, logits.argmax(1)))


def _merge(parts: list[_Found], extractor: Extractor, count: int) -> Seen:
    """The parts of all processes as one."""
    seen = [part for part in parts if part.pool is not None]
    whole = seen[0]
    assert whole.pool is not None
    for part in seen[1:]:
        assert part.pool is not None
        whole.pool.merge(part.pool)
        if whole.spatial and part.spatial:
            whole.spatial.merge(part.spatial)
        if whole.score and part.score:
            whole.score.merge(part.score)
    digests = {start: found for part in seen for start, found in part.digests.items()}
    ordered = b"".join(digest for start in sorted(digests) for digest in digests[start])
    predicted = _in_order([row for part in seen for row in part.predicted]) if extractor.class_names else None
    return Seen(
        count,
        hashlib.sha256(ordered).hexdigest(),
        whole.pool,
        whole.spatial,
        whole.score,
        _in_order([row for part in seen for row in part.features]),
        _in_order([row for part in seen for row in part.logits]),
        None if predicted is None else predicted.astype(np.int64),
    )


def _in_order(rows: list[tuple[int, NDArray[np.generic]]]) -> NDArray:  # type: ignore[type-arg]
    """Values of pieces, by place."""
    ordered = [values for _, values in sorted(rows, key=lambda row: row[0])]
    return np.concatenate(ordered) if ordered else np.empty((0, 0), dtype=np.float32)

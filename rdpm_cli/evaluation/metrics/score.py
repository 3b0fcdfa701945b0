"""Inception Score (Salimans et al. 2016): ADM's mean over consecutive splits, and over all images at once.

Legend: N images, K classes, S splits.
"""

import copy

import numpy as np
from numpy.typing import NDArray

from rdpm_cli.errors import DataError

SPLITS = 10  # consecutive, in file order: of 5,000 at 50,000 images, as ADM

Array = NDArray[np.float64]


def need_images(count: int, splits: int = SPLITS) -> None:
    """Raises DataError for fewer images than splits."""
    if count < splits:
        raise DataError(f"an Inception Score over {splits} splits needs as many images, not {count}", "sample more")


def log_softmax(logits_NK: NDArray[np.floating]) -> Array:
    """float64."""
    wide = logits_NK.astype(np.float64)
    wide -= wide.max(1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(1, keepdims=True))
    return wide


class RunningScore:
    """exp of the mean KL(p(y|x) || p(y)), from sums of p and of p log p over each split. Memory flat in N."""

    def __init__(self, count: int, classes: int, splits: int = SPLITS) -> None:
        """count: N, of the whole set. Raises DataError for fewer images than splits."""
        need_images(count, splits)
        self.ends = np.array([(split + 1) * count // splits for split in range(splits)])
        self.chances_SK, self.entropy_S = np.zeros((splits, classes)), np.zeros(splits)
        self.counts_S = np.zeros(splits)

    def add(self, start: int, logits_NK: NDArray[np.floating]) -> None:
        """Images start, start + 1, ... of the set, in any order of calls."""
        logs = log_softmax(logits_NK)
        chances = np.exp(logs)
        inner = (chances * logs).sum(1)
        split_N = np.searchsorted(self.ends, np.arange(start, start + len(logs)), side="right")
        for split in np.unique(split_N):
            rows = split_N == split
            self.chances_SK[split] += chances[rows].sum(0)
            self.entropy_S[split] += inner[rows].sum()
            self.counts_S[split] += rows.sum()

    def merge(self, other: "RunningScore") -> None:
        """What another process has added."""
        self.chances_SK += other.chances_SK
        self.entropy_S += other.entropy_S
        self.counts_S += other.counts_S

    def without(self, part: "RunningScore") -> "RunningScore":
        """What is left of it where a part that it holds is taken away."""
        left = copy.deepcopy(self)
        left.chances_SK -= part.chances_SK
        left.entropy_S -= part.entropy_S
        left.counts_S -= part.counts_S
        return left

    def by_split(self) -> Array:
        """The score of each split, (S,)."""
        return _scores(self.chances_SK, self.entropy_S, self.counts_S)

    def value(self) -> float:
        """ADM's: the mean over splits. Depends on the order of the images."""
        return float(self.by_split().mean())

    def order_free(self) -> float:
        """Over all images as one split: independent of their order, and larger than the mean over splits."""
        whole = (self.chances_SK.sum(0, keepdims=True), self.entropy_S.sum(keepdims=True), self.counts_S.sum())
        return float(_scores(*whole)[0])


def _scores(chances_SK: Array, entropy_S: Array, counts_S: Array) -> Array:
    """exp(mean of sum p log p - sum q log q), q the mean p: the mean KL, as p averages to q."""
    q_SK = chances_SK / np.reshape(counts_S, (-1, 1))
    logs = np.log(np.where(q_SK > 0, q_SK, 1.0))
    found: Array = np.exp(entropy_S / counts_S - (q_SK * logs).sum(1))
    return found

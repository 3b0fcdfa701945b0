"""Fréchet distance: float64 statistics, running or at once; the trace by the symmetric eigen form.

Legend: N images, D feature width.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rdpm_cli.errors import DataError

Array = NDArray[np.float64]


@dataclass
class Statistics:
    """Mean (D,) and covariance (D, D), ddof 1, of N feature vectors."""

    mean_D: Array
    covariance_DD: Array
    count: int


def statistics(features_ND: NDArray[np.floating]) -> Statistics:
    """float64 mean and covariance, ddof 1. Raises DataError for fewer than 2 images."""
    need_images(len(features_ND))
    wide = features_ND.astype(np.float64)
    return Statistics(wide.mean(0), np.atleast_2d(np.cov(wide, rowvar=False, ddof=1)), len(wide))


def need_images(count: int) -> None:
    """Raises DataError for too few to have a covariance."""
    if count < 2:
        raise DataError(f"a covariance needs at least 2 images, not {count}")


class RunningStatistics:
    """`statistics` of features that come in batches: float64, memory flat in N (Chan et al. 1979)."""

    def __init__(self, width: int) -> None:
        """width: D."""
        self.count, self.mean_D, self.scatter_DD = 0, np.zeros(width), np.zeros((width, width))

    def add(self, features_ND: NDArray[np.floating]) -> None:
        """One batch."""
        wide = features_ND.astype(np.float64)
        mean_D = wide.mean(0)
        wide -= mean_D
        self._join(len(wide), mean_D, wide.T @ wide)

    def merge(self, other: "RunningStatistics") -> None:
        """What another process has added."""
        if other.count:
            self._join(other.count, other.mean_D, other.scatter_DD)

    def without(self, features_ND: NDArray[np.floating]) -> "RunningStatistics":
        """What is left of it where features that it holds are taken away."""
        left, part = RunningStatistics(len(self.mean_D)), RunningStatistics(len(self.mean_D))
        left.merge(self)
        part.add(features_ND)
        left._join(-part.count, part.mean_D, -part.scatter_DD)
        return left

    def _join(self, count: int, mean_D: Array, scatter_DD: Array) -> None:
        step_D, total = mean_D - self.mean_D, self.count + count
        self.scatter_DD += scatter_DD
        self.scatter_DD += np.outer(step_D, step_D * (self.count * count / total))
        self.mean_D += step_D * (count / total)
        self.count = total

    def statistics(self) -> Statistics:
        """Of all batches so far. Raises DataError for fewer than 2 images."""
        need_images(self.count)
        return Statistics(self.mean_D.copy(), self.scatter_DD / (self.count - 1), self.count)


def matrix_root(covariance_DD: Array) -> Array:
    """The symmetric root of a covariance; eigenvalues that rounding made negative count as 0."""
    values, vectors = np.linalg.eigh(covariance_DD)
    root: Array = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    return root


def frechet_distance(a: Statistics, b: Statistics, root_b: Array | None = None) -> float:
    """|mu_a - mu_b|² + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) (Heusel et al. 2017), by the symmetric eigen form.

    tr (S_a S_b)^(1/2) is the sum of the roots of the eigenvalues of S_b^(1/2) S_a S_b^(1/2), which is symmetric.
    root_b: `matrix_root` of b's covariance, where it is known.

    Of covariances it is never negative. What rounding takes off, where a set meets itself, counts as 0: each of the D
    eigenvalues is off by at most the machine epsilon of the largest, so its root by at most sqrt(eps). Raises DataError
    for a value below that, or none: then one of the matrices is no covariance.
    """
    root = matrix_root(b.covariance_DD) if root_b is None else root_b
    try:
        cross = np.clip(np.linalg.eigvalsh(root @ a.covariance_DD @ root), 0, None)
    except np.linalg.LinAlgError:
        cross = np.array([np.nan])
    mean_term = np.sum((a.mean_D - b.mean_D) ** 2)
    trace = np.trace(a.covariance_DD) + np.trace(b.covariance_DD) - 2 * np.sqrt(cross).sum()
    found, rounding = float(mean_term + trace), len(cross) * np.sqrt(np.finfo(np.float64).eps * cross.max())
    if not found >= -2 * rounding:
        raise DataError(
            f"a Fréchet distance of {found:.6g}, which no two covariances have",
            "the statistics are damaged: make the reference again",
        )
    return max(found, 0.0)


def balanced_subsets(labels_N: NDArray[np.integer], size: int) -> list[NDArray[np.int64]]:
    """Disjoint class-balanced subsets of `size` rows, as many as fit: classes differ by at most one row a subset."""
    classes = np.unique(labels_N)
    queues = {c: list(np.flatnonzero(labels_N == c)) for c in classes}
    share, extra = divmod(size, len(classes))
    subsets: list[NDArray[np.int64]] = []
    while True:
        first = len(subsets) * extra
        lucky = {classes[(first + k) % len(classes)] for k in range(extra)}
        wanted = {c: share + (c in lucky) for c in classes}
        if any(len(queues[c]) < wanted[c] for c in classes):
            return subsets
        rows = [queues[c].pop(0) for c in classes for _ in range(wanted[c])]
        subsets.append(np.array(rows, dtype=np.int64))

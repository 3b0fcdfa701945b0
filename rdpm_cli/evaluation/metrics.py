"""Pure metrics: arrays in, numbers out. Statistics in float64.

Legend: N images, D feature width.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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
    _need_two(len(features_ND))
    wide = features_ND.astype(np.float64)
    return Statistics(wide.mean(0), np.atleast_2d(np.cov(wide, rowvar=False, ddof=1)), len(wide))


def _need_two(count: int) -> None:
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
        centred = wide - mean_D
        step_D, total = mean_D - self.mean_D, self.count + len(wide)
        self.scatter_DD += centred.T @ centred + np.outer(step_D, step_D) * (self.count * len(wide) / total)
        self.mean_D += step_D * (len(wide) / total)
        self.count = total

    def statistics(self) -> Statistics:
        """Of all batches so far. Raises DataError for fewer than 2 images."""
        _need_two(self.count)
        return Statistics(self.mean_D.copy(), self.scatter_DD / (self.count - 1), self.count)


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """|mu_a - mu_b|² + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) (Heusel et al. 2017), by the symmetric eigen form.

    tr (S_a S_b)^(1/2) is the sum of the roots of the eigenvalues of S_a^(1/2) S_b S_a^(1/2), which is symmetric.
    """
    values, vectors = np.linalg.eigh(a.covariance_DD)
    root_a = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    cross = np.linalg.eigvalsh(root_a @ b.covariance_DD @ root_a)
    mean_term = np.sum((a.mean_D - b.mean_D) ** 2)
    trace = np.trace(a.covariance_DD) + np.trace(b.covariance_DD) - 2 * np.sqrt(np.clip(cross, 0, None)).sum()
    return float(mean_term + trace)


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


def mean_squared_error(a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
    """Per image, on [-1, 1]: uint8 inputs of (B, 3, H, W) -> (B,)."""
    difference = (a_BCHW.double() - b_BCHW.double()) / 127.5
    return difference.pow(2).flatten(1).mean(1)


def psnr(a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
    """Per image, dB, uint8/255 with data range 1.0: (B,). Equal images give infinity."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    a, b = a_BCHW.double() / 255, b_BCHW.double() / 255
    value: Tensor = peak_signal_noise_ratio(a, b, data_range=1.0, reduction="none", dim=(1, 2, 3))
    return value


def ssim(a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
    """Per image, uint8/255 with data range 1.0, Gaussian window 11 with sigma 1.5: (B,).

    torchmetrics averages over mirrored borders too, Wang et al. over whole windows alone.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    a, b = a_BCHW.float() / 255, b_BCHW.float() / 255
    value = structural_similarity_index_measure(a, b, data_range=1.0, reduction="none")
    assert isinstance(value, Tensor)
    return torch.atleast_1d(value)

"""KID (Bińkowski et al. 2018): unbiased MMD² under the kernel (x·y / D + 1)³, over random subsets.

Legend: N images, D feature width, M images of a subset.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rdpm_cli.errors import DataError

SUBSETS, SUBSET_SIZE, SEED = 100, 1000, 2020  # torch-fidelity's

Array = NDArray[np.float64]


@dataclass(frozen=True)
class KernelDistance:
    """value: mean over subsets; spread: their standard deviation."""

    value: float
    spread: float
    subsets: int
    size: int


def kernel_distance(
    ours_ND: NDArray[np.floating], theirs_ND: NDArray[np.floating], subsets: int = SUBSETS, size: int = SUBSET_SIZE
) -> KernelDistance:
    """Over subsets of at most `size`, the draws of torch-fidelity. Raises DataError for fewer than 2 images."""
    most = min(len(ours_ND), len(theirs_ND))
    need_images(most)
    size = min(size, most)
    random = np.random.RandomState(SEED)
    values = []
    for _ in range(subsets):
        ours = ours_ND[random.choice(len(ours_ND), size, replace=False)].astype(np.float64)
        theirs = theirs_ND[random.choice(len(theirs_ND), size, replace=False)].astype(np.float64)
        values.append(mmd2(ours, theirs))
    return KernelDistance(float(np.mean(values)), float(np.std(values)), subsets, size)


def need_images(count: int) -> None:
    """Raises DataError for too few to have another beside each. count: of the smaller set."""
    if count < 2:
        raise DataError(f"a kernel distance needs at least 2 images, not {count}", "take more images")


def mmd2(x_MD: Array, y_MD: Array) -> float:
    """The unbiased estimate: without the diagonals within a set."""
    within = [_kernel(side, side) for side in (x_MD, y_MD)]
    count = len(x_MD)
    inner = sum(float(k.sum() - np.trace(k)) for k in within) / (count * (count - 1))
    return inner - 2 * float(_kernel(x_MD, y_MD).mean())


def _kernel(x_MD: Array, y_MD: Array) -> Array:
    values: Array = (x_MD @ y_MD.T / x_MD.shape[1] + 1) ** 3
    return values

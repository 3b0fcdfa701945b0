"""Precision and recall (Kynkäänniemi et al. 2019): shares inside the other set's k-nearest-neighbour balls.

Exact, in blocks; fp32 on features whose common mean is taken off, which moves no distance and keeps small ones.
Legend: N, M images, D feature width.
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rdpm_cli.errors import DataError

NEIGHBOURS = 3  # ADM's
ROWS, COLUMNS = 4096, 8192  # of a block of distances: 128 MiB


def precision_recall(
    ours_ND: NDArray[np.floating],
    theirs_MD: NDArray[np.floating],
    k: int = NEIGHBOURS,
    device: torch.device | None = None,
) -> tuple[float, float]:
    """(precision, recall). Raises DataError for sets of k images or fewer."""
    need_images(min(len(ours_ND), len(theirs_MD)), k)
    centre_D = theirs_MD.mean(0, dtype=np.float64)
    ours, theirs = (_centred(side, centre_D).to(device) for side in (ours_ND, theirs_MD))
    radii_N, radii_M = radii(ours, k), radii(theirs, k)
    precise, recalled = torch.zeros_like(radii_N, dtype=torch.bool), torch.zeros_like(radii_M, dtype=torch.bool)
    for rows, columns, distances in _blocks(ours, theirs):
        precise[rows] |= (distances <= radii_M[columns]).any(1)
        recalled[columns] |= (distances <= radii_N[rows, None]).any(0)
    return float(precise.double().mean()), float(recalled.double().mean())


def need_images(count: int, k: int = NEIGHBOURS) -> None:
    """Raises DataError for too few to have k neighbours each. count: of the smaller set."""
    if count <= k:
        raise DataError(f"precision and recall need more than {k} images, not {count}", "take more images")


def _centred(x_ND: NDArray[np.floating], centre_D: NDArray[np.float64]) -> Tensor:
    """x - centre, subtracted in float64, rounded to fp32, without a whole copy between."""
    out_ND = np.empty(x_ND.shape, dtype=np.float32)
    np.subtract(x_ND, centre_D, out=out_ND, casting="same_kind")
    return torch.from_numpy(out_ND)


def radii(x_ND: Tensor, k: int) -> Tensor:
    """Squared distance of each to its k-th nearest other, (N,)."""
    nearest_NK = torch.full((len(x_ND), k), torch.inf, device=x_ND.device)
    for rows, columns, distances in _blocks(x_ND, x_ND):
        first, last = max(rows.start, columns.start), min(rows.stop, columns.stop)
        own = torch.arange(first, max(first, last), device=x_ND.device)
        distances[own - rows.start, own - columns.start] = torch.inf  # a point is no neighbour of itself
        few = distances.topk(min(k, distances.shape[1]), largest=False).values
        nearest_NK[rows] = torch.cat([nearest_NK[rows], few], 1).topk(k, largest=False).values
    return nearest_NK.amax(1)


def _blocks(a_ND: Tensor, b_MD: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """(rows, columns, their squared distances)."""
    a_squared, b_squared = a_ND.square().sum(1), b_MD.square().sum(1)
    for row in range(0, len(a_ND), ROWS):
        rows = slice(row, min(row + ROWS, len(a_ND)))
        for column in range(0, len(b_MD), COLUMNS):
            columns = slice(column, min(column + COLUMNS, len(b_MD)))
            distances = torch.addmm(b_squared[columns], a_ND[rows], b_MD[columns].T, alpha=-2)
            yield rows, columns, distances.add_(a_squared[rows, None]).clamp_(min=0)

"""What ResGen measures of a store before it trains: rho, the size of what k masked depths add up to, and sigma_psi.

Legend: D depths, H width of a code, n rows of the store.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rdpm_cli.codes.store import CodeStore
from rdpm_cli.errors import DataError
from rdpm_cli.tokenizer.quantizer import Quantizer

MEASURED_ROWS = 8192  # training rows looked at, evenly spaced
ROWS_AT_ONCE = 256


@dataclass
class Scales:
    """RMS a dimension. rho_D1: of the sum of k masked embeddings at place k, 1 at place 0. sigma_psi: of z - z'_T."""

    rho_D1: Tensor
    sigma_psi: float
    source: str  # of sigma_psi: `latents`, or `rho` where the store keeps none


def second_moments(store: CodeStore, quantizer: Quantizer, rows: NDArray[np.int64]) -> tuple[Tensor, float | None]:
    """S_jl = mean of e_j e_l over positions and dimensions, (D, D) float64; the mean of (z - z'_T)² where z is kept."""
    spread = rows[np.linspace(0, len(rows) - 1, min(len(rows), MEASURED_ROWS)).astype(np.int64)]
    device, D = quantizer.books.device, quantizer.steps
    total, left, numbers = torch.zeros(D, D, dtype=torch.float64, device=device), 0.0, 0
    for start in range(0, len(spread), ROWS_AT_ONCE):
        own = spread[start : start + ROWS_AT_ONCE]
        codes = torch.from_numpy(store.codes(own).astype(np.int64)).to(device)
        e_DN = torch.stack([quantizer.look_up(codes[:, t - 1], t).flatten() for t in range(1, D + 1)]).double()
        total += e_DN @ e_DN.T
        numbers += e_DN.shape[1]
        if store.manifest.latents:
            z = torch.from_numpy(store.latents(own).astype(np.float32)).to(device)
            left += float((z.flatten().double() - e_DN.sum(0)).pow(2).sum())
    return total / numbers, left / numbers if store.manifest.latents else None


def rho_of(moments_DD: Tensor, coarse_first: bool) -> Tensor:
    """rho_k for k = 0..D: of the finest k depths, or of any k, by lot. (D + 1,) float32; rho_0 = 1."""
    D = len(moments_DD)
    own, all_of_it = float(moments_DD.trace()), float(moments_DD.sum())
    squares = [1.0]
    for k in range(1, D + 1):
        if coarse_first:
            squares.append(float(moments_DD[D - k :, D - k :].sum()))
        else:
            pairs = k * (k - 1) / (D * (D - 1)) if D > 1 else 0.0
            squares.append(own * k / D + (all_of_it - own) * pairs)
    return torch.tensor(squares).sqrt().float()


def measure(
    store: CodeStore, quantizer: Quantizer, rows: NDArray[np.int64], coarse_first: bool, sigma_psi: float | None
) -> Scales:
    """Of these rows. sigma_psi: as given, else RMS(z - z'_T), else rho_1 / 2. Raises DataError where a rho is 0."""
    moments, left = second_moments(store, quantizer, rows)
    rho = rho_of(moments, coarse_first)
    if not bool((rho > 0).all()):
        raise DataError(
            f"{store.root}: the finest codes all stand for 0, so there is nothing to learn at their depth",
            "train the tokenizer longer, or with fewer quantizer.steps, and tokenize again",
        )
    if sigma_psi is not None:
        return Scales(rho, sigma_psi, "recipe")
    if left:
        return Scales(rho, left**0.5, "latents")
    return Scales(rho, 0.5 * float(rho[1]), "rho")

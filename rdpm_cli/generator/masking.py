"""ResGen's masks over positions × depths (arXiv 2412.10208).

Legend: B images, L positions, D depths, a slot is one (position, depth); S sampling steps; N slots that may be masked.
A mask is True where a token is masked. `coarse-to-fine` masks the finest depths first, so that a mask is closed under
depth; `random` masks any depths.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from rdpm_cli.generator.config import MaskSchedule


def gamma(schedule: MaskSchedule, r: float, slots: int) -> float:
    """The share masked at r in [0, 1], from 1 to 0. slots: N, for `exp`, which ends at one slot and not at none."""
    rules: dict[MaskSchedule, Callable[[], float]] = {
        "square": lambda: 1 - r * r,
        "cosine": lambda: math.cos(math.pi * r / 2),
        "circle": lambda: math.sqrt(max(0.0, 1 - r * r)),
        "exp": lambda: 1 - 2 ** (-math.log2(max(slots, 1)) * (1 - r)),
        "linear": lambda: 1 - r,
    }
    return rules[schedule]()


def masked_count(schedule: MaskSchedule, r: float, slots: int) -> int:
    """n = ceil(gamma(r) N), at least 1: how many slots a training example masks."""
    return min(slots, max(1, math.ceil(gamma(schedule, r, slots) * slots)))


def sampling_counts(schedule: MaskSchedule, steps: int, slots: int) -> list[int]:
    """n_0 = N > n_1 > ... > n_S = 0: how many slots are masked after each step. Needs 1 <= S <= N."""
    counts = [slots]
    for t in range(1, steps):
        target = math.floor(gamma(schedule, t / steps, slots) * slots)
        counts.append(min(counts[-1] - 1, max(steps - t, target)))
    return [*counts, 0]


def first_slots(keys_BLD: Tensor, open_BLD: Tensor, count_B: Tensor) -> Tensor:
    """The `count` open slots of each image with the smallest keys, the earlier one on a tie. (B, L, D) bool.

    With uniform keys this draws the slots of a position in number by the multivariate hypergeometric distribution.
    """
    B = len(keys_BLD)
    keys_BN = keys_BLD.masked_fill(~open_BLD, math.inf).reshape(B, -1)
    rank_BN = keys_BN.argsort(dim=1, stable=True).argsort(dim=1)
    return (rank_BN < count_B.view(B, 1)).view_as(keys_BLD) & open_BLD


def finest(count_BL: Tensor, depths: int) -> Tensor:
    """The mask whose highest `count` depths are masked: True where j >= D - k. (B, L, D) bool."""
    return torch.arange(depths, device=count_BL.device) >= depths - count_BL.unsqueeze(-1)


def mask_tokens(keys_BLD: Tensor, count_B: Tensor, coarse_first: bool) -> Tensor:
    """A training mask of `count` slots an image: k_i a position by lot, then its finest k_i, or the drawn ones."""
    drawn = first_slots(keys_BLD, torch.ones_like(keys_BLD, dtype=torch.bool), count_B)
    return finest(drawn.sum(-1), drawn.shape[-1]) if coarse_first else drawn


def reveal(masked_BLD: Tensor, scores_BLD: Tensor, count_B: Tensor, coarse_first: bool) -> Tensor:
    """The mask after the `count` best masked slots of each image are revealed.

    coarse_first: a position reveals as many depths as it has best slots, its coarsest masked ones.
    """
    revealed = first_slots(-scores_BLD, masked_BLD, count_B)
    return finest((masked_BLD & ~revealed).sum(-1), masked_BLD.shape[-1]) if coarse_first else masked_BLD & ~revealed

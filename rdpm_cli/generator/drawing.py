"""From logits to codes: guidance, temperature, top-k and top-p, and the draw itself.

Legend: B rows, S positions, K codes, t = 1..T, u = (t - 1) / (T - 1) from 0 at t = 1 to 1 at t = T (1 where T = 1).
Noise is addressed by (seed, index, t), so a row does not depend on its neighbours.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rdpm_cli import noise
from rdpm_cli.generator.config import RDPMSampling


def progress_at(t: int, steps: int) -> float:
    """u."""
    return (t - 1) / (steps - 1) if steps > 1 else 1.0


def guidance_at(
    t: int, steps: int, cfg: float, schedule: str, *, power: float = 2.0, first: int = 1, last: int | None = None
) -> float:
    """lambda_t of a schedule, for lambda = cfg.

    - constant: lambda (arXiv 2207.12598).
    - linear: lambda u (arXiv 2301.00704, Muse; RDPM's own, arXiv 2412.18390, Table 3).
    - cosine: lambda (1 - cos(pi u)) / 2 (arXiv 2303.14389, MDT, at exponent 1).
    - power: lambda u^power: late steps alone for a large one, `linear` for 1.
    - interval: lambda for first <= t <= last, else 0; last = T by default (arXiv 2404.07724).
    """
    u = progress_at(t, steps)
    shapes = {
        "constant": 1.0,
        "linear": u,
        "cosine": (1 - math.cos(math.pi * u)) / 2,
        "power": u**power,
        "interval": float(first <= t <= (last or steps)),
    }
    return cfg * shapes[schedule]


def tau_at(t: int, steps: int, tau: float, end: float | None) -> float:
    """The inverse temperature of step t: tau, or (1 - u) tau + u end."""
    return tau if end is None else tau + progress_at(t, steps) * (end - tau)


def guide(cond: Tensor, uncond: Tensor, lambda_t: float) -> Tensor:
    """(1 + lambda) cond - lambda uncond. Others' scale is s = 1 + lambda."""
    return cond + lambda_t * (cond - uncond)


def to_device(values: NDArray[np.float32], device: torch.device) -> Tensor:
    """Host values on the device; a GPU goes on computing meanwhile."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def narrow(logits_BSK: Tensor, top_k: int, top_p: float) -> Tensor:
    """-inf for all codes but those that may be drawn.

    top_k: the k largest logits, and what equals the smallest of them; 0 = all. top_p: of these the fewest, largest
    first, whose probabilities sum up to at least p, so never none; 1 = all (nucleus sampling, arXiv 1904.09751).
    """
    if 0 < top_k < logits_BSK.shape[-1]:
        least = logits_BSK.topk(top_k, -1).values[..., -1:]
        logits_BSK = logits_BSK.masked_fill(logits_BSK < least, -torch.inf)
    if top_p < 1:
        ordered, order = logits_BSK.sort(dim=-1, descending=True, stable=True)
        chance = ordered.softmax(-1)
        likelier = chance.cumsum(-1) - chance  # probability of all likelier codes
        beyond = torch.zeros_like(likelier, dtype=torch.bool).scatter(-1, order, likelier >= top_p)
        beyond = beyond.scatter(-1, order[..., :1], False)  # the likeliest stays, whatever rounding says
        logits_BSK = logits_BSK.masked_fill(beyond, -torch.inf)
    return logits_BSK


def draw(logits_BSK: Tensor, sampling: RDPMSampling, indices: Sequence[int], t: int, seed: int) -> Tensor:
    """Codes (B, S) int64 from softmax(logits), where tau is in the logits already; or the likeliest.

    gumbel: argmax(logits + Gumbel), K numbers a position. inverse: the first code at which the cumulative
    probability exceeds a uniform number, one a position: the same distribution, without the cost of the noise.
    """
    if sampling.draw == "argmax":
        return logits_BSK.argmax(-1)
    _, S, K = logits_BSK.shape
    if sampling.draw == "gumbel":
        rows = [
            (row + to_device(noise.gumbel(seed, index, t, (S, K)), row.device)).argmax(-1)
            for row, index in zip(logits_BSK, indices, strict=True)
        ]
        return torch.stack(rows)
    uniform = np.stack([noise.stream("uniform", seed, index, 0, t).random((S, 1), np.float32) for index in indices])
    cumulative = logits_BSK.softmax(-1).cumsum(-1)
    threshold = to_device(uniform, logits_BSK.device) * cumulative[..., -1:]
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1).clamp_(max=K - 1)

"""Classifier-free guidance: logits = cond + lambda_t (cond - uncond), when it is on, and tau over the steps.

Legend: t = 1..T, u = (t - 1) / (T - 1) from 0 at t = 1 to 1 at t = T (1 where T = 1).
"""

import math

from torch import Tensor


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

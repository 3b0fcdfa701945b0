"""Classifier-free guidance: logits = cond + lambda_t (cond - uncond), and when it is on."""

from torch import Tensor


def guidance_at(t: int, steps: int, cfg: float, schedule: str) -> float:
    """lambda_t: `constant`, or `linear` from 0 at t = 1 to lambda at t = T (lambda where T = 1)."""
    if schedule == "constant" or steps == 1:
        return cfg
    return cfg * (t - 1) / (steps - 1)


def guide(cond: Tensor, uncond: Tensor, lambda_t: float) -> Tensor:
    """(1 + lambda) cond - lambda uncond. Others' scale is s = 1 + lambda."""
    return cond + lambda_t * (cond - uncond)

"""Noise schedules alpha_t, t = 1..T (arXiv 2412.18390 §3.1 and Table 4). alpha_t² + beta_t² = 1 and alpha_T = 1."""

import math
from collections.abc import Callable

from rdpm_cli.config import ScheduleConfig


def alphas(schedule: ScheduleConfig, steps: int) -> list[float]:
    """alpha_1..alpha_T. `pow`: base^(T-t); `linear`: t/T; `sin`: sin(pi t / 2T); `rvq`: 1, plain residual VQ."""
    rules: dict[str, Callable[[int], float]] = {
        "pow": lambda t: schedule.base ** (steps - t),
        "linear": lambda t: t / steps,
        "sin": lambda t: math.sin(math.pi * t / (2 * steps)),
        "rvq": lambda t: 1.0,
    }
    return [rules[schedule.kind](t) for t in range(1, steps)] + [1.0]


def beta(alpha_t: float) -> float:
    """beta_t = sqrt(1 - alpha_t²)."""
    return math.sqrt(1.0 - alpha_t * alpha_t)

"""From logits to codes: guidance, temperature, top-k and top-p, and the draw itself.

Legend: B rows, S positions, K codes, t = 1..T, u = (t - 1) / (T - 1) from 0 at t = 1 to 1 at t = T (1 where T = 1)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rdpm_cli import noise


def guidance_at(
    t: int, steps: int, cfg: float, schedule: str, power: float = 2.0, first: int = 1, last: int | None = None
) -> float:
    """lambda_t of a schedule, for lambda = cfg. interval: guided for first <= t <= last, T by default."""
    u = (t - 1) / (steps - 1) if steps > 1 else 1.0
    shapes = {
        "constant": 1.0,  # arXiv 2207.12598
        "linear": u,  # arXiv 2301.00704, Muse; RDPM's own, arXiv 2412.18390, Table 3
        "cosine": (1 - math.cos(math.pi * u)) / 2,  # arXiv 2303.14389, MDT, at exponent 1
        "power": u**power,
        "interval": float(first <= t <= (last or steps)),  # arXiv 2404.07724
    }
    return cfg * shapes[schedule]


def tau_at(t: int, steps: int, tau: float, end: float | None) -> float:
    """The inverse temperature of step t: tau, or (1 - u) tau + u end."""
    return tau if end is None else tau + guidance_at(t, steps, end - tau, "linear")


def guide(both: Tensor, lambda_t: float) -> Tensor:
    """(1 + lambda) cond - lambda uncond of the first and the second half of the rows. Others' scale is 1 + lambda."""
    cond, uncond = both.chunk(2)
    return cond + lambda_t * (cond - uncond)


def to_device(values: noise.Floats | Tensor, device: torch.device) -> Tensor:
    """Host values on the device; a GPU goes on computing meanwhile."""
    tensor = torch.as_tensor(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def narrow(logits_BSK: Tensor, top_k: int, top_p: float) -> Tensor:
    """-inf for all codes but the k largest logits (0 = all), and of these the fewest of probability p (1 = all)."""
    if 0 < top_k < logits_BSK.shape[-1]:
        least = logits_BSK.topk(top_k, -1).values[..., -1:]
        logits_BSK = logits_BSK.masked_fill(logits_BSK < least, -torch.inf)
    if top_p < 1:  # nucleus sampling, arXiv 1904.09751
        ordered, order = logits_BSK.sort(dim=-1, descending=True, stable=True)
        chance = ordered.softmax(-1)
        beyond = chance.cumsum(-1) - chance >= top_p  # all likelier codes are enough
        beyond[..., 0] = False  # the likeliest stays, whatever rounding says
        logits_BSK = logits_BSK.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -torch.inf)
    return logits_BSK


def draw(logits_BSK: Tensor, kind: str, indices: Sequence[int], t: int, seed: int) -> Tensor:
    """Codes (B, S) int64 from softmax(logits), where tau is in the logits already; or the likeliest. kind: `draw`."""
    if kind == "argmax":
        return logits_BSK.argmax(-1)
    (_, S, K), device = logits_BSK.shape, logits_BSK.device
    if kind == "gumbel":
        rows = zip(logits_BSK, indices, strict=True)
        noisy = (row + to_device(noise.gumbel(seed, index, t, (S, K)), device) for row, index in rows)
        return torch.stack([row.argmax(-1) for row in noisy])
    # The code at which the cumulative probability passes a uniform number.
    uniform = noise.uniform_rows("uniform", seed, indices, [0] * len(indices), t, (S, 1))
    cumulative = logits_BSK.softmax(-1).cumsum(-1)
    threshold = to_device(uniform, device) * cumulative[..., -1:]
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1).clamp_(max=K - 1)

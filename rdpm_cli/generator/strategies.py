"""From logits to codes: who may be drawn, with which noise. What a step looked like.

Legend: B images, L positions, K codes, T steps. Noise is addressed by (seed, index, t), so a row depends on its own.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rdpm_cli import noise
from rdpm_cli.config import RDPMSampling


def to_device(values: NDArray[np.float32] | Sequence[int], device: torch.device) -> Tensor:
    """Host values on the device; a GPU goes on computing meanwhile."""
    tensor = torch.from_numpy(values) if isinstance(values, np.ndarray) else torch.tensor(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def narrow(logits_BLK: Tensor, top_k: int, top_p: float) -> Tensor:
    """-inf for all codes but those that may be drawn.

    top_k: the k largest logits, and what equals the smallest of them; 0 = all. top_p: of these the fewest, largest
    first, whose probabilities sum up to at least p, so never none; 1 = all (nucleus sampling, arXiv 1904.09751).
    """
    if 0 < top_k < logits_BLK.shape[-1]:
        least = logits_BLK.topk(top_k, -1).values[..., -1:]
        logits_BLK = logits_BLK.masked_fill(logits_BLK < least, -torch.inf)
    if top_p < 1:
        ordered, place = logits_BLK.sort(dim=-1, descending=True, stable=True)
        chance = ordered.softmax(-1)
        before = chance.cumsum(-1) - chance  # of the codes that are likelier
        beyond = torch.zeros_like(before, dtype=torch.bool).scatter(-1, place, before >= top_p)
        beyond = beyond.scatter(-1, place[..., :1], False)  # the likeliest stays, whatever rounding says
        logits_BLK = logits_BLK.masked_fill(beyond, -torch.inf)
    return logits_BLK


def draw(logits_BLK: Tensor, how: RDPMSampling, indices: Sequence[int], t: int, seed: int) -> Tensor:
    """Codes (B, L) int64 from softmax(logits), where tau is in the logits already; or the likeliest.

    gumbel: argmax(logits + Gumbel), K numbers a position. inverse: the first code at which the cumulative
    probability exceeds a uniform number, one a position: the same distribution, without the cost of the noise.
    """
    if how.draw == "argmax":
        return logits_BLK.argmax(-1)
    _, L, K = logits_BLK.shape
    if how.draw == "gumbel":
        drawn = [
            (row + to_device(noise.gumbel(seed, index, t, (L, K)), row.device)).argmax(-1)
            for row, index in zip(logits_BLK, indices, strict=True)
        ]
        return torch.stack(drawn)
    uniform = np.stack([noise.stream("uniform", seed, index, 0, t).random((L, 1), np.float32) for index in indices])
    cumulative = logits_BLK.softmax(-1).cumsum(-1)
    wanted = to_device(uniform, logits_BLK.device) * cumulative[..., -1:]
    return torch.searchsorted(cumulative, wanted, right=True).squeeze(-1).clamp_(max=K - 1)


def look(logits_BLK: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over positions of the entropy of softmax(logits) in nats, and of its largest probability: (B,) each."""
    log_p = logits_BLK.log_softmax(-1)
    entropy = torch.special.entr(log_p.exp()).sum(-1)
    return entropy.mean(-1), log_p.amax(-1).exp().mean(-1)

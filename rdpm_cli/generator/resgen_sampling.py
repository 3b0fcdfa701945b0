"""The steps of ResGen's sampling: drawing tokens, their confidence, how many are revealed.

Legend: B images, L positions, D depths, V codes a book, H width of a code, K components, n steps. A slot is one
(position, depth). Every draw of sample `index` at step t comes from a stream of (seed, index, t, purpose).
"""

import numpy as np
import torch
from torch import Tensor

from rdpm_cli import noise
from rdpm_cli.errors import UsageError
from rdpm_cli.generator import mixture
from rdpm_cli.generator.config import ResGenSampling
from rdpm_cli.generator.contract import Known
from rdpm_cli.generator.drawing import guidance_at
from rdpm_cli.generator.masking import sampling_counts
from rdpm_cli.generator.mixture import Mixture
from rdpm_cli.tokenizer.quantizer import Quantizer, Search

GREEDIEST = 1e-4  # the temperature used for 0 where tokens are drawn by it


def starting_point(
    count: int, shape: tuple[int, int], device: torch.device, known: Known | None, coarse_first: bool
) -> tuple[Tensor, Tensor]:
    """Codes and mask before the first step, (B, L, D) each. Raises UsageError for fine codes known without coarse."""
    if known is None:
        masked = torch.ones(count, *shape, dtype=torch.bool, device=device)
        return torch.zeros_like(masked, dtype=torch.int64), masked
    codes, masked = known.codes_BTS.transpose(1, 2), ~known.keep_BTS.transpose(1, 2)
    if coarse_first and bool((masked[..., :-1] & ~masked[..., 1:]).any()):
        raise UsageError(
            "some known codes have coarser codes that are not known", "give the coarsest depths of a position"
        )
    return codes.to(device), masked.to(device)


def masked_counts(sampling: ResGenSampling, masked_BLD: Tensor) -> Tensor:
    """How many slots of each image are masked before the first step and after each, (B, n + 1)."""
    rows = []
    for slots in masked_BLD.flatten(1).sum(1).tolist():
        # An image with fewer masked slots than steps reveals one a step and has nothing to do in the last ones.
        counts = sampling_counts(sampling.schedule, min(sampling.steps, slots), slots) if slots else [0]
        rows.append(counts + [0] * (sampling.steps + 1 - len(counts)))
    return torch.tensor(rows, device=masked_BLD.device)


def lambda_at(t: int, sampling: ResGenSampling) -> float:
    """Guidance of step t = 1..n."""
    return guidance_at(t, sampling.steps, sampling.cfg, sampling.cfg_schedule)


def temperature_at(t: int, sampling: ResGenSampling) -> float:
    """Factor of the noise on the confidence: tau (1 - t / n), or tau."""
    return sampling.conf_temp * (1 - t / sampling.steps) if sampling.conf_anneal else sampling.conf_temp


def requantise(quantizer: Quantizer, searches: list[Search], z_BLH: Tensor, masked_BLD: Tensor) -> Tensor:
    """Tokens of the masked depths by residual quantisation of z, coarsest first; elsewhere 0. (B, L, D) int64.

    Visible tokens play no part: z is what the masked ones should add up to. searches: one a depth.
    """
    codes, residual = torch.zeros_like(masked_BLD, dtype=torch.int64), z_BLH.clone()
    for depth, search in enumerate(searches):
        rows = masked_BLD[..., depth]
        if bool(rows.any()):
            nearest = search.nearest(residual[rows])
            residual[rows] -= quantizer.book(depth + 1)[nearest]
            codes[..., depth][rows] = nearest
    return codes


def standardise(values_BL: Tensor, open_BL: Tensor) -> Tensor:
    """z-scores over an image's open positions, since densities of different k have different scales."""
    count = open_BL.sum(1, keepdim=True).clamp_min(1)
    mean = (values_BL * open_BL).sum(1, keepdim=True) / count
    spread = (((values_BL - mean) * open_BL).pow(2).sum(1, keepdim=True) / count).sqrt()
    return (values_BL - mean) / spread.clamp_min(1e-6)


class Drawer:
    """The draws of one micro-batch: tokens of all masked slots, and how sure the positions are of them."""

    def __init__(self, quantizer: Quantizer, sampling: ResGenSampling, seed: int, indices: list[int]) -> None:
        self.quantizer, self.sampling, self.seed, self.indices = quantizer, sampling, seed, indices
        searches = [Search(book) for book in quantizer.books]
        self.searches = searches if len(searches) > 1 else searches * quantizer.steps  # one shared book, or one a depth

    def vectors(self, t: int, mix: Mixture, rho_BL: Tensor, masked_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """A vector from the mixture, requantised. -> tokens (B, L, D), confidence (B, L)."""
        views, (_, L, H), device = [0] * len(self.indices), mix.shift_BLH.shape, mix.shift_BLH.device
        component = mixture.draw(mixture.nucleus(mix.logits_BLK, self.sampling.top_p), self._uniform(t, (L,), device))
        eps = noise.normal_rows("sample", self.seed, self.indices, views, [t] * len(views), (L, H))
        w = mixture.vector_of(mix, component, torch.from_numpy(eps).to(device), self.sampling.z_temp)
        tokens = requantise(self.quantizer, self.searches, w * rho_BL.unsqueeze(-1), masked_BLD)
        log_pi = mix.logits_BLK.log_softmax(-1).gather(-1, component.unsqueeze(-1)).squeeze(-1)
        return tokens, self._confidence(mixture.log_density(mix, w), log_pi, masked_BLD)

    def tokens(self, t: int, logits_BLDV: Tensor, masked_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """Each slot's token by itself. -> tokens (B, L, D), confidence (B, L)."""
        logits = logits_BLDV / max(self.sampling.z_temp, GREEDIEST)
        uniform = self._uniform(t, tuple(masked_BLD.shape[1:]), logits.device)
        tokens = mixture.draw(mixture.nucleus(logits, self.sampling.top_p), uniform)
        log_p = logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        mean = (log_p * masked_BLD).sum(-1) / masked_BLD.sum(-1).clamp_min(1)
        return tokens, self._confidence(mean, mean, masked_BLD)

    def _confidence(self, log_density: Tensor, log_pi: Tensor, masked_BLD: Tensor) -> Tensor:
        """By which positions are revealed first, (B, L)."""
        if self.sampling.conf == "rand":
            return torch.zeros_like(log_pi)
        return log_pi if self.sampling.conf == "comp" else standardise(log_density, masked_BLD.any(-1))

    def gumbel(self, t: int, masked_BLD: Tensor) -> Tensor:
        """Gumbel noise of every slot, (B, L, D)."""
        rows = np.stack([noise.gumbel(self.seed, index, t, masked_BLD.shape[1:]) for index in self.indices])
        return torch.from_numpy(rows).to(masked_BLD.device)

    def _uniform(self, t: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
        rows = noise.uniform_rows("component", self.seed, self.indices, [0] * len(self.indices), t, shape)
        return torch.from_numpy(rows).to(device)

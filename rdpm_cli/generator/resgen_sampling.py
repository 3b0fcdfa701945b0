"""How ResGen samples: predict, requantise, reveal the most confident, S times (specification §7 and §8).

Legend: B images, L positions, D depths, V codes a book, H width of a code, K components. A slot is one (position,
depth). Every draw of sample `index` at step t comes from a stream of (seed, index, t, what it is for).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from rdpm_cli import noise
from rdpm_cli.config import ResGenSampling
from rdpm_cli.errors import UsageError
from rdpm_cli.generator import mixture
from rdpm_cli.generator.contract import Known, SampleOptions
from rdpm_cli.generator.guidance import guidance_at, guide
from rdpm_cli.generator.masking import reveal, sampling_counts
from rdpm_cli.tokenizer.quantizer import Quantizer, Search

if TYPE_CHECKING:
    from rdpm_cli.generator.resgen import ResGen

GREEDIEST = 1e-4  # temperature that stands for 0 where tokens are drawn


def sampling_of(options: SampleOptions) -> ResGenSampling:
    """The options' sampling section, which is ResGen's here."""
    assert isinstance(options.sampling, ResGenSampling)
    return options.sampling


def to_slots(x_BTHW: Tensor) -> Tensor:
    """(B, T, H, W) -> (B, L, D)."""
    return x_BTHW.flatten(2).transpose(1, 2)


def to_codes(x_BLD: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, L, D) -> (B, T, H, W)."""
    return x_BLD.transpose(1, 2).unflatten(2, grid)


def requantise(quantizer: Quantizer, searches: list[Search], z_BLH: Tensor, masked_BLD: Tensor) -> Tensor:
    """Tokens of the masked depths by residual quantisation of z alone, coarsest first; elsewhere 0. (B, L, D) int64.

    Visible tokens play no part: z is what the masked ones should add up to.
    """
    codes, left = torch.zeros_like(masked_BLD, dtype=torch.int64), z_BLH.clone()
    for depth, search in enumerate(searches):
        place = masked_BLD[..., depth]
        if bool(place.any()):
            found = search.nearest(left[place])
            left[place] -= quantizer.book(depth + 1)[found]
            codes[..., depth][place] = found
    return codes


def standardise(values_BL: Tensor, open_BL: Tensor) -> Tensor:
    """z-scores over an image's open positions. Densities of different k have different scales."""
    count = open_BL.sum(1, keepdim=True).clamp_min(1)
    mean = (values_BL * open_BL).sum(1, keepdim=True) / count
    spread = (((values_BL - mean) * open_BL).pow(2).sum(1, keepdim=True) / count).sqrt()
    return (values_BL - mean) / spread.clamp_min(1e-6)


def sample(family: ResGen, labels_B: Tensor, indices: list[int], options: SampleOptions, known: Known | None) -> Tensor:
    """codes (B, T, h, w) int64. A revealed token stays; all sums that are still masked are predicted anew each step."""
    how, device = sampling_of(options), labels_B.device
    shape = (family.grid[0] * family.grid[1], family.quantizer.steps)
    codes, masked = _begin(len(indices), shape, device, known)
    coarse_first = bool(family.network.get_buffer("coarse_first"))
    if coarse_first and bool((masked[..., :-1] & ~masked[..., 1:]).any()):
        raise UsageError("codes are known at depths whose coarser ones are not", "give the coarsest depths of a place")
    counts = torch.tensor([_counts(how, int(n)) for n in masked.flatten(1).sum(1)], device=device)
    drawer = _Drawer(family, how, options.seed, indices, device)
    for t in range(1, how.steps + 1):
        drawn, confidence = drawer.step(t, to_codes(codes, family.grid), masked, labels_B)
        codes = torch.where(masked, drawn, codes)
        scores = confidence.unsqueeze(-1) + _temperature(how, t) * drawer.gumbel(t, shape)
        masked = reveal(masked, scores, counts[:, t - 1] - counts[:, t], coarse_first)
    return to_codes(codes, family.grid)


def _begin(count: int, shape: tuple[int, int], device: torch.device, known: Known | None) -> tuple[Tensor, Tensor]:
    """Codes and mask before the first step: (B, L, D) each."""
    if known is None:
        masked = torch.ones(count, *shape, dtype=torch.bool, device=device)
        return torch.zeros_like(masked, dtype=torch.int64), masked
    return to_slots(known.codes_BTHW).to(device), ~to_slots(known.keep_BTHW).to(device)


def _counts(how: ResGenSampling, slots: int) -> list[int]:
    """n_0..n_S of an image. One with fewer open slots than steps reveals one a step, and is done early."""
    counts = sampling_counts(how.schedule, min(how.steps, slots), slots) if slots else [0]
    return counts + [0] * (how.steps + 1 - len(counts))


def lambda_at(t: int, how: ResGenSampling) -> float:
    """Guidance of step t = 1..S."""
    return guidance_at(t, how.steps, how.cfg, how.cfg_schedule)


def _temperature(how: ResGenSampling, t: int) -> float:
    """tau_t = tau (1 - t / S), or tau."""
    return how.conf_temp * (1 - t / how.steps) if how.conf_anneal else how.conf_temp


class _Drawer:
    """The draws of one call: codes of all masked slots, and how sure they are."""

    def __init__(
        self, family: ResGen, how: ResGenSampling, seed: int, indices: list[int], device: torch.device
    ) -> None:
        self.family, self.how, self.seed, self.indices, self.device = family, how, seed, indices, device
        quantizer = family.quantizer
        shared = [Search(book) for book in quantizer.books]
        self.searches = shared if len(shared) > 1 else shared * quantizer.steps

    def step(self, t: int, codes_BTHW: Tensor, masked_BLD: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
        """-> tokens (B, L, D), right where masked; confidence (B, L)."""
        visible, _ = self.family.masked_sums(self.family.embed(codes_BTHW), masked_BLD)
        lambda_t = lambda_at(t, self.how)
        given = (visible, masked_BLD, labels_B)
        if lambda_t:
            null = torch.full_like(labels_B, self.family.classes)
            given = visible.repeat(2, 1, 1), masked_BLD.repeat(2, 1, 1), torch.cat([labels_B, null])
        direct = self.family.cfg.network.target == "direct"
        drawn, logp, log_pi = (self._tokens if direct else self._vectors)(t, given, lambda_t, masked_BLD)
        if self.how.conf == "rand":
            return drawn, torch.zeros_like(logp)
        return drawn, log_pi if self.how.conf == "comp" else standardise(logp, masked_BLD.any(-1))

    def _vectors(
        self, t: int, given: tuple[Tensor, Tensor, Tensor], lambda_t: float, masked_BLD: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A vector from the mixture, requantised. -> tokens, its log-density, log pi of its component."""
        mix = self.family.predict(*given)
        if lambda_t:
            cond, uncond = mix.halves()
            mix = cond.guided(uncond, lambda_t, means=self.how.cfg_mode == "both")
        rho_BL, _ = self.family.units(masked_BLD)
        L, H = mix.shift_BLH.shape[1:]
        component = mixture.draw(mixture.nucleus(mix.logits_BLK, self.how.top_p), self._uniform(t, (L,)))
        w = mixture.vector_of(mix, component, self._normal(t, (L, H)), self.how.z_temp)
        drawn = requantise(self.family.quantizer, self.searches, w * rho_BL.unsqueeze(-1), masked_BLD)
        log_pi = mix.logits_BLK.log_softmax(-1).gather(-1, component.unsqueeze(-1)).squeeze(-1)
        return drawn, mixture.log_density(mix, w), log_pi

    def _tokens(
        self, t: int, given: tuple[Tensor, Tensor, Tensor], lambda_t: float, masked_BLD: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Each masked slot's token by itself. -> tokens, and twice their mean log-probability a position."""
        logits = self.family.predict_tokens(*given)
        if lambda_t:
            cond, uncond = logits.chunk(2)
            logits = guide(cond, uncond, lambda_t)
        logits = logits / max(self.how.z_temp, GREEDIEST)
        drawn = mixture.draw(mixture.nucleus(logits, self.how.top_p), self._uniform(t, masked_BLD.shape[1:]))
        own = logits.log_softmax(-1).gather(-1, drawn.unsqueeze(-1)).squeeze(-1)
        mean = (own * masked_BLD).sum(-1) / masked_BLD.sum(-1).clamp_min(1)
        return drawn, mean, mean

    def _uniform(self, t: int, shape: tuple[int, ...]) -> Tensor:
        views = [0] * len(self.indices)
        drawn = noise.uniform_rows("component", self.seed, self.indices, views, t, shape)
        return torch.from_numpy(drawn).to(self.device)

    def _normal(self, t: int, shape: tuple[int, int]) -> Tensor:
        none, ts = [0] * len(self.indices), [t] * len(self.indices)
        return torch.from_numpy(noise.normal_rows("sample", self.seed, self.indices, none, ts, shape)).to(self.device)

    def gumbel(self, t: int, shape: tuple[int, int]) -> Tensor:
        """Gumbel noise of every slot, (B, L, D)."""
        drawn = np.stack([noise.gumbel(self.seed, index, t, shape) for index in self.indices])
        return torch.from_numpy(drawn).to(self.device)

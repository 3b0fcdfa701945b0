"""How ResGen samples: predict, requantise, reveal the most confident, S times (specification §7 and §8).

Legend: B images, L positions, D depths, V codes a book, H width of a code, K components. A slot is one (position,
depth). Every draw of sample `index` at step t comes from a stream of (seed, index, t, what it is for).
"""

import math
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from rdpm_cli import noise
from rdpm_cli.errors import UsageError
from rdpm_cli.generator import mixture
from rdpm_cli.generator.config import ResGenArchitecture, ResGenSampling
from rdpm_cli.generator.contract import Condition, Known, SampleOptions
from rdpm_cli.generator.drawing import guidance_at, guide
from rdpm_cli.generator.masking import reveal, sampling_counts
from rdpm_cli.generator.mixture import Mixture
from rdpm_cli.tokenizer.quantizer import Quantizer, Search

GREEDIEST = 1e-4  # the temperature used for 0 where tokens are drawn


class MaskedModel(Protocol):
    """The parts of the family (`resgen.ResGen`) that sampling uses."""

    cfg: ResGenArchitecture
    quantizer: Quantizer
    coarse_first: bool

    def embed(self, codes_BTS: Tensor) -> Tensor: ...
    def masked_sums(self, embedded_BLDH: Tensor, masked_BLD: Tensor) -> tuple[Tensor, Tensor]: ...
    def units(self, masked_BLD: Tensor) -> tuple[Tensor, Tensor]: ...
    def predict(self, visible_BLH: Tensor, masked_BLD: Tensor, condition: Condition) -> Mixture: ...
    def predict_tokens(self, visible_BLH: Tensor, masked_BLD: Tensor, condition: Condition) -> Tensor: ...
    def null_condition(self, count: int) -> Condition: ...


def sampling_of(options: SampleOptions) -> ResGenSampling:
    """The options' sampling section, which is ResGen's here."""
    assert isinstance(options.sampling, ResGenSampling)
    return options.sampling


def to_slots(x_BTS: Tensor) -> Tensor:
    """(B, T, S) -> (B, L, D); its own inverse."""
    return x_BTS.transpose(1, 2)


def requantise(quantizer: Quantizer, searches: list[Search], z_BLH: Tensor, masked_BLD: Tensor) -> Tensor:
    """Tokens of the masked depths by residual quantisation of z alone, coarsest first; elsewhere 0. (B, L, D) int64.

    Visible tokens play no part: z is what the masked ones should add up to.
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
    """z-scores over an image's open positions. Densities of different k have different scales."""
    count = open_BL.sum(1, keepdim=True).clamp_min(1)
    mean = (values_BL * open_BL).sum(1, keepdim=True) / count
    spread = (((values_BL - mean) * open_BL).pow(2).sum(1, keepdim=True) / count).sqrt()
    return (values_BL - mean) / spread.clamp_min(1e-6)


def sample(
    family: MaskedModel, condition: Condition, indices: list[int], options: SampleOptions, known: Known | None
) -> Tensor:
    """codes (B, T, S) int64. Revealed tokens stay; the sums of all masked ones are predicted again at each step."""
    sampling, device = sampling_of(options), condition.vector_BD.device
    shape = (math.prod(family.quantizer.grid), family.quantizer.steps)
    codes, masked = _begin(len(indices), shape, device, known)
    coarse_first = family.coarse_first
    if coarse_first and bool((masked[..., :-1] & ~masked[..., 1:]).any()):
        raise UsageError(
            "codes are known at depths whose coarser ones are not", "give the coarsest depths of a position"
        )
    counts = torch.tensor([_counts(sampling, int(n)) for n in masked.flatten(1).sum(1)], device=device)
    drawer = _Drawer(family, sampling, options.seed, indices, condition)
    for t in range(1, sampling.steps + 1):
        tokens, confidence = drawer.step(t, to_slots(codes), masked)
        codes = torch.where(masked, tokens, codes)
        scores = confidence.unsqueeze(-1) + _temperature(sampling, t) * drawer.gumbel(t, shape)
        masked = reveal(masked, scores, counts[:, t - 1] - counts[:, t], coarse_first)
    return to_slots(codes)


def _begin(count: int, shape: tuple[int, int], device: torch.device, known: Known | None) -> tuple[Tensor, Tensor]:
    """Codes and mask before the first step: (B, L, D) each."""
    if known is None:
        masked = torch.ones(count, *shape, dtype=torch.bool, device=device)
        return torch.zeros_like(masked, dtype=torch.int64), masked
    return to_slots(known.codes_BTS).to(device), ~to_slots(known.keep_BTS).to(device)


def _counts(sampling: ResGenSampling, slots: int) -> list[int]:
    """n_0..n_S of an image. One with fewer open slots than steps reveals one a step, and is done early."""
    counts = sampling_counts(sampling.schedule, min(sampling.steps, slots), slots) if slots else [0]
    return counts + [0] * (sampling.steps + 1 - len(counts))


def lambda_at(t: int, sampling: ResGenSampling) -> float:
    """Guidance of step t = 1..S."""
    return guidance_at(t, sampling.steps, sampling.cfg, sampling.cfg_schedule)


def _temperature(sampling: ResGenSampling, t: int) -> float:
    """tau_t = tau (1 - t / S), or tau."""
    return sampling.conf_temp * (1 - t / sampling.steps) if sampling.conf_anneal else sampling.conf_temp


class _Drawer:
    """The draws of one call: codes of all masked slots, and how sure they are."""

    def __init__(
        self, family: MaskedModel, sampling: ResGenSampling, seed: int, indices: list[int], condition: Condition
    ) -> None:
        self.family, self.sampling, self.seed, self.indices, self.condition = family, sampling, seed, indices, condition
        self.device, quantizer = condition.vector_BD.device, family.quantizer
        self.both = condition.joined(family.null_condition(len(indices))) if sampling.cfg else condition
        shared = [Search(book) for book in quantizer.books]
        self.searches = shared if len(shared) > 1 else shared * quantizer.steps

    def step(self, t: int, codes_BTS: Tensor, masked_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """-> tokens (B, L, D), valid where masked; confidence (B, L)."""
        visible, _ = self.family.masked_sums(self.family.embed(codes_BTS), masked_BLD)
        lambda_t = lambda_at(t, self.sampling)
        inputs = (visible, masked_BLD, self.condition)
        if lambda_t:
            inputs = visible.repeat(2, 1, 1), masked_BLD.repeat(2, 1, 1), self.both
        direct = self.family.cfg.network.target == "direct"
        tokens, logp, log_pi = (self._tokens if direct else self._vectors)(t, inputs, lambda_t, masked_BLD)
        if self.sampling.conf == "rand":
            return tokens, torch.zeros_like(logp)
        return tokens, log_pi if self.sampling.conf == "comp" else standardise(logp, masked_BLD.any(-1))

    def _vectors(
        self, t: int, inputs: tuple[Tensor, Tensor, Condition], lambda_t: float, masked_BLD: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A vector from the mixture, requantised. -> tokens, its log-density, log pi of its component."""
        mix = self.family.predict(*inputs)
        if lambda_t:
            cond, uncond = mix.halves()
            mix = cond.guided(uncond, lambda_t, means=self.sampling.cfg_mode == "both")
        rho_BL, _ = self.family.units(masked_BLD)
        L, H = mix.shift_BLH.shape[1:]
        component = mixture.draw(mixture.nucleus(mix.logits_BLK, self.sampling.top_p), self._uniform(t, (L,)))
        w = mixture.vector_of(mix, component, self._normal(t, (L, H)), self.sampling.z_temp)
        tokens = requantise(self.family.quantizer, self.searches, w * rho_BL.unsqueeze(-1), masked_BLD)
        log_pi = mix.logits_BLK.log_softmax(-1).gather(-1, component.unsqueeze(-1)).squeeze(-1)
        return tokens, mixture.log_density(mix, w), log_pi

    def _tokens(
        self, t: int, inputs: tuple[Tensor, Tensor, Condition], lambda_t: float, masked_BLD: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Each masked slot's token by itself. -> tokens, and twice their mean log-probability a position."""
        logits = self.family.predict_tokens(*inputs)
        if lambda_t:
            cond, uncond = logits.chunk(2)
            logits = guide(cond, uncond, lambda_t)
        logits = logits / max(self.sampling.z_temp, GREEDIEST)
        tokens = mixture.draw(mixture.nucleus(logits, self.sampling.top_p), self._uniform(t, masked_BLD.shape[1:]))
        logp = logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        mean = (logp * masked_BLD).sum(-1) / masked_BLD.sum(-1).clamp_min(1)
        return tokens, mean, mean

    def _uniform(self, t: int, shape: tuple[int, ...]) -> Tensor:
        views = [0] * len(self.indices)
        uniform = noise.uniform_rows("component", self.seed, self.indices, views, t, shape)
        return torch.from_numpy(uniform).to(self.device)

    def _normal(self, t: int, shape: tuple[int, int]) -> Tensor:
        views, ts = [0] * len(self.indices), [t] * len(self.indices)
        return torch.from_numpy(noise.normal_rows("sample", self.seed, self.indices, views, ts, shape)).to(self.device)

    def gumbel(self, t: int, shape: tuple[int, int]) -> Tensor:
        """Gumbel noise of every slot, (B, L, D)."""
        rows = np.stack([noise.gumbel(self.seed, index, t, shape) for index in self.indices])
        return torch.from_numpy(rows).to(self.device)

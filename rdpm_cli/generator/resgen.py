"""ResGen: masked prediction of the sum of the masked depths' embeddings (arXiv 2412.10208).

Legend: B images, L positions of the flattened grid, D depths (the tokenizer's T), V codes a
book, H width of a code, K components. A slot is one (position, depth). At the seams codes are (B, T, S), T = D, S = L.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from rdpm_cli import noise, progress
from rdpm_cli.codes.store import CodeStore
from rdpm_cli.device import full_precision
from rdpm_cli.distributed import TrainStep
from rdpm_cli.errors import DataError, UsageError
from rdpm_cli.generator import mixture
from rdpm_cli.generator.batches import Batch, StoreBatches
from rdpm_cli.generator.conditions import ClassConditional
from rdpm_cli.generator.config import (
    ResGenArchitecture,
    ResGenConfig,
    ResGenNetwork,
    ResGenObjective,
    ResGenSampling,
)
from rdpm_cli.generator.contract import Condition, Known, SampleOptions, Tally
from rdpm_cli.generator.drawing import guide
from rdpm_cli.generator.masking import mask_tokens, masked_count, reveal
from rdpm_cli.generator.mixture import Mixture, MixtureHead
from rdpm_cli.generator.resgen_sampling import Drawer, lambda_at, masked_counts, starting_point, temperature_at
from rdpm_cli.generator.transformer import Transformer
from rdpm_cli.tokenizer.config import TokenizerArchitecture
from rdpm_cli.tokenizer.quantizer import Quantizer

RATIO = 1000.0  # the masked share is embedded as a step of a thousand
HELD_OUT_R = [tenth / 10 for tenth in range(1, 10)]  # r of the held-out masks
MEASURED_ROWS, MEASURED_AT_ONCE = 8192, 256  # training rows whose scales are measured, evenly spaced


# ---- batches -------------------------------------------------------------------------------------------------------


@dataclass
class MaskBatch(Batch):
    """Codes, and the slots that are to be predicted."""

    masked_BLD: Tensor  # bool
    # Means over the whole global batch, by which losses are divided: a loss must not depend on how a batch is shared.
    positions: float = 0.0  # with a masked slot, an image
    slots: float = 0.0  # masked, an image


class MaskBatches(StoreBatches):
    """Codes, labels and masks of a training step, a pure function of (seed, step)."""

    def __init__(self, store: CodeStore, cfg: ResGenConfig, quantizer: Quantizer, seed: int) -> None:
        super().__init__(store, cfg.train.batch, seed)
        self.objective, self.shape = cfg.objective, (math.prod(store.manifest.grid), store.manifest.steps)
        self._last: tuple[int, Tensor, NDArray[np.float32]] | None = None

    @staticmethod
    def blank(cfg: ResGenConfig, quantizer: Quantizer, rows: int) -> MaskBatch:
        """A batch without content, for measuring what a step costs."""
        L, D = math.prod(quantizer.grid), quantizer.steps
        columns = {"labels": torch.zeros(rows, dtype=torch.int64)}
        masked = torch.ones(rows, L, D, dtype=torch.bool)
        return MaskBatch(torch.zeros(rows, D, L, dtype=torch.int64), columns, masked, L, L * D)

    def batch_at(self, step: int, rows: range) -> MaskBatch:
        """These rows of the step's global batch."""
        store_rows, part = self.rows_at(step, rows), slice(rows.start, rows.stop)
        masked, uniform_B = self._global(step)
        return MaskBatch(
            codes_BTS=self.codes(store_rows),
            columns=self.columns(store_rows, uniform_B[part], self.objective.label_drop),
            masked_BLD=masked[part],
            positions=float(masked.any(-1).sum()) / self.batch,
            slots=float(masked.sum()) / self.batch,
        )

    def _global(self, step: int) -> tuple[Tensor, NDArray[np.float32]]:
        """Masks of the whole global batch, and its uniform numbers for label drop."""
        if self._last is None or self._last[0] != step:  # the micro-batches of a step share them
            L, D = self.shape
            drawn = noise.block_uniform(self.seed, step, range(self.batch), 2 + L * D)
            keys = torch.from_numpy(drawn[:, 2:].reshape(-1, L, D))
            self._last = step, self._mask(keys, drawn[:, 0].tolist()), drawn[:, 1]
        return self._last[1:]

    def _mask(self, keys_BLD: Tensor, r_B: list[float]) -> Tensor:
        """The mask at r of each image, by its uniform keys."""
        slots, objective = math.prod(self.shape), self.objective
        count_B = torch.tensor([masked_count(objective.schedule, r, slots) for r in r_B])
        return mask_tokens(keys_BLD, count_B, objective.order == "coarse-to-fine")

    def held_out_batches(self) -> Iterator[MaskBatch]:
        """Held-out rows, each at r = .1, ..., .9 under masks that are always the same."""
        for store_rows in self.held_out_rows():
            codes, columns = self.codes(store_rows), self.columns(store_rows)
            for number, r in enumerate(HELD_OUT_R, 1):
                keys = noise.uniform_rows("mask", 0, *self.addresses(store_rows), number, self.shape)
                yield MaskBatch(codes, columns, self._mask(torch.from_numpy(keys), [r] * len(store_rows)))


# ---- scales --------------------------------------------------------------------------------------------------------


class Scales(NamedTuple):
    """RMS a dimension, measured on a store before training."""

    rho_D1: Tensor  # of the sum of k masked embeddings at index k; 1 at index 0
    sigma_psi: float  # of z - z'_T
    source: str  # of sigma_psi: `recipe`, `latents`, or `rho` if the store keeps no latents


def second_moments(store: CodeStore, quantizer: Quantizer, rows: NDArray[np.int64]) -> tuple[Tensor, float | None]:
    """Mean of e_j e_l over positions and dimensions, (D, D) float64; the mean of (z - z'_T)² if z is stored."""
    measured = rows[np.linspace(0, len(rows) - 1, min(len(rows), MEASURED_ROWS)).astype(np.int64)]
    device, D = quantizer.books.device, quantizer.steps
    total, error, count = torch.zeros(D, D, dtype=torch.float64, device=device), 0.0, 0
    for start in range(0, len(measured), MEASURED_AT_ONCE):
        part = measured[start : start + MEASURED_AT_ONCE]
        codes = torch.from_numpy(store.codes(part).astype(np.int64)).to(device)
        e_DN = torch.stack([quantizer.look_up(codes[:, t - 1], t).flatten() for t in range(1, D + 1)]).double()
        total += e_DN @ e_DN.T
        count += e_DN.shape[1]
        if store.manifest.latents:
            z_N = torch.from_numpy(store.latents(part).astype(np.float32)).to(device).flatten().double()
            error += float((z_N - e_DN.sum(0)).pow(2).sum())
    return total / count, error / count if store.manifest.latents else None


def rho_of(moments_DD: Tensor, coarse_first: bool) -> Tensor:
    """rho_k for k = 0..D: of the finest k depths, or of any k, by lot. (D + 1,) float32; rho_0 = 1."""
    D = len(moments_DD)
    diagonal, total = float(moments_DD.trace()), float(moments_DD.sum())
    squares = [1.0]
    for k in range(1, D + 1):
        if coarse_first:
            squares.append(float(moments_DD[D - k :, D - k :].sum()))
        else:
            pairs = k * (k - 1) / (D * (D - 1)) if D > 1 else 0.0  # the share of pairs of depths among the k
            squares.append(diagonal * k / D + (total - diagonal) * pairs)
    return torch.tensor(squares).sqrt().float()


def measure(store: CodeStore, quantizer: Quantizer, objective: ResGenObjective) -> Scales:
    """The scales of the training rows. sigma_psi: the recipe's, else RMS(z - z'_T), else rho_1 / 2.

    Raises DataError if a rho is 0.
    """
    moments, error = second_moments(store, quantizer, store.split()[0])
    rho = rho_of(moments, objective.order == "coarse-to-fine")
    if not bool((rho > 0).all()):
        raise DataError(
            f"{store.root}: the finest codes all stand for 0, so there is nothing to learn at their depth",
            "train the tokenizer longer, or with fewer quantizer.steps, and tokenize again",
        )
    if objective.sigma_psi is not None:
        return Scales(rho, objective.sigma_psi, "recipe")
    return Scales(rho, math.sqrt(error), "latents") if error else Scales(rho, 0.5 * float(rho[1]), "rho")


# ---- the network ---------------------------------------------------------------------------------------------------


class TokenHead(nn.Module):
    """Hidden states -> logits of every depth's token, (B, L, D, V): the baseline `target: direct`. Starts at zero."""

    def __init__(self, width: int, depths: int, codes: int) -> None:
        super().__init__()
        self.depths = depths
        self.out = nn.Linear(width, depths * codes)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.out(hidden)
        return logits.float().unflatten(-1, (self.depths, -1))


class MaskedNetwork(nn.Module):
    """Linear(H -> width) of the visible sum, transformer; the head; and the scales of the codes."""

    rho: Tensor
    sigma_psi: Tensor
    coarse_first: Tensor

    def __init__(self, cfg: ResGenNetwork, quantizer: Quantizer, classes: int) -> None:
        super().__init__()
        channels, depths = quantizer.books.shape[-1], quantizer.steps
        self.ratio_cond = cfg.ratio_cond
        self.input = nn.Linear(channels, cfg.hidden)
        self.trunk = Transformer(cfg, quantizer.grid, channels, classes)
        self.counts = nn.Embedding(depths + 1, cfg.hidden) if cfg.count_embed else None
        if self.counts is not None:
            nn.init.normal_(self.counts.weight, std=0.02)
        self.head: MixtureHead | TokenHead = (
            MixtureHead(cfg.hidden, channels, cfg.mixtures, cfg.rank)
            if cfg.target == "cumulative"
            else TokenHead(cfg.hidden, depths, quantizer.cfg.codes)
        )
        self.register_buffer("rho", torch.ones(depths + 1))
        self.register_buffer("sigma_psi", torch.ones(()))
        self.register_buffer("coarse_first", torch.ones((), dtype=torch.bool))

    def forward(self, visible_BLH: Tensor, masked_BLD: Tensor, condition: Condition) -> Tensor:
        """The hidden state that the head sees, (B, L, width). visible: the sum of the visible embeddings."""
        x = self.input(visible_BLH / self.rho[-1]).float()  # the residual stream stays fp32 under autocast
        if self.counts is not None:
            x = x + self.counts((~masked_BLD).sum(-1))
        share_B = masked_BLD.flatten(1).float().mean(1)
        hidden: Tensor = self.trunk(x, RATIO * share_B if self.ratio_cond else torch.zeros_like(share_B), condition)
        return hidden


class ResGen(ClassConditional):
    """The family: loss on masked codes, sampling in as many passes as asked for, whatever the depth."""

    def __init__(self, cfg: ResGenArchitecture, quantizer: Quantizer, classes: int) -> None:
        """quantizer: the frozen tokenizer's, of plain residual quantisation."""
        self.cfg, self.quantizer, self.classes = cfg, quantizer, classes
        self.objective = cfg.objective if isinstance(cfg, ResGenConfig) else ResGenObjective()
        self.shape = math.prod(quantizer.grid), quantizer.steps  # (L, D)
        self.direct = cfg.network.target == "direct"
        self.network: nn.Module = MaskedNetwork(cfg.network, quantizer, classes)

    @staticmethod
    def check_codes(tokenizer: TokenizerArchitecture, origin: str) -> None:
        """Raise UsageError unless the codes are of plain residual quantisation without bias."""
        kind, bias = tokenizer.schedule.kind, tokenizer.quantizer.bias
        if kind != "rvq" or bias != "none":
            raise UsageError(
                f"{origin} holds codes of schedule {kind} with bias {bias}, but ResGen needs plain residual "
                "quantisation: codes that fit noise, or a sum that is not the embeddings', cannot be requantised",
                "train a tokenizer with schedule.kind=rvq quantizer.bias=none, e.g. `rdpm train-tokenizer IMAGES "
                "--recipe resgen-digits`, and tokenize again; or train RDPM on it, e.g. --recipe digits",
            )

    # ---- one prediction --------------------------------------------------------------------------------------------

    def embed(self, codes_BTS: Tensor) -> Tensor:
        """Each token's embedding, (B, L, D, H)."""
        depths = [self.quantizer.look_up(codes_BTS[:, t - 1], t) for t in range(1, self.quantizer.steps + 1)]
        return torch.stack(depths, 1).permute(0, 3, 1, 2)  # from (B, D, H, L)

    @staticmethod
    def masked_sums(embedded_BLDH: Tensor, masked_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """u and z: the sums over visible and over masked depths, (B, L, H) each; of no depth, exactly 0."""
        masked = masked_BLD.unsqueeze(-1)
        return embedded_BLDH.masked_fill(masked, 0).sum(2), embedded_BLDH.masked_fill(~masked, 0).sum(2)

    @property
    def _network(self) -> MaskedNetwork:
        assert isinstance(self.network, MaskedNetwork)
        return self.network

    def units(self, masked_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """rho_k and sigma_psi / rho_k of each position's number k of masked depths, (B, L) each."""
        rho_BL = self._network.rho[masked_BLD.sum(-1)]
        return rho_BL, self._network.sigma_psi / rho_BL

    def predict(self, visible_BLH: Tensor, masked_BLD: Tensor, condition: Condition) -> Mixture:
        """The distribution of z / rho_k at each position."""
        head = self._network.head
        assert isinstance(head, MixtureHead)
        mix: Mixture = head(self.network(visible_BLH, masked_BLD, condition), self.units(masked_BLD)[1] / 2)
        return mix

    def predict_tokens(self, visible_BLH: Tensor, masked_BLD: Tensor, condition: Condition) -> Tensor:
        """Logits of every slot's token, (B, L, D, V), with `target: direct`."""
        logits: Tensor = self._network.head(self.network(visible_BLH, masked_BLD, condition))
        return logits

    # ---- training --------------------------------------------------------------------------------------------------

    def begin(self, cfg: ResGenConfig, store: CodeStore) -> dict[str, Any]:
        """Measure rho and sigma_psi of the training rows; the network keeps them."""
        self.objective, network = cfg.objective, self._network
        rho, sigma_psi, source = measure(store, self.quantizer, cfg.objective)
        network.rho.copy_(rho)
        network.sigma_psi.fill_(sigma_psi)
        network.coarse_first.fill_(cfg.objective.order == "coarse-to-fine")
        reason = {
            "latents": "measured on the store's latents",
            "recipe": "set by the recipe",
            "rho": "half of rho_1, for the store keeps no latents (`rdpm tokenize --keep latents` would)",
        }[source]
        progress.say(f"sigma_psi {sigma_psi:.4g}, {reason}; rho_1 {rho[1]:.4g}, rho_D {rho[-1]:.4g}")
        return {"sigma_psi": {"value": sigma_psi, "source": source}, "rho": rho.tolist()}

    def loss(self, batch: MaskBatch, step: TrainStep) -> tuple[Tensor, dict[str, Tensor]]:
        """L_mask in nats: a mean over positions with a masked slot, and dimensions; direct: over slots."""
        with torch.no_grad():
            visible, z = self.masked_sums(self.embed(batch.codes_BTS), batch.masked_BLD)
        if self.direct:
            ce_BLD, right_BLD = self._token_losses(visible, batch)
            count = len(batch) * batch.slots
            ce = (ce_BLD * batch.masked_BLD).sum() / count
            return ce, {"nll": ce.detach(), "accuracy": (right_BLD & batch.masked_BLD).sum() / count}
        mix = self.predict(visible, batch.masked_BLD, self.condition(batch.columns))
        with full_precision(visible):
            rho, sp = self.units(batch.masked_BLD)
            kl = mixture.divergences(mix, z / rho.unsqueeze(-1), sp)
            log_pi, open_BL = mix.logits_BLK.log_softmax(-1), batch.masked_BLD.any(-1)
            count = len(batch) * batch.positions * z.shape[-1]
            nll = (mixture.exact_nll(log_pi, kl) * open_BL).sum() / count
            loss = nll if self.objective.mog_loss == "nll" else (self._bound(log_pi, kl) * open_BL).sum() / count
            return loss, {"nll": nll.detach(), "components": _effective(log_pi.detach().exp(), open_BL)}

    def _bound(self, log_pi: Tensor, kl: Tensor) -> Tensor:
        if self.objective.mog_loss == "clam":
            return mixture.clam_loss(log_pi, kl)
        return mixture.split_loss(log_pi, kl, self.objective.detach_resp)

    def _token_losses(self, visible_BLH: Tensor, batch: MaskBatch) -> tuple[Tensor, Tensor]:
        """Cross-entropy of every slot's token, and whether the likeliest is right: (B, L, D) each."""
        logits = self.predict_tokens(visible_BLH, batch.masked_BLD, self.condition(batch.columns))
        target_BLD = batch.codes_BTS.transpose(1, 2)
        ce = F.cross_entropy(logits.flatten(0, 2), target_BLD.flatten(), reduction="none")
        return ce.view(target_BLD.shape), logits.argmax(-1) == target_BLD

    @torch.no_grad()
    def held_out(self, batch: MaskBatch) -> dict[str, Tally]:
        """By the number k = 1..D of masked depths: exact NLL and the baseline's, nats a dimension.

        direct: cross-entropy and a uniform guess's, nats a token.
        """
        visible, z = self.masked_sums(self.embed(batch.codes_BTS), batch.masked_BLD)
        k_BL = batch.masked_BLD.sum(-1)
        if self.direct:
            ce_BLD, _ = self._token_losses(visible, batch)
            nll = (ce_BLD * batch.masked_BLD).sum(-1) / k_BL.clamp_min(1)
            baseline = torch.full_like(nll, self.quantizer.cfg.codes).log()
        else:
            rho, sp = self.units(batch.masked_BLD)
            w, H = z / rho.unsqueeze(-1), z.shape[-1]
            mix = self.predict(visible, batch.masked_BLD, self.condition(batch.columns))
            nll = mixture.exact_nll(mix.logits_BLK.log_softmax(-1), mixture.divergences(mix, w, sp)) / H
            baseline = mixture.gaussian_nll(w, sp) / H
        return {"nll": self._by_k(nll, k_BL), "baseline": self._by_k(baseline, k_BL)}

    def _by_k(self, values_BL: Tensor, k_BL: Tensor) -> Tally:
        k, D = k_BL.flatten(), self.quantizer.steps
        total = values_BL.new_zeros(D + 1).index_add_(0, k, values_BL.flatten())
        return Tally(total[1:], k.bincount(minlength=D + 1)[1:])  # k = 0 has nothing to predict

    # ---- sampling --------------------------------------------------------------------------------------------------

    def check(self, options: SampleOptions) -> None:
        """Raise UsageError for more steps than there are tokens."""
        slots, steps = math.prod(self.shape), _sampling(options).steps
        if steps > slots:
            raise UsageError(
                f"--steps {steps} is more than the {slots} tokens of an image",
                "each step reveals at least one token; give fewer",
            )

    def passes(self, options: SampleOptions, first: int = 1) -> int:
        """Rows through the network for one sample, whatever the depth, and how many codes are known."""
        sampling = _sampling(options)
        return sum(1 + (lambda_at(t, sampling) > 0) for t in range(1, sampling.steps + 1))

    @torch.no_grad()
    def sample(
        self, condition: Condition, indices_B: Tensor, options: SampleOptions, known: Known | None = None
    ) -> Tensor:
        """At each step predict all masked sums, requantise them, reveal the most confident tokens. codes_BTS."""
        self.check(options)
        sampling, indices, device = _sampling(options), indices_B.tolist(), condition.vector_BD.device
        coarse_first = bool(self._network.coarse_first)
        codes_BLD, masked_BLD = starting_point(len(indices), self.shape, device, known, coarse_first)
        counts = masked_counts(sampling, masked_BLD)
        both = condition.joined(self.null_condition(len(indices))) if sampling.cfg else condition
        drawer = Drawer(self.quantizer, sampling, options.seed, indices)
        for t in range(1, sampling.steps + 1):
            visible, _ = self.masked_sums(self.embed(codes_BLD.transpose(1, 2)), masked_BLD)
            tokens_BLD, confidence_BL = self._draw(drawer, t, visible, masked_BLD, condition, both)
            codes_BLD = torch.where(masked_BLD, tokens_BLD, codes_BLD)
            gumbel_BLD = drawer.gumbel(t, masked_BLD)
            scores = confidence_BL.unsqueeze(-1) + temperature_at(t, sampling) * gumbel_BLD
            masked_BLD = reveal(masked_BLD, scores, counts[:, t - 1] - counts[:, t], coarse_first)
        return codes_BLD.transpose(1, 2)

    def _draw(
        self, drawer: Drawer, t: int, visible: Tensor, masked: Tensor, condition: Condition, both: Condition
    ) -> tuple[Tensor, Tensor]:
        """Tokens of all masked slots (B, L, D), and how sure each position is of its own (B, L).

        One pass of 2B rows with guidance (`both`: the condition and the null one), of B rows where lambda_t = 0.
        """
        lambda_t = lambda_at(t, drawer.sampling)
        inputs = (visible, masked, condition)
        if lambda_t:
            inputs = visible.repeat(2, 1, 1), masked.repeat(2, 1, 1), both
        if self.direct:
            logits = self.predict_tokens(*inputs)
            if lambda_t:
                cond_logits, null_logits = logits.chunk(2)
                logits = guide(cond_logits, null_logits, lambda_t)
            return drawer.tokens(t, logits, masked)
        mix = self.predict(*inputs)
        if lambda_t:
            cond, uncond = mix.halves()
            mix = cond.guided(uncond, lambda_t, means=drawer.sampling.cfg_mode == "both")
        return drawer.vectors(t, mix, self.units(masked)[0], masked)


def _effective(pi_BLK: Tensor, open_BL: Tensor) -> Tensor:
    """Effective number of components, 1 / sum of squared mean pi over positions with something masked."""
    mean_K = (pi_BLK * open_BL.unsqueeze(-1)).sum((0, 1)) / open_BL.sum().clamp_min(1)
    return 1 / mean_K.pow(2).sum()


def _sampling(options: SampleOptions) -> ResGenSampling:
    assert isinstance(options.sampling, ResGenSampling)
    return options.sampling

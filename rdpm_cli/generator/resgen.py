"""ResGen: masked prediction of the sum of the masked depths' embeddings (arXiv 2412.10208).

The method, with what public material leaves open, is the project's specification; its sections are named here.
Legend: B images, L positions, D depths (the tokenizer's T), V codes a book, H width of a code, K components, S steps.
A slot is one (position, depth).
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

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
from rdpm_cli.generator import mixture, resgen_sampling
from rdpm_cli.generator.batches import StoreBatches
from rdpm_cli.generator.conditions import class_condition, null_condition
from rdpm_cli.generator.config import (
    GeneratorConfig,
    ResGenArchitecture,
    ResGenConfig,
    ResGenNetwork,
    ResGenObjective,
)
from rdpm_cli.generator.contract import Condition, Known, SampleOptions, Tally
from rdpm_cli.generator.masking import mask_tokens, masked_count
from rdpm_cli.generator.mixture import Mixture, MixtureHead
from rdpm_cli.generator.resgen_sampling import sampling_of
from rdpm_cli.generator.transformer import Transformer
from rdpm_cli.tokenizer.config import TokenizerArchitecture
from rdpm_cli.tokenizer.quantizer import Quantizer

RATIO = 1000.0  # the masked share is embedded as a step of a thousand


# ---- scales ---------------------------------------------------------------------------------------------------

MEASURED_ROWS = 8192  # training rows looked at, evenly spaced
ROWS_AT_ONCE = 256


@dataclass
class Scales:
    """RMS a dimension. rho_D1: of the sum of k masked embeddings at place k, 1 at place 0. sigma_psi: of z - z'_T."""

    rho_D1: Tensor
    sigma_psi: float
    source: str  # of sigma_psi: `latents`, or `rho` where the store keeps none


def second_moments(store: CodeStore, quantizer: Quantizer, rows: NDArray[np.int64]) -> tuple[Tensor, float | None]:
    """S_jl = mean of e_j e_l over positions and dimensions, (D, D) float64; the mean of (z - z'_T)² where z is kept."""
    spread = rows[np.linspace(0, len(rows) - 1, min(len(rows), MEASURED_ROWS)).astype(np.int64)]
    device, D = quantizer.books.device, quantizer.steps
    total, error, count = torch.zeros(D, D, dtype=torch.float64, device=device), 0.0, 0
    for start in range(0, len(spread), ROWS_AT_ONCE):
        part = spread[start : start + ROWS_AT_ONCE]
        codes = torch.from_numpy(store.codes(part).astype(np.int64)).to(device)
        e_DN = torch.stack([quantizer.look_up(codes[:, t - 1], t).flatten() for t in range(1, D + 1)]).double()
        total += e_DN @ e_DN.T
        count += e_DN.shape[1]
        if store.manifest.latents:
            z = torch.from_numpy(store.latents(part).astype(np.float32)).to(device)
            error += float((z.flatten().double() - e_DN.sum(0)).pow(2).sum())
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
            pairs = k * (k - 1) / (D * (D - 1)) if D > 1 else 0.0
            squares.append(diagonal * k / D + (total - diagonal) * pairs)
    return torch.tensor(squares).sqrt().float()


def measure(
    store: CodeStore, quantizer: Quantizer, rows: NDArray[np.int64], coarse_first: bool, sigma_psi: float | None
) -> Scales:
    """The scales of these rows. sigma_psi: as given, else RMS(z - z'_T), else rho_1 / 2.

    Raises DataError where a rho is 0.
    """
    moments, error = second_moments(store, quantizer, rows)
    rho = rho_of(moments, coarse_first)
    if not bool((rho > 0).all()):
        raise DataError(
            f"{store.root}: the finest codes all stand for 0, so there is nothing to learn at their depth",
            "train the tokenizer longer, or with fewer quantizer.steps, and tokenize again",
        )
    if sigma_psi is not None:
        return Scales(rho, sigma_psi, "recipe")
    if error:
        return Scales(rho, error**0.5, "latents")
    return Scales(rho, 0.5 * float(rho[1]), "rho")


# ---- batches --------------------------------------------------------------------------------------------------

HELD_OUT_R = [tenth / 10 for tenth in range(1, 10)]


@dataclass
class MaskBatch:
    """A batch of one process."""

    codes_BTS: Tensor  # int64
    labels_B: Tensor  # int64; the null class where the label was dropped
    masked_BLD: Tensor  # bool
    positions: float = 0.0  # with a masked token, an image: the mean of the global batch, by which losses are divided
    slots: float = 0.0  # masked, an image: the same

    def to(self, device: torch.device) -> "MaskBatch":
        """The same batch on a device."""
        codes, labels, masked = (x.to(device) for x in (self.codes_BTS, self.labels_B, self.masked_BLD))
        return replace(self, codes_BTS=codes, labels_B=labels, masked_BLD=masked)


def blank(cfg: ResGenConfig, quantizer: Quantizer, rows: int) -> MaskBatch:
    """A micro-batch of the right shapes, for measuring what a step takes."""
    L, D = math.prod(quantizer.grid), quantizer.steps
    codes, labels = torch.zeros(rows, D, L, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64)
    return MaskBatch(codes, labels, torch.ones(rows, L, D, dtype=torch.bool), L, L * D)


class MaskBatches(StoreBatches):
    """batch_at(step, rows): codes, labels and masks of a training step, a pure function of (seed, step)."""

    def __init__(self, store: CodeStore, cfg: ResGenConfig, quantizer: Quantizer, seed: int) -> None:
        super().__init__(store, cfg.train.batch, seed)
        m = store.manifest
        self.objective, self.shape = cfg.objective, (math.prod(m.grid), m.steps)
        self.coarse_first = cfg.objective.order == "coarse-to-fine"
        self._last: tuple[int, Tensor, NDArray[np.float32]] | None = None

    def batch_at(self, step: int, rows: range) -> MaskBatch:
        """rows: this process's rows of the global batch."""
        store_rows, part = self.rows_at(step, rows), slice(rows.start, rows.stop)
        masked, uniform_B = self._global(step)
        return MaskBatch(
            codes_BTS=torch.from_numpy(self.codes(store_rows)),
            labels_B=torch.from_numpy(self.labels_or_null(store_rows, uniform_B[part], self.objective.label_drop)),
            masked_BLD=masked[part],
            positions=float(masked.any(-1).sum()) / self.batch,
            slots=float(masked.sum()) / self.batch,
        )

    def _global(self, step: int) -> tuple[Tensor, NDArray[np.float32]]:
        """Masks of the whole global batch, and its uniform numbers for label drop. The last step's are kept."""
        if self._last is None or self._last[0] != step:
            L, D = self.shape
            drawn = noise.block_uniform(self.seed, step, range(self.batch), 2 + L * D)
            keys = torch.from_numpy(drawn[:, 2:].reshape(-1, L, D))
            self._last = step, self._mask(keys, drawn[:, 0].tolist()), drawn[:, 1]
        return self._last[1:]

    def _mask(self, keys_BLD: Tensor, r_B: list[float]) -> Tensor:
        L, D = self.shape
        count_B = torch.tensor([masked_count(self.objective.schedule, r, L * D) for r in r_B])
        return mask_tokens(keys_BLD, count_B, self.coarse_first)

    def held_out_batches(self) -> Iterator[MaskBatch]:
        """Held-out rows, each at r = .1, ..., .9 under masks that are always the same."""
        for store_rows in self.held_out_rows():
            codes, labels = torch.from_numpy(self.codes(store_rows)), torch.from_numpy(self.labels(store_rows))
            index, view = self.store.index[store_rows].tolist(), self.store.view(store_rows).tolist()
            for number, r in enumerate(HELD_OUT_R, 1):
                keys = torch.from_numpy(noise.uniform_rows("mask", 0, index, view, number, self.shape))
                yield MaskBatch(codes, labels, self._mask(keys, [r] * len(store_rows)))


# ---- the network and the family -------------------------------------------------------------------------------


class TokenHead(nn.Module):
    """Hidden states -> logits of every depth's token, (B, L, D, V): the baseline `target: direct`. Starts at zero."""

    def __init__(self, width: int, depths: int, codes: int) -> None:
        super().__init__()
        self.depths = depths
        self.out = nn.Linear(width, depths * codes)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, hidden_BLD: Tensor) -> Tensor:
        logits: Tensor = self.out(hidden_BLD)
        return logits.float().unflatten(-1, (self.depths, -1))


class MaskedNetwork(nn.Module):
    """Linear(H -> width) of the visible sum, transformer; the head; and what was measured of the codes (§4)."""

    rho: Tensor
    sigma_psi: Tensor
    coarse_first: Tensor

    def __init__(
        self, cfg: ResGenNetwork, grid: tuple[int, ...], channels: int, codes: int, depths: int, classes: int
    ) -> None:
        super().__init__()
        self.ratio_cond = cfg.ratio_cond
        self.input = nn.Linear(channels, cfg.hidden)
        self.trunk = Transformer(cfg, grid, channels, classes)
        self.counts = nn.Embedding(depths + 1, cfg.hidden) if cfg.count_embed else None
        if self.counts is not None:
            nn.init.normal_(self.counts.weight, std=0.02)
        self.head: MixtureHead | TokenHead = (
            MixtureHead(cfg.hidden, channels, cfg.mixtures, cfg.rank)
            if cfg.target == "cumulative"
            else TokenHead(cfg.hidden, depths, codes)
        )
        self.register_buffer("rho", torch.ones(depths + 1))
        self.register_buffer("sigma_psi", torch.ones(()))
        self.register_buffer("coarse_first", torch.ones((), dtype=torch.bool))

    def forward(self, visible_BLH: Tensor, masked_BLD: Tensor, condition: Condition) -> Tensor:
        """The last hidden state, (B, L, width). visible: the sum of the visible embeddings, 0 where all are masked."""
        x = self.input(visible_BLH / self.rho[-1]).float()  # the residual stream stays fp32
        if self.counts is not None:
            x = x + self.counts((~masked_BLD).sum(-1))
        share_B = masked_BLD.flatten(1).float().mean(1)
        hidden: Tensor = self.trunk(x, RATIO * share_B if self.ratio_cond else torch.zeros_like(share_B), condition)
        return hidden


class ResGen:
    """The family: loss on masked codes, sampling over S steps whatever the depth."""

    def __init__(self, cfg: ResGenArchitecture, quantizer: Quantizer, classes: int) -> None:
        """quantizer: the frozen tokenizer's, of plain residual quantisation."""
        quant = quantizer.cfg
        self.cfg, self.quantizer, self.classes = cfg, quantizer, classes
        self.objective = cfg.objective if isinstance(cfg, ResGenConfig) else ResGenObjective()
        channels = quantizer.books.shape[-1]
        self.network: nn.Module = MaskedNetwork(
            cfg.network, quantizer.grid, channels, quant.codes, quant.steps, classes
        )

    @staticmethod
    def check_codes(tokenizer: TokenizerArchitecture, where: str) -> None:
        """Raise UsageError unless this tokenizer's codes are of plain residual quantisation without bias."""
        kind, bias = tokenizer.schedule.kind, tokenizer.quantizer.bias
        if kind != "rvq" or bias != "none":
            raise UsageError(
                f"{where} holds codes of schedule {kind} with bias {bias}, and ResGen needs plain residual codes: "
                "codes that fit noise, or a sum that is not the embeddings', cannot be requantised",
                "train a tokenizer with schedule.kind=rvq quantizer.bias=none, as --recipe resgen-digits does, and "
                "tokenize again; or train RDPM on it, e.g. --recipe digits",
            )

    @property
    def coarse_first(self) -> bool:
        """Whether training masked the finest depths first; recorded in the network."""
        return bool(self.network.get_buffer("coarse_first"))

    def condition(self, columns: Mapping[str, Tensor]) -> Condition:
        """The store's columns as a Condition."""
        return class_condition(self._parts().trunk, columns)

    def null_condition(self, count: int) -> Condition:
        """The condition of rows without a class."""
        return null_condition(self._parts().trunk, self.classes, count)

    # ---- codes as slots --------------------------------------------------------------------------------------

    def embed(self, codes_BTS: Tensor) -> Tensor:
        """Each token's embedding, (B, L, D, H)."""
        looked_up = [self.quantizer.look_up(codes_BTS[:, t - 1], t) for t in range(1, self.quantizer.steps + 1)]
        return torch.stack(looked_up, 1).permute(0, 3, 1, 2)

    @staticmethod
    def masked_sums(embedded_BLDH: Tensor, masked_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """u and z: the sums over visible and over masked depths, (B, L, H) each; of no depth, exactly 0."""
        hidden = masked_BLD.unsqueeze(-1)
        return embedded_BLDH.masked_fill(hidden, 0).sum(2), embedded_BLDH.masked_fill(~hidden, 0).sum(2)

    # ---- one prediction --------------------------------------------------------------------------------------

    def _parts(self) -> MaskedNetwork:
        assert isinstance(self.network, MaskedNetwork)
        return self.network

    def units(self, masked_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """rho_k and sigma_psi / rho_k of each position's number k of masked depths, (B, L) each."""
        network = self._parts()
        rho_BL = network.rho[masked_BLD.sum(-1)]
        return rho_BL, network.sigma_psi / rho_BL

    def predict(self, visible_BLH: Tensor, masked_BLD: Tensor, condition: Condition) -> Mixture:
        """The distribution of z / rho_k at each position."""
        head = self._parts().head
        assert isinstance(head, MixtureHead)
        mix: Mixture = head(self.network(visible_BLH, masked_BLD, condition), self.units(masked_BLD)[1] / 2)
        return mix

    def predict_tokens(self, visible_BLH: Tensor, masked_BLD: Tensor, condition: Condition) -> Tensor:
        """Logits of every slot's token, (B, L, D, V), where target is direct."""
        logits: Tensor = self._parts().head(self.network(visible_BLH, masked_BLD, condition))
        return logits

    # ---- training --------------------------------------------------------------------------------------------

    def begin(self, cfg: GeneratorConfig, store: CodeStore) -> dict[str, Any]:
        """Measure rho and sigma_psi of the training rows; the network keeps them (§2, §5)."""
        assert isinstance(cfg, ResGenConfig)
        self.objective, network = cfg.objective, self._parts()
        coarse_first = cfg.objective.order == "coarse-to-fine"
        scales = measure(store, self.quantizer, store.split()[0], coarse_first, cfg.objective.sigma_psi)
        network.rho.copy_(scales.rho_D1)
        network.sigma_psi.fill_(scales.sigma_psi)
        network.coarse_first.fill_(coarse_first)
        reason = {
            "latents": "measured on the store's latents",
            "recipe": "given by the recipe",
            "rho": "half of rho_1, for the store keeps no latents (`rdpm tokenize --keep latents` would)",
        }[scales.source]
        progress.say(
            f"sigma_psi {scales.sigma_psi:.4g}, {reason}; rho_1 {scales.rho_D1[1]:.4g}, rho_D {scales.rho_D1[-1]:.4g}"
        )
        return {"sigma_psi": {"value": scales.sigma_psi, "source": scales.source}, "rho": scales.rho_D1.tolist()}

    def loss(self, batch: MaskBatch, step: TrainStep) -> tuple[Tensor, dict[str, Tensor]]:
        """L_mask of §6: a mean over positions with something masked and dimensions, nats; direct: over slots.

        Divided by the global batch's number of them, so that it does not depend on how a batch is shared.
        """
        with torch.no_grad():
            visible, z = self.masked_sums(self.embed(batch.codes_BTS), batch.masked_BLD)
        rows = len(batch.labels_B)
        if self.cfg.network.target == "direct":
            ce_BLD, right_BLD = self._token_losses(visible, batch)
            count = rows * batch.slots
            ce = (ce_BLD * batch.masked_BLD).sum() / count
            return ce, {"nll": ce.detach(), "accuracy": (right_BLD & batch.masked_BLD).sum() / count}
        mix = self.predict(visible, batch.masked_BLD, self.condition({"labels": batch.labels_B}))
        with full_precision(visible):
            rho, sp = self.units(batch.masked_BLD)
            kl = mixture.divergences(mix, z / rho.unsqueeze(-1), sp)
            log_pi, open_BL = mix.logits_BLK.log_softmax(-1), batch.masked_BLD.any(-1)
            count = rows * batch.positions * z.shape[-1]
            nll = (mixture.exact_nll(log_pi, kl) * open_BL).sum() / count
            loss = nll if self.objective.mog_loss == "nll" else (self._bound(log_pi, kl) * open_BL).sum() / count
            return loss, {"nll": nll.detach(), "components": _effective(log_pi.detach().exp(), open_BL)}

    def _bound(self, log_pi: Tensor, kl: Tensor) -> Tensor:
        if self.objective.mog_loss == "clam":
            return mixture.clam_loss(log_pi, kl)
        return mixture.split_loss(log_pi, kl, self.objective.detach_resp)

    def _token_losses(self, visible_BLH: Tensor, batch: MaskBatch) -> tuple[Tensor, Tensor]:
        """Cross-entropy of every slot's token, and whether the likeliest is right: (B, L, D) each."""
        logits = self.predict_tokens(visible_BLH, batch.masked_BLD, self.condition({"labels": batch.labels_B}))
        target_BLD = resgen_sampling.to_slots(batch.codes_BTS)
        ce = F.cross_entropy(logits.flatten(0, 2), target_BLD.flatten(), reduction="none")
        return ce.view_as(target_BLD), logits.argmax(-1) == target_BLD

    # ---- held-out measurement --------------------------------------------------------------------------------

    @torch.no_grad()
    def held_out(self, batch: MaskBatch) -> dict[str, Tally]:
        """By the number k = 1..D of masked depths: exact NLL and the baseline's, nats a dimension.

        direct: cross-entropy and a uniform guess's, nats a token.
        """
        visible, z = self.masked_sums(self.embed(batch.codes_BTS), batch.masked_BLD)
        k_BL = batch.masked_BLD.sum(-1)
        if self.cfg.network.target == "direct":
            ce_BLD, _ = self._token_losses(visible, batch)
            nll = (ce_BLD * batch.masked_BLD).sum(-1) / k_BL.clamp_min(1)
            baseline = torch.full_like(nll, self.quantizer.cfg.codes).log()
        else:
            rho, sp = self.units(batch.masked_BLD)
            w, H = z / rho.unsqueeze(-1), z.shape[-1]
            mix = self.predict(visible, batch.masked_BLD, self.condition({"labels": batch.labels_B}))
            nll = mixture.exact_nll(mix.logits_BLK.log_softmax(-1), mixture.divergences(mix, w, sp)) / H
            baseline = mixture.gaussian_nll(w, sp) / H
        return {"nll": self._by_k(nll, k_BL), "baseline": self._by_k(baseline, k_BL)}

    def _by_k(self, values_BL: Tensor, k_BL: Tensor) -> Tally:
        k, D = k_BL.flatten(), self.quantizer.steps
        total = values_BL.new_zeros(D + 1).index_add_(0, k, values_BL.flatten())
        return Tally(total[1:], k.bincount(minlength=D + 1)[1:])

    # ---- sampling --------------------------------------------------------------------------------------------

    def check(self, options: SampleOptions) -> None:
        """Raise UsageError for more steps than there are tokens."""
        slots, steps = math.prod(self.quantizer.grid) * self.quantizer.steps, sampling_of(options).steps
        if steps > slots:
            raise UsageError(
                f"--steps {steps} is more than the {slots} tokens of an image",
                "each step reveals at least one token; give fewer",
            )

    def passes(self, options: SampleOptions, first: int = 1) -> int:
        """Rows through the network for one sample, whatever the depth, and how much of it is given."""
        sampling = sampling_of(options)
        return sum(1 + (resgen_sampling.lambda_at(t, sampling) > 0) for t in range(1, sampling.steps + 1))

    @torch.no_grad()
    def sample(
        self, condition: Condition, indices_B: Tensor, options: SampleOptions, known: Known | None = None
    ) -> Tensor:
        """§7: predict all masked sums, requantise them, reveal the most confident tokens; S passes. codes_BTS."""
        self.check(options)
        return resgen_sampling.sample(self, condition, [int(i) for i in indices_B], options, known)


def _effective(pi_BLK: Tensor, open_BL: Tensor) -> Tensor:
    """Effective number of components, 1 / sum of squared mean pi over positions with something masked."""
    mean_K = (pi_BLK * open_BL.unsqueeze(-1)).sum((0, 1)) / open_BL.sum().clamp_min(1)
    return 1 / mean_K.pow(2).sum()

"""ResGen: masked prediction of the sum of the masked depths' embeddings (arXiv 2412.10208).

Legend: B images, L positions, D depths (the tokenizer's T), V codes a book, H width of a code, K components. A slot is
one (position, depth), N of them an image. A mask is True where a token is masked: `coarse-to-fine` masks the finest
depths first, `random` any. At the seams codes are (B, T, S), T = D, S = L."""

import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdpm_cli import noise
from rdpm_cli.codes.ragged import RaggedStore
from rdpm_cli.codes.store import CodeStore
from rdpm_cli.distributed import TrainStep, full_precision
from rdpm_cli.errors import DataError, UsageError
from rdpm_cli.generator import mixture
from rdpm_cli.generator.config import MaskSchedule, ResGenConfig, ResGenNetwork, ResGenObjective
from rdpm_cli.generator.contract import Batch, Columns, Condition, Generator, GeneratorBatches, Known, SampleOptions
from rdpm_cli.generator.drawing import guidance_at, guide
from rdpm_cli.generator.transformer import Transformer, zero_linear
from rdpm_cli.tokenizer.config import TokenizerArchitecture
from rdpm_cli.tokenizer.quantizer import Quantizer, Search

MEASURED_ROWS, MEASURED_AT_ONCE = 8192, 256  # training rows whose scales are measured, evenly spaced
Inputs = tuple[Tensor, Tensor, Condition]  # of the network: visible sums (B, L, H), masks (B, L, D), conditions


def gamma(schedule: MaskSchedule, r: float, slots: int) -> float:
    """The share masked at r in [0, 1], from 1 to 0. slots: N, for `exp`, which ends at one slot and not at none."""
    square, exp = 1 - r * r, 1 - 2 ** (-math.log2(max(slots, 1)) * (1 - r))
    shares = {"square": square, "circle": math.sqrt(max(0.0, square)), "cosine": math.cos(math.pi * r / 2)}
    return (shares | {"exp": exp, "linear": 1 - r})[schedule]


def masked_count(schedule: MaskSchedule, r: float, slots: int) -> int:
    """n = ceil(gamma(r) N), at least 1: how many slots a training example masks."""
    return min(slots, max(1, math.ceil(gamma(schedule, r, slots) * slots)))


def sampling_counts(schedule: MaskSchedule, steps: int, slots: int) -> list[int]:
    """n_0 = N > n_1 > ... > n_S = 0 masked slots after each step; with N < S the last steps have nothing to do."""
    counts, needed = [slots], min(steps, slots)
    for t in range(1, needed):
        target = math.floor(gamma(schedule, t / needed, slots) * slots)
        counts.append(min(counts[-1] - 1, max(needed - t, target)))
    return counts + [0] * (steps + 1 - len(counts))


def first_slots(keys_BLD: Tensor, open_BLD: Tensor, count_B: Tensor) -> Tensor:
    """The `count` open slots of each image with the smallest keys, the earlier one on a tie. (B, L, D) bool."""
    # By uniform keys the number of slots a position follows the multivariate hypergeometric distribution.
    keys_BN = keys_BLD.masked_fill(~open_BLD, math.inf).flatten(1)
    rank_BN = keys_BN.argsort(dim=1, stable=True).argsort(dim=1)
    return (rank_BN < count_B.unsqueeze(1)).view_as(keys_BLD) & open_BLD


def finest(count_BL: Tensor, depths: int) -> Tensor:
    """The mask whose highest `count` depths are masked: True where j >= D - k. (B, L, D) bool."""
    return torch.arange(depths, device=count_BL.device) >= depths - count_BL.unsqueeze(-1)


def mask_tokens(keys_BLD: Tensor, open_BLD: Tensor, count_B: Tensor, coarse_first: bool) -> Tensor:
    """A training mask of `count` open slots an item: k_i a position by lot, then its finest k_i, or the drawn ones."""
    drawn = first_slots(keys_BLD, open_BLD, count_B)
    return finest(drawn.sum(-1), drawn.shape[-1]) if coarse_first else drawn


def reveal(masked_BLD: Tensor, scores_BLD: Tensor, count_B: Tensor, coarse_first: bool) -> Tensor:
    """The mask after the `count` best masked slots of each image, or a position's as many coarsest, are revealed."""
    masked = masked_BLD & ~first_slots(-scores_BLD, masked_BLD, count_B)
    return finest(masked.sum(-1), masked.shape[-1]) if coarse_first else masked


@dataclass
class MaskBatch(Batch):
    """Codes, and the slots that are to be predicted."""

    masked_BLD: Tensor  # bool
    # Means over the whole global batch, by which losses are divided: a loss must not depend on how a batch is shared.
    positions: float = 0.0  # with a masked slot, an image
    slots: float = 0.0  # masked, an image


class MaskBatches(GeneratorBatches):
    """Codes, labels and masks of a training step."""

    def __init__(self, store: CodeStore, cfg: ResGenConfig, quantizer: Quantizer, seed: int) -> None:
        super().__init__(store, cfg, quantizer, seed)
        self.shape = math.prod(quantizer.grid), quantizer.steps  # (L, D); L = -1 where it is the item's
        self._last: tuple[int, Tensor, noise.Floats] | None = None

    @staticmethod
    def blank(cfg: ResGenConfig, quantizer: Quantizer, rows: int, spoken: tuple[int, int] | None = None) -> MaskBatch:
        L, D = spoken[0] if spoken else math.prod(quantizer.grid), quantizer.steps
        columns = GeneratorBatches.blank_columns(cfg, quantizer.books.shape[-1], rows, spoken)
        return MaskBatch(torch.zeros(rows, D, L).long(), columns, torch.ones(rows, L, D).bool(), L, L * D)

    def batch_at(self, step: int, rows: range) -> MaskBatch:
        store_rows, part = self.rows_at(step, rows), slice(rows.start, rows.stop)
        if self._last is None or self._last[0] != step:  # the micro-batches of a step share its random numbers
            all_rows = range(self.batch)
            open_BLD = self.open_slots(self.rows_at(step, all_rows), self.prompt_numbers(step, all_rows))
            uniform = noise.block_uniform(self.seed, step, all_rows, 2 + math.prod(open_BLD.shape[1:]))
            self._last = step, self._mask(uniform[:, 2:], open_BLD, uniform[:, 0].tolist()), uniform[:, 1]
        _, masked, uniform_B = self._last
        positions, slots = (float(x.sum()) / self.batch for x in (masked.any(-1), masked))
        codes, columns = self.read(store_rows, uniform_B[part], self.prompt_numbers(step, rows))
        return MaskBatch(codes, columns, masked[part, : codes.shape[2]], positions, slots)

    def open_slots(self, store_rows: noise.Ints, prompt_B: noise.Floats | None) -> Tensor:
        """The slots of each row that exist and are not of its prompt. (B, L, D) bool."""
        if not isinstance(self.store, RaggedStore):
            return torch.ones(len(store_rows), *self.shape, dtype=torch.bool)
        open_BS = torch.from_numpy(self.open_positions(store_rows, prompt_B))
        return open_BS.unsqueeze(-1).repeat(1, 1, self.shape[1])

    def _mask(self, keys: noise.Floats, open_BLD: Tensor, r_B: list[float]) -> Tensor:
        """The mask at r of each item, by its uniform keys."""
        objective, slots_B = self.objective, open_BLD.flatten(1).sum(1).tolist()
        count_B = torch.tensor([masked_count(objective.schedule, r, N) for r, N in zip(r_B, slots_B, strict=True)])
        keys_BLD = torch.from_numpy(keys.reshape(open_BLD.shape))
        return mask_tokens(keys_BLD, open_BLD, count_B, objective.order == "coarse-to-fine")

    def held_out_batches(self) -> Iterator[MaskBatch]:
        """Held-out rows, each at r = .1, ..., .9 under masks that are always the same."""
        for store_rows in self.held_out_rows():
            (codes, columns), open_BLD = self.read(store_rows), self.open_slots(store_rows, None)
            for tenth in range(1, 10):
                keys = noise.uniform_rows("mask", 0, *self.addresses(store_rows), tenth, open_BLD.shape[1:])
                yield MaskBatch(codes, columns, self._mask(keys, open_BLD, [tenth / 10] * len(store_rows)))


@torch.no_grad()
def measure(store: CodeStore, quantizer: Quantizer, objective: ResGenObjective) -> tuple[Tensor, float, str]:
    """rho (D + 1,), sigma_psi and its source of the training rows, RMS a dimension. Raises DataError if a rho is 0.

    rho_k: of the sum of the finest, or any, k depths' embeddings. sigma_psi: the recipe's; of z - z'_T; or rho_1 / 2.
    """
    rows = store.split()[0]
    rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), MEASURED_ROWS)).astype(np.int64)]
    device, D, error, count = quantizer.books.device, quantizer.steps, 0.0, 0
    moments_DD = torch.zeros(D, D, dtype=torch.float64, device=device)  # of e_j e_l over positions and dimensions
    for start in range(0, len(rows), MEASURED_AT_ONCE):
        part = rows[start : start + MEASURED_AT_ONCE]
        codes = torch.from_numpy(store.codes(part).astype(np.int64)).to(device)
        exists_BS = torch.from_numpy(store.exists(part)).to(device)
        books = (quantizer.look_up(codes[:, t - 1], t) for t in range(1, D + 1))
        e_DN = torch.stack([e_BCS.mT[exists_BS].flatten() for e_BCS in books]).double()
        moments_DD += e_DN @ e_DN.T
        count += e_DN.shape[1]
        if store.manifest.latents:
            z_BCS = torch.from_numpy(store.latents(part).astype(np.float32)).to(device)
            z_N = z_BCS.mT[exists_BS].flatten().double()
            error += float((z_N - e_DN.sum(0)).pow(2).sum())
    moments_DD /= count
    diagonal, total, squares = float(moments_DD.trace()), float(moments_DD.sum()), [1.0]
    for k in range(1, D + 1):
        if objective.order == "coarse-to-fine":
            squares.append(float(moments_DD[D - k :, D - k :].sum()))
        else:
            pairs = k * (k - 1) / (D * (D - 1)) if D > 1 else 0.0  # the share of pairs of depths among the k
            squares.append(diagonal * k / D + (total - diagonal) * pairs)
    rho = torch.tensor(squares).sqrt().float()
    if not bool((rho > 0).all()):
        hint = "train the tokenizer longer, or with fewer quantizer.steps, and tokenize again"
        raise DataError(f"{store.root}: the finest codes all stand for 0, so there is nothing to learn there", hint)
    if objective.sigma_psi is not None:
        return rho, objective.sigma_psi, "recipe"
    return (rho, math.sqrt(error / count), "latents") if error else (rho, 0.5 * float(rho[1]), "rho")


class MaskedNetwork(nn.Module):
    """Linear(H -> width) of the visible sum, transformer; the head; and the scales of the codes."""

    def __init__(self, cfg: ResGenNetwork, quantizer: Quantizer, classes: int) -> None:
        super().__init__()
        channels, depths = quantizer.books.shape[-1], quantizer.steps
        self.ratio_cond = cfg.ratio_cond
        self.input = nn.Linear(channels, cfg.hidden)
        self.trunk = Transformer(cfg, quantizer.grid, channels, classes)
        self.counts = nn.Embedding(depths + 1, cfg.hidden) if cfg.count_embed else None
        if self.counts is not None:
            nn.init.normal_(self.counts.weight, std=0.02)
        self.head: nn.Module  # direct: logits of every depth's token, (B, L, D·V)
        if cfg.target == "cumulative":
            self.head = mixture.MixtureHead(cfg.hidden, channels, cfg.mixtures, cfg.rank)
        else:
            self.head = nn.Sequential(OrderedDict(out=zero_linear(cfg.hidden, depths * quantizer.cfg.codes)))
        self.rho, self.sigma_psi = nn.Buffer(torch.ones(depths + 1)), nn.Buffer(torch.ones(()))
        self.coarse_first = nn.Buffer(torch.ones((), dtype=torch.bool))

    def forward(self, visible_BLH: Tensor, masked_BLD: Tensor, condition: Condition) -> Tensor:
        """The hidden state that the head sees, (B, L, width). visible: the sum of the visible embeddings."""
        x = self.input(visible_BLH / self.rho[-1]).float()  # the residual stream stays fp32 under autocast
        if self.counts is not None:
            x = x + self.counts((~masked_BLD).sum(-1))
        # The masked share, not counting padding, is embedded as a step of a thousand.
        ratio_B = 1000.0 * masked_BLD.flatten(1).float().mean(1)
        if condition.exists_BS is not None:
            ratio_B = ratio_B / condition.exists_BS.float().mean(1)
        return self.trunk(x, ratio_B if self.ratio_cond else torch.zeros_like(ratio_B), condition)


class ResGen(Generator):
    """The family: loss on masked codes, sampling in as many passes as asked for, whatever the depth."""

    network: MaskedNetwork

    def __init__(self, cfg: ResGenNetwork, quantizer: Quantizer, classes: int) -> None:
        self.quantizer, self.classes, self.objective = quantizer, classes, ResGenObjective()
        self.direct = cfg.target == "direct"
        self.network = MaskedNetwork(cfg, quantizer, classes)

    @staticmethod
    def check_codes(tokenizer: TokenizerArchitecture, origin: str) -> None:
        kind, bias = tokenizer.schedule.kind, tokenizer.quantizer.bias
        if kind != "rvq" or bias != "none":  # codes that fit noise, or a biased sum, cannot be requantised
            hint = "tokenize by such a tokenizer, e.g. of --recipe resgen-digits; or train RDPM, e.g. --recipe digits"
            reason = f"holds codes of schedule {kind} with bias {bias}, but ResGen needs schedule rvq and bias none"
            raise UsageError(f"{origin} {reason}", hint)

    @torch.no_grad()
    def sums(self, codes_BTS: Tensor, masked_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """u and z: sums of the visible and of the masked tokens' embeddings, (B, L, H) each; of none, exactly 0."""
        depths = [self.quantizer.look_up(codes_BTS[:, t - 1], t) for t in range(1, self.quantizer.steps + 1)]
        embedded_BLDH, masked = torch.stack(depths, 1).permute(0, 3, 1, 2), masked_BLD.unsqueeze(-1)
        return embedded_BLDH.masked_fill(masked, 0).sum(2), embedded_BLDH.masked_fill(~masked, 0).sum(2)

    def units(self, masked_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """rho_k and sigma_psi / rho_k of each position's number k of masked depths, (B, L) each."""
        rho_BL = self.network.rho[masked_BLD.sum(-1)]
        return rho_BL, self.network.sigma_psi / rho_BL

    def predict(self, visible_BLH: Tensor, masked_BLD: Tensor, condition: Condition) -> mixture.Mixture:
        """The distribution of z / rho_k at each position."""
        return self.network.head(self.network(visible_BLH, masked_BLD, condition), self.units(masked_BLD)[1] / 2)

    def predict_tokens(self, visible_BLH: Tensor, masked_BLD: Tensor, condition: Condition) -> Tensor:
        """Logits of every slot's token, (B, L, D, V), with `target: direct`."""
        logits = self.network.head(self.network(visible_BLH, masked_BLD, condition))
        return logits.float().unflatten(-1, (self.quantizer.steps, -1))

    def begin(self, cfg: ResGenConfig, store: CodeStore) -> dict[str, Any]:
        rho, sigma_psi, source = measure(store, self.quantizer, cfg.objective)
        self.network.rho.copy_(rho)
        self.network.sigma_psi.fill_(sigma_psi)
        self.network.coarse_first.fill_(cfg.objective.order == "coarse-to-fine")
        return {"sigma_psi": {"value": sigma_psi, "source": source}, "rho": rho.tolist()}

    def loss(self, batch: MaskBatch, step: TrainStep) -> tuple[Tensor, dict[str, Tensor]]:
        """L_mask in nats: a mean over positions with a masked slot, and dimensions; direct: over slots."""
        if self.direct:
            ce_BLD, right_BLD = self._token_losses(batch)
            count = len(batch.masked_BLD) * batch.slots
            ce = (ce_BLD * batch.masked_BLD).sum() / count
            return ce, {"nll": ce.detach(), "accuracy": (right_BLD & batch.masked_BLD).sum() / count}
        log_pi, kl, w, _ = self._divergences(batch)
        with full_precision(w):
            kind, open_BL = self.objective.mog_loss, batch.masked_BLD.any(-1)
            nll_BL = bound_BL = mixture.exact_nll(log_pi, kl)
            if kind == "clam":
                bound_BL = mixture.clam_loss(log_pi, kl)
            elif kind == "split":
                bound_BL = mixture.split_loss(log_pi, kl, self.objective.detach_resp)
            count = len(batch.masked_BLD) * batch.positions * w.shape[-1]
            nll, loss = ((x * open_BL).sum() / count for x in (nll_BL, bound_BL))
            # The effective number of components is 1 / sum of squared mean pi.
            mean_K = (log_pi.detach().exp() * open_BL.unsqueeze(-1)).sum((0, 1)) / open_BL.sum().clamp_min(1)
            return loss, {"nll": nll.detach(), "components": 1 / mean_K.pow(2).sum()}

    def _divergences(self, batch: MaskBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """log pi_c and KL_c (B, L, K), w = z / rho_k (B, L, H) and sp = sigma_psi / rho_k (B, L)."""
        visible, z = self.sums(batch.codes_BTS, batch.masked_BLD)
        mix = self.predict(visible, batch.masked_BLD, self.condition(batch.columns))
        with full_precision(visible):
            rho, sp = self.units(batch.masked_BLD)
            w = z / rho.unsqueeze(-1)
            return mix.logits_BLK.log_softmax(-1), mixture.divergences(mix, w, sp), w, sp

    def _token_losses(self, batch: MaskBatch) -> tuple[Tensor, Tensor]:
        """Cross-entropy of every slot's token, and whether the likeliest is right: (B, L, D) each."""
        visible, _ = self.sums(batch.codes_BTS, batch.masked_BLD)
        logits = self.predict_tokens(visible, batch.masked_BLD, self.condition(batch.columns))
        target_BLD = batch.codes_BTS.transpose(1, 2)
        ce = F.cross_entropy(logits.flatten(0, 2), target_BLD.flatten(), reduction="none")
        return ce.view(target_BLD.shape), logits.argmax(-1) == target_BLD

    @torch.no_grad()
    def held_out(self, batch: MaskBatch, baselines: None = None) -> dict[str, Tensor]:
        """By the number k = 1..D of masked depths: exact NLL and the baseline's, nats a dimension; direct: a token."""
        k_BL, D = batch.masked_BLD.sum(-1), self.quantizer.steps
        if self.direct:
            ce_BLD, _ = self._token_losses(batch)
            nll = (ce_BLD * batch.masked_BLD).sum(-1) / k_BL.clamp_min(1)
            baseline = torch.full_like(nll, self.quantizer.cfg.codes).log()
        else:
            log_pi, kl, w, sp = self._divergences(batch)
            nll, baseline = (x / w.shape[-1] for x in (mixture.exact_nll(log_pi, kl), mixture.gaussian_nll(w, sp)))
        k, measured = k_BL.flatten(), {}
        for name, values_BL in (("nll", nll), ("baseline", baseline)):
            total = nll.new_zeros(D + 1).index_add_(0, k, values_BL.flatten())
            measured[name] = torch.stack([total, k.bincount(minlength=D + 1)])[:, 1:]  # k = 0 has nothing to predict
        return measured

    def check(self, options: SampleOptions) -> None:
        slots = math.prod(self.quantizer.grid) * self.quantizer.steps
        if options.sampling.steps > slots > 0:  # negative where the number is the item's
            raise UsageError(f"--steps {options.sampling.steps}: an image has only {slots} tokens", "give fewer")

    def passes(self, options: SampleOptions, first: int = 1) -> int:
        s = options.sampling
        return sum(1 + (guidance_at(t, s.steps, s.cfg, s.cfg_schedule) > 0) for t in range(1, s.steps + 1))

    @torch.no_grad()
    def sample(self, columns: Columns, indices_B: Tensor, options: SampleOptions, known: Known | None = None) -> Tensor:
        """At each step predict all masked sums, requantise them, reveal the most confident tokens. codes_BTS."""
        self.check(options)
        condition, s, indices = self.condition(columns), options.sampling, indices_B.tolist()
        device, coarse_first = condition.vector_BD.device, bool(self.network.coarse_first)
        exists_BL = condition.exists_BS
        if exists_BL is None:
            exists_BL = torch.ones(len(indices), math.prod(self.quantizer.grid), dtype=torch.bool, device=device)
        masked_BLD = exists_BL.unsqueeze(-1).repeat(1, 1, self.quantizer.steps)
        codes_BLD, shape = torch.zeros_like(masked_BLD, dtype=torch.int64), masked_BLD.shape[1:]
        if known is not None:
            codes_BLD, masked_BLD = known.codes_BTS.transpose(1, 2), masked_BLD & ~known.keep_BTS.transpose(1, 2)
        if coarse_first and bool((masked_BLD[..., :-1] & ~masked_BLD[..., 1:]).any()):
            reason = "some known codes have coarser codes that are not known"
            raise UsageError(reason, "give the coarsest depths of a position")
        slots_B = masked_BLD.flatten(1).sum(1).tolist()
        counts_BS = torch.tensor([sampling_counts(s.schedule, s.steps, slots) for slots in slots_B], device=device)
        both = condition.joined(self.null_condition(columns)) if s.cfg else condition
        for t in range(1, s.steps + 1):
            visible, _ = self.sums(codes_BLD.transpose(1, 2), masked_BLD)
            lambda_t, inputs = guidance_at(t, s.steps, s.cfg, s.cfg_schedule), (visible, masked_BLD, condition)
            if lambda_t:  # one pass of 2B rows
                inputs = visible.repeat(2, 1, 1), masked_BLD.repeat(2, 1, 1), both
            tokens_BLD, confidence_BL = self._draw(t, lambda_t, inputs, masked_BLD, options, indices)
            codes_BLD = torch.where(masked_BLD, tokens_BLD, codes_BLD)
            gumbel = np.stack([noise.gumbel(options.seed, index, t, shape) for index in indices])
            temperature = s.conf_temp * (1 - t / s.steps) if s.conf_anneal else s.conf_temp
            scores = confidence_BL.unsqueeze(-1) + temperature * torch.from_numpy(gumbel).to(device)
            masked_BLD = reveal(masked_BLD, scores, counts_BS[:, t - 1] - counts_BS[:, t], coarse_first)
        return codes_BLD.transpose(1, 2)

    def _draw(
        self, t: int, lambda_t: float, inputs: Inputs, masked: Tensor, options: SampleOptions, indices: list[int]
    ) -> tuple[Tensor, Tensor]:
        """Tokens of all masked slots (B, L, D), and how sure each position is of its own (B, L)."""
        s, zeros, mix = options.sampling, [0] * len(indices), None
        if self.direct:
            logits = self.predict_tokens(*inputs)
            logits = (guide(logits, lambda_t) if lambda_t else logits) / max(s.z_temp, 1e-4)
        else:
            mix = self.predict(*inputs)
            mix = mix.guided(lambda_t, means=s.cfg_mode == "both") if lambda_t else mix
            logits = mix.logits_BLK
        uniform = noise.uniform_rows("component", options.seed, indices, zeros, t, logits.shape[1:-1])
        choice = mixture.draw(mixture.nucleus(logits, s.top_p), torch.from_numpy(uniform).to(masked.device))
        log_p = logits.log_softmax(-1).gather(-1, choice.unsqueeze(-1)).squeeze(-1)
        if mix is None:
            tokens, log_p = choice, (log_p * masked).sum(-1) / masked.sum(-1).clamp_min(1)
            density = log_p
        else:
            eps = noise.normal_rows("sample", options.seed, indices, zeros, [t] * len(zeros), mix.shift_BLH.shape[1:])
            w = mixture.vector_of(mix, choice, torch.from_numpy(eps).to(masked.device), s.z_temp)
            tokens = requantise(self.quantizer, w * self.units(masked)[0].unsqueeze(-1), masked)
            density = mixture.log_density(mix, w)
        if s.conf != "logp":
            return tokens, log_p if s.conf == "comp" else torch.zeros_like(log_p)
        # z-scores over an image's open positions, since densities of different k have different scales.
        open_BL = masked.any(-1)
        count = open_BL.sum(1, keepdim=True).clamp_min(1)
        mean = (density * open_BL).sum(1, keepdim=True) / count
        spread = (((density - mean) * open_BL).pow(2).sum(1, keepdim=True) / count).sqrt()
        return tokens, (density - mean) / spread.clamp_min(1e-6)


def requantise(quantizer: Quantizer, z_BLH: Tensor, masked_BLD: Tensor) -> Tensor:
    """Tokens of the masked depths, coarsest first, by residual quantisation of their sum z; else 0. (B, L, D) int64."""
    codes, residual = torch.zeros_like(masked_BLD, dtype=torch.int64), z_BLH.clone()
    for depth in range(quantizer.steps):
        rows, book = masked_BLD[..., depth], quantizer.book(depth + 1)
        if bool(rows.any()):
            nearest = Search(book).nearest(residual[rows])
            residual[rows] -= book[nearest]
            codes[..., depth][rows] = nearest
    return codes

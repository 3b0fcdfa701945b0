"""Masked tokens: which a training example hides, and sampling that reveals the surest first.

Legend: B images, L positions, D depths (the tokenizer's T). A slot is one (position, depth), N of them an image. A mask
is True where a token is masked. At the seams codes are (B, T, S), T = D, S = L."""

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rdpm_cli import noise
from rdpm_cli.codes.ragged import RaggedStore
from rdpm_cli.codes.store import CodeStore
from rdpm_cli.errors import UsageError
from rdpm_cli.generator.config import MaskSchedule
from rdpm_cli.generator.contract import Batch, Columns, Condition, Generator, GeneratorBatches, Known, SampleOptions
from rdpm_cli.generator.drawing import guidance_at
from rdpm_cli.tokenizer.quantizer import Quantizer


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
    number: int = 0  # of the numbers of masked slots at which held-out rows are measured


class MaskBatches(GeneratorBatches):
    """Codes, labels and masks of a training step."""

    def __init__(self, store: CodeStore, cfg: Any, quantizer: Quantizer, seed: int) -> None:
        super().__init__(store, cfg, quantizer, seed)
        self.shape = math.prod(quantizer.grid), quantizer.steps  # (L, D); L = -1 where it is the item's
        self._last: tuple[int, Tensor, noise.Floats] | None = None

    @staticmethod
    def blank(cfg: Any, quantizer: Quantizer, rows: int, spoken: tuple[int, int] | None = None) -> MaskBatch:
        L, D = spoken[0] if spoken else math.prod(quantizer.grid), quantizer.steps
        columns = GeneratorBatches.blank_columns(cfg, quantizer.books.shape[-1], rows, spoken)
        return MaskBatch(torch.zeros(rows, D, L).long(), columns, torch.ones(rows, L, D).bool(), L, L * D)

    def batch_at(self, step: int, rows: range) -> MaskBatch:
        store_rows, part = self.rows_at(step, rows), slice(rows.start, rows.stop)
        if self._last is None or self._last[0] != step:  # the micro-batches of a step share its random numbers
            all_rows = range(self.batch)
            open_BLD = self.open_slots(self.rows_at(step, all_rows), self.prompt_numbers(step, all_rows))
            uniform = noise.block_uniform(self.seed, step, all_rows, 2 + math.prod(open_BLD.shape[1:]))
            slots_B, r_B = open_BLD.flatten(1).sum(1).tolist(), uniform[:, 0].tolist()
            schedule = self.objective.schedule
            counts = [masked_count(schedule, r, slots) for r, slots in zip(r_B, slots_B, strict=True)]
            self._last = step, self._mask(uniform[:, 2:], open_BLD, counts), uniform[:, 1]
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

    def _mask(self, keys: noise.Floats, open_BLD: Tensor, counts: Sequence[int]) -> Tensor:
        """The mask of so many slots of each item, by its uniform keys."""
        keys_BLD = torch.from_numpy(keys.reshape(open_BLD.shape))
        return mask_tokens(keys_BLD, open_BLD, torch.tensor(counts), self.objective.order == "coarse-to-fine")

    def held_out_counts(self, slots: int) -> list[int]:
        """The numbers of masked slots at which an item of so many slots is measured: at r = .1, ..., .9."""
        return [masked_count(self.objective.schedule, tenth / 10, slots) for tenth in range(1, 10)]

    def held_out_batches(self) -> Iterator[MaskBatch]:
        """Held-out rows, each under masks that are always the same."""
        for store_rows in self.held_out_rows():
            (codes, columns), open_BLD = self.read(store_rows), self.open_slots(store_rows, None)
            counts = [self.held_out_counts(slots) for slots in open_BLD.flatten(1).sum(1).tolist()]
            for number, count_B in enumerate(zip(*counts, strict=True)):
                keys = noise.uniform_rows("mask", 0, *self.addresses(store_rows), number + 1, open_BLD.shape[1:])
                yield MaskBatch(codes, columns, self._mask(keys, open_BLD, count_B), number=number)


Inputs = tuple[Tensor, Tensor, Condition]  # codes (B, L, D), of which the masked ones do not count; masks; conditions


class MaskedGenerator(Generator):
    """A family that predicts all masked tokens at once, in as many passes as asked for."""

    quantizer: Quantizer

    @property
    def coarse_first(self) -> bool:
        """Whether a position's coarser depths are always visible before its finer ones."""
        return False

    @abstractmethod
    def draw_tokens(
        self, t: int, lambda_t: float, inputs: Inputs, options: SampleOptions, indices: list[int]
    ) -> tuple[Tensor, Tensor]:
        """Tokens of all masked slots (B, L, D) at step t, and how sure each is, of a shape that broadcasts to theirs.

        With lambda_t the inputs have 2B rows, and the second half's condition is the null one."""

    def check(self, options: SampleOptions) -> None:
        slots = math.prod(self.quantizer.grid) * self.quantizer.steps
        if options.sampling.steps > slots > 0:  # negative where the number is the item's
            raise UsageError(f"--steps {options.sampling.steps}: an image has only {slots} tokens", "give fewer")

    def check_known(self, keep_BTS: Tensor) -> None:
        if self.coarse_first and bool((keep_BTS[:, 1:] & ~keep_BTS[:, :-1]).any()):
            reason = "some known codes have coarser codes that are not known"
            raise UsageError(reason, "give the coarsest depths of a position")

    def passes(self, options: SampleOptions, first: int = 1) -> int:
        s = options.sampling
        return sum(1 + (guidance_at(t, s.steps, s.cfg, s.cfg_schedule) > 0) for t in range(1, s.steps + 1))

    @torch.no_grad()
    def sample(self, columns: Columns, indices_B: Tensor, options: SampleOptions, known: Known | None = None) -> Tensor:
        """At each step draw all masked tokens and reveal the most confident ones. codes_BTS."""
        self.check(options)
        condition, s, indices = self.condition(columns), options.sampling, indices_B.tolist()
        device, exists_BL = condition.vector_BD.device, condition.exists_BS
        if exists_BL is None:
            exists_BL = torch.ones(len(indices), math.prod(self.quantizer.grid), dtype=torch.bool, device=device)
        masked_BLD = exists_BL.unsqueeze(-1).repeat(1, 1, self.quantizer.steps)
        codes_BLD, shape = torch.zeros_like(masked_BLD, dtype=torch.int64), masked_BLD.shape[1:]
        if known is not None:
            self.check_known(known.keep_BTS)
            codes_BLD, masked_BLD = known.codes_BTS.transpose(1, 2), masked_BLD & ~known.keep_BTS.transpose(1, 2)
        slots_B = masked_BLD.flatten(1).sum(1).tolist()
        counts_BS = torch.tensor([sampling_counts(s.schedule, s.steps, slots) for slots in slots_B], device=device)
        both = condition.joined(self.null_condition(columns)) if s.cfg else condition
        for t in range(1, s.steps + 1):
            lambda_t, inputs = guidance_at(t, s.steps, s.cfg, s.cfg_schedule), (codes_BLD, masked_BLD, condition)
            if lambda_t:  # one pass of 2B rows
                inputs = codes_BLD.repeat(2, 1, 1), masked_BLD.repeat(2, 1, 1), both
            tokens_BLD, confidence = self.draw_tokens(t, lambda_t, inputs, options, indices)
            codes_BLD = torch.where(masked_BLD, tokens_BLD, codes_BLD)
            gumbel = np.stack([noise.gumbel(options.seed, index, t, shape) for index in indices])
            temperature = s.conf_temp * (1 - t / s.steps) if s.conf_anneal else s.conf_temp
            scores = confidence + temperature * torch.from_numpy(gumbel).to(device)
            masked_BLD = reveal(masked_BLD, scores, counts_BS[:, t - 1] - counts_BS[:, t], self.coarse_first)
        return codes_BLD.transpose(1, 2)

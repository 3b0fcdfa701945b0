"""ResGen's batches: stored codes, and masks over positions × depths.

Legend: B images, L positions, D depths (the tokenizer's T), H W grid.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rdpm_cli import noise
from rdpm_cli.codes.store import CodeStore
from rdpm_cli.config import ResGenConfig
from rdpm_cli.generator.batches import StoreBatches
from rdpm_cli.generator.masking import mask_tokens, masked_count
from rdpm_cli.tokenizer.quantizer import Quantizer

HELD_OUT_R = [place / 10 for place in range(1, 10)]


@dataclass
class MaskBatch:
    """A batch of one process."""

    codes_BTHW: Tensor  # int64
    labels_B: Tensor  # int64; the null class where the label was dropped
    masked_BLD: Tensor  # bool
    positions: float = 0.0  # with a masked token, an image: the mean of the global batch, by which losses are divided
    slots: float = 0.0  # masked, an image: the same

    def to(self, device: torch.device) -> "MaskBatch":
        """The same batch on a device."""
        codes, labels, masked = (x.to(device) for x in (self.codes_BTHW, self.labels_B, self.masked_BLD))
        return replace(self, codes_BTHW=codes, labels_B=labels, masked_BLD=masked)


def blank(cfg: ResGenConfig, quantizer: Quantizer, grid: tuple[int, int], rows: int) -> MaskBatch:
    """A micro-batch of the right shapes, for measuring what a step takes."""
    L, D = grid[0] * grid[1], quantizer.steps
    codes, labels = torch.zeros(rows, D, *grid, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64)
    return MaskBatch(codes, labels, torch.ones(rows, L, D, dtype=torch.bool), L, L * D)


class MaskBatches(StoreBatches):
    """batch_at(step, rows): codes, labels and masks of a training step, a pure function of (seed, step)."""

    def __init__(self, store: CodeStore, cfg: ResGenConfig, quantizer: Quantizer, seed: int) -> None:
        super().__init__(store, cfg.train.batch, seed)
        m = store.manifest
        self.objective, self.shape = cfg.objective, (m.grid[0] * m.grid[1], m.steps)
        self.coarse_first = cfg.objective.order == "coarse-to-fine"
        self._last: tuple[int, Tensor, NDArray[np.float32]] | None = None

    def batch_at(self, step: int, rows: range) -> MaskBatch:
        """rows: this process's rows of the global batch."""
        own, part = self.own(step, rows), slice(rows.start, rows.stop)
        masked, uniform_B = self._global(step)
        return MaskBatch(
            codes_BTHW=torch.from_numpy(self.codes(own)),
            labels_B=torch.from_numpy(self.labels_or_null(own, uniform_B[part], self.objective.label_drop)),
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
        for own in self.held_out_rows():
            codes, labels = torch.from_numpy(self.codes(own)), torch.from_numpy(self.labels(own))
            index, view = self.store.index[own].tolist(), self.store.view(own).tolist()
            for place, r in enumerate(HELD_OUT_R, 1):
                keys = torch.from_numpy(noise.uniform_rows("mask", 0, index, view, place, self.shape))
                yield MaskBatch(codes, labels, self._mask(keys, [r] * len(own)))

"""What the families share in training: the rows of a step, the task of the training loop, held-out means.

Legend: B images, T steps, S positions of the flattened grid.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rdpm_cli import noise
from rdpm_cli.codes.store import CodeStore
from rdpm_cli.distributed import TrainStep
from rdpm_cli.errors import some_of
from rdpm_cli.generator.conditions import store_columns
from rdpm_cli.generator.contract import Generator, GeneratorBatches, Tally

EVALUATED_ROWS = 256  # held-out rows measured at most
EVALUATED_AT_ONCE = 32


@dataclass
class Batch:
    """A batch of one process; a family adds its fields."""

    codes_BTS: Tensor  # int64
    columns: dict[str, Tensor]  # conditions, (B,) each; the null class where a label was dropped

    def __len__(self) -> int:
        return len(self.codes_BTS)

    def to(self, device: torch.device) -> Self:
        """The same batch on a device."""
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        columns = {name: column.to(device) for name, column in self.columns.items()}
        return replace(self, **tensors, columns=columns)


class StoreBatches:
    """Rows of a step, a pure function of (seed, step)."""

    def __init__(self, store: CodeStore, batch: int, seed: int) -> None:
        """batch: images a step, over all processes."""
        self.store, self.batch, self.seed = store, batch, seed
        self.rows, self.held_out = store.split()

    @property
    def images(self) -> int:
        """Training images, the unit of an epoch."""
        return len(self.rows) // self.store.manifest.views

    def rows_at(self, step: int, rows: range) -> NDArray[np.int64]:
        """Rows of the store, for rows of the global batch."""
        return self.rows[noise.epoch_rows(self.seed, step, self.batch, len(self.rows))[rows.start : rows.stop]]

    def describe(self, step: int, rows: range) -> str:
        """The source indices and views of those rows."""
        pairs = zip(*self.addresses(self.rows_at(step, rows)), strict=True)
        return f"images:views {some_of(f'{index}:{view}' for index, view in pairs)}"

    def addresses(self, store_rows: NDArray[np.int64]) -> tuple[list[int], list[int]]:
        """Source indices and views of rows of the store, by which their noise is addressed."""
        return self.store.index[store_rows].tolist(), self.store.view(store_rows).tolist()

    def codes(self, store_rows: NDArray[np.int64]) -> Tensor:
        """(B, T, S) int64."""
        return torch.from_numpy(self.store.codes(store_rows).astype(np.int64))

    def columns(
        self, store_rows: NDArray[np.int64], uniform_B: NDArray[np.float32] | None = None, drop: float = 0.0
    ) -> dict[str, Tensor]:
        """Conditions, (B,) each; the null class where uniform_B < drop."""
        return store_columns(self.store, store_rows, uniform_B, drop)

    def held_out_rows(self) -> Iterator[NDArray[np.int64]]:
        """The held-out rows that are measured, EVALUATED_AT_ONCE at a time."""
        measured = self.held_out[:: max(1, len(self.held_out) // EVALUATED_ROWS)][:EVALUATED_ROWS]
        for start in range(0, len(measured), EVALUATED_AT_ONCE):
            yield measured[start : start + EVALUATED_AT_ONCE]


class GeneratorTask:
    """The training loop's one player: the family's network and its loss."""

    name = "generator"
    start = 0

    def __init__(self, generator: Generator) -> None:
        self.generator = generator

    @property
    def model(self) -> nn.Module:
        """The network to train."""
        return self.generator.network

    def networks(self) -> list[nn.Module]:
        """The network as a whole; its heads, a layer each, run outside it and are not compiled."""
        return [self.generator.network]

    def loss(self, batch: Any, step: TrainStep) -> tuple[Tensor, dict[str, Tensor]]:
        """The family's loss."""
        return self.generator.loss(batch, step)

    def after_step(self, step: TrainStep) -> dict[str, Tensor]:
        """Nothing follows a step."""
        return {}


def held_out(generator: Generator, batches: GeneratorBatches, device: torch.device) -> dict[str, list[float | None]]:
    """The family's measurements on held-out codes under held-out draws, with the model-free baseline."""
    totals: dict[str, Tally] = {}
    for batch in batches.held_out_batches():
        for name, tally in generator.held_out(batch.to(device)).items():
            totals[name] = totals[name] + tally if name in totals else tally
    return {name: tally.means() for name, tally in totals.items()}

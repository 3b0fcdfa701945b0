"""What the families share in training: the rows of a step, the task of the training loop, held-out means."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rdpm_cli import noise
from rdpm_cli.codes.store import CodeStore
from rdpm_cli.distributed import TrainStep
from rdpm_cli.errors import some_of
from rdpm_cli.generator.conditions import drop_labels
from rdpm_cli.generator.contract import Generator, GeneratorBatches, Tally

EVALUATED_ROWS = 256  # held-out rows measured at most


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

    def codes(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """(n, T, S)."""
        return self.store.codes(rows).astype(np.int64)

    def labels(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """(n,)."""
        return self.store.columns["labels"][rows].astype(np.int64)

    def labels_or_null(self, rows: NDArray[np.int64], uniform_B: NDArray[np.float32], drop: float) -> NDArray[np.int64]:
        """The null class where the uniform number is below `drop`."""
        return drop_labels(self.labels(rows), uniform_B, drop, len(self.store.manifest.class_names))

    def describe(self, step: int, rows: range) -> str:
        """The source indices and views of those rows."""
        store_rows = self.rows_at(step, rows)
        pairs = zip(self.store.index[store_rows].tolist(), self.store.view(store_rows).tolist(), strict=True)
        return f"images:views {some_of(f'{index}:{view}' for index, view in pairs)}"

    def held_out_rows(self, size: int = 32) -> Iterator[NDArray[np.int64]]:
        """Held-out rows that are measured, in parts."""
        measured = self.held_out[:: max(1, len(self.held_out) // EVALUATED_ROWS)][:EVALUATED_ROWS]
        for start in range(0, len(measured), size):
            yield measured[start : start + size]


class GeneratorTask:
    """One player: the family's network."""

    name = "generator"
    start = 0

    def __init__(self, generator: Generator) -> None:
        self.generator = generator

    @property
    def model(self) -> nn.Module:
        """What is trained."""
        return self.generator.network

    def networks(self) -> list[nn.Module]:
        """The whole, but for its heads, which are a layer each."""
        return [self.generator.network]

    def loss(self, batch: Any, step: TrainStep) -> tuple[Tensor, dict[str, Tensor]]:
        """The family's loss."""
        return self.generator.loss(batch, step)

    def after_step(self, step: TrainStep) -> dict[str, Tensor]:
        """Nothing follows a step."""
        return {}


def held_out(generator: Generator, batches: GeneratorBatches, device: torch.device) -> dict[str, list[float | None]]:
    """The family's measurements on held-out codes under held-out draws, next to the model-free baseline."""
    total: dict[str, Tally] = {}
    for batch in batches.held_out_batches():
        for name, part in generator.held_out(batch.to(device)).items():
            total[name] = total[name] + part if name in total else part
    return {name: tally.means() for name, tally in total.items()}

"""What the families' batches share: which rows of the store a step takes, their labels, which are held out."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from rdpm_cli import noise
from rdpm_cli.codes.store import CodeStore
from rdpm_cli.errors import some_of

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

    def own(self, step: int, rows: range) -> NDArray[np.int64]:
        """Rows of the store, for rows of the global batch."""
        return self.rows[noise.epoch_rows(self.seed, step, self.batch, len(self.rows))[rows.start : rows.stop]]

    def codes(self, own: NDArray[np.int64]) -> NDArray[np.int64]:
        """(n, T, h, w)."""
        return self.store.codes(own).astype(np.int64)

    def labels(self, own: NDArray[np.int64]) -> NDArray[np.int64]:
        """(n,)."""
        return self.store.labels[own].astype(np.int64)

    def labels_or_null(self, own: NDArray[np.int64], uniform_B: NDArray[np.float32], drop: float) -> NDArray[np.int64]:
        """The null class where the uniform number is below `drop`."""
        return np.where(uniform_B < drop, len(self.store.manifest.class_names), self.labels(own))

    def describe(self, step: int, rows: range) -> str:
        """The source indices and views of those rows."""
        own = self.own(step, rows)
        pairs = zip(self.store.index[own].tolist(), self.store.view(own).tolist(), strict=True)
        return f"images:views {some_of(f'{index}:{view}' for index, view in pairs)}"

    def held_out_rows(self, size: int = 32) -> Iterator[NDArray[np.int64]]:
        """Held-out rows that are measured, in parts."""
        chosen = self.held_out[:: max(1, len(self.held_out) // EVALUATED_ROWS)][:EVALUATED_ROWS]
        for start in range(0, len(chosen), size):
            yield chosen[start : start + size]

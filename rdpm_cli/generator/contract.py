"""The whole contract between a generator family and everything else."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from rdpm_cli.codes.store import CodeStore
from rdpm_cli.config import GeneratorArchitecture, GeneratorConfig, SamplingConfig
from rdpm_cli.step import TrainStep


@dataclass(frozen=True)
class SampleOptions:
    """What, with checkpoint, label and index, fixes a sample."""

    sampling: SamplingConfig  # the family's own
    seed: int = 0


@dataclass
class Known:
    """Codes that are given: in-painting, and ResGen's caps."""

    codes_BTHW: Tensor  # int64
    keep_BTHW: Tensor  # bool, True where the code is kept


@dataclass
class Tally:
    """A held-out measurement in parts: sums, and of how many, by step t or by the number of masked depths."""

    total: Tensor
    count: Tensor

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(self.total + other.total, self.count + other.count)

    def means(self) -> list[float | None]:
        """Means; None where nothing was counted."""
        parts = zip(self.total.tolist(), self.count.tolist(), strict=True)
        return [total / count if count else None for total, count in parts]


class GeneratorBatches(Protocol):
    """A family's batches from a code store: those of training, and the held-out ones."""

    @property
    def images(self) -> int:
        """Training images, the unit of an epoch."""

    def batch_at(self, step: int, rows: range) -> Any:
        """rows of the global batch of this step, with a method `to(device)`; a function of (seed, step)."""

    def describe(self, step: int, rows: range) -> str:
        """What those rows are, for an error message."""

    def held_out_batches(self) -> Iterator[Any]:
        """What `held_out` measures: images, and draws, that training never saw."""


class Generator(Protocol):
    """One family. `network` holds the trainable parameters of the generator alone; its `trunk` is the Transformer."""

    network: nn.Module
    classes: int

    @property
    def cfg(self) -> GeneratorArchitecture:
        """Its family and sizes."""

    def begin(self, cfg: GeneratorConfig, store: CodeStore) -> dict[str, Any]:
        """Take what training needs of the recipe and measure what the network keeps of the store. -> provenance."""

    def loss(self, batch: Any, step: TrainStep) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss and logs of a batch of the family's."""

    def check(self, options: SampleOptions) -> None:
        """Raise UsageError for options that this family or its tokenizer cannot use."""

    def passes(self, options: SampleOptions, first: int = 1) -> int:
        """Rows that go through the network for one sample: two at a guided step, one at another, none at a skipped.

        first: the codes of depths before it are given.
        """

    def sample(self, labels_B: Tensor, indices_B: Tensor, options: SampleOptions, known: Known | None = None) -> Tensor:
        """codes (B, T, h, w) int64. Row i depends on (options, labels_B[i], indices_B[i]) alone."""

    def held_out(self, batch: Any) -> dict[str, Tally]:
        """Measurements of a held-out batch, the model-free `baseline` among them."""


@runtime_checkable
class Trajectories(Protocol):
    """A family that tells how its samples come about."""

    def trajectory(
        self, labels_B: Tensor, indices_B: Tensor, options: SampleOptions, known: Known | None = None
    ) -> dict[str, Tensor]:
        """Numbers of the samples that `sample` draws, by name, (B, T) each; NaN where a step has none."""

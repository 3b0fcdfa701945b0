"""The contract between a generator family and everything else. It imports no family.

Legend: B rows, T quantisation steps, S positions of the flattened grid, D width, M tokens of a condition.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from rdpm_cli.codes.store import CodeStore
from rdpm_cli.distributed import TrainStep
from rdpm_cli.generator.config import GeneratorArchitecture, GeneratorConfig, SamplingConfig


class Condition(NamedTuple):
    """What samples are asked to be, one row each, embedded. A class is one kind of it (`conditions.py`)."""

    vector_BD: Tensor  # added to the embedding of t, for AdaLN
    tokens_BMD: Tensor | None = None  # tokens to attend to, in front of the positions
    mask_BM: Tensor | None = None  # bool, True where such a token exists; None: all of them do
    latents_BSD: Tensor | None = None  # added to the input tokens

    def joined(self, second: "Condition") -> "Condition":
        """The rows of this condition, then those of another one of the same kind."""
        pairs = zip(self, second, strict=True)
        return Condition(*(None if a is None or b is None else torch.cat([a, b]) for a, b in pairs))  # type: ignore[arg-type]


@dataclass(frozen=True)
class SampleOptions:
    """The family's sampling options and the seed; with checkpoint, condition and index they fix a sample."""

    sampling: SamplingConfig
    seed: int = 0


@dataclass
class Known:
    """Codes that are given, as for in-painting."""

    codes_BTS: Tensor  # int64
    keep_BTS: Tensor  # bool, True where the code is kept


@dataclass
class Tally:
    """A held-out measurement as sums and counts, by step t or by the number of masked depths."""

    total: Tensor
    count: Tensor

    def __add__(self, second: "Tally") -> "Tally":
        return Tally(self.total + second.total, self.count + second.count)

    def means(self) -> list[float | None]:
        """Means; None where nothing was counted."""
        pairs = zip(self.total.tolist(), self.count.tolist(), strict=True)
        return [total / count if count else None for total, count in pairs]


class GeneratorBatches(Protocol):
    """A family's batches from a code store: those of training, and the held-out ones."""

    @property
    def images(self) -> int:
        """Training images, the unit of an epoch."""

    def batch_at(self, step: int, rows: range) -> Any:
        """rows of the global batch of this step, with a method `to(device)`; a function of (seed, step)."""

    def describe(self, step: int, rows: range) -> str:
        """The items of those rows, for an error message."""

    def held_out_batches(self) -> Iterator[Any]:
        """Batches of images and draws that training never saw, for `Generator.held_out`."""


class Generator(Protocol):
    """One family. `network` holds the trainable parameters of the generator alone; its `trunk` is the Transformer."""

    network: nn.Module
    classes: int

    @property
    def cfg(self) -> GeneratorArchitecture:
        """Its family and sizes."""

    def begin(self, cfg: GeneratorConfig, store: CodeStore) -> dict[str, Any]:
        """Take what training needs of the recipe, and measure what the network keeps of the store. -> provenance."""

    def loss(self, batch: Any, step: TrainStep) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss and logs of one of the family's batches."""

    def condition(self, columns: Mapping[str, Tensor]) -> Condition:
        """The store's condition columns, e.g. {"labels": (B,) int64}, as a Condition."""

    def check(self, options: SampleOptions) -> None:
        """Raise UsageError for options that this family or its tokenizer cannot use."""

    def passes(self, options: SampleOptions, first: int = 1) -> int:
        """Rows that go through the network for one sample: two at a guided step, one at any other evaluated step.

        first: codes of the steps before it are given.
        """

    def sample(
        self, condition: Condition, indices_B: Tensor, options: SampleOptions, known: Known | None = None
    ) -> Tensor:
        """codes_BTS int64. Row i depends on (options, condition row i, indices_B[i]) alone."""

    def held_out(self, batch: Any) -> dict[str, Tally]:
        """Measurements of a held-out batch; `baseline` is the model-free one."""

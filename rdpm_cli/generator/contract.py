"""The whole contract between a generator family and everything else. It imports no family.

Legend: B samples or images, T steps, S positions of the flattened grid, M tokens of the condition, D width.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from rdpm_cli.codes.store import CodeStore
from rdpm_cli.distributed import TrainStep
from rdpm_cli.generator.config import GeneratorArchitecture, SamplingConfig
from rdpm_cli.tokenizer.config import TokenizerArchitecture
from rdpm_cli.tokenizer.quantizer import Quantizer


class Condition(NamedTuple):
    """What samples are asked to be, embedded, one row each. A class is one kind of it (`conditions.py`)."""

    vector_BD: Tensor  # added to the embedding of t, for AdaLN
    tokens_BMD: Tensor | None = None  # to attend to, in front of the positions
    mask_BM: Tensor | None = None  # bool, True where such a token exists; None: all do
    latents_BSD: Tensor | None = None  # added to the input of the positions

    def joined(self, second: "Condition") -> "Condition":
        """The rows of both, for one pass of the network. They must have the same parts."""
        pairs = zip(self, second, strict=True)
        vector, *rest = (None if a is None or b is None else torch.cat([a, b]) for a, b in pairs)
        assert vector is not None
        return Condition(vector, *rest)


class Known(NamedTuple):
    """Codes that samples keep: for editing."""

    codes_BTS: Tensor  # int64
    keep_BTS: Tensor  # bool, True where the code is kept


@dataclass(frozen=True)
class SampleOptions:
    """What fixes a sample, together with checkpoint, condition and index."""

    sampling: SamplingConfig  # the family's
    seed: int = 0


@dataclass
class Tally:
    """Sums and counts of a held-out measurement, by step t or by the number of masked depths."""

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

    def __init__(self, store: CodeStore, cfg: Any, quantizer: Quantizer, seed: int) -> None:
        """cfg: the family's config."""

    @staticmethod
    def blank(cfg: Any, quantizer: Quantizer, rows: int) -> Any:
        """A batch without content, for measuring what a step costs."""

    @property
    def images(self) -> int:
        """Training images, the unit of an epoch."""

    def batch_at(self, step: int, rows: range) -> Any:
        """These rows of the step's global batch, with a method `to(device)`; a function of (seed, step)."""

    def describe(self, step: int, rows: range) -> str:
        """The items of those rows, for an error message."""

    def held_out_batches(self) -> Iterator[Any]:
        """Batches of images and draws that training never saw, for `Generator.held_out`."""


class Generator(Protocol):
    """One family. `network` holds the trainable parameters of the generator only; its `trunk` is the Transformer."""

    network: nn.Module
    classes: int

    def __init__(self, cfg: Any, quantizer: Quantizer, classes: int) -> None:
        """cfg: the family's architecture. quantizer: the frozen tokenizer's."""

    @staticmethod
    def check_codes(tokenizer: TokenizerArchitecture, origin: str) -> None:
        """Raise UsageError, naming a recipe that fits, if the family cannot learn this tokenizer's codes.

        origin: what holds the codes, for the message.
        """

    @property
    def cfg(self) -> GeneratorArchitecture:
        """Its family and sizes."""

    def begin(self, cfg: Any, store: CodeStore) -> dict[str, Any]:
        """Take the training options, and measure the constants that the network keeps of the store. -> provenance."""

    def condition(self, columns: Mapping[str, Tensor]) -> Condition:
        """The condition of rows with these columns of the store, e.g. {"labels": (B,) int64}."""

    def null_condition(self, count: int) -> Condition:
        """The condition of rows that are asked for nothing, for guidance."""

    def loss(self, batch: Any, step: TrainStep) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss and logs of one of the family's batches."""

    def held_out(self, batch: Any) -> dict[str, Tally]:
        """Measurements of a held-out batch; `baseline` is the model-free one."""

    def check(self, options: SampleOptions) -> None:
        """Raise UsageError for options that this family or its tokenizer cannot use."""

    def passes(self, options: SampleOptions, first: int = 1) -> int:
        """Rows through the network for one sample: two at a guided step, none at one without a network call.

        first: the first step whose codes are drawn.
        """

    def sample(
        self, condition: Condition, indices_B: Tensor, options: SampleOptions, known: Known | None = None
    ) -> Tensor:
        """codes (B, T, S) int64. Row i depends on row i of condition, indices_B and known, and on the options."""

"""The contract between a generator family and everything else, and what families share in training. Knows no family.

Legend: B samples or images, T steps, S positions of the flattened grid, M tokens of the condition, D width."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rdpm_cli import noise
from rdpm_cli.codes.heldout import PURPOSE, EncodedImages, EncodedRecordings
from rdpm_cli.codes.ragged import RaggedStore
from rdpm_cli.codes.store import CodeStore
from rdpm_cli.distributed import TrainStep
from rdpm_cli.errors import some_of
from rdpm_cli.tokenizer.config import TokenizerArchitecture
from rdpm_cli.tokenizer.quantizer import Quantizer
from rdpm_cli.training.loop import DeviceBatch, Player

EVALUATED_ROWS, EVALUATED_AT_ONCE = 256, 32  # held-out rows of a store measured at most
HELD_OUT_PROMPT = 3  # the prompt of a held-out row is a third of its units


class Condition(NamedTuple):
    """What samples are asked to be, embedded, one row each. `Transformer.condition` makes it of columns."""

    vector_BD: Tensor  # added to the embedding of t, for AdaLN
    tokens_BMD: Tensor | None = None  # to attend to, in front of the positions, or by cross-attention where it is text
    mask_BM: Tensor | None = None  # bool, True where such a token exists; None: all do
    latents_BSD: Tensor | None = None  # added to the input of the positions
    exists_BS: Tensor | None = None  # bool, True where the row has a position; None: it has all
    known_BS: Tensor | None = None  # bool, True at the positions of a prompt

    def joined(self, second: "Condition") -> "Condition":
        """The rows of both, for one pass of the network. They must have the same parts."""
        pairs = zip(self, second, strict=True)
        return Condition._make(None if a is None or b is None else torch.cat([a, b]) for a, b in pairs)


Columns = Mapping[str, Tensor]  # conditions of rows by name, the first axis B; "labels", or those of sound


class Known(NamedTuple):
    """Codes that samples keep: for editing."""

    codes_BTS: Tensor  # int64
    keep_BTS: Tensor  # bool, True where the code is kept


class Guide(NamedTuple):
    """A weaker generator of the same codes and family: autoguidance, arXiv 2406.02507."""

    generator: "Generator"
    digest: str


@dataclass(frozen=True)
class SampleOptions:
    """What fixes a sample, together with checkpoint, condition and index."""

    sampling: Any  # the family's SamplingConfig
    seed: int = 0
    noise: tuple[str, int] = ("sample", 0)  # purpose and view of the noise under which codes are drawn, for `replays`
    guide: "Guide | None" = None  # in place of the null class


class Generator(Protocol):
    """One family."""

    network: Any  # a module of all trainable parameters, without the tokenizer's; its `trunk` is the Transformer
    classes: int  # without the null class, which is number `classes`
    objective: Any = None  # of training
    replays: bool = False  # whether it learns codes under their noise, and so can draw under that of a store's images

    def __init__(self, cfg: Any, quantizer: Quantizer, classes: int) -> None:
        """cfg: of the network. quantizer: the frozen tokenizer's."""

    @staticmethod
    def check_codes(tokenizer: TokenizerArchitecture, origin: str) -> None:
        """Raise UsageError, naming `origin` and a recipe, if the family cannot learn this tokenizer's codes."""

    def begin(self, cfg: Any, store: CodeStore) -> dict[str, Any]:
        """Measure the constants that the network keeps of the store. -> provenance."""
        return {}

    def condition(self, columns: Columns) -> Condition:
        """The condition of rows with these columns of the store, e.g. {"labels": (B,) int64}."""
        return self.network.trunk.condition(columns)

    def null_condition(self, columns: Columns) -> Condition:
        """The condition of the same rows when they are asked for no class, or no text, for guidance."""
        name = "text" if "text" in columns else "labels"
        column = columns[name]  # -1 behind the end of a text stays
        return self.condition({**columns, name: torch.where(column < 0, column, self.classes)})

    def loss(self, batch: Any, step: TrainStep) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss and logs of one of the family's batches, without that of the durations of units."""

    def fit_baselines(self, store: CodeStore, rows: noise.Ints) -> Any:
        """What predicts the codes without a network, fitted on these rows, for `held_out`. None: nothing."""
        return None

    def held_out(self, batch: Any, baselines: Any = None) -> dict[str, Tensor]:
        """Measurements of a held-out batch, sums and counts (2, n); `baseline` is the model-free one.

        baselines: of `fit_baselines`, to be measured too."""

    def check(self, options: SampleOptions) -> None:
        """Raise UsageError for options that this family or its tokenizer cannot use."""

    def check_known(self, keep_BTS: Tensor) -> None:
        """Raise UsageError if this family cannot keep these codes; True where the code is kept."""
        return

    def passes(self, options: SampleOptions, first: int = 1) -> int:
        """Passes of the network for one sample whose codes are drawn from step `first` on, two where it is guided."""

    def sample(self, columns: Columns, indices_B: Tensor, options: SampleOptions, known: Known | None = None) -> Tensor:
        """codes (B, T, S) int64. Row i depends on row i of columns, indices_B and known, and on the options."""


@dataclass
class Batch(DeviceBatch):
    """A batch of one process; a family adds its fields."""

    codes_BTS: Tensor  # int64
    columns: dict[str, Tensor]  # conditions, (B,) each; the null class where a label was dropped

    def to(self, device: torch.device) -> Self:
        columns = {name: column.to(device) for name, column in self.columns.items()}
        return replace(super().to(device), columns=columns)


class GeneratorBatches(ABC):
    """A family's batches from a code store, pure functions of (seed, step), and the held-out ones."""

    def __init__(self, store: CodeStore, cfg: Any, quantizer: Quantizer, seed: int) -> None:
        self.store, self.objective, self.batch, self.seed = store, cfg.objective, cfg.train.batch, seed
        self.align = cfg.network.align
        self.rows, self.held_out = store.split()
        self.images = len(self.rows) // store.manifest.views  # the unit of an epoch
        self.purpose, self.evaluated_rows = "encode", EVALUATED_ROWS  # of the codes' noise; held-out rows at most
        self._sorted: tuple[int, noise.Ints] | None = None  # steps, and the rows of their batches

    @staticmethod
    @abstractmethod
    def blank(cfg: Any, quantizer: Quantizer, rows: int, spoken: tuple[int, int] | None = None) -> Any:
        """A batch without content, for measuring what a step costs. spoken: latents and units of a row of sound."""

    @staticmethod
    def blank_columns(cfg: Any, channels: int, rows: int, spoken: tuple[int, int] | None) -> dict[str, Tensor]:
        """Columns without content. spoken: latents and units of a row of sound, None of images."""
        if spoken is None:
            return {"labels": torch.zeros(rows).long()}
        S, N = spoken
        columns = {"text": torch.zeros(rows, N).long(), "latents": torch.zeros(rows, channels, S)}
        if cfg.network.align == "cross":
            return {**columns, "lengths": torch.full((rows,), S), "known": torch.zeros(rows, S, dtype=torch.bool)}
        return {**columns, "durations": torch.full((rows, N), S // N), "known": torch.zeros(rows).long()}

    @abstractmethod
    def batch_at(self, step: int, rows: range) -> Any:
        """These rows of the step's global batch."""

    @abstractmethod
    def held_out_batches(self) -> Iterator[Any]:
        """Batches of images and draws that training never saw, for `Generator.held_out`."""

    def of_items(self, items: EncodedImages | EncodedRecordings) -> Self:
        """The same family's held-out batches, of all these images or recordings."""
        batches = copy.copy(self)
        batches.store, batches.held_out = items, np.arange(len(items))
        batches.purpose, batches.evaluated_rows = PURPOSE, len(items)
        return batches

    def prompt_numbers(self, step: int, rows: range) -> noise.Floats | None:
        """Uniform numbers that choose the prompts of these rows of a step's global batch; None of images."""
        if not isinstance(self.store, RaggedStore):
            return None
        return noise.block_uniform(self.seed, step, rows, 1, "prompt")[:, 0]

    def rows_at(self, step: int, rows: range) -> noise.Ints:
        """The store's rows of these rows of a step's global batch."""
        if not isinstance(self.store, RaggedStore) or self.objective.sorted_steps == 1:
            return self.rows[noise.epoch_rows(self.seed, step, self.batch, len(self.rows), rows)]
        steps = self.objective.sorted_steps
        number, place = divmod(step, steps)
        if self._sorted is None or self._sorted[0] != number:
            drawn = self.rows[noise.epoch_rows(self.seed, number, steps * self.batch, len(self.rows))]
            batches = drawn[np.argsort(self.store.lengths[drawn], kind="stable")].reshape(steps, self.batch)
            self._sorted = number, noise.stream("sorted", self.seed, number).permutation(batches)
        return self._sorted[1][place, rows.start : rows.stop]

    def describe(self, step: int, rows: range) -> str:
        pairs = zip(*self.addresses(self.rows_at(step, rows)), strict=True)
        return f"images:views {some_of(f'{index}:{view}' for index, view in pairs)}"

    def addresses(self, store_rows: noise.Ints) -> tuple[list[int], list[int]]:
        """Source indices and views of rows of the store, by which their noise is addressed."""
        return self.store.index[store_rows].tolist(), (store_rows % self.store.manifest.views).tolist()

    def read(
        self, store_rows: noise.Ints, uniform_B: noise.Floats | None = None, prompt_B: noise.Floats | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """codes_BTS and columns of a batch; no class, or text, where uniform_B is below the rate of label drop.

        prompt_B: uniform numbers that choose the prompts of sound; None: those of a held-out batch."""
        codes_BTS, store = torch.from_numpy(self.store.codes(store_rows).astype(np.int64)), self.store
        drop_B = np.zeros(len(store_rows), bool) if uniform_B is None else uniform_B < self.objective.label_drop
        if not isinstance(store, RaggedStore):
            labels = store.columns["labels"][store_rows].astype(np.int64)
            labels = np.where(drop_B, len(store.manifest.class_names), labels)
            return codes_BTS, {"labels": torch.from_numpy(labels)}
        text = store.text(store_rows).astype(np.int64)
        text = np.where(drop_B[:, None] & (text >= 0), len(store.manifest.condition_names), text)
        arrays = {"text": text, "latents": store.latents(store_rows).astype(np.float32)}
        if self.align == "durations":
            durations = store.durations(store_rows).astype(np.int64)
            arrays |= {"durations": durations, "known": self.known_units(store_rows, prompt_B)}
        else:
            open_BS = self.open_positions(store_rows, prompt_B)
            arrays |= {"lengths": store.lengths[store_rows], "known": store.exists(store_rows) & ~open_BS}
        return codes_BTS, {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}

    def known_units(self, store_rows: noise.Ints, prompt_B: noise.Floats | None) -> noise.Ints:
        """The number of units of each row's prompt: 0 for a share of the rows, else any that leaves some to draw."""
        assert isinstance(self.store, RaggedStore)
        most = (self.store.text(store_rows) >= 0).sum(1) - 1
        if prompt_B is None:
            return (most + 1) // HELD_OUT_PROMPT
        return prefix_of(most, prompt_B, self.objective.prompt)

    def open_positions(self, store_rows: noise.Ints, prompt_B: noise.Floats | None) -> NDArray[np.bool_]:
        """The positions of sound that are to be drawn, (B, S): all behind the prompt, or those between known ends."""
        assert isinstance(self.store, RaggedStore)
        lengths = self.store.lengths[store_rows]
        ends = lengths
        if self.align == "durations":
            durations = self.store.durations(store_rows).astype(np.int64)
            is_known = np.arange(durations.shape[1]) < self.known_units(store_rows, prompt_B)[:, None]
            starts = (durations * is_known).sum(1)
        elif prompt_B is None:
            starts = lengths // HELD_OUT_PROMPT
        else:
            # The numbers below `spans` choose a stretch between known ends, those below `prompt` a prefix.
            prompt, spans = self.objective.prompt, self.objective.prompt * self.objective.span
            starts = prefix_of(lengths - 1, prompt_B - spans, prompt - spans)
            place = prompt_B.astype(np.float64) / max(spans, 1e-9)
            first, last = np.divmod((place * lengths * lengths).astype(np.int64), lengths)
            starts = np.where(place < 1, np.minimum(first, last), starts)
            ends = np.where(place < 1, np.maximum(first, last) + 1, lengths)
        position = np.arange(self.store.longest(store_rows))
        return (position >= starts[:, None]) & (position < ends[:, None])

    def extent(self, step: int) -> tuple[float, int | None]:
        """Of a step's global batch: the mean number of positions to be drawn, and S of the longest item.

        Of images 0 and None."""
        if not isinstance(self.store, RaggedStore):
            return 0.0, None
        rows = range(self.batch)
        store_rows = self.rows_at(step, rows)
        open_BS = self.open_positions(store_rows, self.prompt_numbers(step, rows))
        return float(open_BS.sum() / len(store_rows)), self.store.longest(store_rows)

    def held_out_rows(self) -> Iterator[noise.Ints]:
        most = self.evaluated_rows
        measured = self.held_out[:: max(1, len(self.held_out) // most)][:most]
        for start in range(0, len(measured), EVALUATED_AT_ONCE):
            yield measured[start : start + EVALUATED_AT_ONCE]


class GeneratorTask(Player):
    """The training loop's one player. The heads, a layer each, run outside the network and are not compiled."""

    name = "generator"

    def __init__(self, generator: Generator, metadata: dict[str, Any] | None = None) -> None:
        self.generator, self.model, self.metadata = generator, generator.network, metadata

    def loss(self, batch: Any, step: TrainStep) -> tuple[Tensor, dict[str, Tensor]]:
        """The family's loss, and of sound that of the predictor of durations or of lengths."""
        loss, logs = self.generator.loss(batch, step)
        speech = self.model.trunk.speech
        if speech is None:
            return loss, logs
        more = speech.predictor.loss(batch.columns)
        return loss + speech.predictor.factor * more, {**logs, speech.predictor.name: more.detach()}


def prefix_of(most: noise.Ints, uniform_B: noise.Floats, share: float) -> noise.Ints:
    """For numbers below `share` any of 1 to `most`, else 0."""
    length = 1 + np.floor(uniform_B.astype(np.float64) / max(share, 1e-9) * most).astype(np.int64)
    return np.where(uniform_B < share, np.minimum(length, most), 0)


def held_out(
    generator: Generator, batches: GeneratorBatches, device: torch.device, baselines: Any = None
) -> dict[str, Any]:
    """Means of the family's measurements on held-out codes under held-out draws; None where nothing was counted.

    baselines: of `Generator.fit_baselines`. gap: mean over t of the accuracy over that of the linear one."""
    totals: dict[str, Tensor] = {}
    for batch in batches.held_out_batches():
        for name, pair in generator.held_out(batch.to(device), baselines).items():
            totals[name] = totals[name] + pair if name in totals else pair
    means: dict[str, Any]
    pairs = {name: zip(*total.tolist(), strict=True) for name, total in totals.items()}
    means = {name: [value / count if count else None for value, count in pair] for name, pair in pairs.items()}
    gap = {"gap": float(np.mean(means["accuracy"]) - np.mean(means["linear"]))} if "linear" in means else {}
    return {**means, **gap}

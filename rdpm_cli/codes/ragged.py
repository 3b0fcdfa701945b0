"""Stores of items of any length, such as sound: a row is a slice of its shard's arrays. Nothing is padded on disk.

Shard s has codes-s.npy (P, T), lengths-s.npy (rows,), index-s.npy (rows,), where they are known speakers-s.npy and
labels-s.npy (rows,), where kept latents-s.npy (P / V, C), of the items' texts units-s.npy (n,) and text-s.npy (U,), and
where the durations of the units are known, durations-s.npy (U,), in latents. A row follows the row before.
Legend: P sum of the rows' lengths S, U sum of the items' numbers of units N; n items, V views, T steps, C channels."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdpm_cli import files
from rdpm_cli.codes.store import CodeStore, Ints, Manifest, Plan, Speech, Split
from rdpm_cli.data import text
from rdpm_cli.errors import DataError

PADDING = -1  # unit ids behind the end of a text


def conditions(source: Any, kind: text.Kind | None, split: Split, rate: float) -> Speech:
    """The table of units, and the speakers, of an AudioSource. rate: latents a second. Raises DataError."""
    if kind and source.texts is None:
        raise DataError(f"{source.spec} has no texts", "leave --units out, or name a source with texts")
    units = text.vocabulary(kind, source.texts) if kind else ()
    speakers = tuple(sorted(set(source.speakers or ())))
    if split == "speaker" and len(speakers) < 2:
        raise DataError(f"{source.spec} has {len(speakers)} speakers, too few to hold one out", "leave --split out")
    durations = bool(kind == "words" and source.word_seconds)
    return Speech(text=kind, units=units, speakers=speakers, durations=durations, rate=rate, split=split)


def encoded_arrays(codes_nVTS: NDArray[np.uint16], z_nCS: NDArray[np.float16] | None) -> dict[str, NDArray[Any]]:
    """The arrays of items of one length that come from the tokenizer."""
    n, V, T, S = codes_nVTS.shape
    arrays: dict[str, NDArray[Any]] = {"codes": codes_nVTS.swapaxes(2, 3).reshape(-1, T)}
    arrays["lengths"] = np.full(n * V, S, np.int32)
    if z_nCS is not None:
        arrays["latents"] = z_nCS.swapaxes(1, 2).reshape(-1, z_nCS.shape[1])
    return arrays


def text_arrays(source: Any, plan: Plan, indices: Sequence[int], lengths: Sequence[int]) -> dict[str, NDArray[Any]]:
    """Texts, durations and speakers of these items. lengths: of their latents."""
    speech = plan.speech
    assert speech is not None
    arrays: dict[str, NDArray[Any]] = {}
    if speech.speakers:
        number_of = {name: number for number, name in enumerate(speech.speakers)}
        arrays["speakers"] = np.repeat([number_of[source.speakers[i]] for i in indices], plan.views)
    if speech.text:
        texts = [text.encode(speech.text, speech.units, source.texts[index]) for index in indices]
        arrays |= {"units": np.array([len(t) for t in texts]), "text": np.array([u for t in texts for u in t])}
    if speech.durations:
        for i in indices:
            if len(words := text.normalise(source.texts[i]).split()) != len(source.word_seconds[i]):
                reason = f"word_seconds has {len(source.word_seconds[i])} values for the words {' '.join(words)}"
                raise DataError(f"{source.spec}: {source.names[i]}: {reason}", "give one value a word")
        for i, S in zip(indices, lengths, strict=True):
            if not fits(source.word_seconds[i], speech.rate, S):
                reason = f"word_seconds sum to {sum(source.word_seconds[i]):.4g} s, of {S / speech.rate:.4g}"
                raise DataError(f"{source.spec}: {source.names[i]}: {reason}", "count silence to the word before it")
        rows = [latents_of(source.word_seconds[i], speech.rate, S) for i, S in zip(indices, lengths, strict=True)]
        arrays["durations"] = np.array([duration for row in rows for duration in row])
    return arrays


def fits(seconds: Sequence[float], rate: float, length: int) -> bool:
    """Whether durations sum to a length in latents, to which a recording is padded."""
    return abs(sum(seconds) * rate - length) <= 1.5


def latents_of(seconds: Sequence[float], rate: float, length: int) -> list[int]:
    """Durations in latents of units that last these seconds, which sum to `length`; the last one takes the rest."""
    ends = np.round(np.cumsum(seconds) * rate).astype(int).clip(0, length)
    ends[-1:] = length
    return np.diff(ends, prepend=0).tolist()


class RaggedStore(CodeStore):
    """A finished store, memory-mapped. Its arrays are padded to the longest of the rows asked for."""

    def _hold(self, shards: list[dict[str, NDArray[Any]]]) -> None:
        super()._hold(shards)
        self.lengths: Ints = np.concatenate([arrays["lengths"] for arrays in shards]).astype(np.int64)
        views = self.manifest.views
        self._starts = [np.cumsum([0, *arrays["lengths"]]) for arrays in shards]
        self._latent_starts = [np.cumsum([0, *arrays["lengths"][::views]]) for arrays in shards]
        self._text = [arrays.get("text") for arrays in shards]
        self._durations = [arrays.get("durations") for arrays in shards]
        self._text_starts = [np.cumsum([0, *arrays.get("units", ())]) for arrays in shards]

    @property
    def split_keys(self) -> Ints:
        """The source index, or a hash of the speaker's name, whatever other speakers a store has."""
        speech = self.manifest.speech
        if speech is None or speech.split == "row":
            return self.index
        return np.array([int(files.digest(name)[:15], 16) for name in speech.speakers])[self.columns["speakers"]]

    def longest(self, rows: Ints) -> int:
        return int(self.lengths[rows].max())

    def exists(self, rows: Ints) -> NDArray[np.bool_]:
        return np.arange(self.longest(rows)) < self.lengths[rows][:, None]

    def codes(self, rows: Ints) -> NDArray[np.uint16]:
        """(n, T, S) uint16, S the largest of the rows' lengths; 0 behind the end of a row."""
        return self._padded(self._codes, self._starts, rows, 0).swapaxes(1, 2)

    def latents(self, rows: Ints) -> NDArray[np.float16]:
        """(n, C, S) fp16; 0 behind the end of a row. Only where latents are kept."""
        return self._padded(self._latents, self._latent_starts, rows, 0, self.manifest.views).swapaxes(1, 2)

    def text(self, rows: Ints) -> NDArray[Any]:
        """Unit ids (n, N), -1 behind the end of a text."""
        return self._padded(self._text, self._text_starts, rows, PADDING, self.manifest.views)

    def durations(self, rows: Ints) -> NDArray[Any]:
        """Latents a unit (n, N), 0 behind the end of a text."""
        return self._padded(self._durations, self._text_starts, rows, 0, self.manifest.views)

    def _padded(self, shards: Sequence[Any], starts: Sequence[Ints], rows: Ints, value: int, views: int = 1) -> Any:
        """Slices of the rows, or of their items, padded by a value."""
        numbers = np.searchsorted(self.offsets, rows, side="right") - 1
        places = (rows - self.offsets[numbers]) // views
        parts = [shards[n][starts[n][p] : starts[n][p + 1]] for n, p in zip(numbers, places, strict=True)]
        out = np.full((len(parts), max(map(len, parts)), *parts[0].shape[1:]), value, parts[0].dtype)
        for row, part in zip(out, parts, strict=True):
            row[: len(part)] = part
        return out


def open_store(root: Path | str, tokenizer: str | None = None, manifest: Manifest | None = None) -> CodeStore:
    """A finished store of either kind, as `CodeStore`."""
    root = Path(root)
    manifest = manifest or Manifest.load(root)
    return (RaggedStore if manifest.speech else CodeStore)(root, tokenizer, manifest)


def shard_sizes(arrays: Mapping[str, NDArray[Any]]) -> dict[str, int]:
    """positions and units of a shard's arrays, for its row in the manifest."""
    return {"positions": len(arrays["codes"]), "units": len(arrays["text"]) if "text" in arrays else 0}

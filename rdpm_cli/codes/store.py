"""The format of a code store: manifest, shard files, and a memory-mapped reader.

Shard s has codes-s.npy (rows, T, *grid), labels-s.npy (rows,), index-s.npy (rows,), the source index, and latents-s.npy
(n·F, C, *grid) where latents are kept. A row is one (item, view), view fastest; with flips, bit 0 of the view
mirrors it. Items of any length, such as sound, are in other arrays: see codes/ragged.py.
Legend: n items, V views, F = 2 with flips else 1, rows = n·V, T steps, C channels, S positions."""

import json
import math
import resource
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from rdpm_cli import files, noise
from rdpm_cli.data.open import is_there, open_source
from rdpm_cli.data.pixels import TRANSFORM
from rdpm_cli.data.source import Source
from rdpm_cli.data.text import Kind
from rdpm_cli.errors import DataError, RunError, UsageError, rdpm_command
from rdpm_cli.schema import Section, added

# Next to the shards. The manifest is written last; tokenizer.pt is a copy; bad.jsonl lists items that were left out.
MANIFEST, NAMES, TOKENIZER, BAD = "manifest.json", "names.jsonl", "tokenizer.pt", "bad.jsonl"
AGAIN = "copy it again, or delete it and run the same `rdpm tokenize` again, which makes what is missing"

Ints = NDArray[np.int64]
Split = Literal["row", "speaker"]  # what trainings hold out of a store
ArrayShapes = dict[str, tuple[type[np.generic], tuple[int, ...]]]  # kind -> dtype and shape
RAGGED_POSITIONS = 250  # of an item of any length, for the disk space that a store needs: 10 s at 25 a second
BadItem = dict[str, Any]  # a line of bad.jsonl: index, name and reason of an item that could not be read


class DataOrigin(Section):
    """The source that a store was made from. digest: of its names and labels, not of its pixels.

    reading: how it was read, where that is not the default."""

    source: str
    count: int
    digest: str
    reading: dict[str, Any] = Field(default_factory=dict, exclude_if=lambda reading: not reading)


class Speech(Section):
    """The conditions of items of sound: the kind of their texts' units and its table, the speakers.

    durations: whether the lengths of the units are stored. rate: latents a second."""

    text: Kind | None
    units: tuple[str, ...]
    speakers: tuple[str, ...]
    durations: bool
    rate: float
    split: Split = added("row", "held out of trainings: some recordings, or all of some speakers")


class Plan(Section):
    """Everything that fixes the bytes of a store before the first item is read."""

    format: Literal["rdpm-codes"] = "rdpm-codes"
    version: Literal[2] = 2
    tokenizer: str  # digest
    steps: int
    grid: tuple[int, ...]  # (-1,) of items of any length
    codes: int  # entries of the codebook
    channels: int
    views: int
    flip: bool
    latents: bool
    seed: int
    noise: tuple[float, ...]  # 16 values of the stream, to recognise a numpy that draws other numbers
    transform: str
    resolution: int  # 0 of sound
    class_names: tuple[str, ...]
    speech: Speech | None = added(None, "conditions of items of sound")
    data: DataOrigin
    dtype: str = "uint16"
    device: str
    precision: Literal["fp32", "bf16"]
    micro_batch: int
    shard_images: int

    @property
    def shard_ranges(self) -> list[range]:
        """Source indices of every shard, including items that were left out."""
        count, size = self.data.count, self.shard_images
        return [range(start, min(start + size, count)) for start in range(0, count, size)]

    @property
    def mirrored(self) -> int:
        """F, latents an item: the plain one, and with flips the mirrored one."""
        return 2 if self.flip else 1

    @property
    def condition_names(self) -> tuple[str, ...]:
        """The names of what a sample can be asked for: classes, or units of text."""
        return self.speech.units if self.speech else self.class_names

    @property
    def columns(self) -> list[str]:
        """The conditions of a row, one file a shard each."""
        if self.speech is None:
            return ["labels"]
        return ["labels"] * bool(self.class_names) + ["speakers"] * bool(self.speech.speakers)

    def image_bytes(self) -> int:
        """Bytes that one item takes in the shards; about, where items have any length."""
        item = Shard(images=1, rows=self.views, sha256={}, positions=RAGGED_POSITIONS * self.views)
        return sum(np.dtype(dtype).itemsize * math.prod(shape) for dtype, shape in shard_arrays(self, item).values())


class Shard(Section):
    """A row of the shard table. sha256: by file name. Where items have any length, also their sums."""

    images: int
    rows: int
    sha256: dict[str, str]
    positions: int = added(0, "of all rows")
    units: int = added(0, "of the texts of all items")


class Manifest(Plan):
    """The plan, and the files that came of it."""

    images: int
    rows: int
    bad: int
    samples: tuple[dict[str, int | float], ...]  # source index of some items, and PSNR in dB of their first view
    files: dict[str, str]  # sha256 of the files next to the shards
    shards: tuple[Shard, ...]
    sha256: str = ""  # of all the above

    @classmethod
    def load(cls, root: Path) -> "Manifest":
        """Read and check root/manifest.json. Raises UsageError where there is no folder, else DataError."""
        if not root.is_dir():
            raise UsageError(f"{root}: there is no such code store", "make one with `rdpm tokenize IMAGES OUT`")
        path = root / MANIFEST
        if not path.is_file():
            hint = "finish it with the same `rdpm tokenize` again, or make one with `rdpm tokenize IMAGES OUT`"
            raise DataError(f"{root} is not a finished code store: it has no {MANIFEST}", hint)
        try:
            manifest = cls.model_validate(files.read_json(path))
        except (DataError, ValidationError) as error:
            raise DataError(f"{path} cannot be read as the manifest of a store of version 2", AGAIN) from error
        if manifest.sha256 != manifest.digest():
            raise DataError(f"{path} is damaged: it does not match its own checksum", AGAIN)
        if not np.allclose(manifest.noise, noise.fingerprint(manifest.seed), rtol=0, atol=1e-5):
            message = f"{root}: this numpy ({np.__version__}) draws other noise than the one that made the store"
            raise DataError(message, "install the numpy of its run.json, or run `rdpm tokenize` into a new folder")
        return manifest

    def digest(self) -> str:
        """Identity of the store: sha256 of the manifest's content."""
        return files.digest(self.model_dump(mode="json", exclude={"sha256"}))

    def write(self, root: Path) -> None:
        """Write root/manifest.json with its own checksum: the store is finished."""
        files.write_json(root / MANIFEST, {**self.model_dump(mode="json"), "sha256": self.digest()})

    def facts(self) -> dict[str, Any]:
        """The number of items; of sound also their duration, and the numbers of speakers and units."""
        if self.speech is None:
            return {"images": self.images}
        seconds = sum(shard.positions for shard in self.shards) / self.views / self.speech.rate
        facts = {"recordings": self.images, "seconds": round(seconds, 2), "speakers": len(self.speech.speakers)}
        return {**facts, "text": self.speech.text, "units": len(self.speech.units)}

    def sums(self) -> dict[str, str]:
        """sha256 of every file but the manifest."""
        return {**self.files, **{name: value for shard in self.shards for name, value in shard.sha256.items()}}


def shard_arrays(plan: Plan, shard: Shard) -> ArrayShapes:
    """Kind of array -> dtype and shape in a shard, in the order in which they are written."""
    rows, images, speech = shard.rows, shard.images, plan.speech
    arrays: ArrayShapes = {"codes": (np.uint16, (rows, plan.steps, *plan.grid))}
    latents = (images * plan.mirrored, plan.channels, *plan.grid)
    if speech is not None:
        arrays = {"codes": (np.uint16, (shard.positions, plan.steps)), "lengths": (np.int32, (rows,))}
        latents = (shard.positions // plan.views, plan.channels)
    arrays |= dict.fromkeys(plan.columns, (np.int32, (rows,)))
    if plan.latents:
        arrays["latents"] = (np.float16, latents)
    if speech is not None and speech.text:
        arrays |= {"units": (np.int32, (images,)), "text": (np.int32, (shard.units,))}
    if speech is not None and speech.durations:
        arrays["durations"] = (np.uint16, (shard.units,))
    return arrays | {"index": (np.int64, (rows,))}


def json_lines(rows: Iterable[dict[str, Any]]) -> bytes:
    """The content of a file with one JSON value a line."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The values of such a file. Raises DataError."""
    try:
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}", AGAIN) from error


def read_names(root: Path) -> list[str]:
    """The names of all source items, those that were left out included. Raises DataError."""
    return [row["name"] for row in read_lines(root / NAMES)]


def verify(root: Path) -> Manifest:
    """Compare every file of a finished store with its checksum. Raises DataError naming each one that differs."""
    manifest, lines = Manifest.load(root), [f"{root} is damaged:"]
    for name, sha256 in manifest.sums().items():
        try:
            if files.sha256_file(root / name) != sha256:
                lines.append(f"{name} differs from its checksum")
        except OSError as error:
            lines.append(f"{name} cannot be read: {error.strerror}")
    if lines[1:]:
        raise DataError("\n  ".join(lines), AGAIN)
    return manifest


class CodeStore:
    """A finished store, memory-mapped. Rows are global over shards. columns: conditions by name, one value a row."""

    def __init__(self, root: Path, tokenizer: str | None = None, manifest: Manifest | None = None) -> None:
        """tokenizer: digest of the one to expect. manifest: of a store that has none on disk yet. Raises DataError."""
        self.root = root
        self.manifest = m = manifest or Manifest.load(root)
        if tokenizer not in (None, m.tokenizer):
            message = f"{root} was coded by tokenizer {m.tokenizer[:12]}, not {str(tokenizer)[:12]}"
            raise DataError(message, "run `rdpm tokenize` again with this tokenizer, or use the one in the store")
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # numpy keeps a file open for every map
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 1 << 16)), hard))
        self.offsets = np.cumsum([0, *(shard.rows for shard in m.shards)])
        self._hold([self._map(number, shard) for number, shard in enumerate(m.shards)])

    def _hold(self, shards: list[dict[str, NDArray[Any]]]) -> None:
        """Take over the arrays of all shards by kind."""
        self._codes = [arrays["codes"] for arrays in shards]
        self._latents = [arrays["latents"] for arrays in shards if self.manifest.latents]
        self.index: Ints = np.concatenate([arrays["index"] for arrays in shards])
        self.columns = {name: np.concatenate([arrays[name] for arrays in shards]) for name in self.manifest.columns}

    def _map(self, number: int, shard: Shard) -> dict[str, NDArray[Any]]:
        """The arrays of a shard by kind, with flattened grids: codes (rows, T, S), latents (n·F, C, S)."""
        arrays = {}
        for kind, (dtype, shape) in shard_arrays(self.manifest, shard).items():
            path = self.root / f"{kind}-{number:05d}.npy"
            try:  # an empty array cannot be mapped
                array: NDArray[Any] = np.load(path, mmap_mode="r" if shard.images else None, allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                raise DataError(f"{path} cannot be read: {error}", AGAIN) from error
            if array.dtype != dtype or array.shape != shape:
                raise DataError(f"{path} holds {array.dtype} {array.shape}, not {np.dtype(dtype)} {shape}", AGAIN)
            arrays[kind] = np.asarray(array).reshape(*shape[:2], *([math.prod(shape[2:])] if shape[2:] else []))
        return arrays

    def __len__(self) -> int:
        return self.manifest.rows

    def longest(self, rows: Ints) -> int | None:
        """S of these rows, where it is that of the longest item; None: S is the grid's."""
        return None

    def exists(self, rows: Ints) -> NDArray[np.bool_]:
        """The positions that rows have, (n, S)."""
        return np.ones((len(rows), math.prod(self.manifest.grid)), np.bool_)

    def codes(self, rows: Ints) -> NDArray[np.uint16]:
        """(n, T, S) uint16 of any rows, in the order of `rows`."""
        return self._gather(self._codes, rows, self.offsets)

    def latents(self, rows: Ints) -> NDArray[np.float16]:
        """z of the rows' items, mirrored where the view is: (n, C, S) fp16. Only where latents are kept."""
        m = self.manifest
        latent_rows = rows // m.views * m.mirrored + (rows % m.views & 1 if m.flip else 0)
        return self._gather(self._latents, latent_rows, self.offsets // m.views * m.mirrored)

    def _gather(self, shards: list[NDArray[Any]], rows: Ints, offsets: Ints) -> NDArray[Any]:
        """Rows of the joined shards, one by one: with hundreds of shards, sorting by shard costs more than it saves."""
        out = np.empty((len(rows), *shards[0].shape[1:]), dtype=shards[0].dtype)
        shard_of = np.searchsorted(offsets, rows, side="right") - 1
        rows_in_shard = rows - offsets[shard_of]
        for position, (shard, row) in enumerate(zip(shard_of.tolist(), rows_in_shard.tolist(), strict=True)):
            out[position] = shards[shard][row]
        return out

    @property
    def keeping_latents(self) -> str:
        """The command that makes a store of the same source with latents."""
        return rdpm_command("tokenize", self.manifest.data.source, "NEW_FOLDER", "--keep", "latents")

    @property
    def split_keys(self) -> Ints:
        """A number a row by which it is held out: rows with the same number are on one side of the split."""
        return self.index

    def split(self) -> tuple[Ints, Ints]:
        """(training rows, held-out rows): 2% of the items, or of the speakers, by a hash."""
        keys = self.split_keys
        held = held_out(keys)
        if held.all() or not held.any():  # too few keys for the hash: hold out the last one
            held = keys == keys.max(initial=-1)
        if held.all():
            message = f"{self.root} holds fewer than two items or speakers, which leaves none to train on"
            raise DataError(message, "tokenize more")
        rows = np.arange(len(self), dtype=np.int64)
        return rows[~held], rows[held]


def evenly_spaced(rows: Ints, most: int) -> Ints:
    """`most` of some rows, or all where they are fewer."""
    return rows[np.linspace(0, len(rows) - 1, min(len(rows), most)).astype(np.int64)]


def held_out(index_N: Ints, percent: int = 2) -> NDArray[np.bool_]:
    """True for about `percent` of 100 source indices, by splitmix64's finaliser: a function of the index alone."""
    x = index_N.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    held: NDArray[np.bool_] = (x ^ (x >> np.uint64(31))) % np.uint64(100) < percent
    return held


def source_of(manifest: Manifest) -> Source | None:
    """The source that a store was made from, where it is still here, the same, and read with the same transform."""
    try:
        if manifest.transform != TRANSFORM or not is_there(manifest.data.source):
            return None
    except (RunError, UsageError):  # a URL that cannot be reached from here
        return None
    source = open_source(manifest.data.source, **manifest.data.reading)
    return source if source.digest() == manifest.data.digest else None


def store_reference(root: Path, manifest: Manifest) -> dict[str, Any]:
    """The items of a store as a reference of scores. left_out: source indices of those that could not be read."""
    left_out = {"left_out": [row["index"] for row in read_lines(root / BAD)]} if manifest.bad else {}
    origin = manifest.data.model_dump(exclude={"count"})
    return {**left_out, **origin, "resolution": manifest.resolution, "transform": manifest.transform}

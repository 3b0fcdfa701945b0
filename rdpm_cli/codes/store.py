"""The format of a code store: manifest, shard files, and a memory-mapped reader.

Legend: n items, V views, F = 2 with flips else 1, rows = n·V, T steps, C channels, S = prod(grid) positions.

Shard s has codes-s.npy uint16 (rows, T, *grid), labels-s.npy int32 (rows,), index-s.npy int64 (rows,) with the source
index, and latents-s.npy fp16 (n·F, C, *grid) where latents are kept. Next to the shards are names.jsonl, tokenizer.pt
(a byte copy), bad.jsonl where items were left out, and manifest.json, which is written last: no manifest, no store.
A row is one (item, view), view fastest; with flips, bit 0 of the view says whether the image is mirrored.
"""

import json
import math
import mmap
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from rdpm_cli import files, noise
from rdpm_cli.data.open import is_there, open_source
from rdpm_cli.data.pixels import TRANSFORM
from rdpm_cli.data.source import Source
from rdpm_cli.errors import DamagedError, DataError, UsageError
from rdpm_cli.schema import Section

VERSION: Literal[2] = 2
MANIFEST, NAMES, TOKENIZER, BAD = "manifest.json", "names.jsonl", "tokenizer.pt", "bad.jsonl"
COLUMNS: dict[str, type[np.generic]] = {"labels": np.int32}  # conditions of a row, one file a shard each
INDEX_BYTES = np.dtype(np.int64).itemsize
SPARE_FILES = 512  # open files of a process in addition to the mapped shards
HELD_OUT_PERCENT = 2
AGAIN = "copy it again, or delete it and run the same `rdpm tokenize` again"
ALL_AGAIN = f"{AGAIN}, which makes every shard again"
THESE_AGAIN = "copy these files again, or delete them and run the same `rdpm tokenize` again"

Ints = NDArray[np.int64]


def image_bytes(positions: int, steps: int, views: int, latents: int) -> int:
    """Bytes that one item takes in the shards. latents: fp16 numbers a position, 0 where latents are not kept."""
    columns = sum(np.dtype(dtype).itemsize for dtype in COLUMNS.values())
    return views * (2 * steps * positions + columns + INDEX_BYTES) + 2 * latents * positions


# ---- the manifest --------------------------------------------------------------------------------------------------


class DataOrigin(Section):
    """The source that a store was made from. digest: of its names and labels, not of its pixels."""

    source: str
    count: int
    digest: str


class Plan(Section):
    """Everything that fixes the bytes of a store before the first item is read."""

    format: Literal["rdpm-codes"] = "rdpm-codes"
    version: Literal[2] = VERSION
    tokenizer: str  # digest
    steps: int
    grid: tuple[int, ...]
    codes: int  # entries of the codebook
    channels: int
    views: int
    flip: bool
    latents: bool
    seed: int
    noise: tuple[float, ...]  # 16 values of the stream, to recognise a numpy that draws other numbers
    transform: str
    resolution: int
    class_names: tuple[str, ...]
    data: DataOrigin
    dtype: str = "uint16"
    device: str
    precision: Literal["fp32", "bf16"]
    micro_batch: int
    shard_images: int

    @property
    def shard_count(self) -> int:
        """Number of shards."""
        return -(-self.data.count // self.shard_images)

    @property
    def mirrored(self) -> int:
        """F, latents an item: the plain one, and with flips the mirrored one."""
        return 2 if self.flip else 1

    def shard_range(self, shard: int) -> range:
        """Source indices of a shard, including items that were left out."""
        return range(shard * self.shard_images, min((shard + 1) * self.shard_images, self.data.count))

    def image_bytes(self) -> int:
        """Bytes that one item takes in the shards: codes, columns and index of its views, latents where kept."""
        latents = self.mirrored * self.channels if self.latents else 0
        return image_bytes(math.prod(self.grid), self.steps, self.views, latents)


class Shard(Section):
    """A row of the shard table. sha256: by file name."""

    images: int
    rows: int
    sha256: dict[str, str]


class DecodedItem(Section):
    """How well one item of the store decodes: source index, and PSNR in dB of its first view."""

    index: int
    psnr: float


class Manifest(Plan):
    """The plan, and the files that came of it."""

    images: int
    rows: int
    bad: int
    samples: tuple[DecodedItem, ...]
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
            raw = files.read_json(path)
        except DataError as error:
            raise DataError(error.message, ALL_AGAIN) from error
        version = raw.get("version") if isinstance(raw, dict) else None
        if isinstance(version, int) and version != VERSION:
            hint = "run `rdpm tokenize` again into a new folder"
            raise DataError(f"{path} has format version {version}; this rdpm reads {VERSION}", hint)
        try:
            manifest = cls.model_validate(raw)
        except ValidationError as error:
            message = f"{path} is not the manifest of a code store: {error.errors()[0]['msg']}"
            raise DataError(message, ALL_AGAIN) from error
        if manifest.sha256 != manifest.digest():
            raise DataError(f"{path} is damaged: it does not match its own checksum", ALL_AGAIN)
        if not np.allclose(manifest.noise, noise.fingerprint(manifest.seed), rtol=0, atol=1e-5):
            raise DataError(
                f"{root}: this numpy ({np.__version__}) draws other noise than the one that made the store",
                "install the numpy of the store's run.json, or run `rdpm tokenize` again into a new folder",
            )
        return manifest

    def digest(self) -> str:
        """Identity of the store: sha256 of the manifest's content."""
        return files.digest(self.model_dump(mode="json", exclude={"sha256"}))

    def write(self, root: Path) -> None:
        """Write root/manifest.json with its own checksum: the store is finished."""
        files.write_json(root / MANIFEST, {**self.model_dump(mode="json"), "sha256": self.digest()})


# ---- the files -----------------------------------------------------------------------------------------------------


def shard_files(shard: int, latents: bool) -> dict[str, str]:
    """Kind of array -> file name. The index is renamed last, so a shard without its index is incomplete."""
    kinds = ["codes", *COLUMNS, *(["latents"] if latents else []), "index"]
    return {kind: f"{kind}-{shard:05d}.npy" for kind in kinds}


def shard_arrays(plan: Plan, images: int) -> dict[str, tuple[type[np.generic], tuple[int, ...]]]:
    """Kind of array -> dtype and shape in a shard of `images` items."""
    rows = images * plan.views
    return {
        "codes": (np.uint16, (rows, plan.steps, *plan.grid)),
        **{name: (dtype, (rows,)) for name, dtype in COLUMNS.items()},
        "index": (np.int64, (rows,)),
        **({"latents": (np.float16, (images * plan.mirrored, plan.channels, *plan.grid))} if plan.latents else {}),
    }


class BadItem(Section):
    """A line of bad.jsonl: an item that was left out because it could not be read."""

    index: int
    name: str
    reason: str


def bad_lines(bad: Sequence[BadItem]) -> bytes:
    """The content of a file of bad items, in the order of the source."""
    return "".join(json.dumps(item.model_dump()) + "\n" for item in sorted(bad, key=lambda item: item.index)).encode()


def read_bad(path: Path) -> list[BadItem]:
    """The bad items of such a file; none where it is absent. Raises DataError."""
    try:
        return [BadItem.model_validate_json(line) for line in path.read_text().splitlines()] if path.is_file() else []
    except (OSError, ValueError) as error:  # pydantic's ValidationError is a ValueError
        raise DataError(f"{path} cannot be read as a list of bad items: {error}", AGAIN) from error


def name_lines(names: Sequence[str]) -> bytes:
    """The content of names.jsonl."""
    return "".join(json.dumps({"index": i, "name": name}) + "\n" for i, name in enumerate(names)).encode()


def read_names(root: Path) -> list[str]:
    """The names of all source items, those that were left out included. Raises DataError."""
    path = root / NAMES
    try:
        return [json.loads(line)["name"] for line in path.read_text().splitlines()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read: {error}", AGAIN) from error


def damage(root: Path, sums: dict[str, str]) -> list[str]:
    """A line for every file that is missing, cannot be read, or differs from its sha256."""
    lines = []
    for name, sha256 in sums.items():
        try:
            if files.sha256_file(root / name) != sha256:
                lines.append(f"{name} differs from its checksum")
        except (FileNotFoundError, IsADirectoryError):
            lines.append(f"{name} is missing")
        except OSError as error:
            lines.append(f"{name} cannot be read: {error.strerror}")
    return lines


def verify(root: Path) -> Manifest:
    """Compare every file of a finished store with its checksum. Raises DamagedError naming each one that differs."""
    manifest = Manifest.load(root)
    sums = dict(manifest.files)
    for shard in manifest.shards:
        sums |= shard.sha256
    if lines := damage(root, sums):
        raise DamagedError(root, lines, THESE_AGAIN)
    return manifest


# ---- the reader ----------------------------------------------------------------------------------------------------


class CodeStore:
    """A finished store, memory-mapped. Rows are global over shards. columns: conditions by name, one value a row."""

    def __init__(self, root: Path, tokenizer: str | None = None, manifest: Manifest | None = None) -> None:
        """tokenizer: digest that the codes must have been made by. manifest: of a store that has none on disk yet.

        Raises DataError naming the file that does not fit the manifest.
        """
        self.root = root
        self.manifest = m = manifest or Manifest.load(root)
        if tokenizer not in (None, m.tokenizer):
            raise DataError(
                f"{root} was coded by tokenizer {m.tokenizer[:12]}, not {str(tokenizer)[:12]}",
                "run `rdpm tokenize` again with this tokenizer, or use the one in the store",
            )
        _allow_open(len(m.shards) * (2 if m.latents else 1))  # numpy keeps a file open for every map
        self.exceeds_memory = m.image_bytes() * m.images > files.memory_bytes()
        self.offsets = np.cumsum([0, *(shard.rows for shard in m.shards)])
        self._codes = self._map_flat("codes")
        self._latents = self._map_flat("latents") if m.latents else []
        self.index: Ints = np.concatenate(self._map("index"))
        self.columns: dict[str, NDArray[Any]] = {name: np.concatenate(self._map(name)) for name in COLUMNS}

    def __reduce__(self) -> tuple[type["CodeStore"], tuple[Path]]:
        """Pickle the path only: a worker maps the files itself, and a pickled map would be the whole array."""
        return CodeStore, (self.root,)

    def _map(self, kind: str) -> list[NDArray[Any]]:
        """The arrays of a kind, one a shard."""
        return [self._map_shard(number, shard.images, kind) for number, shard in enumerate(self.manifest.shards)]

    def _map_flat(self, kind: str) -> list[NDArray[Any]]:
        """The same with flattened grids, (rows, T or C, S)."""
        return [array.reshape(*array.shape[:2], math.prod(self.manifest.grid)) for array in self._map(kind)]

    def _map_shard(self, shard: int, images: int, kind: str) -> NDArray[Any]:
        m = self.manifest
        path, (dtype, shape) = self.root / shard_files(shard, m.latents)[kind], shard_arrays(m, images)[kind]
        try:  # an empty array cannot be mapped
            array: NDArray[Any] = np.load(path, mmap_mode="r" if images else None, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{path} cannot be read: {error}", AGAIN) from error
        if array.dtype != dtype or array.shape != shape:
            raise DataError(f"{path} holds {array.dtype} {array.shape}, not {np.dtype(dtype)} {shape}", AGAIN)
        base: Any = array.base
        if self.exceeds_memory and isinstance(base, mmap.mmap):
            base.madvise(mmap.MADV_RANDOM)  # read the rows that are needed, not 128 KiB around them
        return np.asarray(array)

    def __len__(self) -> int:
        return self.manifest.rows

    def verify(self) -> None:
        """Compare every file with its checksum. Raises DamagedError."""
        verify(self.root)

    def view(self, rows: Ints) -> Ints:
        """The view of each row."""
        return rows % self.manifest.views

    def codes(self, rows: Ints) -> NDArray[np.uint16]:
        """(n, T, S) uint16 of any rows, in the order of `rows`."""
        return self._gather(self._codes, rows, self.offsets)

    def latents(self, rows: Ints) -> NDArray[np.float16]:
        """z of the rows' items, mirrored where the view is: (n, C, S) fp16. Only where latents are kept."""
        m = self.manifest
        latent_rows = rows // m.views * m.mirrored + (self.view(rows) & 1 if m.flip else 0)
        return self._gather(self._latents, latent_rows, self.offsets // m.views * m.mirrored)

    def _gather(self, shards: list[NDArray[Any]], rows: Ints, offsets: Ints) -> NDArray[Any]:
        """Rows of the joined shards, one by one: with hundreds of shards, sorting by shard costs more than it saves."""
        out = np.empty((len(rows), *shards[0].shape[1:]), dtype=shards[0].dtype)
        shard_of = np.searchsorted(offsets, rows, side="right") - 1
        rows_in_shard = rows - offsets[shard_of]
        for position, (shard, row) in enumerate(zip(shard_of.tolist(), rows_in_shard.tolist(), strict=True)):
            out[position] = shards[shard][row]
        return out

    def split(self) -> tuple[Ints, Ints]:
        """(training rows, held-out rows): 2% of the items, by a hash of the source index."""
        if not len(self):
            raise DataError(f"{self.root} holds no items", "tokenize some")
        held = held_out(self.index)
        rows = np.arange(len(self), dtype=np.int64)
        if held.all() or not held.any():  # too few items for the hash: hold out the last one
            held = self.index == self.index.max()
        if held.all():
            raise DataError(f"{self.root} holds a single item, which leaves none to train on", "tokenize more")
        return rows[~held], rows[held]


def _allow_open(count: int) -> None:
    """Raise this process's limit of open files for `count` more, as far as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = count + SPARE_FILES if hard == resource.RLIM_INFINITY else min(count + SPARE_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def held_out(index_N: Ints, percent: int = HELD_OUT_PERCENT) -> NDArray[np.bool_]:
    """True for about `percent` of 100 source indices, by splitmix64's finaliser: a function of the index alone."""
    x = index_N.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    held: NDArray[np.bool_] = (x ^ (x >> np.uint64(31))) % np.uint64(100) < percent
    return held


# ---- the source of a store -----------------------------------------------------------------------------------------


def source_of(manifest: Manifest) -> Source | None:
    """The source that a store was made from, where it is still here, the same, and read with the same transform."""
    if manifest.transform != TRANSFORM or not is_there(manifest.data.source):
        return None
    source = open_source(manifest.data.source)
    return source if source.digest() == manifest.data.digest else None


def store_reference(root: Path, manifest: Manifest) -> dict[str, Any]:
    """The items of a store as a reference of scores. left_out: source indices of those that could not be read."""
    left_out = [item.index for item in read_bad(root / BAD)] if manifest.bad else []
    return {
        **({"left_out": left_out} if left_out else {}),
        "source": manifest.data.source,
        "digest": manifest.data.digest,
        "resolution": manifest.resolution,
        "transform": manifest.transform,
    }

"""The code store: memory-mapped codes, labels and source indices in shards, and a manifest that is written last.

Files (DESIGN: Code store), for shard s of n images and V views, rows = n·V, a row is one (image, view), view fastest:
codes-s.npy uint16 (rows, T, h, w), labels-s.npy int32 (rows,), index-s.npy int64 (rows,) source index,
latents-s.npy fp16 (n·F, C, h, w) where kept, F = 2 with flips else 1.
"""

import io
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from rdpm_cli import files, noise
from rdpm_cli.config import Section
from rdpm_cli.errors import DataError, RunError, UsageError

VERSION: Literal[1] = 1
HELD_OUT_PERCENT = 2


class DataOrigin(Section):
    """Which images a store was made from."""

    source: str
    count: int
    digest: str


class Plan(Section):
    """Everything that fixes a store's bytes before the first image is read."""

    format: Literal["rdpm-codes"] = "rdpm-codes"
    version: Literal[1] = VERSION
    tokenizer: str
    steps: int
    grid: tuple[int, int]
    codes: int
    channels: int
    views: int
    flip: bool
    latents: bool
    seed: int
    noise: tuple[float, ...]
    transform: str
    resolution: int
    class_names: tuple[str, ...]
    data: DataOrigin
    dtype: str = "uint16"
    device: str
    micro_batch: int
    shard_images: int

    @property
    def shard_count(self) -> int:
        """Number of shards."""
        return -(-self.data.count // self.shard_images)

    def shard_range(self, shard: int) -> range:
        """Source indices of a shard."""
        return range(shard * self.shard_images, min((shard + 1) * self.shard_images, self.data.count))


class Shard(Section):
    """One row of the shard table."""

    images: int
    rows: int
    sha256: dict[str, str]


class Manifest(Plan):
    """The plan and what came of it."""

    images: int
    rows: int
    shards: tuple[Shard, ...]

    @classmethod
    def load(cls, root: Path) -> "Manifest":
        """Read and check root/manifest.json. Raises UsageError where there is no folder, DataError."""
        if not root.is_dir():
            raise UsageError(f"there is no code store {root}", "make one with `rdpm tokenize IMAGES OUT`")
        path = root / "manifest.json"
        if not path.is_file():
            note = root / "run.json"
            started = note.is_file() and "plan" in files.read_json(note)
            hint = "run the same `rdpm tokenize` again to finish it" if started else "make one with `rdpm tokenize`"
            raise DataError(f"{root} is not a finished code store: it has no manifest.json", hint)
        try:
            manifest = cls.model_validate(files.read_json(path))
        except ValidationError as error:
            raise DataError(f"{path} is not a code store's manifest: {error.errors()[0]['msg']}") from error
        if not np.allclose(manifest.noise, noise.fingerprint(manifest.seed), rtol=0, atol=1e-5):
            raise DataError(
                f"{root}: this numpy ({np.__version__}) draws other noise than the one that made the store",
                "install the numpy of the store's run.json, or run `rdpm tokenize` again",
            )
        return manifest

    def digest(self) -> str:
        """Identity of the store: sha256 of the manifest."""
        return files.digest(self.model_dump(mode="json"))


def shard_files(shard: int, latents: bool) -> dict[str, str]:
    """kind -> file name; the index is renamed last and marks a whole shard."""
    kinds = ["codes", "labels", *(["latents"] if latents else []), "index"]
    return {kind: f"{kind}-{shard:05d}.npy" for kind in kinds}


def write_shard(root: Path, shard: int, arrays: dict[str, NDArray[Any]]) -> None:
    """Write a shard's arrays, the index last."""
    for kind, name in shard_files(shard, "latents" in arrays).items():
        buffer = io.BytesIO()
        np.save(buffer, arrays[kind], allow_pickle=False)
        files.write_atomic(root / name, lambda file, data=buffer: file.write(data.getbuffer()))  # type: ignore[misc]


def missing_shards(root: Path, plan: Plan) -> list[int]:
    """Shards without an index file."""
    return [s for s in range(plan.shard_count) if not (root / shard_files(s, False)["index"]).exists()]


def begin(root: Path, plan: Plan, record: dict[str, Any]) -> None:
    """Start or resume writing: note the plan in run.json. Raises UsageError when the folder holds another plan."""
    wanted = plan.model_dump(mode="json")
    if (root / "manifest.json").exists():
        there = Manifest.load(root).model_dump(mode="json", include=set(Plan.model_fields))
    elif (root / "run.json").exists():
        there = files.read_json(root / "run.json").get("plan", {})
    elif any(p for p in root.iterdir() if not p.name.startswith(".")):
        raise UsageError(f"{root} is not empty and not a code store", "choose another folder")
    else:
        there = wanted
    if changed := files.differences(there, wanted):
        raise UsageError(
            f"{root} was begun with other settings: {'; '.join(changed[:6])}", "choose another folder, or remove it"
        )
    files.write_json(root / "run.json", {**record, "plan": wanted})


def finish(root: Path, plan: Plan) -> Manifest:
    """Checksum the shards and write the manifest: no manifest, no store."""
    table = []
    for shard in range(plan.shard_count):
        names = shard_files(shard, plan.latents)
        images = len(plan.shard_range(shard))
        sums = {name: files.sha256_file(root / name) for name in names.values()}
        table.append(Shard(images=images, rows=images * plan.views, sha256=sums))
    manifest = Manifest(
        **plan.model_dump(), images=sum(s.images for s in table), rows=sum(s.rows for s in table), shards=tuple(table)
    )
    files.write_json(root / "manifest.json", manifest.model_dump(mode="json"))
    return manifest


def need_space(root: Path, plan: Plan) -> None:
    """Raise RunError when the disk cannot hold what is missing of the store."""
    h, w = plan.grid
    flips = 2 if plan.flip else 1
    row = 2 * plan.steps * h * w + 12
    images = sum(len(plan.shard_range(shard)) for shard in missing_shards(root, plan))
    need = images * (plan.views * row + (flips * 2 * plan.channels * h * w if plan.latents else 0))
    status = os.statvfs(root)
    have = status.f_bavail * status.f_frsize
    if need > have:
        raise RunError(f"disk full: {root} needs {need / 1e9:.2f} GB, has {have / 1e9:.2f} GB", "free some space")


class CodeStore:
    """A finished store, memory-mapped. Rows are global over shards."""

    def __init__(self, root: Path, tokenizer: str | None = None) -> None:
        """tokenizer: the digest the codes must have been made by, if given. Raises DataError."""
        self.root = root
        self.manifest = m = Manifest.load(root)
        if tokenizer not in (None, m.tokenizer):
            raise DataError(
                f"{root} was coded by tokenizer {m.tokenizer[:12]}, not {str(tokenizer)[:12]}",
                "run `rdpm tokenize` again with this tokenizer, or use the one in the store",
            )
        self.offsets = np.cumsum([0, *(s.rows for s in m.shards)])
        names = [shard_files(s, m.latents) for s in range(len(m.shards))]
        shape = (m.steps, *m.grid)
        self._codes = [self._map(n["codes"], np.uint16, (s.rows, *shape)) for n, s in zip(names, m.shards, strict=True)]
        self.labels = np.concatenate(
            [self._map(n["labels"], np.int32, (s.rows,)) for n, s in zip(names, m.shards, strict=True)]
        )
        self.index = np.concatenate(
            [self._map(n["index"], np.int64, (s.rows,)) for n, s in zip(names, m.shards, strict=True)]
        )
        flips = 2 if m.flip else 1
        self._latents = [
            self._map(n["latents"], np.float16, (s.images * flips, m.channels, *m.grid))
            for n, s in zip(names, m.shards, strict=True)
            if m.latents
        ]

    def __reduce__(self) -> tuple[type["CodeStore"], tuple[Path]]:
        """A worker process maps the files itself; a pickled memory map would be the whole array."""
        return CodeStore, (self.root,)

    def _map(self, name: str, dtype: type[np.generic], shape: tuple[int, ...]) -> NDArray[Any]:
        path = self.root / name
        try:
            array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{path} cannot be read: {error}", "delete it and run `rdpm tokenize` again") from error
        if array.dtype != dtype or array.shape != shape:
            raise DataError(f"{path} holds {array.dtype} {array.shape}, not {np.dtype(dtype)} {shape}", "copy it again")
        return array

    def __len__(self) -> int:
        return self.manifest.rows

    def verify(self) -> None:
        """Compare every shard's bytes with the manifest. Raises DataError naming the first that differs."""
        for shard in self.manifest.shards:
            for name, wanted in shard.sha256.items():
                if files.sha256_file(self.root / name) != wanted:
                    raise DataError(f"{self.root / name} is damaged: it differs from the manifest", "tokenize again")

    def view(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The view of each row."""
        return rows % self.manifest.views

    def codes(self, rows: NDArray[np.int64]) -> NDArray[np.uint16]:
        """(n, T, h, w) uint16 of any rows, in the order asked for."""
        return self._gather(self._codes, rows, self.offsets)

    def latents(self, rows: NDArray[np.int64]) -> NDArray[np.float16]:
        """z of the rows' images (mirrored where the view is), (n, C, h, w) fp16. Only where latents are kept."""
        flips = 2 if self.manifest.flip else 1
        own = rows // self.manifest.views * flips + (self.view(rows) & 1 if flips == 2 else 0)
        return self._gather(self._latents, own, self.offsets // self.manifest.views * flips)

    def _gather(self, parts: list[NDArray[Any]], rows: NDArray[np.int64], offsets: NDArray[np.int64]) -> NDArray[Any]:
        out = np.empty((len(rows), *parts[0].shape[1:]), dtype=parts[0].dtype)
        shard_of = np.searchsorted(offsets, rows, side="right") - 1
        for shard in np.unique(shard_of):
            here = shard_of == shard
            out[here] = parts[shard][rows[here] - offsets[shard]]
        return out

    def split(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(training rows, held-out rows): 2% of the images, by a hash of the source index."""
        held = held_out(self.index)
        rows = np.arange(len(self), dtype=np.int64)
        if held.all() or not held.any():  # too few images for the hash: hold out the last
            held = self.index == self.index.max()
        if held.all():
            raise DataError(f"{self.root} holds a single image: none is left to train on", "tokenize more images")
        return rows[~held], rows[held]


def held_out(index_N: NDArray[np.int64]) -> NDArray[np.bool_]:
    """True for about 2% of source indices: splitmix64's finaliser, so the choice moves with nothing else."""
    x = index_N.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    held: NDArray[np.bool_] = (x ^ (x >> np.uint64(31))) % np.uint64(100) < HELD_OUT_PERCENT
    return held

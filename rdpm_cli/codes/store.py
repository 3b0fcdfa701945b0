"""Reading a code store: memory-mapped codes and latents, labels and source indices, rows global over shards."""

import mmap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdpm_cli import files
from rdpm_cli.codes.manifest import (
    AGAIN,
    THESE_AGAIN,
    Manifest,
    npy_bytes,
    of_another_size,
    shard_arrays,
    shard_files,
    wrong_files,
)
from rdpm_cli.errors import DamagedError, DataError

HELD_OUT_PERCENT = 2


class CodeStore:
    """A finished store, memory-mapped. Rows are global over shards."""

    def __init__(self, root: Path, tokenizer: str | None = None, manifest: Manifest | None = None) -> None:
        """tokenizer: the digest the codes must have been made by, if given. Raises DataError.

        manifest: of a store whose own is not written yet.
        """
        self.root = root
        self.manifest = m = manifest or Manifest.load(root)
        if tokenizer not in (None, m.tokenizer):
            raise DataError(
                f"{root} was coded by tokenizer {m.tokenizer[:12]}, not {str(tokenizer)[:12]}",
                "run `rdpm tokenize` again with this tokenizer, or use the one in the store",
            )
        files.allow_open(len(m.shards) * (2 if m.latents else 1))
        self.exceeds_memory = m.image_bytes() * m.images > files.memory_bytes()
        self.offsets = np.cumsum([0, *(s.rows for s in m.shards)])
        self._codes = self._map("codes")
        self._latents = self._map("latents") if m.latents else []
        self.labels, self.index = np.concatenate(self._map("labels")), np.concatenate(self._map("index"))

    def __reduce__(self) -> tuple[type["CodeStore"], tuple[Path]]:
        """A worker process maps the files itself; a pickled memory map would be the whole array."""
        return CodeStore, (self.root,)

    def _map(self, kind: str) -> list[NDArray[Any]]:
        """The arrays of a kind, a shard each. Raises DataError naming the file that is not as the manifest says."""
        return [self._map_shard(number, shard.images, kind) for number, shard in enumerate(self.manifest.shards)]

    def _map_shard(self, shard: int, images: int, kind: str) -> NDArray[Any]:
        m = self.manifest
        path, (dtype, shape) = self.root / shard_files(shard, m.latents)[kind], shard_arrays(m, images)[kind]
        try:
            array: NDArray[Any] = np.load(path, mmap_mode="r" if images else None, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            size = of_another_size(path, npy_bytes(dtype, shape)) if path.is_file() else ""
            raise DataError(f"{path} {size or f'cannot be read: {error}'}", AGAIN) from error
        if array.dtype != dtype or array.shape != shape:
            raise DataError(f"{path} holds {array.dtype} {array.shape}, not {np.dtype(dtype)} {shape}", AGAIN)
        base: Any = array.base
        if self.exceeds_memory and isinstance(base, mmap.mmap):
            base.madvise(mmap.MADV_RANDOM)  # read what is asked for, not 128 KiB around it
        return np.asarray(array)

    def __len__(self) -> int:
        return self.manifest.rows

    def verify(self) -> None:
        """Compare every shard's bytes with the manifest. Raises DataError naming every file that differs."""
        found = [line for shard in self.manifest.shards for line in wrong_files(self.root, shard.sha256)]
        if found:
            raise DamagedError(self.root, found, THESE_AGAIN)

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
        """Row by row: with hundreds of shards, sorting rows by shard costs more than it saves."""
        out = np.empty((len(rows), *parts[0].shape[1:]), dtype=parts[0].dtype)
        shard_of = np.searchsorted(offsets, rows, side="right") - 1
        own = rows - offsets[shard_of]
        for place, (shard, row) in enumerate(zip(shard_of.tolist(), own.tolist(), strict=True)):
            out[place] = parts[shard][row]
        return out

    def split(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(training rows, held-out rows): 2% of the images, by a hash of the source index."""
        held = held_out(self.index)
        rows = np.arange(len(self), dtype=np.int64)
        if not len(self):
            raise DataError(f"{self.root} holds no image", "tokenize some")
        if held.all() or not held.any():  # too few images for the hash: hold out the last
            held = self.index == self.index.max()
        if held.all():
            raise DataError(f"{self.root} holds a single image: none is left to train on", "tokenize more images")
        return rows[~held], rows[held]


def held_out(index_N: NDArray[np.int64], percent: int = HELD_OUT_PERCENT) -> NDArray[np.bool_]:
    """True for about so many of 100 source indices: splitmix64's finaliser, so the choice moves with nothing else."""
    x = index_N.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    held: NDArray[np.bool_] = (x ^ (x >> np.uint64(31))) % np.uint64(100) < percent
    return held

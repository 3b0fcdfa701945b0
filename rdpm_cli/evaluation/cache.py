"""Activations kept on the disk, by content: the pixels of a piece of images, and the extractor's weights."""

import os
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rdpm_cli import files, progress
from rdpm_cli.errors import UsageError

VERSION = 1  # of what is kept
Arrays = dict[str, NDArray[np.float32]]


def folder() -> Path:
    """$RDPM_CACHE, else ~/.cache/rdpm."""
    named = os.environ.get("RDPM_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "rdpm"


class Cache:
    """Arrays by key: one `.npz` each, written whole or not at all. What cannot be kept is computed again."""

    def __init__(self, root: Path, extractor: str) -> None:
        """extractor: sha256 of its weights."""
        self.root = root / f"activations-v{VERSION}" / extractor[:32]
        self.broken = False  # was something not written? Then nothing more is tried

    def get(self, key: str, rows: int) -> Arrays | None:
        """The arrays of a piece of so many images; None where they are not there, or, with a warning, damaged."""
        path = self._path(key)
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                found = {name: archive[name] for name in archive.files}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, EOFError, KeyError, struct.error, zlib.error, zipfile.BadZipFile) as error:
            progress.warn(f"{path} is damaged ({error}); computing it again")
            return None
        if any(values.shape[:1] != (rows,) or values.dtype != np.float32 for values in found.values()):
            progress.warn(f"{path} is damaged (it holds other arrays); computing it again")
            return None
        return found

    def put(self, key: str, arrays: Arrays) -> None:
        """Keep them; a disk that is full or may not be written costs a warning, not the score."""
        if self.broken:
            return
        try:
            files.write_atomic(self._path(key), lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]
        except (OSError, UsageError) as error:
            self.broken = True
            progress.warn(f"nothing more is kept in {self.root}: {error}; --no-cache says so from the start")

    def _path(self, key: str) -> Path:
        return self.root / key[:2] / f"{key}.npz"

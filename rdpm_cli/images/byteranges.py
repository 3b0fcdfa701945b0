"""Pieces of large files by offset."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

OPEN_AT_ONCE = 16
LARGEST = 1 << 30  # bytes of one encoded image


class ByteRanges:
    """Some files, read anywhere; the last few used stay open, until it is dropped.

    Pickles as their paths; each process opens its own. Reads carry their offset, so forked processes that share an open
    file do not share a position.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        self._open: dict[int, BinaryIO] = {}

    def __getstate__(self) -> dict[str, object]:
        return {"paths": self.paths, "_open": {}}

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close what is open; a later read opens it again."""
        while self._open:
            self._open.popitem()[1].close()

    def read(self, file: int, offset: int, size: int) -> bytes:
        """`size` bytes of file number `file`. Raises OSError where it ends before."""
        if size > LARGEST:
            raise OSError(f"{size:,} bytes are more than an image may have")
        data = os.pread(self._file(file).fileno(), size, offset)
        if len(data) != size:
            raise OSError(f"{self.paths[file].name} ends inside it")
        return data

    def _file(self, place: int) -> BinaryIO:
        file = self._open.pop(place, None) or self.paths[place].open("rb", buffering=0)
        self._open[place] = file  # the last one used comes last
        if len(self._open) > OPEN_AT_ONCE:
            self._open.pop(next(iter(self._open))).close()
        return file

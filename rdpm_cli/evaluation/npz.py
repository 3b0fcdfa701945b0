"""Reading .npz files that others made: nothing is unpickled, one array at a time, images in flat memory."""

import contextlib
import math
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from rdpm_cli.errors import DataError
from rdpm_cli.images.transform import Pixels

HINT = "images are `arr_0`, (N, H, W, 3) uint8, as np.savez writes them; references have `mu` and `sigma`"


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Raises DataError naming the file that cannot be read."""
    try:
        yield
    except (OSError, ValueError, EOFError, KeyError, struct.error, zlib.error, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read as an .npz: {error}", HINT) from error


def names(path: Path) -> list[str]:
    """The arrays it holds. Raises DataError."""
    with _readable(path), zipfile.ZipFile(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def array(path: Path, name: str) -> NDArray[Any]:
    """One array. Raises DataError, also for one of Python objects: those are not unpickled."""
    with _readable(path), path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        found: NDArray[Any] = archive[name]
        return found


class Images:
    """`arr_0` of an .npz. count, shape: (N, H, W, 3)."""

    def __init__(self, path: Path) -> None:
        """Raises DataError where it holds none."""
        self.path = path
        self.there = names(path)
        if "arr_0" not in self.there:
            raise DataError(f"{path} holds no images: it has {', '.join(self.there)}, not arr_0", HINT)
        with self._open() as (file, size):
            self.shape, dtype, fortran = _header(path, file)
            wrong = dtype != np.uint8 or fortran or len(self.shape) != 4 or self.shape[-1] != 3
            if wrong or size - file.tell() != math.prod(self.shape):
                order = "Fortran" if fortran else "C"
                raise DataError(f"{path}: arr_0 is {dtype} {self.shape} in {order} order, {size:,} bytes", HINT)
        self.count = self.shape[0]

    @contextlib.contextmanager
    def _open(self) -> Iterator[tuple[IO[bytes], int]]:
        with _readable(self.path), zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as file:
            yield file, archive.getinfo("arr_0.npy").file_size

    def read(self, pieces: Iterable[range]) -> Iterator[Pixels]:
        """The images of ascending ranges."""
        each = math.prod(self.shape[1:])
        with self._open() as (file, _):
            _header(self.path, file)
            first = file.tell()
            for piece in pieces:
                file.seek(first + piece.start * each)
                content = bytearray(file.read(len(piece) * each))  # torch wants arrays that may be written to
                yield np.frombuffer(content, dtype=np.uint8).reshape(len(piece), *self.shape[1:])

    def labels(self) -> list[int] | None:
        """`arr_1`, where it holds one whole number an image."""
        if "arr_1" not in self.there:
            return None
        found = array(self.path, "arr_1")
        if found.shape != (self.count,) or found.dtype.kind not in "iu":
            return None
        return [int(label) for label in found]


def _header(path: Path, file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any], bool]:
    """(shape, dtype, is it in Fortran order) of the .npy that begins here."""
    with _readable(path):
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        else:
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(file)
    return shape, dtype, fortran

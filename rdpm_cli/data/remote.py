"""Files by fsspec URL, s3://bucket/x.tar or hf://datasets/owner/name/x.parquet: listed, read and written."""

import contextlib
import glob
import io
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from rdpm_cli import files
from rdpm_cli.errors import DataError, RunError, UsageError

FIRST, MOST = 1 << 12, 1 << 20  # bytes of a request: between the headers of a tar's members, and of reading in order
PACKAGES = {"s3": "'rdpm[remote]'", "s3a": "'rdpm[remote]'", "hf": "'rdpm[hub]'", "gs": "gcsfs", "gcs": "gcsfs"}
HINT = "check the address, the connection and the credentials"


class RemotePath:
    """A file or folder by its URL, with those methods of pathlib's Path that sources and stores use.

    It holds no connection: fsspec keeps one for each process, so it can be pickled, and used after a fork."""

    def __init__(self, url: str) -> None:
        self.url = files.url(url).rstrip("/")
        self.name = self.url.rpartition("/")[2]
        self.suffix = Path(self.name).suffix

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(f"{self.url}/{name}")

    @property
    def parent(self) -> "RemotePath":
        return RemotePath(self.url.rpartition("/")[0])

    def resolve(self) -> "RemotePath":
        return self

    absolute = resolve

    def exists(self) -> bool:
        return self._found is not None

    def is_file(self) -> bool:
        return self._found is not None and self._found[0] != "directory"

    def is_dir(self) -> bool:
        return self._found is not None and self._found[0] == "directory"

    @cached_property
    def _found(self) -> tuple[str, int] | None:
        """(kind, bytes); None where there is nothing."""
        try:
            with self._connection() as (system, path):
                info = system.info(path)
        except FileNotFoundError:
            return None
        return info["type"], int(info.get("size") or 0)

    @property
    def size(self) -> int:
        return self._found[1] if self._found else 0

    def glob(self) -> "list[RemotePath]":
        """The files that it names as a pattern with * and ?, sorted."""
        if not glob.has_magic(self.url):
            return [self] if self.exists() else []
        with self._connection() as (system, path):
            return [RemotePath(system.unstrip_protocol(name)) for name in sorted(system.glob(path))]

    def walk(self) -> list[str]:
        """All files below a folder, relative to it; none where there is nothing."""
        with contextlib.suppress(FileNotFoundError), self._connection() as (system, path):
            return [name.removeprefix(path).strip("/") for name in system.find(path)]
        return []

    def sizes(self) -> dict[str, int]:
        """Bytes of the files of a folder, by name; none where there is nothing. Asked for anew each time."""
        with self._connection() as (system, path):
            system.invalidate_cache()
            found = system.find(path, maxdepth=1, detail=True).items()
            return {name.rpartition("/")[2]: int(info["size"]) for name, info in found}

    def write_bytes(self, content: bytes) -> None:
        """Write a file. Raises UsageError where its bucket does not exist, RunError for other reasons."""
        try:
            with self._connection() as (system, path):
                system.pipe_file(path, content)
        except FileNotFoundError as error:
            raise UsageError(f"{self} cannot be written: there is no such bucket or folder", "make it first") from error

    def unlink(self) -> None:
        """Remove a file; nothing where it has gone already."""
        with contextlib.suppress(FileNotFoundError), self._connection() as (system, path):
            system.rm_file(path)

    def read_bytes(self) -> bytes:
        return self.read_at(None, None)

    def read_at(self, start: int | None, end: int | None) -> bytes:
        """Its bytes from start to end, by one request. Raises DataError if it is gone, RunError for other reasons."""
        try:
            with self._connection() as (system, path):
                # Of file systems that open a file for it, open() would read megabytes ahead.
                exact = {} if system.async_impl else {"cache_type": "none"}
                content: bytes = system.cat_file(path, start=start, end=end, **exact)
                return content
        except FileNotFoundError as error:
            raise DataError(f"{self} does not exist any more", "run the command again") from error

    def open(self, mode: str = "rb") -> BinaryIO:
        return io.BufferedReader(_Ranges(self), FIRST)

    @contextlib.contextmanager
    def _connection(self) -> Iterator[tuple[Any, str]]:
        """The file system, and the path in it. Raises UsageError without its package, RunError for what it raises."""
        import fsspec  # slow to import

        scheme = self.url.partition(":")[0]
        if scheme == "hf" and not self.url.startswith("hf://datasets/"):
            raise UsageError(f"{self} is no data set of the hub", "write hf://datasets/owner/name/...")
        try:
            system, path = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:  # ValueError: of a scheme that it does not know
            hint = f"uv pip install {PACKAGES[scheme]}" if scheme in PACKAGES else "copy it to this machine"
            raise UsageError(f"{self} cannot be opened: {error}", hint) from error
        try:
            yield system, path
        except FileNotFoundError:
            raise
        except Exception as error:  # every service has errors of its own
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise RunError(f"{self} cannot be used: {reason}", HINT) from error


class _Ranges(io.RawIOBase):
    """A file that is read by requests: of FIRST bytes after a jump, twice as many each time while reading in order."""

    def __init__(self, path: RemotePath) -> None:
        self.path, self.position, self.start, self.chunk, self.step = path, 0, 0, b"", FIRST // 2

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self.position = offset + (0, self.position, self.path.size)[whence]
        return self.position

    def readinto(self, buffer: Any) -> int:
        behind = self.start + len(self.chunk)
        if not self.start <= self.position < behind:
            self.step = min(2 * self.step, MOST) if self.position == behind else FIRST
            end = min(self.position + max(self.step, len(buffer)), self.path.size)
            self.start = self.position
            self.chunk = self.path.read_at(self.position, end) if self.position < end else b""
        piece = self.chunk[self.position - self.start :][: len(buffer)]
        buffer[: len(piece)] = piece
        self.position += len(piece)
        return len(piece)


Place = Path | RemotePath


def place(spec: str) -> Place:
    """The path of this machine, or the URL, that a user named."""
    return RemotePath(spec) if files.is_url(spec) else Path(spec)

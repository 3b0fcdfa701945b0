"""Files that are whole or absent: atomic writes, locks, digests, free space. Torch-free."""

import contextlib
import errno
import hashlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from rdpm_cli.errors import DataError, RunError, UsageError

FULL = (errno.ENOSPC, errno.EDQUOT)  # errno of a full disk and of a used-up quota
FREE = "free some space and run the same command again"


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call write(file) on a temporary file next to `path`, sync it and rename it: readers see all of it or nothing."""
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        # The system leaves the name out when a write fails, and the user needs to know which disk is full.
        if error.errno in FULL and error.filename is None:
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)
    descriptor = os.open(path.parent, os.O_RDONLY)
    os.fsync(descriptor)  # makes the rename durable
    os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder and its parents. Raises UsageError if a file is in the way or it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, FileNotFoundError, PermissionError) as error:
        raise UsageError(f"folder {folder} cannot be made: {error.strerror}", "name another folder") from error


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: the same text for the same content."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Any) -> str:
    """sha256 of the canonical JSON, in hex."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Indented JSON, written atomically; NaN is refused."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_atomic(path, lambda file: file.write(text.encode()))


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises DataError if it is absent or broken."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}", "make it again; it may be half of a copy") from error


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold `folder` for writing. A second writer gets a RunError that names the pid and host of the first one."""
    make_folder(folder)
    lock, owner = FileLock(folder / ".lock"), folder / ".lock.owner"
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        writer = owner.read_text() if owner.exists() else "another process"
        raise RunError(f"{folder} is being written by {writer}", "wait for it, or stop it") from error
    try:
        owner.write_text(f"pid {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """'a.b: old -> new' for every leaf that differs between two nested dicts."""
    lines = []
    for key in sorted(set(old) | set(new)):
        a, b = old.get(key, "(absent)"), new.get(key, "(absent)")
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a} -> {b}")
    return lines


def free_bytes(folder: Path) -> int:
    """Free space where `folder` is, or would be made."""
    status = os.statvfs(next(path for path in (folder, *folder.absolute().parents) if path.exists()))
    return status.f_bavail * status.f_frsize


def need_space(folder: Path, need: int) -> None:
    """Raise RunError if the disk under `folder` cannot hold this many bytes more."""
    if need > (free := free_bytes(folder)):
        raise RunError(f"disk full: {folder} needs {need / 1e6:.2f} MB more, {free / 1e6:.2f} MB are free", FREE)


@contextlib.contextmanager
def report_full_disk(folder: Path) -> Iterator[None]:
    """Turn the system's 'no space left', or a used-up quota, into a RunError."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        free = f"{free_bytes(folder) / 1e6:.2f} MB are free"
        raise RunError(f"disk full: {folder} cannot be written: {error.strerror}, {free}", FREE) from error

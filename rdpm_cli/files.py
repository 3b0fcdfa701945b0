"""Files that are whole or absent: atomic writes, locks, digests. A plain helper of every room; torch-free."""

import contextlib
import errno
import hashlib
import json
import os
import resource
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from rdpm_cli.errors import DataError, RunError, UsageError

SPARE_FILES = 512  # open files of a process for anything else
FULL = (errno.ENOSPC, errno.EDQUOT)
FREE = "free some space and run the same command again"


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call write(file) on a temporary file beside `path`, sync it and rename it: a reader sees all of it or none."""
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno in FULL and error.filename is None:  # as the system leaves it when a write fails
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder and what is above it. Raises UsageError where a file stands in the way or nothing can be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, FileNotFoundError, PermissionError) as error:
        raise _no_folder(folder, str(error.strerror)) from error


def _no_folder(folder: Path, reason: str) -> UsageError:
    why = "is a file" if folder.is_file() else f"cannot be a folder: {reason}"
    return UsageError(f"{folder} {why}", "name another folder")


def check_folder(folder: Path) -> None:
    """Raise what make_folder would, by what is above it, and PermissionError where nothing can be put into it."""
    there = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
    number = 0
    if not there.is_dir():
        number = errno.EEXIST if there == folder else errno.ENOTDIR
    elif there != folder and not os.statvfs(there).f_blocks:  # the system's own tree, such as /proc, holds no files
        number = errno.ENOENT
    elif not os.access(there, os.W_OK | os.X_OK):
        number = errno.EACCES
    if number == errno.EACCES and there == folder:
        raise PermissionError(number, os.strerror(number), str(folder))
    if number:
        raise _no_folder(folder, os.strerror(number))


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
    text = json_text(value)
    write_atomic(path, lambda file: file.write(text.encode()))


def json_text(value: Any) -> str:
    """What write_json writes."""
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises DataError when it is absent or broken."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}", "make it again; it may be half of a copy") from error


def refuse_second_writer(folder: Path) -> None:
    """Raise RunError where another process writes the folder: a look before slow imports, the lock itself comes later.

    One of several processes that write together does not look: another one of them may have begun.
    """
    from filelock import FileLock, Timeout

    if "RANK" in os.environ or not (folder / ".lock.owner").is_file():
        return
    try:
        FileLock(folder / ".lock").acquire(timeout=0).lock.release()
    except Timeout as error:
        raise _written_by_another(folder) from error


def _written_by_another(folder: Path) -> RunError:
    owner = folder / ".lock.owner"
    who = owner.read_text().strip() if owner.exists() else "another process"
    return RunError(f"{folder} is being written by {who}", "wait for it, or stop it")


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold `folder` for writing. A second writer gets a RunError that names the first one's pid and host."""
    from filelock import FileLock, Timeout

    make_folder(folder)
    lock, owner = FileLock(folder / ".lock"), folder / ".lock.owner"
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise _written_by_another(folder) from error
    try:
        owner.write_text(f"pid {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """'a.b: old -> new' for every leaf that differs between two nested dicts."""
    found = []
    for key in sorted(set(old) | set(new)):
        a, b = old.get(key, "(absent)"), new.get(key, "(absent)")
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {_short(a)} -> {_short(b)}")
    return found


def _short(value: Any) -> str:
    """A value as people compare it: digests by their beginning."""
    text = str(value)
    return text[:12] if len(text) == 64 and all(c in "0123456789abcdef" for c in text) else text


def free_bytes(folder: Path) -> int:
    """Free space where `folder` is, or would be made."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    status = os.statvfs(there)
    return status.f_bavail * status.f_frsize


def need_space(root: Path, need: int) -> None:
    """Raise RunError when the disk under `root` cannot hold so many bytes more."""
    have = free_bytes(root)
    if need > have:
        raise _no_space(root, need, have)


def _no_space(root: Path, need: int, have: int) -> RunError:
    return RunError(f"disk full: {root} needs {_size(need)} more, {_size(have)} are free", FREE)


def full(error: OSError) -> tuple[str, str]:
    """Message and hint of the system's 'no space left', where nobody knows what is still to be written."""
    if error.filename is None:
        return f"disk full: {error.strerror}", FREE
    return (
        f"disk full: {error.filename} cannot be written, {_size(free_bytes(Path(error.filename).parent))} are free",
        FREE,
    )


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


@contextlib.contextmanager
def space_is_told(root: Path, missing: Callable[[], int]) -> Iterator[None]:
    """Turn the system's 'no space left' into a RunError: what is needed and there, or else the system's own text.

    missing: bytes that are still to be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        need, have = missing(), free_bytes(root)
        if need > have:
            raise _no_space(root, need, have) from error
        hint = f"a quota, or the number of files, may be used up; {FREE}"
        raise RunError(f"{root} cannot be written: {error.strerror}, though {_size(have)} are free", hint) from error


def memory_bytes() -> int:
    """The machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def allow_open(count: int) -> None:
    """Let this process hold so many files open beside what it has, as far as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + SPARE_FILES
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def no_file(path: Path) -> str:
    """What to say of a path where a file should be and none is."""
    return f"{path} is a folder, not a file" if path.is_dir() else f"{path} does not exist"

"""Files that are whole or absent: atomic writes, locks, digests, free space. Torch-free."""

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from rdpm_cli.errors import CheckpointError, DataError, RunError, UsageError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of a full disk, a used-up quota, and a limit of file sizes
FREE = "free some space and run the same command again"
HINTS = {  # for an error about a checkpoint, by the kind that is needed; "": any
    "": "name a tokenizer.pt, generator.pt or judge.pt",
    "rdpm-tokenizer": "make one with `rdpm train-tokenizer IMAGES --recipe NAME`",
    "rdpm-generator": "make one with `rdpm train-gen CODES --recipe NAME`",
    "rdpm-judge": "make one with `rdpm eval judge IMAGES OUT`",
    "rdpm-speech-judge": "make one with `rdpm eval judge RECORDINGS OUT --recipe speech8-sin`",
    "weights": "known are rdpm's own files, and of tokenizers VAR's, taming-transformers' VQGAN's and LlamaGen's",
}
UNFIT = (errno.ENAMETOOLONG, errno.ELOOP, errno.EISDIR, errno.ENOTDIR, errno.ENXIO, errno.EBADF)  # of wrong paths
LONGEST_NAME, LONGEST_PATH = 255, 4095  # bytes, on Linux and in all its usual file systems
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/+")
DESCRIPTOR = re.compile(r"/dev/fd/(\d+)|/proc/self/fd/(\d+)|/dev/std(in|out|err)")


def is_url(text: str) -> bool:
    """Whether a user gave a URL, and no path of that name."""
    return URL.match(text) is not None and not os.path.lexists(text)


def url(text: str) -> str:
    """A URL with both its slashes, of which a Path keeps one; of this machine's files all three."""
    slashes = "///" if text.startswith(("file:", "local:")) else "//"
    return URL.sub(lambda scheme: scheme[0].rstrip("/") + slashes, text, count=1)


def local_path(text: str) -> str:
    """A path of this machine that a user gave, with ~ expanded. Raises UsageError for a URL, or without a home."""
    if is_url(text):
        hint = "give a path of this machine, and copy from or to the URL, as `aws s3 sync` does"
        raise UsageError(f"{url(text)}: only IMAGES, CODES and the OUT of tokenize (not http) may be URLs", hint)
    expanded = os.path.expanduser(text)
    if text == expanded and (text == "~" or text.startswith("~/")):
        raise UsageError(f"{text}: this user has no home folder", "set HOME, or write the path without ~")
    return expanded


def check_name(path: Path) -> None:
    """Raise UsageError for a name that no file system takes."""
    if any(len(os.fsencode(part)) > LONGEST_NAME for part in path.parts) or len(os.fsencode(path)) > LONGEST_PATH:
        raise UsageError(f"{path.name[:40]}...: the name or the path is too long", "give a shorter one")


def check_working_folder() -> None:
    """Raise UsageError if it has been deleted: no relative path means anything then."""
    try:
        os.getcwd()
    except OSError as error:
        raise UsageError(f"the working folder cannot be used: {error.strerror}", "cd into another folder") from error


def descriptor_of(path: Path) -> int | None:
    """The open file of this process that a path names, as /dev/stdout does; None for others."""
    if not (match := DESCRIPTOR.fullmatch(str(path))):
        return None
    return {"in": 0, "out": 1, "err": 2}[match[3]] if match[3] else int(match[1] or match[2])


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call write(file) on a temporary file next to `path`, sync it and rename it: readers see all of it or nothing.

    A link stays, and the file that it names is replaced; pipes and devices are written into."""
    try:
        if (number := descriptor_of(path)) is not None:
            with os.fdopen(os.dup(number), "wb") as file:
                write(file)
        elif path.exists() and not path.is_file() and not path.is_dir():
            with path.open("wb") as file:
                write(file)
        else:
            _replace(Path(os.path.realpath(path)) if path.is_symlink() else path, write)
    except OSError as error:
        # The system leaves the name out when a write fails, and the user needs to know which disk is full.
        if error.filename is None:
            error.filename = str(path)
        raise


def _replace(path: Path, write: Callable[[BinaryIO], object]) -> None:
    make_folder(path.parent)
    # The end of the name, since a whole name may be as long as names can be. Random, since every container has a pid 1.
    temporary = path.with_name(f".{path.name[-40:]}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    descriptor = os.open(path.parent, os.O_RDONLY)
    os.fsync(descriptor)  # makes the rename durable
    os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder and its parents. Raises UsageError if a file is in the way or it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in FULL:
            raise
        raise UsageError(f"folder {folder} cannot be made: {error.strerror}", "name another folder") from error


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: the same text for the same content."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Any) -> str:
    """sha256 of the canonical JSON, in hex."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def check_tensors(path: Path, hint: str) -> None:
    """Raise CheckpointError for a file that torch.save cannot have written, by its first bytes: without torch."""
    if not os.path.isfile(path):  # for any name whatever, unlike Path.is_file
        reason = "is not a file" if os.path.exists(path) else "does not exist"
        raise CheckpointError(f"{path} {reason}", hint)
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}", hint) from error
    if start != b"PK\3\4" and start[:1] != b"\x80":  # of a zip file, and of the pickles that came before torch 1.6
        raise CheckpointError(f"{path} is not a checkpoint: it does not begin like the files of torch.save", hint)


def sha256_file(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Indented JSON, written atomically; NaN is refused."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_atomic(path, lambda file: file.write(text.encode()))


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """A .jsonl file, written atomically: JSON of a row a line. -> the path."""
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    write_atomic(path, lambda file: file.write(content))
    return path


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises DataError if it is absent or broken."""
    try:
        return json.loads(path.read_text("utf-8"))
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
        writer = owner.read_text("utf-8") if owner.exists() else "another process"
        raise RunError(f"{folder} is being written by {writer}", "wait for it, or stop it") from error
    try:
        owner.write_text(f"pid {os.getpid()} on {socket.gethostname()}", "utf-8")
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

"""Files of tensors: the one place that calls torch.load, and the seal by which a file of ours is known to be whole.

The seal is the zip's comment: `sha256:`, and the hex digest of all bytes of the file before its digits. A plain helper.

`python -m rdpm_cli.tensorfile FILE COPY` copies the tensors of a file that holds more. Nothing in FILE is run.
"""

import hashlib
import pickle
import re
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.utils._pytree import tree_leaves

from rdpm_cli import files
from rdpm_cli.errors import CheckpointError, RdpmError, UsageError

_UNKNOWN = re.compile(r"GLOBAL (\S+)|Unsupported class (\S+)")  # how torch names what it did not run

SEAL = b"sha256:"
DIGITS = 64
ZIP_END, ZIP_END_BYTES = b"PK\x05\x06", 22  # of the last record of a zip: its comment's length, then the comment
RECORD = 512  # bytes of a tensor's name, headers and padding
PART = 1 << 22  # bytes read at once


class Unreadable(Exception):
    """A file that is no file of plain tensors. Its cause is torch's own error."""


def read(path: Path, device: torch.device | str = "cpu") -> Any:
    """The content of a file that torch.save wrote; no pickled code runs. Raises Unreadable.

    Whatever torch's unpickler meets in a file that is none, KeyError and IndexError among it, says the same thing.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch says of old formats is for who called torch.load
            return torch.load(path, map_location=device, weights_only=True)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise Unreadable(str(error).strip() or type(error).__name__) from error


def size(content: Any) -> int:
    """Bytes that a file of the tensors in nested dicts and lists takes, a little more rather than less."""
    tensors = [leaf for leaf in tree_leaves(content) if isinstance(leaf, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() + RECORD for tensor in tensors)


class _Sealing:
    """A file for torch.save, which writes from front to back: sums up what passes, and holds the last two bytes."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sum, self.held = file, hashlib.sha256(), b""
        self.failed: OSError | None = None

    def write(self, data: Any) -> int:
        whole = memoryview(data).cast("B")
        if len(whole) < 2:
            self.held += bytes(whole)
            self._pass(self.held[:-2])
            self.held = self.held[-2:]
        else:
            self._pass(self.held)
            self._pass(whole[:-2])
            self.held = bytes(whole[-2:])
        return len(whole)

    def flush(self) -> None:
        """What torch.save calls at its end."""

    def _pass(self, data: bytes | memoryview) -> None:
        self.sum.update(data)
        try:
            self.file.write(data)
        except OSError as error:
            self.failed = error
            raise

    def close(self) -> None:
        """Replace the length of the comment, none so far, and add the comment."""
        assert self.held == bytes(2), "torch.save ends with a zip's last record, without a comment"
        self._pass((len(SEAL) + DIGITS).to_bytes(2, "little") + SEAL)
        self.file.write(self.sum.hexdigest().encode())


def write(file: BinaryIO, content: Any) -> None:
    """What torch.save writes, with the seal. Raises the file's own OSError, of which torch makes `unexpected pos`."""
    sealing = _Sealing(file)
    try:
        torch.save(content, sealing)  # type: ignore[arg-type]  # write and flush are all it calls
    except RuntimeError:
        if sealing.failed:
            raise sealing.failed from None
        raise
    sealing.close()


def check_whole(path: Path) -> bool:
    """Compare a file with its seal; one without, of an older rdpm, by the CRC of its members. -> has it a seal?

    Raises Unreadable.
    """
    length = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, length - ZIP_END_BYTES - len(SEAL) - DIGITS))
        end = file.read()
        last = end[-ZIP_END_BYTES:]
        if last[:4] == ZIP_END and last[-2:] == bytes(2):
            check_members(path)
            return False
        comment = (len(SEAL) + DIGITS).to_bytes(2, "little") + SEAL
        if end[:4] != ZIP_END or end[ZIP_END_BYTES - 2 : -DIGITS] != comment:
            raise Unreadable(f"its end is missing or damaged, after {length:,} bytes")
        file.seek(0)
        total, left = hashlib.sha256(), length - DIGITS
        while data := file.read(min(PART, left)):
            total.update(data)
            left -= len(data)
    if total.hexdigest().encode() != end[-DIGITS:]:
        raise Unreadable("it differs from its checksum")
    return True


def unknown(error: Unreadable) -> str | None:
    """The first class or function that a file names beside tensors, as `module.name`; None where it is no such file."""
    found = _UNKNOWN.search(str(error)) if isinstance(error.__cause__, pickle.UnpicklingError) else None
    return (found[1] or found[2]).rstrip(".") if found else None


def is_refused(error: Unreadable) -> bool:
    """Does a file name what torch runs under no circumstances, as posix.system, so that no part of it can be had?"""
    return "is blocked" in str(error)


def reason(error: Unreadable) -> str:
    """One line on why, without torch's advice to load the file without its guard."""
    if what := unknown(error):
        return f"it names {what} beside tensors, and no code of a file is run"
    return str(error).partition("Re-running")[0].strip().splitlines()[0][:200].rstrip(" .")


class _Inert:
    """Stands for every class and function that a pickle names: takes whatever it is given, and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def __setstate__(self, state: Any) -> None: ...
    def __setitem__(self, key: Any, value: Any) -> None: ...
    def append(self, item: Any) -> None: ...
    def extend(self, items: Any) -> None: ...
    def add(self, item: Any) -> None: ...


def read_tensors_alone(path: Path) -> Any:
    """The dicts and tensors of any file that torch.save wrote; what else it holds is left out, and never run.

    Raises Unreadable.
    """
    named: list[str] = []
    while True:
        with torch.serialization.safe_globals([(_Inert, name) for name in named]):
            try:
                return _tensors(read(path))
            except Unreadable as error:
                more = unknown(error)
                if more is None or more in named:
                    raise
                named.append(more)


def _tensors(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    kept = {key: _tensors(inner) for key, inner in value.items() if isinstance(inner, dict | torch.Tensor)}
    return {key: inner for key, inner in kept.items() if isinstance(inner, torch.Tensor) or inner}


def check_members(path: Path) -> None:
    """Compare every member of the zip with its CRC, which torch.load does not. Raises Unreadable.

    Whatever zipfile meets in a damaged one, ValueError and struct.error among it, says the same thing.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except Exception as error:
        raise Unreadable(str(error).strip() or type(error).__name__) from error
    if broken:
        raise Unreadable(f"its member {broken} differs from its CRC")


def copy_tensors(source: Path, copy: Path) -> None:
    """Write what read_tensors_alone finds. Raises CheckpointError, and RunError where the disk is full."""
    if not source.is_file():
        raise CheckpointError(files.no_file(source), "name a file of weights")
    try:
        tensors = read_tensors_alone(source)
    except Unreadable as error:
        hint = "get these weights from another place" if is_refused(error) else "fetch it again"
        raise CheckpointError(f"{source} cannot be read as weights: {reason(error)}", hint) from error
    with files.space_is_told(copy.parent, lambda: size(tensors)):
        files.write_atomic(copy, lambda file: write(file, tensors))


def main() -> None:
    """FILE COPY."""
    try:
        if len(sys.argv) != 3:
            raise UsageError("two paths are needed", "python -m rdpm_cli.tensorfile FILE COPY")
        copy_tensors(*map(Path, sys.argv[1:]))
    except RdpmError as error:
        print(f"rdpm: error: {error.message}\nhint: {error.hint}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()

"""Reading a file of tensors: the one place that calls torch.load. A plain helper.

`python -m rdpm_cli.tensorfile FILE COPY` copies the tensors of a file that holds more. Nothing in FILE is run.
"""

import pickle
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch

_UNKNOWN = re.compile(r"GLOBAL (\S+)|Unsupported class (\S+)")  # how torch names what it did not run


class Unreadable(Exception):
    """A file that is no file of plain tensors. Its cause is torch's own error."""


def read(path: Path, device: torch.device | str = "cpu") -> Any:
    """The content of a file that torch.save wrote; no pickled code runs. Raises Unreadable.

    Whatever torch's unpickler meets in a file that is none, KeyError and IndexError among it, says the same thing.
    """
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise Unreadable(str(error).strip() or type(error).__name__) from error


def unknown(error: Unreadable) -> str | None:
    """The first class or function that a file names beside tensors, as `module.name`; None where it is no such file."""
    found = _UNKNOWN.search(str(error)) if isinstance(error.__cause__, pickle.UnpicklingError) else None
    return (found[1] or found[2]).rstrip(".") if found else None


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


def main() -> None:
    """FILE COPY."""
    source, copy = map(Path, sys.argv[1:])
    try:
        tensors = read_tensors_alone(source)
    except Unreadable as error:
        sys.exit(f"{source} cannot be read as weights: {error}")
    torch.save(tensors, copy)


if __name__ == "__main__":
    main()

"""Reading a file of tensors: the one place that calls torch.load. A plain helper."""

import zipfile
from pathlib import Path
from typing import Any

import torch


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

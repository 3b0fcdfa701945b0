"""Reading a file of tensors: the one place that calls torch.load. A plain helper."""

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

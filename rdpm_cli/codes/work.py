"""How a store is made, as opposed to what: nothing here changes a byte of it. Torch-free."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

MAX_BAD = 0.0001  # share of the images
ROUNDING = 1e-9  # images


def _alone() -> None:
    """There is no other process to wait for."""


@dataclass(frozen=True)
class Work:
    """workers: processes beside this one. on_bad: stop at the first image that cannot be read, or leave it out.

    max_bad: share of the images that may be left out. together: waits until every rank is here.
    """

    workers: int = 1
    on_bad: Literal["stop", "skip"] = "stop"
    max_bad: float = MAX_BAD
    together: Callable[[], None] = _alone

    def bad_allowed(self, count: int) -> int:
        """How many of so many images may be left out: the share, rounded up, but not what binary fractions add."""
        return math.ceil(self.max_bad * count - ROUNDING)

"""The rows of docs/reliability.md that tests count: how often a fault was put right, of how often it was made."""

import contextlib
from collections.abc import Iterator


class Rows:
    """What the tests of this session have counted and measured."""

    def __init__(self) -> None:
        self.counts: dict[str, list[int]] = {}
        self.notes: dict[str, str] = {}

    @contextlib.contextmanager
    def count(self, row: str, faults: int = 1) -> Iterator[None]:
        """So many faults of this row are made inside; they are put right where nothing is raised."""
        counted = self.counts.setdefault(row, [0, 0])
        counted[1] += faults
        yield
        counted[0] += faults

    def note(self, row: str, text: str) -> None:
        """A measured value."""
        self.notes[row] = text

    def add(self, counts: dict[str, list[int]], notes: dict[str, str]) -> None:
        """What another process has counted and measured."""
        for row, (right, made) in counts.items():
            so_far = self.counts.setdefault(row, [0, 0])
            so_far[0] += right
            so_far[1] += made
        self.notes.update(notes)

    def lines(self) -> list[str]:
        counted = [f"row: {row} {right}/{made}" for row, (right, made) in self.counts.items()]
        return [*counted, *(f"row: {row}: {text}" for row, text in self.notes.items())]


ROWS = Rows()

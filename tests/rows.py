"""The rows of docs/reliability.md that tests count: of the faults made, how many were recovered from."""

import contextlib
from collections.abc import Iterator


class Rows:
    """Counts and measurements of this session."""

    def __init__(self) -> None:
        self.counts: dict[str, list[int]] = {}
        self.notes: dict[str, str] = {}

    @contextlib.contextmanager
    def count(self, row: str, faults: int = 1) -> Iterator[None]:
        """Make `faults` faults of this row inside; they count as recovered from unless an exception leaves."""
        counted = self.counts.setdefault(row, [0, 0])
        counted[1] += faults
        yield
        counted[0] += faults

    def note(self, row: str, text: str) -> None:
        """A measured value."""
        self.notes[row] = text

    def add(self, counts: dict[str, list[int]], notes: dict[str, str]) -> None:
        """Add the counts and measurements of another process."""
        for row, (recovered, total) in counts.items():
            so_far = self.counts.setdefault(row, [0, 0])
            so_far[0] += recovered
            so_far[1] += total
        self.notes.update(notes)

    def lines(self) -> list[str]:
        counted = [f"row: {row} {recovered}/{total}" for row, (recovered, total) in self.counts.items()]
        return [*counted, *(f"row: {row}: {text}" for row, text in self.notes.items())]


ROWS = Rows()

"""The rows of docs/reliability.md that tests count: the number of faults made, and of those recovered from."""

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
        self.add({row: [0, faults]}, {})
        yield
        self.add({row: [faults, 0]}, {})

    def note(self, row: str, text: str) -> None:
        """A measured value."""
        self.notes[row] = text

    def add(self, counts: dict[str, list[int]], notes: dict[str, str]) -> None:
        """Add the counts and measurements of another process."""
        for row, (recovered, total) in counts.items():
            before = self.counts.get(row, [0, 0])
            self.counts[row] = [before[0] + recovered, before[1] + total]
        self.notes |= notes

    def lines(self) -> list[str]:
        counted = [f"row: {row} {recovered}/{total}" for row, (recovered, total) in self.counts.items()]
        return [*counted, *(f"row: {row}: {text}" for row, text in self.notes.items())]


ROWS = Rows()

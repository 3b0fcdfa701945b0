"""Progress on stderr: a bar with a time estimate on a terminal, plain lines elsewhere. A plain helper."""

import sys
import time
from typing import Any

LINE_EVERY = 10.0  # seconds between plain lines: rarer than 5, more often than 30

quiet = False


class Bar:
    """Progress of one job: `with Bar("tokenize", 1500, "images") as bar: bar.advance(64)`."""

    def __init__(self, label: str, total: int, unit: str) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done, self.note = 0, ""
        self._rich: Any = None

    def __enter__(self) -> "Bar":
        self._start = self._last = time.monotonic()
        self._first = 0
        if not quiet and sys.stderr.isatty():
            self._open_rich()
        return self

    def _open_rich(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns: list[Any] = ["{task.description}", BarColumn(), "{task.completed:.0f}/{task.total:.0f}", self.unit]
        self._rich = Progress(
            *columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
        )  # fmt: skip
        self._task = self._rich.add_task(self.label, total=self.total, note="")
        self._rich.start()

    def advance(self, amount: int, note: str = "") -> None:
        """So many more are done. note: shown behind."""
        self.done += amount
        self.note = note or self.note
        if self._rich:
            self._rich.update(self._task, completed=self.done, note=self.note)
        elif not quiet and time.monotonic() - self._last >= LINE_EVERY:
            self._line()

    def resume_at(self, done: int) -> None:
        """So many were done before this process: they do not count for the rate."""
        self.done = self._first = done

    def _line(self) -> None:
        self._last = time.monotonic()
        seconds = self._last - self._start
        rate = (self.done - self._first) / max(seconds, 1e-9)
        left = (self.total - self.done) / rate if rate > 0 else float("inf")
        text = f"{self.label}: {self.done}/{self.total} {self.unit}, {rate:.1f}/s, {seconds:.0f} s, {left:.0f} s left"
        print(f"{text}  {self.note}".rstrip(), file=sys.stderr, flush=True)

    def __exit__(self, kind: object, *_: object) -> None:
        if self._rich:
            self._rich.stop()
        elif not quiet and kind is None:
            seconds = time.monotonic() - self._start
            print(f"{self.label}: {self.done} {self.unit} in {seconds:.1f} s", file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """One line that --quiet does not silence."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def say(text: str) -> None:
    """One line for the person watching."""
    if not quiet:
        print(text, file=sys.stderr, flush=True)

"""All output on stderr: a bar on a terminal, plain lines elsewhere, or a JSON document a line."""

import json
import sys
import threading
import time
from typing import Any

from rich.console import Console
from rich.progress import Progress

from rdpm_cli import launcher

LINE_EVERY = 10.0  # seconds between plain lines
clock = time.monotonic
quiet = False
as_json = False  # --log-format json
_warned: set[str] = set()


class Bar:
    """Progress of one job: `with Bar("tokenize", 1500, "images") as bar: bar.advance(64)`."""

    def __init__(self, label: str, total: int, unit: str) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done, self.note, self._resumed = 0, "", 0
        self._rich: Progress | None = None
        self._finished = threading.Event()

    def __enter__(self) -> "Bar":
        self._start = clock()
        if sys.stderr.isatty() and not as_json:
            self._rich = Progress(console=Console(stderr=True), disable=quiet)
            self._task = self._rich.add_task(self.label, total=self.total)
            self._rich.start()
        else:  # a thread, so that a job whose single step takes minutes is not silent
            threading.Thread(target=self._write_lines, daemon=True).start()
        return self

    def _write_lines(self) -> None:
        while not self._finished.wait(LINE_EVERY):
            self.write_line("progress")

    def write_line(self, kind: str) -> None:
        """Write how far the job is. kind: progress or finished."""
        seconds = clock() - self._start
        rate = (self.done - self._resumed) / max(seconds, 1e-9)
        remaining = (self.total - self.done) / rate if rate else None
        text = f"{self.label}: {self.done}/{self.total} {self.unit}, {rate:.1f}/s, {seconds:.0f} s"
        text += f", {remaining:.0f} s left" if remaining else ""
        _write(
            kind, f"{text}  {self.note}".rstrip(), job=self.label, done=self.done, total=self.total, unit=self.unit,
            before=self._resumed, rate=rate, seconds=seconds, seconds_left=remaining, note=self.note,
        )  # fmt: skip

    def advance(self, amount: int, note: str = "") -> None:
        """Count `amount` more as done. note: shown at the end of the line."""
        self.done += amount
        self.note = note or self.note
        if self._rich:
            text = f"{self.label}: {self.done}/{self.total} {self.unit}  {self.note}"
            self._rich.update(self._task, completed=self.done, description=text)

    def resume_at(self, done: int) -> None:
        """Begin at `done`: the work of an earlier process does not count for the rate."""
        self.done = self._resumed = done

    def __exit__(self, kind: object, *_: object) -> None:
        self._finished.set()
        if self._rich:
            self._rich.stop()
        elif kind is None:
            self.write_line("finished")


def _write(kind: str, text: str, **values: Any) -> None:
    """One line; as JSON with the time (seconds since 1970), its kind and these values."""
    if quiet and kind not in ("warning", "error"):
        return
    document = {"time": time.time(), "kind": kind, "message": text, **values}
    print(json.dumps(document, allow_nan=False) if as_json else text, file=sys.stderr, flush=True)


def warn(text: str, once: bool = False) -> None:
    """One line that --quiet does not silence. once: a fact that every process finds, maybe more than once."""
    if once:
        if text in _warned or not launcher.is_first():
            return
        _warned.add(text)
    _write("warning", text if as_json else f"warning: {text}")


def say(text: str) -> None:
    """One line of information."""
    _write("info", text)


def error(message: str, hint: str, exit_code: int, trace: str = "") -> None:
    """The two lines of an error, below its traceback if it has one; as JSON one line with all of it."""
    if as_json:
        _write("error", message, hint=hint, exit_code=exit_code, trace=trace)
    else:
        lines = [f"rdpm: error: {message}"] * bool(message) + [f"hint: {hint}"] * bool(hint)
        print(trace + "\n".join(lines), file=sys.stderr, flush=True)

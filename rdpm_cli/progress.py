"""All output on stderr: a bar on a terminal, plain lines elsewhere, or a JSON document a line."""

import json
import sys
import threading
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_EVERY = 10.0  # seconds between plain lines while work is being finished
SILENCE = 20.0  # seconds after which a line comes though nothing was finished
TICK = 5.0  # seconds between checks of the silence

quiet = False
as_json = False  # --log-format json
clock = time.monotonic


class Bar:
    """Progress of one job: `with Bar("tokenize", 1500, "images") as bar: bar.advance(64)`."""

    def __init__(self, label: str, total: int, unit: str) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done, self.note = 0, ""
        self._rich: Progress | None = None
        # A thread writes lines too, so that a job whose single step takes minutes is not silent.
        self._lock, self._finished = threading.Lock(), threading.Event()

    def __enter__(self) -> "Bar":
        self._start = self._last = clock()
        self._resumed = 0
        if quiet:
            return self
        if sys.stderr.isatty() and not as_json:
            self._open_rich()
        else:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def _open_rich(self) -> None:
        self._rich = Progress(
            "{task.description}", BarColumn(), "{task.completed:.0f}/{task.total:.0f}", self.unit,
            TextColumn("{task.fields[rate]}"), TimeElapsedColumn(), "left", TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"), console=Console(stderr=True),
        )  # fmt: skip
        self._task = self._rich.add_task(self.label, total=self.total, note="", rate="")
        self._rich.start()

    def _watch(self) -> None:
        while not self._finished.wait(TICK):
            self.tick()

    def tick(self) -> None:
        """Write a line if there was none for long."""
        self._line_after(SILENCE)

    def advance(self, amount: int, note: str = "") -> None:
        """Count `amount` more as done. note: shown at the end of the line."""
        self.done += amount
        self.note = note or self.note
        if self._rich:
            self._rich.update(self._task, completed=self.done, note=self.note, rate=f"{self._rate(clock()):.1f}/s")
        elif not quiet:
            self._line_after(LINE_EVERY)

    def resume_at(self, done: int) -> None:
        """Begin at `done`: the work of an earlier process does not count for the rate."""
        self.done = self._resumed = done

    def _rate(self, instant: float) -> float:
        return (self.done - self._resumed) / max(instant - self._start, 1e-9)

    def _line_after(self, silence: float) -> None:
        """Write a line if the last one is at least `silence` seconds old."""
        with self._lock:
            instant = clock()
            if instant - self._last < silence:
                return
            self._last, rate = instant, self._rate(instant)
        remaining = (self.total - self.done) / rate if rate > 0 else None
        text = f"{self.label}: {self.done}/{self.total} {self.unit}, {rate:.1f}/s, {instant - self._start:.0f} s, "
        text += "no rate yet" if remaining is None else f"{remaining:.0f} s left"
        seconds = {"seconds": instant - self._start, "seconds_left": remaining}
        _write("progress", f"{text}  {self.note}".rstrip(), **self._counts(), rate=rate, **seconds, note=self.note)

    def _counts(self) -> dict[str, Any]:
        return {"job": self.label, "done": self.done, "total": self.total, "unit": self.unit}

    def __exit__(self, kind: object, *_: object) -> None:
        self._finished.set()
        if self._rich:
            self._rich.stop()
        elif not quiet and kind is None:
            seconds, count = clock() - self._start, self.done - self._resumed
            resumed = f" ({self._resumed} of them earlier)" if self._resumed else ""
            rate = f", {count / max(seconds, 1e-9):.1f}/s" if count else ""
            text = f"{self.label}: {self.done} {self.unit}{resumed} in {seconds:.1f} s{rate}"
            _write("finished", text, **self._counts(), before=self._resumed, seconds=seconds)


def _write(kind: str, text: str, **values: Any) -> None:
    """One line; as JSON with the time (seconds since 1970), its kind and these values."""
    document = {"time": time.time(), "kind": kind, "message": text, **values}
    print(json.dumps(document, allow_nan=False) if as_json else text, file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """One line that --quiet does not silence."""
    _write("warning", text if as_json else f"warning: {text}")


def say(text: str) -> None:
    """One line of information."""
    if not quiet:
        _write("info", text)


def error(message: str, hint: str, exit_code: int, trace: str = "") -> None:
    """The two lines of an error, below its traceback if it has one; as JSON one line with all of it."""
    if as_json:
        _write("error", message, hint=hint, exit_code=exit_code, trace=trace)
        return
    lines = [f"rdpm: error: {message}"] * bool(message) + [f"hint: {hint}"] * bool(hint)
    print(trace + "".join(f"{line}\n" for line in lines), end="", file=sys.stderr, flush=True)

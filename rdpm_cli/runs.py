"""What every long command shares: its result, the versions it ran with, run.json, and stopping on a signal."""

import contextlib
import ctypes
import os
import platform
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy
import torch

from rdpm_cli import __version__, files, progress
from rdpm_cli.distributed import world
from rdpm_cli.errors import Stopped, UsageError
from rdpm_cli.launcher import LAUNCHER

RUN_FILE = "run.json"
Settings = dict[str, Any]


@dataclass
class Result:
    """The answer of a command. values: of `--json`; next: the command that follows; text: printed instead of them.

    picture: printed below them on a terminal, by rich."""

    title: str
    values: dict[str, Any] = field(default_factory=dict)
    next: str = ""
    text: str = ""
    picture: Any = None


def text_table(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells in aligned columns, for the text of a result."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  " + "  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def versions() -> dict[str, str]:
    """The versions that numbers depend on."""
    libraries = {"torch": str(torch.__version__), "numpy": numpy.__version__}
    return {"rdpm": __version__, **libraries, "python": platform.python_version()}


def read_run(folder: Path) -> dict[str, Any]:
    """The content of FOLDER/run.json; empty if there is none. Raises DataError."""
    path = folder / RUN_FILE
    return dict(files.read_json(path)) if path.is_file() else {}


def write_run(folder: Path, values: dict[str, Any]) -> None:
    """Write FOLDER/run.json: these values, and how this process was started."""
    files.write_json(folder / RUN_FILE, {**_process(), **values})


def _process() -> dict[str, Any]:
    threads = torch.get_num_threads()  # their number changes the last bits of a sum
    return {"argv": sys.argv, "processes": world()[1], "threads": threads, "versions": versions()}


def check_run(folder: Path, settings: Settings, bind: Callable[[Settings], Settings]) -> dict[str, Any]:
    """The run.json of a folder that was started with these settings; empty for a new folder.

    bind: leaves the settings that must not change. Raises UsageError for a folder that holds another run, or no run."""
    record, hint = read_run(folder), "choose another folder for the run"
    if record:
        previous = record.get("settings", {})
        if (command := previous.get("command")) != settings.get("command"):
            raise UsageError(f"{folder} is a run of {command}", hint)
        if changed := files.differences(bind(previous), bind(settings)):
            raise UsageError(f"{folder} was started with other settings: {'; '.join(changed[:6])}", hint)
    elif foreign := [path.name for path in folder.glob("*") if not path.name.startswith(".")]:
        raise UsageError(f"{folder} is not empty ({foreign[0]}, ...) and is not a run folder", hint)
    return record


def claim_run(folder: Path, settings: Settings, finished: bool, bind: Callable[[Settings], Settings]) -> None:
    """Start or resume a run: write these settings, or add this process to the run. Raises as check_run does."""
    record = check_run(folder, settings, bind)
    if changed := files.differences(record.get("settings", settings), settings):
        progress.say(f"resuming with {'; '.join(changed)}")
    if record:
        entry = {**_process(), "changed": changed} if changed else _process()
        record["resumed"] = [*record.get("resumed", []), entry]
    if not finished:
        record["settings"] = settings
    for leftover in [*folder.glob(".*.tmp"), *folder.glob("*/.*.tmp")]:  # of a killed process
        leftover.unlink()
    write_run(folder, record)


@dataclass
class StopRequest:
    """Set by a signal, `name`; a job checks it between two whole pieces of work."""

    name: str = ""

    def leave(self, saved: str) -> None:
        """Raise Stopped (exit 75) if a signal has come, KeyboardInterrupt (130) after Ctrl-C. saved: what is safe."""
        message = f"stopped by {self.name}; {saved}"
        # One of several processes raises Stopped after Ctrl-C too; their launcher turns it into 130.
        if self.name == signal.SIGINT.name and "RANK" not in os.environ:
            progress.say(message)
            raise KeyboardInterrupt
        if self.name:
            raise Stopped(message, "run the same command again")


@contextlib.contextmanager
def stop_on_signal(interrupt: bool = False) -> Iterator[StopRequest]:
    """Turn the first SIGTERM or SIGUSR1 into a request; a second one has its usual effect. In the main thread only.

    interrupt: SIGINT too, for work that is not safe at every moment, and for processes to which a launcher passes it.
    """
    request = StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        request.name = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)
        if os.isatty(2) and not progress.quiet:  # os.write, since the handler may have interrupted a print
            os.write(2, b"\nstopping after the current work; a second signal stops at once\n")

    watched = [signal.SIGTERM, signal.SIGUSR1] + [signal.SIGINT] * interrupt
    previous = {number: signal.signal(number, note) for number in watched}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def serve_parent() -> None:
    """Begin a data worker: it leaves signals to the process that started it, and does not outlive it."""
    # Launchers signal whole process groups, and the step under way still needs its batch.
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(signal.SIGKILL, os.getppid())


def end_with_parent(number: signal.Signals, parent: int) -> None:
    """Receive this signal when the parent process ends, however it does (Linux); end at once if it already has."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(number))  # PR_SET_PDEATHSIG of sys/prctl.h
    if os.getppid() != parent:
        sys.exit(1)


def join_launcher() -> None:
    """Begin one of several processes, of `--gpus` or torchrun: end with the launcher, keep stdout for the result."""
    # gloo prints to file descriptor 1. It becomes stderr, and sys.stdout writes to a copy of the real one.
    sys.stdout = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)
    os.dup2(2, 1)
    # torchrun does not pass SIGUSR1 on, and nobody can catch SIGKILL: no process may go on without its launcher.
    end_with_parent(signal.SIGTERM, int(os.environ.get(LAUNCHER, os.getppid())))

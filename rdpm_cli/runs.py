"""What every long command shares: its result, the versions it ran with, run.json, and stopping on a signal."""

import contextlib
import ctypes
import os
import platform
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import numpy
import torch

from rdpm_cli import __version__, files, progress
from rdpm_cli.distributed import LAUNCHER, world
from rdpm_cli.errors import Stopped, UsageError

RUN_FILE = "run.json"
ANOTHER_FOLDER = "choose another folder for the run"
PR_SET_PDEATHSIG = 1  # of Linux's sys/prctl.h
PATIENCE = 3.0  # seconds that a piece of work may continue after a signal, if it can be left in its middle

Settings = dict[str, Any]


@dataclass
class Result:
    """The answer of a command. values: what `--json` prints; next: the command that follows from here.

    text: printed instead of title, values and next if it is not empty.
    """

    title: str
    values: dict[str, Any] = field(default_factory=dict)
    next: str = ""
    text: str = ""


def versions() -> dict[str, str]:
    """The versions that numbers depend on."""
    return {
        "rdpm": __version__,
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
        "python": platform.python_version(),
    }


# ---- run.json ------------------------------------------------------------------------------------------------------


def read_run(folder: Path) -> dict[str, Any]:
    """The content of FOLDER/run.json; empty if there is none. Raises DataError."""
    path = folder / RUN_FILE
    return dict(files.read_json(path)) if path.is_file() else {}


def write_run(folder: Path, values: dict[str, Any]) -> None:
    """Write FOLDER/run.json: these values, and how this process was started."""
    process = {"argv": sys.argv, "processes": world()[1], "versions": versions()}
    files.write_json(folder / RUN_FILE, {**process, **values})


def check_run(folder: Path, settings: Settings, bind: Callable[[Settings], Settings]) -> dict[str, Any]:
    """The run.json of a folder that was started with these settings; empty for a new folder.

    bind: leaves the settings that must not change. Raises UsageError for a folder that holds another run, or no run.
    """
    record = read_run(folder)
    if record:
        previous = record.get("settings", {})
        if previous.get("command") != settings["command"]:
            raise UsageError(f"{folder} is not a run of {settings['command']}", ANOTHER_FOLDER)
        if changed := files.differences(bind(previous), bind(settings)):
            raise UsageError(f"{folder} was started with other settings: {'; '.join(changed[:6])}", ANOTHER_FOLDER)
    elif foreign := [path.name for path in folder.glob("*") if not path.name.startswith(".")]:
        raise UsageError(f"{folder} is not empty ({foreign[0]}, ...) and is not a run folder", ANOTHER_FOLDER)
    return record


def claim_run(folder: Path, settings: Settings, finished: bool, bind: Callable[[Settings], Settings]) -> None:
    """Start or resume a run: write these settings, or add this process to those that worked on it.

    Raises UsageError as check_run does.
    """
    record = check_run(folder, settings, bind)
    # The number of threads changes the last bits of a sum.
    process = {"argv": sys.argv, "processes": world()[1], "threads": torch.get_num_threads(), "versions": versions()}
    if record:
        changed = files.differences(record["settings"], settings)
        entry = {**process, "changed": changed} if changed else process
        record["resumed"] = [*record.get("resumed", []), entry]
        if not finished:
            record["settings"] = settings
        if changed:
            progress.say(f"resuming with {'; '.join(changed)}")
    for leftover in [*folder.glob(".*.tmp"), *folder.glob("checkpoints/.*.tmp")]:  # of a killed process
        leftover.unlink()
    files.write_json(folder / RUN_FILE, record or {"settings": settings, **process})


# ---- signals -------------------------------------------------------------------------------------------------------


class StopRequest:
    """Set by SIGTERM or SIGUSR1; a job checks it between two whole pieces of work."""

    def __init__(self) -> None:
        self.name = ""

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return bool(self.name)

    def leave(self, saved: str) -> None:
        """Raise Stopped (exit 75) if a signal has come, KeyboardInterrupt (130) after Ctrl-C. saved: what is safe.

        One of several processes raises Stopped after Ctrl-C too; their launcher turns it into 130.
        """
        if not self.requested:
            return
        message = f"stopped by {self.name}; {saved}"
        if self.name == signal.SIGINT.name and "RANK" not in os.environ:
            progress.say(message)
            raise KeyboardInterrupt
        raise Stopped(message, "run the same command again")


@contextlib.contextmanager
def stop_on_signal(interrupt: bool = False, saved: str = "") -> Iterator[StopRequest]:
    """Turn the first SIGTERM or SIGUSR1 into a request; a second one has its usual effect.

    interrupt: SIGINT too, for work that is not safe at every moment, and for one of several processes, to which a
    launcher passes Ctrl-C on. saved: what is safe at every moment, if anything is: a piece of work that continues for
    PATIENCE after the request, such as a read from a disk that does not answer, is then left in its middle.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():  # Python runs signal handlers only there
        yield request
        return
    watched = (signal.SIGTERM, signal.SIGUSR1, *([signal.SIGINT] if interrupt else []))
    previous = {number: signal.getsignal(number) for number in watched}

    def note(number: int, frame: FrameType | None) -> None:
        request.name = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)
        if os.isatty(2) and not progress.quiet:  # os.write: the handler may have interrupted a print
            os.write(2, f"\n{request.name}: stopping after the current work; a second one stops at once\n".encode())
        if saved:
            signal.setitimer(signal.ITIMER_REAL, PATIENCE, PATIENCE)

    if saved:
        previous[signal.SIGALRM] = signal.signal(signal.SIGALRM, lambda number, frame: request.leave(saved))
    for number in watched:
        signal.signal(number, note)
    try:
        yield request
    finally:
        if saved:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in previous.items():
            signal.signal(number, handler)


def serve_parent(_: int = 0) -> None:
    """Begin a data worker: it leaves signals to the process that started it, and does not outlive it."""
    # Launchers signal whole process groups, and the step under way still needs its batch.
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(signal.SIGKILL, os.getppid())


def end_with_parent(number: signal.Signals, parent: int) -> None:
    """Receive this signal when the parent process ends, however it does (Linux); end at once if it already has."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(PR_SET_PDEATHSIG, int(number))
    if os.getppid() != parent:
        sys.exit(1)


def join_launcher() -> None:
    """Begin one of several processes, of `--gpus` or torchrun: end with the launcher, keep stdout for the result.

    gloo prints to file descriptor 1. It becomes stderr, and sys.stdout writes to a copy of the real one.
    """
    if "RANK" not in os.environ:
        return
    stdout: TextIO = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.stdout = stdout
    # torchrun does not pass SIGUSR1 on, and nobody can catch SIGKILL: no process may go on without its launcher.
    end_with_parent(signal.SIGTERM, int(os.environ.get(LAUNCHER, os.getppid())))

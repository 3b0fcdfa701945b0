"""Stopping on a signal after saving. A plain helper of every long job."""

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from rdpm_cli import progress
from rdpm_cli.errors import Stopped

PR_SET_PDEATHSIG = 1  # of Linux's sys/prctl.h
PATIENCE = 3.0  # seconds that a piece of work may still take, where it may be left in its middle


class StopRequest:
    """Set by SIGTERM or SIGUSR1; a job asks between two whole pieces of work."""

    def __init__(self) -> None:
        self.name = ""

    @property
    def asked(self) -> bool:
        """Has a signal come?"""
        return bool(self.name)

    def leave(self, saved: str) -> None:
        """Raise Stopped (exit 75) if a signal has come, KeyboardInterrupt (130) after Ctrl-C. saved: what is safe now.

        One of several processes raises Stopped after Ctrl-C too: their launcher makes it 130.
        """
        if self.asked:
            told = f"stopped by {self.name}; {saved}"
            if self.name == signal.SIGINT.name and "RANK" not in os.environ:
                progress.say(told)
                raise KeyboardInterrupt
            raise Stopped(told, "run the same command again")


@contextlib.contextmanager
def stop_on_signal(interrupt: bool = False, saved: str = "") -> Iterator[StopRequest]:
    """Turn the first SIGTERM or SIGUSR1 into a request; a second one takes its usual course.

    interrupt: SIGINT too, for what is not safe at every moment, and for one of several processes, to which a launcher
    passes Ctrl-C on. saved: what is safe at every moment, where something is: a piece of work that goes on for PATIENCE
    after the request, as a read from a disk that does not answer, is then left in its middle, as Ctrl-C leaves it.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    watched = (signal.SIGTERM, signal.SIGUSR1, *([signal.SIGINT] if interrupt else []))
    before = {number: signal.getsignal(number) for number in watched}

    def note(number: int, frame: FrameType | None) -> None:
        request.name = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)
        if os.isatty(2) and not progress.quiet:  # written at once: a handler may stand in the middle of a print
            os.write(2, f"\n{request.name}: stopping after what is under way; a second one stops at once\n".encode())
        if saved:
            signal.setitimer(signal.ITIMER_REAL, PATIENCE, PATIENCE)

    def leave(number: int, frame: FrameType | None) -> None:
        request.leave(saved)

    if saved:
        before[signal.SIGALRM] = signal.signal(signal.SIGALRM, leave)
    for number in watched:
        signal.signal(number, note)
    try:
        yield request
    finally:
        if saved:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_signals_to_parent(_: int = 0) -> None:
    """Ignore what also goes to this process's group: the parent decides, and ends this helper process itself."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def serve_parent(_: int = 0) -> None:
    """Begin a data worker: it leaves signals to the process that started it, and does not outlive it."""
    leave_signals_to_parent()
    end_with_parent(signal.SIGKILL, os.getppid())


def end_with_parent(number: signal.Signals, parent: int) -> None:
    """Get this signal when the parent process ends, however it does (Linux); end at once where it has already."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(PR_SET_PDEATHSIG, int(number))
    if os.getppid() != parent:
        sys.exit(1)

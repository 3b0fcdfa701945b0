"""`--gpus N`: the processes of a team on this node, by torch's own launcher, whose log and tables are kept quiet."""

import contextlib
import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from rdpm_cli import progress, team
from rdpm_cli.errors import EXIT_FAILED, EXIT_INTERRUPT, EXIT_STOPPED, ProcessError, RdpmError, Stopped, UsageError
from rdpm_cli.team import Failure, Team

PROGRAM = ("-m", "rdpm_cli")
SAVING = 300  # seconds that the processes have for saving after a signal
BY_SIGNAL = {EXIT_STOPPED, EXIT_INTERRUPT}
AGAIN = "run the same command again: it goes on from what is saved"


def check(asked: Team, device: str) -> None:
    """Raises UsageError for a team that this node or device cannot have."""
    count, there = asked.processes, torch.cuda.device_count()
    if count > 1 and device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--device {device} is one device, --gpus {count} wants {count}", "leave --device out")
    if device != "cpu" and count > there:
        fewer = f"give --gpus {there}, or " if there else ""
        raise UsageError(f"--gpus {count}: there are {there} GPUs here", f"{fewer}share the CPU by --device cpu")


def launch(asked: Team) -> dict[str, Any] | None:
    """Run the team's command in its processes, and wait until all have ended. -> what the first one answered, if any.

    Raises ProcessError with the message and exit code of the process that failed first, Stopped after SIGTERM and
    SIGUSR1, KeyboardInterrupt after Ctrl-C: the processes get the signal and save.
    """
    threads = max(1, torch.get_num_threads() // asked.processes)
    progress.say(f"{asked.processes} processes, CPU threads each: {threads}")
    with tempfile.TemporaryDirectory(prefix="rdpm-") as name, _quiet(), _raising_signals():
        folder = Path(name)
        with _environment(_variables(folder, threads)):
            try:
                elastic_launch(_config(asked, folder), sys.executable)(*PROGRAM, *asked.argv)
            except ChildFailedError as error:
                raise _error(_failures(error.failures, folder, asked.processes)) from None
            except SignalException as error:
                raise _stopped(team.failures(folder).values(), error.sigval) from None
        return team.answered(folder)


def _config(asked: Team, folder: Path) -> LaunchConfig:
    """One node, no restarts, a free port, nothing left in the temporary folder."""
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=asked.processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(log_dir=str(folder / "logs")),
    )


def _variables(folder: Path, threads: int) -> dict[str, str]:
    """The environment of the processes, beside what the launcher sets."""
    return {
        team.FOLDER: str(folder),
        team.LAUNCHER: str(os.getpid()),
        "OMP_NUM_THREADS": str(threads),
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SAVING)),
    }


@contextlib.contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    """Environment variables, as long as the processes run."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No log lines of the launcher: what they say is said here, once."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _raising_signals() -> Iterator[None]:
    """Signals as the launcher wants them, also before it has begun, and SIGUSR1, which it does not catch itself."""

    def note(number: int, frame: FrameType | None) -> None:
        raise SignalException(f"got signal {number}", signal.Signals(number))

    kept = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  # the launcher sets four
    before = {number: signal.getsignal(number) for number in kept}
    for number in kept[:3]:
        signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _failures(ended: dict[int, ProcessFailure], folder: Path, processes: int) -> list[Failure]:
    """What the processes left, and for those that left nothing how they ended."""
    left = team.failures(folder)
    return [left.get(rank) or _silent(rank, found, processes) for rank, found in ended.items()]


def _silent(rank: int, found: ProcessFailure, processes: int) -> Failure:
    """The failure of a process that could not say anything."""
    who = f"rank {rank} of {processes} processes (pid {found.pid})"
    if found.exitcode >= 0:
        return Failure(EXIT_FAILED, f"{who} ended with exit code {found.exitcode}", AGAIN, rank=rank)
    killed = signal.Signals(-found.exitcode)
    why = "out of memory? " if killed == signal.SIGKILL else ""
    ours = killed == signal.SIGTERM  # the launcher's, to the others once one has failed
    message = f"{who} was killed by {killed.name}"
    return Failure(EXIT_FAILED, message, why + AGAIN, lost=ours, rank=rank, when=found.timestamp)


def _cause(found: Iterable[Failure]) -> Failure:
    """The failure that the others follow from: the first, but not one for want of another process."""
    return min(found, key=lambda failure: (failure.lost, failure.when))


def _error(found: Iterable[Failure]) -> RdpmError:
    """The error to show for processes that failed."""
    cause = _cause(found)
    message = cause.message or f"a bug in rank {cause.rank}; its traceback is above"
    return ProcessError(message, cause.hint or AGAIN, cause.code, cause.trace)


def _stopped(found: Iterable[Failure], number: signal.Signals) -> BaseException:
    """What follows from a signal to the launcher, once the processes have ended."""
    told = [failure for failure in found if not failure.lost]
    if broken := [failure for failure in told if failure.code not in BY_SIGNAL]:
        return _error(broken)
    saved = next((failure for failure in told if failure.code == EXIT_STOPPED), None)
    if number == signal.SIGINT:
        if saved:
            progress.say(saved.message)
        return KeyboardInterrupt()
    message = saved.message if saved else f"stopped by {number.name}; what is saved stands"
    return Stopped(message, "run the same command again")

"""Several processes from one command: what the launcher and the processes that it starts tell each other.

A process that the launcher started keeps its error to itself: it leaves it in the launcher's folder, and the launcher
shows the one that the others follow from, once. A plain helper; torch-free.
"""

import contextlib
import json
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rdpm_cli.errors import UsageError
from rdpm_cli.signals import end_with_parent

FOLDER = "RDPM_TEAM"  # environment variable of a started process: where it leaves its failure
ANSWER = "answer.json"  # in that folder: what its first process found, where no file of the run says it
LAUNCHER = "RDPM_LAUNCHER"  # and its launcher's process id


@dataclass(frozen=True)
class Team:
    """`--gpus N`: so many processes on this node (one: this process), and the command line that each runs."""

    processes: int
    argv: tuple[str, ...] = ()


@dataclass(frozen=True)
class Failure:
    """How a process failed. code: its exit code; trace: of a bug; lost: only because another process went away."""

    code: int
    message: str = ""
    hint: str = ""
    trace: str = ""
    lost: bool = False
    rank: int = 0
    when: float = field(default_factory=time.time)


def ask(gpus: int | None, argv: Sequence[str]) -> Team | None:
    """The team of `--gpus`; None without it. argv: this command's. Raises UsageError where torchrun made a team."""
    if gpus is None:
        return None
    if "WORLD_SIZE" in os.environ:
        raise UsageError(
            f"--gpus {gpus} starts processes of its own, and torchrun has started this one (WORLD_SIZE is set)",
            "leave out --gpus, or torchrun",
        )
    return Team(gpus, tuple(without(argv, "--gpus")))


def without(argv: Sequence[str], option: str) -> list[str]:
    """argv without `option VALUE` and `option=VALUE`."""
    kept: list[str] = []
    rest = list(argv)
    while rest:
        part = rest.pop(0)
        if part == "--":
            return [*kept, part, *rest]
        if part == option:
            rest = rest[1:]
        elif not part.startswith(f"{option}="):
            kept.append(part)
    return kept


def started() -> bool:
    """Has `--gpus` started this process?"""
    return FOLDER in os.environ


def begin() -> None:
    """Settle in as one of several processes: stop when the launcher is gone, and leave stdout to it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # neither `--gpus` nor torchrun
        return
    if started():
        os.dup2(2, 1)  # gloo writes to stdout
    # torchrun does not catch SIGUSR1, and nobody catches SIGKILL: no orphan goes on
    end_with_parent(signal.SIGTERM, int(os.environ[LAUNCHER]) if started() else os.getppid())


def leave(failure: Failure) -> bool:
    """Leave a failure for the launcher to show. -> False where there is no launcher, so that it must be shown here."""
    if not started():
        return False
    rank = int(os.environ.get("RANK", "0"))
    path = Path(os.environ[FOLDER]) / f"failure-{rank}.json"
    with contextlib.suppress(OSError):  # the launcher, and its folder, are gone: say it here
        path.write_text(json.dumps({**asdict(failure), "rank": rank}))
        return True
    return False


def answer(values: dict[str, Any]) -> None:
    """Leave the answer of the first process for its launcher, where there is one."""
    if started():
        (Path(os.environ[FOLDER]) / ANSWER).write_text(json.dumps(values, allow_nan=False))


def answered(folder: Path) -> dict[str, Any] | None:
    """What the first process left, if it did."""
    path = folder / ANSWER
    found: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
    return found


def failures(folder: Path) -> dict[int, Failure]:
    """What the started processes left, by rank."""
    found = (Failure(**json.loads(path.read_text())) for path in folder.glob("failure-*.json"))
    return {failure.rank: failure for failure in found}

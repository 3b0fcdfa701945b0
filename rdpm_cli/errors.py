"""What can go wrong for a user: what is wrong, where, what to do next, and the exit code that says so to a script.

Anything that is not an `RdpmError` is a bug and keeps its traceback.
"""

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

EXIT_FAILED = 1  # the run failed: disk full, out of memory, NaN, lock held
EXIT_USAGE = 2  # usage or recipe
EXIT_DATA = 3  # data, checkpoint or weights unreadable, empty, of the wrong kind, mismatched or absent
EXIT_STOPPED = 75  # stopped by a signal after saving: run the same command to go on
EXIT_INTERRUPT = 130  # Ctrl-C


class RdpmError(Exception):
    """One clear line for the user. `message` says what and where, `hint` what to do next."""

    exit_code = EXIT_FAILED
    trace = ""  # to be shown above it

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class RunError(RdpmError):
    """The run could not go on: NaN, disk full, somebody else holds the lock."""


class LostProcessError(RunError):
    """Another process of this run has gone, so this one cannot go on: a consequence, never the cause."""


class ProcessError(RdpmError):
    """A process that this one started has failed: its message, its exit code, and its traceback if it was a bug."""

    def __init__(self, message: str, hint: str, exit_code: int, trace: str) -> None:
        super().__init__(message, hint)
        self.exit_code, self.trace = exit_code, trace


class UsageError(RdpmError):
    """A path, option or value that cannot be used as given."""

    exit_code = EXIT_USAGE


class RecipeError(UsageError):
    """A recipe, or an override of one, that does not fit the schema."""


class DataError(RdpmError):
    """Images, codes, samples or references that are unreadable, empty or do not fit each other."""

    exit_code = EXIT_DATA


class ImageError(DataError):
    """An image that cannot be read. name: which of its source; reason: why, without the place.

    A data loader's worker makes it again from its message alone, other processes from all of it.
    """

    def __init__(self, message: str, hint: str = "", *, name: str = "", reason: str = "") -> None:
        super().__init__(message, hint)
        self.name, self.reason = name, reason

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return functools.partial(ImageError, name=self.name, reason=self.reason), (self.message, self.hint)


class DamagedError(DataError):
    """Files that are not what was written. found: a line for each, all of them shown."""

    def __init__(self, place: Path, found: Sequence[str], hint: str) -> None:
        super().__init__("\n  ".join((f"{place} is damaged:", *found)), hint)
        self.found = list(found)


class CheckpointError(DataError):
    """A checkpoint or weight file that is unreadable, of the wrong kind, or absent."""


class AbsentWeightsError(CheckpointError):
    """A published weight file that is in none of its places. reason: what a score that needs it says instead."""

    def __init__(self, file: str, places: Sequence[Path], hint: str) -> None:
        looked = ", ".join(map(str, places))
        super().__init__(f"weights {file} are not here (looked at: {looked})", hint)
        self.reason = f"weights absent: {file} (looked at: {looked})"


class Stopped(RdpmError):
    """A signal asked us to stop; the state is saved and the same command goes on from it."""

    exit_code = EXIT_STOPPED


def some_of(names: Iterable[str], most: int = 8) -> str:
    """The first few of many names: `a, b, c and 120 more`."""
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more

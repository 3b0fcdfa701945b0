"""Errors for users, with their exit codes. An exception that is no `RdpmError` is a bug and keeps its traceback."""

import shlex
from collections.abc import Iterable

EXIT_FAILED = 1  # the run failed: disk full, out of memory, NaN, lock held
EXIT_USAGE = 2  # usage or recipe
EXIT_DATA = 3  # data, checkpoint or weights unreadable, empty, of the wrong kind, mismatched or absent
EXIT_STOPPED = 75  # stopped by a signal after saving; the same command continues
EXIT_INTERRUPT = 130  # Ctrl-C


class RdpmError(Exception):
    """One clear line for the user. `message` says what is wrong and where, `hint` what to do next."""

    exit_code = EXIT_FAILED

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message, self.hint = message, hint
        if hint:
            self.add_note(f"hint: {hint}")  # below the traceback, for those who call the package from Python


class RunError(RdpmError):
    """The run could not continue: NaN, disk full, lock held by another process."""


class LostProcessError(RunError):
    """Another process of this run has ended, so this one cannot continue: a consequence, never the cause."""


class UsageError(RdpmError):
    """A path, option or value that cannot be used."""

    exit_code = EXIT_USAGE


class RecipeError(UsageError):
    """A recipe, or an override of one, that does not fit the schema."""


class DataError(RdpmError):
    """Images, codes, samples or references that are unreadable, empty or do not fit each other."""

    exit_code = EXIT_DATA


class ItemError(DataError):
    """An item that cannot be read. name: of the item in its source; reason: without the place."""

    def __init__(self, message: str, hint: str = "", *, name: str = "", reason: str = "") -> None:
        super().__init__(message, hint)
        self.name, self.reason = name, reason


class ImageError(ItemError):
    """An image that cannot be read."""


class AudioError(ItemError):
    """A recording that cannot be read."""


class CheckpointError(DataError):
    """A checkpoint or weight file that is unreadable, of the wrong kind, or absent."""


class AbsentWeightsError(CheckpointError):
    """A published weight file that is in none of its folders; a score that needs it is left out."""


class Stopped(RdpmError):
    """A signal ended the command; its state is saved and the same command continues from it."""

    exit_code = EXIT_STOPPED


def some_of(names: Iterable[str], most: int = 8) -> str:
    """The first few of many names: `a, b, c and 120 more`."""
    listed = list(names)
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")


def rdpm_command(*words: object) -> str:
    """A command as one types it, with quotes where a shell needs them: `rdpm eval fid 'my samples'`."""
    return shlex.join(["rdpm", *map(str, words)])

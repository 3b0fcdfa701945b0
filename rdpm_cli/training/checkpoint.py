"""Training state in RUN/checkpoints/: parameters, optimisers, EMA, step. Written atomically, the newest few kept.

All randomness is a function of (seed, step), so the step alone places a resumed run in its data.
"""

import re
from pathlib import Path
from typing import Any

import torch

from rdpm_cli import files, tensorfile
from rdpm_cli.errors import CheckpointError, RunError

NAME = re.compile(r"step-(\d{9})\.pt")
FIELDS = {"step", "skipped", "threads", "players", "ema"}  # of a state


def found(folder: Path) -> list[tuple[int, Path]]:
    """(step, file) of the checkpoints in a folder, oldest first."""
    matches = [(NAME.fullmatch(path.name), path) for path in folder.glob("step-*.pt")]
    return sorted((int(match.group(1)), path) for match, path in matches if match)


def save(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write the state of a step, then drop all but the newest `keep`; none before the new one is read back as written.

    Raises RunError where the disk is full, or gives other bytes back: the checkpoints before it stay.
    """
    path, need = folder / f"step-{step:09d}.pt", tensorfile.size(state)
    files.need_space(folder, need)
    with files.space_is_told(folder, lambda: need):
        files.write_atomic(path, lambda file: tensorfile.write(file, state))
    if old := found(folder)[:-keep]:
        _read_back(path)
        for _, previous in old:
            previous.unlink()
    return path


def _read_back(path: Path) -> None:
    try:
        tensorfile.check_whole(path)
    except tensorfile.Unreadable as error:
        path.unlink()
        raise RunError(
            f"{path} was written and is not what was written: {error}",
            "it was removed, those before it are kept: look at the disk, then run the same command again",
        ) from error


def check(path: Path) -> bool:
    """Is a file what `save` writes? -> has it a seal? Raises Unreadable, and CheckpointError for other content."""
    sealed = tensorfile.check_whole(path)
    state, named = tensorfile.read(path), NAME.fullmatch(path.name)
    if not isinstance(state, dict) or set(state) != FIELDS or not named or state["step"] != int(named[1]):
        raise CheckpointError(f"{path} is not a state of training, or not of the step in its name", "copy it again")
    return sealed


def load_newest(folder: Path, device: torch.device) -> dict[str, Any] | None:
    """The newest state, or None. Raises CheckpointError when it cannot be read, or is not what was written."""
    there = found(folder)
    if not there:
        return None
    path = there[-1][1]
    try:
        tensorfile.check_whole(path)
        state: dict[str, Any] = tensorfile.read(path, device)
    except tensorfile.Unreadable as error:
        hint = "delete this file to go on from the one before it"
        raise CheckpointError(f"{path} cannot be read: {tensorfile.reason(error)}", hint) from error
    return state

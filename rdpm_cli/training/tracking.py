"""`--track`: an experiment tracker that gets what metrics.jsonl gets. The package is an extra, looked for at once."""

import contextlib
import importlib
import importlib.util
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from rdpm_cli import files, progress
from rdpm_cli.errors import UsageError

NOTE = "wandb.json"  # in the run folder: the id that a resumed run continues
PROJECT = "rdpm"  # unless WANDB_PROJECT names another


class Mirror(Protocol):
    """Gets every logged number."""

    def write(self, step: int, values: dict[str, float]) -> None:
        """The numbers of one line."""


def check(track: str | None) -> None:
    """Raises UsageError where the tracker's package is not installed."""
    if track is None:
        return
    found = importlib.util.find_spec(track)
    if found is None or found.origin is None:  # a folder of that name is no package
        raise UsageError(
            f"--track {track} needs the package {track}, which is not here", f"pip install 'rdpm[{track}]'"
        )


class Wandb:
    """One run of Weights & Biases; WANDB_MODE, WANDB_PROJECT and their like are its own."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        """Begin the run of this folder, or go on with it. settings: shown beside it. Raises UsageError."""
        wandb = importlib.import_module("wandb")
        note = folder / NOTE
        if not note.exists():
            files.write_json(note, {"id": secrets.token_hex(8)})
        own = wandb.Settings(console="off", silent=progress.quiet)
        try:
            self.run = wandb.init(
                project=_unless_set("WANDB_PROJECT", PROJECT),
                name=_unless_set("WANDB_NAME", folder.name),
                id=files.read_json(note)["id"],
                resume="allow",
                dir=str(folder),
                config=settings,
                settings=own,
            )
        except wandb.Error as error:
            hint = "run `wandb login`, or set WANDB_MODE=offline and `wandb sync` later"
            raise UsageError(f"--track wandb: {str(error).splitlines()[0]}", hint) from error
        self.run.define_metric("*", step_metric="step")  # wandb's own counter refuses steps that a crash repeats

    def write(self, step: int, values: dict[str, float]) -> None:
        """The numbers of one line."""
        self.run.log({"step": step, **values})

    def close(self) -> None:
        """Send what is left."""
        self.run.finish()


def _unless_set(variable: str, value: str) -> str | None:
    """The value; None, so that the package takes its own, where the variable is set."""
    return None if os.environ.get(variable) else value


@contextlib.contextmanager
def mirrors(track: str | None, folder: Path, settings: dict[str, Any]) -> Iterator[list[Mirror]]:
    """What --track asks for, until the run ends or stops."""
    if track is None:
        yield []
        return
    tracker = Wandb(folder, settings)
    try:
        yield [tracker]
    finally:
        tracker.close()

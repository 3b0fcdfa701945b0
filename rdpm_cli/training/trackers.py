"""`--track NAME`: the numbers of the log go to an experiment tracker too, whose run a resumed training continues."""

import contextlib
import importlib.util
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rdpm_cli import files, progress
from rdpm_cli.errors import UsageError

Log = Callable[[int, dict[str, float]], None]  # a step, and the numbers of its line by name


class Tracker(NamedTuple):
    """A tracker's run."""

    id: str  # by which it is continued
    log: Log
    finish: Callable[[], object]


def _wandb(folder: Path, id: str | None, settings: dict[str, Any]) -> Tracker:
    import wandb

    id = id or secrets.token_hex(8)
    names = {"project": os.environ.get("WANDB_PROJECT", "rdpm"), "name": os.environ.get("WANDB_NAME", folder.name)}
    quiet = wandb.Settings(console="off", silent=progress.quiet)
    try:
        run = wandb.init(**names, id=id, resume="allow", dir=str(folder), config=settings, settings=quiet)
    except wandb.Error as error:
        reason = f"--track wandb: {str(error).splitlines()[0]}"
        raise UsageError(reason, "run `wandb login`, or set WANDB_MODE=offline and `wandb sync` later") from error
    run.define_metric("*", step_metric="step")  # wandb's own counter refuses steps that a crash repeats
    return Tracker(id, lambda step, numbers: run.log({"step": step, **numbers}), run.finish)


def _trackio(folder: Path, id: str | None, settings: dict[str, Any]) -> Tracker:
    import trackio

    id = id or f"{folder.name}-{secrets.token_hex(4)}"  # its name, which must be the only one of the project
    project = os.environ.get("TRACKIO_PROJECT", "rdpm")
    run = trackio.init(project=project, name=id, config=settings, resume="allow", embed=False)
    return Tracker(id, lambda step, numbers: run.log(numbers, step=step), trackio.finish)


def _mlflow(folder: Path, id: str | None, settings: dict[str, Any]) -> Tracker:
    import mlflow

    try:
        mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "rdpm"))
        run = mlflow.start_run(run_id=id, run_name=folder.name)
        mlflow.log_dict(settings, "settings.json")  # whole: as parameters they would be cut to 6,000 characters
    except mlflow.MlflowException as error:
        hint = "set MLFLOW_TRACKING_URI to a server, or `pip install mlflow` for a store on this machine"
        raise UsageError(f"--track mlflow: {str(error).splitlines()[0]}", hint) from error
    return Tracker(run.info.run_id, lambda step, numbers: mlflow.log_metrics(numbers, step=step), mlflow.end_run)


TRACKERS = {"wandb": _wandb, "trackio": _trackio, "mlflow": _mlflow}


def check_tracker(track: str | None) -> None:
    """Raises UsageError if the tracker's package is not installed."""
    # A folder of that name, such as wandb's own ./wandb, has a spec without an origin.
    if track and getattr(importlib.util.find_spec(track), "origin", None) is None:
        raise UsageError(f"--track {track} needs the package {track}", f"pip install 'rdpm[{track}]'")


@contextlib.contextmanager
def open_tracker(track: str | None, folder: Path, settings: dict[str, Any]) -> Iterator[Log | None]:
    """What --track logs to, None without it. RUN/TRACK.json has the id of its run. Raises UsageError."""
    if track is None:
        yield None
        return
    note = folder / f"{track}.json"
    tracker = TRACKERS[track](folder, files.read_json(note)["id"] if note.exists() else None, settings)
    files.write_json(note, {"id": tracker.id})
    try:
        yield tracker.log
    finally:
        tracker.finish()

"""The log of a training: metrics.jsonl, TensorBoard and, with `--track`, Weights & Biases."""

import contextlib
import importlib
import importlib.util
import json
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from rdpm_cli import files, progress
from rdpm_cli.errors import UsageError

METRICS = "metrics.jsonl"
WANDB_FILE = "wandb.json"  # in the run folder: the id of the wandb run that a resumed training continues
PROJECT = "rdpm"  # unless WANDB_PROJECT names another


class MetricsLog:
    """RUN/metrics.jsonl and RUN/tensorboard/, a line or a point each logged step.

    On resume, lines after the resumed step are dropped.
    """

    def __init__(self, folder: Path, resumed_at: int, tracker: "Wandb | None" = None) -> None:
        self.path, self.tracker = folder / METRICS, tracker
        lines = [json.dumps(row) + "\n" for row in read_metrics(folder) if row["step"] <= resumed_at]
        files.write_atomic(self.path, lambda file: file.write("".join(lines).encode()))
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_at + 1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append one line; its numbers also go to TensorBoard and the tracker. Raises RunError if the disk is full."""
        line, numbers = json.dumps({"step": step, **values}) + "\n", scalars(values)
        with files.report_full_disk(self.path.parent, lambda: len(line) + 1):
            with self.path.open("a") as file:
                file.write(line)
            for name, value in numbers.items():
                self.board.add_scalar(name, value, step)
        if self.tracker:
            self.tracker.write(step, numbers)

    def close(self) -> None:
        """Flush. Raises RunError if the disk is full."""
        with files.report_full_disk(self.path.parent, lambda: 1):
            self.board.close()


def scalars(values: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line by name; those of a list, one each t, as name/t01, name/t02, ..."""
    numbers: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, list):
            numbers |= {f"{name}/t{t:02d}": number for t, number in enumerate(value, 1)}
        elif isinstance(value, int | float):
            numbers[name] = value
    return numbers


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of RUN/metrics.jsonl, without a half-written last one."""
    path = folder / METRICS
    rows: list[dict[str, Any]] = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def last_metrics(folder: Path, names: Sequence[str]) -> dict[str, float]:
    """The named values in the last line of a run's log that has the first of them."""
    rows = [row for row in read_metrics(folder) if names[0] in row]
    return {name: rows[-1][name] for name in names if rows and name in rows[-1]}


# ---- --track -------------------------------------------------------------------------------------------------------


def check_tracker(track: str | None) -> None:
    """Raises UsageError if the tracker's package is not installed."""
    if track is None:
        return
    spec = importlib.util.find_spec(track)
    if spec is None or spec.origin is None:  # no origin: a folder of that name, such as wandb's own ./wandb
        raise UsageError(f"--track {track} needs the package {track}", f"pip install 'rdpm[{track}]'")


class Wandb:
    """One run of Weights & Biases. WANDB_MODE, WANDB_PROJECT and the like have their usual meaning."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        """Start or continue the wandb run of a run folder. settings: shown with it. Raises UsageError."""
        wandb = importlib.import_module("wandb")  # an optional package
        note = folder / WANDB_FILE
        if not note.exists():
            files.write_json(note, {"id": secrets.token_hex(8)})
        try:
            self.run = wandb.init(
                project=None if os.environ.get("WANDB_PROJECT") else PROJECT,
                name=None if os.environ.get("WANDB_NAME") else folder.name,
                id=files.read_json(note)["id"],
                resume="allow",
                dir=str(folder),
                config=settings,
                settings=wandb.Settings(console="off", silent=progress.quiet),
            )
        except wandb.Error as error:
            hint = "run `wandb login`, or set WANDB_MODE=offline and `wandb sync` later"
            raise UsageError(f"--track wandb: {str(error).splitlines()[0]}", hint) from error
        self.run.define_metric("*", step_metric="step")  # wandb's own counter refuses steps that a crash repeats

    def write(self, step: int, values: dict[str, float]) -> None:
        """The numbers of one line."""
        self.run.log({"step": step, **values})


@contextlib.contextmanager
def open_tracker(track: str | None, folder: Path, settings: dict[str, Any]) -> Iterator[Wandb | None]:
    """The tracker that --track names, until the run ends or stops."""
    if track is None:
        yield None
        return
    tracker = Wandb(folder, settings)
    try:
        yield tracker
    finally:
        tracker.run.finish()

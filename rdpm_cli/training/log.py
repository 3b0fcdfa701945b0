"""The log of a training: metrics.jsonl, TensorBoard and, with `--track`, a tracker."""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from rdpm_cli import files
from rdpm_cli.training.trackers import Log

METRICS = "metrics.jsonl"


class MetricsLog:
    """RUN/metrics.jsonl and RUN/tensorboard/, a line or a point each logged step."""

    def __init__(self, folder: Path, resumed_at: int, tracker: Log | None = None) -> None:
        """Lines after the resumed step are dropped. tracker: of `open_tracker`."""
        self.path, self.tracker = folder / METRICS, tracker
        lines = [json.dumps(row) + "\n" for row in read_metrics(folder) if row["step"] <= resumed_at]
        files.write_atomic(self.path, lambda file: file.write("".join(lines).encode()))
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_at + 1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append one line; its numbers also go to TensorBoard and the tracker. Raises RunError if the disk is full."""
        line, numbers = json.dumps({"step": step, **values}) + "\n", scalars(values)
        with files.report_full_disk(self.path.parent):
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
            for name, value in numbers.items():
                self.board.add_scalar(name, value, step)
        if self.tracker:
            self.tracker(step, numbers)

    def close(self) -> None:
        """Flush. Raises RunError if the disk is full."""
        with files.report_full_disk(self.path.parent):
            self.board.close()


def scalars(values: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line by name; those of a list, one each t, as name/t01, name/t02, ..."""
    lists = [(name, value) for name, value in values.items() if isinstance(value, list)]
    per_t = {f"{name}/t{t:02d}": number for name, value in lists for t, number in enumerate(value, 1)}
    return {name: value for name, value in values.items() if isinstance(value, int | float)} | per_t


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of RUN/metrics.jsonl, without a half-written last one."""
    rows: list[dict[str, Any]] = []
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError), (folder / METRICS).open("rb") as lines:
        for line in lines:
            rows.append(json.loads(line))
    return rows


def last_metrics(folder: Path, names: Sequence[str]) -> dict[str, float]:
    """The named values in the last line of a run's log that has the first of them."""
    last: dict[str, Any] = next((row for row in reversed(read_metrics(folder)) if names[0] in row), {})
    return {name: last[name] for name in names if name in last}

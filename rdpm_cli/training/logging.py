"""metrics.jsonl, TensorBoard and trackers: one line, or one point, a logged step."""

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rdpm_cli import files
from rdpm_cli.training.tracking import Mirror


class MetricsLog:
    """RUN/metrics.jsonl and RUN/tensorboard/. On resume, lines after the resumed step are dropped."""

    def __init__(self, folder: Path, resumed_at: int, mirrors: Sequence[Mirror] = ()) -> None:
        """mirrors: what else gets every number."""
        from torch.utils.tensorboard import SummaryWriter

        self.path, self.mirrors = folder / "metrics.jsonl", mirrors
        kept = [row for row in read_metrics(folder) if row["step"] <= resumed_at]
        text = "".join(json.dumps(row) + "\n" for row in kept)
        files.write_atomic(self.path, lambda file: file.write(text.encode()))
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_at + 1)
        self._hook, threading.excepthook = threading.excepthook, self._in_a_thread

    def _in_a_thread(self, args: threading.ExceptHookArgs) -> None:
        """TensorBoard's own thread meets a full disk: its next call raises the same here, and that one is told."""
        if not (isinstance(args.exc_value, OSError) and args.exc_value.errno in files.FULL):
            self._hook(args)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append one line; numbers also go to TensorBoard and the mirrors, those of a list, one a t, by t.

        Raises RunError where the disk is full.
        """
        line, numbers = json.dumps({"step": step, **values}) + "\n", scalars(values)
        with files.space_is_told(self.path.parent, lambda: len(line) + 1):
            with self.path.open("a") as file:
                file.write(line)
            for name, value in numbers.items():
                self.board.add_scalar(name, value, step)
        for mirror in self.mirrors:
            mirror.write(step, numbers)

    def close(self) -> None:
        """Flush. Raises RunError where the disk is full."""
        with files.space_is_told(self.path.parent, lambda: 1):
            self.board.close()
        threading.excepthook = self._hook


def scalars(values: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line by name; those of a list, one a t, as name/t01 and so on."""
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, list):
            found |= {f"{name}/t{t:02d}": one for t, one in enumerate(value, 1)}
        elif isinstance(value, int | float):
            found[name] = value
    return found


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of RUN/metrics.jsonl; a half-written last line is left out."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows

"""metrics.jsonl and TensorBoard: one line, or one point, a logged step."""

import json
from pathlib import Path
from typing import Any

from rdpm_cli import files


class MetricsLog:
    """RUN/metrics.jsonl and RUN/tensorboard/. On resume, lines after the resumed step are dropped."""

    def __init__(self, folder: Path, resumed_at: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / "metrics.jsonl"
        kept = [row for row in read_metrics(folder) if row["step"] <= resumed_at]
        text = "".join(json.dumps(row) + "\n" for row in kept)
        files.write_atomic(self.path, lambda file: file.write(text.encode()))
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_at + 1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append one line; numbers also go to TensorBoard, those of a list, one a t, by t."""
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            if isinstance(value, list):
                for t, one in enumerate(value, 1):
                    self.board.add_scalar(f"{name}/t{t:02d}", one, step)
            elif isinstance(value, int | float):
                self.board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush."""
        self.board.close()


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

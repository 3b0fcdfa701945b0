"""The log of a run: metrics.jsonl, and a full disk."""

from pathlib import Path

import pytest

from rdpm_cli.errors import RunError
from rdpm_cli.training.log import MetricsLog, last_metrics, read_metrics, scalars


def test_lists_are_one_number_each_t_and_lines_after_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    for step in (1, 2, 3):
        log.write(step, {"loss": 1.0 / step, "heldout/accuracy": [0.5, 0.25]})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # a kill in the middle of a line
    assert scalars(read_metrics(tmp_path)[0]) == {
        "step": 1, "loss": 1.0, "heldout/accuracy/t01": 0.5, "heldout/accuracy/t02": 0.25,
    }  # fmt: skip
    MetricsLog(tmp_path, 2).close()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    assert last_metrics(tmp_path, ["loss", "absent"]) == {"loss": 0.5}


def test_a_full_disk_is_one_error_that_names_the_run(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    log.path = Path("/dev/full")
    with pytest.raises(RunError, match="/dev"):
        log.write(1, {"loss": 1.0})
    log.close()

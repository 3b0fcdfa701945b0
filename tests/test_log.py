"""The log of a run: metrics.jsonl, a full disk, and `--track wandb` over a stand-in for the package."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
from processes import tokenizer_command

from rdpm_cli.cli.app import run as run_cli
from rdpm_cli.engine.tokenizer import train_tokenizer
from rdpm_cli.errors import RunError, UsageError
from rdpm_cli.training.log import MetricsLog, check_tracker, last_metrics, open_tracker, read_metrics, scalars


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


# ---- --track -------------------------------------------------------------------------------------------------------


class RefusedError(Exception):
    """wandb.Error."""


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> MagicMock:
    """A stand-in for the package."""
    package = MagicMock(Error=RefusedError, __spec__=SimpleNamespace(origin="wandb.py"))
    monkeypatch.setitem(sys.modules, "wandb", package)
    for variable in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_MODE"):
        monkeypatch.delenv(variable, raising=False)
    return package


def test_a_tracker_gets_every_number_and_a_resumed_run_continues_the_same_one(wandb: MagicMock, tmp_path: Path) -> None:
    command = [*tokenizer_command(tmp_path / "run", "train.steps=3", "train.batch=16"), "--track", "wandb"]
    assert run_cli(command) == 0
    run = wandb.init.return_value
    lines = [{"step": row["step"], **scalars(row)} for row in read_metrics(tmp_path / "run")]
    assert [call.args[0] for call in run.log.call_args_list] == lines
    run.define_metric.assert_called_once_with("*", step_metric="step")
    run.finish.assert_called_once_with()
    first = wandb.init.call_args.kwargs
    assert (first["project"], first["name"], first["dir"]) == ("rdpm", "run", str(tmp_path / "run"))
    assert first["config"]["recipe"]["tokenizer"]["train"]["steps"] == 3
    with open_tracker("wandb", tmp_path / "run", {}):
        again = wandb.init.call_args.kwargs
    assert (again["id"], again["resume"]) == (first["id"], "allow")


def test_the_package_s_variables_win_and_it_learns_of_a_failure(
    wandb: MagicMock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    with pytest.raises(RuntimeError), open_tracker("wandb", tmp_path, {}):
        raise RuntimeError("out of memory")
    assert wandb.init.call_args.kwargs["project"] == "mine"
    wandb.init.return_value.finish.assert_called_once_with()


def test_a_tracker_that_refuses_is_a_usage_error(wandb: MagicMock, tmp_path: Path) -> None:
    wandb.init.side_effect = RefusedError("api_key not configured (no-tty)\nmore lines")
    with pytest.raises(UsageError, match=r"api_key.*\)$"), open_tracker("wandb", tmp_path, {}):
        pass


def test_an_absent_package_is_named_before_the_run_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "no_tracker").mkdir()  # a folder is no package
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UsageError, match="no_tracker"):
        check_tracker("no_tracker")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="wandb"):
        train_tokenizer("digits", tmp_path / "run", "digits", track="wandb")
    assert not (tmp_path / "run").exists()

"""`--track`, over stand-ins for the packages: a tracker gets every number, and a resumed run continues its own."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from processes import tokenizer_command

from rdpm_cli.cli.app import run as run_cli
from rdpm_cli.engine.tokenizer import train_tokenizer
from rdpm_cli.errors import UsageError
from rdpm_cli.training.log import read_metrics, scalars
from rdpm_cli.training.trackers import check_tracker, open_tracker


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
    with pytest.raises(UsageError) as error, open_tracker("wandb", tmp_path, {}):
        pass
    assert error.value.message.endswith("api_key not configured (no-tty)")


def test_an_absent_package_is_named_before_the_run_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "no_tracker").mkdir()  # a folder is no package
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UsageError, match="no_tracker"):
        check_tracker("no_tracker")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="wandb"):
        train_tokenizer("digits", tmp_path / "run", "digits", track="wandb")
    assert not (tmp_path / "run").exists()


@pytest.fixture(params=["trackio", "mlflow"])
def other(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, MagicMock]:
    """A stand-in for another package, by its name."""
    package = MagicMock(MlflowException=RefusedError, __spec__=SimpleNamespace(origin="package.py"))
    package.start_run.return_value.info.run_id = "7e"
    monkeypatch.setitem(sys.modules, request.param, package)
    return request.param, package


def test_other_trackers_get_the_same_numbers_and_continue_their_run(
    other: tuple[str, MagicMock], tmp_path: Path
) -> None:
    name, package = other
    command = [*tokenizer_command(tmp_path / "run", "train.steps=3", "train.batch=16"), "--track", name]
    assert run_cli(command) == 0
    lines = [(row["step"], scalars(row)) for row in read_metrics(tmp_path / "run")]
    log = package.init.return_value.log if name == "trackio" else package.log_metrics
    logged = [(call.kwargs["step"], {"step": call.kwargs["step"], **call.args[0]}) for call in log.call_args_list]
    assert logged == lines
    start, finish, key = (
        (package.init, package.finish, "name") if name == "trackio" else (package.start_run, package.end_run, "run_id")
    )
    finish.assert_called_once_with()
    id: Any = json.loads((tmp_path / "run" / f"{name}.json").read_text())["id"]
    with open_tracker(name, tmp_path / "run", {}):
        assert start.call_args.kwargs[key] == id
    assert start.call_count == 2

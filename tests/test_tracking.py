"""`--track wandb`, over a stand-in for the package: what it gets, which run a resumed training continues."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import tokenizer_command

from rdpm_cli.cli.app import run as run_cli
from rdpm_cli.engine import train_tokenizer
from rdpm_cli.errors import UsageError
from rdpm_cli.training import tracking
from rdpm_cli.training.logging import read_metrics, scalars

STAND_IN = """
import json, os
class Error(Exception):
    pass
class Settings:
    def __init__(self, **given):
        self.given = given
class Run:
    def define_metric(self, *names, **more):
        note("define", [names, more])
    def log(self, values):
        note("log", values)
    def finish(self):
        note("finish", None)
def note(what, value):
    with open({log!r}, "a") as file:
        file.write(json.dumps([what, value]) + "\\n")
def init(settings, **given):
    if os.environ.get("WANDB_MODE") == "broken":
        raise Error("api_key not configured (no-tty)\\nmore lines")
    note("init", {{**given, "settings": settings.given}})
    return Run()
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The package on the path; what it was called with, in calls.jsonl."""
    folder = tmp_path / "packages"
    folder.mkdir()
    (folder / "wandb.py").write_text(STAND_IN.format(log=str(folder / "calls.jsonl")))
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    for variable in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_MODE"):
        monkeypatch.delenv(variable, raising=False)
    yield folder / "calls.jsonl"
    sys.modules.pop("wandb", None)


def calls(log: Path, kind: str) -> list[Any]:
    return [value for what, value in map(json.loads, log.read_text().splitlines()) if what == kind]


def test_a_tracker_gets_every_number_and_a_resumed_run_goes_on_in_the_same_one(stand_in: Path, tmp_path: Path) -> None:
    command = [*tokenizer_command(tmp_path / "run", "train.steps=3", "train.batch=16"), "--track", "wandb"]
    assert run_cli(command) == 0
    lines = [{"step": row["step"], **scalars(row)} for row in read_metrics(tmp_path / "run")]
    assert calls(stand_in, "log") == lines
    assert calls(stand_in, "define") == [[["*"], {"step_metric": "step"}]]
    assert len(calls(stand_in, "finish")) == 1
    [first] = calls(stand_in, "init")
    assert first["project"] == "rdpm"
    assert first["name"] == "run"
    assert first["dir"] == str(tmp_path / "run")
    assert first["config"]["recipe"]["tokenizer"]["train"]["steps"] == 3
    assert first["settings"] == {"console": "off", "silent": True}
    with tracking.mirrors("wandb", tmp_path / "run", {}):
        again = calls(stand_in, "init")[1]
    assert again["id"] == first["id"]
    assert again["resume"] == "allow"


def test_the_packages_own_variables_come_first(stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    with tracking.mirrors("wandb", tmp_path, {}):
        assert calls(stand_in, "init")[0]["project"] is None
        assert calls(stand_in, "init")[0]["name"] == tmp_path.name


def test_the_tracker_is_told_of_the_end_of_a_run_that_fails(stand_in: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), tracking.mirrors("wandb", tmp_path, {}):
        raise RuntimeError("out of memory")
    assert len(calls(stand_in, "finish")) == 1


def test_without_the_option_nothing_is_imported(stand_in: Path, tmp_path: Path) -> None:
    with tracking.mirrors(None, tmp_path, {}) as mirrors:
        assert mirrors == []
    assert "wandb" not in sys.modules
    assert not stand_in.exists()
    assert list((tmp_path).iterdir()) == [stand_in.parent]


@pytest.mark.usefixtures("stand_in")
def test_a_tracker_that_refuses_is_a_usage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "broken")
    with pytest.raises(UsageError, match="api_key not configured") as refused, tracking.mirrors("wandb", tmp_path, {}):
        pass
    assert "\n" not in refused.value.message
    assert "WANDB_MODE=offline" in refused.value.hint


def test_an_absent_package_is_named_with_its_command_before_anything_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="wandb") as refused:
        train_tokenizer("digits", tmp_path / "run", "digits", track="wandb")
    assert "pip install 'rdpm[wandb]'" in refused.value.hint
    assert not (tmp_path / "run").exists()


def test_a_folder_of_that_name_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "no_tracker").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UsageError):
        tracking.check("no_tracker")

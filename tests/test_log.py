"""The log of a run: metrics.jsonl, a full disk, and `--track wandb` over a stand-in for the package."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import tokenizer_command

from rdpm_cli.cli.app import run as run_cli
from rdpm_cli.engine.tokenizer import train_tokenizer
from rdpm_cli.errors import RunError, UsageError
from rdpm_cli.training.log import MetricsLog, check_tracker, last_metrics, open_tracker, read_metrics, scalars

# ---- metrics.jsonl -------------------------------------------------------------------------------------------------


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

STAND_IN = """
import json, os
class Error(Exception):
    pass
class Settings:
    def __init__(self, **options):
        self.options = options
class Run:
    def define_metric(self, *names, **options):
        note("define", [names, options])
    def log(self, values):
        note("log", values)
    def finish(self):
        note("finish", None)
def note(kind, value):
    with open({log!r}, "a") as file:
        file.write(json.dumps([kind, value]) + "\\n")
def init(settings, **options):
    if os.environ.get("WANDB_MODE") == "broken":
        raise Error("api_key not configured (no-tty)\\nmore lines")
    note("init", {{**options, "settings": settings.options}})
    return Run()
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The package on the path; its calls, in calls.jsonl."""
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
    return [value for name, value in map(json.loads, log.read_text().splitlines()) if name == kind]


def test_a_tracker_gets_every_number_and_a_resumed_run_continues_the_same_one(stand_in: Path, tmp_path: Path) -> None:
    command = [*tokenizer_command(tmp_path / "run", "train.steps=3", "train.batch=16"), "--track", "wandb"]
    assert run_cli(command) == 0
    lines = [{"step": row["step"], **scalars(row)} for row in read_metrics(tmp_path / "run")]
    assert calls(stand_in, "log") == lines
    assert calls(stand_in, "define") == [[["*"], {"step_metric": "step"}]]
    assert len(calls(stand_in, "finish")) == 1
    [first] = calls(stand_in, "init")
    assert (first["project"], first["name"], first["dir"]) == ("rdpm", "run", str(tmp_path / "run"))
    assert first["config"]["recipe"]["tokenizer"]["train"]["steps"] == 3
    with open_tracker("wandb", tmp_path / "run", {}):
        again = calls(stand_in, "init")[1]
    assert (again["id"], again["resume"]) == (first["id"], "allow")


def test_the_package_s_own_variables_win(stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    with open_tracker("wandb", tmp_path, {}):
        assert calls(stand_in, "init")[0]["project"] is None
        assert calls(stand_in, "init")[0]["name"] == tmp_path.name


def test_the_tracker_learns_of_the_end_of_a_run_that_fails(stand_in: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), open_tracker("wandb", tmp_path, {}):
        raise RuntimeError("out of memory")
    assert len(calls(stand_in, "finish")) == 1


def test_without_the_option_nothing_is_imported(stand_in: Path, tmp_path: Path) -> None:
    with open_tracker(None, tmp_path, {}) as tracker:
        assert tracker is None
    assert "wandb" not in sys.modules
    assert not stand_in.exists()


@pytest.mark.usefixtures("stand_in")
def test_a_tracker_that_refuses_is_a_usage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "broken")
    with pytest.raises(UsageError, match="api_key") as refused, open_tracker("wandb", tmp_path, {}):
        pass
    assert "\n" not in refused.value.message
    assert "WANDB_MODE=offline" in refused.value.hint


def test_an_absent_package_is_named_before_the_run_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="wandb") as refused:
        train_tokenizer("digits", tmp_path / "run", "digits", track="wandb")
    assert "rdpm[wandb]" in refused.value.hint
    assert not (tmp_path / "run").exists()


def test_a_folder_of_that_name_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "no_tracker").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UsageError, match="no_tracker"):
        check_tracker("no_tracker")

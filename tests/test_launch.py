"""`--gpus N`: what the processes of one command do together, and what is said of them, once.

Most tests start a stand-in for the command, which imports no torch: how its processes end is what is tested.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import alive, exit_code, spawn, tokenizer_command, wait_for

from rdpm_cli import team
from rdpm_cli.cli.app import run as run_cli
from rdpm_cli.errors import UsageError
from rdpm_cli.threads import one_thread
from rdpm_cli.training.logging import read_metrics

# ---- asking --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "kept"),
    [
        ("train-gen codes --gpus 2 --out run", "train-gen codes --out run"),
        ("train-gen --gpus=2 codes", "train-gen codes"),
        ("train-gen codes train.steps=2 --gpus 8", "train-gen codes train.steps=2"),
        ("train-gen -- --gpus codes", "train-gen -- --gpus codes"),
        ("train-gen codes", "train-gen codes"),
    ],
)
def test_the_processes_run_the_same_command_line_without_the_option(argv: str, kept: str) -> None:
    assert team.without(argv.split(), "--gpus") == kept.split()


def test_under_torchrun_the_option_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert team.ask(None, ["train-gen"]) is None
    assert team.ask(2, ["train-gen", "--gpus", "2"]) == team.Team(2, ("train-gen",))
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert team.ask(None, ["train-gen"]) is None
    with pytest.raises(UsageError, match="WORLD_SIZE"):
        team.ask(2, ["train-gen"])


@pytest.mark.parametrize(
    ("options", "error", "hint"),
    [
        ("--gpus 3", "--gpus 3: there are 2 GPUs here", "give --gpus 2"),
        ("--gpus 2 --device cuda:1", "--device cuda:1 is one device", "leave --device out"),
        ("--gpus 2 train.batch=48", "train.batch=48 cannot be shared by 2 processes", "multiple of 32"),
        ("--gpus 0", "--gpus", "--help"),
        ("--keep 1", "--keep", "--help"),
        ("--gpus 2 train.stepz=3", "train.stepz", "train.steps"),
        ("--gpus 2 --recipe digitz", "digitz", "digits"),
        ("--gpus 2 --device cpu --out {full}", "full is not empty", "another folder"),
    ],
)
def test_what_cannot_be_started_is_said_once_and_starts_nothing(
    options: str,
    error: str,
    hint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from rdpm_cli.training import launch

    def fail(*_: object) -> None:
        raise AssertionError("something was started")

    monkeypatch.setattr(launch, "launch", fail)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    given = options.format(full=tmp_path / "full").split()
    place = [] if "--out" in given else ["--out", str(tmp_path / "run")]
    assert run_cli(["train-tokenizer", "digits", "--recipe", "digits", *place, *given]) == 2
    shown = capfd.readouterr()
    lines = shown.err.splitlines()
    assert [line.partition(": ")[0] for line in lines] == ["rdpm", "hint"]
    assert error in lines[0]
    assert hint in lines[1]
    assert not shown.out
    assert not (tmp_path / "run").exists()


# ---- how processes end ---------------------------------------------------------------------------------------------

STAND_IN = """
import os, signal, sys, time
from pathlib import Path
from rdpm_cli import engine, errors
from rdpm_cli.cli import main
from rdpm_cli.signals import stop_on_signal

RANK = int(os.environ["RANK"])

def wait(path):
    while not path.exists():
        time.sleep(0.02)

def play(how):
    ready = Path(os.environ["PLAY"]) / f"{RANK}.pid"
    print("on stdout")
    if how == "usage":
        raise errors.UsageError("wrong in every process", "mend it")
    if how == "data" and RANK == 1:
        raise errors.DataError("a shard is torn", "copy it again")
    if how == "bug" and RANK == 1:
        {}["no such key"]
    if how == "killed" and RANK == 1:
        ready.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if how in ("bug", "killed"):
        wait(ready.with_name("1.pid") if how == "killed" else Path(os.environ["RDPM_TEAM"]) / "failure-1.json")
        raise errors.LostProcessError("another process of this run has gone", "look for what it said")
    if how == "deaf":
        ready.write_text(str(os.getpid()))
    if how in ("data", "deaf"):
        wait(Path("never"))
    if how in ("stop", "full"):
        with stop_on_signal(interrupt=True) as stop:
            ready.write_text(str(os.getpid()))
            while not stop.asked:
                time.sleep(0.02)
        if how == "full" and RANK == 0:
            raise errors.RunError("disk full: here", "free some space")
        stop.leave(f"saved by {RANK}")
    return engine.Result("done")

engine.inspect = play
main()
"""


def launcher(folder: Path, how: str) -> None:
    """Be a command that starts two stand-ins; its stdout and stderr go into files."""
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ["PLAY"] = str(folder)
    os.environ["TMPDIR"] = str(folder / "tmp")
    (folder / "tmp").mkdir()
    from rdpm_cli import engine
    from rdpm_cli.cli import main
    from rdpm_cli.training import launch

    (folder / "stand_in.py").write_text(STAND_IN)
    launch.PROGRAM = (str(folder / "stand_in.py"),)  # type: ignore[assignment]

    def inspect(target: str) -> engine.Result:
        launch.launch(team.Team(2, ("inspect", target)))
        return engine.Result("the launcher's answer")

    engine.inspect = inspect
    sys.argv = ["rdpm", "inspect", how]
    main()


Ended = tuple[int | None, str, list[str]]


def play(folder: Path, how: str, number: signal.Signals | None = None) -> Ended:
    """The launcher's exit code, stdout, and lines of stderr; a signal is sent once both processes wait for it."""
    process = spawn(launcher, folder, how)
    pids: list[int] = []
    if number is not None:
        files = [folder / f"{rank}.pid" for rank in range(2)]
        wait_for(lambda: all(path.exists() and path.read_text() for path in files), process)
        pids = [int(path.read_text()) for path in files]
        assert all(alive(pid) for pid in pids)
        assert process.pid is not None
        os.kill(process.pid, number)
    code = exit_code(process, 60)
    if number == signal.SIGKILL:
        spare = spawn(wait_here)
        wait_for(lambda: not any(alive(pid) for pid in pids), spare, 20)
        spare.kill()
    else:
        assert not list((folder / "tmp").iterdir())
    assert not any(alive(pid) for pid in pids)
    return code, (folder / "out").read_text(), (folder / "err").read_text().splitlines()


def wait_here() -> None:
    signal.pause()


FIRST = "2 processes, CPU threads each: 1"


def test_the_answer_is_printed_once(tmp_path: Path) -> None:
    code, out, err = play(tmp_path, "fine")
    assert code == 0
    assert out == "the launcher's answer\n"
    assert err[0] == FIRST
    assert set(err[1:]) <= {"on stdout"}


@pytest.mark.parametrize(
    ("how", "exit", "message"),
    [
        ("usage", 2, "rdpm: error: wrong in every process"),
        ("data", 3, "rdpm: error: a shard is torn"),
        ("killed", 1, "rdpm: error: rank 1 of 2 processes"),
    ],
)
def test_a_failure_is_shown_once_with_its_exit_code(how: str, exit: int, message: str, tmp_path: Path) -> None:
    code, out, err = play(tmp_path, how)
    assert code == exit
    assert not out
    said = [line for line in err if line != "on stdout"]
    assert said[0] == FIRST
    assert said[1].startswith(message)
    assert said[2].startswith("hint: ")
    assert len(said) == 3
    if how == "killed":
        assert said[1].endswith("was killed by SIGKILL")


def test_a_bug_keeps_its_traceback_once(tmp_path: Path) -> None:
    code, _, err = play(tmp_path, "bug")
    assert code == 1
    assert err.count("Traceback (most recent call last):") == 1
    assert err.count("KeyError: 'no such key'") == 1
    assert err[-2] == "rdpm: error: a bug in rank 1; its traceback is above"


@pytest.mark.parametrize(
    ("number", "exit", "said"),
    [
        (signal.SIGTERM, 75, ["rdpm: error: stopped by SIGTERM; saved by", "hint: run the same command again"]),
        (signal.SIGUSR1, 75, ["rdpm: error: stopped by SIGUSR1; saved by", "hint: run the same command again"]),
        (signal.SIGINT, 130, ["stopped by SIGINT; saved by", "rdpm: error: interrupted", "hint: "]),
        (signal.SIGKILL, -9, []),  # nobody can say anything, but the processes stop too
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_signal_reaches_the_processes_and_none_is_left(
    number: signal.Signals, exit: int, said: list[str], tmp_path: Path
) -> None:
    code, _, err = play(tmp_path, "stop", number)
    assert code == exit
    lines = [line for line in err if line not in ("on stdout", FIRST)]
    assert len(lines) == len(said)
    assert all(line.startswith(start) for line, start in zip(lines, said, strict=True))


def test_what_fails_after_a_signal_is_what_is_said(tmp_path: Path) -> None:
    code, _, err = play(tmp_path, "full", signal.SIGTERM)
    assert code == 1
    assert "rdpm: error: disk full: here" in err


def test_a_signal_before_anything_is_done_is_a_stop_too(tmp_path: Path) -> None:
    code, _, err = play(tmp_path, "deaf", signal.SIGTERM)
    assert code == 75
    assert "rdpm: error: stopped by SIGTERM; what is saved stands" in err


# ---- the commands --------------------------------------------------------------------------------------------------


def losses(folder: Path, name: str = "loss") -> list[float]:
    return [row[name] for row in read_metrics(folder) if name in row]


def test_a_run_goes_on_with_two_processes_and_again_with_one(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Steps 1-2 by one process, 3-4 by two, 5-6 by one: one checkpoint for any number of processes."""
    options = ["train.batch=32", "train.steps=6", "train.save_every=2", "--device", "cpu", "--json"]

    def train(name: str, *more: str) -> Any:
        with one_thread():
            assert run_cli([*tokenizer_command(tmp_path / name, *options), *more]) == 0
        shown = capfd.readouterr()
        assert not shown.err
        return json.loads(shown.out)

    def back_to(step: int) -> None:
        """As if the run had ended at this step."""
        (tmp_path / "parts" / "tokenizer.pt").unlink()
        for path in (tmp_path / "parts" / "checkpoints").glob("*.pt"):
            if int(path.stem.removeprefix("step-")) > step:
                path.unlink()

    whole = train("whole")
    train("parts")
    back_to(2)
    assert train("parts", "--gpus", "2").keys() == whole.keys()
    note = json.loads((tmp_path / "parts" / "run.json").read_text())
    assert note["resumed"][-1]["processes"] == 2
    back_to(4)
    train("parts")
    assert [row["step"] for row in read_metrics(tmp_path / "parts")] == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose(losses(tmp_path / "parts"), losses(tmp_path / "whole"), rtol=1e-4)


def until(condition: Callable[[], object], args: list[str], number: signal.Signals) -> tuple[int | None, list[int]]:
    """Start the command with two real processes, signal it once the condition holds. -> exit code, children."""
    process = spawn(be, args)
    wait_for(condition, process, 300)
    assert process.pid is not None
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(process.pid, number)
    return exit_code(process, 20), [int(pid) for pid in children]


def be(args: list[str]) -> None:
    sys.argv = ["rdpm", *args]
    from rdpm_cli.cli import main

    main()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_real_training_saves_on_a_signal(number: signal.Signals, tmp_path: Path) -> None:
    more = ["train.batch=32", "train.steps=5000", "train.workers=1", "--device", "cpu", "--gpus", "2"]
    code, children = until(lambda: read_metrics(tmp_path), tokenizer_command(tmp_path, *more), number)
    assert code == (130 if number == signal.SIGINT else 75)
    assert len(children) == 2
    assert not any(alive(pid) for pid in children)
    last = read_metrics(tmp_path)[-1]["step"]
    assert (tmp_path / "checkpoints" / f"step-{last:09d}.pt").exists()


@pytest.mark.slow
def test_two_processes_train_a_generator(tmp_path: Path, digits_codes: Path, capfd: pytest.CaptureFixture[str]) -> None:
    small = ["network.depth=1", "network.width=32", "network.heads=2", "train.batch=32", "train.steps=4"]
    for name, more in (("one", []), ("two", ["--gpus", "2"])):
        command = ["train-gen", str(digits_codes), "--recipe", "digits", "--out", str(tmp_path / name), *small]
        with one_thread():
            assert run_cli([*command, "train.log_every=1", "--device", "cpu", "--quiet", "--json", *more]) == 0
        shown = capfd.readouterr()
        assert json.loads(shown.out)["generator"] == str(tmp_path / name / "generator.pt")
        assert not shown.err
    np.testing.assert_allclose(losses(tmp_path / "two", "ce"), losses(tmp_path / "one", "ce"), rtol=1e-4)

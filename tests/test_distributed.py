"""Several processes: a step's share and randomness, the helpers of a group, and what `--gpus N` starts and hands on.

The launcher's tests start a stand-in for the command: how its processes end is what is tested."""

import json
import os
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import CPU
from processes import alive, environments, exit_code, spawn, tokenizer_command, torchrun, wait_for, wait_until_gone
from torch import Tensor

from rdpm_cli import distributed
from rdpm_cli.cli.app import run as run_cli
from rdpm_cli.distributed import TrainStep, world
from rdpm_cli.errors import LostProcessError, UsageError
from rdpm_cli.training.log import read_metrics

# ---- a step, and several processes ---------------------------------------------------------------------------------


def test_draws_of_a_ranks_rows_are_a_slice_of_the_full_batch() -> None:
    def draw(rows: range, step: int = 2, seed: int = 0) -> list[Tensor]:
        taken = TrainStep(seed, step, rows, 48, CPU)
        return [taken.normal(3, 2), taken.normal(4)]  # the second draw goes on from the first

    whole = draw(range(48))
    for rows in (range(16), range(16, 48)):
        for part, full in zip(draw(rows), whole, strict=True):
            assert torch.equal(part, full[rows.start : rows.stop])
    assert not torch.equal(draw(range(48), step=3)[0], whole[0])
    assert not torch.equal(draw(range(48), seed=1)[0], whole[0])
    assert len({round(float(v), 5) for v in whole[0].flatten()}) > 280  # no block repeats another
    picks = [TrainStep(0, step, rows, 32, CPU).pick(50, 1000) for step, rows in ((5, range(16)), (5, range(16, 32)))]
    assert torch.equal(*picks)  # the same in every process
    assert 0 <= int(picks[0].min()) < 100 < 900 < int(picks[0].max()) < 1000
    assert not torch.equal(picks[0], TrainStep(0, 6, range(16), 32, CPU).pick(50, 1000))


def test_ranks_share_the_batch_in_whole_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert distributed.rank_rows(7) == range(7)
    rows: list[int] = []
    for rank in range(4):
        monkeypatch.setattr(distributed, "world", lambda rank=rank: (rank, 4))
        rows += distributed.rank_rows(128)
    assert rows == list(range(128))
    for batch in (32, 100):
        with pytest.raises(UsageError, match=f"train.batch={batch}") as refused:
            distributed.rank_rows(batch)
        assert "64" in refused.value.hint


def primitives(environment: dict[str, str], out: Path) -> None:
    """Save what a rank gets from each helper."""
    os.environ.update(environment)
    with distributed.process_group("cpu", several=True) as device:
        rank, size = world()
        step = TrainStep(0, 0, distributed.rank_rows(64), 64, device)
        values = {
            "logs": distributed.average_logs({"a": torch.tensor(float(rank))}),
            "any": [distributed.any_process(rank == size - 1, device), distributed.any_process(False, device)],
            "sum": step.sum_(torch.tensor([1.0, float(rank)])),
            "all": distributed.gather(rank),
            "normal": step.normal(2),
        }
        torch.save(values, out / f"{rank}.pt")


@pytest.mark.parametrize("size", [1, 2])
def test_helpers_of_any_number_of_processes_agree(size: int, tmp_path: Path) -> None:
    group = [spawn(primitives, environment, tmp_path) for environment in environments(size)]
    assert [exit_code(process) for process in group] == [0] * size
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(size)]
    for rank, values in enumerate(ranks):
        assert (values["logs"], values["any"]) == ({"a": (size - 1) / 2}, [True, False])
        assert values["sum"].tolist() == [size, size - 1]
        assert values["all"] == (list(range(size)) if rank == 0 else None)
    normal = torch.cat([values["normal"] for values in ranks])
    assert torch.equal(normal, TrainStep(0, 0, range(64), 64, CPU).normal(2))


def left_alone(environment: dict[str, str], out: Path) -> None:
    """The second process goes away without a word; the first writes what it makes of that."""
    os.environ.update(environment)
    try:
        with distributed.process_group("cpu", several=True) as device:
            distributed.barrier()
            if world()[0] == 1:
                os._exit(9)
            distributed.any_process(False, device)
    except LostProcessError as error:
        (out / "said").write_text(error.message)


def test_a_process_whose_peer_has_gone_says_so(tmp_path: Path) -> None:
    pair = [spawn(left_alone, environment, tmp_path) for environment in torchrun(2)]
    assert [exit_code(process) for process in pair] == [0, 9]
    assert (tmp_path / "said").exists()


# ---- --gpus N: how processes start and end -------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["--gpus 3", "--gpus 2 --device cuda:1", "--gpus 0"])
def test_processes_that_have_no_room_are_refused_once(
    options: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delattr(distributed, "start_processes")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    out = tmp_path / "run"
    assert run_cli(["train-tokenizer", "digits", "--recipe", "digits", "--out", str(out), *options.split()]) == 2
    shown = capfd.readouterr()
    assert [line.partition(": ")[0] for line in shown.err.splitlines()] == ["rdpm", "hint"]
    assert "--gpus" in shown.err
    assert not out.exists()


STAND_IN = """
import os, signal, sys, time, types
from pathlib import Path
from rdpm_cli import errors
from rdpm_cli.cli import main
from rdpm_cli.runs import Result, stop_on_signal

RANK = int(os.environ["RANK"])

def wait(path):
    while not path.exists():
        time.sleep(0.02)

def play(target, reading):
    ready = Path(os.environ["PLAY"]) / f"{RANK}.pid"
    os.write(1, b"as gloo prints\\n")
    if target == "usage":
        raise errors.UsageError("wrong in every process", "change it")
    if target == "data" and RANK == 1:
        raise errors.DataError("a shard is torn", "copy it again")
    if target == "bug" and RANK == 1:
        ready.touch()
        {}["no such key"]
    if target == "killed" and RANK == 1:
        ready.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if target in ("bug", "killed"):
        wait(ready.with_name("1.pid"))
        raise errors.LostProcessError("another process of this run has gone", "see its own message")
    if target == "deaf":
        ready.write_text(str(os.getpid()))
    if target in ("data", "deaf"):
        wait(Path("never"))
    if target in ("stop", "full"):
        with stop_on_signal(interrupt=True) as stop:
            ready.write_text(str(os.getpid()))
            while not stop.name:
                time.sleep(0.02)
        if target == "full" and RANK == 0:
            raise errors.RunError("disk full: here", "free some space")
        stop.leave(f"saved by {RANK}")
    return Result("done", {"rank": RANK})

sys.modules["rdpm_cli.engine.look"] = types.SimpleNamespace(inspect=play)  # the room itself takes seconds to import
main()
"""
FIRST = "2 processes, CPU threads each: 1"


def launcher(folder: Path, how: str) -> None:
    """Be a command that starts two stand-ins; its stdout and stderr go into files."""
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ["PLAY"] = str(folder)
    (folder / "stand_in.py").write_text(STAND_IN)
    distributed.PROGRAM = (str(folder / "stand_in.py"),)  # type: ignore[assignment]

    def inspect(target: str, reading: dict[str, Any]) -> Any:
        code = distributed.launch(2, "cpu", ["inspect", target])
        sys.stdout.flush()
        os._exit(code)

    sys.modules["rdpm_cli.engine.look"] = types.SimpleNamespace(inspect=inspect)  # type: ignore[assignment]
    be(["inspect", how])


def be(args: list[str]) -> None:
    """Be `rdpm ARGS`, which starts processes of its own."""
    sys.argv = ["rdpm", *args]
    from rdpm_cli.cli import main

    main()


def play(folder: Path, how: str, number: signal.Signals | None = None) -> tuple[int | None, str, list[str]]:
    """The launcher's exit code, stdout, and lines of stderr; a signal is sent once both processes wait for it."""
    process = spawn(launcher, folder, how)
    pids: list[int] = []
    if number is not None:
        notes = [folder / f"{rank}.pid" for rank in range(2)]
        wait_for(lambda: all(path.exists() and path.read_text() for path in notes), process)
        pids = [int(path.read_text()) for path in notes]
        assert all(alive(pid) for pid in pids)
        assert process.pid is not None
        os.kill(process.pid, number)
    code = exit_code(process, 120)
    wait_until_gone(pids, 20 if number == signal.SIGKILL else 1)
    lines = [line for line in (folder / "err").read_text().splitlines() if line not in ("as gloo prints", FIRST)]
    return code, (folder / "out").read_text(), lines


def test_files_in_the_working_folder_are_not_imported(tmp_path: Path) -> None:
    """By the processes of --gpus, and by those that torchrun starts: `python -m rdpm_cli`."""
    for name in ("tokenize", "queue", "torch"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('of the user')")
    assert play(tmp_path, "fine")[0] == 0
    module = [sys.executable, "-m", "rdpm_cli", "inspect", "digits", "--quiet"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    subprocess.run(module, cwd=tmp_path, check=True, timeout=60, env=environment, stdout=subprocess.DEVNULL)


def test_stdout_holds_the_first_process_s_answer_only(tmp_path: Path) -> None:
    code, out, err = play(tmp_path, "fine")
    assert [line.strip() for line in out.splitlines()] == ["done", "rank  0"]
    assert (code, err) == (0, [])


@pytest.mark.parametrize(
    ("how", "exit", "token"),
    [("usage", 2, "wrong"), ("data", 3, "torn"), ("killed", 1, "SIGKILL"), ("bug", 1, "KeyError: 'no such key'")],
)
def test_a_failure_is_shown_once_with_its_exit_code(how: str, exit: int, token: str, tmp_path: Path) -> None:
    code, out, err = play(tmp_path, how)
    assert (code, out) == (exit, "")
    assert len([line for line in err if token in line]) == 1
    assert how == "bug" or [line.partition(": ")[0] for line in err] == ["rdpm", "hint"]


@pytest.mark.parametrize(
    ("how", "number", "exit", "token"),
    [
        ("stop", signal.SIGTERM, 75, "saved by 0"),
        ("stop", signal.SIGUSR1, 75, "saved by 0"),
        ("stop", signal.SIGINT, 130, "saved by 0"),
        ("stop", signal.SIGKILL, -signal.SIGKILL, ""),  # the launcher can say nothing, but the processes stop too
        ("full", signal.SIGTERM, 1, "disk full: here"),  # a failure while saving outweighs the signal
        ("deaf", signal.SIGTERM, 75, ""),  # before anything is done
    ],
)
def test_a_signal_reaches_the_processes_and_none_is_left(
    how: str, number: signal.Signals, exit: int, token: str, tmp_path: Path
) -> None:
    code, _, err = play(tmp_path, how, number)
    assert code == exit
    assert len([line for line in err if "saved by" in line]) <= 1
    assert token in "".join(err)


def test_a_run_continues_with_two_processes(tmp_path: Path) -> None:
    """Steps 3 to 6 again, by two processes: one state for any number of them."""
    options = ["train.batch=32", "train.steps=6", "train.save_every=2", "--device", "cpu"]
    assert exit_code(spawn(be, tokenizer_command(tmp_path / "whole", *options))) == 0
    parts = Path(shutil.copytree(tmp_path / "whole", tmp_path / "parts"))
    for name in ("tokenizer.pt", "checkpoints/step-000000004.pt", "checkpoints/step-000000006.pt"):
        (parts / name).unlink()
    assert exit_code(spawn(be, [*tokenizer_command(parts, *options), "--gpus", "2"])) == 0
    assert json.loads((parts / "run.json").read_text())["resumed"][-1]["processes"] == 2
    rows, whole = read_metrics(parts), read_metrics(tmp_path / "whole")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose([row["loss"] for row in rows], [row["loss"] for row in whole], rtol=1e-4)

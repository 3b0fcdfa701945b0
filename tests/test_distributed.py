"""Several processes: a step's share and randomness, the helpers of a group, and what `--gpus N` starts and hands on.

The launcher's tests start a stand-in for the command: how its processes end is what is tested.
"""

import json
import math
import os
import signal
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import CPU
from processes import alive, children, exit_code, spawn, tokenizer_command, torchrun, wait_for, wait_until_gone
from torch import Tensor, nn

from rdpm_cli import distributed
from rdpm_cli.cli.app import run as run_cli
from rdpm_cli.distributed import TrainStep, world
from rdpm_cli.errors import LostProcessError, UsageError
from rdpm_cli.training.log import read_metrics
from rdpm_cli.training.loop import AveragedLoss

# ---- a step, and several processes ---------------------------------------------------------------------------------


def test_normal_of_a_ranks_rows_is_a_slice_of_the_full_batch() -> None:
    def draw(rows: range, step: int = 2, seed: int = 0) -> list[Tensor]:
        taken = TrainStep(seed, step, rows, 48, CPU)
        return [taken.normal(3, 2), taken.normal(4)]  # the second draw goes on from the first

    whole = draw(range(48))
    for start_row in (0, 16, 32):
        for part, full in zip(draw(range(start_row, start_row + 16)), whole, strict=True):
            assert torch.equal(part, full[start_row : start_row + 16])
    assert torch.equal(torch.cat([a[0] for a in (draw(range(32)), draw(range(32, 48)))]), whole[0])
    assert not torch.equal(draw(range(48), step=3)[0], whole[0])
    assert not torch.equal(draw(range(48), seed=1)[0], whole[0])
    assert len({round(float(v), 5) for v in whole[0].flatten()}) > 280  # no block repeats another


def test_pick_is_equal_for_all_ranks() -> None:
    picks = [TrainStep(0, 5, rows, 32, CPU).pick(50, 1000) for rows in (range(16), range(16, 32))]
    assert torch.equal(*picks)
    assert 0 <= int(picks[0].min()) <= int(picks[0].max()) < 1000
    assert not torch.equal(picks[0], TrainStep(0, 6, range(16), 32, CPU).pick(50, 1000))


@pytest.mark.parametrize(("batch", "processes"), [(24, 2), (32, 4), (48, 2), (100, 8)])
def test_a_batch_that_blocks_cannot_share_is_refused(
    batch: int, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "world", lambda: (0, processes))
    with pytest.raises(UsageError, match=f"train.batch={batch}") as refused:
        distributed.rank_rows(batch)
    assert refused.value.exit_code == 2
    assert f"multiple of {16 * processes}" in refused.value.hint


def test_ranks_share_the_batch_without_gap_or_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    for rank in range(4):
        monkeypatch.setattr(distributed, "world", lambda rank=rank: (rank, 4))
        rows += distributed.rank_rows(128)
    assert rows == list(range(128))


def test_one_process_shares_with_nobody() -> None:
    assert distributed.rank_rows(7) == range(7)
    model = nn.Linear(2, 2)
    loss = AveragedLoss(model, lambda x: (model(x).sum(), {"x": x}))
    with loss.micro_batch(last=True):
        value, logs = loss(torch.ones(1, 2))
        value.backward()
    assert torch.equal(model.weight.grad, torch.ones(2, 2))  # type: ignore[arg-type]
    assert (logs["x"].tolist(), loss.local_norm) == ([[1.0, 1.0]], None)
    assert distributed.average_logs({"a": torch.tensor(2.0)}) == {"a": 2.0}
    assert distributed.any_process(True, CPU)
    assert not distributed.any_process(False, CPU)


def primitives(environment: dict[str, str], out: Path) -> None:
    """What a rank gets from each helper."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    with distributed.process_group("cpu", several=True) as device:
        rank, _ = world()
        model = nn.Linear(2, 1)
        model.register_buffer("count", torch.tensor(10 + rank))
        nn.init.constant_(model.weight, 1.0 + rank)
        loss = AveragedLoss(model, lambda x: (model(x).sum(), {}))
        for last in (False, True):  # two micro-batches of x = 1 and x = 3, by rank
            with loss.micro_batch(last):
                loss(torch.full((1, 2), 1.0 + 2 * rank))[0].backward()
        rows = distributed.rank_rows(64)
        step = TrainStep(0, 0, rows, 64, device)
        found = {
            "rows": [rows.start, rows.stop],
            "weight": model.weight.detach(),
            "count": model.get_buffer("count"),
            "gradient": model.weight.grad,
            "local_norm": loss.local_norm,
            "logs": distributed.average_logs({"a": torch.tensor(float(rank))}),
            "any": [distributed.any_process(rank == 1, device), distributed.any_process(False, device)],
            "sum": step.sum_(torch.tensor([1.0, float(rank)])),
            "pick": step.pick(5, 100),
            "normal": step.normal(2),
        }
        torch.save(found, out / f"{rank}.pt")


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
    assert (tmp_path / "said").read_text().startswith("another process of this run")


def test_helpers_of_two_processes_agree(tmp_path: Path) -> None:
    pair = [spawn(primitives, environment, tmp_path) for environment in torchrun(2)]
    assert [exit_code(process) for process in pair] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert [first["rows"], second["rows"]] == [[0, 32], [32, 64]]
    for found in (first, second):
        assert found["weight"].tolist() == [[1.0, 1.0]]  # the first process's
        assert int(found["count"]) == 10
        assert found["gradient"].tolist() == [[4.0, 4.0]]  # the mean of 1 + 1 and 3 + 3
        assert found["logs"] == {"a": 0.5}
        assert found["any"] == [True, False]
        assert found["sum"].tolist() == [2.0, 1.0]
    norms = [found["local_norm"].item() for found in (first, second)]  # of two weights and a bias, before the mean
    np.testing.assert_allclose(norms, [math.sqrt(12), math.sqrt(76)], rtol=1e-6)
    assert torch.equal(first["pick"], second["pick"])
    whole = TrainStep(0, 0, range(64), 64, CPU).normal(2)
    assert torch.equal(torch.cat([first["normal"], second["normal"]]), whole)


# ---- --gpus N: what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "options", "token"),
    [
        ({"WORLD_SIZE": "1"}, "--gpus 2 --device cpu", "WORLD_SIZE"),
        ({}, "--gpus 3", "--gpus 3"),
        ({}, "--gpus 2 --device cuda:1", "--device cuda:1"),
        ({}, "--gpus 0", "--gpus"),
    ],
)
def test_processes_that_cannot_be_started_are_refused_once(
    environment: dict[str, str],
    options: str,
    token: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("something was started")

    monkeypatch.setattr(distributed, "start_processes", fail)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    out = tmp_path / "run"
    assert run_cli(["train-tokenizer", "digits", "--recipe", "digits", "--out", str(out), *options.split()]) == 2
    shown = capfd.readouterr()
    assert [line.partition(": ")[0] for line in shown.err.splitlines()] == ["rdpm", "hint"]
    assert token in shown.err
    assert not shown.out
    assert not out.exists()


# ---- --gpus N: how processes end -----------------------------------------------------------------------------------

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

def play(how):
    ready = Path(os.environ["PLAY"]) / f"{RANK}.pid"
    os.write(1, b"as gloo prints\\n")
    if how == "usage":
        raise errors.UsageError("wrong in every process", "change it")
    if how == "data" and RANK == 1:
        raise errors.DataError("a shard is torn", "copy it again")
    if how == "bug" and RANK == 1:
        ready.touch()
        {}["no such key"]
    if how == "killed" and RANK == 1:
        ready.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if how in ("bug", "killed"):
        wait(ready.with_name("1.pid"))
        raise errors.LostProcessError("another process of this run has gone", "see its own message")
    if how == "deaf":
        ready.write_text(str(os.getpid()))
    if how in ("data", "deaf"):
        wait(Path("never"))
    if how in ("stop", "full"):
        with stop_on_signal(interrupt=True) as stop:
            ready.write_text(str(os.getpid()))
            while not stop.requested:
                time.sleep(0.02)
        if how == "full" and RANK == 0:
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
    from rdpm_cli.cli import main

    distributed.PROGRAM = (str(folder / "stand_in.py"),)  # type: ignore[assignment]

    def inspect(target: str) -> Any:
        code = distributed.launch(2, "cpu", ["inspect", target])
        sys.stdout.flush()
        os._exit(code)

    sys.modules["rdpm_cli.engine.look"] = types.SimpleNamespace(inspect=inspect)  # type: ignore[assignment]
    sys.argv = ["rdpm", "inspect", how]
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


def test_stdout_holds_the_first_process_s_answer_only(tmp_path: Path) -> None:
    code, out, err = play(tmp_path, "fine")
    assert code == 0
    assert [line.strip() for line in out.splitlines()] == ["done", "rank  0"]
    assert not err


@pytest.mark.parametrize(
    ("how", "exit", "token"), [("usage", 2, "wrong"), ("data", 3, "torn"), ("killed", 1, "SIGKILL")]
)
def test_a_failure_is_shown_once_with_its_exit_code(how: str, exit: int, token: str, tmp_path: Path) -> None:
    code, out, err = play(tmp_path, how)
    assert code == exit
    assert not out
    assert [line.partition(": ")[0] for line in err] == ["rdpm", "hint"]
    assert token in err[0]


def test_a_bug_keeps_its_traceback_once(tmp_path: Path) -> None:
    code, _, err = play(tmp_path, "bug")
    assert code == 1
    assert err.count("Traceback (most recent call last):") == 1
    assert err.count("KeyError: 'no such key'") == 1


@pytest.mark.parametrize(
    ("number", "exit", "token"),
    [
        (signal.SIGTERM, 75, "saved by 0"),
        (signal.SIGUSR1, 75, "saved by 0"),
        (signal.SIGINT, 130, "saved by 0"),
        (signal.SIGKILL, -signal.SIGKILL, ""),  # the launcher can say nothing, but the processes stop too
    ],
)
def test_a_signal_reaches_the_processes_and_none_is_left(
    number: signal.Signals, exit: int, token: str, tmp_path: Path
) -> None:
    code, _, err = play(tmp_path, "stop", number)
    assert code == exit
    assert len([line for line in err if "saved by" in line]) <= 1
    assert token in "".join(err)


def test_a_failure_while_saving_outweighs_the_signal(tmp_path: Path) -> None:
    code, _, err = play(tmp_path, "full", signal.SIGTERM)
    assert code == 1
    assert "disk full: here" in "".join(err)


def test_a_signal_before_anything_is_done_is_a_stop_too(tmp_path: Path) -> None:
    assert play(tmp_path, "deaf", signal.SIGTERM)[0] == 75


# ---- --gpus N: the commands ----------------------------------------------------------------------------------------


def losses(folder: Path, name: str = "loss") -> list[float]:
    return [row[name] for row in read_metrics(folder) if name in row]


def be(args: list[str]) -> None:
    """Be `rdpm ARGS`, which starts processes of its own."""
    sys.argv = ["rdpm", *args]
    from rdpm_cli.cli import main

    main()


def test_a_run_continues_with_two_processes_and_again_with_one(tmp_path: Path) -> None:
    """Steps 1-2 by one process, 3-4 by two, 5-6 by one: one state for any number of processes."""
    options = ["train.batch=32", "train.steps=6", "train.save_every=2", "--device", "cpu"]

    def train(name: str, *gpus: str) -> None:
        assert exit_code(spawn(be, [*tokenizer_command(tmp_path / name, *options), *gpus]), 300) == 0

    def back_to(step: int) -> None:
        """As if the run had ended at this step."""
        (tmp_path / "parts" / "tokenizer.pt").unlink()
        for path in (tmp_path / "parts" / "checkpoints").glob("*.pt"):
            if int(path.stem.removeprefix("step-")) > step:
                path.unlink()

    train("whole")
    train("parts")
    back_to(2)
    train("parts", "--gpus", "2")
    record = json.loads((tmp_path / "parts" / "run.json").read_text())
    assert record["resumed"][-1]["processes"] == 2
    back_to(4)
    train("parts")
    assert [row["step"] for row in read_metrics(tmp_path / "parts")] == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose(losses(tmp_path / "parts"), losses(tmp_path / "whole"), rtol=1e-4)


def stop(condition: Callable[[], object], args: list[str], number: signal.Signals) -> tuple[int | None, list[int]]:
    """Start the command with two real processes, signal it once the condition holds. -> exit code, children."""
    process = spawn(be, args)
    wait_for(condition, process, 300)
    assert process.pid is not None
    started = children(process.pid)
    os.kill(process.pid, number)
    return exit_code(process, 30), started


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_real_training_saves_on_a_signal(number: signal.Signals, tmp_path: Path) -> None:
    options = ["train.batch=32", "train.steps=5000", "train.workers=1", "--device", "cpu", "--gpus", "2"]
    code, started = stop(lambda: read_metrics(tmp_path), tokenizer_command(tmp_path, *options), number)
    assert code == (130 if number == signal.SIGINT else 75)
    assert len(started) == 2
    assert not any(alive(pid) for pid in started)
    last = read_metrics(tmp_path)[-1]["step"]
    assert (tmp_path / "checkpoints" / f"step-{last:09d}.pt").exists()


@pytest.mark.slow
def test_two_processes_train_a_generator(tmp_path: Path, digits_codes: Path) -> None:
    small = ["network.depth=1", "network.width=32", "network.heads=2", "train.batch=32", "train.steps=4"]
    for name, gpus in (("one", []), ("two", ["--gpus", "2"])):
        command = ["train-gen", str(digits_codes), "--recipe", "digits", "--out", str(tmp_path / name), *small]
        assert exit_code(spawn(be, [*command, "train.log_every=1", "--device", "cpu", "--quiet", *gpus]), 300) == 0
    np.testing.assert_allclose(losses(tmp_path / "two", "ce"), losses(tmp_path / "one", "ce"), rtol=1e-4)

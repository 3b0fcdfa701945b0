"""SIGTERM and SIGUSR1 to a training: saved, exit 75, nobody left, and the same bits as without.

A run is stopped again and again, after gaps drawn from its seed, by a signal to one of its processes, and compared with
one that was left alone."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
from helpers import assert_same, metrics, newest_state
from processes import (
    alive,
    children,
    command_line,
    environments,
    exit_code,
    run_all,
    signalled_after,
    spawn,
    tokenizer_command,
    training_command,
    wait_for,
    wait_until_gone,
)
from rows import Rows
from torch import Tensor

from rdpm_cli.engine import look
from rdpm_cli.errors import EXIT_STOPPED


def command(training: str, codes: Path, out: Path, steps: int) -> list[str]:
    return training_command(training, codes, out, "train.batch=32", f"train.steps={steps}", "train.workers=1")


SHORT = ("generator", signal.SIGTERM, 1, 2)
LONG = [
    ("generator", signal.SIGTERM, 1, 20),
    ("tokenizer", signal.SIGUSR1, 1, 20),
    ("generator", signal.SIGUSR1, 2, 20),
    ("tokenizer", signal.SIGTERM, 2, 20),
]


@pytest.mark.parametrize(
    ("training", "number", "processes", "times"),
    [SHORT, *(pytest.param(*case, marks=pytest.mark.long) for case in LONG)],
)
def test_a_run_that_is_stopped_again_and_again_is_the_uninterrupted_one(
    training: str, number: signal.Signals, processes: int, times: int, digits_codes: Path, tmp_path: Path, rows: Rows
) -> None:
    draw = random.Random(f"{training} {number.name} {processes}")  # the seed, printed with the test's name
    gaps = [draw.randint(1, 5) for _ in range(times)]
    steps, out, row = sum(gaps) + 3, tmp_path / "run", f"{number.name} at random steps, {processes} processes"
    args, slowest = command(training, digits_codes, out, steps), 0.0
    for stop, gap in enumerate(gaps, 1):
        with rows.count(row):
            own = draw.randrange(processes)  # the one that gets the signal
            running = [
                spawn(signalled_after, gap, number, tmp_path / "note", args, environment)
                if rank == own
                else spawn(command_line, args, environment)
                for rank, environment in enumerate(environments(processes))
            ]
            assert [exit_code(process, 300) for process in running] == [EXIT_STOPPED] * processes
            when, *left = (tmp_path / "note").read_text().split()
            slowest = max(slowest, time.time() - float(when))
            wait_until_gone([int(pid) for pid in left])
            assert slowest < 20
            assert newest_state(out)["step"] == sum(gaps[:stop])
    assert run_all(args, processes) == [0] * processes
    assert run_all(command(training, digits_codes, tmp_path / "whole", steps), processes) == [0] * processes
    assert_same(newest_state(out), newest_state(tmp_path / "whole"))
    assert metrics(out) == metrics(tmp_path / "whole")
    rows.note(f"{row}: from the signal to the end", f"at most {slowest:.1f} s")


def stuck_in_saving(note: Path, args: list[str]) -> None:
    """Be `rdpm ARGS`, whose saving never ends."""
    from rdpm_cli import checkpoint

    def hang(*_: object) -> None:
        note.touch()
        time.sleep(1000)

    setattr(checkpoint, "save_state", hang)  # noqa: B010
    command_line(args, {})


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_second_signal_ends_it_at_once(number: signal.Signals, tmp_path: Path, rows: Rows) -> None:
    settings = ("train.batch=16", "train.steps=1000", "train.save_every=2", "train.workers=2", "--device", "cpu")
    process = spawn(stuck_in_saving, tmp_path / "note", tokenizer_command(tmp_path / "run", *settings))
    wait_for((tmp_path / "note").exists, process)
    assert process.pid is not None
    with rows.count("a second signal ends a training at once"):
        os.kill(process.pid, number)
        time.sleep(0.5)
        assert alive(process.pid)
        workers = children(process.pid)
        assert len(workers) >= 2
        started = time.monotonic()
        os.kill(process.pid, number)
        assert exit_code(process, 20) == -number
        assert time.monotonic() - started < 2
        wait_until_gone(workers)


def stuck_in_reading(args: list[str]) -> None:
    """Be `rdpm ARGS`, whose worker never prepares the data of step 3."""
    from rdpm_cli.tokenizer.training import ItemBatches

    batch_at = ItemBatches.batch_at

    def hang(batches: ItemBatches, step: int, rows: range) -> Tensor:
        if step == 3:
            time.sleep(1000)
        return batch_at(batches, step, rows)

    setattr(ItemBatches, "batch_at", hang)  # noqa: B010
    command_line(args, {})


def test_one_signal_ends_a_training_whose_worker_is_stuck(tmp_path: Path, rows: Rows) -> None:
    settings = ("train.batch=16", "train.steps=1000", "train.workers=2", "--device", "cpu")
    process = spawn(stuck_in_reading, tokenizer_command(tmp_path / "run", *settings))
    wait_for(lambda: (tmp_path / "run" / "metrics.jsonl").exists() and len(metrics(tmp_path / "run")) == 3, process)
    assert process.pid is not None
    with rows.count("a signal ends a training whose data worker is stuck"):
        workers = children(process.pid)
        os.kill(process.pid, signal.SIGTERM)
        assert exit_code(process, 20) == EXIT_STOPPED
        wait_until_gone(workers)
        assert newest_state(tmp_path / "run")["step"] == 3


def test_ctrl_c_saves_and_the_same_command_goes_on(digits_codes: Path, tmp_path: Path, rows: Rows) -> None:
    args = command("generator", digits_codes, tmp_path / "run", 6)
    with rows.count("Ctrl-C saves"):
        process = spawn(signalled_after, 3, signal.SIGINT, tmp_path / "note", args, {})
        assert exit_code(process) == 130
        assert newest_state(tmp_path / "run")["step"] == 3
        saved = look.verify(tmp_path / "run" / "checkpoints" / "step-000000003.pt")
        assert saved.values["kind"] == "training state"
        assert run_all(args) == [0]

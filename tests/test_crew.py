"""Worker processes: answers in order, a bounded number of tasks under way, errors and ends as one process has them."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import alive, spawn, wait_for

from rdpm_cli import crew
from rdpm_cli.errors import DataError, ProcessError, RunError, UsageError


def slow_square(number: int) -> int:
    time.sleep(0.02 if number % 3 == 0 else 0.0)  # answers come out of order
    return number * number


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_answers_come_in_the_order_of_the_tasks(workers: int) -> None:
    assert list(crew.in_order(slow_square, range(40), workers)) == [n * n for n in range(40)]
    assert list(crew.in_order(slow_square, [], workers)) == []


def own_pid(_: int) -> int:
    time.sleep(0.01)
    return os.getpid()


def test_so_many_processes_work() -> None:
    pids = set(crew.in_order(own_pid, range(30), 3))
    assert len(pids) == 3
    assert os.getpid() not in pids
    assert not any(alive(pid) for pid in pids)


def test_a_bounded_number_of_tasks_is_given_out() -> None:
    taken: list[int] = []

    def tasks() -> Iterator[int]:
        for number in range(1000):
            taken.append(number)
            yield number

    answers = crew.in_order(slow_square, tasks(), 2)
    for _ in range(10):
        next(answers)
        time.sleep(0.01)
    answers.close()
    assert len(taken) <= 10 + crew.AHEAD * 2


def test_large_answers_pass() -> None:
    answers = crew.in_order(lambda n: bytes(3_000_000) + bytes([n]), range(8), 2)
    assert [answer[-1] for answer in answers] == list(range(8))


def test_tensors_pass() -> None:
    answers = crew.in_order(lambda n: torch.full((300, 300), float(n)), range(8), 2)
    assert [float(answer.sum()) / 90_000 for answer in answers] == list(range(8))


def fails(number: int) -> int:
    if number == 5:
        raise DataError("image 5 is torn", "copy it again")
    if number == 6:
        raise KeyError("a bug")
    return number


def test_an_error_comes_in_its_turn_with_its_exit_code() -> None:
    seen: list[int] = []
    with pytest.raises(ProcessError, match="image 5 is torn") as caught:
        seen.extend(crew.in_order(fails, range(20), 3))
    assert seen == list(range(5))
    assert (caught.value.exit_code, caught.value.hint, caught.value.trace) == (3, "copy it again", "")


def test_a_bug_brings_its_traceback() -> None:
    with pytest.raises(ProcessError, match="a bug in a worker process") as caught:
        list(crew.in_order(fails, [6], 2))
    assert "KeyError: 'a bug'" in caught.value.trace
    with pytest.raises(UsageError):
        list(crew.in_order(refuse, [1], 1))  # in this process an error is itself


def refuse(_: int) -> None:
    raise UsageError("no")


def die(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_killed_worker_is_an_error_that_says_so() -> None:
    with pytest.raises(RunError, match=r"worker process \d+ was killed by SIGKILL") as caught:
        list(crew.in_order(die, range(100), 2))
    assert "out of memory?" in caught.value.hint


def die_in_an_answer(_: int) -> bytes:
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGKILL)).start()
    return bytes(1 << 22)  # more than a pipe holds


def test_a_worker_killed_in_the_middle_of_an_answer_is_the_same_error(monkeypatch: pytest.MonkeyPatch) -> None:
    take = crew._Worker.take

    def late(worker: Any) -> tuple[int, Any]:
        time.sleep(0.5)
        return take(worker)

    monkeypatch.setattr(crew._Worker, "take", late)
    with pytest.raises(RunError, match=r"worker process \d+ was killed by SIGKILL"):
        list(crew.in_order(die_in_an_answer, range(2), 2))


def note_and_wait(path: str) -> None:
    Path(path).write_text(str(os.getpid()))
    time.sleep(60)


def lead(folder: str) -> None:
    """A process with two workers that take long."""
    list(crew.in_order(note_and_wait, [f"{folder}/0", f"{folder}/1"], 2))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_their_parent(number: signal.Signals, tmp_path: Path) -> None:
    parent = spawn(lead, str(tmp_path))
    notes = [tmp_path / "0", tmp_path / "1"]
    wait_for(lambda: all(note.exists() and note.read_text() for note in notes), parent)
    pids = [int(note.read_text()) for note in notes]
    assert all(alive(pid) for pid in pids)
    assert parent.pid is not None
    os.kill(parent.pid, number)
    parent.join(20)
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_workers_end_with_the_iterator() -> None:
    answers = crew.in_order(own_pid, range(1000), 2)
    pids = {next(answers) for _ in range(20)}
    assert all(alive(pid) for pid in pids)
    answers.close()
    assert not any(alive(pid) for pid in pids)

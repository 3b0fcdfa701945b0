"""Worker processes: results in order, errors in their turn, what is lost or stuck ends, and nothing outlives them."""

import multiprocessing
import os
import signal
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_same, digits, newest_state, tiny_config, tiny_players, train
from processes import alive, spawn, wait_for, wait_until_gone
from torch import Tensor

from rdpm_cli import runs, workers
from rdpm_cli.errors import ImageError, RdpmError, RunError
from rdpm_cli.workers import in_order

OPTION = "--workers 1"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short time before a worker counts as stuck."""
    monkeypatch.setattr(workers, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(workers, "LONGEST_SECONDS", 0.2)


@pytest.mark.parametrize(("count", "items", "processes"), [(3, 60, 3), (64, 2, 2), (1, 4, 1), (0, 4, 0), (2, 0, 0)])
def test_results_come_in_order_from_this_number_of_processes_of_one_thread(
    count: int, items: int, processes: int
) -> None:
    def work(number: int) -> tuple[int, int, int]:
        time.sleep(0.02 if number % 3 == 0 else 0.005)  # some take longer than those after them
        return number, os.getpid(), torch.get_num_threads()

    results = list(in_order(work, range(items), count, OPTION))
    assert [number for number, *_ in results] == list(range(items))
    pids = {pid for _, pid, _ in results} - {os.getpid()}
    assert len(pids) == processes
    assert not any(alive(pid) for pid in pids)
    assert {threads for _, _, threads in results} <= {1}


@dataclass
class Parts:
    """A batch of several tensors and an array."""

    tensors: list[Tensor]
    array: Any


def test_tensors_and_arrays_arrive_as_they_were_and_can_be_written_to() -> None:
    random = torch.Generator().manual_seed(0)
    whole = torch.randint(256, (5, 6, 7, 3), generator=random, dtype=torch.uint8)
    tensors = [whole, whole.permute(0, 3, 1, 2), torch.randn(300, 1000, generator=random), whole[::2]]
    tensors += [torch.empty(0, 4), torch.tensor(3), torch.tensor([True, False])]
    sent = Parts(tensors, np.arange(12, dtype=np.uint16).reshape(3, 4)[:, ::2])
    for _, received in in_order(lambda number: (number, sent), range(3), 2, OPTION):
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(received.tensors, tensors, strict=True))
        assert np.array_equal(received.array, sent.array)
        received.tensors[0][0] = 7
    assert not torch.equal(received.tensors[0], whole)


def refuse(*_: object, **__: object) -> None:
    raise OSError(38, "Function not implemented")


def test_trainings_need_neither_semaphores_nor_sockets_nor_shared_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container may have 64 MB of /dev/shm or none, and a TMPDIR longer than the path of a socket may be."""
    cfg = tiny_config(train={"workers": 2, "steps": 2})
    train(tiny_players(cfg), tiny_config(train={"steps": 2}), tmp_path / "without")
    for name in ("_multiprocessing.SemLock", "socket.socket", "torch.UntypedStorage._share_fd_cpu_"):
        monkeypatch.setattr(name, refuse)
    train(tiny_players(cfg), cfg, tmp_path / "with", digits(cfg))
    assert_same(newest_state(tmp_path / "with"), newest_state(tmp_path / "without"))


def test_workers_end_with_the_iterator_in_the_middle_of_their_work() -> None:
    results = in_order(time.sleep, [0, *[50] * 50], 2, OPTION)
    next(results)
    pids = [child.pid for child in multiprocessing.active_children()]
    start = time.monotonic()
    results.close()
    assert time.monotonic() - start < 2
    assert not any(alive(pid) for pid in pids if pid)


ERRORS: list[RdpmError] = [ImageError("image 5", "copy it", name="5.png", reason="torn"), RunError("disk 5")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("count", [0, 3])
def test_an_error_comes_in_its_turn_as_itself(error: RdpmError, count: int) -> None:
    def work(number: int) -> int:
        if number == 5:
            raise error
        return number

    results: list[int] = []
    with pytest.raises(type(error)) as caught:
        results.extend(in_order(work, range(20), count, OPTION))
    assert results == list(range(5))
    assert (caught.value.message, caught.value.hint) == (error.message, error.hint)
    assert (caught.value.exit_code, vars(caught.value)) == (error.exit_code, vars(error))


def test_a_bug_in_a_worker_keeps_its_type_and_traceback() -> None:
    def work(number: int) -> int:
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="in work"):
        list(in_order(work, range(3), 2, OPTION))


def die(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def leave(number: int) -> int:
    raise SystemExit(4)


@pytest.mark.parametrize(("work", "token"), [(die, "SIGKILL"), (leave, "4")])
def test_a_lost_worker_is_an_error_with_exit_code_1(work: Callable[[int], int], token: str) -> None:
    with pytest.raises(RunError) as caught:
        list(in_order(work, range(100), 2, OPTION))
    assert (caught.value.exit_code, token in caught.value.message) == (1, True)
    assert OPTION in caught.value.hint


def test_a_worker_that_is_killed_while_it_sends_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def send(pipe: Connection, content: memoryview) -> None:
        os.write(pipe.fileno(), struct.pack("!i", 1000) + b"the beginning")  # as multiprocessing frames a message
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(Connection, "send_bytes", send)
    with pytest.raises(RunError, match="SIGKILL"):
        list(in_order(str, range(4), 1, OPTION))


def test_a_worker_that_ends_at_its_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "serve_parent", lambda: os._exit(9))
    with pytest.raises(RunError, match="9"):
        list(in_order(str, range(4), 2, OPTION))


def test_workers_that_cannot_be_started_are_an_error_and_none_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    start, started = multiprocessing.context.ForkProcess.start, list[Any]()

    def start_two(process: Any) -> None:
        if len(started) == 2:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        start(process)
        started.append(process)

    monkeypatch.setattr(multiprocessing.context.ForkProcess, "start", start_two)
    with pytest.raises(RunError, match="Resource temporarily") as caught:
        list(in_order(time.sleep, [60] * 9, 3, OPTION))
    assert OPTION in caught.value.hint
    assert [process.is_alive() for process in started] == [False, False]


@pytest.mark.usefixtures("impatient")
def test_a_stuck_worker_is_an_error_with_exit_code_1() -> None:
    results = in_order(time.sleep, [0, 60], 1, OPTION)
    next(results)
    with pytest.raises(RunError) as caught:
        next(results)
    assert (caught.value.exit_code, OPTION in caught.value.hint) == (1, True)


def test_a_request_to_stop_ends_the_wait_for_a_stuck_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "POLL_SECONDS", 0.05)
    results: list[None] = []
    for result in in_order(time.sleep, [0, 60, 60], 1, OPTION, stopped=lambda: bool(results)):
        results.append(result)
    assert results == [None]


def lead(folder: str) -> None:
    """Be a process with two workers that take long."""

    def note_and_wait(number: int) -> None:
        (Path(folder) / str(number)).write_text(str(os.getpid()))
        time.sleep(60)

    list(in_order(note_and_wait, range(2), 2, OPTION))


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
    wait_until_gone(pids, 20)

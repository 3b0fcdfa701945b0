"""Worker processes on this machine: tasks go out, answers come back in the order of the tasks. A plain helper."""

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import Any, TypeVar

from rdpm_cli.errors import EXIT_FAILED, ProcessError, RdpmError, RunError
from rdpm_cli.signals import end_with_parent, leave_signals_to_parent

FORKS = multiprocessing.get_context("fork")  # workers share what is loaded already, a model above all
AT_ONCE = 2  # tasks a worker has: the next one waits with it
AHEAD = 3  # tasks a worker may be ahead of the answer that comes next: what is held of them
AGAIN = "run the same command again with fewer --workers; finished work is kept"

Task = TypeVar("Task")
Answer = TypeVar("Answer")


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class _Failed:
    """How a task failed, for the process that gave it."""

    message: str
    hint: str
    exit_code: int
    trace: str

    def error(self) -> ProcessError:
        return ProcessError(self.message, self.hint, self.exit_code, self.trace)


def in_order(work: Callable[[Task], Answer], tasks: Iterable[Task], workers: int) -> Generator[Answer, None, None]:
    """work(task) of every task, in order; by so many processes, or by this one where that is one.

    Memory is flat: a bounded number of tasks is under way. The workers end with the iterator and with this process,
    however it ends. Raises ProcessError with a task's error, RunError when a worker was killed.
    """
    if workers <= 1:
        yield from map(work, tasks)
        return
    with _crew(work, workers) as crew:
        yield from _deal(crew, enumerate(tasks))


class _Worker:
    """A process and what it has to do."""

    def __init__(self, work: Callable[[Any], Any]) -> None:
        self.pipe, other = FORKS.Pipe()
        self.process: ForkProcess = FORKS.Process(target=_serve, args=(work, other, os.getpid()), daemon=True)
        self.process.start()
        other.close()
        self.busy = 0

    def give(self, number: int, task: Any) -> None:
        """Raises RunError when the process is no more."""
        with self._alive():
            self.pipe.send((number, task))
        self.busy += 1

    def take(self) -> tuple[int, Any]:
        """The number of a task and its answer. Raises RunError when the process is no more."""
        with self._alive():
            answer: tuple[int, Any] = self.pipe.recv()
        self.busy -= 1
        return answer

    @contextlib.contextmanager
    def _alive(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, OSError) as error:
            if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError):
                raise  # an end in the middle of an answer has no number
            self.process.join()
            code = self.process.exitcode or 0
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            why = "out of memory? " if code == -signal.SIGKILL else ""
            raise RunError(f"worker process {self.process.pid} {how}", why + AGAIN) from error


@contextlib.contextmanager
def _crew(work: Callable[[Any], Any], workers: int) -> Iterator[list[_Worker]]:
    crew: list[_Worker] = []
    try:
        for _ in range(workers):
            crew.append(_Worker(work))
        yield crew
    finally:
        for worker in crew:
            worker.process.kill()  # what it is at is of no use any more
        for worker in crew:
            worker.process.join()
            worker.pipe.close()


def _deal(crew: list[_Worker], tasks: Iterator[tuple[int, Any]]) -> Iterator[Any]:
    """Keep the crew busy, and hand on the answers in order."""
    waiting: dict[int, Any] = {}  # answers whose turn has not come
    following = 0
    while True:
        under_way = sum(worker.busy for worker in crew) + len(waiting)
        free = [worker for _ in range(AT_ONCE) for worker in crew]
        for worker in free:
            if worker.busy < AT_ONCE and under_way < AHEAD * len(crew):
                for number, task in islice(tasks, 1):
                    worker.give(number, task)
                    under_way += 1
        busy = {worker.pipe: worker for worker in crew if worker.busy}
        if not busy:
            return
        for ready in wait(list(busy)):
            assert isinstance(ready, Connection)
            number, answer = busy[ready].take()
            waiting[number] = answer
        while following in waiting:
            answer = waiting.pop(following)
            following += 1
            if isinstance(answer, _Failed):
                raise answer.error()
            yield answer


def _serve(work: Callable[[Any], Any], pipe: Connection, parent: int) -> None:
    """Be a worker."""
    leave_signals_to_parent()
    end_with_parent(signal.SIGKILL, parent)
    while True:
        number, task = pipe.recv()
        try:
            answer = work(task)
        except RdpmError as error:
            answer = _Failed(error.message, error.hint, error.exit_code, "")
        except MemoryError:
            answer = _Failed("out of memory in a worker process", AGAIN, EXIT_FAILED, "")
        except Exception:
            answer = _Failed(
                "a bug in a worker process; its traceback is above", "", EXIT_FAILED, traceback.format_exc()
            )
        pipe.send((number, answer))

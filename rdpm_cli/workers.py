"""Worker processes that prepare data, for trainings and for stores: work(item) of every item, in order.

Each worker has its own pipe, which ends with it. concurrent.futures and torch's DataLoader share one among all, and so
wait for ever if a worker is killed while it sends, for lack of memory for example. DataLoader also needs shared memory,
sockets and semaphores, which containers often lack."""

import io
import multiprocessing
import pickle
import signal
import traceback
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from torch import Tensor

from rdpm_cli import runs
from rdpm_cli.errors import RdpmError, RunError

POLL_SECONDS = 1.0  # between two looks for a signal while no result comes
LONGEST_SECONDS = 1800.0  # for one result; other processes wait longer for this one, see distributed.TIMEOUT


def in_order(
    work: Callable[[Any], Any], items: Sequence[Any], workers: int, option: str,
    stopped: Callable[[], bool] = lambda: False,
) -> Generator[Any, None, None]:  # fmt: skip
    """work(item) of every item, in order, by this number of processes, or by this one for 0.

    Raises the error of an item in its turn, and RunError for workers that are lost or stuck. No worker outlives the
    iterator, which ends early if `stopped` while it waits. option: of the command, to go on without workers."""
    if not (workers := min(workers, len(items))):
        yield from map(work, items)
        return
    pool: list[Worker] = []
    try:
        for number in range(workers):
            pool.append(Worker(work, items[number::workers], option))
        for number in range(len(items)):
            worker, waited = pool[number % workers], 0.0
            while not wait([worker.pipe], POLL_SECONDS):
                waited += POLL_SECONDS
                if stopped():
                    return
                if waited >= LONGEST_SECONDS:
                    message = f"worker process {worker.process.pid} has prepared nothing for {waited / 60:.0f} minutes"
                    raise RunError(message, f"does a disk hang? run the same command again, or give {option}")
            result = worker.receive()
            if isinstance(result, Exception):
                raise result
            yield result
    finally:
        for worker in pool:
            worker.end()


class Worker:
    """A process that works on some items, and the pipe through which its results come."""

    def __init__(self, work: Callable[[Any], Any], items: Sequence[Any], option: str) -> None:
        """Raises RunError if it cannot be started: for too many processes or open files."""
        self.option = option
        fork = multiprocessing.get_context("fork")  # a copy of this process, so that `work` may be anything
        try:
            self.pipe, writing = fork.Pipe(duplex=False)
            with writing:
                self.process = fork.Process(target=self._serve, args=(work, items, writing), daemon=True)
                self.process.start()
        except OSError as error:
            hint = f"use fewer workers, or give {option}"
            raise RunError(f"a worker process cannot be started: {error.strerror}", hint) from error

    def _serve(self, work: Callable[[Any], Any], items: Sequence[Any], writing: Connection) -> None:
        """Be the worker. It prepares an item while the previous one is sent."""
        runs.serve_parent()
        self.pipe.close()
        torch.set_num_threads(1)
        sent: Future[None] | None = None
        with ThreadPoolExecutor(1) as sender:
            for item in items:
                try:
                    result = work(item)
                except Exception as error:  # raised by the process that receives it
                    if not isinstance(error, RdpmError):
                        error.add_note(traceback.format_exc())
                    result = error
                packet = packed(result)
                if sent:
                    sent.result()
                sent = sender.submit(writing.send_bytes, packet)

    def receive(self) -> Any:
        """The next result, or the exception in its place. Raises RunError if the worker has ended."""
        try:
            return self.pipe.recv()
        except (EOFError, OSError) as error:  # before a message, and inside one
            self.process.join()
            code = self.process.exitcode or 0
            reason = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"has ended with exit code {code}"
            hint = f"out of memory? run the same command again with fewer workers, or with {self.option}"
            raise RunError(f"worker process {self.process.pid} {reason}", hint) from error

    def end(self) -> None:
        """Kill it, also in the middle of an item, or of a read that hangs."""
        self.process.kill()
        self.process.join()
        self.pipe.close()


class _ByValue(pickle.Pickler):
    """Packs tensors as arrays, since torch's own way passes them by shared memory and sockets."""

    def reducer_override(self, value: Any) -> Any:
        return (torch.from_numpy, (value.numpy(),)) if isinstance(value, Tensor) else NotImplemented


def packed(result: Any) -> memoryview:
    """A result as bytes. Connection.send itself would pickle tensors in torch's own way."""
    _ByValue(whole := io.BytesIO(), protocol=5).dump(result)
    return whole.getbuffer()

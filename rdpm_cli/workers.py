"""Worker processes that prepare data, for trainings and for stores: work(item) of every item, in order.

Results come through a pipe of each worker, and a worker that is lost ends its pipe. torch's DataLoader takes shared
memory, sockets and semaphores, which containers often lack, and raises from a signal handler when a worker dies."""

import io
import multiprocessing
import os
import pickle
import signal
import struct
import traceback
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import wait
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor

from rdpm_cli import runs
from rdpm_cli.errors import RdpmError, RunError

POLL_SECONDS = 1.0  # between two looks for a signal while no result comes
LONGEST_SECONDS = 1800.0  # for one result; other processes wait longer for this one, see distributed.TIMEOUT
NUMBER = struct.Struct("<q")


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
            self.pipe, writing = os.pipe()
            self.process = fork.Process(target=self._serve, args=(work, items, writing), daemon=True)
            try:
                self.process.start()
            except OSError:
                os.close(self.pipe)
                raise
            finally:
                os.close(writing)
        except OSError as error:
            hint = f"use fewer workers, or give {option}"
            raise RunError(f"a worker process cannot be started: {error.strerror}", hint) from error

    def _serve(self, work: Callable[[Any], Any], items: Sequence[Any], pipe: int) -> None:
        """Be the worker. It prepares an item while the previous one is sent."""
        runs.serve_parent()
        os.close(self.pipe)
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
                parts = packed(result)
                if sent:
                    sent.result()
                sent = sender.submit(send, pipe, parts)

    def receive(self) -> Any:
        """The next result, or the exception in its place. Raises RunError if the worker has ended."""
        try:
            parts = [self._read(self._number()) for _ in range(self._number())]
        except EOFError as error:
            self.process.join()
            code = self.process.exitcode or 0
            reason = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"has ended with exit code {code}"
            hint = f"out of memory? run the same command again with fewer workers, or with {self.option}"
            raise RunError(f"worker process {self.process.pid} {reason}", hint) from error
        return ForkingPickler.loads(parts[0], buffers=parts[1:])  # from a process of this run, never from a file

    def _number(self) -> int:
        return int(NUMBER.unpack(self._read(NUMBER.size))[0])

    def _read(self, size: int) -> bytearray:
        content = bytearray(size)
        rest = memoryview(content)
        while rest:
            count = os.readv(self.pipe, [rest])
            if not count:
                raise EOFError
            rest = rest[count:]
        return content

    def end(self) -> None:
        """Kill it, also in the middle of an item, or of a read that hangs."""
        self.process.kill()
        self.process.join()
        os.close(self.pipe)


class _ByValue(pickle.Pickler):
    """Packs tensors as arrays, since torch's own way copies their content several times."""

    def reducer_override(self, value: Any) -> Any:
        return (torch.from_numpy, (value.numpy(),)) if isinstance(value, Tensor) else NotImplemented


def packed(result: Any) -> list[memoryview]:
    """The parts of a result: its pickle, and the content of its arrays, not copied."""
    buffers: list[pickle.PickleBuffer] = []
    _ByValue(whole := io.BytesIO(), protocol=5, buffer_callback=buffers.append).dump(result)
    return [whole.getbuffer(), *(buffer.raw() for buffer in buffers)]


def send(pipe: int, parts: Sequence[memoryview]) -> None:
    """Write the number of parts, and each with its size before it."""
    _write(pipe, NUMBER.pack(len(parts)))
    for part in parts:
        _write(pipe, NUMBER.pack(len(part)))
        _write(pipe, part)


def _write(pipe: int, content: bytes | memoryview) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(pipe, rest) :]

"""Devices and processes of a command: the group, a step's share and randomness, and `--gpus N`, the launcher.

Every helper is valid with one process, so nothing else asks whether it is distributed."""

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, start_processes

from rdpm_cli import noise, progress
from rdpm_cli.errors import EXIT_FAILED, EXIT_INTERRUPT, EXIT_STOPPED, LostProcessError, RunError, Stopped, UsageError
from rdpm_cli.launcher import LAUNCHER

TIMEOUT = timedelta(hours=1)  # the first process may score or write this long; NCCL's default is 10 minutes
SAVING_SECONDS = 300  # that processes get to save after a signal, before they are killed
PROGRAM = ("-m", "rdpm_cli")  # that every process runs


def pick_device(device: str) -> torch.device:
    """auto, cpu, cuda (the local rank's) or cuda:N -> this process's device. Raises UsageError if it is not here."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        picked = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" else device)
        torch.empty(0, device=picked)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {device}: no such device here", "leave it out, or give --device cpu") from error
    if picked.type == "cuda":
        torch.cuda.set_device(picked)
        # TF32 convolutions would move z' by 1e-3, and codes with it; networks that may be coarser run in bf16.
        torch.backends.cudnn.allow_tf32 = False
    return picked


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Run torch's CPU kernels on one thread, so that their sums do not depend on the number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def full_precision(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Switch autocast off on the device of x."""
    # Tensors on the meta device have no content and no autocast.
    return contextlib.nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False)


def world() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) without torch.distributed."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_first() -> bool:
    """Whether this is the only process, or the first of several: the one that writes files."""
    return world()[0] == 0


@contextlib.contextmanager
def process_group(device: str, several: bool = False) -> Iterator[torch.device]:
    """Join torchrun's group if there is one. -> this process's device. device: auto, cpu, cuda or cuda:N.

    Raises UsageError for a group unless `several`, and LostProcessError if another process has ended."""
    picked, size = pick_device(device), int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1 and not several:
        raise UsageError("this command runs as one process", "start it without torchrun")
    if size == 1:
        yield picked
        return
    nccl = picked.type == "cuda"
    try:
        dist.init_process_group("nccl" if nccl else "gloo", timeout=TIMEOUT, device_id=picked if nccl else None)
        yield picked
    except Stopped:
        dist.destroy_process_group()  # every process stops after the same step
        raise
    except RuntimeError as error:
        # The group is not destroyed: NCCL would wait for the others, and under gloo they would fail before this process
        # has shown its error. gloo's errors have no class of their own, but name its source file.
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        raise LostProcessError(f"another process of this run has ended: {reason}", "see its own message") from error
    dist.destroy_process_group()


def gather(value: Any) -> list[Any] | None:
    """The values of all processes by rank, in the first one; None in the others."""
    rank, size = world()
    values: list[Any] | None = [value] * size if rank == 0 else None
    if size > 1:
        dist.gather_object(value, values)
    return values


def barrier() -> None:
    """Wait for every process."""
    if dist.is_initialized():
        dist.barrier()


def average_logs(logs: dict[str, Tensor]) -> dict[str, float]:
    """Mean of scalar logs over processes, as floats."""
    values = torch.stack([v.detach().float().reshape(()) for v in logs.values()])
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= world()[1]
    return dict(zip(logs, values.tolist(), strict=True))


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set in any process."""
    if not dist.is_initialized():
        return flag  # a tensor would make a GPU wait
    value = torch.tensor(float(flag), device=device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return bool(value)


def rank_rows(batch: int, place: tuple[int, int] | None = None) -> range:
    """This process's rows of a global batch: whole blocks of 16, equally many in every process, else UsageError.

    place: rank and number of processes, if they are not those of this group."""
    rank, size = place or world()
    if size > 1 and batch % (size * noise.BLOCK):
        hint = f"give a multiple of {size * noise.BLOCK}"
        raise UsageError(f"train.batch={batch} cannot be shared by {size} processes", hint)
    share = batch // size
    return range(rank * share, (rank + 1) * share)


@dataclass
class TrainStep:
    """One training step as a task sees it: this process's rows of the global `batch`, and its randomness.

    Blocks of 16 rows draw from (seed, step, block), and a process has whole blocks: any number of them draws the same.
    """

    seed: int
    step: int
    rows: range
    batch: int
    device: torch.device

    @cached_property
    def _blocks(self) -> list[tuple[int, torch.Generator]]:
        """(rows of the block, its generator on the device), in row order."""
        starts = self.rows[:: noise.BLOCK]
        seeds = [noise.seed_of("device", self.seed, self.step, start // noise.BLOCK) for start in starts]
        generators = [torch.Generator(self.device).manual_seed(seed) for seed in seeds]
        return [(min(noise.BLOCK, self.rows.stop - start), g) for start, g in zip(starts, generators, strict=True)]

    @cached_property
    def _shared(self) -> torch.Generator:
        return torch.Generator().manual_seed(noise.seed_of("shared", self.seed, self.step, 0))

    def normal(self, *shape: int) -> Tensor:
        """Standard normal values on the device, (rows, *shape), fp32."""
        return torch.cat([torch.randn(n, *shape, generator=g, device=self.device) for n, g in self._blocks])

    def pick(self, count: int, below: int) -> Tensor:
        """`count` random indices below `below`, int64 on the CPU, the same in every process."""
        return torch.randint(below, (count,), generator=self._shared)

    def sum_(self, value: Tensor) -> Tensor:
        """Sum over processes, in place."""
        if dist.is_initialized():
            dist.all_reduce(value)
        return value


def launch(processes: int, device: str, argv: list[str]) -> int:
    """Run `rdpm ARGV` in this many processes of this node, which print their own results and errors. -> the exit code.

    SIGTERM, SIGUSR1 and Ctrl-C reach them, and they save. Raises UsageError, and RunError for a killed process."""
    places = torch.cuda.device_count() if device in ("auto", "cuda") else processes if device == "cpu" else 1
    if processes > places:
        hint = "give fewer, or share the CPU with --device cpu"
        raise UsageError(f"--gpus {processes} with --device {device}: there is room for {places}", hint)
    threads = max(1, torch.get_num_threads() // processes)
    progress.say(f"{processes} processes, CPU threads each: {threads}")
    # The launcher serves the store in which the ranks meet, so no rank needs a port that is free by luck.
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    count, level = str(processes), os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR")
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "OMP_NUM_THREADS": str(threads)}
    shared |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    shared |= {LAUNCHER: str(os.getpid()), "TORCH_CPP_LOG_LEVEL": level}
    envs = {rank: {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)}
    argvs: dict[int, tuple[str, ...]] = dict.fromkeys(envs, (*PROGRAM, *argv))
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGTERM,SIGINT,SIGUSR1"  # torch's default lacks the last
    logging.disable(logging.CRITICAL)  # the launcher's log repeats what the processes print themselves
    context: Any = None
    try:
        context = start_processes("rdpm", sys.executable, argvs, envs, DefaultLogsSpecs(os.devnull))
        return _exit_code([failure.exitcode for failure in context.wait(period=0.1).failures.values()])
    except SignalException as error:
        if context:
            context.close(error.sigval, SAVING_SECONDS)
        codes = [handler.proc.returncode for handler in context.subprocess_handlers.values()] if context else [-1]
        # A failure while saving, as on a full disk, outweighs the stop. Negative codes: killed before they could save.
        failed = [code for code in codes if code > 0 and code not in (EXIT_STOPPED, EXIT_INTERRUPT)]
        stopped = EXIT_INTERRUPT if error.sigval == signal.SIGINT else EXIT_STOPPED
        return failed[0] if failed else stopped if any(codes) else 0  # 0: the signal came after the last step


def _exit_code(failures: list[int]) -> int:
    """The code of the failure that the others follow from. Raises RunError if that process was killed."""
    # The launcher ends the rest with SIGTERM, and a process that has lost its peer leaves with 1: consequences, so
    # every other code comes first. Their order alone would not do: the processes are polled every 0.1 s.
    cause = min(failures, key=lambda code: (code == -signal.SIGTERM, code == EXIT_FAILED), default=0)
    if cause < 0:
        hint = "out of memory? run the same command again: it continues from what is saved"
        raise RunError(f"one of the processes was killed by {signal.Signals(-cause).name}", hint)
    return cause

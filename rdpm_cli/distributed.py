"""Several processes of one command: the group they form, a step's share and randomness, and `--gpus N`, the launcher.

Every helper is valid with one process, so nothing else asks whether it is distributed.
"""

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.elastic.multiprocessing import (
    DefaultLogsSpecs,
    ProcessFailure,
    SignalException,
    SubprocessContext,
    start_processes,
)

from rdpm_cli import noise, progress
from rdpm_cli.device import pick_device
from rdpm_cli.errors import EXIT_FAILED, EXIT_INTERRUPT, EXIT_STOPPED, LostProcessError, RunError, Stopped, UsageError

TIMEOUT = timedelta(hours=1)  # the first process may score or write this long; NCCL's default is 10 minutes
SAVING_SECONDS = 300  # that processes get to save after a signal, before they are killed
PROGRAM = ("-m", "rdpm_cli")  # that every process runs
LAUNCHER = "RDPM_LAUNCHER"  # environment variable of a process that `--gpus` started: the launcher's process id


# ---- the group -----------------------------------------------------------------------------------------------------


def world() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) without torch.distributed."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_first() -> bool:
    """Whether this is the only process, or the first of several: the one that writes files."""
    return world()[0] == 0


@contextlib.contextmanager
def process_group(device: str, several: bool = False) -> Iterator[torch.device]:
    """Join torchrun's group if there is one. -> this process's device. device: auto, cpu, cuda or cuda:N.

    several: whether this command may run as several processes. Raises UsageError if it may not and does, and
    LostProcessError if another process has ended.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1 and not several:
        raise UsageError("this command runs as one process", "start it without torchrun")
    picked = pick_device(device)
    if size == 1:
        yield picked
        return
    nccl = picked.type == "cuda"
    leaving_together = False
    try:
        dist.init_process_group("nccl" if nccl else "gloo", timeout=TIMEOUT, device_id=picked if nccl else None)
        yield picked
        leaving_together = True
    except Stopped:
        leaving_together = True  # every process stops after the same step
        raise
    except RuntimeError as error:
        # gloo's errors have no class of their own, but name its source file
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            reason = str(error).splitlines()[0]
            raise LostProcessError(f"another process of this run has ended: {reason}", "see its own message") from error
        raise
    finally:
        # After an error the other processes are elsewhere: NCCL would wait for them here, and under gloo they would
        # fail before this process has shown its error.
        if leaving_together:
            dist.destroy_process_group()


def gather(value: Any) -> list[Any] | None:
    """The values of all processes by rank, in the first one; None in the others."""
    rank, size = world()
    if size == 1:
        return [value]
    values: list[Any] | None = [None] * size if rank == 0 else None
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
        return flag
    value = torch.tensor(float(flag), device=device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return bool(value.item())


def first_message(text: str) -> str:
    """The text of the first process whose text is not empty, in every process."""
    if not dist.is_initialized():
        return text
    texts: list[str] = [""] * world()[1]
    dist.all_gather_object(texts, text)
    return next((line for line in texts if line), "")


# ---- a step's share of the batch -----------------------------------------------------------------------------------


def rank_rows(batch: int) -> range:
    """This process's rows of a global batch: whole blocks of 16, equally many in every process."""
    rank, size = world()
    check_share(batch, size)
    share = batch // size
    return range(rank * share, (rank + 1) * share)


def check_share(batch: int, size: int) -> None:
    """Raises UsageError if this many processes cannot share a batch in whole blocks of 16."""
    if size > 1 and batch % (size * noise.BLOCK):
        raise UsageError(
            f"train.batch={batch} cannot be shared by {size} processes", f"give a multiple of {size * noise.BLOCK}"
        )


class TrainStep:
    """One training step as a task sees it: this process's rows of the global batch, and its randomness.

    All randomness of step s is drawn for the global batch in blocks of 16 rows, each from (seed, s, block), and a
    process takes whole blocks. So a step depends neither on the number of processes nor on what ran before.
    """

    def __init__(self, seed: int, step: int, rows: range, batch: int, device: torch.device) -> None:
        """rows: of the global batch, which has `batch` images."""
        self.seed, self.step, self.rows, self.batch, self.device = seed, step, rows, batch, device
        self._blocks: list[tuple[int, torch.Generator]] = []
        self._shared: torch.Generator | None = None

    def _generators(self) -> list[tuple[int, torch.Generator]]:
        """(rows of the block, its generator on the device), in row order."""
        if not self._blocks:
            for start in range(self.rows.start, self.rows.stop, noise.BLOCK):
                generator = torch.Generator(self.device)
                generator.manual_seed(noise.seed_of("device", self.seed, self.step, start // noise.BLOCK))
                self._blocks.append((min(noise.BLOCK, self.rows.stop - start), generator))
        return self._blocks

    def normal(self, *shape: int) -> Tensor:
        """Standard normal values on the device, (rows, *shape), fp32."""
        return torch.cat([torch.randn(n, *shape, generator=g, device=self.device) for n, g in self._generators()])

    def pick(self, count: int, below: int) -> Tensor:
        """`count` random indices below `below`, int64 on the CPU, the same in every process."""
        if self._shared is None:
            self._shared = torch.Generator()
            self._shared.manual_seed(noise.seed_of("shared", self.seed, self.step, 0))
        return torch.randint(below, (count,), generator=self._shared)

    def sum_(self, value: Tensor) -> Tensor:
        """Sum over processes, in place."""
        if dist.is_initialized():
            dist.all_reduce(value)
        return value


# ---- --gpus N ------------------------------------------------------------------------------------------------------


def launch(processes: int, device: str, argv: list[str]) -> int:
    """Run `rdpm ARGV` in this many processes of this node and wait for them. -> the exit code to leave with.

    The processes print their own results and errors; the code is that of the one that failed first. SIGTERM, SIGUSR1
    and Ctrl-C reach them, and they save: exit code 75, or 130. Raises UsageError, and RunError for a killed process.
    """
    _check_devices(processes, device)
    threads = max(1, torch.get_num_threads() // processes)
    progress.say(f"{processes} processes, CPU threads each: {threads}")
    # The launcher serves the store in which the ranks meet, so no rank needs a port that is free by luck.
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    shared = {
        **{"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)},
        **{"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"},
        **{"OMP_NUM_THREADS": str(threads), LAUNCHER: str(os.getpid())},
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
    }
    envs = {rank: {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)}
    commands: dict[int, tuple[str, ...]] = dict.fromkeys(range(processes), (*PROGRAM, *argv))
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGTERM,SIGINT,SIGUSR1"  # torch's default lacks the last
    logging.disable(logging.CRITICAL)  # the launcher's log repeats what the processes print themselves
    context = None
    try:
        context = start_processes("rdpm", sys.executable, commands, envs, DefaultLogsSpecs(os.devnull))
        result = context.wait(period=0.1)
        return _exit_code(result.failures if result else {}, processes)
    except SignalException as error:
        codes: list[int] = []
        if isinstance(context, SubprocessContext):
            context.close(error.sigval, SAVING_SECONDS)
            codes = [handler.proc.returncode for handler in context.subprocess_handlers.values()]
        return _exit_code_after(error.sigval, codes)


def _check_devices(processes: int, device: str) -> None:
    """Raises UsageError for processes that this node or device cannot hold."""
    if "WORLD_SIZE" in os.environ:
        raise UsageError(
            f"--gpus {processes} starts processes, but torchrun has started this one (WORLD_SIZE is set)",
            "leave out --gpus, or torchrun",
        )
    count = torch.cuda.device_count()
    if processes > 1 and device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--device {device} is one device, but --gpus is {processes}", "leave --device out")
    if device != "cpu" and processes > count:
        fewer = f"give --gpus {count}, or " if count else ""
        raise UsageError(f"--gpus {processes}: this node has {count} GPUs", f"{fewer}share the CPU with --device cpu")


def _exit_code(failures: dict[int, ProcessFailure], processes: int) -> int:
    """The exit code of the failure that the others follow from. Raises RunError if that process was killed."""
    if not failures:
        return 0
    # The launcher ends the rest with SIGTERM, and a process that has lost its peer leaves with 1: consequences, so
    # every other code comes first. Their order alone would not do: the processes are polled every 0.1 s.
    cause = min(failures.values(), key=lambda f: (f.exitcode == -signal.SIGTERM, f.exitcode == EXIT_FAILED))
    if cause.exitcode > 0:
        return cause.exitcode
    name = signal.Signals(-cause.exitcode).name
    out_of_memory = "out of memory? " if name == "SIGKILL" else ""  # Linux kills the largest process
    raise RunError(
        f"rank {cause.local_rank} of {processes} processes (pid {cause.pid}) was killed by {name}",
        f"{out_of_memory}run the same command again: it continues from what is saved",
    )


def _exit_code_after(number: signal.Signals, codes: list[int]) -> int:
    """The exit code after a signal to the launcher. codes: the processes' own."""
    if codes and not any(codes):
        return 0  # the signal came after the last step
    # A failure while saving, as on a full disk, outweighs the stop. Negative codes: killed before they could save.
    failed = [code for code in codes if code > 0 and code not in (EXIT_STOPPED, EXIT_INTERRUPT)]
    return failed[0] if failed else EXIT_INTERRUPT if number == signal.SIGINT else EXIT_STOPPED

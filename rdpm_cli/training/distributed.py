"""Several processes, valid at world size 1, so that nothing else asks whether it is distributed."""

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from rdpm_cli import noise
from rdpm_cli.errors import LostProcessError, Stopped, UsageError
from rdpm_cli.step import world

PATIENCE = timedelta(hours=1)  # of the others while the first process scores or writes; NCCL's own is 10 minutes


@contextlib.contextmanager
def process_group(device: str, several: bool = False) -> Iterator[torch.device]:
    """Join torchrun's group if there is one. -> this process's device. device: auto, cpu, cuda or cuda:N.

    several: may this command run as several processes? Raises UsageError when it may not and does.
    """
    if not several and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("this command runs as one process", "start it without torchrun")
    chosen = pick_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield chosen
        return
    with _group(chosen):
        yield chosen


def pick_device(device: str) -> torch.device:
    """This process's device: torchrun's local rank chooses among several. Raises UsageError for one that is none."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"--device {device}: no CUDA device here", "leave it out, or give --device cpu")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    try:
        chosen = torch.device(f"cuda:{local}" if device == "cuda" else device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {device}: no such device here", "give auto, cpu, cuda or cuda:N") from error
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32: TF32 would move z' by 1e-3; networks use bf16
    return chosen


@contextlib.contextmanager
def _group(device: torch.device) -> Iterator[None]:
    """The group of torchrun's processes. Raises LostProcessError where one of them has gone."""
    nccl = device.type == "cuda"
    together = False  # do all processes leave here?
    try:
        dist.init_process_group("nccl" if nccl else "gloo", timeout=PATIENCE, device_id=device if nccl else None)
        yield
        together = True
    except Stopped:
        together = True
        raise
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):  # gloo's errors have no class, but its path
            what = f"another process of this run has gone: {str(error).splitlines()[0]}"
            raise LostProcessError(what, "look for what it said") from error
        raise
    finally:
        if together:  # else the others are elsewhere: NCCL would wait for them, and gloo's would fail before this error
            dist.destroy_process_group()  # has been told


def own_rows(batch: int) -> range:
    """This process's rows of a global batch: whole blocks of 16, equally many in every process."""
    rank, size = world()
    check_share(batch, size)
    share = batch // size
    return range(rank * share, (rank + 1) * share)


def check_share(batch: int, size: int) -> None:
    """Raises UsageError when so many processes cannot share a batch in whole blocks of 16."""
    if size > 1 and batch % (size * noise.BLOCK):
        raise UsageError(
            f"train.batch={batch} cannot be shared by {size} processes", f"give a multiple of {size * noise.BLOCK}"
        )


def average_logs(logs: dict[str, Tensor]) -> dict[str, float]:
    """Mean of scalar logs over processes, as floats."""
    values = torch.stack([v.detach().float().reshape(()) for v in logs.values()])
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= world()[1]
    return dict(zip(logs, values.tolist(), strict=True))


def any_process(flag: bool, device: torch.device) -> bool:
    """Is the flag set in any process?"""
    if not dist.is_initialized():
        return flag
    value = torch.tensor(float(flag), device=device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return bool(value.item())


def first_message(text: str) -> str:
    """The first process's text that is not empty, in every process."""
    if not dist.is_initialized():
        return text
    texts: list[str] = [""] * world()[1]
    dist.all_gather_object(texts, text)
    return next((found for found in texts if found), "")


def barrier() -> None:
    """Wait for every process."""
    if dist.is_initialized():
        dist.barrier()

"""Where tensors are computed: the device, stretches on one thread, stretches in full precision."""

import contextlib
import os
from collections.abc import Iterator

import torch
from torch import Tensor

from rdpm_cli.errors import UsageError


def pick_device(device: str) -> torch.device:
    """auto, cpu, cuda or cuda:N -> this process's device; the local rank chooses among several GPUs.

    Raises UsageError for a device that is not here.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"--device {device}: no CUDA device here", "leave it out, or give --device cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    try:
        picked = torch.device(f"cuda:{local_rank}" if device == "cuda" else device)
        torch.empty(0, device=picked)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {device}: no such device here", "give auto, cpu, cuda or cuda:N") from error
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

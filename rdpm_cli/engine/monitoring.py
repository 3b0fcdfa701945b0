"""What a run makes of its machine: operations a second, share of the GPU's peak, memory. Beside every logged line.

And a warning of a loss that leaps.
"""

import resource
import statistics
import sys
from collections import deque

import torch

from rdpm_cli import progress
from rdpm_cli.engine import gpus
from rdpm_cli.engine.gpus import GIB
from rdpm_cli.step import world
from rdpm_cli.training.loop import Observer, Run


def machine(flops: int) -> Observer:
    """Add `flops_per_second` of all processes, `utilisation` where the GPU is known, and `memory_gib` of this process.

    flops: operations of a training step an image (docs/flops.md).
    """

    def observe(run: Run, logs: dict[str, float] | None) -> None:
        if logs is None:
            return
        logs["flops_per_second"] = rate = flops * logs["images_per_second"]
        if gpu := known_gpu(run.device):
            logs["utilisation"] = rate / (world()[1] * gpu.bf16_flops)
        logs["memory_gib"] = peak_memory(run.device) / GIB

    return observe


SPIKE, LATELY, ENOUGH = 6.0, 100, 20  # standard deviations; logged losses looked back at, at most and at least


def spikes() -> Observer:
    """Warn of a logged loss more than SPIKE standard deviations above the last ones. Nothing else follows from it."""
    lately: deque[float] = deque(maxlen=LATELY)

    def observe(run: Run, logs: dict[str, float] | None) -> None:
        if logs is None or world()[0]:
            return
        loss = logs["loss"]
        if len(lately) >= ENOUGH and (spread := statistics.stdev(lately)) > 0:
            above = (loss - statistics.fmean(lately)) / spread
            if above > SPIKE:
                what = f"{above:.0f} standard deviations above the {len(lately)} before"
                progress.warn(f"loss {loss:.4g} at step {run.step} is {what}")
        lately.append(loss)

    return observe


def known_gpu(device: torch.device) -> gpus.Gpu | None:
    """The device's entry in the table of GPUs, if it is one and there."""
    return gpus.of_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_memory(device: torch.device) -> int:
    """Bytes: on CUDA the most that tensors took at once, else the most that this process had resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

"""What a run makes of its machine: operations a second, share of the GPU's peak, memory. Beside every logged line."""

import resource
import sys

import torch

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


def known_gpu(device: torch.device) -> gpus.Gpu | None:
    """The device's entry in the table of GPUs, if it is one and there."""
    return gpus.of_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_memory(device: torch.device) -> int:
    """Bytes: on CUDA the most that tensors took at once, else the most that this process had resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

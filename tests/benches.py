"""What the benchmarks share: rounds in which all competitors take turns, a clock for each device, tables."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Job = Callable[[], Any]


def race(jobs: dict[str, Job], rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each job; they take turns, after one warm-up each. Ctrl-C ends it with the rounds so far."""

    def now() -> float:
        """CPU seconds of this thread, or the wall clock once the device is idle."""
        if device.type == "cpu":
            return time.thread_time()
        torch.cuda.synchronize(device)
        return time.perf_counter()

    turns: list[list[float]] = []
    try:
        for turn in range(rounds + 1):
            seconds = []
            for job in jobs.values():
                start = now()
                job()
                seconds.append(now() - start)
            turns += [seconds] if turn else []
    except KeyboardInterrupt:
        if not turns:
            raise
        print(f"stopped after {len(turns)} of {rounds} rounds")
    return {name: statistics.median(values) for name, values in zip(jobs, zip(*turns, strict=True), strict=True)}


def convolutions(network: nn.Module, forward: Job) -> Job:
    """Only the convolutions of `forward`."""
    calls: list[Job] = []

    def record(layer: Any, inputs: Any, _: Any) -> None:
        x = inputs[0].detach().clone(memory_format=torch.preserve_format)
        calls.append(lambda: nn.Conv2d.forward(layer, x))

    hooks = [m.register_forward_hook(record) for m in network.modules() if isinstance(m, nn.Conv2d)]
    forward()
    for hook in hooks:
        hook.remove()
    return lambda: [call() for call in calls]


def table(head: list[str], rows: list[list[str]]) -> None:
    """Columns, the first to the left."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for first, *others in [head, *rows]:
        print("  ".join([f"  {first:<{widths[0]}}", *(f"{v:>{w}}" for v, w in zip(others, widths[1:], strict=True))]))
    print()


def verdict(met: bool) -> str:
    return "met" if met else "MISSED"

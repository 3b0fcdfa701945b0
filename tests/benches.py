"""What the benchmarks share: rounds in which all competitors take turns, a clock a device, tables."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

Job = Callable[[], Any]


def race(jobs: dict[str, Job], rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each job; they take turns, after one warm-up each. Ctrl-C ends it with the rounds so far."""
    turns: list[list[float]] = []
    try:
        for turn in range(rounds + 1):
            taken = [_seconds(job, device) for job in jobs.values()]
            turns += [taken] if turn else []
    except KeyboardInterrupt:
        if not turns:
            raise
        print(f"stopped after {len(turns)} of {rounds} rounds")
    return {name: statistics.median(values) for name, values in zip(jobs, zip(*turns, strict=True), strict=True)}


def _seconds(job: Job, device: torch.device) -> float:
    start = _now(device)
    job()
    return _now(device) - start


def _now(device: torch.device) -> float:
    """CPU seconds of this thread, or the wall clock once the device is idle."""
    if device.type == "cpu":
        return time.thread_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def table(head: list[str], rows: list[list[str]]) -> None:
    """Columns, the first to the left."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for first, *others in [head, *rows]:
        print("  ".join([f"  {first:<{widths[0]}}", *(f"{v:>{w}}" for v, w in zip(others, widths[1:], strict=True))]))
    print()


def verdict(met: bool) -> str:
    return "met" if met else "MISSED"

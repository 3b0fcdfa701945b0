"""What a sample of a generator costs, as JSON: passes of the network, operations, seconds and memory.

    python recipes/ablations/cost.py runs/flow/generator.pt steps=25 solver=heun

Drawn and decoded at one batch. Operations are those that torch counts, a multiply-add two. The memory is the most bytes
that the tensors of a batch have at once, without the weights. The seconds are the median of three batches.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from rdpm_cli.engine.plan import Live
from rdpm_cli.engine.sample import key_values
from rdpm_cli.generator import registry, sampler


def cost(ckpt: Path, overrides: list[str], batch: int, device: torch.device) -> dict[str, float]:
    """Per sample, at `batch` samples a pass."""
    loaded = registry.load(ckpt).to(device)
    options = loaded.options(0, None, key_values(overrides))
    job = sampler.Job(loaded.generator, loaded.tokenizer, options, batch)
    labels = [index % loaded.generator.classes for index in range(batch)]
    with FlopCounterMode(display=False) as counter, Live() as live:
        job.draw(range(batch), labels)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        job.draw(range(batch), labels)  # ends with pixels on the CPU
        seconds.append(time.perf_counter() - start)
    return {
        "passes": loaded.generator.passes(options), "gflops_a_sample": counter.get_total_flops() / batch / 1e9,
        "seconds_a_sample": statistics.median(seconds) / batch, "memory_mib_a_sample": live.peak / batch / 2**20,
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ckpt", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    print(json.dumps(cost(args.ckpt, args.overrides, args.batch, torch.device(args.device))))

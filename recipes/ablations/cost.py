"""What a sample of a generator costs, as JSON: passes of the network, operations, seconds and peak memory.

    python recipes/ablations/cost.py runs/flow/generator.pt steps=25 solver=heun

Drawn and decoded at one batch, after one that is not timed. Operations are those that torch counts, a multiply-add two.
"""

import argparse
import json
import resource
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from rdpm_cli.engine.sample import key_values, sampling_options
from rdpm_cli.generator import registry, sampler
from rdpm_cli.generator.contract import SampleOptions


def cost(ckpt: Path, overrides: list[str], batch: int, device: torch.device) -> dict[str, float]:
    """Per sample, at `batch` samples a pass; the memory of the whole process on a CPU, of torch's tensors on a GPU."""
    loaded = registry.load(ckpt).to(device)
    options = SampleOptions(sampling_options(loaded.sampling, None, key_values(overrides)))
    job = sampler.Job(loaded.generator, loaded.tokenizer, options, batch)
    labels = [index % loaded.generator.classes for index in range(batch)]
    with FlopCounterMode(display=False) as counter:
        job.draw(range(batch), labels)
    start = time.perf_counter()
    job.draw(range(batch, 2 * batch), labels)  # ends with pixels on the CPU
    seconds = time.perf_counter() - start
    on_gpu = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_gpu else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "passes": loaded.generator.passes(options), "gflops_a_sample": counter.get_total_flops() / batch / 1e9,
        "seconds_a_sample": seconds / batch, "peak_memory_mib": peak / 2**20,
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ckpt", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    print(json.dumps(cost(args.ckpt, args.overrides, args.batch, torch.device(args.device))))

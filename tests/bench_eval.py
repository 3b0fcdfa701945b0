"""Speed and memory of scores at 50,000 images. By hand: python tests/bench_eval.py --help

The extractor: CPU seconds of one thread (on CUDA: wall seconds between synchronisations), medians of rounds in which it
and its floor take turns. The floor is only its convolutions, on the same shapes. Weights are random.

Metrics: features of 50,000 × 2048 random values, once each, on the threads of OMP_NUM_THREADS; wall seconds, and CPU
seconds of all threads over their number, which equal the wall's on an idle machine and which the goals are for. Memory
is the largest that the process held during the job, minus what it held before."""

import argparse
import time
import unittest.mock
from functools import partial
from pathlib import Path

import numpy as np
import torch
from benches import Job, convolutions, race, table, verdict
from numpy.typing import NDArray
from torch import nn
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from rdpm_cli.cli.app import tune_allocator
from rdpm_cli.data.source import spread
from rdpm_cli.evaluation import metrics

GOALS = {"FID": 60, "precision, recall": 300}  # CPU seconds a thread
WIDTH, SPATIAL, CLASSES = 2048, 2023, 1008


def inception() -> nn.Module:
    """torch-fidelity's network with the layers that scores take, weights drawn at random, without its download."""
    from torch_fidelity import feature_extractor_inceptionv3 as fidelity

    with (
        unittest.mock.patch.object(fidelity, "load_state_dict_from_url", return_value={}),
        unittest.mock.patch.object(fidelity.FeatureExtractorInceptionV3, "load_state_dict"),
    ):
        network: nn.Module = fidelity.FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"])
    return network


@torch.no_grad()
def bench_extractor(batches: list[int], side: int, rounds: int, device: torch.device) -> None:
    """Images a second of the extractor, and of its convolutions without the rest."""
    network = inception().to(device)
    rows = []
    for count in batches:
        pixels = torch.randint(256, (count, 3, side, side), dtype=torch.uint8, device=device)

        forward = partial(network, pixels)
        seconds = race({"floor": convolutions(network, forward), "extractor": forward}, rounds, device)
        share = seconds["floor"] / seconds["extractor"]
        rates = [f"{count / seconds[name]:.2f}" for name in ("extractor", "floor")]
        rows.append([f"B = {count}", *rates, f"{share:.0%}"])
    print(f"Inception, {side}×{side} to 299, fp32, {device.type}, {rounds} rounds")
    table(["", "images/s", "its convolutions", "share"], rows)


def measured(job: Job) -> list[float]:
    """[wall seconds, CPU seconds a thread, GiB more than the process held before]."""
    held = _kibibytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    wall, cpu = time.perf_counter(), time.process_time()
    job()
    seconds = [time.perf_counter() - wall, (time.process_time() - cpu) / torch.get_num_threads()]
    return [*seconds, (_kibibytes("VmHWM") - held) / 2**20]


def _kibibytes(name: str) -> int:
    """A field of this process's status."""
    return int(Path("/proc/self/status").read_text().partition(name)[2].split()[1])


def random_features(count: int, width: int, seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).random((count, width), dtype=np.float32)


def bench_metrics(count: int, references: int) -> None:
    """Each metric once, after the features are there."""
    samples, reference = random_features(count, WIDTH, 0), random_features(references, WIDTH, 1)
    spatial, logits = random_features(count, SPATIAL, 2), random_features(count, CLASSES, 3)
    pool = metrics.statistics(reference)
    spatial_pool = metrics.statistics(random_features(references, SPATIAL, 4))
    tensors = {"samples": torch.from_numpy(samples), "reference": torch.from_numpy(reference)}
    theirs: dict[str, Job] = {
        "FID": lambda: fid_statistics_to_metric(*map(fid_features_to_statistics, tensors.values()), verbose=False),
        "IS": lambda: isc_features_to_metric(torch.from_numpy(logits), splits=10, shuffle=False),
        "KID": lambda: kid_features_to_metric(*tensors.values(), kid_subset_size=1000, verbose=False),
        "precision, recall": lambda: prc_features_to_metric(*tensors.values(), verbose=False),
    }
    jobs: dict[str, Job] = {
        "FID: statistics, distance": lambda: metrics.frechet_distance(metrics.statistics(samples), pool),
        "sFID: statistics, distance": lambda: metrics.frechet_distance(metrics.statistics(spatial), spatial_pool),
        "IS": lambda: metrics.inception_score(logits),
        "precision, recall": lambda: metrics.precision_recall(samples, reference),
        "density, coverage": lambda: metrics.density_coverage(samples, reference),
        "KID: 100 subsets of 1,000": lambda: metrics.kernel_distance(samples, reference),
        "MIND": lambda: metrics.mind(samples[spread(count, references)], reference),
        "CMMD": lambda: metrics.cmmd(samples[spread(count, references)], reference),
        "FD-infinity": lambda: metrics.fd_infinity(samples, pool),
    }
    rows, total = [], 0.0
    for name, job in jobs.items():
        wall, cpu, memory = measured(job)
        peer = theirs.get(name.partition(":")[0])
        peers = (
            [f"{value:.{digits}f}" for value, digits in zip(measured(peer)[1:], (1, 2), strict=True)] if peer else []
        )
        most, total = GOALS.get(name.partition(":")[0]), total + cpu
        goal = "" if most is None else f"<= {most} s: {verdict(cpu <= most)}"
        rows.append([name, f"{wall:.1f}", f"{cpu:.1f}", f"{memory:.2f}", *(peers or ["", ""]), goal])
        print(f"  {name}: {wall:.1f} s", flush=True)
    print(f"{count:,} × {WIDTH} random features, {references:,} of the reference, {torch.get_num_threads()} threads")
    table(["", "wall s", "CPU s a thread", "GiB more", "torch-fidelity's s", "its GiB", "goal"], rows)
    print(f"all: {total:.0f} CPU s a thread; goal <= 300 s: {verdict(total <= 300)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16], help="images a forward pass")
    parser.add_argument("--side", type=int, default=256, help="pixels of an image")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=50_000, help="of the metrics")
    parser.add_argument("--references", type=int, default=10_000)
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads\n")
    bench_metrics(arguments.images, arguments.references)
    tune_allocator()  # as `rdpm` does; before, freed memory would count as held
    torch.set_num_threads(1)
    bench_extractor(arguments.batch, arguments.side, arguments.rounds, torch.device("cpu"))
    if torch.cuda.is_available():
        bench_extractor([64, 256], arguments.side, arguments.rounds, torch.device("cuda"))
    else:
        print("no CUDA device: its runs were not made")


if __name__ == "__main__":
    main()

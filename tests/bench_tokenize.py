"""Speed of tokenising, and of reading a store. By hand: python tests/bench_tokenize.py --help

Rates are images per CPU second of one core, of parts that take turns; workers' rates are of their own CPU seconds, so
that other jobs on the machine do not count. Weights are random: that changes neither the work nor the bytes."""

import argparse
import os
import resource
import tempfile
import time
import unittest.mock
from pathlib import Path

import numpy as np
import torch
from benches import race, table, verdict
from helpers import CPU
from pictures import random_image
from PIL import Image
from stores import Making, synthetic_plan

from rdpm_cli import checkpoint, noise
from rdpm_cli.codes import write
from rdpm_cli.codes.store import NAMES, TOKENIZER, CodeStore
from rdpm_cli.data.open import open_source
from rdpm_cli.data.pixels import chw, to_model
from rdpm_cli.data.source import Source, Subset
from rdpm_cli.recipes import load_recipe
from rdpm_cli.tokenizer import model
from rdpm_cli.tokenizer.model import Tokenizer

NARROW = ["autoencoder.width=8", "autoencoder.res_blocks=1", "autoencoder.attention=false", "autoencoder.groups=4"]
BATCH, BATCHES = 1024, 200  # records per batch when reading, batches timed
SHARE, RECORDS, EPS_MICROSECONDS = 0.9, 300_000, 200.0  # goals


def save_jpegs(root: Path) -> Path:
    """64 smooth random JPEGs of 500×375, in two classes."""
    for index in range(64):
        path = root / f"{index % 2}" / f"{index:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        random_image(32, 24, index).resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)
    return root


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


@torch.no_grad()
def bench_pipeline(source: Source, overrides: list[str], rounds: int, workers: int, scratch: Path) -> None:
    """Images/s of each part, their sum, and of the whole store with one process and with several."""
    torch.manual_seed(0)
    cfg = load_recipe("imagenet256-tokenizer", overrides, "tokenizer").tokenizer
    assert cfg is not None
    file, settings = scratch / "tokenizer.pt", {"views": 1, "latents": False, "shard_images": 4096}
    checkpoint.save(file, model.pack(Tokenizer(cfg), class_names=[], provenance={}))
    making = Making(scratch / "unused", source, file, **settings)
    tokenizer, plan = making.tokenizer, making.plan
    batch = write.micro_batches(plan, 0)[0]
    prepared = write.prepare(source, tokenizer.inputs, plan, batch)
    x, eps = to_model(chw(prepared.arrays["items"])), torch.from_numpy(prepared.arrays["eps_VBTCS"][0])
    z, arrays = tokenizer.latents(x), write.shard_arrays([write.encode(tokenizer, plan, prepared)], source, plan)
    parts = {
        "decode and crop": lambda: [source.pixels(i, plan.resolution) for i in batch],
        "noise": lambda: tokenizer.noise("encode", 0, batch, [0] * len(batch)),
        "encode": lambda: tokenizer.latents(x),
        "quantise": lambda: tokenizer.quantizer.encode(z, eps),
        "write": lambda: write.write_shard(scratch, 0, arrays, []),
    }
    count = len(source)
    print(f"tokenise at 256×256, width {cfg.autoencoder.width}: micro-batch {len(batch)}, {count} images")
    seconds = {name: value / len(batch) for name, value in race(parts, rounds, CPU).items()}
    total, slowest = sum(seconds.values()), max(seconds.values())
    rows = [[name, f"{1 / value:.2f}", f"{value / total:.1%}", ""] for name, value in seconds.items()]
    rows.append(["the parts one after the other", f"{1 / total:.2f}", "", ""])
    for processes in dict.fromkeys([1, workers]):
        # Without decoding 16 images at the end, which a store of this size would notice.
        with unittest.mock.patch.object(write, "decoded_items", return_value=()):
            start, before = time.perf_counter(), cpu_seconds()
            Making(scratch / f"{processes}", source, file, workers=processes, **settings).finish()
            wall, cpu = time.perf_counter() - start, (cpu_seconds() - before) / count
        goal = verdict((slowest if slowest / total > SHARE else total) / cpu >= SHARE)
        rates = f"{count / wall:.2f} wall; {total / cpu:.0%} of the parts, {slowest / cpu:.0%} of the slowest: {goal}"
        rows.append([f"a whole store, processes: {processes}", f"{1 / cpu:.2f}", "", rates])
    table(["", "images/s/core", "share", ""], rows)


def bench_reading(root: Path, count: int) -> None:
    """Random batches of 1,024 records of random codes (T = 10, 16×16, K = 4096); and the noise of an image."""
    plan = synthetic_plan(count, (16, 16), steps=10, codes=4096, channels=32, shard_images=4096, latents=False)
    block = np.random.default_rng(0).integers(0, 4096, (plan.shard_images, 10, 16, 16), dtype=np.uint16)
    for shard, items in enumerate(plan.shard_ranges):
        index = np.array(items, dtype=np.int64)
        block[:, 0, 0, 0] = shard % 4096
        labels = (index % 2).astype(np.int32)
        write.write_shard(root, shard, {"codes": block[: len(index)], "labels": labels, "index": index}, [])
    for name in (TOKENIZER, NAMES):
        (root / name).touch()
    write.tabulate(root, plan).write(root)
    for path in root.glob("*.npy"):  # ask the system to drop the store from its cache
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    store, random = CodeStore(root), np.random.default_rng(0)
    batches = [random.integers(0, len(store), BATCH) for _ in range(BATCHES)]

    def read(number: int) -> None:
        for rows in batches[:number]:
            store.codes(rows)
            store.columns["labels"][rows]

    start = time.perf_counter()
    read(8)
    cold = 8 * BATCH / (time.perf_counter() - start)
    read(BATCHES)  # warms the system's cache
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    warm = BATCHES * BATCH / race({"read": lambda: read(BATCHES)}, 5, CPU)["read"]
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1000
    draw = {"eps": lambda: noise.normal_rows("encode", 0, range(256), [0] * 256, [1] * 256, (32, 256))}
    eps = 1e6 * race(draw, 9, CPU)["eps"] / 256
    rows = [
        ["warm, records per CPU second", f"{warm:,.0f}", f"{RECORDS:,}", verdict(warm >= RECORDS)],
        ["cold, records/s", f"{cold:,.0f}", "", ""],
        ["memory grown, MB", f"{grown:.1f}", "flat", verdict(grown < 50)],
        ["noise of one t, µs per image", f"{eps:.0f}", f"{EPS_MICROSECONDS:g}", verdict(eps <= EPS_MICROSECONDS)],
    ]
    table([f"reading {count:,} records, {BATCH} per batch", "", "goal", ""], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["recipe", "narrow", "reading"], help="one part (default: all)")
    parser.add_argument("--images", type=Path, help="class folders of real images, repeated (default: generated JPEGs)")
    parser.add_argument("--count", type=int, help="images (default: 16 of the recipe, 512 of a narrow tokenizer)")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds of the parts")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes of the second whole store")
    parser.add_argument("--records", type=int, default=1_000_000, help="records of the store that is read (5 GB)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, one thread, {os.cpu_count()} cores\n")
    for part, count, overrides in (("recipe", args.count or 16, []), ("narrow", args.count or 512, NARROW)):
        if args.only in (None, part):
            with tempfile.TemporaryDirectory() as name:
                images = open_source(str(args.images or save_jpegs(Path(name) / "images")))
                source = Subset(images, [index % len(images) for index in range(count)], f"first {count}")
                bench_pipeline(source, overrides, args.rounds, args.workers, Path(name))
    if args.only in (None, "reading"):
        with tempfile.TemporaryDirectory() as name:
            bench_reading(Path(name), args.records)


if __name__ == "__main__":
    main()

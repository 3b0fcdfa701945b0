"""Speed of tokenising, and of reading a store. By hand: python tests/bench_tokenize.py --help

Rates are images per CPU second of one core, of parts that take turns; workers' rates are of their own CPU seconds, so
that other jobs on the machine do not count. Weights are random: that changes neither the work nor the bytes.
"""

import argparse
import io
import os
import resource
import tempfile
import time
import unittest.mock
from pathlib import Path

import numpy as np
import torch
from benches import Job, race, table, verdict
from numpy.typing import NDArray
from PIL import Image
from stores import synthetic_plan

from rdpm_cli import noise
from rdpm_cli.codes import encode, write
from rdpm_cli.codes.encode import StoreOptions
from rdpm_cli.codes.store import NAMES, TOKENIZER, CodeStore
from rdpm_cli.data.open import open_source
from rdpm_cli.data.pixels import chw, to_model
from rdpm_cli.data.source import Source
from rdpm_cli.recipes import load_recipe
from rdpm_cli.tokenizer import model
from rdpm_cli.tokenizer.model import Tokenizer

SLOWEST, RECORDS_A_SECOND, EPS_MICROSECONDS = 0.9, 300_000, 200.0
BATCH, BATCHES = 1024, 200  # records of a batch when reading, batches timed
NARROW = ["autoencoder.width=8", "autoencoder.res_blocks=1", "autoencoder.attention=false", "autoencoder.groups=4"]
CPU = torch.device("cpu")


class Repeated(Source):
    """The images of a folder again and again, up to `count`."""

    def __init__(self, source: Source, count: int) -> None:
        self.source, self.spec, self.class_names = source, source.spec, source.class_names or ["all"]
        indices = [index % len(source) for index in range(count)]
        self.names = [source.names[index] for index in indices]
        self.labels = [source.labels[index] if source.labels else 0 for index in indices]

    def open(self, index: int) -> Image.Image:
        return self.source.open(index % len(self.source))


def save_jpegs(root: Path, count: int = 64, side: int = 500) -> None:
    """Two class folders of smooth random JPEGs of side × 3/4 side."""
    random = np.random.default_rng(0)
    for index in range(count):
        path = root / f"{index % 2}" / f"{index:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        few = Image.fromarray(random.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        few.resize((side, side * 3 // 4), Image.Resampling.BICUBIC).save(path, quality=90)


# ---- tokenising ----------------------------------------------------------------------------------------------------


class Subject:
    """A source and a tokenizer with its plan. narrow: so narrow that decoding the JPEG matters."""

    def __init__(self, source: Source, narrow: bool) -> None:
        torch.manual_seed(0)
        cfg = load_recipe("imagenet256-tokenizer", NARROW if narrow else [], "tokenizer").tokenizer
        assert cfg is not None
        self.source, self.tokenizer = source, Tokenizer(cfg).eval().requires_grad_(False)
        content, buffer = model.pack(self.tokenizer, class_names=[], provenance={}), io.BytesIO()
        torch.save(content, buffer)
        self.file = buffer.getvalue()
        self.plan = encode.make_plan(source, self.tokenizer, content["digest"], StoreOptions(), CPU)

    def parts(self, folder: Path) -> dict[str, Job]:
        """Each part that a micro-batch passes through."""
        plan, tokenizer, source = self.plan, self.tokenizer, self.source
        batch = encode.micro_batches(plan, 0)[0]
        prepared = encode.prepare(source, plan, batch)
        assert prepared.pixels_BHWC is not None
        assert prepared.eps_VBTCS is not None
        x, eps = to_model(chw(prepared.pixels_BHWC)), torch.from_numpy(prepared.eps_VBTCS[0])
        z = tokenizer.latents(x)
        arrays = write._arrays([encode.encode(tokenizer, plan, prepared)], source, plan)
        return {
            "decode and crop": lambda: [source.pixels(i, plan.resolution) for i in batch],
            "noise": lambda: tokenizer.noise("encode", 0, batch, [0] * len(batch)),
            "encode": lambda: tokenizer.latents(x),
            "quantise": lambda: tokenizer.quantizer.encode(z, eps),
            "write": lambda: write.write_shard(folder, 0, arrays, []),
        }

    def store(self, workers: int) -> tuple[float, float]:
        """Make the store, without decoding 16 images at the end. -> wall and CPU seconds, workers included."""
        with (
            tempfile.TemporaryDirectory() as folder,
            unittest.mock.patch.object(write, "decoded_items", return_value=()),
        ):
            start, before, work = time.perf_counter(), cpu_seconds(), write.Work(workers)
            for _ in write.write_store(Path(folder) / "c", self.source, self.tokenizer, self.file, self.plan, work):
                pass
            return time.perf_counter() - start, cpu_seconds() - before


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


@torch.no_grad()
def bench_pipeline(subject: Subject, rounds: int, workers: int) -> None:
    """Images/s of each part, their sum, and of the whole store with one process and with several."""
    count, size = len(subject.source), len(encode.micro_batches(subject.plan, 0)[0])
    width = subject.tokenizer.cfg.autoencoder.width
    print(f"tokenise at 256×256, width {width}: micro-batch {size}, {rounds} rounds, {count} images")
    with tempfile.TemporaryDirectory() as folder:
        seconds = {name: value / size for name, value in race(subject.parts(Path(folder)), rounds, CPU).items()}
    total, slowest = sum(seconds.values()), max(seconds.values())
    rows = [[name, f"{1 / value:.2f}", f"{value / total:.1%}", ""] for name, value in seconds.items()]
    rows.append(["the parts one after the other", f"{1 / total:.2f}", "", ""])
    for number in dict.fromkeys([1, workers]):
        wall, cpu = subject.store(number)
        whole = cpu / count
        goal = verdict((slowest if slowest / total > SLOWEST else total) / whole >= SLOWEST)
        rates = f"{count / wall:.2f} wall; {total / whole:.0%} of the parts, {slowest / whole:.0%} of the slowest"
        rows.append(
            [f"a whole store, {number} process{'es' * (number > 1)}", f"{1 / whole:.2f}", "", f"{rates}: {goal}"]
        )
    table(["", "images/s/core", "share", ""], rows)


# ---- reading -------------------------------------------------------------------------------------------------------


def synthetic_store(root: Path, count: int) -> CodeStore:
    """A store of random codes: T = 10, 16×16, K = 4096."""
    plan = synthetic_plan(count, (16, 16), steps=10, codes=4096, channels=32, shard_images=4096, latents=False)
    block = np.random.default_rng(0).integers(0, 4096, (plan.shard_images, 10, 16, 16), dtype=np.uint16)
    for shard in range(plan.shard_count):
        index = np.array(plan.shard_range(shard), dtype=np.int64)
        block[:, 0, 0, 0] = shard % 4096
        labels: NDArray[np.int32] = (index % 2).astype(np.int32)
        write.write_shard(root, shard, {"codes": block[: len(index)], "labels": labels, "index": index}, [])
    for name in (TOKENIZER, NAMES):
        (root / name).touch()
    write.tabulate(root, plan).write(root)
    return CodeStore(root)


def forget(root: Path) -> None:
    """Ask the system to drop the store from its cache."""
    for path in root.glob("*.npy"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def memory() -> float:
    """MB of this process that are no pages of a file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("RssAnon"))


def bench_reading(folder: Path | None, count: int) -> None:
    """Random batches of 1,024 records; and the noise of an image."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        root = Path(name) / "codes"
        store, random = synthetic_store(root, count), np.random.default_rng(0)
        forget(root)
        print(f"reading {count:,} records, {len(store.manifest.shards)} shards, {BATCH} a batch")
        batches = [random.integers(0, len(store), BATCH) for _ in range(BATCHES)]
        start = time.perf_counter()
        for rows in batches[:8]:
            store.codes(rows)
        cold = 8 * BATCH / (time.perf_counter() - start)
        for path in root.glob("codes-*"):
            path.read_bytes()  # warms the system's cache
        before = memory()

        def read() -> None:
            for rows in batches:
                store.codes(rows)
                store.columns["labels"][rows]

        seconds = race({"read": read}, 5, CPU)
        warm, grown = BATCHES * BATCH / seconds["read"], memory() - before
    indices = range(256)
    draw = {"eps": lambda: noise.normal_rows("encode", 0, indices, [0] * 256, [1] * 256, (32, 256))}
    eps = 1e6 * race(draw, 9, CPU)["eps"] / 256
    table(
        ["", "", "goal", ""],
        [
            ["warm, records a CPU second", f"{warm:,.0f}", f"{RECORDS_A_SECOND:,}", verdict(warm >= RECORDS_A_SECOND)],
            ["cold, records/s", f"{cold:,.0f}", "", "advised at random" if store.exceeds_memory else "not advised"],
            ["memory grown, MB", f"{grown:.1f}", "flat", verdict(grown < 50)],
            ["noise of one t, µs an image", f"{eps:.0f}", f"{EPS_MICROSECONDS:g}", verdict(eps <= EPS_MICROSECONDS)],
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["recipe", "narrow", "reading"], help="one part (default: all)")
    parser.add_argument("--images", type=Path, help="folder of real images, repeated (default: generated JPEGs)")
    parser.add_argument("--count", type=int, default=16, help="images through the recipe's tokenizer")
    parser.add_argument("--narrow-count", type=int, default=512, help="images through a narrow one")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds of the parts")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes of the second whole store")
    parser.add_argument("--records", type=int, default=1_000_000, help="records of the store that is read")
    parser.add_argument("--folder", type=Path, help="where that store is made (5 GB; default: the temporary folder)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, one thread, {os.cpu_count()} cores\n")
    with tempfile.TemporaryDirectory() as folder:
        if args.images is None:
            save_jpegs(Path(folder))
        source = open_source(str(args.images or folder))
        for part, count in (("recipe", args.count), ("narrow", args.narrow_count)):
            if args.only in (None, part):
                bench_pipeline(Subject(Repeated(source, count), part == "narrow"), args.rounds, args.workers)
    if args.only in (None, "reading"):
        bench_reading(args.folder, args.records)


if __name__ == "__main__":
    main()

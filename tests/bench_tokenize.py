"""Speed and size of tokenising, and of reading a store. By hand: python tests/bench_tokenize.py --help

Rates are images per CPU second of one core, of parts that take turns; workers' rates are of their own CPU seconds, so
that other jobs on the machine do not count. Weights are random: that changes neither the work nor the bytes.
"""

import argparse
import functools
import io
import os
import resource
import statistics
import tempfile
import time
import unittest.mock
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benches import table, verdict
from numpy.typing import NDArray
from PIL import Image

from rdpm_cli import crew, modelfile, noise
from rdpm_cli.codes import encode, make, writing
from rdpm_cli.codes.manifest import DataOrigin, Manifest, Plan, Shard, shard_files
from rdpm_cli.codes.store import CodeStore
from rdpm_cli.codes.work import Work
from rdpm_cli.config import AutoencoderConfig, QuantizerConfig, ScheduleConfig, TokenizerArchitecture
from rdpm_cli.images.sources import ImageSource, open_source
from rdpm_cli.images.tensors import to_model
from rdpm_cli.recipe_files import load_recipe
from rdpm_cli.threads import tune_allocator
from rdpm_cli.tokenizer import model
from rdpm_cli.tokenizer.model import Tokenizer

SLOWEST, RECORDS_A_SECOND, EPS_MICROSECONDS = 0.9, 300_000, 200.0
BATCH, BATCHES = 1024, 200  # records of a batch when reading, batches timed


# ---- what is tokenised -------------------------------------------------------------------------------------------


def architecture(width: int | None) -> TokenizerArchitecture:
    """The recipe's tokenizer, or one so narrow that decoding the JPEG matters."""
    if width is None:
        cfg = load_recipe("imagenet256-tokenizer", []).tokenizer
        assert cfg is not None
        return TokenizerArchitecture(autoencoder=cfg.autoencoder, schedule=cfg.schedule, quantizer=cfg.quantizer)
    auto = AutoencoderConfig(width=width, res_blocks=1, attention=False, groups=4, channels=8)
    return TokenizerArchitecture(
        autoencoder=auto, schedule=ScheduleConfig(), quantizer=QuantizerConfig(codes=256, steps=4)
    )


def jpegs(root: Path, count: int, side: int) -> None:
    """Two class folders of smooth random JPEGs of side × 3/4 side."""
    random = np.random.default_rng(0)
    for place in range(count):
        path = root / f"{place % 2}" / f"{place:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(random.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        small.resize((side, side * 3 // 4), Image.Resampling.BICUBIC).save(path, quality=90)


class Repeated(ImageSource):
    """The images of a folder again and again, until there are so many."""

    def __init__(self, source: ImageSource, count: int) -> None:
        self.source, self.spec, self.class_names = source, source.spec, source.class_names or ["all"]
        places = [place % len(source) for place in range(count)]
        self.names = [source.names[place] for place in places]
        self.labels = [source.labels[place] if source.labels else 0 for place in places]

    def open(self, index: int) -> Image.Image:
        return self.source.open(index % len(self.source))

    def pixels(self, index: int, size: int, draft: bool = False) -> NDArray[np.uint8]:
        return self.source.pixels(index % len(self.source), size, draft)


class Subject:
    """A source and a tokenizer with its plan."""

    def __init__(self, source: ImageSource, width: int | None, draft: bool) -> None:
        torch.manual_seed(0)
        self.source = source
        tokenizer = Tokenizer(architecture(width))
        buffer = io.BytesIO()
        torch.save(model.pack(tokenizer, class_names=[], provenance={}), buffer)
        self.file, self.tokenizer = buffer.getvalue(), tokenizer.eval().requires_grad_(False)
        digest = modelfile.model_digest(self.tokenizer.state_dict(), {})
        self.plan = encode.make_plan(
            source, self.tokenizer, digest, views=1, flip=False, latents=False, seed=0, shard_images=4096,
            device=torch.device("cpu"), draft=draft,
        )  # fmt: skip

    def store(self, workers: int) -> tuple[float, float]:
        """Make the store, without the look at 16 images in the end. -> wall and CPU seconds, workers included."""
        with tempfile.TemporaryDirectory() as name, unittest.mock.patch.object(make, "measure", return_value=()):
            start, before = time.perf_counter(), cpu_seconds()
            work = Work(workers=workers)
            for _ in make.write_store(
                Path(name) / "codes", self.source, self.tokenizer, self.file, self.plan, {}, work
            ):
                pass
            return time.perf_counter() - start, cpu_seconds() - before


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


# ---- the parts and the whole -------------------------------------------------------------------------------------


def parts(subject: Subject) -> dict[str, Callable[[], Any]]:
    """What a micro-batch goes through, each part alone."""
    plan, tokenizer, source = subject.plan, subject.tokenizer, subject.source
    part = encode.parts(plan, 0)[0]
    prepared = encode.prepare(source, plan, part)
    z = tokenizer.latents(to_model(prepared.pixels_BCHW))
    found = encode.encode(prepared, tokenizer, plan)
    shape, indices = tokenizer.latent_shape, list(part)
    arrays: dict[str, NDArray[Any]] = {
        "codes": found.codes[:, 0], "labels": np.zeros(len(part), np.int32), "index": np.array(part)
    }  # fmt: skip
    folder = tempfile.mkdtemp()
    return {
        "decode and crop": lambda: [source.pixels(i, plan.resolution, bool("draft" in plan.transform)) for i in part],
        "noise": lambda: noise.normal_steps("encode", 0, indices, [0] * len(part), plan.steps, shape),
        "encode": lambda: tokenizer.latents(to_model(prepared.pixels_BCHW)),
        "quantise": lambda: tokenizer.quantizer.encode(z, prepared.eps_VBTCHW[0]),
        "write": lambda: writing.write_shard(Path(folder), 0, arrays, []),
    }


@torch.no_grad()
def bench_pipeline(subject: Subject, rounds: int, workers: int) -> None:
    """Images/s of each part, their sum, and of the whole command's work with one process and with several."""
    count, width = len(subject.source), subject.tokenizer.cfg.autoencoder.width
    print(
        f"tokenise at 256×256, width {width}: micro-batch {subject.plan.micro_batch}, {rounds} rounds, {count} images"
    )
    jobs, taken = parts(subject), {}
    size = len(encode.parts(subject.plan, 0)[0])
    turns = [[_seconds(job) / size for job in jobs.values()] for _ in range(rounds + 1)][1:]
    for name, column in zip(jobs, zip(*turns, strict=True), strict=True):
        taken[name] = statistics.median(column)
    total, slowest = sum(taken.values()), max(taken.values())
    rows = [[name, f"{1 / value:.2f}", f"{value / total:.1%}", ""] for name, value in taken.items()]
    rows.append(["the parts one after the other", f"{1 / total:.2f}", "", ""])
    for number in dict.fromkeys([1, workers]):
        wall, cpu = subject.store(number)
        whole = cpu / count
        goal = verdict((slowest if slowest / total > SLOWEST else total) / whole >= SLOWEST)
        told = (
            f"{count / wall:.2f} wall; {total / whole:.0%} of the parts, {slowest / whole:.0%} of the slowest: {goal}"
        )
        rows.append([f"a whole store, {number} process{'es' * (number > 1)}", f"{1 / whole:.2f}", "", told])
    table(["", "images/s/core", "share", ""], rows)


def _seconds(job: Callable[[], Any]) -> float:
    start = time.thread_time()
    job()
    return time.thread_time() - start


# ---- bytes an image ----------------------------------------------------------------------------------------------


def npy(array: NDArray[Any]) -> int:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return len(buffer.getvalue())


def npz(**arrays: NDArray[Any]) -> int:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return len(buffer.getvalue())


def bench_bytes() -> None:
    """Files as each project writes them, in memory; on a disk a file takes whole blocks of 4 KiB."""
    rows = []
    plan = synthetic_plan(4096)
    heads = 3 * 128 / plan.shard_images
    kept = plan.model_copy(update={"latents": True})
    label = npy(np.zeros((1,), np.int64))
    moments = np.zeros((32, 16, 16), np.float32)
    cases: list[tuple[str, list[float], str]] = [
        ("rdpm, T = 10, a view", [plan.image_bytes() + heads], "shards of 4,096 images"),
        ("rdpm, T = 10, plain and mirrored", [2 * plan.image_bytes() + heads], "shards of 4,096 images"),
        ("rdpm, with latents z (fp16)", [kept.image_bytes() + heads + 128 / 4096], "shards of 4,096 images"),
        (
            "LlamaGen, 256 tokens",
            [npy(np.zeros((1, 2, 256), np.int64)), label],
            "int64, plain and mirrored; label",
        ),
        (
            "the same for T = 10",
            [npy(np.zeros((1, 2, 2560), np.int64)), label],
            "int64, plain and mirrored; label",
        ),
        ("MAR, KL-16 moments", [npz(moments=moments, moments_flip=moments)], "fp32 .npz, plain and mirrored"),
        ("raw latents, C = 32, fp16", [npy(np.zeros((32, 16, 16), np.float16))], "a .npy an image"),
    ]
    for name, sizes, what in cases:
        bare = sum(sizes)
        disk = bare if "shards" in what else sum(-(-size // 4096) * 4096 for size in sizes)
        files_ = f"{3 + ('latents' in name)} / 4,096" if "shards" in what else str(len(sizes))
        rows.append([name, f"{bare:,.0f}", f"{disk:,.0f}", files_, f"{disk * 1_281_167 / 1e9:.1f}", what])
    table(["bytes an image", "content", "on disk", "files", "ImageNet, GB", ""], rows)


# ---- reading -----------------------------------------------------------------------------------------------------


def synthetic_plan(count: int) -> Plan:
    """T = 10, 16×16, K = 4096, C = 32."""
    data = DataOrigin(source="synthetic", count=count, digest="0" * 64)
    return Plan(
        tokenizer="0" * 64, steps=10, grid=(16, 16), codes=4096, channels=32, views=1, flip=False, latents=False,
        seed=0, noise=tuple(noise.fingerprint(0)), transform="adm-center-crop", resolution=256, class_names=("a", "b"),
        data=data, device="cpu", precision="fp32", micro_batch=8, shard_images=4096,
    )  # fmt: skip


def synthetic_store(root: Path, count: int) -> None:
    """So many records of random codes, without checksums."""
    plan, shards = synthetic_plan(count), []
    block = np.random.default_rng(0).integers(0, 4096, (plan.shard_images, 10, 16, 16), dtype=np.uint16)
    root.mkdir()
    for shard in range(plan.shard_count):
        index = np.array(plan.shard_range(shard))
        block[:, 0, 0, 0] = shard % 4096
        arrays: dict[str, NDArray[Any]] = {"codes": block[: len(index)], "labels": (index % 2).astype(np.int32)}
        arrays["index"] = index
        for kind, name in shard_files(shard, False).items():
            np.save(root / name, arrays[kind])
        sums = dict.fromkeys(shard_files(shard, False).values(), "0" * 64)
        shards.append(Shard(images=len(index), rows=len(index), sha256=sums))
    table_ = {"images": count, "rows": count, "bad": 0, "samples": (), "files": {}, "shards": tuple(shards)}
    writing.finish(root, Manifest(**plan.model_dump(), **table_))


def own_memory() -> float:
    """MB of this process that are no pages of a file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("RssAnon"))


def forget(root: Path) -> None:
    """Ask the system to drop the store from its cache."""
    for path in root.glob("*.npy"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def bench_reading(folder: Path | None, count: int) -> None:
    """Random batches of 1,024 records from a store of so many; the noise of an image apart."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        root = Path(name) / "codes"
        synthetic_store(root, count)
        forget(root)
        store, random = CodeStore(root), np.random.default_rng(0)
        size = sum(path.stat().st_size for path in root.iterdir()) / 1e9
        print(f"reading {count:,} records, {size:.2f} GB, {len(store.manifest.shards)} shards, {BATCH} a batch")
        wanted = [random.integers(0, len(store), BATCH) for _ in range(BATCHES)]
        start = time.perf_counter()
        for rows in wanted[:8]:
            store.codes(rows)
        cold = 8 * BATCH / (time.perf_counter() - start)
        for path in root.glob("codes-*"):  # warm
            path.read_bytes()
        before, rates = own_memory(), []
        for _ in range(5):
            start = time.thread_time()
            for rows in wanted:
                store.codes(rows)
                store.labels[rows]
            rates.append(BATCHES * BATCH / (time.thread_time() - start))
        warm, grown = statistics.median(rates[1:]), own_memory() - before
    shape, spent = (32, 16, 16), []
    for turn in range(9):
        start = time.thread_time()
        noise.normal_rows("encode", 0, range(turn, turn + 256), [0] * 256, [turn + 1] * 256, shape)
        spent.append(1e6 * (time.thread_time() - start) / 256)
    eps = statistics.median(spent)
    table(
        ["", "", "goal", ""],
        [
            ["warm, records a CPU second", f"{warm:,.0f}", f"{RECORDS_A_SECOND:,}", verdict(warm >= RECORDS_A_SECOND)],
            ["cold, records/s", f"{cold:,.0f}", "", "advised at random" if store.exceeds_memory else "not advised"],
            ["memory grown, MB", f"{grown:.1f}", "flat", verdict(grown < 50)],
            ["noise of one t, µs an image", f"{eps:.0f}", f"{EPS_MICROSECONDS:g}", verdict(eps <= EPS_MICROSECONDS)],
        ],
    )


# ---- by hand -----------------------------------------------------------------------------------------------------


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["recipe", "narrow", "bytes", "reading"], help="one part (default: all)")
    parser.add_argument("--images", type=Path, help="folder of real images, repeated (default: generated JPEGs)")
    parser.add_argument("--count", type=int, default=16, help="images through the recipe's tokenizer")
    parser.add_argument("--narrow-count", type=int, default=512, help="images through a narrow one")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds of the parts")
    parser.add_argument("--workers", type=int, default=crew.cores(), help="processes of the second whole store")
    parser.add_argument("--draft", action="store_true", help="let JPEG decode at a reduced scale")
    parser.add_argument("--records", type=int, default=1_000_000, help="records of the store that is read")
    parser.add_argument("--folder", type=Path, help="where that store is made (5 GB; default: the temporary folder)")
    return parser.parse_args()


def sources(chosen: argparse.Namespace, folder: Path) -> Iterator[tuple[str, Callable[[], Subject]]]:
    """(part, its subject): the recipe's tokenizer, and a narrow one."""
    if chosen.images is None:
        jpegs(folder, 64, 500)
    found = open_source(str(chosen.images or folder))
    for part, count, width in (("recipe", chosen.count, None), ("narrow", chosen.narrow_count, 8)):
        yield part, functools.partial(Subject, Repeated(found, count), width, chosen.draft)


def main() -> None:
    chosen = options()
    tune_allocator()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, one thread, {crew.cores()} cores\n")
    with tempfile.TemporaryDirectory() as folder:
        for part, subject in sources(chosen, Path(folder)):
            if chosen.only in (None, part):
                bench_pipeline(subject(), chosen.rounds if part == "recipe" else 3 * chosen.rounds, chosen.workers)
    if chosen.only in (None, "bytes"):
        bench_bytes()
    if chosen.only in (None, "reading"):
        bench_reading(chosen.folder, chosen.records)
    if not torch.cuda.is_available():
        print("no CUDA device: a GPU fed by decode workers was not measured")


if __name__ == "__main__":
    main()

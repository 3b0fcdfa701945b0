"""Code stores for tests: one in the making, from images in memory, and one of random latents on any grid.

Legend: n items, T steps, C channels, S = prod(grid) positions."""

import math
from collections.abc import Collection, Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rdpm_cli import noise
from rdpm_cli.codes import write
from rdpm_cli.codes.store import NAMES, TOKENIZER, CodeStore, DataOrigin, Plan, json_lines
from rdpm_cli.codes.write import MicroBatch, StoreOptions, Work, make_plan, tabulate, write_shard, write_store
from rdpm_cli.data.source import Source
from rdpm_cli.tokenizer import model
from rdpm_cli.tokenizer.quantizer import Quantizer

NOT_THE_STORE = {".lock", ".lock.owner", ".claim.lock", "run.json"}


class MemoryImages(Source):
    """Small random images of three classes, image i a function of i. bad: those that cannot be read."""

    def __init__(self, count: int, bad: Collection[int] = (), side: int = 16) -> None:
        self.spec, self.bad, self.side = f"memory:{count}", set(bad), side
        self.class_names = ["a", "b", "c"]
        self.labels = [index * 3 // count for index in range(count)]
        self.names = [f"{self.class_names[label]}/{index:05d}.png" for index, label in enumerate(self.labels)]

    def open(self, index: int) -> Image.Image:
        if index in self.bad:
            raise OSError(f"image file is truncated <object at 0x{id(self):x}>")
        pixels = np.random.default_rng(index).integers(0, 256, (self.side, self.side, 3), dtype=np.uint8)
        return Image.fromarray(pixels)


class Making:
    """A store to be written, in pieces as a signal may cut them."""

    def __init__(self, root: Path, source: Source, tokenizer_file: Path, **settings: Any) -> None:
        self.root, self.source, self.file = root, source, tokenizer_file
        self.tokenizer, content = model.load(tokenizer_file)
        options: dict[str, Any] = {"views": 2, "latents": True, "shard_images": 10, **settings}
        micro_batch = options.pop("micro_batch", None)
        work = ("workers", "on_bad", "max_bad", "shards", "make", "stopped")
        self.work = Work(**{key: options.pop(key) for key in work if key in options})
        self.plan = make_plan(source, self.tokenizer, content["digest"], StoreOptions(**options), torch.device("cpu"))
        if micro_batch:  # which only a GPU's store may choose
            self.plan = self.plan.model_copy(update={"micro_batch": micro_batch})

    def run(self) -> Generator[int, None, None]:
        """Write what is missing, a piece at a time."""
        return write_store(self.root, self.source, self.tokenizer, self.file.read_bytes(), self.plan, self.work)

    def cut(self, pieces: int) -> None:
        """Write some pieces of what is missing, then stop."""
        running = self.run()
        for _ in range(pieces):
            next(running)
        running.close()

    def finish(self) -> CodeStore:
        """Write all that is missing."""
        assert sum(self.run()) == self.plan.data.count
        return CodeStore(self.root)


def content(root: Path) -> dict[str, bytes]:
    """The files that are the store."""
    return {path.name: path.read_bytes() for path in root.iterdir() if path.name not in NOT_THE_STORE}


def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The source indices that this process encodes from now on."""
    indices: list[int] = []
    original = write.prepare_and_encode

    def spy(source: Source, tokenizer: model.Tokenizer, plan: Plan, batch: range) -> MicroBatch:
        indices.extend(batch)
        return original(source, tokenizer, plan, batch)

    monkeypatch.setattr(write, "prepare_and_encode", spy)
    return indices


def flip(path: Path, position: int = -1) -> None:
    """Flip the bits of one byte of a file."""
    data = bytearray(path.read_bytes())
    data[position] ^= 0xFF
    path.write_bytes(data)


def synthetic_plan(count: int, grid: tuple[int, ...], **fields: Any) -> Plan:
    """The plan of a store that no source was coded into."""
    sizes: dict[str, Any] = {"steps": 4, "codes": 64, "channels": 4, "views": 1, "shard_images": 25, "latents": True}
    data = DataOrigin(source=f"synthetic:{count}", count=count, digest="0" * 64)
    return Plan(
        tokenizer="1" * 64, grid=grid, flip=False, seed=0, noise=tuple(noise.fingerprint(0)), transform="none",
        resolution=1, class_names=("a", "b", "c"), data=data, device="cpu", precision="fp32", micro_batch=1,
        **{**sizes, **fields},
    )  # fmt: skip


@torch.no_grad()
def latent_store(root: Path, quantizer: Quantizer, channels: int, count: int = 60, views: int = 2) -> CodeStore:
    """A finished store of random latents on the quantiser's grid, of three classes, in shards of 25."""
    grid, steps, shape = quantizer.grid, quantizer.steps, (channels, math.prod(quantizer.grid))
    plan = synthetic_plan(count, grid, views=views, steps=steps, codes=quantizer.cfg.codes, channels=channels)
    z_NCS = torch.randn(count, *shape, generator=torch.Generator().manual_seed(0)).half().float()
    root.mkdir(parents=True)
    (root / TOKENIZER).write_bytes(b"none")
    (root / NAMES).write_bytes(json_lines({"index": index, "name": str(index)} for index in range(count)))
    for shard, items in enumerate(plan.shard_ranges):
        index = np.repeat(np.arange(items.start, items.stop), views)
        view = np.tile(np.arange(views), len(items))
        eps = noise.normal_steps("encode", 0, index.tolist(), view.tolist(), steps, shape)
        codes = quantizer.encode(z_NCS[index], torch.from_numpy(eps)).numpy()
        arrays: dict[str, Any] = {
            "codes": codes.astype(np.uint16).reshape(len(index), steps, *grid),
            "labels": (index % 3).astype(np.int32),
            "index": index.astype(np.int64),
            "latents": z_NCS[items.start : items.stop].half().numpy().reshape(len(items), channels, *grid),
        }
        write_shard(root, shard, arrays, [])
    tabulate(root, plan).write(root)
    return CodeStore(root)

"""What several test files share: comparisons of two runs, a tiny tokenizer, a store in the making."""

from collections.abc import Collection, Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from rdpm_cli.codes import encode, make
from rdpm_cli.codes.encode import Encoded
from rdpm_cli.codes.manifest import Plan
from rdpm_cli.codes.store import CodeStore
from rdpm_cli.codes.work import Work
from rdpm_cli.config import RDPMSampling, TokenizerConfig
from rdpm_cli.generator.contract import SampleOptions
from rdpm_cli.images.sources import ImageSource, open_source
from rdpm_cli.signals import StopRequest
from rdpm_cli.tokenizer import model
from rdpm_cli.tokenizer.model import Tokenizer
from rdpm_cli.tokenizer.task import ImageBatches, Players, players_of
from rdpm_cli.training import checkpoint
from rdpm_cli.training.logging import read_metrics
from rdpm_cli.training.loop import Batches, Run, fit

CPU = torch.device("cpu")


def sampling_options(seed: int = 0, **sampling: Any) -> SampleOptions:
    """RDPM's, by field."""
    return SampleOptions(RDPMSampling(**sampling), seed)


def newest_state(folder: Path) -> dict[str, Any]:
    state = checkpoint.load_newest(folder / "checkpoints", CPU)
    assert state is not None
    return state


def leaves(value: Any, name: str = "") -> dict[str, Any]:
    """Every leaf of nested dicts and lists, by its path."""
    if isinstance(value, dict):
        items = [(str(k), v) for k, v in value.items()]
    elif isinstance(value, list | tuple):
        items = [(str(k), v) for k, v in enumerate(value)]
    else:
        return {name: value}
    return {k: v for key, inner in items for k, v in leaves(inner, f"{name}/{key}").items()}


def assert_same(found: Any, wanted: Any) -> None:
    """Bitwise equal, leaf by leaf."""
    a, b = leaves(found), leaves(wanted)
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]) if isinstance(value, Tensor) else value == b[name], name


MACHINE = {"images_per_second", "flops_per_second", "utilisation", "memory_gib"}


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The log without what depends on the clock and the machine."""
    return [{k: v for k, v in row.items() if k not in MACHINE} for row in read_metrics(folder)]


def distance(found: Tensor, wanted: Tensor) -> float:
    """Relative distance of two tensors: sums in another order flip a near-tie of a code now and then, no more."""
    return float((found.float() - wanted.float()).norm() / wanted.float().norm().clamp_min(1e-6))


# ---- a tokenizer so small that a step takes milliseconds ----------------------------------------------------------

TINY: dict[str, Any] = {
    "autoencoder": {
        "resolution": 16, "width": 8, "multipliers": [1, 1, 2], "res_blocks": 1, "attention": False, "groups": 4,
        "channels": 4,
    },
    "schedule": {"kind": "sin"},
    "quantizer": {"codes": 32, "steps": 2, "decay": 0.5},
    "loss": {"adversarial": "hinge"},
    "discriminator": {"width": 8, "layers": 2},
    "train": {"batch": 16, "steps": 4, "lr": 1e-3, "ema": 0.9, "log_every": 1},
}  # fmt: skip


def tiny_config(**sections: dict[str, Any]) -> TokenizerConfig:
    """TINY, a tokenizer with a critic, with some fields of its sections changed."""
    return TokenizerConfig.model_validate({**TINY, **{name: {**TINY[name], **more} for name, more in sections.items()}})


def tiny_players(cfg: TokenizerConfig, seed: int = 0) -> Players:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return players_of(Tokenizer(cfg, cfg.loss.weight).train(), cfg, CPU)


def digits(cfg: TokenizerConfig) -> ImageBatches:
    return ImageBatches(open_source("digits"), cfg, 0)


def train(players: Players, cfg: TokenizerConfig, folder: Path, batches: Batches | None = None) -> Run:
    """Fit the players on the digits in a folder."""
    folder.mkdir(exist_ok=True)
    run = Run(folder, 0, CPU, cfg.train.total_steps(1000), cfg.train.warmup(1000), StopRequest())
    fit(players, batches or digits(cfg), cfg.train, run)
    return run


# ---- a code store in the making ------------------------------------------------------------------------------------

NOT_THE_STORE = {".lock", ".lock.owner", "run.json"}


class MemoryImages(ImageSource):
    """Small random images of three classes, image i a function of i. bad: those that cannot be read."""

    def __init__(self, count: int, bad: Collection[int] = (), side: int = 16) -> None:
        self.spec, self.bad, self.side = f"memory:{count}", set(bad), side
        self.class_names = ["a", "b", "c"]
        self.labels = [place * 3 // count for place in range(count)]
        self.names = [f"{self.class_names[label]}/{place:05d}.png" for place, label in enumerate(self.labels)]

    def open(self, index: int) -> Image.Image:
        if index in self.bad:
            raise OSError(f"image file is truncated <object at 0x{id(self):x}>")
        pixels = np.random.default_rng(index).integers(0, 256, (self.side, self.side, 3), dtype=np.uint8)
        return Image.fromarray(pixels)


class Making:
    """A store to be written, in pieces as a signal may cut them."""

    def __init__(self, root: Path, source: ImageSource, tokenizer_file: Path, **settings: Any) -> None:
        self.root, self.source, self.file = root, source, tokenizer_file
        self.tokenizer, content = model.load(tokenizer_file)
        wanted: dict[str, Any] = {"views": 2, "flip": False, "latents": True, "seed": 0, "shard_images": 10, **settings}
        small = wanted.pop("micro_batch", None)
        self.work = Work(**{key: wanted.pop(key) for key in ("workers", "on_bad", "max_bad") if key in wanted})
        device = torch.device("cpu")
        self.plan = encode.make_plan(source, self.tokenizer, content["digest"], device=device, **wanted)
        if small:
            self.plan = self.plan.model_copy(update={"micro_batch": small})

    def run(self) -> Generator[int, None, None]:
        """Write what is missing, a piece at a time."""
        file = self.file.read_bytes()
        return make.write_store(self.root, self.source, self.tokenizer, file, self.plan, {}, self.work)

    def finish(self) -> CodeStore:
        """Write what is missing."""
        assert sum(self.run()) == self.plan.data.count
        return CodeStore(self.root)


def content(root: Path) -> dict[str, bytes]:
    """The files that are the store."""
    return {p.name: p.read_bytes() for p in root.iterdir() if p.name not in NOT_THE_STORE}


def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The source indices that are encoded from now on."""
    seen: list[int] = []
    original = encode.encode_part

    def spy(source: ImageSource, tokenizer: Tokenizer, plan: Plan, part: range) -> Encoded:
        seen.extend(part)
        return original(source, tokenizer, plan, part)

    monkeypatch.setattr(encode, "encode_part", spy)
    return seen

"""Stand-ins for tests of scores: random images, sets of them, an extractor of block means, untrained judges.

Legend: B batch, N images, H W sides."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import leaves
from numpy.typing import NDArray
from torch import Tensor

from rdpm_cli import checkpoint
from rdpm_cli.cli.app import run
from rdpm_cli.data.folder import ImageSet
from rdpm_cli.evaluation import judge
from rdpm_cli.evaluation.features import Activations
from rdpm_cli.evaluation.judge import Judge

CPU = torch.device("cpu")
SIDE = 16
Images = NDArray[np.uint8]


def pixels(count: int, seed: int = 0, side: int = SIDE) -> Images:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def image_set(images: Images, labels: list[int] | None = None, names: Iterable[str] = "abc") -> ImageSet:
    def read(pieces: Iterable[range]) -> Iterator[Images]:
        return (images[piece.start : piece.stop] for piece in pieces)

    return ImageSet("images", len(images), images.shape[1], labels, list(names), read)


class Blocks:
    """Means of quarters as features, mean colours as logits, means of rows as spatial features."""

    def __init__(self, name: str = "inception-2015-12-05", class_names: Iterable[str] = ()) -> None:
        self.name, self.sha256, self.note, self.device = name, "6" * 64, "", CPU
        self.class_names = list(class_names)
        self.accuracy: float | None = None
        self.classes, self.width, self.spatial_width = 3, 12, SIDE
        self.resolution: int | None = None
        self.factor_layer: torch.nn.Module | None = None
        self.extracted = 0  # images so far

    def __call__(self, pixels_BCHW: Tensor) -> Activations:
        self.extracted += len(pixels_BCHW)
        x = pixels_BCHW.float() / 255
        quarters = x.unfold(2, 8, 8).unfold(3, 8, 8).mean((4, 5)).flatten(1)  # (B, 12)
        return Activations(quarters, 40 * x.mean((2, 3)), x.mean((1, 3)))


def make_judge(seed: int = 0, classes: int = 3) -> Judge:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Judge(SIDE, 8, 6, classes).eval()


def save_judge(path: Path, seed: int = 0, names: Iterable[str] = "abc") -> Path:
    """The file of an untrained judge of three classes."""
    network, extra = make_judge(seed), {"class_names": list(names), "provenance": {"heldout_accuracy": 0.25}}
    checkpoint.save(path, checkpoint.pack(judge.KIND, network.config, network, **extra))
    return path


def answer(capsys: pytest.CaptureFixture[str], *args: object) -> dict[str, Any]:
    """`rdpm eval ARGS` as JSON."""
    assert run(["eval", *map(str, args), "--device", "cpu", "--quiet", "--json"]) == 0
    values: dict[str, Any] = json.loads(capsys.readouterr().out)
    return values


def assert_close(values: dict[str, Any], expected: dict[str, Any]) -> None:
    """Equal leaf by leaf, floats to 1e-6."""
    a, b = leaves(values), leaves(expected)
    assert a.keys() == b.keys()
    for name, value in b.items():
        assert a[name] == (pytest.approx(value, rel=1e-6, abs=1e-9) if isinstance(value, float) else value), name

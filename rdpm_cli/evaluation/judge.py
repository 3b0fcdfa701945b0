"""The judge: a small classifier of real images, an honest extractor where Inception says little (small data sets)."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdpm_cli import modelfile, noise
from rdpm_cli.codes.store import held_out
from rdpm_cli.config import JudgeConfig
from rdpm_cli.errors import DataError, some_of
from rdpm_cli.evaluation.reference import open_images
from rdpm_cli.images.sources import ImageSource, PartOfSource
from rdpm_cli.images.tensors import chw, to_model
from rdpm_cli.step import TrainStep

KIND = "rdpm-judge"
GROUPS = 8  # of every GroupNorm
HELD_OUT_PERCENT = 10  # of a source, where no other images are given


class Residual(nn.Module):
    """Two convolutions beside an identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        layers = (_convolution(channels, channels), nn.Conv2d(channels, channels, 3, padding=1))
        self.body = nn.Sequential(*layers[0], layers[1], nn.GroupNorm(GROUPS, channels))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """The same shape."""
        return F.silu(x_BCHW + self.body(x_BCHW))


def _convolution(inner: int, outer: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(inner, outer, 3, stride=stride, padding=1), nn.GroupNorm(GROUPS, outer), nn.SiLU()]


class Judge(nn.Module):
    """Convolutions and halvings down to 8×8 or less (two at least), a feature layer, a class layer."""

    def __init__(self, resolution: int, width: int, features: int, classes: int, blocks: int = 0) -> None:
        """resolution: of the images it is trained on, pixels a side. blocks: residual ones after each halving."""
        super().__init__()
        self.config = {
            "resolution": resolution, "width": width, "features": features, "classes": classes, "blocks": blocks,
        }  # fmt: skip
        channels = width
        layers = _convolution(3, channels)
        for place in range(max(2, math.ceil(math.log2(resolution / 8)))):
            inner, channels = channels, (2 if place < 2 else 4) * width
            layers += [*_convolution(inner, channels, 2), *(Residual(channels) for _ in range(blocks))]
        layers += [nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Dropout(0.3)]
        self.body = nn.Sequential(*layers, nn.Linear(16 * channels, features), nn.SiLU())
        self.classes = nn.Linear(features, classes)

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """x in [-1, 1] -> penultimate features (B, features), logits (B, classes)."""
        features = self.body(x_BCHW)
        return features, self.classes(features)


@dataclass
class LabelledImages:
    """A batch of images with their classes."""

    pixels_BCHW: Tensor
    labels_B: Tensor

    def to(self, device: torch.device) -> "LabelledImages":
        """The same batch on a device."""
        return LabelledImages(self.pixels_BCHW.to(device), self.labels_B.to(device))


class JudgeBatches:
    """batch_at(step, rows) of real images, each shifted by up to a sixteenth of its side; cfg.flip mirrors half."""

    def __init__(self, source: ImageSource, cfg: JudgeConfig, resolution: int, seed: int) -> None:
        self.source, self.cfg, self.resolution, self.seed = source, cfg, resolution, seed
        self.reach = max(1, resolution // 16)

    def batch_at(self, step: int, rows: range) -> LabelledImages:
        """rows: this process's rows of the global batch."""
        own = self._indices(step, rows)
        uniform = noise.block_uniform(self.seed, step, rows, 3 if self.cfg.flip else 2)
        shifts = (uniform[:, :2] * (2 * self.reach + 1)).astype(int) - self.reach
        mirrored = uniform[:, 2] < 0.5 if self.cfg.flip else np.zeros(len(own), dtype=bool)
        images = []
        for index, (dy, dx), mirror in zip(own, shifts, mirrored, strict=True):
            padded = np.pad(
                self.source.pixels(int(index), self.resolution), ((self.reach,) * 2,) * 2 + ((0, 0),), "edge"
            )
            y, x = self.reach + dy, self.reach + dx
            shifted = padded[y : y + self.resolution, x : x + self.resolution]
            images.append(shifted[:, ::-1] if mirror else shifted)
        labels = self.source.need_labels()
        return LabelledImages(chw(np.stack(images)), torch.tensor([labels[int(i)] for i in own]))

    def describe(self, step: int, rows: range) -> str:
        """The names of those images."""
        return f"images {some_of(self.source.names[int(i)] for i in self._indices(step, rows))}"

    def _indices(self, step: int, rows: range) -> noise.Ints:
        return noise.epoch_rows(self.seed, step, self.cfg.train.batch, len(self.source))[rows.start : rows.stop]


class JudgeTask:
    """Cross-entropy on real images; never sees a sample."""

    name = "judge"
    start = 0

    def __init__(self, judge: Judge) -> None:
        self.model = judge

    def networks(self) -> list[nn.Module]:
        """The whole."""
        return [self.model]

    def loss(self, batch: LabelledImages, step: TrainStep) -> tuple[Tensor, dict[str, Tensor]]:
        """-> loss and accuracy."""
        _, logits = self.model(to_model(batch.pixels_BCHW))
        loss = F.cross_entropy(logits, batch.labels_B)
        return loss, {"accuracy": (logits.argmax(1) == batch.labels_B).float().mean()}

    def after_step(self, step: TrainStep) -> dict[str, Tensor]:
        """Nothing follows a step."""
        return {}


def split(source: ImageSource) -> tuple[ImageSource, ImageSource]:
    """(to train on, held out): about 10% of the images, by a hash of the source index. Raises DataError for too few."""
    held = held_out(np.arange(len(source)), HELD_OUT_PERCENT)
    if held.all() or not held.any():
        raise DataError(f"{source.spec} holds {len(source)} images, too few to hold some out", "give --heldout IMAGES")
    note = f"{HELD_OUT_PERCENT}% of the images, by a hash of the index"
    rest = PartOfSource(source, np.flatnonzero(~held).tolist(), f"without {note}")
    return rest, PartOfSource(source, np.flatnonzero(held).tolist(), note)


@torch.no_grad()
def accuracy(judge: Judge, source: ImageSource, device: torch.device) -> float:
    """Share of a source's images that the judge puts into their class."""
    batches = open_images(source, int(judge.config["resolution"])).batches
    predicted = [judge(to_model(chw(pixels)).to(device))[1].argmax(1).cpu().numpy() for pixels in batches]
    return float(np.mean(np.concatenate(predicted) == np.array(source.need_labels())))


def pack(judge: Judge, class_names: list[str], **more: Any) -> dict[str, Any]:
    """The content of a judge's file. more: provenance, with its held-out accuracy."""
    return modelfile.pack(KIND, judge.config, judge, class_names=class_names, **more)


def load(path: Path) -> tuple[Judge, dict[str, Any]]:
    """The judge of a file, frozen, and the file's content. Raises CheckpointError."""
    content = modelfile.load(path, KIND)
    judge = Judge(**content["config"])
    modelfile.fill(judge, content, str(path))
    return judge.eval().requires_grad_(False), content

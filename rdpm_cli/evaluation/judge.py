"""The judge: a small classifier of real images. Its features score samples where Inception says little (small data).

Legend: B batch, K classes, D feature width."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from rdpm_cli import checkpoint, noise
from rdpm_cli.codes.store import held_out
from rdpm_cli.data.labels import match_classes
from rdpm_cli.data.pixels import Pixels, chw, to_model
from rdpm_cli.data.source import ItemSource, Source, Subset
from rdpm_cli.distributed import TrainStep
from rdpm_cli.errors import CheckpointError, DataError, some_of
from rdpm_cli.evaluation import factors
from rdpm_cli.evaluation.factors import PREDICTED
from rdpm_cli.schema import Section
from rdpm_cli.training.config import TrainConfig
from rdpm_cli.training.loop import DeviceBatch, Player

KIND = "rdpm-judge"
GROUPS = 8  # of every GroupNorm
HELD_OUT_PERCENT = 10  # of a source, where no held-out images are named
BATCH = 64  # images a forward pass
FACTOR_WEIGHT = 5.0  # of the factors' squared error next to the cross-entropy: both fall, neither waits for the other


class JudgeConfig(Section):
    """A small classifier of real images, whose features score samples where Inception says little."""

    width: int = Field(32, gt=0, multiple_of=8, description="channels of the first layer")
    blocks: int = Field(0, ge=0, description="residual blocks after each halving; 1 or 2 for photographs")
    features: int = Field(64, gt=0, description="width of the penultimate layer")
    flip: bool = Field(False, description="mirror training images at random; not for digits and letters")
    train: TrainConfig


class Residual(nn.Module):
    """Two convolutions and an identity connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*_convolution(channels, channels), *_convolution(channels, channels)[:2])

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return F.silu(x_BCHW + self.body(x_BCHW))


def _convolution(inner: int, outer: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(inner, outer, 3, stride=stride, padding=1), nn.GroupNorm(GROUPS, outer), nn.SiLU()]


class Judge(nn.Module):
    """Convolutions and halvings down to 8×8 or less (two at least), a feature layer, a class layer, a factor layer."""

    def __init__(
        self, resolution: int, width: int, features: int, classes: int, blocks: int = 0, factors: bool = False
    ) -> None:
        """resolution: of its training images, pixels a side. blocks: residual blocks after each halving.

        factors: it also learns what the images were drawn from (data/shapes.py)."""
        super().__init__()
        self.resolution, facts = resolution, {"width": width, "features": features, "classes": classes}
        self.config: dict[str, Any] = {"resolution": resolution, **facts, "blocks": blocks}
        channels, layers = width, _convolution(3, width)
        for number in range(max(2, math.ceil(math.log2(resolution / 8)))):
            inner, channels = channels, (2 if number < 2 else 4) * width
            layers += [*_convolution(inner, channels, 2), *(Residual(channels) for _ in range(blocks))]
        # Pooling to 4×4 keeps some idea of place. Dropout would be noise in the factors.
        layers += [nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Dropout(0.0 if factors else 0.3)]
        self.body = nn.Sequential(*layers, nn.Linear(16 * channels, features), nn.SiLU())
        self.classes = nn.Linear(features, classes)
        self.factors = nn.Linear(features, PREDICTED) if factors else None
        if factors:  # absent otherwise, as in the digests of judges before there were factors
            self.config["factors"] = True

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """x in [-1, 1] -> penultimate features (B, D), logits (B, K)."""
        features_BD = self.body(x_BCHW)
        return features_BD, self.classes(features_BD)


def load(path: Path, device: torch.device | str = "cpu") -> tuple[Judge, dict[str, Any]]:
    """The judge of a file, frozen, and the file's content. Raises CheckpointError."""
    content = checkpoint.load(path, KIND)
    judge = Judge(**content["config"])
    checkpoint.fill(judge, content, str(path))
    return judge.eval().requires_grad_(False).to(device), content


@dataclass
class LabelledImages(DeviceBatch):
    """A batch of uint8 images, their classes, and where they are known their factors as the judge predicts them."""

    pixels_BCHW: Tensor
    labels_B: Tensor
    targets_BP: Tensor | None = None


class JudgeBatches:
    """batch_at(step, rows) of real images, each shifted by up to a sixteenth of its side; cfg.flip mirrors half.

    Images with factors stay as they are, since a shift would change their position and a mirror their angle."""

    def __init__(self, source: Source, cfg: JudgeConfig, resolution: int, seed: int) -> None:
        self.source, self.cfg, self.resolution, self.seed = source, cfg, resolution, seed

    def batch_at(self, step: int, rows: range) -> LabelledImages:
        """rows: this process's rows of the global batch."""
        size, known = self.resolution, self.source.factors
        reach = max(1, size // 16) if known is None else 0  # pixels of the largest shift
        flip = self.cfg.flip and known is None
        labels, images, indices = self.source.need_labels(), [], self._indices(step, rows)
        uniform = noise.block_uniform(self.seed, step, rows, 3 if flip else 2)
        shifts = (uniform[:, :2] * (2 * reach + 1)).astype(int)
        for index, (y, x), numbers in zip(indices, shifts, uniform, strict=True):
            padded = np.pad(self.source.pixels(index, size), ((reach, reach), (reach, reach), (0, 0)), "edge")
            shifted = padded[y : y + size, x : x + size]
            images.append(shifted[:, ::-1] if flip and numbers[2] < 0.5 else shifted)
        labels_B = torch.tensor([labels[index] for index in indices])
        targets_BP = None if known is None else torch.from_numpy(factors.encode(known[indices]))
        return LabelledImages(chw(np.stack(images)), labels_B, targets_BP)

    def describe(self, step: int, rows: range) -> str:
        """The names of those images."""
        return f"images {some_of(self.source.names[index] for index in self._indices(step, rows))}"

    def _indices(self, step: int, rows: range) -> list[int]:
        indices: list[int] = noise.epoch_rows(self.seed, step, self.cfg.train.batch, len(self.source), rows).tolist()
        return indices


class JudgeTask(Player):
    """Cross-entropy, and squared error of the factors, on real images. No sample takes part in a judge's training."""

    name = "judge"

    def __init__(self, judge: Judge) -> None:
        self.model = judge

    def loss(self, batch: LabelledImages, step: TrainStep) -> tuple[Tensor, dict[str, Tensor]]:
        """-> loss, and accuracy for the log."""
        features_BD, logits_BK = self.model(to_model(batch.pixels_BCHW))
        loss = F.cross_entropy(logits_BK, batch.labels_B)
        logs = {"accuracy": (logits_BK.argmax(1) == batch.labels_B).float().mean()}
        if batch.targets_BP is not None:
            logs["factor_mse"] = error = F.mse_loss(self.model.factors(features_BD), batch.targets_BP)
            loss = loss + FACTOR_WEIGHT * error
        return loss, logs


def split_indices(source: ItemSource) -> tuple[list[int], list[int]]:
    """Indices of the training items, and of about 10% held out by a hash. Raises DataError for too few items."""
    held = held_out(np.arange(len(source)), HELD_OUT_PERCENT)
    if held.all() or not held.any():
        raise DataError(f"{source.spec} holds {len(source)} items, too few to hold some out", "give --heldout")
    return np.flatnonzero(~held).tolist(), np.flatnonzero(held).tolist()


def split(source: Source) -> tuple[Source, Source]:
    """(training images, about 10% held out by a hash of the source index). Raises DataError for too few images."""
    rest, unseen = split_indices(source)
    note = f"{HELD_OUT_PERCENT}% of the images, by a hash of the index"
    return Subset(source, rest, f"without {note}"), Subset(source, unseen, note)


@torch.no_grad()
def measure(judge: Judge, source: Source, device: torch.device) -> dict[str, Any]:
    """heldout_accuracy: share of a source's images that the judge puts into their class; factor_errors where known."""
    predicted, factors_of = [], []
    for start in range(0, len(source), BATCH):
        indices = range(start, min(start + BATCH, len(source)))
        pixels = np.stack([source.pixels(index, judge.resolution) for index in indices])
        features_BD, logits_BK = judge(to_model(chw(pixels)).to(device))
        predicted += logits_BK.argmax(1).tolist()
        if judge.factors is not None:
            factors_of.append(factors.decode(judge.factors(features_BD).cpu().numpy()))
    accuracy = float(np.mean(np.array(predicted) == np.array(source.need_labels())))
    if source.factors is None or not factors_of:
        return {"heldout_accuracy": accuracy}
    errors = factors.errors(np.concatenate(factors_of), source.factors)
    return {"heldout_accuracy": accuracy, "factor_errors": errors}


def check_size(resolution: int | None, side: int) -> None:
    """Raise DataError for images of another size than a judge's own, at which its features say little. None: any."""
    if resolution not in (None, side):
        message = f"the images are {side}×{side}, and the judge was trained on {resolution}×{resolution}"
        raise DataError(message, f"train one with `rdpm eval judge IMAGES OUT --resolution {side}`")


def class_outputs(
    known: Sequence[str], names: Sequence[str], classes: Iterable[int], owner: str = "the judge"
) -> dict[int, int]:
    """The number that a judge, the owner of the classes `known`, gives to each of these classes of the list `names`.

    Raises CheckpointError for a class that the judge does not know, or whose name stands for several classes."""
    outputs, fault = match_classes(known, names, classes, owner)
    if fault:
        raise CheckpointError(fault, "train a judge on images of the same classes with `rdpm eval judge`")
    return outputs


class ClassJudge:
    """log p(class | image), for best-of-n sampling. name and sha256 go into the record of the samples."""

    def __init__(self, path: str | Path, class_names: Sequence[str], resolution: int, device: torch.device) -> None:
        """class_names, resolution: the generator's. Raises CheckpointError and DataError for a judge of others."""
        self.judge, content = load(Path(path), device)
        check_size(self.judge.resolution, resolution)
        self.device, self.name, self.sha256 = device, f"judge {Path(path).name}", content["digest"]
        known = class_outputs(content["class_names"], class_names, range(len(class_names)))
        self.output_of_class = torch.tensor([known[label] for label in range(len(class_names))])

    @torch.no_grad()
    def __call__(self, pixels_BHWC: Pixels, labels: list[int]) -> NDArray[np.float64]:
        """(B, H, W, 3) uint8 and the labels they were drawn for -> log p, (B,); larger is better."""
        batches = to_model(chw(pixels_BHWC)).split(BATCH)
        log_p_BK = torch.cat([self.judge(batch.to(self.device))[1] for batch in batches]).double().log_softmax(1).cpu()
        return log_p_BK[torch.arange(len(labels)), self.output_of_class[labels]].numpy()

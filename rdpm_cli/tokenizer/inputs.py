"""What a tokenizer codes, images or sound: how items are opened, read, turned into its input, compared and shown.

An item is an array: of an image (H, W, 3) uint8, of a sound its log-mel spectrogram (F, M)."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from rdpm_cli import noise
from rdpm_cli.data import audio, mel
from rdpm_cli.data.open import open_source
from rdpm_cli.data.pixels import EXACT_PSNR, TRANSFORM, Pixels, chw, hwc, to_model, to_pixels, unreadable
from rdpm_cli.data.source import ItemSource
from rdpm_cli.errors import ItemError
from rdpm_cli.tokenizer.config import AutoencoderConfig, MelConfig

Item = NDArray[Any]


class Inputs(ABC):
    """transform: its name in manifests. resolution: of images, pixels a side. rate: of sound, latents a second."""

    transform: str
    resolution = 0
    rate: float | None = None

    @abstractmethod
    def open(self, spec: str, **reading: Any) -> ItemSource:
        """The source that a user names. Raises UsageError and DataError."""

    @abstractmethod
    def read(self, source: Any, index: int) -> Item:
        """An item. Raises ImageError naming one that cannot be read."""

    @abstractmethod
    def blank(self) -> Item:
        """An item without content, in the place of one that cannot be read."""

    @abstractmethod
    def positions(self, item: Item) -> int:
        """S of the item's latent."""

    @abstractmethod
    def unreadable(self, source: str, name: str, reason: str) -> ItemError:
        """The error of the item `name` of `source`, which cannot be read."""

    @abstractmethod
    def blank_batch(self, rows: int) -> Tensor:
        """A training batch without content."""

    @abstractmethod
    def windows(self, source: Any, indices: Sequence[int], uniform_B: noise.Floats, flip: bool) -> Tensor:
        """A training batch: the items, each changed at random by its uniform number in [0, 1)."""

    @abstractmethod
    def to_model(self, items: Tensor) -> Tensor:
        """Stacked items, channels first, as the encoder's input."""

    @abstractmethod
    def tensor(self, items: Sequence[Item]) -> Tensor:
        """Items of one shape, stacked, channels first."""

    @abstractmethod
    def items(self, x: Tensor) -> Item:
        """The decoder's output as stacked items: the inverse of `tensor` and `to_model`."""

    @abstractmethod
    def pixels(self, items: Item) -> Pixels:
        """Stacked items as pictures, (B, H, W, 3)."""

    @abstractmethod
    def fidelity(self, item: Item, other: Item) -> dict[str, float]:
        """How near an item is to its reconstruction."""

    @abstractmethod
    def distance(self, x: Tensor, recon: Tensor) -> Tensor:
        """L_recon, a mean over all values."""


class ImageInputs(Inputs):
    transform = TRANSFORM

    def __init__(self, cfg: AutoencoderConfig) -> None:
        self.resolution = cfg.resolution
        self.grid = cfg.grid

    def open(self, spec: str, **reading: Any) -> ItemSource:
        return open_source(spec, **reading)

    def read(self, source: Any, index: int) -> Item:
        return source.pixels(index, self.resolution)

    def blank(self) -> Item:
        return np.zeros((self.resolution, self.resolution, 3), np.uint8)

    def positions(self, item: Item) -> int:
        return math.prod(self.grid)

    def unreadable(self, source: str, name: str, reason: str) -> ItemError:
        return unreadable(source, name, reason)

    def blank_batch(self, rows: int) -> Tensor:
        return torch.zeros(rows, 3, self.resolution, self.resolution, dtype=torch.uint8)

    def windows(self, source: Any, indices: Sequence[int], uniform_B: noise.Floats, flip: bool) -> Tensor:
        """Mirrored where the number is below 0.5 and `flip`. uint8 (B, 3, H, W)."""
        images = [self.read(source, index) for index in indices]
        return self.tensor([x[:, ::-1] if u < 0.5 and flip else x for x, u in zip(images, uniform_B, strict=True)])

    def to_model(self, items: Tensor) -> Tensor:
        return to_model(items)

    def tensor(self, items: Sequence[Item]) -> Tensor:
        return chw(np.stack(items))

    def items(self, x: Tensor) -> Item:
        return hwc(to_pixels(x))

    def pixels(self, items: Item) -> Pixels:
        return items

    def fidelity(self, item: Item, other: Item) -> dict[str, float]:
        """PSNR in dB."""
        error = int(np.square(item.astype(np.int64) - other).sum())
        psnr = 10 * math.log10(255**2 * item.size / error) if error else EXACT_PSNR
        return {"psnr": round(psnr, 2)}

    def distance(self, x: Tensor, recon: Tensor) -> Tensor:
        """The mean squared error."""
        return F.mse_loss(recon, x)


class MelInputs(Inputs):
    """Log-mel spectrograms of whole latents, in nats."""

    def __init__(self, cfg: MelConfig) -> None:
        self.features, self.stride, self.frames = mel.PRESETS[cfg.features], cfg.stride, cfg.frames
        self.transform = f"log-mel-{cfg.features}"
        self.rate: float = self.features.rate / (self.features.hop * self.stride)

    def open(self, spec: str, **reading: Any) -> ItemSource:
        return audio.open_audio(spec, **reading)

    def read(self, source: Any, index: int) -> Item:
        return mel.log_mel(source.wave(index, self.features.rate), self.features, self.stride)

    def blank(self) -> Item:
        return np.full((self.stride, self.features.bands), np.log(self.features.floor), np.float32)

    def positions(self, item: Item) -> int:
        return len(item) // self.stride

    def unreadable(self, source: str, name: str, reason: str) -> ItemError:
        return audio.unreadable(source, name, reason)

    def blank_batch(self, rows: int) -> Tensor:
        return torch.zeros(rows, self.features.bands, self.frames)

    def windows(self, source: Any, indices: Sequence[int], uniform_B: noise.Floats, flip: bool) -> Tensor:
        """A window of `frames` of each, from a frame by its number; shorter sounds are followed by silence."""
        windows = []
        for index, u in zip(indices, uniform_B, strict=True):
            item = self.read(source, index)
            start = int(u * max(1, len(item) - self.frames + 1))
            silence = np.repeat(self.blank()[:1], max(0, self.frames - len(item)), 0)
            windows.append(np.concatenate([item[start : start + self.frames], silence]))
        return self.tensor(windows)

    def to_model(self, items: Tensor) -> Tensor:
        return items

    def tensor(self, items: Sequence[Item]) -> Tensor:
        return torch.from_numpy(np.stack(items)).mT.contiguous()

    def items(self, x: Tensor) -> Item:
        return x.float().mT.contiguous().cpu().numpy()

    def pixels(self, items: Item) -> Pixels:
        return mel.mel_pixels(items)

    def fidelity(self, item: Item, other: Item) -> dict[str, float]:
        """The mean absolute difference of the log-mel values, in nats."""
        return {"mel_distance": round(mel.mel_distance(item, other), 4)}

    def distance(self, x: Tensor, recon: Tensor) -> Tensor:
        """The mean absolute error and half of the squared one, in nats."""
        return F.l1_loss(recon, x) + 0.5 * F.mse_loss(recon, x)


def inputs_of(cfg: AutoencoderConfig | MelConfig) -> Inputs:
    return MelInputs(cfg) if isinstance(cfg, MelConfig) else ImageInputs(cfg)

"""Extractors: uint8 images -> features. The default is always Inception, never silently another."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rdpm_cli import weights as weight_files
from rdpm_cli.errors import DataError, UsageError
from rdpm_cli.evaluation import judge as judge_file
from rdpm_cli.images.tensors import chw, to_model
from rdpm_cli.images.transform import Pixels

INCEPTION = weight_files.Published(
    "weights-inception-2015-12-05-6726825d.pth",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
)
OPTION = "--weights FILE or --extractor judge.pt"


class Extractor(Protocol):
    """Features of images, and where it came from."""

    name: str
    sha256: str
    class_names: list[str]  # empty unless it classifies our classes
    note: str

    def __call__(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        """uint8 (B, 3, H, W) -> features (B, D), logits over class_names or None."""


class Inception:
    """Inception 2015-12-05 by torch-fidelity: TF1 bilinear resize to 299, pool_3 features (2048)."""

    def __init__(self, found: weight_files.Found, device: torch.device) -> None:
        self.sha256 = found.sha256
        self.name = "inception-2015-12-05" if found.published else f"inception-v3 layout, weights {self.sha256[:8]}"
        self.note = "" if found.published else f"the weights in {found.path} are not the published ones"
        self.class_names: list[str] = []
        self.device = device
        self.network = _inception_network(found.path).to(device)

    @torch.no_grad()
    def __call__(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.network(pixels_BCHW.to(self.device))[0], None


def _inception_network(path: Path) -> nn.Module:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    hint = weight_files.where_to_put(INCEPTION, OPTION)
    weight_files.read(path, "Inception", hint)  # first: torch-fidelity's own load would run any pickle
    try:
        network: nn.Module = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path)
        )
    except (RuntimeError, TypeError, ValueError) as error:
        raise weight_files.misfit(path, "Inception", hint, error) from error
    return network


class JudgeExtractor:
    """A judge's penultimate features, and its opinion of the class."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self.judge, content = judge_file.load(path)
        self.judge.to(device)
        self.device, self.sha256, self.class_names = device, content["digest"], content["class_names"]
        accuracy = content["provenance"]["heldout_accuracy"]
        self.name = f"judge {path.name}"
        self.note = f"held-out accuracy of the judge: {accuracy:.4f}"

    @torch.no_grad()
    def __call__(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        features, logits = self.judge(to_model(pixels_BCHW).to(self.device))
        return features, logits


def make_extractor(extractor: Path | None, weights: Path | None, device: torch.device) -> Extractor:
    """A judge's file where one is named, else Inception. Raises CheckpointError before any image is read."""
    if extractor is not None and weights is not None:
        raise UsageError("--extractor and --weights name two extractors", "give one of them")
    if extractor is not None:
        return JudgeExtractor(extractor, device)
    return Inception(weight_files.find(INCEPTION, weights, OPTION), device)


@dataclass
class Features:
    """Features of a set of images. sha256: of the uint8 pixels in order, the identity of the set."""

    features_ND: NDArray[np.float32]
    predicted_N: NDArray[np.int64] | None
    sha256: str

    def __len__(self) -> int:
        return len(self.features_ND)


def hash_pixels(digest: "hashlib._Hash", pixels: Pixels) -> None:
    """Add images (B, H, W, 3) to the identity of their set, which does not depend on how it is cut into batches."""
    for image in pixels:
        digest.update(str(image.shape).encode() + np.ascontiguousarray(image).tobytes())


def collect(extractor: Extractor, batches: Iterable[Pixels]) -> Features:
    """Run an extractor over (B, H, W, 3) uint8 batches."""
    features: list[NDArray[np.float32]] = []
    predicted: list[NDArray[np.int64]] = []
    digest = hashlib.sha256()
    for pixels in batches:
        hash_pixels(digest, pixels)
        found, logits = extractor(chw(pixels))
        features.append(found.float().cpu().numpy())
        if logits is not None:
            predicted.append(logits.argmax(1).cpu().numpy())
    if not features:
        raise DataError("there are no images to score", "sample again, or name another folder")
    return Features(np.concatenate(features), np.concatenate(predicted) if predicted else None, digest.hexdigest())

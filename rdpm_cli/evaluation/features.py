"""Extractors: uint8 images -> features. The default is always Inception, never silently another."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rdpm_cli import progress
from rdpm_cli import weights as weight_files
from rdpm_cli.errors import DataError, UsageError
from rdpm_cli.evaluation import judge as judge_file
from rdpm_cli.images.tensors import chw, to_model
from rdpm_cli.images.transform import Pixels

INCEPTION = weight_files.Published(
    "weights-inception-2015-12-05-6726825d.pth",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
)
OPTION = "--weights FILE or --extractor judge.pt, or --download"
PUBLISHED = "inception-2015-12-05"
BATCH = 64  # images a forward pass
NO_IMAGES = "there are no images to score"
WIDTH = 2048  # of Inception's pool_3
SPATIAL_LAYER, SPATIAL_CHANNELS, SPATIAL_WIDTH = "Mixed_6d.branch1x1", 7, 7 * 17 * 17


class Activations(NamedTuple):
    """What an extractor sees in images."""

    features_BD: Tensor
    logits_BK: Tensor  # of the Inception Score; over class_names where there are any
    spatial_BS: Tensor | None = None  # of sFID


class Extractor(Protocol):
    """Features of images, and where it came from."""

    name: str
    sha256: str
    class_names: list[str]  # empty unless it classifies our classes
    note: str
    accuracy: float | None  # of a judge, on held-out images
    width: int  # of its features
    spatial: int  # the same of those that know where; 0: it has none

    def __call__(self, pixels_BCHW: Tensor) -> Activations:
        """uint8 (B, 3, H, W) -> activations, fp32."""


class Inception:
    """Inception 2015-12-05 by torch-fidelity: TF1 bilinear resize to 299, pool_3 features (2048).

    Logits are the unbiased ones, as ADM's. Spatial features are ADM's `mixed_6/conv:0`, which is Mixed_6d's 1×1 branch
    after its ReLU: the first 7 channels of 17 × 17 places, in the order height, width, channel (2023).
    """

    def __init__(self, found: weight_files.Found, device: torch.device) -> None:
        self.sha256 = found.sha256
        self.name = PUBLISHED if found.published else f"inception-v3 layout, weights {self.sha256[:8]}"
        self.note = "" if found.published else f"the weights in {found.path} are not the published ones"
        self.class_names: list[str] = []
        self.accuracy: float | None = None
        self.width, self.spatial = WIDTH, SPATIAL_WIDTH
        self.device = device
        self.network = _inception_network(found.path).to(device)
        self._branch: Tensor | None = None
        self.network.get_submodule(SPATIAL_LAYER).register_forward_hook(self._keep)

    def _keep(self, layer: nn.Module, given: tuple[Tensor, ...], out_BCHW: Tensor) -> None:
        self._branch = out_BCHW

    @torch.no_grad()
    def __call__(self, pixels_BCHW: Tensor) -> Activations:
        features, logits = self.network(pixels_BCHW.to(self.device))
        assert self._branch is not None
        spatial = self._branch[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        self._branch = None
        return Activations(features, logits, spatial.float())


def _inception_network(path: Path) -> nn.Module:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    hint = weight_files.where_to_put(INCEPTION, OPTION)
    weight_files.read(path, "Inception", hint)  # first: torch-fidelity's own load would run any pickle
    try:
        network: nn.Module = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
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
        self.accuracy: float | None = float(content["provenance"]["heldout_accuracy"])
        self.width, self.spatial = int(content["config"]["features"]), 0
        self.name = f"judge {path.name}"
        self.note = f"held-out accuracy of the judge: {self.accuracy:.4f}"

    @torch.no_grad()
    def __call__(self, pixels_BCHW: Tensor) -> Activations:
        features, logits = self.judge(to_model(pixels_BCHW).to(self.device))
        return Activations(features, logits)


def make_extractor(
    extractor: Path | None, weights: Path | None, device: torch.device, download: bool = False
) -> Extractor:
    """A judge's file where one is named, else Inception. Raises CheckpointError before any image is read.

    download: fetch Inception's weights where they are absent.
    """
    if extractor is not None and (weights is not None or download):
        raise UsageError(
            f"--extractor and --{'weights' if weights else 'download'} name two extractors", "give one of them"
        )
    if extractor is not None:
        return JudgeExtractor(extractor, device)
    return Inception(weight_files.find(INCEPTION, weights, OPTION, download), device)


def is_published_inception(extractor: Extractor) -> bool:
    """May its distance be called a FID?"""
    return extractor.name.startswith(PUBLISHED)


def identity(extractor: Extractor) -> dict[str, Any]:
    """What a result says of it; of a judge also the held-out accuracy."""
    judged = {} if extractor.accuracy is None else {"heldout_accuracy": extractor.accuracy}
    return {"name": extractor.name, "sha256": extractor.sha256, **judged}


@dataclass
class Features:
    """Features of a set of images. sha256: of the uint8 pixels in order, the identity of the set."""

    features_ND: NDArray[np.float32]
    predicted_N: NDArray[np.int64] | None
    sha256: str

    def __len__(self) -> int:
        return len(self.features_ND)


def image_digests(pixels: Pixels) -> list[bytes]:
    """The sha256 of each image of (B, H, W, 3), its shape and its pixels."""
    return [
        hashlib.sha256(str(image.shape).encode() + np.ascontiguousarray(image).tobytes()).digest() for image in pixels
    ]


def hash_pixels(digest: "hashlib._Hash", pixels: Pixels) -> None:
    """Add images (B, H, W, 3) to the identity of their set, which does not depend on how it is cut into batches."""
    digest.update(b"".join(image_digests(pixels)))


def extract(extractor: Extractor, pixels: Pixels) -> dict[str, NDArray[np.float32]]:
    """features, logits and, where it gives them, spatial features of images (B, H, W, 3), in parts of BATCH.

    Parts of half the size where a GPU's memory is too small. Raises DataError for values that are not finite.
    """
    parts = _in_parts(extractor, pixels, BATCH)
    columns = dict(zip(("features", "logits", "spatial"), zip(*parts, strict=True), strict=True))
    found = {
        name: torch.cat([values for values in column if values is not None]).float().cpu().numpy()
        for name, column in columns.items()
        if column[0] is not None
    }
    if not all(np.isfinite(values).all() for values in found.values()):
        raise DataError(
            f"{extractor.name} gives values that are not finite", "its weights are damaged: copy them again"
        )
    return found


def _in_parts(extractor: Extractor, pixels: Pixels, size: int) -> list[Activations]:
    try:
        return [extractor(chw(pixels[start : start + size])) for start in range(0, len(pixels), size)]
    except torch.OutOfMemoryError:
        if size == 1:
            raise
    torch.cuda.empty_cache()
    progress.warn(f"out of memory: {extractor.name} goes on with {size // 2} images at once")
    return _in_parts(extractor, pixels, size // 2)


def collect(extractor: Extractor, batches: Iterable[Pixels]) -> Features:
    """Run an extractor over (B, H, W, 3) uint8 batches, and keep the features of all."""
    features: list[NDArray[np.float32]] = []
    predicted: list[NDArray[np.int64]] = []
    digest = hashlib.sha256()
    for pixels in batches:
        hash_pixels(digest, pixels)
        found = extract(extractor, pixels)
        features.append(found["features"])
        predicted.append(found["logits"].argmax(1))
    if not features:
        raise DataError(NO_IMAGES, "sample again, or name another folder")
    return Features(
        np.concatenate(features), np.concatenate(predicted) if extractor.class_names else None, digest.hexdigest()
    )

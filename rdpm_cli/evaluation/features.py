"""Extractors, uint8 images -> features, and the features of whole sets as arrays.

The default extractor is Inception; no other one ever takes its place unasked.
Legend: B batch, N images, D feature width, K classes or logits, P spatial feature width.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rdpm_cli import checkpoint, files, progress
from rdpm_cli.data.folder import ImageSet
from rdpm_cli.data.pictures import npz_array, npz_names
from rdpm_cli.data.pixels import Pixels, chw, to_model
from rdpm_cli.distributed import gather, world
from rdpm_cli.errors import DataError, UsageError
from rdpm_cli.evaluation import judge as judge_file

INCEPTION = checkpoint.Published(
    "weights-inception-2015-12-05-6726825d.pth",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
)
INCEPTION_NAME = "inception"  # of --extractor
PUBLISHED = "inception-2015-12-05"  # its name in results, with the published weights
OPTION = "--weights FILE or --extractor judge.pt, or --download"
BATCH = 64  # images a forward pass
PIECE = 256  # images; rank r takes pieces r, r + size, ...
NO_IMAGES = ("there are no images to score", "sample again, or name another folder")
SPATIAL_LAYER, SPATIAL_CHANNELS, SPATIAL_SIDE = "Mixed_6d.branch1x1", 7, 17

T = TypeVar("T")
Floats = NDArray[np.float32]


# ---- extractors ----------------------------------------------------------------------------------------------------


class Activations(NamedTuple):
    """Outputs of an extractor for a batch."""

    features_BD: Tensor
    logits_BK: Tensor  # of the Inception Score; over class_names where there are any
    spatial_BP: Tensor | None = None  # of sFID


class Extractor(Protocol):
    """uint8 (B, 3, H, W) -> activations in fp32, with the identity that goes into results."""

    name: str
    sha256: str
    device: torch.device
    class_names: list[str]  # empty unless it classifies the classes of a data set
    note: str  # for the notes of a result
    accuracy: float | None  # of a judge, on held-out images
    width: int  # D
    spatial_width: int  # P; 0: it has no spatial features

    def __call__(self, pixels_BCHW: Tensor) -> Activations: ...


class Inception:
    """Inception 2015-12-05 by torch-fidelity: TF1 bilinear resize to 299, pool_3 features (2048).

    The logits are those without bias, as ADM's. The spatial features are ADM's `mixed_6/conv:0`, which is Mixed_6d's
    1×1 branch after its ReLU: the first 7 channels of 17×17 positions, in the order height, width, channel (2023).
    """

    def __init__(self, weights: checkpoint.WeightFile, device: torch.device) -> None:
        self.sha256, self.device = weights.sha256, device
        self.name = PUBLISHED if weights.published else f"inception-v3 layout, weights {self.sha256[:8]}"
        self.note = "" if weights.published else f"the weights in {weights.path} are not the published ones"
        self.class_names: list[str] = []
        self.accuracy: float | None = None
        self.width, self.spatial_width = 2048, SPATIAL_CHANNELS * SPATIAL_SIDE**2
        self.network = _inception_network(weights.path).to(device)
        self._branch_BCHW = torch.empty(0)
        # torch-fidelity returns whole blocks, so the branch within one is read by a hook.
        self.network.get_submodule(SPATIAL_LAYER).register_forward_hook(self._keep_branch)

    def _keep_branch(self, layer: nn.Module, inputs: tuple[Tensor, ...], output_BCHW: Tensor) -> None:
        self._branch_BCHW = output_BCHW

    @torch.no_grad()
    def __call__(self, pixels_BCHW: Tensor) -> Activations:
        features, logits = self.network(pixels_BCHW.to(self.device))
        spatial = self._branch_BCHW[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return Activations(features, logits, spatial.float())


def _inception_network(path: Path) -> nn.Module:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # seconds to import

    hint = checkpoint.weights_hint(INCEPTION, OPTION)
    checkpoint.read_weights(path, "Inception", hint)  # first: torch-fidelity's own load would run any pickle
    try:
        network: nn.Module = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
        )
    except (RuntimeError, TypeError, ValueError) as error:
        raise checkpoint.misfit(path, "Inception", hint, error) from error
    return network


class JudgeExtractor:
    """A judge's penultimate features, and its logits over the classes of its data set."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self.judge, content = judge_file.load(path)
        self.judge.to(device)
        self.name, self.device, self.sha256 = f"judge {path.name}", device, content["digest"]
        self.class_names: list[str] = content["class_names"]
        self.accuracy: float | None = float(content["provenance"]["heldout_accuracy"])
        self.width, self.spatial_width = int(content["config"]["features"]), 0
        self.note = f"held-out accuracy of the judge: {self.accuracy:.4f}"

    @torch.no_grad()
    def __call__(self, pixels_BCHW: Tensor) -> Activations:
        features, logits = self.judge(to_model(pixels_BCHW).to(self.device))
        return Activations(features, logits)


def open_extractor(
    extractor: str | Path | None, weights: Path | None, device: torch.device, download: bool = False
) -> Extractor:
    """`inception`, which is the default, or a judge's file. Raises CheckpointError and UsageError.

    weights: Inception's file; None: looked up. download: fetch it where it is absent.
    """
    if extractor is None or str(extractor) == INCEPTION_NAME:
        return Inception(checkpoint.find_weights(INCEPTION, weights, OPTION, download), device)
    if weights is not None or download:
        option = "--weights" if weights else "--download"
        raise UsageError(f"--extractor {extractor} and {option} name two extractors", "give one of them")
    return JudgeExtractor(Path(extractor), device)


def is_published_inception(extractor: Extractor) -> bool:
    """Whether its Fréchet distance may be called a FID."""
    return extractor.name == PUBLISHED


def identity(extractor: Extractor) -> dict[str, Any]:
    """The extractor as results record it; a judge with its held-out accuracy."""
    judged = {} if extractor.accuracy is None else {"heldout_accuracy": extractor.accuracy}
    return {"name": extractor.name, "sha256": extractor.sha256, **judged}


# ---- features of sets of images ------------------------------------------------------------------------------------


@dataclass
class Features:
    """Activations of images, in order. digests: sha256 of each image."""

    features_ND: Floats
    logits_NK: Floats
    spatial_NP: Floats | None
    digests: list[bytes]

    def __len__(self) -> int:
        return len(self.features_ND)

    @property
    def predicted(self) -> NDArray[np.int64]:
        """The class with the largest logit of each image; of a judge."""
        return self.logits_NK.argmax(1)

    @property
    def sha256(self) -> str:
        """The identity of the set: of the uint8 pixels in order."""
        return set_digest(self.digests)


def image_digests(pixels_BHWC: Pixels) -> list[bytes]:
    """The sha256 of each image: of its shape and its pixels."""
    return [
        hashlib.sha256(str(image.shape).encode() + np.ascontiguousarray(image).tobytes()).digest()
        for image in pixels_BHWC
    ]


def set_digest(digests: Iterable[bytes]) -> str:
    """The identity of a set, from the digests of its images in order."""
    return hashlib.sha256(b"".join(digests)).hexdigest()


def cut(count: int, size: int) -> list[range]:
    """0..count-1 in ranges of `size`."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def rank_pieces(count: int) -> list[range]:
    """This process's pieces of a set: rank r takes every size-th one."""
    rank, size = world()
    return cut(count, PIECE)[rank::size]


def in_order(by_rank: list[list[T]]) -> list[T]:
    """The values of all pieces in order. by_rank: those of rank r belong to pieces r, r + size, ..."""
    count = sum(map(len, by_rank))
    return [by_rank[number % len(by_rank)][number // len(by_rank)] for number in range(count)]


def extract(extractor: Extractor, pixels_BHWC: Pixels, spatial: bool = False) -> Features:
    """Activations of (B, H, W, 3) uint8 images, BATCH at a time, or fewer where a GPU's memory is too small.

    spatial: keep spatial features, where the extractor has any. Raises DataError for values that are not finite.
    """
    columns = zip(*_in_batches(extractor, pixels_BHWC, BATCH), strict=True)
    features, logits, spatial_NP = (None if column[0] is None else _floats(column) for column in columns)
    assert features is not None
    assert logits is not None
    if not (np.isfinite(features).all() and np.isfinite(logits).all()):
        message = f"{extractor.name} gives values that are not finite"
        raise DataError(message, "its weights are damaged: copy them again")
    return Features(features, logits, spatial_NP if spatial else None, image_digests(pixels_BHWC))


def _floats(batches: Sequence[Tensor | None]) -> Floats:
    return torch.cat([values for values in batches if values is not None]).float().cpu().numpy()


def _in_batches(extractor: Extractor, pixels_BHWC: Pixels, size: int) -> list[Activations]:
    try:
        return [extractor(chw(pixels_BHWC[start : start + size])) for start in range(0, len(pixels_BHWC), size)]
    except torch.OutOfMemoryError:
        if size == 1:
            raise
    torch.cuda.empty_cache()
    progress.warn(f"out of memory: {extractor.name} continues with {size // 2} images at a time")
    return _in_batches(extractor, pixels_BHWC, size // 2)


def shared_pieces(extractor: Extractor, images: ImageSet, spatial: bool) -> Iterator[Features]:
    """The activations of this process's pieces."""
    pieces = rank_pieces(images.count)
    with progress.Bar("extract features", sum(map(len, pieces)), "images") as bar:
        for pixels in images.read(pieces):
            yield extract(extractor, pixels, spatial)
            bar.advance(len(pixels))


def join(pieces: Sequence[Features]) -> Features:
    """Consecutive pieces as one. Raises DataError for none."""
    if not pieces:
        raise DataError(*NO_IMAGES)
    features, logits = (np.concatenate([getattr(p, name) for p in pieces]) for name in ("features_ND", "logits_NK"))
    spatial = [piece.spatial_NP for piece in pieces if piece.spatial_NP is not None]
    digests = [digest for piece in pieces for digest in piece.digests]
    return Features(features, logits, np.concatenate(spatial) if spatial else None, digests)


def collect(extractor: Extractor, images: ImageSet | Iterable[Pixels]) -> Features:
    """The features of a set, or of (B, H, W, 3) uint8 batches, by this process. Raises DataError for no images."""
    batches = images.read(cut(images.count, BATCH)) if isinstance(images, ImageSet) else images
    return join([extract(extractor, pixels) for pixels in batches])


def collect_shared(
    extractor: Extractor, images: ImageSet, spatial: bool = False, file: Path | None = None
) -> Features | None:
    """The features of a set by all processes -> in the first one; None in the others. Raises DataError.

    file: of `--features`. If it exists, its features are read, and the images only to compare their identity; else it
    is written, with spatial features where the extractor has any, so that it serves every metric.
    """
    if file is not None and file.is_file():
        return _reuse(file, extractor, images)
    by_rank = gather(list(shared_pieces(extractor, images, spatial or file is not None)))
    if by_rank is None:
        return None
    features = join(in_order(by_rank))
    if file is not None:
        _save(file, features, extractor)
    return features


# ---- --features FILE.npz -------------------------------------------------------------------------------------------

ACTIVATIONS, VERSION = "rdpm_features", 1
FEATURES_HINT = "name another file with --features, or delete this one to compute it again"


def _save(path: Path, features: Features, extractor: Extractor) -> None:
    record = {"version": VERSION, "images": features.sha256, "extractor": identity(extractor)}
    arrays: dict[str, NDArray[Any]] = {"features": features.features_ND, "logits": features.logits_NK}
    if features.spatial_NP is not None:
        arrays["spatial"] = features.spatial_NP
    text = np.array(files.canonical_json(record))
    files.write_atomic(path, lambda file: np.savez(file, **{ACTIVATIONS: text}, **arrays))  # type: ignore[arg-type]


def _reuse(path: Path, extractor: Extractor, images: ImageSet) -> Features | None:
    """The features in a file, if they are this extractor's of these images. Raises DataError."""
    names = npz_names(path)
    if ACTIVATIONS not in names:
        raise DataError(f"{path} holds no features that `eval --features` wrote", FEATURES_HINT)
    record = npz_record(path, ACTIVATIONS, VERSION, ("images", "extractor"), FEATURES_HINT)
    if record["extractor"]["sha256"] != extractor.sha256:
        raise DataError(f"{path} holds features of {record['extractor']['name']}, not {extractor.name}", FEATURES_HINT)
    by_rank = gather([image_digests(pixels) for pixels in images.read(rank_pieces(images.count))])
    if by_rank is None:
        return None
    digests = [digest for piece in in_order(by_rank) for digest in piece]
    if set_digest(digests) != record["images"]:
        raise DataError(f"{path} holds features of other images", FEATURES_HINT)
    spatial = npz_array(path, "spatial") if "spatial" in names else None
    return Features(npz_array(path, "features"), npz_array(path, "logits"), spatial, digests)


def npz_record(path: Path, name: str, version: int, fields: Collection[str], hint: str) -> dict[str, Any]:
    """The JSON text that one of our .npz files holds under a name. Raises DataError if it is damaged or newer."""
    try:
        record: dict[str, Any] = json.loads(str(npz_array(path, name)))
        if absent := {"version", *fields} - set(record):
            raise ValueError(f"its record lacks {', '.join(sorted(absent))}")
    except (ValueError, TypeError) as error:
        raise DataError(f"{path} is damaged: {error}", hint) from error
    if record["version"] != version:
        raise DataError(f"{path} has format version {record['version']}; this rdpm reads {version}", hint)
    return record

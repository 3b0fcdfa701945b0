"""Extractors, uint8 images -> features, and the features of whole sets as arrays.

The default extractor is Inception; no other one ever takes its place unasked. backbones.py has those on timm.
Legend: B batch, N images, D feature width, K classes or logits, P spatial feature width."""

import hashlib
import io
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
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
from rdpm_cli.distributed import gather, is_first, world
from rdpm_cli.errors import DataError
from rdpm_cli.evaluation import judge

FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION = checkpoint.Published(FILE, f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILE}")
PUBLISHED = "inception-2015-12-05"  # the extractor's name with the published weights: only its scores are FID, IS, KID
MARK = "Conv2d_1a_3x3.conv.weight"  # a name of its weights
OPTION = "--weights FILE or --extractor judge.pt, or --download"
BATCH = 64  # images a forward pass
PIECE = 256  # images; rank r takes pieces r, r + size, ...
FEATURES_RECORD, RECORD_VERSION = "rdpm_features", 1
ARRAYS = ("features", "logits", "spatial")  # of a file of features; the last where the extractor has it
FEATURES_HINT = "name another file with --features, or delete this one to compute it again"

T = TypeVar("T")
Floats = NDArray[np.float32]


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
    classes: int  # K; 0: it has no logits
    note: str  # for the notes of a result
    accuracy: float | None  # of a judge, on held-out images
    width: int  # D
    spatial_width: int  # P; 0: it has no spatial features
    resolution: int | None  # of the images it takes, pixels a side; None: any
    factor_layer: nn.Module | None  # features -> factors, of a judge of images with factors

    def __call__(self, pixels_BCHW: Tensor) -> Activations: ...


class Inception:
    """Inception 2015-12-05 by torch-fidelity: TF1 bilinear resize to 299, pool_3 features (2048).

    The logits are those without bias, as ADM's. The spatial features are ADM's `mixed_6/conv:0`, which is Mixed_6d's
    1×1 branch after its ReLU: the first 7 channels of 17×17 positions, in the order height, width, channel (2023)."""

    def __init__(self, weights: checkpoint.WeightFile, device: torch.device) -> None:
        """Raises CheckpointError for weights of another network."""
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # seconds to import

        self.sha256, self.device = weights.sha256, device
        self.name = PUBLISHED if weights.published else f"inception-v3 layout, weights {self.sha256[:8]}"
        self.note = "" if weights.published else f"the weights in {weights.path} are not the published ones"
        self.accuracy: float | None = None
        self.class_names, self.classes, self.width, self.spatial_width = list[str](), 1008, 2048, 2023
        self.resolution: int | None = None
        self.factor_layer: nn.Module | None = None
        hint = checkpoint.weights_hint(INCEPTION, OPTION)
        # torch-fidelity's own load would run any pickle, so it gets the tensors alone.
        torch.save(checkpoint.read_weights(weights.path, "Inception", MARK, hint), file := io.BytesIO())
        file.seek(0)
        outputs = ["2048", "logits_unbiased"]
        try:
            network = FeatureExtractorInceptionV3("inception-v3-compat", outputs, feature_extractor_weights_path=file)
        except (RuntimeError, TypeError, ValueError) as error:
            raise checkpoint.misfit(weights.path, "Inception", hint, error) from error
        self.network: nn.Module = network.to(device)

    @torch.no_grad()
    def __call__(self, pixels_BCHW: Tensor) -> Activations:
        branches: list[Tensor] = []
        # torch-fidelity returns whole blocks, so the branch within one is read by a hook.
        layer = self.network.get_submodule("Mixed_6d.branch1x1")
        with layer.register_forward_hook(lambda _, inputs, output_BCHW: branches.append(output_BCHW)):
            features_BD, logits_BK = self.network(pixels_BCHW.to(self.device))
        return Activations(features_BD, logits_BK, branches[0][:, :7].permute(0, 2, 3, 1).flatten(1).float())


class JudgeExtractor:
    """A judge's penultimate features, and its logits over the classes of its data set."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self.judge, content = judge.load(path, device)
        self.name, self.device, self.sha256 = f"judge {path.name}", device, content["digest"]
        self.class_names: list[str] = content["class_names"]
        self.classes = len(self.class_names)
        self.accuracy: float | None = float(content["provenance"]["heldout_accuracy"])
        self.width, self.spatial_width = int(content["config"]["features"]), 0
        self.resolution: int | None = self.judge.resolution
        self.factor_layer: nn.Module | None = self.judge.factors
        self.note = f"held-out accuracy of the judge: {self.accuracy:.4f}"

    @torch.no_grad()
    def __call__(self, pixels_BCHW: Tensor) -> Activations:
        return Activations(*self.judge(to_model(pixels_BCHW).to(self.device)))


def identity(extractor: Extractor) -> dict[str, Any]:
    """The extractor as results record it; a judge with its held-out accuracy."""
    judged = {} if extractor.accuracy is None else {"heldout_accuracy": extractor.accuracy}
    return {"name": extractor.name, "sha256": extractor.sha256, **judged}


def is_maker(extractor: Extractor, record: dict[str, Any]) -> bool:
    """Whether this extractor is the recorded one. Names count too, since two may read the same weights differently.

    That of a judge is its file's, which may have been renamed."""
    return record["sha256"] == extractor.sha256 and (extractor.accuracy is not None or record["name"] == extractor.name)


class Features(NamedTuple):
    """Activations of images, in order. digests: sha256 of each image."""

    digests: list[bytes]
    features_ND: Floats
    logits_NK: Floats
    spatial_NP: Floats | None = None

    @property
    def sha256(self) -> str:
        """The identity of the set: of the uint8 pixels in order."""
        return set_digest(self.digests)


def image_digests(pixels_BHWC: Pixels) -> list[bytes]:
    """The sha256 of each image: of its shape and its pixels."""
    return [hashlib.sha256(str(image.shape).encode() + image.tobytes()).digest() for image in pixels_BHWC]


def set_digest(digests: Iterable[bytes]) -> str:
    """The identity of a set, from the digests of its images in order."""
    return hashlib.sha256(b"".join(digests)).hexdigest()


def pieces(count: int, rank: int = 0, size: int = 1) -> list[range]:
    """The pieces of a set of `count` images that a rank takes: every size-th one."""
    return [range(start, min(start + PIECE, count)) for start in range(rank * PIECE, count, size * PIECE)]


def in_order(by_rank: list[list[T]]) -> list[T]:
    """The values of all pieces in order. by_rank: those of rank r belong to pieces r, r + size, ..."""
    return [by_rank[n % len(by_rank)][n // len(by_rank)] for n in range(sum(map(len, by_rank)))]


def extract(extractor: Extractor, pixels_BHWC: Pixels, spatial: bool = False) -> Features:
    """Activations of (B, H, W, 3) uint8 images, BATCH at a time, or fewer where a GPU's memory is too small.

    Raises DataError for images of another size than the extractor's."""
    judge.check_size(extractor.resolution, pixels_BHWC.shape[1])
    size = BATCH
    while True:
        try:
            batches = [extractor(chw(pixels_BHWC[at : at + size])) for at in range(0, len(pixels_BHWC), size)]
            break
        except torch.OutOfMemoryError:
            if size == 1:
                raise
        size //= 2
        torch.cuda.empty_cache()  # not in the except clause, where the error still holds the tensors of its frames
        progress.warn(f"out of memory: {extractor.name} continues with {size} images at a time")
    kept = 3 if spatial and extractor.spatial_width else 2  # outputs of the extractor
    outputs = [torch.cat(parts).float().cpu().numpy() for parts in list(zip(*batches, strict=True))[:kept]]
    if not all(np.isfinite(output).all() for output in outputs):
        raise DataError(f"{extractor.name} gives values that are not finite", "copy its weights again")
    return Features(image_digests(pixels_BHWC), *outputs)


def shared_pieces(extractor: Extractor, images: ImageSet, spatial: bool) -> Iterator[Features]:
    """The activations of this process's pieces."""
    ranges = pieces(images.count, *world())
    with progress.Bar("extract features", sum(map(len, ranges)), "images") as bar:
        for pixels in images.read(ranges):
            yield extract(extractor, pixels, spatial)
            bar.advance(len(pixels))


def collect(extractor: Extractor, images: ImageSet | Iterable[Pixels]) -> Features:
    """The features of a set, or of (B, H, W, 3) uint8 batches, by this process. Raises DataError for no images."""
    batches = images.read(pieces(images.count)) if isinstance(images, ImageSet) else images
    return _join([extract(extractor, pixels) for pixels in batches])


def _join(parts: Sequence[Features]) -> Features:
    """Consecutive pieces as one."""
    if not parts:
        raise DataError("there are no images to score", "sample again, or name another folder")
    digests, *outputs = zip(*parts, strict=True)
    arrays = [np.concatenate(output) for output in outputs if output[0] is not None]
    return Features(list(itertools.chain(*digests)), *arrays)


def collect_shared(
    extractor: Extractor, images: ImageSet, spatial: bool = False, file: Path | None = None
) -> Features | None:
    """The features of a set by all processes -> in the first one; None in the others. Raises DataError.

    file: of `--features`: read, if these images and extractor made it, else written so that it serves every metric."""
    if file is not None and file.is_file():
        return _reuse(file, extractor, images)
    by_rank = gather(list(shared_pieces(extractor, images, spatial or file is not None)))
    if by_rank is None:
        return None
    features = _join(in_order(by_rank))
    if file is not None:
        record = {"images": features.sha256, "extractor": identity(extractor)}
        arrays = {name: array for name, array in zip(ARRAYS, features[1:], strict=True) if array is not None}
        save_npz_record(file, FEATURES_RECORD, record, arrays)
    return features


def _reuse(path: Path, extractor: Extractor, images: ImageSet) -> Features | None:
    """The features in a file, if they are this extractor's of these images. Raises DataError."""
    record = npz_record(path, FEATURES_RECORD, FEATURES_HINT)
    if not is_maker(extractor, record["extractor"]):
        raise DataError(f"{path} holds features of {record['extractor']['name']}, not {extractor.name}", FEATURES_HINT)
    if not is_first():
        return None
    digests = [digest for pixels in images.read(pieces(images.count)) for digest in image_digests(pixels)]
    if set_digest(digests) != record["images"]:
        raise DataError(f"{path} holds features of other images", FEATURES_HINT)
    names = ARRAYS if ARRAYS[2] in npz_names(path) else ARRAYS[:2]
    return Features(digests, *(npz_array(path, name) for name in names))


def save_npz_record(path: Path, name: str, record: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> None:
    """Write an .npz of arrays, with a record about them as JSON text under this name."""
    whole = {name: np.array(files.canonical_json({**record, "version": RECORD_VERSION})), **arrays}
    files.write_atomic(path, lambda file: np.savez(file, **whole))  # type: ignore[arg-type]


def npz_record(path: Path, name: str, hint: str) -> dict[str, Any]:
    """The record that save_npz_record wrote. Raises DataError if it is absent, damaged or newer."""
    try:
        record: dict[str, Any] = json.loads(str(npz_array(path, name)))
        version = record["version"]
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"the record {name} of {path} is damaged: {error!r}", hint) from error
    if version != RECORD_VERSION:
        raise DataError(f"{path} has format version {version}; this rdpm reads {RECORD_VERSION}", hint)
    return record

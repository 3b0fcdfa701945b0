"""Copies of training images among samples: the training images nearest to each sample, and what follows from them.

Legend: N samples, M training images, U of them that are nearest to a sample, D numbers an image: its features, or its
shrunk pixels, C candidates."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from rdpm_cli import progress
from rdpm_cli.data.folder import ImageSet
from rdpm_cli.data.pixels import Pixels
from rdpm_cli.distributed import gather
from rdpm_cli.evaluation import metrics
from rdpm_cli.evaluation.features import Extractor, Features, collect_shared, in_order

SIDE = 32  # pixels; larger images are shrunk to it before their pixels are compared
CANDIDATES = 8  # neighbours by rounded distances, of which the nearest two are found by exact ones
COPY = 1 / 3  # largest ratio of the two nearest distances of a near copy

Rows = NDArray[np.int64]
Distances = NDArray[np.float64]


class Views(NamedTuple):
    """Images in the two spaces in which they are compared."""

    features: Features
    pixels_ND: Pixels  # shrunk, one row an image


class Neighbours(NamedTuple):
    """The two training images nearest to each image, the nearest one first."""

    rows_N2: Rows
    distances_N2: Distances


def views(extractor: Extractor, images: ImageSet) -> Views | None:
    """The views of a set, by one pass of all processes -> in the first one; None in the others. Raises DataError."""
    shrunk: list[Pixels] = []

    def read(pieces: Iterable[range]) -> Iterator[Pixels]:
        for pixels in images.read(pieces):
            shrunk.append(shrink(pixels))
            yield pixels

    features, by_rank = collect_shared(extractor, replace(images, read=read)), gather(shrunk)
    return Views(features, np.concatenate(in_order(by_rank))) if features and by_rank else None


def shrink(pixels_BHWC: Pixels) -> Pixels:
    """Images averaged over boxes to at most SIDE pixels a side, one row each: (B, D) uint8."""
    size = (min(pixels_BHWC.shape[1], SIDE),) * 2
    small = [np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BOX)) for pixels in pixels_BHWC]
    return np.stack(small).reshape(len(small), -1)


def equal_features(features: Features, known: dict[bytes, NDArray[Any]]) -> None:
    """Give an image the features of an equal one that is known: an extractor's differ by rounding with the batch."""
    for digest, features_D in zip(features.digests, features.features_ND, strict=True):
        features_D[:] = known.setdefault(digest, features_D)


def nearest_two(
    x_ND: NDArray[Any], y_MD: NDArray[Any], own_N: Rows | None = None, device: torch.device | None = None
) -> Neighbours:
    """The two rows of y nearest to each row of x by Euclidean distance; of equally near ones the first.

    own_N: the row of y that is this row of x, and none of its neighbours. y has at least two others."""
    rows_NC = np.sort(_candidates(x_ND, y_MD, device), 1)
    distances_NC = np.empty(rows_NC.shape)
    for start in range(0, len(x_ND), metrics.BLOCK):
        block = slice(start, start + metrics.BLOCK)
        x_BD = x_ND[block].astype(np.float64)
        for candidate, rows_B in enumerate(rows_NC[block].T):
            distances_NC[block, candidate] = np.linalg.norm(x_BD - y_MD[rows_B], axis=1)  # 0 for equal rows
    if own_N is not None:
        distances_NC[rows_NC == own_N[:, None]] = np.inf
    order_N2 = np.argsort(distances_NC, 1, kind="stable")[:, :2]
    return Neighbours(np.take_along_axis(rows_NC, order_N2, 1), np.take_along_axis(distances_NC, order_N2, 1))


def _candidates(x_ND: NDArray[Any], y_MD: NDArray[Any], device: torch.device | None) -> Rows:
    """CANDIDATES rows of y for each row of x, nearest by fp32 distances: (N, C). y is converted a block at a time."""
    centre_D = metrics.centre(y_MD)
    x = metrics.centred(x_ND, centre_D, device)
    smallest_NC = torch.full((len(x), min(CANDIDATES, len(y_MD))), torch.inf, device=device)
    rows_NC = torch.zeros(smallest_NC.shape, dtype=torch.int64, device=device)
    with progress.Bar("find nearest images", len(y_MD), "images") as bar:
        for start in range(0, len(y_MD), metrics.COLUMNS):
            y = metrics.centred(y_MD[start : start + metrics.COLUMNS], centre_D, device)
            for block, _, distances in metrics.blocks(x, y):
                smallest, rows = distances.topk(min(CANDIDATES, len(y)), largest=False)
                smallest = torch.cat([smallest_NC[block], smallest], 1)
                rows = torch.cat([rows_NC[block], rows + start], 1)
                smallest_NC[block], order = smallest.topk(smallest_NC.shape[1], largest=False)
                rows_NC[block] = rows.gather(1, order)
            bar.advance(len(y))
    found: Rows = rows_NC.cpu().numpy()
    return found


def ratios(distances_N2: Distances) -> Distances:
    """The distance to the nearest training image over that to the second, 0 where both are 0: (N,).

    An image with at most COPY is a near copy (Yoon et al. 2023, Gu et al. 2023)."""
    nearest_N, second_N = distances_N2.T
    return np.divide(nearest_N, second_N, out=np.zeros(len(nearest_N)), where=second_N > 0)


def authentic(neighbours: Neighbours, training_MD: NDArray[Any], device: torch.device | None = None) -> Any:
    """Whether each image is farther from its nearest training image than that is from all others: (N,) bool.

    The authenticity of Alaa et al. 2022. neighbours: of the images among training_MD."""
    nearest_U, places_N = np.unique(neighbours.rows_N2[:, 0], return_inverse=True)
    gaps_U2 = nearest_two(training_MD[nearest_U], training_MD, nearest_U, device).distances_N2
    return neighbours.distances_N2[:, 0] > gaps_U2[places_N, 0]


def compare(images: Views, training: Views, device: torch.device) -> tuple[dict[str, float], Neighbours]:
    """Shares of copies and median distances of images, and their neighbours by pixels (root mean square, in [0, 1])."""
    features_MD = training.features.features_ND
    by_features = nearest_two(images.features.features_ND, features_MD, device=device)
    rows_N2, distances_N2 = nearest_two(images.pixels_ND, training.pixels_ND, device=device)
    by_pixels = Neighbours(rows_N2, distances_N2 / (255 * images.pixels_ND.shape[1] ** 0.5))
    values = {
        "near_copies": np.mean(ratios(by_pixels.distances_N2) <= COPY),
        "near_copies_features": np.mean(ratios(by_features.distances_N2) <= COPY),
        "authpct": authentic(by_features, features_MD, device).mean(),
        "nearest_pixels": np.median(by_pixels.distances_N2[:, 0]),
        "nearest_features": np.median(by_features.distances_N2[:, 0]),
    }
    return {name: float(value) for name, value in values.items()}, by_pixels

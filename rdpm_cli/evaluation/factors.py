"""Scores by the factors that a judge predicts for images of a set whose factors are uniform (data/shapes.py).

Legend: N images, F factors in [0, 1), P numbers by which a judge predicts them: cos and sin of a circular one."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from rdpm_cli.data.pixels import EXACT_PSNR, Pixels
from rdpm_cli.data.shapes import CIRCULAR, FACTORS, draw

BINS = 16  # of a histogram
PREDICTED = len(FACTORS) + len(CIRCULAR)  # P
Floats = NDArray[np.float32]


def encode(factors_NF: Floats) -> Floats:
    """Factors -> (N, P) in [-1, 1]: 2 f - 1, or cos and sin of 2 pi f for a circular one."""
    columns = []
    for name, values in zip(FACTORS, factors_NF.T, strict=True):
        turn = 2 * np.pi * values
        columns += [np.cos(turn), np.sin(turn)] if name in CIRCULAR else [2 * values - 1]
    return np.stack(columns, 1).astype(np.float32)


def decode(predicted_NP: Floats) -> Floats:
    """The inverse of `encode`; values outside [0, 1) become the nearest in it."""
    columns, predicted = [], iter(predicted_NP.T)
    for name in FACTORS:
        first = next(predicted)
        columns.append(np.arctan2(next(predicted), first) / (2 * np.pi) % 1 if name in CIRCULAR else (first + 1) / 2)
    return np.clip(np.stack(columns, 1), 0, np.nextafter(np.float32(1), np.float32(0)), dtype=np.float32)


def errors(predicted_NF: Floats, factors_NF: Floats) -> dict[str, float]:
    """The mean absolute error of each factor; of a circular one the shorter way round."""
    error_NF = np.abs(predicted_NF - factors_NF)
    circular_F = [name in CIRCULAR for name in FACTORS]
    error_NF = np.where(circular_F, np.minimum(error_NF, 1 - error_NF), error_NF)
    return dict(zip(FACTORS, error_NF.mean(0).tolist(), strict=True))


def coverage(factors_NF: Floats) -> dict[str, float]:
    """The total variation distance of each factor's histogram from uniform: 0 for uniform, 15/16 for one value.

    N uniform values have about sqrt(BINS / (2 pi N)): .036 for 2,000. So compare sets of equal size."""
    shares_of = (np.histogram(values, BINS, (0, 1))[0] / len(values) for values in factors_NF.T)
    distances = (float(np.abs(shares - 1 / BINS).sum() / 2) for shares in shares_of)
    return dict(zip(FACTORS, distances, strict=True))


def validity(batches: Iterable[Pixels], kinds: NDArray[np.int64], factors_NF: Floats) -> float:
    """The mean PSNR, in dB, of images against the pictures of their classes and factors drawn again.

    A mean over images in dB, as of reconstructions: a mean squared error would be that of the few worst images."""
    rows = zip(kinds, factors_NF, strict=True)
    psnrs = []
    for image in (image for pixels_BHWC in batches for image in pixels_BHWC):
        mse = np.square(image - draw(*next(rows), len(image)).astype(np.float64)).mean()
        psnrs.append(min(10 * np.log10(255**2 / mse), EXACT_PSNR) if mse else EXACT_PSNR)
    return float(np.mean(psnrs))

"""95% intervals of scores of N images: of what such scores of N other images of the same kind would average to.

A Fréchet distance and the order-free score by the delete-a-group jackknife (Efron and Stein 1981): GROUPS random groups
of images are left out in turn, and what the values spread is scaled to N. No image counts twice, which a bootstrap
does, and which raises a distance that has few images; at N = 20 images already, with as many groups, the width is that
of values of fresh images, or more where target and reference are alike. A mean over splits by Student's t, since they
share no image. The reference counts as given. No interval goes below the least value: 0 of a distance, 1 of a score.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from rdpm_cli import noise, progress
from rdpm_cli.errors import DataError
from rdpm_cli.evaluation.metrics import SPLITS, RunningScore, RunningStatistics, Statistics, frechet_distance

GROUPS = 50
FEWEST = 2 * SPLITS  # images
T_GROUPS, T_SPLITS = 2.01, 2.262  # 97.5% of Student's t with GROUPS - 1 and SPLITS - 1 degrees of freedom

Interval = list[float]


def need_images(count: int) -> None:
    """Raises DataError for too few to leave some out."""
    if count < FEWEST:
        raise DataError(f"an interval needs at least {FEWEST} images, not {count}", "take more, or leave --ci out")


def frechet(
    pool: RunningStatistics,
    features_ND: NDArray[np.float32],
    against: Statistics,
    root: NDArray[np.float64],
    value: float,
) -> Interval:
    """Of a Fréchet distance. pool: of all the features; root: of the covariance it is compared with."""
    values = []
    with progress.Bar("leave out, for the interval", min(GROUPS, pool.count), "groups") as bar:
        for rows in _groups(pool.count):
            left = pool.without(features_ND[rows])
            values.append(frechet_distance(left.statistics(), against, root))
            bar.advance(1)
    return _about(value, T_GROUPS * _jackknife(values, pool.count), 0.0)


def order_free(logits_NK: NDArray[np.float32], value: float) -> Interval:
    """Of an Inception Score over all images at once."""
    count, classes = logits_NK.shape
    groups, whole, parts = list(_groups(count)), RunningScore(count, classes, 1), []
    others = np.setdiff1d(np.arange(count), np.concatenate(groups))
    for rows in (*groups, others):
        parts.append(RunningScore(count, classes, 1))
        parts[-1].add(0, logits_NK[rows])
        whole.merge(parts[-1])
    values = [whole.without(part).order_free() for part in parts[: len(groups)]]
    return _about(value, T_GROUPS * _jackknife(values, count), 1.0)


def mean_of_splits(values_S: NDArray[np.float64]) -> Interval:
    """Of the mean over SPLITS parts that share no image."""
    error = float(np.std(values_S, ddof=1)) / len(values_S) ** 0.5
    return _about(float(values_S.mean()), T_SPLITS * error, 1.0)


def _groups(count: int) -> Iterator[NDArray[np.int64]]:
    """GROUPS, or one an image, of equal size, at random; what does not divide is in none."""
    order_N, size = noise.stream("intervals", 0).permutation(count), max(count // GROUPS, 1)
    for start in range(0, min(GROUPS, count) * size, size):
        yield np.sort(order_N[start : start + size])


def _jackknife(values_G: list[float], count: int) -> float:
    """The standard error of the value of all `count` images: m that are left out pull by m / (count - m) less."""
    size = max(count // GROUPS, 1)
    return (count - size) / (count * size) ** 0.5 * float(np.std(values_G, ddof=1))


def _about(value: float, reach: float, least: float) -> Interval:
    return [max(value - reach, least), value + reach]

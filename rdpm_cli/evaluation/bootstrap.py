"""95% intervals by bootstrap over images: N are drawn again with replacement, RESAMPLES times.

A Fréchet distance grows when images are drawn twice, as it does with fewer images; so an interval is what the
resamples spread about their own mean, laid about the value.
"""

import numpy as np
from numpy.typing import NDArray

from rdpm_cli import noise, progress
from rdpm_cli.evaluation.metrics import RunningScore, RunningStatistics, Statistics, frechet_distance, matrix_root

RESAMPLES = 50
ROWS = 4096  # of features at once
TAILS = (2.5, 97.5)  # percent

Interval = list[float]


def frechet(features_ND: NDArray[np.float32], against: Statistics, value: float) -> Interval:
    """Of a Fréchet distance whose target has these features."""
    root, values = matrix_root(against.covariance_DD), []
    with progress.Bar("bootstrap the distance", RESAMPLES, "resamples") as bar:
        for resample in range(RESAMPLES):
            rows = _random(resample).integers(len(features_ND), size=len(features_ND))
            rows.sort()  # neighbours in memory
            running = RunningStatistics(features_ND.shape[1])
            for start in range(0, len(rows), ROWS):
                running.add(features_ND[rows[start : start + ROWS]])
            values.append(frechet_distance(running.statistics(), against, root))
            bar.advance(1)
    return _about(value, values)


def score(logits_NK: NDArray[np.float32], splits: int, value: float, order_free: float) -> tuple[Interval, Interval]:
    """Of an Inception Score: of the mean over splits, images drawn within theirs, and of the order-free value."""
    count, classes = logits_NK.shape
    by_split, whole = list[float](), list[float]()
    with progress.Bar("bootstrap the score", RESAMPLES, "resamples") as bar:
        for resample in range(RESAMPLES):
            random, running = _random(resample), RunningScore(count, classes, splits)
            split_N = running.split_of(np.arange(count))
            weights = np.zeros(count, dtype=np.int64)
            for split in range(splits):
                rows = np.flatnonzero(split_N == split)
                weights[rows] = np.bincount(random.integers(len(rows), size=len(rows)), minlength=len(rows))
            for start in range(0, count, ROWS):
                running.add(start, logits_NK[start : start + ROWS], weights[start : start + ROWS])
            by_split.append(running.value())
            whole.append(running.order_free())
            bar.advance(1)
    return _about(value, by_split), _about(order_free, whole)


def _random(resample: int) -> np.random.Generator:
    return noise.stream("bootstrap", 0, resample)


def _about(value: float, resampled: list[float]) -> Interval:
    low, high = np.percentile(np.array(resampled) - np.mean(resampled), TAILS)
    return [value + float(low), value + float(high)]

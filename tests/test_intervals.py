"""95% intervals: how often they hold what they are of, and how wide they are, where the distribution is known."""

import numpy as np
import pytest
from numpy.typing import NDArray

from rdpm_cli.errors import DataError
from rdpm_cli.evaluation import intervals, metrics
from rdpm_cli.evaluation.intervals import Interval

SETS, WIDTH, CLASSES = 40, 4, 5
AGAINST = metrics.Statistics(np.zeros(WIDTH), np.eye(WIDTH), 10_000)
ROOT = metrics.matrix_root(AGAINST.covariance_DD)


def gaussian(count: int, shift: float, seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(shift, 1, (count, WIDTH)).astype(np.float32)


def distance(features: NDArray[np.float32]) -> tuple[float, Interval]:
    pool = metrics.RunningStatistics(WIDTH)
    pool.add(features)
    value = metrics.frechet_distance(pool.statistics(), AGAINST, ROOT)
    return value, intervals.frechet(pool, features, AGAINST, ROOT, value)


def opinions(count: int, seed: int) -> metrics.RunningScore:
    running = metrics.RunningScore(count, CLASSES)
    running.add(0, logits(count, seed))
    return running


def logits(count: int, seed: int) -> NDArray[np.float32]:
    return (2 * np.random.default_rng(seed).normal(size=(count, CLASSES))).astype(np.float32)


def check(found: list[Interval], values: list[float], widest: float) -> None:
    """Most hold the mean, and their mean width is near that of 95% of the values."""
    held = sum(low <= np.mean(values) <= high for low, high in found)
    assert held >= 0.85 * SETS
    assert np.mean([high - low for low, high in found]) < widest * 2 * 1.96 * np.std(values)


@pytest.mark.parametrize("shift", [0.0, 0.5])
@pytest.mark.parametrize("count", [20, 57, 400])
def test_a_distances_interval_holds_what_such_distances_average_to(count: int, shift: float) -> None:
    values = [
        metrics.frechet_distance(metrics.statistics(gaussian(count, shift, 1000 + seed)), AGAINST, ROOT)
        for seed in range(400)
    ]
    found = [distance(gaussian(count, shift, seed))[1] for seed in range(SETS)]
    check(found, values, 1.8 if shift == 0 else 1.4)
    assert min(low for low, _ in found) >= 0


@pytest.mark.parametrize("count", [40, 205])
def test_a_scores_intervals_hold_what_such_scores_average_to(count: int) -> None:
    others, own = (
        [opinions(count, first + seed) for seed in range(number)] for first, number in ((1000, 400), (0, SETS))
    )
    whole = [
        intervals.order_free(logits(count, seed), running.order_free())
        for seed, running in zip(range(SETS), own, strict=True)
    ]
    check(whole, [running.order_free() for running in others], 1.4)
    check([intervals.mean_of_splits(running.by_split()) for running in own], [r.value() for r in others], 1.4)
    assert min(low for low, _ in whole) >= 1


def test_images_that_are_their_own_reference_have_an_interval_from_zero() -> None:
    features = gaussian(60, 0, 0)
    own = metrics.statistics(features)
    pool = metrics.RunningStatistics(WIDTH)
    pool.add(features)
    low, high = intervals.frechet(pool, features, own, metrics.matrix_root(own.covariance_DD), 0.0)
    assert low == 0 < high


def test_an_interval_is_the_same_each_time_and_of_too_few_images_refused() -> None:
    assert distance(gaussian(57, 0.5, 1)) == distance(gaussian(57, 0.5, 1))
    intervals.need_images(20)
    with pytest.raises(DataError, match="at least 20 images, not 19"):
        intervals.need_images(19)

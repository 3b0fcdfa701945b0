"""Each metric against an independent computation: torch-fidelity's, scipy's, a few lines of numpy, or known values."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.linalg import sqrtm
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import calculate_precision_recall_full

from rdpm_cli.errors import DataError
from rdpm_cli.evaluation import metrics
from rdpm_cli.evaluation.metrics import Interval, Statistics, frechet_distance, moments, statistics

Floats = NDArray[np.float32]


def correlated(count: int, width: int, seed: int, shift: float = 0.0) -> Floats:
    """Features like an extractor's: non-negative, with a mean far from 0."""
    random = np.random.default_rng(seed)
    mixed = random.normal(size=(count, width)) @ random.normal(size=(width, width)) / width**0.5
    return (np.abs(mixed) + 0.5 + shift).astype(np.float32)


def distance(a_ND: NDArray[np.floating], b_ND: NDArray[np.floating]) -> float:
    return frechet_distance(statistics(a_ND), statistics(b_ND))


@pytest.mark.parametrize("block", [7, 4096])
def test_statistics_are_mean_and_unbiased_covariance_in_float64(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "BLOCK", block)
    features = correlated(40, 5, 0) + 1e4
    result = statistics(features.astype(np.float32))
    exact = features.astype(np.float32).astype(np.float64)
    assert result.count == 40
    assert result.covariance_DD.dtype == np.float64
    assert np.allclose(result.mean_D, exact.mean(0), rtol=1e-12)
    assert np.allclose(result.covariance_DD, np.cov(exact, rowvar=False), rtol=1e-9)


@pytest.mark.parametrize("cuts", [[20], [1, 2], [1, 2, 3, 39]])
def test_moments_of_parts_add_up_and_subtract(cuts: list[int]) -> None:
    features = correlated(40, 6, 0) + 1e3
    parts = [moments(part) for part in np.split(features, cuts)]
    total, expected = sum(parts[1:], parts[0]).statistics(), statistics(features)
    assert total.count == 40
    assert np.allclose(total.mean_D, expected.mean_D, rtol=1e-12)
    assert np.allclose(total.covariance_DD, expected.covariance_DD, rtol=1e-7, atol=1e-10)
    rest = (moments(features) - parts[-1]).statistics()
    assert np.allclose(rest.covariance_DD, statistics(features[: cuts[-1]]).covariance_DD, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize(("counts", "width"), [((300, 200), 40), ((50, 57), 8), ((30, 37), 1)])
def test_the_distance_is_torch_fidelitys_and_scipys(counts: tuple[int, int], width: int) -> None:
    a, b = correlated(counts[0], width, 1), correlated(counts[1], width, 2, 0.3)
    sides = [fid_features_to_statistics(torch.from_numpy(side.astype(np.float64))) for side in (a, b)]
    if width > 1:
        theirs = fid_statistics_to_metric(*sides, verbose=False)["frechet_inception_distance"]
        assert distance(a, b) == pytest.approx(theirs, rel=1e-7)
    (mean_a, cov_a), (mean_b, cov_b) = ((side["mu"], np.atleast_2d(side["sigma"])) for side in sides)
    expected = np.sum((mean_a - mean_b) ** 2) + np.trace(cov_a + cov_b - 2 * np.real(sqrtm(cov_a @ cov_b)))
    assert distance(a, b) == pytest.approx(expected, rel=1e-7)
    reference = statistics(b)
    for _ in range(2):  # the second time its root is known
        assert frechet_distance(statistics(a), reference) == distance(a, b)


@pytest.mark.parametrize(("count", "width"), [(50, 8), (5, 8)])  # full rank, and fewer images than features
def test_closed_forms_of_the_distance(count: int, width: int) -> None:
    a = correlated(count, width, 0).astype(np.float64)
    scale = float(np.trace(statistics(a).covariance_DD))
    shift = np.arange(width) / 3
    assert 0 <= distance(a, a) < 1e-6 * scale
    assert distance(a, a + shift) == pytest.approx(np.sum(shift**2), abs=1e-6 * scale)
    mean = a.mean(0)
    assert distance(a, mean + 3 * (a - mean)) == pytest.approx(4 * scale, rel=1e-6)  # (1 - 3)² tr S
    diagonal_a = Statistics(np.array([0.0, 1.0]), np.diag([4.0, 9.0]), 10)
    diagonal_b = Statistics(np.array([2.0, 1.0]), np.diag([1.0, 16.0]), 10)
    assert frechet_distance(diagonal_a, diagonal_b) == pytest.approx(4 + (2 - 1) ** 2 + (3 - 4) ** 2)


def test_a_damaged_covariance_gives_no_distance() -> None:
    whole = statistics(correlated(50, 4, 1))
    with pytest.raises(DataError):
        frechet_distance(Statistics(whole.mean_D, -2 * np.eye(4), 50), whole)


@pytest.mark.parametrize(
    ("counts", "size", "subsets"),
    [([80] * 10, 297, 2), ([80] * 10, 100, 8), ([2, 2, 2], 2, 3), ([7, 5, 9], 6, 2), ([3, 3], 7, 0), ([5, 0, 5], 4, 2)],
)
def test_balanced_subsets_are_disjoint_and_balanced(counts: list[int], size: int, subsets: int) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    groups = metrics.balanced_subsets(labels, size)
    assert [len(rows) for rows in groups] == [size] * subsets
    used = [int(row) for rows in groups for row in rows]
    assert len(used) == len(set(used))
    for rows in groups:
        shares = np.unique(labels[rows], return_counts=True)[1]
        assert shares.max() - shares.min() <= 1
        assert len(shares) == min(size, sum(count > 0 for count in counts))


def test_the_score_is_torch_fidelitys_unshuffled() -> None:
    """Where the images divide into splits of one size; ADM's last split may be smaller."""
    logits = 3 * np.random.default_rng(0).normal(size=(200, 12))
    theirs = isc_features_to_metric(torch.from_numpy(logits), splits=10, shuffle=False)
    by_split, order_free = metrics.inception_score(logits, 20)
    assert float(by_split.mean()) == pytest.approx(theirs["inception_score_mean"], rel=1e-12)
    assert float(np.std(by_split)) == pytest.approx(theirs["inception_score_std"], rel=1e-9)
    whole = isc_features_to_metric(torch.from_numpy(logits), splits=1, shuffle=True)["inception_score_mean"]
    assert order_free == pytest.approx(whole, rel=1e-12)


def test_splits_have_five_thousand_images_as_adms_whatever_their_number() -> None:
    logits = np.random.default_rng(0).normal(size=(12_000, 3))
    by_split, order_free = metrics.inception_score(logits)
    ends = [0, 5000, 10_000, 12_000]
    assert by_split == pytest.approx([metrics.inception_score(logits[a:b])[1] for a, b in itertools.pairwise(ends)])
    few, of_all = metrics.inception_score(logits[:3000])
    assert few.tolist() == [of_all]
    assert of_all != order_free


@pytest.mark.parametrize(("counts", "k"), [((60, 40), 3), ((40, 90), 3), ((30, 30), 1), ((7, 5), 4)])
@pytest.mark.parametrize("blocks", [(4096, 8192), (16, 7), (1, 1)])
def test_precision_and_recall_are_torch_fidelitys_whatever_the_blocks(
    counts: tuple[int, int], k: int, blocks: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "ROWS", blocks[0])
    monkeypatch.setattr(metrics, "COLUMNS", blocks[1])
    samples, reference = correlated(counts[0], 6, 1, 0.2), correlated(counts[1], 6, 2)
    values = metrics.precision_recall(samples, reference, k)
    theirs = calculate_precision_recall_full(torch.from_numpy(samples), torch.from_numpy(reference), k)
    assert values == pytest.approx(theirs[:2], abs=1e-7)
    assert 0 < values[0] < 1 or counts == (7, 5)


def test_features_on_a_grid_keep_their_ties() -> None:
    """Counts: many distances equal a radius exactly, which decides whether a sample is inside."""
    random = np.random.default_rng(0)
    samples, reference = (random.integers(0, 4, (n, 6)).astype(np.float32) + 7 for n in (300, 200))
    theirs = calculate_precision_recall_full(torch.from_numpy(samples), torch.from_numpy(reference))
    for scale in (1, 1 / 8, 1024):
        assert metrics.precision_recall(scale * samples, scale * reference) == pytest.approx(theirs[:2], abs=1e-7)


@pytest.mark.parametrize(("counts", "k"), [((60, 40), 5), ((40, 90), 3)])
def test_density_and_coverage_are_their_definition(counts: tuple[int, int], k: int) -> None:
    samples, reference = correlated(counts[0], 6, 1, 0.2), correlated(counts[1], 6, 2)
    x, y = samples.astype(np.float64), reference.astype(np.float64)
    radii = np.sort(np.linalg.norm(y[:, None] - y[None], axis=2), 1)[:, k]  # 0 is the point itself
    inside = np.linalg.norm(x[:, None] - y[None], axis=2) <= radii
    expected = inside.sum() / (k * len(x)), inside.any(0).mean()
    assert metrics.density_coverage(samples, reference, k) == pytest.approx(expected)
    assert 0 < expected[1] < 1


def test_mind_is_the_sliced_wasserstein_distance() -> None:
    """Of a shift by v: 3 |v|². Of sets on a line in one dimension: 3 times the mean squared distance of quantiles."""
    samples = correlated(300, 8, 0)
    shift = np.arange(8, dtype=np.float32) / 4
    assert metrics.mind(samples, samples) == 0
    assert metrics.mind(samples + shift, samples) == pytest.approx(3 * np.sum(shift**2), rel=0.1)  # of 1,000 directions
    a, b = np.random.default_rng(0).normal(size=(2, 500, 1)).astype(np.float32) * [[[1]], [[3]]]
    expected = 3 * np.mean((np.sort(a[:, 0]) - np.sort(b[:, 0])) ** 2)
    assert metrics.mind(a, b[np.random.default_rng(1).permutation(500)]) == pytest.approx(expected, rel=1e-5)


def test_cmmd_is_its_definition_and_blind_to_the_features_length() -> None:
    samples, reference = correlated(40, 8, 1, 0.2), correlated(60, 8, 2)

    def kernel(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
        distances = ((x[:, None] - y[None]) ** 2).sum(2)
        return float(np.exp(-distances / 200).mean())

    x, y = (side / np.linalg.norm(side.astype(np.float64), axis=1, keepdims=True) for side in (samples, reference))
    expected = 1000 * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y))
    assert metrics.cmmd(samples, reference) == pytest.approx(expected, rel=1e-4)
    assert metrics.cmmd(7 * samples, reference) == pytest.approx(expected, rel=1e-4)
    assert metrics.cmmd(samples, samples) == pytest.approx(0, abs=1e-6)


def test_the_extrapolated_distance_has_no_bias_of_few_images() -> None:
    reference, shift = Statistics(np.zeros(6), np.eye(6), 10_000), 0.1
    sets = [np.random.default_rng(seed).normal(shift, 1, (400, 6)) for seed in range(60)]
    plain = [frechet_distance(statistics(each), reference) for each in sets]
    infinite = [metrics.fd_infinity(each, reference) for each in sets]
    exact, error = 6 * shift**2, np.std(infinite) / 60**0.5
    assert np.mean(infinite) == pytest.approx(exact, abs=3 * error)
    assert np.mean(plain) > exact + 5 * np.std(plain) / 60**0.5


def test_a_large_common_mean_moves_no_neighbour() -> None:
    samples, reference = correlated(80, 8, 1, 0.2).astype(np.float64), correlated(60, 8, 2).astype(np.float64)
    assert metrics.precision_recall(samples + 1e4, reference + 1e4) == metrics.precision_recall(samples, reference)


def test_the_kernel_distance_is_torch_fidelitys() -> None:
    samples, reference = correlated(150, 20, 1, 0.1), correlated(120, 20, 2)
    value, spread = metrics.kernel_distance(samples, reference, subsets=7, size=100)
    sides = (torch.from_numpy(side.astype(np.float64)) for side in (samples, reference))
    theirs = kid_features_to_metric(*sides, kid_subsets=7, kid_subset_size=100, verbose=False)
    assert value == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)
    assert spread == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-9)


# 95% intervals: how often they hold the mean of such scores, and how wide they are

SETS, WIDTH, CLASSES = 40, 4, 5
STANDARD = Statistics(np.zeros(WIDTH), np.eye(WIDTH), 10_000)


def gaussian(count: int, shift: float, seed: int) -> Floats:
    return np.random.default_rng(seed).normal(shift, 1, (count, WIDTH)).astype(np.float32)


def logits(count: int, seed: int) -> Floats:
    return (2 * np.random.default_rng(seed).normal(size=(count, CLASSES))).astype(np.float32)


def interval(features: Floats, reference: Statistics = STANDARD) -> Interval:
    value = frechet_distance(statistics(features), reference)
    values = list(metrics.distances_without_groups(features, reference))
    return metrics.interval_from_groups(value, values, len(features))


def check(intervals: Sequence[Interval], values: Sequence[float], widest: float) -> None:
    """Most hold the mean, and their mean width is near that of 95% of the values."""
    holding = sum(low <= np.mean(values) <= high for low, high in intervals)
    assert holding >= 0.85 * SETS
    assert np.mean([high - low for low, high in intervals]) < widest * 2 * 1.96 * np.std(values)


@pytest.mark.parametrize(("count", "shift"), [(20, 0.0), (57, 0.5), (400, 0.0)])
def test_the_interval_of_a_distance_holds_the_mean_of_such_distances(count: int, shift: float) -> None:
    values = [frechet_distance(statistics(gaussian(count, shift, 1000 + s)), STANDARD) for s in range(400)]
    intervals = [interval(gaussian(count, shift, seed)) for seed in range(SETS)]
    check(intervals, values, 1.8 if shift == 0 else 1.4)
    assert min(low for low, _ in intervals) >= 0


@pytest.mark.parametrize("count", [40, 205])
def test_the_intervals_of_a_score_hold_the_mean_of_such_scores(count: int) -> None:
    other = [metrics.inception_score(logits(count, 1000 + seed), count // 10) for seed in range(400)]
    scores = [metrics.inception_score(logits(count, seed), count // 10) for seed in range(SETS)]
    intervals = [metrics.score_intervals(logits(count, seed), *scores[seed]) for seed in range(SETS)]
    splits, whole = zip(*intervals, strict=True)
    check(whole, [order_free for _, order_free in other], 1.4)
    check(splits, [float(by_split.mean()) for by_split, _ in other], 1.4)
    assert min(low for low, _ in whole) >= 1


def test_an_interval_is_reproducible_and_begins_at_zero_for_equal_sets() -> None:
    assert interval(gaussian(57, 0.5, 1)) == interval(gaussian(57, 0.5, 1))
    features = gaussian(60, 0, 0)
    low, high = interval(features, statistics(features))
    assert low == 0 < high

"""Each metric of features beside an independent computation: torch-fidelity's, or a few lines of numpy."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.linalg import sqrtm

from rdpm_cli.errors import DataError
from rdpm_cli.evaluation import metrics
from rdpm_cli.evaluation.metrics import manifold

Floats = NDArray[np.float32]


def correlated(count: int, width: int, seed: int, shift: float = 0.0) -> Floats:
    """Features as an extractor gives them: non-negative, with a mean far from 0."""
    random = np.random.default_rng(seed)
    mixed = random.normal(size=(count, width)) @ random.normal(size=(width, width)) / width**0.5
    return (np.abs(mixed) + 0.5 + shift).astype(np.float32)


# ---- Fréchet distance ----------------------------------------------------------------------------------------------


def test_the_distance_is_torch_fidelitys_and_scipys() -> None:
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    a, b = correlated(300, 40, 1), correlated(200, 40, 2, 0.3)
    ours = metrics.frechet_distance(metrics.statistics(a), metrics.statistics(b))
    sides = [fid_features_to_statistics(torch.from_numpy(side.astype(np.float64))) for side in (a, b)]
    theirs = fid_statistics_to_metric(*sides, verbose=False)["frechet_inception_distance"]
    root = np.trace(np.real(np.asarray(sqrtm(sides[0]["sigma"] @ sides[1]["sigma"]))))
    trace = np.trace(sides[0]["sigma"]) + np.trace(sides[1]["sigma"]) - 2 * root
    assert ours == pytest.approx(theirs, rel=1e-7)
    assert ours == pytest.approx(float(np.sum((sides[0]["mu"] - sides[1]["mu"]) ** 2) + trace), rel=1e-7)


def test_a_known_root_changes_nothing() -> None:
    a, b = (metrics.statistics(correlated(50, 8, seed)) for seed in (1, 2))
    root = metrics.matrix_root(b.covariance_DD)
    assert np.allclose(root @ root, b.covariance_DD)
    assert metrics.frechet_distance(a, b, root) == metrics.frechet_distance(a, b)


@pytest.mark.parametrize("count", [6, 30, 200])
def test_a_set_is_at_no_distance_below_zero_from_itself(count: int) -> None:
    own = metrics.statistics(correlated(count, 30, 1))
    assert 0 <= metrics.frechet_distance(own, own) < 1e-5


@pytest.mark.parametrize("spoiled", [-2 * np.eye(4), np.full((4, 4), np.nan)])
def test_what_is_no_covariance_gives_no_distance(spoiled: NDArray[np.float64]) -> None:
    whole = metrics.statistics(correlated(50, 4, 1))
    with pytest.raises(DataError, match="which no two covariances have") as refused:
        metrics.frechet_distance(metrics.Statistics(whole.mean_D, spoiled, 50), whole)
    assert refused.value.hint


def test_what_is_taken_away_again_leaves_the_rest() -> None:
    found = correlated(40, 6, 0) + 1e3
    whole = metrics.RunningStatistics(6)
    whole.add(found)
    left, wanted = whole.without(found[5:12]).statistics(), metrics.statistics(np.delete(found, slice(5, 12), 0))
    assert left.count == 33
    assert np.allclose(left.mean_D, wanted.mean_D, rtol=1e-12)
    assert np.allclose(left.covariance_DD, wanted.covariance_DD, rtol=1e-7, atol=1e-10)
    assert whole.count == 40


@pytest.mark.parametrize("cuts", [[20], [1, 2], [0, 40]])
def test_statistics_of_several_processes_are_those_of_one(cuts: list[int]) -> None:
    found = correlated(40, 6, 0) + 1e3
    whole = metrics.RunningStatistics(6)
    for part in np.split(found, cuts):
        one = metrics.RunningStatistics(6)
        if len(part):
            one.add(part)
        whole.merge(one)
    wanted = metrics.statistics(found)
    assert whole.statistics().count == 40
    assert np.allclose(whole.statistics().mean_D, wanted.mean_D, rtol=1e-12)
    assert np.allclose(whole.statistics().covariance_DD, wanted.covariance_DD, rtol=1e-7, atol=1e-10)


# ---- Inception Score -----------------------------------------------------------------------------------------------


def score_of(logits: NDArray[np.floating], pieces: int = 1) -> metrics.RunningScore:
    running = metrics.RunningScore(len(logits), logits.shape[1])
    for part in np.array_split(np.arange(len(logits)), pieces)[::-1]:
        running.add(int(part[0]), logits[part])
    return running


@pytest.mark.parametrize("count", [10, 57, 200])
def test_the_score_is_torch_fidelitys_unshuffled(count: int) -> None:
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = 3 * np.random.default_rng(0).normal(size=(count, 12))
    theirs = isc_features_to_metric(torch.from_numpy(logits), splits=10, shuffle=False)
    ours = score_of(logits)
    assert ours.value() == pytest.approx(theirs["inception_score_mean"], rel=1e-12)
    assert float(np.std(ours.by_split())) == pytest.approx(theirs["inception_score_std"], rel=1e-9)
    whole = isc_features_to_metric(torch.from_numpy(logits), splits=1, shuffle=True)["inception_score_mean"]
    assert ours.order_free() == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("pieces", [2, 3, 7])
def test_pieces_in_any_order_give_the_score_of_the_whole(pieces: int) -> None:
    logits = 3 * np.random.default_rng(0).normal(size=(57, 12)).astype(np.float32)
    whole = score_of(logits)
    assert score_of(logits, pieces).value() == pytest.approx(whole.value(), rel=1e-12)
    halves = [metrics.RunningScore(57, 12) for _ in range(2)]
    halves[0].add(30, logits[30:])
    halves[1].add(0, logits[:30])
    halves[0].merge(halves[1])
    assert halves[0].by_split() == pytest.approx(whole.by_split(), rel=1e-12)


def test_scores_of_known_opinions() -> None:
    sure = 1000 * np.eye(20)[np.repeat(np.arange(20), 10)]  # by class: each split sees two
    shuffled = sure[np.random.default_rng(0).permutation(200)]
    assert score_of(sure).value() == pytest.approx(2)
    assert score_of(sure).order_free() == score_of(shuffled).order_free() == pytest.approx(20)
    assert score_of(shuffled).value() > 10
    assert score_of(np.zeros((30, 5))).value() == pytest.approx(1)


def test_fewer_images_than_splits_are_refused() -> None:
    with pytest.raises(DataError, match="10 splits needs as many images, not 9") as refused:
        metrics.RunningScore(9, 3)
    assert refused.value.exit_code == 3


# ---- precision and recall ------------------------------------------------------------------------------------------


def precision_recall_by_hand(ours: Floats, theirs: Floats, k: int) -> tuple[float, float]:
    """Kynkäänniemi et al. 2019, all distances at once."""

    def distances(a: Floats, b: Floats) -> NDArray[np.float64]:
        return np.sqrt(((a[:, None].astype(np.float64) - b[None].astype(np.float64)) ** 2).sum(2))

    def balls(x: Floats) -> NDArray[np.float64]:
        return np.sort(distances(x, x), axis=1)[:, k]  # column 0 is the point itself

    cross = distances(ours, theirs)
    return float((cross <= balls(theirs)[None]).any(1).mean()), float((cross <= balls(ours)[:, None]).any(0).mean())


@pytest.mark.parametrize(("counts", "k"), [((60, 40), 3), ((40, 90), 3), ((30, 30), 1), ((7, 5), 4)])
@pytest.mark.parametrize("blocks", [(4096, 8192), (16, 7), (1, 1)])
def test_precision_and_recall_are_those_of_all_distances(
    counts: tuple[int, int], k: int, blocks: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifold, "ROWS", blocks[0])
    monkeypatch.setattr(manifold, "COLUMNS", blocks[1])
    ours, theirs = correlated(counts[0], 6, 1, 0.2), correlated(counts[1], 6, 2)
    found = metrics.precision_recall(ours, theirs, k)
    assert found == precision_recall_by_hand(ours, theirs, k)
    assert 0 < found[0] < 1 or counts == (7, 5)


def test_precision_and_recall_are_torch_fidelitys() -> None:
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    ours, theirs = correlated(300, 30, 1, 0.1), correlated(200, 30, 2)
    wanted = calculate_precision_recall_full(torch.from_numpy(ours), torch.from_numpy(theirs), 3)
    assert metrics.precision_recall(ours, theirs) == pytest.approx(wanted[:2], abs=1e-7)


def test_a_set_covers_itself_and_nothing_far_away() -> None:
    here, far = correlated(50, 8, 1), correlated(50, 8, 1, 100.0)
    assert metrics.precision_recall(here, here) == (1.0, 1.0)
    assert metrics.precision_recall(here, far) == (0.0, 0.0)
    assert metrics.precision_recall(np.repeat(here[:5], 10, 0), here)[0] == 1.0, "copies of real images"


def test_a_large_common_mean_moves_no_neighbour() -> None:
    ours, theirs = correlated(80, 8, 1, 0.2).astype(np.float64), correlated(60, 8, 2).astype(np.float64)
    assert metrics.precision_recall(ours + 1e4, theirs + 1e4) == metrics.precision_recall(ours, theirs)


@pytest.mark.parametrize("counts", [(3, 10), (10, 3)])
def test_no_more_images_than_neighbours_are_refused(counts: tuple[int, int]) -> None:
    with pytest.raises(DataError, match="more than 3 images, not 3"):
        metrics.precision_recall(correlated(counts[0], 4, 1), correlated(counts[1], 4, 2))


# ---- kernel distance -----------------------------------------------------------------------------------------------


def test_the_kernel_distance_is_torch_fidelitys() -> None:
    from torch_fidelity.metric_kid import kid_features_to_metric

    ours, theirs = correlated(150, 20, 1, 0.1), correlated(120, 20, 2)
    found = metrics.kernel_distance(ours, theirs, subsets=7, size=100)
    wide = (torch.from_numpy(side.astype(np.float64)) for side in (ours, theirs))
    wanted = kid_features_to_metric(*wide, kid_subsets=7, kid_subset_size=100, verbose=False)
    assert found.value == pytest.approx(wanted["kernel_inception_distance_mean"], rel=1e-9)
    assert found.spread == pytest.approx(wanted["kernel_inception_distance_std"], rel=1e-9)
    assert (found.subsets, found.size) == (7, 100)


def test_the_kernel_distance_of_equals_is_about_zero_and_grows_with_a_shift() -> None:
    a, b = correlated(400, 8, 1), correlated(400, 8, 1)
    near = metrics.kernel_distance(a[:200], b[200:], subsets=20)
    far = metrics.kernel_distance(a[:200], b[200:] + 1, subsets=20)
    assert near.size == 200
    assert abs(near.value) < 0.05 * far.value


def test_one_image_has_no_kernel_distance() -> None:
    with pytest.raises(DataError, match="at least 2 images, not 1"):
        metrics.kernel_distance(correlated(1, 4, 1), correlated(9, 4, 2))

"""Metrics as functions of arrays.

Legend: N, M images, D feature width, K classes, S splits, G groups that are left out.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rdpm_cli import noise
from rdpm_cli.errors import DataError

Array = NDArray[np.float64]
AnyFloats = NDArray[np.floating]
Interval = list[float]  # [lower, upper]

BLOCK = 4096  # rows that are converted to float64 at a time: 64 MiB of Inception's features


def need_images(count: int, fewest: int, score: str) -> None:
    """Raises DataError for fewer images than a score needs."""
    if count < fewest:
        raise DataError(f"{score} needs at least {fewest} images, not {count}", "take more images")


# ---- Fréchet distance ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Statistics:
    """Mean (D,) and covariance (D, D), ddof 1, of the features of `count` images; count 0: not known."""

    mean_D: Array
    covariance_DD: Array
    count: int


@dataclass(frozen=True)
class Moments:
    """Mean and scatter, sum (x - mean)(x - mean)^T, of features. Disjoint sets add up (Chan et al. 1979)."""

    mean_D: Array
    scatter_DD: Array
    count: int

    def __add__(self, part: "Moments") -> "Moments":
        if not (self.count and part.count):
            return part if part.count else self
        return self._join(part, 1)

    def __sub__(self, part: "Moments") -> "Moments":
        """The moments of the rest, without a part that is in this set."""
        return self._join(part, -1)

    def _join(self, part: "Moments", sign: int) -> "Moments":
        total, step_D = self.count + sign * part.count, part.mean_D - self.mean_D
        between_DD = np.outer(step_D, step_D * (sign * self.count * part.count / total))
        mean_D = self.mean_D + step_D * (sign * part.count / total)
        return Moments(mean_D, self.scatter_DD + sign * part.scatter_DD + between_DD, total)

    def statistics(self) -> Statistics:
        """Raises DataError for fewer than 2 images."""
        need_images(self.count, 2, "a covariance")
        return Statistics(self.mean_D, self.scatter_DD / (self.count - 1), self.count)


NO_MOMENTS = Moments(np.empty(0), np.empty((0, 0)), 0)  # to add to


def moments(features_ND: AnyFloats) -> Moments:
    """Mean and scatter in float64, of at least one image. Two passes: one would cancel where the mean is large."""
    mean_D: Array = features_ND.mean(0, dtype=np.float64)
    scatter_DD = np.zeros((len(mean_D), len(mean_D)))
    for start in range(0, len(features_ND), BLOCK):
        centred = features_ND[start : start + BLOCK].astype(np.float64) - mean_D
        scatter_DD += centred.T @ centred
    return Moments(mean_D, scatter_DD, len(features_ND))


def statistics(features_ND: AnyFloats) -> Statistics:
    """Mean and covariance in float64, ddof 1. Raises DataError for fewer than 2 images."""
    return moments(features_ND).statistics()


def matrix_root(covariance_DD: Array) -> Array:
    """The symmetric root of a covariance."""
    values, vectors = np.linalg.eigh(covariance_DD)
    root: Array = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T  # rounding makes zeros slightly negative
    return root


def frechet_distance(a: Statistics, b: Statistics, root_b: Array | None = None) -> float:
    """|mu_a - mu_b|² + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) (Heusel et al. 2017).

    The trace of the root is the sum of the roots of the eigenvalues of S_b^(1/2) S_a S_b^(1/2), which is symmetric, so
    no root of a general matrix is needed. root_b: `matrix_root` of b's covariance, to save computing it again.

    Raises DataError for statistics that belong to no set of features.
    """
    root = matrix_root(b.covariance_DD) if root_b is None else root_b
    try:
        cross = np.clip(np.linalg.eigvalsh(root @ a.covariance_DD @ root), 0, None)
    except np.linalg.LinAlgError:
        cross = np.array([np.nan])
    mean_term = np.sum((a.mean_D - b.mean_D) ** 2)
    trace = np.trace(a.covariance_DD) + np.trace(b.covariance_DD) - 2 * np.sqrt(cross).sum()
    distance = float(mean_term + trace)
    # A covariance pair never gives a negative distance but for rounding: each of the D eigenvalues is off by at most
    # the machine epsilon of the largest, so its root by at most sqrt(eps). Anything below that is damage.
    rounding = len(cross) * np.sqrt(np.finfo(np.float64).eps * cross.max())
    if not distance >= -2 * rounding:
        raise DataError(
            f"the statistics give a Fréchet distance of {distance:.6g}, which no two covariances have",
            "they are damaged: make the reference again",
        )
    return max(distance, 0.0)


def balanced_subsets(labels_N: NDArray[np.integer], size: int) -> list[NDArray[np.int64]]:
    """As many disjoint class-balanced subsets of `size` rows as there are: classes differ by at most one row."""
    classes = np.unique(labels_N)
    queues = {c: list(np.flatnonzero(labels_N == c)) for c in classes}
    share, extra = divmod(size, len(classes))
    subsets: list[NDArray[np.int64]] = []
    while True:
        # The classes with one row more rotate from subset to subset, so that none runs out early.
        first = len(subsets) * extra
        with_extra = {classes[(first + k) % len(classes)] for k in range(extra)}
        counts = {c: share + (c in with_extra) for c in classes}
        if any(len(queues[c]) < counts[c] for c in classes):
            return subsets
        rows = [queues[c].pop(0) for c in classes for _ in range(counts[c])]
        subsets.append(np.array(rows, dtype=np.int64))


# ---- Inception Score -----------------------------------------------------------------------------------------------

SPLITS = 10  # consecutive, in file order: of 5,000 images at 50,000, as ADM


def inception_score(logits_NK: AnyFloats, splits: int = SPLITS) -> tuple[Array, float]:
    """exp of the mean KL(p(y|x) || p(y)) (Salimans et al. 2016) -> of each consecutive split (S,), of all images.

    ADM's score is the mean over splits, which depends on the order of the images; that of all images does not, and is
    larger. Raises DataError for fewer images than splits.
    """
    count = len(logits_NK)
    need_images(count, splits, f"an Inception Score over {splits} splits")
    ends = [split * count // splits for split in range(splits + 1)]
    sums = [_score_sums(logits_NK[start:end]) for start, end in itertools.pairwise(ends)]
    return np.array([_score(part) for part in sums]), _score(np.sum(sums, 0))


def _score_sums(logits_NK: AnyFloats) -> Array:
    """Sums over images that fix the score of a set: p (K numbers), sum_k p log p, and the number of images. (K + 2,)"""
    log_p = logits_NK.astype(np.float64)
    log_p -= log_p.max(1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))
    p = np.exp(log_p)
    return np.array([*p.sum(0), (p * log_p).sum(), len(log_p)])


def _score(sums: Array) -> float:
    """exp(mean of sum_k p log p - sum_k q log q), q the mean p. The mean KL, since p averages to q."""
    count = sums[-1]
    q = sums[:-2] / count
    return float(np.exp(sums[-2] / count - (q * np.log(np.where(q > 0, q, 1.0))).sum()))


# ---- precision and recall ------------------------------------------------------------------------------------------

NEIGHBOURS = 3  # ADM's k
ROWS, COLUMNS = 4096, 8192  # of a block of distances: 128 MiB


def precision_recall(
    samples_ND: AnyFloats, reference_MD: AnyFloats, k: int = NEIGHBOURS, device: torch.device | None = None
) -> tuple[float, float]:
    """(precision, recall): shares inside the other set's k-nearest-neighbour balls (Kynkäänniemi et al. 2019).

    Exact, in blocks of distances. Raises DataError for sets of k images or fewer.
    """
    need_images(min(len(samples_ND), len(reference_MD)), k + 1, "precision and recall")
    # |a|² - 2ab + |b|² loses small distances where the features have a large common mean, so it is subtracted.
    centre_D = reference_MD.mean(0, dtype=np.float64)
    samples, reference = (_centred(side, centre_D).to(device) for side in (samples_ND, reference_MD))
    radii_N, radii_M = _radii(samples, k), _radii(reference, k)
    precise = torch.zeros_like(radii_N, dtype=torch.bool)
    recalled = torch.zeros_like(radii_M, dtype=torch.bool)
    for rows, columns, distances in _blocks(samples, reference):
        precise[rows] |= (distances <= radii_M[columns]).any(1)
        recalled[columns] |= (distances <= radii_N[rows, None]).any(0)
    return float(precise.double().mean()), float(recalled.double().mean())


def _centred(x_ND: AnyFloats, centre_D: Array) -> Tensor:
    """x - centre, subtracted in float64, rounded to fp32, without a float64 copy of the whole."""
    centred_ND = np.empty(x_ND.shape, dtype=np.float32)
    np.subtract(x_ND, centre_D, out=centred_ND, casting="same_kind")
    return torch.from_numpy(centred_ND)


def _radii(x_ND: Tensor, k: int) -> Tensor:
    """Squared distance of each row to its k-th nearest neighbour, (N,)."""
    nearest_NK = torch.full((len(x_ND), k), torch.inf, device=x_ND.device)
    for rows, columns, distances in _blocks(x_ND, x_ND):
        first, last = max(rows.start, columns.start), min(rows.stop, columns.stop)
        diagonal = torch.arange(first, max(first, last), device=x_ND.device)
        distances[diagonal - rows.start, diagonal - columns.start] = torch.inf  # a point is no neighbour of itself
        smallest = distances.topk(min(k, distances.shape[1]), largest=False).values
        nearest_NK[rows] = torch.cat([nearest_NK[rows], smallest], 1).topk(k, largest=False).values
    return nearest_NK.amax(1)


def _blocks(a_ND: Tensor, b_MD: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """(rows, columns, their squared distances)."""
    a_squared, b_squared = a_ND.square().sum(1), b_MD.square().sum(1)
    for row in range(0, len(a_ND), ROWS):
        rows = slice(row, min(row + ROWS, len(a_ND)))
        for column in range(0, len(b_MD), COLUMNS):
            columns = slice(column, min(column + COLUMNS, len(b_MD)))
            distances = torch.addmm(b_squared[columns], a_ND[rows], b_MD[columns].T, alpha=-2)
            yield rows, columns, distances.add_(a_squared[rows, None]).clamp_(min=0)


# ---- kernel distance -----------------------------------------------------------------------------------------------

SUBSETS, SUBSET_SIZE, SUBSET_SEED = 100, 1000, 2020  # torch-fidelity's


def kernel_distance(
    samples_ND: AnyFloats, reference_MD: AnyFloats, subsets: int = SUBSETS, size: int = SUBSET_SIZE
) -> tuple[float, float]:
    """KID (Bińkowski et al. 2018): unbiased MMD² under the kernel (x·y / D + 1)³ -> mean and spread over subsets.

    The subsets are torch-fidelity's random draws, at most as large as the smaller set. Raises DataError for fewer than
    2 images.
    """
    count = min(len(samples_ND), len(reference_MD))
    need_images(count, 2, "a kernel distance")
    size = min(size, count)
    random = np.random.RandomState(SUBSET_SEED)
    values = []
    for _ in range(subsets):
        x, y = (
            side[random.choice(len(side), size, replace=False)].astype(np.float64)
            for side in (samples_ND, reference_MD)
        )
        values.append(_mmd2(x, y))
    return float(np.mean(values)), float(np.std(values))


def _mmd2(x_MD: Array, y_MD: Array) -> float:
    """The unbiased estimate: without the diagonals within a set."""
    count = len(x_MD)
    within = sum(float(k.sum() - np.trace(k)) for k in (_kernel(x_MD, x_MD), _kernel(y_MD, y_MD)))
    return within / (count * (count - 1)) - 2 * float(_kernel(x_MD, y_MD).mean())


def _kernel(x_MD: Array, y_MD: Array) -> Array:
    values: Array = (x_MD @ y_MD.T / x_MD.shape[1] + 1) ** 3
    return values


# ---- 95% intervals -------------------------------------------------------------------------------------------------
#
# Intervals of what such scores of N other images of the same kind would average to; the reference counts as fixed.
# A Fréchet distance and the order-free score by the delete-a-group jackknife (Efron and Stein 1981): random groups of
# images are left out in turn, and the spread of the values is scaled to N. A bootstrap would count images twice, which
# raises a distance that has few images. A mean over splits by Student's t, since splits share no image.

GROUPS = 50
FEWEST_FOR_INTERVAL = 2 * SPLITS  # images
T_GROUPS, T_SPLITS = 2.01, 2.262  # 97.5% of Student's t with GROUPS - 1 and SPLITS - 1 degrees of freedom


def distances_without_groups(features_ND: AnyFloats, reference: Statistics, root: Array) -> Iterator[float]:
    """The Fréchet distance without each of the groups in turn. root: of the reference's covariance.

    An iterator, since a distance of Inception's features takes seconds.
    """
    whole = moments(features_ND)
    for rows in _groups(len(features_ND)):
        yield frechet_distance((whole - moments(features_ND[rows])).statistics(), reference, root)


def interval_from_groups(value: float, values_G: list[float], count: int, lowest: float = 0.0) -> Interval:
    """Interval of a value of `count` images from its values without each group. lowest: value of the score at best."""
    size = max(count // GROUPS, 1)
    # m images that are left out pull by m / (count - m) less than m new ones would move the value.
    error = (count - size) / (count * size) ** 0.5 * float(np.std(values_G, ddof=1))
    return _interval(value, T_GROUPS * error, lowest)


def order_free_interval(logits_NK: AnyFloats, value: float) -> Interval:
    """Interval of an Inception Score over all images at once."""
    groups = list(_groups(len(logits_NK)))
    rest = np.setdiff1d(np.arange(len(logits_NK)), np.concatenate(groups))
    sums = [_score_sums(logits_NK[rows]) for rows in groups]
    whole = np.sum([*sums, _score_sums(logits_NK[rest])], 0)
    return interval_from_groups(value, [_score(whole - part) for part in sums], len(logits_NK), 1.0)


def splits_interval(by_split_S: Array) -> Interval:
    """Interval of the mean over SPLITS splits."""
    error = float(np.std(by_split_S, ddof=1)) / len(by_split_S) ** 0.5
    return _interval(float(by_split_S.mean()), T_SPLITS * error, 1.0)


def _groups(count: int) -> Iterator[NDArray[np.int64]]:
    """GROUPS random groups of equal size, or one an image; images that do not divide are in none."""
    order_N, size = noise.stream("intervals", 0).permutation(count), max(count // GROUPS, 1)
    for start in range(0, min(GROUPS, count) * size, size):
        yield np.sort(order_N[start : start + size])


def _interval(value: float, reach: float, lowest: float) -> Interval:
    return [max(value - reach, lowest), value + reach]


# ---- pairs of images -----------------------------------------------------------------------------------------------
#
# torchmetrics takes seconds to import, which trainings and Fréchet distances need not wait for.


def mean_squared_error(a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
    """Per image, on [-1, 1]: uint8 inputs of (B, 3, H, W) -> (B,)."""
    difference = (a_BCHW.double() - b_BCHW.double()) / 127.5
    return difference.pow(2).flatten(1).mean(1)


def psnr(a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
    """Per image, dB, uint8/255 with data range 1.0: (B,). Equal images give infinity."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    a, b = a_BCHW.double() / 255, b_BCHW.double() / 255
    value: Tensor = peak_signal_noise_ratio(a, b, data_range=1.0, reduction="none", dim=(1, 2, 3))
    return value


def ssim(a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
    """Per image, uint8/255 with data range 1.0, Gaussian window 11 with sigma 1.5: (B,).

    torchmetrics averages over mirrored borders too, Wang et al. (2004) only over whole windows.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    a, b = a_BCHW.float() / 255, b_BCHW.float() / 255
    value = structural_similarity_index_measure(a, b, data_range=1.0, reduction="none")
    assert isinstance(value, Tensor)
    return torch.atleast_1d(value)  # of one image it returns a scalar

"""Metrics of arrays. Legend: N, M images, D feature width, K classes, S splits, G groups that are left out."""

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.special
import torch
from numpy.typing import NDArray
from torch import Tensor

from rdpm_cli import noise
from rdpm_cli.errors import DataError

Array = NDArray[np.float64]
AnyFloats = NDArray[np.floating]
Interval = list[float]  # [lower, upper]

BLOCK = 4096  # rows that are converted to float64 at a time: 64 MiB of Inception's features
SPLIT = 5000  # images of a split of an Inception Score: consecutive, in file order, as ADM
NEIGHBOURS, DENSITY_NEIGHBOURS = 3, 5  # k: ADM's, of precision and recall; Naeem et al.'s, of density and coverage
ROWS, COLUMNS = 4096, 8192  # of a block of distances: 128 MiB
SUBSETS, SUBSET_SIZE, SUBSET_SEED = 100, 1000, 2020  # torch-fidelity's, of a kernel distance
PROJECTIONS, DIRECTIONS = 1000, 100  # of MIND: all, and those of one matrix product
SIGMA, CMMD_SCALE = 10, 1000  # of CMMD's kernel and value, as its authors take them
SIZES = 15  # of subsets from a tenth of the images to all, through which FD-infinity draws its line
GROUPS = 50  # of images, that an interval leaves out in turn


@dataclass(frozen=True)
class Statistics:
    """Mean (D,) and covariance (D, D), ddof 1, of the features of `count` (at least 2) images; count 0: not known."""

    mean_D: Array
    covariance_DD: Array
    count: int

    @functools.cached_property
    def root(self) -> Array:
        """The symmetric root of the covariance, which takes seconds at Inception's width."""
        return matrix_root(self.covariance_DD)


@dataclass(frozen=True)
class Moments:
    """Mean and scatter, sum (x - mean)(x - mean)^T, of features. Disjoint sets add up (Chan et al. 1979)."""

    mean_D: Array
    scatter_DD: Array
    count: int

    def __add__(self, part: "Moments") -> "Moments":
        if not (self.count and part.count):
            return part if part.count else self
        total, step_D = self.count + part.count, part.mean_D - self.mean_D
        between_DD = np.outer(step_D, step_D * (self.count * part.count / total))
        mean_D = self.mean_D + step_D * (part.count / total)
        return Moments(mean_D, self.scatter_DD + part.scatter_DD + between_DD, total)

    def __sub__(self, part: "Moments") -> "Moments":
        """The moments of the rest, without a part that is in this set."""
        return self + Moments(part.mean_D, -part.scatter_DD, -part.count)

    def statistics(self) -> Statistics:
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
    """Mean and covariance in float64, ddof 1, of at least 2 images."""
    return moments(features_ND).statistics()


def matrix_root(covariance_DD: Array) -> Array:
    """The symmetric root of a covariance."""
    values, vectors = np.linalg.eigh(covariance_DD)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T  # rounding makes zeros slightly negative


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """|mu_a - mu_b|² + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) (Heusel et al. 2017). b keeps its root."""
    # The trace of the root is the sum of the roots of the eigenvalues of this product, which is symmetric.
    cross = np.clip(np.linalg.eigvalsh(b.root @ a.covariance_DD @ b.root), 0, None)
    trace = np.trace(a.covariance_DD) + np.trace(b.covariance_DD) - 2 * np.sqrt(cross).sum()
    distance = float(np.sum((a.mean_D - b.mean_D) ** 2) + trace)
    # A covariance pair never gives a negative distance but for rounding: each of the D eigenvalues is off by at most
    # the machine epsilon of the largest, so its root by at most sqrt(eps). Anything below that is damage.
    rounding = len(cross) * np.sqrt(np.finfo(np.float64).eps * cross.max())
    if distance < -2 * rounding:
        message = f"the statistics give a Fréchet distance of {distance:.6g}, which no two covariances have"
        raise DataError(message, "they are damaged: make the reference again")
    return max(distance, 0.0)


def deviation(values: Sequence[float]) -> float:
    """The standard deviation over seeds, estimated from these few (n - 1 in the denominator); 0 of one."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def balanced_subsets(labels_N: NDArray[np.integer], size: int) -> list[NDArray[np.int64]]:
    """As many disjoint class-balanced subsets of `size` rows as there are: classes differ by at most one row."""
    classes, subsets = np.unique(labels_N), list[NDArray[np.int64]]()
    queues = {c: list(np.flatnonzero(labels_N == c)) for c in classes}
    share, extra = divmod(size, len(classes))
    while True:
        # The classes with one row more rotate from subset to subset, so that none runs out early.
        with_extra = {classes[(len(subsets) * extra + k) % len(classes)] for k in range(extra)}
        counts = {c: share + (c in with_extra) for c in classes}
        if any(len(queues[c]) < counts[c] for c in classes):
            return subsets
        rows = [queues[c].pop(0) for c in classes for _ in range(counts[c])]
        subsets.append(np.array(rows, dtype=np.int64))


def inception_score(logits_NK: AnyFloats, split: int = SPLIT) -> tuple[Array, float]:
    """exp of the mean KL(p(y|x) || p(y)) (Salimans et al. 2016) -> of each consecutive split (S,), of all images.

    ADM's is the mean over splits of 5,000 images, of which the last may be smaller. It depends on the order of the
    images; that of all at once does not, and is larger."""
    sums = [_score_sums(logits_NK[start : start + split]) for start in range(0, len(logits_NK), split)]
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
    q = sums[:-2] / sums[-1]
    return float(np.exp(sums[-2] / sums[-1] - (q * np.log(np.where(q > 0, q, 1.0))).sum()))


def precision_recall(
    samples_ND: AnyFloats, reference_MD: AnyFloats, k: int = NEIGHBOURS, device: torch.device | None = None
) -> tuple[float, float]:
    """(precision, recall): exact shares inside the other set's k-neighbour balls (Kynkäänniemi et al. 2019)."""
    samples, reference = _centred(samples_ND, reference_MD, device)
    radii_N, radii_M = _radii(samples, k), _radii(reference, k)
    precise, recalled = torch.zeros_like(radii_N, dtype=torch.bool), torch.zeros_like(radii_M, dtype=torch.bool)
    for rows, columns, distances in blocks(samples, reference):
        precise[rows] |= (distances <= radii_M[columns]).any(1)
        recalled[columns] |= (distances <= radii_N[rows, None]).any(0)
    return float(precise.double().mean()), float(recalled.double().mean())


def density_coverage(
    samples_ND: AnyFloats, reference_MD: AnyFloats, k: int = DENSITY_NEIGHBOURS, device: torch.device | None = None
) -> tuple[float, float]:
    """(density, coverage) by the k-neighbour balls of the reference (Naeem et al. 2020).

    Density: balls that a sample lies in, over k, on average; not bounded by 1. Coverage: share of balls that hold a
    sample."""
    samples, reference = _centred(samples_ND, reference_MD, device)
    radii_M, inside, covered = _radii(reference, k), 0, torch.zeros(len(reference), dtype=torch.bool, device=device)
    for _, columns, distances in blocks(samples, reference):
        within = distances <= radii_M[columns]
        inside += int(within.sum())
        covered[columns] |= within.any(0)
    return inside / (k * len(samples)), float(covered.double().mean())


def _centred(samples_ND: AnyFloats, reference_MD: AnyFloats, device: torch.device | None) -> tuple[Tensor, Tensor]:
    """Both as `centred` about the reference."""
    centre_D = centre(reference_MD)
    return centred(samples_ND, centre_D, device), centred(reference_MD, centre_D, device)


def centre(reference_MD: NDArray[Any]) -> Array:
    """About the mean of the features, (D,): squared distances |a|² - 2ab + |b|² lose small ones far from 0.

    The mean is rounded to a power of two near the spread of the first BLOCK rows: features on a grid, such as counts,
    stay on it, and ties stay ties."""
    spread = reference_MD[:BLOCK].std(dtype=np.float64)
    grid = 2.0 ** np.floor(np.log2(spread)) if spread else 1.0
    centre_D: Array = np.round(reference_MD.mean(0, dtype=np.float64) / grid) * grid
    return centre_D


def centred(x_ND: NDArray[Any], centre_D: Array, device: torch.device | None) -> Tensor:
    """x - centre: in float64, rounded to fp32, without a float64 copy of the whole."""
    out = np.empty(x_ND.shape, np.float32)
    return torch.from_numpy(np.subtract(x_ND, centre_D, out=out, casting="same_kind")).to(device)


def _radii(x_ND: Tensor, k: int) -> Tensor:
    """Squared distance of each row to its k-th nearest neighbour, (N,)."""
    nearest_NK = torch.full((len(x_ND), k), torch.inf, device=x_ND.device)
    for rows, columns, distances in blocks(x_ND, x_ND):
        first, last = max(rows.start, columns.start), min(rows.stop, columns.stop)
        diagonal = torch.arange(first, max(first, last), device=x_ND.device)
        distances[diagonal - rows.start, diagonal - columns.start] = torch.inf  # a point is no neighbour of itself
        smallest = distances.topk(min(k, distances.shape[1]), largest=False).values
        nearest_NK[rows] = torch.cat([nearest_NK[rows], smallest], 1).topk(k, largest=False).values
    return nearest_NK.amax(1)


def blocks(a_ND: Tensor, b_MD: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """(rows, columns, their squared distances)."""
    a_squared, b_squared = a_ND.square().sum(1), b_MD.square().sum(1)
    for row in range(0, len(a_ND), ROWS):
        rows = slice(row, min(row + ROWS, len(a_ND)))
        for column in range(0, len(b_MD), COLUMNS):
            columns = slice(column, min(column + COLUMNS, len(b_MD)))
            distances = torch.addmm(b_squared[columns], a_ND[rows], b_MD[columns].T, alpha=-2)
            yield rows, columns, distances.add_(a_squared[rows, None]).clamp_(min=0)


def kernel_distance(
    samples_ND: AnyFloats, reference_MD: AnyFloats, subsets: int = SUBSETS, size: int = SUBSET_SIZE
) -> tuple[float, float]:
    """KID (Bińkowski et al. 2018): unbiased MMD² under the kernel (x·y / D + 1)³ -> mean and spread over subsets."""
    size = min(size, len(samples_ND), len(reference_MD))
    random, values = np.random.RandomState(SUBSET_SEED), []

    def kernel(x_MD: Array, y_MD: Array) -> Array:
        return (x_MD @ y_MD.T / x_MD.shape[1] + 1) ** 3

    for _ in range(subsets):
        x, y = (s[random.choice(len(s), size, replace=False)].astype(np.float64) for s in (samples_ND, reference_MD))
        # unbiased: without the diagonals within a set
        within = sum(float(k.sum() - np.trace(k)) for k in (kernel(x, x), kernel(y, y)))
        values.append(within / (size * (size - 1)) - 2 * float(kernel(x, y).mean()))
    return float(np.mean(values)), float(np.std(values))


def mind(samples_ND: AnyFloats, reference_ND: AnyFloats) -> float:
    """MIND of two sets of equal size: 3 D E_u W2²(u·x, u·y), u uniform on the unit sphere (Berthet et al. 2026).

    A shift by v counts 3 |v|²."""
    directions_KD = noise.stream("mind", 0).standard_normal((PROJECTIONS, samples_ND.shape[1]))
    directions_KD /= np.linalg.norm(directions_KD, axis=1, keepdims=True)
    total = 0.0
    for start in range(0, PROJECTIONS, DIRECTIONS):
        u_DK = directions_KD[start : start + DIRECTIONS].T.astype(samples_ND.dtype)
        a_NK, b_NK = (np.sort(side @ u_DK, 0) for side in (samples_ND, reference_ND))
        total += float(np.square(a_NK - b_NK).mean(0, dtype=np.float64).sum())
    return 3 * samples_ND.shape[1] * total / PROJECTIONS


def cmmd(samples_ND: AnyFloats, reference_MD: AnyFloats, device: torch.device | None = None) -> float:
    """CMMD (Jayasumana et al. 2024): 1,000 MMD² of unit features under exp(-|x - y|² / (2 · 10²)), not corrected for
    bias: the diagonals count."""
    x, y = (torch.from_numpy(np.asarray(side, np.float32)).to(device) for side in (samples_ND, reference_MD))
    x, y = (torch.nn.functional.normalize(side, dim=1) for side in (x, y))

    def mean(a: Tensor, b: Tensor) -> float:
        """Of the kernel - 1: all its values lie near 1, which cancels."""
        sums = [torch.expm1(d / (-2 * SIGMA**2)).sum(dtype=torch.float64) for _, _, d in blocks(a, b)]
        return float(sum(sums)) / (len(a) * len(b))

    return CMMD_SCALE * (mean(x, x) + mean(y, y) - 2 * mean(x, y))


def fd_infinity(features_ND: AnyFloats, reference: Statistics) -> float:
    """The Fréchet distance of infinitely many images (Chong and Forsyth 2020), whose bias falls as 1 / N.

    The line through the distances of SIZES random subsets against 1 / N, at 0. Each subset holds the one before it."""
    order_N = noise.stream("infinity", 0).permutation(len(features_ND))
    ends = np.linspace(len(order_N) / 10, len(order_N), SIZES).astype(int)
    part, values = NO_MOMENTS, []
    for start, end in itertools.pairwise([0, *ends]):
        part += moments(features_ND[np.sort(order_N[start:end])])
        values.append(frechet_distance(part.statistics(), reference))
    return float(np.polyfit(1 / ends, values, 1)[1])


# 95% intervals of what such scores of N other images of the same kind would average to; the reference counts as fixed.
# A Fréchet distance and the order-free score by the delete-a-group jackknife (Efron and Stein 1981): random groups of
# images are left out in turn, and the spread of the values is scaled to N. A bootstrap would count images twice, which
# raises a distance that has few images. A mean over several splits by Student's t, since splits share no image.


def distances_without_groups(features_ND: AnyFloats, reference: Statistics) -> Iterator[float]:
    """The Fréchet distance without each group in turn; each takes seconds."""
    whole = moments(features_ND)
    for rows in _groups(len(features_ND)):
        yield frechet_distance((whole - moments(features_ND[rows])).statistics(), reference)


def interval_from_groups(value: float, values_G: list[float], count: int, lowest: float = 0.0) -> Interval:
    """Interval of a value of `count` images from its values without each group. lowest: value of the score at best."""
    size = max(count // GROUPS, 1)
    # m images that are left out pull by m / (count - m) less than m new ones would move the value.
    reach = student(len(values_G)) * ((count - size) / (count * size) ** 0.5 * float(np.std(values_G, ddof=1)))
    return [max(value - reach, lowest), value + reach]


def student(count: int) -> float:
    """97.5% of Student's t with count - 1 degrees of freedom."""
    return float(scipy.special.stdtrit(count - 1, 0.975))


def score_intervals(logits_NK: AnyFloats, by_split_S: Array, order_free: float) -> tuple[Interval, Interval]:
    """Intervals of the mean of an Inception Score over splits, and of that over all images at once."""
    groups = list(_groups(len(logits_NK)))
    rest = np.setdiff1d(np.arange(len(logits_NK)), np.concatenate(groups))
    parts = [_score_sums(logits_NK[rows]) for rows in (*groups, rest)]
    whole = np.sum(parts, 0)
    without = [_score(whole - part) for part in parts[:-1]]
    whole_interval = interval_from_groups(order_free, without, len(logits_NK), 1.0)
    if len(by_split_S) == 1:  # the same score
        return whole_interval, whole_interval
    mean = float(by_split_S.mean())
    reach = student(len(by_split_S)) * float(np.std(by_split_S, ddof=1)) / len(by_split_S) ** 0.5
    return [max(mean - reach, 1.0), mean + reach], whole_interval


def _groups(count: int) -> Iterator[NDArray[np.int64]]:
    """GROUPS random groups of equal size, or one an image; images that do not divide are in none."""
    order_N, size = noise.stream("intervals", 0).permutation(count), max(count // GROUPS, 1)
    for start in range(0, min(GROUPS, count) * size, size):
        yield np.sort(order_N[start : start + size])

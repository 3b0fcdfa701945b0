"""Scores of a set of images as a record: value, N, reference and hash, extractor and hash; all from one pass."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdpm_cli import progress
from rdpm_cli.data.folder import ImageSet
from rdpm_cli.data.source import spread
from rdpm_cli.errors import DataError, UsageError
from rdpm_cli.evaluation import metrics
from rdpm_cli.evaluation.features import (
    Extractor,
    Features,
    Floats,
    collect_shared,
    identity,
    is_published_inception,
)
from rdpm_cli.evaluation.reference import Reference, StatisticsFile, measure, open_target

METRICS = ("fid", "sfid", "is", "pr", "kid")
GROUPS = {**{name: (name,) for name in METRICS}, "all": METRICS}
# Only scores by the published Inception weights have the names that papers use.
PUBLISHED_NAMES = {"fid": "fid", "sfid": "sfid", "is": "inception_score", "kid": "kid"}
OTHER_NAMES = {
    "fid": "frechet_distance", "sfid": "spatial_frechet_distance", "is": "classifier_score", "kid": "kernel_distance",
}  # fmt: skip
REFERENCE_FEATURES = 10_000  # images of a reference that precision, recall and KID take: ADM's number
FEWEST = {"fid": 2, "sfid": 2, "is": metrics.SPLITS, "pr": metrics.NEIGHBOURS + 1, "kid": 2}  # images
ENOUGH = 4  # images a class, of a split of an Inception Score
SORTED = "the images are in class order, so a mean over consecutive splits says nothing; see order_free"


@dataclass(frozen=True)
class Options:
    """subset: the Fréchet distance as a mean over disjoint class-balanced subsets of this size.

    ci: 95% intervals. features: file that keeps the features of the target.
    """

    subset: int | None = None
    ci: bool = False
    features: Path | None = None


def check(metric: str, options: Options, judged: bool = False) -> None:
    """Raises UsageError for an option that this metric does not use. judged: whether a judge is the extractor."""
    if judged and metric == "sfid":
        raise UsageError("sFID needs spatial features; a judge has none", "leave --extractor out, or take `eval fid`")
    if options.subset and "fid" not in GROUPS[metric]:
        raise UsageError(f"--subset belongs to the Fréchet distance, not to `eval {metric}`", "leave it out")
    if options.ci and not {"fid", "is"} & set(GROUPS[metric]):
        raise UsageError(f"--ci belongs to fid and is, not to `eval {metric}`", "leave it out")
    if options.ci and options.subset:
        raise UsageError("--ci and --subset both give a spread", "give one of them")


def score(
    metric: str,
    extractor: Extractor,
    target: ImageSet,
    reference: ImageSet | StatisticsFile | None,
    options: Options | None = None,
) -> dict[str, Any] | None:
    """The record of a metric of METRICS, or of `all`. Every process calls it; the first one gets the record.

    reference: None for `is`, which compares with nothing. Raises DataError.
    """
    options, requested = options or Options(), GROUPS[metric]
    counts = [target.count, *([reference.count] if isinstance(reference, ImageSet) else [])]
    fewest = [metrics.FEWEST_FOR_INTERVAL] * options.ci + [FEWEST[part] for part in requested]
    metrics.need_images(min(counts), max(fewest), f"`eval {metric}`{' --ci' * options.ci}")
    if options.subset is not None:
        _subsets(target, options.subset)
    compared = None if reference is None else _measure(extractor, reference, requested)
    reasons = {part: _reason(part, extractor, compared) for part in requested}
    if all(reasons.values()):
        raise DataError(str(reasons[requested[0]]), "give images as --ref, or a file that has them")
    features = collect_shared(extractor, target, "sfid" in requested, options.features)
    if features is None:
        return None
    scores = _Scores(extractor, target, features, compared, options)
    rows: dict[str, Row] = {}
    for part in requested:
        rows |= {name: {"": None} for name in scores.names(part)} if reasons[part] else scores.rows(part)
    absent = {name: reason for part, reason in reasons.items() if reason for name in scores.names(part)}
    return scores.record(metric, rows, {**absent, **scores.absent})


def _measure(extractor: Extractor, reference: ImageSet | StatisticsFile, requested: Sequence[str]) -> Reference | None:
    """The reference's statistics and features, computed or read. Computed: None in all processes but the first."""
    needs_features = not {"pr", "kid"}.isdisjoint(requested)
    if isinstance(reference, ImageSet):
        rows = spread(reference.count, REFERENCE_FEATURES) if needs_features else ()
        return measure(extractor, reference, "sfid" in requested, rows)
    compared = reference.load(extractor)
    if needs_features and "features" in compared.absent and "arr_0" in reference.arrays:
        images = open_target(str(reference.path), None)
        features, rows = collect_shared(extractor, images), spread(images.count, REFERENCE_FEATURES)
        compared.features_ND = features.features_ND[rows] if features else None
        del compared.absent["features"]
    return compared


def _reason(part: str, extractor: Extractor, compared: Reference | None) -> str | None:
    """The reason why a score cannot be computed; None if it can."""
    if part == "sfid" and not extractor.spatial_width:
        return f"{extractor.name} has no spatial features"
    needed = {"sfid": "spatial", "pr": "features", "kid": "features"}.get(part, "")
    return compared.absent.get(needed) if compared else None


Row = dict[str, Any]  # the value of a score under "", its details under their names


@dataclass
class _Scores:
    """The rows of each score. absent: score -> why its value is None."""

    extractor: Extractor
    target: ImageSet
    features: Features
    reference: Reference | None
    options: Options
    notes: list[str] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)

    @property
    def _compared(self) -> Reference:
        assert self.reference is not None
        return self.reference

    def _reference_features(self) -> Floats:
        assert self._compared.features_ND is not None
        return self._compared.features_ND

    def names(self, part: str) -> tuple[str, ...]:
        """The scores of a part of METRICS."""
        if part == "pr":
            return ("precision", "recall")
        return ((PUBLISHED_NAMES if is_published_inception(self.extractor) else OTHER_NAMES)[part],)

    def rows(self, part: str) -> dict[str, Row]:
        """The rows of a part of METRICS."""
        functions = {"fid": self._fid, "sfid": self._sfid, "is": self._is, "pr": self._pr, "kid": self._kid}
        return functions[part]()

    def _fid(self) -> dict[str, Row]:
        """The Fréchet distance of all images, or the mean over balanced subsets."""
        features_ND, pool = self.features.features_ND, self._compared.pool
        root = metrics.matrix_root(pool.covariance_DD)
        subsets = [slice(None)] if self.options.subset is None else _subsets(self.target, self.options.subset)
        statistics = [metrics.statistics(features_ND[rows]) for rows in subsets]
        values = [metrics.frechet_distance(one, pool, root) for one in statistics]
        row: Row = {"": float(np.mean(values))}
        if self.options.ci:
            row["ci95"] = self._distance_interval(row[""], root)
        row["spread_over_subsets"] = float(np.std(values)) if len(values) > 1 else None
        self._note_rank(statistics[0], "features")
        return {self.names("fid")[0]: {**row, "n": statistics[0].count, "subsets": len(values)}}

    def _distance_interval(self, value: float, root: metrics.Array) -> metrics.Interval:
        features_ND, values = self.features.features_ND, []
        groups = min(metrics.GROUPS, len(features_ND))
        with progress.Bar("leave out, for the interval", groups, "groups") as bar:
            for without in metrics.distances_without_groups(features_ND, self._compared.pool, root):
                values.append(without)
                bar.advance(1)
        return metrics.interval_from_groups(value, values, len(features_ND))

    def _sfid(self) -> dict[str, Row]:
        """The Fréchet distance of the spatial features."""
        assert self.features.spatial_NP is not None
        assert self._compared.spatial is not None
        statistics = metrics.statistics(self.features.spatial_NP)
        self._note_rank(statistics, "spatial features")
        return {self.names("sfid")[0]: {"": metrics.frechet_distance(statistics, self._compared.spatial)}}

    def _note_rank(self, statistics: metrics.Statistics, kind: str) -> None:
        count = min(statistics.count, self._compared.count or statistics.count)
        self.notes += rank_notes(count, len(statistics.mean_D), kind)

    def _is(self) -> dict[str, Row]:
        """The Inception Score: mean over splits, and over all images at once."""
        (name,), logits_NK = self.names("is"), self.features.logits_NK
        by_split, order_free = metrics.inception_score(logits_NK)
        row: Row = {"": float(by_split.mean()), "spread_over_splits": float(np.std(by_split)), "splits": len(by_split)}
        row |= {"images_per_split": len(logits_NK) // len(by_split), "order_free": order_free}
        if self.options.ci:
            row["ci95"] = metrics.splits_interval(by_split)
            row["order_free_ci95"] = metrics.order_free_interval(logits_NK, order_free)
        labels = self.target.labels
        if labels is not None and len(set(labels)) > 1 and labels == sorted(labels):
            row |= {key: None for key in ("", "spread_over_splits", "ci95") if key in row}
            self.absent[name] = SORTED
        self.notes += few_notes(row["images_per_split"], logits_NK.shape[1])
        return {name: row}

    def _pr(self) -> dict[str, Row]:
        """Precision and recall."""
        reference_ND = self._reference_features()
        values = metrics.precision_recall(self.features.features_ND, reference_ND, device=self.extractor.device)
        settings = {"neighbours": metrics.NEIGHBOURS, "reference_features": len(reference_ND)}
        return {name: {"": value, **settings} for name, value in zip(self.names("pr"), values, strict=True)}

    def _kid(self) -> dict[str, Row]:
        """The kernel distance."""
        reference_ND = self._reference_features()
        value, spread_over_subsets = metrics.kernel_distance(self.features.features_ND, reference_ND)
        row: Row = {"": value, "spread_over_subsets": spread_over_subsets, "subsets": metrics.SUBSETS}
        size = min(metrics.SUBSET_SIZE, len(self.features), len(reference_ND))
        row |= {"subset_size": size, "reference_features": len(reference_ND)}
        return {self.names("kid")[0]: row}

    def record(self, metric: str, rows: dict[str, Row], absent: dict[str, str]) -> dict[str, Any]:
        """The keys of one score are short (value, ci95); of `all` they carry its name (fid, fid_ci95)."""
        whole = metric == "all"
        values: dict[str, Any] = {"metric": "all" if whole else "_".join(rows)}
        for name, row in rows.items():
            main = name if len(rows) > 1 else "value"
            values |= {main if not key else f"{name}_{key}" if whole else key: value for key, value in row.items()}
            absent = {main if key == name else key: reason for key, reason in absent.items()}
        target, compared, features = self.target, self.reference, self.features
        values.setdefault("n", len(features))
        return {
            **values,
            "target": {"name": target.name, "count": len(features), "sha256": features.sha256},
            "reference": compared and {"name": compared.name, "count": compared.count, "sha256": compared.sha256},
            "extractor": identity(self.extractor),
            "class_accuracy": class_accuracy(self.extractor, target.labels, target.class_names, features.predicted),
            "notes": ([self.extractor.note] if self.extractor.note else []) + self.notes,
            **({"not_computed": absent} if absent else {}),
        }


def rank_notes(count: int, width: int, kind: str) -> list[str]:
    """A note for a Fréchet distance of fewer images than features."""
    return [f"fewer images than the {width} {kind}: the covariance has no full rank"] if count <= width else []


def few_notes(count: int, classes: int) -> list[str]:
    """A note for an Inception Score of few images a split: 5,000 for Inception's 1,008 classes are enough."""
    if count >= ENOUGH * classes:
        return []
    return [
        f"{count} images a split for {classes} classes: an Inception Score of so few is too low, the order-free one by "
        "less; compare it only at the same N"
    ]


def class_accuracy(
    extractor: Extractor, labels: Sequence[int] | None, names: Sequence[str], predicted_N: NDArray[np.int64]
) -> float | None:
    """Share of images that a judge puts into the class they were drawn for, by name; None if that is not known."""
    if not extractor.class_names or labels is None or not names:
        return None
    return float(np.mean([extractor.class_names[p] == names[y] for p, y in zip(predicted_N, labels, strict=True)]))


def _subsets(target: ImageSet, size: int) -> list[NDArray[np.int64]]:
    if target.labels is None:
        raise DataError(f"{target.name} has no labels, so no class-balanced subsets", "leave --subset out")
    subsets = metrics.balanced_subsets(np.array(target.labels), size)
    if not subsets:
        message = f"{target.name}: {target.count} images hold no class-balanced subset of {size}"
        raise DataError(message, "sample more")
    return subsets

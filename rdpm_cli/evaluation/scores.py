"""Scores as records: value, N, reference and hash, extractor and hash, options; every metric from one pass."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rdpm_cli.errors import DataError, UsageError
from rdpm_cli.evaluation import intervals, metrics, needs
from rdpm_cli.evaluation.cache import Cache
from rdpm_cli.evaluation.features import Extractor, identity, is_published_inception
from rdpm_cli.evaluation.passes import Seen, Wanted, look
from rdpm_cli.evaluation.reference import ImageSet, open_npz
from rdpm_cli.evaluation.statfile import Against, StatFile
from rdpm_cli.images.sources import spread

METRICS = ("fid", "sfid", "is", "pr", "kid")
FAMILIES = {**{name: (name,) for name in METRICS}, "all": METRICS}
NAMES = {"fid": "fid", "sfid": "sfid", "is": "inception_score", "kid": "kid"}  # of the published Inception alone
OTHERS = {
    "fid": "frechet_distance", "sfid": "spatial_frechet_distance", "is": "classifier_score", "kid": "kernel_distance",
}  # fmt: skip
REFERENCES = 10_000  # images of a reference that precision, recall and KID take: ADM's number
ENOUGH = 4  # images a class, of a split of an Inception Score
SORTED = (
    "the images are in class order, so a mean over consecutive parts says nothing; order_free does not depend on it"
)


@dataclass(frozen=True)
class Options:
    """subset: mean over disjoint class-balanced subsets of so many images, of the Fréchet distance.

    ci: 95% intervals. cache: where activations are kept.
    """

    subset: int | None = None
    ci: bool = False
    cache: Cache | None = None


@dataclass
class _Scored:
    """Rows of a result: {name: {"": value, more}}, reasons for those that are None, notes."""

    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def check(metric: str, options: Options, judged: bool = False) -> None:
    """Raises UsageError for an option that this metric has no use for. judged: is a judge the extractor?"""
    if judged and metric == "sfid":
        raise UsageError(
            "a judge has pooled features alone, and sFID takes some that know where",
            "leave --extractor out for Inception's, or take `eval fid`",
        )
    if options.subset and "fid" not in FAMILIES[metric]:
        raise UsageError(f"--subset belongs to the Fréchet distance, not to `eval {metric}`", "leave it out")
    if options.ci and not {"fid", "is"} & set(FAMILIES[metric]):
        raise UsageError(f"--ci belongs to fid and is, not to `eval {metric}`", "leave it out")
    if options.ci and options.subset:
        raise UsageError("--ci and --subset are two ways to a spread", "give one of them")


def needs_reference(metric: str) -> bool:
    """Everything but the Inception Score compares."""
    return metric != "is"


def frechet(extractor: Extractor, target: ImageSet, reference: ImageSet, subset: int | None) -> dict[str, Any]:
    """`score` of the Fréchet distance, in one process."""
    found = score("fid", extractor, target, reference, Options(subset))
    assert found is not None
    return found


def score(
    metric: str,
    extractor: Extractor,
    target: ImageSet,
    reference: ImageSet | StatFile | None,
    options: Options | None = None,
) -> dict[str, Any] | None:
    """The record of a metric of METRICS, or of all. Called by every rank; the first one gets the record.

    reference: None where none is needed. Raises DataError.
    """
    options = options or Options()
    parts = FAMILIES[metric]
    needs.images(parts, target, reference, interval=options.ci)
    if options.subset is not None:
        _groups(target, options.subset)
    if isinstance(reference, StatFile):
        reference.check(extractor)
    keeps = {"pr", "kid"} & set(parts) or options.subset or (options.ci and "fid" in parts)
    spatial = "sfid" in parts and bool(extractor.spatial)
    wanted = Wanted(range(target.count) if keeps else (), spatial, "is" in parts, options.ci and "is" in parts)
    against = None if reference is None else _against(extractor, reference, parts, options.cache)
    seen = look(extractor, target, wanted, options.cache)
    if seen is None:
        return None
    scored = _Scored(notes=[extractor.note] if extractor.note else [])
    for part in parts:
        _PARTS[part](scored, extractor, target, seen, against, options)
    return _record(metric, extractor, target, seen, against, scored)


def _against(
    extractor: Extractor, reference: ImageSet | StatFile, parts: Sequence[str], cache: Cache | None
) -> Against | None:
    """The other side of the comparison: read, or computed. None in all processes but the first."""
    needs_features = {"pr", "kid"} & set(parts)
    if isinstance(reference, ImageSet):
        kept = spread(reference.count, REFERENCES) if needs_features else ()
        seen = look(extractor, reference, Wanted(kept, "sfid" in parts and bool(extractor.spatial)), cache)
        if seen is None:
            return None
        spatial = seen.spatial.statistics() if seen.spatial else None
        pool = seen.pool.statistics()
        return Against(reference.name, seen.count, seen.sha256, pool, spatial, seen.features_ND, {})
    found = reference.load()
    needs.statistics(parts, extractor, found, reference.has_images)
    if needs_features and found.features_ND is None and reference.has_images:
        images = open_npz(reference.path)
        seen = look(extractor, images, Wanted(spread(images.count, REFERENCES)), cache)
        found.features_ND = seen.features_ND if seen else None
    return found


def _record(
    metric: str, extractor: Extractor, target: ImageSet, seen: Seen, against: Against | None, scored: _Scored
) -> dict[str, Any]:
    whole = metric == "all"
    values: dict[str, Any] = {"metric": "all" if whole else "_".join(scored.rows)}
    for name, row in scored.rows.items():
        main = name if whole or len(scored.rows) > 1 else "value"
        values |= {main if not key else f"{name}_{key}" if whole else key: value for key, value in row.items()}
        if name in scored.missing and main == "value":
            scored.missing["value"] = scored.missing.pop(name)
    values.setdefault("n", seen.count)
    values |= {
        "target": {"name": target.name, "count": seen.count, "sha256": seen.sha256},
        "reference": against and {"name": against.name, "count": against.count, "sha256": against.sha256},
        "extractor": identity(extractor),
        "class_accuracy": class_accuracy(extractor, target.labels, target.class_names, seen.predicted_N),
        "notes": scored.notes,
    }
    return {**values, **({"not_computed": scored.missing} if scored.missing else {})}


# ---- the parts -----------------------------------------------------------------------------------------------------


def name_of(part: str, extractor: Extractor) -> str:
    """Only the published Inception's scores have the names that papers use."""
    return (NAMES if is_published_inception(extractor) else OTHERS)[part]


def _fid(
    scored: _Scored, extractor: Extractor, target: ImageSet, seen: Seen, against: Against | None, options: Options
) -> None:
    assert against is not None
    name, whole = name_of("fid", extractor), seen.pool.statistics()
    root = metrics.matrix_root(against.pool.covariance_DD)
    groups = [] if options.subset is None else _groups(target, options.subset)
    each = [metrics.statistics(seen.features_ND[rows]) for rows in groups] or [whole]
    values = [metrics.frechet_distance(one, against.pool, root) for one in each]
    row: dict[str, Any] = {"": float(np.mean(values))}
    if options.ci:
        row["ci95"] = intervals.frechet(seen.pool, seen.features_ND, against.pool, root, row[""])
    row["spread_over_subsets"] = float(np.std(values)) if len(values) > 1 else None
    scored.rows[name] = {**row, "n": each[0].count, "subsets": len(each)}
    smallest = min(each[0].count, against.count or each[0].count)
    scored.notes += rank_notes(smallest, len(whole.mean_D), "features")


def _sfid(
    scored: _Scored, extractor: Extractor, target: ImageSet, seen: Seen, against: Against | None, options: Options
) -> None:
    assert against is not None
    name = name_of("sfid", extractor)
    if seen.spatial is None:
        scored.rows[name] = {"": None}
        scored.missing[name] = f"{extractor.name} has pooled features alone, none that know where"
        return
    if against.spatial is None:
        _lack(scored, name, against.missing["spatial"])
        return
    ours = seen.spatial.statistics()
    scored.rows[name] = {"": metrics.frechet_distance(ours, against.spatial)}
    scored.notes += rank_notes(min(ours.count, against.count or ours.count), len(ours.mean_D), "spatial features")


def _is(
    scored: _Scored, extractor: Extractor, target: ImageSet, seen: Seen, against: Against | None, options: Options
) -> None:
    assert seen.score is not None
    name, by_split = name_of("is", extractor), seen.score.by_split()
    value, order_free = seen.score.value(), seen.score.order_free()
    row: dict[str, Any] = {"": value, "spread_over_splits": float(np.std(by_split)), "splits": len(by_split)}
    row |= {"images_per_split": seen.count // len(by_split), "order_free": order_free}
    if options.ci:
        row["ci95"] = intervals.mean_of_splits(by_split)
        row["order_free_ci95"] = intervals.order_free(seen.logits_NK, order_free)
    if _is_sorted(target.labels):
        row |= dict.fromkeys(["", "spread_over_splits", *(["ci95"] if options.ci else [])])
        scored.missing[name] = SORTED
    scored.rows[name] = row
    scored.notes += few_notes(row["images_per_split"], seen.score.chances_SK.shape[1])


def _pr(
    scored: _Scored, extractor: Extractor, target: ImageSet, seen: Seen, against: Against | None, options: Options
) -> None:
    assert against is not None
    if against.features_ND is None:
        for name in ("precision", "recall"):
            _lack(scored, name, against.missing["features"])
        return
    device = getattr(extractor, "device", torch.device("cpu"))
    precision, recall = metrics.precision_recall(seen.features_ND, against.features_ND, device=device)
    settings = {"neighbours": metrics.NEIGHBOURS, "reference_features": len(against.features_ND)}
    scored.rows |= {"precision": {"": precision, **settings}, "recall": {"": recall, **settings}}


def _kid(
    scored: _Scored, extractor: Extractor, target: ImageSet, seen: Seen, against: Against | None, options: Options
) -> None:
    assert against is not None
    name = name_of("kid", extractor)
    if against.features_ND is None:
        _lack(scored, name, against.missing["features"])
        return
    found = metrics.kernel_distance(seen.features_ND, against.features_ND)
    scored.rows[name] = {
        "": found.value,
        "spread_over_subsets": found.spread,
        "subsets": found.subsets,
        "subset_size": found.size,
        "reference_features": len(against.features_ND),
    }


_PARTS = {"fid": _fid, "sfid": _sfid, "is": _is, "pr": _pr, "kid": _kid}


def _lack(scored: _Scored, name: str, why: str) -> None:
    """A score that the reference has nothing for."""
    scored.rows[name], scored.missing[name] = {"": None}, why


def rank_notes(count: int, width: int, what: str) -> list[str]:
    """What a reader of a Fréchet distance of so few images should know."""
    if count > width:
        return []
    return [f"fewer images than the {width} {what}: the covariance has no full rank"]


def few_notes(count: int, classes: int) -> list[str]:
    """What a reader of an Inception Score of so few images a split should know: 5,000 for 1,008 classes are not few."""
    if count >= ENOUGH * classes:
        return []
    return [
        f"{count} images a split for {classes} classes: an Inception Score of so few is too low, the order-free one by "
        "less; compare it at the same N alone"
    ]


def _groups(target: ImageSet, subset: int) -> list[NDArray[np.int64]]:
    if target.labels is None:
        raise DataError(f"{target.name} has no labels, so no class-balanced subsets", "leave --subset out")
    groups = metrics.balanced_subsets(np.array(target.labels), subset)
    if not groups:
        raise DataError(
            f"{target.name}: {target.count} images hold no class-balanced subset of {subset}", "sample more"
        )
    return groups


def _is_sorted(labels: list[int] | None) -> bool:
    """Are images of several classes given class by class?"""
    return labels is not None and len(set(labels)) > 1 and labels == sorted(labels)


def class_accuracy(
    extractor: Extractor, labels: Sequence[int] | None, names: Sequence[str], predicted_N: NDArray[np.int64] | None
) -> float | None:
    """Share of images the extractor puts into the class they were made for, by class name; None if it cannot say."""
    if predicted_N is None or labels is None or not names:
        return None
    predicted = [extractor.class_names[p] for p in predicted_N]
    wanted = [names[label] for label in labels]
    return float(np.mean([p == w for p, w in zip(predicted, wanted, strict=True)]))

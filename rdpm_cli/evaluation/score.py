"""Scores of a set of images as a record: value, N, reference and extractor with their hashes."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rdpm_cli import progress
from rdpm_cli.data.folder import ImageSet
from rdpm_cli.data.pixels import Pixels
from rdpm_cli.data.source import spread
from rdpm_cli.errors import CheckpointError, DataError
from rdpm_cli.evaluation import factors, features, judge, metrics
from rdpm_cli.evaluation.features import PUBLISHED, Extractor, Features, Floats, collect_shared, identity
from rdpm_cli.evaluation.metrics import Statistics
from rdpm_cli.evaluation.reference import Reference, measure

# Only scores by the published Inception weights have the names that papers use for Inception's.
NAMES = {
    "fid": ("fid", "frechet_distance"), "sfid": ("sfid", "spatial_frechet_distance"), "kid": ("kid", "kernel_distance"),
    "is": ("inception_score", "classifier_score"),
}  # fmt: skip
PAIRS = {"pr": ("precision", "recall"), "dc": ("density", "coverage")}
BY_FEATURES = {"pr", "dc", "kid", "mind", "cmmd"}  # what compares features of a reference, not its statistics
MOST_FEATURES = 10_000  # images of a reference whose features are compared (ADM's number), and of samples for CMMD
FEWEST = {  # images
    "fid": 2, "sfid": 2, "is": 2, "pr": metrics.NEIGHBOURS + 1, "dc": metrics.DENSITY_NEIGHBOURS + 1, "kid": 2,
    "mind": 2, "cmmd": 2, "fdr": 2,
}  # fmt: skip
FEWEST_CI = 20  # images that an interval needs
ENOUGH = 4  # images a class, of a split of an Inception Score

Row = dict[str, Any]  # of a score: `value` and its details; `not_computed`, why the value is None; `notes`


def score(
    metric: str, extractor: Extractor, targets: Sequence[ImageSet], reference: ImageSet | Reference | None, *,
    heldout: ImageSet | None = None, subset: int | None = None, ci: bool = False, file: Path | None = None,
    without: Collection[str] = (),
) -> list[dict[str, Any]]:  # fmt: skip
    """The record of each target by a metric of METRICS, or `all`. Every process calls it; the first one gets them.

    reference: None for `is`. heldout: real images, for `fdr`. subset: the Fréchet distance as a mean over disjoint
    class-balanced subsets of this size. ci: 95% intervals. file: keeps the features of the target. without: metrics
    that `all` leaves out. Raises DataError."""
    whole = [part for part in METRICS if part not in without and (heldout or part != "fdr")]
    parts = whole if metric == "all" else [metric]
    for target in targets:
        judge.check_size(extractor.resolution, target.resolution)
    sets = [images for images in (*targets, reference) if isinstance(images, ImageSet)]
    subsets = [_subsets(target, subset) for target in targets]
    absent = _absent(extractor, reference, targets, min(sets, key=lambda images: images.count))
    if heldout and heldout.count < FEWEST["fdr"]:
        absent["fdr"] = f"it needs at least {FEWEST['fdr']} images, not {heldout.count} as in {heldout.name}"
    if set(parts) <= set(absent):
        raise DataError(f"{metric}: {absent[parts[0]]}", "take more images, or another --ref")
    if ci and (smallest := min(target.count for target in targets)) < FEWEST_CI:
        raise DataError(f"an interval needs at least {FEWEST_CI} images, not {smallest}", "take more images")
    compared = measured(extractor, reference, parts)
    real = collect_shared(extractor, heldout) if heldout and "fdr" not in absent else None
    records = []
    for target, subsets_of_target in zip(targets, subsets, strict=True):
        if extractor.factor_layer is not None:  # validity reads the images again
            target = _kept(target)
        scored = collect_shared(extractor, target, "sfid" in parts, file)
        if scored is None:
            continue
        comparison = Comparison(extractor, scored, target.labels, compared, real, subsets_of_target, ci)
        rows = dict[str, Row]()
        for part in parts:
            names = PAIRS.get(part) or [NAMES[part][extractor.name != PUBLISHED] if part in NAMES else part]
            reasons: list[Row] = [{"value": None, "not_computed": absent.get(part)} for _ in names]
            rows |= zip(names, reasons if part in absent else ROWS[part](comparison), strict=True)
        record = _record(metric, rows, extractor, target, scored, compared)
        if heldout and real:
            record["heldout"] = {"name": heldout.name, "count": heldout.count, "sha256": real.sha256}
        records.append(record)
    return records


def _kept(images: ImageSet) -> ImageSet:
    """Images whose pixels stay in memory once they are read: reading them may mean drawing them."""
    kept: dict[range, Pixels] = {}

    def read(pieces: Iterable[range]) -> Iterator[Pixels]:
        for piece in pieces:
            if piece not in kept:
                (kept[piece],) = images.read([piece])
            yield kept[piece]

    return replace(images, read=read)


def _subsets(target: ImageSet, size: int | None) -> list[Any]:
    """The rows of class-balanced subsets of this size, or all rows. Raises DataError where there is no such subset."""
    if size is None:
        return [slice(None)]
    subsets = [] if target.labels is None else metrics.balanced_subsets(np.array(target.labels), size)
    if not subsets:
        message = f"{target.name}: {target.count} images hold no class-balanced subset of {size}"
        raise DataError(message, "sample more, or leave --subset out")
    return subsets


def _absent(
    extractor: Extractor, reference: ImageSet | Reference | None, targets: Sequence[ImageSet], smallest: ImageSet
) -> dict[str, str]:
    """The parts of METRICS that cannot be computed, with the reason. smallest: of all sets of images."""
    absent = {
        part: f"it needs at least {fewest} images, not {smallest.count} as in {smallest.name}"
        for part, fewest in FEWEST.items()
        if smallest.count < fewest
    }
    count = min(target.count for target in targets)
    if (fewest := 10 * (extractor.width + 1)) > count:  # a tenth, its smallest subset, needs a covariance of full rank
        absent["fd_infinity"] = f"it needs at least {fewest} samples for {extractor.width} features, not {count}"
    if isinstance(reference, Reference):
        if reference.spatial is None:
            absent["sfid"] = f"{reference.name} has no mu_s and sigma_s"
        if reference.features_ND is None and reference.images is None:
            absent |= dict.fromkeys(BY_FEATURES, f"{reference.name} has neither features nor images (arr_0)")
    if not extractor.spatial_width:
        absent["sfid"] = f"{extractor.name} has no spatial features"
    if not extractor.classes:
        absent["is"] = f"{extractor.name} has no classes"
    return absent


def measured(extractor: Extractor, reference: ImageSet | Reference | None, parts: Sequence[str]) -> Reference | None:
    """The reference with all that the parts need. Measured here: None in all processes but the first."""
    images = reference.images if isinstance(reference, Reference) else reference
    rows = spread(images.count, MOST_FEATURES) if images and not BY_FEATURES.isdisjoint(parts) else []
    if isinstance(reference, ImageSet):
        return measure(extractor, reference, "sfid" in parts, rows)
    if reference and images and rows:
        shared = collect_shared(extractor, images)
        reference.features_ND, reference.images = shared and shared.features_ND[rows], None  # measured once
    return reference


@dataclass
class Comparison:
    """One target and what it is compared with. subsets: rows of balanced subsets for the Fréchet distance, or all."""

    extractor: Extractor
    target: Features
    labels: list[int] | None
    reference: Reference | None
    heldout: Features | None
    subsets: Sequence[Any]
    ci: bool

    @property
    def sides(self) -> tuple[Floats, Floats]:
        """Features of the target, and of images of the reference."""
        assert self.reference is not None
        assert self.reference.features_ND is not None
        return self.target.features_ND, self.reference.features_ND

    @property
    def pool(self) -> Statistics:
        assert self.reference is not None
        return self.reference.pool

    @property
    def facts(self) -> dict[str, int]:
        return {"reference_features": len(self.sides[1])}


def _inception_row(c: Comparison) -> list[Row]:
    """The Inception Score: mean over splits, and over all images at once."""
    logits_NK, labels = c.target.logits_NK, c.labels
    by_split, order_free = metrics.inception_score(logits_NK, metrics.SPLIT)
    row: Row = {
        "value": float(by_split.mean()), "spread_over_splits": float(np.std(by_split)), "splits": len(by_split),
        "images_per_split": min(metrics.SPLIT, len(logits_NK)), "order_free": order_free,
    }  # fmt: skip
    if c.ci:
        row["ci95"], row["order_free_ci95"] = metrics.score_intervals(logits_NK, by_split, order_free)
    if len(by_split) > 1 and labels is not None and len(set(labels)) > 1 and labels == sorted(labels):
        row |= {key: None for key in ("value", "spread_over_splits", "ci95") if key in row}
        row["not_computed"] = "the images are in class order, so a mean over splits says nothing; see order_free"
    if row["images_per_split"] < ENOUGH * logits_NK.shape[1]:
        row["notes"] = [f"{row['images_per_split']} images a split: such a score is too low; compare it at the same N"]
    return [row]


def _fid_row(c: Comparison) -> list[Row]:
    return [_frechet_row(c.target.features_ND, c.pool, "features", c.subsets, c.ci)]


def _sfid_row(c: Comparison) -> list[Row]:
    assert c.reference is not None
    assert c.reference.spatial is not None
    assert c.target.spatial_NP is not None
    row = _frechet_row(c.target.spatial_NP, c.reference.spatial, "spatial features", [slice(None)], False)
    return [{"value": row["value"], "notes": row["notes"]}]


def _pr_rows(c: Comparison) -> list[Row]:
    shares = metrics.precision_recall(*c.sides, device=c.extractor.device)
    return [{"value": share, "neighbours": metrics.NEIGHBOURS, **c.facts} for share in shares]


def _dc_rows(c: Comparison) -> list[Row]:
    values = metrics.density_coverage(*c.sides, device=c.extractor.device)
    return [{"value": value, "neighbours": metrics.DENSITY_NEIGHBOURS, **c.facts} for value in values]


def _kid_row(c: Comparison) -> list[Row]:
    value, spread_over_subsets = metrics.kernel_distance(*c.sides)
    size = min(metrics.SUBSET_SIZE, *map(len, c.sides))
    draws = {"spread_over_subsets": spread_over_subsets, "subsets": metrics.SUBSETS, "subset_size": size}
    return [{"value": value, **draws, **c.facts}]


def _mind_row(c: Comparison) -> list[Row]:
    n = min(map(len, c.sides))
    return [{"value": metrics.mind(*(side[spread(len(side), n)] for side in c.sides)), "n": n}]


def _cmmd_row(c: Comparison) -> list[Row]:
    samples_ND, reference_MD = (side[spread(len(side), MOST_FEATURES)] for side in c.sides)
    return [{"value": metrics.cmmd(samples_ND, reference_MD, c.extractor.device), "n": len(samples_ND), **c.facts}]


def _fd_infinity_row(c: Comparison) -> list[Row]:
    return [{"value": metrics.fd_infinity(c.target.features_ND, c.pool), "sizes": metrics.SIZES}]


def _fdr_row(c: Comparison) -> list[Row]:
    """The Fréchet distance over that of as many held-out images (Yang et al. 2026), so that both have the same bias."""
    assert c.heldout is not None
    assert c.reference is not None
    sides = c.target.features_ND, c.heldout.features_ND
    n = min(map(len, sides))
    parts = (metrics.statistics(side[spread(len(side), n)]) for side in sides)
    samples, real = (metrics.frechet_distance(part, c.pool) for part in parts)
    if c.heldout.sha256 == c.reference.sha256 or not real:
        raise DataError("the held-out images are those of the reference", "give other images as --heldout")
    notes = rank_notes(n, c.extractor.width)
    return [{"value": samples / real, "n": n, "heldout_distance": real, "notes": notes}]


ROWS: dict[str, Callable[[Comparison], list[Row]]] = {
    "fid": _fid_row, "sfid": _sfid_row, "is": _inception_row, "pr": _pr_rows, "dc": _dc_rows, "kid": _kid_row,
    "mind": _mind_row, "cmmd": _cmmd_row, "fd_infinity": _fd_infinity_row, "fdr": _fdr_row,
}  # fmt: skip
METRICS = tuple(ROWS)


def _frechet_row(features_ND: Floats, reference: Statistics, kind: str, subsets: Sequence[Any], ci: bool) -> Row:
    """The Fréchet distance of all images, or the mean over balanced subsets."""
    statistics = [metrics.statistics(features_ND[rows]) for rows in subsets]
    values = [metrics.frechet_distance(one, reference) for one in statistics]
    row: Row = {"value": float(np.mean(values))}
    if ci:
        without = []
        with progress.Bar("leave out, for the interval", min(metrics.GROUPS, len(features_ND)), "groups") as bar:
            for distance in metrics.distances_without_groups(features_ND, reference):
                without.append(distance)
                bar.advance(1)
        row["ci95"] = metrics.interval_from_groups(row["value"], without, len(features_ND))
    count = statistics[0].count
    notes = rank_notes(min(count, reference.count or count), features_ND.shape[1], kind)
    spread_over_subsets = float(np.std(values)) if len(values) > 1 else None
    return {**row, "spread_over_subsets": spread_over_subsets, "n": count, "subsets": len(values), "notes": notes}


def _record(
    metric: str, rows: dict[str, Row], extractor: Extractor, target: ImageSet, scored: Features,
    reference: Reference | None,
) -> dict[str, Any]:  # fmt: skip
    """The keys of one score are short (value, ci95); of `all` they carry its name (fid, fid_ci95)."""
    values: dict[str, Any] = {"metric": "all" if metric == "all" else "_".join(rows)}
    notes, absent = [extractor.note] if extractor.note else [], {}
    for name, row in rows.items():
        main, prefix = name if len(rows) > 1 else "value", f"{name}_" if metric == "all" else ""
        if reason := row.pop("not_computed", None):
            absent[main] = reason
        notes += row.pop("notes", [])
        values |= {main if key == "value" else prefix + key: value for key, value in row.items()}
    values.setdefault("n", target.count)
    values |= factor_scores(extractor, target, scored)
    accuracy, reason = class_accuracy(extractor, target.labels, target.class_names, scored)
    if reason:
        absent["class_accuracy"] = reason
    return {
        **values,
        "target": {"name": target.name, "count": target.count, "sha256": scored.sha256},
        "reference": reference and {name: getattr(reference, name) for name in ("name", "count", "sha256")},
        "extractor": identity(extractor),
        "class_accuracy": accuracy,
        "notes": notes,
        **({"not_computed": absent} if absent else {}),
    }


def columns_of(records: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Every score of these records, one value a record; those of `factor_coverage` as `factor_coverage.NAME`."""
    columns: dict[str, list[float]] = {}
    for record in records:
        coverage = {f"factor_coverage.{name}": value for name, value in record.get("factor_coverage", {}).items()}
        for name, value in {**record, **coverage}.items():
            if isinstance(value, float) and "spread_over_" not in name:
                columns.setdefault(name, []).append(value)
    return columns


def average(records: Sequence[dict[str, Any]], seeds: Sequence[int]) -> dict[str, Any]:
    """The record of samples of several seeds: means over the seeds, and `spread_over_seeds`, their standard deviations.

    The spreads within one set and the sha256 of its images are left out; all else is the same for every seed."""
    columns, first = columns_of(records), records[0]
    means = {name: float(np.mean(values)) for name, values in columns.items()}
    coverage = {name: means.pop(f"factor_coverage.{name}") for name in first.get("factor_coverage", {})}
    return {
        **{name: value for name, value in first.items() if "spread_over_" not in name}, **means,
        **({"factor_coverage": coverage} if coverage else {}), "seeds": list(seeds),
        "spread_over_seeds": {name: metrics.deviation(values) for name, values in columns.items()},
        "target": {name: first["target"][name] for name in ("name", "count")},
    }  # fmt: skip


@torch.no_grad()
def factor_scores(extractor: Extractor, target: ImageSet, scored: Features) -> dict[str, Any]:
    """factor_coverage and validity, by a judge of images with factors; nothing by any other extractor."""
    if extractor.factor_layer is None:
        return {}
    predicted_NP = extractor.factor_layer(torch.from_numpy(scored.features_ND).to(extractor.device))
    factors_NF = factors.decode(predicted_NP.cpu().numpy())
    outputs, _ = class_outputs(extractor, target.labels, target.class_names)
    kinds = scored.logits_NK.argmax(1) if outputs is None else outputs
    psnr = factors.validity(target.read(features.pieces(target.count)), kinds, factors_NF)
    return {"factor_coverage": factors.coverage(factors_NF), "validity": psnr}


def rank_notes(count: int, width: int, kind: str = "features") -> list[str]:
    """A note for a Fréchet distance of fewer images than features."""
    return [f"fewer images than the {width} {kind}: the covariance has no full rank"] if count <= width else []


def class_accuracy(
    extractor: Extractor, labels: Sequence[int] | None, names: Sequence[str], scored: Features
) -> tuple[float | None, str]:
    """Share of images that a judge puts into the class they were drawn for; or None, and why its classes do not fit."""
    outputs, reason = class_outputs(extractor, labels, names)
    return None if outputs is None else float(np.mean(scored.logits_NK.argmax(1) == outputs)), reason


def class_outputs(
    extractor: Extractor, labels: Sequence[int] | None, names: Sequence[str]
) -> tuple[NDArray[np.int64] | None, str]:
    """The judge's number of the class that each image was drawn for; or None, and why its classes do not fit."""
    if not extractor.class_names or labels is None or not names:
        return None, ""
    try:
        output_of = judge.class_outputs(extractor.class_names, names, labels, extractor.name)
    except CheckpointError as error:
        return None, error.message
    return np.array([output_of[label] for label in labels]), ""

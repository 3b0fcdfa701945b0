"""References, and scores of a set of images as a record: value, N, reference and extractor with their hashes.

A reference is images, or an .npz of statistics: `mu, sigma` of the pooled features (pytorch-fid, EDM). ADM's also have
`mu_s, sigma_s` of the spatial features, and 10,000 images `arr_0` for precision and recall. Ours, of `rdpm eval
reference`, hold features instead of images, and record which extractor made them."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rdpm_cli import files, progress
from rdpm_cli.data import folder
from rdpm_cli.data.folder import ImageSet
from rdpm_cli.data.open import is_builtin, is_there, open_source
from rdpm_cli.data.pictures import npz_array, npz_names
from rdpm_cli.data.pixels import TRANSFORM, Pixels, image_errors
from rdpm_cli.data.source import Source, spread
from rdpm_cli.distributed import gather, world
from rdpm_cli.errors import CheckpointError, DataError, UsageError
from rdpm_cli.evaluation import factors, features, judge, metrics
from rdpm_cli.evaluation.features import PUBLISHED, Extractor, Features, Floats, collect_shared, identity
from rdpm_cli.evaluation.metrics import NO_MOMENTS, Statistics, moments

METRICS = ("fid", "sfid", "is", "pr", "kid")
# Only scores by the published Inception weights have the names that papers use.
NAMES = {
    "fid": ("fid", "frechet_distance"), "sfid": ("sfid", "spatial_frechet_distance"), "kid": ("kid", "kernel_distance"),
    "is": ("inception_score", "classifier_score"),
}  # fmt: skip
REFERENCE_FEATURES = 10_000  # images of a reference that precision, recall and KID take: ADM's number
FEWEST = {"fid": 2, "sfid": 2, "is": metrics.SPLITS, "pr": metrics.NEIGHBOURS + 1, "kid": 2}  # images
ENOUGH = 4  # images a class, of a split of an Inception Score
SIZES = 8  # of images, that are counted; photographs have thousands
RECORD = "rdpm_reference"  # the name of our record in the .npz
AGAIN = "give images, or make a reference by `rdpm eval reference IMAGES REF.npz` with the same extractor"

Row = dict[str, Any]  # of a score: `value` and its details; `not_computed`, why the value is None; `notes`


def open_images(source: Source, resolution: int, limit: int | None = None, without: Collection[int] = ()) -> ImageSet:
    """Images of a source after the ADM crop. without: indices to leave out; limit: evenly spaced ones of the rest."""
    included = np.setdiff1d(np.arange(len(source)), list(without))
    indices: list[int] = included[spread(len(included), limit)].tolist()
    labels = None if source.labels is None else [int(source.labels[index]) for index in indices]

    def read(pieces: Iterable[range]) -> Iterator[Pixels]:
        for piece in pieces:
            yield np.stack([source.pixels(index, resolution) for index in indices[piece.start : piece.stop]])

    return ImageSet(source.spec, len(indices), resolution, labels, source.class_names, read)


def open_target(
    spec: str, resolution: int | None, extractor: Extractor, reading: Mapping[str, Any] | None = None
) -> ImageSet:
    """A folder of samples or .npz of images as it is; a source cropped to `resolution`, or as `crop_side` says."""
    if images := _open_pictures(spec):
        if resolution:
            message = f"--resolution {resolution}: the images of {spec} are not cropped, they are {images.resolution}"
            raise UsageError(f"{message}×{images.resolution}", "leave it out")
        return images
    source = open_source(spec, **(reading or {}))
    return open_images(source, resolution or crop_side(source, default=extractor.resolution))


def _open_pictures(spec: str) -> ImageSet | None:
    """A folder of samples or an .npz of images; None for any other source."""
    path = Path(spec)
    if is_builtin(spec):
        return None
    if (path / folder.RECORD).is_file():
        return folder.open_samples(path)
    if path.suffix == ".npz" and path.is_file():
        return folder.open_npz(path)
    if path.is_dir() and folder.is_unfinished(path):
        raise DataError(f"{spec} is an unfinished folder of pictures", "run the command that makes it again")
    return None


def crop_side(*sources: Source, default: int | None = None) -> int:
    """The side to crop images to where none is given: the default, or their short side. They must be of one size.

    Raises DataError for images of several sizes: one may not belong to the set, such as a grid of samples."""
    counts, first = _sizes(sources)
    width, height = min(counts, key=lambda size: counts[size])
    if len(counts) > 1:
        listed = ", ".join(f"{number} of {w}×{h}" for (w, h), number in counts.most_common())
        among = f" among the first {counts.total()} images" if len(counts) > SIZES else ""
        message = f"{sources[0].spec} holds images of several sizes{among}: {listed}: {first[width, height]}"
        hint = "take out what does not belong to the set, or give --resolution, to which all are cropped"
        raise DataError(message, hint)
    side = default or min(width, height)
    if (width, height) != (side, side):
        progress.say(f"{counts.total()} images of {width}×{height} are scaled and cropped to {side}×{side}")
    return side


def _sizes(sources: Sequence[Source]) -> tuple[Counter[tuple[int, int]], dict[tuple[int, int], str]]:
    """The number of images by (width, height), and the first name of each, up to the image that has one too many."""
    counts, first = Counter[tuple[int, int]](), dict[tuple[int, int], str]()
    with progress.Bar("read sizes", sum(map(len, sources)), "images") as bar:
        for source in sources:
            for index, name in enumerate(source.names):
                with image_errors(source.spec, name), source.open(index) as image:
                    size = image.size
                first.setdefault(size, name)
                counts[size] += 1
                bar.advance(1)
                if len(counts) > SIZES:
                    return counts, first
    return counts, first


def open_recorded(record: dict[str, Any] | None, owner: str, hint: str, limit: int | None = None) -> ImageSet:
    """The images of a reference record, or `limit` of them; owner, hint: of the DataError if they are not the same."""
    if not record:
        raise DataError(f"{owner} records no reference", hint)
    name, transform = record["source"], record["transform"]
    known = is_there(name) and transform == TRANSFORM
    source = open_source(name, **record.get("reading", {})) if known else None
    if source is None or source.digest() != record["digest"]:
        raise DataError(f"{owner} records the reference {name} ({transform}), which is not here or has changed", hint)
    # Images that the store could not read took no part in the training, so they are no part of the reference.
    return open_images(source, int(record["resolution"]), limit=limit, without=record.get("left_out", ()))


@dataclass
class Reference:
    """The side that images are compared with. count, resolution: of the images behind it, where they are known."""

    name: str
    count: int | None
    sha256: str
    resolution: int | None
    pool: Statistics
    spatial: Statistics | None = None
    features_ND: Floats | None = None  # of some images, evenly spaced
    images: ImageSet | None = None  # of an ADM file, for features


def open_reference(
    ref: str | None, target: ImageSet, extractor: Extractor, reading: Mapping[str, Any] | None = None
) -> ImageSet | Reference:
    """The images or statistics that the user names, else the images that the target's record names. Of its size."""
    reference: ImageSet | Reference
    if ref is None:
        reference = open_recorded(target.record.get("reference"), target.name, "give the reference with --ref IMAGES")
    elif ref.endswith(".npz") and Path(ref).is_file() and {"mu", "sigma"} <= set(npz_names(Path(ref))):
        reference = load_statistics(Path(ref), extractor)
    else:
        reference = _open_pictures(ref) or open_images(open_source(ref, **(reading or {})), target.resolution)
    if (side := reference.resolution) not in (None, target.resolution):
        message = f"the reference {reference.name} is of images of {side}×{side}, the target of {target.resolution}"
        raise DataError(message, "compare images of one size: `rdpm eval reference --resolution`")
    return reference


def measure(extractor: Extractor, images: ImageSet, spatial: bool, rows: Sequence[int] = ()) -> Reference | None:
    """Statistics of images by all processes -> in the first one; None in the others. rows: whose features are kept."""
    with_features_N = np.isin(np.arange(images.count), list(rows))
    kept: list[tuple[list[bytes], Floats]] = []  # digests, and features of the rows, of each piece
    pool = spatial_pool = NO_MOMENTS  # sums, since features of a million images fill 10 GB
    ranges = features.pieces(images.count, *world())
    for piece, part in zip(ranges, features.shared_pieces(extractor, images, spatial), strict=True):
        kept.append((part.digests, part.features_ND[with_features_N[piece]]))
        pool += moments(part.features_ND)
        if part.spatial_NP is not None:
            spatial_pool += moments(part.spatial_NP)
    by_rank = gather((kept, pool, spatial_pool))
    if by_rank is None:
        return None
    kept_by_rank, pools, spatial_pools = zip(*by_rank, strict=True)
    spatial_pool = sum(spatial_pools, NO_MOMENTS)
    digests, features_of = zip(*features.in_order(list(kept_by_rank)), strict=True)
    return Reference(
        images.name, images.count, features.set_digest(digest for piece in digests for digest in piece),
        images.resolution, sum(pools, NO_MOMENTS).statistics(),
        spatial_pool.statistics() if spatial_pool.count else None, np.concatenate(features_of),
    )  # fmt: skip


def save_statistics(path: Path, reference: Reference, record: dict[str, Any], extractor: Extractor) -> None:
    """Write measured statistics as an .npz. record: what else to record, such as the crop."""
    assert reference.features_ND is not None
    arrays: dict[str, NDArray[Any]] = {"mu": reference.pool.mean_D, "sigma": reference.pool.covariance_DD}
    arrays["features"] = reference.features_ND
    if spatial := reference.spatial:
        arrays |= {"mu_s": spatial.mean_D, "sigma_s": spatial.covariance_DD}
    facts = {name: getattr(reference, name) for name in ("name", "sha256", "count", "resolution")}
    facts |= {"features": len(reference.features_ND), "extractor": identity(extractor)}
    features.save_npz_record(path, RECORD, {**record, **facts}, arrays)


def load_statistics(path: Path, extractor: Extractor) -> Reference:
    """The statistics of an .npz. Raises DataError for damaged arrays, and unless this extractor made them."""
    names = set(npz_names(path))
    record = features.npz_record(path, RECORD, AGAIN) if RECORD in names else {}
    maker = record.get("extractor", {"name": PUBLISHED, "sha256": ""})
    if not features.is_maker(extractor, maker) if record else maker["name"] != extractor.name:
        message = f"{path} was made with {maker['name']} {maker['sha256'][:12]}, not with {extractor.name}"
        raise DataError(f"{message} {extractor.sha256[:12]}", AGAIN)

    def load(name: str, *shape: int) -> NDArray[Any]:
        array = npz_array(path, name)
        if array.shape != shape or array.dtype.kind != "f" or not np.isfinite(array).all():
            raise DataError(f"{path}: {name} {array.shape} is damaged, or not of {shape[-1]} features", AGAIN)
        return array.astype(np.float32 if name == "features" else np.float64)

    def statistics(mean: str, covariance: str, width: int) -> Statistics:
        return Statistics(load(mean, width), load(covariance, width, width), record.get("count", 0))

    pool, spatial = statistics("mu", "sigma", extractor.width), None
    if {"mu_s", "sigma_s"} <= names and extractor.spatial_width:
        spatial = statistics("mu_s", "sigma_s", extractor.spatial_width)
    if record:
        features_ND = load("features", record["features"], extractor.width)
        facts = {name: record[name] for name in ("name", "count", "sha256", "resolution")}
        return Reference(**facts, pool=pool, spatial=spatial, features_ND=features_ND)
    images = folder.open_npz(path) if "arr_0" in names else None
    return Reference(str(path), None, files.sha256_file(path), None, pool, spatial, None, images)


def score(
    metric: str, extractor: Extractor, targets: Sequence[ImageSet], reference: ImageSet | Reference | None, *,
    subset: int | None = None, ci: bool = False, file: Path | None = None, without: Collection[str] = (),
) -> list[dict[str, Any]]:  # fmt: skip
    """The record of each target by a metric of METRICS, or `all`. Every process calls it; the first one gets them.

    reference: None for `is`. subset: the Fréchet distance as a mean over disjoint class-balanced subsets of this size.
    ci: 95% intervals. file: keeps the features of the target. without: metrics that `all` leaves out. Raises
    DataError."""
    parts = [part for part in METRICS if part not in without] if metric == "all" else [metric]
    fewest = max(*(FEWEST[part] for part in parts), 2 * metrics.SPLITS if ci else 0)
    for target in targets:
        judge.check_size(extractor.resolution, target.resolution)
    for images in (*targets, reference):
        if isinstance(images, ImageSet) and images.count < fewest:
            raise DataError(f"`eval {metric}` needs at least {fewest} images, not {images.count}", "take more images")
    subsets = [_subsets(target, subset) for target in targets]
    absent = _absent(extractor, reference)
    if set(parts) <= set(absent):
        raise DataError(absent[parts[0]], "give images as --ref, or a file that has them")
    compared = measured(extractor, reference, parts)
    records = []
    for target, subsets_of_target in zip(targets, subsets, strict=True):
        if extractor.factor_layer is not None:  # validity reads the images again
            target = _kept(target)
        scored = collect_shared(extractor, target, "sfid" in parts, file)
        if scored is None:
            continue
        rows = dict[str, Row]()
        for part in parts:
            names = ("precision", "recall") if part == "pr" else [NAMES[part][extractor.name != PUBLISHED]]
            new: list[Row] = [{"value": None, "not_computed": absent.get(part)} for _ in names]
            if part not in absent and part == "is":
                new = [_inception_row(scored.logits_NK, target.labels, ci)]
            elif part not in absent:
                assert compared is not None
                new = _compared_rows(part, extractor, scored, compared, subsets_of_target, ci)
            rows |= zip(names, new, strict=True)
        records.append(_record(metric, rows, extractor, target, scored, compared))
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


def _absent(extractor: Extractor, reference: ImageSet | Reference | None) -> dict[str, str]:
    """The parts of METRICS that cannot be computed, with the reason."""
    absent = {}
    if isinstance(reference, Reference):
        if reference.spatial is None:
            absent["sfid"] = f"{reference.name} has no mu_s and sigma_s"
        if reference.features_ND is None and reference.images is None:
            absent |= dict.fromkeys(("pr", "kid"), f"{reference.name} has neither features nor images (arr_0)")
    if not extractor.spatial_width:
        absent["sfid"] = f"{extractor.name} has no spatial features"
    if not extractor.classes:
        absent["is"] = f"{extractor.name} has no classes"
    return absent


def measured(extractor: Extractor, reference: ImageSet | Reference | None, parts: Sequence[str]) -> Reference | None:
    """The reference with all that the parts need. Measured here: None in all processes but the first."""
    images = reference.images if isinstance(reference, Reference) else reference
    rows = spread(images.count, REFERENCE_FEATURES) if images and not {"pr", "kid"}.isdisjoint(parts) else []
    if isinstance(reference, ImageSet):
        return measure(extractor, reference, "sfid" in parts, rows)
    if reference and images and rows:
        shared = collect_shared(extractor, images)
        reference.features_ND, reference.images = shared and shared.features_ND[rows], None  # measured once
    return reference


def _inception_row(logits_NK: Floats, labels: list[int] | None, ci: bool) -> Row:
    """The Inception Score: mean over splits, and over all images at once."""
    by_split, order_free = metrics.inception_score(logits_NK)
    row: Row = {
        "value": float(by_split.mean()), "spread_over_splits": float(np.std(by_split)), "splits": len(by_split),
        "images_per_split": len(logits_NK) // len(by_split), "order_free": order_free,
    }  # fmt: skip
    if ci:
        row["ci95"], row["order_free_ci95"] = metrics.score_intervals(logits_NK, by_split, order_free)
    if labels is not None and len(set(labels)) > 1 and labels == sorted(labels):
        row |= {key: None for key in ("value", "spread_over_splits", "ci95") if key in row}
        row["not_computed"] = "the images are in class order, so a mean over splits says nothing; see order_free"
    if row["images_per_split"] < ENOUGH * logits_NK.shape[1]:
        row["notes"] = [f"{row['images_per_split']} images a split: such a score is too low; compare it at the same N"]
    return row


def _compared_rows(
    part: str, extractor: Extractor, scored: Features, reference: Reference, subsets: Sequence[Any], ci: bool
) -> list[Row]:
    """The rows of the scores that compare with a reference."""
    features_ND, reference_ND = scored.features_ND, reference.features_ND
    if part == "fid":
        return [_frechet_row(features_ND, reference.pool, "features", subsets, ci)]
    if part == "sfid":
        assert scored.spatial_NP is not None
        assert reference.spatial is not None
        row = _frechet_row(scored.spatial_NP, reference.spatial, "spatial features", [slice(None)], False)
        return [{"value": row["value"], "notes": row["notes"]}]
    assert reference_ND is not None
    facts = {"reference_features": len(reference_ND)}
    if part == "pr":
        shares = metrics.precision_recall(features_ND, reference_ND, device=extractor.device)
        return [{"value": share, "neighbours": metrics.NEIGHBOURS, **facts} for share in shares]
    value, spread_over_subsets = metrics.kernel_distance(features_ND, reference_ND)
    size = min(metrics.SUBSET_SIZE, len(features_ND), len(reference_ND))
    draws = {"spread_over_subsets": spread_over_subsets, "subsets": metrics.SUBSETS, "subset_size": size}
    return [{"value": value, **draws, **facts}]


def _frechet_row(features_ND: Floats, reference: Statistics, kind: str, subsets: Sequence[Any], ci: bool) -> Row:
    """The Fréchet distance of all images, or the mean over balanced subsets."""
    root = metrics.matrix_root(reference.covariance_DD)
    statistics = [metrics.statistics(features_ND[rows]) for rows in subsets]
    values = [metrics.frechet_distance(one, reference, root) for one in statistics]
    row: Row = {"value": float(np.mean(values))}
    if ci:
        without = []
        with progress.Bar("leave out, for the interval", min(metrics.GROUPS, len(features_ND)), "groups") as bar:
            for distance in metrics.distances_without_groups(features_ND, reference, root):
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

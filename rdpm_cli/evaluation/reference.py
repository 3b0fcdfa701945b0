"""References, and sets of images as they are scored.

A reference is images, or an .npz of statistics: `mu, sigma` of the pooled features (pytorch-fid, EDM). ADM's also have
`mu_s, sigma_s` of the spatial features, and 10,000 images `arr_0` for scores that compare features. Ours, of `rdpm eval
reference`, hold features instead of images, and record which extractor made them."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdpm_cli import files, progress
from rdpm_cli.data import folder
from rdpm_cli.data.folder import ImageSet
from rdpm_cli.data.open import is_builtin, is_there, open_source
from rdpm_cli.data.pictures import npz_array, npz_names
from rdpm_cli.data.pixels import TRANSFORM, Pixels, image_errors
from rdpm_cli.data.source import Source, spread
from rdpm_cli.distributed import gather, world
from rdpm_cli.errors import DataError, UsageError
from rdpm_cli.evaluation import features
from rdpm_cli.evaluation.features import PUBLISHED, Extractor, Floats, identity
from rdpm_cli.evaluation.metrics import NO_MOMENTS, Statistics, moments

SIZES = 8  # of images, that are counted; photographs have thousands
RECORD = "rdpm_reference"  # the name of our record in the .npz
AGAIN = "give images, or make a reference by `rdpm eval reference IMAGES REF.npz` with the same extractor"


def open_images(source: Source, resolution: int, limit: int | None = None, without: Collection[int] = ()) -> ImageSet:
    """Images of a source after the ADM crop. without: indices to leave out; limit: evenly spaced ones of the rest."""
    included = np.setdiff1d(np.arange(len(source)), list(without))
    indices: list[int] = included[spread(len(included), limit)].tolist()
    labels = None if source.labels is None else [int(source.labels[index]) for index in indices]

    def read(pieces: Iterable[range]) -> Iterator[Pixels]:
        for piece in pieces:
            yield np.stack([source.pixels(index, resolution) for index in indices[piece.start : piece.stop]])

    names = [source.names[index] for index in indices]
    return ImageSet(source.spec, len(indices), resolution, labels, source.class_names, read, names=names)


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


def holds_statistics(ref: str) -> bool:
    """Whether a reference is an .npz of statistics. Raises DataError for a damaged one."""
    return ref.endswith(".npz") and Path(ref).is_file() and {"mu", "sigma"} <= set(npz_names(Path(ref)))


def open_reference(
    ref: str | None, target: ImageSet, extractor: Extractor, reading: Mapping[str, Any] | None = None
) -> ImageSet | Reference:
    """The images or statistics that the user names, else the images that the target's record names. Of its size."""
    reference: ImageSet | Reference
    if ref is None:
        reference = open_recorded(target.record.get("reference"), target.name, "give the reference with --ref IMAGES")
    elif holds_statistics(ref):
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

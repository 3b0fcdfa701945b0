"""Sets of images to score, and references: images, or files of their statistics.

Files of statistics are .npz with `mu, sigma` of the pooled features (pytorch-fid, EDM). ADM's also have `mu_s, sigma_s`
of the spatial features, and 10,000 images `arr_0` for precision and recall. Ours, of `rdpm eval reference`, hold
features instead of images, and record which extractor made them.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdpm_cli import files
from rdpm_cli.data import folder
from rdpm_cli.data.folder import ImageSet
from rdpm_cli.data.open import is_builtin, is_there, open_source
from rdpm_cli.data.pictures import npz_array, npz_names
from rdpm_cli.data.pixels import TRANSFORM, Pixels
from rdpm_cli.data.source import Source, spread
from rdpm_cli.distributed import gather
from rdpm_cli.errors import DataError
from rdpm_cli.evaluation.features import (
    PUBLISHED,
    Extractor,
    Floats,
    identity,
    in_order,
    is_published_inception,
    npz_record,
    rank_pieces,
    set_digest,
    shared_pieces,
)
from rdpm_cli.evaluation.metrics import NO_MOMENTS, Statistics, moments

# ---- sets of images ------------------------------------------------------------------------------------------------


def open_images(
    source: Source, resolution: int, *, limit: int | None = None, without: Collection[int] = ()
) -> ImageSet:
    """Images of a source after the ADM crop. without: indices to leave out; limit: evenly spaced ones of the rest."""
    excluded = set(without)
    included = [index for index in range(len(source)) if index not in excluded]
    indices = [included[number] for number in spread(len(included), limit)]
    labels = None if source.labels is None else [int(source.labels[index]) for index in indices]

    def read(pieces: Iterable[range]) -> Iterator[Pixels]:
        for piece in pieces:
            yield np.stack([source.pixels(index, resolution) for index in indices[piece.start : piece.stop]])

    return ImageSet(source.spec, len(indices), resolution, labels, source.class_names, read)


def open_target(spec: str, resolution: int | None) -> ImageSet:
    """A sample folder, an .npz of images (`arr_0`), or any image source.

    Sources are cropped to `resolution`, else to the size of their first image's short side.
    """
    if (images := _open_ready(spec)) is not None:
        return images
    source = open_source(spec)
    return open_images(source, resolution or min(source.image(0).size))


def _open_ready(spec: str) -> ImageSet | None:
    """Images that are not cropped again: a sample folder, an .npz. None for anything else."""
    if is_builtin(spec):
        return None
    path = Path(spec)
    if (path / folder.RECORD).is_file():
        return folder.open_samples(path)
    if path.suffix == ".npz" and path.is_file():
        return folder.open_npz(path)
    if path.is_dir() and folder.is_unfinished(path):
        raise DataError(f"{spec} is an unfinished folder of pictures", "run the command that makes it again")
    return None


def open_reference(ref: str | None, target: ImageSet) -> ImageSet:
    """The images that the user names, else those recorded along samples -> checkpoint -> store -> data."""
    if ref is None:
        return open_recorded(target.record.get("reference"), target.name, "give the reference with --ref IMAGES")
    return _open_ready(ref) or open_images(open_source(ref), target.resolution)


def open_recorded(record: dict[str, Any] | None, owner: str, hint: str, limit: int | None = None) -> ImageSet:
    """The images of a reference record, if they are still the same. limit: evenly spaced ones of them.

    owner: what holds the record, and hint: what else to do, for the errors (DataError).
    """
    if not record:
        raise DataError(f"{owner} records no reference", hint)
    if record["transform"] != TRANSFORM:
        raise DataError(f"{owner} names a reference with transform {record['transform']}", hint)
    name = record["source"]
    if not is_there(name):
        raise DataError(f"the recorded reference {name} is not here", hint)
    source = open_source(name)
    if source.digest() != record["digest"]:
        raise DataError(f"{name} holds other images than when it was tokenised", hint)
    # Images that the store could not read took no part in the training, so they are no part of the reference.
    return open_images(source, int(record["resolution"]), limit=limit, without=record.get("left_out", ()))


# ---- the reference of a comparison ---------------------------------------------------------------------------------


@dataclass
class Reference:
    """The side that images are compared with. count: of the images behind the statistics, where it is known.

    features_ND: of some images, evenly spaced. absent: why there is no `spatial` or no `features`.
    """

    name: str
    count: int | None
    sha256: str
    pool: Statistics
    spatial: Statistics | None
    features_ND: Floats | None
    absent: dict[str, str] = field(default_factory=dict)


def measure(extractor: Extractor, images: ImageSet, spatial: bool, rows: Sequence[int] = ()) -> Reference | None:
    """Statistics of images by all processes -> in the first one; None in the others.

    Summed piece by piece: a reference of a million images would fill 10 GB with features. spatial: also of the spatial
    features, where the extractor has any. rows: of the images whose features are kept.
    """
    with_features_N = np.zeros(images.count, dtype=bool)
    with_features_N[list(rows)] = True
    pieces: list[tuple[list[bytes], Floats]] = []  # digests, and features of the rows
    pool = spatial_pool = NO_MOMENTS
    for piece, part in zip(rank_pieces(images.count), shared_pieces(extractor, images, spatial), strict=True):
        pieces.append((part.digests, part.features_ND[with_features_N[piece.start : piece.stop]]))
        pool += moments(part.features_ND)
        if part.spatial_NP is not None:
            spatial_pool += moments(part.spatial_NP)
    by_rank = gather((pieces, pool, spatial_pool))
    if by_rank is None:
        return None
    pieces_by_rank, pools, spatial_pools = zip(*by_rank, strict=True)
    pool, spatial_pool = sum(pools, NO_MOMENTS), sum(spatial_pools, NO_MOMENTS)
    digests, features = zip(*in_order(list(pieces_by_rank)), strict=True)
    return Reference(
        images.name,
        images.count,
        set_digest(digest for piece_digests in digests for digest in piece_digests),
        pool.statistics(),
        spatial_pool.statistics() if spatial_pool.count else None,
        np.concatenate(features),
    )


# ---- files of statistics -------------------------------------------------------------------------------------------

STATISTICS, VERSION = "rdpm_reference", 1  # the name of our record in the .npz, and its format
FIELDS = ("name", "sha256", "count", "resolution", "extractor")
AGAIN = "give images, or make a reference by `rdpm eval reference IMAGES REF.npz` with the same extractor"


class StatisticsFile:
    """A reference of statistics, of which only the record and the names of the arrays have been read."""

    def __init__(self, path: Path) -> None:
        """Raises DataError for a file that cannot be read."""
        self.path, self.name, self.arrays = path, str(path), npz_names(path)
        recorded = STATISTICS in self.arrays
        self.record = npz_record(path, STATISTICS, VERSION, FIELDS, AGAIN) if recorded else None
        self.resolution = int(self.record["resolution"]) if self.record else None

    def load(self, extractor: Extractor) -> Reference:
        """Its statistics in float64 and its features in float32.

        Raises DataError for damaged arrays, and unless the extractor in use is the one that made it.
        """
        self._check(extractor)
        count, absent = self.record["count"] if self.record else None, {}
        pool, spatial = self._statistics("mu", "sigma", extractor.width), None
        if {"mu_s", "sigma_s"} <= set(self.arrays) and extractor.spatial_width:
            spatial = self._statistics("mu_s", "sigma_s", extractor.spatial_width)
        else:
            absent["spatial"] = f"{self.path} has no mu_s and sigma_s"
        if self.record is None:
            absent["features"] = f"{self.path} has neither features nor images (arr_0)"
            return Reference(self.name, count, files.sha256_file(self.path), pool, spatial, None, absent)
        features_ND = npz_array(self.path, "features").astype(np.float32)
        if features_ND.ndim != 2 or features_ND.shape[1] != extractor.width:
            raise DataError(f"{self.path} is damaged: features are {features_ND.shape}", AGAIN)
        return Reference(self.record["name"], count, self.record["sha256"], pool, spatial, features_ND, absent)

    def _check(self, extractor: Extractor) -> None:
        in_use = f"the extractor in use is {extractor.name}"
        if self.record is None:
            if not is_published_inception(extractor):
                raise DataError(f"{self.path} holds statistics of {PUBLISHED}, but {in_use}", AGAIN)
        elif (maker := self.record["extractor"])["sha256"] != extractor.sha256:
            message = f"{self.path} was made with {maker['name']} ({maker['sha256'][:12]})"
            raise DataError(f"{message}, but {in_use} ({extractor.sha256[:12]})", AGAIN)

    def _statistics(self, mean: str, covariance: str, width: int) -> Statistics:
        arrays = [npz_array(self.path, name) for name in (mean, covariance)]
        shapes = [array.shape for array in arrays]
        if shapes != [(width,), (width, width)] or not all(
            a.dtype.kind == "f" and np.isfinite(a).all() for a in arrays
        ):
            raise DataError(
                f"{self.path}: {mean} {shapes[0]} and {covariance} {shapes[1]} are damaged, or not statistics of "
                f"{width} features",
                AGAIN,
            )
        mean_D, covariance_DD = (array.astype(np.float64) for array in arrays)
        return Statistics(mean_D, covariance_DD, self.record["count"] if self.record else 0)


def find_statistics(ref: str | None) -> StatisticsFile | None:
    """The file of statistics that a user named; None where the name is of images. Raises DataError."""
    path = Path(ref or "")
    if path.suffix != ".npz" or not path.is_file():
        return None
    names = npz_names(path)
    return StatisticsFile(path) if STATISTICS in names or {"mu", "sigma"} <= set(names) else None


def save_statistics(path: Path, reference: Reference, record: dict[str, Any], extractor: Extractor) -> None:
    """Write a reference as an .npz. record: name, resolution, and where the images are from."""
    features_ND = np.empty((0, extractor.width), np.float32) if reference.features_ND is None else reference.features_ND
    pool, spatial = reference.pool, reference.spatial
    arrays: dict[str, NDArray[Any]] = {"mu": pool.mean_D, "sigma": pool.covariance_DD, "features": features_ND}
    if spatial is not None:
        arrays |= {"mu_s": spatial.mean_D, "sigma_s": spatial.covariance_DD}
    whole = {
        **record,
        "version": VERSION,
        "sha256": reference.sha256,
        "count": reference.count,
        "features": len(features_ND),
        "extractor": identity(extractor),
    }
    text = np.array(files.canonical_json(whole))
    files.write_atomic(path, lambda file: np.savez(file, **{STATISTICS: text}, **arrays))  # type: ignore[arg-type]

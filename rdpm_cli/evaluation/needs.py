"""What scores need of images and references: looked at before any image is."""

from collections.abc import Sequence

from rdpm_cli.errors import DataError
from rdpm_cli.evaluation import intervals
from rdpm_cli.evaluation.features import NO_IMAGES, Extractor
from rdpm_cli.evaluation.metrics import frechet, kernel, manifold, score
from rdpm_cli.evaluation.reference import ImageSet
from rdpm_cli.evaluation.statfile import Against, StatFile


def images(
    parts: Sequence[str], target: ImageSet, reference: ImageSet | StatFile | None, *, interval: bool = False
) -> None:
    """parts: of METRICS. Raises DataError where target or reference has too few images for one of them."""
    counts = [target.count]
    if isinstance(reference, ImageSet):
        counts.append(reference.count)
    if not min(counts):
        raise DataError(NO_IMAGES, "sample again, or name another folder")
    if {"fid", "sfid"} & set(parts):
        frechet.need_images(min(counts))
    if "is" in parts:
        score.need_images(target.count)
    if interval:
        intervals.need_images(target.count)
    if isinstance(reference, StatFile) and reference.features is not None:
        counts.append(reference.features)
    if "pr" in parts:
        manifold.need_images(min(counts))
    if "kid" in parts:
        kernel.need_images(min(counts))


def statistics(parts: Sequence[str], extractor: Extractor, against: Against, has_images: bool) -> None:
    """Raises DataError where the file holds nothing for any of the parts, or has features of another width.

    has_images: are there some whose features can be computed?
    """
    sides = [("", against.pool, extractor.width)]
    if against.spatial and "sfid" in parts and extractor.spatial:
        sides.append(("spatial ", against.spatial, extractor.spatial))
    for kind, side, width in sides:
        if len(side.mean_D) != width:
            raise DataError(
                f"{against.name} has {len(side.mean_D)} {kind}features a mean, and {extractor.name} gives {width}",
                "give a reference of the same extractor",
            )
    lacks = {"sfid": against.missing.get("spatial")}
    if not has_images:
        lacks |= dict.fromkeys(("pr", "kid"), against.missing.get("features"))
    reasons = [lacks.get(part) for part in parts]
    if None not in reasons:
        raise DataError(str(reasons[0]), "give images as --ref, or a file that has them")

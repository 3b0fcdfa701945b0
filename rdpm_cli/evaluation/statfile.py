"""References that hold statistics instead of images: ours, ADM's, and those of pytorch-fid and EDM.

All are .npz with `mu, sigma` of pooled features. ADM's also have `mu_s, sigma_s` of the spatial ones and 10,000 images
`arr_0` for precision and recall; ours the features themselves, and say which extractor made them.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdpm_cli import files
from rdpm_cli.errors import DataError
from rdpm_cli.evaluation import npz
from rdpm_cli.evaluation.features import PUBLISHED, Extractor, identity, is_published_inception
from rdpm_cli.evaluation.metrics import Statistics
from rdpm_cli.evaluation.passes import Seen

OURS, VERSION = "rdpm_reference", 1
AGAIN = "give images, or make a reference by `rdpm eval reference IMAGES REF.npz` with the same extractor"


@dataclass
class Against:
    """What a set of images is compared with. count: of the images behind the statistics, where it is known.

    missing: why there is no `spatial` or no `features_ND`.
    """

    name: str
    count: int | None
    sha256: str
    pool: Statistics
    spatial: Statistics | None
    features_ND: NDArray[np.float32] | None
    missing: dict[str, str]


class StatFile:
    """A reference of statistics, looked at but not read."""

    def __init__(self, path: Path) -> None:
        """Raises DataError for a file that cannot be read."""
        self.path, self.arrays = path, npz.names(path)
        self.record = self._record() if OURS in self.arrays else None

    def _record(self) -> dict[str, Any]:
        try:
            record: dict[str, Any] = json.loads(str(npz.array(self.path, OURS)))
            if record["version"] != VERSION:
                raise DataError(f"{self.path} has format version {record['version']}; this rdpm reads {VERSION}", AGAIN)
            if not {"name", "sha256", "count", "resolution", "extractor"} <= set(record):
                raise ValueError("its record lacks a field")
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{self.path} is damaged: {error}", AGAIN) from error
        return record

    @property
    def name(self) -> str:
        """Of the file."""
        return str(self.path)

    @property
    def resolution(self) -> int | None:
        """Of its images, where it is ours and says so."""
        return int(self.record["resolution"]) if self.record else None

    @property
    def has_images(self) -> bool:
        """Are there images for precision and recall?"""
        return "arr_0" in self.arrays

    @property
    def features(self) -> int | None:
        """Images whose features it holds, or can give; None where it has neither."""
        if self.record:
            found: int | None = self.record.get("features")
            return found
        return npz.Images(self.path).count if self.has_images else None

    def check(self, extractor: Extractor) -> None:
        """Raises DataError where another extractor made it than the one in use."""
        if self.record is not None:
            made = self.record["extractor"]
            if made["sha256"] != extractor.sha256:
                raise DataError(
                    f"{self.path} was made with {made['name']} ({made['sha256'][:12]}), and the extractor in use is "
                    f"{extractor.name} ({extractor.sha256[:12]})",
                    AGAIN,
                )
        elif not is_published_inception(extractor):
            raise DataError(
                f"{self.path} holds statistics of {PUBLISHED}, and the extractor in use is {extractor.name}", AGAIN
            )

    def load(self) -> Against:
        """Its statistics and features, in float64 and float32."""
        count = self.record["count"] if self.record else None
        pool = self._statistics("mu", "sigma", count)
        missing = {}
        spatial = self._statistics("mu_s", "sigma_s", count) if {"mu_s", "sigma_s"} <= set(self.arrays) else None
        if spatial is None:
            missing["spatial"] = f"{self.path} has no mu_s and sigma_s"
        found = npz.array(self.path, "features").astype(np.float32) if self.record else None
        if found is not None and (found.ndim != 2 or found.shape[1] != len(pool.mean_D)):
            raise DataError(f"{self.path} is damaged: features are {found.shape}", AGAIN)
        if found is None:
            missing["features"] = f"{self.path} has neither features nor images (arr_0)"
        name, sha256 = str(self.path), files.sha256_file(self.path)
        if self.record:
            name, sha256 = self.record["name"], self.record["sha256"]
        return Against(name, count, sha256, pool, spatial, found, missing)

    def _statistics(self, mean: str, covariance: str, count: int | None) -> Statistics:
        raw = [npz.array(self.path, name) for name in (mean, covariance)]
        if any(values.dtype.kind != "f" for values in raw):
            raise DataError(f"{self.path} is damaged: {mean} and {covariance} are no floating-point numbers", AGAIN)
        mean_D, covariance_DD = (values.astype(np.float64) for values in raw)
        if mean_D.ndim != 1 or covariance_DD.shape != (len(mean_D), len(mean_D)):
            raise DataError(
                f"{self.path} is damaged: {mean} is {mean_D.shape}, {covariance} {covariance_DD.shape}", AGAIN
            )
        if not (np.isfinite(mean_D).all() and np.isfinite(covariance_DD).all()):
            raise DataError(f"{self.path} is damaged: {mean} or {covariance} holds values that are not finite", AGAIN)
        return Statistics(mean_D, covariance_DD, count or 0)


def find(ref: str | None) -> StatFile | None:
    """The reference of statistics that was named; None where it names images. Raises DataError for a pickle."""
    if ref is None:
        return None
    path = Path(ref)
    if path.suffix in (".pkl", ".pickle") and path.is_file():
        raise DataError(
            f"{path} is a pickle, which may run code when it is read",
            "give an .npz: EDM2's own tools write one with mu and sigma, and `rdpm eval reference` makes one",
        )
    if path.suffix != ".npz" or not path.is_file():
        return None
    arrays = npz.names(path)
    return StatFile(path) if OURS in arrays or {"mu", "sigma"} <= set(arrays) else None


def save(path: Path, seen: Seen, record: dict[str, Any], extractor: Extractor) -> None:
    """Write a reference. record: name, resolution and more of where the images are from."""
    pool = seen.pool.statistics()
    arrays: dict[str, NDArray[Any]] = {"mu": pool.mean_D, "sigma": pool.covariance_DD, "features": seen.features_ND}
    if seen.spatial:
        spatial = seen.spatial.statistics()
        arrays |= {"mu_s": spatial.mean_D, "sigma_s": spatial.covariance_DD}
    whole = {
        **record,
        "version": VERSION,
        "sha256": seen.sha256,
        "count": seen.count,
        "features": len(seen.features_ND),
        "extractor": identity(extractor),
    }
    text = np.array(files.canonical_json(whole))
    files.write_atomic(path, lambda file: np.savez(file, **{OURS: text}, **arrays))  # type: ignore[arg-type]

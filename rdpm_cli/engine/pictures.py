"""Folders of PNGs with a record of what they are: samples and reconstructions share one form, so `eval` reads both."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rdpm_cli import files
from rdpm_cli.engine.runs import versions
from rdpm_cli.errors import UsageError

if TYPE_CHECKING:
    from rdpm_cli.codes.manifest import Manifest
    from rdpm_cli.images.sources import ImageSource

RECORD = "samples.json"


def picture_record(
    kind: str,
    made_from: dict[str, str],
    options: dict[str, Any],
    *,
    resolution: int,
    class_names: list[str],
    reference: dict[str, Any] | None,
    rows: list[dict[str, Any]],
) -> dict[str, Any]:
    """The content of samples.json. made_from: digests; rows: file, index, label and what else is known of each."""
    return {
        "format": kind,
        "version": 1,
        "made_from": made_from,
        "options": options,
        "resolution": resolution,
        "class_names": class_names,
        "reference": reference,
        "versions": versions(),
        "samples": rows,
    }


def check(out: Path, record: dict[str, Any]) -> dict[str, Any]:
    """What tells `record`'s pictures from others. Raises UsageError when `out` holds something else."""
    identity = {key: record[key] for key in ("format", "made_from", "options")}
    identity |= {"count": len(record["samples"]), "samples": files.digest(record["samples"])}
    if (out / "run.json").is_file():
        before = files.read_json(out / "run.json").get("pictures", {})
        if changed := files.differences(before, identity):
            raise UsageError(f"{out} holds other pictures: {'; '.join(changed[:4])}", "choose another folder")
    elif out.is_dir() and any(not p.name.startswith(".") for p in out.iterdir()):
        raise UsageError(f"{out} is not empty and not a folder of samples", "choose another folder")
    return identity


def claim(out: Path, record: dict[str, Any]) -> None:
    """Begin or repeat writing `record`'s pictures into `out`. Raises UsageError when it holds something else."""
    files.make_folder(out)
    identity = check(out, record)
    files.write_json(out / "run.json", {"pictures": identity, "argv": sys.argv, "versions": versions()})


def finished(out: Path) -> dict[str, Any]:
    """samples.json of a finished folder; of another nothing."""
    return files.read_json(out / RECORD) if (out / RECORD).is_file() else {}


def finish(out: Path, record: dict[str, Any]) -> None:
    """Write samples.json: the pictures are all there."""
    files.write_json(out / RECORD, record)


def source_reference(source: ImageSource, resolution: int) -> dict[str, Any]:
    """What later scores compare with: the same images after the same crop."""
    from rdpm_cli.images.transform import TRANSFORM

    return {"source": source.spec, "digest": source.digest(), "resolution": resolution, "transform": TRANSFORM}


def store_reference(root: Path, manifest: Manifest) -> dict[str, Any]:
    """The images a store was made from. left_out: source indices of those that could not be read."""
    from rdpm_cli.codes.manifest import BAD, read_bad

    left_out = [bad.index for bad in read_bad(root / BAD)] if manifest.bad else []
    return {
        **({"left_out": left_out} if left_out else {}),
        "source": manifest.data.source,
        "digest": manifest.data.digest,
        "resolution": manifest.resolution,
        "transform": manifest.transform,
    }

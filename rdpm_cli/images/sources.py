"""Where images come from: the door to every kind of source. One interface for all, told by what is there."""

import os
from collections.abc import Sequence
from pathlib import Path

from rdpm_cli.errors import DataError, UsageError
from rdpm_cli.images.arrange import CLASSES, HINT, is_image, read_classes, read_note
from rdpm_cli.images.digits import DIGIT_PARTS, DigitsSource
from rdpm_cli.images.folders import FolderSource, visible_files
from rdpm_cli.images.interface import ImageSource, PartOfSource, spread
from rdpm_cli.images.parquet import ParquetSource
from rdpm_cli.images.patterns import SHARDS, expand, is_pattern, shard_files
from rdpm_cli.images.tars import TarSource
from rdpm_cli.images.zips import ZipSource

__all__ = [
    "DigitsSource",
    "FolderSource",
    "ImageSource",
    "ParquetSource",
    "PartOfSource",
    "TarSource",
    "ZipSource",
    "is_archive",
    "is_builtin",
    "is_there",
    "open_source",
    "spread",
]

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def is_builtin(spec: str) -> bool:
    """Is `spec` the built-in data? A folder of that name is given as ./digits."""
    return spec == "digits" or spec.startswith("digits:")


def is_archive(spec: str) -> bool:
    """Does `spec` look like a file, or a pattern of files, that holds images?"""
    return Path(spec).suffix.lower() in (".zip", *SHARDS)


def is_there(spec: str) -> bool:
    """Does what `spec` names exist: the built-in data, a path, every file of a pattern?"""
    if is_builtin(spec) or Path(spec).exists():
        return True
    try:
        return is_pattern(spec) and bool(expand(spec))
    except UsageError:
        return False


def open_source(spec: str) -> ImageSource:
    """The images a user named. Raises UsageError for a path that is not there, DataError for one without images."""
    if is_builtin(spec):
        part = spec.partition(":")[2] or "train"
        if part not in DIGIT_PARTS:
            raise UsageError(f"no part '{part}' of digits", f"parts: {', '.join('digits:' + p for p in DIGIT_PARTS)}")
        return DigitsSource(part)
    path = Path(spec)
    if path.is_dir():
        return _open_folder(path)
    if path.is_file() and path.suffix.lower() == ".zip":
        return ZipSource(path)
    if path.is_file():
        return _open_shards(os.path.abspath(spec), [path])
    if is_pattern(spec):
        return _open_shards(os.path.abspath(spec), expand(spec))
    raise UsageError(f"{path} does not exist", HINT)


def _open_folder(root: Path) -> ImageSource:
    """A folder of images, or of shards: never one while the other is passed over."""
    found = visible_files(root)
    shards = [name for name in found if name.lower().endswith(tuple(SHARDS))]
    images = [name for name in found if is_image(name)]
    if shards and images:
        first = Path(min(shards))
        raise DataError(
            f"{root} holds {len(images):,} images such as '{min(images)}' and {len(shards):,} shards such as '{first}'",
            f"name the shards: '{root / first.parent}/*{first.suffix}'; for the images, move the shards away",
        )
    if shards and not images:
        return _open_shards(str(root.resolve()), shard_files(shards, root))
    if not images and (packed := [name for name in found if name.lower().endswith(COMPRESSED)]):
        _refuse_compressed(root / min(packed))
    return FolderSource(root, found)


def _open_shards(spec: str, paths: Sequence[Path]) -> ImageSource:
    """One or more files of one kind, with `classes.txt` beside the first, or in the folder that was named."""
    kinds = {path.suffix.lower() for path in paths}
    for path in paths:
        if path.name.lower().endswith(COMPRESSED):
            _refuse_compressed(path)
    if odd := [path for path in paths if path.suffix.lower() not in SHARDS]:
        raise DataError(f"{odd[0]} is not a folder, .zip, .tar or .parquet", HINT)
    if len(kinds) > 1:
        raise DataError(f"{spec} names both .tar and .parquet", "name one kind")
    notes = (folder / CLASSES for folder in (paths[0].parent, Path(spec)))
    note = next((path for path in notes if path.is_file()), None)
    lines = read_classes(read_note(note), str(note.parent)) if note else None
    return (TarSource if kinds == {".tar"} else ParquetSource)(spec, paths, lines)


def _refuse_compressed(path: Path) -> None:
    raise DataError(f"{path} is compressed, so its images cannot be reached one by one", "unpack it to a plain .tar")

"""Several files by one name: `train-{0000..0009}.tar`, `data/train-*.parquet`, a folder of shards."""

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from rdpm_cli.errors import DataError, UsageError
from rdpm_cli.images.arrange import SPLITS

SHARDS = {".tar", ".parquet"}
MOST_FILES = 100_000
RANGE = re.compile(r"(\d+)\.\.(\d+)")


def is_pattern(spec: str) -> bool:
    return any(mark in spec for mark in "{*?[")


def expand(spec: str) -> list[Path]:
    """The files of a pattern, in its order. Raises UsageError where one is absent or none is there."""
    names = _braces(spec)
    paths: list[Path] = []
    for name in names:
        found = sorted(glob.glob(name)) if any(mark in name for mark in "*?[") else [name]
        if not found or not Path(found[0]).is_file():
            raise UsageError(f"{name} does not exist", f"{spec} names {len(names):,} files, and all must be there")
        paths += map(Path, found)
    return paths


def _braces(spec: str) -> list[str]:
    """`{0000..0009}` counts with its zeros kept, `{a,b}` lists; several multiply."""
    names = [""]
    for place, part in enumerate(re.split(r"\{([^{}]*)\}", spec)):
        choices = _choices(part, spec) if place % 2 else [part]
        if len(names) * len(choices) > MOST_FILES:
            raise UsageError(f"{spec} names more than {MOST_FILES:,} files", "name fewer")
        names = [name + choice for name in names for choice in choices]
    return names


def _choices(inner: str, spec: str) -> list[str]:
    if counted := RANGE.fullmatch(inner):
        first, last = map(int, counted.groups())
        if 0 <= last - first < MOST_FILES:
            return [str(number).zfill(len(counted[1])) for number in range(first, last + 1)]
    elif "," in inner:
        return inner.split(",")
    raise UsageError(f"{{{inner}}} in {spec} is no list of files", "write {0000..0009}, or {a,b}")


def shard_files(found: Sequence[str], root: Path) -> list[Path]:
    """The shards among a folder's files, sorted. Raises DataError for two kinds, or the splits of a data set."""
    names = sorted(name for name in found if PurePosixPath(name).suffix.lower() in SHARDS)
    kinds = sorted({PurePosixPath(name).suffix.lower() for name in names})
    if len(kinds) > 1:
        raise DataError(f"{root} holds both {' and '.join(kinds)} shards", f"name one kind: '{root}/*{kinds[0]}'")
    split_of = {name: split for name in names if (split := _split(name))}
    if splits := sorted(set(split_of.values())):
        others = len(names) - len(split_of)
        if len(splits) + bool(others) > 1:
            first = next(name for name in names if split_of.get(name) == splits[-1])
            one = os.path.join(root, os.path.dirname(first), f"{splits[-1]}*{kinds[0]}")
            raise DataError(f"{root} holds data splits ({', '.join(splits)}), not one set of images",
                            f"name one, such as '{one}'")  # fmt: skip
    return [root / name for name in names]


def _split(name: str) -> str | None:
    """The split of a data set that `data/train-00000-of-00294.parquet` or `train/0000.tar` belongs to."""
    return next((word for part in name.split("/") if (word := re.split("[-_.]", part)[0].lower()) in SPLITS), None)


def short_names(paths: Sequence[Path]) -> list[str]:
    """What tells the files apart: their names below the folder that holds them all."""
    folder = os.path.commonpath([path.absolute().parent for path in paths])
    return [path.absolute().relative_to(folder).as_posix() for path in paths]

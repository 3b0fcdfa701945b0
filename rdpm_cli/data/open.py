"""Opening what a user names: a folder, an archive, a pattern of shards or a built-in set -> a Source."""

import contextlib
import glob
import io
import os
import posixpath
import re
import shlex
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rdpm_cli import files, progress
from rdpm_cli.data import labels
from rdpm_cli.data.archives import HEAD, ParquetSource, TarSource, ZipSource
from rdpm_cli.data.labels import CLASSES, arrange, describe, is_hidden, read_classes, split_key
from rdpm_cli.data.pixels import SUFFIXES, image_errors, open_image, to_rgb
from rdpm_cli.data.remote import Place, RemotePath, place
from rdpm_cli.data.shapes import ShapesSource
from rdpm_cli.data.source import UNLABELLED, ItemSource, Reading, Source
from rdpm_cli.errors import DataError, UsageError

SHARDS = (".tar", ".parquet")
ARCHIVES = (".zip", *SHARDS)


def is_builtin(spec: str) -> bool:
    """Whether `spec` names a built-in set. A folder of that name is given as ./digits."""
    return spec.partition(":")[0] in BUILTIN


def is_there(spec: str) -> bool:
    """Whether what `spec` names exists: the built-in data, a path, every file of a pattern."""
    return is_builtin(spec) or place(spec).exists() or bool(expand(spec))


def open_source(spec: str, **reading: Any) -> Source:
    """The source that a user names, with a warning of what is not taken. reading: fields of `Reading`.

    Raises UsageError for a path that does not exist, DataError without images."""
    how = Reading(**reading)
    with path_errors(spec):
        opened = _open(spec, how)
    if how.image_column and not isinstance(opened, ParquetSource):
        raise UsageError(f"--image-column is for parquet files, which {spec} is not", "leave it out")
    if how.unlabelled:
        opened.labels, opened.class_names, opened.factors = [0] * len(opened), [UNLABELLED], None
    warn_of(opened)
    return opened


@contextlib.contextmanager
def path_errors(spec: str) -> Iterator[None]:
    """Turn an OSError of listing what `spec` names into a DataError."""
    try:
        yield
    except OSError as error:
        hint = "let this user read it, or remove it"
        raise DataError(f"{error.filename or spec} cannot be read: {error.strerror}", hint) from error


def warn_of(source: ItemSource) -> None:
    """Print a source's warnings, and what of its files is not taken."""
    for line in source.warnings:
        progress.warn(line, once=True)
    if text := describe({kind: count for kind, count in source.not_taken.items() if kind != "hidden"}):
        progress.warn(f"{source.spec}: {text}", once=True)


def _open(spec: str, how: Reading) -> Source:
    if is_builtin(spec):
        name, _, part = spec.partition(":")
        return BUILTIN[name](part or "train")
    path = place(spec)
    if path.is_dir() and spec:  # '' would be the working folder
        return _open_folder(path, how)
    if path.is_file() and path.suffix.lower() == ".zip":
        return ZipSource(path, how)
    paths = [path] if path.is_file() else expand(spec)
    if not paths:
        raise UsageError(f"{spec} does not exist, or a file of this pattern does not", labels.HINT)
    return _open_shards(spec if files.is_url(spec) else os.path.abspath(spec), paths, how)


def check_output(out: Path, images: str) -> None:
    """Raise UsageError for an output inside the folder of images: the next command would read it as a class."""
    if not is_builtin(images) and Path(images).is_dir() and out.resolve().is_relative_to(Path(images).resolve()):
        raise UsageError(f"{out} is inside {images}, whose images it would be taken for", "write it somewhere else")


def expand(spec: str) -> list[Any]:
    """The files of a pattern, in its order, with {0000..0009} counted. All must be there: else there are none."""
    if span := re.search(r"\{(\d+)\.\.(\d+)\}", spec):
        paths: list[Any] = []
        for number in range(int(span[1]), int(span[2]) + 1):
            part = expand(spec[: span.start()] + str(number).zfill(len(span[1])) + spec[span.end() :])
            if not part:
                return []
            paths += part
        return paths
    return RemotePath(spec).glob() if files.is_url(spec) else sorted(map(Path, glob.glob(spec)))


def open_item(spec: str) -> Image.Image:
    """One RGB image: a file, or item N of a source as SOURCE#N. Raises UsageError or ImageError."""
    path = Path(spec)
    if path.is_file() and path.suffix.lower() not in ARCHIVES:
        with image_errors(str(path.parent), path.name), open_image(path) as image:
            return to_rgb(image)
    name, mark, number = spec.rpartition("#")
    opened = open_source(name) if mark and number.isdecimal() else None
    if opened is None or int(number) >= len(opened):
        hint = "give an image file, or item N of a source as SOURCE#N: photo.png, digits:heldout#3, 'imagenet.zip#12'"
        raise UsageError(f"{spec} is neither an image file nor an item of a source", hint)
    return opened.image(int(number))


def _open_folder(root: Place, how: Reading) -> Source:
    """A folder of images, or of shards. Refuses one of both: neither is silently left out."""
    members, folders = (root.walk(), []) if isinstance(root, RemotePath) else walk(root, how.follow_links)
    visible = sorted(name for name in members if not is_hidden(name))
    if arrow := [name for name in visible if name.lower().endswith(".arrow")]:
        part = (root / arrow[0]).parent
        code = f"from datasets import load_from_disk; load_from_disk({str(part)!r}).to_parquet({f'{part}.parquet'!r})"
        message = f"{root} holds arrow files such as '{arrow[0]}', as `save_to_disk` writes them"
        raise DataError(message, f"convert them: python -c {shlex.quote(code)}")
    shards = [name for name in visible if name.lower().endswith(SHARDS)]
    if not shards:
        return FolderSource(root, members, folders, how)
    hint = f"name the shards, such as {shlex.quote(f'{(root / shards[0]).parent}/*{Path(shards[0]).suffix}')}"
    if images := [name for name in visible if split_key(name)[1] in SUFFIXES]:
        raise DataError(f"{root} holds both images such as '{images[0]}' and shards such as '{shards[0]}'", hint)
    # Splits are recognised by words: data/train-00000-of-00294.parquet, train/0000.tar, imagenet1k-validation-00.tar.
    word_rows = (re.split("[-_./]", name.lower()) for name in shards)
    splits = {next((word for word in words if labels.SPLIT.fullmatch(word)), "") for words in word_rows}
    if len(splits) > 1:
        raise DataError(f"{root} holds data splits ({', '.join(sorted(filter(None, splits)))}), not one set", hint)
    opened = _open_shards(str(root.resolve()), [root / name for name in shards], how)
    others = [name for name in visible if not name.lower().endswith(SHARDS) and posixpath.basename(name) != CLASSES]
    opened.not_taken = Counter(opened.not_taken) + Counter(split_key(name)[1] or "no suffix" for name in others)
    return opened


def walk(root: Path, follow_links: bool) -> tuple[list[str], list[str]]:
    """(files, folders) below root, relative to it. Raises DataError for a link to a folder, OSError as os.walk."""

    def fail(error: OSError) -> None:
        raise error  # os.walk would leave the folder out

    files: list[str] = []
    subfolders: list[str] = []
    for branch, folders, names in os.walk(root, onerror=fail, followlinks=True):
        below = os.path.relpath(branch, root)
        prefix = "" if below == "." else f"{below}/"
        folders[:] = [name for name in folders if not is_hidden(name)]
        for link in (path for name in folders if os.path.islink(path := os.path.join(branch, name))):
            if not follow_links:
                raise DataError(f"{link} is a link to a folder", "give --follow-links to read what links point to")
            if Path(branch).resolve().is_relative_to(Path(link).resolve()):
                raise DataError(f"{link} is a link to a folder that it is in, without end", "remove this link")
        files += [prefix + name for name in names]
        subfolders += [prefix + name for name in folders]
    return files, subfolders


def _open_shards(spec: str, paths: Sequence[Place], how: Reading) -> Source:
    """One or more files of one kind, with `classes.txt` next to the first, or in the folder that was named."""
    kinds = {path.suffix.lower() for path in paths}
    if len(kinds) > 1 or not kinds <= set(SHARDS):
        raise DataError(f"{spec} is {' and '.join(sorted(kinds))}, not a set of .tar or of .parquet", labels.HINT)
    if odd := [path for path in paths if path.exists() and not path.is_file()]:  # a pipe would wait for ever
        raise DataError(f"{odd[0]} is not a regular file", labels.HINT)
    note = next((f / CLASSES for f in (paths[0].parent, place(spec)) if (f / CLASSES).is_file()), None)
    lines = read_classes(note.read_bytes(), str(note.parent)) if note else None
    folder = os.path.commonpath([str(path.absolute().parent) for path in paths])
    shards = {os.path.relpath(str(path), folder): path for path in paths}
    return (TarSource if kinds == {".tar"} else ParquetSource)(spec, shards, lines, how)


class DigitsSource(Source):
    """scikit-learn's handwritten digits, 8×8 enlarged to 16×16: 1,500 in `digits:train`, 297 in `digits:heldout`."""

    def __init__(self, part: str) -> None:
        if part not in ("train", "heldout"):
            raise UsageError(f"digits has no part '{part}'", "parts: digits:train, digits:heldout")
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        data = load_digits()
        rows = np.arange(len(data.target))
        train, heldout = train_test_split(rows, test_size=297, stratify=data.target, random_state=0)
        rows = np.sort(train if part == "train" else heldout)
        self.spec = f"digits:{part}"
        self.scans = np.round(data.images[rows] * (255 / 16)).astype(np.uint8)  # stored as 0..16
        self.labels = data.target[rows].tolist()
        self.names = [f"{part}/{label}/{row:04d}" for row, label in zip(rows, self.labels, strict=True)]
        self.class_names = [str(digit) for digit in range(10)]

    def open(self, index: int) -> Image.Image:
        return Image.fromarray(self.scans[index]).resize((16, 16), Image.Resampling.BICUBIC)


BUILTIN = {"digits": DigitsSource, "shapes": ShapesSource}


class FolderSource(Source):
    """A folder of class folders, of EDM's images with their `dataset.json`, or a flat folder without labels."""

    def __init__(self, root: Place, members: Sequence[str], folders: Sequence[str], reading: Reading) -> None:
        """members, folders: all files and folders below root, relative to it."""
        self.root, self.spec, self.reading = root, str(root.resolve()), reading

        def read(name: str, size: int = -1) -> bytes:
            path = root / name
            if path.exists() and not path.is_file():
                return b""  # a pipe or socket, which is no image
            with path.open("rb") as file:
                return file.read(size)

        self.hold(arrange(
            {name: name for name in sorted(members)}, self.spec, read, head=lambda name: read(name, HEAD),
            folders=folders, column=reading.label_column,
        ))  # fmt: skip

    def open(self, index: int) -> Image.Image:
        path = self.root / self.names[index]
        if isinstance(path, RemotePath):
            return open_image(io.BytesIO(path.read_bytes()))
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would wait for ever
            raise OSError("it is no regular file")
        return open_image(path)

"""Opening what a user names: a folder, an archive, a pattern of shards or the built-in digits -> a Source."""

import glob
import heapq
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from rdpm_cli.data.archives import ParquetSource, TarSource, ZipSource
from rdpm_cli.data.labels import CLASSES, EDM, HINT, SPLITS, arrange, is_hidden, is_image, read_classes, without_wrapper
from rdpm_cli.data.pixels import image_errors, open_image, to_rgb
from rdpm_cli.data.source import Source
from rdpm_cli.errors import DataError, UsageError

SHARDS = (".tar", ".parquet")
ARCHIVES = (".zip", *SHARDS)
ITEM_HINT = "give an image file, or item N of a source as SOURCE#N: photo.png, digits:heldout#3, 'imagenet.zip#12'"


def is_builtin(spec: str) -> bool:
    """Whether `spec` names the built-in digits. A folder of that name is given as ./digits."""
    return spec == "digits" or spec.startswith("digits:")


def is_there(spec: str) -> bool:
    """Whether what `spec` names exists: the built-in data, a path, every file of a pattern."""
    return is_builtin(spec) or Path(spec).exists() or all(map(glob.glob, _braces(spec)))


def open_source(spec: str) -> Source:
    """The source that a user names. Raises UsageError for a path that does not exist, DataError without images."""
    if is_builtin(spec):
        return DigitsSource(spec.partition(":")[2] or "train")
    path = Path(spec)
    if path.is_dir():
        return _open_folder(path)
    if path.is_file() and path.suffix.lower() == ".zip":
        return ZipSource(path)
    return _open_shards(os.path.abspath(spec), [path] if path.is_file() else expand(spec))


def open_item(spec: str) -> Image.Image:
    """One RGB image: a file, or item N of a source as SOURCE#N. Raises UsageError or ImageError."""
    path = Path(spec)
    if path.is_file() and is_image(path.name):
        with image_errors(str(path.parent), path.name), open_image(path) as image:
            return to_rgb(image)
    name, mark, number = spec.rpartition("#")
    if not mark or not number.isdecimal():
        raise UsageError(f"{spec} is not an image" if path.exists() else f"{spec} does not exist", ITEM_HINT)
    source = open_source(name)
    if int(number) >= len(source):
        raise UsageError(f"{spec}: {name} has items 0 to {len(source) - 1}", ITEM_HINT)
    return source.image(int(number))


class DigitsSource(Source):
    """scikit-learn's 1,797 scans of handwritten digits, 8×8, 10 classes, enlarged to 16×16.

    `digits:train` has 1,500 and `digits:heldout` 297, stratified with a fixed seed; `digits` is `digits:train`.
    """

    def __init__(self, part: str) -> None:
        if part not in ("train", "heldout"):
            raise UsageError(f"digits has no part '{part}'", "parts: digits:train, digits:heldout")
        # Imported here because scikit-learn takes a second, and only these images need it.
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        data = load_digits()
        rows = np.arange(len(data.target))
        train, heldout = train_test_split(rows, test_size=297, stratify=data.target, random_state=0)
        rows = np.sort(train if part == "train" else heldout)
        self.spec = f"digits:{part}"
        self.scans = np.round(data.images[rows] * (255 / 16)).astype(np.uint8)  # stored as 0..16
        self.labels = [int(label) for label in data.target[rows]]
        self.names = [f"{part}/{label}/{row:04d}" for row, label in zip(rows, self.labels, strict=True)]
        self.class_names = [str(digit) for digit in range(10)]

    def open(self, index: int) -> Image.Image:
        return Image.fromarray(self.scans[index]).resize((16, 16), Image.Resampling.BICUBIC)


class FolderSource(Source):
    """A folder of class folders, of EDM's images with their `dataset.json`, or a flat folder without labels."""

    def __init__(self, root: Path, members: Sequence[str]) -> None:
        """members: all visible files below root, relative to it."""
        self.root, self.spec = root, str(root.resolve())
        if (root / "samples.json").is_file():  # a folder of samples: the grids in it are not images of the set
            members = [name for name in members if not name.startswith("previews/")]
        self.names, self.labels, self.class_names = arrange(members, self.spec, lambda name: (root / name).read_bytes())
        if self.labels is None or any(Path(name).name in (CLASSES, EDM) for name in members):
            return
        # A class folder without images would shift the labels of later classes; ImageFolder refuses it, too.
        first = self.names[0]
        wrapper = root / first[: len(first) - len(without_wrapper(self.names)[0])]
        folders = {entry.name for entry in _entries(wrapper) if entry.is_dir(follow_symlinks=False)}
        if empty := sorted(folders - set(self.class_names)):
            hint = f"name the folder that holds the images, or list its classes in {CLASSES}, one a line"
            raise DataError(f"{wrapper / empty[0]} is a class folder without images", hint)

    def open(self, index: int) -> Image.Image:
        return open_image(self.root / self.names[index])


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return [entry for entry in entries if not is_hidden(entry.name)]


def _visible_files(root: Path) -> list[str]:
    """Every file below root, relative to it, hidden ones left out; each folder once, even where links lead to it."""
    names: list[str] = []
    visited: set[str] = set()
    folders = [(False, "")]  # whether it is a link: those come last, so that a folder has its real name below root
    while folders:
        _, folder = heapq.heappop(folders)
        real = os.path.realpath(root / folder)
        if real in visited:
            continue
        visited.add(real)
        for entry in _entries(root / folder):
            path = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_dir():
                heapq.heappush(folders, (entry.is_symlink(), path))
            elif is_image(path) and not entry.is_file():
                raise DataError(f"{entry.path} is a broken link or not a regular file", "remove it")
            else:
                names.append(path)
    return names


def _open_folder(root: Path) -> Source:
    """A folder of images, or of shards. Refuses one of both: neither is silently left out."""
    members = _visible_files(root)
    shards = sorted(name for name in members if name.lower().endswith(SHARDS))
    images = [name for name in members if is_image(name)]
    if not shards:
        return FolderSource(root, members)
    hint = f"name the shards, such as '{(root / shards[0]).parent}/*{Path(shards[0]).suffix}'"
    if images:
        raise DataError(f"{root} holds both images such as '{min(images)}' and shards such as '{shards[0]}'", hint)
    # Splits are recognised by the first words of folders and files: data/train-00000-of-00294.parquet, train/0000.tar.
    word_rows = ([re.split("[-_.]", step)[0] for step in name.lower().split("/")] for name in shards)
    splits = {next((word for word in words if word in SPLITS), "") for words in word_rows}
    if len(splits) > 1:
        raise DataError(f"{root} holds data splits ({', '.join(sorted(filter(None, splits)))}), not one set", hint)
    return _open_shards(str(root.resolve()), [root / name for name in shards])


def _open_shards(spec: str, paths: Sequence[Path]) -> Source:
    """One or more files of one kind, with `classes.txt` next to the first, or in the folder that was named."""
    kinds = {path.suffix.lower(): path for path in paths}
    if foreign := kinds.keys() - set(SHARDS):
        raise DataError(f"{kinds[min(foreign)]} is not a folder, .zip, .tar or .parquet", HINT)
    if len(kinds) > 1:
        raise DataError(f"{spec} names both .tar and .parquet", "name one kind")
    note = next((f / CLASSES for f in (paths[0].parent, Path(spec)) if (f / CLASSES).is_file()), None)
    lines = read_classes(note.read_bytes(), str(note.parent)) if note else None
    return (TarSource if ".tar" in kinds else ParquetSource)(spec, paths, lines)


def expand(spec: str) -> list[Path]:
    """The files of a pattern, in its order. Raises UsageError where one is absent, since all must be there."""
    paths: list[Path] = []
    for name in _braces(spec):
        matches = sorted(glob.glob(name))
        if not matches:
            raise UsageError(f"{name} does not exist", HINT)
        paths += map(Path, matches)
    return paths


def _braces(spec: str) -> list[str]:
    """`{0000..0009}` counts with its zeros kept, `{a,b}` lists; several multiply."""
    names = [""]
    for index, part in enumerate(re.split(r"\{([^{}]*)\}", spec)):
        count = re.fullmatch(r"(\d+)\.\.(\d+)", part)
        texts = part.split(",") if index % 2 else [part]  # the odd parts were in braces
        if index % 2 and count:
            texts = [str(number).zfill(len(count[1])) for number in range(int(count[1]), int(count[2]) + 1)] or texts
        names = [name + text for name in names for text in texts]
    return names

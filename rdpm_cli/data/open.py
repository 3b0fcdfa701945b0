"""Opening what a user names: a folder, an archive, a pattern of shards or the built-in digits -> a Source.

Archives (.zip, WebDataset .tar shards, parquet) are read in place and never extracted."""

import bisect
import glob
import importlib.util
import io
import json
import os
import posixpath
import re
import stat
import struct
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rdpm_cli.data import source
from rdpm_cli.data.pixels import image_errors, open_image, to_rgb
from rdpm_cli.data.source import Source
from rdpm_cli.errors import DataError, UsageError

SHARDS = (".tar", ".parquet")
ARCHIVES = (".zip", *SHARDS)
LARGEST = 1 << 30  # bytes of one encoded image: damaged tables claim any size
ZIP_FIELDS = ("header_offset", "compress_size", "file_size", "CRC", "compress_type")
LOCAL_HEADER = struct.Struct("<26xHH")  # of a zip member: length of its name, length of its extra field
IMAGES, LABELS = {"jpg", "jpeg", "png", "webp"}, {"cls", "json"}  # kinds of members of a WebDataset shard
SHARD_HINT = "shards hold key.jpg, .jpeg, .png or .webp, and key.cls (a number) or key.json (`label` or `cls`)"
PARQUET_HINT = "the columns are `image` (a struct of bytes and path) and `label` (whole numbers)"


def is_builtin(spec: str) -> bool:
    """Whether `spec` names the built-in digits. A folder of that name is given as ./digits."""
    return spec == "digits" or spec.startswith("digits:")


def is_there(spec: str) -> bool:
    """Whether what `spec` names exists: the built-in data, a path, every file of a pattern."""
    return is_builtin(spec) or Path(spec).exists() or bool(expand(spec))


def open_source(spec: str) -> Source:
    """The source that a user names. Raises UsageError for a path that does not exist, DataError without images."""
    if is_builtin(spec):
        return DigitsSource(spec.partition(":")[2] or "train")
    path = Path(spec)
    if path.is_dir():
        return _open_folder(path)
    if path.is_file() and path.suffix.lower() == ".zip":
        return ZipSource(path)
    paths = [path] if path.is_file() else expand(spec)
    if not paths:
        raise UsageError(f"{spec} does not exist, or a file of this pattern does not", source.HINT)
    return _open_shards(os.path.abspath(spec), paths)


def expand(spec: str) -> list[Path]:
    """The files of a pattern, in its order, with {0000..0009} counted. All must be there: else there are none."""
    if span := re.search(r"\{(\d+)\.\.(\d+)\}", spec):
        numbers = [str(number).zfill(len(span[1])) for number in range(int(span[1]), int(span[2]) + 1)]
        parts = [expand(spec[: span.start()] + number + spec[span.end() :]) for number in numbers]
        return [path for part in parts for path in part] if all(parts) else []
    return sorted(map(Path, glob.glob(spec)))


def open_item(spec: str) -> Image.Image:
    """One RGB image: a file, or item N of a source as SOURCE#N. Raises UsageError or ImageError."""
    path = Path(spec)
    if path.is_file() and source.is_image(path.name):
        with image_errors(str(path.parent), path.name), open_image(path) as image:
            return to_rgb(image)
    name, mark, number = spec.rpartition("#")
    opened = open_source(name) if mark and number.isdecimal() else None
    if opened is None or int(number) >= len(opened):
        hint = "give an image file, or item N of a source as SOURCE#N: photo.png, digits:heldout#3, 'imagenet.zip#12'"
        raise UsageError(f"{spec} is neither an image file nor an item of a source", hint)
    return opened.image(int(number))


def _open_folder(root: Path) -> Source:
    """A folder of images, or of shards. Refuses one of both: neither is silently left out."""
    start, members, walked = len(os.path.join(root, "")), list[str](), {os.path.realpath(root)}
    for branch, folders, names in os.walk(root, followlinks=True):  # as ImageFolder does
        # A second way into a folder, by a link, would repeat its images, and a loop of links for ever.
        real = {os.path.realpath(f"{branch}/{name}"): name for name in sorted(folders, reverse=True)}
        folders[:] = [name for path, name in real.items() if path not in walked]
        walked |= real.keys()
        paths = (os.path.join(branch, name)[start:] for name in names)
        members += [name for name in paths if not source.is_hidden(name)]
    shards = sorted(name for name in members if name.lower().endswith(SHARDS))
    if not shards:
        return FolderSource(root, members)
    hint = f"name the shards, such as '{(root / shards[0]).parent}/*{Path(shards[0]).suffix}'"
    if images := [name for name in members if source.is_image(name)]:
        raise DataError(f"{root} holds both images such as '{min(images)}' and shards such as '{shards[0]}'", hint)
    # Splits are recognised by the first words of folders and files: data/train-00000-of-00294.parquet, train/0000.tar.
    word_rows = ([re.split("[-_.]", step)[0] for step in name.lower().split("/")] for name in shards)
    splits = {next((word for word in words if word in source.SPLITS), "") for words in word_rows}
    if len(splits) > 1:
        raise DataError(f"{root} holds data splits ({', '.join(sorted(filter(None, splits)))}), not one set", hint)
    return _open_shards(str(root.resolve()), [root / name for name in shards])


def _open_shards(spec: str, paths: Sequence[Path]) -> Source:
    """One or more files of one kind, with `classes.txt` next to the first, or in the folder that was named."""
    kinds = {path.suffix.lower() for path in paths}
    if len(kinds) > 1 or not kinds <= set(SHARDS):
        raise DataError(f"{spec} is {' and '.join(sorted(kinds))}, not a set of .tar or of .parquet", source.HINT)
    note = next((f / source.CLASSES for f in (paths[0].parent, Path(spec)) if (f / source.CLASSES).is_file()), None)
    lines = source.read_classes(note.read_bytes(), str(note.parent)) if note else None
    folder = os.path.commonpath([path.absolute().parent for path in paths])
    shards = {os.path.relpath(path, folder): path for path in paths}
    return (TarSource if kinds == {".tar"} else ParquetSource)(spec, shards, lines)


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


class FolderSource(Source):
    """A folder of class folders, of EDM's images with their `dataset.json`, or a flat folder without labels."""

    def __init__(self, root: Path, members: Sequence[str]) -> None:
        """members: all files below root, relative to it."""
        self.root, self.spec = root, str(root.resolve())
        if "samples.json" in members:  # a folder of samples: the grids in it are not images of the set
            members = [name for name in members if not name.startswith("previews/")]
        arranged = source.arrange(members, self.spec, lambda name: (root / name).read_bytes())
        self.names, (self.labels, self.class_names) = arranged
        if self.labels is None or any(posixpath.basename(name) in (source.CLASSES, source.EDM) for name in members):
            return
        # A class folder without images would shift the labels of later classes; ImageFolder refuses it, too.
        wrapper = root / self.names[0].removesuffix(source.without_wrapper(self.names)[0])
        folders = {path.name for path in wrapper.iterdir() if path.is_dir() and not source.is_hidden(path.name)}
        if empty := sorted(folders - set(self.class_names)):
            hint = f"name the folder that holds the images, or list its classes in {source.CLASSES}, one a line"
            raise DataError(f"{wrapper / empty[0]} is a class folder without images", hint)

    def open(self, index: int) -> Image.Image:
        path = self.root / self.names[index]
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would wait for ever
            raise OSError("it is no regular file")
        return open_image(path)


def read_at(path: Path, offset: int, size: int) -> bytes:
    """`size` bytes of a file, opened again for every item. Raises OSError where it ends before."""
    with path.open("rb", buffering=0) as file:
        data = os.pread(file.fileno(), min(size, LARGEST), offset)
    if len(data) != size:
        raise OSError(f"{path.name} ends inside it")
    return data


class ZipSource(Source):
    """A .zip of class folders, or EDM's with its `dataset.json`."""

    def __init__(self, path: Path) -> None:
        self.path, self.spec = path, str(path.resolve())
        try:
            with zipfile.ZipFile(path) as archive:
                names = [member.filename for member in archive.infolist() if not member.is_dir()]
                self.names, (self.labels, self.class_names) = source.arrange(names, self.spec, archive.read)
                # An array (n, 5), since zipfile's own objects take a gigabyte for ImageNet.
                images = map(archive.getinfo, self.names)
                self.table = np.array([[getattr(m, field) for field in ZIP_FIELDS] for m in images], dtype=np.int64)
        except DataError:
            raise
        except Exception as error:  # zipfile raises almost anything for damaged bytes
            raise DataError(f"{path} cannot be read as a zip: {error}", source.HINT) from error

    def open(self, index: int) -> Image.Image:
        """Raises OSError, or an error of the member's packing, where its bytes are damaged."""
        offset, packed_size, size, checksum, method = map(int, self.table[index])
        # The extra field of the local header may differ from that of the directory, so its length is read here.
        name, extra = LOCAL_HEADER.unpack(read_at(self.path, offset, LOCAL_HEADER.size))
        packed = read_at(self.path, offset + LOCAL_HEADER.size + name + extra, packed_size)
        member = zipfile.ZipInfo(self.names[index])
        member.compress_size, member.file_size, member.CRC, member.compress_type = packed_size, size, checksum, method
        with zipfile.ZipExtFile(io.BytesIO(packed), "r", member) as file:
            return open_image(io.BytesIO(file.read(LARGEST)))  # up to its size it is compared with the checksum


class TarSource(Source):
    """WebDataset shards in the order given, images in the order of their members, by the name `shard.tar/member`.

    Members are grouped by key, their path up to the first dot of the base name; other kinds are never unpickled.
    Without labels their folders are the classes. lines: class names, where known."""

    def __init__(self, spec: str, shards: dict[str, Path], lines: list[str] | None) -> None:
        self.spec, self.paths = spec, list(shards.values())
        rows = [(number, *row) for number, path in enumerate(self.paths) for row in _shard_rows(path)]
        if not rows:
            raise DataError(f"{spec} holds no images", SHARD_HINT)
        shorts = list(shards)
        self.names = [f"{shorts[number]}/{member}" for number, member, *_ in rows]
        self.table = np.array([(number, offset, size) for number, _, offset, size, _ in rows])
        self.labels, self.class_names = source.numbered([label for *_, label in rows], self.names, spec, lines)
        if self.labels is None:
            self.labels, self.class_names = source.by_folder([member for _, member, *_ in rows], spec, lines)

    def open(self, index: int) -> Image.Image:
        shard, offset, size = map(int, self.table[index])
        return open_image(io.BytesIO(read_at(self.paths[shard], offset, size)))


def _shard_rows(path: Path) -> list[tuple[str, int, int, Any]]:
    """(member, offset, size, label) of every image of a shard. Raises DataError."""
    images: dict[str, tuple[str, int, int]] = {}  # by key
    labels: dict[str, Any] = {}  # by key; `numbered` checks that they are whole numbers
    name = "its beginning"
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep a kilobyte for each
                name = member.name.removeprefix("./")
                folder, base = posixpath.split(name)
                stem, _, kind = base.partition(".")
                key, kind = posixpath.join(folder, stem), kind.lower()
                if member.isdir() or source.is_hidden(name) or kind not in IMAGES | LABELS:
                    continue
                if not member.isreg() or member.issparse():
                    raise ValueError("it is a link, or no regular file")
                row = (name, member.offset_data, member.size)
                if kind in IMAGES and images.setdefault(key, row) != row:
                    raise ValueError(f"there is another image for '{key}'")
                if kind in LABELS:
                    file.seek(member.offset_data)
                    content = file.read(min(member.size, 1 << 20))
                    note = {"cls": int(content)} if kind == "cls" else json.loads(content)
                    label = note.get("label", note.get("cls")) if isinstance(note, dict) else None
                    if label is not None and labels.setdefault(key, label) != label:
                        raise ValueError(f"there is another label for '{key}'")
            file.seek(tar.offset)  # of the block that ended the list: zeros, or damage that tarfile takes for an end
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise ValueError("the file is cut short: its end mark is missing")
        if lonely := labels.keys() - images.keys():
            raise ValueError(f"'{min(lonely)}' has a label but no image")
    except (tarfile.TarError, EOFError, OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as a plain .tar, at {name}: {error}", SHARD_HINT) from error
    return [(*image, labels.get(key)) for key, image in images.items()]


class ParquetSource(Source):
    """Parquet as Hugging Face packs images: a column `image` of {bytes, path}, and `label` of class numbers.

    Rows in order, by the name `file.parquet/row`. The last row group read stays in memory, so that reading in order
    decodes each once; `datasets` writes groups of 100 images. lines: class names, where known."""

    def __init__(self, spec: str, shards: dict[str, Path], lines: list[str] | None) -> None:
        if importlib.util.find_spec("pyarrow") is None:
            raise UsageError(f"{spec} is parquet, which needs pyarrow", 'uv pip install "rdpm[parquet]"')
        self.spec, self.paths = spec, list(shards.values())
        self.names: list[str] = []
        self.groups: list[tuple[int, int, int]] = []  # first row, file, row group
        self._last: tuple[tuple[int, int, int] | None, Any] = (None, None)  # the last group read, and its images
        labels: list[int | None] = []
        class_names: list[list[str] | None] = []
        for number, short in enumerate(shards):
            try:
                labels += self._add(number, short, class_names)
            except Exception as error:  # pyarrow raises almost anything for damaged bytes
                raise DataError(f"{shards[short]} cannot be read as parquet: {error}", PARQUET_HINT) from error
        if not self.names:
            raise DataError(f"{spec} holds no images", PARQUET_HINT)
        if any(names != class_names[0] for names in class_names):
            raise DataError(f"the files of {spec} name their classes differently", "give files of one data set")
        if set(labels) == {-1}:  # how a test split without labels is packed
            labels = [None] * len(labels)
        self.labels, self.class_names = source.numbered(labels, self.names, spec, lines or class_names[0])

    def _add(self, number: int, short: str, class_names: list[list[str] | None]) -> list[int | None]:
        """Add the row groups, names and class names of a file -> its labels."""
        file = self._open(number)
        columns, metadata, first = file.schema_arrow.names, file.metadata, len(self.names)
        if "image" not in columns:
            raise ValueError(f"it has no column `image`, only {', '.join(columns)}")
        for group in range(metadata.num_row_groups):
            self.groups.append((first, number, group))
            first += metadata.row_group(group).num_rows
        self.names += [f"{short}/{row:06d}" for row in range(metadata.num_rows)]
        note = json.loads((file.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
        class_names.append(note.get("info", {}).get("features", {}).get("label", {}).get("names"))
        labeled = "label" in columns
        return file.read(columns=["label"]).column(0).to_pylist() if labeled else [None] * metadata.num_rows

    def _open(self, number: int) -> Any:
        from pyarrow import parquet  # an optional package

        return parquet.ParquetFile(self.paths[number])

    def open(self, index: int) -> Image.Image:
        group = self.groups[bisect.bisect_right(self.groups, index, key=lambda group: group[0]) - 1]
        if group != self._last[0]:
            table = self._open(group[1]).read_row_group(group[2], columns=["image"], use_threads=False)
            self._last = group, table.column(0)
        value = self._last[1][index - group[0]].as_py()
        return open_image(io.BytesIO(value["bytes"] if isinstance(value, dict) else value))

"""Archives of images, read in place and never extracted: .zip, WebDataset .tar shards, parquet."""

import bisect
import io
import json
import os
import re
import stat
import struct
import tarfile
import zipfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rdpm_cli.data.labels import HINT, arrange, by_folder, is_hidden, numbered
from rdpm_cli.data.pixels import open_image
from rdpm_cli.data.source import Source
from rdpm_cli.errors import DataError, UsageError

LARGEST = 1 << 30  # bytes of one encoded image: damaged tables claim any size
ZIP_FIELDS = ("header_offset", "compress_size", "file_size", "CRC", "compress_type")
LOCAL_HEADER = struct.Struct("<26xHH")  # of a zip member: length of its name, length of its extra field
IMAGES, LABELS = {"jpg", "jpeg", "png", "webp"}, {"cls", "json"}  # kinds of members of a WebDataset shard
SHARD_HINT = "shards hold key.jpg, .jpeg, .png or .webp, and key.cls (a number) or key.json (`label` or `cls`)"
PARQUET_HINT = "the columns are `image` (a struct of bytes and path) and `label` (whole numbers)"


def check_member(name: str, is_link: bool, archive: Path) -> None:
    """Raise DataError for a member that no archive of images holds: a link, or a path out of the archive."""
    plain = name.replace("\\", "/")
    if is_link or re.match("/|[A-Za-z]:/", plain) or ".." in plain.split("/"):
        message = f"{archive}: member '{name}' is a link or points outside the archive"
        raise DataError(message, "pack the image files themselves again")


def short_names(paths: Sequence[Path]) -> list[str]:
    """The names of files below the folder that holds them all."""
    folder = os.path.commonpath([path.absolute().parent for path in paths])
    return [path.absolute().relative_to(folder).as_posix() for path in paths]


def read_at(path: Path, offset: int, size: int) -> bytes:
    """`size` bytes of a file. Raises OSError where it ends before.

    The file is opened again for every item, as in a folder: processes that share an open file after a fork
    also share its position.
    """
    if size > LARGEST:
        raise OSError(f"{size:,} bytes are more than an image may have")
    with path.open("rb", buffering=0) as file:
        data = os.pread(file.fileno(), size, offset)
    if len(data) != size:
        raise OSError(f"{path.name} ends inside it")
    return data


class ZipSource(Source):
    """A .zip of class folders, or EDM's with its `dataset.json`."""

    def __init__(self, path: Path) -> None:
        self.path, self.spec = path, str(path.resolve())
        try:
            with zipfile.ZipFile(path) as archive:
                members = [member for member in archive.infolist() if not member.is_dir()]
                for member in members:
                    check_member(member.filename, stat.S_ISLNK(member.external_attr >> 16), path)
                names = [member.filename for member in members]
                self.names, self.labels, self.class_names = arrange(names, self.spec, archive.read)
                # An array (n, 5), since zipfile's own objects take a gigabyte for ImageNet.
                images = map(archive.getinfo, self.names)
                self.table = np.array([[getattr(m, field) for field in ZIP_FIELDS] for m in images], dtype=np.int64)
        except DataError:
            raise
        except Exception as error:  # zipfile raises almost anything for damaged bytes
            raise DataError(f"{path} cannot be read as a zip: {error}", HINT) from error

    def open(self, index: int) -> Image.Image:
        """Raises OSError, or an error of the member's packing, where its bytes are damaged."""
        offset, packed_size, size, checksum, method = map(int, self.table[index])
        if size > LARGEST:
            raise OSError(f"{size:,} bytes are more than an image may have")
        # The extra field of the local header may differ from that of the directory, so its length is read here.
        name, extra = LOCAL_HEADER.unpack(read_at(self.path, offset, LOCAL_HEADER.size))
        packed = read_at(self.path, offset + LOCAL_HEADER.size + name + extra, packed_size)
        member = zipfile.ZipInfo(self.names[index])
        member.compress_size, member.file_size, member.CRC, member.compress_type = packed_size, size, checksum, method
        with zipfile.ZipExtFile(io.BytesIO(packed), "r", member) as file:
            data = file.read()  # never more than `size`, and compared with the checksum
        if len(data) != size:
            raise OSError("it unpacks to fewer bytes than the zip says")
        return open_image(io.BytesIO(data))


class TarSource(Source):
    """WebDataset shards in the order of `shards`, images in the order of their members: a scan reads front to back.

    An image's name is `shard.tar/member`. Members are grouped by key, their path up to the first dot of the base name;
    members of any other kind (.pyd, .pkl, .npy ...) are ignored and never unpickled. Without labels in the shards the
    folders of the members are the classes. lines: the class names, where they are known.
    """

    def __init__(self, spec: str, shards: Sequence[Path], lines: list[str] | None) -> None:
        self.spec, self.paths = spec, list(shards)
        self.table = array("q")  # shard, offset and size of every image in a row
        self.names: list[str] = []
        labels: list[int | None] = []
        members: list[str] = []
        for number, short in enumerate(short_names(shards)):
            for member, offset, size, label in _shard_rows(shards[number]):
                members.append(member)
                self.names.append(f"{short}/{member}")
                labels.append(label)
                self.table.extend((number, offset, size))
        if not self.names:
            raise DataError(f"{spec} holds no images", SHARD_HINT)
        self.labels, self.class_names = numbered(labels, self.names, spec, lines)
        if self.labels is None:
            self.labels, self.class_names = by_folder(members, spec, lines)

    def open(self, index: int) -> Image.Image:
        shard, offset, size = self.table[3 * index : 3 * index + 3]
        return open_image(io.BytesIO(read_at(self.paths[shard], offset, size)))


def _shard_rows(path: Path) -> list[tuple[str, int, int, Any]]:
    """(member, offset, size, label) of every image of a shard. Raises DataError."""
    images: dict[str, tuple[str, int, int]] = {}  # by key
    labels: dict[str, Any] = {}  # by key; `numbered` checks that they are whole numbers
    numbers: set[str] = set()  # keys with a .cls, which must have an image
    try:
        with tarfile.open(path, "r:") as tar:
            for member in _members(tar):
                check_member(member.name, member.issym() or member.islnk(), path)
                name = member.name.removeprefix("./")
                folder, slash, base = name.rpartition("/")
                stem, _, kind = base.partition(".")
                key, kind = folder + slash + stem, kind.lower()
                if member.isdir() or is_hidden(name) or kind not in IMAGES | LABELS:
                    continue
                content = tar.extractfile(member)
                if content is None or member.issparse():
                    raise ValueError(f"member '{name}' is not a regular file")
                if kind in IMAGES and key in images:
                    raise ValueError(f"there are two images for '{key}'")
                if kind in IMAGES:
                    images[key] = name, member.offset_data, member.size
                elif (label := _label(content.read(1 << 20), name)) is not None:
                    numbers |= {key} if kind == "cls" else set()
                    if labels.setdefault(key, label) != label:
                        raise ValueError(f"there are two labels for '{key}'")
            if lonely := numbers - images.keys():
                raise ValueError(f"'{min(lonely)}' has a label but no image")
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as a plain .tar: {error}", SHARD_HINT) from error
    return [(*image, labels.get(key)) for key, image in images.items()]


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Every member. Raises ValueError where the file ends, or is damaged, before its end mark."""
    while (member := tar.next()) is not None:
        yield member
        tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep a kilobyte for each
    assert tar.fileobj is not None, "it is open"
    tar.fileobj.seek(tar.offset)  # of the block that ended the list: zeros, or damage that tarfile takes for an end
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise ValueError("it is cut short: its end mark is missing")


def _label(content: bytes, name: str) -> Any:
    """The label in a .cls (a number as text) or .json (`label` or `cls`; None without either)."""
    try:
        whole = {"label": int(content)} if name.lower().endswith("cls") else json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"'{name}' holds no label: {error}") from error
    return whole.get("label", whole.get("cls")) if isinstance(whole, dict) else None


class ParquetSource(Source):
    """Parquet as Hugging Face packs images: a column `image` of {bytes, path}, and `label` of class numbers.

    Rows in order, by the name `file.parquet/row`. Needs the extra `parquet`. The last row group read stays in memory,
    so that reading in order decodes each once; `datasets` writes groups of 100 images. lines: the class names, where
    they are known apart from the files.
    """

    def __init__(self, spec: str, paths: Sequence[Path], lines: list[str] | None) -> None:
        self.spec, self.paths = spec, list(paths)
        self.groups: list[tuple[int, int]] = []  # (file, row group) of each group that has rows
        self.starts: list[int] = []  # its first row
        self.names: list[str] = []
        self._group = -1  # the last group read
        self._rows: Any = None
        labels: list[int | None] = []
        class_names: list[list[str] | None] = []
        for number, short in enumerate(short_names(paths)):
            try:
                numbers, names = self._list(number, short)
            except UsageError:
                raise
            except Exception as error:  # pyarrow raises almost anything for damaged bytes
                raise DataError(f"{paths[number]} cannot be read as parquet: {error}", PARQUET_HINT) from error
            labels += numbers
            class_names.append(names)
        if not self.names:
            raise DataError(f"{spec} holds no images", PARQUET_HINT)
        if any(names != class_names[0] for names in class_names):
            raise DataError(f"the files of {spec} name their classes differently", "give files of one data set")
        if set(labels) == {-1}:  # how a test split without labels is packed
            labels = [None] * len(labels)
        self.labels, self.class_names = numbered(labels, self.names, spec, lines or class_names[0])

    def open(self, index: int) -> Image.Image:
        group = bisect.bisect_right(self.starts, index) - 1
        if group != self._group:
            number, row_group = self.groups[group]
            table = self._open(number).read_row_group(row_group, columns=["image"], use_threads=False)
            self._group, self._rows = group, table.column(0)
        value = self._rows[index - self.starts[group]].as_py()
        raw = value["bytes"] if isinstance(value, dict) else value
        if raw is None:
            raise ValueError("its row holds no bytes")
        return open_image(io.BytesIO(raw))

    def _open(self, number: int) -> Any:
        """pyarrow's ParquetFile. Raises what pyarrow raises, and UsageError where it is not installed."""
        path = self.paths[number]
        try:
            from pyarrow import parquet  # an optional package
        except ImportError as error:
            raise UsageError(f"{path} is parquet, which needs pyarrow", 'uv pip install "rdpm[parquet]"') from error
        return parquet.ParquetFile(path)

    def _list(self, number: int, short: str) -> tuple[list[int | None], list[str] | None]:
        """Add the row groups and names of a file -> its labels, and the class names that `datasets` keeps in it."""
        file = self._open(number)
        columns, metadata = file.schema_arrow.names, file.metadata
        if "image" not in columns:
            raise ValueError(f"it has no column `image`, only {', '.join(columns)}")
        start = len(self.names)
        for group in range(metadata.num_row_groups):
            if rows := metadata.row_group(group).num_rows:
                self.groups.append((number, group))
                self.starts.append(start)
                start += rows
        self.names += [f"{short}/{row:06d}" for row in range(metadata.num_rows)]
        labels: list[int | None] = [None] * metadata.num_rows
        if "label" in columns:
            labels = file.read(columns=["label"], use_threads=False).column(0).to_pylist()
        try:
            notes = json.loads((file.schema_arrow.metadata or {})[b"huggingface"])
            return labels, list(map(str, notes["info"]["features"]["label"]["names"])) or None
        except (KeyError, TypeError, ValueError):
            return labels, None

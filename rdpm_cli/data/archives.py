"""Archives that are read in place and never extracted: zip, WebDataset's tar shards, parquet."""

import bisect
import importlib.util
import io
import json
import os
import stat
import struct
import tarfile
import threading
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from rdpm_cli.data import labels
from rdpm_cli.data.labels import LABEL_COLUMNS, arrange, is_hidden, member_name, says_something, split_key
from rdpm_cli.data.pixels import open_image
from rdpm_cli.data.remote import Place, RemotePath
from rdpm_cli.data.source import Items, Reading, Source
from rdpm_cli.errors import DataError, RdpmError, UsageError

LARGEST = 1 << 30  # bytes of one encoded image: damaged tables claim any size
ZIP_FIELDS = ("header_offset", "compress_size", "file_size", "CRC", "compress_type")
LOCAL_HEADER = struct.Struct("<26xHH")  # of a zip member: length of its name, length of its extra field
THREADS = 16  # shards by URL that are listed at a time
HEAD = 16  # bytes that tell an image from another file
LABEL_KINDS = (".cls", ".json")  # of members of a WebDataset shard
IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")  # of parquet; the first one counts
SHARD_HINT = "shards hold images, and for each key.jpg a key.cls (a number) or key.json (`label` or `cls`)"
PARQUET_HINT = "name the columns with --image-column and --label-column"


def read_at(path: Place, offset: int, size: int) -> bytes:
    """`size` bytes of a file, opened again for every item. Raises OSError where it ends before."""
    if isinstance(path, RemotePath):
        data = path.read_at(offset, offset + min(size, LARGEST)) if size else b""
    else:
        with path.open("rb", buffering=0) as file:
            data = os.pread(file.fileno(), min(size, LARGEST), offset)
    if len(data) != size:
        raise OSError(f"{path.name} ends inside it")
    return data


def open_zipped(path: Place, fields: Sequence[int], name: str = "member") -> BinaryIO:
    """The content of a zip's member, by its ZIP_FIELDS. Raises OSError, or an error of its packing if it is damaged."""
    offset, packed_size, size, checksum, method = fields
    # The extra field of the local header may differ from that of the directory, so its length is read here.
    name_size, extra = LOCAL_HEADER.unpack(read_at(path, offset, LOCAL_HEADER.size))
    packed = read_at(path, offset + LOCAL_HEADER.size + name_size + extra, packed_size)
    member = zipfile.ZipInfo(name)
    member.compress_size, member.file_size, member.CRC, member.compress_type = packed_size, size, checksum, method
    with zipfile.ZipExtFile(io.BytesIO(packed), "r", member) as file:
        return io.BytesIO(file.read(LARGEST))  # up to its size it is compared with the checksum


class ZipSource(Source):
    """A .zip of class folders, or EDM's with its `dataset.json`."""

    def __init__(self, path: Place, reading: Reading) -> None:
        self.path, self.spec, self.reading = path, str(path.resolve()), reading
        try:
            with path.open("rb") as stream, zipfile.ZipFile(stream) as archive:
                files: dict[str, zipfile.ZipInfo] = {}
                folders: list[str] = []
                for member in archive.infolist():
                    name = member_name(member.filename)
                    if member.filename.endswith(("/", "\\")):  # some Windows programs write '\\'
                        folders.append(name)
                    elif files.setdefault(name, member) is not member:
                        raise DataError(f"{path} holds two files named {name}", "pack it again")
                    elif member.flag_bits & 1:
                        raise DataError(f"{path}: {name} is encrypted", "pack it again without a password")
                    elif stat.S_ISLNK(member.external_attr >> 16) and says_something(name):
                        reason = "is a link; links in archives are not followed"
                        raise DataError(f"{path}: {name} {reason}", "pack what it points to")

                def head(name: str) -> bytes:
                    with archive.open(files[name]) as file:
                        return file.read(HEAD)

                members = {name: name for name in sorted(files)}
                self.hold(arrange(
                    members, self.spec, lambda name: archive.read(files[name]), head=head, folders=folders,
                    column=reading.label_column,
                ))  # fmt: skip
                # An array (n, 5), since zipfile's own objects take a gigabyte for ImageNet.
                images = map(files.__getitem__, self.names)
                self.table = np.array([[getattr(m, field) for field in ZIP_FIELDS] for m in images], dtype=np.int64)
        except RdpmError:
            raise
        except Exception as error:  # zipfile raises almost anything for damaged bytes
            raise DataError(f"{path} cannot be read as a zip: {error}", labels.HINT) from error

    def open(self, index: int) -> Image.Image:
        """Raises OSError, or an error of the member's packing, where its bytes are damaged."""
        return open_image(open_zipped(self.path, self.table[index].tolist(), self.names[index]))


class TarSource(Source):
    """WebDataset shards in the order given, images in the order of their members, by the name `shard.tar/member`.

    Members of one key belong together; other kinds are never unpickled. Without labels their folders are the classes.
    lines: class names, where known."""

    def __init__(self, spec: str, shards: Mapping[str, Place], lines: list[str] | None, reading: Reading) -> None:
        self.spec, self.paths, self.reading = spec, list(shards.values()), reading
        rows: dict[str, tuple[int, int, int]] = {}  # shard, offset, size by name
        paths: dict[str, str] = {}
        keyed: dict[str, Any] = {}
        folders: list[str] = []
        for number, ((short, shard), members) in enumerate(zip(shards.items(), listings(self.paths), strict=True)):
            for path, offset, size, label in members:
                name = f"{short}/{path}"
                if size < 0:
                    folders.append(path)
                elif label is not None:
                    key = split_key(name)[0]
                    if str(keyed.setdefault(key, label)) != str(label):
                        raise DataError(f"{shard}: there are two labels for '{key}'", SHARD_HINT)
                elif rows.setdefault(name, (number, offset, size)) != (number, offset, size):
                    raise DataError(f"{shard} holds two files named {path}", "pack it again")
                else:
                    paths[name] = path

        def read(name: str, size: int = LARGEST) -> bytes:
            shard, offset, whole = rows[name]
            return read_at(self.paths[shard], offset, min(whole, size))

        self.hold(arrange(
            paths, spec, read, head=lambda name: read(name, HEAD), folders=folders, column=reading.label_column,
            lines=lines, keyed=keyed,
        ))  # fmt: skip
        self.table = np.array([rows[name] for name in self.names])

    def open(self, index: int) -> Image.Image:
        shard, offset, size = map(int, self.table[index])
        return open_image(io.BytesIO(read_at(self.paths[shard], offset, size)))


def listings(paths: Sequence[Place]) -> Iterator[Iterable[tuple[str, int, int, Any]]]:
    """`members_of` every shard. Of URLs several at a time: each member takes a request, which is mostly waiting."""
    if not isinstance(paths[0], RemotePath):
        yield from map(members_of, paths)
        return
    ended = threading.Event()  # by an error or Ctrl-C, after which no thread has to list its shard to the end
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            yield from pool.map(lambda path: list(takewhile(lambda _: not ended.is_set(), members_of(path))), paths)
        finally:
            ended.set()


def members_of(path: Place) -> Iterator[tuple[str, int, int, Any]]:
    """(member, offset, size, label or None) of every file of a shard; size -1 for folders. Raises DataError."""
    name = "its beginning"
    try:
        with path.open("rb") as file:
            start: int | None = 0
            while start is not None:  # archives that `cat` has joined follow each other behind their end marks
                file.seek(start)
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    for member in tar:
                        tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep a kilobyte for each
                        name = member_name(member.name)
                        kind, is_file = split_key(name)[1], member.isreg() and not member.issparse()
                        if member.isdir():
                            yield name, 0, -1, None
                            continue
                        if not is_file and (says_something(name) or kind in LABEL_KINDS):
                            raise ValueError("it is a link, or no regular file; links in archives are not followed")
                        label = _label(file, member) if kind in LABEL_KINDS and not is_hidden(name) else None
                        yield name, member.offset_data, member.size, label
                    start = _behind(file, start, tar.offset)
    except (tarfile.TarError, EOFError, OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as a plain .tar, at {name}: {error}", SHARD_HINT) from error


def _label(file: BinaryIO, member: tarfile.TarInfo) -> Any:
    """The label in a key.cls or key.json, a number or text; None in a .json without one."""
    file.seek(member.offset_data)
    content = file.read(min(member.size, LARGEST))
    if member.name.lower().endswith(".cls"):
        return content.decode("utf-8-sig").strip()
    note = json.loads(content)
    return note.get("label", note.get("cls")) if isinstance(note, dict) else None


def _behind(file: BinaryIO, start: int, end: int) -> int | None:
    """Where the next archive begins behind one from `start` to an end mark at `end`; None at the end of the file."""
    file.seek(end)  # of the block that ended the list: zeros, or damage that tarfile takes for an end
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        reason = "the file is cut short: its end mark is missing"
        raise ValueError(f"what follows its end mark at byte {start} is no archive" if start == end > 0 else reason)
    while block := file.read(1 << 20):
        if block.strip(b"\0"):
            zeros = len(block) - len(block.lstrip(b"\0"))
            return file.tell() - len(block) + zeros // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
    return None


class ParquetSource(Source):
    """Parquet as Hugging Face packs images: a column of {bytes, path} or of bytes, and one of labels.

    Rows in order, by the name `file.parquet/row`. The last row group read stays in memory, so that reading in order
    decodes each once; `datasets` writes groups of 100 images. lines: class names, where known."""

    def __init__(self, spec: str, shards: Mapping[str, Place], lines: list[str] | None, reading: Reading) -> None:
        if importlib.util.find_spec("pyarrow") is None:
            raise UsageError(f"{spec} is parquet, which needs pyarrow", 'uv pip install "rdpm[parquet]"')
        self.spec, self.paths, self.reading = spec, list(shards.values()), reading
        self.names: list[str] = []
        self.groups: list[tuple[int, int, int]] = []  # first row, file, row group
        self._last: tuple[tuple[int, int, int] | None, Any] = (None, None)  # the last group read, and its images
        self.columns_of: list[tuple[str, str | None]] = []  # image and label column of every file
        values: list[Any] = []
        class_names: list[list[str] | None] = []
        for number, short in enumerate(shards):
            try:
                values += self._add(number, short, class_names)
            except RdpmError:
                raise
            except Exception as error:  # pyarrow raises almost anything for damaged bytes
                raise DataError(f"{shards[short]} cannot be read as parquet: {error}", PARQUET_HINT) from error
        if not self.names:
            raise DataError(f"{spec} holds no images", PARQUET_HINT)
        if other := [n for n, columns in enumerate(self.columns_of) if columns != self.columns_of[0]]:
            pair = [f"{list(shards)[n]} has {', '.join(filter(None, self.columns_of[n]))}" for n in (0, other[0])]
            raise DataError(f"the files of {spec} have different columns: {'; '.join(pair)}", PARQUET_HINT)
        if any(names != class_names[0] for names in class_names):
            raise DataError(f"the files of {spec} name their classes differently", "give files of one data set")
        self.hold(Items(self.names, *labels.numbered(values, self.names, spec, lines or class_names[0])))

    def _add(self, number: int, short: str, class_names: list[list[str] | None]) -> list[Any]:
        """Add the row groups, names and class names of a file -> its labels."""
        file = self._open(number)
        columns, metadata, first = file.schema_arrow.names, file.metadata, len(self.names)
        image, label = (
            next((name for name in ((asked,) if asked else known) if name in columns), None)
            for asked, known in ((self.reading.image_column, IMAGE_COLUMNS), (self.reading.label_column, LABEL_COLUMNS))
        )
        self.label_hint = (
            f"name the column of labels with --label-column, of {', '.join(columns)}; or give --unlabelled"
        )
        if image is None or (self.reading.label_column and label is None):
            asked = self.reading.image_column or f"named {', '.join(IMAGE_COLUMNS)}" if image is None else ""
            raise ValueError(f"it has no column {asked or self.reading.label_column}, only {', '.join(columns)}")
        self.columns_of.append((image, label))
        for group in range(metadata.num_row_groups):
            self.groups.append((first, number, group))
            first += metadata.row_group(group).num_rows
        self.names += [f"{short}/{row:06d}" for row in range(metadata.num_rows)]
        note = json.loads((file.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
        class_names.append(note.get("info", {}).get("features", {}).get(label, {}).get("names"))
        return file.read(columns=[label]).column(0).to_pylist() if label else [None] * metadata.num_rows

    def _open(self, number: int) -> Any:
        from pyarrow import parquet  # an optional package

        path = self.paths[number]
        return parquet.ParquetFile(path.open() if isinstance(path, RemotePath) else path)

    def open(self, index: int) -> Image.Image:
        group = self.groups[bisect.bisect_right(self.groups, index, key=lambda group: group[0]) - 1]
        if group != self._last[0]:
            column = self.columns_of[group[1]][0]
            table = self._open(group[1]).read_row_group(group[2], columns=[column], use_threads=False)
            self._last = group, table.column(0)
        value = self._last[1][index - group[0]].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes):
            where = f", only the path {value['path']}" if isinstance(value, dict) and value.get("path") else ""
            raise ValueError(f"the file does not hold its bytes{where}")
        return open_image(io.BytesIO(content))

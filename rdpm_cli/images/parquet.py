"""Parquet as Hugging Face packs images: a column `image` of {bytes, path}, a column `label` of class numbers."""

import bisect
import contextlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from rdpm_cli.errors import DataError, RdpmError, UsageError
from rdpm_cli.images import decode
from rdpm_cli.images.arrange import numbered
from rdpm_cli.images.interface import ImageSource
from rdpm_cli.images.patterns import short_names

IMAGE, LABEL = "image", "label"
WINDOW = 64 << 20  # bytes of decoded rows kept
BUFFER = 1 << 20  # bytes read ahead; without it and with pre_buffer, pyarrow reads the group first
HINT = "the columns are `image` (a struct of bytes and path) and `label` (whole numbers)"


class ParquetSource(ImageSource):
    """Rows in order, by the name `file.parquet/row`. Needs the extra `parquet`.

    Rows around the last one read are kept, a row group or 64 MiB of one, so reading in order reads every file once, in
    the memory of that and of a page; at random an image costs its row group, and `datasets` writes groups of 100.
    """

    def __init__(self, spec: str, paths: Sequence[Path], lines: list[str] | None) -> None:
        """lines: the class names, where they are known beside the files' own."""
        self.spec, self.paths = spec, list(paths)
        self.groups: list[tuple[int, int]] = []  # (file, row group) of each
        self.starts: list[int] = []  # its first row
        self.rows_at_once: list[int] = []
        self.names: list[str] = []
        labels: list[int | None] = []
        named: list[list[str] | None] = []
        for place, short in enumerate(short_names(paths)):
            with _listing(paths[place]):
                file = self._open(place)
                _check_columns(file, paths[place])
                self._list_groups(place, file.metadata)
                self.names += [f"{short}/{row:06d}" for row in range(file.metadata.num_rows)]
                labels += _labels(file)
                named.append(_features(file))
        if not self.names:
            raise DataError(f"{spec} holds no images", HINT)
        if any(names != named[0] for names in named):
            raise DataError(f"the files of {spec} name their classes differently", "give files of one data set")
        if set(labels) == {-1}:  # how a test split without labels is packed
            labels = [None] * len(labels)
        self.labels, self.class_names = numbered(labels, self.names, spec, lines or named[0])
        self._window: _Window | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_window": None}

    def open(self, index: int) -> Image.Image:
        group = bisect.bisect_right(self.starts, index) - 1
        row = index - self.starts[group]
        window, self._window = self._window, None  # one that fails is not gone on with
        if window is None or not window.reaches(group, row):
            file, inner = self.groups[group]
            window = _Window(self._open(file), group, inner, self.rows_at_once[group])
        value = window.row(row)
        self._window = window
        raw = value["bytes"] if isinstance(value, dict) else value
        if raw is None:
            raise ValueError("its row holds no bytes")
        return decode.open_image(io.BytesIO(raw))

    def _open(self, place: int) -> Any:
        """pyarrow's ParquetFile. Raises what pyarrow raises, and UsageError where it is not installed."""
        return _pyarrow(self.paths[place]).ParquetFile(self.paths[place], buffer_size=BUFFER, pre_buffer=False)

    def _list_groups(self, file: int, metadata: Any) -> None:
        start = len(self.names)
        for group in range(metadata.num_row_groups):
            found = metadata.row_group(group)
            if found.num_rows:
                self.groups.append((file, group))
                self.starts.append(start)
                self.rows_at_once.append(
                    max(1, min(found.num_rows, WINDOW * found.num_rows // max(1, found.total_byte_size)))
                )
            start += found.num_rows


class _Window:
    """Some consecutive rows of a row group, and what reads the next ones; of one process."""

    def __init__(self, file: Any, group: int, inner: int, rows: int) -> None:
        self.process, self.group = os.getpid(), group
        self._batches = file.iter_batches(batch_size=rows, row_groups=[inner], columns=[IMAGE], use_threads=False)
        self.first = self.stop = 0
        self._batch: Any = None

    def reaches(self, group: int, row: int) -> bool:
        """Is this row here, or further on?"""
        return self.process == os.getpid() and self.group == group and row >= self.first

    def row(self, row: int) -> Any:
        while row >= self.stop:
            self._batch = next(self._batches).column(0)
            self.first, self.stop = self.stop, self.stop + len(self._batch)
        return self._batch[row - self.first].as_py()


@contextlib.contextmanager
def _listing(path: Path) -> Iterator[None]:
    """Whatever pyarrow raises of a damaged file is a DataError about it."""
    try:
        yield
    except RdpmError:
        raise
    except Exception as error:
        raise DataError(f"{path} cannot be read as parquet: {error}", HINT) from error


def _pyarrow(path: Path) -> Any:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise UsageError(f"{path} is parquet, which needs pyarrow", 'uv pip install "rdpm[parquet]"') from error
    return parquet


def _check_columns(file: Any, path: Path) -> None:
    from pyarrow import types

    schema = file.schema_arrow
    if IMAGE not in schema.names:
        raise DataError(f"{path} has no column `{IMAGE}`, only {', '.join(schema.names)}", HINT)
    kind = schema.field(IMAGE).type
    if types.is_struct(kind):
        kind = kind.field("bytes").type if kind.get_field_index("bytes") >= 0 else kind
    if not (types.is_binary(kind) or types.is_large_binary(kind)):
        raise DataError(f"the column `{IMAGE}` of {path} holds {kind}, not the bytes of images", HINT)
    if LABEL in schema.names and not types.is_integer(schema.field(LABEL).type):
        raise DataError(f"the column `{LABEL}` of {path} holds {schema.field(LABEL).type}, not class numbers", HINT)


def _labels(file: Any) -> list[int | None]:
    if LABEL not in file.schema_arrow.names:
        return [None] * file.metadata.num_rows
    return file.read(columns=[LABEL], use_threads=False).column(0).to_pylist()


def _features(file: Any) -> list[str] | None:
    """The class names that Hugging Face's `datasets` keeps in the schema; None where it keeps none."""
    try:
        features = json.loads((file.schema_arrow.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[LABEL]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return [str(name) for name in names] if isinstance(names, list) and names else None

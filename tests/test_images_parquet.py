"""Parquet as Hugging Face packs it: labels, class names, what is kept in memory, what is refused."""

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pictures import encoded, random_image, run_alone, write_parquet
from PIL import Image
from pyarrow import parquet

from rdpm_cli.errors import DataError, UsageError
from rdpm_cli.images import parquet as room
from rdpm_cli.images.sources import open_source

IMAGES = [encoded(random_image(8, 8, seed)) for seed in range(20)]


def pixels(row: int) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(IMAGES[row])))


def test_one_file_with_class_names(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", IMAGES[:3], [1, 0, 1], ["cat", "dog", "fox"])
    source = open_source(str(path))
    assert (source.need_labels(), source.class_names) == ([1, 0, 1], ["cat", "dog", "fox"])
    assert list(source.names) == ["x.parquet/000000", "x.parquet/000001", "x.parquet/000002"]
    assert source.spec == str(path)
    (tmp_path / "classes.txt").write_text("Katze\nHund")
    assert open_source(str(path)).class_names == ["Katze", "Hund"]


def test_without_class_names_they_are_numbers(tmp_path: Path) -> None:
    source = open_source(str(write_parquet(tmp_path / "x.parquet", IMAGES[:2], [2, 0])))
    assert source.class_names == ["0", "1", "2"]


@pytest.mark.parametrize("labels", [None, [-1, -1], [None, None]])
def test_without_labels(tmp_path: Path, labels: list[int | None] | None) -> None:
    source = open_source(str(write_parquet(tmp_path / "x.parquet", IMAGES[:2], labels, ["a"])))
    assert (source.labels, source.class_names) == (None, [])
    assert source.pixels(1, 8).shape == (8, 8, 3)


def test_plain_bytes_are_images_too(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"image": IMAGES[:2], "other": ["x", "y"]}), tmp_path / "x.parquet")
    assert np.array_equal(open_source(str(tmp_path / "x.parquet")).pixels(1, 8), pixels(1))


def test_links_to_shards_may_lead_out_as_in_a_download_cache(tmp_path: Path) -> None:
    blob = write_parquet(tmp_path / "blobs" / "0a1b2c", IMAGES[:2], [0, 0])
    link = tmp_path / "snapshot" / "data" / "train-00000-of-00001.parquet"
    link.parent.mkdir(parents=True)
    link.symlink_to(blob)
    for path in (tmp_path / "snapshot", link):
        source = open_source(str(path))
        assert len(open_source(source.spec)) == 2
        assert source.names[0] == "train-00000-of-00001.parquet/000000"


def write(columns: dict[str, Any]) -> Callable[[Path], object]:
    return lambda path: parquet.write_table(pyarrow.table(columns), path)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda path: path.write_bytes(b"text"), r"x\.parquet cannot be read as parquet"),
        (lambda path: path.write_bytes(b""), "cannot be read as parquet"),
        (lambda path: write_parquet(path, IMAGES[:2], [0, None]), "1 of 2 images have no label"),
        (lambda path: write_parquet(path, IMAGES[:2], [0, -1]), "has the label -1"),
        (lambda path: write_parquet(path, IMAGES[:2], [0, 3], ["a", "b"]), "has the label 3"),
        (lambda path: write_parquet(path, [], []), "holds no images"),
        (write({"picture": IMAGES[:2]}), "has no column `image`, only picture"),
        (write({"image": ["a.png", "b.png"]}), "holds string, not the bytes"),
        (write({"image": [{"path": "a.png"}]}), "not the bytes"),
        (write({"image": IMAGES[:1], "label": ["cat"]}), "holds string, not class numbers"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit_are_refused(tmp_path: Path, make: Callable[[Path], object], text: str) -> None:
    make(tmp_path / "x.parquet")
    with pytest.raises(DataError, match=text) as caught:
        open_source(str(tmp_path))
    assert caught.value.hint


def test_files_of_different_data_sets_are_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "0.parquet", IMAGES[:2], [0, 1], ["a", "b"])
    write_parquet(tmp_path / "1.parquet", IMAGES[:2], [0, 1], ["b", "a"])
    with pytest.raises(DataError, match="name their classes differently"):
        open_source(str(tmp_path))


def test_a_row_group_is_read_once_and_a_large_one_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "0.parquet", IMAGES[:12], [0] * 12, group=5)
    write_parquet(tmp_path / "1.parquet", IMAGES[12:], [0] * 8, group=8)
    opened: list[tuple[int, int]] = []

    class Watched(room._Window):
        def __init__(self, file: Any, group: int, inner: int, rows: int) -> None:
            opened.append((group, rows))
            super().__init__(file, group, inner, rows)

    monkeypatch.setattr(room, "_Window", Watched)
    source = open_source(str(tmp_path))
    assert all(np.array_equal(source.pixels(i, 8), pixels(i)) for i in [*range(20), *reversed(range(20))])
    assert opened == [(0, 5), (1, 5), (2, 2), (3, 8), (2, 2), (1, 5), (0, 5)]
    monkeypatch.setattr(room, "WINDOW", 600)  # bytes: two or three images
    source = open_source(str(tmp_path))
    opened.clear()
    assert all(np.array_equal(source.pixels(i, 8), pixels(i)) for i in [*range(20), 14, 13, 19, 0])
    assert [group for group, _ in opened] == [0, 1, 2, 3, 3, 3, 0]  # back within a piece, back before it
    assert max(rows for _, rows in opened) <= 3


MEMORY = """
import sys
from rdpm_cli.images import parquet
from rdpm_cli.images.sources import open_source
from pictures import peak_memory
parquet.WINDOW = 4 << 20
source = open_source(sys.argv[1])
before = peak_memory()
for index in range(len(source)):
    source.open(index)
print(peak_memory() - before)
"""


def test_memory_is_bounded_where_a_file_is_one_row_group(tmp_path: Path) -> None:
    raw = encoded(random_image(600, 600), "BMP")  # a megabyte
    path = write_parquet(tmp_path / "x.parquet", [raw + bytes([i]) for i in range(120)], [0] * 120, group=1000)
    assert float(run_alone(MEMORY, path)) < 70


def test_a_damaged_page_names_its_images_and_spares_the_others(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", IMAGES[:8], [0] * 8, group=4)
    group = parquet.ParquetFile(path).metadata.row_group(0).column(0)
    raw = bytearray(path.read_bytes())
    start = group.dictionary_page_offset or group.data_page_offset
    raw[start : start + 8] = b"\xff" * 8
    path.write_bytes(raw)
    source = open_source(str(path))
    for index in (0, 1, 0):
        with pytest.raises(DataError, match=rf"x\.parquet/00000{index} cannot be read as an image: (?!StopIteration)"):
            source.pixels(index, 8)
    assert np.array_equal(source.pixels(5, 8), pixels(5))


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "x.parquet", IMAGES[:2], [0, 1])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match="needs pyarrow") as caught:
        open_source(str(tmp_path))
    assert caught.value.hint == 'uv pip install "rdpm[parquet]"'

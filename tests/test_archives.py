"""Archives read in place: the same images in every packing, zip members, WebDataset shards, parquet, damage."""

import gzip
import io
import json
import multiprocessing
import pickle
import struct
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pictures import encoded, make_tar, make_zip, random_image, write_parquet
from PIL import Image
from pyarrow import parquet

from rdpm_cli.data.archives import ParquetSource, TarSource, ZipSource
from rdpm_cli.data.open import FolderSource, is_there, open_source
from rdpm_cli.data.source import Source
from rdpm_cli.errors import DataError, ImageError, UsageError

IMAGES = [encoded(random_image(8, 8, seed)) for seed in range(20)]
PNG = IMAGES[0]

# ---- the same images in every packing ------------------------------------------------------------------------------


def as_zip(path: Path, members: Mapping[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


@pytest.fixture
def packings(image_folder: Path, tmp_path: Path) -> dict[type[Source], list[Path]]:
    """Four images of each of three classes in every packing that is read."""
    images = {p.relative_to(image_folder).as_posix(): p.read_bytes() for p in sorted(image_folder.glob("?/0[2-5].*"))}
    labels = ["abc".index(name[0]) for name in images]
    classes = {"classes.txt": b"a\nb\nc\n"}
    moved = {f"00000/img{i:08d}{Path(name).suffix}": raw for i, (name, raw) in enumerate(images.items())}
    note = json.dumps({"labels": list(map(list, zip(moved, labels, strict=True)))}).encode()
    packed = {**moved, "dataset.json": note, **classes}
    for name, raw in [*((f"folder/{n}", r) for n, r in images.items()), *((f"edm/{n}", r) for n, r in moved.items())]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(raw)
    (tmp_path / "edm" / "dataset.json").write_bytes(note)
    for folder in ("edm", "tars", "json", "parquet"):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "classes.txt").write_bytes(classes["classes.txt"])
    rows = list(zip(images, images.values(), labels, strict=True))
    for shard in range(3):
        cls: dict[str, bytes] = {}
        js: dict[str, bytes] = {}
        for number, (name, raw, label) in enumerate(rows[shard * 4 : shard * 4 + 4]):
            kind = Path(name).suffix
            cls |= {f"{number:04d}{kind}": raw, f"{number:04d}.cls": str(label).encode()}
            js |= {f"./x/{number}.json": json.dumps({"label": label}).encode(), f"./x/{number}{kind}": raw}
        make_tar(tmp_path / "tars" / f"train-{shard:04d}.tar", cls)
        make_tar(tmp_path / "json" / f"{shard}.tar", js)
        part = rows[shard * 4 : shard * 4 + 4]
        path = tmp_path / "parquet" / "data" / f"train-{shard:05d}-of-00003.parquet"
        write_parquet(path, [raw for _, raw, _ in part], [label for *_, label in part], list("abc"), group=3)
    return {
        FolderSource: [tmp_path / "folder", tmp_path / "edm"],
        ZipSource: [
            as_zip(tmp_path / "folders.zip", images, zipfile.ZIP_DEFLATED),
            as_zip(tmp_path / "edm.zip", packed),
            as_zip(tmp_path / "wrapped.zip", {f"set/{name}": raw for name, raw in packed.items()}, zipfile.ZIP_BZIP2),
        ],
        TarSource: [
            tmp_path / "tars",
            tmp_path / "tars" / "train-{0000..0002}.tar",
            tmp_path / "tars" / "train-*.tar",
            tmp_path / "json" / "{0,1,2}.tar",
            make_tar(tmp_path / "plain" / "folders.tar", images),
        ],
        ParquetSource: [tmp_path / "parquet", tmp_path / "parquet" / "data" / "train-*.parquet"],
    }


def test_the_same_images_are_the_same_in_every_packing(packings: dict[type[Source], list[Path]]) -> None:
    plain = open_source(str(packings[FolderSource][0]))
    pixels = [plain.pixels(i, 16) for i in range(12)]
    for kind, paths in packings.items():
        for path in paths:
            source = open_source(str(path))
            assert type(source) is kind, path
            assert source.need_labels() == plain.need_labels() == [0] * 4 + [1] * 4 + [2] * 4, path
            assert source.class_names == plain.class_names == ["a", "b", "c"], path
            assert len(set(source.names)) == 12
            for copy in (source, pickle.loads(pickle.dumps(source)), open_source(source.spec)):
                assert (copy.digest(), copy.spec) == (source.digest(), source.spec)
                for index in (0, 11, 3, 2, 7, 1, *range(12)):
                    assert np.array_equal(copy.pixels(index, 16), pixels[index]), path
            assert is_there(source.spec)


def test_forked_workers_read_every_packing_at_the_same_time(packings: dict[type[Source], list[Path]]) -> None:
    """Processes that share an open file share its position, and read each other's bytes."""
    sources = [open_source(str(paths[0])) for paths in packings.values()]
    sizes = [[source.image(i).size for i in range(12)] for source in sources]
    fork = multiprocessing.get_context("fork")
    answers = fork.SimpleQueue()

    def read(first: int) -> None:
        order = [(first + 5 * i) % 12 for i in range(36)]
        answers.put(
            [[s.image(i).size for i in order] == [z[i] for i in order] for s, z in zip(sources, sizes, strict=True)]
        )

    workers = [fork.Process(target=read, args=(first,)) for first in range(3)]
    for worker in workers:
        worker.start()
    assert [answers.get() for _ in workers] == [[True] * 4] * 3
    for worker in workers:
        worker.join()


@pytest.mark.parametrize("kind", [ZipSource, TarSource, ParquetSource])
def test_a_damaged_archive_is_refused_or_its_images_are_named(
    packings: dict[type[Source], list[Path]], tmp_path: Path, kind: type[Source]
) -> None:
    first = packings[kind][0]
    whole = first if first.is_file() else min(p for p in first.rglob("*") if p.suffix in (".tar", ".parquet"))
    raw, path = whole.read_bytes(), tmp_path / f"damaged{whole.suffix}"
    random = np.random.default_rng(0)
    refused = named = 0
    for trial in range(150):
        damaged = bytearray(raw)
        for offset in random.integers(max(0, len(raw) - 900) if trial % 2 else 0, len(raw), 1 + trial % 4):
            damaged[offset] = random.integers(256)
        path.write_bytes(damaged[: random.integers(len(raw))] if trial % 6 == 0 else damaged)
        try:
            source = open_source(str(path))
        except DataError:
            refused += 1
            continue
        for index in range(len(source)):
            try:
                source.pixels(index, 16)
            except ImageError:
                named += 1
    assert refused > 10
    assert named > 10


# ---- zip -----------------------------------------------------------------------------------------------------------


def break_deflate(raw: bytearray) -> None:
    raw[30 + raw[26]] = 0xFF  # after the local header and its name: a block type that does not exist


def set_unknown_method(raw: bytearray) -> None:
    raw[8] = 97
    raw[raw.rfind(b"PK\x01\x02") + 10] = 97


def understate_size(raw: bytearray) -> None:
    entry = raw.rfind(b"PK\x01\x02") + 24  # of the unpacked size
    raw[entry : entry + 4] = struct.pack("<I", 1000)


@pytest.mark.parametrize("damage", [break_deflate, set_unknown_method, understate_size])
def test_an_unreadable_zip_member_is_named(tmp_path: Path, damage: Callable[[bytearray], None]) -> None:
    path = as_zip(tmp_path / "x.zip", {"a/1.bmp": encoded(random_image(30, 30), "BMP")}, zipfile.ZIP_DEFLATED)
    raw = bytearray(path.read_bytes())
    damage(raw)
    path.write_bytes(raw)
    with pytest.raises(ImageError, match=r"a/1\.bmp"):
        open_source(str(path)).pixels(0, 16)


def test_half_a_zip_is_refused(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "cut.zip", "a/1.png")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"cut\.zip"):
        open_source(str(path))


# ---- tar -----------------------------------------------------------------------------------------------------------


def tar_source(folder: Path, **members: bytes) -> Source:
    """The source of a .tar with these members; `__` in a name stands for its dot."""
    return open_source(str(make_tar(folder / "x.tar", {n.replace("__", "."): raw for n, raw in members.items()})))


def test_labels_and_kinds_of_a_shard(tmp_path: Path) -> None:
    source = tar_source(
        tmp_path, a__png=PNG, a__cls=b"2\n", b__cls=b" 0", b__JPG=PNG, c__webp=PNG, c__json=b'{"cls": 1}', d__npy=b"x"
    )
    assert source.names == ["x.tar/a.png", "x.tar/b.JPG", "x.tar/c.webp"]
    assert (source.labels, source.class_names) == ([2, 0, 1], ["0", "1", "2"])
    (tmp_path / "classes.txt").write_text("zero\none\ntwo\nthree")
    assert open_source(source.spec).class_names == ["zero", "one", "two", "three"]
    (tmp_path / "classes.txt").write_text("zero\none")
    with pytest.raises(DataError, match=r"x\.tar/a\.png"):
        open_source(source.spec)


def test_a_key_ends_at_the_first_dot_and_its_members_may_be_apart(tmp_path: Path) -> None:
    members = {"d.ir/a.png": PNG, "e/a.png": PNG, "d.ir/a.seg.png": PNG, "e/a.cls": b"0", "d.ir/a.cls": b"1"}
    source = open_source(str(make_tar(tmp_path / "x.tar", members)))
    assert (list(source.names), source.labels) == (["x.tar/d.ir/a.png", "x.tar/e/a.png"], [1, 0])


def test_a_shard_without_labels(tmp_path: Path) -> None:
    source = tar_source(tmp_path, a__png=PNG, b__json=b'{"width": 8}', b__png=PNG, info__json=b"[]")
    assert (source.labels, source.class_names, len(source)) == (None, [], 2)


@pytest.mark.parametrize(
    ("members", "token"),
    [
        ({"a__png": PNG, "a__cls": b"0", "b__png": PNG}, r"x\.tar/b\.png"),
        ({"a__png": PNG, "a__cls": b"cat"}, r"a\.cls"),
        ({"a__png": PNG, "a__cls": b""}, r"a\.cls"),
        ({"a__png": PNG, "a__cls": b"\x80\x04K\x01."}, r"a\.cls"),
        ({"a__png": PNG, "a__cls": b"-1"}, "-1"),
        ({"a__png": PNG, "a__json": b"{"}, r"a\.json"),
        ({"a__png": PNG, "a__json": b'{"label": "cat"}'}, "'cat'"),
        ({"a__png": PNG, "a__json": b'{"label": true}'}, "True"),
        ({"a__png": PNG, "a__cls": b"1", "a__json": b'{"label": 2}'}, "'a'"),
        ({"a__png": PNG, "a__jpg": PNG}, "'a'"),
        ({"a__gif": PNG, "a__cls": b"1"}, "'a'"),
        ({"a__txt": b"text"}, r"x\.tar"),
        ({"a__png": PNG, "a__cls": b"1" * (1 << 21)}, r"a\.cls"),
    ],
)
def test_shards_that_do_not_fit_are_refused(tmp_path: Path, members: dict[str, bytes], token: str) -> None:
    with pytest.raises(DataError, match=token) as caught:
        tar_source(tmp_path, **members)
    assert caught.value.hint


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_form_of_tar_is_read(tmp_path: Path, form: int) -> None:
    accent = "e" if form == tarfile.USTAR_FORMAT else "é"
    names = ["c/" + "a" * 90 + ".png", f"c/{accent}.png", "d" * 80 + "/" + "b" * 60 + ".png"]
    with tarfile.open(tmp_path / "x.tar", "w", format=form) as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(PNG), 1.5
            tar.addfile(info, io.BytesIO(PNG))
    source = open_source(str(tmp_path / "x.tar"))
    assert list(source.names) == [f"x.tar/{name}" for name in names]
    assert all(source.pixels(i, 8).shape == (8, 8, 3) for i in range(3))


def test_a_shard_that_is_cut_short_is_refused_wherever_it_is_cut(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "x.tar", {f"{i}.{k}": v for i in range(3) for k, v in (("png", PNG), ("cls", b"0"))})
    raw = path.read_bytes()
    end = len(raw.rstrip(b"\0")) + 511 & ~511
    damaged = bytearray(raw)
    damaged[1024 + 3] ^= 1  # a name in a later header, so that its checksum fails
    cuts = [raw[:length] for length in [0, 100, 512, 700, *range(1024, end + 1, 512), end - 200]]
    for content in (*cuts, bytes(damaged), gzip.compress(raw)):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"x\.tar"):
            open_source(str(path))


def test_a_shard_that_shrinks_later_is_an_error_that_names_the_image(tmp_path: Path) -> None:
    source = tar_source(tmp_path, a__png=PNG, b__png=PNG)
    raw = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(raw[: 512 + 1024])
    assert source.pixels(0, 8).shape == (8, 8, 3)
    with pytest.raises(ImageError, match=r"x\.tar/b\.png"):
        source.pixels(1, 8)


def test_a_shard_of_many_members_is_listed_in_seconds(tmp_path: Path) -> None:
    members = {f"{i:05d}.{kind}": raw for i in range(2500) for kind, raw in (("png", PNG), ("json", b'{"label": 3}'))}
    path = make_tar(tmp_path / "x.tar", members)
    started = time.process_time()
    source = open_source(str(path))
    assert time.process_time() - started < 5
    assert (len(source), len({id(label) for label in source.need_labels()})) == (2500, 1)
    assert json.dumps(source.class_names) == '["0", "1", "2", "3"]'


# ---- parquet -------------------------------------------------------------------------------------------------------


def decoded(row: int) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(IMAGES[row])))


def test_parquet_with_class_names(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", IMAGES[:3], [1, 0, 1], ["cat", "dog", "fox"])
    source = open_source(str(path))
    assert (source.need_labels(), source.class_names) == ([1, 0, 1], ["cat", "dog", "fox"])
    assert list(source.names) == ["x.parquet/000000", "x.parquet/000001", "x.parquet/000002"]
    assert source.spec == str(path)
    (tmp_path / "classes.txt").write_text("Katze\nHund")
    assert open_source(str(path)).class_names == ["Katze", "Hund"]


def test_parquet_without_class_names_or_labels(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    assert open_source(str(write_parquet(path, IMAGES[:2], [2, 0]))).class_names == ["0", "1", "2"]
    for labels in (None, [-1, -1], [None, None]):
        source = open_source(str(write_parquet(path, IMAGES[:2], labels, ["a"])))
        assert (source.labels, source.class_names) == (None, [])
        assert source.pixels(1, 8).shape == (8, 8, 3)


def test_plain_bytes_are_images_too(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"image": IMAGES[:2], "other": ["x", "y"]}), tmp_path / "x.parquet")
    assert np.array_equal(open_source(str(tmp_path / "x.parquet")).pixels(1, 8), decoded(1))


def test_shards_may_be_links_as_in_a_download_cache(tmp_path: Path) -> None:
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
    ("make", "token"),
    [
        (lambda path: path.write_bytes(b"text"), r"x\.parquet"),
        (lambda path: path.write_bytes(b""), r"x\.parquet"),
        (lambda path: write_parquet(path, IMAGES[:2], [0, None]), r"x\.parquet/000001"),
        (lambda path: write_parquet(path, IMAGES[:2], [0, -1]), "-1"),
        (lambda path: write_parquet(path, IMAGES[:2], [0, 3], ["a", "b"]), "3"),
        (lambda path: write_parquet(path, [], []), "no images"),
        (write({"picture": IMAGES[:2]}), "picture"),
        (write({"image": IMAGES[:1], "label": ["cat"]}), "'cat'"),
    ],
)
def test_parquet_that_does_not_fit_is_refused(tmp_path: Path, make: Callable[[Path], object], token: str) -> None:
    make(tmp_path / "x.parquet")
    with pytest.raises(DataError, match=token) as caught:
        open_source(str(tmp_path))
    assert caught.value.hint


@pytest.mark.parametrize("column", [["a.png", "b.png"], [{"path": "a.png"}, {"path": "b.png"}]])
def test_parquet_of_paths_names_its_images(tmp_path: Path, column: list[Any]) -> None:
    write({"image": column})(tmp_path / "x.parquet")
    with pytest.raises(ImageError, match=r"x\.parquet/000001"):
        open_source(str(tmp_path)).pixels(1, 8)


def test_parquet_files_of_different_data_sets_are_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "0.parquet", IMAGES[:2], [0, 1], ["a", "b"])
    write_parquet(tmp_path / "1.parquet", IMAGES[:2], [0, 1], ["b", "a"])
    with pytest.raises(DataError, match=str(tmp_path)):
        open_source(str(tmp_path))


def test_a_row_group_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "0.parquet", IMAGES[:12], [0] * 12, group=5)
    write_parquet(tmp_path / "1.parquet", IMAGES[12:], [0] * 8, group=8)
    source = open_source(str(tmp_path))
    assert isinstance(source, ParquetSource)
    opened, open_file = [], source._open

    def watched(number: int) -> Any:
        opened.append(number)
        return open_file(number)

    monkeypatch.setattr(source, "_open", watched)
    assert all(np.array_equal(source.pixels(i, 8), decoded(i)) for i in [*range(20), *reversed(range(20))])
    assert opened == [0, 0, 0, 1, 0, 0, 0]


def test_a_damaged_page_names_its_images_and_spares_the_rest(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", IMAGES[:8], [0] * 8, group=4)
    group = parquet.ParquetFile(path).metadata.row_group(0).column(0)
    raw = bytearray(path.read_bytes())
    start = group.dictionary_page_offset or group.data_page_offset
    raw[start : start + 8] = b"\xff" * 8
    path.write_bytes(raw)
    source = open_source(str(path))
    for index in (0, 1, 0):
        with pytest.raises(ImageError, match=rf"x\.parquet/00000{index}"):
            source.pixels(index, 8)
    assert np.array_equal(source.pixels(5, 8), decoded(5))


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "x.parquet", IMAGES[:2], [0, 1])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match="pyarrow") as caught:
        open_source(str(tmp_path))
    assert "rdpm[parquet]" in caught.value.hint

"""Archives read in place: the same images in every packing, zip members, WebDataset shards, parquet, damage."""

import gzip
import io
import json
import pickle
import stat
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pictures import encoded, make_tar, random_image, write_parquet
from PIL import Image
from pyarrow import parquet

from rdpm_cli.data.archives import ParquetSource, TarSource, ZipSource
from rdpm_cli.data.open import FolderSource, is_there, open_source
from rdpm_cli.data.source import Source
from rdpm_cli.errors import DataError, ImageError
from rdpm_cli.workers import in_order

IMAGES = [encoded(random_image(8, 8, seed)) for seed in range(20)]
PNG = IMAGES[0]


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
    moved = {f"00000/img{i:08d}{Path(name).suffix}": raw for i, (name, raw) in enumerate(images.items())}
    note = json.dumps({"labels": list(map(list, zip(moved, labels, strict=True)))}).encode()
    edm = {**moved, "dataset.json": note, "classes.txt": b"a\nb\nc\n"}
    contents = {**{f"folder/{n}": raw for n, raw in images.items()}, **{f"edm/{n}": raw for n, raw in edm.items()}}
    contents |= {f"{name}/classes.txt": b"a\nb\nc\n" for name in ("tars", "json")}
    for name, raw in contents.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(raw)
    for shard in range(3):
        part = list(images.items())[shard * 4 : shard * 4 + 4]
        cls: dict[str, bytes] = {}
        js: dict[str, bytes] = {}
        for number, (name, raw) in enumerate(part):
            kind = Path(name).suffix
            cls |= {f"{number:04d}{kind}": raw, f"{number:04d}.cls": str(shard).encode()}
            js |= {f"./x/{number}.json": json.dumps({"label": shard}).encode(), f"./x/{number}{kind}": raw}
        make_tar(tmp_path / "tars" / f"train-{shard:04d}.tar", cls)
        make_tar(tmp_path / "json" / f"{shard}.tar", js)
        path = tmp_path / "parquet" / "data" / f"train-{shard:05d}-of-00003.parquet"
        write_parquet(path, [raw for _, raw in part], [shard] * 4, list("abc"), group=3)
    wrapped = {f"set/{name}": raw for name, raw in edm.items()}
    plain = make_tar(tmp_path / "plain" / "folders.tar", images)
    tars = [tmp_path / name for name in ("tars", "tars/train-{0000..0002}.tar", "tars/train-*.tar", "json/{0..2}.tar")]
    return {
        FolderSource: [tmp_path / "folder", tmp_path / "edm"],
        ZipSource: [
            as_zip(tmp_path / "folders.zip", images, zipfile.ZIP_DEFLATED),
            as_zip(tmp_path / "wrapped.zip", wrapped, zipfile.ZIP_BZIP2),
        ],
        TarSource: [*tars, plain],
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

    def read(batch: range) -> list[tuple[int, int]]:
        return [source.image(batch.start % 12).size for source in sources]

    orders = [range(5 * i, 5 * i + 1) for i in range(36)]
    assert list(in_order(read, orders, 3, "--workers 1")) == [
        [size[order.start % 12] for size in sizes] for order in orders
    ]


@pytest.mark.parametrize("kind", [ZipSource, TarSource, ParquetSource])
def test_a_damaged_archive_is_refused_or_its_images_are_named(
    packings: dict[type[Source], list[Path]], tmp_path: Path, kind: type[Source]
) -> None:
    first = packings[kind][0]
    whole = first if first.is_file() else min(p for p in first.rglob("*") if p.suffix in (".tar", ".parquet"))
    raw = whole.read_bytes()
    raw = raw.rstrip(b"\0") + bytes(1024) if kind is TarSource else raw  # its padding holds nothing to damage
    path = tmp_path / f"damaged{whole.suffix}"
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


def test_keys_may_hold_dots(tmp_path: Path) -> None:
    """A key ends at the last dot; a label without an image of its key goes to the only one of `key.<anything>.png`."""
    labels = {"v1.0/c.v2": 3, "v1.0/c.v3": 0, "v1.0/d": 1, "e.f.g": 2, "h": 4}
    members = {f"{key}.cls": str(label).encode() for key, label in labels.items()}
    members |= dict.fromkeys([f"{key}.png" for key in labels if key != "h"] + ["h.left.png", "v1.0/d.seg.png"], PNG)
    source = open_source(str(make_tar(tmp_path / "x.tar", members)))
    assert source.labels is not None
    assert dict(zip(source.names, source.labels, strict=True)) == {
        "x.tar/v1.0/c.v2.png": 3, "x.tar/v1.0/c.v3.png": 0, "x.tar/v1.0/d.png": 1, "x.tar/e.f.g.png": 2,
        "x.tar/h.left.png": 4,
    }  # fmt: skip
    assert source.not_taken == {".seg.png beside a labelled image": 1}


@pytest.mark.parametrize(
    ("members", "token"),
    [
        ({"a__png": PNG, "a__cls": b"0", "b__png": PNG}, r"x\.tar/b\.png"),
        ({"a__png": PNG, "a__cls": b"cat", "b__png": PNG, "b__cls": b"1"}, "'cat'"),
        ({"a__png": PNG, "a__cls": b"-1", "b__png": PNG, "b__cls": b"1"}, "-1"),
        ({"a__png": PNG, "a__json": b"{"}, r"a\.json"),
        ({"a__png": PNG, "a__json": b'{"label": 1.5}'}, "1.5"),
        ({"a__png": PNG, "a__cls": b"1", "a__json": b'{"label": 2}'}, "a'"),
        ({"a__png": PNG, "a__jpg": PNG, "a__cls": b"1"}, "a'"),
        ({"a__txt": PNG, "a__cls": b"1", "b__png": PNG}, "a'"),
        ({"a__txt": b"text"}, r"x\.tar"),
    ],
)
def test_shards_that_do_not_fit_are_refused(tmp_path: Path, members: dict[str, bytes], token: str) -> None:
    with pytest.raises(DataError, match=token):
        tar_source(tmp_path, **members)


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


@pytest.mark.parametrize("padding", [0, 512, 1024, 1536, 9728])
def test_joined_shards_are_read_to_the_end(tmp_path: Path, padding: int) -> None:
    """As `cat a.tar b.tar` joins them, or tar -A or an interrupted append, behind an end mark of any length."""
    whole = b""
    for key in "abc":
        raw = make_tar(tmp_path / "x.tar", {f"{key}.png": PNG, f"{key}.cls": b"1"}).read_bytes().rstrip(b"\0")
        whole += raw + bytes(-len(raw) % 512) + bytes(padding)
    (tmp_path / "x.tar").write_bytes(whole + bytes(512))
    source = open_source(str(tmp_path / "x.tar"))
    assert (source.names, source.labels) == ([f"x.tar/{key}.png" for key in "abc"], [1, 1, 1])
    for junk in (b"junk", b"j" * 600, gzip.compress(whole)):
        (tmp_path / "x.tar").write_bytes(whole + bytes(1024) + junk)
        with pytest.raises(DataError, match=r"x\.tar"):
            open_source(source.spec)


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_long_and_accented_names_in_every_format_of_tar(tmp_path: Path, kind: int) -> None:
    names = [f"{'d' * 90}/{'e' * 90}.png", "ünïcode/1.png"]
    with tarfile.open(tmp_path / "x.tar", "w", format=kind) as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(PNG)
            tar.addfile(info, io.BytesIO(PNG))
    source = open_source(str(tmp_path / "x.tar"))
    assert source.names == [f"x.tar/{name}" for name in names]
    assert (source.labels, source.class_names) == ([0, 1], ["d" * 90, "ünïcode"])


@pytest.mark.parametrize(
    ("change", "token"),
    [
        (lambda member: setattr(member, "external_attr", (stat.S_IFLNK | 0o777) << 16), "link"),
        (lambda member: setattr(member, "flag_bits", member.flag_bits | 1), "encrypted"),
    ],
)
@pytest.mark.parametrize("name", ["a/2.png", "b", "classes.txt"])
def test_links_and_encrypted_members_of_a_zip_are_refused(
    tmp_path: Path, name: str, change: Callable[[zipfile.ZipInfo], None], token: str
) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a/1.png", PNG)
        archive.writestr(name, b"a")
        change(archive.infolist()[-1])  # as the directory at the end will list it
    with pytest.raises(DataError, match=f"{name}.*{token}"):
        open_source(str(tmp_path / "x.zip"))


def test_folders_in_a_zip_of_windows_are_folders(tmp_path: Path) -> None:
    path = as_zip(tmp_path / "x.zip", {"a\\1.png": PNG, "b\\": b"", "b\\2.png": PNG})
    source = open_source(str(path))
    assert (source.names, source.labels, source.not_taken) == (["a/1.png", "b/2.png"], [0, 1], {})


def test_class_names_and_labels_of_parquet(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", IMAGES[:3], [1, 0, 1], ["cat", "dog", "fox"])
    source = open_source(str(path))
    assert (source.need_labels(), source.class_names, source.spec) == ([1, 0, 1], ["cat", "dog", "fox"], str(path))
    assert open_source(str(write_parquet(path, IMAGES[:2], [2, 0]))).class_names == ["0", "1", "2"]
    for labels in (None, [-1, -1], [None, None]):
        source = open_source(str(write_parquet(path, IMAGES[:2], labels, ["a"])))
        assert (source.labels, source.class_names) == (None, [])
        assert source.pixels(1, 8).shape == (8, 8, 3)
    parquet.write_table(pyarrow.table({"image": IMAGES[:2], "other": ["x", "y"]}), path)  # plain bytes
    assert np.array_equal(open_source(str(path)).pixels(1, 8), np.asarray(Image.open(io.BytesIO(IMAGES[1]))))


def write(columns: dict[str, Any]) -> Callable[[Path], object]:
    return lambda path: parquet.write_table(pyarrow.table(columns), path)


@pytest.mark.parametrize(
    ("make", "token"),
    [
        (lambda path: path.write_bytes(b"text"), r"x\.parquet"),
        (lambda path: write_parquet(path, IMAGES[:2], [0, None]), r"x\.parquet/000001"),
        (lambda path: write_parquet(path, IMAGES[:2], [0, -1]), "-1"),
        (lambda path: write_parquet(path, IMAGES[:2], [0, 3], ["a", "b"]), "3"),
        (lambda path: write_parquet(path, [], []), "no images"),
        (write({"picture": IMAGES[:2]}), "picture"),
        (write({"image": IMAGES[:2], "label": ["cat", "2"]}), "'cat'"),
    ],
)
def test_parquet_that_does_not_fit_is_refused(tmp_path: Path, make: Callable[[Path], object], token: str) -> None:
    make(tmp_path / "x.parquet")
    with pytest.raises(DataError, match=token):
        open_source(str(tmp_path))


STRUCT = pyarrow.array([{"bytes": raw, "path": None} for raw in IMAGES[:2]])


@pytest.mark.parametrize(
    ("columns", "options", "labels", "names"),
    [
        ({"img": STRUCT, "label": [1, 0]}, {}, [1, 0], ["0", "1"]),
        ({"img": STRUCT, "coarse_label": [5, 6], "fine_label": [1, 0]}, {}, [1, 0], ["0", "1"]),
        ({"jpg": IMAGES[:2], "cls": [1, 0], "__key__": ["x", "y"]}, {}, [1, 0], ["0", "1"]),
        ({"image": STRUCT, "label": pyarrow.array([1, 0], pyarrow.uint8())}, {}, [1, 0], ["0", "1"]),
        ({"image": STRUCT, "label": ["dog", "cat"]}, {}, [1, 0], ["cat", "dog"]),
        ({"image": STRUCT, "label": pyarrow.array(["dog", "cat"], pyarrow.large_string())}, {}, [1, 0], ["cat", "dog"]),
        ({"image": STRUCT, "label": pyarrow.array(["dog", "cat"]).dictionary_encode()}, {}, [1, 0], ["cat", "dog"]),
        ({"image": STRUCT, "caption": ["x", "y"]}, {}, None, []),
        ({"image": STRUCT, "kind": ["b", "a"]}, {"label_column": "kind"}, [1, 0], ["a", "b"]),
        ({"picture": STRUCT, "label": [0, 0]}, {"image_column": "picture"}, [0, 0], ["0"]),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else None,
)
def test_columns_of_parquet_by_their_usual_names_or_as_asked(
    tmp_path: Path, columns: dict[str, Any], options: dict[str, str], labels: list[int] | None, names: list[str]
) -> None:
    write(columns)(tmp_path / "x.parquet")
    source = open_source(str(tmp_path / "x.parquet"), **options)
    assert (source.labels, source.class_names) == (labels, names)
    assert np.array_equal(source.pixels(1, 8), np.asarray(Image.open(io.BytesIO(IMAGES[1]))))


@pytest.mark.parametrize("option", ["image_column", "label_column"])
def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path: Path, option: str) -> None:
    write({"image": IMAGES[:2], "kind": [0, 1]})(tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"typo.*image, kind") as caught:
        open_source(str(tmp_path / "x.parquet"), **{option: "typo"})
    assert f"--{option.replace('_', '-')}" in caught.value.hint


def test_parquet_without_labels_is_asked_about_columns_not_folders(tmp_path: Path) -> None:
    write({"image": IMAGES[:2], "kind": [0, 1]})(tmp_path / "x.parquet")
    with pytest.raises(DataError) as caught:
        open_source(str(tmp_path / "x.parquet")).need_labels()
    assert "--label-column, of image, kind" in caught.value.hint


def test_a_path_without_bytes_in_parquet_is_named(tmp_path: Path) -> None:
    write({"image": [{"bytes": None, "path": "x/a.png"}, {"bytes": PNG, "path": None}]})(tmp_path / "x.parquet")
    source = open_source(str(tmp_path / "x.parquet"))
    with pytest.raises(ImageError, match=r"x\.parquet/000000.*x/a\.png"):
        source.pixels(0, 8)
    assert source.pixels(1, 8).shape == (8, 8, 3)


def test_parquet_files_of_different_columns_are_refused(tmp_path: Path) -> None:
    for number, names in enumerate((("image", "label"), ("img", "fine_label"))):
        write(dict(zip(names, (IMAGES[:2], [0, 1]), strict=True)))(tmp_path / f"{number}.parquet")
    with pytest.raises(DataError, match=r"1\.parquet has img, fine_label"):
        open_source(str(tmp_path))


def test_parquet_files_of_different_data_sets_are_refused(tmp_path: Path) -> None:
    for number, names in enumerate(("ab", "ba")):
        write_parquet(tmp_path / f"{number}.parquet", IMAGES[:2], [0, 1], list(names))
    with pytest.raises(DataError, match=str(tmp_path)):
        open_source(str(tmp_path))

"""WebDataset shards: what is an image, what is a label, what is passed over and what is refused."""

import gzip
import io
import json
import tarfile
import time
from pathlib import Path

import pytest
from pictures import encoded, make_tar, random_image

from rdpm_cli.errors import DataError
from rdpm_cli.images.sources import TarSource, open_source

PNG = encoded(random_image(8, 8))


def opened(path: Path, **members: bytes) -> TarSource:
    """The source of a .tar with these members; `__` in a name stands for its dot."""
    source = open_source(str(make_tar(path / "x.tar", {n.replace("__", "."): raw for n, raw in members.items()})))
    assert isinstance(source, TarSource)
    return source


def test_labels_and_kinds(tmp_path: Path) -> None:
    source = opened(tmp_path, a__png=PNG, a__cls=b"2\n", b__cls=b" 0", b__JPG=PNG, c__webp=PNG, c__json=b'{"cls": 1}')
    assert source.names == ["x.tar/a.png", "x.tar/b.JPG", "x.tar/c.webp"]
    assert (source.labels, source.class_names) == ([2, 0, 1], ["0", "1", "2"])
    (tmp_path / "classes.txt").write_text("zero\none\ntwo\nthree")
    assert open_source(source.spec).class_names == ["zero", "one", "two", "three"]
    (tmp_path / "classes.txt").write_text("zero\none")
    with pytest.raises(DataError, match=r"'x\.tar/a\.png' has the label 2, which is not one of 0\.\.1"):
        open_source(source.spec)


def test_the_key_ends_at_the_first_dot_of_the_base_name(tmp_path: Path) -> None:
    members = {"d.ir/a.png": PNG, "d.ir/a.cls": b"1", "d.ir/a.seg.png": PNG, "e/a.png": PNG, "e/a.cls": b"0"}
    source = open_source(str(make_tar(tmp_path / "x.tar", members)))
    assert (list(source.names), source.labels) == (["x.tar/d.ir/a.png", "x.tar/e/a.png"], [1, 0])


def test_members_of_a_key_may_lie_apart(tmp_path: Path) -> None:
    assert opened(tmp_path, a__png=PNG, b__png=PNG, b__cls=b"1", a__cls=b"0").labels == [0, 1]


def test_without_labels(tmp_path: Path) -> None:
    source = opened(tmp_path, a__png=PNG, b__json=b'{"width": 8}', b__png=PNG, info__json=b"[]")
    assert (source.labels, source.class_names, len(source)) == (None, [], 2)


@pytest.mark.parametrize(
    ("members", "text"),
    [
        ({"a__png": PNG, "a__cls": b"0", "b__png": PNG}, r"1 of 2 images have no label, such as 'x\.tar/b\.png'"),
        ({"a__png": PNG, "a__cls": b"cat"}, r"'a\.cls' holds no label"),
        ({"a__png": PNG, "a__cls": b""}, r"'a\.cls' holds no label"),
        ({"a__png": PNG, "a__cls": b"\x80\x04K\x01."}, r"'a\.cls' holds no label"),
        ({"a__png": PNG, "a__cls": b"-1"}, "has the label -1"),
        ({"a__png": PNG, "a__json": b"{"}, r"'a\.json' holds no label"),
        ({"a__png": PNG, "a__json": b'{"label": "cat"}'}, "has the label 'cat'"),
        ({"a__png": PNG, "a__json": b'{"label": true}'}, "has the label True"),
        ({"a__png": PNG, "a__cls": b"1", "a__json": b'{"label": 2}'}, "two labels for 'a'"),
        ({"a__png": PNG, "a__jpg": PNG}, "two images for 'a'"),
        ({"a__gif": PNG, "a__cls": b"1"}, "'a' has a label and no image"),
        ({"a__txt": b"text"}, "holds no images"),
        ({"a__png": PNG, "a__cls": b"1" * (1 << 21)}, "too large"),
    ],
)
def test_shards_that_do_not_fit_are_refused(tmp_path: Path, members: dict[str, bytes], text: str) -> None:
    with pytest.raises(DataError, match=text) as caught:
        opened(tmp_path, **members)
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
    whole = make_tar(tmp_path / "x.tar", {f"{i}.{k}": v for i in range(3) for k, v in (("png", PNG), ("cls", b"0"))})
    raw = whole.read_bytes()
    end = len(raw.rstrip(b"\0")) + 511 & ~511
    for length in [0, 100, 512, 700, *range(1024, end + 1, 512), end - 200]:
        whole.write_bytes(raw[:length])
        with pytest.raises(DataError, match=r"x\.tar cannot be read as a tar"):
            open_source(str(whole))
    damaged = bytearray(raw)
    damaged[1024 + 3] ^= 1  # a name in a header behind the first: its checksum
    whole.write_bytes(damaged)
    with pytest.raises(DataError, match="cannot be read as a tar"):
        open_source(str(whole))


def test_a_compressed_tar_is_refused_by_its_content_too(tmp_path: Path) -> None:
    raw = make_tar(tmp_path / "x.tar", {"a.png": PNG}).read_bytes()
    (tmp_path / "x.tar").write_bytes(gzip.compress(raw))
    with pytest.raises(DataError, match="compressed; unpack it with gunzip"):
        open_source(str(tmp_path / "x.tar"))


def test_a_shard_that_shrinks_later_is_an_error_that_names_the_image(tmp_path: Path) -> None:
    source = opened(tmp_path, a__png=PNG, b__png=PNG)
    raw = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(raw[: 512 + 1024])
    assert source.pixels(0, 8).shape == (8, 8, 3)
    with pytest.raises(DataError, match=r"x\.tar/b\.png cannot be read as an image: x\.tar ends inside it"):
        source.pixels(1, 8)


def test_a_shard_of_many_members_is_listed_in_seconds(tmp_path: Path) -> None:
    members = {f"{i:05d}.{kind}": raw for i in range(2500) for kind, raw in (("png", PNG), ("json", b'{"label": 3}'))}
    path = make_tar(tmp_path / "x.tar", members)
    started = time.perf_counter()
    source = open_source(str(path))
    assert time.perf_counter() - started < 5  # 0.1 s alone
    assert (len(source), len({id(label) for label in source.need_labels()})) == (2500, 1)
    assert json.dumps(source.class_names) == '["0", "1", "2", "3"]'

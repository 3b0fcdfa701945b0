"""Sources: folders, the digits, patterns, labels and class names, single items, and the classes a user asks for."""

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pictures import adm_center_crop_arr, make_files, make_tar, make_zip, real, write_parquet
from PIL import Image

from rdpm_cli import files
from rdpm_cli.data.labels import parse_classes
from rdpm_cli.data.open import DigitsSource, FolderSource, expand, is_there, open_item, open_source
from rdpm_cli.data.source import Subset
from rdpm_cli.errors import DataError, RdpmError, UsageError


def test_folder_of_classes(image_folder: Path) -> None:
    source = open_source(str(image_folder))
    assert isinstance(source, FolderSource)
    assert (len(source), source.class_names) == (36, ["a", "b", "c"])
    assert list(source.names) == sorted(p.relative_to(image_folder).as_posix() for p in image_folder.glob("?/*"))
    few = Subset(source, [3, 30], "two of them")
    assert (few.names, few.labels, few.class_names) == (source.names[3::27], [0, 2], source.class_names)
    assert source.need_labels() == source.columns["labels"] == [0] * 12 + [1] * 12 + [2] * 12
    with Image.open(image_folder / source.names[20]) as image:
        assert np.array_equal(source.pixels(20, 16), adm_center_crop_arr(image.convert("RGB"), 16))


def test_the_digest_covers_names_and_labels_only(tmp_path: Path) -> None:
    make_files(tmp_path / "x", "b/2.png", "a/1.png")
    make_zip(tmp_path / "x.zip", "b/2.png", "a/1.png")
    expected = files.digest({"names": ["a/1.png", "b/2.png"], "labels": [0, 1]})
    assert {open_source(str(tmp_path / name)).digest() for name in ("x", "x.zip")} == {expected}
    renamed = open_source(str(make_files(tmp_path / "y", "a/1.png", "b/3.png")))
    moved = open_source(str(make_files(tmp_path / "z", "a/1.png", "c/2.png")))
    assert len({expected, renamed.digest(), moved.digest()}) == 3


def test_digits_are_1500_and_297_disjoint_and_stratified() -> None:
    train, heldout = open_source("digits:train"), open_source("digits:heldout")
    assert (len(train), len(heldout)) == (1500, 297)
    rows = [int(name.rsplit("/", 1)[1]) for source in (train, heldout) for name in source.names]
    assert sorted(rows) == list(range(1797))
    for label in range(10):
        counts = [list(source.need_labels()).count(label) for source in (train, heldout)]
        assert abs(counts[1] - sum(counts) * 297 / 1797) < 1


def test_digits_without_a_part_are_the_training_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digits = open_source("digits")
    assert isinstance(digits, DigitsSource)
    assert (digits.spec, digits.digest()[:16]) == ("digits:train", "97dbad725a1d7f5e")  # as stores record it
    make_files(tmp_path / "digits", "a/1.png")
    monkeypatch.chdir(tmp_path)
    assert (len(open_source("./digits")), len(open_source("digits"))) == (1, 1500)


def test_real_imagenet_photographs_are_cropped_as_by_adm() -> None:
    source = open_source(real("imagenet-50"))
    assert (len(source), len(source.class_names), source.need_labels()) == (50, 50, list(range(50)))
    for index in (0, 17, 49):
        assert np.array_equal(source.pixels(index, 256), adm_center_crop_arr(source.image(index), 256))


def test_a_flat_folder_has_no_labels_and_previews_are_no_samples(tmp_path: Path) -> None:
    make_files(tmp_path, "000001.png", "000000.png", "previews/grid.png")
    (tmp_path / "samples.json").write_text("{}")
    source = open_source(str(tmp_path))
    assert (list(source.names), source.labels, source.columns) == (["000000.png", "000001.png"], None, {})
    with pytest.raises(DataError, match=str(tmp_path)):
        source.need_labels()


def test_hidden_files_and_other_files_are_ignored(tmp_path: Path) -> None:
    make_files(tmp_path, "a/1.png", "b/2.JPEG", ".hidden/3.png", "a/.4.png", "__MACOSX/a/1.png", "b/.cache/5.png")
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    (tmp_path / "README.md").write_text("not an image")
    source = open_source(str(tmp_path))
    assert (list(source.names), source.class_names) == (["a/1.png", "b/2.JPEG"], ["a", "b"])


def test_links_are_followed_and_each_folder_counts_once_under_its_real_name(tmp_path: Path) -> None:
    root = make_files(tmp_path / "root", "a/1.png", "b/2.png")
    make_files(tmp_path / "elsewhere", "3.png")
    (root / "a" / "again.png").symlink_to("1.png")
    (root / "a" / "up").symlink_to(root)
    (root / "also-b").symlink_to("b")
    (root / "c").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "link").symlink_to(root)
    for path in (root, tmp_path / "link"):
        source = open_source(str(path))
        assert list(source.names) == ["a/1.png", "a/again.png", "b/2.png", "c/3.png"]
        assert source.class_names == ["a", "b", "c"]
        assert source.pixels(3, 16).shape == (16, 16, 3)


@pytest.mark.parametrize(
    ("make", "error", "token"),
    [
        (lambda root: root / "nothing", UsageError, "nothing"),
        (lambda root: make_files(root / "empty", "notes/.hidden.png"), DataError, "empty"),
        (lambda root: make_files(root / "mixed", "a/1.png", "loose.png"), DataError, r"loose\.png"),
        (lambda root: make_zip(root / "empty.zip", "a/readme.txt"), DataError, r"empty\.zip"),
        (lambda root: make_zip(root / "up.zip", "a/1.png", "../b/2.png"), DataError, r"\.\./b/2\.png"),
        (lambda root: make_zip(root / "cut.zip", "a/1.png").rename(root / "x.tar"), DataError, r"x\.tar"),
        (lambda root: Path("digits:test"), UsageError, "test"),
    ],
)
def test_what_is_no_source_is_refused(
    tmp_path: Path, make: Callable[[Path], Path], error: type[RdpmError], token: str
) -> None:
    with pytest.raises(error, match=token) as caught:
        open_source(str(make(tmp_path)))
    assert type(caught.value) is error
    assert caught.value.exit_code == (2 if error is UsageError else 3)
    assert caught.value.hint


@pytest.mark.parametrize("wrapper", ["", "set/"])
def test_a_class_folder_without_images_is_refused_unless_the_classes_are_listed(tmp_path: Path, wrapper: str) -> None:
    """It would shift the labels of the classes after it, so that two splits disagree."""
    make_files(tmp_path, f"{wrapper}a/1.png", f"{wrapper}c/2.png")
    (tmp_path / wrapper / "b").mkdir()
    (tmp_path / wrapper / ".hidden").mkdir()
    with pytest.raises(DataError, match=f"{wrapper}b"):
        open_source(str(tmp_path))
    (tmp_path / wrapper / "classes.txt").write_text("a\nb\nc\n")
    source = open_source(str(tmp_path))
    assert (source.labels, source.class_names) == ([0, 2], ["a", "b", "c"])


def test_a_pipe_or_broken_link_is_refused_before_it_is_read(tmp_path: Path) -> None:
    make_files(tmp_path, "a/1.png")
    os.mkfifo(tmp_path / "a" / "2.png")
    with pytest.raises(DataError, match=r"a/2\.png"):
        open_source(str(tmp_path))
    (tmp_path / "a" / "2.png").unlink()
    (tmp_path / "a" / "2.png").symlink_to("gone.png")
    with pytest.raises(DataError, match=r"a/2\.png"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("splits", [("train/a", "val/a"), ("set/train/a", "set/val/a")])
def test_data_splits_are_no_classes(tmp_path: Path, splits: tuple[str, str]) -> None:
    make_files(tmp_path, *(f"{split}/1.png" for split in splits))
    with pytest.raises(DataError, match="train, val"):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    ("lines", "labels", "names"),
    [
        (["tench", "goldfish"], [0, 1], ["tench", "goldfish"]),
        (["b", "a"], [1, 0], ["b", "a"]),
        (["x", "a", "y", "b"], [1, 3], ["x", "a", "y", "b"]),
        (["crane", "crane", ""], [0, 1], ["crane", "crane"]),
    ],
)
def test_classes_txt_names_the_class_folders(
    tmp_path: Path, lines: list[str], labels: list[int], names: list[str]
) -> None:
    root = make_files(tmp_path / "root", "a/1.png", "b/2.png")
    (root / "classes.txt").write_text("\n".join(lines))
    packed = make_zip(tmp_path / "x.zip", "a/1.png", "b/2.png")
    with zipfile.ZipFile(packed, "a") as archive:
        archive.writestr("classes.txt", "\r\n".join(lines))
    for path in (root, packed):
        source = open_source(str(path))
        assert (source.need_labels(), source.class_names) == (labels, names)


@pytest.mark.parametrize(
    ("content", "token"),
    [
        (b"a\n", "lacks b"),
        (b"x\ny\nz\n", "3"),
        (b"x\n\ny\n", ""),
        (b"", ""),
        (b"\xff", ""),
    ],
)
def test_classes_txt_that_does_not_fit_is_refused(tmp_path: Path, content: bytes, token: str) -> None:
    root = make_files(tmp_path, "a/1.png", "b/2.png")
    (root / "classes.txt").write_bytes(content)
    with pytest.raises(DataError, match=rf"{token}(?s:.*)classes\.txt|classes\.txt(?s:.*){token}"):
        open_source(str(root))


@pytest.mark.parametrize(
    ("labels", "token"),
    [
        ([["a/1.png", 0]], r"b/2\.png"),
        ([["a/1.png", 0], ["b/2.png", 1.5]], "1.5"),
        ([["a/1.png", 0], ["b/2.png", -1]], "-1"),
        ([["a/1.png", 0], ["b/2.png", 10**9]], "1000000000"),
        ([["a/1.png"]], r"dataset\.json"),
        (7, r"dataset\.json"),
    ],
)
def test_edm_labels_that_do_not_fit_are_refused(tmp_path: Path, labels: object, token: str) -> None:
    make_files(tmp_path, "a/1.png", "b/2.png")
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}))
    with pytest.raises(DataError, match=token):
        open_source(str(tmp_path))


def test_edm_without_labels_and_another_dataset_json(tmp_path: Path) -> None:
    make_files(tmp_path, "00000/1.png", "00001/2.png")
    note = tmp_path / "dataset.json"
    note.write_text('{"labels": null}')
    assert (open_source(str(tmp_path)).labels, open_source(str(tmp_path)).class_names) == (None, [])
    note.write_text('{"labels": [["00000/1.png", 4], ["00001/2.png", 0], ["gone.png", 9]]}')
    assert open_source(str(tmp_path)).labels == [4, 0]
    assert open_source(str(tmp_path)).class_names == ["0", "1", "2", "3", "4"]
    note.write_text('{"name": "another program"}')
    assert open_source(str(tmp_path)).class_names == ["00000", "00001"]


def test_patterns_count_with_their_zeros_list_and_multiply(tmp_path: Path) -> None:
    for name in ("08a", "08b", "09a", "09b", "10a", "10b"):
        (tmp_path / f"{name}.tar").touch()
    paths = expand(str(tmp_path / "{08..10}{a,b}.tar"))
    assert [path.stem for path in paths] == ["08a", "08b", "09a", "09b", "10a", "10b"]


@pytest.mark.parametrize(
    ("pattern", "error", "token"),
    [
        ("x-{0..3}.tar", UsageError, r"x-2\.tar"),
        ("x-{0.tar,0.txt}", DataError, r"x-0\.txt"),
        ("x-0.{tar,parquet}", DataError, r"\.tar and \.parquet"),
        ("x.tar.gz", DataError, r"x\.tar\.gz"),
    ],
)
def test_patterns_that_name_no_shards(tmp_path: Path, pattern: str, error: type[RdpmError], token: str) -> None:
    for name in ("x-0.tar", "x-1.tar", "x-3.tar", "x-0.txt", "x-0.parquet", "x.tar.gz"):
        make_tar(tmp_path / name, {})
    with pytest.raises(error, match=token):
        open_source(str(tmp_path / pattern))
    assert not is_there(str(tmp_path / "x-{0..3}.tar"))
    assert is_there(str(tmp_path / "x-{0..1}.tar"))


def test_a_folder_of_shards_is_one_set_of_images(tmp_path: Path, image_folder: Path) -> None:
    sample = {"0.png": (image_folder / "a" / "00.png").read_bytes(), "0.cls": b"0"}
    for name in ("data/train-0000.tar", "data/train-0001.tar", "data/val-0000.tar"):
        make_tar(tmp_path / "tars" / name, sample)
    with pytest.raises(DataError, match="train, val"):
        open_source(str(tmp_path / "tars"))
    assert len(open_source(str(tmp_path / "tars" / "data" / "train*.tar"))) == 2
    (tmp_path / "tars" / "data" / "val-0000.tar").unlink()
    assert open_source(str(tmp_path / "tars")).names == ["train-0000.tar/0.png", "train-0001.tar/0.png"]
    write_parquet(tmp_path / "tars" / "train-0.parquet", [sample["0.png"]], [0])
    with pytest.raises(DataError, match=r"\.tar and \.parquet"):
        open_source(str(tmp_path / "tars"))


def test_an_item_is_a_file_or_a_number_of_a_source(image_folder: Path) -> None:
    path = image_folder / "b" / "03.png"
    for spec in (str(path), f"{image_folder}#15"):
        with Image.open(path) as image:
            assert np.array_equal(np.asarray(open_item(spec)), np.asarray(image.convert("RGB")))
    assert open_item("digits:heldout#3").size == (16, 16)
    for spec in ("nothing.png", f"{image_folder}#36", f"{image_folder}#x", str(image_folder)):
        with pytest.raises(UsageError, match=spec):
            open_item(spec)


NAMES = ["tench", "goldfish, Carassius auratus", "goldfish"]


@pytest.mark.parametrize(
    ("text", "classes"),
    [
        ("0-2", [0, 1, 2]),
        ("all", [0, 1, 2]),
        ("2, 0-1,all", [2, 0, 1]),
        ("name:goldfish, Carassius auratus", [1]),
        ("0, name:goldfish, Carassius auratus, 2", [0, 1, 2]),
        ("name:goldfish,0", [2, 0]),
    ],
)
def test_classes_are_numbers_ranges_and_names(text: str, classes: list[int]) -> None:
    assert parse_classes(text, NAMES) == classes


@pytest.mark.parametrize(
    "text", ["", "1,", "cat", "2-1", "-1", "1-", "0-3", "3", "name:", "name:dog", "1.5", "a-b", "²", "0-9999999999"]
)
def test_what_is_no_class_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--classes") as caught:
        parse_classes(text, NAMES)
    assert caught.value.hint

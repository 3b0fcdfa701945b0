"""Sources: folders, the digits, patterns, labels and class names, single items, and the classes a user asks for."""

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pictures import adm_center_crop_arr, make_files, make_tar, make_zip, real, write_parquet
from PIL import Image

from rdpm_cli import files
from rdpm_cli.data.labels import parse_classes
from rdpm_cli.data.open import FolderSource, expand, is_there, open_item, open_source
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


def test_digits_are_1500_and_297_disjoint_and_stratified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, heldout = open_source("digits"), open_source("digits:heldout")
    assert (train.spec, train.digest()[:16]) == ("digits:train", "97dbad725a1d7f5e")  # as stores record it
    assert (len(train), len(heldout)) == (1500, 297)
    rows = [int(name.rsplit("/", 1)[1]) for source in (train, heldout) for name in source.names]
    assert sorted(rows) == list(range(1797))
    for label in range(10):
        counts = [list(source.need_labels()).count(label) for source in (train, heldout)]
        assert abs(counts[1] - sum(counts) * 297 / 1797) < 1
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


def test_hidden_and_other_files_are_counted_and_linked_folders_are_followed_if_asked(tmp_path: Path) -> None:
    root = make_files(tmp_path / "root", "a/1.png", "b/2.JPEG", ".hidden/3.png", "a/.4.png", "__MACOSX/a/1.png")
    (root / "a" / "notes.txt").write_text("not an image")
    make_files(tmp_path / "elsewhere", "3.png")
    (root / "c").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=str(root / "c")) as caught:
        open_source(str(root))
    assert "--follow-links" in caught.value.hint
    source = open_source(str(root), follow_links=True)
    assert (list(source.names), source.class_names) == (["a/1.png", "b/2.JPEG", "c/3.png"], ["a", "b", "c"])
    assert source.not_taken == {".txt": 1, "hidden": 1}
    (root / "b" / "loop").symlink_to(root)
    with pytest.raises(DataError, match="loop"):
        open_source(str(root), follow_links=True)


@pytest.mark.parametrize(
    ("make", "error", "token"),
    [
        (lambda root: root / "nothing", UsageError, "nothing"),
        (lambda root: make_files(root / "empty", "notes/.hidden.png"), DataError, "empty"),
        (lambda root: make_files(root / "mixed", "a/1.png", "loose.png"), DataError, r"loose\.png"),
        (lambda root: make_files(root / "splits", "train/a/1.png", "val/a/1.png"), DataError, "train, val"),
        (lambda root: make_files(root / "splits", "set/train/a/1.png", "set/val/a/1.png"), DataError, "train, val"),
        (lambda root: make_zip(root / "empty.zip", "a/readme.txt"), DataError, r"empty\.zip"),
        (lambda root: make_zip(root / "cut.zip", "a/1.png").rename(root / "x.tar"), DataError, r"x\.tar"),
        (lambda root: make_tar(root / "x.tar.gz", {}), DataError, r"x\.tar\.gz"),
        (lambda root: Path("digits:test"), UsageError, "test"),
    ],
)
def test_what_is_no_source_is_refused(
    tmp_path: Path, make: Callable[[Path], Path], error: type[RdpmError], token: str
) -> None:
    with pytest.raises(error, match=token) as caught:
        open_source(str(make(tmp_path)))
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
    ("name", "content", "token"),
    [
        ("classes.txt", b"a\n", "lacks b"),
        ("classes.txt", b"x\ny\nz\n", "3"),
        ("classes.txt", b"x\n\ny\n", "empty"),
        ("classes.txt", b"", "empty"),
        ("classes.txt", b"\xff", "UTF-8"),
        ("dataset.json", b'{"labels": [["a/1.png", 0]]}', "b/2.png"),
        ("dataset.json", b'{"labels": [["a/1.png", 0], ["b/2.png", 1.5]]}', "1.5"),
        ("dataset.json", b'{"labels": [["a/1.png", 0], ["b/2.png", -1]]}', "-1"),
        ("dataset.json", b'{"labels": [["a/1.png", 0], ["b/2.png", 1000000000]]}', "1000000000"),
        ("dataset.json", b'{"labels": [["a/1.png"]]}', "dataset.json"),
        ("dataset.json", b'{"labels": 7}', "dataset.json"),
    ],
)
def test_class_names_and_edm_labels_that_do_not_fit_are_refused(
    tmp_path: Path, name: str, content: bytes, token: str
) -> None:
    (make_files(tmp_path, "a/1.png", "b/2.png") / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        open_source(str(tmp_path))
    assert token in caught.value.message


@pytest.mark.parametrize(
    ("note", "labels", "names"),
    [
        ('{"labels": null}', None, []),
        ('{"labels": [["00000/1.png", 4], ["00001/2.png", 0], ["gone.png", 9]]}', [4, 0], list("01234")),
        ('{"name": "another program"}', [0, 1], ["00000", "00001"]),
    ],
)
def test_edm_without_labels_and_another_dataset_json(
    tmp_path: Path, note: str, labels: list[int] | None, names: list[str]
) -> None:
    make_files(tmp_path, "00000/1.png", "00001/2.png")
    (tmp_path / "dataset.json").write_text(note)
    source = open_source(str(tmp_path))
    assert (source.labels, source.class_names) == (labels, names)


def test_patterns_count_with_their_zeros_and_must_be_complete(tmp_path: Path) -> None:
    for name in ("08-1", "08-2", "09-1", "09-2", "10-1", "10-2"):
        (tmp_path / f"{name}.tar").touch()
    paths = expand(str(tmp_path / "{08..10}-{1..2}.tar"))
    assert [path.stem for path in paths] == ["08-1", "08-2", "09-1", "09-2", "10-1", "10-2"]
    assert is_there(str(tmp_path / "{08..10}-1.tar"))
    absent = str(tmp_path / "{08..11}-1.tar")
    assert not is_there(absent)
    with pytest.raises(UsageError) as caught:
        open_source(absent)
    assert absent in caught.value.message


def test_a_folder_of_shards_is_one_set_of_images(tmp_path: Path, image_folder: Path) -> None:
    sample = {"0.png": (image_folder / "a" / "00.png").read_bytes(), "0.cls": b"0"}
    for name in ("data/train-0000.tar", "data/train-0001.tar", "data/val-0000.tar"):
        make_tar(tmp_path / "tars" / name, sample)
    with pytest.raises(DataError, match="train, val"):
        open_source(str(tmp_path / "tars"))
    assert len(open_source(str(tmp_path / "tars" / "data" / "train*.tar"))) == 2
    (tmp_path / "tars" / "data" / "val-0000.tar").unlink()
    assert open_source(str(tmp_path / "tars")).names == ["train-0000.tar/0.png", "train-0001.tar/0.png"]
    for name, token in (("train-0.parquet", r"\.parquet"), ("loose.png", r"loose\.png")):
        write_parquet(tmp_path / "tars" / name, [sample["0.png"]], [0])
        with pytest.raises(DataError, match=token):
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
        ("0, name:goldfish, Carassius auratus, 2", [0, 1, 2]),
        ("name:goldfish,0", [2, 0]),
    ],
)
def test_classes_are_numbers_ranges_and_names(text: str, classes: list[int]) -> None:
    assert parse_classes(text, NAMES) == classes


def test_a_name_of_two_classes_is_refused_with_their_numbers() -> None:
    names = ["crane", "maillot", "crane", "stork"]
    for text, numbers in {"name:crane": ("0", "2"), "3, name:crane": ("0", "2")}.items():
        with pytest.raises(UsageError, match="crane") as caught:
            parse_classes(text, names)
        assert all(number in caught.value.message for number in numbers)
    assert parse_classes("name:maillot,0,2", names) == [1, 0, 2]


@pytest.mark.parametrize("text", ["", "1,", "cat", "2-1", "-1", "1-", "0-3", "name:", "name:dog", "1.5", "a-b", "²"])
def test_what_is_no_class_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--classes") as caught:
        parse_classes(text, NAMES)
    assert caught.value.hint

"""Images in: folders, zips, digits, patterns, and the same images packed in every way."""

import json
import multiprocessing
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from pictures import adm_center_crop_arr, make_files, make_tar, make_zip, real, write_parquet
from PIL import Image

from rdpm_cli import files
from rdpm_cli.errors import DataError, ImageError, RdpmError, UsageError
from rdpm_cli.images import sources
from rdpm_cli.images.sources import (
    DigitsSource,
    FolderSource,
    ImageSource,
    ParquetSource,
    TarSource,
    ZipSource,
    open_source,
)


@pytest.fixture
def image_zip(image_folder: Path, tmp_path: Path) -> Path:
    """`image_folder` packed in reverse order, with the folder entries that zip tools add."""
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(image_folder.rglob("*"), reverse=True):
            archive.write(file, file.relative_to(image_folder))
    return path


def test_folder_of_classes(image_folder: Path) -> None:
    source = open_source(str(image_folder))
    assert isinstance(source, FolderSource)
    assert (len(source), source.class_names) == (36, ["a", "b", "c"])
    assert list(source.names) == sorted(p.relative_to(image_folder).as_posix() for p in image_folder.glob("?/*"))
    assert source.need_labels() == [0] * 12 + [1] * 12 + [2] * 12
    with Image.open(image_folder / source.names[20]) as image:
        assert np.array_equal(source.pixels(20, 16), adm_center_crop_arr(image.convert("RGB"), 16))


def test_labels_count_the_sorted_class_names(tmp_path: Path) -> None:
    source = FolderSource(make_files(tmp_path, "9/x.png", "10/x.png", "b/deep/er/x.png", "b-a/x.png", "B/x.png"))
    assert source.class_names == ["10", "9", "B", "b", "b-a"]
    assert dict(zip(source.names, source.need_labels(), strict=True)) == {
        "10/x.png": 0,
        "9/x.png": 1,
        "B/x.png": 2,
        "b/deep/er/x.png": 3,
        "b-a/x.png": 4,
    }


def test_flat_folder_has_no_labels(tmp_path: Path) -> None:
    source = open_source(str(make_files(tmp_path, "2.png", "1.jpg")))
    assert (list(source.names), source.labels, source.class_names) == (["1.jpg", "2.png"], None, [])
    assert source.pixels(0, 16).shape == (16, 16, 3)
    with pytest.raises(DataError, match="has no classes") as caught:
        source.need_labels()
    assert (caught.value.exit_code, str(tmp_path) in caught.value.message) == (3, True)


def test_zip_equals_the_folder_it_was_made_of(image_folder: Path, image_zip: Path) -> None:
    folder, packed = open_source(str(image_folder)), open_source(str(image_zip))
    assert isinstance(packed, ZipSource)
    assert (list(packed.names), packed.need_labels()) == (list(folder.names), folder.need_labels())
    assert (packed.class_names, packed.digest()) == (folder.class_names, folder.digest())
    for index in range(len(folder)):
        assert np.array_equal(packed.pixels(index, 16), folder.pixels(index, 16))


def test_zip_survives_pickling(image_zip: Path) -> None:
    source = open_source(str(image_zip))
    first = source.pixels(0, 16)  # the file is open now
    copy: ImageSource = pickle.loads(pickle.dumps(source))
    assert np.array_equal(copy.pixels(0, 16), first)
    assert copy.digest() == source.digest()


def test_forked_workers_read_a_zip_at_the_same_time(image_zip: Path) -> None:
    """Processes that share one open file share its position, and read each other's bytes."""
    source = open_source(str(image_zip))
    sizes = [source.open(i).size for i in range(len(source))]
    fork = multiprocessing.get_context("fork")
    answers = fork.SimpleQueue()

    def read() -> None:
        try:
            answers.put(all(source.open(i).size == size for _ in range(60) for i, size in enumerate(sizes)))
        except Exception as error:
            answers.put(repr(error))

    workers = [fork.Process(target=read) for _ in range(3)]
    for worker in workers:
        worker.start()
    assert [answers.get() for _ in workers] == [True] * 3
    for worker in workers:
        worker.join()


def test_digest_follows_names_and_labels(tmp_path: Path) -> None:
    source = open_source(str(make_files(tmp_path / "one", "a/1.png", "b/2.png")))
    renamed = open_source(str(make_files(tmp_path / "two", "a/1.png", "b/3.png")))
    moved = open_source(str(make_files(tmp_path / "three", "a/1.png", "c/2.png")))
    assert source.digest() == open_source(source.spec).digest()
    assert len({source.digest(), renamed.digest(), moved.digest()}) == 3


def test_digits_are_1500_and_297_disjoint_and_stratified() -> None:
    train, heldout = open_source("digits:train"), open_source("digits:heldout")
    assert (len(train), len(heldout)) == (1500, 297)
    rows = [int(name.rsplit("/", 1)[1]) for source in (train, heldout) for name in source.names]
    assert sorted(rows) == list(range(1797))
    for label in range(10):
        here, there = list(train.need_labels()).count(label), list(heldout.need_labels()).count(label)
        assert abs(there - (here + there) * 297 / 1797) < 1


def test_digits_are_the_same_scans_everywhere() -> None:
    from sklearn.datasets import load_digits

    scans, targets = load_digits().images, load_digits().target
    heldout = open_source("digits:heldout")
    assert list(heldout.names[:3]) == ["heldout/1/0021", "heldout/4/0024", "heldout/8/0028"]
    row = int(heldout.names[5].rsplit("/", 1)[1])
    assert (heldout.need_labels()[5], heldout.class_names) == (targets[row], [str(d) for d in range(10)])
    pixels = heldout.pixels(5, 16)
    assert pixels.shape == (16, 16, 3)
    assert np.array_equal(pixels[..., 0], pixels[..., 2])
    halved = pixels[..., 0].astype(float).reshape(8, 2, 8, 2).mean((1, 3))
    assert np.corrcoef(halved.ravel(), scans[row].ravel())[0, 1] > 0.98


def test_digits_alone_means_the_training_part() -> None:
    plain, train = open_source("digits"), open_source("digits:train")
    assert isinstance(plain, DigitsSource)
    assert (plain.spec, plain.digest()) == ("digits:train", train.digest())


def test_a_folder_called_digits_is_reached_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_files(tmp_path / "digits", "a/1.png")
    monkeypatch.chdir(tmp_path)
    assert len(open_source("./digits")) == 1
    assert len(open_source("digits")) == 1500


def test_hidden_files_and_other_files_are_ignored(tmp_path: Path) -> None:
    make_files(tmp_path, "a/1.png", "b/2.JPEG", ".hidden/3.png", "a/.4.png", "__MACOSX/a/1.png", "b/.cache/5.png")
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    (tmp_path / "README.md").write_text("not an image")
    source = open_source(str(tmp_path))
    assert (list(source.names), source.class_names) == (["a/1.png", "b/2.JPEG"], ["a", "b"])


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda root: root / "nothing", UsageError, "does not exist"),
        (lambda root: make_files(root / "empty", "notes/.hidden.png"), DataError, "holds no images"),
        (lambda root: make_files(root / "mixed", "a/1.png", "loose.png"), DataError, "mixes .* 'loose.png'"),
        (lambda root: make_zip(root / "empty.zip", "a/readme.txt"), DataError, "holds no images"),
        (lambda root: make_zip(root / "mixed.zip", "a/1.png", "loose.png"), DataError, "mixes .* 'loose.png'"),
        (lambda root: make_zip(root / "up.zip", "a/1.png", "../b/2.png"), DataError, r"'\.\./b/2\.png' points outside"),
        (lambda root: make_zip(root / "in.zip", "a/1.png", "a/../../2.png"), DataError, "points outside"),
        (lambda root: make_zip(root / "root.zip", "/etc/2.png"), DataError, "'/etc/2.png' points outside"),
        (
            lambda root: make_zip(root / "cut.zip", "a/1.png").rename(root / "images.tar"),
            DataError,
            "cannot be read as a tar",
        ),
        (lambda root: Path("digits:test"), UsageError, "no part 'test' of digits"),
    ],
)
def test_what_is_no_source_is_refused(
    tmp_path: Path, make: Callable[[Path], Path], error: type[RdpmError], text: str
) -> None:
    with pytest.raises(error, match=text) as caught:
        open_source(str(make(tmp_path)))
    assert type(caught.value) is error
    assert caught.value.exit_code == (2 if error is UsageError else 3)
    assert caught.value.hint


def test_half_a_zip_is_refused(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "cut.zip", "a/1.png")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"cut\.zip cannot be read as a zip"):
        open_source(str(path))


def test_builtin_names() -> None:
    assert [sources.is_builtin(spec) for spec in ("digits", "digits:train", "./digits", "digits.zip")] == [
        True,
        True,
        False,
        False,
    ]


def test_real_imagenet_photographs_are_cropped_as_by_adm() -> None:
    source = open_source(real("imagenet-50"))
    assert (len(source), len(source.class_names), source.need_labels()) == (50, 50, list(range(50)))
    for index in (0, 17, 49):
        assert np.array_equal(source.pixels(index, 256), adm_center_crop_arr(source.image(index), 256))


def test_real_cifar10_zip_is_read_in_place() -> None:
    source = open_source(real("cifar10-train.zip"))
    assert np.bincount(source.need_labels()).tolist() == [5000] * 10
    assert source.class_names[0] == "airplane"
    for index in (0, 49_999):
        assert source.image(index).size == (32, 32)
        assert np.array_equal(source.pixels(index, 32), np.asarray(source.image(index)))


# ---- the same images in every packing ----------------------------------------------------------------------------


def as_zip(path: Path, members: Mapping[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


@pytest.fixture
def packings(image_folder: Path, tmp_path: Path) -> dict[type[ImageSource], list[Path]]:
    """Four images of each of three classes, packed in every way that is read."""
    chosen = {p.relative_to(image_folder).as_posix(): p.read_bytes() for p in sorted(image_folder.glob("?/0[2-5].*"))}
    labels = ["abc".index(name[0]) for name in chosen]
    classes = {"classes.txt": b"a\nb\nc\n"}
    moved = {f"00000/img{i:08d}{Path(name).suffix}": raw for i, (name, raw) in enumerate(chosen.items())}
    note = json.dumps({"labels": list(map(list, zip(moved, labels, strict=True)))}).encode()
    packed = {**moved, "dataset.json": note, **classes}
    for name, raw in [*((f"folder/{n}", r) for n, r in chosen.items()), *((f"edm/{n}", r) for n, r in moved.items())]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(raw)
    (tmp_path / "edm" / "dataset.json").write_bytes(note)
    for folder in ("edm", "tars", "json", "parquet"):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "classes.txt").write_bytes(classes["classes.txt"])
    rows = list(zip(chosen, chosen.values(), labels, strict=True))
    for shard in range(3):
        cls: dict[str, bytes] = {}
        js: dict[str, bytes] = {}
        for place, (name, raw, label) in enumerate(rows[shard * 4 : shard * 4 + 4]):
            kind = Path(name).suffix
            cls |= {f"{place:04d}{kind}": raw, f"{place:04d}.cls": str(label).encode()}
            js |= {f"./x/{place}.json": json.dumps({"label": label, "name": name}).encode(), f"./x/{place}{kind}": raw}
        make_tar(tmp_path / "tars" / f"train-{shard:04d}.tar", cls)
        make_tar(tmp_path / "json" / f"{shard}.tar", js)
        part = rows[shard * 4 : shard * 4 + 4]
        path = tmp_path / "parquet" / "data" / f"train-{shard:05d}-of-00003.parquet"
        write_parquet(path, [raw for _, raw, _ in part], [label for *_, label in part], list("abc"), group=3)
    return {
        FolderSource: [tmp_path / "folder", tmp_path / "edm"],
        ZipSource: [
            as_zip(tmp_path / "folders.zip", chosen),
            as_zip(tmp_path / "edm.zip", packed),
            as_zip(tmp_path / "wrapped.zip", {f"set/{name}": raw for name, raw in packed.items()}),
        ],
        TarSource: [
            tmp_path / "tars",
            tmp_path / "tars" / "train-{0000..0002}.tar",
            tmp_path / "tars" / "train-*.tar",
            tmp_path / "json" / "{0,1,2}.tar",
            make_tar(tmp_path / "plain" / "folders.tar", chosen),
        ],
        ParquetSource: [tmp_path / "parquet", tmp_path / "parquet" / "data" / "train-*.parquet"],
    }  # fmt: skip


def test_the_same_images_are_the_same_however_packed(packings: dict[type[ImageSource], list[Path]]) -> None:
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
            assert sources.is_there(source.spec)


def test_forked_workers_read_every_packing_at_the_same_time(packings: dict[type[ImageSource], list[Path]]) -> None:
    opened = [open_source(str(paths[0])) for paths in packings.values()]
    sizes = [[source.image(i).size for i in range(12)] for source in opened]  # everything is open now
    fork = multiprocessing.get_context("fork")
    answers = fork.SimpleQueue()

    def read(first: int) -> None:
        order = [(first + 5 * i) % 12 for i in range(36)]
        answers.put(
            [[s.image(i).size for i in order] == [z[i] for i in order] for s, z in zip(opened, sizes, strict=True)]
        )

    workers = [fork.Process(target=read, args=(first,)) for first in range(3)]
    for worker in workers:
        worker.start()
    assert [answers.get() for _ in workers] == [[True] * 4] * 3
    for worker in workers:
        worker.join()


def test_the_digest_is_of_names_and_labels_alone(tmp_path: Path) -> None:
    make_files(tmp_path / "x", "b/2.png", "a/1.png")
    make_zip(tmp_path / "x.zip", "b/2.png", "a/1.png")
    wanted = files.digest({"names": ["a/1.png", "b/2.png"], "labels": [0, 1]})
    assert {open_source(str(tmp_path / name)).digest() for name in ("x", "x.zip")} == {wanted}
    digest = "97dbad725a1d7f5e"
    assert open_source("digits").digest().startswith(digest), "stores of the digits would be refused"


# ---- links --------------------------------------------------------------------------------------------------------


def test_links_inside_the_root_are_followed(tmp_path: Path) -> None:
    root = make_files(tmp_path / "root", ".kept/c/3.png", "a/1.png", "b/2.png")
    (root / "c").symlink_to(root / ".kept" / "c")
    (root / "a" / "again.png").symlink_to("../b/2.png")
    (root / "a" / "up").symlink_to(root)
    (root / "also-b").symlink_to("b")  # named already
    (tmp_path / "link").symlink_to(root)
    for path in (root, tmp_path / "link"):
        source = open_source(str(path))
        assert list(source.names) == ["a/1.png", "a/again.png", "b/2.png", "c/3.png"]
        assert source.class_names == ["a", "b", "c"]
        assert source.pixels(3, 16).shape == (16, 16, 3)


@pytest.mark.parametrize("target", ["out/1.png", "out", "nothing.png"])
def test_a_link_out_of_the_root_is_refused(tmp_path: Path, target: str) -> None:
    root = make_files(tmp_path / "root", "a/1.png")
    make_files(tmp_path / "out", "1.png")
    make_files(tmp_path / "root-2", "1.png")
    name = root / "a" / f"link{Path(target).suffix}"
    name.symlink_to(tmp_path / target)
    with pytest.raises(DataError, match=r"a/link.* is a link out of the folder") as caught:
        open_source(str(root))
    assert str(tmp_path / target) in caught.value.message
    name.unlink()
    (root / "a" / "notes.txt").symlink_to("/etc/hostname")
    assert len(open_source(str(root))) == 1


# ---- class names and labels ---------------------------------------------------------------------------------------


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
    ("content", "text"),
    [
        (b"a\n", "1 lines for 2 class folders and lacks b"),
        (b"a\nc\n", "lacks b"),
        (b"x\ny\nz\n", "3 lines for 2 class folders"),
        (b"x\n\ny\n", "line 2 of classes.txt names no class"),
        (b"", "names no class"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_classes_txt_that_does_not_fit_is_refused(tmp_path: Path, content: bytes, text: str) -> None:
    root = make_files(tmp_path, "a/1.png", "b/2.png")
    (root / "classes.txt").write_bytes(content)
    with pytest.raises(DataError, match=text):
        open_source(str(root))


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        ([["a/1.png", 0]], r"1 of 2 images have no label, such as 'b/2\.png'"),
        ([["a/1.png", 0], ["b/2.png", 1.5]], "has the label 1.5"),
        ([["a/1.png", 0], ["b/2.png", -1]], "has the label -1"),
        ([["a/1.png", 0], ["b/2.png", True]], "has the label True"),
        ([["a/1.png", 0], ["b/2.png", 10**9]], "which is not one of 0"),
        ([["a/1.png"]], "is not EDM's"),
        (7, "is not EDM's"),
    ],
)
def test_edm_labels_that_do_not_fit_are_refused(tmp_path: Path, labels: object, text: str) -> None:
    make_files(tmp_path, "a/1.png", "b/2.png")
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}))
    with pytest.raises(DataError, match=text):
        open_source(str(tmp_path))


def test_edm_without_labels_and_another_dataset_json(tmp_path: Path) -> None:
    make_files(tmp_path, "00000/1.png", "00001/2.png")
    note = tmp_path / "dataset.json"
    note.write_text('{"labels": null}')
    assert (open_source(str(tmp_path)).labels, open_source(str(tmp_path)).class_names) == (None, [])
    note.write_text('{"labels": [["00000/1.png", 4], ["00001/2.png", 0], ["gone.png", 9]]}')
    assert open_source(str(tmp_path)).labels == [4, 0]
    assert open_source(str(tmp_path)).class_names == ["0", "1", "2", "3", "4"]
    note.write_text('{"name": "not of EDM"}')
    assert open_source(str(tmp_path)).class_names == ["00000", "00001"]


# ---- several files by one name ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "error", "text"),
    [
        ("x-{0..3}.tar", UsageError, r"x-2\.tar does not exist"),
        ("y-*.tar", UsageError, "does not exist"),
        ("x-{3..1}.tar", UsageError, "no list of files"),
        ("x-{}.tar", UsageError, "no list of files"),
        ("x-{0..9999999}.tar", UsageError, "no list of files"),
        ("{0..999}{0..999}.tar", UsageError, "more than 100,000 files"),
        ("*.txt", DataError, "not a folder, .zip, .tar or .parquet"),
        ("x-{0.tar,0.txt}", DataError, r"x-0\.txt is not a folder"),
        ("x-0.{tar,parquet}", DataError, r"names both \.tar and \.parquet"),
        ("x.tar.gz", DataError, "is compressed"),
        ("z", DataError, r"z\.tgz is compressed"),
    ],
)
def test_patterns_that_name_no_shards(tmp_path: Path, pattern: str, error: type[RdpmError], text: str) -> None:
    for name in ("x-0.tar", "x-1.tar", "x-3.tar", "x-0.txt", "x-0.parquet", "x.tar.gz", "z/z.tgz"):
        make_tar(tmp_path / name, {})
    with pytest.raises(error, match=text):
        open_source(str(tmp_path / pattern))
    assert not sources.is_there(str(tmp_path / "x-{0..3}.tar"))


def test_a_folder_of_shards_is_one_set_of_images(tmp_path: Path, image_folder: Path) -> None:
    sample = {"0.png": (image_folder / "a" / "00.png").read_bytes(), "0.cls": b"0"}
    for name in ("data/train-0000.tar", "data/train-0001.tar", "data/val-0000.tar"):
        make_tar(tmp_path / "tars" / name, sample)
    with pytest.raises(DataError, match=r"holds data splits \(train, val\)") as caught:
        open_source(str(tmp_path / "tars"))
    assert "data/val*.tar" in caught.value.hint
    assert len(open_source(str(tmp_path / "tars" / "data" / "train*.tar"))) == 2
    (tmp_path / "tars" / "data" / "val-0000.tar").unlink()
    assert open_source(str(tmp_path / "tars")).names == ["train-0000.tar/0.png", "train-0001.tar/0.png"]
    write_parquet(tmp_path / "tars" / "0.parquet", [sample["0.png"]], [0])
    with pytest.raises(DataError, match=r"both \.parquet and \.tar"):
        open_source(str(tmp_path / "tars"))


@pytest.mark.parametrize("image", ["preview.png", "a/1.png", "assets/logo.png"])
@pytest.mark.parametrize("shard", ["0.tar", "data/0.tar"])
def test_a_folder_of_images_and_of_shards_is_refused(tmp_path: Path, image: str, shard: str) -> None:
    """Neither is passed over silently: a picture in a data set's repository would stand for all of its shards."""
    make_files(tmp_path, image)
    (tmp_path / shard).parent.mkdir(exist_ok=True)
    make_tar(tmp_path / shard, {})
    with pytest.raises(DataError, match=rf"holds 1 images such as '{image}' and 1 shards such as '{shard}'") as caught:
        open_source(str(tmp_path))
    assert f"'{(tmp_path / shard).parent}/*.tar'" in caught.value.hint


@pytest.mark.parametrize("wrapper", ["", "set/"])
def test_a_class_folder_without_images_is_refused_unless_the_classes_are_listed(tmp_path: Path, wrapper: str) -> None:
    """It would move the labels of the classes after it, so that two splits disagree; torchvision refuses it too."""
    make_files(tmp_path, f"{wrapper}a/1.png", f"{wrapper}c/2.png")
    (tmp_path / wrapper / "b").mkdir()
    (tmp_path / wrapper / ".hidden").mkdir()
    with pytest.raises(DataError, match="b is a class folder without images"):
        open_source(str(tmp_path))
    (tmp_path / wrapper / "classes.txt").write_text("a\nb\nc\n")
    source = open_source(str(tmp_path))
    assert (source.labels, source.class_names) == ([0, 2], ["a", "b", "c"])


def test_what_is_no_regular_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    make_files(tmp_path, "a/1.png")
    os.mkfifo(tmp_path / "a" / "2.png")
    with pytest.raises(DataError, match=r"a/2\.png is no file"):
        open_source(str(tmp_path))
    (tmp_path / "a" / "2.png").unlink()
    (tmp_path / "a" / "2.png").symlink_to("gone.png")
    with pytest.raises(DataError, match=r"a/2\.png is no file, or a link to none"):
        open_source(str(tmp_path))


def test_a_member_that_a_zip_holds_twice_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a/1.png", b"x")
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a/1.png", b"x")
    with pytest.raises(DataError, match=r"holds 'a/1\.png' twice"):
        open_source(str(tmp_path / "x.zip"))


# ---- damaged ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [ZipSource, TarSource, ParquetSource])
def test_a_damaged_archive_is_refused_or_its_images_are_named(
    packings: dict[type[ImageSource], list[Path]], tmp_path: Path, kind: type[ImageSource]
) -> None:
    first = packings[kind][0]
    whole = first if first.is_file() else min(p for p in first.rglob("*") if p.suffix in (".tar", ".parquet"))
    raw, path = whole.read_bytes(), tmp_path / f"damaged{whole.suffix}"
    random = np.random.default_rng(0)
    refused = named = 0
    for trial in range(150):
        damaged = bytearray(raw)
        for place in random.integers(max(0, len(raw) - 900) if trial % 2 else 0, len(raw), 1 + trial % 4):
            damaged[place] = random.integers(256)
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

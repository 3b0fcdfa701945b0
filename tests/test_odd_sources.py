"""The same odd files in folders, zips, tars, parquet and lists: the same items and labels, or one error that names
the first offending member."""

import json
import os
import shlex
import shutil
import unicodedata
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pictures import encoded, make_files, make_tar, random_image
from pyarrow import parquet
from stores import Making
from stores import encoded as encoded_indices

from rdpm_cli.cli.app import run
from rdpm_cli.codes.store import CodeStore
from rdpm_cli.data.folder import claim, finish
from rdpm_cli.data.labels import parse_classes
from rdpm_cli.data.open import open_source
from rdpm_cli.data.source import Source
from rdpm_cli.errors import DataError, UsageError

PNG = encoded(random_image(8, 8))
COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))


def pack(kind: str, root: Path, members: Mapping[str, bytes]) -> str:
    """A folder, zip or tar of these members, in a new folder."""
    root = root / kind
    if kind == "tar":
        return str(make_tar(root / "x.tar", members))
    root.mkdir()
    if kind == "zip":
        with zipfile.ZipFile(root / "x.zip", "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        return str(root / "x.zip")
    for name, content in members.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return str(root)


def items(source: Source) -> dict[str, str | None]:
    """Name -> class, without the name of the shard."""
    labels = [None] * len(source) if source.labels is None else [source.class_names[label] for label in source.labels]
    return {name.removeprefix("x.tar/"): label for name, label in zip(source.names, labels, strict=True)}


@dataclass(frozen=True)
class Case:
    """members: names, and contents where they are no images. items: name -> class; or error: in its message."""

    members: Mapping[str, bytes | str | None]
    items: Mapping[str, str | None] = field(default_factory=dict)
    error: str = ""
    not_taken: Mapping[str, int] = field(default_factory=dict)
    warning: str = ""
    kinds: tuple[str, ...] = ("folder", "zip", "tar")


def images(*names: str) -> dict[str, bytes | str | None]:
    return dict.fromkeys(names)


ARCHIVES = ("zip", "tar")
TABLE = "\ufefffile_name,text,label\r\n" + f'{COMPOSED}.png,"two\nlines, quoted",cat\r\n./a.png,,dog\r\n'
ROWS = f'\n{{"file_name": "{COMPOSED}.png", "label": "cat"}}\n\n{{"file_name": "a.png", "label": "dog"}}\n'
LISTED = json.dumps({"labels": [[f"{COMPOSED}.png", "cat"], ["./a.png", "dog"]]})
ACCENTS = images("a.png", f"{DECOMPOSED}.png")
CAT_DOG = {"a.png": "dog", f"{DECOMPOSED}.png": "cat"}

CASES = {
    "suffixes in any case, or none": Case(
        images("a/1.JPG", "a/2.jfif", "a/3.jpe", "b/4")
        | dict.fromkeys(("b/notes", "b/5.heic", "b/6.txt", "b/7."), ""),
        {"a/1.JPG": "a", "a/2.jfif": "a", "a/3.jpe": "a", "b/4": "b"},
        not_taken={".": 1, ".heic": 1, ".txt": 1, "no suffix": 1},
    ),
    "hidden files": Case(
        images("a/1.png", "a/._1.png", "__MACOSX/a/1.png", ".git/x.png") | {".DS_Store": "x"}, {"a/1.png": "a"}
    ),
    "dots in names": Case(images("v1.0/c.v2.png", "v1.1/d.3.png"), {"v1.0/c.v2.png": "v1.0", "v1.1/d.3.png": "v1.1"}),
    "accents, a byte order mark and CRLF in classes.txt": Case(
        images("a/1.png", f"{DECOMPOSED}/2.png") | {"Classes.TXT": f"\ufeff{COMPOSED}\r\na\r\n"},
        {"a/1.png": "a", f"{DECOMPOSED}/2.png": COMPOSED},
    ),
    "accents in dataset.json": Case(ACCENTS | {"Dataset.json": LISTED}, CAT_DOG),
    "accents in metadata.csv": Case(ACCENTS | {"METADATA.csv": TABLE}, CAT_DOG),
    "accents in metadata.jsonl": Case(ACCENTS | {"metadata.jsonl": ROWS}, CAT_DOG),
    "one class in two normal forms": Case(images(f"{COMPOSED}/1.png", f"{DECOMPOSED}/2.png"), error=f"'{COMPOSED}'"),
    "numbers as class folders": Case(
        images("0/x.png", "1/x.png", "10/x.png", "2/x.png"),
        {"0/x.png": "0", "1/x.png": "1", "10/x.png": "10", "2/x.png": "2"}, warning="10",
    ),
    "a class of unreadable kinds": Case(images("a/1.png", "c/1.png") | {"b/1.heic": ""}, error="b is a class"),
    "no images": Case({"a/1.heic": "", "b/2.heic": "", "b/x.txt": ""}, error=".heic 2, .txt 1"),
    "Kaggle's splits": Case(images("train/a/1.png", "val/2.png", "test/3.png"), error="test, train, val"),
    "mnist_png's splits": Case(images("x/training/0/1.png", "x/testing/0/2.png"), error="testing, training"),
    "splits beside another folder": Case(images("train/a/1.png", "val/a/1.png", "figures/1.png"), error="train, val"),
    "splits with the set's name": Case(
        images("seg_train/seg_train/a/1.png", "seg_test/seg_test/a/2.png"), error="seg_test, seg_train"
    ),
    "classes that end like splits": Case(
        images("bullet_train/1.png", "steam_train/2.png"),
        {"bullet_train/1.png": "bullet_train", "steam_train/2.png": "steam_train"},
    ),
    "a split without classes": Case(images("train/1.png", "train/2.png"), error="train"),
    "a single split of classes": Case(images("train/a/1.png", "train/b/1.png"), {f"train/{c}/1.png": c for c in "ab"}),
    "a class named test": Case(images("a/1.png", "test/2.png"), {"a/1.png": "a", "test/2.png": "test"}),
    "a table in each split": Case(
        images("train/1.png", "test/2.png")
        | {"train/metadata.csv": "file_name,label\n1.png,a\n", "test/metadata.csv": "file_name,label\n2.png,b\n"},
        error="test, train",
    ),
    "a table in a folder": Case(
        images("x/1.png", "x/2.png") | {"x/metadata.csv": "file_name,label\n./2.png,a\nx/../1.png,b\n"},
        {"x/1.png": "b", "x/2.png": "a"},
    ),
    "a table of other folders": Case(
        images("1.png", "2.png") | {"metadata.csv": "file_name,label\n../1.png,a\n2.png,b\n"}, error="1.png"
    ),
    "a table without labels": Case(
        images("a/1.png", "b/2.png") | {"metadata.csv": "file_name,text\na/1.png,hello\n"},
        {"a/1.png": "a", "b/2.png": "b"}, warning="file_name, text",
    ),
    "tables that disagree": Case(
        images("a.png") | {"metadata.csv": "file_name,label\na.png,a\n", "metadata.jsonl": ROWS}, error="a.png' has"
    ),
    "a table in Latin-1": Case(images("1.png") | {"metadata.csv": b"file_name,label\n1.png,\xe9"}, error=".csv"),
    "backslashes": Case(images("a\\1.png", "b\\2.png"), {"a/1.png": "a", "b/2.png": "b"}, kinds=ARCHIVES),
    "paths in other words": Case(
        images("./a/1.png", "/b//2.png", "c/./3.png"), {"a/1.png": "a", "b/2.png": "b", "c/3.png": "c"}, kinds=ARCHIVES
    ),
    "two files of one name": Case(images("a/1.png", "./a/1.png"), error="a/1.png", kinds=ARCHIVES),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "title"), [(kind, title) for title, case in CASES.items() for kind in case.kinds])
def test_odd_files_are_the_same_in_every_packing(
    kind: str, title: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = CASES[title]
    contents = {name: PNG if value is None else value for name, value in case.members.items()}
    spec = pack(kind, tmp_path, {name: v.encode() if isinstance(v, str) else v for name, v in contents.items()})
    if case.error:
        with pytest.raises(DataError) as caught:
            open_source(spec)
        assert case.error in caught.value.message
        assert caught.value.hint
        return
    source = open_source(spec)
    assert items(source) == case.items
    assert {kind: n for kind, n in source.not_taken.items() if kind != "hidden"} == case.not_taken
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == bool(case.warning) + bool(case.not_taken)
    assert case.warning in "".join(warnings)
    assert all(f"{kind} {n}" in warnings[-1] for kind, n in case.not_taken.items())
    assert [source.pixels(index, 8).shape for index in range(len(source))] == [(8, 8, 3)] * len(source)


def test_a_class_folder_named_by_a_number_is_asked_for_by_its_name(tmp_path: Path) -> None:
    source = open_source(pack("folder", tmp_path, {f"{name}/x.png": PNG for name in (0, 1, 2, 10)}))
    assert source.class_names == ["0", "1", "10", "2"]
    assert parse_classes("name:2,2", source.class_names) == [3, 2]


# ---- labels that the data records ----------------------------------------------------------------------------------

LABELS: dict[str, tuple[list[Any], list[int] | str | None, list[str]]] = {  # values -> labels or the error, and names
    "numbers": ([2, 0, 2], [2, 0, 2], ["0", "1", "2"]),
    "digits in text": (["2", " 0", "10"], [2, 0, 10], [str(number) for number in range(11)]),
    "whole numbers as pandas writes them": ([2.0, 0.0, 10.0], [2, 0, 10], [str(number) for number in range(11)]),
    "names": (["dog", "cat", "dog "], [1, 0, 1], ["cat", "dog"]),
    "accents in names": ([COMPOSED, "z", DECOMPOSED], [1, 0, 1], ["z", COMPOSED]),
    "none": ([None, None, None], None, []),
    "-1 for all": ([-1, -1, -1], None, []),
    "a label missing": ([1, None, 0], "1.png", []),
    "a name missing": (["cat", "", "dog"], "1.png", []),
    "-1 for one": ([0, -1, 1], "1.png", []),
    "an identity": ([0, 1, 10**9], "2.png", []),
    "an endless number": (["0", "1", "9" * 5000], "2.png", []),
    "a fraction": ([0, 1, 0.5], "2.png", []),
    "a truth value": ([True, False, True], "0.png", []),
    "a list": ([[0], [1], [0]], "0.png", []),
}
CARRIERS = ("dataset.json", "metadata.jsonl", "metadata.csv", "zip", "tar of .cls", "tar of .json", "parquet")


def carry(carrier: str, root: Path, values: list[Any]) -> str:
    """Three images and their labels as the carrier records them."""
    pictures = {f"{index}.png": PNG for index in range(3)}
    texts = ["" if value is None else str(value) for value in values]
    rows = [{"file_name": name, "label": value} for name, value in zip(pictures, values, strict=True)]
    notes = {
        "dataset.json": json.dumps({"labels": [list(pair) for pair in zip(pictures, values, strict=True)]}),
        "metadata.jsonl": "\n".join(map(json.dumps, rows)),
        "metadata.csv": "file_name,label\n" + "".join(f'{n},"{v}"\n' for n, v in zip(pictures, texts, strict=True)),
    }  # fmt: skip
    if carrier in notes:
        return pack("folder", root, pictures | {carrier: notes[carrier].encode()})
    if carrier == "zip":
        return pack("zip", root, pictures | {"dataset.json": notes["dataset.json"].encode()})
    if carrier == "tar of .cls":
        return pack("tar", root, pictures | {f"{i}.cls": text.encode() for i, text in enumerate(texts)})
    if carrier == "tar of .json":
        return pack(
            "tar", root, pictures | {f"{i}.json": json.dumps({"label": v}).encode() for i, v in enumerate(values)}
        )
    column = pyarrow.array(texts if any(isinstance(value, str) for value in values) else values)
    parquet.write_table(pyarrow.table({"image": [PNG] * 3, "label": column}), root / "x.parquet")
    return str(root / "x.parquet")


@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize("title", LABELS)
def test_recorded_labels_are_the_same_wherever_they_are_recorded(carrier: str, title: str, tmp_path: Path) -> None:
    values, labels, names = LABELS[title]
    if title in ("a truth value", "a list") and carrier in ("metadata.csv", "tar of .cls"):
        pytest.skip("in a text these are names")
    spec = carry(carrier, tmp_path, values)
    if isinstance(labels, str):
        with pytest.raises(DataError) as caught:
            open_source(spec)
        assert labels.replace(".png", "" if carrier == "parquet" else ".png") in caught.value.message
        return
    source = open_source(spec)
    assert (source.labels, source.class_names) == (labels, names)


@pytest.mark.parametrize("carrier", CARRIERS)
def test_classes_txt_numbers_the_names_that_the_data_records(carrier: str, tmp_path: Path) -> None:
    cases: dict[str, list[Any]] = {"names": ["dog", "ant", "dog"], "numbers": [2, 0, 2]}
    for title, values in cases.items():
        (tmp_path / title).mkdir()
        path = Path(carry(carrier, tmp_path / title, values))
        if path.suffix == ".zip":
            with zipfile.ZipFile(path, "a") as archive:
                archive.writestr("classes.txt", "ant\ncat\ndog\n")
        else:
            (path if path.is_dir() else path.parent).joinpath("classes.txt").write_text("ant\ncat\ndog\n")
        source = open_source(str(path))
        assert (source.labels, source.class_names) == ([2, 0, 2], ["ant", "cat", "dog"])


# ---- links, and folders of several kinds ---------------------------------------------------------------------------


def test_a_missing_target_is_named_and_a_pipe_is_no_image(tmp_path: Path) -> None:
    root = Path(pack("folder", tmp_path, {"a/1.png": PNG, "b/2.png": PNG}))
    os.mkfifo(root / "pipe")
    (root / "a" / "pipe").symlink_to(root / "pipe")
    source = open_source(str(root))
    assert (len(source), source.not_taken) == (2, {"no suffix": 2})
    for name in ("c", "classes.txt"):
        (root / name).symlink_to(tmp_path / "gone")
        with pytest.raises(DataError, match=f"{root / name} "):
            open_source(str(root))
        (root / name).unlink()
    os.mkfifo(tmp_path / "x.tar")
    with pytest.raises(DataError, match=r"x\.tar"):
        open_source(str(tmp_path / "x.tar"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_this_user_may_not_read_is_named(tmp_path: Path) -> None:
    root = Path(pack("folder", tmp_path, {"a/1.png": PNG, "b/2.png": PNG}))
    (root / "b").chmod(0)
    with pytest.raises(DataError, match=str(root / "b")):
        open_source(str(root))


def test_files_beside_shards_are_counted(tmp_path: Path) -> None:
    make_tar(tmp_path / "0.tar", {"a/1.png": PNG})
    for name in ("1.tar.gz", "README", "classes.txt", ".hidden"):
        (tmp_path / name).write_text("a\n")
    assert open_source(str(tmp_path)).not_taken == {".gz": 1, "no suffix": 1}


@pytest.mark.parametrize("names", [("set-train-00.tar", "set-validation-00.tar"), ("train/0.tar", "test/0.tar")])
def test_shards_of_several_splits_are_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    for name in names:
        make_tar(tmp_path / name, {"0.png": PNG, "0.cls": b"0"})
    with pytest.raises(DataError, match="train") as caught:
        open_source(str(tmp_path))
    assert str(tmp_path) in caught.value.hint
    (tmp_path / names[1]).unlink()
    assert len(open_source(str(tmp_path))) == 1


def test_a_column_of_labels_is_that_of_a_table_or_refused(tmp_path: Path) -> None:
    files = {"a/1.png": PNG, "dataset.json": b'{"labels": [["a/1.png", 3]]}'}
    root = pack("folder", tmp_path, files)
    assert open_source(root).labels == [3]
    with pytest.raises(UsageError, match="kind"):
        open_source(root, label_column="kind")
    (Path(root) / "metadata.csv").write_text("file_name,kind,label\na/1.png,cat,dog\n")
    assert open_source(root, label_column="kind").class_names == ["cat"]
    with pytest.raises(DataError, match=r"typo.*file_name, kind, label"):
        open_source(root, label_column="typo")


def test_an_empty_name_is_not_the_working_folder(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(image_folder)
    for spec in ("", "x" * 5000, "images-{0..999999999}.tar"):
        with pytest.raises((DataError, UsageError)):
            open_source(spec)


# ---- what commands say ---------------------------------------------------------------------------------------------

Capture = pytest.CaptureFixture[str]


def test_what_rdpm_wrote_is_not_read_as_data(
    image_folder: Path, tmp_path: Path, tiny_tokenizer_file: Path, capsys: Capture
) -> None:
    """Reconstructions are images, so they are read, with a word; as a class among others, or a store, never."""
    use = ["--tokenizer", str(tiny_tokenizer_file), "--device", "cpu"]
    own = tmp_path / "own"
    shutil.copytree(image_folder, own)
    assert run(["reconstruct", str(own), str(own / "recon"), *use]) == 2
    assert str(own / "recon") in capsys.readouterr().err
    assert not (own / "recon").exists()
    recon, rows = tmp_path / "recon", [{"file": f"{index:06d}.png", "index": index, "label": 0} for index in range(4)]
    record = {"format": "rdpm-reconstructions", "made_from": {}, "options": {}, "samples": rows}
    claim(recon, record)
    make_files(recon, *(str(row["file"]) for row in rows), "previews/grid.png")
    finish(recon, record)
    assert run(["tokenize", str(own), str(tmp_path / "codes"), *use]) == 0
    capsys.readouterr()
    source = open_source(str(recon))
    assert (len(source), source.labels) == (4, None)  # without the grid
    assert f"warning: {recon}" in capsys.readouterr().err
    for part in (recon, tmp_path / "codes"):
        shutil.copytree(part, own / part.name)
        with zipfile.ZipFile(tmp_path / "own.zip", "w") as archive:
            for path in own.rglob("*.*"):
                archive.write(path, path.relative_to(own))
        for spec in (own, tmp_path / "own.zip"):
            with pytest.raises(DataError, match=f"{part.name}/run.json"):
                open_source(str(spec))
        shutil.rmtree(own / part.name)
    with pytest.raises(DataError, match=r"run\.json"):
        open_source(str(tmp_path / "codes"))
    (own / "run.json").write_text('{"name": "of another program"}')
    assert len(open_source(str(own))) == 36


def test_images_without_labels_are_tokenized_if_asked(
    tmp_path: Path, tiny_tokenizer_file: Path, capsys: Capture
) -> None:
    root = pack("folder", tmp_path, {f"{index}.png": PNG for index in range(4)})
    command = ["tokenize", root, str(tmp_path / "codes"), "--tokenizer", str(tiny_tokenizer_file), "--device", "cpu"]
    assert run(command) == 3
    assert "--unlabelled" in capsys.readouterr().err
    assert run([*command, "--unlabelled"]) == 0
    manifest = CodeStore(tmp_path / "codes").manifest
    assert (manifest.images, manifest.class_names) == (4, ("unlabelled",))


def test_an_unfinished_store_goes_on_with_the_same_images_elsewhere(
    image_folder: Path, tmp_path: Path, tiny_tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Making(tmp_path / "codes", open_source(str(image_folder)), tiny_tokenizer_file).cut(2)
    shutil.copytree(image_folder, tmp_path / "moved")
    moved = Making(tmp_path / "codes", open_source(str(tmp_path / "moved")), tiny_tokenizer_file)
    indices = encoded_indices(monkeypatch)
    assert moved.finish().manifest.images == 36
    assert 0 < len(indices) < 36
    (tmp_path / "moved" / "a" / "00.png").rename(tmp_path / "moved" / "a" / "000.png")
    renamed = Making(tmp_path / "codes", open_source(str(tmp_path / "moved")), tiny_tokenizer_file)
    with pytest.raises(UsageError, match="digest"):
        renamed.finish()


def test_a_folder_of_save_to_disk_is_named_with_the_line_that_converts_it(tmp_path: Path, capsys: Capture) -> None:
    root = tmp_path / "my data"
    for name in ("train/data-00000-of-00001.arrow", "train/state.json", "dataset_dict.json"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("{}")
    assert run(["inspect", str(root)]) == 3
    shown = capsys.readouterr().err
    assert "train/data-00000-of-00001.arrow" in shown
    line = shown.split("hint: convert them: ")[1].splitlines()[0]
    words = shlex.split(line)
    assert words[:2] == ["python", "-c"]
    assert f"load_from_disk({str(root / 'train')!r}).to_parquet(" in words[2]

"""Malicious files: pickles that would run code, archive members that point outside or unpack without end."""

import io
import pickle
import re
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import encoded, make_tar, make_zip, random_image
from processes import touch
from rows import Rows

from rdpm_cli.cli.app import run as run_cli
from rdpm_cli.data import archives
from rdpm_cli.data.open import open_source
from rdpm_cli.errors import DataError, ImageError

PNG = encoded(random_image(8, 8))
ESCAPES = "members of archives that point outside, refused"


class Trap:
    """Its pickle makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return touch, (str(self.path),)


# ---- pickles -------------------------------------------------------------------------------------------------------


def torch_file(folder: Path, trap: Trap) -> Path:
    path = folder / "tokenizer.pt"
    torch.save({"format": "rdpm-tokenizer", "weights": trap}, path)
    return path


def plain_pickle(folder: Path, trap: Trap) -> Path:
    path = folder / "weights.pth"
    path.write_bytes(pickle.dumps({"state_dict": trap}))
    return path


def store_of_objects(folder: Path, trap: Trap) -> Path:
    root = folder / "codes"
    np.save(root / "labels-00000.npy", np.array([trap], dtype=object), allow_pickle=True)
    return root


def images_of_objects(folder: Path, trap: Trap) -> Path:
    path = folder / "samples.npz"
    np.savez(path, arr_0=np.array([trap], dtype=object))
    return path


def checkpoint_folder(folder: Path, trap: Trap) -> Path:
    """The layout of torch.distributed.checkpoint: a pickled `.metadata` next to the shards."""
    root = folder / "dcp"
    root.mkdir()
    (root / ".metadata").write_bytes(pickle.dumps(trap))
    (root / "__0_0.distcp").write_bytes(pickle.dumps(trap))
    return root


def pickles_in_a_tar(folder: Path, trap: Trap) -> Path:
    members = {name: pickle.dumps(trap) for name in ("a.pyd", "a.pkl", "a.pickle", "a.pth", "a.npy", "a.cls")}
    return make_tar(folder / "x.tar", members | {"a.png": PNG})


TOKENIZE = "tokenize digits {out} --tokenizer {file} --device cpu"
SAMPLE = "sample --ckpt {file} --out {out}"
WARM = "train-tokenizer digits --recipe digits --from-weights {file} --out {out}"
FID = "eval fid digits:heldout --ref digits:train --resolution 16 --weights {file}"
TRAIN = "train-gen {file} --recipe digits --out {out} --device cpu"


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    ("kind", "make", "command"),
    [
        (".pt", torch_file, TOKENIZE),
        (".pt", torch_file, SAMPLE),
        (".pt", torch_file, "verify {file}"),
        (".pt", torch_file, "inspect {file}"),
        (".pth", plain_pickle, WARM),
        (".pth", plain_pickle, FID),
        ("npy of objects", store_of_objects, TRAIN),
        ("npy of objects", store_of_objects, "verify {file}"),
        ("npy of objects", images_of_objects, FID.replace("digits:heldout", "{file}").replace("--weights {file}", "")),
        ("folder like DCP's", checkpoint_folder, SAMPLE),
        ("folder like DCP's", checkpoint_folder, WARM),
        ("pickle in a tar", pickles_in_a_tar, "tokenize {file} {out} --tokenizer {tokenizer} --device cpu"),
    ],
)
def test_a_malicious_file_is_refused_and_does_nothing(
    kind: str, make: Callable[[Path, Trap], Path], command: str, tmp_path: Path, digits_codes: Path,
    tiny_tokenizer_file: Path, capsys: pytest.CaptureFixture[str], rows: Rows,
) -> None:  # fmt: skip
    sprung, out = tmp_path / "sprung", tmp_path / "out"
    if make is store_of_objects:
        shutil.copytree(digits_codes, tmp_path / "codes")
    file = make(tmp_path, Trap(sprung))
    with rows.count(f"malicious files refused: {kind}"):
        assert run_cli(command.format(file=file, out=out, tokenizer=tiny_tokenizer_file).split()) in (2, 3)
        shown = capsys.readouterr().err
        assert "rdpm: error: " in shown
        assert "Traceback" not in shown
        assert not sprung.exists()
        assert not out.exists()


def test_the_trap_works(tmp_path: Path) -> None:
    """Without it the tests above would show nothing."""
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung")))
    assert (tmp_path / "sprung").exists()


def test_pickles_next_to_the_images_of_a_tar_are_ignored(tmp_path: Path) -> None:
    trap = pickle.dumps(Trap(tmp_path / "sprung"))
    members = {"a.png": PNG, "a.cls": b"0", "a.pyd": trap, "a.pkl": trap, "a.pth": trap, "a.npy": trap}
    source = open_source(str(make_tar(tmp_path / "x.tar", members)))
    assert (len(source), source.pixels(0, 8).shape) == (1, (8, 8, 3))
    assert not (tmp_path / "sprung").exists()


# ---- archives ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "token"),
    [
        ("../a.png", tarfile.REGTYPE, r"\.\./a\.png"),
        ("d/../../a.png", tarfile.REGTYPE, "a.png"),
        ("/etc/a.png", tarfile.REGTYPE, "/etc/a.png"),
        ("a.png", tarfile.SYMTYPE, "a.png"),
        ("a.png", tarfile.LNKTYPE, "a.png"),
        ("folder", tarfile.SYMTYPE, "folder"),
        ("a.png", tarfile.FIFOTYPE, "a.png"),
        ("a.cls", tarfile.CHRTYPE, "a.cls"),
        ("a.png", tarfile.BLKTYPE, "a.png"),
    ],
)
def test_a_member_of_a_tar_that_points_outside_is_refused(
    tmp_path: Path, name: str, kind: bytes, token: str, rows: Rows
) -> None:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/hostname"
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        good = tarfile.TarInfo("good.png")
        good.size = len(PNG)
        tar.addfile(good, io.BytesIO(PNG))
        tar.addfile(info)
    with rows.count(ESCAPES), pytest.raises(DataError, match=token):
        open_source(str(tmp_path / "x.tar"))


def test_a_link_in_a_zip_is_refused(tmp_path: Path, rows: Rows) -> None:
    path = make_zip(tmp_path / "x.zip", "a/1.png")
    link = zipfile.ZipInfo("a/2.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(link, "/etc/hostname")
    with rows.count(ESCAPES), pytest.raises(DataError, match=r"a/2\.png"):
        open_source(str(path))


@pytest.mark.parametrize("name", ["..\\2.png", "C:\\2.png", "../notes.txt", "a/b/../../../x.png", "/etc/2.png"])
def test_a_member_of_a_zip_that_climbs_out_is_refused(tmp_path: Path, name: str, rows: Rows) -> None:
    with rows.count(ESCAPES), pytest.raises(DataError, match=re.escape(name)):
        open_source(str(make_zip(tmp_path / "x.zip", "a/1.png", name)))


def test_a_member_of_a_zip_is_never_unpacked_beyond_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: Rows
) -> None:
    """A megabyte of zeros, compressed a thousandfold: above the limit of an image's file it is not unpacked at all."""
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/1.bmp", bytes(1 << 20))
    assert archives.LARGEST == 1 << 30
    monkeypatch.setattr(archives, "LARGEST", 1 << 19)
    beyond = pytest.raises(ImageError, match="1,048,576")
    with rows.count("members that unpack beyond the limit of an image's file, refused"), beyond:
        open_source(str(path)).pixels(0, 16)

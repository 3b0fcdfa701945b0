"""Malicious files: pickles that would run code, links in archives, members that unpack without end."""

import pickle
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import encoded, make_tar, random_image
from processes import touch
from rows import Rows

from rdpm_cli.cli.app import run as run_cli
from rdpm_cli.data import archives as sources
from rdpm_cli.data.open import open_source
from rdpm_cli.errors import DataError

PNG = encoded(random_image(8, 8))


class Trap:
    """Its pickle makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return touch, (str(self.path),)


# ---- pickles -------------------------------------------------------------------------------------------------------


def make_traps(folder: Path, trap: Trap, store: Path) -> dict[str, Path]:
    """A file or folder of each kind in which the trap is pickled."""
    pickled = pickle.dumps(trap)
    kinds = {".pt": "tokenizer.pt", ".pth": "weights.pth", "npy of objects": "codes", "npz of objects": "samples.npz"}
    paths = {kind: folder / name for kind, name in {**kinds, "folder like DCP's": "dcp", "tar": "x.tar"}.items()}
    torch.save({"format": "rdpm-tokenizer", "weights": trap}, paths[".pt"])
    paths[".pth"].write_bytes(pickle.dumps({"state_dict": trap}))
    shutil.copytree(store, paths["npy of objects"])
    np.save(paths["npy of objects"] / "labels-00000.npy", np.array([trap], dtype=object), allow_pickle=True)
    np.savez(paths["npz of objects"], arr_0=np.array([trap], dtype=object))
    paths["folder like DCP's"].mkdir()  # the layout of torch.distributed.checkpoint
    for name in (".metadata", "__0_0.distcp"):
        (paths["folder like DCP's"] / name).write_bytes(pickled)
    members = dict.fromkeys(("a.pyd", "a.pkl", "a.pickle", "a.pth", "a.npy", "a.cls"), pickled)
    make_tar(paths["tar"], members | {"a.png": PNG})
    return paths


TOKENIZE = "tokenize digits {out} --tokenizer {file} --device cpu"
SAMPLE = "sample --ckpt {file} --out {out}"
WARM = "train-tokenizer digits --recipe digits --from-weights {file} --out {out}"
FID = "eval fid digits:heldout --ref digits:train --resolution 16"
TRAIN = "train-gen {file} --recipe digits --out {out} --device cpu"


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    ("kind", "command"),
    [
        (".pt", TOKENIZE), (".pt", SAMPLE), (".pt", "verify {file}"), (".pt", "inspect {file}"),
        (".pth", WARM), (".pth", FID + " --weights {file}"),
        ("npy of objects", TRAIN), ("npy of objects", "verify {file}"),
        ("npz of objects", FID.replace("digits:heldout", "{file}")),
        ("folder like DCP's", SAMPLE), ("folder like DCP's", WARM),
        ("tar", "tokenize {file} {out} --tokenizer {tokenizer} --device cpu"),
    ],
)  # fmt: skip
def test_a_malicious_file_is_refused_and_does_nothing(
    kind: str, command: str, tmp_path: Path, digits_codes: Path, tiny_tokenizer_file: Path,
    capsys: pytest.CaptureFixture[str], rows: Rows,
) -> None:  # fmt: skip
    sprung, out = tmp_path / "sprung", tmp_path / "out"
    file = make_traps(tmp_path, Trap(sprung), digits_codes)[kind]
    with rows.count("malicious files refused"):
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
    ("name", "kind"),
    [
        ("a.png", tarfile.SYMTYPE), ("a.png", tarfile.LNKTYPE), ("a.png", tarfile.FIFOTYPE), ("a.cls", tarfile.CHRTYPE),
        ("a.png", tarfile.BLKTYPE),
    ],
)  # fmt: skip
def test_a_link_or_device_in_a_tar_is_refused(tmp_path: Path, name: str, kind: bytes, rows: Rows) -> None:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/hostname"
    with tarfile.open(make_tar(tmp_path / "x.tar", {"good.png": PNG}), "a") as tar:
        tar.addfile(info)
    with rows.count("links and devices in archives, refused"), pytest.raises(DataError, match=name):
        open_source(str(tmp_path / "x.tar"))


def test_a_member_of_a_zip_is_never_unpacked_beyond_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A megabyte of zeros, compressed a thousandfold; a link is refused."""
    link = zipfile.ZipInfo("a/2.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/1.bmp", bytes(1 << 20))
    shutil.copy(tmp_path / "x.zip", tmp_path / "linked.zip")
    with zipfile.ZipFile(tmp_path / "linked.zip", "a") as archive:
        archive.writestr(link, "/etc/hostname")
    with pytest.raises(DataError, match=r"a/2\.png"):
        open_source(str(tmp_path / "linked.zip"))
    assert sources.LARGEST == 1 << 30
    monkeypatch.setattr(sources, "LARGEST", 1 << 19)
    sizes: list[int] = []
    monkeypatch.setattr(sources, "open_image", lambda file: sizes.append(len(file.read())))
    source = open_source(str(tmp_path / "x.zip"))
    source.open(0)
    assert sizes == [1 << 19]

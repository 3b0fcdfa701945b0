"""Images that are damaged or huge: pixels, or an error that names the image and its reason; never anything else."""

import errno
import json
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pictures import encoded, make_files, make_tar, random_image, write_parquet
from PIL import Image
from rows import Rows

from rdpm_cli.cli.app import run as run_cli
from rdpm_cli.codes.store import CodeStore
from rdpm_cli.data.open import open_source
from rdpm_cli.data.source import Source
from rdpm_cli.errors import DataError, ImageError, RunError


def one(folder: Path, raw: bytes, name: str = "a/1.png") -> Source:
    """A source of one file."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(raw)
    return open_source(str(folder))


def smooth(width: int, height: int) -> Image.Image:
    """A photograph, as far as codecs care."""
    return random_image(8, 8).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: b"",
        lambda raw: b"text",
        lambda raw: raw[: len(raw) // 2],
        lambda raw: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    ],
)
def test_an_unreadable_image_is_named_and_the_next_one_is_read(
    tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    make_files(tmp_path, "a/1.png", "a/2.png")
    path = tmp_path / "a" / "1.png"
    path.write_bytes(damage(path.read_bytes()))
    source = open_source(str(tmp_path))
    for read in (source.image, lambda index: source.pixels(index, 16)):
        with pytest.raises(ImageError, match=rf"{tmp_path}.*a/1\.png") as caught:
            read(0)
        copy = pickle.loads(pickle.dumps(caught.value))  # as it reaches another process
        for error in (caught.value, copy):
            assert (error.name, error.exit_code, bool(error.reason), bool(error.hint)) == ("a/1.png", 3, True, True)
    assert source.pixels(1, 16).shape == (16, 16, 3)


def test_a_bad_image_in_a_shard_is_named_and_the_next_one_is_read(tmp_path: Path) -> None:
    good = encoded(random_image(9, 9))
    make_tar(tmp_path / "x.tar", {"0.png": b"text", "1.png": good})
    write_parquet(tmp_path / "x.parquet", [good[:60], good, None], None)
    for name, bad in {"x.tar/0.png": 0, "x.parquet/000000": 0, "x.parquet/000002": 2}.items():
        source = open_source(str(tmp_path / name.split("/")[0]))
        with pytest.raises(ImageError) as caught:
            source.pixels(bad, 16)
        assert caught.value.name == name
        assert source.pixels(1, 9).shape == (9, 9, 3)


KINDS: dict[str, dict[str, object]] = {kind: {} for kind in ("PNG", "GIF", "BMP", "JPEG2000")}
KINDS |= {"JPEG": {"progressive": True}, "WEBP": {"lossless": True}, "TIFF": {"compression": "tiff_lzw"}}


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_bytes_are_an_image_or_an_image_error(tmp_path: Path, kind: str) -> None:
    """200 random flips and cuts: nothing but pixels or ImageError comes out."""
    whole = encoded(smooth(40, 33), kind, **KINDS[kind])
    source, path, random = one(tmp_path, whole), tmp_path / "a" / "1.png", np.random.default_rng(sum(kind.encode()))
    errors = []
    for trial in range(200):
        raw = bytearray(whole)
        for offset in random.integers(0, min(len(raw), 200) if trial % 2 else len(raw), 1 + trial % 4):
            raw[offset] ^= 1 << random.integers(8)
        cut = int(random.integers(len(raw))) if trial % 3 == 0 else len(raw)
        try:
            path.write_bytes(raw[:cut])
            assert source.pixels(0, 16).shape == (16, 16, 3)
        except ImageError as error:
            errors.append(error)
    assert len(errors) > 10
    assert all(error.name == "a/1.png" and error.reason for error in errors)


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (OSError(errno.EIO, "Input/output error"), RunError),
        (MemoryError(), MemoryError),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), DataError),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_fault_of_the_machine_is_no_bad_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception, kind: type[Exception]
) -> None:
    """Otherwise `--on-bad skip` would leave a good image out for ever."""
    source = one(tmp_path, encoded(random_image(9, 9)))

    def fail(_: int) -> Image.Image:
        raise fault

    monkeypatch.setattr(source, "open", fail)
    with pytest.raises(kind) as caught:
        source.pixels(0, 9)
    assert type(caught.value) is kind


ODD: dict[str, bytes] = {
    "animated.gif": encoded(smooth(20, 20), "GIF", save_all=True, append_images=[smooth(20, 20)]),
    "cmyk.jpg": encoded(Image.new("CMYK", (20, 20), (0, 255, 255, 0)), "JPEG"),
    "deep.png": encoded(Image.fromarray(np.full((16, 16), 25_700, dtype=np.uint16))),
    "palette.png": encoded(smooth(20, 20).quantize(8), "PNG", transparency=bytes([0, 255, 7])),
    "png.jpg": encoded(smooth(20, 20)),
    "rotated.jpg": encoded(smooth(20, 30), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06"),
}
BAD: dict[str, bytes] = {"half.png": encoded(smooth(20, 20))[:99], "nothing.png": b"", "text.png": b"this is text"}


def test_a_folder_of_odd_images_is_tokenized_without_the_bad_ones(
    tmp_path: Path, tiny_tokenizer_file: Path, capsys: pytest.CaptureFixture[str], rows: Rows
) -> None:
    (tmp_path / "x" / "a").mkdir(parents=True)
    for name, raw in {**ODD, **BAD}.items():
        (tmp_path / "x" / "a" / name).write_bytes(raw)
    out = tmp_path / "codes"
    command = ["tokenize", str(tmp_path / "x"), str(out), "--tokenizer", str(tiny_tokenizer_file), "--device", "cpu"]
    with rows.count("odd and bad images: read, or named and left out", len(ODD) + len(BAD)):
        assert run_cli(command) == 3
        assert "a/half.png" in capsys.readouterr().err
        assert run_cli([*command, "--on-bad", "skip"]) == 3
        assert "3 of 9" in capsys.readouterr().err
        names = [json.loads(line)["name"] for line in (out / "bad.jsonl").read_text().splitlines()]
        assert names == [f"a/{name}" for name in sorted(BAD)]
        assert run_cli([*command, "--on-bad", "skip", "--max-bad", "0.4"]) == 0
        assert CodeStore(out).manifest.images == len(ODD)


@pytest.mark.parametrize(("packing", "side"), [("folder", 12_000), ("zip", 20_000)])
def test_a_huge_image_is_refused_by_its_header(tmp_path: Path, packing: str, side: int, rows: Rows) -> None:
    """12,000² is where Pillow warns, 20,000² where it raises: both are errors."""
    raw = bytearray(encoded(Image.new("L", (8, 8))))
    raw[16:24] = struct.pack(">II", side, side)
    raw[29:33] = struct.pack(">I", zlib.crc32(raw[12:29]))
    source = one(tmp_path / "x", bytes(raw))
    if packing == "zip":
        with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
            archive.writestr("a/1.png", bytes(raw))
        source = open_source(str(tmp_path / "x.zip"))
    with rows.count("bombs of 12,000² and 20,000² pixels refused"), pytest.raises(ImageError, match=r"a/1\.png"):
        source.pixels(0, 256)

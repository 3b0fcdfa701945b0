"""Images that are odd, damaged or huge: what is read, as what, and what is refused."""

import errno
import io
import json
import pickle
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pictures import adm_center_crop_arr, encoded, make_files, make_tar, random_image, real, run_alone, write_parquet
from PIL import Image
from rows import Rows

from rdpm_cli import engine
from rdpm_cli.cli.app import run as run_cli
from rdpm_cli.errors import DataError, ImageError, RunError
from rdpm_cli.images import decode
from rdpm_cli.images.interface import ImageSource
from rdpm_cli.images.sources import open_source
from rdpm_cli.images.transform import DRAFT_TRANSFORM, TRANSFORM, Pixels


def one(folder: Path, raw: bytes, name: str = "a/1.png") -> ImageSource:
    """A source of one file."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(raw)
    return open_source(str(folder))


def smooth(width: int, height: int) -> Image.Image:
    """A photograph, as far as codecs care."""
    return random_image(8, 8).resize((width, height), Image.Resampling.BICUBIC)


# ---- damaged ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [lambda raw: b"", lambda raw: b"text", lambda raw: raw[: len(raw) // 2]])
def test_an_unreadable_image_is_named(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    make_files(tmp_path, "a/1.png", "a/2.png")
    path = tmp_path / "a" / "2.png"
    path.write_bytes(damage(path.read_bytes()))
    source = open_source(str(tmp_path))
    assert source.pixels(0, 16).shape == (16, 16, 3)
    with pytest.raises(DataError, match=r"a/2\.png cannot be read as an image") as caught:
        source.pixels(1, 16)
    assert str(tmp_path) in caught.value.message


def break_deflate(raw: bytearray) -> None:
    raw[30 + raw[26]] = 0xFF  # behind the local header and its name: a block of the type that does not exist


def set_encrypted(raw: bytearray) -> None:
    raw[6] |= 1
    raw[raw.rfind(b"PK\x01\x02") + 8] |= 1


def set_unknown_method(raw: bytearray) -> None:
    raw[8] = 97
    raw[raw.rfind(b"PK\x01\x02") + 10] = 97


@pytest.mark.parametrize("damage", [break_deflate, set_encrypted, set_unknown_method])
def test_an_unreadable_zip_member_is_named(tmp_path: Path, damage: Callable[[bytearray], None]) -> None:
    buffer = io.BytesIO()
    random_image(30, 30).save(buffer, "BMP")
    with zipfile.ZipFile(tmp_path / "images.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/1.bmp", buffer.getvalue())
    raw = bytearray((tmp_path / "images.zip").read_bytes())
    damage(raw)
    (tmp_path / "images.zip").write_bytes(raw)
    source = open_source(str(tmp_path / "images.zip"))
    with pytest.raises(DataError, match=r"images\.zip: a/1\.bmp cannot be read as an image"):
        source.pixels(0, 16)


class Raw(ImageSource):
    """Bytes as images."""

    def __init__(self, *files: bytes) -> None:
        self.files, self.spec, self.labels, self.class_names = files, "raw", None, []
        self.names = [f"{i}.jpg" for i in range(len(files))]

    def open(self, index: int) -> Image.Image:
        return decode.open_image(io.BytesIO(self.files[index]))


KINDS: dict[str, dict[str, object]] = {
    "JPEG": {"progressive": True},
    "PNG": {},
    "WEBP": {"lossless": True},
    "TIFF": {"compression": "tiff_lzw"},
    "GIF": {},
    "BMP": {},
    "PPM": {},
    "JPEG2000": {},
}


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_bytes_are_an_image_or_an_image_error(kind: str) -> None:
    """200 random flips and cuts: nothing but pixels or ImageError comes out, with draft or without."""
    whole = encoded(smooth(40, 33), kind, **KINDS[kind])
    random = np.random.default_rng(sum(kind.encode()))
    errors = []
    for trial in range(200):
        raw = bytearray(whole)
        for place in random.integers(0, min(len(raw), 200) if trial % 2 else len(raw), 1 + trial % 4):
            raw[place] ^= 1 << random.integers(8)
        cut = int(random.integers(len(raw))) if trial % 3 == 0 else len(raw)
        try:
            assert Raw(bytes(raw[:cut])).pixels(0, 16, draft=trial % 5 == 0).shape == (16, 16, 3)
        except ImageError as error:
            errors.append(error)
    assert len(errors) > 10
    assert all(error.name == "0.jpg" and error.reason for error in errors)


def test_an_image_error_says_which_image_and_why_and_reaches_another_process(tmp_path: Path) -> None:
    with pytest.raises(ImageError) as caught:
        one(tmp_path, b"text").pixels(0, 16)
    error = pickle.loads(pickle.dumps(caught.value))
    for found in (caught.value, error):
        assert (found.name, found.exit_code) == ("a/1.png", 3)
        assert found.reason == "it is empty or of no known image format"
        assert found.message == f"{tmp_path}: a/1.png cannot be read as an image: {found.reason}"
        assert found.hint


@pytest.mark.parametrize("raw", [b"", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"P1\n", b"\xff\xd8\xff"])
def test_what_is_no_image_is_named(tmp_path: Path, raw: bytes) -> None:
    with pytest.raises(ImageError, match=r"a/1\.png cannot be read"):
        one(tmp_path, raw).image(0)


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (OSError(errno.EIO, "Input/output error"), RunError),
        (OSError(errno.ESTALE, "Stale file handle"), RunError),
        (OSError(errno.EMFILE, "Too many open files"), RunError),
        (MemoryError(), MemoryError),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), DataError),
        (PermissionError(errno.EACCES, "Permission denied"), DataError),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_fault_of_the_machine_is_no_bad_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception, kind: type[Exception]
) -> None:
    """Else `--on-bad skip` would leave a good image out for ever."""
    source = one(tmp_path, encoded(random_image(9, 9)))

    def fail(_: int) -> Image.Image:
        raise fault

    monkeypatch.setattr(source, "open", fail)
    with pytest.raises(kind) as caught:
        source.pixels(0, 9)
    assert not isinstance(caught.value, ImageError)


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


def test_warnings_about_an_image_neither_show_nor_raise(tmp_path: Path) -> None:
    image = palette_image()
    raw = encoded(image, "PNG", transparency=bytes([0, 255, 7]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert one(tmp_path, raw).pixels(0, 16)[0, 0].tolist() == [10, 20, 30]


# ---- odd ----------------------------------------------------------------------------------------------------------


def palette_image() -> Image.Image:
    image = Image.new("P", (16, 16), 3)
    image.putpalette([0, 0, 0, 1, 1, 1, 2, 2, 2, 10, 20, 30])
    return image


def deep_image() -> Image.Image:
    return Image.fromarray(np.full((16, 16), 100 * 257, dtype=np.uint16))  # 100 of 255, as 16 bits say it


@pytest.mark.parametrize(
    ("image", "suffix", "rgb"),
    [
        (Image.new("L", (16, 16), 100), "png", (100, 100, 100)),
        (Image.new("LA", (16, 16), (100, 7)), "png", (100, 100, 100)),
        (Image.new("1", (16, 16), 1), "png", (255, 255, 255)),
        (Image.new("RGBA", (16, 16), (1, 2, 3, 7)), "png", (1, 2, 3)),
        (palette_image(), "png", (10, 20, 30)),
        (Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "tif", (255, 0, 0)),
        (Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "jpg", (255, 0, 0)),
        (deep_image(), "png", (100, 100, 100)),
        (deep_image(), "tif", (100, 100, 100)),
        (deep_image(), "ppm", (100, 100, 100)),
    ],
    ids=lambda value: getattr(value, "mode", None),
)
def test_every_mode_comes_out_as_rgb(
    tmp_path: Path, image: Image.Image, suffix: str, rgb: tuple[int, int, int]
) -> None:
    (tmp_path / "a").mkdir()
    image.save(tmp_path / "a" / f"image.{suffix}")
    pixels = open_source(str(tmp_path)).pixels(0, 16)
    assert pixels.shape == (16, 16, 3)
    assert pixels.reshape(-1, 3).min(0).tolist() == pixels.reshape(-1, 3).max(0).tolist() == list(rgb)


@pytest.mark.parametrize("limit", [100, 300])  # 18 × 20 pixels: more than twice the first, more than the second
def test_a_decompression_bomb_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    source = open_source(str(make_files(tmp_path, "a/bomb.png")))
    assert source.pixels(0, 16).shape == (16, 16, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(DataError, match=r"a/bomb\.png cannot be read as an image: .*decompression bomb"):
        source.pixels(0, 16)


def png(width: int, height: int, depth: int, colour: int, pixels: bytes) -> bytes:
    """A PNG of these raw rows, each with its filter byte, for what Pillow does not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(pixels, 1)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("colour", "rgb"), [(2, [10, 20, 30]), (6, [10, 20, 30]), (4, [10, 10, 10]), (0, [10, 10, 10])]
)
def test_16_bits_a_channel_keep_their_high_byte(tmp_path: Path, colour: int, rgb: list[int]) -> None:
    values = {0: [10], 2: [10, 20, 30], 4: [10, 99], 6: [10, 20, 30, 99]}[colour]
    row = b"\0" + b"".join(struct.pack(">H", value * 256 + 200) for value in values) * 16
    assert one(tmp_path, png(16, 16, 16, colour, row * 16)).pixels(0, 16)[3, 5].tolist() == rgb


@pytest.mark.parametrize("mode", ["I", "F"])
def test_32_bits_a_pixel_are_refused_not_clipped(tmp_path: Path, mode: str) -> None:
    with pytest.raises(ImageError, match="no agreed range"):
        one(tmp_path, encoded(Image.new(mode, (16, 16), 1), "TIFF"), "a/1.tif").pixels(0, 16)


def test_alpha_is_dropped_as_the_field_does_not_composited(tmp_path: Path) -> None:
    """`convert("RGB")`, as ADM and torchvision's ImageFolder: the colour under a transparent pixel is what counts."""
    rgba = Image.new("RGBA", (16, 16), (200, 100, 50, 0))
    for name, raw in {"png": encoded(rgba), "webp": encoded(rgba, "WEBP", lossless=True, exact=True)}.items():
        assert one(tmp_path / name, raw, f"a/1.{name}").pixels(0, 16)[0, 0].tolist() == [200, 100, 50]


def test_exif_rotation_is_not_applied_as_in_the_field(tmp_path: Path) -> None:
    image, exif = smooth(32, 16), Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    for kind in ("JPEG", "PNG", "WEBP"):
        raw = encoded(image, kind, exif=exif)
        with Image.open(io.BytesIO(raw)) as stored:
            assert stored.getexif()[0x0112] == 6
            wanted = adm_center_crop_arr(stored.convert("RGB"), 16)
        source = one(tmp_path / kind, raw, f"a/1.{kind.lower()}")
        assert source.image(0).size == (32, 16)
        assert np.array_equal(source.pixels(0, 16), wanted)


def test_the_content_tells_the_format_not_the_suffix(tmp_path: Path) -> None:
    image = smooth(20, 20)
    source = one(tmp_path, encoded(image), "a/1.JPEG")
    assert np.array_equal(np.asarray(source.image(0)), np.asarray(image))
    assert source.pixels(0, 16, draft=True).shape == (16, 16, 3)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "TIFF"])
def test_of_an_animation_the_first_frame_is_read(tmp_path: Path, kind: str) -> None:
    first, second = Image.new("RGB", (16, 16), (255, 0, 0)), Image.new("RGB", (16, 16), (0, 0, 255))
    options = {"lossless": True} if kind == "WEBP" else {}
    raw = encoded(first, kind, save_all=True, append_images=[second], **options)
    with Image.open(io.BytesIO(raw)) as stored:
        assert getattr(stored, "n_frames", 1) == 2
    assert one(tmp_path, raw).pixels(0, 16)[0, 0].tolist() == [255, 0, 0]


def test_cmyk_of_adobe_is_stored_inverted_and_read_upright(tmp_path: Path) -> None:
    raw = encoded(Image.new("CMYK", (32, 32), (0, 255, 255, 0)), "JPEG", quality=95)
    assert b"Adobe" in raw
    for draft in (False, True):
        red = one(tmp_path, raw, "a/1.jpg").pixels(0, 16, draft=draft)[8, 8].astype(int)
        assert np.abs(red - [255, 0, 0]).max() <= 3


ODD: dict[str, bytes] = {
    "animated.gif": encoded(smooth(20, 20), "GIF", save_all=True, append_images=[smooth(20, 20)]),
    "cmyk.jpg": encoded(Image.new("CMYK", (20, 20), (0, 255, 255, 0)), "JPEG"),
    "deep.png": encoded(deep_image()),
    "palette.png": encoded(palette_image(), "PNG", transparency=bytes([0, 255, 7])),
    "png.jpg": encoded(smooth(20, 20)),
    "rotated.jpg": encoded(smooth(20, 30), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06"),
}
BAD: dict[str, bytes] = {"half.png": encoded(smooth(20, 20))[:99], "nothing.png": b"", "text.png": b"this is text"}


def test_a_folder_of_odd_images_is_tokenised_without_the_bad_ones(
    tmp_path: Path, tiny_tokenizer_file: Path, capsys: pytest.CaptureFixture[str], rows: Rows
) -> None:
    (tmp_path / "x" / "a").mkdir(parents=True)
    for name, raw in {**ODD, **BAD}.items():
        (tmp_path / "x" / "a" / name).write_bytes(raw)
    out = tmp_path / "codes"
    command = ["tokenize", str(tmp_path / "x"), str(out), "--tokenizer", str(tiny_tokenizer_file), "--device", "cpu"]
    with rows.count("odd and bad images: read, or named and left out", len(ODD) + len(BAD)):
        assert run_cli(command) == 3
        assert "a/half.png cannot be read as an image" in capsys.readouterr().err
        assert run_cli([*command, "--on-bad", "skip"]) == 3
        assert "3 of 9 images cannot be read" in capsys.readouterr().err
        listed = [json.loads(line)["name"] for line in (out / "bad.jsonl").read_text().splitlines()]
        assert listed == [f"a/{name}" for name in sorted(BAD)]
        assert run_cli([*command, "--on-bad", "skip", "--max-bad", "0.4"]) == 0
        assert engine.verify(out).values["images"] == len(ODD)


# ---- huge ---------------------------------------------------------------------------------------------------------

HUGE = """
import sys, time
from rdpm_cli.errors import ImageError
from rdpm_cli.images.sources import open_source
from pictures import peak_memory
source, started = open_source(sys.argv[1]), time.process_time()
try:
    source.pixels(0, 256)
except ImageError as error:
    print(error.name, round(time.process_time() - started, 3), peak_memory())
"""


def huge_png(side: int) -> bytes:
    """A white grey PNG, packed row block by row block: a side of 20,000 takes 400 MB when decoded."""
    packer, rows = zlib.compressobj(1), b"\0" + b"\xff" * side
    packed = b"".join([packer.compress(rows * 100) for _ in range(side // 100)]) + packer.flush()
    whole = png(side, side, 8, 0, b"")
    start = whole.index(b"IDAT") - 4
    content = b"IDAT" + packed
    return (
        whole[:start] + struct.pack(">I", len(packed)) + content + struct.pack(">I", zlib.crc32(content)) + whole[-12:]
    )


def test_huge_png_is_a_png() -> None:
    with Image.open(io.BytesIO(huge_png(200))) as image:
        assert np.asarray(image).min() == 255


@pytest.mark.parametrize(
    ("packing", "side"), [("folder", 12_000), ("folder", 20_000), ("zip", 20_000), ("tar", 12_000)]
)
def test_a_huge_image_is_refused_by_its_header(tmp_path: Path, packing: str, side: int, rows: Rows) -> None:
    """12,000² is where Pillow warns, 20,000² where it raises: both are errors."""
    raw = huge_png(side)
    if packing == "folder":
        path = Path(one(tmp_path / "x", raw).spec)
    elif packing == "tar":
        path = make_tar(tmp_path / "x.tar", {"a/1.png": raw})
    else:
        path = tmp_path / "x.zip"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/1.png", raw)
    with rows.count("bombs of 12,000² and 20,000² pixels refused"):
        name, seconds, megabytes = run_alone(HUGE, path).split()
        rows.note(f"bomb of {side:,}² in a {packing}", f"{seconds} s of CPU, {float(megabytes):.0f} MB")
        assert name.endswith("a/1.png")
        assert float(seconds) < 1
        assert float(megabytes) < 300


def test_a_zip_member_that_unpacks_to_more_than_it_says_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/1.bmp", bytes(1 << 20))
    raw = bytearray(path.read_bytes())
    entry = raw.rfind(b"PK\x01\x02") + 24
    raw[entry : entry + 4] = struct.pack("<I", 1000)
    path.write_bytes(raw)
    with pytest.raises(ImageError, match="its checksum in the zip is another"):
        open_source(str(path)).pixels(0, 16)


def test_an_image_too_thin_to_be_enlarged_is_refused(tmp_path: Path) -> None:
    source = one(tmp_path, encoded(Image.new("L", (1, 5000))))
    assert source.pixels(0, 16).shape == (16, 16, 3)
    with pytest.raises(ImageError, match="1×5000 pixels are too thin to be enlarged to 256"):
        source.pixels(0, 256)


# ---- draft --------------------------------------------------------------------------------------------------------


def draft_and_exact(folder: Path, width: int, height: int, kind: str = "JPEG") -> tuple[Pixels, Pixels]:
    source = one(folder / f"{width}x{height}", encoded(smooth(width, height), kind), "a/1.jpg")
    return source.pixels(0, 32, draft=True), source.pixels(0, 32)


def test_draft_changes_nothing_below_twice_the_size_nor_in_other_formats(tmp_path: Path) -> None:
    assert DRAFT_TRANSFORM != TRANSFORM
    for width, height in ((32, 32), (63, 200), (40, 63)):
        assert np.array_equal(*draft_and_exact(tmp_path, width, height))
    assert np.array_equal(*draft_and_exact(tmp_path, 300, 300, "PNG"))


@pytest.mark.parametrize(("side", "scale"), [(64, 2), (127, 2), (128, 4), (255, 4), (256, 8), (700, 8)])
def test_draft_decodes_at_the_smallest_scale_that_keeps_the_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: int, scale: int
) -> None:
    seen: list[tuple[int, int]] = []
    convert = Image.Image.convert

    def watch(image: Image.Image, *args: object) -> Image.Image:
        seen.append(image.size)
        return convert(image, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Image.Image, "convert", watch)
    draft, exact = draft_and_exact(tmp_path, side, side)
    assert seen[0] == (-(-side // scale), -(-side // scale))
    assert min(seen[0]) >= 32
    assert draft.shape == exact.shape == (32, 32, 3)
    assert not np.array_equal(draft, exact)
    assert np.abs(draft.astype(int) - exact).mean() < 5


def test_draft_of_real_photographs_is_near_the_exact_crop() -> None:
    source = open_source(real("imagenet-50"))
    for index in range(0, 50, 10):
        draft, exact = source.pixels(index, 64, draft=True), source.pixels(index, 64)
        assert np.corrcoef(draft.ravel(), exact.ravel())[0, 1] > 0.9

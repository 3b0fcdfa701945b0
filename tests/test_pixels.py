"""Pixels: the ADM crop, what odd images decode to, and the way to tensors and back."""

import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import adm_center_crop_arr, encoded, random_image, random_pixels
from PIL import Image, ImageCms, PngImagePlugin
from torchvision.datasets.folder import pil_loader

from rdpm_cli.data.open import open_source
from rdpm_cli.data.pixels import Pixels, cells, center_crop, chw, hwc, to_model, to_pixels
from rdpm_cli.errors import ImageError


def read(folder: Path, raw: bytes, name: str = "a/1.png", size: int = 16) -> Pixels:
    """The pixels of one file."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(raw)
    return open_source(str(folder)).pixels(0, size)


@pytest.mark.parametrize("size", [16, 15])
@pytest.mark.parametrize(
    "shape",
    [
        (16, 16), (16, 41), (31, 31), (32, 32), (33, 47), (203, 131), (20, 500), (9, 13), (1, 1),
    ],
)  # fmt: skip
def test_center_crop_equals_adm(shape: tuple[int, int], size: int) -> None:
    image = random_image(*shape)
    cropped = center_crop(image, size)
    assert cropped.shape == (size, size, 3)
    assert cropped.dtype == np.uint8
    assert np.array_equal(cropped, adm_center_crop_arr(image, size))


def test_a_mask_touches_the_cells_that_hold_a_white_pixel() -> None:
    mask = np.zeros((8, 12, 3), dtype=np.uint8)
    mask[0, 0, 1] = 127  # less than half white
    mask[5, 11] = 128
    assert cells(mask, (2, 3)).tolist() == [[False] * 3, [False, False, True]]


def palette_image() -> Image.Image:
    image = Image.new("P", (16, 16), 3)
    image.putpalette([0, 0, 0, 1, 1, 1, 2, 2, 2, 10, 20, 30])
    return image


def deep_image() -> Image.Image:
    return Image.fromarray(np.full((16, 16), 100 * 257, dtype=np.uint16))  # 100 of 255 in 16 bits


@pytest.mark.parametrize(
    ("image", "suffix", "rgb"),
    [
        (Image.new("L", (16, 16), 100), "png", [100, 100, 100]),
        (Image.new("LA", (16, 16), (100, 7)), "png", [100, 100, 100]),
        (Image.new("1", (16, 16), 1), "png", [255, 255, 255]),
        (Image.new("RGBA", (16, 16), (1, 2, 3, 7)), "png", [1, 2, 3]),
        (palette_image(), "png", [10, 20, 30]),
        (Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "tif", [255, 0, 0]),
        (Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "jpg", [255, 0, 0]),
        (deep_image(), "png", [100, 100, 100]),
        (deep_image(), "tif", [100, 100, 100]),
        (deep_image(), "ppm", [100, 100, 100]),
    ],
    ids=lambda value: getattr(value, "mode", None),
)
def test_every_mode_comes_out_as_rgb(tmp_path: Path, image: Image.Image, suffix: str, rgb: list[int]) -> None:
    image.save(tmp_path / f"image.{suffix}")
    for exif in (False, True):
        pixels = open_source(str(tmp_path), exif=exif).pixels(0, 16)
        assert pixels.reshape(-1, 3).min(0).tolist() == pixels.reshape(-1, 3).max(0).tolist() == rgb


@pytest.mark.parametrize("mode", ["I", "F"])
def test_32_bits_a_pixel_are_refused_not_clipped(tmp_path: Path, mode: str) -> None:
    with pytest.raises(ImageError, match=r"a/1\.tif"):
        read(tmp_path, encoded(Image.new(mode, (16, 16), 1), "TIFF"), "a/1.tif")


def test_the_content_decides_the_format(tmp_path: Path) -> None:
    raw = encoded(random_image(8, 8).resize((32, 16)), "JPEG")
    with Image.open(io.BytesIO(raw)) as stored:
        assert np.array_equal(read(tmp_path, raw, "a/1.png"), adm_center_crop_arr(stored.convert("RGB"), 16))


def png(width: int, height: int, depth: int, colour: int, content: bytes) -> bytes:
    """A PNG of these raw rows, in layouts that Pillow does not write. colour: 0 grey, 2 RGB, 4 grey+A, 6 RGBA."""
    rows = [b"\0" + content[row * len(content) // height : (row + 1) * len(content) // height] for row in range(height)]
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = {b"IHDR": header, b"IDAT": zlib.compress(b"".join(rows)), b"IEND": b""}
    parts = [struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks.items()]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_16_bits_keep_their_high_byte(tmp_path: Path, colour: int, channels: int) -> None:
    """Of a grey image too, which Pillow's own conversion, and so torchvision, would clip to white."""
    values = np.random.default_rng(0).integers(0, 1 << 16, (16, 16, channels), dtype=np.uint16)
    high = (values >> 8).astype(np.uint8)
    expected = high[..., :3] if channels > 2 else high[..., :1].repeat(3, -1)
    assert np.array_equal(read(tmp_path, png(16, 16, 16, colour, values.byteswap().tobytes())), expected)


def turned(value: int) -> Image.Exif:
    """EXIF data of this orientation."""
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


PHOTO = random_image(8, 8).resize((24, 16), Image.Resampling.BICUBIC)
CMYK = encoded(PHOTO.convert("CMYK"), "JPEG", quality=95)  # Pillow stores it inverted, as Adobe does
ADOBE = CMYK.index(b"Adobe")
TEXT = PngImagePlugin.PngInfo()
TEXT.add_text("prompt", "x" * (3 << 20), zip=True)
TEXT.add_itxt("workflow", "y" * (3 << 20), zip=True)
AS_TORCHVISION: dict[str, bytes] = {
    "1 bit": encoded(PHOTO.convert("1")),
    "palette": encoded(PHOTO.quantize(9)),
    "palette with transparency": encoded(PHOTO.quantize(9), transparency=bytes([0, 255, 7, 0])),
    "one transparent colour": encoded(PHOTO, transparency=PHOTO.getpixel((3, 3))),
    "alpha": encoded(Image.merge("RGBA", (*PHOTO.split(), PHOTO.split()[0]))),
    "grey and alpha": encoded(Image.merge("LA", PHOTO.split()[:2])),
    "CMYK as Adobe stores it": CMYK,
    "YCCK": CMYK[: ADOBE + 11] + b"\2" + CMYK[ADOBE + 12 :],
    "CMYK without Adobe's mark": CMYK[: ADOBE - 4] + CMYK[ADOBE + 12 :],
    "CMYK in TIFF": encoded(PHOTO.convert("CMYK"), "TIFF"),
    "JPEG of RGB": encoded(PHOTO, "JPEG", keep_rgb=True),
    "ICC profile": encoded(PHOTO, icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()),
    "ICC profile that is none": encoded(PHOTO, "JPEG", icc_profile=b"none"),
    "animation": encoded(PHOTO, "GIF", save_all=True, append_images=[random_image(24, 16)]),
    "MPO": encoded(PHOTO, "MPO", save_all=True, append_images=[random_image(24, 16)]),
    "turned by EXIF": encoded(PHOTO, "JPEG", exif=turned(6)),
}


@pytest.mark.parametrize("title", AS_TORCHVISION)
def test_odd_images_are_read_as_torchvision_reads_them(tmp_path: Path, title: str) -> None:
    raw = AS_TORCHVISION[title]
    (tmp_path / "1.png").write_bytes(raw)
    image = open_source(str(tmp_path)).image(0)
    assert (image.mode, image.size) == ("RGB", (24, 16))
    with warnings.catch_warnings(action="ignore"):  # of Pillow, that transparency is lost
        assert np.array_equal(np.asarray(image), np.asarray(pil_loader(str(tmp_path / "1.png"))))


def test_an_icc_profile_changes_nothing_and_alpha_is_not_composited(tmp_path: Path) -> None:
    for title in ("ICC profile", "alpha"):
        (tmp_path / "1.png").write_bytes(AS_TORCHVISION[title])
        assert np.array_equal(np.asarray(open_source(str(tmp_path)).image(0)), np.asarray(PHOTO)), title


@pytest.mark.parametrize("large", [{"pnginfo": TEXT}, {"icc_profile": bytes(3 << 20)}], ids=["text", "profile"])
def test_a_png_with_a_large_text_or_profile_is_read(tmp_path: Path, large: dict[str, Any]) -> None:
    """Pillow's own limit for them is 1 MiB, which generators' prompts and printers' profiles exceed."""
    assert np.array_equal(read(tmp_path, encoded(PHOTO, **large)), adm_center_crop_arr(PHOTO, 16))


ORIENTATIONS = {  # of EXIF -> the stored rows and columns as they should be seen
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: x[::-1].swapaxes(0, 1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: x[:, ::-1].swapaxes(0, 1),
}  # fmt: skip


def test_a_tiff_is_always_turned_as_pillow_and_so_torchvision_do(tmp_path: Path) -> None:
    (tmp_path / "1.tif").write_bytes(encoded(PHOTO, "TIFF", exif=turned(6)))
    for exif in (False, True):
        image = np.asarray(open_source(str(tmp_path), exif=exif).image(0))
        assert np.array_equal(image, ORIENTATIONS[6](np.asarray(PHOTO)))
    assert np.array_equal(image, np.asarray(pil_loader(str(tmp_path / "1.tif"))))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("value", [*ORIENTATIONS, 0, 9])
def test_exif_orientation_is_applied_if_asked(tmp_path: Path, value: int, kind: str) -> None:
    (tmp_path / "1.png").write_bytes(
        encoded(PHOTO, kind, exif=turned(value), **({"lossless": True} if kind == "WEBP" else {}))
    )
    stored = np.asarray(open_source(str(tmp_path)).image(0))
    assert stored.shape == (16, 24, 3)
    seen = ORIENTATIONS.get(value, ORIENTATIONS[1])(stored)
    source = open_source(str(tmp_path), exif=True)
    assert np.array_equal(np.asarray(source.image(0)), seen)
    assert np.array_equal(source.pixels(0, 16), adm_center_crop_arr(Image.fromarray(seen), 16))
    assert source.record()["reading"] == {"exif": True}


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "TIFF"])
def test_an_animation_gives_its_first_frame(tmp_path: Path, kind: str) -> None:
    first, second = Image.new("RGB", (16, 16), (255, 0, 0)), Image.new("RGB", (16, 16), (0, 0, 255))
    options = {"lossless": True} if kind == "WEBP" else {}
    raw = encoded(first, kind, save_all=True, append_images=[second], **options)
    with Image.open(io.BytesIO(raw)) as stored:
        assert getattr(stored, "n_frames", 1) == 2
    assert read(tmp_path, raw)[0, 0].tolist() == [255, 0, 0]


def test_all_256_values_survive_the_model_range() -> None:
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 3, 1, 1)
    x = to_model(values)
    assert (x.dtype, float(x.min()), float(x.max())) == (torch.float32, -1.0, 1.0)
    assert torch.equal(to_pixels(x), values)
    assert to_pixels(torch.tensor([-1.3, 0.0, 1.3])).tolist() == [0, 128, 255]


def test_hwc_and_chw_are_inverse() -> None:
    images = random_pixels(3, 5)[:, :4]
    planes = chw(images)
    assert (planes.shape, planes.is_contiguous()) == ((3, 3, 4, 5), True)
    assert planes[2, 1, 3, 4] == images[2, 3, 4, 1]
    assert np.array_equal(hwc(planes), images)
    assert hwc(planes).flags.c_contiguous

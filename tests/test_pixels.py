"""Pixels: the ADM crop, what odd images decode to, and the way to tensors and back."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import adm_center_crop_arr, encoded, random_image, random_pixels
from PIL import Image

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
    pixels = open_source(str(tmp_path)).pixels(0, 16)
    assert pixels.reshape(-1, 3).min(0).tolist() == pixels.reshape(-1, 3).max(0).tolist() == rgb


@pytest.mark.parametrize("mode", ["I", "F"])
def test_32_bits_a_pixel_are_refused_not_clipped(tmp_path: Path, mode: str) -> None:
    with pytest.raises(ImageError, match=r"a/1\.tif"):
        read(tmp_path, encoded(Image.new(mode, (16, 16), 1), "TIFF"), "a/1.tif")


def test_exif_rotation_is_not_applied_and_the_content_decides_the_format(tmp_path: Path) -> None:
    image, exif = random_image(8, 8).resize((32, 16)), Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    raw = encoded(image, "JPEG", exif=exif)
    with Image.open(io.BytesIO(raw)) as stored:
        assert np.array_equal(read(tmp_path, raw, "a/1.png"), adm_center_crop_arr(stored.convert("RGB"), 16))


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

"""The ADM crop, pixels and tensors, and pictures out (npz, grids, GIFs, curves)."""

import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pictures import adm_center_crop_arr, random_image, random_pixels
from PIL import Image

from rdpm_cli.errors import DataError
from rdpm_cli.images import writers
from rdpm_cli.images.tensors import chw, hwc, to_model, to_pixels
from rdpm_cli.images.transform import center_crop

# ---- the ADM crop -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [16, 15])
@pytest.mark.parametrize(
    "shape",
    [
        (16, 16),
        (16, 41),
        (17, 23),
        (31, 31),
        (32, 32),
        (33, 47),
        (64, 48),
        (203, 131),
        (20, 500),
        (9, 13),
        (5, 60),
        (1, 1),
    ],
)
def test_center_crop_equals_adm(shape: tuple[int, int], size: int) -> None:
    image = random_image(*shape)
    cropped = center_crop(image, size)
    assert cropped.shape == (size, size, 3)
    assert cropped.dtype == np.uint8
    assert np.array_equal(cropped, adm_center_crop_arr(image, size))


def test_center_crop_keeps_an_image_of_the_right_size() -> None:
    image = random_image(16, 16)
    assert np.array_equal(center_crop(image, 16), np.asarray(image))


def test_center_crop_takes_the_middle() -> None:
    wide = np.zeros((16, 48, 3), dtype=np.uint8)
    wide[:, 16:32] = 200
    assert (center_crop(Image.fromarray(wide), 16) == 200).all()


# ---- pixels and tensors -------------------------------------------------------------------------------------------


def test_all_256_values_survive_the_model_range() -> None:
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 3, 1, 1)
    x = to_model(values)
    assert (x.dtype, float(x.min()), float(x.max())) == (torch.float32, -1.0, 1.0)
    assert torch.equal(to_pixels(x), values)


@pytest.mark.parametrize(
    ("value", "pixel"),
    [(-1.0, 0), (-3.0, 0), (1.0, 255), (9.0, 255), (1 / 255, 128), (0.99 / 127.5 - 1, 1), (0.49 / 127.5 - 1, 0)],
)
def test_to_pixels_rounds_to_the_nearest_and_clamps(value: float, pixel: int) -> None:
    assert to_pixels(torch.tensor([value])).tolist() == [pixel]


def test_to_pixels_is_round_of_127_5_x_plus_127_5() -> None:
    x = np.random.default_rng(0).uniform(-1.3, 1.3, 1000).astype(np.float32)
    expected = np.clip(np.round(np.float32(127.5) * x + np.float32(127.5)), 0, 255).astype(np.uint8)
    assert np.array_equal(to_pixels(torch.from_numpy(x)).numpy(), expected)


def test_hwc_and_chw_are_inverse() -> None:
    images = random_pixels(3, 5)[:, :4]
    planes = chw(images)
    assert planes.shape == (3, 3, 4, 5)
    assert planes[2, 1, 3, 4] == images[2, 3, 4, 1]
    assert np.array_equal(hwc(planes), images)
    assert hwc(planes).flags.c_contiguous
    assert planes.is_contiguous()


# ---- writers ------------------------------------------------------------------------------------------------------


def test_png_round_trip(tmp_path: Path) -> None:
    pixels = random_pixels(1, 16)[0]
    writers.save_png(tmp_path / "new" / "image.png", pixels)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "new" / "image.png")), pixels)


def test_npz_is_what_adm_reads(tmp_path: Path) -> None:
    images, labels = random_pixels(7, 6), [3, 1, 4, 1, 5, 9, 2]
    strided = [np.asfortranarray(part) for part in (images[:4], images[4:6], images[6:])]
    writers.save_npz(tmp_path / "samples.npz", (7, 6, 6, 3), strided, labels)
    with np.load(tmp_path / "samples.npz") as content:
        assert sorted(content.files) == ["arr_0", "arr_1"]
        assert (content["arr_0"].dtype, content["arr_0"].flags.c_contiguous) == (np.uint8, True)
        assert np.array_equal(content["arr_0"], images)
        assert content["arr_1"].tolist() == labels
    with zipfile.ZipFile(tmp_path / "samples.npz") as archive:
        assert {member.compress_type for member in archive.infolist()} == {zipfile.ZIP_STORED}


def test_an_interrupted_npz_leaves_nothing(tmp_path: Path) -> None:
    def batches() -> Iterator[NDArray[np.uint8]]:
        yield random_pixels(2, 6)
        raise DataError("the third sample is missing")

    with pytest.raises(DataError, match="third sample"):
        writers.save_npz(tmp_path / "samples.npz", (4, 6, 6, 3), batches(), [0] * 4)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("side", "factor"), [(8, 8), (16, 4), (32, 2), (64, 1), (256, 1)])
def test_small_images_are_enlarged_to_about_64_pixels(side: int, factor: int) -> None:
    assert writers.enlargement(side) == factor


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, 1, 1), (6, 3, 2), (7, 3, 3)])
def test_grid_size_is_tiles_and_gaps(count: int, columns: int, rows: int) -> None:
    sheet = writers.grid(random_pixels(count, 16), columns)
    assert sheet.shape == (rows * 66 + 2, columns * 66 + 2, 3)
    assert sheet.dtype == np.uint8


def test_grid_shows_every_tile_in_its_place_beside_labels_and_title() -> None:
    images = random_pixels(5, 16)
    plain = writers.grid(images, 3)
    sheet = writers.grid(images, 3, ["one", "another"], "a title")
    assert sheet.shape[0] > plain.shape[0]
    assert sheet.shape[1] > plain.shape[1]
    height, width = sheet.shape[:2]
    for place, image in enumerate(images):
        y, x = height - (2 - place // 3) * 66, width - (3 - place % 3) * 66
        assert np.array_equal(sheet[y : y + 64 : 4, x : x + 64 : 4], image)
        assert np.array_equal(sheet[y + 3 : y + 64 : 4, x + 3 : x + 64 : 4], image)
    assert (sheet[: height - plain.shape[0]] < 255).any(), "no title"
    assert (sheet[height - plain.shape[0] :, : width - plain.shape[1]] < 255).any(), "no labels"


def test_gif_has_a_frame_a_step_and_stays_at_the_last(tmp_path: Path) -> None:
    frames = [writers.grid(random_pixels(4, 16), 2, title=f"t = {t} of 5") for t in range(1, 6)]
    writers.save_gif(tmp_path / "steps.gif", frames, seconds=0.2)
    durations = []
    with Image.open(tmp_path / "steps.gif") as gif:
        assert (getattr(gif, "n_frames", 1), gif.size) == (5, frames[0].shape[1::-1])
        assert gif.info["loop"] == 0
        for frame in range(5):
            gif.seek(frame)
            durations.append(gif.info["duration"])
    assert durations == [200] * 4 + [800]


def test_curves_are_a_picture_with_a_panel_a_title(tmp_path: Path) -> None:
    losses = {"train": ([0.0, 100.0], [1.0, 0.01]), "held out": ([0.0, 100.0], [1.1, 0.02])}
    writers.save_curves(tmp_path / "one.png", {"loss": losses})
    writers.save_curves(tmp_path / "two.png", {"loss": losses, "accuracy|t": {"model": ([1.0, 2.0], [0.5, 0.2])}})
    writers.save_curves(tmp_path / "log.png", {"loss": losses}, log_panels=["loss"])
    sheets = {path.stem: np.asarray(Image.open(path).convert("RGB")) for path in tmp_path.glob("*.png")}
    assert sheets["two"].shape[1] == 2 * sheets["one"].shape[1]
    assert len(np.unique(sheets["one"].reshape(-1, 3), axis=0)) > 2, "nothing is drawn"
    assert not np.array_equal(sheets["log"], sheets["one"]), "the logarithmic axis does nothing"


@pytest.mark.parametrize("name", ["image.png", "steps.gif", "curves.png"])
def test_a_writer_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    write: dict[str, Callable[[Path], None]] = {
        "image.png": lambda path: writers.save_png(path, random_pixels(1, 8)[0]),
        "steps.gif": lambda path: writers.save_gif(path, list(random_pixels(2, 8))),
        "curves.png": lambda path: writers.save_curves(path, {"loss": {"train": ([0.0], [1.0])}}),
    }
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write[name](tmp_path / name)
    assert list(tmp_path.iterdir()) == []

"""Pictures out (PNG, grids, GIFs, curves) and .npz files of images both ways."""

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from pictures import random_pixels
from PIL import Image

from rdpm_cli.data import pictures
from rdpm_cli.errors import DataError


def test_grid_shows_every_tile_in_its_place_with_labels_and_title() -> None:
    images = random_pixels(5, 16)
    plain = pictures.grid(images, 3)
    sheet = pictures.grid(images, 3, ["one", "another"], "a title")
    height, width = sheet.shape[:2]
    assert height > plain.shape[0]
    assert width > plain.shape[1]
    for index, image in enumerate(images):
        y, x = height - (2 - index // 3) * 66, width - (3 - index % 3) * 66
        assert np.array_equal(sheet[y : y + 64 : 4, x : x + 64 : 4], image)
        assert np.array_equal(sheet[y + 3 : y + 64 : 4, x + 3 : x + 64 : 4], image)
    assert (sheet[: height - plain.shape[0]] < 255).any(), "no title"
    assert (sheet[height - plain.shape[0] :, : width - plain.shape[1]] < 255).any(), "no labels"


def test_gif_has_a_frame_a_step_and_stays_at_the_last(tmp_path: Path) -> None:
    frames = [pictures.grid(random_pixels(4, 16), 2, title=f"t = {t} of 5") for t in range(1, 6)]
    pictures.save_gif(tmp_path / "steps.gif", frames, seconds=0.2)
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
    pictures.save_curves(tmp_path / "one.png", {"loss": losses})
    pictures.save_curves(tmp_path / "two.png", {"loss": losses, "accuracy|t": {"model": ([1.0, 2.0], [0.5, 0.2])}})
    pictures.save_curves(tmp_path / "log.png", {"loss": losses}, log_panels=["loss"])
    sheets = {path.stem: pictures.read_png(path) for path in tmp_path.glob("*.png")}
    assert sheets["two"].shape[1] == 2 * sheets["one"].shape[1]
    assert len(np.unique(sheets["one"].reshape(-1, 3), axis=0)) > 2, "nothing is drawn"
    assert not np.array_equal(sheets["log"], sheets["one"]), "the logarithmic axis does nothing"


def test_npz_is_the_format_of_adm(tmp_path: Path) -> None:
    images, labels = random_pixels(7, 6), [3, 1, 4, 1, 5, 9, 2]
    strided = [np.asfortranarray(part) for part in (images[:4], images[4:6], images[6:])]
    pictures.save_npz(tmp_path / "samples.npz", (7, 6, 6, 3), strided, labels)
    with np.load(tmp_path / "samples.npz") as content:
        assert sorted(content.files) == ["arr_0", "arr_1"]
        assert (content["arr_0"].dtype, content["arr_0"].flags.c_contiguous) == (np.uint8, True)
        assert np.array_equal(content["arr_0"], images)
        assert content["arr_1"].tolist() == labels
    with zipfile.ZipFile(tmp_path / "samples.npz") as archive:
        assert {member.compress_type for member in archive.infolist()} == {zipfile.ZIP_STORED}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_images_are_read_in_pieces(tmp_path: Path, save: Callable[..., None]) -> None:
    images, path = random_pixels(9, 6), tmp_path / "x.npz"
    save(path, images, np.arange(9), mu=np.zeros(3))
    npz = pictures.NpzImages(path)
    assert (npz.shape, npz.labels) == ((9, 6, 6, 3), list(range(9)))
    pieces = [range(0, 2), range(2, 3), range(5, 9)]
    for piece, pixels in zip(pieces, npz.read(pieces), strict=True):
        assert np.array_equal(pixels, images[piece.start : piece.stop])
    assert pictures.npz_names(path) == ["mu", "arr_0", "arr_1"]
    assert pictures.npz_array(path, "mu").shape == (3,)


@pytest.mark.parametrize(
    "arrays",
    [
        {"mu": np.zeros(3)},
        {"arr_0": np.zeros((2, 4, 4, 3), dtype=np.float32)},
        {"arr_0": np.zeros((2, 4, 4), dtype=np.uint8)},
        {"arr_0": np.asfortranarray(np.zeros((2, 4, 4, 3), dtype=np.uint8))},
    ],
)
def test_an_npz_without_uint8_images_is_refused(tmp_path: Path, arrays: dict[str, NDArray[np.generic]]) -> None:
    np.savez(tmp_path / "x.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"x\.npz"):
        pictures.NpzImages(tmp_path / "x.npz")


def test_a_damaged_npz_is_named_and_objects_are_not_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", arr_0=random_pixels(2, 4))
    raw = (tmp_path / "x.npz").read_bytes()
    for name, content in {"half": raw[:100], "empty": b"", "text": b"text"}.items():
        (tmp_path / f"{name}.npz").write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}\.npz"):
            pictures.npz_names(tmp_path / f"{name}.npz")
    np.savez(tmp_path / "objects.npz", x=np.array([{}], dtype=object))
    with pytest.raises(DataError, match=r"objects\.npz"):
        pictures.npz_array(tmp_path / "objects.npz", "x")

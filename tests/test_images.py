"""Images in (folders, zips, digits, the ADM crop) and pictures out (npz, grids, GIFs, curves)."""

import io
import multiprocessing
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from rdpm_cli.errors import DataError, RdpmError, UsageError
from rdpm_cli.images import sources, writers
from rdpm_cli.images.sources import DigitsSource, FolderSource, ImageSource, ZipSource, open_source
from rdpm_cli.images.tensors import chw, hwc, to_model, to_pixels
from rdpm_cli.images.transform import center_crop

REAL_DATA = Path(__file__).parents[2] / "shared" / "data"


def random_image(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def random_pixels(count: int, side: int) -> NDArray[np.uint8]:
    return np.random.default_rng(1).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def make_files(root: Path, *names: str) -> Path:
    """Small images under these relative names, each of its own colours."""
    for seed, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        random_image(20, 18, seed).save(root / name)
    return root


def make_zip(path: Path, *names: str) -> Path:
    """A .zip of one small PNG under each of these member names."""
    buffer = io.BytesIO()
    random_image(8, 8).save(buffer, "PNG")
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, buffer.getvalue())
    return path


@pytest.fixture
def image_zip(image_folder: Path, tmp_path: Path) -> Path:
    """`image_folder` packed in reverse order, with the folder entries that zip tools add."""
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(image_folder.rglob("*"), reverse=True):
            archive.write(file, file.relative_to(image_folder))
    return path


# ---- the ADM crop -------------------------------------------------------------------------------------------------


def adm_center_crop_arr(pil_image: Image.Image, image_size: int) -> NDArray[np.uint8]:
    """`center_crop_arr` of openai/guided-diffusion, image_datasets.py, transcribed with Pillow's new names."""
    while min(*pil_image.size) >= 2 * image_size:
        halved = tuple(x // 2 for x in pil_image.size)
        pil_image = pil_image.resize((halved[0], halved[1]), resample=Image.Resampling.BOX)
    scale = image_size / min(*pil_image.size)
    scaled = tuple(round(x * scale) for x in pil_image.size)
    pil_image = pil_image.resize((scaled[0], scaled[1]), resample=Image.Resampling.BICUBIC)
    arr = np.array(pil_image)
    crop_y = (arr.shape[0] - image_size) // 2
    crop_x = (arr.shape[1] - image_size) // 2
    return arr[crop_y : crop_y + image_size, crop_x : crop_x + image_size]


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


# ---- sources ------------------------------------------------------------------------------------------------------


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
        (lambda root: make_zip(root / "cut.zip", "a/1.png").rename(root / "images.tar"), DataError, "not a folder or"),
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


def test_builtin_names() -> None:
    assert [sources.is_builtin(spec) for spec in ("digits", "digits:train", "./digits", "digits.zip")] == [
        True,
        True,
        False,
        False,
    ]


def real(name: str) -> str:
    """Real images beside the project; they are not part of it."""
    if not (REAL_DATA / name).exists():
        pytest.skip(f"../shared/data/{name} is not here")
    return str(REAL_DATA / name)


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

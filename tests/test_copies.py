"""eval memory: exact neighbours, the rules of copies, and copies that are found whatever their order and number."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from extractors import Blocks, Images, answer, assert_close, image_set, pixels, save_judge
from generators import save_generator
from numpy.typing import NDArray
from PIL import Image
from processes import ranks

from rdpm_cli.cli.app import run
from rdpm_cli.codes.store import CodeStore
from rdpm_cli.data.open import open_source
from rdpm_cli.engine.sample import sample
from rdpm_cli.evaluation import memory, metrics
from rdpm_cli.evaluation.memory import Neighbours, nearest_two
from rdpm_cli.generator import sampler

SHARES = ("near_copies", "near_copies_features", "authpct")
SCORES = (*SHARES, "nearest_pixels", "nearest_features")


@pytest.fixture(scope="module")
def judge_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_judge(tmp_path_factory.mktemp("judge") / "judge.pt")


def all_distances(x_ND: NDArray[Any], y_MD: NDArray[Any]) -> NDArray[np.float64]:
    """Every distance in float64: (N, M)."""
    return np.sqrt(((x_ND[:, None].astype(np.float64) - y_MD[None].astype(np.float64)) ** 2).sum(2))


def points(count: int, seed: int, kind: str) -> NDArray[Any]:
    random = np.random.default_rng(seed)
    if kind == "pixels":
        return random.integers(0, 256, (count, 12), dtype=np.uint8)
    return (random.normal(size=(count, 12)) + (1e3 if kind == "far from 0" else 0)).astype(np.float32)


@pytest.mark.parametrize("kind", ["features", "far from 0", "pixels"])
@pytest.mark.parametrize("blocks", [(4096, 8192, 4096), (7, 5, 3), (1, 1, 1)])
def test_the_nearest_two_are_those_of_all_distances(
    kind: str, blocks: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, size in zip(("ROWS", "COLUMNS", "BLOCK"), blocks, strict=True):
        monkeypatch.setattr(metrics, name, size)
    x, y, own = points(20, 1, kind), points(31, 2, kind), np.array([30, 4, 0])
    for found, distances in ((nearest_two(x, y), all_distances(x, y)), (nearest_two(y[own], y, own), None)):
        if distances is None:
            distances = all_distances(y[own], y)
            distances[range(3), own] = np.inf
        assert np.array_equal(found.rows_N2, distances.argsort(1)[:, :2])
        assert np.allclose(found.distances_N2, np.sort(distances, 1)[:, :2], rtol=1e-12)


@pytest.mark.parametrize("copies", [2, 20])  # more than there are candidates
def test_equal_rows_are_exactly_0_apart(copies: int) -> None:
    y = np.concatenate([points(9, 1, "far from 0"), *[points(1, 2, "far from 0")] * copies])
    own = np.arange(len(y))
    assert (nearest_two(y[-1:], y).distances_N2 == 0).all()
    gaps = nearest_two(y, y, own)
    assert (gaps.rows_N2 != own[:, None]).all()
    assert np.array_equal(gaps.distances_N2[:, 0] == 0, own >= 9)


def test_a_near_copy_is_a_third_as_far_from_the_nearest_as_from_the_second() -> None:
    distances = np.array([[1.0, 3.0], [1.0, 2.99], [0.0, 0.0], [0.0, 1.0], [2.0, 2.0]])
    assert memory.ratios(distances) == pytest.approx([1 / 3, 1 / 2.99, 0, 0, 1])
    assert (memory.ratios(distances) <= memory.COPY).tolist() == [True, False, True, True, False]


def test_authentic_is_farther_from_the_nearest_than_that_is_from_all_others() -> None:
    x, y = points(50, 1, "features"), points(40, 2, "features")
    among, gaps = all_distances(x, y), all_distances(y, y)
    np.fill_diagonal(gaps, np.inf)
    expected = among.min(1) > gaps.min(1)[among.argmin(1)]
    assert 0 < expected.sum() < 50
    assert np.array_equal(memory.authentic(nearest_two(x, y), y), expected)
    one = Neighbours(np.array([[3, 5]]), np.array([[gaps[3].min(), 9.0]]))
    assert not memory.authentic(one, y).any()  # as far


def test_pixels_are_means_of_boxes_of_at_most_32() -> None:
    images = pixels(3, side=64)
    means = images.reshape(3, 32, 2, 32, 2, 3).mean((2, 4)).reshape(3, -1)
    assert np.abs(memory.shrink(images) - means).max() <= 1  # rounded in both directions
    assert np.array_equal(memory.shrink(pixels(3)), pixels(3).reshape(3, -1))


def test_equal_images_have_equal_features_in_any_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the extractor's differ by rounding."""
    extractor, images = Blocks(), pixels(30)

    class Rounding(Blocks):
        def __call__(self, pixels_BCHW: Any) -> Any:
            activations = extractor(pixels_BCHW)
            return activations._replace(features_BD=activations.features_BD * (1 + 1e-7 * len(pixels_BCHW)))

    training = memory.views(Rounding(), image_set(images))
    copies = memory.views(Rounding(), image_set(images[3:5]))
    assert training is not None
    assert copies is not None
    assert (nearest_two(copies.features.features_ND, training.features.features_ND).distances_N2[:, 0] > 0).all()
    known: dict[bytes, Any] = {}
    for view in (training, copies):
        memory.equal_features(view.features, known)
    values, _ = memory.compare(copies, training, extractor.device)
    assert (values["nearest_features"], values["authpct"]) == (0, 0)


def save(path: Path, images: Images) -> Path:
    np.savez(path, images)
    return path


def remembered(
    capsys: pytest.CaptureFixture[str], folder: Path, judge: Path, samples: Images, training: Images, *args: object
) -> dict[str, Any]:
    target, ref = save(folder / "samples.npz", samples), save(folder / "training.npz", training)
    return answer(capsys, "memory", target, "--ref", ref, "--extractor", judge, *args)


@pytest.mark.parametrize("doubled", [0, 60])  # the training set may hold images twice
@pytest.mark.parametrize("seed", [0, 1])
def test_training_images_drawn_again_are_caught_in_any_order(
    doubled: int, seed: int, judge_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    order = np.random.default_rng(seed).permutation(60)
    images = pixels(60)
    training = np.concatenate([images, images[:doubled]])
    values = remembered(capsys, tmp_path, judge_path, images[order], training)
    assert {name: values[name] for name in SCORES} == dict(zip(SCORES, (1, 1, 0, 0, 0), strict=True))
    assert [pair["training"] for pair in values["closest"]] == order[:16].tolist()
    assert [pair["sample"] for pair in values["closest"]] == list(range(16))


def test_copies_with_noise_are_caught_and_other_images_are_not(
    judge_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training, others = pixels(60, 1), pixels(50, 2)
    noise = np.random.default_rng(3).normal(0, 6, others.shape)
    noisy = np.clip(training[:50] + noise, 0, 255).round().astype(np.uint8)
    unseen = save(tmp_path / "unseen.npz", others)
    copied = remembered(capsys, tmp_path, judge_path, noisy, training, "--heldout", unseen)
    independent = remembered(capsys, tmp_path, judge_path, others, training)
    assert (copied["near_copies"], independent["near_copies"]) == (1, 0)
    assert copied["authpct"] < 0.2 < independent["authpct"]
    difference = (noisy.astype(np.float64) - training[:50]) / 255
    assert copied["nearest_pixels"] == pytest.approx(np.median(np.sqrt((difference**2).mean((1, 2, 3)))))
    assert copied["heldout"] == {
        **{name: independent[name] for name in SCORES}, "name": str(unseen), "count": 50,
        "sha256": independent["target"]["sha256"],
    }  # fmt: skip
    assert independent["heldout"] is None
    assert (copied["n"], copied["reference"]["count"], copied["target"]["count"]) == (50, 60, 50)
    ratios = [pair["ratio"] for pair in copied["closest"]]
    assert ratios == sorted(ratios)
    assert max(ratios) < 1 / 3


def test_a_folder_gives_the_names_of_its_files_and_its_record_the_training_images(
    judge_path: Path, tmp_path: Path, tiny_tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A checkpoint is scored like its samples."""
    monkeypatch.chdir(tmp_path)
    generator = save_generator(tmp_path / "generator.pt", tiny_tokenizer_file, micro_batch=4)
    sample(generator, "all", 2, Path("samples"), seed=3, device="cpu")
    Path("training").mkdir()
    for index in range(6):
        picture = Image.open(f"samples/{index:06d}.png")
        picture.save(f"training/{9 - index}.png")
    common = ["--extractor", judge_path, "--heldout", "training"]
    by_files = answer(capsys, "memory", "samples", "--ref", "training", *common)
    drawn = answer(capsys, "memory", "--ckpt", generator, "--per-class", 2, "--seed", 3, "--ref", "training", *common)
    assert {name: drawn[name] for name in SCORES} == {name: by_files[name] for name in SCORES}
    assert (by_files["near_copies"], drawn["checkpoint"]) == (1, by_files["checkpoint"])
    for pair in by_files["closest"]:
        assert 9 - int(pair["sample"].removesuffix(".png")) == int(pair["training"].removesuffix(".png"))
    assert run(["eval", "memory", "samples", "--extractor", str(judge_path), "--device", "cpu"]) == 3
    assert "--ref" in capsys.readouterr().err  # the record names none


@pytest.mark.parametrize(("count", "pairs"), [(5, 5), (20, 16)])
def test_the_sheet_has_a_row_of_two_pictures_for_each_of_the_closest_pairs(
    count: int, pairs: int, judge_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, sheet = pixels(30), tmp_path / "sheets" / "pairs.png"
    values = remembered(capsys, tmp_path, judge_path, images[:count][::-1], images, "--sheet", sheet)
    assert len(values["closest"]) == pairs
    with Image.open(sheet) as picture:
        assert picture.format == "PNG"
        drawn = np.asarray(picture)
    tile, gap = 64, 2  # 16 pixels, four times enlarged
    assert drawn.shape[0] == 24 + gap + pairs * (tile + gap)
    rows = drawn[24 + gap :, -2 * (tile + gap) :].reshape(pairs, tile + gap, 2, tile + gap, 3)[:, :tile, :, :tile]
    small = rows.transpose(0, 2, 1, 3, 4)[:, :, ::4, ::4]
    for row, pair in zip(small, values["closest"], strict=True):
        assert np.array_equal(row, images[[count - 1 - pair["sample"], pair["training"]]])
    assert [path.name for path in sheet.parent.iterdir()] == ["pairs.png"]


REFUSED = {
    "stats.npz": (3, "stats.npz"), "two.npz": (3, "two.npz"), "large.npz": (3, "32×32"),
    "many.npz --heldout stats.npz": (3, "stats.npz"), "many.npz --heldout none.npz": (3, "none.npz"),
    "many.npz --sheet pairs.jpg": (2, "pairs.jpg"), "many.npz --per-class 2": (2, "--per-class"),
}  # fmt: skip


@pytest.mark.parametrize(("args", "refusal"), REFUSED.items())
def test_what_is_no_set_of_images_or_too_few_is_refused_before_the_pass(
    args: str, refusal: tuple[int, str], judge_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    np.savez("stats.npz", mu=np.zeros(6), sigma=np.eye(6), arr_0=pixels(9))
    for name, images in {"none": pixels(0), "two": pixels(2), "many": pixels(9), "large": pixels(9, side=32)}.items():
        np.savez(f"{name}.npz", images)
    command = ["eval", "memory", "many.npz", "--ref", *args.split(), "--extractor", str(judge_path), "--device", "cpu"]
    assert run(command) == refusal[0]
    shown = capsys.readouterr()
    assert refusal[1] in shown.err
    assert "extract features" not in shown.err


@pytest.mark.slow
def test_two_processes_find_what_one_does(judge_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    training, samples = save(tmp_path / "training.npz", pixels(600, 1)), save(tmp_path / "samples.npz", pixels(300, 2))
    args = ["eval", "memory", str(samples), "--ref", str(training), "--heldout", str(training)]
    args += ["--extractor", str(judge_path), "--device", "cpu", "--quiet", "--json"]
    both = ranks(args, tmp_path / "both.json")
    assert run(args) == 0
    assert_close(both, json.loads(capsys.readouterr().out))


@pytest.mark.parametrize("views", [1, 3])
def test_images_that_return_under_the_noise_of_their_codes_are_recalled(
    judge_path: Path, image_folder: Path, tiny_tokenizer_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], views: int,
) -> None:  # fmt: skip
    """A stand-in for the generator gives back the image of half of the store's addresses, and of no other."""
    source, common = open_source(str(image_folder)), ["--device", "cpu", "--quiet"]
    codes, words = tmp_path / "codes", ["--views", str(views), "--seed", "7", "--tokenizer", str(tiny_tokenizer_file)]
    assert run(["tokenize", str(image_folder), str(codes), *words, *common]) == 0
    original, asked = sampler.Job.draw, list[tuple[tuple[str, int], int]]()

    def draw(job: sampler.Job, indices: list[int], labels: list[int]) -> sampler.Samples:
        samples = original(job, indices, labels)
        if job.options.noise == ("sample", 0):
            return samples
        asked.append((job.options.noise, job.options.seed))
        assert labels == [source.need_labels()[index] for index in indices]
        knows = job.options.noise == ("encode", 0)
        rows = [index if knows and index % 2 else (index + 1) % len(source) for index in indices]
        return replace(samples, pixels_BHWC=np.stack([source.pixels(row, 16) for row in rows]))

    monkeypatch.setattr(sampler.Job, "draw", draw)
    ckpt = save_generator(tmp_path / "generator.pt", tiny_tokenizer_file)
    memory_of = ["eval", "memory", "--ckpt", str(ckpt), "--extractor", str(judge_path), "--codes", str(codes), *common]
    capsys.readouterr()
    assert run([*memory_of, "--ref", str(image_folder), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    rows = CodeStore(codes).split()[0][::views] // views
    assert values["recalled"] == pytest.approx(np.mean(rows % 2))
    assert values["recalled_unseen"] == 0
    assert asked == [(("encode", 0), 7), (("encode", views + views % 2), 7)]
    assert run([*memory_of, "--ref", str(image_folder / "a")]) == 3
    assert "--ref" in capsys.readouterr().err
    assert run(["eval", "memory", str(image_folder), "--codes", str(codes)]) == 2

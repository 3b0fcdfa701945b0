"""Scores: each metric against an independent computation, extractors, the judge, the chain of references."""

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from rdpm_cli import engine, files, modelfile
from rdpm_cli.cli.app import run
from rdpm_cli.config import JudgeConfig, TrainConfig
from rdpm_cli.errors import CheckpointError, DataError, RdpmError
from rdpm_cli.evaluation import evaluate, features, judge, metrics, reference, scores
from rdpm_cli.evaluation.features import Activations
from rdpm_cli.evaluation.judge import Judge, JudgeBatches, JudgeTask
from rdpm_cli.evaluation.reference import ImageSet
from rdpm_cli.images.sources import ImageSource, open_source
from rdpm_cli.images.tensors import chw, hwc, to_model, to_pixels
from rdpm_cli.images.transform import DRAFT_TRANSFORM, TRANSFORM
from rdpm_cli.recipe_files import load_recipe
from rdpm_cli.step import TrainStep
from rdpm_cli.threads import one_thread
from rdpm_cli.tokenizer import model as tokenizer_file

CPU = torch.device("cpu")
Floats = NDArray[np.float64]


def normal(count: int, width: int, seed: int = 0) -> Floats:
    """Correlated features."""
    random = np.random.default_rng(seed)
    return random.normal(size=(count, width)) @ random.normal(size=(width, width)) + random.normal(size=width)


def random_pixels(count: int, side: int = 16, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def distance(a_ND: NDArray[np.floating], b_ND: NDArray[np.floating]) -> float:
    return metrics.frechet_distance(metrics.statistics(a_ND), metrics.statistics(b_ND))


# ---- metrics ------------------------------------------------------------------------------------------------------


def test_statistics_are_mean_and_unbiased_covariance_in_float64() -> None:
    wide = normal(40, 5) + 1e4
    found = metrics.statistics(wide.astype(np.float32))
    exact = wide.astype(np.float32).astype(np.float64)
    centred = exact - exact.sum(0) / 40
    assert found.count == 40
    assert found.covariance_DD.dtype == np.float64
    assert np.allclose(found.mean_D, exact.sum(0) / 40, rtol=1e-12)
    assert np.allclose(found.covariance_DD, centred.T @ centred / 39, rtol=1e-9)


def test_statistics_of_one_image_are_refused() -> None:
    with pytest.raises(DataError, match="at least 2 images, not 1"):
        metrics.statistics(normal(1, 5))


@pytest.mark.parametrize(("count", "width"), [(50, 8), (500, 3), (30, 1)])
def test_frechet_distance_equals_the_formula_with_scipys_matrix_root(count: int, width: int) -> None:
    from scipy.linalg import sqrtm

    a, b = normal(count, width, 1), normal(count + 7, width, 2)
    mean_a, mean_b = a.mean(0), b.mean(0)
    cov_a, cov_b = np.atleast_2d(np.cov(a, rowvar=False)), np.atleast_2d(np.cov(b, rowvar=False))
    expected = np.sum((mean_a - mean_b) ** 2) + np.trace(cov_a + cov_b - 2 * np.real(sqrtm(cov_a @ cov_b)))
    assert distance(a, b) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("count", "width"), [(50, 8), (5, 8)])  # full rank, and fewer images than features
def test_frechet_distance_closed_forms(count: int, width: int) -> None:
    a = normal(count, width)
    scale = float(np.trace(metrics.statistics(a).covariance_DD))
    shift = np.arange(width) / 3
    assert distance(a, a) == pytest.approx(0, abs=1e-6 * scale)
    assert distance(a, a + shift) == pytest.approx(np.sum(shift**2), abs=1e-6 * scale)
    mean = a.mean(0)
    assert distance(a, mean + 3 * (a - mean)) == pytest.approx(4 * scale, rel=1e-6)  # (1 - 3)² tr S


def test_frechet_distance_of_diagonal_gaussians_is_a_sum_over_axes() -> None:
    a = metrics.Statistics(np.array([0.0, 1.0]), np.diag([4.0, 9.0]), 10)
    b = metrics.Statistics(np.array([2.0, 1.0]), np.diag([1.0, 16.0]), 10)
    assert metrics.frechet_distance(a, b) == pytest.approx(4 + (2 - 1) ** 2 + (3 - 4) ** 2)
    assert metrics.frechet_distance(b, a) == pytest.approx(6)


@pytest.mark.parametrize(
    ("counts", "size", "subsets"),
    [
        ([80] * 10, 297, 2),
        ([80] * 10, 100, 8),
        ([2, 2, 2], 2, 3),
        ([7, 5, 9], 6, 2),
        ([3, 3], 7, 0),
        ([5, 0, 5], 4, 2),
    ],
)
def test_balanced_subsets_are_disjoint_and_balanced(counts: list[int], size: int, subsets: int) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    found = metrics.balanced_subsets(labels, size)
    assert [len(rows) for rows in found] == [size] * subsets
    taken = [int(row) for rows in found for row in rows]
    assert len(taken) == len(set(taken))
    for rows in found:
        shares = np.unique(labels[rows], return_counts=True)[1]
        assert shares.max() - shares.min() <= 1
        assert len(shares) == min(size, sum(count > 0 for count in counts))


def test_psnr_and_mse_equal_their_formulas() -> None:
    a, b = random_pixels(3, seed=1), random_pixels(3, seed=2)
    squared = (a.astype(np.float64) - b) ** 2
    mse = np.array([part.mean() for part in squared])
    assert np.allclose(metrics.mean_squared_error(chw(a), chw(b)).numpy(), mse / 127.5**2, rtol=1e-12)
    assert np.allclose(metrics.psnr(chw(a), chw(b)).numpy(), 10 * np.log10(255**2 / mse), rtol=1e-6)


def test_a_difference_of_one_level_has_the_psnr_of_the_textbook() -> None:
    a = np.full((1, 16, 16, 3), 100, dtype=np.uint8)
    assert float(metrics.psnr(chw(a), chw(a + 1))) == pytest.approx(48.1308, abs=1e-4)  # 20 log10(255)


def ssim_by_hand(a_HWC: NDArray[np.uint8], b_HWC: NDArray[np.uint8]) -> float:
    """Wang et al. 2004 on each channel: Gaussian 11×11 window of sigma 1.5 at every pixel, borders mirrored, mean."""
    line = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2

    def blur(plane_HWC: Floats) -> Floats:
        mirrored = np.pad(plane_HWC, ((5, 5), (5, 5), (0, 0)), mode="reflect")
        views = np.lib.stride_tricks.sliding_window_view(mirrored, (11, 11), axis=(0, 1))  # (H, W, C, 11, 11)
        return np.einsum("hwcij,ij->hwc", views, window)

    a, b = a_HWC / 255.0, b_HWC / 255.0
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    values = (2 * mean_a * mean_b + c1) * (2 * covariance + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return float(values.mean())


@pytest.mark.parametrize("side", [11, 16, 37])
def test_ssim_equals_the_formula(side: int) -> None:
    a = random_pixels(3, side, seed=1)
    near = np.clip(a + np.random.default_rng(3).normal(0, 20, a.shape), 0, 255).astype(np.uint8)
    for b in (near, random_pixels(3, side, seed=2)):
        expected = [ssim_by_hand(one, other) for one, other in zip(a, b, strict=True)]
        assert np.allclose(metrics.ssim(chw(a), chw(b)).numpy(), expected, atol=1e-4)


def test_scores_of_one_image_keep_their_axis() -> None:
    a, b = chw(random_pixels(1, seed=1)), chw(random_pixels(1, seed=2))
    assert metrics.ssim(a, b).shape == metrics.psnr(a, b).shape == metrics.mean_squared_error(a, b).shape == (1,)


def test_identical_images_are_scored_as_identical() -> None:
    a = chw(random_pixels(2))
    assert metrics.mean_squared_error(a, a).tolist() == [0.0, 0.0]
    assert metrics.ssim(a, a).tolist() == pytest.approx([1.0, 1.0])
    assert torch.isposinf(metrics.psnr(a, a)).all()


# ---- reconstruction scores ----------------------------------------------------------------------------------------


def test_reconstruction_scores_are_means_over_images_not_batches() -> None:
    a, b = random_pixels(5, seed=1), random_pixels(5, seed=2)
    found = []
    for cuts in ([], [1], [2, 3]):
        scores = evaluate.ReconstructionScores()
        for originals, recon in zip(np.split(a, cuts), np.split(b, cuts), strict=True):
            scores.add(originals, recon)
        found.append(scores.means())
    mse = [((one.astype(np.float64) - other) ** 2).mean() for one, other in zip(a, b, strict=True)]
    ssim = [ssim_by_hand(one, other) for one, other in zip(a, b, strict=True)]
    for means in found:
        assert means["mse"] == pytest.approx(np.mean(mse) / 127.5**2)
        assert means["psnr"] == pytest.approx(np.mean(10 * np.log10(255**2 / np.array(mse))))
        assert means["ssim"] == pytest.approx(np.mean(ssim), abs=1e-4)


def test_a_perfect_reconstruction_can_be_reported() -> None:
    """One blank image that comes back exactly must not cost the whole evaluation its answer."""
    scores = evaluate.ReconstructionScores()
    scores.add(random_pixels(2), random_pixels(2))
    means = scores.means()
    assert means["mse"] == 0
    assert means["ssim"] == pytest.approx(1)
    assert json.loads(files.canonical_json(means))["mse"] == 0


def test_reconstructions_depend_on_seed_and_index_not_on_the_limit(
    image_folder: Path, tiny_tokenizer_file: Path
) -> None:
    source, tokenizer = open_source(str(image_folder)), tokenizer_file.load(tiny_tokenizer_file)[0]

    def all_of(seed: int, limit: int | None) -> list[NDArray[np.uint8]]:
        parts = list(evaluate.reconstructions(source, tokenizer, seed, CPU, limit))
        assert [i for indices, _, _ in parts for i in indices] == [k * 36 // (limit or 36) for k in range(limit or 36)]
        return [np.concatenate([part[side] for part in parts]) for side in (1, 2)]

    originals, recon = all_of(0, None)
    assert np.array_equal(originals, np.stack([source.pixels(i, 16) for i in range(36)]))
    assert np.array_equal(all_of(0, 5)[1], recon[[0, 7, 14, 21, 28]])
    assert (all_of(1, None)[1] != recon).any(axis=(1, 2, 3)).all()
    x, eps = to_model(chw(originals[20:21])), tokenizer.noise("eval", 0, [20], [0])
    by_codes = hwc(to_pixels(tokenizer.decode(tokenizer.encode(x, eps))))[0].astype(int)
    assert np.abs(by_codes - recon[20]).max() <= 1


def test_eval_recon_is_the_mean_over_seeds_with_its_spread(image_folder: Path, tiny_tokenizer_file: Path) -> None:
    single = [
        engine.eval_recon(str(image_folder), tiny_tokenizer_file, seed=seed, seeds=1, limit=6, device="cpu").values
        for seed in (3, 4)
    ]
    both = engine.eval_recon(str(image_folder), tiny_tokenizer_file, seed=3, seeds=2, limit=6, device="cpu").values
    assert (both["n"], both["seeds"], single[0]["spread_over_seeds"]) == (6, [3, 4], None)
    for name in ("mse", "psnr", "ssim"):
        one, other = single[0][name], single[1][name]
        assert one != other
        assert both[name] == pytest.approx((one + other) / 2)
        assert both["spread_over_seeds"][name] == pytest.approx(abs(one - other) / 2)
    assert both["tokenizer"] == modelfile.load(tiny_tokenizer_file)["digest"]
    assert both["target"]["name"] == str(image_folder.resolve())


# ---- extractors ---------------------------------------------------------------------------------------------------


@dataclass
class Means:
    """An extractor whose features are mean colours and whose opinion is the brightest of them."""

    name: str = "mean colours"
    sha256: str = "0" * 64
    class_names: list[str] = field(default_factory=lambda: ["red", "green", "blue"])
    note: str = ""
    accuracy: float | None = None
    width: int = 3
    spatial: int = 0

    def __call__(self, pixels_BCHW: Tensor) -> Activations:
        means = pixels_BCHW.float().mean((2, 3))
        return Activations(means, means)


def image_set(pixels: NDArray[np.uint8], labels: list[int] | None = None, names: Iterable[str] = ()) -> ImageSet:
    def read(pieces: Iterable[range]) -> Iterator[NDArray[np.uint8]]:
        return (pixels[piece.start : piece.stop] for piece in pieces)

    return ImageSet("images", len(pixels), pixels.shape[1], labels, list(names), read, origin={})


def test_collect_gives_the_features_in_order() -> None:
    pixels = random_pixels(10)
    found = features.collect(Means(), [pixels[:3], pixels[3:]])
    assert np.allclose(found.features_ND, pixels.astype(np.float64).mean((1, 2)), atol=1e-4)
    assert found.predicted_N is not None
    assert found.predicted_N.tolist() == pixels.astype(np.float64).mean((1, 2)).argmax(1).tolist()
    assert len(found) == 10


@pytest.mark.parametrize("size", [1, 3, 7])
def test_collect_is_independent_of_the_batch_size(size: int) -> None:
    pixels = random_pixels(10)
    whole = features.collect(Means(), [pixels])
    parts = features.collect(Means(), [pixels[i : i + size] for i in range(0, 10, size)])
    assert np.array_equal(parts.features_ND, whole.features_ND)
    assert np.array_equal(parts.predicted_N, whole.predicted_N)  # type: ignore[arg-type]
    assert parts.sha256 == whole.sha256


def test_the_identity_of_a_set_follows_its_pixels_and_their_order() -> None:
    pixels = random_pixels(4)
    changed = pixels.copy()
    changed[3, 0, 0, 0] ^= 1
    sets = [pixels, pixels[::-1], pixels[:3], changed, pixels.reshape(4, 8, 32, 3)]
    assert len({features.collect(Means(), [one]).sha256 for one in sets}) == 5


def test_frechet_says_what_it_was_computed_with() -> None:
    ours, theirs = random_pixels(12, seed=1), random_pixels(20, seed=2)
    values = scores.frechet(Means(), image_set(ours), image_set(theirs), None)
    expected = distance(ours.astype(np.float64).mean((1, 2)), theirs.astype(np.float64).mean((1, 2)))
    assert values["value"] == pytest.approx(expected, rel=1e-4)
    assert (values["metric"], values["n"], values["subsets"]) == ("frechet_distance", 12, 1)
    assert (values["target"]["count"], values["reference"]["count"]) == (12, 20)
    assert values["reference"]["sha256"] == features.collect(Means(), [theirs[:5], theirs[5:]]).sha256
    assert values["extractor"] == {"name": "mean colours", "sha256": "0" * 64}
    assert (values["class_accuracy"], values["spread_over_subsets"], values["notes"]) == (None, None, [])


def test_few_images_are_noted() -> None:
    values = scores.frechet(Means(), image_set(random_pixels(3)), image_set(random_pixels(20)), None)
    assert any("fewer images than the 3 features" in note for note in values["notes"])


def test_a_subset_score_is_the_mean_over_balanced_subsets() -> None:
    ours, theirs, labels = random_pixels(12, seed=1), random_pixels(20, seed=2), [0, 1] * 6
    values = scores.frechet(Means(), image_set(ours, labels, "ab"), image_set(theirs), 4)
    means = [pixels.astype(np.float64).mean((1, 2)) for pixels in (ours, theirs)]
    each = [distance(means[0][rows], means[1]) for rows in metrics.balanced_subsets(np.array(labels), 4)]
    assert (values["n"], values["subsets"], len(each)) == (4, 3, 3)
    assert values["value"] == pytest.approx(np.mean(each), rel=1e-4)
    assert values["spread_over_subsets"] == pytest.approx(np.std(each), rel=1e-3)


@pytest.mark.parametrize(("labels", "text"), [(None, "has no labels"), ([0] * 6, "no class-balanced subset of 8")])
def test_a_subset_that_cannot_be_taken_is_refused(labels: list[int] | None, text: str) -> None:
    with pytest.raises(DataError, match=text):
        scores.frechet(Means(), image_set(random_pixels(6), labels, "a"), image_set(random_pixels(6)), 8)


@pytest.mark.parametrize(
    ("names", "accuracy"), [(["red", "green", "blue"], 1.0), (["blue", "green", "red"], 1 / 3), (["x", "y", "z"], 0.0)]
)
def test_class_accuracy_compares_names_not_numbers(names: list[str], accuracy: float) -> None:
    pixels = np.zeros((3, 4, 4, 3), dtype=np.uint8)
    for colour in range(3):
        pixels[colour, ..., colour] = 200
    target = image_set(pixels, [0, 1, 2], names)
    assert scores.class_accuracy(
        Means(), target.labels, target.class_names, features.collect(Means(), [pixels]).predicted_N
    ) == pytest.approx(accuracy)


def test_absent_inception_weights_name_the_file_and_the_places(no_weights: Path) -> None:
    with pytest.raises(CheckpointError, match=r"weights-inception-2015-12-05-6726825d\.pth are not here") as caught:
        features.make_extractor(None, None, CPU)
    assert caught.value.exit_code == 3
    for place in (no_weights / "weights", no_weights / "torch" / "hub" / "checkpoints"):
        assert str(place) in caught.value.message
    assert "RDPM_WEIGHTS" in caught.value.hint
    assert "--weights" in caught.value.hint


def test_a_named_weight_file_that_is_absent_is_not_replaced_by_another(no_weights: Path) -> None:
    (no_weights / "weights" / features.INCEPTION.file).write_bytes(b"another")
    with pytest.raises(CheckpointError, match=r"mine\.pth"):
        features.make_extractor(None, no_weights / "mine.pth", CPU)


def test_weights_are_looked_up_before_images_are_opened(no_weights: Path) -> None:
    with pytest.raises(CheckpointError, match="are not here"):
        engine.eval_fid(str(no_weights), device="cpu")  # a folder without images


def test_inception_gives_2048_features_and_says_whose_weights_it_has(random_inception: Path) -> None:
    extractor = features.make_extractor(None, random_inception, CPU)
    assert extractor.sha256 == files.sha256_file(random_inception)
    assert extractor.name == f"inception-v3 layout, weights {extractor.sha256[:8]}"
    assert "not the published ones" in extractor.note
    pixels = chw(random_pixels(2))
    with one_thread():
        found, logits, spatial = extractor(pixels)
        alone = extractor(pixels[1:]).features_BD
    assert spatial is not None
    assert [tuple(one.shape) for one in (found, logits, spatial)] == [(2, 2048), (2, 1008), (2, 2023)]
    assert bool(torch.isfinite(found).all())
    scale = float(found.abs().max())
    assert float((found[0] - found[1]).abs().max()) > 0.01 * scale, "the image does nothing"
    assert float((alone[0] - found[1]).abs().max()) < 1e-4 * scale


@pytest.mark.parametrize(
    ("name", "metric"),
    [
        ("inception-2015-12-05", "fid"),
        ("inception-v3 layout, weights 01234567", "frechet_distance"),
        ("judge judge.pt", "frechet_distance"),
    ],
)
def test_only_the_published_inception_gives_a_fid(name: str, metric: str) -> None:
    target, theirs = image_set(random_pixels(4)), image_set(random_pixels(4, seed=1))
    values = scores.frechet(Means(name=name, note="a note"), target, theirs, None)
    assert (values["metric"], values["extractor"]["name"]) == (metric, name)
    assert values["notes"] == ["a note"]


def pickled(value: object) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(pickle.dumps(value, protocol=2))


def saved(value: object) -> Callable[[Path], object]:
    return lambda path: torch.save(value, path)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"not found"),
        lambda path: path.write_bytes(b"PK\x03\x04 half a zip"),
        pickled({"a": 1}),
        saved({"fc.weight": torch.zeros(3)}),
        saved([torch.zeros(3)]),
        saved(torch.zeros(3)),
    ],
)
def test_what_holds_no_inception_is_refused_by_name(no_weights: Path, write: Callable[[Path], object]) -> None:
    path = no_weights / "weights.pth"
    write(path)
    with pytest.raises(CheckpointError, match=r"weights\.pth does not hold Inception weights") as caught:
        features.make_extractor(None, path, CPU)
    assert (caught.value.exit_code, "\n" in caught.value.message) == (3, False)


@pytest.mark.parametrize("form", [pickled, saved])
def test_a_malicious_pickle_is_refused_and_not_run(
    tmp_path: Path, form: Callable[[object], Callable[[Path], object]]
) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    form({"fc.weight": Bomb()})(tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"weights\.pth does not hold Inception weights"):
        features.make_extractor(None, tmp_path / "weights.pth", CPU)
    form({"format": "rdpm-judge", "weights": Bomb()})(tmp_path / "judge.pt")
    with pytest.raises(CheckpointError, match=r"judge\.pt cannot be read as a checkpoint"):
        features.make_extractor(tmp_path / "judge.pt", None, CPU)
    assert not (tmp_path / "ran").exists()


# ---- the judge ----------------------------------------------------------------------------------------------------


def make_judge(classes: int = 3) -> Judge:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Judge(16, 8, 6, classes).eval()


@pytest.fixture(scope="module")
def judge_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of an untrained judge of classes a, b, c."""
    path = tmp_path_factory.mktemp("judge") / "judge.pt"
    modelfile.save(path, judge.pack(make_judge(), list("abc"), provenance={"heldout_accuracy": 0.25}))
    return path


@pytest.mark.parametrize("side", [16, 32, 20])
def test_the_judge_gives_features_and_a_logit_a_class(side: int) -> None:
    found, logits = make_judge(5)(torch.zeros(2, 3, side, side))
    assert (tuple(found.shape), tuple(logits.shape)) == ((2, 6), (2, 5))


def test_the_judges_file_gives_the_same_judge(judge_path: Path) -> None:
    x = to_model(chw(random_pixels(2)))
    loaded, content = judge.load(judge_path)
    assert all(torch.equal(a, b) for a, b in zip(loaded(x), make_judge()(x), strict=True))
    assert (content["class_names"], content["format"]) == (["a", "b", "c"], "rdpm-judge")
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())


def test_a_judge_as_extractor_names_itself(judge_path: Path) -> None:
    extractor = features.make_extractor(judge_path, None, CPU)
    pixels = chw(random_pixels(2))
    found, logits, spatial = extractor(pixels)
    expected = make_judge()(to_model(pixels))
    assert spatial is None
    assert torch.equal(found, expected[0])
    assert torch.equal(logits, expected[1])
    assert (extractor.name, extractor.class_names) == ("judge judge.pt", ["a", "b", "c"])
    assert (extractor.sha256, "0.25" in extractor.note) == (modelfile.load(judge_path)["digest"], True)


def test_another_kind_of_checkpoint_is_no_judge(tiny_tokenizer_file: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.pt is a tokenizer, not a judge") as caught:
        features.make_extractor(tiny_tokenizer_file, None, CPU)
    assert (caught.value.exit_code, "rdpm eval judge" in caught.value.hint) == (3, True)
    with pytest.raises(CheckpointError, match=r"nothing\.pt does not exist"):
        features.make_extractor(tmp_path / "nothing.pt", None, CPU)


@pytest.fixture(scope="module")
def source(image_folder: Path) -> ImageSource:
    return open_source(str(image_folder))


def judge_batches(source: ImageSource, seed: int = 0, batch: int = 18) -> JudgeBatches:
    return JudgeBatches(source, JudgeConfig(width=8, features=6, train=TrainConfig(batch=batch, steps=4)), 16, seed)


def test_a_judges_batch_depends_on_seed_and_step_alone(source: ImageSource) -> None:
    first, second = judge_batches(source), judge_batches(source)
    first.batch_at(0, range(18))
    for step in (3, 1):
        a, b = first.batch_at(step, range(18)), second.batch_at(step, range(18))
        assert torch.equal(a.pixels_BCHW, b.pixels_BCHW)
        assert torch.equal(a.labels_B, b.labels_B)
        assert not torch.equal(a.pixels_BCHW, second.batch_at(step + 1, range(18)).pixels_BCHW)
        assert not torch.equal(a.pixels_BCHW, judge_batches(source, seed=1).batch_at(step, range(18)).pixels_BCHW)


def test_a_process_takes_its_rows_of_the_judges_batch(source: ImageSource) -> None:
    batches = judge_batches(source, batch=32)
    whole = batches.batch_at(2, range(32))
    parts = [batches.batch_at(2, range(0, 16)), batches.batch_at(2, range(16, 32))]
    assert torch.equal(torch.cat([part.pixels_BCHW for part in parts]), whole.pixels_BCHW)
    assert torch.equal(torch.cat([part.labels_B for part in parts]), whole.labels_B)


def test_the_judge_sees_every_image_once_an_epoch_shifted_by_at_most_a_pixel(source: ImageSource) -> None:
    batches = judge_batches(source)
    seen = []
    padded = [np.pad(source.pixels(i, 16), ((1, 1), (1, 1), (0, 0)), "edge") for i in range(len(source))]
    for step in range(2):
        batch = batches.batch_at(step, range(18))
        for pixels, label in zip(hwc(batch.pixels_BCHW), batch.labels_B.tolist(), strict=True):
            found = [
                (index, y, x)
                for index in range(len(source))
                for y in range(3)
                for x in range(3)
                if np.array_equal(padded[index][y : y + 16, x : x + 16], pixels)
            ]
            assert source.need_labels()[found[0][0]] == label
            seen.append(found[0])
    assert sorted(index for index, _, _ in seen) == list(range(36))
    assert {place for _, *places in seen for place in places} == {0, 1, 2}, "the shift does nothing"


def test_the_judges_loss_is_cross_entropy_of_the_true_class(source: ImageSource) -> None:
    network = make_judge()
    batch = judge_batches(source).batch_at(0, range(18))
    loss, logs = JudgeTask(network).loss(batch, TrainStep(0, 0, range(18), 18, CPU))
    logits = network(to_model(batch.pixels_BCHW))[1].detach().double()
    chosen = torch.softmax(logits, 1)[torch.arange(18), batch.labels_B]
    assert loss.item() == pytest.approx(float(-chosen.log().mean()), rel=1e-5)
    assert float(logs["accuracy"]) == pytest.approx(float((logits.argmax(1) == batch.labels_B).float().mean()))


def test_a_trained_judge_records_its_accuracy_on_held_out_images(image_folder: Path, tmp_path: Path) -> None:
    recipe = load_recipe("digits", ["judge.train.steps=3", "judge.train.batch=16", "judge.width=8"])
    trained = engine.train_judge(str(image_folder), str(image_folder), tmp_path / "judge", recipe, "cpu")
    path = Path(trained.values["judge"])
    extractor = features.make_extractor(path, None, CPU)
    target = reference.open_images(open_source(str(image_folder)), 16)
    accuracy = scores.class_accuracy(
        extractor, target.labels, target.class_names, features.collect(extractor, target.batches).predicted_N
    )
    assert trained.values["heldout_accuracy"] == pytest.approx(accuracy)
    assert extractor.class_names == ["a", "b", "c"]
    data = files.read_json(tmp_path / "judge" / "run.json")["settings"]["data"]
    digest = open_source(str(image_folder)).digest()
    assert (data["digest"], data["heldout_digest"], data["resolution"]) == (digest, digest, 16)


# ---- samples and the chain of references --------------------------------------------------------------------------


@pytest.fixture
def samples(tmp_path: Path, image_folder: Path) -> Path:
    """A folder as `rdpm sample` writes it, whose chain ends at `image_folder`; and a file that is no sample."""
    source = open_source(str(image_folder))
    folder = tmp_path / "samples"
    folder.mkdir()
    rows = [{"file": f"{i:06d}.png", "index": i, "label": i % 3} for i in range(12)]
    for name, pixels in zip([*(row["file"] for row in rows), "stray.png"], random_pixels(13), strict=True):
        Image.fromarray(pixels).save(folder / str(name))
    record = {
        "resolution": 16,
        "class_names": ["a", "b", "c"],
        "options": {"cfg": 0.0, "seed": 0},
        "reference": {"source": source.spec, "digest": source.digest(), "resolution": 16, "transform": TRANSFORM},
        "samples": rows,
    }
    files.write_json(folder / "samples.json", record)
    return folder


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    record = files.read_json(folder / "samples.json")
    change(record)
    files.write_json(folder / "samples.json", record)


def test_samples_are_exactly_the_files_of_the_record_in_its_order(samples: Path) -> None:
    edit(samples, lambda record: record["samples"].reverse())
    opened = reference.open_samples(samples)
    assert (opened.count, opened.resolution, opened.class_names) == (12, 16, ["a", "b", "c"])
    assert opened.labels == [i % 3 for i in reversed(range(12))]
    assert np.array_equal(np.concatenate(list(opened.batches)), random_pixels(13)[:12][::-1])


def test_the_recorded_reference_is_used_and_named(samples: Path, image_folder: Path, judge_path: Path) -> None:
    values = engine.eval_fid(str(samples), extractor=judge_path, device="cpu").values
    given = engine.eval_fid(str(samples), str(image_folder), extractor=judge_path, device="cpu").values
    assert values["reference"]["name"] == str(image_folder.resolve())
    assert (values["reference"]["count"], values["target"]["count"]) == (36, 12)
    assert (values["value"], values["reference"]) == (given["value"], given["reference"])
    assert values["options"] == {"cfg": 0.0, "seed": 0}
    assert 0 <= values["class_accuracy"] <= 1
    assert json.loads(files.canonical_json(values))["extractor"]["name"] == "judge judge.pt"


def test_the_recorded_reference_is_read_as_the_store_was(samples: Path, image_folder: Path) -> None:
    """Without the images that could not be read, and decoded in draft where the store was."""
    edit(samples, lambda record: record["reference"].update(left_out=[1, 35], transform=DRAFT_TRANSFORM))
    found = reference.open_reference(None, reference.open_samples(samples))
    kept = [i for i in range(36) if i not in (1, 35)]
    source = open_source(str(image_folder))
    assert source.labels is not None
    assert (found.count, found.labels) == (34, [source.labels[i] for i in kept])
    wanted = np.stack([source.pixels(i, 16, draft=True) for i in kept])
    assert np.array_equal(np.concatenate(list(found.batches)), wanted)


def test_a_reference_given_by_the_user_comes_first(
    samples: Path, image_folder: Path, judge_path: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(samples, tmp_path / "other"))
    for ref, count in ((image_folder / "a", 12), (other, 12), (tmp_path / "own", 5)):
        if count == 5:
            shutil.copytree(image_folder / "b", ref, ignore=lambda _, names: names[5:])
        values = engine.eval_fid(str(samples), str(ref), extractor=judge_path, device="cpu").values
        assert (Path(values["reference"]["name"]).name, values["reference"]["count"]) == (ref.name, count)
    equal = engine.eval_fid(str(samples), str(other), extractor=judge_path, device="cpu").values
    assert equal["value"] == pytest.approx(0, abs=1e-4)
    assert equal["target"]["sha256"] == equal["reference"]["sha256"]


def test_images_are_a_target_too_at_the_size_asked_for(image_folder: Path) -> None:
    assert reference.open_target(str(image_folder), 24).resolution == 24
    first = open_source(str(image_folder)).image(0)
    opened = reference.open_target(str(image_folder), None)
    assert opened.resolution == min(first.size)
    assert np.concatenate(list(opened.batches)).shape == (36, opened.resolution, opened.resolution, 3)
    with pytest.raises(DataError, match="records no reference"):
        reference.open_reference(None, opened)


def break_sample(folder: Path) -> None:
    (folder / "000003.png").write_bytes((folder / "000003.png").read_bytes()[:60])


def enlarge_sample(folder: Path) -> None:
    Image.new("RGB", (17, 16)).save(folder / "000003.png")


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda folder: (folder / "000003.png").unlink(), r"1 of 12 samples are missing, first 000003\.png"),
        (break_sample, r"000003\.png cannot be read"),
        (enlarge_sample, r"000003\.png is \(16, 17, 3\), not 16×16"),
        (lambda folder: (folder / "samples.json").write_text("{"), r"samples\.json cannot be read as JSON"),
        (lambda folder: (folder / "samples.json").write_text("{}"), r"samples\.json lacks 'samples'"),
        (lambda folder: (folder / "samples.json").write_text("[]"), r"samples\.json lacks"),
        (lambda folder: edit(folder, lambda r: r["reference"].update(digest="0" * 64)), "holds other images than when"),
        (lambda folder: edit(folder, lambda r: r["reference"].update(source="/no/where")), "/no/where is not here"),
        (lambda folder: edit(folder, lambda r: r["reference"].update(transform="squash")), "transform squash"),
        (lambda folder: edit(folder, lambda r: r.update(reference=None)), "records no reference"),
        (lambda folder: edit(folder, lambda r: r.update(samples=r["samples"][:1])), "at least 2 images, not 1"),
        (lambda folder: edit(folder, lambda r: r.update(samples=[])), "no (images|samples)"),
    ],
)
def test_samples_that_cannot_be_scored_say_why(
    samples: Path, judge_path: Path, damage: Callable[[Path], object], text: str
) -> None:
    damage(samples)
    with pytest.raises(RdpmError, match=text) as caught:
        engine.eval_fid(str(samples), extractor=judge_path, device="cpu")
    assert isinstance(caught.value, DataError)
    assert caught.value.exit_code == 3


# ---- eval judge ----------------------------------------------------------------------------------------------------

SMALL = ["width=8", "blocks=1", "features=6", "train.batch=16", "train.epochs=null", "train.steps=3"]


def test_a_judge_of_any_labelled_source_holds_out_a_share_of_it(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["eval", "judge", str(image_folder), str(tmp_path / "judge"), *SMALL, "--resolution", "16", "--quiet"]
    assert run([*command, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    source = open_source(str(image_folder))
    seen, unseen = judge.split(source)
    assert (values["images"], values["heldout_images"]) == (len(seen), len(unseen))
    assert len(seen) + len(unseen) == 36
    assert not set(seen.names) & set(unseen.names)
    extractor = features.make_extractor(Path(values["judge"]), None, CPU)
    target = reference.open_images(unseen, 16)
    accuracy = scores.class_accuracy(
        extractor, target.labels, target.class_names, features.collect(extractor, target.batches).predicted_N
    )
    assert values["heldout_accuracy"] == pytest.approx(accuracy)
    before = (tmp_path / "judge" / "judge.pt").read_bytes()
    assert run([*command, "--json"]) == 0, "the same command again"
    assert json.loads(capsys.readouterr().out) == values
    assert (tmp_path / "judge" / "judge.pt").read_bytes() == before


def test_the_share_held_out_moves_with_nothing(image_folder: Path) -> None:
    first, again = (judge.split(open_source("digits"))[1] for _ in range(2))
    assert first.names == again.names
    assert 0.07 < len(first) / 1500 < 0.13
    assert first.labels == [open_source("digits").need_labels()[i] for i in first.indices]  # type: ignore[attr-defined]
    assert np.array_equal(first.pixels(3, 16), open_source("digits").pixels(first.indices[3], 16))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        ("{images} {out} --heldout {flat}", 3, "no classes"),
        ("{images} {out} --heldout digits:heldout", 3, "other classes"),
        ("{few} {out}", 3, "too few to hold some out"),
        ("{images} {out}/judge.pt", 2, "run folder"),
        ("{images} {out} widht=8", 2, "widht"),
        ("{images} {out} --recipe imagenet256-d16", 2, "no judge section"),
        ("{images} {out} width=12", 2, "multiple of 8"),
    ],
)
def test_a_judge_that_cannot_be_trained_is_refused(
    args: str, code: int, text: str, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(image_folder / "a", tmp_path / "flat")
    for name in "ab":
        shutil.copytree(image_folder / name, tmp_path / "few" / name, ignore=lambda _, names: sorted(names)[1:])
    places = {"images": image_folder, "out": tmp_path / "out", "flat": tmp_path / "flat", "few": tmp_path / "few"}
    assert run(["eval", "judge", *args.format(**places).split(), "--quiet"]) == code
    assert text in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("side", "halvings"), [(16, 2), (32, 2), (64, 3), (256, 5)])
def test_larger_images_are_halved_more_often(side: int, halvings: int) -> None:
    network = Judge(side, 8, 6, 3, blocks=1)
    strides = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d) and m.stride == (2, 2)]
    assert len(strides) == halvings
    assert tuple(network(torch.zeros(1, 3, side, side))[1].shape) == (1, 3)


def test_a_judge_of_before_blocks_reads_the_same(judge_path: Path) -> None:
    content = modelfile.load(judge_path)
    config = {name: value for name, value in content["config"].items() if name != "blocks"}
    old = Judge(**config)
    old.load_state_dict(content["weights"])
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(old.eval()(x)[1], make_judge()(x)[1])


def test_mirroring_is_an_option(source: ImageSource) -> None:
    cfg = JudgeConfig(width=8, features=6, flip=True, train=TrainConfig(batch=32, steps=4))
    mirrored, plain = JudgeBatches(source, cfg, 16, 0), judge_batches(source, batch=32)
    both = [hwc(batches.batch_at(0, range(32)).pixels_BCHW) for batches in (mirrored, plain)]
    assert not np.array_equal(both[0], both[1])
    padded = {i: np.pad(source.pixels(i, 16), ((1, 1), (1, 1), (0, 0)), "edge") for i in range(36)}

    def found(pixels: NDArray[np.uint8]) -> bool:
        return any(
            np.array_equal(padded[i][y : y + 16, x : x + 16], pixels)
            for i in range(36)
            for y in range(3)
            for x in range(3)
        )

    straight = [found(pixels) for pixels in both[0]]
    assert 0 < sum(straight) < 32
    assert all(found(pixels[:, ::-1]) for pixels, whole in zip(both[0], straight, strict=True) if not whole)

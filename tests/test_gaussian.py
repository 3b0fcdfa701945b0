"""The rows that need no generator: samples of a Gaussian a class, images drawn again, reconstructions; their scores."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from extractors import Blocks, Images, answer, assert_close, image_set, pixels, save_judge
from numpy.typing import NDArray
from processes import ranks

from rdpm_cli.cli.app import run
from rdpm_cli.codes.store import CodeStore
from rdpm_cli.data.open import open_source
from rdpm_cli.data.pixels import hwc, to_pixels
from rdpm_cli.distributed import one_thread
from rdpm_cli.engine import baselines
from rdpm_cli.errors import DataError
from rdpm_cli.evaluation import gaussian, metrics
from rdpm_cli.evaluation.features import collect, image_digests
from rdpm_cli.evaluation.recon import reconstructions
from rdpm_cli.generator import baselines as linear
from rdpm_cli.generator.sampler import balanced_labels
from rdpm_cli.tokenizer import model

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def judge_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_judge(tmp_path_factory.mktemp("judge") / "judge.pt")


def patterned(side: int, count: int = 60) -> tuple[Images, list[int]]:
    """Images of three patterns at random strengths, around another mean in each of two classes, never clipped."""
    random = np.random.default_rng(side)
    patterns_3P = random.choice([-1.0, 1.0], (3, 3 * side**2))
    labels_N = np.arange(count) % 2
    strengths_N3 = random.normal(0, [6, 9, 12], (count, 3)) + 15 * labels_N[:, None]
    values_NP = np.clip(np.rint(128 + strengths_N3 @ patterns_3P), 0, 255)
    return values_NP.astype(np.uint8).reshape(count, side, side, 3), labels_N.tolist()


def read(images: Any, *ranges: range) -> Images:
    return np.concatenate(list(images.read(ranges or [range(images.count)])))


@pytest.mark.parametrize("side", [16, 20])  # exact and randomised components
def test_samples_have_the_moments_of_their_class_in_the_space_of_the_components(side: int) -> None:
    images, labels = patterned(side)
    samples = gaussian.fit(image_set(images, labels)).samples(1000, 0)
    mean_P = images.reshape(60, -1).mean(0)
    directions = np.linalg.svd(images.reshape(60, -1) - mean_P, full_matrices=False)[2][:3]

    def projected(set_of: Images, labels_of: list[int], label: int) -> NDArray[np.float64]:
        return (set_of[np.array(labels_of) == label].reshape(-1, 3 * side**2) - mean_P) @ directions.T

    drawn = read(samples)
    for label in (0, 1):
        real, sampled = projected(images, labels, label), projected(drawn, samples.labels or [], label)
        deviations = real.std(0)
        assert np.abs(sampled.mean(0) - real.mean(0)) / deviations == pytest.approx(0, abs=0.15)
        error = (np.cov(sampled.T) - np.cov(real.T)) / np.outer(deviations, deviations)
        assert error == pytest.approx(0, abs=0.25)


def test_a_sample_depends_on_seed_index_and_class_only() -> None:
    images, labels = patterned(16)
    fitted = gaussian.fit(image_set(images, labels))
    few, many = fitted.samples(3, 5), fitted.samples(9, 5)
    drawn = read(many)
    assert np.array_equal(read(many, range(2, 4), range(7, 8)), drawn[[2, 3, 7]])
    shared = [i for i in range(6) if few.labels and many.labels and few.labels[i] == many.labels[i]]
    assert shared
    assert np.array_equal(read(few)[shared], drawn[shared])
    assert len(set(image_digests(np.concatenate([drawn, read(fitted.samples(9, 6))])))) == 36


def test_fewer_images_than_components_give_fewer_and_a_class_of_one_is_refused() -> None:
    few = gaussian.fit(image_set(pixels(6), [0, 0, 1, 1, 2, 2]))
    assert len(few.components.components_) == 6
    assert read(few.samples(2, 0)).shape == (6, 16, 16, 3)
    with pytest.raises(DataError, match="'b'"):
        gaussian.fit(image_set(pixels(5), [0, 0, 1, 2, 2]))


def test_images_without_classes_are_one_class() -> None:
    samples = gaussian.fit(image_set(pixels(12), names=())).samples(8, 0)
    assert (samples.count, samples.labels) == (8, [0] * 8)


def test_a_subset_is_balanced_without_replacement_and_of_its_seed() -> None:
    source = open_source("digits:heldout")
    first, again, other = (baselines.class_subset(source, 20, seed) for seed in (0, 0, 1))
    assert Counter(first.labels) == dict.fromkeys(range(10), 20)
    assert len(set(first.indices)) == 200
    assert first.labels != sorted(first.need_labels())  # the Inception Score refuses images in class order
    assert first.indices == again.indices != other.indices
    assert sorted(baselines.class_subset(source, 80, 0).indices) == list(range(297))


def test_the_rows_are_those_of_the_images(
    image_folder: Path, tiny_tokenizer_file: Path, judge_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    extractor = Blocks("judge", "abc")
    monkeypatch.setattr(baselines, "open_extractor", lambda *_: extractor)
    args = ["--heldout", image_folder, "--tokenizer", tiny_tokenizer_file, "--resolution", 16, "--per-class", 4]
    values = answer(capsys, "baselines", image_folder, *args, "--seed", 3, "--seeds", 2)
    assert (values["seeds"], values["per_class"], values["not_computed"]) == ([3, 4], 4, {})
    assert list(values["rows"]) == ["gaussian", "training", "reconstructions", "heldout"]
    assert extractor.extracted == 36 + 2 * 4 * 12  # the reference once
    source = open_source(str(image_folder))
    subset, tokenizer = baselines.class_subset(source, 4, 4), model.load(tiny_tokenizer_file)[0]
    recons = reconstructions(source, tokenizer, [4], extractor.device, subset.indices)
    target = collect(extractor, [batch for _, _, by_seed in recons for batch, _ in by_seed]).features_ND
    reference = collect(extractor, [np.stack([source.pixels(index, 16) for index in range(36)])]).features_ND
    distance = metrics.frechet_distance(metrics.statistics(target), metrics.statistics(reference))
    row = values["rows"]["reconstructions"]
    assert row["n"] == 12
    assert row["frechet_distance"]["values"][1] == pytest.approx(distance, rel=1e-6)
    assert row["frechet_distance"]["mean"] == pytest.approx(np.mean(row["frechet_distance"]["values"]))
    assert row["frechet_distance"]["std"] == pytest.approx(np.std(row["frechet_distance"]["values"], ddof=1))
    assert {"class_accuracy", "precision", "recall", "classifier_score"} <= row.keys()


def test_the_linear_row_has_decoded_samples_of_the_codes_baseline(
    image_folder: Path, digits_codes: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    extractor = Blocks("judge", "abc")
    monkeypatch.setattr(baselines, "open_extractor", lambda *_: extractor)
    args = ["--codes", digits_codes, "--resolution", 16, "--per-class", 8]  # 24 samples: two batches
    values = answer(capsys, "baselines", image_folder, *args, "--seed", 3, "--seeds", 2)
    assert list(values["rows"]) == ["gaussian", "linear", "training", "reconstructions"]
    store, tokenizer = CodeStore(digits_codes), model.load(digits_codes / "tokenizer.pt")[0]
    assert values["tokenizer"] == store.manifest.tokenizer
    assert values["images"]["linear"] == {"source": str(digits_codes), "digest": store.manifest.digest()}
    fits, labels = linear.fit(store, store.split()[0], tokenizer.quantizer), balanced_labels(range(3), 8, 4)
    eps = tokenizer.noise("sample", 4, range(24), [0] * 24)
    samples = hwc(to_pixels(tokenizer.decode(linear.sample(fits, tokenizer.quantizer, torch.tensor(labels), eps))))
    source = open_source(str(image_folder))
    images = np.stack([source.pixels(index, 16) for index in range(36)])
    target, reference = (metrics.statistics(collect(extractor, [side]).features_ND) for side in (samples, images))
    row = values["rows"]["linear"]
    assert row["n"] == 24
    assert row["frechet_distance"]["values"][1] == pytest.approx(metrics.frechet_distance(target, reference), rel=1e-4)


def test_training_images_that_are_all_drawn_are_their_reference(
    image_folder: Path, judge_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)  # without a tokenizer.pt
    args = ["--resolution", 16, "--extractor", judge_path, "--seeds", 1]
    values = answer(capsys, "baselines", image_folder, *args)
    training = {name: score["mean"] for name, score in values["rows"]["training"].items() if isinstance(score, dict)}
    assert values["rows"]["training"]["n"] == 36
    assert training["frechet_distance"] == pytest.approx(0, abs=1e-6)
    assert (training["precision"], training["recall"]) == (1, 1)
    assert "reconstructions" not in values["rows"]
    assert "tokenizer" in values["not_computed"]["reconstructions"]


def test_the_table_has_a_column_a_row(
    image_folder: Path, judge_path: Path, tiny_tokenizer_file: Path, capsys: Capture
) -> None:
    args = f"eval baselines {image_folder} --tokenizer {tiny_tokenizer_file} --resolution 16 --extractor {judge_path}"
    assert run([*args.split(), "--seeds", "2", "--per-class", "4", "--quiet"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()[1:]
    assert head.split() == ["gaussian", "training", "reconstructions"]
    assert lines[0].split() == ["n", "12", "12", "12"]
    assert all(len(line.split()) == 10 for line in lines[1:])  # name, and three of "mean ± spread"


@pytest.mark.parametrize(
    ("args", "code", "token"),
    [
        ("{images} --resolution 8 --tokenizer {tokenizer}", 2, "16×16"),
        ("no-such", 2, "no-such"),
        ("{images} --heldout no-such", 2, "no-such"),
        ("{images} --resolution 16 --codes {codes} --tokenizer {tokenizer}", 2, "--tokenizer"),
        ("{images} --resolution 8 --codes {codes}", 2, "16×16"),
        ("{images} --resolution 16 --codes no-such", 3, "no-such"),
        ("{images}", 3, "sizes"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    args: str, code: int, token: str, image_folder: Path, tiny_tokenizer_file: Path, digits_codes: Path,
    judge_path: Path, capsys: Capture,
) -> None:  # fmt: skip
    words = args.format(images=image_folder, tokenizer=tiny_tokenizer_file, codes=digits_codes).split()
    assert run(["eval", "baselines", *words, "--extractor", str(judge_path), "--device", "cpu"]) == code
    assert token in capsys.readouterr().err


def test_two_processes_score_as_one(
    image_folder: Path, digits_codes: Path, judge_path: Path, tmp_path: Path, capsys: Capture
) -> None:
    args = ["baselines", image_folder, "--codes", digits_codes, "--resolution", 16]
    args += ["--extractor", judge_path, "--per-class", 4, "--seeds", 1]
    shared = ["--device", "cpu", "--quiet", "--json"]
    both = ranks(["eval", *map(str, args), *shared], tmp_path / "both.json")
    with one_thread():
        assert_close(both, answer(capsys, *args))

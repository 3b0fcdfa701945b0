"""eval fid, sfid, is, pr, kid and all: one pass, the same values however it is made, and a record of what made them."""

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from extractors import CPU, Blocks, Images, image_set, pixels, save_judge
from generators import save_generator
from helpers import leaves
from numpy.typing import NDArray
from PIL import Image
from processes import ranks

from rdpm_cli import checkpoint
from rdpm_cli.cli.app import run
from rdpm_cli.data.pictures import save_npz
from rdpm_cli.data.pixels import chw
from rdpm_cli.engine.sample import Outputs, sample
from rdpm_cli.engine.score import Ruler, eval_images
from rdpm_cli.errors import DataError, UsageError
from rdpm_cli.evaluation import metrics, score
from rdpm_cli.evaluation.features import INCEPTION, collect, open_extractor
from rdpm_cli.evaluation.score import Options


@pytest.fixture(scope="module")
def judge_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_judge(tmp_path_factory.mktemp("judge") / "judge.pt")


@pytest.fixture(scope="module")
def generator_path(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_file: Path) -> Path:
    """An untrained generator of classes a, b, c that records no reference."""
    path = tmp_path_factory.mktemp("generator") / "generator.pt"
    return save_generator(path, tiny_tokenizer_file, micro_batch=4)


def scored(metric: str, target: Images, reference: Images | None, **options: Any) -> dict[str, Any]:
    compared = None if reference is None else image_set(reference)
    values = score.score(metric, Blocks(), image_set(target), compared, Options(**options))
    assert values is not None
    return values


def answer(capsys: pytest.CaptureFixture[str], *args: object) -> dict[str, Any]:
    """`rdpm eval ARGS` as JSON."""
    assert run(["eval", *map(str, args), "--device", "cpu", "--quiet", "--json"]) == 0
    values: dict[str, Any] = json.loads(capsys.readouterr().out)
    return values


# ---- one pass ------------------------------------------------------------------------------------------------------


def test_every_score_of_a_pass_is_the_metric_of_the_features() -> None:
    target, reference = pixels(40, 1), pixels(60, 2)
    values = scored("all", target, reference)
    a, b = (collect(Blocks(), [side]) for side in (target, reference))
    spatial_a, spatial_b = (Blocks()(chw(side)).spatial_BP for side in (target, reference))
    assert spatial_a is not None
    assert spatial_b is not None

    def distance(x: NDArray[np.float32], y: NDArray[np.float32]) -> float:
        return metrics.frechet_distance(metrics.statistics(x), metrics.statistics(y))

    assert values["fid"] == pytest.approx(distance(a.features_ND, b.features_ND), rel=1e-6)
    assert values["sfid"] == pytest.approx(distance(spatial_a.numpy(), spatial_b.numpy()), rel=1e-6)
    by_split, order_free = metrics.inception_score(a.logits_NK)
    assert values["inception_score"] == pytest.approx(by_split.mean())
    assert values["inception_score_order_free"] == pytest.approx(order_free)
    precision_recall = metrics.precision_recall(a.features_ND, b.features_ND)
    assert (values["precision"], values["recall"]) == precision_recall
    assert values["kid"] == pytest.approx(metrics.kernel_distance(a.features_ND, b.features_ND)[0])
    assert values["target"] == {"name": "images", "count": 40, "sha256": a.sha256}
    assert values["reference"] == {"name": "images", "count": 60, "sha256": b.sha256}
    assert values["extractor"] == {"name": "inception-2015-12-05", "sha256": "6" * 64}
    assert "not_computed" not in values


@pytest.mark.parametrize("metric", score.METRICS)
def test_a_single_score_is_the_one_among_all(metric: str) -> None:
    target, reference = pixels(40, 1), None if metric == "is" else pixels(60, 2)
    single, among = scored(metric, target, reference), scored("all", target, pixels(60, 2))
    if metric == "pr":
        assert (single["metric"], single["precision"]) == ("precision_recall", among["precision"])
        assert (single["recall"], single["neighbours"]) == (among["recall"], 3)
    else:
        assert single["metric"] == score.PUBLISHED_NAMES[metric]
        assert single["value"] == among[single["metric"]]
    assert single["target"] == among["target"]
    assert json.loads(json.dumps(single, allow_nan=False)) == single


def test_precision_and_recall_take_ten_thousand_of_a_large_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score, "REFERENCE_FEATURES", 20)
    values = scored("pr", pixels(40, 1), pixels(60, 2))
    a, b = (collect(Blocks(), [side]).features_ND for side in (pixels(40, 1), pixels(60, 2)[::3]))
    assert (values["precision"], values["recall"]) == metrics.precision_recall(a, b)
    assert values["reference_features"] == 20


@pytest.mark.parametrize(
    ("name", "metric"),
    [
        ("inception-2015-12-05", "fid"),
        ("inception-v3 layout, weights 0123", "frechet_distance"),
        ("judge", "frechet_distance"),
    ],
)
def test_only_the_published_inception_gives_a_fid(name: str, metric: str) -> None:
    extractor = Blocks(name)
    extractor.note = "a note"
    values = score.score("fid", extractor, image_set(pixels(40)), image_set(pixels(40, 1)))
    assert values is not None
    assert (values["metric"], values["extractor"]["name"], values["notes"]) == (metric, name, ["a note"])


def test_the_subset_score_is_the_mean_over_balanced_subsets() -> None:
    labels = [0, 1] * 20
    options = Options(subset=16)
    values = score.score("fid", Blocks(), image_set(pixels(40, 1), labels), image_set(pixels(60, 2)), options)
    assert values is not None
    a, b = (collect(Blocks(), [side]).features_ND for side in (pixels(40, 1), pixels(60, 2)))
    reference = metrics.statistics(b)
    subsets = metrics.balanced_subsets(np.array(labels), 16)
    each = [metrics.frechet_distance(metrics.statistics(a[rows]), reference) for rows in subsets]
    assert (values["n"], values["subsets"], len(each)) == (16, 2, 2)
    assert values["value"] == pytest.approx(np.mean(each))
    assert values["spread_over_subsets"] == pytest.approx(np.std(each))


@pytest.mark.parametrize(
    ("names", "accuracy"), [(["red", "green", "blue"], 1.0), (["blue", "green", "red"], 1 / 3), (["x", "y", "z"], 0.0)]
)
def test_class_accuracy_compares_names_not_numbers(names: list[str], accuracy: float) -> None:
    images = np.zeros((3, 16, 16, 3), dtype=np.uint8)
    for colour in range(3):
        images[colour, ..., colour] = 200
    extractor = Blocks(class_names=["red", "green", "blue"])
    predicted = collect(extractor, [images]).predicted
    assert score.class_accuracy(extractor, [0, 1, 2], names, predicted) == pytest.approx(accuracy)
    assert score.class_accuracy(extractor, None, names, predicted) is None
    assert score.class_accuracy(Blocks(), [0, 1, 2], names, predicted) is None


def test_intervals_hold_the_value_and_narrow_with_more_images() -> None:
    few, many = (scored("fid", pixels(count, 1), pixels(60, 2), ci=True) for count in (30, 300))
    for values in (few, many):
        assert 0 <= values["ci95"][0] < values["value"] < values["ci95"][1]
    assert many["ci95"][1] - many["ci95"][0] < few["ci95"][1] - few["ci95"][0]
    values = scored("is", pixels(100), None, ci=True)
    assert values["ci95"][0] < values["value"] < values["ci95"][1]
    assert values["order_free_ci95"][0] < values["order_free"] < values["order_free_ci95"][1]


# ---- scores without a value, notes, refusals -----------------------------------------------------------------------


def test_a_judge_has_no_sfid_and_the_record_says_so(judge_path: Path) -> None:
    extractor = open_extractor(judge_path, None, CPU)
    target, reference = image_set(pixels(40, 1)), image_set(pixels(60, 2))
    with pytest.raises(DataError):
        score.score("sfid", extractor, target, reference)
    values = score.score("all", extractor, target, reference)
    assert values is not None
    assert values["spatial_frechet_distance"] is None
    assert set(values["not_computed"]) == {"spatial_frechet_distance"}
    assert values["extractor"]["heldout_accuracy"] == 0.25
    p = torch.softmax(extractor(chw(pixels(40, 1))).logits_BK.double(), 1)
    kl = (p * (p.log() - p.mean(0).log())).sum(1).mean()
    assert values["classifier_score_order_free"] == pytest.approx(float(kl.exp()))


def test_images_in_class_order_have_no_score_by_splits() -> None:
    in_order, mixed = (
        score.score("is", Blocks(), image_set(pixels(30), labels), None)
        for labels in (sorted([0, 1, 2] * 10), [0, 1, 2] * 10)
    )
    assert in_order is not None
    assert mixed is not None
    assert in_order["value"] is None
    assert "order_free" in in_order["not_computed"]["value"]
    assert in_order["order_free"] == mixed["order_free"]
    assert mixed["value"] > 1


@pytest.mark.parametrize(
    ("metric", "counts", "options"),
    [
        ("is", (9, 60), {}),
        ("fid", (1, 60), {}),
        ("sfid", (60, 1), {}),
        ("pr", (3, 60), {}),
        ("pr", (60, 2), {}),
        ("kid", (60, 1), {}),
        ("all", (60, 3), {}),
        ("fid", (0, 60), {}),
        ("fid", (19, 60), {"ci": True}),
        ("fid", (30, 60), {"subset": 6}),  # without labels
    ],
)
def test_too_few_images_are_refused_before_the_pass(
    metric: str, counts: tuple[int, int], options: dict[str, Any]
) -> None:
    extractor, (target, reference) = Blocks(), (image_set(pixels(count)) for count in counts)
    with pytest.raises(DataError) as refused:
        score.score(metric, extractor, target, reference, Options(**options))
    assert refused.value.exit_code == 3
    assert extractor.extracted == 0
    labelled = image_set(pixels(30), [0, 1, 2] * 10)
    with pytest.raises(DataError, match="60"):
        score.score("fid", extractor, labelled, image_set(pixels(60)), Options(subset=60))


def test_scores_of_few_images_have_a_note() -> None:
    assert scored("is", pixels(110), None)["notes"][0].startswith("11 images a split for 3 classes")
    assert scored("is", pixels(120), None)["notes"] == []
    assert any("12 features" in note for note in scored("fid", pixels(12), pixels(60))["notes"])
    assert any("16 spatial features" in note for note in scored("sfid", pixels(60), pixels(16))["notes"])
    assert scored("all", pixels(120), pixels(60))["notes"] == []


@pytest.mark.parametrize(
    ("metric", "options", "token"),
    [
        ("is", {"subset": 4}, "--subset"),
        ("pr", {"subset": 4}, "--subset"),
        ("kid", {"ci": True}, "--ci"),
        ("fid", {"ci": True, "subset": 4}, "--ci"),
    ],
)
def test_an_option_without_a_use_is_refused(metric: str, options: dict[str, Any], token: str) -> None:
    with pytest.raises(UsageError, match=token):
        score.check(metric, Options(**options))


def test_absent_weights_come_before_absent_images(no_weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["eval", "fid", str(no_weights)]) == 3  # a folder without images
    assert INCEPTION.file in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "token"),
    [
        ("fid", "TARGET"),
        ("fid a b", "a b"),
        ("fid nothing/here", "nothing/here"),
        ("fid samples --ckpt {ckpt}", "samples"),
        ("fid tua=2 --ckpt {ckpt}", "tua"),
        ("fid --ckpt {ckpt} --resolution 8", "--resolution"),
        ("fid --ckpt {ckpt} --classes 9", "9"),
        ("fid --ckpt {ckpt} --preset rawest", "rawest"),
        ("is digits --subset 4", "--subset"),
        ("is digits --ref digits", "--ref"),
        ("sfid digits --ref digits", "judge"),
        ("fid digits --ref digits --preset raw", "--preset"),
        ("fid digits --ref digits --per-class 8", "--per-class"),
        ("reference digits ref", ".npz"),
    ],
)
def test_arguments_that_do_not_fit_are_usage_errors(
    args: str, token: str, generator_path: Path, judge_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["eval", *args.format(ckpt=generator_path).split(), "--extractor", str(judge_path)]
    assert run([*command, "--device", "cpu"]) == 2
    assert token in capsys.readouterr().err


# ---- targets -------------------------------------------------------------------------------------------------------


def test_a_folder_a_zip_and_an_npz_of_the_same_images_score_alike(
    tmp_path: Path, judge_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "flat").mkdir()
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for index, image in enumerate(pixels(48)):
            path = tmp_path / "flat" / f"{index:03d}.png"
            Image.fromarray(image).save(path)
            archive.write(path, path.name)
    np.savez_compressed(tmp_path / "packed.npz", arr_0=pixels(48))
    save_npz(tmp_path / "ours.npz", (48, 16, 16, 3), [pixels(48)], [0] * 48)
    ref = ["--ref", "digits:heldout", "--extractor", judge_path]
    names = ("flat", "images.zip", "packed.npz", "ours.npz")
    flat, *others = [answer(capsys, "all", tmp_path / name, *ref) for name in names]
    assert flat["target"]["count"] == 48
    for values in others:
        assert {**values, "target": 0} == {**flat, "target": 0}
        assert values["target"]["sha256"] == flat["target"]["sha256"]


def test_features_are_kept_in_the_file_of_the_option(
    tmp_path: Path, judge_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "a.npz", pixels(40, 1))
    common = ["--extractor", judge_path, "--features", tmp_path / "features.npz"]
    ref = ["--ref", "digits:heldout"]
    first, again = (answer(capsys, "all", tmp_path / "a.npz", *ref, *common) for _ in range(2))
    assert first == again == answer(capsys, "all", tmp_path / "a.npz", *ref, "--extractor", judge_path)
    np.savez(tmp_path / "a.npz", pixels(40, 2))
    assert run(["eval", "is", str(tmp_path / "a.npz"), *map(str, common), "--device", "cpu"]) == 3
    assert "features.npz" in capsys.readouterr().err


def test_a_checkpoint_scores_like_its_samples_and_writes_nothing(
    generator_path: Path, judge_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    ref = ["--ref", "digits:heldout", "--extractor", judge_path]
    drawn = ["--ckpt", generator_path, "--per-class", 6, "--seed", 3]
    direct = answer(capsys, "all", "tau=2", *drawn, *ref)
    raw = answer(capsys, "is", *drawn, "--preset", "raw", "--extractor", judge_path)
    assert raw["options"]["draw"] == "argmax"
    assert list(tmp_path.iterdir()) == []
    for name, outputs in {"files": Outputs(), "packed": Outputs(png=False, npz=True)}.items():
        sample(generator_path, "all", 6, tmp_path / name, seed=3, sampling={"tau": 2.0}, outputs=outputs, device="cpu")
    by_files, by_npz, by_path = (
        answer(capsys, "all", tmp_path / name, *ref) for name in ("files", "packed", "packed/samples.npz")
    )
    assert {**by_files, "target": 0} == {**by_npz, "target": 0} == {**by_path, "target": 0}
    for values in (direct, by_npz, by_path):
        assert values["target"]["sha256"] == by_files["target"]["sha256"]
    for name in ("frechet_distance", "classifier_score", "precision", "kernel_distance", "class_accuracy"):
        assert direct[name] == by_files[name], name
    digest = checkpoint.load(generator_path)["digest"]
    of_checkpoint = {"classes": "all", "per_class": 6, "checkpoint": digest}
    assert direct["options"] == {**by_files["options"], **of_checkpoint}
    assert by_files["checkpoint"] == digest


# ---- several processes ---------------------------------------------------------------------------------------------


def assert_close(values: dict[str, Any], expected: dict[str, Any]) -> None:
    a, b = leaves(values), leaves(expected)
    assert a.keys() == b.keys()
    for name, value in b.items():
        assert a[name] == (pytest.approx(value, rel=1e-6, abs=1e-9) if isinstance(value, float) else value), name


def arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of an .npz; none where there is no file."""
    if not path.exists():
        return {}
    with np.load(path) as content:
        return dict(content)


@pytest.mark.parametrize(
    "task",
    [
        "all --ci",
        *(
            pytest.param(task, marks=pytest.mark.slow)
            for task in ("is --ci", "pr", "reference", "all --ckpt", "is --features")
        ),
    ],
)
def test_two_processes_score_as_one(
    task: str, generator_path: Path, judge_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "a.npz", pixels(600, 1))
    np.savez(tmp_path / "b.npz", pixels(100, 2))  # one piece: the second process has none
    metric, *options = task.split()
    target = ["--ckpt", str(generator_path), "--per-class", "8"] if "--ckpt" in options else [str(tmp_path / "a.npz")]
    target += [str(tmp_path / "made.npz")] if metric == "reference" else []
    target += ["--ref", str(tmp_path / "b.npz")] if metric not in ("is", "reference") else []
    target += ["--ci"] if "--ci" in options else []
    target += ["--features", str(tmp_path / "made.npz")] if "--features" in options else []
    args = ["eval", metric, *target, "--extractor", str(judge_path), "--device", "cpu", "--quiet", "--json"]
    both, made = ranks(args, tmp_path / "both.json"), arrays(tmp_path / "made.npz")
    if "--features" in options:
        assert_close(ranks(args, tmp_path / "again.json"), both)
        (tmp_path / "made.npz").unlink()
    assert run(args) == 0
    assert_close(both, json.loads(capsys.readouterr().out))
    for name, array in arrays(tmp_path / "made.npz").items():
        assert np.allclose(made[name], array, rtol=1e-6) if array.dtype.kind == "f" else made[name] == array, name


@pytest.mark.slow
def test_two_processes_of_one_command_answer_once(judge_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    args = ["eval", "fid", "digits:heldout", "--ref", "digits:train", "--extractor", str(judge_path), "--device", "cpu"]
    assert run([*args, "--quiet", "--json"]) == 0
    single = json.loads(capfd.readouterr().out)
    assert run([*args, "--quiet", "--json", "--gpus", "2"]) == 0
    assert_close(json.loads(capfd.readouterr().out), single)


# ---- the published numbers -----------------------------------------------------------------------------------------

PUBLISHED = {  # guided-diffusion, evaluations/README.md: value, tolerance
    "inception_score": (215.8370, 1.08),
    "fid": (3.942557, 0.01),
    "sfid": (6.140434, 0.02),
    "precision": (0.8265, 0.003),
    "recall": (0.5309, 0.004),
}
SAMPLES, REFERENCE = "admnet_guided_upsampled_imagenet256.npz", "VIRTUAL_imagenet256_labeled.npz"


def test_adms_samples_have_adms_scores() -> None:
    folder = Path(os.environ.get("RDPM_GOLDEN", "."))
    if absent := [name for name in (SAMPLES, REFERENCE, INCEPTION.file) if not (folder / name).is_file()]:
        pytest.skip(f"not in the folder $RDPM_GOLDEN: {', '.join(absent)}")
    ruler = Ruler(weights=folder / INCEPTION.file)
    values = eval_images("all", str(folder / SAMPLES), str(folder / REFERENCE), ruler).values
    for name, (value, tolerance) in PUBLISHED.items():
        assert values[name] == pytest.approx(value, abs=tolerance), name

"""eval fid, sfid, is, pr, kid and all: one pass, the same values however it is made, and a record of what made them."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import extractors
import numpy as np
import pytest
import torch
from extractors import CPU, Blocks, Images, answer, assert_close, image_set, pixels, save_judge
from generators import save_generator
from numpy.typing import NDArray
from PIL import Image
from processes import ranks

from rdpm_cli import checkpoint
from rdpm_cli.cli.app import run
from rdpm_cli.data.pictures import save_npz
from rdpm_cli.data.pixels import chw
from rdpm_cli.data.source import spread
from rdpm_cli.engine.sample import Outputs, sample
from rdpm_cli.engine.score import eval_images
from rdpm_cli.errors import DataError
from rdpm_cli.evaluation import features, metrics, score
from rdpm_cli.evaluation.backbones import open_extractor
from rdpm_cli.evaluation.features import INCEPTION, collect
from rdpm_cli.evaluation.reference import open_target


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
    (values,) = score.score(metric, Blocks(), [image_set(target)], compared, **options)
    return values


@pytest.mark.parametrize("metric", [*score.METRICS, "all"])
def test_every_score_is_the_metric_of_the_features(metric: str) -> None:
    target, reference, heldout = pixels(140, 1), pixels(60, 2), pixels(70, 3)
    options = {"heldout": image_set(heldout)} if metric in ("fdr", "all") else {}
    values = scored(metric, target, None if metric == "is" else reference, **options)
    (a, spatial_a), (b, spatial_b), (real, _) = (
        (collect(Blocks(), [side]), Blocks()(chw(side)).spatial_BP) for side in (target, reference, heldout)
    )
    assert spatial_a is not None
    assert spatial_b is not None

    def distance(x: NDArray[np.float32], y: NDArray[np.float32]) -> float:
        return metrics.frechet_distance(metrics.statistics(x), metrics.statistics(y))

    by_split, order_free = metrics.inception_score(a.logits_NK)
    precision, recall = metrics.precision_recall(a.features_ND, b.features_ND)
    density, coverage = metrics.density_coverage(a.features_ND, b.features_ND)
    pool, half, third = metrics.statistics(b.features_ND), a.features_ND[::2], a.features_ND[spread(140, 60)]
    expected = {
        "fid": distance(a.features_ND, b.features_ND), "sfid": distance(spatial_a.numpy(), spatial_b.numpy()),
        "inception_score": by_split.mean(), "inception_score_order_free": order_free, "order_free": order_free,
        "precision": precision, "recall": recall, "kid": metrics.kernel_distance(a.features_ND, b.features_ND)[0],
        "density": density, "coverage": coverage, "mind": metrics.mind(third, b.features_ND),
        "cmmd": metrics.cmmd(a.features_ND, b.features_ND), "fd_infinity": metrics.fd_infinity(a.features_ND, pool),
        "fdr": distance(half, b.features_ND) / distance(real.features_ND, b.features_ND),
    }  # fmt: skip
    if "value" in values:
        assert values["value"] == pytest.approx(expected[values["metric"]], rel=1e-6)
    same = expected.keys() & values.keys()
    assert {name: values[name] for name in same} == pytest.approx({name: expected[name] for name in same}, rel=1e-6)
    assert len(same) == {"is": 1, "pr": 2, "dc": 2, "all": 13}.get(metric, 0)
    assert values["target"] == {"name": "images", "count": 140, "sha256": a.sha256}
    assert metric == "is" or values["reference"] == {"name": "images", "count": 60, "sha256": b.sha256}
    assert values["extractor"] == {"name": "inception-2015-12-05", "sha256": "6" * 64}
    assert "not_computed" not in values
    assert json.loads(json.dumps(values, allow_nan=False)) == values


def test_precision_and_recall_take_ten_thousand_of_a_large_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score, "MOST_FEATURES", 20)
    values = scored("pr", pixels(40, 1), pixels(60, 2))
    a, b = (collect(Blocks(), [side]).features_ND for side in (pixels(40, 1), pixels(60, 2)[::3]))
    assert (values["precision"], values["recall"]) == metrics.precision_recall(a, b)
    assert values["reference_features"] == 20


def test_only_the_published_inception_gives_a_fid() -> None:
    extractor = Blocks("inception-v3 layout, weights 0123")
    extractor.note = "a note"
    (values,) = score.score("fid", extractor, [image_set(pixels(40))], image_set(pixels(40, 1)))
    assert (values["metric"], values["extractor"]["name"]) == ("frechet_distance", extractor.name)
    assert values["notes"] == ["a note"]


def test_the_subset_score_is_the_mean_over_balanced_subsets() -> None:
    labels = [0, 1] * 20
    (values,) = score.score("fid", Blocks(), [image_set(pixels(40, 1), labels)], image_set(pixels(60, 2)), subset=16)
    a, b = (collect(Blocks(), [side]).features_ND for side in (pixels(40, 1), pixels(60, 2)))
    reference = metrics.statistics(b)
    subsets = metrics.balanced_subsets(np.array(labels), 16)
    each = [metrics.frechet_distance(metrics.statistics(a[rows]), reference) for rows in subsets]
    assert (values["n"], values["subsets"], len(each)) == (16, 2, 2)
    assert values["value"] == pytest.approx(np.mean(each))
    assert values["spread_over_subsets"] == pytest.approx(np.std(each))


@pytest.mark.parametrize(
    ("known", "names", "accuracy"),
    [
        ("red green blue", "red green blue", 1.0), ("red green blue", "blue green red", 1 / 3),
        ("red green red", "red green red", 1.0), ("red green red", "blue green red", None),
        ("red green blue", "red green red", None), ("red green blue", "x y z", None),
    ],
)  # fmt: skip
def test_class_accuracy_compares_numbers_of_one_list_and_names_of_others(
    known: str, names: str, accuracy: float | None
) -> None:
    """Classes of one name are other classes; a class that the judge does not know has no accuracy."""
    images = np.zeros((3, 16, 16, 3), dtype=np.uint8)
    for colour in range(3):
        images[colour, ..., colour] = 200
    extractor = Blocks(class_names=known.split())
    features = collect(extractor, [images])
    value, reason = score.class_accuracy(extractor, [0, 1, 2], names.split(), features)
    assert value == pytest.approx(accuracy)
    assert bool(reason) == (accuracy is None)
    assert score.class_accuracy(extractor, None, names.split(), features) == (None, "")
    assert score.class_accuracy(Blocks(), [0, 1, 2], names.split(), features) == (None, "")


def test_a_judge_that_does_not_know_a_class_is_named_in_the_record() -> None:
    target = image_set(pixels(40, 1), [0, 1] * 20, ["x", "y"])
    (values,) = score.score("fid", Blocks("judge", "abc"), [target], image_set(pixels(40, 2)))
    assert values["class_accuracy"] is None
    assert "'x'" in values["not_computed"]["class_accuracy"]


def test_intervals_hold_the_value() -> None:
    values = scored("all", pixels(100, 1), pixels(60, 2), ci=True)
    for name in ("fid", "inception_score", "inception_score_order_free"):
        low, high = values[f"{name}_ci95"]
        assert 0 <= low < values[name] < high


def test_a_judge_has_no_sfid_and_the_record_says_so(judge_path: Path) -> None:
    extractor = open_extractor(judge_path, None, CPU)
    target, reference = image_set(pixels(40, 1)), image_set(pixels(60, 2))
    with pytest.raises(DataError):
        score.score("sfid", extractor, [target], reference)
    (values,) = score.score("all", extractor, [target], reference)
    assert values["spatial_frechet_distance"] is None
    assert set(values["not_computed"]) == {"spatial_frechet_distance", "fd_infinity"}  # of 40 images
    assert values["extractor"]["heldout_accuracy"] == 0.25
    p = torch.softmax(extractor(chw(pixels(40, 1))).logits_BK.double(), 1)
    kl = (p * (p.log() - p.mean(0).log())).sum(1).mean()
    assert values["classifier_score_order_free"] == pytest.approx(float(kl.exp()))


def test_images_in_class_order_have_no_score_by_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless there is one split only."""
    labels = [0, 1, 2] * 10
    (whole,) = score.score("is", Blocks(), [image_set(pixels(30), sorted(labels))], None)
    assert whole["value"] == whole["order_free"]
    monkeypatch.setattr(metrics, "SPLIT", 3)
    in_order, mixed = score.score("is", Blocks(), [image_set(pixels(30), y) for y in (sorted(labels), labels)], None)
    assert (in_order["value"], in_order["order_free"]) == (None, mixed["order_free"])
    assert "order_free" in in_order["not_computed"]["value"]
    assert mixed["value"] > 1


@pytest.mark.parametrize(
    ("metric", "counts", "options"),
    [
        ("is", (1, 60), {}), ("fid", (1, 60), {}), ("sfid", (60, 1), {}), ("pr", (3, 60), {}), ("kid", (60, 1), {}),
        ("all", (60, 1), {}), ("fid", (0, 60), {}), ("dc", (60, 5), {}), ("fd_infinity", (129, 60), {}),
        ("fid", (19, 60), {"ci": True}),
        ("fid", (30, 60), {"subset": 6}),  # without labels
    ],
)  # fmt: skip
def test_too_few_images_are_refused_before_the_pass(
    metric: str, counts: tuple[int, int], options: dict[str, Any]
) -> None:
    extractor, (target, reference) = Blocks(), (image_set(pixels(count)) for count in counts)
    with pytest.raises(DataError) as refused:
        score.score(metric, extractor, [target], reference, **options)
    assert refused.value.exit_code == 3
    assert extractor.extracted == 0
    labelled = image_set(pixels(30), [0, 1, 2] * 10)
    with pytest.raises(DataError, match="60"):
        score.score("fid", extractor, [labelled], image_set(pixels(60)), subset=60)


MISFITS = {
    "fid": "TARGET", "fid a b": "a b", "fid nothing/here": "nothing/here", "fid samples --ckpt {ckpt}": "samples",
    "fid tua=2 --ckpt {ckpt}": "tua", "fid --ckpt {ckpt} --resolution 8": "--resolution",
    "fid --ckpt {ckpt} --classes 9": "9", "fid --ckpt {ckpt} --preset rawest": "rawest",
    "is digits --subset 4": "--subset", "pr digits --ref digits --subset 4": "--subset",
    "kid digits --ref digits --ci": "--ci", "fid digits --ref digits --ci --subset 4": "--ci",
    "is digits --ref digits": "--ref", "sfid digits --ref digits": "judge", "reference digits ref": ".npz",
    "fid digits --ref digits --preset raw": "--preset", "fid digits --ref digits --per-class 9": "--per-class",
    "fid digits --ref digits --seeds 2": "--seeds", "fid --ckpt {ckpt} --seeds 2 --ci": "--ci",
    "fid --ckpt {ckpt} --seeds 2 --subset 4": "--subset", "fid --ckpt {ckpt} --seeds 2 --features x": "--features",
    "fid {npz} --ref digits --resolution 16": "--resolution", "reference {npz} ref.npz --resolution 16": "--resolution",
}  # fmt: skip


@pytest.mark.parametrize(("args", "token"), MISFITS.items())
def test_arguments_that_do_not_fit_are_usage_errors(
    args: str, token: str, generator_path: Path, judge_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "images.npz", pixels(12))
    paths = {"ckpt": generator_path, "npz": tmp_path / "images.npz"}
    command = ["eval", *args.format(**paths).split(), "--extractor", str(judge_path)]
    assert run([*command, "--device", "cpu"]) == 2
    assert token in capsys.readouterr().err


def save_images(folder: Path, images: Images) -> Path:
    folder.mkdir(exist_ok=True)
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{index:03d}.png")
    return folder


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("command", ["is {images}", "fid {images} --ref digits", "reference {images} ref.npz"])
def test_images_of_several_sizes_are_counted_and_refused_unless_a_size_is_given(
    command: str, packed: bool, judge_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A grid of samples among samples is none of them."""
    monkeypatch.chdir(tmp_path)
    save_images(tmp_path / "images", pixels(40))
    Image.fromarray(pixels(1, side=128)[0]).save(tmp_path / "images" / "grid.png")
    images = shutil.make_archive("images", "zip", "images") if packed else "images"
    args = [*command.format(images=images).split(), "--extractor", str(judge_path)]
    assert run(["eval", *args, "--device", "cpu"]) == 3
    assert "40 of 16×16, 1 of 128×128: grid.png" in capsys.readouterr().err
    values = answer(capsys, *args, "--resolution", 16)
    assert (values["resolution"], values.get("n", 41)) == (16, 41)


def test_a_set_of_many_sizes_is_refused_before_all_are_read(tmp_path: Path, judge_path: Path) -> None:
    for side in range(16, 32):
        Image.fromarray(pixels(1, side=side)[0]).save(tmp_path / f"{side}.png")
    (tmp_path / "99.png").write_bytes(b"not read")
    with pytest.raises(DataError, match=r"16×16.*24×24"):
        eval_images("is", str(tmp_path), extractor=judge_path, device="cpu")


def test_images_of_one_oblong_size_are_cropped_to_their_short_side(tmp_path: Path) -> None:
    save_images(tmp_path / "images", pixels(4, side=24)[:, :20])
    images = open_target(str(tmp_path / "images"), None, Blocks())
    assert (images.resolution, next(images.read([range(4)])).shape) == (20, (4, 20, 20, 3))


def test_the_size_of_a_judge_is_the_default_crop_and_another_size_is_refused(
    generator_path: Path, tmp_path: Path, tiny_tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Also the checkpoint's, of 16 pixels, is not that of a judge of 64."""
    monkeypatch.setattr(extractors, "SIDE", 64)
    large = ["--extractor", str(save_judge(tmp_path / "large.pt")), "--device", "cpu"]
    monkeypatch.setattr(extractors, "SIDE", 16)
    small = ["--extractor", str(save_judge(tmp_path / "small.pt"))]
    save_images(tmp_path / "images", pixels(12, side=64))
    np.savez(tmp_path / "images.npz", pixels(12))
    cropped = answer(capsys, "is", tmp_path / "images", *small)
    assert cropped["resolution"] == 16
    assert cropped["order_free"] == answer(capsys, "is", tmp_path / "images", *small, "--resolution", 16)["order_free"]
    refused = {
        f"is {tmp_path}/images.npz": "64×64", f"is --ckpt {generator_path} --per-class 4": "64×64",
        "is digits --resolution 16": "64×64", f"reference digits {tmp_path}/ref.npz --resolution 16": "64×64",
        f"recon digits --tokenizer {tiny_tokenizer_file} --limit 4": "64×64",
    }  # fmt: skip
    for args, token in refused.items():
        assert run(["eval", *args.split(), *large]) == 3, args
        message = capsys.readouterr().err
        assert token in message
        assert "16×16" in message


def test_a_folder_a_zip_and_an_npz_of_the_same_images_score_alike(
    tmp_path: Path, judge_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_images(tmp_path / "flat", pixels(48))
    shutil.make_archive(str(tmp_path / "images"), "zip", tmp_path / "flat")
    np.savez_compressed(tmp_path / "packed.npz", arr_0=pixels(48))
    save_npz(tmp_path / "ours.npz", (48, 16, 16, 3), [pixels(48)], [0] * 48)
    ref = ["--ref", "digits:heldout", "--extractor", judge_path]
    names = ("flat", "images.zip", "packed.npz", "ours.npz")
    flat, *others = [answer(capsys, "all", tmp_path / name, *ref) for name in names]
    for values in others:
        assert {**values, "target": 0} == {**flat, "target": 0}
        assert (values["target"]["sha256"], values["target"]["count"]) == (flat["target"]["sha256"], 48)


def test_features_are_kept_in_the_file_of_the_option(
    tmp_path: Path, judge_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "a.npz", pixels(40, 1))
    args = ["all", tmp_path / "a.npz", "--ref", "digits:heldout", "--extractor", judge_path]
    first, again = (answer(capsys, *args, "--features", tmp_path / "features.npz") for _ in range(2))
    assert first == again == answer(capsys, *args)
    assert (tmp_path / "features.npz").is_file()


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
    cut = answer(capsys, "is", "tau=2", *drawn, "--dtype-cut", "floor", "--extractor", judge_path)
    assert cut["options"] == {**direct["options"], "dtype_cut": "floor"}
    assert cut["target"]["sha256"] != direct["target"]["sha256"]
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


def test_scores_of_several_seeds_are_the_means_over_one_seed_each(
    generator_path: Path, judge_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["all", "--ckpt", generator_path, "--per-class", 6, "--ref", "digits:heldout", "--extractor", judge_path]
    singles = [answer(capsys, *args, "--seed", seed) for seed in (3, 4)]
    extracted: list[int] = []
    shared_pieces = features.shared_pieces

    def counted(extractor: Any, images: Any, spatial: bool) -> Any:
        extracted.append(images.count)
        return shared_pieces(extractor, images, spatial)

    monkeypatch.setattr(features, "shared_pieces", counted)
    both = answer(capsys, *args, "--seed", 3, "--seeds", 2)
    assert extracted == [297, 18, 18]  # the reference once
    scores = {"frechet_distance", "classifier_score", "classifier_score_order_free", "precision", "recall"}
    scores |= {"kernel_distance", "class_accuracy", "density", "coverage", "mind", "cmmd"}
    assert both["spread_over_seeds"].keys() == scores
    for name in scores:
        each = [values[name] for values in singles]
        assert (both[name], both["spread_over_seeds"][name]) == pytest.approx((np.mean(each), np.std(each, ddof=1))), (
            name
        )
    assert both["seeds"] == [3, 4]
    of_one_set = {"classifier_score_spread_over_splits", "kernel_distance_spread_over_subsets"}
    of_one_set |= {"frechet_distance_spread_over_subsets"}
    assert singles[0].keys() - both.keys() == of_one_set
    assert singles[0]["options"].keys() - both["options"].keys() == {"seed"}
    assert both["target"] == {"name": str(generator_path), "count": 18}


def test_the_ratio_of_several_extractors_is_the_mean_of_theirs(
    judge_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, seed in (("a", 1), ("heldout", 2)):
        np.savez(tmp_path / f"{name}.npz", pixels(40, seed))
    other = save_judge(tmp_path / "other.pt", 1)
    args = ["fdr", tmp_path / "a.npz", "--ref", "digits", "--heldout", tmp_path / "heldout.npz", "--extractor"]
    each = [answer(capsys, *args, path) for path in (judge_path, other)]
    both = answer(capsys, *args, f"{judge_path},{other}")
    assert both["value"] == pytest.approx(np.mean([one["value"] for one in each]))
    assert [one["fdr"] for one in both["by_extractor"]] == [one["value"] for one in each]
    assert both["heldout"] == each[0]["heldout"]
    assert both["heldout"]["count"] == 40
    assert answer(capsys, "fdr", tmp_path / "a.npz", *args[2:4], "--heldout", tmp_path / "a.npz", *args[6:], other)[
        "value"
    ] == pytest.approx(1)


def test_factor_coverage_is_averaged_by_factor() -> None:
    target = {"name": "x", "count": 2, "sha256": ""}
    records = [{"factor_coverage": {"x": a, "y": b}, "target": target} for a, b in ((0.1, 0.5), (0.3, 0.5))]
    values = score.average(records, [0, 1])
    assert values["factor_coverage"] == pytest.approx({"x": 0.2, "y": 0.5})
    assert values["spread_over_seeds"] == pytest.approx({"factor_coverage.x": 0.2 / 2**0.5, "factor_coverage.y": 0})


def arrays(path: Path) -> dict[str, NDArray[Any]]:
    return dict(np.load(path)) if path.exists() else {}


@pytest.mark.parametrize(
    "task",
    [
        "all {a} --ref {b} --ci",
        pytest.param("pr {a} --ref {b}", marks=pytest.mark.slow),
        pytest.param("is {a} --features {made}", marks=pytest.mark.slow),
        pytest.param("reference {a} {made}", marks=pytest.mark.slow),
        pytest.param("all --ckpt {ckpt} --per-class 8 --seeds 2 --ref {b}", marks=pytest.mark.slow),
    ],
)
def test_two_processes_score_as_one(
    task: str, generator_path: Path, judge_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {name: tmp_path / f"{name}.npz" for name in ("a", "b", "made")}
    np.savez(paths["a"], pixels(600, 1))
    np.savez(paths["b"], pixels(100, 2))  # one piece: the second process has none
    args = ["eval", *task.format(**paths, ckpt=generator_path).split(), "--extractor", str(judge_path)]
    args += ["--device", "cpu", "--quiet", "--json"]
    both, made = ranks(args, tmp_path / "both.json"), arrays(paths["made"])
    if "--features" in task:
        assert_close(ranks(args, tmp_path / "again.json"), both)
        paths["made"].unlink()
    assert run(args) == 0
    assert_close(both, json.loads(capsys.readouterr().out))
    for name, array in arrays(paths["made"]).items():
        assert np.allclose(made[name], array, rtol=1e-6) if array.dtype.kind == "f" else made[name] == array, name


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
    paths = [str(folder / name) for name in (SAMPLES, REFERENCE)]
    values = eval_images("all", *paths, weights=folder / INCEPTION.file).values
    for name, (value, tolerance) in PUBLISHED.items():
        assert values[name] == pytest.approx(value, abs=tolerance), name

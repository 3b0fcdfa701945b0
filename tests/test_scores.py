"""eval fid, sfid, is, pr, kid and all: one pass, the same numbers however it is made; what it is computed with."""

import json
import os
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import leaves
from numpy.typing import NDArray
from PIL import Image
from processes import ranks
from torch import Tensor

from rdpm_cli import engine, modelfile
from rdpm_cli.cli.app import run
from rdpm_cli.errors import DataError, UsageError
from rdpm_cli.evaluation import cache, features, judge, metrics, passes, reference, scores
from rdpm_cli.evaluation.features import Activations
from rdpm_cli.evaluation.judge import Judge
from rdpm_cli.evaluation.reference import ImageSet
from rdpm_cli.generator import model, sampler
from rdpm_cli.generator.contract import SampleOptions
from rdpm_cli.images.tensors import chw
from rdpm_cli.images.writers import save_npz
from rdpm_cli.threads import one_thread

CPU = torch.device("cpu")
Images = NDArray[np.uint8]


def pixels(count: int, seed: int = 0) -> Images:
    return np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)


def image_set(values: Images, labels: list[int] | None = None, name: str = "images") -> ImageSet:
    def read(pieces: Iterable[range]) -> Iterator[Images]:
        return (values[piece.start : piece.stop] for piece in pieces)

    return ImageSet(name, len(values), 16, labels, list("abc"), read, origin={})


class Blocks:
    """An extractor with everything: means of quarters as features, of colours as logits, rows as spatial features."""

    name, sha256, note = "inception-2015-12-05 stand-in", "6" * 64, ""
    class_names: list[str] = []  # noqa: RUF012
    accuracy: float | None = None
    width, spatial = 12, 16

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, pixels_BCHW: Tensor) -> Activations:
        self.seen += len(pixels_BCHW)
        x = pixels_BCHW.float() / 255
        quarters = x.unfold(2, 8, 8).unfold(3, 8, 8).mean((4, 5)).flatten(1)  # (B, 12)
        return Activations(quarters, 40 * x.mean((2, 3)), x.mean((1, 3)))


@pytest.fixture(scope="module")
def judge_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained judge of the classes a, b, c."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Judge(16, 8, 6, 3)
    path = tmp_path_factory.mktemp("judge") / "judge.pt"
    modelfile.save(path, judge.pack(network, list("abc"), provenance={"heldout_accuracy": 0.25}))
    return path


def score(metric: str, ours: Images, theirs: Images, **options: Any) -> dict[str, Any]:
    found = scores.score(metric, Blocks(), image_set(ours), image_set(theirs), scores.Options(**options))
    assert found is not None
    return found


# ---- one pass ------------------------------------------------------------------------------------------------------


def test_every_score_of_one_pass_is_the_metric_of_the_features() -> None:
    ours, theirs = pixels(40, 1), pixels(60, 2)
    values = score("all", ours, theirs)
    a, b = (Blocks()(chw(side)) for side in (ours, theirs))

    def distance(x: Tensor | None, y: Tensor | None) -> float:
        assert x is not None
        assert y is not None
        return metrics.frechet_distance(metrics.statistics(x.numpy()), metrics.statistics(y.numpy()))

    assert values["fid"] == pytest.approx(distance(a.features_BD, b.features_BD), rel=1e-6)
    assert values["sfid"] == pytest.approx(distance(a.spatial_BS, b.spatial_BS), rel=1e-6)
    running = metrics.RunningScore(40, 3)
    running.add(0, a.logits_BK.numpy())
    assert values["inception_score"] == pytest.approx(running.value())
    assert values["inception_score_order_free"] == pytest.approx(running.order_free())
    both = a.features_BD.numpy(), b.features_BD.numpy()
    assert (values["precision"], values["recall"]) == metrics.precision_recall(*both)
    assert values["kid"] == pytest.approx(metrics.kernel_distance(*both).value)
    assert "not_computed" not in values


@pytest.mark.parametrize("metric", scores.METRICS)
def test_a_score_alone_is_the_score_among_all(metric: str) -> None:
    ours, theirs = pixels(40, 1), pixels(60, 2)
    alone, among = score(metric, ours, theirs), score("all", ours, theirs)
    if metric == "pr":
        assert (alone["metric"], alone["precision"]) == ("precision_recall", among["precision"])
        assert (alone["recall"], alone["neighbours"]) == (among["recall"], 3)
    else:
        assert alone["metric"] == scores.NAMES[metric]
        assert alone["value"] == among[scores.NAMES[metric]]
    assert alone["target"] == among["target"]
    assert json.loads(json.dumps(alone, allow_nan=False)) == alone


def test_the_pass_does_not_depend_on_its_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = score("all", pixels(40, 1), pixels(60, 2))
    for piece, batch in ((7, 64), (40, 3), (1, 1)):
        monkeypatch.setattr(passes, "PIECE", piece)
        monkeypatch.setattr(features, "BATCH", batch)
        cut = score("all", pixels(40, 1), pixels(60, 2))
        assert cut["target"] == whole["target"]
        for name in ("fid", "sfid", "inception_score", "precision", "recall", "kid"):
            assert cut[name] == pytest.approx(whole[name], rel=1e-9, abs=1e-12), name


def test_statistics_alone_keep_no_features() -> None:
    seen = passes.look(Blocks(), image_set(pixels(40)), passes.Wanted(score=True))
    assert seen is not None
    assert (seen.features_ND.size, seen.logits_NK.size, seen.spatial) == (0, 0, None)
    some = passes.look(Blocks(), image_set(pixels(40)), passes.Wanted([3, 39]))
    assert some is not None
    assert np.array_equal(some.features_ND, Blocks()(chw(pixels(40)[[3, 39]])).features_BD.numpy())


def test_precision_and_recall_take_ten_thousand_of_a_large_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "REFERENCES", 20)
    values = score("pr", pixels(40, 1), pixels(60, 2))
    few = [Blocks()(chw(side)).features_BD.numpy() for side in (pixels(40, 1), pixels(60, 2)[::3])]
    assert (values["precision"], values["recall"]) == metrics.precision_recall(few[0], few[1])
    assert values["reference_features"] == 20


# ---- what is no number ---------------------------------------------------------------------------------------------


def test_a_judge_has_no_sfid_and_says_so(judge_path: Path) -> None:
    extractor = features.make_extractor(judge_path, None, CPU)
    ours, theirs = image_set(pixels(40, 1)), image_set(pixels(60, 2))
    alone, among = (scores.score(metric, extractor, ours, theirs) for metric in ("sfid", "all"))
    assert alone is not None
    assert among is not None
    assert (alone["metric"], alone["value"]) == ("spatial_frechet_distance", None)
    assert "pooled features alone" in alone["not_computed"]["value"]
    assert among["spatial_frechet_distance"] is None
    assert set(among["not_computed"]) == {"spatial_frechet_distance"}
    assert among["extractor"]["heldout_accuracy"] == 0.25
    chances = torch.softmax(extractor(chw(pixels(40, 1))).logits_BK.double(), 1)
    kl = (chances * (chances.log() - chances.mean(0).log())).sum(1).mean()
    assert among["classifier_score_order_free"] == pytest.approx(float(kl.exp()))


def test_sorted_images_have_no_score_by_splits() -> None:
    labels = sorted([0, 1, 2] * 10)
    values = scores.score("is", Blocks(), image_set(pixels(30), labels), None)
    mixed = scores.score("is", Blocks(), image_set(pixels(30), [0, 1, 2] * 10), None)
    assert values is not None
    assert mixed is not None
    assert values["value"] is None
    assert "class order" in values["not_computed"]["value"]
    assert values["order_free"] == mixed["order_free"]
    assert mixed["value"] > 1


def test_too_few_images_are_refused() -> None:
    for metric, counts, text in (
        ("is", (9, 60), "needs as many images, not 9"),
        ("fid", (1, 60), "at least 2 images"),
        ("sfid", (60, 1), "at least 2 images"),
        ("pr", (3, 60), "more than 3 images, not 3"),
        ("pr", (60, 2), "more than 3 images, not 2"),
        ("kid", (60, 1), "at least 2 images"),
        ("all", (60, 3), "more than 3 images"),
        ("fid", (0, 60), "no images to score"),
        ("fid", (60, 0), "no images to score"),
    ):
        extractor = Blocks()
        ours, theirs = (image_set(pixels(count)) for count in counts)
        with pytest.raises(DataError, match=text) as refused:
            scores.score(metric, extractor, ours, theirs)
        assert refused.value.exit_code == 3
        assert extractor.seen == 0, "before any image is looked at"


@pytest.mark.parametrize(
    ("labels", "options", "text"),
    [
        (None, {"subset": 6}, "has no labels"),
        ([0, 1, 2] * 10, {"subset": 60}, "hold no class-balanced subset of 60"),
        (None, {"ci": True}, "needs at least 20 images, not 19"),
    ],
)
def test_subsets_and_intervals_that_cannot_be_are_refused_before_the_pass(
    labels: list[int] | None, options: dict[str, Any], text: str
) -> None:
    extractor, ours = Blocks(), image_set(pixels(30 if labels else 19), labels)
    with pytest.raises(DataError, match=text):
        scores.score("fid", extractor, ours, image_set(pixels(60)), scores.Options(**options))
    assert extractor.seen == 0


def test_an_inception_score_of_few_images_is_noted() -> None:
    few, enough = (scores.score("is", Blocks(), image_set(pixels(count)), None) for count in (110, 120))
    assert few is not None
    assert enough is not None
    assert (few["images_per_split"], enough["images_per_split"]) == (11, 12)
    assert few["notes"][0].startswith("11 images a split for 3 classes: an Inception Score of so few is too low")
    assert enough["notes"] == []


def test_a_covariance_without_full_rank_is_noted() -> None:
    assert any("12 features" in note for note in score("fid", pixels(12), pixels(60))["notes"])
    assert any("16 spatial features" in note for note in score("sfid", pixels(60), pixels(16))["notes"])
    assert score("all", pixels(120), pixels(60))["notes"] == []


def test_values_that_are_not_finite_are_refused() -> None:
    class Broken(Blocks):
        def __call__(self, pixels_BCHW: Tensor) -> Activations:
            found = super().__call__(pixels_BCHW)
            return found._replace(logits_BK=found.logits_BK * torch.nan)

    with pytest.raises(DataError, match="not finite"):
        scores.score("fid", Broken(), image_set(pixels(20)), image_set(pixels(20)))


# ---- intervals -----------------------------------------------------------------------------------------------------


def test_intervals_are_laid_about_the_value_and_narrow_with_more_images() -> None:
    few, many = (score("fid", pixels(count, 1), pixels(60, 2), ci=True) for count in (30, 300))
    assert few["ci95"][0] >= 0
    for values in (few, many):
        assert values["ci95"][0] < values["value"] < values["ci95"][1]
    assert many["ci95"][1] - many["ci95"][0] < few["ci95"][1] - few["ci95"][0]
    again = score("fid", pixels(30, 1), pixels(60, 2), ci=True)
    assert again["ci95"] == few["ci95"]
    opinions = scores.score("is", Blocks(), image_set(pixels(100)), None, scores.Options(ci=True))
    assert opinions is not None
    assert opinions["ci95"][0] < opinions["value"] < opinions["ci95"][1]
    assert opinions["order_free_ci95"][0] < opinions["order_free"] < opinions["order_free_ci95"][1]


@pytest.mark.parametrize(
    ("metric", "options", "text"),
    [("is", {"subset": 4}, "--subset"), ("kid", {"ci": True}, "--ci"), ("pr", {"subset": 4}, "--subset")],
)
def test_an_option_without_a_use_is_refused(metric: str, options: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        scores.check(metric, scores.Options(**options))


# ---- the cache -----------------------------------------------------------------------------------------------------


def test_the_cache_goes_by_content(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    extractor, kept = Blocks(), cache.Cache(tmp_path, "6" * 64)
    first = scores.score(
        "all", extractor, image_set(pixels(40, 1)), image_set(pixels(60, 2)), scores.Options(cache=kept)
    )
    assert extractor.seen == 100
    for name in ("images", "others"):  # under any name
        again = scores.score(
            "all", extractor, image_set(pixels(40, 1), name=name), image_set(pixels(60, 2)), scores.Options(cache=kept)
        )
        assert extractor.seen == 100
        assert again is not None
        assert first is not None
        assert {**again, "target": 0} == {**first, "target": 0}
    changed = pixels(40, 1)
    changed[7, 0, 0, 0] ^= 1
    scores.score("fid", extractor, image_set(changed), image_set(pixels(60, 2)), scores.Options(cache=kept))
    assert extractor.seen == 140
    other = cache.Cache(tmp_path, "7" * 64)
    scores.score("fid", extractor, image_set(changed), image_set(pixels(60, 2)), scores.Options(cache=other))
    assert extractor.seen == 240, "another extractor's"
    assert not capsys.readouterr().err.count("warning")
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".npz"] == []


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "other"])
def test_a_damaged_entry_is_computed_again_with_a_warning(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extractor, kept = Blocks(), cache.Cache(tmp_path, "6" * 64)
    options = scores.Options(cache=kept)
    first = scores.score("is", extractor, image_set(pixels(40, 1)), None, options)
    (entry,) = tmp_path.rglob("*.npz")
    content = bytearray(entry.read_bytes())
    if damage == "truncate":
        entry.write_bytes(content[:300])
    elif damage == "flip":
        content[len(content) // 3] ^= 1
        entry.write_bytes(content)
    elif damage == "empty":
        entry.write_bytes(b"")
    else:
        np.savez(entry, features=np.zeros((3, 2), np.float32))
    assert scores.score("is", extractor, image_set(pixels(40, 1)), None, options) == first
    assert extractor.seen == 80
    assert "damaged" in capsys.readouterr().err
    assert scores.score("is", extractor, image_set(pixels(40, 1)), None, options) == first
    assert extractor.seen == 80, "mended"


def test_a_cache_that_cannot_be_written_costs_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    kept = cache.Cache(tmp_path / "file", "6" * 64)
    assert scores.score("is", Blocks(), image_set(pixels(600)), None, scores.Options(cache=kept))
    assert capsys.readouterr().err.count("warning: nothing more is kept") == 1


def test_the_cache_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RDPM_CACHE", str(tmp_path / "mine"))
    assert cache.folder() == tmp_path / "mine"
    monkeypatch.delenv("RDPM_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.folder() == tmp_path / ".cache" / "rdpm"


# ---- targets -------------------------------------------------------------------------------------------------------


def answer(capsys: pytest.CaptureFixture[str], *args: object) -> dict[str, Any]:
    """`rdpm eval ARGS` as JSON."""
    assert run(["eval", *map(str, args), "--device", "cpu", "--quiet", "--json"]) == 0
    values: dict[str, Any] = json.loads(capsys.readouterr().out)
    return values


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """48 images as a flat folder."""
    (tmp_path / "flat").mkdir()
    for place, image in enumerate(pixels(48)):
        Image.fromarray(image).save(tmp_path / "flat" / f"{place:03d}.png")
    return tmp_path / "flat"


def test_a_folder_a_zip_and_an_npz_of_the_same_images_score_alike(
    folder: Path, judge_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with zipfile.ZipFile(folder.parent / "images.zip", "w") as archive:
        for path in sorted(folder.iterdir()):
            archive.write(path, path.name)
    np.savez(folder.parent / "images.npz", pixels(48))
    np.savez_compressed(folder.parent / "packed.npz", arr_0=pixels(48))
    save_npz(folder.parent / "ours.npz", (48, 16, 16, 3), [pixels(48)], [0] * 48)
    names = ["flat", "images.zip", "images.npz", "packed.npz", "ours.npz"]
    found = [
        answer(capsys, "all", folder.parent / name, "--ref", "digits:heldout", "--extractor", judge_path)
        for name in names
    ]
    for values in found[1:]:
        assert {**values, "target": 0} == {**found[0], "target": 0}
        assert values["target"]["sha256"] == found[0]["target"]["sha256"]
        assert values["target"]["count"] == 48


def object_array(path: Path) -> None:
    np.savez(path, arr_0=np.array([os.getcwd, 1], dtype=object), mu=np.array([os.getcwd], dtype=object))


@pytest.mark.parametrize(
    ("write", "text"),
    [
        (lambda path: path.write_bytes(b"PK\x03\x04 half"), "cannot be read as an .npz"),
        (lambda path: np.savez(path, images=pixels(3)), "holds no images: it has images"),
        (lambda path: np.savez(path, pixels(3).astype(np.float32)), "arr_0 is float32"),
        (lambda path: np.savez(path, pixels(3)[..., 0]), r"arr_0 is uint8 \(3, 16, 16\)"),
        (lambda path: np.savez(path, np.asfortranarray(pixels(3))), "Fortran"),
        (object_array, "arr_0 is object"),
        (lambda path: np.savez(path, mu=np.zeros(3), sigma=np.eye(3)), "holds statistics, not images"),
    ],
)
def test_an_npz_without_images_is_refused(write: Any, text: str, tmp_path: Path, judge_path: Path) -> None:
    write(tmp_path / "images.npz")
    with pytest.raises(DataError, match=text) as refused:
        engine.eval_images("is", str(tmp_path / "images.npz"), ruler=engine.Ruler(judge_path), device="cpu")
    assert refused.value.exit_code == 3


@pytest.mark.parametrize(
    "changes", [{}, {"npz": "other.npz"}, {"resolution": 8}, {"rows": 47}, {"label": 2}, {"label": None}]
)
def test_what_lies_beside_an_npz_is_of_it_only_where_it_lists_its_images(
    changes: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    label = changes.get("label", 1)
    rows = [{"index": place, "label": label} for place in range(changes.get("rows", 48))]
    record = {"npz": "samples.npz", "resolution": 16, "class_names": ["a", "b", "c"], "options": {"cfg": 1.0}}
    record |= {"samples": rows} | {key: changes[key] for key in ("npz", "resolution") if key in changes}
    save_npz(tmp_path / "samples.npz", (48, 16, 16, 3), [pixels(48)], [1] * 48)
    (tmp_path / "samples.json").write_text(json.dumps(record))
    found = reference.open_target(str(tmp_path / "samples.npz"), None)
    belongs = not changes or label is None
    assert found.labels == [1] * 48
    assert (found.class_names, found.origin.get("options")) == (
        (["a", "b", "c"], {"cfg": 1.0}) if belongs else ([], None)
    )
    warned = "lists other images than" in capsys.readouterr().err
    assert warned == (not belongs and "npz" not in changes)


def test_an_npz_is_read_in_flat_memory(tmp_path: Path) -> None:
    np.savez(tmp_path / "images.npz", pixels(48))
    found = reference.open_target(str(tmp_path / "images.npz"), None)
    parts = list(found.read([range(5, 9), range(20, 48)]))
    assert np.array_equal(np.concatenate(parts), pixels(48)[[*range(5, 9), *range(20, 48)]])


@pytest.fixture(scope="module")
def generator_path(tmp_path_factory: pytest.TempPathFactory, digits_codes: Path) -> Path:
    """A generator of one step, whose reference is the store's images."""
    small = ["network.depth=1", "network.width=32", "network.heads=2", "train.batch=16", "train.steps=1"]
    out = tmp_path_factory.mktemp("generator") / "run"
    engine.train_gen(digits_codes, out, "digits", [*small, "sampling.micro_batch=4"], "cpu")
    return out / "generator.pt"


def test_a_checkpoint_is_scored_as_its_samples_are_with_no_files_between(
    generator_path: Path, judge_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    drawn = ["--ckpt", generator_path, "--per-class", 6, "--seed", 3]
    ours = answer(capsys, "all", "tau=2", *drawn, "--extractor", judge_path)
    raw = answer(capsys, "is", "channels_last=true", *drawn, "--preset", "raw", "--extractor", judge_path)
    assert (raw["options"]["draw"], raw["options"]["channels_last"]) == ("argmax", True)
    assert list(tmp_path.iterdir()) == []
    engine.sample(generator_path, "all", 6, tmp_path / "samples", seed=3, sampling={"tau": 2.0}, device="cpu")
    files = answer(capsys, "all", tmp_path / "samples", "--extractor", judge_path)
    assert ours["target"]["sha256"] == files["target"]["sha256"]
    for name in ("frechet_distance", "classifier_score", "precision", "kernel_distance", "class_accuracy"):
        assert ours[name] == files[name], name
    assert ours["reference"] == files["reference"]
    assert ours["options"] == {
        **files["options"], "classes": "all", "per_class": 6, "checkpoint": model.load(generator_path).digest,
    }  # fmt: skip


def test_samples_kept_in_an_npz_alone_are_scored_like_files(
    generator_path: Path, judge_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = engine.Outputs(png=False, npz=True)
    for name, outputs in {"files": engine.Outputs(), "alone": alone}.items():
        engine.sample(generator_path, "all", 6, tmp_path / name, seed=3, outputs=outputs, device="cpu")
    files, packed = (answer(capsys, "all", tmp_path / name, "--extractor", judge_path) for name in ("files", "alone"))
    assert "file" not in json.loads((tmp_path / "alone" / "samples.json").read_text())["samples"][0]
    assert {**packed, "target": None} == {**files, "target": None}
    assert packed["target"]["sha256"] == files["target"]["sha256"]
    direct = answer(capsys, "all", tmp_path / "alone" / "samples.npz", "--extractor", judge_path)
    assert {**direct, "target": None} == {**files, "target": None}, "options, checkpoint, reference and classes too"
    np.savez(tmp_path / "alone" / "samples.npz", pixels(3))
    with pytest.raises(DataError, match=r"\(3, 16, 16, 3\), not \(18, 16, 16, 3\)"):
        reference.open_samples(tmp_path / "alone")
    (tmp_path / "alone" / "samples.npz").unlink()
    with pytest.raises(DataError, match=r"all samples are missing, first samples\.npz"):
        reference.open_samples(tmp_path / "alone")


def test_a_checkpoint_gives_each_process_its_own_pieces(generator_path: Path) -> None:
    images = engine.Drawn(generator_path, per_class=6).images(CPU)
    loaded = model.load(generator_path)
    labels = sampler.balanced_labels([0, 1, 2], 6, 0)
    parts = sampler.sample(loaded.generator, loaded.tokenizer, labels, SampleOptions(loaded.sampling), 4)
    whole = np.concatenate([part.pixels_BHWC for part in parts])
    assert images.labels == labels
    pieces = [range(0, 3), range(6, 11), range(17, 18)]
    for piece, found in zip(pieces, images.read(pieces), strict=True):
        assert np.array_equal(found, whole[piece.start : piece.stop])


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ("fid", "one TARGET is wanted"),
        ("fid a b", "2 are given"),
        ("fid samples --ckpt {ckpt}", "'samples' is not key=value"),
        ("fid tua=2 --ckpt {ckpt}", "tua"),
        ("fid --ckpt {ckpt} --resolution 8", "--resolution"),
        ("fid --ckpt {ckpt} --classes 9", "there is no class 9"),
        ("is digits --subset 4", "--subset"),
        ("is digits --ref digits", "--ref"),
        ("sfid digits --ref digits", "a judge has pooled features alone"),
        ("fid digits --ref digits --preset raw", "--preset belongs to --ckpt"),
        ("fid --ckpt {ckpt} --preset rawest", "no such preset"),
        ("fid digits --ref digits --per-class 8", "--per-class belongs to --ckpt"),
        ("reference digits ref", "no .npz"),
    ],
)
def test_arguments_that_mean_nothing_are_usage_errors(
    args: str, text: str, generator_path: Path, judge_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["eval", *args.format(ckpt=generator_path).split(), "--extractor", str(judge_path)]
    assert run([*command, "--device", "cpu"]) == 2
    assert text in capsys.readouterr().err


# ---- Inception -----------------------------------------------------------------------------------------------------


def test_spatial_features_are_the_first_channels_of_the_branch_in_height_width_channel_order(
    random_inception: Path,
) -> None:
    """ADM's mixed_6/conv:0[..., :7] of NHWC: place (y, x, c) is number (17 y + x) · 7 + c."""
    extractor = features.make_extractor(None, random_inception, CPU)
    assert isinstance(extractor, features.Inception)
    kept: list[Tensor] = []
    layer = extractor.network.get_submodule("Mixed_6d.branch1x1.conv")
    norm = extractor.network.get_submodule("Mixed_6d.branch1x1.bn")
    layer.register_forward_hook(lambda _, given, out: kept.append(out))
    with one_thread():
        found = extractor(chw(pixels(2))).spatial_BS
        assert found is not None
        by_hand = torch.relu(norm(kept[0]))  # (B, 192, 17, 17)
    assert tuple(found.shape) == (2, 2023)
    for y, x, c in ((0, 0, 0), (0, 0, 6), (0, 1, 0), (1, 0, 0), (16, 16, 6), (5, 11, 3)):
        assert torch.equal(found[:, (17 * y + x) * 7 + c], by_hand[:, c, y, x])
    assert bool((found > 0).any())


def test_logits_are_those_without_bias(random_inception: Path) -> None:
    extractor = features.make_extractor(None, random_inception, CPU)
    assert isinstance(extractor, features.Inception)
    with one_thread():
        found = extractor(chw(pixels(2)))
    weight = extractor.network.get_submodule("fc").weight
    assert isinstance(weight, Tensor)
    assert torch.allclose(found.logits_BK, found.features_BD @ weight.T, rtol=1e-5)


# ---- several processes ---------------------------------------------------------------------------------------------


def assert_close(both: dict[str, Any], alone: dict[str, Any]) -> None:
    found, wanted = leaves(both), leaves(alone)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name] == (pytest.approx(value, rel=1e-6, abs=1e-9) if isinstance(value, float) else value), name


def arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Those of an .npz; none where it is not there."""
    if not path.exists():
        return {}
    with np.load(path) as content:
        return dict(content)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["fid --ci", "is --ci", "pr", "kid", "reference", "all --ckpt"])
def test_two_processes_do_as_one(
    what: str, generator_path: Path, judge_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "a.npz", pixels(600, 1))
    np.savez(tmp_path / "b.npz", pixels(300, 2))
    metric, *more = what.split()
    target = ["--ckpt", str(generator_path), "--per-class", "8"] if "--ckpt" in more else [str(tmp_path / "a.npz")]
    target += [str(tmp_path / "made.npz")] if metric == "reference" else []
    target += ["--ref", str(tmp_path / "b.npz")] if metric not in ("is", "reference") else []
    args = ["eval", metric, *target, *(["--ci"] if "--ci" in more else []), "--extractor", str(judge_path)]
    args += ["--device", "cpu", "--quiet", "--json", "--no-cache"]
    both = ranks(args, tmp_path / "both.json")
    made = arrays(tmp_path / "made.npz")
    assert run(args) == 0
    assert_close(both, json.loads(capsys.readouterr().out))
    for name, again in arrays(tmp_path / "made.npz").items():
        assert np.allclose(again, made[name], rtol=1e-6) if again.dtype.kind == "f" else again == made[name], name


def test_two_processes_score_as_one(judge_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "a.npz", pixels(300, 1))
    np.savez(tmp_path / "b.npz", pixels(100, 2))  # one piece: the second process has none
    args = ["eval", "all", str(tmp_path / "a.npz"), "--ref", str(tmp_path / "b.npz"), "--extractor", str(judge_path)]
    args += ["--device", "cpu", "--quiet", "--json", "--no-cache"]
    both = ranks(args, tmp_path / "both.json")
    assert run(args) == 0
    alone = json.loads(capsys.readouterr().out)
    assert_close(both, alone)


@pytest.mark.slow
def test_a_team_answers_once(judge_path: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    args = [
        "eval",
        "fid",
        "digits:heldout",
        "--ref",
        "digits:train",
        "--extractor",
        str(judge_path),
        "--quiet",
        "--json",
    ]
    assert run([*args, "--device", "cpu"]) == 0
    alone = json.loads(capfd.readouterr().out)
    assert run([*args, "--device", "cpu", "--gpus", "2"]) == 0
    team = json.loads(capfd.readouterr().out)
    assert team["value"] == pytest.approx(alone["value"], rel=1e-6)
    assert team["reference"] == alone["reference"]

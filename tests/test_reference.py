"""Targets and references: sample folders and the reference they record, .npz files of images and of statistics."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from extractors import CPU, Blocks, Images, image_set, pixels, save_judge
from numpy.typing import NDArray
from PIL import Image

from rdpm_cli import checkpoint, files
from rdpm_cli.cli.app import run
from rdpm_cli.data.folder import ImageSet, open_samples
from rdpm_cli.data.open import open_source
from rdpm_cli.data.pixels import TRANSFORM, chw
from rdpm_cli.engine.score import Ruler, eval_images, eval_reference
from rdpm_cli.errors import DataError
from rdpm_cli.evaluation import features, reference
from rdpm_cli.evaluation.metrics import statistics
from rdpm_cli.evaluation.reference import StatisticsFile, find_statistics, measure
from rdpm_cli.evaluation.score import score


@pytest.fixture(scope="module")
def judge_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_judge(tmp_path_factory.mktemp("judge") / "judge.pt")


def answer(capsys: pytest.CaptureFixture[str], *args: object) -> dict[str, Any]:
    """`rdpm eval ARGS` as JSON."""
    assert run(["eval", *map(str, args), "--device", "cpu", "--quiet", "--json"]) == 0
    values: dict[str, Any] = json.loads(capsys.readouterr().out)
    return values


def all_of(images: ImageSet) -> Images:
    return np.concatenate(list(images.read([range(0, 7), range(7, images.count)])))


# ---- samples and the reference that they record --------------------------------------------------------------------


@pytest.fixture
def samples(tmp_path: Path, image_folder: Path) -> Path:
    """A folder as `rdpm sample` writes it, whose record names `image_folder`; and a file that is no sample."""
    source = open_source(str(image_folder))
    folder = tmp_path / "samples"
    folder.mkdir()
    rows = [{"file": f"{i:06d}.png", "index": i, "label": i % 3} for i in range(12)]
    for name, image in zip([*(row["file"] for row in rows), "stray.png"], pixels(13), strict=True):
        Image.fromarray(image).save(folder / str(name))
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


def test_the_recorded_reference_is_used_unless_another_is_named(
    samples: Path, image_folder: Path, judge_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judged = ["--extractor", judge_path]
    recorded = answer(capsys, "fid", samples, *judged)
    named = answer(capsys, "fid", samples, "--ref", image_folder, "--resolution", 16, *judged)
    assert (recorded["value"], recorded["reference"]) == (named["value"], named["reference"])
    assert recorded["reference"]["name"] == str(image_folder.resolve())
    assert (recorded["reference"]["count"], recorded["target"]["count"]) == (36, 12)
    assert recorded["options"] == {"cfg": 0.0, "seed": 0}
    assert 0 <= recorded["class_accuracy"] <= 1
    some = answer(capsys, "fid", samples, "--ref", image_folder / "a", *judged)
    assert (Path(some["reference"]["name"]).name, some["reference"]["count"]) == ("a", 12)
    same = answer(capsys, "fid", samples, "--ref", samples, *judged)
    assert same["value"] == pytest.approx(0, abs=1e-4)
    assert same["target"] == same["reference"]


def test_images_that_the_store_left_out_are_not_in_the_reference(samples: Path, image_folder: Path) -> None:
    edit(samples, lambda record: record["reference"].update(left_out=[1, 35]))
    images = reference.open_reference(None, open_samples(samples))
    indices, source = [i for i in range(36) if i not in (1, 35)], open_source(str(image_folder))
    assert (images.count, images.labels) == (34, [source.need_labels()[i] for i in indices])
    assert np.array_equal(all_of(images), np.stack([source.pixels(i, 16) for i in indices]))
    few = reference.open_recorded(open_samples(samples).record["reference"], "samples", "", limit=3)
    assert np.array_equal(np.concatenate(list(few.read([range(3)]))), all_of(images)[[0, 11, 22]])


def test_images_are_a_target_at_the_size_of_the_first_or_the_requested_one(image_folder: Path) -> None:
    assert reference.open_target(str(image_folder), 24).resolution == 24
    images = reference.open_target(str(image_folder), None)
    side = min(open_source(str(image_folder)).image(0).size)
    assert all_of(images).shape == (36, side, side, 3)
    with pytest.raises(DataError, match="--ref") as refused:
        raise_with_hint(lambda: reference.open_reference(None, images))
    assert refused.value.exit_code == 3


def raise_with_hint(function: Callable[[], object]) -> None:
    """Call, and raise a DataError with its hint in the message."""
    try:
        function()
    except DataError as error:
        raise DataError(f"{error.message}; {error.hint}") from error


@pytest.mark.parametrize(
    ("damage", "token"),
    [
        (lambda folder: (folder / "000003.png").unlink(), "000003.png"),
        (lambda folder: (folder / "000003.png").write_bytes(b"\x89PNG"), "000003.png"),
        (lambda folder: Image.new("RGB", (17, 16)).save(folder / "000003.png"), "000003.png"),
        (lambda folder: (folder / "samples.json").write_text("{"), "samples.json"),
        (lambda folder: (folder / "samples.json").write_text("{}"), "samples.json"),
        (lambda folder: edit(folder, lambda r: r["reference"].update(digest="0" * 64)), "images"),
        (lambda folder: edit(folder, lambda r: r["reference"].update(source="/no/where")), "/no/where"),
        (lambda folder: edit(folder, lambda r: r["reference"].update(transform="squash")), "squash"),
        (lambda folder: edit(folder, lambda r: r.update(reference=None)), "--ref"),
        (lambda folder: edit(folder, lambda r: r.update(samples=r["samples"][:1])), "not 1"),
    ],
)
def test_samples_that_cannot_be_scored_are_an_error_of_data(
    samples: Path, judge_path: Path, damage: Callable[[Path], object], token: str
) -> None:
    damage(samples)
    with pytest.raises(DataError, match=token.replace(".", r"\.")):
        raise_with_hint(lambda: eval_images("fid", str(samples), ruler=Ruler(judge_path), device="cpu"))


# ---- .npz files of images ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(b"PK\x03\x04 half"),
        lambda path: np.savez(path, images=pixels(3)),
        lambda path: np.savez(path, pixels(3).astype(np.float32)),
        lambda path: np.savez(path, np.asfortranarray(pixels(3))),
        lambda path: np.savez(path, arr_0=np.array([os.getcwd, 1], dtype=object)),
        lambda path: np.savez(path, mu=np.zeros(3), sigma=np.eye(3)),  # statistics
    ],
)
def test_an_npz_without_images_is_refused_as_a_target(write: Any, tmp_path: Path, judge_path: Path) -> None:
    write(tmp_path / "images.npz")
    with pytest.raises(DataError, match=r"images\.npz"):
        eval_images("is", str(tmp_path / "images.npz"), ruler=Ruler(judge_path), device="cpu")


# ---- statistics ----------------------------------------------------------------------------------------------------


def statistics_of(features_ND: NDArray[np.floating]) -> tuple[NDArray[Any], NDArray[Any]]:
    return features_ND.astype(np.float64).mean(0), np.cov(features_ND.astype(np.float64), rowvar=False)


def adm_file(path: Path, images: Images) -> Path:
    """As ADM's VIRTUAL_imagenet256_labeled.npz, by the stand-in of Inception."""
    activations = Blocks()(chw(images))
    assert activations.spatial_BP is not None
    mu, sigma = statistics_of(activations.features_BD.numpy())
    mu_s, sigma_s = statistics_of(activations.spatial_BP.numpy())
    np.savez(path, mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s, arr_0=images)
    return path


def opened(path: Path) -> StatisticsFile:
    file = find_statistics(str(path))
    assert file is not None
    return file


def scored(metric: str, target: ImageSet, compared: ImageSet | StatisticsFile) -> dict[str, Any]:
    values = score(metric, Blocks(), target, compared)
    assert values is not None
    return values


def test_an_adm_file_gives_the_scores_of_its_images(tmp_path: Path) -> None:
    target, images = image_set(pixels(40, 1)), pixels(60, 2)
    path = adm_file(tmp_path / "adm.npz", images)
    by_file, by_images = scored("all", target, opened(path)), scored("all", target, image_set(images))
    for name in ("fid", "sfid", "inception_score", "precision", "recall", "kid"):
        assert by_file[name] == pytest.approx(by_images[name], rel=1e-6, abs=1e-9), name
    assert by_file["reference"] == {"name": str(path), "count": None, "sha256": files.sha256_file(path)}


def test_a_pytorch_fid_file_gives_only_fid(tmp_path: Path) -> None:
    mu, sigma = statistics_of(Blocks()(chw(pixels(60, 2))).features_BD.numpy())
    np.savez(tmp_path / "fid.npz", mu=mu.astype(np.float32), sigma=sigma)
    values = scored("all", image_set(pixels(40, 1)), opened(tmp_path / "fid.npz"))
    expected = scored("fid", image_set(pixels(40, 1)), image_set(pixels(60, 2)))["value"]
    assert values["fid"] == pytest.approx(expected, rel=1e-5)
    assert set(values["not_computed"]) == {"sfid", "precision", "recall", "kid"}
    assert "mu_s" in values["not_computed"]["sfid"]
    assert "arr_0" in values["not_computed"]["kid"]
    assert values["precision"] is None


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


def with_arrays(**arrays: NDArray[Any]) -> Callable[[Path], object]:
    whole: dict[str, NDArray[Any]] = {"mu": np.zeros(12), "sigma": np.eye(12), **arrays}
    return lambda path: np.savez(path, **whole)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "write",
    [
        with_arrays(sigma=np.eye(11)),
        with_arrays(mu=np.zeros(5), sigma=np.eye(5)),  # of another extractor
        with_arrays(mu=np.full(12, np.nan)),
        with_arrays(sigma=np.array(["x"])),
        with_arrays(mu=np.array([Bomb()], dtype=object)),
        with_arrays(rdpm_reference=np.array("{}")),
        with_arrays(rdpm_reference=np.array("[")),
        with_arrays(mu_s=np.zeros(5), sigma_s=np.eye(5)),
        lambda path: path.write_bytes(b"PK\x03\x04 half"),
        lambda path: np.savez(path, other=np.zeros(3)),
        lambda path: path.write_bytes(pickle.dumps(Bomb())),
    ],
)
def test_a_file_without_usable_statistics_is_refused_and_not_run(
    write: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    extractor = Blocks()
    monkeypatch.setattr(Ruler, "open", lambda *_: extractor)
    write(tmp_path / "ref.npz")
    with pytest.raises(DataError, match=r"ref\.npz"):
        eval_images("fid", "digits:heldout", "ref.npz", device="cpu")
    assert extractor.extracted == 0
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("metric", ["sfid", "pr", "kid"])
def test_a_reference_that_has_nothing_for_the_score_is_refused_before_the_pass(metric: str, tmp_path: Path) -> None:
    with_arrays()(tmp_path / "ref.npz")
    extractor = Blocks()
    with pytest.raises(DataError, match=r"ref\.npz"):
        score(metric, extractor, image_set(pixels(40)), opened(tmp_path / "ref.npz"))
    assert extractor.extracted == 0


def test_statistics_are_refused_for_another_extractor(tmp_path: Path, judge_path: Path, image_folder: Path) -> None:
    inception = adm_file(tmp_path / "adm.npz", pixels(60, 2))
    other = save_judge(tmp_path / "other.pt", 1)
    judged = tmp_path / "ref.npz"
    eval_reference(str(image_folder), judged, Ruler(judge_path), resolution=16, device="cpu")
    for path, extractor in ((inception, judge_path), (judged, other)):
        with pytest.raises(DataError, match=extractor.name.replace(".", r"\.")) as refused:
            eval_images("fid", "digits:heldout", str(path), Ruler(extractor), device="cpu")
        assert "eval reference" in refused.value.hint


# ---- eval reference ------------------------------------------------------------------------------------------------


def test_a_reference_gives_the_scores_of_its_images(
    image_folder: Path, judge_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ref, judged = tmp_path / "ref.npz", ["--extractor", judge_path]
    made = answer(capsys, "reference", image_folder, ref, "--resolution", 16, *judged)
    assert (made["count"], made["features"], made["resolution"]) == (36, 36, 16)
    by_file, by_images = (
        answer(capsys, "all", "digits:heldout", "--ref", path, "--resolution", 16, *judged)
        for path in (ref, image_folder)
    )
    assert by_file == by_images
    assert made["sha256"] == by_images["reference"]["sha256"]
    whole = np.stack([open_source(str(image_folder)).pixels(index, 16) for index in range(36)])
    with np.load(ref, allow_pickle=False) as content:
        record = json.loads(str(content["rdpm_reference"]))
        assert {"mu", "sigma", "features"} <= set(content.files), "pytorch-fid reads it too"
        assert content["features"].dtype == np.float32
        expected = features.collect(features.open_extractor(judge_path, None, CPU), [whole]).features_ND
        assert np.allclose(content["features"], expected)
    assert record["extractor"]["sha256"] == checkpoint.load(judge_path)["digest"]
    assert (record["name"], record["transform"]) == (str(image_folder.resolve()), TRANSFORM)


def test_references_that_cannot_be_made_or_used_are_refused(
    image_folder: Path, judge_path: Path, tmp_path: Path
) -> None:
    np.savez(tmp_path / "one.npz", pixels(1))
    with pytest.raises(DataError, match="not 1"):
        eval_reference(str(tmp_path / "one.npz"), tmp_path / "ref.npz", Ruler(judge_path), device="cpu")
    assert not (tmp_path / "ref.npz").exists()
    small = tmp_path / "small.npz"
    eval_reference(str(image_folder), small, Ruler(judge_path), resolution=8, device="cpu")
    np.savez(tmp_path / "images.npz", pixels(40)[:, :12, :12])
    for path, side in ((small, 8), (tmp_path / "images.npz", 12)):
        with pytest.raises(DataError, match=f"{side}×{side}"):
            eval_images("fid", "digits:heldout", str(path), Ruler(judge_path), device="cpu")


@pytest.mark.parametrize("piece", [7, 256])
def test_measured_and_saved_statistics_are_those_of_all_features(
    piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "PIECE", piece)
    images, rows = image_set(pixels(60, 2)), range(0, 60, 3)
    measured, whole = measure(Blocks(), images, True, rows), features.collect_shared(Blocks(), images, spatial=True)
    assert measured is not None
    assert whole is not None
    reference.save_statistics(tmp_path / "ref.npz", measured, {"name": "images", "resolution": 16}, Blocks())
    loaded = opened(tmp_path / "ref.npz").load(Blocks())
    assert (loaded.count, loaded.sha256, loaded.absent) == (60, whole.sha256, {})
    assert whole.spatial_NP is not None
    for side, expected_ND in ((loaded.pool, whole.features_ND), (loaded.spatial, whole.spatial_NP)):
        assert side is not None
        assert np.allclose(side.mean_D, statistics(expected_ND).mean_D, rtol=1e-12)
        assert np.allclose(side.covariance_DD, statistics(expected_ND).covariance_DD, rtol=1e-9, atol=1e-15)
    assert loaded.features_ND is not None
    assert np.array_equal(loaded.features_ND, whole.features_ND[rows])

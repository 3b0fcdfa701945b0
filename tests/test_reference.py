"""Targets and references: sample folders and the reference they record, .npz files of images and of statistics."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from extractors import Blocks, Images, answer, image_set, pixels, save_judge
from numpy.typing import NDArray
from PIL import Image

from rdpm_cli import checkpoint, files
from rdpm_cli.data.folder import ImageSet, open_samples
from rdpm_cli.data.open import open_source
from rdpm_cli.data.pixels import TRANSFORM, chw
from rdpm_cli.engine import score as engine
from rdpm_cli.engine.score import eval_images, eval_reference
from rdpm_cli.errors import DataError
from rdpm_cli.evaluation import features
from rdpm_cli.evaluation.metrics import statistics
from rdpm_cli.evaluation.reference import (
    Reference,
    load_statistics,
    measure,
    open_recorded,
    open_reference,
    save_statistics,
)
from rdpm_cli.evaluation.score import score


@pytest.fixture(scope="module")
def judge_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_judge(tmp_path_factory.mktemp("judge") / "judge.pt")


def all_of(images: ImageSet) -> Images:
    return np.concatenate(list(images.read([range(0, 7), range(7, images.count)])))


@pytest.fixture
def samples(tmp_path: Path, image_folder: Path) -> Path:
    """A folder as `rdpm sample` writes it, whose record names `image_folder`; and a file that is no sample."""
    source = open_source(str(image_folder))
    folder = tmp_path / "samples"
    folder.mkdir()
    rows = [{"file": f"{i:06d}.png", "index": i, "label": i % 3} for i in range(12)]
    for name, image in zip([*(row["file"] for row in rows), "stray.png"], pixels(13), strict=True):
        Image.fromarray(image).save(folder / str(name))
    reference = {"source": source.spec, "digest": source.digest(), "resolution": 16, "transform": TRANSFORM}
    record = {
        "resolution": 16, "class_names": ["a", "b", "c"], "options": {"cfg": 0.0, "seed": 0}, "reference": reference,
        "samples": rows,
    }  # fmt: skip
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
    named = answer(capsys, "fid", samples, "--ref", image_folder, *judged)
    assert (recorded["value"], recorded["reference"]) == (named["value"], named["reference"])
    assert recorded["reference"]["name"] == str(image_folder.resolve())
    assert (recorded["reference"]["count"], recorded["target"]["count"]) == (36, 12)
    assert recorded["options"] == {"cfg": 0.0, "seed": 0}
    assert 0 <= recorded["class_accuracy"] <= 1
    same = answer(capsys, "fid", samples, "--ref", samples, *judged)
    assert same["value"] == pytest.approx(0, abs=1e-4)
    assert same["target"] == same["reference"]


def test_images_that_the_store_left_out_are_not_in_the_reference(samples: Path, image_folder: Path) -> None:
    edit(samples, lambda record: record["reference"].update(left_out=[1, 35]))
    images = open_reference(None, open_samples(samples), Blocks())
    assert isinstance(images, ImageSet)
    indices, source = [i for i in range(36) if i not in (1, 35)], open_source(str(image_folder))
    assert (images.count, images.labels) == (34, [source.need_labels()[i] for i in indices])
    assert np.array_equal(all_of(images), np.stack([source.pixels(i, 16) for i in indices]))
    few = open_recorded(open_samples(samples).record["reference"], "samples", "", limit=3)
    assert np.array_equal(np.concatenate(list(few.read([range(3)]))), all_of(images)[[0, 11, 22]])


@pytest.mark.parametrize(
    ("damage", "token"),
    [
        (lambda folder: (folder / "000003.png").unlink(), "000003.png"),
        (lambda folder: edit(folder, lambda r: r["reference"].update(digest="0" * 64)), "changed"),
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
    with pytest.raises(DataError) as refused:
        eval_images("fid", str(samples), extractor=judge_path, device="cpu")
    assert token in f"{refused.value.message}; {refused.value.hint}"


def adm_file(path: Path, images: Images) -> Path:
    """As ADM's VIRTUAL_imagenet256_labeled.npz, by the stand-in of Inception."""
    values, _, spatial = Blocks()(chw(images))
    assert spatial is not None
    x, x_s = values.double().numpy(), spatial.double().numpy()
    sigma, sigma_s = np.cov(x, rowvar=False), np.cov(x_s, rowvar=False)
    np.savez(path, mu=x.mean(0), sigma=sigma, mu_s=x_s.mean(0), sigma_s=sigma_s, arr_0=images)
    return path


def scored(metric: str, target: ImageSet, compared: ImageSet | Reference) -> dict[str, Any]:
    (values,) = score(metric, Blocks(), [target], compared)
    return values


def test_an_adm_file_gives_the_scores_of_its_images_and_a_pytorch_fid_file_only_fid(tmp_path: Path) -> None:
    target, images, path = image_set(pixels(40, 1)), pixels(60, 2), tmp_path / "fid.npz"
    adm = adm_file(tmp_path / "adm.npz", images)
    by_file, by_images = (scored("all", target, x) for x in (load_statistics(adm, Blocks()), image_set(images)))
    for name in ("fid", "sfid", "inception_score", "precision", "recall", "kid"):
        assert by_file[name] == pytest.approx(by_images[name], rel=1e-6, abs=1e-9), name
    assert by_file["reference"] == {"name": str(adm), "count": None, "sha256": files.sha256_file(adm)}
    with np.load(adm) as content:
        np.savez(path, mu=content["mu"].astype(np.float32), sigma=content["sigma"])
    values = scored("all", target, load_statistics(path, Blocks()))
    assert values["fid"] == pytest.approx(by_images["fid"], rel=1e-5)
    of_features = {"precision", "recall", "density", "coverage", "kid", "mind", "cmmd"}
    assert set(values["not_computed"]) == {"sfid", "fd_infinity", *of_features}
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
        with_arrays(mu=np.array([Bomb()], dtype=object)),
        with_arrays(rdpm_reference=np.array("{}")),
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
    monkeypatch.setattr(engine, "open_extractor", lambda *_: extractor)
    write(tmp_path / "ref.npz")
    with pytest.raises(DataError, match=r"ref\.npz"):
        eval_images("fid", "digits:heldout", "ref.npz", device="cpu")
    assert extractor.extracted == 0
    assert not (tmp_path / "ran").exists()


def test_a_reference_that_has_nothing_for_the_score_is_refused_before_the_pass(tmp_path: Path) -> None:
    with_arrays()(tmp_path / "ref.npz")
    extractor = Blocks()
    for metric in ("sfid", "pr", "kid"):
        with pytest.raises(DataError, match=r"ref\.npz"):
            score(metric, extractor, [image_set(pixels(40))], load_statistics(tmp_path / "ref.npz", extractor))
    assert extractor.extracted == 0


def test_statistics_are_refused_for_another_extractor(tmp_path: Path, judge_path: Path, image_folder: Path) -> None:
    inception = adm_file(tmp_path / "adm.npz", pixels(60, 2))
    other = save_judge(tmp_path / "other.pt", 1)
    judged = tmp_path / "ref.npz"
    eval_reference(str(image_folder), judged, extractor=judge_path, resolution=16, device="cpu")
    for path, extractor in ((inception, judge_path), (judged, other)):
        with pytest.raises(DataError, match=extractor.name.replace(".", r"\.")) as refused:
            eval_images("fid", "digits:heldout", str(path), extractor=extractor, device="cpu")
        assert "eval reference" in refused.value.hint


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
    with np.load(ref, allow_pickle=False) as content:
        record = json.loads(str(content["rdpm_reference"]))
        assert {"mu", "sigma", "features"} <= set(content.files), "pytorch-fid reads it too"
    assert record["extractor"]["sha256"] == checkpoint.load(judge_path)["digest"]
    assert (record["name"], record["transform"]) == (str(image_folder.resolve()), TRANSFORM)


def test_references_that_cannot_be_made_or_used_are_refused(
    image_folder: Path, judge_path: Path, tmp_path: Path
) -> None:
    np.savez(tmp_path / "one.npz", pixels(1))
    with pytest.raises(DataError, match="not 1"):
        eval_reference(str(tmp_path / "one.npz"), tmp_path / "ref.npz", extractor=judge_path, device="cpu")
    assert not (tmp_path / "ref.npz").exists()
    with pytest.raises(DataError, match="8×8"):
        eval_reference(str(image_folder), tmp_path / "ref.npz", extractor=judge_path, resolution=8, device="cpu")
    np.savez(tmp_path / "images.npz", pixels(40)[:, :12, :12])
    with pytest.raises(DataError, match="12×12"):
        eval_images("fid", "digits:heldout", str(tmp_path / "images.npz"), extractor=judge_path, device="cpu")


@pytest.mark.parametrize("piece", [7, 256])
def test_measured_and_saved_statistics_are_those_of_all_features(
    piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "PIECE", piece)
    images, rows = image_set(pixels(60, 2)), range(0, 60, 3)
    measured, whole = measure(Blocks(), images, True, rows), features.collect_shared(Blocks(), images, spatial=True)
    assert measured is not None
    assert whole is not None
    save_statistics(tmp_path / "ref.npz", measured, {}, Blocks())
    loaded = load_statistics(tmp_path / "ref.npz", Blocks())
    assert (loaded.name, loaded.count, loaded.resolution, loaded.sha256) == ("images", 60, 16, whole.sha256)
    assert whole.spatial_NP is not None
    for side, expected_ND in ((loaded.pool, whole.features_ND), (loaded.spatial, whole.spatial_NP)):
        assert side is not None
        assert np.allclose(side.mean_D, statistics(expected_ND).mean_D, rtol=1e-12)
        assert np.allclose(side.covariance_DD, statistics(expected_ND).covariance_DD, rtol=1e-9, atol=1e-15)
    assert loaded.features_ND is not None
    assert np.array_equal(loaded.features_ND, whole.features_ND[rows])

"""References of statistics: ours, ADM's, pytorch-fid's; and the published numbers, where their files are."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from test_scores import Blocks, image_set, pixels

from rdpm_cli import engine, files, modelfile
from rdpm_cli.cli.app import run
from rdpm_cli.errors import CheckpointError, DataError, RunError
from rdpm_cli.evaluation import features, judge, metrics, passes, scores, statfile
from rdpm_cli.evaluation.judge import Judge
from rdpm_cli.images.sources import open_source
from rdpm_cli.images.tensors import chw
from rdpm_cli.images.transform import TRANSFORM

CPU = torch.device("cpu")


def make_judge(path: Path, seed: int) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = Judge(16, 8, 6, 3)
    modelfile.save(path, judge.pack(network, list("abc"), provenance={"heldout_accuracy": 0.25}))
    return path


@pytest.fixture(scope="module")
def judge_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_judge(tmp_path_factory.mktemp("judge") / "judge.pt", 0)


def statistics_of(found: NDArray[np.floating]) -> tuple[NDArray[Any], NDArray[Any]]:
    return found.astype(np.float64).mean(0), np.cov(found.astype(np.float64), rowvar=False)


def adm_file(path: Path, images: NDArray[np.uint8]) -> Path:
    """As ADM's VIRTUAL_imagenet256_labeled.npz, by the stand-in of Inception."""
    seen = Blocks()(chw(images))
    assert seen.spatial_BS is not None
    mu, sigma = statistics_of(seen.features_BD.numpy())
    mu_s, sigma_s = statistics_of(seen.spatial_BS.numpy())
    np.savez(path, mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s, arr_0=images)
    return path


def opened(path: Path) -> statfile.StatFile:
    found = statfile.find(str(path))
    assert found is not None
    return found


# ---- others' files -------------------------------------------------------------------------------------------------


def test_an_adm_file_gives_what_its_images_give(tmp_path: Path) -> None:
    ours, theirs = pixels(40, 1), pixels(60, 2)
    path = adm_file(tmp_path / "adm.npz", theirs)
    by_file = scores.score("all", Blocks(), image_set(ours), opened(path))
    by_images = scores.score("all", Blocks(), image_set(ours), image_set(theirs))
    assert by_file is not None
    assert by_images is not None
    for name in ("fid", "sfid", "inception_score", "precision", "recall", "kid"):
        assert by_file[name] == pytest.approx(by_images[name], rel=1e-6, abs=1e-9), name
    assert by_file["reference"] == {"name": str(path), "count": None, "sha256": files.sha256_file(path)}


def test_a_pytorch_fid_file_has_a_mean_and_a_covariance_alone(tmp_path: Path) -> None:
    mu, sigma = statistics_of(Blocks()(chw(pixels(60, 2))).features_BD.numpy())
    np.savez(tmp_path / "fid.npz", mu=mu.astype(np.float32), sigma=sigma)
    values = scores.score("all", Blocks(), image_set(pixels(40, 1)), opened(tmp_path / "fid.npz"))
    wanted = scores.score("fid", Blocks(), image_set(pixels(40, 1)), image_set(pixels(60, 2)))
    assert values is not None
    assert wanted is not None
    assert values["fid"] == pytest.approx(wanted["value"], rel=1e-5)
    assert set(values["not_computed"]) == {"sfid", "precision", "recall", "kid"}
    assert "no mu_s" in values["not_computed"]["sfid"]
    assert "neither features nor images" in values["not_computed"]["kid"]
    assert values["precision"] is None


def test_statistics_of_inception_are_refused_for_any_other_extractor(tmp_path: Path, judge_path: Path) -> None:
    path = adm_file(tmp_path / "adm.npz", pixels(60, 2))
    with pytest.raises(DataError, match="the extractor in use is judge") as refused:
        engine.eval_fid("digits:heldout", str(path), extractor=judge_path, device="cpu")
    assert refused.value.exit_code == 3
    assert "eval reference" in refused.value.hint


class Bomb:
    def __init__(self, place: str) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.place,)


def spoiled(**arrays: NDArray[Any]) -> Callable[[Path], object]:
    whole: dict[str, NDArray[Any]] = {"mu": np.zeros(12), "sigma": np.eye(12), **arrays}
    return lambda path: np.savez(path, **whole)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("write", "text"),
    [
        (spoiled(sigma=np.eye(11)), "is damaged: mu is"),
        (spoiled(mu=np.zeros(5), sigma=np.eye(5)), "5 features a mean, and .* gives 12"),
        (spoiled(mu=np.full(12, np.nan)), "not finite"),
        (spoiled(sigma=np.array(["x"])), "no floating-point numbers"),
        (spoiled(mu=np.array([Bomb("ran")], dtype=object)), "cannot be read as an .npz"),
        (spoiled(rdpm_reference=np.array("{}")), "is damaged"),
        (spoiled(rdpm_reference=np.array("[")), "is damaged"),
        (lambda path: path.write_bytes(b"PK\x03\x04 half"), "cannot be read as an .npz"),
        (lambda path: np.savez(path, other=np.zeros(3)), "holds no images"),
    ],
)
def test_what_is_no_reference_is_refused_and_not_run(
    write: Callable[[Path], object], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    extractor = Blocks()
    monkeypatch.setattr(features, "make_extractor", lambda *_: extractor)
    write(tmp_path / "ref.npz")
    with pytest.raises(DataError, match=text) as refused:
        engine.eval_images("all", "digits:heldout", str(tmp_path / "ref.npz"), device="cpu")
    assert refused.value.exit_code == 3
    assert not (tmp_path / "ran").exists()
    assert extractor.seen == 0, "before any image is looked at"


@pytest.mark.parametrize(
    ("metric", "arrays", "text"),
    [
        ("sfid", {}, "has no mu_s and sigma_s"),
        ("sfid", {"mu_s": np.zeros(5), "sigma_s": np.eye(5)}, "5 spatial features a mean, and .* gives 16"),
        ("kid", {}, "neither features nor images"),
        ("pr", {}, "neither features nor images"),
        ("pr", {"arr_0": pixels(3)}, "more than 3 images, not 3"),
    ],
)
def test_a_reference_that_has_nothing_for_the_score_is_refused_before_the_pass(
    metric: str, arrays: dict[str, NDArray[Any]], text: str, tmp_path: Path
) -> None:
    spoiled(**arrays)(tmp_path / "ref.npz")
    extractor = Blocks()
    with pytest.raises(DataError, match=text) as refused:
        scores.score(metric, extractor, image_set(pixels(40)), opened(tmp_path / "ref.npz"))
    assert refused.value.hint
    assert extractor.seen == 0


def test_a_pickle_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "img512.pkl").write_bytes(pickle.dumps(Bomb("ran")))
    with pytest.raises(DataError, match="is a pickle, which may run code"):
        statfile.find("img512.pkl")
    assert not (tmp_path / "ran").exists()


# ---- ours ----------------------------------------------------------------------------------------------------------


def answer(capsys: pytest.CaptureFixture[str], *args: object) -> dict[str, Any]:
    assert run(["eval", *map(str, args), "--device", "cpu", "--quiet", "--json"]) == 0
    values: dict[str, Any] = json.loads(capsys.readouterr().out)
    return values


def test_our_file_gives_what_its_images_give(
    image_folder: Path, judge_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ref, judged = tmp_path / "ref.npz", ["--extractor", judge_path]
    made = answer(capsys, "reference", image_folder, ref, "--resolution", 16, *judged)
    assert (made["count"], made["features"], made["resolution"]) == (36, 36, 16)
    by_file, by_images = (
        answer(capsys, "all", "digits:heldout", "--ref", place, "--resolution", 16, *judged)
        for place in (ref, image_folder)
    )
    assert by_file == by_images
    assert made["sha256"] == by_images["reference"]["sha256"]
    with np.load(ref, allow_pickle=False) as content:
        record = json.loads(str(content["rdpm_reference"]))
        assert {"mu", "sigma", "features"} <= set(content.files), "pytorch-fid reads it too"
        assert content["features"].dtype == np.float32
        source = open_source(str(image_folder))
        whole = np.stack([source.pixels(index, 16) for index in range(36)])
        assert np.allclose(
            content["features"], features.collect(features.make_extractor(judge_path, None, CPU), [whole]).features_ND
        )
    assert record["extractor"]["sha256"] == modelfile.load(judge_path)["digest"]
    assert (record["name"], record["transform"]) == (str(image_folder.resolve()), TRANSFORM)


def test_one_image_makes_no_reference_and_is_not_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "one.npz", pixels(1))
    extractor = Blocks()
    monkeypatch.setattr(features, "make_extractor", lambda *_: extractor)
    with pytest.raises(DataError, match="at least 2 images, not 1"):
        engine.eval_reference(str(tmp_path / "one.npz"), tmp_path / "ref.npz", device="cpu")
    assert (extractor.seen, (tmp_path / "ref.npz").exists()) == (0, False)


def test_few_features_are_evenly_spaced(image_folder: Path, judge_path: Path, tmp_path: Path) -> None:
    ruler = engine.Ruler(judge_path)
    for name, count in (("whole", 100), ("few", 6)):
        engine.eval_reference(
            str(image_folder), tmp_path / f"{name}.npz", ruler, features=count, resolution=16, device="cpu"
        )
    with np.load(tmp_path / "whole.npz") as whole, np.load(tmp_path / "few.npz") as few:
        assert np.array_equal(few["features"], whole["features"][::6])
        assert np.array_equal(few["sigma"], whole["sigma"])


def test_a_reference_of_another_extractor_is_refused(image_folder: Path, judge_path: Path, tmp_path: Path) -> None:
    engine.eval_reference(
        str(image_folder), tmp_path / "ref.npz", engine.Ruler(judge_path), resolution=16, device="cpu"
    )
    other = make_judge(tmp_path / "other.pt", 1)
    with pytest.raises(
        DataError, match=r"was made with judge judge\.pt .* and the extractor in use is judge other\.pt"
    ):
        engine.eval_fid("digits:heldout", str(tmp_path / "ref.npz"), extractor=other, device="cpu")


def test_a_reference_of_another_size_is_refused(image_folder: Path, judge_path: Path, tmp_path: Path) -> None:
    small, ruler = tmp_path / "small.npz", engine.Ruler(judge_path)
    engine.eval_reference(str(image_folder), small, ruler, resolution=8, device="cpu")
    np.savez(tmp_path / "images.npz", pixels(40)[:, :12, :12])
    for reference, side in ((small, 8), (tmp_path / "images.npz", 12)):
        with pytest.raises(DataError, match=rf"is of images of {side}×{side}, digits:heldout of 16"):
            engine.eval_fid("digits:heldout", str(reference), extractor=judge_path, device="cpu")


def test_spatial_statistics_are_kept_where_there_are_any(tmp_path: Path) -> None:
    seen = passes.look(Blocks(), image_set(pixels(60, 2)), passes.Wanted(range(0, 60, 3), spatial=True))
    assert seen is not None
    statfile.save(tmp_path / "ref.npz", seen, {"name": "images", "resolution": 16}, Blocks())
    loaded = opened(tmp_path / "ref.npz")
    loaded.check(Blocks())
    found = loaded.load()
    assert found.spatial is not None
    spatial = Blocks()(chw(pixels(60, 2))).spatial_BS
    assert spatial is not None
    assert np.allclose(found.spatial.covariance_DD, metrics.statistics(spatial.numpy()).covariance_DD)
    assert (found.count, found.missing) == (60, {})
    assert found.features_ND is not None
    assert len(found.features_ND) == 20


# ---- fetching weights ----------------------------------------------------------------------------------------------


@pytest.fixture
def published(random_inception: Path, no_weights: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Inception's weights at a local address, under a name that has their sha256."""
    name = f"weights-inception-2015-12-05-{files.sha256_file(random_inception)[:8]}.pth"
    from rdpm_cli.weights import Published

    monkeypatch.setattr(features, "INCEPTION", Published(name, random_inception.as_uri()))
    return no_weights / "weights" / name


def test_weights_are_fetched_only_when_asked_and_then_found(published: Path) -> None:
    with pytest.raises(CheckpointError, match="are not here") as refused:
        features.make_extractor(None, None, CPU)
    assert "--download" in refused.value.hint
    extractor = features.make_extractor(None, None, CPU, download=True)
    assert extractor.name == "inception-2015-12-05"
    assert list(published.parent.iterdir()) == [published]
    assert features.make_extractor(None, None, CPU).sha256 == files.sha256_file(published)


def test_other_bytes_are_not_kept(published: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from rdpm_cli.weights import Published

    (tmp_path / "page.html").write_text("sign in first")
    monkeypatch.setattr(features, "INCEPTION", Published(published.name, (tmp_path / "page.html").as_uri()))
    with pytest.raises(CheckpointError, match="sha256 begins with"):
        features.make_extractor(None, None, CPU, download=True)
    monkeypatch.setattr(features, "INCEPTION", Published(published.name, (tmp_path / "nothing").as_uri()))
    with pytest.raises(RunError, match="cannot be fetched") as refused:
        features.make_extractor(None, None, CPU, download=True)
    assert str(published.parent) in refused.value.hint
    assert list(published.parent.iterdir()) == []


# ---- the published numbers -----------------------------------------------------------------------------------------

GOLDEN = {  # guided-diffusion, evaluations/README.md: value, tolerance
    "inception_score": (215.8370, 1.08),
    "fid": (3.942557, 0.01),
    "sfid": (6.140434, 0.02),
    "precision": (0.8265, 0.003),
    "recall": (0.5309, 0.004),
}
SAMPLES, REFERENCE = "admnet_guided_upsampled_imagenet256.npz", "VIRTUAL_imagenet256_labeled.npz"


def test_adms_samples_have_adms_scores() -> None:
    folder = Path(os.environ.get("RDPM_GOLDEN", "."))
    needed = [SAMPLES, REFERENCE, features.INCEPTION.file]
    if absent := [name for name in needed if not (folder / name).is_file()]:
        pytest.skip(f"not in the folder $RDPM_GOLDEN: {', '.join(absent)}")
    ruler = engine.Ruler(weights=folder / features.INCEPTION.file, cache=True)
    values = engine.eval_images("all", str(folder / SAMPLES), str(folder / REFERENCE), ruler).values
    for name, (value, tolerance) in GOLDEN.items():
        assert values[name] == pytest.approx(value, abs=tolerance), name

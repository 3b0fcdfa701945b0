"""Scores of reconstructions: what is computed with which weights, what is not and why, the spread over noise seeds."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from processes import ranks
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from rdpm_cli import engine, files, modelfile
from rdpm_cli.cli.app import run
from rdpm_cli.errors import DataError, UsageError
from rdpm_cli.evaluation import evaluate, features, judge, metrics, recon
from rdpm_cli.evaluation.reference import open_images
from rdpm_cli.images.sources import open_source
from rdpm_cli.images.tensors import chw, to_model
from rdpm_cli.threads import one_thread
from rdpm_cli.tokenizer import model, perceptual
from rdpm_cli.tokenizer.perceptual import Net

CPU = torch.device("cpu")
Images = NDArray[np.uint8]


@pytest.fixture(scope="module")
def judge_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained judge of 16×16 images, 6 features."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = judge.Judge(16, 8, 6, 3).eval()
    path = tmp_path_factory.mktemp("judge") / "judge.pt"
    modelfile.save(path, judge.pack(network, ["a", "b", "c"], provenance={"heldout_accuracy": 0.5}))
    return path


def pairs(folder: Path, tokenizer: Path, seed: int, limit: int | None = None) -> tuple[Images, Images]:
    """(originals, reconstructions) of a seed."""
    parts = list(evaluate.reconstructions(open_source(str(folder)), model.load(tokenizer)[0], seed, CPU, limit))
    return np.concatenate([part[1] for part in parts]), np.concatenate([part[2] for part in parts])


def latent_error(folder: Path, tokenizer_file: Path, seed: int) -> float:
    """Mean of (z' - z)² over images and latent, from the codes that are stored."""
    source, tokenizer = open_source(str(folder)), model.load(tokenizer_file)[0]
    x = to_model(chw(np.stack([source.pixels(index, 16) for index in range(len(source))])))
    eps = tokenizer.noise("eval", seed, range(len(source)), [0] * len(source))
    z = tokenizer.latents(x)
    return float((tokenizer.quantizer.decode(tokenizer.encode(x, eps)) - z).pow(2).mean())


# ---- running statistics --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [[], [1], [16, 32], [1, 2, 3, 39]])
def test_running_statistics_are_those_of_all_features_at_once(cuts: list[int]) -> None:
    random = np.random.default_rng(0)
    found = (random.normal(size=(40, 5)) @ random.normal(size=(5, 5)) + 1e4).astype(np.float32)
    running = metrics.RunningStatistics(5)
    for part in np.split(found, cuts):
        running.add(part)
    wanted, ours = metrics.statistics(found), running.statistics()
    assert ours.count == 40
    assert np.allclose(ours.mean_D, wanted.mean_D, rtol=1e-13)
    assert np.allclose(ours.covariance_DD, wanted.covariance_DD, rtol=1e-8, atol=1e-9)


def test_one_image_has_no_covariance() -> None:
    running = metrics.RunningStatistics(2)
    running.add(np.ones((1, 2)))
    with pytest.raises(DataError, match="at least 2 images, not 1"):
        running.statistics()


# ---- values --------------------------------------------------------------------------------------------------------


def test_lpips_is_the_mean_over_images_of_the_uint8_images(random_backbones: dict[Net, Path]) -> None:
    random = np.random.default_rng(0)
    a, b = (random.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8) for _ in range(2))
    networks = {net: perceptual.load(net, path, "", "", 32) for net, path in random_backbones.items()}
    scores = evaluate.ReconstructionScores(networks)
    for part in ([0, 1], [2]):
        scores.add(a[part], b[part])
    for net, network in networks.items():
        one_by_one = [
            float(network.network(chw(x[None]).float() / 127.5 - 1, chw(y[None]).float() / 127.5 - 1))
            for x, y in zip(a, b, strict=True)
        ]
        assert scores.means()[f"lpips_{net}"] == pytest.approx(np.mean(one_by_one), rel=1e-4)


def test_values_are_those_of_independent_computations(
    image_folder: Path, tiny_tokenizer_file: Path, judge_file: Path, random_backbones: dict[Net, Path]
) -> None:
    seeds, vgg = (3, 4, 5), random_backbones["vgg"]
    values = engine.eval_recon(
        str(image_folder), tiny_tokenizer_file, seed=3, seeds=3, extractor=judge_file, lpips_vgg=vgg, device="cpu"
    ).values
    both = [pairs(image_folder, tiny_tokenizer_file, seed) for seed in seeds]
    unit = [[chw(side).double() / 255 for side in pair] for pair in both]
    network = perceptual.load("vgg", vgg, "", "", 16)
    per_seed: dict[str, list[float]] = {
        "psnr": [
            float(np.mean([float(peak_signal_noise_ratio(y, x, data_range=1.0)) for x, y in zip(a, b, strict=True)]))
            for a, b in unit
        ],
        "ssim": [float(torch.as_tensor(structural_similarity_index_measure(b, a, data_range=1.0))) for a, b in unit],
        "mse": [float((4 * (a - b) ** 2).mean()) for a, b in unit],
        "latent_mse": [latent_error(image_folder, tiny_tokenizer_file, seed) for seed in seeds],
        "lpips_vgg": [float(network(*(to_model(chw(side)) for side in pair)).mean()) for pair in both],
    }
    for name, found in per_seed.items():
        assert values[name] == pytest.approx(np.mean(found), rel=1e-4), name
        assert values["spread_over_seeds"][name] == pytest.approx(np.std(found), rel=0.02), name
    extractor = features.make_extractor(judge_file, None, CPU)
    ours, theirs = (features.collect(extractor, [side]).features_ND for side in (both[0][1], both[0][0]))
    wanted = metrics.frechet_distance(metrics.statistics(ours), metrics.statistics(theirs))
    assert values["frechet_distance"] == pytest.approx(wanted, rel=1e-6)
    assert "frechet_distance" not in values["spread_over_seeds"]
    assert "frechet_distance is of seed 3 alone" in values["notes"]


def test_results_say_what_they_were_computed_with(
    image_folder: Path, tiny_tokenizer_file: Path, judge_file: Path, random_backbones: dict[Net, Path]
) -> None:
    values = engine.eval_recon(
        str(image_folder),
        tiny_tokenizer_file,
        seed=1,
        seeds=2,
        extractor=judge_file,
        lpips_vgg=random_backbones["vgg"],
        device="cpu",
    ).values
    assert (values["n"], values["seed"], values["seeds"]) == (36, 1, [1, 2])
    digest = modelfile.load(judge_file)["digest"]
    assert values["extractor"] == {"name": "judge judge.pt", "sha256": digest, "heldout_accuracy": 0.5}
    vgg = files.sha256_file(random_backbones["vgg"])
    assert values["lpips"] == {"vgg": {"name": "lpips 0.1.4 vgg", "sha256": vgg}}
    assert any("not the published ones" in note for note in values["notes"])
    reference = features.collect(
        features.make_extractor(judge_file, None, CPU), open_images(open_source(str(image_folder)), 16).batches
    )
    assert values["reference"] == {"name": str(image_folder.resolve()), "count": 36, "sha256": reference.sha256}
    assert {"rdpm", "torch", "lpips", "torch-fidelity", "torchmetrics"} <= set(values["versions"])


def test_weights_that_are_not_the_published_inceptions_give_no_rfid(
    image_folder: Path, tiny_tokenizer_file: Path, random_inception: Path
) -> None:
    with one_thread():
        values = engine.eval_recon(
            str(image_folder), tiny_tokenizer_file, seeds=1, limit=3, weights=random_inception, device="cpu"
        ).values
    assert values["frechet_distance"] > 0
    assert "rfid" not in values
    assert values["extractor"]["sha256"] == files.sha256_file(random_inception)
    assert any("not the published ones" in note for note in values["notes"])
    assert any("no full rank" in note for note in values["notes"])


def test_the_published_inceptions_distance_is_called_rfid(judge_file: Path) -> None:
    extractor = features.make_extractor(judge_file, None, CPU)
    extractor.name = "inception-2015-12-05"
    distance = recon.RunningFrechet(extractor)
    random = np.random.default_rng(0)
    a, b = (random.integers(0, 256, (8, 16, 16, 3), dtype=np.uint8) for _ in range(2))
    distance.add(a, b)
    assert distance.result()[0] == "rfid"
    same = recon.RunningFrechet(extractor)
    same.add(a, a)
    assert same.result()[1] == pytest.approx(0, abs=1e-9)


# ---- what is absent ------------------------------------------------------------------------------------------------


def answer(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[dict[str, Any], dict[str, str]]:
    """`eval recon` as JSON, and the rows of its table."""
    command = ["eval", "recon", *map(str, args), "--quiet"]
    assert run([*command, "--json"]) == 0
    values: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert run(command) == 0
    rows = [line.strip().partition(" ") for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    return values, {name: text.strip() for name, _, text in rows}


def test_without_weights_the_table_and_the_json_say_what_is_missing(
    image_folder: Path, tiny_tokenizer_file: Path, no_weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values, rows = answer(capsys, image_folder, "--tokenizer", tiny_tokenizer_file, "--limit", 4)
    reasons = values["not_computed"]
    assert set(reasons) == {"rfid", "lpips_alex", "lpips_vgg"}
    for name, reason in reasons.items():
        assert values[name] is None
        assert name not in values["spread_over_seeds"]
        assert rows[name] == f"not computed, {reason}"
    for name, file in {"rfid": features.INCEPTION.file, "lpips_vgg": "vgg16-397923af.pth"}.items():
        assert reasons[name].startswith(f"weights absent: {file} ")
        assert str(no_weights / "weights" / file) in reasons[name]
    assert reasons["lpips_alex"] == "LPIPS (alex) needs images of at least 31 pixels a side, not 16"
    assert values["psnr"] > 0
    assert values["seeds"] == [0, 1, 2, 3]
    assert values["spread_over_seeds"]["psnr"] > 0


def test_with_weights_nothing_is_missing_that_fits(
    image_folder: Path,
    tiny_tokenizer_file: Path,
    judge_file: Path,
    random_backbones: dict[Net, Path],
    no_weights: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = ["--extractor", judge_file, "--lpips-vgg", random_backbones["vgg"], "--limit", 4, "--seeds", 2]
    values, rows = answer(capsys, image_folder, "--tokenizer", tiny_tokenizer_file, *args)
    assert set(values["not_computed"]) == {"lpips_alex"}
    for name in ("frechet_distance", "psnr", "ssim", "mse", "lpips_vgg"):
        assert float(rows[name]) == pytest.approx(values[name], rel=1e-3)
    assert float(rows["spread_over_seeds.lpips_vgg"]) > 0
    assert rows["lpips.vgg.name"] == "lpips 0.1.4 vgg"


@pytest.mark.parametrize("option", ["--extractor", "--weights", "--lpips-vgg"])
def test_what_is_asked_for_by_name_and_absent_is_an_error(
    option: str,
    image_folder: Path,
    tiny_tokenizer_file: Path,
    no_weights: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["eval", "recon", str(image_folder), "--tokenizer", str(tiny_tokenizer_file), "--limit", "4"]
    assert run([*command, option, str(no_weights / "mine.pt")]) == 3
    shown = capsys.readouterr()
    assert not shown.out
    assert "mine.pt" in shown.err
    assert len(shown.err.splitlines()) == 2


def test_a_spoiled_file_is_an_error_not_a_missing_score(no_weights: Path) -> None:
    (no_weights / "weights" / features.INCEPTION.file).write_bytes(b"half a download")
    with pytest.raises(DataError, match="damaged or another file"):
        recon.find_rulers(4, 16, CPU)


def test_images_too_small_for_the_network_asked_for_are_a_usage_error(random_backbones: dict[Net, Path]) -> None:
    with pytest.raises(UsageError, match="at least 31 pixels a side, not 16") as caught:
        recon.find_rulers(4, 16, CPU, lpips={"alex": random_backbones["alex"]})
    assert "--lpips-alex" in caught.value.hint


def test_two_extractors_are_one_too_many(judge_file: Path, random_inception: Path) -> None:
    with pytest.raises(UsageError, match="two extractors"):
        recon.find_rulers(4, 16, CPU, extractor=judge_file, weights=random_inception)


def test_one_image_has_scores_but_no_distance(judge_file: Path, no_weights: Path) -> None:
    assert recon.find_rulers(1, 16, CPU).missing["rfid"] == "a Fréchet distance needs at least 2 images, not 1"
    with pytest.raises(DataError, match="at least 2 images, not 1"):
        recon.find_rulers(1, 16, CPU, extractor=judge_file)


# ---- several processes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [None, 10], ids=["all", "fewer images than a batch"])
def test_two_processes_score_as_one(
    limit: int | None,
    image_folder: Path,
    tiny_tokenizer_file: Path,
    judge_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = ["eval", "recon", str(image_folder), "--tokenizer", str(tiny_tokenizer_file), "--seeds", "2"]
    args += ["--extractor", str(judge_file), *([] if limit is None else ["--limit", str(limit)])]
    args += ["--device", "cpu", "--quiet", "--json"]
    both = ranks(args, tmp_path / "both.json")
    with one_thread():
        assert run(args) == 0
    alone = json.loads(capsys.readouterr().out)
    assert both.keys() == alone.keys()
    for name, value in alone.items():
        if isinstance(value, float):
            assert both[name] == pytest.approx(value, rel=1e-6, abs=1e-9), name
        elif name != "spread_over_seeds":
            assert both[name] == value, name
    assert both["spread_over_seeds"] == pytest.approx(alone["spread_over_seeds"], rel=1e-4, abs=1e-9)

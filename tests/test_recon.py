"""Scores of reconstructions: each against an independent computation, absent weights, the spread over noise seeds."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from extractors import CPU, Images, pixels, save_judge
from helpers import leaves
from processes import ranks
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from rdpm_cli import checkpoint, files
from rdpm_cli.cli.app import run
from rdpm_cli.data.open import open_source
from rdpm_cli.data.pixels import chw, hwc, to_model, to_pixels
from rdpm_cli.device import one_thread
from rdpm_cli.engine.score import Ruler, eval_recon
from rdpm_cli.errors import DataError, UsageError
from rdpm_cli.evaluation import metrics, recon
from rdpm_cli.evaluation.features import INCEPTION, collect, open_extractor
from rdpm_cli.evaluation.recon import open_networks, reconstructions
from rdpm_cli.evaluation.reference import open_images
from rdpm_cli.tokenizer import model
from rdpm_cli.tokenizer.losses import Net, load_perceptual


@pytest.fixture(scope="module")
def judge_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_judge(tmp_path_factory.mktemp("judge") / "judge.pt")


def pairs(folder: Path, tokenizer: Path, seed: int, limit: int | None = None) -> tuple[list[int], Images, Images]:
    """(indices, originals, reconstructions) of a seed."""
    batches = list(reconstructions(open_source(str(folder)), model.load(tokenizer)[0], seed, CPU, limit))
    originals, recons = (np.concatenate([batch[side] for batch in batches]) for side in (1, 2))
    return [index for indices, _, _ in batches for index in indices], originals, recons


def latent_error(folder: Path, tokenizer_file: Path, seed: int) -> float:
    """Mean of (z' - z)² over images and latent, from the codes."""
    source, tokenizer = open_source(str(folder)), model.load(tokenizer_file)[0]
    x = to_model(chw(np.stack([source.pixels(index, 16) for index in range(len(source))])))
    eps = tokenizer.noise("eval", seed, range(len(source)), [0] * len(source))
    z = tokenizer.latents(x)
    return float((tokenizer.quantizer.decode(tokenizer.encode(x, eps)) - z).pow(2).mean())


# ---- values --------------------------------------------------------------------------------------------------------


def test_reconstructions_depend_on_seed_and_index_not_on_the_limit(
    image_folder: Path, tiny_tokenizer_file: Path
) -> None:
    source, tokenizer = open_source(str(image_folder)), model.load(tiny_tokenizer_file)[0]
    indices, originals, recons = pairs(image_folder, tiny_tokenizer_file, 0)
    assert indices == list(range(36))
    assert np.array_equal(originals, np.stack([source.pixels(i, 16) for i in range(36)]))
    few_indices, _, few = pairs(image_folder, tiny_tokenizer_file, 0, limit=5)
    assert few_indices == [0, 7, 14, 21, 28]
    assert np.array_equal(few, recons[few_indices])
    assert (pairs(image_folder, tiny_tokenizer_file, 1)[2] != recons).any(axis=(1, 2, 3)).all()
    x, eps = to_model(chw(originals[20:21])), tokenizer.noise("eval", 0, [20], [0])
    by_codes = hwc(to_pixels(tokenizer.decode(tokenizer.encode(x, eps))))[0].astype(int)
    assert np.abs(by_codes - recons[20]).max() <= 1


def test_scores_are_means_over_images_not_batches() -> None:
    a, b = pixels(5, 1), pixels(5, 2)
    whole = recon.means([recon.pair_scores(a, b)])
    for cuts in ([1], [2, 3]):
        batches = zip(np.split(a, cuts), np.split(b, cuts), strict=True)
        parts = [recon.pair_scores(originals, recons) for originals, recons in batches]
        assert recon.means(parts) == pytest.approx(whole, rel=1e-6)
    assert whole["mse"] == pytest.approx(((a.astype(np.float64) - b) ** 2).mean() / 127.5**2)


def test_a_perfect_reconstruction_has_finite_scores() -> None:
    scores = recon.means([recon.pair_scores(pixels(2), pixels(2))])
    assert (scores["mse"], scores["psnr"]) == (0, recon.EXACT_PSNR)
    assert scores["ssim"] == pytest.approx(1)


def test_lpips_is_the_mean_over_images_of_the_uint8_images(random_backbones: dict[Net, Path]) -> None:
    a, b = pixels(3, 1, 32), pixels(3, 2, 32)
    networks = {net: load_perceptual(net, path, "", "", 32) for net, path in random_backbones.items()}
    scores = recon.means([recon.pair_scores(a[rows], b[rows], networks) for rows in ([0, 1], [2])])
    for net, network in networks.items():
        one_by_one = [
            float(network.network(chw(x[None]).float() / 127.5 - 1, chw(y[None]).float() / 127.5 - 1))
            for x, y in zip(a, b, strict=True)
        ]
        assert scores[f"lpips_{net}"] == pytest.approx(np.mean(one_by_one), rel=1e-4)


def test_values_are_those_of_independent_computations(
    image_folder: Path, tiny_tokenizer_file: Path, judge_path: Path, random_backbones: dict[Net, Path]
) -> None:
    seeds, vgg, folder = (3, 4, 5), random_backbones["vgg"], str(image_folder)
    values = eval_recon(
        folder, tiny_tokenizer_file, seed=3, seeds=3, ruler=Ruler(judge_path), lpips={"vgg": vgg}, device="cpu"
    ).values
    both = [pairs(image_folder, tiny_tokenizer_file, seed)[1:] for seed in seeds]
    unit = [[chw(side).double() / 255 for side in pair] for pair in both]
    network = load_perceptual("vgg", vgg, "", "", 16)
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
    for name, each in per_seed.items():
        assert values[name] == pytest.approx(np.mean(each), rel=1e-4), name
        assert values["spread_over_seeds"][name] == pytest.approx(np.std(each), rel=0.02), name
    extractor = open_extractor(judge_path, None, CPU)
    real, recons = (metrics.statistics(collect(extractor, [side]).features_ND) for side in both[0])
    assert values["frechet_distance"] == pytest.approx(metrics.frechet_distance(recons, real), rel=1e-6)
    assert "frechet_distance" not in values["spread_over_seeds"]
    assert (values["n"], values["seed"], values["seeds"]) == (36, 3, [3, 4, 5])
    sha256 = checkpoint.load(judge_path)["digest"]
    assert values["extractor"] == {"name": "judge judge.pt", "sha256": sha256, "heldout_accuracy": 0.25}
    assert values["lpips"] == {"vgg": {"name": "lpips 0.1.4 vgg", "sha256": files.sha256_file(vgg)}}
    assert any(str(vgg) in note for note in values["notes"]), "not the published weights"
    images = collect(extractor, open_images(open_source(folder), 16))
    assert values["reference"] == {"name": str(image_folder.resolve()), "count": 36, "sha256": images.sha256}
    assert values["tokenizer"] == checkpoint.load(tiny_tokenizer_file)["digest"]
    assert {"rdpm", "torch", "lpips", "torch-fidelity", "torchmetrics"} <= set(values["versions"])


def test_only_the_published_inceptions_distance_is_called_rfid(
    image_folder: Path, tiny_tokenizer_file: Path, random_inception: Path, judge_path: Path
) -> None:
    with one_thread():
        values = eval_recon(
            str(image_folder),
            tiny_tokenizer_file,
            seeds=1,
            limit=3,
            ruler=Ruler(weights=random_inception),
            device="cpu",
        ).values
    assert values["frechet_distance"] > 0
    assert "rfid" not in values
    assert values["spread_over_seeds"] is None
    assert any(str(random_inception) in note for note in values["notes"])
    assert any("2048 features" in note for note in values["notes"])
    networks = open_networks(36, 16, CPU, extractor=judge_path)
    assert networks.extractor is not None
    networks.extractor.name = "inception-2015-12-05"
    tokenizer = model.load(tiny_tokenizer_file)[0]
    record = recon.score(open_source(str(image_folder)), tokenizer, networks, range(1), CPU, None)
    assert record is not None
    assert record["rfid"] > 0


# ---- absent weights ------------------------------------------------------------------------------------------------


def answer(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[dict[str, Any], str]:
    """`eval recon` as JSON, and as a table."""
    command = ["eval", "recon", *map(str, args), "--quiet"]
    assert run([*command, "--json"]) == 0
    values: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert run(command) == 0
    return values, capsys.readouterr().out


def test_scores_without_weights_are_left_out_and_name_the_file(
    image_folder: Path, tiny_tokenizer_file: Path, no_weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values, shown = answer(capsys, image_folder, "--tokenizer", tiny_tokenizer_file, "--limit", 4)
    reasons = values["not_computed"]
    assert set(reasons) == {"rfid", "lpips_alex", "lpips_vgg"}
    for name, reason in reasons.items():
        assert values[name] is None
        assert name not in values["spread_over_seeds"]
        assert name in shown
        assert reason in shown
    for name, file in {"rfid": INCEPTION.file, "lpips_vgg": "vgg16-397923af.pth"}.items():
        assert str(no_weights / "weights" / file) in reasons[name]
    assert "31" in reasons["lpips_alex"], "the images are too small"
    assert values["psnr"] > 0
    assert values["seeds"] == [0, 1, 2, 3]
    assert values["spread_over_seeds"]["psnr"] > 0


@pytest.mark.parametrize("option", ["--extractor", "--weights", "--lpips-vgg"])
def test_a_named_file_that_is_absent_is_an_error(
    option: str, image_folder: Path, tiny_tokenizer_file: Path, no_weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["eval", "recon", str(image_folder), "--tokenizer", str(tiny_tokenizer_file), "--limit", "4"]
    assert run([*command, option, str(no_weights / "mine.pt")]) == 3
    shown = capsys.readouterr()
    assert not shown.out
    assert "mine.pt" in shown.err


def test_files_and_options_that_do_not_fit_are_errors(
    no_weights: Path, judge_path: Path, random_inception: Path, random_backbones: dict[Net, Path]
) -> None:
    with pytest.raises(UsageError, match="31"):
        open_networks(4, 16, CPU, lpips={"alex": random_backbones["alex"]})
    with pytest.raises(UsageError, match="--weights"):
        open_networks(4, 16, CPU, extractor=judge_path, weights=random_inception)
    assert "not 1" in open_networks(1, 16, CPU).absent["rfid"]
    with pytest.raises(DataError, match="not 1"):
        open_networks(1, 16, CPU, extractor=judge_path)
    (no_weights / "weights" / INCEPTION.file).write_bytes(b"half a download")
    with pytest.raises(DataError, match="6726825d"):
        open_networks(4, 16, CPU)


# ---- several processes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [None, 10], ids=["all", "fewer images than a batch"])
def test_two_processes_score_as_one(
    limit: int | None,
    image_folder: Path,
    tiny_tokenizer_file: Path,
    judge_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = ["eval", "recon", str(image_folder), "--tokenizer", str(tiny_tokenizer_file), "--seeds", "2"]
    args += ["--extractor", str(judge_path), *([] if limit is None else ["--limit", str(limit)])]
    args += ["--device", "cpu", "--quiet", "--json"]
    both = leaves(ranks(args, tmp_path / "both.json"))
    with one_thread():
        assert run(args) == 0
    single = leaves(json.loads(capsys.readouterr().out))
    assert both.keys() == single.keys()
    for name, value in single.items():
        assert both[name] == (pytest.approx(value, rel=1e-6, abs=1e-9) if isinstance(value, float) else value), name

"""Scores of reconstructions: each against an independent computation, absent weights, the spread over noise seeds."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from extractors import CPU, Images, answer, assert_close, pixels, save_judge
from numpy.typing import NDArray
from processes import ranks

from rdpm_cli import checkpoint, files
from rdpm_cli.cli.app import run
from rdpm_cli.data.open import open_source
from rdpm_cli.data.pixels import chw, hwc, to_model, to_pixels
from rdpm_cli.data.source import spread
from rdpm_cli.distributed import one_thread
from rdpm_cli.engine.recon import eval_recon
from rdpm_cli.errors import DataError, UsageError
from rdpm_cli.evaluation import metrics, recon
from rdpm_cli.evaluation.backbones import open_extractor
from rdpm_cli.evaluation.features import INCEPTION, PUBLISHED, collect
from rdpm_cli.evaluation.recon import Perturb, open_networks, pair_scores, reconstructions
from rdpm_cli.evaluation.reference import open_images
from rdpm_cli.tokenizer import model
from rdpm_cli.tokenizer.losses import Net, load_perceptual


@pytest.fixture(scope="module")
def judge_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_judge(tmp_path_factory.mktemp("judge") / "judge.pt")


def pairs(folder: Path, tokenizer: Path, seed: int, limit: int | None = None) -> tuple[list[int], Images, Images]:
    """(indices, originals, reconstructions) of a seed."""
    source = open_source(str(folder))
    batches = reconstructions(source, model.load(tokenizer)[0], [seed], CPU, spread(len(source), limit))
    indices, originals, recons = zip(*((rows, x, by_seed[0][0]) for rows, x, by_seed in batches), strict=True)
    return [i for rows in indices for i in rows], np.concatenate(originals), np.concatenate(recons)


def latent_error(folder: Path, tokenizer_file: Path, seed: int) -> float:
    """Mean of (z' - z)² over images and latent, from the codes."""
    source, tokenizer = open_source(str(folder)), model.load(tokenizer_file)[0]
    x = to_model(chw(np.stack([source.pixels(index, 16) for index in range(len(source))])))
    eps = tokenizer.noise("eval", seed, range(len(source)), [0] * len(source))
    return float((tokenizer.quantizer.decode(tokenizer.encode(x, eps)) - tokenizer.latents(x)).pow(2).mean())


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


def ssim_by_hand(a_HWC: Images, b_HWC: Images) -> float:
    """Wang et al. 2004 on each channel: Gaussian 11×11 window of sigma 1.5 wherever it fits, mean."""
    line = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2

    def blur(plane_HWC: NDArray[np.float64]) -> NDArray[np.float64]:
        views = np.lib.stride_tricks.sliding_window_view(
            plane_HWC, (11, 11), axis=(0, 1)
        )  # (H - 10, W - 10, C, 11, 11)
        return np.einsum("hwcij,ij->hwc", views, window)

    a, b = a_HWC / 255.0, b_HWC / 255.0
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    values = (2 * mean_a * mean_b + c1) * (2 * covariance + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return float(values.mean())


@pytest.mark.parametrize(("side", "noise"), [(11, 20), (16, 20), (37, 20), (16, 200)])
def test_scores_of_pairs_equal_their_formulas_whatever_the_batches(side: int, noise: float) -> None:
    a = pixels(3, 1, side)
    b = np.clip(a + np.random.default_rng(3).normal(0, noise, a.shape), 0, 255).astype(np.uint8)
    mse = ((a.astype(np.float64) - b) ** 2).mean((1, 2, 3))
    scores = pair_scores(a, b)
    assert np.allclose(scores["mse"], mse / 127.5**2, rtol=1e-12)
    assert np.allclose(scores["psnr"], 10 * np.log10(255**2 / mse), rtol=1e-6)
    assert np.allclose(scores["ssim"], [ssim_by_hand(x, y) for x, y in zip(a, b, strict=True)], atol=1e-4)
    parts = [pair_scores(a[rows], b[rows]) for rows in ([0], [1, 2])]
    assert recon.means(parts) == pytest.approx({name: each.mean() for name, each in scores.items()}, rel=1e-6)


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_perturbed_codes_are_near_ones_of_a_share_of_each_step(tiny_tokenizer_file: Path, share: float) -> None:
    tokenizer, _ = model.load(tiny_tokenizer_file)
    K, perturb = tokenizer.cfg.quantizer.codes, Perturb(share, tokenizer)
    codes = torch.from_numpy(np.random.default_rng(0).integers(0, K, (3, tokenizer.quantizer.steps, 16)))
    changed = perturb(codes, 5, [7, 2, 9])
    assert (changed != codes).float().mean().item() == pytest.approx(share, abs=0.1)  # of 192 codes
    for t in range(tokenizer.quantizer.steps):
        book = tokenizer.quantizer.book(t + 1).detach().numpy()
        for old, new in zip(codes[:, t].flatten().tolist(), changed[:, t].flatten().tolist(), strict=True):
            distances = np.linalg.norm(book - book[old], axis=1)
            assert (distances < distances[new]).sum() <= perturb.neighbours  # of them the code itself
    assert torch.equal(perturb(codes[1:2], 5, [2]), changed[1:2])
    assert not torch.equal(perturb(codes, 6, [7, 2, 9]), changed)


def test_perturbed_and_cut_reconstructions_are_scored_and_say_so(
    image_folder: Path, tiny_tokenizer_file: Path, judge_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["recon", image_folder, "--tokenizer", tiny_tokenizer_file, "--extractor", judge_path, "--seeds", 1]
    plain, perturbed, cut = (
        answer(capsys, *args, *more) for more in ([], ["--perturb", 0.5], ["--dtype-cut", "floor"])
    )
    assert perturbed["latent_mse"] > plain["latent_mse"]
    assert perturbed["continuous"] == plain["continuous"]
    assert perturbed["options"]["perturb"] == 0.5
    assert cut["latent_mse"] == plain["latent_mse"]
    assert cut["mse"] != plain["mse"]
    assert cut["options"]["dtype_cut"] == "floor"
    x = torch.tensor([[[[-1.5, -1, 0.9999, 1]]]])
    assert to_pixels(x, "floor").flatten().tolist() == [0, 0, 254, 255]


def test_a_perfect_reconstruction_has_finite_scores() -> None:
    scores = recon.means([pair_scores(pixels(2), pixels(2))])
    assert scores == pytest.approx({"mse": 0, "psnr": 100, "ssim": 1})


def test_values_are_those_of_independent_computations(
    image_folder: Path, tiny_tokenizer_file: Path, judge_path: Path, random_backbones: dict[Net, Path]
) -> None:
    seeds, vgg, folder = (3, 4, 5), random_backbones["vgg"], str(image_folder)
    values = eval_recon(
        folder, tiny_tokenizer_file, seed=3, seeds=3, extractor=judge_path, lpips={"vgg": vgg}, device="cpu"
    ).values
    both = [pairs(image_folder, tiny_tokenizer_file, seed)[1:] for seed in seeds]
    unit = [[chw(side).double() / 255 for side in pair] for pair in both]
    network = load_perceptual("vgg", vgg, "", "", 16)
    per_seed = {
        "psnr": [float((-10 * (a - b).square().mean((1, 2, 3)).log10()).mean()) for a, b in unit],
        "ssim": [float(np.mean([ssim_by_hand(x, y) for x, y in zip(*pair, strict=True)])) for pair in both],
        "mse": [float((4 * (a - b) ** 2).mean()) for a, b in unit],
        "latent_mse": [latent_error(image_folder, tiny_tokenizer_file, seed) for seed in seeds],
        "lpips_vgg": [float(network(*(to_model(chw(side)) for side in pair)).mean()) for pair in both],
    }
    for name, each in per_seed.items():
        assert values[name] == pytest.approx(np.mean(each), rel=1e-4, abs=1e-5), name
        assert values["spread_over_seeds"][name] == pytest.approx(np.std(each, ddof=1), rel=0.02), name
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


def test_continuous_scores_are_those_of_z_itself(
    image_folder: Path, tiny_tokenizer_file: Path, judge_path: Path
) -> None:
    values = eval_recon(str(image_folder), tiny_tokenizer_file, seeds=1, extractor=judge_path, device="cpu").values
    source, tokenizer = open_source(str(image_folder)), model.load(tiny_tokenizer_file)[0]
    originals = np.stack([source.pixels(index, 16) for index in range(len(source))])
    x = to_model(chw(originals))
    of_z = hwc(to_pixels(tokenizer.decode_latents(tokenizer.latents(x))))
    mse = (to_model(chw(of_z)) - x).square().mean((1, 2, 3))
    assert values["continuous"]["mse"] == pytest.approx(float(mse.mean()), rel=1e-4)
    assert values["continuous"]["psnr"] == pytest.approx(float((-10 * (mse / 4).log10()).mean()), rel=1e-4)
    extractor = open_extractor(judge_path, None, CPU)
    real, recons = (metrics.statistics(collect(extractor, [side]).features_ND) for side in (originals, of_z))
    distance = metrics.frechet_distance(recons, real)
    assert values["continuous"]["frechet_distance"] == pytest.approx(distance, rel=1e-3)
    assert values["continuous"].keys() == {"mse", "psnr", "ssim", "frechet_distance"}


def test_only_the_published_inceptions_distance_is_called_rfid(
    image_folder: Path, tiny_tokenizer_file: Path, random_inception: Path, judge_path: Path
) -> None:
    folder = str(image_folder)
    with one_thread():
        values = eval_recon(
            folder, tiny_tokenizer_file, seeds=1, limit=3, weights=random_inception, device="cpu"
        ).values
    assert values["frechet_distance"] > 0
    assert "rfid" not in values
    assert values["spread_over_seeds"] is None
    for text in (str(random_inception), "2048 features"):
        assert any(text in note for note in values["notes"]), text
    networks = open_networks(36, 16, CPU, {}, judge_path)
    assert networks.extractor is not None
    networks.extractor.name = PUBLISHED
    tokenizer = model.load(tiny_tokenizer_file)[0]
    record = recon.score(open_source(folder), tokenizer, networks, range(1), CPU, None)
    assert record is not None
    assert record["rfid"] > 0


def test_scores_without_weights_are_left_out_and_name_the_file(
    image_folder: Path, tiny_tokenizer_file: Path, no_weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["eval", "recon", str(image_folder), "--tokenizer", str(tiny_tokenizer_file), "--limit", "4", "--quiet"]
    assert run([*command, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    reasons = values["not_computed"]
    assert set(reasons) == {"rfid", "lpips_alex", "lpips_vgg"}
    for name in reasons:
        assert values[name] is None
        assert name not in values["spread_over_seeds"]
    for name, file in {"rfid": INCEPTION.file, "lpips_vgg": "vgg16-397923af.pth"}.items():
        assert str(no_weights / "weights" / file) in reasons[name]
    assert "31" in reasons["lpips_alex"], "the images are too small"
    assert values["seeds"] == [0, 1, 2, 3]
    assert values["spread_over_seeds"]["psnr"] > 0
    assert "not 1" in open_networks(1, 16, CPU, {}).absent["rfid"]


@pytest.mark.parametrize("option", ["--extractor", "--weights", "--lpips-vgg"])
def test_a_named_file_that_is_absent_is_an_error(
    option: str, image_folder: Path, tiny_tokenizer_file: Path, no_weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["eval", "recon", str(image_folder), "--tokenizer", str(tiny_tokenizer_file), "--limit", "4"]
    assert run([*command, option, str(no_weights / "mine.pt")]) == 3
    shown = capsys.readouterr()
    assert not shown.out
    assert "mine.pt" in shown.err


def test_files_that_do_not_fit_are_errors(no_weights: Path, random_backbones: dict[Net, Path]) -> None:
    with pytest.raises(UsageError, match="31"):
        open_networks(4, 16, CPU, {"alex": random_backbones["alex"]})
    (no_weights / "weights" / INCEPTION.file).write_bytes(b"half a download")
    with pytest.raises(DataError, match="6726825d"):
        open_networks(4, 16, CPU, {})


@pytest.mark.parametrize("limit", ["36", "10"], ids=["all", "fewer images than a batch"])
def test_two_processes_score_as_one(
    limit: str, image_folder: Path, tiny_tokenizer_file: Path, judge_path: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    args = [
        "eval",
        "recon",
        str(image_folder),
        "--tokenizer",
        str(tiny_tokenizer_file),
        "--seeds",
        "2",
        "--limit",
        limit,
    ]
    args += ["--extractor", str(judge_path), "--device", "cpu", "--quiet", "--json"]
    both = ranks(args, tmp_path / "both.json")
    with one_thread():
        assert run(args) == 0
    assert_close(both, json.loads(capsys.readouterr().out))

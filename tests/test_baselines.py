"""What codes can be predicted without a network, against scikit-learn and constructed latents; train-gen --heldout.

Legend: N rows, T steps, C code width, S positions."""

from pathlib import Path

import numpy as np
import pytest
import torch
from generators import CHANNELS, STEPS, make_quantizer
from helpers import assert_same, metrics, newest_state
from processes import generator_command
from sklearn.linear_model import Ridge
from stores import latent_store

from rdpm_cli.cli.app import run
from rdpm_cli.codes import heldout
from rdpm_cli.codes.store import CodeStore, Manifest
from rdpm_cli.data.open import open_source
from rdpm_cli.errors import DataError
from rdpm_cli.generator import baselines
from rdpm_cli.tokenizer.quantizer import Quantizer


@pytest.fixture
def quantizer() -> Quantizer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make_quantizer(grid=(2, 2))


def rows_of(store: CodeStore, quantizer: Quantizer, t: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """z'_{t-1} and z, (N, C, S) each, and labels of all rows."""
    rows = np.arange(len(store))
    codes = torch.from_numpy(store.codes(rows).astype(np.int64))
    previous = quantizer.prefix(codes, torch.full((len(rows),), t - 1))
    z = torch.from_numpy(store.latents(rows).astype(np.float32))
    return previous, z, torch.from_numpy(store.columns["labels"].astype(np.int64))


def test_the_linear_baseline_is_scikit_learn_s_ridge(
    quantizer: Quantizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = latent_store(tmp_path / "store", quantizer, CHANNELS)
    for features in (baselines.FEATURES, 0):  # all positions, or each one by itself
        monkeypatch.setattr(baselines, "FEATURES", features)
        fits = baselines.fit(store, np.arange(len(store)), quantizer)
        previous, z, labels = rows_of(store, quantizer, STEPS)
        predicted = fits[STEPS - 1].predict(previous, labels)
        for part in [slice(None)] if features else [slice(position, position + 1) for position in range(4)]:
            x, y = (value[..., part].flatten(1).double().numpy() for value in (previous, z))
            means_x, means_y = (np.stack([v[labels == k].mean(0) for k in range(3)])[labels] for v in (x, y))
            strength = baselines.RIDGE * np.square(x - means_x).sum(0).mean()
            ridge = Ridge(alpha=strength, fit_intercept=False).fit(x - means_x, y - means_y)
            expected = means_y + ridge.predict(x - means_x)
            np.testing.assert_allclose(predicted[..., part].flatten(1).numpy(), expected, rtol=0, atol=1e-4)


def test_at_the_first_step_it_is_the_class_mean(quantizer: Quantizer, tmp_path: Path) -> None:
    store = latent_store(tmp_path / "store", quantizer, CHANNELS)
    previous, z, labels = rows_of(store, quantizer, 1)
    predicted = baselines.fit(store, np.arange(len(store)), quantizer)[0].predict(previous, labels)
    for k in range(3):
        torch.testing.assert_close(predicted[labels == k][0], z[labels == k].mean(0), rtol=0, atol=1e-5)


def test_latents_that_are_linear_in_the_prefix_and_the_class_are_predicted_exactly(
    quantizer: Quantizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = latent_store(tmp_path / "store", quantizer, CHANNELS)
    previous, z, labels = rows_of(store, quantizer, 3)
    slopes = torch.randn(z[0].numel(), z[0].numel(), generator=torch.Generator().manual_seed(1))
    goal = (previous.flatten(1) @ slopes + labels.unsqueeze(1)).view_as(z)
    monkeypatch.setattr(CodeStore, "latents", lambda _, rows: goal.numpy()[rows])
    predicted = baselines.fit(store, np.arange(len(store)), quantizer)[2].predict(previous, labels)
    torch.testing.assert_close(predicted, goal, rtol=0, atol=2e-3)


def test_the_class_mean_beats_the_guess_where_classes_differ(
    quantizer: Quantizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = latent_store(tmp_path / "store", quantizer, CHANNELS)
    _, z, labels = rows_of(store, quantizer, 1)
    means = 3 * torch.randn(3, *z.shape[1:], generator=torch.Generator().manual_seed(1))
    z = means[labels] + 0.01 * z
    eps = torch.randn(len(z), STEPS, *z.shape[1:], generator=torch.Generator().manual_seed(2))
    codes = quantizer.encode(z, eps)
    monkeypatch.setattr(CodeStore, "latents", lambda _, rows: z.numpy()[rows])
    mean = baselines.fit(store, np.arange(len(store)), quantizer)[0]
    previous = quantizer.prefix(codes, torch.full((len(z),), STEPS - 1))
    hits = [
        (quantizer.guess(previous - known, eps[:, -1], STEPS) == codes[:, -1]).float().mean()
        for known in (torch.zeros_like(z), mean.predict(previous, labels))
    ]
    assert hits[0] < 0.2
    assert hits[1] > 0.8


@pytest.mark.parametrize("kind", ["sin", "rvq"])
def test_its_samples_are_the_nearest_codes_of_the_predicted_latents_under_the_noise(kind: str, tmp_path: Path) -> None:
    quantizer = make_quantizer(kind, grid=(2, 2), bias="none")
    store = latent_store(tmp_path / "store", quantizer, CHANNELS)  # of two views
    fits = baselines.fit(store, store.split()[0], quantizer)
    labels = torch.tensor([0, 1, 2, 0])
    eps = torch.randn(4, STEPS, CHANNELS, 4, generator=torch.Generator().manual_seed(3))
    codes = baselines.sample(fits, quantizer, labels, eps).numpy()
    book = quantizer.books[0].numpy()  # (K, C)
    previous = np.zeros((4, CHANNELS, 4), np.float32)
    for t, alpha in enumerate(quantizer.alphas):
        slopes, offsets = fits[t].slopes_GFF[0].numpy(), fits[t].offsets_KGF[:, 0].numpy()
        z = (previous.reshape(4, -1) @ slopes + offsets[labels]).reshape(previous.shape)
        v = alpha * (z - previous) + np.sqrt(1 - alpha**2) * eps[:, t].numpy()
        distances = np.square(v[:, None] - book[None, :, :, None]).sum(2)  # (B, K, S)
        assert np.array_equal(codes[:, t], distances.argmin(1))
        previous = previous + book[codes[:, t]].transpose(0, 2, 1)
    assert np.array_equal(codes[0], codes[3]) == (kind == "rvq")  # of one class


@pytest.mark.parametrize("images", ["{folder}", "digits:heldout"])  # too few; other classes
def test_held_out_images_that_cannot_be_measured_are_refused(
    digits_codes: Path, image_folder: Path, tmp_path: Path, images: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = images.format(folder=image_folder)
    for more in ([], ["--dry-run"]):
        assert run([*generator_command(digits_codes, tmp_path / "run"), "--heldout", spec, *more]) == 3
        assert spec in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_held_out_class_has_the_stores_number_and_one_that_stands_for_two_is_refused(
    digits_codes: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heldout, "LEAST", 36)
    manifest, (a, b, c) = Manifest.load(digits_codes), open_source(str(image_folder)).class_names
    labels = open_source(str(image_folder)).need_labels()
    other = manifest.model_copy(update={"class_names": (c, "more", a, b)})
    images = heldout.open_heldout(str(image_folder), other)
    assert images.labels == [{0: 2, 1: 3, 2: 0}[label] for label in labels]
    twice = manifest.model_copy(update={"class_names": (a, a, b, c)})
    with pytest.raises(DataError, match=a):
        heldout.open_heldout(str(image_folder), twice)


def test_held_out_images_only_observe_and_may_be_named_when_a_run_resumes(
    digits_codes: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heldout, "LEAST", 36)
    args = ["train.batch=16", "train.steps=4"]
    assert run(generator_command(digits_codes, tmp_path / "without", *args)) == 0
    command = [*generator_command(digits_codes, tmp_path / "with", *args), "--heldout", str(image_folder)]
    assert run(command) == 0
    assert_same(newest_state(tmp_path / "with"), newest_state(tmp_path / "without"))
    plain, last = metrics(tmp_path / "without")[-1], metrics(tmp_path / "with")[-1]
    for name in ("ce", "accuracy", "baseline", "class_mean", "linear", "gap", "norm"):
        assert last[f"heldout/{name}"] == plain[f"heldout/{name}"]
        assert f"heldout_images/{name}" in last
    # They are the store's own images under other noise, so the store's rows are about as easy.
    assert last["heldout_images/baseline"] == pytest.approx(last["heldout/baseline"], abs=0.15)
    gap = np.mean(last["heldout_images/accuracy"]) - np.mean(last["heldout_images/linear"])
    assert last["heldout_images/gap"] == pytest.approx(gap)
    (tmp_path / "without" / "generator.pt").unlink()
    resumed = [*generator_command(digits_codes, tmp_path / "without", *args), "--heldout", str(image_folder)]
    assert run(resumed) == 0

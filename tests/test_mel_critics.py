"""Critics of log-mel spectrograms, and the losses that they add to a tokenizer of sound.

Legend: B sounds, F frames, M bands, W windows."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import CPU, TINY, distance, tiny_players
from pydantic import ValidationError
from sounds import TINY_MEL, burst
from torch import Tensor

from rdpm_cli import checkpoint
from rdpm_cli.cli.app import run
from rdpm_cli.data.audio import write_wav
from rdpm_cli.data.mel import PRESETS
from rdpm_cli.distributed import TrainStep
from rdpm_cli.tokenizer.config import FEWEST_BANDS, TokenizerConfig
from rdpm_cli.tokenizer.mel_critics import MelCritics, window
from rdpm_cli.tokenizer.training import DiscriminatorTask, TokenizerTask


def config(**sections: dict[str, Any]) -> TokenizerConfig:
    plain: dict[str, Any] = {**TINY, "autoencoder": TINY_MEL, "quantizer": {"codes": 32, "steps": 2, "bias": "none"}}
    plain["discriminator"] = {"width": 8, "layers": 2, "windows": (16, 32), "resolutions": (1, 2)}
    return TokenizerConfig.model_validate({**plain, **{name: plain[name] | more for name, more in sections.items()}})


def pair(cfg: TokenizerConfig) -> tuple[TokenizerTask, MelCritics, DiscriminatorTask]:
    """The players, and their critics made less indifferent than at their start."""
    task, rival = tiny_players(cfg)
    assert isinstance(task, TokenizerTask)
    assert isinstance(rival, DiscriminatorTask)
    assert isinstance(task.critic, MelCritics)
    with torch.no_grad():
        for parameter in task.critic.parameters():
            parameter.mul_(3)
    return task, task.critic, rival


def mels(count: int = 32, frames: int = 32) -> Tensor:
    return torch.randn(count, 64, frames, generator=torch.Generator().manual_seed(1)) - 4


def step_of(rows: range = range(32), step: int = 0) -> TrainStep:
    return TrainStep(0, step, rows, 32, CPU)


def test_a_window_is_the_frames_from_its_place_on_and_its_gradient_theirs() -> None:
    x = mels(4, 40).requires_grad_()
    cut = window(x, torch.tensor([0.0, 0.5, 0.999, 1.0]), 16)
    for row, first in enumerate((0, 12, 24, 24)):  # of 25 places
        assert torch.equal(cut[row], x[row, :, first : first + 16])
    cut.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad[1, 0], torch.tensor([0.0] * 12 + [1.0] * 16 + [0.0] * 12))


def test_a_window_has_one_logit_and_a_resolution_has_one_a_patch() -> None:
    """Sides of 64 bands and 32 frames, and of half: two strided layers, then two that take one off each."""
    _, critic, _ = pair(config())
    judged = critic(mels(2), torch.full((2, 2), 0.5))
    assert [maps[-1].shape[1:] for maps in judged] == [(1, 1, 1), (1, 1, 1), (1, 14, 6), (1, 6, 2)]
    assert [len(maps) for maps in judged] == [4, 4, 4, 4]


def test_windows_lie_at_random_by_seed_and_step_and_not_by_micro_batch() -> None:
    def places(*parts: range, step: int = 0) -> Tensor:
        task, _, _ = pair(config(train={"batch": 32}))
        for rows in parts:
            task.loss(mels()[rows.start : rows.stop], step_of(rows, step))
        return torch.cat([place for _, _, place in task.pairs if place is not None])

    whole = places(range(32))
    assert torch.equal(places(range(16), range(16, 32)), whole)
    assert not torch.equal(places(range(32), step=1), whole)
    assert len(set(whole.flatten().tolist())) == 64
    assert 0 < float(whole.min()) < 0.2 < 0.8 < float(whole.max()) < 1


@pytest.mark.parametrize("kind", ["hinge", "least_squares"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_every_gradient_is_that_of_the_plain_sum(adaptive: bool, kind: str) -> None:
    """recon + 0.75 w (gan + 2 fm) + 0.25 quant with w detached, in one graph and one backward pass."""
    cfg = config(loss={"adaptive": adaptive, "adversarial": kind, "feature_matching": 2.0})
    task, critic, _ = pair(cfg)
    x = mels()
    loss, logs = task.loss(x, step_of())
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in task.model.named_parameters() if p.grad is not None}
    assert all(p.grad is None for p in critic.parameters())
    task.model.zero_grad()

    place = task.pairs[0][2]
    assert place is not None
    recon, chain = task.model(x, step_of().normal(2, *task.model.latent_shape_of(x)))
    real, fake = critic(x, place), critic(recon, place)
    terms = [(1 - maps[-1]).pow(2).mean() if kind == "least_squares" else -maps[-1].mean() for maps in fake]
    gan = sum(terms) / 4
    sides = [[layer for maps in judged for layer in maps[:3]] for judged in (real, fake)]
    fm = sum((a - b).abs().mean() for a, b in zip(*sides, strict=True)) / 12
    perceived, gan = (recon - x).abs().mean() + 0.5 * F.mse_loss(recon, x), gan + 2 * fm
    last = task.model.decoder.conv_out.weight
    norms = [torch.autograd.grad(term, last, retain_graph=True)[0].norm() for term in (perceived, gan)]
    weight = (norms[0] / (norms[1] + 1e-4)).detach() if adaptive else torch.tensor(1.0)
    total = perceived + 0.75 * weight * gan + 0.25 * chain.loss
    total.backward()
    assert float(loss.detach()) == pytest.approx(float(total.detach()), rel=1e-6)
    assert float(logs["feature_distance"]) == pytest.approx(float(fm.detach()), rel=1e-5)
    assert gradients.keys() == {name for name, _ in task.model.named_parameters()}
    for name, parameter in task.model.named_parameters():
        assert parameter.grad is not None
        assert distance(gradients[name], parameter.grad) < 1e-4, name


@pytest.mark.parametrize("kind", ["hinge", "least_squares"])
def test_the_critics_loss_is_their_mean_on_the_windows_that_the_tokenizer_saw(kind: str) -> None:
    task, critic, rival = pair(config(loss={"adversarial": kind}))
    task.loss(mels(), step_of())
    x, recon, place = task.pairs[0]
    assert place is not None
    loss, logs = rival.loss(mels(), step_of())
    loss.backward()
    with torch.no_grad():
        logits = [(a[-1], b[-1]) for a, b in zip(critic(x, place), critic(recon, place), strict=True)]
    if kind == "hinge":
        each = [0.5 * ((1 - a).clamp_min(0).mean() + (1 + b).clamp_min(0).mean()) for a, b in logits]
    else:
        each = [0.5 * ((1 - a).pow(2).mean() + b.pow(2).mean()) for a, b in logits]
    assert float(loss.detach()) == pytest.approx(float(sum(each)) / 4, rel=1e-5)
    assert float(logs["logits_real"]) == pytest.approx(float(sum(a.mean() for a, _ in logits)) / 4, rel=1e-4)
    assert all(p.grad is not None and p.grad.any() for p in critic.parameters() if p.ndim > 1)
    assert all(p.grad is None for p in task.model.parameters())


@pytest.mark.parametrize(
    ("discriminator", "token"),
    [
        ({"windows": (16, 64)}, "64"), ({"windows": (8,)}, "layers"), ({"resolutions": (8,)}, "layers"),
        ({"layers": 4}, "layers"), ({"windows": (), "resolutions": ()}, "windows"),
    ],
)  # fmt: skip
def test_critics_that_see_nothing_are_refused(discriminator: dict[str, Any], token: str) -> None:
    with pytest.raises(ValidationError, match=token):
        config(discriminator=discriminator)
    assert min(features.bands for features in PRESETS.values()) == FEWEST_BANDS


def test_images_have_no_feature_matching() -> None:
    with pytest.raises(ValidationError, match="feature_matching"):
        TokenizerConfig.model_validate({**TINY, "loss": {"feature_matching": 1.0}})


@pytest.mark.parametrize(("recipe", "rate", "depth"), [("libritts-melvae", 22050, 32), ("mls-rvqvae44", 44100, 72)])
def test_recipes_of_papers_train_both_players(recipe: str, rate: int, depth: int, tmp_path: Path) -> None:
    """Two steps, with a small batch and short windows, of a network of the recipe's depth."""
    for number in range(4):
        write_wav(tmp_path / "sound" / f"{number}.wav", burst(rate, number), rate)
    smaller = [
        "autoencoder.width=32", "autoencoder.frames=64", "train.batch=4", "train.micro_batch=null", "train.workers=0",
        "train.precision=fp32", "train.steps=2", "train.epochs=null", "train.log_every=1", "quantizer.init=normal",
        "discriminator.start=0", "discriminator.windows=[32,64]", "discriminator.width=8",
    ]  # fmt: skip
    command = ["train-tokenizer", str(tmp_path / "sound"), "--recipe", recipe, "--out", str(tmp_path / "run")]
    assert run([*command, "--device", "cpu", *smaller]) == 0
    content = checkpoint.load(tmp_path / "run" / "tokenizer.pt", "rdpm-tokenizer")
    assert content["weights"]["quantizer.books"].shape[:2] == (depth, 1024)
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count('"gan_weight"') == 2

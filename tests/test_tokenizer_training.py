"""Training a tokenizer: its batches, its task, and the discriminator's."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import CPU, TINY, assert_same, digits, leaves, metrics, newest_state, tiny_config, tiny_players, train
from PIL import Image
from sounds import TINY_MEL, strings, write_speech
from torch import Tensor

from rdpm_cli.data.audio import open_audio
from rdpm_cli.data.pixels import to_model
from rdpm_cli.data.source import ItemSource, Source
from rdpm_cli.distributed import TrainStep
from rdpm_cli.tokenizer.config import TokenizerConfig
from rdpm_cli.tokenizer.losses import discriminator_hinge
from rdpm_cli.tokenizer.training import DiscriminatorTask, ItemBatches, Players, TokenizerTask, health

K, T = 32, 2  # of the tiny tokenizer


class Ramps(Source):
    """Image i: red rises from left to right, green is i, blue falls downwards; no image is its own mirror image."""

    def __init__(self, count: int) -> None:
        self.spec, self.labels, self.class_names = "ramps", None, []
        self.names = [f"{i}.png" for i in range(count)]

    def open(self, index: int) -> Image.Image:
        pixels = np.full((16, 16, 3), index, dtype=np.uint8)
        pixels[..., 0], pixels[..., 2] = np.arange(16) * 16, np.arange(16)[::-1, None]
        return Image.fromarray(pixels)


def ramps(count: int = 100, seed: int = 0, flip: bool = True) -> ItemBatches:
    cfg = tiny_config(train={"batch": 32}).model_copy(update={"flip": flip})
    return ItemBatches(Ramps(count), cfg, seed)


def test_batches_are_a_function_of_seed_and_step_and_ranks_take_slices() -> None:
    rows, batches, resumed = range(32), ramps(), ramps()
    straight = [batches.batch_at(step, rows) for step in range(5)]
    for step in (3, 1):  # step 3 spans two epochs
        assert torch.equal(resumed.batch_at(step, rows), straight[step])
        halves = [batches.batch_at(step, half) for half in (range(0, 16), range(16, 32))]
        assert torch.equal(torch.cat(halves), straight[step])
    assert not torch.equal(straight[0], straight[1])
    assert not torch.equal(ramps(seed=1).batch_at(0, rows), straight[0])


def test_batches_hold_the_images_of_the_source_once_an_epoch() -> None:
    batches = ramps(64, flip=False)
    epoch = torch.cat([batches.batch_at(step, range(32)) for step in range(2)])
    assert epoch.shape == (64, 3, 16, 16)
    assert epoch.dtype == torch.uint8
    indices = epoch[:, 1, 0, 0].tolist()
    assert sorted(indices) == list(range(64))
    for image, index in zip(epoch, indices, strict=True):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), batches.inputs.read(batches.source, index))
    assert f"{indices[0]}.png" in batches.describe(0, range(1))


def test_flip_mirrors_about_half_of_the_images() -> None:
    batches, plain = ramps(), ramps(flip=False)
    flipped = 0
    for step in range(10):
        mirrored, straight = batches.batch_at(step, range(32)), plain.batch_at(step, range(32))
        turned_B = mirrored[:, 0, 0, 0] > mirrored[:, 0, 0, -1]  # red falls from left to right
        assert torch.equal(torch.where(turned_B.view(-1, 1, 1, 1), mirrored.flip(3), mirrored), straight)
        flipped += int(turned_B.sum())
    assert 120 < flipped < 200  # of 320


def task(**sections: dict[str, Any]) -> TokenizerTask:
    (player,) = tiny_players(tiny_config(loss={"adversarial": "none"}, train={"batch": 32}, **sections))
    assert isinstance(player, TokenizerTask)
    return player


def step_of(step: int = 0, rows: range = range(32), batch: int = 32) -> TrainStep:
    return TrainStep(0, step, rows, batch, CPU)


def pixels() -> Tensor:
    return ramps().batch_at(0, range(32))


@pytest.mark.parametrize("weight", [True, False])
def test_the_mean_over_t_is_the_sum_divided_by_the_sum_of_gamma(weight: bool) -> None:
    logs = []
    for reduce in ("sum", "mean"):
        loss = {"adversarial": "none", "quant_reduce": reduce, "weight": weight}
        (player,) = tiny_players(tiny_config(loss=loss, train={"batch": 32}))
        total, terms = player.loss(pixels(), step_of())
        assert float(total.detach()) == pytest.approx(float(terms["recon"] + 0.25 * terms["quant"]), rel=1e-5)
        logs.append(terms)
    gammas = sum(player.model.quantizer.alphas) if weight else T
    assert float(logs[0]["quant"] / logs[1]["quant"]) == pytest.approx(gammas, rel=1e-5)


def test_channels_last_changes_the_layout_and_not_the_loss() -> None:
    (player,) = tiny_players(tiny_config(loss={"adversarial": "none"}, train={"batch": 32, "channels_last": True}))
    player.model.to(memory_format=torch.channels_last)
    loss, logs = player.loss(pixels(), step_of())
    assert float(loss.detach()) == pytest.approx(float(logs["recon"]) + 0.25 * float(logs["quant"]), rel=1e-5)
    assert float(loss.detach()) == pytest.approx(float(task().loss(pixels(), step_of())[0].detach()), rel=1e-5)
    assert logs.keys() == {"recon", "quant", "latent_spread", "latent_error/t01", "latent_error/t02"}
    assert 0 < float(logs["latent_spread"]) <= 1


def test_after_step_moves_the_codebook_as_micro_batches_do_and_logs_its_health() -> None:
    whole, halves, batch = task(), task(), pixels()
    books = whole.model.quantizer.books.clone()
    whole.loss(batch, step_of())
    for rows in (range(0, 16), range(16, 32)):
        halves.loss(batch[rows.start : rows.stop], step_of(0, rows))
    logs, logs_of_halves = (player.after_step(step_of()) for player in (whole, halves))
    assert not torch.equal(whole.model.quantizer.books, books)
    torch.testing.assert_close(whole.model.quantizer.books, halves.model.quantizer.books, rtol=1e-4, atol=1e-4)
    assert logs["usage/t01"] == logs_of_halves["usage/t01"]
    for t in range(1, T + 1):
        usage, perplexity, dead = (float(logs[f"{name}/t{t:02d}"]) for name in ("usage", "perplexity", "dead"))
        assert 0 < usage <= 1 <= perplexity <= K * usage + 1e-3
        assert dead == pytest.approx(K * (1 - usage))


def test_every_step_counts_only_its_own_vectors() -> None:
    player = task()
    for step in range(2):
        player.loss(pixels(), step_of(step))
        assert [codes.shape for codes, _ in player.passes] == [(32, T, 16)]
        player.after_step(step_of(step))


def test_codebook_health_of_counts_worked_out_by_hand() -> None:
    counts = torch.tensor([[2.0, 2.0, 0.0, 0.0], [4.0, 0.0, 0.0, 0.0], [1.0, 1.0, 2.0, 0.0]])
    logs = health(counts, shared=True)
    assert float(health(counts, shared=False)["usage/book"]) == 0.25
    expected = {
        "usage/book": 0.75,
        "usage/t01": 0.5, "perplexity/t01": 2.0, "dead/t01": 2.0,
        "usage/t02": 0.25, "perplexity/t02": 1.0, "dead/t02": 3.0,
        "usage/t03": 0.75, "perplexity/t03": math.sqrt(8), "dead/t03": 1.0,
    }  # fmt: skip
    assert {name: float(value) for name, value in logs.items()} == pytest.approx(expected, rel=1e-5)


def tasks(players: Players) -> tuple[TokenizerTask, DiscriminatorTask]:
    first, second = players
    assert isinstance(first, TokenizerTask)
    assert isinstance(second, DiscriminatorTask)
    return first, second


def test_its_loss_is_the_hinge_on_the_images_and_reconstructions_of_the_step() -> None:
    cfg = tiny_config()
    tokenizer, critic = tasks(tiny_players(cfg))
    batch, step = digits(cfg).batch_at(3, range(16)), step_of(3, range(16), 16)
    tokenizer.loss(batch, step)
    loss, logs = critic.loss(batch, step)
    x = to_model(batch)
    with torch.no_grad():
        recon, _ = tokenizer.model(x, step_of(3, range(16), 16).normal(T, *tokenizer.model.latent_shape))
        real, fake = critic.model(x), critic.model(recon)
    assert float(loss.detach()) == pytest.approx(float(discriminator_hinge(real, fake)), rel=1e-6)
    assert float(logs["logits_real"]) == pytest.approx(float(real.mean()), rel=1e-5)
    assert float(logs["logits_fake"]) == pytest.approx(float(fake.mean()), rel=1e-5)
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in critic.model.parameters() if p.ndim > 1)
    assert all(p.grad is None for p in tokenizer.model.parameters())


def test_each_micro_batch_meets_its_own_reconstructions() -> None:
    cfg = tiny_config(train={"batch": 32})
    tokenizer, critic = tasks(tiny_players(cfg))
    halves, batch = [range(16), range(16, 32)], digits(cfg).batch_at(0, range(32))
    for rows in halves:
        tokenizer.loss(batch[rows.start : rows.stop], step_of(0, rows))
    for rows, (x, recon, _) in zip(halves, list(tokenizer.pairs), strict=True):
        assert torch.equal(x, to_model(batch[rows.start : rows.stop]))
        assert not recon.requires_grad
        critic.loss(batch[rows.start : rows.stop], step_of(0, rows))
    assert not tokenizer.pairs


@dataclass
class Subject:
    """A tiny tokenizer of images or of sound, and what it learns from."""

    source: ItemSource
    plain: dict[str, Any]

    def config(self, **sections: dict[str, Any]) -> TokenizerConfig:
        changed = {name: self.plain[name] | fields for name, fields in sections.items()}
        return TokenizerConfig.model_validate({**self.plain, **changed})

    def train(self, cfg: TokenizerConfig, folder: Path) -> Players:
        players = tiny_players(cfg)
        train(players, cfg, folder, ItemBatches(self.source, cfg, 0))
        return players


@pytest.fixture(scope="module", params=["images", "sound"])
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    if request.param == "images":
        return Subject(digits(tiny_config()).source, TINY)
    critic = TINY["discriminator"] | {"windows": (16, 32), "resolutions": (1, 2)}
    plain = {
        **TINY,
        "autoencoder": TINY_MEL,
        "quantizer": TINY["quantizer"] | {"bias": "none"},
        "discriminator": critic,
    }
    plain["loss"] = {"adversarial": "hinge", "feature_matching": 2.0}
    return Subject(open_audio(write_speech(tmp_path_factory.mktemp("sound"), strings(20))), plain)


Trained = tuple[dict[str, Any], list[dict[str, Any]]]


def trained(subject: Subject, folder: Path, steps: int, adversarial: str) -> Trained:
    """-> the tokenizer's state (parameters, codebook, optimiser, average) and the log of a run; start = 3."""
    cfg = subject.config(loss={"adversarial": adversarial}, discriminator={"start": 3}, train={"steps": steps})
    subject.train(cfg, folder)
    state = newest_state(folder)
    return {"tokenizer": state["players"]["tokenizer"], "ema": state["ema"]}, metrics(folder)


def test_until_its_start_a_run_is_the_one_without_and_then_it_differs(subject: Subject, tmp_path: Path) -> None:
    with_, without = (trained(subject, tmp_path / name, 3, name) for name in ("hinge", "none"))
    assert_same(with_[0], without[0])
    assert with_[1] == without[1]
    started, never = (trained(subject, tmp_path / f"{name}4", 4, name) for name in ("hinge", "none"))
    a, b = leaves(started[0]["tokenizer"]), leaves(never[0]["tokenizer"])
    assert not all(torch.equal(v, b[k]) if isinstance(v, Tensor) else v == b[k] for k, v in a.items())
    assert started[1][:3] == never[1][:3]
    added = {name.partition("/")[0] for name in started[1][3].keys() - never[1][3].keys()}
    assert added - {"feature_distance"} == {"gan", "gan_weight", "discriminator"}


def test_the_discriminator_does_not_move_before_its_start(subject: Subject, tmp_path: Path) -> None:
    cfg = subject.config(discriminator={"start": 2}, train={"steps": 2})
    weights = dict(tiny_players(cfg)[1].model.state_dict())
    assert_same(dict(subject.train(cfg, tmp_path)[1].model.state_dict()), weights)
    assert newest_state(tmp_path)["players"]["discriminator"]["optimizer"]["state"] == {}


def test_a_run_of_both_players_resumes_exactly(subject: Subject, tmp_path: Path) -> None:
    cfg = subject.config(loss={"adversarial": "least_squares"}, train={"steps": 4, "save_every": 2})
    subject.train(cfg, tmp_path)
    whole, log = newest_state(tmp_path), metrics(tmp_path)
    (tmp_path / "checkpoints" / "step-000000004.pt").unlink()
    subject.train(cfg, tmp_path)
    assert_same(newest_state(tmp_path), whole)
    assert metrics(tmp_path) == log


@pytest.mark.parametrize(("step", "share"), [(4, 0.0), (5, 0.25), (6, 0.5), (8, 1.0), (100, 1.0)])
def test_the_adversarial_term_warms_up_by_a_linear_ramp(step: int, share: float) -> None:
    """With start 4 and 4 steps of warm-up: the adversarial part of the loss, and its gradient, are share × full."""

    def gradient(players: Players) -> tuple[float, Tensor, dict[str, Tensor]]:
        loss, logs = players[0].loss(digits(tiny_config()).batch_at(step, range(16)), step_of(step, range(16), 16))
        loss.backward()
        last = dict(players[0].model.named_parameters())["decoder.conv_out.weight"].grad
        assert last is not None
        return float(loss.detach()), last, logs

    results = []
    for warmup in (4, 0):
        cfg = tiny_config(discriminator={"start": 4, "warmup_steps": warmup})
        results.append(gradient(tiny_players(cfg)))
    plain_loss, plain, _ = gradient(tiny_players(tiny_config(loss={"adversarial": "none"})))
    (ramped_loss, ramped, logs), (full_loss, full, _) = results
    term = float(0.75 * logs["gan_weight"] * logs["gan"])
    assert ramped_loss - plain_loss == pytest.approx(share * term, abs=1e-6)
    assert full_loss - plain_loss == pytest.approx(term, abs=1e-6)
    torch.testing.assert_close(ramped - plain, share * (full - plain), rtol=1e-3, atol=1e-6)

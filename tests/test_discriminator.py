"""The discriminator: what its logits see, and the player that trains it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import CPU, TINY, assert_same, digits, leaves, metrics, newest_state, tiny_config, tiny_players, train
from pydantic import ValidationError
from torch import Tensor

from rdpm_cli.config import DiscriminatorConfig
from rdpm_cli.images.tensors import to_model
from rdpm_cli.step import TrainStep
from rdpm_cli.threads import one_thread
from rdpm_cli.tokenizer.discriminator import PatchDiscriminator
from rdpm_cli.tokenizer.losses import discriminator_hinge
from rdpm_cli.tokenizer.task import DiscriminatorTask, Players, TokenizerTask


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def critic(layers: int) -> PatchDiscriminator:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return PatchDiscriminator(DiscriminatorConfig(width=8, layers=layers))


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


# ---- the network ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "side", "grid"), [(2, 16, 2), (2, 64, 14), (2, 256, 62), (3, 32, 2), (3, 256, 30), (3, 128, 14)]
)
def test_the_logits_are_a_grid_of_patches(layers: int, side: int, grid: int) -> None:
    """Two convolutions of stride 1 and kernel 4 each take one off the side / 2^layers that the strided ones leave."""
    assert critic(layers)(noise(2, 3, side, side)).shape == (2, 1, grid, grid)


@pytest.mark.parametrize("size", ["16", "8"])
def test_a_recipe_whose_images_hold_no_patch_is_refused(size: str) -> None:
    small = {**TINY, "autoencoder": {**TINY["autoencoder"], "resolution": int(size)}}
    cfg = {**small, "discriminator": {"layers": 3}}
    with pytest.raises(ValidationError, match="leaves no patch"):
        type(tiny_config()).model_validate(cfg)
    type(tiny_config()).model_validate({**cfg, "loss": {"adversarial": "none"}})


def extent(grad_BCHW: Tensor) -> tuple[int, int]:
    """(height, width) of the smallest box around what is not zero."""
    seen = grad_BCHW.abs().sum((0, 1)) > 0
    rows, columns = seen.any(1).nonzero().flatten(), seen.any(0).nonzero().flatten()
    return int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1


@pytest.mark.parametrize(("layers", "pixels"), [(2, 34), (3, 70)])
def test_a_logit_sees_a_patch(layers: int, pixels: int) -> None:
    """Measured by the gradient of one logit amid the grid; the norms, which see the whole image, are taken out."""
    network = critic(layers)
    for place, layer in enumerate(network.layers):
        if isinstance(layer, torch.nn.GroupNorm):
            network.layers[place] = torch.nn.Identity()
    x = noise(1, 3, 160, 160).requires_grad_()
    logits = network(x)
    middle = logits.shape[-1] // 2
    logits[0, 0, middle, middle].backward()
    assert x.grad is not None
    assert extent(x.grad) == (pixels, pixels)


def test_the_logits_of_an_image_do_not_depend_on_the_batch() -> None:
    network, x = critic(2), noise(5, 3, 32, 32)
    alone = torch.cat([network(image) for image in x.split(1)])
    torch.testing.assert_close(network(x), alone, rtol=1e-5, atol=1e-6)
    others = torch.cat([x[:1], 100 * noise(4, 3, 32, 32)])
    torch.testing.assert_close(network(others)[:1], alone[:1], rtol=1e-5, atol=1e-6)


def test_it_starts_undecided() -> None:
    logits = critic(3)(noise(4, 3, 64, 64))
    assert logits.abs().max() < 2
    convolutions = [layer for layer in critic(3).layers if isinstance(layer, torch.nn.Conv2d)]
    assert not any(layer.bias.any() for layer in convolutions if layer.bias is not None)


# ---- the player ----------------------------------------------------------------------------------------------------


def tasks(players: Players) -> tuple[TokenizerTask, DiscriminatorTask]:
    first, second = players
    assert isinstance(first, TokenizerTask)
    assert isinstance(second, DiscriminatorTask)
    return first, second


def step_of(step: int, rows: range = range(16), batch: int = 16) -> TrainStep:
    return TrainStep(0, step, rows, batch, CPU)


def test_its_loss_is_the_hinge_on_the_images_and_their_reconstructions_of_the_same_step() -> None:
    cfg = tiny_config()
    tokenizer, critic_task = tasks(tiny_players(cfg))
    pixels = digits(cfg).batch_at(3, range(16))
    tokenizer.loss(pixels, step_of(3))
    loss, logs = critic_task.loss(pixels, step_of(3))
    x = to_model(pixels)
    step = step_of(3)
    with torch.no_grad():
        recon, _ = tokenizer.model(x, step.normal(2, *tokenizer.model.latent_shape))
        real, fake = critic_task.model(x), critic_task.model(recon)
    assert float(loss.detach()) == pytest.approx(float(discriminator_hinge(real, fake)), rel=1e-6)
    assert float(logs["logits_real"]) == pytest.approx(float(real.mean()), rel=1e-5)
    assert float(logs["logits_fake"]) == pytest.approx(float(fake.mean()), rel=1e-5)
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in critic_task.model.parameters() if p.ndim > 1)
    assert all(p.grad is None for p in tokenizer.model.parameters())


def test_each_micro_batch_meets_its_own_reconstructions() -> None:
    cfg = tiny_config(train={"batch": 32})
    tokenizer, critic_task = tasks(tiny_players(cfg))
    parts = [range(16), range(16, 32)]
    pixels = digits(cfg).batch_at(0, range(32))
    for rows in parts:
        tokenizer.loss(pixels[rows.start : rows.stop], step_of(0, rows, 32))
    for rows, (x, recon) in zip(parts, list(tokenizer.made), strict=True):
        assert torch.equal(x, to_model(pixels[rows.start : rows.stop]))
        assert not recon.requires_grad
        critic_task.loss(pixels[rows.start : rows.stop], step_of(0, rows, 32))
    assert not tokenizer.made


def only_tokenizer(folder: Path) -> dict[str, object]:
    """What a checkpoint holds of the tokenizer: parameters, codebook, optimiser, average."""
    state = newest_state(folder)
    return {"tokenizer": state["players"]["tokenizer"], "ema": state["ema"]}


def is_same(found: object, wanted: object) -> bool:
    a, b = leaves(found), leaves(wanted)
    return all(torch.equal(v, b[k]) if isinstance(v, Tensor) else v == b[k] for k, v in a.items())


def test_before_its_start_a_run_is_the_one_without_and_then_it_differs(tmp_path: Path) -> None:
    def of(name: str, steps: int, adversarial: str) -> tuple[dict[str, object], list[dict[str, object]]]:
        cfg = tiny_config(loss={"adversarial": adversarial}, discriminator={"start": 3}, train={"steps": steps})
        train(tiny_players(cfg), cfg, tmp_path / name)
        return only_tokenizer(tmp_path / name), metrics(tmp_path / name)

    with_, without = of("with", 3, "hinge"), of("without", 3, "none")
    assert_same(with_[0], without[0])
    assert with_[1] == without[1]
    started, never = of("started", 4, "hinge"), of("never", 4, "none")
    assert not is_same(started[0]["tokenizer"], never[0]["tokenizer"])
    assert started[1][:3] == never[1][:3]
    assert {name.partition("/")[0] for name in started[1][3].keys() - never[1][3].keys()} == {
        "gan", "gan_weight", "discriminator",
    }  # fmt: skip


def test_the_discriminator_does_not_move_before_its_start(tmp_path: Path) -> None:
    cfg = tiny_config(discriminator={"start": 2}, train={"steps": 2})
    players = tiny_players(cfg)
    before = {name: value.clone() for name, value in players[1].model.state_dict().items()}
    train(players, cfg, tmp_path)
    assert_same(dict(players[1].model.state_dict()), before)
    assert newest_state(tmp_path)["players"]["discriminator"]["optimizer"]["state"] == {}


@pytest.mark.parametrize(("step", "share"), [(4, 0.0), (5, 0.25), (6, 0.5), (8, 1.0), (100, 1.0)])
def test_the_tokenizer_feels_it_by_a_linear_ramp(step: int, share: float) -> None:
    """Of a start at 4 and 4 steps of warm-up: the adversarial part of the loss, and its gradient, are share × full."""
    totals, gradients = [], []
    for warmup in (4, 0):
        cfg = tiny_config(discriminator={"start": 4, "warmup_steps": warmup})
        tokenizer, _ = tasks(tiny_players(cfg))
        loss, logs = tokenizer.loss(digits(cfg).batch_at(step, range(16)), step_of(step))
        loss.backward()
        plain = float(logs["recon"] + 0.25 * logs["quant"])
        totals.append((float(loss.detach()) - plain, float(0.75 * logs["gan_weight"] * logs["gan"])))
        last = tokenizer.model.decoder.conv_out.weight.grad
        assert last is not None
        gradients.append(last.clone())
    (ramped, term), (full, _) = totals
    assert ramped == pytest.approx(share * term, abs=1e-6)
    assert full == pytest.approx(term, abs=1e-6)
    cfg = tiny_config(loss={"adversarial": "none"})
    (alone,) = tiny_players(cfg)
    alone.loss(digits(cfg).batch_at(step, range(16)), step_of(step))[0].backward()
    plain_gradient = alone.model.get_parameter("decoder.conv_out.weight").grad
    assert plain_gradient is not None
    torch.testing.assert_close(
        gradients[0] - plain_gradient, share * (gradients[1] - plain_gradient), rtol=1e-3, atol=1e-6
    )


def test_the_average_of_the_weights_is_the_tokenizers_alone(tmp_path: Path) -> None:
    cfg = tiny_config(train={"steps": 2})
    players = tiny_players(cfg)
    run = train(players, cfg, tmp_path)
    assert run.ema is not None
    assert run.ema.model.state_dict().keys() == players[0].model.state_dict().keys()

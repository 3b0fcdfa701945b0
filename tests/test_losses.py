"""The tokenizer's loss: hinge terms, VQGAN's adaptive weight, and the gradients that they give."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from helpers import CPU, digits, tiny_config, tiny_players
from torch import Tensor, nn

from rdpm_cli.config import TokenizerConfig
from rdpm_cli.images.tensors import to_model
from rdpm_cli.step import TrainStep
from rdpm_cli.threads import one_thread
from rdpm_cli.tokenizer.losses import adaptive_weight, discriminator_hinge, generator_hinge
from rdpm_cli.tokenizer.task import DiscriminatorTask, TokenizerTask


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


# ---- the terms -----------------------------------------------------------------------------------------------------


def test_the_discriminators_hinge_worked_out_by_hand() -> None:
    """0.5 ((0 + 0.5 + 3) / 3 + (0 + 1.25) / 2): logits beyond ±1 on the right side cost nothing."""
    real, fake = torch.tensor([2.0, 0.5, -2.0]), torch.tensor([-3.0, 0.25])
    assert float(discriminator_hinge(real, fake)) == pytest.approx(0.5 * (3.5 / 3 + 1.25 / 2))


def test_the_tokenizers_hinge_is_minus_the_mean_logit() -> None:
    assert float(generator_hinge(torch.tensor([[1.0, -4.0], [0.5, 0.5]]))) == pytest.approx(0.5)


def test_hinges_are_taken_in_fp32() -> None:
    logits = torch.linspace(-1, 1, 1001).bfloat16()
    for found in (generator_hinge(logits), discriminator_hinge(logits, logits)):
        assert found.dtype == torch.float32
    assert float(generator_hinge(logits)) == pytest.approx(-float(logits.double().mean()), abs=1e-6)


def test_the_adaptive_weight_is_the_ratio_of_norms_clamped() -> None:
    three, four = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 4.0]])
    assert float(adaptive_weight(three, four)) == pytest.approx(3 / 4.0001)
    assert float(adaptive_weight(three, 0 * four)) == 1e4  # 3 / 1e-4, clamped
    assert float(adaptive_weight(0 * three, four)) == 0


# ---- one step ------------------------------------------------------------------------------------------------------


def pair(cfg: TokenizerConfig) -> tuple[TokenizerTask, nn.Module]:
    """The task, and its critic made less indifferent than at its start."""
    task, other = tiny_players(cfg)
    assert isinstance(task, TokenizerTask)
    assert isinstance(other, DiscriminatorTask)
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.mul_(3)
    return task, other.model


def step_of(rows: range = range(16)) -> TrainStep:
    return TrainStep(0, 0, rows, rows.stop, CPU)


class TinyPerceptual(nn.Module):
    """(x, x') -> a distance (B,), in the place of LPIPS."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3).requires_grad_(False)
        nn.init.normal_(self.conv.weight, generator=torch.Generator().manual_seed(2))

    def forward(self, x: Tensor, recon: Tensor) -> Tensor:
        difference = torch.tanh(self.conv(x)) - torch.tanh(self.conv(recon))
        return difference.pow(2).mean((1, 2, 3))


def straight(task: TokenizerTask, critic: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """perceived, gan, quant of one batch in one plain graph, and the last layer's weight."""
    x = to_model(pixels)
    recon, chain = task.model(x, step_of().normal(task.model.cfg.quantizer.steps, *task.model.latent_shape))
    perceived = F.mse_loss(recon, x)
    if task.loss_terms.perceptual is not None:
        perceived = perceived + task.cfg.loss.perceptual_factor * task.loss_terms.perceptual(x, recon).mean()
    return perceived, -critic(recon).mean(), chain.loss, task.model.decoder.conv_out.weight


def plain_weight(perceived: Tensor, gan: Tensor, last: Tensor) -> Tensor:
    """VQGAN's calculate_adaptive_weight, by plain autograd on the last layer."""
    recon_grads = torch.autograd.grad(perceived, last, retain_graph=True)[0]
    gan_grads = torch.autograd.grad(gan, last, retain_graph=True)[0]
    weight = torch.norm(recon_grads) / (torch.norm(gan_grads) + 1e-4)
    return torch.clamp(weight, 0.0, 1e4).detach()


@pytest.mark.parametrize("perceptual", [False, True])
def test_the_logged_weight_is_vqgans(perceptual: bool) -> None:
    cfg = tiny_config()
    task, critic = pair(cfg)
    if perceptual:
        task.loss_terms.perceptual = TinyPerceptual()
    pixels = digits(cfg).batch_at(0, range(16))
    _, logs = task.loss(pixels, step_of())
    perceived, gan, _, last = straight(task, critic, pixels)
    assert float(logs["gan_weight"]) == pytest.approx(float(plain_weight(perceived, gan, last)), rel=1e-5)
    assert float(logs["gan"]) == pytest.approx(float(gan.detach()), rel=1e-5)
    assert not logs["gan_weight"].requires_grad


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
@pytest.mark.parametrize("perceptual", [False, True])
@pytest.mark.parametrize("adaptive", [False, True])
def test_every_gradient_is_that_of_the_plain_sum(adaptive: bool, perceptual: bool, codebook: str) -> None:
    """perceived + 0.75 w gan + 0.25 quant with w detached, in one graph and one backward."""
    cfg = tiny_config(loss={"adaptive": adaptive}, quantizer={"codebook": codebook})
    task, critic = pair(cfg)
    if perceptual:
        task.loss_terms.perceptual = TinyPerceptual()
    pixels = digits(cfg).batch_at(0, range(16))
    loss, logs = task.loss(pixels, step_of())
    loss.backward()
    found = {name: p.grad.clone() for name, p in task.model.named_parameters() if p.grad is not None}
    task.model.zero_grad()
    perceived, gan, quant, last = straight(task, critic, pixels)
    weight = plain_weight(perceived, gan, last) if adaptive else torch.tensor(1.0)
    total = perceived + 0.75 * weight * gan + 0.25 * quant
    total.backward()
    assert float(loss.detach()) == pytest.approx(float(total.detach()), rel=1e-6)
    assert float(logs["gan_weight"]) == pytest.approx(float(weight), rel=1e-5)
    assert found.keys() == {name for name, _ in task.model.named_parameters()}
    for name, parameter in task.model.named_parameters():
        assert parameter.grad is not None
        far = (found[name] - parameter.grad).norm() / parameter.grad.norm()
        assert far < 1e-5, name  # the rounding of fp32


def test_the_tokenizers_loss_reaches_no_weight_of_the_discriminator() -> None:
    cfg = tiny_config()
    task, critic = pair(cfg)
    loss, _ = task.loss(digits(cfg).batch_at(0, range(16)), step_of())
    loss.backward()
    assert all(parameter.grad is None for parameter in critic.parameters())
    assert all(parameter.requires_grad for parameter in critic.parameters())  # it can train in the same step


def test_the_adversarial_factor_scales_the_term() -> None:
    losses = []
    for factor in (0.0, 0.75, 1.5):
        cfg = tiny_config(loss={"adversarial_factor": factor})
        task, _ = pair(cfg)
        loss, logs = task.loss(digits(cfg).batch_at(0, range(16)), step_of())
        losses.append(float(loss.detach()))
        assert losses[-1] == pytest.approx(
            float(logs["recon"] + 0.25 * logs["quant"] + factor * logs["gan_weight"] * logs["gan"]), rel=1e-6
        )
    assert losses[2] - losses[0] == pytest.approx(2 * (losses[1] - losses[0]), rel=1e-4)


def test_in_micro_batches_the_weight_is_the_whole_batchs_a_step_later() -> None:
    def pieces(task: TokenizerTask, parts: list[range]) -> list[dict[str, float]]:
        pixels, logs = digits(cfg).batch_at(0, range(32)), []
        task.model.zero_grad()
        for rows in parts:
            loss, found = task.loss(pixels[rows.start : rows.stop], TrainStep(0, 0, rows, 32, CPU))
            (loss * len(rows) / 32).backward()
            logs.append({name: float(value) for name, value in found.items()})
        return logs

    cfg = tiny_config(train={"batch": 32})
    whole, _ = pair(cfg)
    (at_once,) = pieces(whole, [range(32)])
    cfg = tiny_config(train={"batch": 32, "micro_batch": 16})
    halves, _ = pair(cfg)
    assert [part["gan_weight"] for part in pieces(halves, [range(16), range(16, 32)])] == [0, 0]
    assert halves.gan_weight is not None
    halves.gan_weight.after_step(TrainStep(0, 0, range(32), 32, CPU))
    several = pieces(halves, [range(16), range(16, 32)])
    assert several[0]["gan_weight"] == several[1]["gan_weight"]
    for name in ("recon", "quant", "gan", "gan_weight"):
        assert sum(part[name] for part in several) / 2 == pytest.approx(at_once[name], rel=1e-4), name
    for (name, found), (_, wanted) in zip(halves.model.named_parameters(), whole.model.named_parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_a_step_that_was_passed_over_leaves_the_weight_alone() -> None:
    cfg = tiny_config(train={"batch": 32, "micro_batch": 16})
    task, _ = pair(cfg)
    pixels = digits(cfg).batch_at(0, range(16))
    task.loss(1000 * pixels.float(), TrainStep(0, 0, range(16), 32, CPU))  # a first half; then nothing follows
    for rows in (range(16), range(16, 32)):
        task.loss(pixels, TrainStep(0, 1, rows, 32, CPU))
    assert task.gan_weight is not None
    task.gan_weight.after_step(TrainStep(0, 1, range(32), 32, CPU))
    once = float(task.gan_weight.value)
    task, _ = pair(cfg)
    for rows in (range(16), range(16, 32)):
        task.loss(pixels, TrainStep(0, 1, rows, 32, CPU))
    assert task.gan_weight is not None
    task.gan_weight.after_step(TrainStep(0, 1, range(32), 32, CPU))
    assert once == float(task.gan_weight.value) > 0


def test_the_last_layer_and_the_weight_are_fp32_inside_autocast() -> None:
    """In bf16 autocast x' and the last layer's gradients have all the bits of fp32, not bf16's eight."""
    cfg = tiny_config()
    task, _ = pair(cfg)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = task.loss(digits(cfg).batch_at(0, range(16)), step_of())
        recon, _ = task.model(to_model(digits(cfg).batch_at(0, range(16))), torch.zeros(16, 2, 4, 4, 4))
    loss.backward()
    for value in (recon, task.model.decoder.conv_out.weight.grad):
        assert value is not None
        assert value.dtype == torch.float32
        assert not torch.equal(value, value.bfloat16().float())
    inner = task.model.decoder.mid.block_1.conv1.weight.grad
    assert inner is not None
    assert torch.equal(inner, inner.bfloat16().float())  # the convolutions before it do run in bf16

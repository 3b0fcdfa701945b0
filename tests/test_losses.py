"""The tokenizer's loss: hinge terms, VQGAN's adaptive weight, the gradients of the whole, and LPIPS."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lpips
import pytest
import torch
import torch.nn.functional as F
from helpers import CPU, digits, tiny_config, tiny_players
from torch import Tensor, nn
from torchvision import models

from rdpm_cli import checkpoint, files
from rdpm_cli.cli.app import run
from rdpm_cli.data.pixels import to_model
from rdpm_cli.distributed import TrainStep
from rdpm_cli.errors import CheckpointError, UsageError
from rdpm_cli.tokenizer.config import TokenizerConfig, TokenizerLossConfig
from rdpm_cli.tokenizer.losses import (
    BACKBONES,
    Net,
    Perceptual,
    TokenizerLoss,
    adaptive_weight,
    discriminator_hinge,
    generator_hinge,
    load_perceptual,
)
from rdpm_cli.tokenizer.training import DiscriminatorTask, TokenizerTask

NETS: tuple[Net, ...] = ("alex", "vgg")


# ---- the terms -----------------------------------------------------------------------------------------------------


def test_the_discriminators_hinge_worked_out_by_hand() -> None:
    """0.5 ((0 + 0.5 + 3) / 3 + (0 + 1.25) / 2): logits beyond ±1 on the right side cost nothing."""
    real, fake = torch.tensor([2.0, 0.5, -2.0]), torch.tensor([-3.0, 0.25])
    assert float(discriminator_hinge(real, fake)) == pytest.approx(0.5 * (3.5 / 3 + 1.25 / 2))


def test_the_tokenizers_hinge_is_minus_the_mean_logit() -> None:
    assert float(generator_hinge(torch.tensor([[1.0, -4.0], [0.5, 0.5]]))) == pytest.approx(0.5)


def test_hinges_are_taken_in_fp32() -> None:
    logits = torch.linspace(-1, 1, 1001).bfloat16()
    for loss in (generator_hinge(logits), discriminator_hinge(logits, logits)):
        assert loss.dtype == torch.float32
    assert float(generator_hinge(logits)) == pytest.approx(-float(logits.double().mean()), abs=1e-6)


def test_the_adaptive_weight_is_the_ratio_of_norms_clamped() -> None:
    three, four = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 4.0]])
    assert float(adaptive_weight(three, four)) == pytest.approx(3 / 4.0001)
    assert float(adaptive_weight(three, 0 * four)) == 1e4  # 3 / 1e-4, clamped
    assert float(adaptive_weight(0 * three, four)) == 0


def test_loss_terms_have_the_factors_of_the_recipe() -> None:
    x, recon = images(16), images(16, seed=1)
    total, terms = TokenizerLoss(TokenizerLossConfig(quant=0.5))(x, recon, torch.tensor(3.0))
    squared = float((x - recon).pow(2).mean())
    assert float(terms["recon"]) == pytest.approx(squared, rel=1e-5)
    assert float(total) == pytest.approx(squared + 1.5, rel=1e-5)


# ---- one step ------------------------------------------------------------------------------------------------------


def pair(cfg: TokenizerConfig) -> tuple[TokenizerTask, nn.Module]:
    """The task, and its critic made less indifferent than at its start."""
    task, critic_task = tiny_players(cfg)
    assert isinstance(task, TokenizerTask)
    assert isinstance(critic_task, DiscriminatorTask)
    with torch.no_grad():
        for parameter in critic_task.model.parameters():
            parameter.mul_(3)
    return task, critic_task.model


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


def plain_terms(task: TokenizerTask, critic: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """perceived, gan and quant of one batch, in one plain graph."""
    x = to_model(pixels)
    recon, chain = task.model(x, step_of().normal(task.model.cfg.quantizer.steps, *task.model.latent_shape))
    perceived = F.mse_loss(recon, x)
    if task.loss_terms.perceptual is not None:
        perceived = perceived + task.cfg.loss.perceptual_factor * task.loss_terms.perceptual(x, recon).mean()
    return perceived, -critic(recon).mean(), chain.loss


def vqgan_weight(perceived: Tensor, gan: Tensor, last: Tensor) -> Tensor:
    """VQGAN's calculate_adaptive_weight, by plain autograd on the last layer."""
    recon_grads = torch.autograd.grad(perceived, last, retain_graph=True)[0]
    gan_grads = torch.autograd.grad(gan, last, retain_graph=True)[0]
    weight = torch.norm(recon_grads) / (torch.norm(gan_grads) + 1e-4)
    return torch.clamp(weight, 0.0, 1e4).detach()


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
@pytest.mark.parametrize("perceptual", [False, True])
@pytest.mark.parametrize("adaptive", [False, True])
def test_every_gradient_is_that_of_the_plain_sum(adaptive: bool, perceptual: bool, codebook: str) -> None:
    """perceived + 0.75 w gan + 0.25 quant with w detached, in one graph and one backward pass."""
    cfg = tiny_config(loss={"adaptive": adaptive}, quantizer={"codebook": codebook})
    task, critic = pair(cfg)
    if perceptual:
        task.loss_terms.perceptual = TinyPerceptual()
    pixels = digits(cfg).batch_at(0, range(16))
    loss, logs = task.loss(pixels, step_of())
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in task.model.named_parameters() if p.grad is not None}
    task.model.zero_grad()
    perceived, gan, quant = plain_terms(task, critic, pixels)
    weight = vqgan_weight(perceived, gan, task.model.decoder.conv_out.weight) if adaptive else torch.tensor(1.0)
    total = perceived + 0.75 * weight * gan + 0.25 * quant
    total.backward()
    assert float(loss.detach()) == pytest.approx(float(total.detach()), rel=1e-6)
    assert float(logs["gan_weight"]) == pytest.approx(float(weight), rel=1e-5)
    assert float(logs["gan"]) == pytest.approx(float(gan.detach()), rel=1e-5)
    assert not logs["gan_weight"].requires_grad
    assert gradients.keys() == {name for name, _ in task.model.named_parameters()}
    for name, parameter in task.model.named_parameters():
        assert parameter.grad is not None
        error = (gradients[name] - parameter.grad).norm() / parameter.grad.norm()
        assert error < 1e-5, name  # the rounding of fp32


def test_the_adversarial_factor_scales_the_term() -> None:
    losses = []
    for factor in (0.0, 0.75, 1.5):
        cfg = tiny_config(loss={"adversarial_factor": factor})
        loss, logs = pair(cfg)[0].loss(digits(cfg).batch_at(0, range(16)), step_of())
        losses.append(float(loss.detach()))
        expected = logs["recon"] + 0.25 * logs["quant"] + factor * logs["gan_weight"] * logs["gan"]
        assert losses[-1] == pytest.approx(float(expected), rel=1e-6)
    assert losses[2] - losses[0] == pytest.approx(2 * (losses[1] - losses[0]), rel=1e-4)


def micro_batches(task: TokenizerTask, rows: list[range], step: int = 0) -> list[dict[str, float]]:
    """Accumulate the gradients of a step of 32 images. -> the logs of each micro-batch."""
    pixels, logs = digits(task.cfg).batch_at(0, range(32)), []
    task.model.zero_grad()
    for micro in rows:
        loss, terms = task.loss(pixels[micro.start : micro.stop], TrainStep(0, step, micro, 32, CPU))
        (loss * len(micro) / 32).backward()
        logs.append({name: float(value) for name, value in terms.items()})
    return logs


HALVES = [range(16), range(16, 32)]


def test_with_micro_batches_the_weight_is_the_whole_batchs_a_step_later() -> None:
    whole, _ = pair(tiny_config(train={"batch": 32}))
    (at_once,) = micro_batches(whole, [range(32)])
    halves, _ = pair(tiny_config(train={"batch": 32, "micro_batch": 16}))
    assert [logs["gan_weight"] for logs in micro_batches(halves, HALVES)] == [0, 0]
    assert halves.gan_weight is not None
    halves.gan_weight.after_step(TrainStep(0, 0, range(32), 32, CPU))
    several = micro_batches(halves, HALVES)
    assert several[0]["gan_weight"] == several[1]["gan_weight"]
    for name in ("recon", "quant", "gan", "gan_weight"):
        assert sum(logs[name] for logs in several) / 2 == pytest.approx(at_once[name], rel=1e-4), name
    for (name, half), (_, one) in zip(halves.model.named_parameters(), whole.model.named_parameters(), strict=True):
        torch.testing.assert_close(half.grad, one.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_a_step_that_was_passed_over_does_not_touch_the_weight() -> None:
    weights = []
    for passed_over in (True, False):
        task, _ = pair(tiny_config(train={"batch": 32, "micro_batch": 16}))
        if passed_over:  # a first half without its second
            task.loss(1000 * digits(task.cfg).batch_at(0, range(16)).float(), TrainStep(0, 0, range(16), 32, CPU))
        micro_batches(task, HALVES, step=1)
        assert task.gan_weight is not None
        task.gan_weight.after_step(TrainStep(0, 1, range(32), 32, CPU))
        weights.append(float(task.gan_weight.value))
    assert weights[0] == weights[1] > 0


def test_the_last_layer_and_the_weight_are_fp32_inside_autocast() -> None:
    """In bf16 autocast x' and the last layer's gradients have all the bits of fp32, not bf16's eight."""
    cfg = tiny_config()
    task, _ = pair(cfg)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = task.loss(digits(cfg).batch_at(0, range(16)), step_of())
        recon, _ = task.model(to_model(digits(cfg).batch_at(0, range(16))), torch.zeros(16, 2, 4, 16))
    loss.backward()
    for value in (recon, task.model.decoder.conv_out.weight.grad):
        assert value is not None
        assert value.dtype == torch.float32
        assert not torch.equal(value, value.bfloat16().float())
    inner = task.model.decoder.mid.block_1.conv1.weight.grad
    assert inner is not None
    assert torch.equal(inner, inner.bfloat16().float())  # the convolutions before it do run in bf16


# ---- LPIPS ---------------------------------------------------------------------------------------------------------


def images(side: int = 33, count: int = 2, seed: int = 0) -> Tensor:
    """(count, 3, side, side) in [-1, 1]."""
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def load(net: Net, path: Path | None, resolution: int = 256) -> Perceptual:
    return load_perceptual(net, path, "--weights FILE", "go on without", resolution)


@pytest.fixture(scope="module")
def networks(random_backbones: dict[Net, Path]) -> dict[Net, Perceptual]:
    return {net: load(net, path) for net, path in random_backbones.items()}


def of_the_package(net: Net, path: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """LPIPS as the package builds it; its call for torchvision's pretrained network is answered from the file."""
    with torch.device("meta"):
        features = (models.vgg16() if net == "vgg" else models.alexnet()).features
    state = {name.removeprefix("features."): v for name, v in torch.load(path, weights_only=True).items()}
    features.load_state_dict(state, assign=True)
    name = "vgg16" if net == "vgg" else "alexnet"
    monkeypatch.setattr(lpips.pretrained_networks.tv, name, lambda pretrained: SimpleNamespace(features=features))
    network: nn.Module = lpips.LPIPS(net=net, verbose=False)
    return network


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("side", [33, 64])
def test_lpips_is_the_packages(
    net: Net,
    side: int,
    networks: dict[Net, Perceptual],
    random_backbones: dict[Net, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, y = images(side), images(side, seed=1)
    distances = networks[net](x, y)
    assert distances.shape == (2,)
    assert float(distances.min()) > 0
    expected = of_the_package(net, random_backbones[net], monkeypatch)(x, y).flatten()
    assert torch.allclose(distances, expected, rtol=1e-6)
    assert torch.equal(networks[net](x, x), torch.zeros(2))
    assert torch.allclose(distances[1:], networks[net](x[1:], y[1:]), rtol=1e-4)


def test_the_published_files_are_torchvisions() -> None:
    assert models.VGG16_Weights.IMAGENET1K_V1.url == BACKBONES["vgg"].published.url
    assert models.AlexNet_Weights.IMAGENET1K_V1.url == BACKBONES["alex"].published.url


def test_inside_autocast_only_the_convolutions_are_bf16(networks: dict[Net, Perceptual]) -> None:
    x, y = torch.rand(2, 1, 3, 32, 32).mul(2).sub(1)
    exact = networks["vgg"](x, y)
    with torch.autocast("cpu", torch.bfloat16):
        low = networks["vgg"](x, y)
    assert low.dtype == torch.float32
    assert not torch.equal(low, exact)
    assert torch.allclose(low, exact, rtol=0.05)
    assert torch.equal(networks["vgg"](x, y), exact)


@pytest.mark.parametrize("net", NETS)
def test_gradients_reach_the_image_and_no_weight_of_the_network(net: Net, networks: dict[Net, Perceptual]) -> None:
    network, y = networks[net], images(seed=1).requires_grad_()
    state = {name: value.clone() for name, value in network.state_dict().items()}
    network.train()
    network(images(), y).mean().backward()
    assert y.grad is not None
    assert bool(torch.isfinite(y.grad).all())
    assert float(y.grad.abs().max()) > 0
    assert not any(module.training for module in network.modules())
    assert not any(p.requires_grad or p.grad is not None for p in network.parameters())
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_positions_without_any_feature_give_a_finite_gradient(
    random_backbones: dict[Net, Path], tmp_path: Path
) -> None:
    """There the norm that divides is 0, and the slope of its root infinite."""
    state = torch.load(random_backbones["vgg"], weights_only=True)
    state["features.28.bias"] -= 1e4
    torch.save(state, tmp_path / "dead.pth")
    y = images(16, 1, seed=1).requires_grad_()
    load("vgg", tmp_path / "dead.pth")(images(16, 1), y).sum().backward()
    assert y.grad is not None
    assert bool(torch.isfinite(y.grad).all())


@pytest.mark.parametrize("net", NETS)
def test_the_smallest_image_of_each_backbone(
    net: Net, networks: dict[Net, Perceptual], random_backbones: dict[Net, Path]
) -> None:
    side = BACKBONES[net].smallest
    assert bool((networks[net](images(side), images(side, seed=1)) > 0).all())
    with pytest.raises(RuntimeError, match="too small"):
        networks[net](images(side - 1), images(side - 1, seed=1))
    with pytest.raises(UsageError) as caught:
        load(net, random_backbones[net], side - 1)
    assert (caught.value.exit_code, "go on without" in caught.value.hint) == (2, True)


def test_loading_is_silent_and_draws_nothing(
    random_backbones: dict[Net, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """A draw from torch's generator would change the initial weights of the tokenizer."""
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load("vgg", random_backbones["vgg"])
    assert torch.equal(torch.get_rng_state(), state)
    assert capsys.readouterr() == ("", "")


def test_a_file_may_hold_the_classifier_too(
    random_backbones: dict[Net, Path], networks: dict[Net, Perceptual], tmp_path: Path
) -> None:
    state = torch.load(random_backbones["alex"], weights_only=True)
    torch.save({**state, "classifier.6.bias": torch.zeros(1000)}, tmp_path / "whole.pth")
    whole = load("alex", tmp_path / "whole.pth")
    assert torch.equal(whole(images(), images(seed=1)), networks["alex"](images(), images(seed=1)))
    assert whole.sha256 == files.sha256_file(tmp_path / "whole.pth") != networks["alex"].sha256


WRONG: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "features.8.bias": lambda state: {name: v for name, v in state.items() if name != "features.8.bias"},
    "net.slice4.8.bias": lambda state: {**state, "features.8.bias": torch.zeros(3)},
    "features.0.weight": lambda state: {"fc.weight": torch.zeros(3)},
    "dict": lambda state: [torch.zeros(3)],
    "pathlib": lambda state: {"features.0.bias": Path("x")},
}


@pytest.mark.parametrize("token", WRONG)
def test_another_layout_is_refused_by_name(token: str, random_backbones: dict[Net, Path], tmp_path: Path) -> None:
    path = tmp_path / "mine.pth"
    torch.save(WRONG[token](torch.load(random_backbones["alex"], weights_only=True)), path)
    with pytest.raises(CheckpointError) as caught:
        load("alex", path)
    assert "mine.pth" in caught.value.message
    assert token in caught.value.message
    assert (caught.value.exit_code, "\n" in caught.value.message) == (3, False)
    with pytest.raises(CheckpointError, match="vgg"):
        load("vgg", random_backbones["alex"])


# ---- LPIPS in the loss ---------------------------------------------------------------------------------------------


def test_the_loss_has_a_term_of_its_mean_with_its_factor(networks: dict[Net, Perceptual]) -> None:
    x, recon, quant = images(16), images(16, seed=1), torch.tensor(3.0)
    cfg = TokenizerLossConfig(perceptual="lpips", perceptual_factor=0.5)
    total, terms = TokenizerLoss(cfg, networks["vgg"])(x, recon, quant)
    assert float(terms["lpips"]) == pytest.approx(float(networks["vgg"](x, recon).mean()))
    plain, plain_terms = TokenizerLoss(TokenizerLossConfig())(x, recon, quant)
    assert set(terms) == {*plain_terms, "lpips"}
    assert float(total) == pytest.approx(float(plain) + 0.5 * float(terms["lpips"]))


TINY = [
    "autoencoder.width=8", "autoencoder.groups=4", "autoencoder.res_blocks=1", "quantizer.codes=16",
    "quantizer.steps=2", "train.batch=16", "train.steps=2", "train.log_every=1",
]  # fmt: skip


def train(out: Path, *overrides: str) -> int:
    return run(["train-tokenizer", "digits", "--recipe", "digits", "--out", str(out), "--json", *TINY, *overrides])


def test_a_tokenizer_trains_with_lpips_and_carries_none_of_it(
    random_backbones: dict[Net, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the run resumes with the same weights wherever they lie, but not with others."""
    out, moved, doubled = tmp_path / "with", tmp_path / "moved.pth", tmp_path / "doubled.pth"
    backbone = random_backbones["vgg"]
    assert train(out, "loss.perceptual=lpips", f"loss.perceptual_weights={backbone}") == 0
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert answer["lpips"] > 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        assert row["lpips"] > 0
        assert row["loss"] == pytest.approx(row["recon"] + 0.25 * row["quant"] + row["lpips"], rel=1e-5)
    assert train(tmp_path / "without") == 0
    with_, without = (checkpoint.load(tmp_path / name / "tokenizer.pt") for name in ("with", "without"))
    assert with_["weights"].keys() == without["weights"].keys()
    assert with_["config"] == without["config"]
    assert with_["digest"] != without["digest"], "the term does nothing"
    assert with_["provenance"]["perceptual"]["sha256"] == files.sha256_file(backbone)
    sizes = [sum(p.stat().st_size for p in (tmp_path / n / "checkpoints").iterdir()) for n in ("with", "without")]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)

    shutil.copy(backbone, moved)
    final = (out / "tokenizer.pt").read_bytes()
    assert train(out, "loss.perceptual=lpips", f"loss.perceptual_weights={moved}") == 0
    assert (out / "tokenizer.pt").read_bytes() == final
    torch.save({name: 2 * v for name, v in torch.load(moved, weights_only=True).items()}, doubled)
    capsys.readouterr()
    assert train(out, "loss.perceptual=lpips", f"loss.perceptual_weights={doubled}") == 2
    assert "perceptual.sha256" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "code", "token"),
    [
        ([], 3, "vgg16-397923af.pth"),
        (["loss.perceptual_weights=no-such.pth"], 3, "no-such.pth"),
        (["autoencoder.resolution=8"], 2, "loss.perceptual=none"),
        (["loss.perceptual=vgg"], 2, "loss.perceptual"),
    ],
)
def test_a_run_that_cannot_have_lpips_claims_no_folder(
    overrides: list[str], code: int, token: str, no_weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(no_weights / "run", "loss.perceptual=lpips", *overrides) == code
    assert token in capsys.readouterr().err
    assert not (no_weights / "run").exists()

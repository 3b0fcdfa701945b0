"""The tokenizer's loss: hinge terms, VQGAN's adaptive weight, the gradients of the whole, and LPIPS."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import lpips
import pytest
import torch
import torch.nn.functional as F
from helpers import CPU, digits, distance, tiny_config, tiny_players
from torch import Tensor, nn

from rdpm_cli import checkpoint, files
from rdpm_cli.cli.app import run
from rdpm_cli.data.pixels import to_model
from rdpm_cli.distributed import TrainStep
from rdpm_cli.errors import CheckpointError, UsageError
from rdpm_cli.tokenizer import losses
from rdpm_cli.tokenizer.config import TokenizerConfig
from rdpm_cli.tokenizer.losses import BACKBONES, Net, Perceptual, load_perceptual
from rdpm_cli.tokenizer.networks import PatchDiscriminator
from rdpm_cli.tokenizer.training import TokenizerTask

NETS: tuple[Net, ...] = ("alex", "vgg")
HALVES = [range(16), range(16, 32)]


def test_the_hinges_worked_out_by_hand() -> None:
    """0.5 ((0 + 0.5 + 3) / 3 + (0 + 1.25) / 2): logits beyond ±1 on the right side cost nothing; in fp32."""
    real, fake = torch.tensor([2.0, 0.5, -2.0]).bfloat16(), torch.tensor([-3.0, 0.25]).bfloat16()
    assert float(losses.discriminator_hinge(real, fake)) == pytest.approx(0.5 * (3.5 / 3 + 1.25 / 2))
    assert float(losses.generator_hinge(fake)) == pytest.approx(2.75 / 2)
    logits = torch.linspace(-1, 1, 1001).bfloat16()
    assert float(losses.generator_hinge(logits)) == pytest.approx(-float(logits.double().mean()), abs=1e-6)


def test_the_adaptive_weight_is_the_ratio_of_norms_clamped() -> None:
    three, four = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 4.0]])
    assert float(losses.adaptive_weight(three, four)) == pytest.approx(3 / 4.0001)
    assert float(losses.adaptive_weight(three, 0 * four)) == 1e4  # 3 / 1e-4, clamped
    assert float(losses.adaptive_weight(0 * three, four)) == 0


def pair(cfg: TokenizerConfig) -> tuple[TokenizerTask, PatchDiscriminator]:
    """The task, and its critic made less indifferent than at its start."""
    task = tiny_players(cfg)[0]
    assert isinstance(task, TokenizerTask)
    assert isinstance(task.critic, PatchDiscriminator)
    with torch.no_grad():
        for parameter in task.critic.parameters():
            parameter.mul_(3)
    return task, task.critic


def step_of(rows: range = range(16)) -> TrainStep:
    return TrainStep(0, 0, rows, rows.stop, CPU)


class TinyPerceptual(nn.Module):
    """(x, x') -> a distance (B,), in the place of LPIPS."""

    def forward(self, x: Tensor, recon: Tensor) -> Tensor:
        return (torch.tanh(3 * x) - torch.tanh(3 * recon)).pow(2).mean((1, 2, 3))


def plain_terms(task: TokenizerTask, critic: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """perceived, gan and quant of one batch in one plain graph, and VQGAN's calculate_adaptive_weight."""
    x = to_model(pixels)
    recon, chain = task.model(x, step_of().normal(task.model.cfg.quantizer.steps, *task.model.latent_shape))
    perceived, gan = F.mse_loss(recon, x), -critic(recon).mean()
    if task.perceptual is not None:
        perceived = perceived + task.cfg.loss.perceptual_factor * task.perceptual(x, recon).mean()
    last = task.model.decoder.conv_out.weight
    norms = [torch.autograd.grad(term, last, retain_graph=True)[0].norm() for term in (perceived, gan)]
    return perceived, gan, chain.loss, (norms[0] / (norms[1] + 1e-4)).clamp(0.0, 1e4).detach()


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
@pytest.mark.parametrize("perceptual", [False, True])
@pytest.mark.parametrize("adaptive", [False, True])
def test_every_gradient_is_that_of_the_plain_sum(adaptive: bool, perceptual: bool, codebook: str) -> None:
    """perceived + 0.75 w gan + 0.25 quant with w detached, in one graph and one backward pass."""
    cfg = tiny_config(loss={"adaptive": adaptive, "perceptual_factor": 0.5}, quantizer={"codebook": codebook})
    task, critic = pair(cfg)
    task.perceptual = TinyPerceptual() if perceptual else None
    pixels = digits(cfg).batch_at(0, range(16))
    loss, logs = task.loss(pixels, step_of())
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in task.model.named_parameters() if p.grad is not None}
    task.model.zero_grad()
    perceived, gan, quant, weight = plain_terms(task, critic, pixels)
    weight = weight if adaptive else torch.tensor(1.0)
    total = perceived + 0.75 * weight * gan + 0.25 * quant
    total.backward()
    assert float(loss.detach()) == pytest.approx(float(total.detach()), rel=1e-6)
    assert float(logs["gan_weight"]) == pytest.approx(float(weight), rel=1e-5)
    assert float(logs["gan"]) == pytest.approx(float(gan.detach()), rel=1e-5)
    assert not logs["gan_weight"].requires_grad
    assert gradients.keys() == {name for name, _ in task.model.named_parameters()}
    for name, parameter in task.model.named_parameters():
        assert parameter.grad is not None
        assert distance(gradients[name], parameter.grad) < 1e-5, name  # the rounding of fp32


@pytest.mark.parametrize("option", ["quant", "perceptual_factor", "adversarial_factor"])
def test_each_factor_scales_its_term(option: str) -> None:
    totals = set()
    for factor in (0.0, 0.5, 1.0):
        cfg = tiny_config(loss={option: factor})
        task, _ = pair(cfg)
        task.perceptual = TinyPerceptual()
        loss, logs = task.loss(digits(cfg).batch_at(0, range(16)), step_of())
        expected = logs["recon"] + cfg.loss.quant * logs["quant"] + cfg.loss.perceptual_factor * logs["lpips"]
        expected = expected + cfg.loss.adversarial_factor * logs["gan_weight"] * logs["gan"]
        assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-6)
        totals.add(float(loss.detach()))
    assert len(totals) == 3


def micro_batches(task: TokenizerTask, rows: list[range], step: int = 0) -> list[dict[str, float]]:
    """Accumulate the gradients of a step of 32 images. -> the logs of each micro-batch."""
    pixels, logs = digits(task.cfg).batch_at(0, range(32)), []
    task.model.zero_grad()
    for micro in rows:
        loss, terms = task.loss(pixels[micro.start : micro.stop], TrainStep(0, step, micro, 32, CPU))
        (loss * len(micro) / 32).backward()
        logs.append({name: float(value) for name, value in terms.items()})
    return logs


def test_with_micro_batches_the_weight_is_the_whole_batchs_a_step_later() -> None:
    still = {"codebook": "gradient"}  # a step moves no code
    whole, _ = pair(tiny_config(train={"batch": 32}, quantizer=still))
    (at_once,) = micro_batches(whole, [range(32)])
    halves, _ = pair(tiny_config(train={"batch": 32, "micro_batch": 16}, quantizer=still))
    assert [logs["gan_weight"] for logs in micro_batches(halves, HALVES)] == [0, 0]
    halves.after_step(TrainStep(0, 0, range(32), 32, CPU))
    several = micro_batches(halves, HALVES)
    assert several[0]["gan_weight"] == several[1]["gan_weight"]
    for name in ("recon", "quant", "gan", "gan_weight"):
        assert sum(logs[name] for logs in several) / 2 == pytest.approx(at_once[name], rel=1e-4), name
    for (name, half), (_, one) in zip(halves.model.named_parameters(), whole.model.named_parameters(), strict=True):
        torch.testing.assert_close(half.grad, one.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_a_step_that_was_passed_over_does_not_touch_the_weight() -> None:
    weights = []
    for passed_over in (True, False):
        task, critic = pair(tiny_config(train={"batch": 32, "micro_batch": 16}))
        if passed_over:  # a first half without its second
            task.loss(1000 * digits(task.cfg).batch_at(0, range(16)).float(), TrainStep(0, 0, range(16), 32, CPU))
        micro_batches(task, HALVES, step=1)
        task.after_step(TrainStep(0, 1, range(32), 32, CPU))
        weights.append(float(critic.gan_weight))
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
    inner = dict(task.model.named_parameters())["decoder.mid.block_1.conv1.weight"].grad
    assert inner is not None
    assert torch.equal(inner, inner.bfloat16().float())  # the convolutions before it do run in bf16


def images(side: int = 33, count: int = 2, seed: int = 0) -> Tensor:
    """(count, 3, side, side) in [-1, 1]."""
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def load(net: Net, path: Path | None, resolution: int = 256) -> Perceptual:
    return load_perceptual(net, path, "--weights FILE", "go on without", resolution)


@pytest.fixture(scope="module")
def networks(random_backbones: dict[Net, Path]) -> dict[Net, Perceptual]:
    return {net: load(net, path) for net, path in random_backbones.items()}


@pytest.mark.filterwarnings("ignore::UserWarning")  # torchvision's, about the package's arguments
@pytest.mark.parametrize("net", NETS)
def test_lpips_is_the_packages(net: Net, networks: dict[Net, Perceptual], random_backbones: dict[Net, Path]) -> None:
    """And its gradient reaches the image, but no weight."""
    network, package = networks[net], lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    state = torch.load(random_backbones[net], weights_only=True)
    names = package.net.state_dict()
    package.net.load_state_dict({name: state[f"features.{name.partition('.')[2]}"] for name in names})
    for side in (33, 64):
        x, y, z = images(side), images(side, seed=1).requires_grad_(), images(side, seed=1).requires_grad_()
        distances, expected = network(x, y), package(x, z).flatten()
        assert torch.allclose(distances, expected, rtol=1e-6)
        assert float(distances.min()) > 0 == float(network(x, x).abs().max())
        distances.sum().backward()
        expected.sum().backward()
        assert y.grad is not None
        assert z.grad is not None
        assert distance(y.grad, z.grad) < 1e-5
    assert not any(p.requires_grad or p.grad is not None for p in network.parameters())


def test_inside_autocast_only_the_convolutions_are_bf16(networks: dict[Net, Perceptual]) -> None:
    x, y = torch.rand(2, 1, 3, 32, 32).mul(2).sub(1)
    exact = networks["vgg"](x, y)
    with torch.autocast("cpu", torch.bfloat16):
        low = networks["vgg"](x, y)
    assert low.dtype == torch.float32
    assert not torch.equal(low, exact)
    assert torch.allclose(low, exact, rtol=0.05)
    assert torch.equal(networks["vgg"](x, y), exact)


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
def test_the_smallest_image_of_each_backbone(net: Net, networks: dict[Net, Perceptual]) -> None:
    side = BACKBONES[net].smallest
    assert bool((networks[net](images(side), images(side, seed=1)) > 0).all())
    with pytest.raises(RuntimeError):
        networks[net](images(side - 1), images(side - 1, seed=1))
    with pytest.raises(UsageError) as caught:
        load(net, None, side - 1)
    assert (caught.value.exit_code, "go on without" in caught.value.hint) == (2, True)


def test_loading_is_silent_draws_nothing_and_passes_over_the_classifier(
    random_backbones: dict[Net, Path], networks: dict[Net, Perceptual], tmp_path: Path
) -> None:
    """A draw from torch's generator would change the initial weights of the tokenizer."""
    content, state = torch.load(random_backbones["alex"], weights_only=True), torch.get_rng_state()
    torch.save({**content, "classifier.6.bias": torch.zeros(1000)}, tmp_path / "whole.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = load("alex", tmp_path / "whole.pth")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(whole(images(), images(seed=1)), networks["alex"](images(), images(seed=1)))


def test_names_with_the_segments_of_wrappers_are_those_without(
    random_backbones: dict[Net, Path], networks: dict[Net, Perceptual], tmp_path: Path
) -> None:
    content = torch.load(random_backbones["alex"], weights_only=True)
    torch.save({"model": {f"module.{name}": value for name, value in content.items()}}, tmp_path / "ddp.pth")
    wrapped = load("alex", tmp_path / "ddp.pth")
    assert torch.equal(wrapped(images(), images(seed=1)), networks["alex"](images(), images(seed=1)))


WRONG: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "features.8.bias": lambda state: {name: v for name, v in state.items() if name != "features.8.bias"},
    "slice4.8.bias": lambda state: {**state, "features.8.bias": torch.zeros(3)},
    "features.0.weight": lambda state: {"fc.weight": torch.zeros(3)},
    "dict": lambda state: [torch.zeros(3)],
}


@pytest.mark.parametrize("token", WRONG)
def test_another_layout_is_refused_by_name(token: str, random_backbones: dict[Net, Path], tmp_path: Path) -> None:
    path = tmp_path / "mine.pth"
    torch.save(WRONG[token](torch.load(random_backbones["alex"], weights_only=True)), path)
    with pytest.raises(CheckpointError) as caught:
        load("alex", path)
    assert "mine.pth" in caught.value.message
    assert token in caught.value.message
    with pytest.raises(CheckpointError, match="vgg"):
        load("vgg", random_backbones["alex"])


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
    capsys.readouterr()
    for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()):
        assert row["lpips"] > 0
        assert row["loss"] == pytest.approx(row["recon"] + 0.25 * row["quant"] + row["lpips"], rel=1e-5)
    assert train(tmp_path / "without") == 0
    with_, without = (checkpoint.load(tmp_path / name / "tokenizer.pt") for name in ("with", "without"))
    assert with_["weights"].keys() == without["weights"].keys()
    assert with_["digest"] != without["digest"], "the term does nothing"
    assert with_["provenance"]["perceptual"]["sha256"] == files.sha256_file(backbone)

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

"""Published weight files and where they are looked for; LPIPS against the `lpips` package; the loss it becomes."""

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rdpm_cli import files, modelfile, weights
from rdpm_cli.cli.app import run
from rdpm_cli.config import TokenizerLossConfig
from rdpm_cli.errors import AbsentWeightsError, CheckpointError, UsageError
from rdpm_cli.threads import one_thread
from rdpm_cli.tokenizer import perceptual
from rdpm_cli.tokenizer.losses import TokenizerLoss
from rdpm_cli.tokenizer.perceptual import Net, Perceptual

NETS: tuple[Net, ...] = ("alex", "vgg")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def images(side: int = 33, count: int = 2, seed: int = 0) -> Tensor:
    """(count, 3, side, side) in [-1, 1]."""
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def load(net: Net, given: Path | None, resolution: int = 256) -> Perceptual:
    return perceptual.load(net, given, "--weights FILE", "go on without", resolution)


@pytest.fixture(scope="module")
def networks(random_backbones: dict[Net, Path]) -> dict[Net, Perceptual]:
    return {net: load(net, path) for net, path in random_backbones.items()}


# ---- where weights are looked for ----------------------------------------------------------------------------------


def published(content: bytes) -> weights.Published:
    """What would be published with this content."""
    return weights.Published(f"net-{hashlib.sha256(content).hexdigest()[:8]}.pth", "https://example.org/net.pth")


def test_a_file_is_found_in_the_environments_folder_then_in_torch_hubs(no_weights: Path) -> None:
    what = published(b"weights")
    hub = no_weights / "torch" / "hub" / "checkpoints" / what.file
    hub.parent.mkdir(parents=True)
    for place in (hub, no_weights / "weights" / what.file):
        place.write_bytes(b"weights")
        found = weights.find(what, None, "--weights FILE")
        assert found == weights.Found(place, files.sha256_file(place), published=True)


@pytest.mark.parametrize("net", NETS)
def test_absent_weights_name_file_places_and_where_they_are_published(net: Net, no_weights: Path) -> None:
    file, url = perceptual.BACKBONES[net].published.file, perceptual.BACKBONES[net].published.url
    assert url.endswith(f"/{file}")
    with pytest.raises(AbsentWeightsError, match=f"{file} are not here") as caught:
        load(net, None)
    assert caught.value.exit_code == 3
    for place in (no_weights / "weights" / file, no_weights / "torch" / "hub" / "checkpoints" / file):
        assert str(place) in caught.value.message
        assert str(place) in caught.value.reason
    for way in (url, "$RDPM_WEIGHTS", "--weights FILE", "go on without"):
        assert way in caught.value.hint


def test_a_found_file_must_be_the_published_one_a_named_one_need_not(no_weights: Path) -> None:
    what = published(b"weights")
    spoiled = no_weights / "weights" / what.file
    spoiled.write_bytes(b"weighty")
    with pytest.raises(CheckpointError, match=f"{what.file} is damaged or another file") as caught:
        weights.find(what, None, "--weights FILE")
    assert (caught.value.exit_code, isinstance(caught.value, AbsentWeightsError)) == (3, False)
    assert weights.find(what, spoiled, "") == weights.Found(spoiled, files.sha256_file(spoiled), published=False)


def test_a_named_file_that_is_absent_is_not_replaced_by_another(no_weights: Path) -> None:
    what = published(b"weights")
    (no_weights / "weights" / what.file).write_bytes(b"weights")
    with pytest.raises(CheckpointError, match=r"mine\.pth does not exist"):
        weights.find(what, no_weights / "mine.pth", "--weights FILE")


def test_the_files_are_torchvisions() -> None:
    from torchvision import models

    assert models.VGG16_Weights.IMAGENET1K_V1.url == perceptual.BACKBONES["vgg"].published.url
    assert models.AlexNet_Weights.IMAGENET1K_V1.url == perceptual.BACKBONES["alex"].published.url


# ---- LPIPS ---------------------------------------------------------------------------------------------------------


def of_the_package(net: Net, path: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """LPIPS as the package builds it; its call for torchvision's pretrained network is answered from the file."""
    import lpips
    from torchvision import models

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
    found = networks[net](x, y)
    assert found.shape == (2,)
    assert float(found.min()) > 0
    wanted = of_the_package(net, random_backbones[net], monkeypatch)(x, y).flatten()
    assert torch.allclose(found, wanted, rtol=1e-6)
    assert torch.equal(networks[net](x, x), torch.zeros(2))
    assert torch.allclose(found[1:], networks[net](x[1:], y[1:]), rtol=1e-4)


@pytest.mark.parametrize("net", NETS)
def test_every_weight_of_the_backbone_counts(net: Net, random_backbones: dict[Net, Path]) -> None:
    state = torch.load(random_backbones[net], weights_only=True)
    loaded = load(net, random_backbones[net]).network.state_dict()
    backbone = {n.removeprefix("net.layers."): value for n, value in loaded.items() if n.startswith("net.")}
    assert len(backbone) == len(state)
    for name, value in backbone.items():
        assert torch.equal(value, state[f"features.{name.split('.', 1)[1]}"])


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
def test_gradient_reaches_the_image_and_nothing_of_the_network(net: Net, networks: dict[Net, Perceptual]) -> None:
    network, y = networks[net], images(seed=1).requires_grad_()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network.train()
    network(images(), y).mean().backward()
    assert y.grad is not None
    assert bool(torch.isfinite(y.grad).all())
    assert float(y.grad.abs().max()) > 0
    assert not any(module.training for module in network.modules())
    assert not any(p.requires_grad or p.grad is not None for p in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_the_gradient_is_the_slope(networks: dict[Net, Perceptual]) -> None:
    network = networks["vgg"]
    x, y = images(16, 1), images(16, 1, seed=1).requires_grad_()
    network(x, y).sum().backward()
    assert y.grad is not None
    direction = y.grad / y.grad.norm()
    ahead, behind = (float(network(x, y.detach() + step * direction)) for step in (5e-3, -5e-3))
    assert (ahead - behind) / 1e-2 == pytest.approx(float(y.grad.norm()), rel=0.02)


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
def test_the_smallest_image_is_the_smallest(
    net: Net, networks: dict[Net, Perceptual], random_backbones: dict[Net, Path]
) -> None:
    side = perceptual.BACKBONES[net].smallest
    assert bool((networks[net](images(side), images(side, seed=1)) > 0).all())
    with pytest.raises(RuntimeError, match="too small"):
        networks[net](images(side - 1), images(side - 1, seed=1))
    with pytest.raises(UsageError, match=f"at least {side} pixels a side, not {side - 1}") as caught:
        load(net, random_backbones[net], side - 1)
    assert (caught.value.exit_code, "go on without" in caught.value.hint) == (2, True)


def test_loading_is_silent_and_draws_nothing(
    random_backbones: dict[Net, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    before = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load("vgg", random_backbones["vgg"])
    assert torch.equal(torch.get_rng_state(), before)
    assert capsys.readouterr() == ("", "")


def test_a_file_may_hold_the_classifier_too(
    random_backbones: dict[Net, Path], networks: dict[Net, Perceptual], tmp_path: Path
) -> None:
    state = torch.load(random_backbones["alex"], weights_only=True)
    torch.save({**state, "classifier.6.bias": torch.zeros(1000)}, tmp_path / "whole.pth")
    whole = load("alex", tmp_path / "whole.pth")
    assert torch.equal(whole(images(), images(seed=1)), networks["alex"](images(), images(seed=1)))
    assert whole.sha256 == files.sha256_file(tmp_path / "whole.pth") != networks["alex"].sha256


def without(state: dict[str, Tensor]) -> object:
    return {name: value for name, value in state.items() if name != "features.8.bias"}


WRONG: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "a weight less": (without, "lacks 'features.8.bias'"),
    "a weight more": (lambda state: {**state, "features.30.bias": torch.zeros(3)}, "foreign 'features.30.bias'"),
    "another shape": (lambda state: {**state, "features.8.bias": torch.zeros(3)}, "size mismatch"),
    "no features": (lambda state: {"fc.weight": torch.zeros(3)}, "lacks 'features.0.bias'|foreign 'fc.weight'"),
    "no tensors": (lambda state: {"features.0.bias": 3}, "no dict of tensors"),
    "no dict": (lambda state: [torch.zeros(3)], "no dict of tensors"),
    "code": (lambda state: {"features.0.bias": Path("x")}, "it names pathlib"),
}


@pytest.mark.parametrize("what", WRONG)
def test_another_layout_is_refused_by_name(what: str, random_backbones: dict[Net, Path], tmp_path: Path) -> None:
    change, message = WRONG[what]
    path = tmp_path / "mine.pth"
    torch.save(change(torch.load(random_backbones["alex"], weights_only=True)), path)
    with pytest.raises(CheckpointError, match=rf"mine\.pth does not hold alex weights: .*({message})") as caught:
        load("alex", path)
    assert (caught.value.exit_code, "\n" in caught.value.message) == (3, False)


def test_one_networks_weights_are_not_anothers(random_backbones: dict[Net, Path]) -> None:
    with pytest.raises(CheckpointError, match="does not hold vgg weights"):
        load("vgg", random_backbones["alex"])


# ---- the loss ------------------------------------------------------------------------------------------------------


def test_the_loss_has_a_term_of_its_mean_with_its_factor(networks: dict[Net, Perceptual]) -> None:
    x, recon, quant = images(16), images(16, seed=1), torch.tensor(3.0)
    cfg = TokenizerLossConfig(perceptual="lpips", perceptual_factor=0.5)
    total, terms = TokenizerLoss(cfg, networks["vgg"])(x, recon, quant)
    assert float(terms["lpips"]) == pytest.approx(float(networks["vgg"](x, recon).mean()))
    plain, others = TokenizerLoss(TokenizerLossConfig())(x, recon, quant)
    assert set(terms) == {*others, "lpips"}
    assert float(total) == pytest.approx(float(plain) + 0.5 * float(terms["lpips"]))


TINY = [
    "autoencoder.width=8", "autoencoder.groups=4", "autoencoder.res_blocks=1", "quantizer.codes=16",
    "quantizer.steps=2", "train.batch=16", "train.steps=2", "train.log_every=1",
]  # fmt: skip


def train(out: Path, *overrides: str) -> int:
    return run(["train-tokenizer", "digits", "--recipe", "digits", "--out", str(out), "--json", *TINY, *overrides])


def test_a_tokenizer_trains_with_it_and_carries_none_of_it(
    random_backbones: dict[Net, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, backbone = tmp_path / "with", random_backbones["vgg"]
    assert train(out, "loss.perceptual=lpips", f"loss.perceptual_weights={backbone}") == 0
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert answer["lpips"] > 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(row["lpips"] > 0 for row in rows)
    for row in rows:
        assert row["loss"] == pytest.approx(row["recon"] + 0.25 * row["quant"] + row["lpips"], rel=1e-5)
    assert train(tmp_path / "without") == 0
    ours, plain = (modelfile.load(tmp_path / name / "tokenizer.pt") for name in ("with", "without"))
    assert ours["weights"].keys() == plain["weights"].keys()
    assert ours["config"] == plain["config"]
    assert ours["digest"] != plain["digest"], "the term does nothing"
    assert ours["provenance"]["perceptual"]["sha256"] == files.sha256_file(backbone)
    sizes = [sum(p.stat().st_size for p in (tmp_path / n / "checkpoints").iterdir()) for n in ("with", "without")]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)


def test_a_run_goes_on_with_the_same_weights_wherever_they_lie(
    random_backbones: dict[Net, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, moved, other = tmp_path / "run", tmp_path / "moved.pth", tmp_path / "other.pth"
    assert train(out, "loss.perceptual=lpips", f"loss.perceptual_weights={random_backbones['vgg']}") == 0
    shutil.copy(random_backbones["vgg"], moved)
    assert train(out, "loss.perceptual=lpips", f"loss.perceptual_weights={moved}") == 0
    assert "finished already" in capsys.readouterr().err
    torch.save({name: 2 * v for name, v in torch.load(moved, weights_only=True).items()}, other)
    assert train(out, "loss.perceptual=lpips", f"loss.perceptual_weights={other}") == 2
    assert "perceptual.sha256" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "code", "error", "hint"),
    [
        ([], 3, "vgg16-397923af.pth are not here", "loss.perceptual=none"),
        (["loss.perceptual_weights=no-such.pth"], 3, "no-such.pth", "/models/vgg16-397923af.pth"),
        (["autoencoder.resolution=8"], 2, "at least 16 pixels a side, not 8", "loss.perceptual=none"),
        (["loss.perceptual=vgg"], 2, "loss.perceptual", "lpips"),
    ],
)
def test_what_the_term_lacks_is_said_before_the_run_begins(
    overrides: list[str], code: int, error: str, hint: str, no_weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = no_weights / "run"
    assert train(out, "loss.perceptual=lpips", *overrides) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert error in lines[0]
    assert hint in lines[0] + lines[1]
    assert not out.exists()


def test_a_spoiled_file_in_the_folder_stops_the_run(no_weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (no_weights / "weights" / "vgg16-397923af.pth").write_bytes(b"half a download")
    assert train(no_weights / "run", "loss.perceptual=lpips") == 3
    assert "damaged or another file" in capsys.readouterr().err
    assert not (no_weights / "run").exists()

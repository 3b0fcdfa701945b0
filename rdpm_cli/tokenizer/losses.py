"""Terms of the tokenizer's loss (arXiv 2412.18390 Eq. 5): VQGAN's hinge losses and their weight w (arXiv 2012.09841
§3.1), least squares and feature matching, as CLaM-TTS has them (arXiv 2404.02781), and LPIPS (Zhang et al. 2018,
version 0.1), a distance of two images in the features of a frozen classifier."""

import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdpm_cli import checkpoint
from rdpm_cli.distributed import full_precision
from rdpm_cli.errors import UsageError
from rdpm_cli.tokenizer.config import TokenizerConfig

Net = Literal["alex", "vgg"]


def generator_hinge(fake_logits: Tensor) -> Tensor:
    """L_gan for the tokenizer: -mean D(x')."""
    return -fake_logits.float().mean()


def discriminator_hinge(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """0.5 (mean max(0, 1 - D(x)) + mean max(0, 1 + D(x')))."""
    return 0.5 * (F.relu(1 - real_logits.float()).mean() + F.relu(1 + fake_logits.float()).mean())


def generator_squares(fake_logits: Tensor) -> Tensor:
    """L_gan of LSGAN (arXiv 1611.04076) for the tokenizer: mean (1 - D(x'))²."""
    return (1 - fake_logits.float()).square().mean()


def discriminator_squares(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """0.5 (mean (1 - D(x))² + mean D(x')²)."""
    return 0.5 * ((1 - real_logits.float()).square().mean() + fake_logits.float().square().mean())


Judgement = list[list[Tensor]]  # of each critic: feature maps, and logits as the last
GENERATOR: dict[str, Callable[[Tensor], Tensor]] = {"hinge": generator_hinge, "least_squares": generator_squares}
DISCRIMINATOR: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "hinge": discriminator_hinge, "least_squares": discriminator_squares,
}  # fmt: skip


def mean_of(terms: Sequence[Tensor]) -> Tensor:
    """The mean of scalars."""
    return torch.stack(list(terms)).mean()


def feature_distance(real: Judgement, fake: Judgement) -> Tensor:
    """L_fm: the mean absolute difference of feature maps, a mean over critics and layers (HiFi-GAN has the sum).

    Gradients reach `fake` only."""
    critics = zip(real, fake, strict=True)
    maps = [pair for a, b in critics for pair in zip(a[:-1], b[:-1], strict=True)]
    return mean_of([F.l1_loss(b.float(), a.detach().float()) for a, b in maps])


def adaptive_weight(recon_gradient: Tensor, gan_gradient: Tensor) -> Tensor:
    """w = |grad L_rec| / (|grad L_gan| + 1e-4) at the decoder's last layer, clamped to [0, 1e4], as VQGAN. Scalar."""
    return (recon_gradient.norm() / (gan_gradient.norm() + 1e-4)).clamp(0, 1e4)


class Backbone(NamedTuple):
    """A classifier that LPIPS has heads for. smallest: pixels a side; below, its last stage has no position left."""

    published: checkpoint.Published
    smallest: int


URL, ALEX, VGG = "https://download.pytorch.org/models", "alexnet-owt-7be5be79.pth", "vgg16-397923af.pth"
BACKBONES: dict[Net, Backbone] = {
    "alex": Backbone(checkpoint.Published(ALEX, f"{URL}/{ALEX}"), 31),
    "vgg": Backbone(checkpoint.Published(VGG, f"{URL}/{VGG}"), 16),
}


class Trunk(nn.Module):
    """The backbone's convolutions, in bf16 where `low` is set; features come out in fp32."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers, self.low = layers, False

    def forward(self, x_BCHW: Tensor) -> list[Tensor]:
        """Features after each of the five stages."""
        with torch.autocast(x_BCHW.device.type, torch.bfloat16, enabled=self.low):
            return [features.float() for features in self.layers(x_BCHW)]


class Perceptual(nn.Module):
    """LPIPS with one backbone, frozen: the network and the heads of the `lpips` package.

    Distances are fp32 also inside autocast; only the backbone follows it, which costs 120 GFLOP per image of 256²."""

    def __init__(self, net: Net, sha256: str = "", note: str = "") -> None:
        """With random weights, enough to count what a step costs. sha256: of the file of the backbone's weights."""
        import lpips  # seconds: it imports all of torchvision's models

        super().__init__()
        self.name, self.sha256, self.note = f"lpips {version('lpips')} {net}", sha256, note
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torchvision's, of an argument that lpips 0.1.4 still passes
            network: nn.Module = lpips.LPIPS(net=net, pretrained=False, pnet_rand=True, verbose=False)
        self.network, self.trunk = network.eval().requires_grad_(False), Trunk(network.get_submodule("net"))
        self.network.add_module("net", self.trunk)

    def record(self) -> dict[str, str]:
        """The setting of a run that binds it to these weights, wherever they lie."""
        return {"name": self.name, "sha256": self.sha256}

    def train(self, mode: bool = True) -> "Perceptual":
        """Stays in evaluation mode, because the heads contain dropout."""
        return super().train(False)

    def forward(self, x_BCHW: Tensor, y_BCHW: Tensor) -> Tensor:
        """Distances (B,) of images in [-1, 1]; gradients reach the images."""
        self.trunk.low = torch.is_autocast_enabled(x_BCHW.device.type)
        with full_precision(x_BCHW):
            distances: Tensor = self.network(x_BCHW.float(), y_BCHW.float())
        return distances.flatten()


def open_perceptual(cfg: TokenizerConfig) -> Perceptual | None:
    """The perceptual network of a recipe; None if it has none. Raises as `load_perceptual`."""
    if cfg.loss.perceptual == "none":
        return None
    path = Path(cfg.loss.perceptual_weights) if cfg.loss.perceptual_weights else None
    option, without = "loss.perceptual_weights=FILE", "go on without it by loss.perceptual=none"
    return load_perceptual("vgg", path, option, without, cfg.autoencoder.resolution)


def load_perceptual(net: Net, path: Path | None, option: str, without: str, resolution: int) -> Perceptual:
    """LPIPS on the CPU, with the weights in `path` or those that are looked up; nothing is fetched.

    option: how to name another weight file; without: how to go on without LPIPS. Raises UsageError where images of
    this resolution are too small, AbsentWeightsError and CheckpointError."""
    import lpips

    published, smallest = BACKBONES[net]
    if resolution < smallest:
        message = f"LPIPS ({net}) needs images of at least {smallest} pixels a side, not {resolution}"
        raise UsageError(message, f"use larger images, or {without}")
    file = checkpoint.find_weights(published, path, f"{option} (or {without})")
    hint = checkpoint.weights_hint(published, f"{option} (or {without})")
    note = "" if file.published else f"LPIPS: the weights in {file.path} are not the published ones"
    content = checkpoint.read_weights(file.path, net, "features.0.weight", hint)
    heads = checkpoint.read_tensors(Path(lpips.__file__).parent / "weights" / "v0.1" / f"{net}.pth")
    with torch.device("meta"):  # otherwise it would draw 138M initial values from torch's generator
        perceptual = Perceptual(net, file.sha256, note)
    # The package registers each head twice, as `lin0` and as `lins.0`.
    state = heads | {name.replace("lin", "lins.", 1): value for name, value in heads.items()}
    state |= {f"scaling_layer.{name}": value for name, value in lpips.ScalingLayer().state_dict().items()}
    try:
        for name in perceptual.network.state_dict():
            if name.startswith("net.layers."):  # net.layers.slice2.5.bias is features.5.bias in torchvision's file
                state[name] = content[f"features.{name.split('.', 3)[3]}"].float()
        perceptual.network.load_state_dict(state, assign=True)
    except (KeyError, RuntimeError) as error:
        raise checkpoint.misfit(file.path, net, hint, error) from error
    return perceptual

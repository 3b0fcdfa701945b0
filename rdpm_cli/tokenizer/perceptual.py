"""LPIPS (Zhang et al. 2018, version 0.1): the distance of two images in the features of a frozen classifier.

Network and linear heads are the `lpips` package's; the backbone's weights are torchvision's and are looked up, never
fetched. Part of no checkpoint.
"""

import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torchvision.models import AlexNet_Weights, VGG16_Weights, WeightsEnum

from rdpm_cli import precision, weights
from rdpm_cli.errors import UsageError

Net = Literal["alex", "vgg"]


@dataclass(frozen=True)
class Backbone:
    """A classifier that LPIPS has heads for. smallest: pixels a side; below, its last layer has no position left."""

    published: weights.Published
    smallest: int


def _published(found: WeightsEnum) -> weights.Published:
    """torchvision's own entry: where the file is, and so its name."""
    return weights.Published(str(found.url).rpartition("/")[2], str(found.url))


BACKBONES: dict[Net, Backbone] = {
    "alex": Backbone(_published(AlexNet_Weights.IMAGENET1K_V1), 31),
    "vgg": Backbone(_published(VGG16_Weights.IMAGENET1K_V1), 16),
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
    """LPIPS with one backbone: frozen, always in evaluation mode.

    Distances are fp32 also inside autocast, where only the convolutions follow it: they cost 120 GF an image of 256².
    """

    def __init__(self, net: Net, network: nn.Module, sha256: str = "", note: str = "") -> None:
        """network: the package's, filled. sha256: of its backbone's weights."""
        super().__init__()
        self.sha256, self.note = sha256, note
        self.name = f"lpips {version('lpips')} {net}"
        self.network = network.eval().requires_grad_(False)
        self.trunk = Trunk(self.network.get_submodule("net"))
        self.network.add_module("net", self.trunk)

    def train(self, mode: bool = True) -> "Perceptual":
        """Stays in evaluation mode: the heads hold dropout."""
        return super().train(False)

    def forward(self, x_BCHW: Tensor, y_BCHW: Tensor) -> Tensor:
        """Distances (B,) of images in [-1, 1]; gradients reach the images."""
        self.trunk.low = torch.is_autocast_enabled(x_BCHW.device.type)
        with precision.full(x_BCHW):
            distances: Tensor = self.network(x_BCHW.float(), y_BCHW.float())
        return distances.flatten()


def load(net: Net, given: Path | None, option: str, without: str, resolution: int) -> Perceptual:
    """LPIPS on the CPU. option: how to name another weight file; without: how to go on without any; for the hints.

    Raises UsageError where images of this resolution are too small, AbsentWeightsError and CheckpointError.
    """
    backbone = BACKBONES[net]
    if resolution < backbone.smallest:
        raise UsageError(too_small(net, resolution), f"use larger images, or {without}")
    either = f"{option} (or {without})"
    found = weights.find(backbone.published, given, either)
    network = _network(net, found.path, weights.where_to_put(backbone.published, either))
    note = "" if found.published else f"LPIPS: the weights in {found.path} are not the published ones"
    return Perceptual(net, network, found.sha256, note)


def hollow(net: Net) -> Perceptual:
    """LPIPS without its weights: for what a step costs, not for what it says."""
    return Perceptual(net, _empty(net))


def too_small(net: Net, resolution: int) -> str:
    """What is wrong with images smaller than the backbone takes."""
    return f"LPIPS ({net}) needs images of at least {BACKBONES[net].smallest} pixels a side, not {resolution}"


def _empty(net: Net) -> nn.Module:
    """The package's network, unfilled."""
    import lpips

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torchvision, about an argument that lpips 0.1.4 still gives
        network: nn.Module = lpips.LPIPS(net=net, pretrained=False, pnet_rand=True, verbose=False)
    return network


def _network(net: Net, path: Path, hint: str) -> nn.Module:
    """The package's network, filled strictly. On `meta` first: its own way fetches weights, or draws 138M values.

    Raises CheckpointError, with the hint, for a file of another layout.
    """
    import lpips

    content = weights.read(path, net, hint)
    with torch.device("meta"):
        network = _empty(net)
    scaling: nn.Module = lpips.ScalingLayer()
    network.scaling_layer = scaling
    heads_file = Path(lpips.__file__).parent / "weights" / "v0.1" / f"{net}.pth"
    heads = torch.load(heads_file, map_location="cpu", weights_only=True)
    state = {f"scaling_layer.{name}": value for name, value in scaling.state_dict().items()}
    state |= heads | {
        name.replace("lin", "lins.", 1): value for name, value in heads.items()
    }  # the same modules, listed twice
    state |= _slices(network, content, path, net, hint)
    try:
        network.load_state_dict(state, assign=True)
    except RuntimeError as error:
        last = RuntimeError(str(error).splitlines()[-1].strip())
        raise weights.misfit(path, net, hint, last) from error
    return network


def _slices(network: nn.Module, content: dict[str, Tensor], path: Path, net: str, hint: str) -> dict[str, Tensor]:
    """torchvision's names -> the package's: features.N.weight -> net.sliceK.N.weight. A classifier is left out."""
    names = [name for name in network.state_dict() if name.startswith("net.")]
    wanted = {f"features.{name.split('.', 2)[2]}": name for name in names}
    there = {name for name in content if not name.startswith("classifier.")}
    if wrong := sorted(wanted.keys() ^ there):
        what = "lacks" if wrong[0] in wanted else "holds a foreign"
        raise weights.misfit(path, net, hint, ValueError(f"it {what} '{wrong[0]}'"))
    return {wanted[name]: content[name].detach().float() for name in wanted}

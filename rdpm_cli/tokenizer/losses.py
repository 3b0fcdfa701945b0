"""The tokenizer's loss (arXiv 2412.18390 Eq. 3-5): L = L_recon + 0.25 L_quant + L_lpips + 0.75 w L_gan.

The adversarial part is VQGAN's (arXiv 2012.09841 §3.1): hinge losses, and w balances the gradients of the last layer.
L_lpips is LPIPS (Zhang et al. 2018, version 0.1), the distance of two images in the features of a frozen classifier.
"""

import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdpm_cli import checkpoint
from rdpm_cli.device import full_precision
from rdpm_cli.distributed import TrainStep
from rdpm_cli.errors import UsageError
from rdpm_cli.tokenizer.config import TokenizerLossConfig

LARGEST_WEIGHT = 1e4
TINY_NORM = 1e-4  # added to the denominator of w, as VQGAN does

Net = Literal["alex", "vgg"]


def reconstruction(x: Tensor, recon: Tensor) -> Tensor:
    """L_recon: mean squared error on [-1, 1]."""
    return F.mse_loss(recon.float(), x.float())


def generator_hinge(fake_logits: Tensor) -> Tensor:
    """L_gan for the tokenizer: -mean D(x')."""
    return -fake_logits.float().mean()


def discriminator_hinge(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """0.5 (mean max(0, 1 - D(x)) + mean max(0, 1 + D(x')))."""
    return 0.5 * (F.relu(1 - real_logits.float()).mean() + F.relu(1 + fake_logits.float()).mean())


def adaptive_weight(recon_gradient: Tensor, gan_gradient: Tensor) -> Tensor:
    """w = |grad L_rec| / (|grad L_gan| + 1e-4) at the decoder's last layer, clamped to [0, 1e4]. Scalar."""
    return (recon_gradient.norm() / (gan_gradient.norm() + TINY_NORM)).clamp(0, LARGEST_WEIGHT)


class AdaptiveWeight:
    """w of the global batch, from each micro-batch's last-layer gradients.

    Gradients that accumulate are complete only after the last micro-batch. w is then that of the previous step (0 in
    the first), on any number of processes; `value` keeps it between steps and belongs to the run's state.
    """

    def __init__(self, value: Tensor, accumulates: bool) -> None:
        self.value, self.accumulates = value, accumulates
        self.reset()

    def reset(self) -> None:
        """Drop a step's gradients: before the next step, and after one that was passed over."""
        self.sum: Tensor | float = 0.0

    def __call__(self, pair: Tensor, step: TrainStep) -> Tensor:
        """pair: gradients of L_rec and L_gan, both means over the micro-batch `step`. -> w, scalar."""
        # A process whose gradient is not finite fails by its own loss; it must not spoil the weight of all processes.
        share = pair.nan_to_num(0.0, 0.0, 0.0) * (len(step.rows) / step.batch)
        if not self.accumulates:
            return adaptive_weight(*step.sum_(share))
        self.sum = self.sum + share
        return self.value.clone()

    def after_step(self, step: TrainStep) -> None:
        """Where gradients accumulate: w for the next step, from all micro-batches of all processes."""
        if isinstance(self.sum, Tensor):
            self.value.copy_(adaptive_weight(*step.sum_(self.sum)))


@dataclass
class Adversary:
    """The inputs of the adversarial term for one micro-batch."""

    logits: Tensor  # D(x'), D frozen
    last_layer: Tensor  # weight of the last convolution of the decoder
    ramp: float  # 0..1, the warm-up of the term
    step: TrainStep
    weight: AdaptiveWeight


class TokenizerLoss:
    """Named terms and their factors."""

    def __init__(self, cfg: TokenizerLossConfig, perceptual: nn.Module | None = None) -> None:
        """perceptual: (x, x') -> distances (B,), where cfg asks for it; it is frozen and part of no checkpoint."""
        assert (perceptual is not None) == (cfg.perceptual != "none"), "the recipe decides whether the term exists"
        self.cfg, self.perceptual = cfg, perceptual

    def __call__(
        self, x: Tensor, recon: Tensor, quant: Tensor, adversary: Adversary | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """-> total and the unweighted terms by name (scalars, detached). recon: fp32, in the graph of the decoder."""
        perceived = reconstruction(x, recon)
        logs = {"recon": perceived.detach(), "quant": quant.detach()}
        if self.perceptual is not None:
            lpips = self.perceptual(x, recon).mean()
            perceived, logs["lpips"] = perceived + self.cfg.perceptual_factor * lpips, lpips.detach()
        if adversary is not None:
            perceived, adversarial_logs = self._with_adversary(perceived, recon, adversary)
            logs |= adversarial_logs
        return perceived + self.cfg.quant * quant, logs

    def _with_adversary(
        self, perceived: Tensor, recon: Tensor, adversary: Adversary
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """perceived + 0.75 w L_gan, ramped."""
        gan = generator_hinge(adversary.logits)
        # The gradients of both terms at the image serve w and the training pass, so that the discriminator and LPIPS
        # are differentiated once a step. VQGAN differentiates them twice.
        at_image = [torch.autograd.grad(term, recon)[0] for term in (perceived, gan)]
        weight = torch.ones_like(gan)
        if self.cfg.adaptive:
            last = adversary.last_layer
            pair = [torch.autograd.grad(recon, last, g, retain_graph=True)[0].float() for g in at_image]
            weight = adversary.weight(torch.stack(pair), adversary.step)
        factor = adversary.ramp * self.cfg.adversarial_factor * weight
        value = (perceived + factor * gan).detach()
        logs = {"gan": gan.detach(), "gan_weight": weight}
        return _with_gradient(value, recon, at_image[0] + factor * at_image[1]), logs


def _with_gradient(value: Tensor, at: Tensor, gradient: Tensor) -> Tensor:
    """The scalar `value`, whose gradient with respect to `at` is `gradient`."""
    carrier = (at * gradient).sum()
    return value + (carrier - carrier.detach())


# ---- LPIPS ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Backbone:
    """A classifier that LPIPS has heads for. smallest: pixels a side; below, its last layer has no position left."""

    published: checkpoint.Published
    smallest: int


def _torchvision_file(file: str) -> checkpoint.Published:
    return checkpoint.Published(file, f"https://download.pytorch.org/models/{file}")


BACKBONES: dict[Net, Backbone] = {
    "alex": Backbone(_torchvision_file("alexnet-owt-7be5be79.pth"), 31),
    "vgg": Backbone(_torchvision_file("vgg16-397923af.pth"), 16),
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
    """LPIPS with one backbone: frozen, always in evaluation mode. Network and heads are the `lpips` package's.

    Distances are fp32 also inside autocast; only the convolutions follow it, which cost 120 GFLOP an image of 256².
    """

    def __init__(self, net: Net, network: nn.Module, sha256: str = "", note: str = "") -> None:
        """network: the package's, with its weights. sha256: of the file of its backbone's weights."""
        super().__init__()
        self.sha256, self.note = sha256, note
        self.name = f"lpips {version('lpips')} {net}"
        self.network = network.eval().requires_grad_(False)
        self.trunk = Trunk(self.network.get_submodule("net"))
        self.network.add_module("net", self.trunk)

    def train(self, mode: bool = True) -> "Perceptual":
        """Stays in evaluation mode, because the heads contain dropout."""
        return super().train(False)

    def forward(self, x_BCHW: Tensor, y_BCHW: Tensor) -> Tensor:
        """Distances (B,) of images in [-1, 1]; gradients reach the images."""
        self.trunk.low = torch.is_autocast_enabled(x_BCHW.device.type)
        with full_precision(x_BCHW):
            distances: Tensor = self.network(x_BCHW.float(), y_BCHW.float())
        return distances.flatten()


def load_perceptual(net: Net, path: Path | None, option: str, without: str, resolution: int) -> Perceptual:
    """LPIPS on the CPU, with the weights in `path` or those that are looked up; nothing is fetched.

    option: how to name another weight file; without: how to go on without LPIPS; both for the hints. Raises UsageError
    where images of this resolution are too small, AbsentWeightsError and CheckpointError.
    """
    backbone = BACKBONES[net]
    if resolution < backbone.smallest:
        raise UsageError(too_small(net, resolution), f"use larger images, or {without}")
    either = f"{option} (or {without})"
    file = checkpoint.find_weights(backbone.published, path, either)
    network = _filled(net, file.path, checkpoint.weights_hint(backbone.published, either))
    note = "" if file.published else f"LPIPS: the weights in {file.path} are not the published ones"
    return Perceptual(net, network, file.sha256, note)


def hollow_perceptual(net: Net = "vgg") -> Perceptual:
    """LPIPS without its weights, to count what a step costs."""
    return Perceptual(net, _empty(net))


def too_small(net: Net, resolution: int) -> str:
    """The message about images smaller than the backbone takes."""
    return f"LPIPS ({net}) needs images of at least {BACKBONES[net].smallest} pixels a side, not {resolution}"


def _empty(net: Net) -> nn.Module:
    """The package's network, without its weights."""
    import lpips  # seconds: it imports all of torchvision's models

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torchvision's, about an argument that lpips 0.1.4 still passes
        network: nn.Module = lpips.LPIPS(net=net, pretrained=False, pnet_rand=True, verbose=False)
    return network


def _filled(net: Net, path: Path, hint: str) -> nn.Module:
    """The package's network with its heads, and the backbone's weights from torchvision's file.

    Raises CheckpointError, with the hint, for a file of another layout.
    """
    import lpips

    with torch.device("meta"):  # otherwise it would draw 138M initial values from torch's generator
        network = _empty(net)
    scaling: nn.Module = lpips.ScalingLayer()
    network.scaling_layer = scaling
    heads = checkpoint.read_tensors(Path(lpips.__file__).parent / "weights" / "v0.1" / f"{net}.pth")
    state = {f"scaling_layer.{name}": value for name, value in scaling.state_dict().items()}
    # the package registers each head twice, as `lin0` and as `lins.0`
    state |= heads | {name.replace("lin", "lins.", 1): value for name, value in heads.items()}
    content = checkpoint.read_weights(path, net, hint)
    try:
        for name in network.state_dict():
            if name.startswith("net."):  # net.slice2.5.bias here is features.5.bias in torchvision's file
                state[name] = content[f"features.{name.split('.', 2)[2]}"].float()
        network.load_state_dict(state, assign=True)
    except KeyError as error:
        raise checkpoint.misfit(path, net, hint, f"it lacks {error}") from error
    except RuntimeError as error:  # torch's first line names only the class
        raise checkpoint.misfit(path, net, hint, str(error).splitlines()[-1]) from error
    return network

"""The PatchGAN discriminator of VQGAN's loss (Isola et al., arXiv 1611.07004; Esser et al., arXiv 2012.09841)."""

import itertools

import torch
from torch import Tensor, nn

from rdpm_cli.config import DiscriminatorConfig

GROUPS = 8


class PatchDiscriminator(nn.Module):
    """x (B,3,H,W) in [-1,1] -> logits (B,1,h',w'), one a patch; large means real.

    GroupNorm where pix2pix has BatchNorm: the loss of an image then depends neither on the batch nor on the number
    of processes.
    """

    gan_weight: Tensor  # where gradients accumulate, w for the next step (losses.AdaptiveWeight)

    def __init__(self, cfg: DiscriminatorConfig) -> None:
        super().__init__()
        widths = [cfg.width * min(2**level, 8) for level in range(cfg.layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for level, (inputs, outputs) in enumerate(itertools.pairwise(widths), 1):
            stride = 1 if level == cfg.layers else 2
            layers += [
                nn.Conv2d(inputs, outputs, 4, stride, padding=1, bias=False),
                nn.GroupNorm(GROUPS, outputs),
                nn.LeakyReLU(0.2),
            ]
        layers.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.layers = nn.Sequential(*layers)
        self.register_buffer("gan_weight", torch.zeros(()))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)  # pix2pix's
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        logits: Tensor = self.layers(x_BCHW)
        return logits

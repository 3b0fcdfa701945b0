"""The VQGAN encoder and decoder, in VAR's layout and names so that public weights map onto them, and the discriminator.

Shapes: x (B,3,H,W) in [-1,1]; z (B,C,h,w) with H/h = f = 2^(levels-1); features (B,F,h,w), F = C unless configured.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdpm_cli.device import full_precision
from rdpm_cli.tokenizer.config import AutoencoderConfig, DiscriminatorConfig

DISCRIMINATOR_GROUPS = 8  # of its GroupNorms


def feature_channels(cfg: AutoencoderConfig) -> int:
    """F, channels of the encoder's output and the decoder's input (256 in taming and LlamaGen)."""
    return cfg.features or cfg.channels


def norm(channels: int, groups: int) -> nn.GroupNorm:
    """GroupNorm with VQGAN's epsilon; torch's default is 1e-5."""
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))))))."""

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.norm1 = norm(inputs, groups)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = norm(outputs, groups)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x), inplace=True))  # in place: the norm's output has no second reader
        y = self.conv2(F.silu(self.norm2(y), inplace=True))
        shortcut: Tensor = self.nin_shortcut(x)
        return shortcut + y


class AttnBlock(nn.Module):
    """Single-head self-attention over the h·w positions, fused 1×1 qkv."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = norm(channels, groups)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        B, C, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).view(B, 3, 1, C, h * w).transpose(-1, -2).unbind(1)  # (B, 1, hw, C)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(B, C, h, w)
        return x + self.proj_out(mixed)


class Downsample(nn.Module):
    """Halve h and w: pad one pixel right and below, 3×3 convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))  # on two sides only, as VQGAN, whose weights expect it
        return y


class Upsample(nn.Module):
    """Double h and w: nearest neighbour, 3×3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return y


class Level(nn.Module):
    """One resolution: residual blocks, each followed by attention at the lowest resolution, then a resize."""

    def __init__(self, widths: list[int], attention: bool, groups: int, resize: tuple[str, nn.Module] | None) -> None:
        super().__init__()
        pairs = list(itertools.pairwise(widths))
        self.block = nn.ModuleList(ResnetBlock(i, o, groups) for i, o in pairs)
        self.attn = nn.ModuleList(AttnBlock(o, groups) for _, o in pairs if attention)
        self.resize = resize[0] if resize else ""
        if resize:
            self.add_module(*resize)  # as `downsample` or `upsample`, the names of the public weights

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[index](x)
        return self.get_submodule(self.resize)(x) if self.resize else x


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, attention: bool, groups: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1 = AttnBlock(channels, groups) if attention else nn.Identity()
        self.block_2 = ResnetBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block_2(self.attn_1(self.block_1(x)))
        return y


class Encoder(nn.Module):
    """x (B,3,H,W) -> features (B,F,h,w), before quant_conv."""

    def __init__(self, cfg: AutoencoderConfig) -> None:
        super().__init__()
        widths = [cfg.width * m for m in cfg.multipliers]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, cfg.width, 3, padding=1)
        self.down = nn.ModuleList()
        previous = cfg.width
        for level, width in enumerate(widths):
            resize = ("downsample", Downsample(width)) if level < last else None
            blocks = [previous, *[width] * cfg.res_blocks]
            self.down.append(Level(blocks, cfg.attention and level == last, cfg.groups, resize))
            previous = width
        self.mid = Middle(previous, cfg.attention, cfg.groups)
        self.norm_out = norm(previous, cfg.groups)
        self.conv_out = nn.Conv2d(previous, feature_channels(cfg), 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y = self.conv_in(x_BCHW)
        for level in self.down:
            y = level(y)
        y = self.mid(y)
        out: Tensor = self.conv_out(F.silu(self.norm_out(y), inplace=True))
        return out


class Decoder(nn.Module):
    """features (B,F,h,w), after post_quant_conv -> x' (B,3,H,W). `up[i]` is indexed from high to low resolution.

    The last convolution is fp32 also inside autocast: the losses see x', and the adaptive weight its gradient there.
    """

    def __init__(self, cfg: AutoencoderConfig) -> None:
        super().__init__()
        widths = [cfg.width * m for m in cfg.multipliers]
        last = len(widths) - 1
        previous = widths[-1]
        self.conv_in = nn.Conv2d(feature_channels(cfg), previous, 3, padding=1)
        self.mid = Middle(previous, cfg.attention, cfg.groups)
        levels = []
        for level in reversed(range(len(widths))):
            resize = ("upsample", Upsample(widths[level])) if level > 0 else None
            blocks = [previous, *[widths[level]] * (cfg.res_blocks + 1)]
            levels.append(Level(blocks, cfg.attention and level == last, cfg.groups, resize))
            previous = widths[level]
        self.up = nn.ModuleList(reversed(levels))  # made in the order they run, listed from high to low resolution
        self.norm_out = norm(previous, cfg.groups)
        self.conv_out = nn.Conv2d(previous, 3, 3, padding=1)

    def forward(self, z_BCHW: Tensor) -> Tensor:
        y = self.mid(self.conv_in(z_BCHW))
        for level in reversed(list(self.up)):
            y = level(y)
        y = F.silu(self.norm_out(y), inplace=True)
        with full_precision(y):
            out: Tensor = self.conv_out(y.float())
        return out


class PatchDiscriminator(nn.Module):
    """x (B,3,H,W) in [-1,1] -> logits (B,1,h',w'), one a patch; large means real.

    VQGAN's PatchGAN (Isola et al., arXiv 1611.07004; Esser et al., arXiv 2012.09841).
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
                # pix2pix has BatchNorm here, with which an image's loss depends on the batch and the process count
                nn.GroupNorm(DISCRIMINATOR_GROUPS, outputs),
                nn.LeakyReLU(0.2),
            ]
        layers.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.layers = nn.Sequential(*layers)
        self.register_buffer("gan_weight", torch.zeros(()))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)  # as pix2pix
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        logits: Tensor = self.layers(x_BCHW)
        return logits


def layer_norm(z_BCHW: Tensor) -> Tensor:
    """LayerNorm over channels at each position, no affine: z then has the scale of the noise."""
    channels = z_BCHW.shape[1]
    return F.layer_norm(z_BCHW.movedim(1, -1), (channels,)).movedim(-1, 1)


def round_to_half(z_BCHW: Tensor) -> Tensor:
    """z rounded to fp16 and back, straight-through: codes then depend only on the z that a store can keep."""
    return z_BCHW + (z_BCHW.detach().to(torch.float16).to(z_BCHW.dtype) - z_BCHW.detach())

"""The VQGAN encoder and decoder, in VAR's layout and names so that public weights map onto them, and the discriminator.

Shapes: x (B,3,H,W) in [-1,1]; z (B,C,h,w) with H/h = f = 2^(levels-1); features (B,F,h,w), F = C unless configured."""

import itertools
from collections import OrderedDict
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdpm_cli.distributed import full_precision
from rdpm_cli.tokenizer.config import AutoencoderConfig, DiscriminatorConfig, MelConfig
from rdpm_cli.tokenizer.mel_networks import MelDecoder, MelEncoder

norm = partial(nn.GroupNorm, eps=1e-6)  # VQGAN's epsilon; torch's default is 1e-5


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))))))."""

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.norm1 = norm(groups, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = norm(groups, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x), inplace=True))  # in place: the norm's output has no second reader
        y = self.conv2(F.silu(self.norm2(y), inplace=True))
        return self.nin_shortcut(x) + y


class AttnBlock(nn.Module):
    """Single-head self-attention over the h·w positions, fused 1×1 qkv."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = norm(groups, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        B, C, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).view(B, 3, 1, C, h * w).transpose(-1, -2).unbind(1)  # (B, 1, hw, C)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(B, C, h, w)
        return x + self.proj_out(mixed)


class Level(nn.Module):
    """One resolution: residual blocks, each followed by attention at the lowest resolution, then a resize."""

    def __init__(self, widths: list[int], attention: bool, groups: int, resize: str) -> None:
        """resize: `downsample`, `upsample`, the names of the public weights, or "" for none."""
        super().__init__()
        channels, pairs, self.resize = widths[-1], list(itertools.pairwise(widths)), resize
        # the resize is made before the blocks and registered after them: this orders random draws and optimiser states
        if resize == "downsample":  # VQGAN pads on two sides only, and its weights expect it
            layers = OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(channels, channels, 3, stride=2))
        elif resize:
            layers = OrderedDict(up=nn.Upsample(scale_factor=2.0), conv=nn.Conv2d(channels, channels, 3, padding=1))
        self.block = nn.ModuleList(ResnetBlock(i, o, groups) for i, o in pairs)
        self.attn = nn.ModuleList(AttnBlock(o, groups) for _, o in pairs if attention)
        if resize:
            self.add_module(resize, nn.Sequential(layers))

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[index](x)
        return self.get_submodule(self.resize)(x) if self.resize else x


def middle(channels: int, attention: bool, groups: int) -> nn.Sequential:
    """Residual block, attention, residual block at the lowest resolution."""
    first = ResnetBlock(channels, channels, groups)
    attn = AttnBlock(channels, groups) if attention else nn.Identity()
    return nn.Sequential(OrderedDict(block_1=first, attn_1=attn, block_2=ResnetBlock(channels, channels, groups)))


class Encoder(nn.Module):
    """x (B,3,H,W) -> features (B,F,h,w), before quant_conv."""

    def __init__(self, cfg: AutoencoderConfig) -> None:
        super().__init__()
        widths, last = [cfg.width * m for m in cfg.multipliers], len(cfg.multipliers) - 1
        self.conv_in = nn.Conv2d(3, cfg.width, 3, padding=1)
        levels = []
        for level, (previous, width) in enumerate(itertools.pairwise([cfg.width, *widths])):
            blocks, resize = [previous, *[width] * cfg.res_blocks], "downsample" if level < last else ""
            levels.append(Level(blocks, cfg.attention and level == last, cfg.groups, resize))
        self.down = nn.Sequential(*levels)
        self.mid = middle(widths[-1], cfg.attention, cfg.groups)
        self.norm_out = norm(cfg.groups, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], cfg.features or cfg.channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y = self.mid(self.down(self.conv_in(x_BCHW)))
        return self.conv_out(F.silu(self.norm_out(y), inplace=True))


class Decoder(nn.Module):
    """features (B,F,h,w), after post_quant_conv -> x' (B,3,H,W). `up[i]` is indexed from high to low resolution."""

    def __init__(self, cfg: AutoencoderConfig) -> None:
        super().__init__()
        widths, last = [cfg.width * m for m in cfg.multipliers], len(cfg.multipliers) - 1
        self.conv_in = nn.Conv2d(cfg.features or cfg.channels, widths[-1], 3, padding=1)
        self.mid = middle(widths[-1], cfg.attention, cfg.groups)
        levels = []
        for level in reversed(range(len(widths))):
            blocks = [widths[min(level + 1, last)], *[widths[level]] * (cfg.res_blocks + 1)]
            resize = "upsample" if level > 0 else ""
            levels.append(Level(blocks, cfg.attention and level == last, cfg.groups, resize))
        self.up = nn.ModuleList(reversed(levels))  # made in the order they run, listed from high to low resolution
        self.norm_out = norm(cfg.groups, widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z_BCHW: Tensor) -> Tensor:
        y = self.mid(self.conv_in(z_BCHW))
        for level in reversed(list(self.up)):
            y = level(y)
        y = F.silu(self.norm_out(y), inplace=True)
        with full_precision(y):  # the losses see x', and the adaptive weight its gradient at this layer
            return self.conv_out(y.float())


def autoencoder(cfg: AutoencoderConfig | MelConfig) -> tuple[nn.Module, nn.Module, nn.Module, nn.Module]:
    """Encoder, decoder, quant_conv and post_quant_conv: features of E -> z, and z' -> features of D."""
    if isinstance(cfg, MelConfig):
        return MelEncoder(cfg), MelDecoder(cfg), nn.Identity(), nn.Identity()
    outer, inner, kernel = cfg.features or cfg.channels, cfg.channels, cfg.quant_kernel
    quant_conv = partial(nn.Conv2d, kernel_size=kernel, padding=kernel // 2)
    return Encoder(cfg), Decoder(cfg), quant_conv(outer, inner), quant_conv(inner, outer)


class PatchDiscriminator(nn.Module):
    """x (B,D,H,W) -> logits (B,1,h',w'), one a patch, large means real: VQGAN's PatchGAN (arXiv 1611.07004)."""

    def __init__(self, cfg: DiscriminatorConfig, channels: int = 3, whole: tuple[int, int] | None = None) -> None:
        """channels: D. whole: (H, W), where the last layer is to see all of x: logits (B,1,1,1)."""
        super().__init__()
        widths = [cfg.width * min(2**level, 8) for level in range(cfg.layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(channels, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for level, (inputs, outputs) in enumerate(itertools.pairwise(widths), 1):
            stride = 1 if level == cfg.layers else 2
            # pix2pix has BatchNorm here, with which an image's loss depends on the batch and the process count
            group_norm = nn.GroupNorm(8, outputs)
            layers += [nn.Conv2d(inputs, outputs, 4, stride, 1, bias=False), group_norm, nn.LeakyReLU(0.2)]
        height, width = [(side >> cfg.layers) - 1 for side in whole] if whole else (4, 4)
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, (height, width), padding=0 if whole else 1))
        self.gan_weight = nn.Buffer(torch.zeros(()))  # where gradients accumulate, w for the next step (TokenizerTask)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)  # as pix2pix
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x_BDHW: Tensor) -> Tensor:
        return self.layers(x_BDHW)

    def features(self, x_BDHW: Tensor) -> list[Tensor]:
        """The output of each activation, then the logits."""
        maps, y = [], x_BDHW
        for layer in self.layers:
            y = layer(y)
            if isinstance(layer, nn.LeakyReLU):
                maps.append(y)
        return [*maps, y]

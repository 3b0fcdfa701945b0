"""Encoder and decoder of log-mel spectrograms: convolutions in time, as in CLaM-TTS's Mel-VAE (arXiv 2404.02781 §3.1).

Norms are over the channels of one frame, so that a frame sees only the frames that the convolutions reach.
Shapes: x (B,M,F) log-mel in nats; z (B,C,w) with F/w = stride = 2^(levels-1)."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdpm_cli.data.mel import PRESETS
from rdpm_cli.distributed import full_precision
from rdpm_cli.tokenizer.config import MelConfig


class Scale(nn.Module):
    """One mean and one standard deviation of all log-mel values, those of the first training batch."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.deviation = nn.Buffer(torch.zeros(())), nn.Buffer(torch.ones(()))

    def measure(self, x: Tensor) -> None:
        self.mean.copy_(x.mean())
        self.deviation.copy_(x.std())

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.deviation

    def inverse(self, y: Tensor) -> Tensor:
        return y * self.deviation + self.mean


class FrameNorm(nn.LayerNorm):
    """LayerNorm over the channels of each frame: (B, D, F)."""

    def forward(self, x_BDF: Tensor) -> Tensor:
        return super().forward(x_BDF.mT).mT


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), the first one dilated."""

    def __init__(self, inputs: int, outputs: int, dilation: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = FrameNorm(inputs), FrameNorm(outputs)
        self.conv1 = nn.Conv1d(inputs, outputs, 3, padding=dilation, dilation=dilation)
        self.conv2 = nn.Conv1d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class ConvNeXtBlock(nn.Module):
    """x + W2 gelu(W1 norm(depthwise convolution of 7 frames)), arXiv 2201.03545."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(channels, channels, 7, padding=3, groups=channels)
        self.norm = FrameNorm(channels)
        self.expand, self.reduce = nn.Conv1d(channels, 4 * channels, 1), nn.Conv1d(4 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.reduce(F.gelu(self.expand(self.norm(self.depthwise(x)))))


def blocks(widths: list[int]) -> nn.Sequential:
    """Residual blocks from width to width, dilated 1, 2, 1, 2, ..."""
    pairs = enumerate(itertools.pairwise(widths))
    return nn.Sequential(*(ResidualBlock(inputs, outputs, 1 + number % 2) for number, (inputs, outputs) in pairs))


class MelEncoder(nn.Module):
    """x (B,M,F) -> features (B,C,w), before quant_conv."""

    def __init__(self, cfg: MelConfig) -> None:
        super().__init__()
        widths = [cfg.width * m for m in cfg.multipliers]
        self.scale, self.conv_in = Scale(), nn.Conv1d(PRESETS[cfg.features].bands, widths[0], 3, padding=1)
        levels: list[nn.Module] = []
        for level, width in enumerate(widths):
            if level:
                levels.append(nn.Conv1d(widths[level - 1], width, 4, stride=2, padding=1))
            levels.append(blocks([width] * (cfg.res_blocks + 1)))
        self.down = nn.Sequential(*levels)
        self.norm_out = FrameNorm(widths[-1])
        self.conv_out = nn.Conv1d(widths[-1], cfg.channels, 3, padding=1)

    def forward(self, x_BMF: Tensor) -> Tensor:
        return self.conv_out(F.silu(self.norm_out(self.down(self.conv_in(self.scale(x_BMF))))))


class MelDecoder(nn.Module):
    """features (B,C,w), after post_quant_conv -> x' (B,M,F)."""

    def __init__(self, cfg: MelConfig) -> None:
        super().__init__()
        widths = [cfg.width * m for m in cfg.multipliers]
        self.conv_in = nn.Conv1d(cfg.channels, widths[-1], 3, padding=1)
        levels: list[nn.Module] = []
        for level in reversed(range(len(widths))):
            levels.append(blocks([widths[level]] * (cfg.res_blocks + 1)))
            if level:
                resize = nn.Upsample(scale_factor=2.0), nn.Conv1d(widths[level], widths[level - 1], 3, padding=1)
                levels.append(nn.Sequential(*resize))
        self.up = nn.Sequential(*levels, *(ConvNeXtBlock(widths[0]) for _ in range(cfg.final_blocks)))
        self.norm_out = FrameNorm(widths[0])
        self.conv_out, self.scale = nn.Conv1d(widths[0], PRESETS[cfg.features].bands, 3, padding=1), Scale()

    def forward(self, z_BCw: Tensor) -> Tensor:
        y = F.silu(self.norm_out(self.up(self.conv_in(z_BCw))))
        with full_precision(y):  # the loss sees x'
            return self.scale.inverse(self.conv_out(y.float()))

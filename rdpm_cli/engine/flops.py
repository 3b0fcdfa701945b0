"""Floating-point operations of networks and training steps, from their sizes alone. Torch-free.

A multiply-add counts two; matrix products, convolutions and attention are counted, and nothing else. A backward pass
costs two forward ones where weights learn and one where a gradient only passes through, or none goes on to the input;
attention's costs two and a half, since its kernels compute the scores once more. What activation checkpointing repeats
is not counted. docs/flops.md holds the formulas.

Legend: L = h·w latent positions, N = L + class tokens, D width, F SwiGLU's width, C code width, K codes, T steps.
"""

import itertools
import math
from dataclasses import dataclass

from rdpm_cli.config import (
    AutoencoderConfig,
    DiscriminatorConfig,
    GeneratorConfig,
    NetworkConfig,
    RDPMConfig,
    ResGenNetwork,
    TokenizerArchitecture,
    TokenizerConfig,
    TransformerConfig,
)

STEP_FEATURES = 256  # of the sinusoidal embedding of t
VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # each stage at half the side
FORWARD_BACKWARD = 3  # passes of a network that learns
VGG16_PARAMETERS = 14_714_688  # of those convolutions


@dataclass(frozen=True)
class Latent:
    """What of a tokenizer a generator's cost depends on."""

    positions: int  # L
    channels: int  # C
    codes: int  # K
    steps: int  # T
    biased: bool = True  # is there a bias convolution?

    @classmethod
    def of(cls, cfg: TokenizerArchitecture) -> "Latent":
        """The latent of a tokenizer."""
        auto, quant = cfg.autoencoder, cfg.quantizer
        return cls(math.prod(auto.grid), auto.channels, quant.codes, quant.steps, quant.bias != "none")

    @property
    def bias(self) -> int:
        """The bias convolution of all positions, where there is one: 18 L C²."""
        return convolution(self.positions, 3, self.channels, self.channels) if self.biased else 0


def linear(rows: int, inputs: int, outputs: int) -> int:
    """A matrix product of (rows, inputs) and (inputs, outputs)."""
    return 2 * rows * inputs * outputs


def convolution(positions: int, kernel: int, inputs: int, outputs: int) -> int:
    """A square kernel at so many output positions."""
    return linear(positions, kernel * kernel * inputs, outputs)


def attention(tokens: int, width: int) -> int:
    """QK^T and its product with V, whatever the number of heads: 4 N² D."""
    return 4 * tokens * tokens * width


# ---- generator -----------------------------------------------------------------------------------------------------


def swiglu_width(width: int) -> int:
    """F = round(8D/3/64)·64."""
    return max(1, round(8 * width / 3 / 64)) * 64


def block(tokens: int, width: int) -> int:
    """One transformer block of a row: 2ND(4D + 3F) + 4N²D, and 12D² of AdaLN once a row."""
    dense = linear(tokens, width, 4 * width) + 3 * linear(tokens, width, swiglu_width(width))
    return dense + attention(tokens, width) + linear(1, width, 6 * width)


def trunk(cfg: TransformerConfig, latent: Latent) -> int:
    """One row through the transformer, with its condition and the class latents."""
    L, C, D = latent.positions, latent.channels, cfg.hidden
    condition = linear(1, STEP_FEATURES, D) + linear(1, D, D) + linear(1, D, 2 * D)
    latents = linear(L, C, D) if cfg.class_latents else 0
    return condition + latents + cfg.depth * block(L + cfg.class_tokens, D)


def _rdpm_ends(cfg: NetworkConfig, latent: Latent) -> int:
    L, C, D = latent.positions, latent.channels, cfg.hidden
    geometric = linear(L, D, C) + linear(L, C, latent.codes) if cfg.head == "geometric" else 0
    return linear(L, 2 * C, D) + linear(L, D, latent.codes) + geometric


def _resgen_ends(cfg: ResGenNetwork, latent: Latent) -> int:
    """With what the loss makes of the head's output: distances to K means of rank r."""
    L, C, D, K, r = latent.positions, latent.channels, cfg.hidden, cfg.mixtures, cfg.rank
    if cfg.target == "direct":
        return linear(L, C, D) + linear(L, D, latent.steps * latent.codes)
    distances = linear(L, C, K + r) + linear(L * K, r, r) + linear(L, r, K)
    return linear(L, C, D) + linear(L, D, K + K * r + C + 1) + distances


def generator_forward(cfg: TransformerConfig, latent: Latent) -> int:
    """One row: one image at one t, or under one mask."""
    if isinstance(cfg, ResGenNetwork):
        return _resgen_ends(cfg, latent) + trunk(cfg, latent)
    assert isinstance(cfg, NetworkConfig)
    return _rdpm_ends(cfg, latent) + trunk(cfg, latent)


def generator_backward(cfg: TransformerConfig, latent: Latent) -> int:
    """One row: two forward passes, half an attention more, without the gradients that nothing learns from."""
    scores_again = cfg.depth * attention(latent.positions + cfg.class_tokens, cfg.hidden) // 2
    return 2 * generator_forward(cfg, latent) + scores_again - _unasked(cfg, latent)


def _unasked(cfg: TransformerConfig, latent: Latent) -> int:
    """Gradients of a row's inputs, of t's sinusoids, and of the frozen codebook in a geometric head."""
    L, C, D = latent.positions, latent.channels, cfg.hidden
    sinusoids = linear(1, STEP_FEATURES, D)
    if not isinstance(cfg, NetworkConfig):
        return linear(L, C, D) + sinusoids
    book = linear(L, C, latent.codes) if cfg.head == "geometric" else 0
    return linear(L, 2 * C, D) + sinusoids + book


def generator_step(cfg: GeneratorConfig, latent: Latent) -> dict[str, int]:
    """One image of a training step, by part: S rows forward and backward; z' of each, and new codes of fresh noise."""
    forward, backward = generator_forward(cfg.network, latent), generator_backward(cfg.network, latent)
    if not isinstance(cfg, RDPMConfig):
        return {"forward": forward, "backward": backward}
    rows = cfg.objective.steps_per_image
    new_codes = 0 if cfg.objective.noise == "cached" else quantiser(latent)
    return {"forward": rows * forward, "backward": rows * backward, "codes": rows * latent.bias + new_codes}


# ---- tokenizer -----------------------------------------------------------------------------------------------------


def quantiser(latent: Latent) -> int:
    """T searches of L vectors among K codes, and T bias convolutions."""
    return latent.steps * (linear(latent.positions, latent.channels + 1, latent.codes) + latent.bias)


def _residual(positions: int, inputs: int, outputs: int) -> int:
    shortcut = convolution(positions, 1, inputs, outputs) if inputs != outputs else 0
    return convolution(positions, 3, inputs, outputs) + convolution(positions, 3, outputs, outputs) + shortcut


def _attended(positions: int, channels: int) -> int:
    return linear(positions, channels, 4 * channels) + attention(positions, channels)


def _level(positions: int, widths: list[int], attended: bool) -> int:
    blocks = sum(_residual(positions, i, o) for i, o in itertools.pairwise(widths))
    return blocks + (sum(_attended(positions, o) for o in widths[1:]) if attended else 0)


def autoencoder_forward(cfg: AutoencoderConfig) -> tuple[int, int]:
    """Encoder with quant_conv, and decoder with post_quant_conv, of one image."""
    widths = [cfg.width * m for m in cfg.multipliers]
    places = [(cfg.resolution >> level) ** 2 for level in range(len(widths))]
    top, last, L = widths[-1], len(widths) - 1, places[-1]
    outer = cfg.features or cfg.channels
    middle = 2 * _residual(L, top, top) + (_attended(L, top) if cfg.attention else 0)
    border = convolution(L, cfg.quant_kernel, outer, cfg.channels)
    encoder = convolution(places[0], 3, 3, cfg.width) + middle + convolution(L, 3, top, outer) + border
    decoder = convolution(L, 3, outer, top) + middle + convolution(places[0], 3, cfg.width, 3) + border
    before, above = cfg.width, top
    for level, width in enumerate(widths):
        deepest = cfg.attention and level == last
        encoder += _level(places[level], [before, *[width] * cfg.res_blocks], deepest)
        encoder += convolution(places[level + 1], 3, width, width) if level < last else 0
        before = width
    for level in reversed(range(len(widths))):
        width, deepest = widths[level], cfg.attention and level == last
        decoder += _level(places[level], [above, *[width] * (cfg.res_blocks + 1)], deepest)
        decoder += convolution(places[level - 1], 3, width, width) if level else 0
        above = width
    return encoder, decoder


def discriminator_forward(cfg: DiscriminatorConfig, resolution: int) -> int:
    """The PatchGAN critic of one image: kernels of 4, stride 2 but in the last two layers."""
    widths = [3, *(cfg.width * min(2**level, 8) for level in range(cfg.layers + 1)), 1]
    side, total = resolution, 0
    for place, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        side = side // 2 if place < cfg.layers else side - 1
        total += convolution(side * side, 4, inputs, outputs)
    return total


def vgg16_forward(resolution: int) -> int:
    """The convolutions of VGG16 on one image, as LPIPS looks at it."""
    inputs, total = 3, 0
    for level, stage in enumerate(VGG16):
        for outputs in stage:
            total += convolution((resolution >> level) ** 2, 3, inputs, outputs)
            inputs = outputs
    return total


def tokenizer_forward(cfg: TokenizerArchitecture) -> int:
    """x -> codes -> x' of one image."""
    return sum(autoencoder_forward(cfg.autoencoder)) + quantiser(Latent.of(cfg))


def tokenizer_step(cfg: TokenizerConfig) -> dict[str, int]:
    """One image of a training step, by part.

    LPIPS is frozen: x forward, x' forward and back to x'. The critic: x' forward and back to x' for the tokenizer;
    for itself x and x', forward and backward.
    """
    size = cfg.autoencoder.resolution
    parts = {"autoencoder": FORWARD_BACKWARD * sum(autoencoder_forward(cfg.autoencoder))}
    parts["quantiser"] = quantiser(Latent.of(cfg))
    if cfg.loss.perceptual != "none":
        parts["perceptual"] = 3 * vgg16_forward(size)
    if cfg.loss.adversarial != "none":
        parts["adversary"] = (2 + 2 * FORWARD_BACKWARD) * discriminator_forward(cfg.discriminator, size)
    return parts

"""The tokenizer: items x <-> latents (B, C, S) <-> codes (B, T, S), and its file.

x: images (B, 3, H, W) in [-1, 1], or log-mel spectrograms (B, M, F) in nats, of any length, with S = F / stride."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdpm_cli import checkpoint, noise
from rdpm_cli.tokenizer.config import AutoencoderConfig, TokenizerArchitecture
from rdpm_cli.tokenizer.inputs import inputs_of
from rdpm_cli.tokenizer.networks import autoencoder
from rdpm_cli.tokenizer.quantizer import Chain, Quantizer

KIND = "rdpm-tokenizer"


class Tokenizer(nn.Module):
    """E, Q and D of arXiv 2412.18390 §3.1."""

    def __init__(self, cfg: TokenizerArchitecture, weight: bool = True) -> None:
        """weight: gamma_t = alpha_t in L_quant (training only)."""
        super().__init__()
        auto = cfg.autoencoder
        self.cfg, self.grid, self.inputs = cfg, auto.grid, inputs_of(auto)
        self.latent_shape = auto.channels, math.prod(self.grid)  # (C, S); S = -1 where it is the item's
        self.encoder, self.decoder, self.quant_conv, self.post_quant_conv = autoencoder(auto)
        self.quantizer = Quantizer(cfg.quantizer, cfg.schedule, auto.channels, self.grid, weight)
        self.norm = nn.LayerNorm(auto.channels) if auto.latent_norm == "affine" else None

    def noise(
        self, purpose: str, seed: int, indices: Sequence[int], views: Sequence[int], length: int | None = None
    ) -> Tensor:
        """The addressed noise eps_1..eps_T of items, (B, T, C, S), on the CPU. length: S, where it is the item's."""
        (C, S), by_position = self.latent_shape, length is not None
        steps, shape = self.cfg.quantizer.steps, (C, S if length is None else length)
        return torch.from_numpy(noise.normal_steps(purpose, seed, indices, views, steps, shape, by_position))

    def latents(self, x: Tensor) -> Tensor:
        """z = LN(E(x)), rounded to fp16 values, straight-through: (B, C, S) fp32."""
        z_BCS = self.quant_conv(self.encoder(x)).float().flatten(2)
        if self.cfg.autoencoder.latent_norm == "layernorm":  # without affine: z then has the scale of the noise
            z_BCS = F.layer_norm(z_BCS.mT, self.latent_shape[:1]).mT
        elif self.norm is not None:
            z_BCS = self.norm(z_BCS.mT).mT
        # codes depend only on the z that a store can keep
        return z_BCS + (z_BCS.detach().half().float() - z_BCS.detach())

    def decode_latents(self, z_BCS: Tensor) -> Tensor:
        """D(z') -> x', not clamped."""
        return self.decoder(self.post_quant_conv(z_BCS.unflatten(2, self.grid)))

    def latent_shape_of(self, x: Tensor) -> tuple[int, int]:
        """(C, S) of these items."""
        (C, S), auto = self.latent_shape, self.cfg.autoencoder
        return (C, S) if isinstance(auto, AutoencoderConfig) else (C, x.shape[-1] // auto.stride)

    def forward(
        self, x: Tensor, eps_BTCS: Tensor, shake_BCS: Tensor | None = None, terms_B: Tensor | None = None
    ) -> tuple[Tensor, Chain]:
        """x -> (x', chain). shake: added to z. terms: x' is decoded from the first steps, this number for each item."""
        z_BCS = self.latents(x)
        chain: Chain = self.quantizer(z_BCS if shake_BCS is None else z_BCS + shake_BCS, eps_BTCS, terms_B)
        return self.decode_latents(chain.z_BCS), chain

    @torch.no_grad()
    def encode(self, x: Tensor, eps_BTCS: Tensor) -> Tensor:
        """codes (B, T, S) int64."""
        return self.quantizer.encode(self.latents(x), eps_BTCS)

    @torch.no_grad()
    def decode(self, codes_BTS: Tensor) -> Tensor:
        """codes -> x'."""
        return self.decode_latents(self.quantizer.decode(codes_BTS))


def parameters(network: nn.Module) -> int:
    """Number of trained values."""
    return sum(p.numel() for p in network.parameters())


def parameter_table(tokenizer: Tokenizer) -> dict[str, int]:
    """Trained values of each part; an EMA codebook, which no gradient trains, has an entry of its own."""
    table = {name: sum(p.numel() for p in part.parameters()) for name, part in tokenizer.named_children()}
    return {**table, "codebook": tokenizer.quantizer.books.numel() if tokenizer.cfg.quantizer.codebook == "ema" else 0}


def pack(tokenizer: Tokenizer, **extra: Any) -> dict[str, Any]:
    """The content of a tokenizer file. extra: class_names, provenance."""
    fields = TokenizerArchitecture.model_fields  # without the training section, which a file does not carry
    return checkpoint.pack(KIND, tokenizer.cfg.model_dump(mode="json", include=set(fields)), tokenizer, **extra)


def unpack(content: dict[str, Any], where: str) -> Tokenizer:
    """The frozen tokenizer of a file's content, in evaluation mode."""
    tokenizer = Tokenizer(checkpoint.config_of(TokenizerArchitecture, content["config"], where))
    checkpoint.fill(tokenizer, content, where)
    return tokenizer.eval().requires_grad_(False)


def load(path: Path) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer of a file, and the file's content. Raises CheckpointError."""
    content = checkpoint.load(path, KIND)
    return unpack(content, str(path)), content

"""The tokenizer: images (B, 3, H, W) <-> latents (B, C, S) <-> codes (B, T, S), and its file."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdpm_cli import checkpoint, noise
from rdpm_cli.tokenizer.config import TokenizerArchitecture
from rdpm_cli.tokenizer.networks import Decoder, Encoder
from rdpm_cli.tokenizer.quantizer import Chain, Quantizer

KIND = "rdpm-tokenizer"


class Tokenizer(nn.Module):
    """E, Q and D of arXiv 2412.18390 §3.1."""

    def __init__(self, cfg: TokenizerArchitecture, weight: bool = True) -> None:
        """weight: gamma_t = alpha_t in L_quant (training only)."""
        super().__init__()
        auto = cfg.autoencoder
        self.cfg, self.grid = cfg, auto.grid
        self.latent_shape = auto.channels, math.prod(self.grid)  # (C, S)
        self.encoder, self.decoder = Encoder(auto), Decoder(auto)
        outer, inner, kernel = auto.features or auto.channels, auto.channels, auto.quant_kernel
        self.quant_conv = nn.Conv2d(outer, inner, kernel, padding=kernel // 2)
        self.post_quant_conv = nn.Conv2d(inner, outer, kernel, padding=kernel // 2)
        self.quantizer = Quantizer(cfg.quantizer, cfg.schedule, inner, self.grid, weight)
        self.norm = nn.LayerNorm(inner) if auto.latent_norm == "affine" else None

    def noise(self, purpose: str, seed: int, indices: Sequence[int], views: Sequence[int]) -> Tensor:
        """The addressed noise eps_1..eps_T of images, (B, T, C, S), on the CPU."""
        steps = self.cfg.quantizer.steps
        return torch.from_numpy(noise.normal_steps(purpose, seed, indices, views, steps, self.latent_shape))

    def latents(self, x_BCHW: Tensor) -> Tensor:
        """z = LN(E(x)) of images in [-1, 1], rounded to fp16 values, straight-through: (B, C, S) fp32."""
        z_BCS = self.quant_conv(self.encoder(x_BCHW)).float().flatten(2)
        if self.cfg.autoencoder.latent_norm == "layernorm":  # without affine: z then has the scale of the noise
            z_BCS = F.layer_norm(z_BCS.mT, self.latent_shape[:1]).mT
        elif self.norm is not None:
            z_BCS = self.norm(z_BCS.mT).mT
        # codes depend only on the z that a store can keep
        return z_BCS + (z_BCS.detach().half().float() - z_BCS.detach())

    def decode_latents(self, z_BCS: Tensor) -> Tensor:
        """D(z'): (B, 3, H, W), about [-1, 1], not clamped."""
        return self.decoder(self.post_quant_conv(z_BCS.unflatten(2, self.grid)))

    def forward(self, x_BCHW: Tensor, eps_BTCS: Tensor) -> tuple[Tensor, Chain]:
        """x -> (x', chain)."""
        chain: Chain = self.quantizer(self.latents(x_BCHW), eps_BTCS)
        return self.decode_latents(chain.z_BCS), chain

    @torch.no_grad()
    def encode(self, x_BCHW: Tensor, eps_BTCS: Tensor) -> Tensor:
        """codes (B, T, S) int64."""
        return self.quantizer.encode(self.latents(x_BCHW), eps_BTCS)

    @torch.no_grad()
    def decode(self, codes_BTS: Tensor) -> Tensor:
        """codes -> x' (B, 3, H, W)."""
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

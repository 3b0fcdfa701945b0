"""The transformer that every family shares: AdaLN-Zero blocks with RMSNorm, 2-D RoPE attention and SwiGLU.

Legend: B rows, L = h·w positions, N = class tokens + L, D width, A heads, E = D / A.
D = 64·depth and SwiGLU's hidden width round(8D/3/64)·64 give Table 1's parameter counts (arXiv 2412.18390).
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from rdpm_cli.config import TransformerConfig
from rdpm_cli.errors import UsageError

FREQUENCIES = 256  # width of the sinusoidal embedding of t


def modulate(x_BND: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    """x (1 + scale) + shift, once a row, not a token."""
    return torch.addcmul(shift_BD.unsqueeze(1), x_BND, 1 + scale_BD.unsqueeze(1))


def rope_table(grid: tuple[int, int], head_width: int, extra: int, theta: float = 10000.0) -> Tensor:
    """Angles of 2-D RoPE over a (h, w) grid: (extra + h·w, head_width / 2). Half the pairs turn with y, half with x.

    The `extra` leading tokens have no place and are not turned.
    """
    speeds = theta ** -(torch.arange(0, head_width // 4) / (head_width // 4))
    down, along = (torch.outer(torch.arange(side).float(), speeds) for side in grid)  # (side, head_width / 4)
    y, x = down[:, None].expand(*grid, -1), along[None].expand(*grid, -1)
    return torch.cat([torch.zeros(extra, head_width // 2), torch.cat([y, x], -1).flatten(0, 1)])


def rotate(x_NE: Tensor, cos_NE: Tensor, sin_NE: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i+E/2}) by the position's angles. x: (..., N, E)."""
    a, b = x_NE.chunk(2, -1)
    return torch.cat([a * cos_NE - b * sin_NE, b * cos_NE + a * sin_NE], -1)


Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v (B, A, N, E) -> (B, A, N, E)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's own, FlashAttention among its kernels on CUDA."""
    return F.scaled_dot_product_attention(q, k, v)


def flash() -> Kernel:
    """The flash-attn package's kernel, for bf16 and fp16 on CUDA. Raises UsageError where it is not installed."""
    try:
        from flash_attn import flash_attn_func
    except ImportError as error:
        raise UsageError(
            "attention=flash needs the flash-attn package, which is not installed",
            "uv pip install 'rdpm[flash]' --no-build-isolation, or leave attention=sdpa",
        ) from error

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mixed: Tensor = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)))  # (B, N, A, E)
        return mixed.transpose(1, 2)

    return kernel


class Attention(nn.Module):
    """Multi-head self-attention over all tokens."""

    kernel: Kernel = staticmethod(sdpa)

    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        self.q_norm = nn.RMSNorm(width // heads, eps=1e-6) if qk_norm else None
        self.k_norm = nn.RMSNorm(width // heads, eps=1e-6) if qk_norm else None

    def forward(self, x_BND: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        B, N, D = x_BND.shape
        qkv = self.qkv(x_BND).view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)  # (3, B, A, N, E)
        q, k, v = qkv
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
            qkv = torch.stack([q, k])
        if cos is not None and sin is not None:
            q, k = rotate(qkv[:2], cos, sin).to(v.dtype)
        mixed = self.kernel(q, k, v)
        out: Tensor = self.proj(mixed.transpose(1, 2).reshape(B, N, D))
        return out


class SwiGLU(nn.Module):
    """W3 (silu(W1 x) · W2 x)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = max(1, round(8 * width / 3 / 64)) * 64
        self.w12 = nn.Linear(width, 2 * self.hidden, bias=False)
        self.w3 = nn.Linear(self.hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, -1)
        out: Tensor = self.w3(F.silu(gate) * value)
        return out


class Block(nn.Module):
    """AdaLN-Zero: shift, scale and gate of both branches from the condition, starting as the identity."""

    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(width, heads, qk_norm)
        self.norm2 = nn.RMSNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = SwiGLU(width)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x_BND: Tensor, cond_BD: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(cond_BD)).chunk(6, -1)
        attended = self.attn(modulate(self.norm1(x_BND), shift1, scale1), cos, sin)
        x_BND = torch.addcmul(x_BND, gate1.unsqueeze(1), attended)
        return torch.addcmul(x_BND, gate2.unsqueeze(1), self.mlp(modulate(self.norm2(x_BND), shift2, scale2)))


class StepEmbedding(nn.Module):
    """Sinusoidal embedding of t, then a two-layer MLP: (B,) -> (B, D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t_B: Tensor) -> Tensor:
        half = FREQUENCIES // 2
        speeds = torch.exp(-math.log(10000.0) * torch.arange(half, device=t_B.device) / half)
        angles = t_B.float()[:, None] * speeds
        out: Tensor = self.mlp(torch.cat([angles.cos(), angles.sin()], -1))
        return out


class Transformer(nn.Module):
    """Tokens in, normalised and modulated tokens out. The condition is the sum of a step and a class embedding."""

    cos: Tensor
    sin: Tensor
    recompute = False  # activation checkpointing: a block's are computed again in the backward pass

    def __init__(self, cfg: TransformerConfig, grid: tuple[int, int], channels: int, classes: int) -> None:
        """grid: (h, w). channels: C of class latents. classes: without the null class, which is number `classes`."""
        super().__init__()
        D = cfg.hidden
        self.cfg, self.length = cfg, math.prod(grid)
        self.step_embedding = StepEmbedding(D)
        self.class_embedding = nn.Embedding(classes + 1, D)
        self.positions = nn.Embedding(self.length, D) if cfg.positions in ("learned", "both") else None
        self.class_latents = nn.Embedding(classes + 1, self.length * channels) if cfg.class_latents else None
        self.class_latents_in = nn.Linear(channels, D, bias=False) if cfg.class_latents else None
        self.class_tokens = nn.Embedding(classes + 1, cfg.class_tokens * D) if cfg.class_tokens else None
        self.blocks = nn.ModuleList(Block(D, cfg.head_count, cfg.qk_norm) for _ in range(cfg.depth))
        self.norm = nn.RMSNorm(D, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(D, 2 * D)
        if cfg.positions in ("rope", "both"):
            angles = rope_table(grid, D // cfg.head_count, cfg.class_tokens)
            self.register_buffer("cos", angles.cos(), persistent=False)
            self.register_buffer("sin", angles.sin(), persistent=False)
        self._initialise()

    def use(self, kernel: Kernel) -> None:
        """Attend with this kernel from now on."""
        for block in self.blocks:
            assert isinstance(block, Block)
            block.attn.kernel = kernel

    def _initialise(self) -> None:
        """DiT's initialisation: Xavier linears, N(0, 0.02) embeddings, zero modulations."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for layer in [self.modulation, *(block.modulation for block in self.blocks)]:
            assert isinstance(layer, nn.Linear)
            nn.init.zeros_(layer.weight)
        for linear in (self.step_embedding.mlp[0], self.step_embedding.mlp[2]):
            assert isinstance(linear, nn.Linear)
            nn.init.normal_(linear.weight, std=0.02)

    def forward(self, x_BLD: Tensor, t_B: Tensor, labels_B: Tensor) -> Tensor:
        """x: embedded input. t: 1..T. labels: 0..classes, the last being the null class. -> (B, L, D)."""
        B, L, D = x_BLD.shape
        cond_BD = self.step_embedding(t_B) + self.class_embedding(labels_B)
        if self.positions is not None:
            x_BLD = x_BLD + self.positions.weight
        if self.class_latents is not None and self.class_latents_in is not None:
            x_BLD = x_BLD + self.class_latents_in(self.class_latents(labels_B).view(B, L, -1))
        x_BND = x_BLD
        if self.class_tokens is not None:
            x_BND = torch.cat([self.class_tokens(labels_B).view(B, -1, D).to(x_BLD.dtype), x_BLD], 1)
        cos, sin = (self.cos, self.sin) if self.cfg.positions in ("rope", "both") else (None, None)
        again = self.recompute and torch.is_grad_enabled()
        for block in self.blocks:
            if again:
                x_BND = torch.utils.checkpoint.checkpoint(block, x_BND, cond_BD, cos, sin, use_reentrant=False)
            else:
                x_BND = block(x_BND, cond_BD, cos, sin)
        shift, scale = self.modulation(F.silu(cond_BD)).chunk(2, -1)
        return modulate(self.norm(x_BND[:, -L:]), shift, scale)

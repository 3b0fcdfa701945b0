"""The transformer that every family shares: AdaLN-Zero blocks with RMSNorm, RoPE attention and SwiGLU.

Legend: B rows, S positions of the flattened grid, M tokens of the condition, N = M + S, D width, A heads, E = D / A.
D = 64·depth and SwiGLU's hidden width round(8D/3/64)·64 give Table 1's parameter counts (arXiv 2412.18390).
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from rdpm_cli.errors import UsageError
from rdpm_cli.generator.config import TransformerConfig
from rdpm_cli.generator.contract import Condition

FREQUENCIES = 256  # width of the sinusoidal embedding of t, as in DiT

# q, k, v (B, A, N, E) and a mask of keys (B, 1, 1, N) bool, None for all -> (B, A, N, E)
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


# ---- attention -----------------------------------------------------------------------------------------------------


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """torch's attention, with FlashAttention among its kernels on CUDA."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def flash() -> Kernel:
    """The flash-attn package's kernel, for bf16 and fp16 on CUDA. Raises UsageError if it is not installed."""
    try:
        from flash_attn import flash_attn_func
    except ImportError as error:
        raise UsageError(
            "attention=flash needs the flash-attn package, which is not installed",
            "uv pip install 'rdpm[flash]' --no-build-isolation, or leave attention=sdpa",
        ) from error

    def kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None:
            raise UsageError("attention=flash cannot mask the condition's tokens", "leave attention=sdpa")
        mixed: Tensor = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)))  # (B, N, A, E)
        return mixed.transpose(1, 2)

    return kernel


def rope_table(grid: Sequence[int], head_width: int, theta: float = 10000.0) -> Tensor:
    """Angles of RoPE over a grid of n axes: (S, E / 2). An n-th of the pairs turns with each axis, the rest not."""
    pairs = head_width // 2
    share = pairs // len(grid)
    speeds = theta ** -(torch.arange(0, share) / share)
    places = torch.meshgrid(*(torch.arange(side).float() for side in grid), indexing="ij")
    angles = torch.cat([torch.outer(place.flatten(), speeds) for place in places], -1)  # (S, n · share)
    return F.pad(angles, (0, pairs - len(grid) * share))


def rotate(x_NE: Tensor, cos_NE: Tensor, sin_NE: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i+E/2}) by the position's angles. x: (..., N, E)."""
    a, b = x_NE.chunk(2, -1)
    return torch.cat([a * cos_NE - b * sin_NE, b * cos_NE + a * sin_NE], -1)


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

    def forward(self, x_BND: Tensor, turns: tuple[Tensor, Tensor] | None, mask: Tensor | None) -> Tensor:
        """turns: cosine and sine of RoPE's angles, (N, E / 2) each."""
        B, N, D = x_BND.shape
        qkv = self.qkv(x_BND).view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)  # (3, B, A, N, E)
        q, k, v = qkv
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
            qkv = torch.stack([q, k])
        if turns is not None:
            q, k = rotate(qkv[:2], *turns).to(v.dtype)  # both at once; the angles are fp32 also under bf16
        mixed = self.kernel(q, k, v, mask)
        out: Tensor = self.proj(mixed.transpose(1, 2).reshape(B, N, D))
        return out


# ---- blocks --------------------------------------------------------------------------------------------------------


def modulate(x_BND: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    """x (1 + scale) + shift, with one shift and scale a row."""
    return torch.addcmul(shift_BD.unsqueeze(1), x_BND, 1 + scale_BD.unsqueeze(1))


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

    def forward(
        self, x_BND: Tensor, cond_BD: Tensor, turns: tuple[Tensor, Tensor] | None, mask: Tensor | None
    ) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(cond_BD)).chunk(6, -1)
        attended = self.attn(modulate(self.norm1(x_BND), shift1, scale1), turns, mask)
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


# ---- the whole -----------------------------------------------------------------------------------------------------


class Transformer(nn.Module):
    """Embedded positions in, normalised and modulated positions out. The tables of classes are here too.

    The order of the modules is the order in which the initialisation draws: it is part of what a seed means.
    """

    cos: Tensor
    sin: Tensor
    recompute = False  # activation checkpointing: the backward pass computes each block's activations again

    def __init__(self, cfg: TransformerConfig, grid: Sequence[int], channels: int, classes: int) -> None:
        """grid: positions on each of its axes. channels: C of class latents. classes: without the null class."""
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
            angles = rope_table(grid, D // cfg.head_count)
            self.register_buffer("cos", angles.cos(), persistent=False)
            self.register_buffer("sin", angles.sin(), persistent=False)
        self._initialise()

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

    def use(self, kernel: Kernel) -> None:
        """Attend with this kernel from now on."""
        for block in self.blocks:
            assert isinstance(block, Block)
            block.attn.kernel = kernel

    def forward(self, x_BSD: Tensor, t_B: Tensor, condition: Condition) -> Tensor:
        """x: embedded input. t: 1..T, or another scalar a row. -> (B, S, D)."""
        S = x_BSD.shape[1]
        cond_BD = self.step_embedding(t_B) + condition.vector_BD
        if self.positions is not None:
            x_BSD = x_BSD + self.positions.weight
        if condition.latents_BSD is not None:
            x_BSD = x_BSD + condition.latents_BSD
        tokens = condition.tokens_BMD
        x_BND = x_BSD if tokens is None else torch.cat([tokens.to(x_BSD.dtype), x_BSD], 1)
        turns, mask = self._turns(x_BND.shape[1] - S), _key_mask(condition.mask_BM, S)
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                x_BND = torch.utils.checkpoint.checkpoint(block, x_BND, cond_BD, turns, mask, use_reentrant=False)
            else:
                x_BND = block(x_BND, cond_BD, turns, mask)
        shift, scale = self.modulation(F.silu(cond_BD)).chunk(2, -1)
        return modulate(self.norm(x_BND[:, -S:]), shift, scale)

    def _turns(self, tokens: int) -> tuple[Tensor, Tensor] | None:
        """Cosine and sine of RoPE's angles, (N, E / 2); the condition's tokens have no place and are not turned."""
        if self.cfg.positions == "learned":
            return None
        return F.pad(self.cos, (0, 0, tokens, 0), value=1.0), F.pad(self.sin, (0, 0, tokens, 0))


def _key_mask(mask_BM: Tensor | None, positions: int) -> Tensor | None:
    """Which keys may be attended to, (B, 1, 1, N) bool; all positions may. None without a mask."""
    return None if mask_BM is None else F.pad(mask_BM, (0, positions), value=True)[:, None, None]


def trunk_of(network: nn.Module) -> Transformer:
    """The transformer of a family's network."""
    trunk = network.get_submodule("trunk")
    assert isinstance(trunk, Transformer)
    return trunk

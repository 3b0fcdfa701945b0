"""The transformer that every family shares: AdaLN-Zero blocks with RMSNorm, 2-D RoPE attention and SwiGLU.

Legend: B rows, L = h·w positions, N = class tokens + L, D width, A heads, E = D / A.
D = 64·depth and SwiGLU's hidden width round(8D/3/64)·64 give Table 1's parameter counts (arXiv 2412.18390).
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

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
        return self.modulated(x_BND, self.modulation(F.silu(cond_BD)), cos, sin)

    def modulated(self, x_BND: Tensor, six_BM: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        """The same with the six modulations, (B, 6 D), at hand."""
        shift1, scale1, gate1, shift2, scale2, gate2 = six_BM.chunk(6, -1)
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


class Condition(NamedTuple):
    """All that t and class do to B rows. While weights stand still it is the same for every image of a (t, class)."""

    blocks: Tensor  # (B, depth, 6 D): the blocks' modulations
    last: Tensor  # (B, 2 D): that of the output
    latents: Tensor | None  # (B, L, D): what class latents add to the tokens
    tokens: Tensor | None  # (B, N - L, D): class tokens


REMEMBERED = {"cpu": 2 << 30, "cuda": 8 << 30}  # bytes of conditions that are kept at most


class Memory:
    """Conditions of single (t, class), kept until the bytes are used up; what comes after is computed each time."""

    def __init__(self, limit: int) -> None:
        self.free = limit
        self.rows: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.classes: dict[int, tuple[Tensor | None, Tensor | None]] = {}

    def take(self, *values: Tensor | None) -> bool:
        """Is there room for these, which are then counted?"""
        size = sum(value.nbytes for value in values if value is not None)
        fits = size <= self.free
        self.free -= size if fits else 0
        return fits


class Transformer(nn.Module):
    """Tokens in, normalised and modulated tokens out. The condition is the sum of a step and a class embedding."""

    cos: Tensor
    sin: Tensor
    recompute = False  # activation checkpointing: a block's are computed again in the backward pass
    memory: Memory | None = None  # of a job that samples

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

    def forward(self, x_BLD: Tensor, t_B: Tensor, labels_B: Tensor, given: Condition | None = None) -> Tensor:
        """x: embedded input. t: 1..T. labels: 0..classes, the last being the null class. -> (B, L, D).

        given: the condition of these rows, where it is known: nothing of it is computed again.
        """
        L = x_BLD.shape[1]
        cond_BD = self.step_embedding(t_B) + self.class_embedding(labels_B) if given is None else given.last
        latents, tokens = self._of_class(labels_B) if given is None else (given.latents, given.tokens)
        if self.positions is not None:
            x_BLD = x_BLD + self.positions.weight
        if latents is not None:
            x_BLD = x_BLD + latents
        x_BND = x_BLD if tokens is None else torch.cat([tokens.to(x_BLD.dtype), x_BLD], 1)
        cos, sin = (self.cos, self.sin) if self.cfg.positions in ("rope", "both") else (None, None)
        again = self.recompute and torch.is_grad_enabled()
        for place, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            if given is not None:
                x_BND = block.modulated(x_BND, given.blocks[:, place], cos, sin)
            elif again:
                x_BND = torch.utils.checkpoint.checkpoint(block, x_BND, cond_BD, cos, sin, use_reentrant=False)
            else:
                x_BND = block(x_BND, cond_BD, cos, sin)
        last = self.modulation(F.silu(cond_BD)) if given is None else given.last
        shift, scale = last.chunk(2, -1)
        return modulate(self.norm(x_BND[:, -L:]), shift, scale)

    def _of_class(self, labels_B: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What class latents add to the tokens (B, L, D), and class tokens (B, N - L, D); None without them."""
        B, D = len(labels_B), self.cfg.hidden
        latents, tokens = None, None
        if self.class_latents is not None and self.class_latents_in is not None:
            latents = self.class_latents_in(self.class_latents(labels_B).view(B, self.length, -1))
        if self.class_tokens is not None:
            tokens = self.class_tokens(labels_B).view(B, -1, D)
        return latents, tokens

    # ---- sampling: one t, and classes that come again and again -----------------------------------------------

    @torch.no_grad()
    def condition(self, t: int, labels: Sequence[int]) -> Condition:
        """The condition of rows of one t, each computed alone: what is remembered is then what would be computed."""
        rows = {label: self._row(t, label) for label in dict.fromkeys(labels)}
        classes = {label: self._class(label) for label in rows}
        latents, tokens = ([classes[label][i] for label in labels] for i in (0, 1))
        return Condition(
            torch.cat([rows[label][0] for label in labels]),
            torch.cat([rows[label][1] for label in labels]),
            torch.cat([v for v in latents if v is not None]) if self.class_latents is not None else None,
            torch.cat([v for v in tokens if v is not None]) if self.class_tokens is not None else None,
        )

    def forget(self) -> None:
        """Drop what is remembered and keep no more: its memory is needed."""
        if self.memory is not None:
            self.memory = Memory(0)

    def _row(self, t: int, label: int) -> tuple[Tensor, Tensor]:
        """Modulations of one (t, class): (1, depth, 6 D) of the blocks, (1, 2 D) of the output."""
        if self.memory is not None and (t, label) in self.memory.rows:
            return self.memory.rows[t, label]
        t_1, label_1 = (torch.full((1,), value, device=self.class_embedding.weight.device) for value in (t, label))
        active = F.silu(self.step_embedding(t_1) + self.class_embedding(label_1))
        modulations = [block.modulation for block in self.blocks if isinstance(block, Block)]
        found = (torch.stack([layer(active) for layer in modulations], 1), self.modulation(active))
        if self.memory is not None and self.memory.take(*found):
            self.memory.rows[t, label] = found
        return found

    def _class(self, label: int) -> tuple[Tensor | None, Tensor | None]:
        """Class latents and class tokens of one class."""
        if self.memory is not None and label in self.memory.classes:
            return self.memory.classes[label]
        found = self._of_class(torch.full((1,), label, device=self.class_embedding.weight.device))
        if self.memory is not None and self.memory.take(*found):
            self.memory.classes[label] = found
        return found


def trunk_of(network: nn.Module) -> Transformer:
    """The transformer of a family's network."""
    trunk = network.get_submodule("trunk")
    assert isinstance(trunk, Transformer)
    return trunk


@contextlib.contextmanager
def remembering(trunk: Transformer) -> Iterator[None]:
    """Inside, conditions are kept once they are computed: the weights stand still. An outer one lasts longer."""
    if trunk.memory is not None:
        yield
        return
    device = trunk.class_embedding.weight.device.type
    trunk.memory = Memory(REMEMBERED.get(device, REMEMBERED["cuda"]))
    try:
        yield
    finally:
        trunk.memory = None

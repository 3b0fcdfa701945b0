"""The transformer that every family shares: AdaLN-Zero blocks with RMSNorm, RoPE attention and SwiGLU.

Legend: B rows, S positions of the flattened grid, M tokens of the condition, N = M + S, D width, A heads, E = D / A."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from rdpm_cli.errors import UsageError
from rdpm_cli.generator.conditions import LONGEST, SpeechCondition, TextCondition, sinusoids
from rdpm_cli.generator.config import TransformerConfig
from rdpm_cli.generator.contract import Columns, Condition

# q, k, v (B, A, N, E), a mask of keys (B, 1, 1, N) or of pairs (1, 1, N, N), bool, None for all, and whether each token
# sees only those before it and itself -> (B, A, N, E)
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None, bool], Tensor]
Turns = tuple[Tensor, Tensor] | None  # cosine and sine of RoPE's angles, (N, E / 2) each


class Text(NamedTuple):
    """What cross-attention sees: tokens, which of them exist, and the angles of positions and tokens."""

    tokens_BMD: Tensor
    mask: Tensor  # (B, 1, 1, M) bool
    position_turns: tuple[Tensor, Tensor]  # (B, 1, S, E / 2) each
    token_turns: tuple[Tensor, Tensor]  # (M, E / 2) each


class Cache:
    """Keys and values of one attention layer, for sequences that grow."""

    def __init__(self, longest: int) -> None:
        self.longest, self.length, self._kv = longest, 0, torch.empty(0)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """-> those of all tokens so far, (B, A, N, E) each."""
        B, A, N, E = k.shape
        if self.length == 0:
            self._kv = k.new_empty(2, B, A, self.longest, E)
        start, self.length = self.length, self.length + N
        self._kv[:, :, :, start : self.length] = torch.stack([k, v])
        keys, values = self._kv[:, :, :, : self.length]
        return keys, values


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


def rope_table(grid: Sequence[int], head_width: int) -> Tensor:
    """Angles of RoPE over a grid of n axes: (S, E / 2). An n-th of the pairs turns with each axis, the rest not."""
    pairs, share = head_width // 2, head_width // 2 // len(grid)
    speeds = 10000.0 ** -(torch.arange(0, share) / share)
    places = torch.meshgrid(*(torch.arange(side).float() for side in grid), indexing="ij")
    angles = torch.cat([torch.outer(place.flatten(), speeds) for place in places], -1)  # (S, n · share)
    return F.pad(angles, (0, pairs - len(grid) * share))


def rotate(x_NE: Tensor, cos_NE: Tensor, sin_NE: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i+E/2}) by the position's angles. x: (..., N, E)."""
    a, b = x_NE.chunk(2, -1)
    return torch.cat([a * cos_NE - b * sin_NE, b * cos_NE + a * sin_NE], -1)


def modulate(x_BND: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    """x (1 + scale) + shift, with one shift and scale a row."""
    return torch.addcmul(shift_BD.unsqueeze(1), x_BND, 1 + scale_BD.unsqueeze(1))


def zero_linear(width: int, outputs: int) -> nn.Linear:
    """A linear layer that starts at zero."""
    layer = nn.Linear(width, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class Attention(nn.Module):
    """Multi-head self-attention over all tokens."""

    kernel: Kernel = staticmethod(sdpa)

    def __init__(self, width: int, heads: int, qk_norm: bool, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        self.q_norm = nn.RMSNorm(width // heads, eps=1e-6) if qk_norm else None
        self.k_norm = nn.RMSNorm(width // heads, eps=1e-6) if qk_norm else None

    def forward(self, x_BND: Tensor, turns: Turns, mask: Tensor | None, cache: Cache | None = None) -> Tensor:
        B, N, D = x_BND.shape
        qkv = self.qkv(x_BND).view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)  # (3, B, A, N, E)
        qk, v = qkv[:2], qkv[2]
        if self.q_norm is not None and self.k_norm is not None:
            qk = torch.stack([self.q_norm(qk[0]), self.k_norm(qk[1])]).to(v.dtype)
        if turns is not None:
            qk = rotate(qk, *turns).to(v.dtype)  # both at once; the angles are fp32 also under bf16
        k, v = (qk[1], v) if cache is None else cache.append(qk[1], v)
        mixed = self.kernel(qk[0], k, v, mask, self.causal and mask is None and N > 1)
        return self.proj(mixed.transpose(1, 2).reshape(B, N, D))


class CrossAttention(nn.Module):
    """Multi-head attention from the positions to the tokens of a text."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.kv = nn.Linear(width, width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)

    def forward(self, x_BSD: Tensor, text: Text) -> Tensor:
        (k, v), q = (self._heads(x) for x in self.kv(text.tokens_BMD).chunk(2, -1)), self._heads(self.q(x_BSD))
        q, k = rotate(q, *text.position_turns).to(v.dtype), rotate(k, *text.token_turns).to(v.dtype)
        return self.proj(sdpa(q, k, v, text.mask).transpose(1, 2).flatten(2))

    def _heads(self, x_BND: Tensor) -> Tensor:
        """(B, A, N, E)."""
        return x_BND.unflatten(2, (self.heads, -1)).transpose(1, 2)


class SwiGLU(nn.Module):
    """W3 (silu(W1 x) · W2 x)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden, bias=False)
        self.w3 = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, -1)
        return self.w3(F.silu(gate) * value)


class Block(nn.Module):
    """AdaLN-Zero: shift, scale and gate of both branches from the condition, starting as the identity."""

    def __init__(self, width: int, heads: int, qk_norm: bool, mlp: int, cross: bool, causal: bool) -> None:
        """mlp: hidden width of SwiGLU. cross: attend to a text, too; what this adds starts at zero."""
        super().__init__()
        self.norm1 = nn.RMSNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(width, heads, qk_norm, causal)
        self.norm2 = nn.RMSNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = SwiGLU(width, mlp)
        self.modulation = nn.Linear(width, 6 * width)
        self.cross_norm = nn.RMSNorm(width, eps=1e-6) if cross else None
        self.cross = CrossAttention(width, heads) if cross else None

    def forward(
        self, x_BND: Tensor, cond_BD: Tensor, turns: Turns, mask: Tensor | None, text: Text | None = None,
        cache: Cache | None = None,
    ) -> Tensor:  # fmt: skip
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(cond_BD)).chunk(6, -1)
        attended = self.attn(modulate(self.norm1(x_BND), shift1, scale1), turns, mask, cache)
        x_BND = torch.addcmul(x_BND, gate1.unsqueeze(1), attended)
        if self.cross is not None and self.cross_norm is not None and text is not None:
            x_BND = x_BND + self.cross(self.cross_norm(x_BND), text)
        return torch.addcmul(x_BND, gate2.unsqueeze(1), self.mlp(modulate(self.norm2(x_BND), shift2, scale2)))


class StepEmbedding(nn.Module):
    """Sinusoidal embedding of t of width 256, as in DiT, then a two-layer MLP: (B,) -> (B, D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t_B: Tensor) -> Tensor:
        return self.mlp(sinusoids(t_B, 256))


class Transformer(nn.Module):
    """Embedded positions in, normalised and modulated positions out. The tables of classes are here too."""

    recompute = False  # activation checkpointing: the backward pass computes each block's activations again

    def __init__(
        self, cfg: TransformerConfig, grid: Sequence[int], channels: int, classes: int, causal: bool = False
    ) -> None:
        """grid: positions on each of its axes. channels: C of class latents. classes: without the null class; 0: no
        tables of classes, for conditions from elsewhere.

        causal: a position attends to the condition's tokens, itself and the positions before it."""
        super().__init__()
        self.causal = causal
        D, heads = cfg.hidden, cfg.heads or cfg.depth
        self.cfg, self.grid, self.length = cfg, tuple(grid), math.prod(grid)
        is_speech, cross = self.length < 0, cfg.align == "cross"  # as long as the item
        if is_speech and (cfg.positions != "rope" or cfg.class_latents or cfg.class_tokens):
            raise UsageError("sound takes network.positions=rope, and no class latents or tokens", "leave them out")
        if cross and not is_speech:
            raise UsageError("network.align=cross is for sound", "leave it out")
        # The order of the modules is the order in which the initialisation draws: it is part of what a seed means.
        self.step_embedding = StepEmbedding(D)
        self.class_embedding = None if is_speech or classes == 0 else nn.Embedding(classes + 1, D)
        self.speech: SpeechCondition | TextCondition | None = None
        if is_speech and cross:
            self.speech = TextCondition(D, heads, cfg.text_depth, channels, classes)
        elif is_speech:
            self.speech = SpeechCondition(D, channels, classes)
        self.positions = nn.Embedding(self.length, D) if cfg.positions in ("learned", "both") else None
        self.class_latents = nn.Embedding(classes + 1, self.length * channels) if cfg.class_latents else None
        self.class_latents_in = nn.Linear(channels, D, bias=False) if cfg.class_latents else None
        self.class_tokens = nn.Embedding(classes + 1, cfg.class_tokens * D) if cfg.class_tokens else None
        self.blocks = nn.ModuleList(
            Block(D, heads, cfg.qk_norm, cfg.mlp_width, cross, causal) for _ in range(cfg.depth)
        )
        self.norm = nn.RMSNorm(D, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(D, 2 * D)
        if cfg.positions in ("rope", "both"):
            angles = rope_table((LONGEST,) if is_speech else grid, D // heads)
            self.cos, self.sin = (nn.Buffer(x, persistent=False) for x in (angles.cos(), angles.sin()))
        for module in self.modules():  # DiT's initialisation
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for name, parameter in self.named_parameters():
            if "modulation" in name or "cross.proj" in name:
                nn.init.zeros_(parameter)
        for index in (0, 2):
            nn.init.normal_(self.get_parameter(f"step_embedding.mlp.{index}.weight"), std=0.02)

    @property
    def class_tables(self) -> list[str]:
        """Names of the tables with a row a class, or unit of text, of which the last is the null class's."""
        embeddings = [(name, module) for name, module in self.named_modules() if isinstance(module, nn.Embedding)]
        return [f"{name}.weight" for name, module in embeddings if module is not self.positions]

    def condition(self, columns: Columns) -> Condition:
        """The condition of labels 0..classes, or of the columns of `SpeechCondition` or `TextCondition`."""
        if self.speech is not None:
            return self.speech(columns)
        assert self.class_embedding is not None
        labels_B, tokens, latents = columns["labels"], None, None
        B = len(labels_B)
        if self.class_tokens is not None:
            tokens = self.class_tokens(labels_B).view(B, -1, self.cfg.hidden)
        if self.class_latents is not None and self.class_latents_in is not None:
            latents = self.class_latents_in(self.class_latents(labels_B).view(B, self.length, -1))
        return Condition(self.class_embedding(labels_B), tokens, latents_BSD=latents)

    def forward(
        self, x_BSD: Tensor, t_B: Tensor, condition: Condition, caches: Sequence[Cache] | None = None
    ) -> Tensor:
        """x: embedded input. t: 1..T, or another scalar a row. -> (B, S, D).

        caches: one a block, of the positions that earlier passes have seen; x is what follows them."""
        S, cond_BD = x_BSD.shape[1], self.step_embedding(t_B) + condition.vector_BD
        tokens_BMD = None if self.cfg.align == "cross" else condition.tokens_BMD
        M = 0 if tokens_BMD is None else tokens_BMD.shape[1]
        first = caches[0].length - M if caches and caches[0].length else 0
        assert first == 0 or S == 1, "sequences grow by one position at a time"
        places = slice(first, first + S)
        if self.positions is not None:
            x_BSD = x_BSD + self.positions.weight[places]
        if condition.latents_BSD is not None:
            x_BSD = x_BSD + condition.latents_BSD[:, places]
        x_BND, turns, text = x_BSD, None, None
        if self.cfg.align == "cross":
            text = self._text(condition)
        elif tokens_BMD is not None and first == 0:
            x_BND = torch.cat([tokens_BMD.to(x_BSD.dtype), x_BSD], 1)
        front = x_BND.shape[1] - S
        if self.cfg.positions != "learned":  # the condition's tokens have no place and are not turned
            turns = F.pad(self.cos[places], (0, 0, front, 0), value=1.0), F.pad(self.sin[places], (0, 0, front, 0))
        mask = self._causal_mask(M, S, front) if self.causal else self._mask(condition, S, text)
        for number, block in enumerate(self.blocks):
            if self.recompute and torch.is_grad_enabled():
                x_BND = torch.utils.checkpoint.checkpoint(block, x_BND, cond_BD, turns, mask, text, use_reentrant=False)
            else:
                x_BND = block(x_BND, cond_BD, turns, mask, text, caches[number] if caches else None)
        shift, scale = self.modulation(F.silu(cond_BD)).chunk(2, -1)
        return modulate(self.norm(x_BND[:, -S:]), shift, scale)

    def _mask(self, condition: Condition, positions: int, text: Text | None) -> Tensor | None:
        """What all tokens may attend to, (B, 1, 1, N)."""
        if condition.exists_BS is not None:
            return condition.exists_BS[:, None, None]
        if condition.mask_BM is not None and text is None:
            return F.pad(condition.mask_BM, (0, positions), value=True)[:, None, None]
        return None

    def _causal_mask(self, tokens: int, positions: int, front: int) -> Tensor | None:
        """What `front` tokens of the condition and these positions may attend to, (1, 1, N, N).

        None: what comes before them, which the kernel knows without a mask; so does a single one after cached ones."""
        if tokens == 0 or front + positions == 1:
            return None
        mask = torch.ones(front + positions, front + positions, dtype=torch.bool, device=self.modulation.weight.device)
        mask = mask.tril()
        mask[:, :front] = True
        return mask[None, None]

    def _text(self, condition: Condition) -> Text:
        """The tokens of a condition of text. The angles of positions run over as many units as those of its tokens.

        By them a position can tell the units near its own share of the text; this is a choice of ours."""
        tokens_BMD, mask_BM, exists_BS = condition.tokens_BMD, condition.mask_BM, condition.exists_BS
        assert tokens_BMD is not None
        assert mask_BM is not None
        assert exists_BS is not None
        units_B1, length_B1 = mask_BM.sum(1, keepdim=True), exists_BS.sum(1, keepdim=True)
        place_BS = (torch.arange(exists_BS.shape[1], device=mask_BM.device) + 0.5) * units_B1 / length_B1
        place_M = torch.arange(mask_BM.shape[1], device=mask_BM.device) + 0.5
        width = tokens_BMD.shape[2] // (self.cfg.heads or self.cfg.depth)
        turns = (sinusoids(place, width).chunk(2, -1) for place in (place_BS.unsqueeze(1), place_M))
        (cos_BS, sin_BS), (cos_M, sin_M) = turns
        return Text(tokens_BMD, mask_BM[:, None, None], (cos_BS, sin_BS), (cos_M, sin_M))

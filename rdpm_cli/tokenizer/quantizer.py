"""T-step noisy residual quantisation (arXiv 2412.18390 §3.1, Alg. 1): the loop exists once, here.

Legend: B batch, T steps, C code width, H W latent grid, N vectors, K codebook entries, S books (1 or T).
t counts 1..T as in the paper; column t - 1 of a tensor belongs to step t.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdpm_cli.config import QuantizerConfig, ScheduleConfig
from rdpm_cli.step import TrainStep
from rdpm_cli.tokenizer.schedule import alphas, beta

TILE = 64  # width of the tiles of the two-stage argmin
BLOCK_BYTES = {"cpu": 2 << 20, "cuda": 256 << 20}  # scores held at once


def nearest_code(v_NC: Tensor, codebook_KC: Tensor) -> Tensor:
    """Q(.) of Eq. 2: argmin_k |v - e_k|². |v|² is constant in k and dropped. -> (N,) int64, lowest index on a tie.

    fp32 also inside autocast (bf16 scores flip 5% of the codes); the N × K scores never exist at once. The argmin
    takes two stages because reducing over K costs more than the product.
    """
    with torch.autocast(v_NC.device.type, enabled=False):
        codes, width = codebook_KC.shape[0], codebook_KC.shape[1]
        padded = -codes % TILE
        keys_KC = F.pad(codebook_KC.float(), (0, 0, 0, padded))
        half_norm_K = F.pad(0.5 * codebook_KC.float().pow(2).sum(1), (0, padded), value=math.inf)
        rows = max(1, BLOCK_BYTES.get(v_NC.device.type, BLOCK_BYTES["cuda"]) // (4 * (codes + padded)))
        found = [_nearest_block(v, keys_KC, half_norm_K) for v in v_NC.float().reshape(-1, width).split(rows)]
        return torch.cat(found)


def _nearest_block(v_NC: Tensor, keys_KC: Tensor, half_norm_K: Tensor) -> Tensor:
    scores_NK = torch.addmm(half_norm_K, v_NC, keys_KC.T, alpha=-1)  # |e|²/2 - v·e
    tiles = scores_NK.view(len(v_NC), -1, TILE)
    tile_N = tiles.amin(2).argmin(1)
    inside_N = tiles[torch.arange(len(v_NC), device=v_NC.device), tile_N].argmin(1)
    return tile_N * TILE + inside_N


def diffuse(z_t: Tensor, eps_t: Tensor, alpha_t: float) -> Tensor:
    """v_t = alpha_t z_t + beta_t eps_t, Eq. 2."""
    return alpha_t * z_t + beta(alpha_t) * eps_t


@dataclass
class Usage:
    """What a codebook needs to follow its vectors, of this process's rows."""

    counts_SK: Tensor  # gamma-weighted number of vectors a code
    sums_SKC: Tensor  # gamma-weighted sum of those vectors
    used_TK: Tensor  # plain number of vectors a step and code
    vectors_TBNC: Tensor  # the v_t, from which dead codes restart; N positions

    def merged(self, other: "Usage") -> "Usage":
        """This and the next micro-batch's."""
        return Usage(
            self.counts_SK + other.counts_SK,
            self.sums_SKC + other.sums_SKC,
            self.used_TK + other.used_TK,
            torch.cat([self.vectors_TBNC, other.vectors_TBNC], 1),
        )


@dataclass
class Chain:
    """One pass of the residual chain."""

    codes_BTHW: Tensor  # int64
    z_BCHW: Tensor  # z'_T, straight-through to z
    loss: Tensor  # L_quant of Eq. 4, scalar
    error_T: Tensor  # mean |z - z'_t|² a step, per channel and position, detached
    usage: Usage | None  # in training mode


class Quantizer(nn.Module):
    """Codebook(s), the bias convolution shared by all t, and the schedule."""

    books: Tensor
    ema_counts: Tensor
    ema_sums: Tensor

    def __init__(self, cfg: QuantizerConfig, schedule: ScheduleConfig, channels: int, weight: bool = True) -> None:
        """channels: C. weight: gamma_t = alpha_t in L_quant, else 1."""
        super().__init__()
        self.cfg, self.steps = cfg, cfg.steps
        self.alphas = alphas(schedule, cfg.steps)
        self.gammas = self.alphas if weight else [1.0] * cfg.steps
        shape = (cfg.steps if cfg.codebooks == "per_step" else 1, cfg.codes, channels)
        books = torch.randn(shape)
        if cfg.codebook == "gradient":
            self.books = nn.Parameter(books)
        else:
            self.register_buffer("books", books)
            self.register_buffer("ema_counts", torch.ones(shape[:2]))
            self.register_buffer("ema_sums", books.clone())
        self.phi = nn.Conv2d(channels, channels, 3, padding=1) if cfg.bias != "none" else None
        if self.phi is not None and cfg.bias == "add":
            nn.init.zeros_(self.phi.weight)
            nn.init.zeros_(self.phi.bias)  # type: ignore[arg-type]

    @torch.no_grad()
    def place(self, books_SKC: Tensor) -> None:
        """Set the codebook(s); an EMA one follows its vectors from there."""
        self.books.copy_(books_SKC)
        if self.cfg.codebook == "ema":
            self.ema_counts.fill_(1.0)
            self.ema_sums.copy_(self.books)

    # ---- the pieces of one step ------------------------------------------------------------------------------

    def book(self, t: int) -> Tensor:
        """The codebook of step t, (K, C)."""
        return self.books[t - 1 if self.cfg.codebooks == "per_step" else 0]

    def quantize(self, v_BCHW: Tensor, t: int) -> Tensor:
        """C_t = Q(v_t): (B, H, W) int64."""
        B, C, H, W = v_BCHW.shape
        return nearest_code(v_BCHW.movedim(1, -1).reshape(-1, C), self.book(t)).view(B, H, W)

    def look_up(self, codes_BHW: Tensor, t: int) -> Tensor:
        """e_{C_t}, (B, C, H, W)."""
        return F.embedding(codes_BHW.long(), self.book(t)).movedim(-1, 1)

    def bias(self, q_BCHW: Tensor) -> Tensor:
        """bias(q): q, q + conv(q) or 0.5 q + 0.5 conv(q). Used in the residual, the sum, the loss and the sampler."""
        return self.bias_of_sum(q_BCHW, 1)

    def bias_of_sum(self, sum_BCHW: Tensor, terms: int | Tensor) -> Tensor:
        """sum_i bias(q_i) from sum_i q_i: bias is affine, so one convolution does. terms: n, an int or (B,)."""
        if self.phi is None:
            return sum_BCHW
        share = 0.5 if self.cfg.bias == "blend" else 1.0
        with torch.autocast(sum_BCHW.device.type, enabled=False):  # z' is the tokenizer's own, to fp32
            convolved = F.conv2d(sum_BCHW, self.phi.weight, padding=1)
        assert self.phi.bias is not None
        n = terms.to(sum_BCHW.dtype).view(-1, 1, 1, 1) if isinstance(terms, Tensor) else float(terms)
        return share * (sum_BCHW + convolved + n * self.phi.bias.view(1, -1, 1, 1))

    def guess(self, previous_BCHW: Tensor, eps_BCHW: Tensor, t: int) -> Tensor:
        """The model-free baseline Q(beta_t eps_t - alpha_t z'_{t-1}): what is known of v_t without z. (B, H, W)."""
        return self.quantize(diffuse(-previous_BCHW, eps_BCHW, self.alphas[t - 1]), t)

    # ---- the loop --------------------------------------------------------------------------------------------

    def forward(self, z_BCHW: Tensor, eps_BTCHW: Tensor) -> Chain:
        """Alg. 1: v_t = alpha_t z_t + beta_t eps_t; C_t = Q(v_t); v'_t = bias(e); z_{t+1} = z_t - v'_t.

        Straight-through a step on the live residual, e + v_t - sg(v_t): with `bias: none` the gradient from z'_T to z
        is exactly the identity, because alpha_T = 1. Runs in fp32 also inside autocast.
        """
        with torch.autocast(z_BCHW.device.type, enabled=False):
            z_BCHW, eps_BTCHW = z_BCHW.float(), eps_BTCHW.float()
            z_t, total = z_BCHW, torch.zeros_like(z_BCHW)
            loss, codes, vectors, errors = z_BCHW.new_zeros(()), [], [], []
            for t in range(1, self.steps + 1):
                v_t = diffuse(z_t, eps_BTCHW[:, t - 1], self.alphas[t - 1])
                codes_t = self.quantize(v_t.detach(), t)
                q_t = self.look_up(codes_t, t)
                chosen = self.bias(q_t.detach() + (v_t - v_t.detach()))
                z_t, total = z_t - chosen, total + chosen
                codes.append(codes_t)
                errors.append(F.mse_loss(total.detach(), z_BCHW.detach()))
                if self.training:
                    loss = loss + self.gammas[t - 1] * self._quant_loss(v_t, chosen, q_t)
                    vectors.append(v_t.detach())
            codes_BTHW = torch.stack(codes, 1)
            usage = self._usage(codes_BTHW, vectors) if self.training else None
        return Chain(codes_BTHW, total, loss, torch.stack(errors), usage)

    def _quant_loss(self, v_t: Tensor, chosen: Tensor, q_t: Tensor) -> Tensor:
        """One term of Eq. 4: mean[|v_t - sg v'_t|² + |sg v_t - bias(e')|²]; e' = sg(e) for an EMA book."""
        learnt = self.bias(q_t if self.cfg.codebook == "gradient" else q_t.detach())
        return F.mse_loss(v_t, chosen.detach()) + F.mse_loss(learnt, v_t.detach())

    @torch.no_grad()
    def encode(self, z_BCHW: Tensor, eps_BTCHW: Tensor) -> Tensor:
        """codes (B, T, H, W) int64 of latents under given noise."""
        codes: Tensor = self(z_BCHW, eps_BTCHW).codes_BTHW
        return codes

    def prefix(self, codes_BTHW: Tensor, terms_B: Tensor) -> Tensor:
        """z'_n = sum_{i<=n} bias(e_{C_i}), n = terms_B a row (0 gives zero): (B, C, H, W)."""
        B, T, H, W = codes_BTHW.shape
        S, K, C = self.books.shape
        book_of_T = torch.arange(T, device=codes_BTHW.device) * K if S > 1 else torch.zeros_like(terms_B[:1])
        index_NT = (codes_BTHW.long() + book_of_T.view(1, -1, 1, 1)).movedim(1, -1).reshape(-1, T)
        keep_BT = torch.arange(T, device=codes_BTHW.device) < terms_B.view(-1, 1)
        keep_NT = keep_BT.view(B, 1, T).expand(B, H * W, T).reshape(-1, T).to(self.books.dtype)
        sum_NC = F.embedding_bag(index_NT, self.books.reshape(S * K, C), mode="sum", per_sample_weights=keep_NT)
        return self.bias_of_sum(sum_NC.view(B, H, W, C).movedim(-1, 1), terms_B)

    def decode(self, codes_BTHW: Tensor) -> Tensor:
        """z'_T of codes: the inverse of encode, up to the quantisation error."""
        return self.prefix(codes_BTHW, torch.full((len(codes_BTHW),), self.steps, device=codes_BTHW.device))

    # ---- the codebook follows its vectors --------------------------------------------------------------------

    def _usage(self, codes_BTHW: Tensor, vectors: list[Tensor]) -> Usage:
        S, K, C = self.books.shape
        vectors_TBNC = torch.stack([v.flatten(2).transpose(1, 2) for v in vectors])
        used = torch.stack([codes_BTHW[:, t].flatten().bincount(minlength=K) for t in range(self.steps)]).float()
        counts, sums = torch.zeros_like(self.books[..., 0]), torch.zeros_like(self.books)
        for t, gamma in enumerate(self.gammas):
            book = t if S > 1 else 0
            counts[book] += gamma * used[t]
            sums[book].index_add_(0, codes_BTHW[:, t].flatten(), vectors_TBNC[t].reshape(-1, C), alpha=gamma)
        return Usage(counts.detach(), sums.detach(), used, vectors_TBNC)

    @torch.no_grad()
    def follow(self, usage: Usage, step: TrainStep) -> int:
        """EMA step of the codebook, then restarts of dead codes from current vectors. -> number restarted.

        `usage` becomes the sum over processes. A gradient-trained book is left alone.
        """
        for value in (usage.counts_SK, usage.sums_SKC, usage.used_TK):
            step.sum_(value)
        if self.cfg.codebook == "gradient":
            return 0
        self.ema_counts.lerp_(usage.counts_SK, 1 - self.cfg.decay)
        self.ema_sums.lerp_(usage.sums_SKC, 1 - self.cfg.decay)
        restarted = 0
        for book, counts_K in enumerate(self.ema_counts):
            mean = counts_K.mean().clone()
            dead = (counts_K < self.cfg.restart_below * mean).nonzero().flatten()
            if len(dead):
                steps = usage.vectors_TBNC[book : book + 1] if len(self.books) > 1 else usage.vectors_TBNC
                counts_K[dead] = mean
                self.ema_sums[book, dead] = mean * _draw_vectors(steps, len(dead), step)
                restarted += len(dead)
        self.books.copy_(self.ema_sums / self.ema_counts.clamp_min(1e-12).unsqueeze(-1))
        return restarted


def _draw_vectors(vectors_TBNC: Tensor, count: int, step: TrainStep) -> Tensor:
    """`count` vectors of the global batch, drawn alike in every process and summed from whoever holds them."""
    T, _, N, C = vectors_TBNC.shape
    place = step.pick(count, T * step.batch * N).to(vectors_TBNC.device)
    t, row, position = place // (step.batch * N), place // N % step.batch, place % N
    mine = (row >= step.rows.start) & (row < step.rows.stop)
    drawn = vectors_TBNC.new_zeros(count, C)
    drawn[mine] = vectors_TBNC[t[mine], row[mine] - step.rows.start, position[mine]]
    return step.sum_(drawn)

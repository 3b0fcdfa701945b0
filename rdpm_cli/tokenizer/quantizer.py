"""T-step noisy residual quantisation (arXiv 2412.18390 §3.1, Alg. 1): the loop exists once, here.

Legend: B batch, T steps, C code width, H W latent grid, N vectors, K codebook entries, S books (1 or T).
t counts 1..T as in the paper; column t - 1 of a tensor belongs to step t.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdpm_cli import precision
from rdpm_cli.config import QuantizerConfig, ScheduleConfig
from rdpm_cli.step import TrainStep
from rdpm_cli.tokenizer.schedule import alphas, beta

TILE = 64  # width of the tiles of the two-stage argmin
BLOCK_BYTES = {"cpu": 2 << 20, "cuda": 256 << 20}  # of scores held at once


class Search:
    """Q(.) of Eq. 2 over one codebook: argmin_k |v - e_k|² = argmin_k |e_k|²/2 - v·e_k, as |v|² is constant in k.

    What depends on the codebook alone is computed once, here: the keys -e_k, with |e_k|²/2 for a vector's (C+1)th
    number, 1. fp32 also inside autocast (bf16 scores flip 5% of the codes); the N × K scores never exist at once, a
    block of rows does, in one buffer. No gradient passes.
    """

    def __init__(self, codebook_KC: Tensor) -> None:
        book_KC = codebook_KC.detach().float()
        codes, width = book_KC.shape
        self.codes = codes
        padded = codes + -codes % TILE
        self.keys = book_KC.new_zeros(width + 1, padded)
        self.keys[:-1, :codes] = -book_KC.T
        self.keys[-1] = math.inf  # of the padding, which is never the nearest
        self.keys[-1, :codes] = 0.5 * book_KC.pow(2).sum(1)
        limit = BLOCK_BYTES.get(book_KC.device.type, BLOCK_BYTES["cuda"])
        self.rows = max(1, limit // (4 * padded))
        self.scores_NK = self.keys.new_empty(0, padded)

    def nearest(self, v_NC: Tensor) -> Tensor:
        """-> (N,) int64, the lowest index on a tie."""
        with precision.full(v_NC):
            return torch.cat([self._block(v) for v in v_NC.detach().float().split(self.rows)])

    def _block(self, v_NC: Tensor) -> Tensor:
        if len(self.scores_NK) < len(v_NC):
            self.scores_NK = self.scores_NK.new_empty(len(v_NC), self.scores_NK.shape[1])
        with_one = F.pad(v_NC, (0, 1), value=1.0)
        found = lowest(torch.mm(with_one, self.keys, out=self.scores_NK[: len(v_NC)]))
        return found.clamp_(max=self.codes - 1)  # a vector that is not finite finds the padding; its loss will tell


def lowest(scores_NK: Tensor) -> Tensor:
    """argmin over K, a multiple of TILE; the lowest index on a tie. -> (N,) int64.

    torch's argmin costs more than the product that made the scores. On CPUs numpy's takes a twelfth to a fifth of it.
    """
    if scores_NK.device.type == "cpu":
        return torch.from_numpy(scores_NK.numpy().argmin(1))
    return lowest_by_tiles(scores_NK)


def lowest_by_tiles(scores_NK: Tensor) -> Tensor:
    """`lowest` in two stages: the first tile that holds the minimum, then the first place in it."""
    tiles = scores_NK.view(len(scores_NK), -1, TILE)
    tile_N = tiles.amin(2).argmin(1)
    inside_N = tiles[torch.arange(len(tiles), device=tiles.device), tile_N].argmin(1)
    return tile_N * TILE + inside_N


def nearest_code(v_NC: Tensor, codebook_KC: Tensor) -> Tensor:
    """Q(.) of Eq. 2, for one use of a codebook. -> (N,) int64."""
    return Search(codebook_KC).nearest(v_NC)


def diffuse(z_t: Tensor, eps_t: Tensor, alpha_t: float) -> Tensor:
    """v_t = alpha_t z_t + beta_t eps_t, Eq. 2."""
    return alpha_t * z_t + beta(alpha_t) * eps_t


def _straight_through(q_t: Tensor, v_t: Tensor) -> Tensor:
    """sg(e) + v_t - sg(v_t): e in value, v_t in gradient."""
    return q_t.detach() + (v_t - v_t.detach()) if v_t.requires_grad else q_t.detach()


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
    error_T: Tensor  # mean |z - z'_t|² a step, per channel and position, detached; empty if codes_only
    usage: Usage | None  # in training mode
    spread: Tensor | None  # of z, in training mode


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

    def quantize(self, v_BCHW: Tensor, t: int, search: Search | None = None) -> Tensor:
        """C_t = Q(v_t): (B, H, W) int64. search: the one of step t's codebook, where it serves more than once."""
        B, C, H, W = v_BCHW.shape
        search = search or Search(self.book(t))
        return search.nearest(v_BCHW.movedim(1, -1).reshape(-1, C)).view(B, H, W)

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
        with precision.full(sum_BCHW):  # z' is the tokenizer's own, to fp32
            convolved = F.conv2d(sum_BCHW, self.phi.weight, padding=1)
        assert self.phi.bias is not None
        n = terms.to(sum_BCHW.dtype).view(-1, 1, 1, 1) if isinstance(terms, Tensor) else float(terms)
        return share * (sum_BCHW + convolved + n * self.phi.bias.view(1, -1, 1, 1))

    def guess(self, previous_BCHW: Tensor, eps_BCHW: Tensor, t: int) -> Tensor:
        """The model-free baseline Q(beta_t eps_t - alpha_t z'_{t-1}): what is known of v_t without z. (B, H, W)."""
        return self.quantize(diffuse(-previous_BCHW, eps_BCHW, self.alphas[t - 1]), t)

    # ---- the loop --------------------------------------------------------------------------------------------

    def forward(self, z_BCHW: Tensor, eps_BTCHW: Tensor, codes_only: bool = False) -> Chain:
        """Alg. 1: v_t = alpha_t z_t + beta_t eps_t; C_t = Q(v_t); v'_t = bias(e); z_{t+1} = z_t - v'_t.

        Straight-through a step on the live residual, e + v_t - sg(v_t): with `bias: none` the gradient from z'_T to z
        is exactly the identity, because alpha_T = 1. Runs in fp32 also inside autocast. codes_only: without loss,
        errors (empty) and usage.
        """
        learning = self.training and not codes_only
        with precision.full(z_BCHW):
            z_BCHW, eps_BTCHW = z_BCHW.float(), eps_BTCHW.float()
            z_t, total = z_BCHW, torch.zeros_like(z_BCHW)
            loss, codes, vectors, errors = z_BCHW.new_zeros(()), [], [], []
            search: Search | None = None
            for t in range(1, self.steps + 1):
                search = Search(self.book(t)) if search is None or len(self.books) > 1 else search
                v_t = diffuse(z_t, eps_BTCHW[:, t - 1], self.alphas[t - 1])
                codes_t = self.quantize(v_t, t, search)
                q_t = self.look_up(codes_t, t)
                chosen = self.bias(_straight_through(q_t, v_t))
                z_t, total = z_t - chosen, total + chosen
                codes.append(codes_t)
                if not codes_only:
                    errors.append(F.mse_loss(total.detach(), z_BCHW.detach()))
                if learning:
                    loss = loss + self.gammas[t - 1] * self._quant_loss(v_t, chosen, q_t)
                    vectors.append(v_t.detach())
            codes_BTHW = torch.stack(codes, 1)
            usage, spread = (self._usage(codes_BTHW, vectors), _spread(z_BCHW)) if learning else (None, None)
        return Chain(codes_BTHW, total, loss, torch.stack(errors) if errors else z_BCHW.new_empty(0), usage, spread)

    def _quant_loss(self, v_t: Tensor, chosen: Tensor, q_t: Tensor) -> Tensor:
        """One term of Eq. 4: mean[|v_t - sg v'_t|² + |sg v_t - bias(e')|²]; e' = sg(e) for an EMA book."""
        learnt = self.bias(q_t if self.cfg.codebook == "gradient" else q_t.detach())
        return F.mse_loss(v_t, chosen.detach()) + F.mse_loss(learnt, v_t.detach())

    @torch.no_grad()
    def encode(self, z_BCHW: Tensor, eps_BTCHW: Tensor) -> Tensor:
        """codes (B, T, H, W) int64 of latents under given noise."""
        codes: Tensor = self(z_BCHW, eps_BTCHW, codes_only=True).codes_BTHW
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


@torch.no_grad()
def _spread(z_BCHW: Tensor) -> Tensor:
    """Share of z's energy that varies over images and positions, at most 1; 0 for an encoder that tells nothing.

    Usage does not show that: the noise of the first steps spreads over a shared book whatever z is.
    """
    varies = z_BCHW.var((0, 2, 3), correction=0).sum()
    return varies / z_BCHW.pow(2).mean((0, 2, 3)).sum().clamp_min(1e-12)


def _draw_vectors(vectors_TBNC: Tensor, count: int, step: TrainStep) -> Tensor:
    """`count` vectors of the global batch, drawn alike in every process and summed from whoever holds them."""
    T, _, N, C = vectors_TBNC.shape
    place = step.pick(count, T * step.batch * N).to(vectors_TBNC.device)
    t, row, position = place // (step.batch * N), place // N % step.batch, place % N
    mine = (row >= step.rows.start) & (row < step.rows.stop)
    drawn = vectors_TBNC.new_zeros(count, C)
    drawn[mine] = vectors_TBNC[t[mine], row[mine] - step.rows.start, position[mine]]
    return step.sum_(drawn)

"""T-step noisy residual quantisation (arXiv 2412.18390 §3.1, Alg. 1), its noise schedule and its codebooks.

Legend: B batch, T steps, C code width, S positions of the flattened grid, N vectors (B·S), K codebook entries,
M codebooks (1 or T). t counts 1..T as in the paper; column t - 1 of a tensor belongs to step t."""

import math
from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdpm_cli import noise
from rdpm_cli.distributed import TrainStep, full_precision
from rdpm_cli.tokenizer.config import QuantizerConfig, ScheduleConfig

TILE = 64  # width of the tiles of the two-stage argmin
BLOCK_BYTES = {"cpu": 2 << 20, "cuda": 256 << 20}  # of scores held at once: 2 MiB stay in a CPU core's cache
CONVOLUTIONS = ((nn.Conv1d, F.conv1d), (nn.Conv2d, F.conv2d), (nn.Conv3d, F.conv3d))  # by the axes of the grid


def alphas(schedule: ScheduleConfig, steps: int) -> list[float]:
    """alpha_1..alpha_T (Table 4). alpha_T = 1 always: the last step sees the residual without noise."""
    before_last = {
        "pow": [schedule.base ** (steps - t) for t in range(1, steps)],
        "linear": [t / steps for t in range(1, steps)],
        "sin": [math.sin(math.pi * t / (2 * steps)) for t in range(1, steps)],
        "rvq": [1.0] * (steps - 1),
    }
    return [*before_last[schedule.kind], 1.0]  # exactly 1, where sin(pi / 2) may miss it by a rounding


def beta(alpha_t: float) -> float:
    """beta_t = sqrt(1 - alpha_t²)."""
    return math.sqrt(1.0 - alpha_t * alpha_t)


def diffuse(z_t: Tensor, eps_t: Tensor, alpha_t: float) -> Tensor:
    """v_t = alpha_t z_t + beta_t eps_t, Eq. 2."""
    return alpha_t * z_t + beta(alpha_t) * eps_t


class Search:
    """Q(.) of Eq. 2 over one codebook: argmin_k |v - e_k|² = argmin_k |e_k|²/2 - v·e_k. No gradient passes.

    The keys -e_k have |e_k|²/2 as an additional row, which meets a constant 1 in every vector. The scores are fp32 also
    inside autocast, where bf16 ones would change some percent of the codes."""

    def __init__(self, codebook_KC: Tensor) -> None:
        book_KC = codebook_KC.detach().float()
        self.codes = len(book_KC)
        padding = (0, -self.codes % TILE)
        norms_1K = F.pad(0.5 * book_KC.pow(2).sum(1), padding, value=math.inf)[None]  # padding is never the nearest
        self.keys = torch.cat([F.pad(-book_KC.T, padding), norms_1K])
        # The N × K scores never exist at once: one block of rows does, in a buffer that all blocks share.
        self.rows = max(1, BLOCK_BYTES["cpu" if book_KC.device.type == "cpu" else "cuda"] // (4 * self.keys.shape[1]))

    def nearest(self, v_NC: Tensor) -> Tensor:
        """-> (N,) int64, the lowest index on a tie."""
        scores_NK = self.keys.new_empty(min(self.rows, len(v_NC)), self.keys.shape[1])
        codes = []
        with full_precision(v_NC):
            for v in v_NC.detach().float().split(self.rows):
                block = torch.mm(F.pad(v, (0, 1), value=1.0), self.keys, out=scores_NK[: len(v)])
                codes.append(lowest(block))
        # A vector that is not finite may land in the padding; the index stays valid and the loss reports the vector.
        return torch.cat(codes).clamp_(max=self.codes - 1)


def lowest(scores_NK: Tensor) -> Tensor:
    """argmin over K, a multiple of TILE; the lowest index on a tie. -> (N,) int64."""
    if scores_NK.device.type == "cpu":  # torch's argmin would cost more than the product that made the scores
        return torch.from_numpy(scores_NK.numpy().argmin(1))
    return lowest_by_tiles(scores_NK)


def lowest_by_tiles(scores_NK: Tensor) -> Tensor:
    """`lowest` in two stages: the first tile that holds the minimum, then the first position in it."""
    tiles = scores_NK.view(len(scores_NK), -1, TILE)
    tile_N = tiles.amin(2).argmin(1)
    inside_N = tiles[torch.arange(len(tiles), device=tiles.device), tile_N].argmin(1)
    return tile_N * TILE + inside_N


class Chain(NamedTuple):
    """One pass of the residual chain."""

    codes_BTS: Tensor  # int64
    z_BCS: Tensor  # z'_T, or z'_n, straight-through to z
    loss: Tensor  # L_quant of Eq. 4, scalar; 0 outside training mode
    error_T: Tensor  # mean |z - z'_t|² a step, per channel and position, detached
    vectors_TBSC: Tensor  # v_t, detached
    spread: Tensor  # share of z's energy that varies over images and positions, detached


class Quantizer(nn.Module):
    """Codebook(s), the schedule, and one bias convolution, which has the axes of the grid."""

    def __init__(
        self, cfg: QuantizerConfig, schedule: ScheduleConfig, channels: int, grid: tuple[int, ...], weight: bool = True
    ) -> None:
        """channels: C. grid: positions on each of 1 to 3 axes. weight: gamma_t = alpha_t in L_quant, else 1."""
        super().__init__()
        self.cfg, self.steps, self.grid = cfg, cfg.steps, tuple(grid)
        self.alphas = alphas(schedule, cfg.steps)
        self.gammas = self.alphas if weight else [1.0] * cfg.steps
        books = torch.randn(cfg.steps if cfg.codebooks == "per_step" else 1, cfg.codes, channels)
        self.books: Tensor = nn.Parameter(books) if cfg.codebook == "gradient" else nn.Buffer(books)
        if cfg.codebook == "ema":
            self.ema_counts, self.ema_sums = nn.Buffer(torch.ones(books.shape[:2])), nn.Buffer(books.clone())
        convolution, self.convolve = CONVOLUTIONS[len(self.grid) - 1]
        self.phi = convolution(channels, channels, 3, padding=1) if cfg.bias != "none" else None
        if self.phi is not None and cfg.bias == "add":
            for parameter in self.phi.parameters():
                nn.init.zeros_(parameter)

    @torch.no_grad()
    def set_books(self, books_MKC: Tensor) -> None:
        """Set the codebook(s); an EMA one follows its vectors from there."""
        self.books.copy_(books_MKC)
        if self.cfg.codebook == "ema":
            self.ema_counts.fill_(1.0)
            self.ema_sums.copy_(self.books)

    def noise(
        self, purpose: str, seed: int, indices: Sequence[int], views: Sequence[int], ts: Sequence[int],
        length: int | None = None,
    ) -> Tensor:  # fmt: skip
        """eps of these addresses, (n, C, S) on the CPU. length: S of a grid that is as long as its item."""
        shape = self.books.shape[-1], math.prod(self.grid) if length is None else length
        return torch.from_numpy(noise.normal_rows(purpose, seed, indices, views, ts, shape, length is not None))

    def book(self, t: int) -> Tensor:
        """The codebook of step t, (K, C)."""
        return self.books[t - 1 if self.cfg.codebooks == "per_step" else 0]

    def quantize(self, v_BCS: Tensor, t: int, search: Search | None = None) -> Tensor:
        """C_t = Q(v_t): (B, S) int64. search: over step t's codebook, where it serves more than once."""
        B, C, S = v_BCS.shape
        search = search or Search(self.book(t))
        return search.nearest(v_BCS.transpose(1, 2).reshape(-1, C)).view(B, S)

    def look_up(self, codes_BS: Tensor, t: int) -> Tensor:
        """e_{C_t}, (B, C, S)."""
        return F.embedding(codes_BS.long(), self.book(t)).transpose(1, 2)

    def bias(self, q_BCS: Tensor, terms_B: Tensor | None = None) -> Tensor:
        """bias(q): q, q + conv(q) or 0.5 q + 0.5 conv(q); of a sum of n = terms_B vectors (default 1), their sum."""
        if self.phi is None:
            return q_BCS
        assert self.phi.bias is not None
        with full_precision(q_BCS):  # a generator in bf16 must see the tokenizer's z', to the bits of fp32
            convolved = self.convolve(q_BCS.unflatten(2, self.grid), self.phi.weight, padding=1).flatten(2)
        n = 1 if terms_B is None else terms_B.view(-1, 1, 1)  # bias is affine, so that one convolution serves a sum
        return (0.5 if self.cfg.bias == "blend" else 1.0) * (q_BCS + convolved + n * self.phi.bias.view(1, -1, 1))

    def guess(self, previous_BCS: Tensor, eps_BCS: Tensor, t: int) -> Tensor:
        """The model-free baseline Q(beta_t eps_t - alpha_t z'_{t-1}): v_t without the unknown z. (B, S) int64."""
        return self.quantize(diffuse(-previous_BCS, eps_BCS, self.alphas[t - 1]), t)

    def step(self, z_t: Tensor, eps_BCS: Tensor, t: int, search: Search) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One step of Alg. 1: C_t, v_t, e_{C_t} and v'_t, straight-through to v_t."""
        v_t = diffuse(z_t, eps_BCS, self.alphas[t - 1])
        codes_BS = self.quantize(v_t, t, search)
        q_t = self.look_up(codes_BS, t)
        return codes_BS, v_t, q_t, self.bias(q_t.detach() + (v_t - v_t.detach()))

    def searches(self) -> list[Search]:
        """The search of every step; a shared codebook is prepared once."""
        return [Search(book) for book in self.books] * (self.steps if len(self.books) == 1 else 1)

    def forward(self, z_BCS: Tensor, eps_BTCS: Tensor, terms_B: Tensor | None = None) -> Chain:
        """Alg. 1: v_t = alpha_t z_t + beta_t eps_t; C_t = Q(v_t); v'_t = bias(e); z_{t+1} = z_t - v'_t.

        Straight-through a step on the live residual: with `bias: none` the gradient from z'_T to z is exactly the
        identity, because alpha_T = 1. Runs in fp32 also inside autocast.
        terms: the z' of the chain is z'_n, with a number n of steps for each item; default T."""
        codes, vectors, errors = list[Tensor](), list[Tensor](), list[Tensor]()
        with full_precision(z_BCS):
            z_BCS, eps_BTCS = z_BCS.float(), eps_BTCS.float()
            z_t, total, loss = z_BCS, torch.zeros_like(z_BCS), z_BCS.new_zeros(())
            for t, search in enumerate(self.searches(), 1):
                codes_BS, v_t, q_t, approx_t = self.step(z_t, eps_BTCS[:, t - 1], t, search)
                z_t = z_t - approx_t
                total = total + (approx_t if terms_B is None else approx_t * (terms_B >= t).view(-1, 1, 1))
                codes.append(codes_BS)
                errors.append(F.mse_loss(total.detach(), z_BCS.detach()))
                vectors.append(v_t.detach().transpose(1, 2))
                if self.training:
                    # Eq. 4: mean[|v_t - sg v'_t|² + |sg v_t - bias(e')|²]; no gradient reaches e' of an EMA book
                    learnt = F.mse_loss(self.bias(q_t), v_t.detach())
                    loss = loss + self.gammas[t - 1] * (F.mse_loss(v_t, approx_t.detach()) + learnt)
            # 0 for a collapsed encoder, which the codebook's usage does not show: early noise fills a shared book
            energy = z_BCS.detach().pow(2).mean((0, 2)).sum().clamp_min(1e-12)
            spread = z_BCS.detach().var((0, 2), correction=0).sum() / energy
        return Chain(torch.stack(codes, 1), total, loss, torch.stack(errors), torch.stack(vectors), spread)

    @torch.no_grad()
    def encode(self, z_BCS: Tensor, eps_BTCS: Tensor) -> Tensor:
        """codes (B, T, S) int64 of latents under the noise eps: the steps without what only training needs."""
        codes = []
        with full_precision(z_BCS):
            z_t, eps_BTCS = z_BCS.float(), eps_BTCS.float()
            for t, search in enumerate(self.searches(), 1):
                codes_BS, _, _, approx_t = self.step(z_t, eps_BTCS[:, t - 1], t, search)
                z_t = z_t - approx_t
                codes.append(codes_BS)
        return torch.stack(codes, 1)

    def prefix(self, codes_BTS: Tensor, terms_B: Tensor) -> Tensor:
        """z'_n = sum_{i<=n} bias(e_{C_i}), n = terms_B a row (0 gives zero): (B, C, S)."""
        B, T, S = codes_BTS.shape
        M, K, C = self.books.shape
        # One sum over a flat table of all books, row (t - 1) K + k for code k of step t, with weights 0 after n terms
        step_T = torch.arange(T, device=codes_BTS.device)
        first_row_T = step_T * K if M > 1 else 0 * step_T
        index_NT = (codes_BTS.long() + first_row_T.view(1, -1, 1)).transpose(1, 2).reshape(-1, T)
        keep_NT = (step_T < terms_B.view(-1, 1, 1)).expand(B, S, T).reshape(-1, T).to(self.books.dtype)
        sum_NC = F.embedding_bag(index_NT, self.books.reshape(M * K, C), mode="sum", per_sample_weights=keep_NT)
        return self.bias(sum_NC.view(B, S, C).transpose(1, 2), terms_B)

    def decode(self, codes_BTS: Tensor) -> Tensor:
        """z'_T of codes: the inverse of encode, up to the quantisation error. (B, C, S)."""
        return self.prefix(codes_BTS, torch.full((len(codes_BTS),), self.steps, device=codes_BTS.device))

    @torch.no_grad()
    def follow(self, passes: Sequence[tuple[Tensor, Tensor]], step: TrainStep) -> tuple[int, Tensor]:
        """EMA step of the codebook, then restarts of dead codes from current vectors. A gradient-trained book stays.

        passes: (codes_BTS, vectors_TBSC) of this process's micro-batches. -> number restarted; used_TK."""
        counts = [self._count(codes_BTS, vectors_TBSC) for codes_BTS, vectors_TBSC in passes]
        counts_MK, sums_MKC, used_TK = (step.sum_(reduce(torch.add, parts)) for parts in zip(*counts, strict=True))
        if self.cfg.codebook == "gradient":
            return 0, used_TK
        self.ema_counts.lerp_(counts_MK, 1 - self.cfg.decay)
        self.ema_sums.lerp_(sums_MKC, 1 - self.cfg.decay)
        restarted, vectors_TBSC = 0, torch.cat([vectors for _, vectors in passes], 1)
        for book, counts_K in enumerate(self.ema_counts):
            mean = counts_K.mean()
            dead = (counts_K < self.cfg.restart_below * mean).nonzero().flatten()
            if len(dead):
                # vectors of the global batch, drawn alike in every process and summed from the process that holds each
                steps_TBSC = vectors_TBSC[book : book + 1] if len(self.books) > 1 else vectors_TBSC
                T, _, S, C = steps_TBSC.shape
                index = step.pick(len(dead), T * step.batch * S).to(dead.device)
                t, row, position = index // (step.batch * S), index // S % step.batch, index % S
                local = (row >= step.rows.start) & (row < step.rows.stop)
                drawn = steps_TBSC.new_zeros(len(dead), C)
                drawn[local] = steps_TBSC[t[local], row[local] - step.rows.start, position[local]]
                # with a mean code's count a restarted code survives the next steps' decay long enough to be used
                counts_K[dead] = mean
                self.ema_sums[book, dead] = mean * step.sum_(drawn)
                restarted += len(dead)
        self.books.copy_(self.ema_sums / self.ema_counts.clamp_min(1e-12).unsqueeze(-1))
        return restarted, used_TK

    def _count(self, codes_BTS: Tensor, vectors_TBSC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gamma-weighted number (M, K) and sum (M, K, C) of each code's vectors, and their plain number (T, K)."""
        M, K, C = self.books.shape
        codes_TN = codes_BTS.transpose(0, 1).flatten(1)
        used_TK = torch.stack([codes_N.bincount(minlength=K) for codes_N in codes_TN]).float()
        counts_MK, sums_MKC = torch.zeros_like(self.books[..., 0]), torch.zeros_like(self.books)
        for t, gamma in enumerate(self.gammas):
            book = t if M > 1 else 0
            counts_MK[book] += gamma * used_TK[t]
            sums_MKC[book].index_add_(0, codes_TN[t], vectors_TBSC[t].reshape(-1, C), alpha=gamma)
        return counts_MK, sums_MKC, used_TK

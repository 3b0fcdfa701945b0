"""T-step noisy residual quantisation (arXiv 2412.18390 §3.1, Alg. 1), its noise schedule and its codebooks.

The loop over t exists once, in `Quantizer.forward`: encoding, training and rebuilding all go through it or its pieces.

Legend: B batch, T steps, C code width, S positions of the flattened grid, N vectors (B·S), K codebook entries,
M codebooks (1 or T). t counts 1..T as in the paper; column t - 1 of a tensor belongs to step t.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdpm_cli.device import full_precision
from rdpm_cli.distributed import TrainStep
from rdpm_cli.tokenizer.config import QuantizerConfig, ScheduleConfig

TILE = 64  # width of the tiles of the two-stage argmin
BLOCK_BYTES = {"cpu": 2 << 20, "cuda": 256 << 20}  # of scores held at once: 2 MiB stay in a CPU core's cache
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)  # by the number of axes of the grid, less one


# ---- the schedule --------------------------------------------------------------------------------------------------


def alphas(schedule: ScheduleConfig, steps: int) -> list[float]:
    """alpha_1..alpha_T (Table 4). `pow`: base^(T-t); `linear`: t/T; `sin`: sin(pi t / 2T); `rvq`: 1, plain residual VQ.

    alpha_T = 1 under all of them: the last step sees the residual without noise.
    """
    if schedule.kind == "pow":
        values = [schedule.base ** (steps - t) for t in range(1, steps)]
    elif schedule.kind == "linear":
        values = [t / steps for t in range(1, steps)]
    elif schedule.kind == "sin":
        values = [math.sin(math.pi * t / (2 * steps)) for t in range(1, steps)]
    else:
        values = [1.0] * (steps - 1)
    return [*values, 1.0]  # exactly 1, where sin(pi / 2) may miss it by a rounding


def beta(alpha_t: float) -> float:
    """beta_t = sqrt(1 - alpha_t²)."""
    return math.sqrt(1.0 - alpha_t * alpha_t)


def diffuse(z_t: Tensor, eps_t: Tensor, alpha_t: float) -> Tensor:
    """v_t = alpha_t z_t + beta_t eps_t, Eq. 2."""
    return alpha_t * z_t + beta(alpha_t) * eps_t


# ---- the nearest code ----------------------------------------------------------------------------------------------


class Search:
    """Q(.) of Eq. 2 over one codebook: argmin_k |v - e_k|² = argmin_k |e_k|²/2 - v·e_k, as |v|² is constant in k.

    The keys -e_k, with |e_k|²/2 as an additional row that meets a constant 1 in every vector, depend on the codebook
    only and are computed once. The scores are fp32 also inside autocast, where bf16 ones would change some percent of
    the codes. No gradient passes.
    """

    def __init__(self, codebook_KC: Tensor) -> None:
        book_KC = codebook_KC.detach().float()
        codes, width = book_KC.shape
        self.codes = codes
        padded = codes + -codes % TILE
        self.keys = book_KC.new_zeros(width + 1, padded)
        self.keys[:-1, :codes] = -book_KC.T
        self.keys[-1] = math.inf  # the padding is never the nearest
        self.keys[-1, :codes] = 0.5 * book_KC.pow(2).sum(1)
        # The N × K scores never exist at once: one block of rows does, in a buffer that all blocks share.
        limit = BLOCK_BYTES.get(book_KC.device.type, BLOCK_BYTES["cuda"])
        self.rows = max(1, limit // (4 * padded))
        self.scores_NK = self.keys.new_empty(0, padded)

    def nearest(self, v_NC: Tensor) -> Tensor:
        """-> (N,) int64, the lowest index on a tie."""
        with full_precision(v_NC):
            return torch.cat([self._block(v) for v in v_NC.detach().float().split(self.rows)])

    def _block(self, v_NC: Tensor) -> Tensor:
        if len(self.scores_NK) < len(v_NC):
            self.scores_NK = self.scores_NK.new_empty(len(v_NC), self.scores_NK.shape[1])
        with_one = F.pad(v_NC, (0, 1), value=1.0)
        codes_N = lowest(torch.mm(with_one, self.keys, out=self.scores_NK[: len(v_NC)]))
        # A vector that is not finite may land in the padding; the index stays valid and the loss reports the vector.
        return codes_N.clamp_(max=self.codes - 1)


def lowest(scores_NK: Tensor) -> Tensor:
    """argmin over K, a multiple of TILE; the lowest index on a tie. -> (N,) int64."""
    # torch's argmin costs more than the product that made the scores; numpy's takes a twelfth to a fifth of it on CPUs.
    if scores_NK.device.type == "cpu":
        return torch.from_numpy(scores_NK.numpy().argmin(1))
    return lowest_by_tiles(scores_NK)


def lowest_by_tiles(scores_NK: Tensor) -> Tensor:
    """`lowest` in two stages: the first tile that holds the minimum, then the first position in it."""
    tiles = scores_NK.view(len(scores_NK), -1, TILE)
    tile_N = tiles.amin(2).argmin(1)
    inside_N = tiles[torch.arange(len(tiles), device=tiles.device), tile_N].argmin(1)
    return tile_N * TILE + inside_N


# ---- the chain -----------------------------------------------------------------------------------------------------


@dataclass
class Usage:
    """The statistics with which a codebook follows its vectors, over this process's rows."""

    counts_MK: Tensor  # gamma-weighted number of vectors a code
    sums_MKC: Tensor  # gamma-weighted sum of those vectors
    used_TK: Tensor  # plain number of vectors a step and code
    vectors_TBSC: Tensor  # the v_t, from which dead codes restart

    def merged(self, following: "Usage") -> "Usage":
        """The statistics of this micro-batch and the following one."""
        return Usage(
            self.counts_MK + following.counts_MK,
            self.sums_MKC + following.sums_MKC,
            self.used_TK + following.used_TK,
            torch.cat([self.vectors_TBSC, following.vectors_TBSC], 1),
        )


@dataclass
class Chain:
    """One pass of the residual chain."""

    codes_BTS: Tensor  # int64
    z_BCS: Tensor  # z'_T, straight-through to z
    loss: Tensor  # L_quant of Eq. 4, scalar; 0 outside training mode
    error_T: Tensor  # mean |z - z'_t|² a step, per channel and position, detached; empty if codes_only
    usage: Usage | None  # in training mode
    spread: Tensor | None  # of z, in training mode


class Quantizer(nn.Module):
    """Codebook(s), the bias convolution shared by all t, and the schedule.

    All tensors are flat, (..., S); only the bias convolution knows the axes of the grid.
    """

    books: Tensor
    ema_counts: Tensor
    ema_sums: Tensor

    def __init__(
        self, cfg: QuantizerConfig, schedule: ScheduleConfig, channels: int, grid: tuple[int, ...], weight: bool = True
    ) -> None:
        """channels: C. grid: positions on each of 1 to 3 axes. weight: gamma_t = alpha_t in L_quant, else 1."""
        super().__init__()
        self.cfg, self.steps, self.grid = cfg, cfg.steps, tuple(grid)
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
        convolution = CONVOLUTIONS[len(self.grid) - 1]
        self.phi = convolution(channels, channels, 3, padding=1) if cfg.bias != "none" else None
        if self.phi is not None and cfg.bias == "add":
            nn.init.zeros_(self.phi.weight)
            nn.init.zeros_(self.phi.bias)  # type: ignore[arg-type]

    @torch.no_grad()
    def set_books(self, books_MKC: Tensor) -> None:
        """Set the codebook(s); an EMA one follows its vectors from there."""
        self.books.copy_(books_MKC)
        if self.cfg.codebook == "ema":
            self.ema_counts.fill_(1.0)
            self.ema_sums.copy_(self.books)

    # ---- the pieces of one step ------------------------------------------------------------------------------------

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

    def bias(self, q_BCS: Tensor) -> Tensor:
        """bias(q): q, q + conv(q) or 0.5 q + 0.5 conv(q). Used in the residual, the sum, the loss and the sampler."""
        return self.bias_of_sum(q_BCS, 1)

    def bias_of_sum(self, sum_BCS: Tensor, terms: int | Tensor) -> Tensor:
        """sum_i bias(q_i) from sum_i q_i: bias is affine, so one convolution does. terms: n, an int or (B,)."""
        if self.phi is None:
            return sum_BCS
        share = 0.5 if self.cfg.bias == "blend" else 1.0
        with full_precision(sum_BCS):  # a generator in bf16 must see the tokenizer's z', to the bits of fp32
            convolved = self._convolve(sum_BCS)
        assert self.phi.bias is not None
        n = terms.to(sum_BCS.dtype).view(-1, 1, 1) if isinstance(terms, Tensor) else float(terms)
        return share * (sum_BCS + convolved + n * self.phi.bias.view(1, -1, 1))

    def _convolve(self, q_BCS: Tensor) -> Tensor:
        """The 3^n convolution without its constant, on the axes of the grid; zero padding. (B, C, S)."""
        assert self.phi is not None
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(self.grid) - 1]
        return convolve(q_BCS.unflatten(2, self.grid), self.phi.weight, padding=1).flatten(2)

    def guess(self, previous_BCS: Tensor, eps_BCS: Tensor, t: int) -> Tensor:
        """The model-free baseline Q(beta_t eps_t - alpha_t z'_{t-1}): v_t without the unknown z. (B, S) int64."""
        return self.quantize(diffuse(-previous_BCS, eps_BCS, self.alphas[t - 1]), t)

    # ---- the loop --------------------------------------------------------------------------------------------------

    def forward(self, z_BCS: Tensor, eps_BTCS: Tensor, codes_only: bool = False) -> Chain:
        """Alg. 1: v_t = alpha_t z_t + beta_t eps_t; C_t = Q(v_t); v'_t = bias(e); z_{t+1} = z_t - v'_t.

        Straight-through a step on the live residual, e + v_t - sg(v_t): with `bias: none` the gradient from z'_T to z
        is exactly the identity, because alpha_T = 1. Runs in fp32 also inside autocast. codes_only: without loss,
        errors (empty) and usage.
        """
        learning = self.training and not codes_only
        with full_precision(z_BCS):
            z_BCS, eps_BTCS = z_BCS.float(), eps_BTCS.float()
            z_t, total = z_BCS, torch.zeros_like(z_BCS)
            loss, codes, vectors, errors = z_BCS.new_zeros(()), [], [], []
            search: Search | None = None
            for t in range(1, self.steps + 1):
                # a shared book serves all steps with one table of keys
                search = Search(self.book(t)) if search is None or len(self.books) > 1 else search
                v_t = diffuse(z_t, eps_BTCS[:, t - 1], self.alphas[t - 1])
                codes_t = self.quantize(v_t, t, search)
                q_t = self.look_up(codes_t, t)
                approx_t = self.bias(_straight_through(q_t, v_t))  # v'_t
                z_t, total = z_t - approx_t, total + approx_t
                codes.append(codes_t)
                if not codes_only:
                    errors.append(F.mse_loss(total.detach(), z_BCS.detach()))
                if learning:
                    loss = loss + self.gammas[t - 1] * self._quant_loss(v_t, approx_t, q_t)
                    vectors.append(v_t.detach())
            codes_BTS = torch.stack(codes, 1)
            usage, spread = (self._usage(codes_BTS, vectors), _spread(z_BCS)) if learning else (None, None)
        return Chain(codes_BTS, total, loss, torch.stack(errors) if errors else z_BCS.new_empty(0), usage, spread)

    def _quant_loss(self, v_t: Tensor, approx_t: Tensor, q_t: Tensor) -> Tensor:
        """One term of Eq. 4: mean[|v_t - sg v'_t|² + |sg v_t - bias(e')|²]; e' = sg(e) for an EMA book."""
        learnt = self.bias(q_t if self.cfg.codebook == "gradient" else q_t.detach())
        return F.mse_loss(v_t, approx_t.detach()) + F.mse_loss(learnt, v_t.detach())

    @torch.no_grad()
    def encode(self, z_BCS: Tensor, eps_BTCS: Tensor) -> Tensor:
        """codes (B, T, S) int64 of latents under the noise eps."""
        codes: Tensor = self(z_BCS, eps_BTCS, codes_only=True).codes_BTS
        return codes

    def prefix(self, codes_BTS: Tensor, terms_B: Tensor) -> Tensor:
        """z'_n = sum_{i<=n} bias(e_{C_i}), n = terms_B a row (0 gives zero): (B, C, S)."""
        B, T, S = codes_BTS.shape
        M, K, C = self.books.shape
        # One weighted sum over a flat table of all books: row (t - 1) K + k is code k of step t's book, and the weights
        # cut the sum off after n terms. So rows of different n share one call, and then one convolution.
        first_row_T = torch.arange(T, device=codes_BTS.device) * K if M > 1 else torch.zeros_like(terms_B[:1])
        index_NT = (codes_BTS.long() + first_row_T.view(1, -1, 1)).transpose(1, 2).reshape(-1, T)
        keep_BT = torch.arange(T, device=codes_BTS.device) < terms_B.view(-1, 1)
        keep_NT = keep_BT.view(B, 1, T).expand(B, S, T).reshape(-1, T).to(self.books.dtype)
        sum_NC = F.embedding_bag(index_NT, self.books.reshape(M * K, C), mode="sum", per_sample_weights=keep_NT)
        return self.bias_of_sum(sum_NC.view(B, S, C).transpose(1, 2), terms_B)

    def decode(self, codes_BTS: Tensor) -> Tensor:
        """z'_T of codes: the inverse of encode, up to the quantisation error. (B, C, S)."""
        return self.prefix(codes_BTS, torch.full((len(codes_BTS),), self.steps, device=codes_BTS.device))

    # ---- the codebook follows its vectors --------------------------------------------------------------------------

    def _usage(self, codes_BTS: Tensor, vectors: list[Tensor]) -> Usage:
        M, K, C = self.books.shape
        vectors_TBSC = torch.stack([v.transpose(1, 2) for v in vectors])
        used = torch.stack([codes_BTS[:, t].flatten().bincount(minlength=K) for t in range(self.steps)]).float()
        counts, sums = torch.zeros_like(self.books[..., 0]), torch.zeros_like(self.books)
        for t, gamma in enumerate(self.gammas):
            book = t if M > 1 else 0
            counts[book] += gamma * used[t]
            sums[book].index_add_(0, codes_BTS[:, t].flatten(), vectors_TBSC[t].reshape(-1, C), alpha=gamma)
        return Usage(counts.detach(), sums.detach(), used, vectors_TBSC)

    @torch.no_grad()
    def follow(self, usage: Usage, step: TrainStep) -> int:
        """EMA step of the codebook, then restarts of dead codes from current vectors. -> number restarted.

        `usage` becomes the sum over processes. A gradient-trained book stays as it is.
        """
        for value in (usage.counts_MK, usage.sums_MKC, usage.used_TK):
            step.sum_(value)
        if self.cfg.codebook == "gradient":
            return 0
        self.ema_counts.lerp_(usage.counts_MK, 1 - self.cfg.decay)
        self.ema_sums.lerp_(usage.sums_MKC, 1 - self.cfg.decay)
        restarted = 0
        for book, counts_K in enumerate(self.ema_counts):
            mean = counts_K.mean().clone()  # a copy: counts_K changes below
            dead = (counts_K < self.cfg.restart_below * mean).nonzero().flatten()
            if len(dead):
                steps = usage.vectors_TBSC[book : book + 1] if len(self.books) > 1 else usage.vectors_TBSC
                # with a mean code's count a restarted code survives the next steps' decay long enough to be used
                counts_K[dead] = mean
                self.ema_sums[book, dead] = mean * _draw_vectors(steps, len(dead), step)
                restarted += len(dead)
        self.books.copy_(self.ema_sums / self.ema_counts.clamp_min(1e-12).unsqueeze(-1))
        return restarted


def _straight_through(q_t: Tensor, v_t: Tensor) -> Tensor:
    """sg(e) + v_t - sg(v_t): e in value, v_t in gradient."""
    return q_t.detach() + (v_t - v_t.detach()) if v_t.requires_grad else q_t.detach()


@torch.no_grad()
def _spread(z_BCS: Tensor) -> Tensor:
    """Share of z's energy that varies over images and positions, at most 1; 0 for a collapsed encoder.

    The codebook's usage does not show a collapse: the noise of the first steps spreads over a shared book whatever z.
    """
    varying = z_BCS.var((0, 2), correction=0).sum()
    return varying / z_BCS.pow(2).mean((0, 2)).sum().clamp_min(1e-12)


def _draw_vectors(vectors_TBSC: Tensor, count: int, step: TrainStep) -> Tensor:
    """`count` vectors of the global batch, drawn alike in every process and summed from the process that holds each."""
    T, _, S, C = vectors_TBSC.shape
    index = step.pick(count, T * step.batch * S).to(vectors_TBSC.device)
    t, row, position = index // (step.batch * S), index // S % step.batch, index % S
    local = (row >= step.rows.start) & (row < step.rows.stop)
    drawn = vectors_TBSC.new_zeros(count, C)
    drawn[local] = vectors_TBSC[t[local], row[local] - step.rows.start, position[local]]
    return step.sum_(drawn)

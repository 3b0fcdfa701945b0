"""The T-step noisy residual quantiser against independent computations: float64, numbers by hand, another library.

Legend: B batch, T steps, C code width, S positions of the flattened grid, N vectors, K codebook entries, M books.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from vector_quantize_pytorch import ResidualVQ, VectorQuantize

from rdpm_cli.distributed import TrainStep
from rdpm_cli.tokenizer.config import QuantizerConfig, ScheduleConfig
from rdpm_cli.tokenizer.quantizer import (
    BLOCK_BYTES,
    Chain,
    Quantizer,
    Search,
    Usage,
    alphas,
    beta,
    lowest,
    lowest_by_tiles,
)

B, C, K, T = 3, 8, 48, 5
GRID = (4, 5)
GRIDS = [(7,), (4, 4), (2, 3, 4)]
BIASES = ["none", "add", "blend"]
BOOKS = ["shared", "per_step"]
KINDS = ["pow", "linear", "sin", "rvq"]

Grid = tuple[int, ...]


def make(
    kind: str = "sin",
    base: float = 0.75,
    weight: bool = True,
    channels: int = C,
    grid: Grid = GRID,
    **options: Any,
) -> Quantizer:
    """A quantiser in training mode; codes and bias convolution from a fixed seed, `add` away from zero too."""
    cfg = QuantizerConfig.model_validate({"codes": K, "steps": T, **options})
    schedule = ScheduleConfig.model_validate({"kind": kind, "base": base})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        quantizer = Quantizer(cfg, schedule, channels, grid, weight)
        if quantizer.phi is not None:
            torch.nn.init.normal_(quantizer.phi.weight, std=0.05)
            assert quantizer.phi.bias is not None
            torch.nn.init.normal_(quantizer.phi.bias, std=0.2)
    return quantizer.train()


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(grid: Grid = GRID) -> tuple[Tensor, Tensor]:
    """z (B, C, S) of LayerNorm's scale and eps (B, T, C, S)."""
    S = math.prod(grid)
    return F.layer_norm(draw(B, S, C), (C,)).transpose(1, 2), draw(B, T, C, S, seed=2)


def train_step(seed: int = 0, step: int = 0, batch: int = B) -> TrainStep:
    return TrainStep(seed, step, range(batch), batch, torch.device("cpu"))


def run(quantizer: Quantizer, z: Tensor, eps: Tensor) -> tuple[Chain, Usage]:
    """The chain in training mode and its usage."""
    chain: Chain = quantizer(z, eps)
    assert chain.usage is not None
    return chain, chain.usage


def neighbourhood_sum(q_BCS: Tensor, weight: Tensor, grid: Grid) -> Tensor:
    """The 3^n convolution with zero padding, as a sum over the 3^n shifts of the grid."""
    padded = F.pad(q_BCS.reshape(*q_BCS.shape[:2], *grid), (1, 1) * len(grid))
    total = torch.zeros(len(q_BCS), weight.shape[0], *grid, dtype=q_BCS.dtype)
    for offset in itertools.product(range(3), repeat=len(grid)):
        shifted: list[Any] = [slice(o, o + n) for o, n in zip(offset, grid, strict=True)]
        tap: list[Any] = list(offset)
        total = total + torch.einsum("oc,bc...->bo...", weight[(..., *tap)], padded[(..., *shifted)])
    return total.flatten(2)


def bias(quantizer: Quantizer, q_BCS: Tensor) -> Tensor:
    """bias(q) as DESIGN §2 writes it."""
    if quantizer.phi is None:
        return q_BCS
    assert quantizer.phi.bias is not None
    convolved = neighbourhood_sum(q_BCS, quantizer.phi.weight, quantizer.grid) + quantizer.phi.bias.view(1, -1, 1)
    return q_BCS + convolved if quantizer.cfg.bias == "add" else 0.5 * q_BCS + 0.5 * convolved


def brute_force(v_NC: Tensor, codebook_KC: Tensor) -> tuple[Tensor, Tensor]:
    """argmin_k |v - e_k|² in float64, all differences written out -> (codes, gap to the second best)."""
    distances = (v_NC.double().unsqueeze(1) - codebook_KC.double()).pow(2).sum(2)
    best = distances.topk(2, largest=False)
    return best.indices[:, 0], best.values[:, 1] - best.values[:, 0]


def nearest(v_NC: Tensor, codebook_KC: Tensor) -> Tensor:
    return Search(codebook_KC).nearest(v_NC)


# ---- the schedule --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 7, 10, 64])
@pytest.mark.parametrize(("kind", "base"), [(kind, 0.75) for kind in KINDS] + [("pow", 0.5), ("pow", 1.0)])
def test_schedule_rises_to_exactly_one(kind: str, base: float, steps: int) -> None:
    values = alphas(ScheduleConfig.model_validate({"kind": kind, "base": base}), steps)
    assert len(values) == steps
    assert values[-1] == 1.0
    assert values == sorted(values)
    assert all(0 < a <= 1 for a in values)
    assert all(a**2 + beta(a) ** 2 == pytest.approx(1, abs=1e-12) for a in values)
    assert beta(values[-1]) == 0.0


@pytest.mark.parametrize(
    ("kind", "base", "expected"),
    [
        ("pow", 0.75, [0.421875, 0.5625, 0.75, 1.0]),
        ("pow", 0.5, [0.125, 0.25, 0.5, 1.0]),
        ("pow", 0.9, [0.729, 0.81, 0.9, 1.0]),
        ("linear", 0.75, [0.25, 0.5, 0.75, 1.0]),
        ("linear", 0.5, [0.25, 0.5, 0.75, 1.0]),
        ("sin", 0.75, [0.3826834323650898, math.sqrt(0.5), 0.9238795325112867, 1.0]),
        ("rvq", 0.75, [1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_formula_of_each_schedule(kind: str, base: float, expected: list[float]) -> None:
    schedule = ScheduleConfig.model_validate({"kind": kind, "base": base})
    assert alphas(schedule, 4) == pytest.approx(expected, rel=1e-12)


def test_beta_of_known_values() -> None:
    assert [beta(0.6), beta(0.0), beta(1.0)] == pytest.approx([0.8, 1.0, 0.0], abs=1e-12)


# ---- the nearest code ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [2, 8, 32])
@pytest.mark.parametrize("codes", [2, 63, 64, 65, 200, 256, 4096])
def test_nearest_code_equals_float64_beyond_near_ties(codes: int, channels: int) -> None:
    """K = 4096: the scores are computed for 128 vectors at a time, and the last block is a short one."""
    v, book = draw(300 if codes > 1000 else 1500, channels), draw(codes, channels, seed=2)
    expected, gap = brute_force(v, book)
    clear = gap > 1e-6 * (1 + v.double().pow(2).sum(1))
    assert clear.float().mean() > 0.99
    assert torch.equal(nearest(v, book)[clear], expected[clear])


@pytest.mark.parametrize("copies", [2, 3])
@pytest.mark.parametrize("codes", [1, 5, 64, 65, 128])
def test_ties_take_the_lowest_index(codes: int, copies: int) -> None:
    """Every code occurs `copies` times in the book, within a tile of 64 and across tiles."""
    book, v = draw(codes, 8, seed=2), draw(400, 8)
    once = nearest(v, book)
    assert torch.equal(nearest(v, book.repeat(copies, 1)), once)
    assert torch.equal(nearest(v, book.repeat_interleave(copies, 0)), copies * once)


def test_equal_distances_of_different_codes_take_the_lowest_index() -> None:
    book = torch.tensor([[9.0, 0.0], [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    assert nearest(torch.zeros(1, 2), book).tolist() == [1]
    assert nearest(torch.zeros(1, 2), book.flip(0)).tolist() == [0]


def test_padding_of_the_last_tile_is_never_the_nearest() -> None:
    book = 100 + draw(70, 4)  # far from zero: a zero row of padding would be nearer
    assert int(nearest(torch.zeros(50, 4), book).max()) < 70
    assert int(nearest(torch.full((50, 4), math.nan), book).max()) < 70  # a valid index also then


def test_nearest_code_is_fp32_inside_bf16_autocast() -> None:
    v, book = draw(2000, 8), draw(256, 8, seed=2)
    outside = nearest(v, book)
    with torch.autocast("cpu", torch.bfloat16):
        inside = nearest(v, book)
        rounded = (0.5 * book.pow(2).sum(1) - v @ book.T).argmin(1)
    assert torch.equal(inside, outside)
    assert not torch.equal(rounded, outside), "bf16 scores would have changed codes here"


@pytest.mark.parametrize("codes", [64, 128, 4096])
def test_both_ways_to_the_lowest_score_equal_a_search_by_hand(codes: int) -> None:
    """Scores of few values: most rows hold their minimum many times, within a tile and across tiles."""
    scores = draw(300, codes).mul(2).round()
    expected = [row.index(min(row)) for row in scores.tolist()]
    assert lowest(scores).tolist() == expected
    assert lowest_by_tiles(scores).tolist() == expected


class LargestTensor(TorchDispatchMode):
    """Records the number of values in the largest tensor made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor):
                self.values = max(self.values, value.numel(), value.untyped_storage().nbytes() // value.element_size())
        return out


@pytest.mark.parametrize("training", [False, True])
def test_all_scores_never_exist_at_once(training: bool) -> None:
    """1,024 vectors and 4,096 codes are 4.2M scores a step, of which one block of 2 MiB is held."""
    quantizer = make(codes=4096, steps=2, grid=(16, 16)).train(training)
    with LargestTensor() as largest:
        quantizer(draw(4, C, 256), draw(4, 2, C, 256, seed=2))
    assert largest.values == BLOCK_BYTES["cpu"] // 4 < 1024 * 4096


# ---- the chain against a direct transcription ----------------------------------------------------------------------


@dataclass
class Reference:
    codes_BTS: Tensor
    z_BCS: Tensor
    loss: Tensor
    error_T: Tensor


def reference_chain(
    quantizer: Quantizer, z: Tensor, eps: Tensor, schedule: list[float], gammas: list[float]
) -> Reference:
    """DESIGN §2 line by line: Alg. 1, the straight-through step, and L_quant."""
    z_t, total, loss = z, torch.zeros_like(z), z.new_zeros(())
    codes, errors = [], []
    for t, alpha in enumerate(schedule):
        book = quantizer.books[t if quantizer.cfg.codebooks == "per_step" else 0]
        v = alpha * z_t + math.sqrt(1 - alpha**2) * eps[:, t]
        code = brute_force(v.detach().transpose(1, 2).flatten(0, 1), book.detach())[0].view(len(v), -1)
        e = book[code].transpose(1, 2)
        through = bias(quantizer, e.detach() + v - v.detach())
        learnt = e if quantizer.cfg.codebook == "gradient" else e.detach()
        square = (v - through.detach()) ** 2 + (v.detach() - bias(quantizer, learnt)) ** 2
        loss = loss + gammas[t] * square.mean()
        z_t, total = z_t - through, total + through
        codes.append(code)
        errors.append((z - total).detach().pow(2).mean())
    return Reference(torch.stack(codes, 1), total, loss, torch.stack(errors))


SIN = [math.sin(math.pi * t / (2 * T)) for t in range(1, T + 1)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("weight", [True, False], ids=["gamma=alpha", "gamma=1"])
@pytest.mark.parametrize("codebook", ["ema", "gradient"])
@pytest.mark.parametrize("bias_kind", BIASES)
@pytest.mark.parametrize("books", BOOKS)
def test_chain_loss_and_gradients_equal_the_formula(
    books: str, bias_kind: str, codebook: str, weight: bool, grid: Grid
) -> None:
    quantizer = make(codebooks=books, bias=bias_kind, codebook=codebook, weight=weight, grid=grid)
    z, eps = inputs(grid)
    z.requires_grad_()
    chain = quantizer(z, eps)
    expected = reference_chain(quantizer, z, eps, SIN, SIN if weight else [1.0] * T)

    assert torch.equal(chain.codes_BTS, expected.codes_BTS)
    torch.testing.assert_close(chain.z_BCS, expected.z_BCS, rtol=0, atol=1e-5)
    torch.testing.assert_close(chain.loss, expected.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(chain.error_T, expected.error_T, rtol=1e-4, atol=1e-6)
    learnt = [z, *quantizer.parameters()]
    pairs = zip(torch.autograd.grad(chain.loss, learnt), torch.autograd.grad(expected.loss, learnt), strict=True)
    for gradient, reference in pairs:
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-6)
        assert reference.abs().max() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_chain_follows_the_formula_under_every_schedule(kind: str) -> None:
    schedule = {
        "pow": [0.75 ** (T - t) for t in range(1, T + 1)],
        "linear": [t / T for t in range(1, T + 1)],
        "sin": SIN,
        "rvq": [1.0] * T,
    }[kind]
    quantizer, (z, eps) = make(kind), inputs()
    expected = reference_chain(quantizer, z, eps, [*schedule[:-1], 1.0], schedule)
    chain = quantizer(z, eps)
    assert torch.equal(chain.codes_BTS, expected.codes_BTS)
    torch.testing.assert_close(chain.z_BCS, expected.z_BCS, rtol=0, atol=1e-5)
    torch.testing.assert_close(chain.loss, expected.loss, rtol=1e-5, atol=0)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("bias_kind", BIASES)
@pytest.mark.parametrize("books", BOOKS)
def test_encoding_and_rebuilding_on_any_number_of_axes(books: str, bias_kind: str, grid: Grid) -> None:
    """Encode, every prefix, decode, guess and the codebook's step, each against its own computation."""
    quantizer = make(codebooks=books, bias=bias_kind, grid=grid, decay=0.0, restart_below=0.0)
    z, eps = inputs(grid)
    expected = reference_chain(quantizer, z, eps, SIN, SIN)
    codes = quantizer.encode(z, eps)
    assert torch.equal(codes, expected.codes_BTS)
    torch.testing.assert_close(quantizer.decode(codes), expected.z_BCS, rtol=0, atol=1e-5)

    running = [torch.zeros_like(z)]
    for t in range(1, T + 1):
        book = quantizer.books[t - 1 if books == "per_step" else 0]
        known = math.sqrt(1 - SIN[t - 1] ** 2) * eps[:, t - 1] - SIN[t - 1] * running[-1]
        guess, _ = brute_force(known.transpose(1, 2).flatten(0, 1), book)
        assert torch.equal(quantizer.guess(running[-1], eps[:, t - 1], t).flatten(), guess)
        running.append(running[-1] + bias(quantizer, book[codes[:, t - 1]].transpose(1, 2)))
        torch.testing.assert_close(quantizer.prefix(codes, torch.full((B,), t)), running[-1], rtol=0, atol=1e-5)
    assert torch.equal(quantizer.prefix(codes, torch.zeros(B, dtype=torch.int64)), running[0])
    mixed = torch.stack([running[n][row] for row, n in enumerate((4, 0, 1))])
    torch.testing.assert_close(quantizer.prefix(codes, torch.tensor([4, 0, 1])), mixed, rtol=0, atol=1e-5)

    books_before, (_, usage) = quantizer.books.clone(), run(quantizer, z, eps)
    quantizer.follow(usage, train_step())
    assert not torch.equal(quantizer.books, books_before)
    assert usage.used_TK.tolist() == [[int((codes[:, t] == code).sum()) for code in range(K)] for t in range(T)]
    assert_follows(quantizer, codes, usage)


def assert_follows(quantizer: Quantizer, codes_BTS: Tensor, usage: Usage) -> None:
    """decay 0: every code that is used is the gamma-weighted mean of its vectors, taken one at a time."""
    v_TNC, codes_TN = usage.vectors_TBSC.flatten(1, 2), codes_BTS.movedim(1, 0).flatten(1)
    checked = 0
    for book, codes_KC in enumerate(quantizer.books):
        steps = [book] if len(quantizer.books) > 1 else range(T)
        for code, e_C in enumerate(codes_KC):
            weighted = [(SIN[t], v_TNC[t, n]) for t in steps for n in (codes_TN[t] == code).nonzero().flatten()]
            if weighted:
                mean = torch.stack([g * v for g, v in weighted]).sum(0) / sum(g for g, _ in weighted)
                torch.testing.assert_close(e_C, mean, rtol=1e-4, atol=1e-5)
                checked += 1
    assert checked > 12


def test_evaluation_and_codes_only_change_neither_codes_nor_latents() -> None:
    quantizer, (z, eps) = make(), inputs()
    training, short = quantizer(z, eps), quantizer(z, eps, codes_only=True)
    evaluating = quantizer.eval()(z, eps)
    for chain in (short, evaluating):
        assert torch.equal(chain.codes_BTS, training.codes_BTS)
        assert torch.equal(chain.z_BCS, training.z_BCS)
        assert (chain.usage, float(chain.loss)) == (None, 0.0)
    assert torch.equal(evaluating.error_T, training.error_T)
    assert len(short.error_T) == 0


@pytest.mark.parametrize("bias_kind", BIASES)
def test_chain_and_prefix_are_fp32_inside_bf16_autocast(bias_kind: str) -> None:
    """A generator trains in bf16 on z'_{t-1} rebuilt from codes: it must be the z' that the tokenizer saw."""
    quantizer, (z, eps) = make(bias=bias_kind), inputs()
    terms = torch.full((B,), T - 1)
    with torch.no_grad():
        outside = quantizer(z, eps)
        rebuilt = quantizer.prefix(outside.codes_BTS, terms)
        with torch.autocast("cpu", torch.bfloat16):
            inside = quantizer(z, eps)
            rebuilt_inside = quantizer.prefix(outside.codes_BTS, terms)
    for name in ("codes_BTS", "z_BCS", "loss", "error_T"):
        assert torch.equal(getattr(inside, name), getattr(outside, name)), name
    torch.testing.assert_close(rebuilt_inside, rebuilt, rtol=0, atol=1e-5)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_rvq_equals_an_independent_residual_quantizer(grid: Grid) -> None:
    """vector-quantize-pytorch's ResidualVQ with a shared codebook, in evaluation, index for index."""
    quantizer, (z, eps) = make("rvq", bias="none", grid=grid).eval(), inputs(grid)
    independent = ResidualVQ(dim=C, num_quantizers=T, codebook_size=K, shared_codebook=True).eval()
    independent.layers[0]._codebook.embed.data.copy_(quantizer.books)
    with torch.no_grad():
        quantized_BSC, indices_BST, _ = independent(z.transpose(1, 2))
        chain = quantizer(z, eps)
    assert torch.equal(chain.codes_BTS, indices_BST.transpose(1, 2))
    torch.testing.assert_close(chain.z_BCS.transpose(1, 2), quantized_BSC, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_one_step_is_plain_vector_quantisation(kind: str) -> None:
    """T = 1 means alpha = 1 under every schedule: z' is the nearest codebook entry, and the noise is not used."""
    quantizer, (z, eps) = make(kind, steps=1, bias="none"), inputs()
    chain = quantizer(z, eps[:, :1])
    codes_N, _ = brute_force(z.transpose(1, 2).reshape(-1, C), quantizer.books[0])
    assert torch.equal(chain.codes_BTS.flatten(), codes_N)
    torch.testing.assert_close(chain.z_BCS, quantizer.books[0][codes_N].view(B, -1, C).transpose(1, 2))
    assert torch.equal(quantizer(z, 5 + eps[:, :1]).z_BCS, chain.z_BCS)


def test_spread_is_the_share_of_energy_that_varies() -> None:
    """By hand: channel 0 is constant at 2; channel 1 is ±1. Energy 4 + 1, of which 1 varies."""
    quantizer = make(channels=2, grid=(4,), steps=1, bias="none")
    z = torch.stack([torch.full((2, 4), 2.0), torch.tensor([1.0, -1.0] * 4).view(2, 4)], 1)
    assert float(quantizer(z, torch.zeros(2, 1, 2, 4)).spread) == pytest.approx(0.2)
    assert float(quantizer(torch.ones_like(z), torch.zeros(2, 1, 2, 4)).spread) == 0


# ---- gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("books", BOOKS)
def test_straight_through_is_exactly_the_identity_without_bias(kind: str, books: str) -> None:
    quantizer, (z, eps) = make(kind, bias="none", codebooks=books), inputs()
    z.requires_grad_()
    weights = draw(*z.shape, seed=3)
    (gradient,) = torch.autograd.grad((quantizer(z, eps).z_BCS * weights).sum(), z)
    assert torch.equal(gradient, weights)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("bias_kind", ["add", "blend"])
def test_reconstruction_teaches_the_bias_convolution(bias_kind: str, grid: Grid) -> None:
    quantizer, (z, eps) = make(bias=bias_kind, grid=grid), inputs(grid)
    (quantizer(z, eps).z_BCS * draw(*z.shape, seed=3)).sum().backward()
    assert quantizer.phi is not None
    for parameter in quantizer.phi.parameters():
        assert parameter.grad is not None
        assert (parameter.grad != 0).all()


def test_add_starts_as_the_identity() -> None:
    cfg, q = QuantizerConfig(bias="add", codes=K, steps=T), draw(B, C, math.prod(GRID))
    assert torch.equal(Quantizer(cfg, ScheduleConfig(), C, GRID).bias(q), q)


def test_a_gradient_codebook_is_a_parameter_that_only_its_used_codes_move() -> None:
    quantizer, (z, eps) = make(codebook="gradient"), inputs()
    chain, usage = run(quantizer, z, eps)
    chain.loss.backward()
    books = dict(quantizer.named_parameters())["books"]
    assert books.grad is not None
    moved = books.grad[0].abs().sum(1) > 0
    assert sorted(chain.codes_BTS.unique().tolist()) == moved.nonzero().flatten().tolist()
    before = books.detach().clone()
    assert quantizer.follow(usage, train_step()) == 0
    assert torch.equal(books, before)
    assert usage.used_TK.sum(1).tolist() == [B * math.prod(GRID)] * T  # counted nevertheless, for the log


def test_an_ema_codebook_is_a_buffer_that_no_gradient_reaches() -> None:
    quantizer, (z, eps) = make(codebook="ema"), inputs()
    before = quantizer.books.clone()
    quantizer(z.requires_grad_(), eps).loss.backward()
    assert "books" in dict(quantizer.named_buffers())
    assert "books" not in dict(quantizer.named_parameters())
    assert "books" in quantizer.state_dict()
    assert not quantizer.books.requires_grad
    assert torch.equal(quantizer.books, before)


# ---- sums ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("bias_kind", BIASES)
def test_one_convolution_of_the_sum_equals_the_sum_of_convolutions(bias_kind: str, grid: Grid) -> None:
    """On the whole grid, since borders are padded once a term; rows have their own number of terms."""
    quantizer, q = make(bias=bias_kind, grid=grid), draw(4, B, C, math.prod(grid))
    rows = []
    for row, n in enumerate((0, 3, 4)):
        terms = [bias(quantizer, q[i : i + 1, row]) for i in range(n)]
        expected = sum(terms, torch.zeros(1, C, math.prod(grid)))
        torch.testing.assert_close(quantizer.bias_of_sum(q[:n, row].sum(0)[None], n), expected, rtol=0, atol=1e-5)
        rows.append(expected)
    sums = torch.stack([q[:n, row].sum(0) for row, n in enumerate((0, 3, 4))])
    together = quantizer.bias_of_sum(sums, torch.tensor([0, 3, 4]))
    torch.testing.assert_close(together, torch.cat(rows), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_codes_may_come_in_any_integer_type(dtype: torch.dtype) -> None:
    quantizer, (z, eps) = make(), inputs()
    codes = quantizer.encode(z, eps)
    assert torch.equal(quantizer.decode(codes.to(dtype)), quantizer.decode(codes))


# ---- the codebook follows its vectors ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "expected"),
    [(True, (0.75 * 1 + 0.25 * 4) / (0.75 + 0.25 * 1.5)), (False, (0.75 * 1 + 0.25 * 5) / (0.75 + 0.25 * 2))],
    ids=["gamma=alpha", "gamma=1"],
)
def test_ema_codebook_follows_gamma_weighted_means(weight: bool, expected: float) -> None:
    """By hand: alpha = (1/2, 1), z = 4, eps = 0, e_0 = 1, e_1 = 10. Then v = (2, 3), both coded 0; e_1 stays.

    Weighted: 1.5 vectors of sum 0.5·2 + 3 = 4; unweighted: 2 of sum 5. Both EMAs keep 0.75, from 1 vector of sum e.
    """
    quantizer = make(
        "linear", channels=1, grid=(1, 1), codes=2, steps=2, bias="none", decay=0.75, restart_below=0.0, weight=weight
    )
    quantizer.set_books(torch.tensor([[[1.0], [10.0]]]))
    chain, usage = run(quantizer, torch.full((1, 1, 1), 4.0), torch.zeros(1, 2, 1, 1))
    assert chain.codes_BTS.flatten().tolist() == [0, 0]
    assert quantizer.follow(usage, train_step(batch=1)) == 0
    torch.testing.assert_close(quantizer.books, torch.tensor([[[expected], [10.0]]]))


def test_the_ema_codebook_equals_an_independent_one_over_several_steps() -> None:
    """vector-quantize-pytorch's VectorQuantize, whose average starts from the same books with a count of 1 each."""
    quantizer = make("rvq", steps=1, bias="none", decay=0.9, restart_below=0.0)
    independent = VectorQuantize(dim=C, codebook_size=K, decay=0.9, threshold_ema_dead_code=0).train()
    book = independent._codebook
    book.embed.data.copy_(quantizer.books)
    book.embed_avg.data.copy_(quantizer.books)
    for step in range(4):
        z = draw(B, C, math.prod(GRID), seed=10 + step)
        chain, usage = run(quantizer, z, torch.zeros(B, 1, C, math.prod(GRID)))
        _, indices_BS, _ = independent(z.transpose(1, 2))
        assert torch.equal(chain.codes_BTS[:, 0], indices_BS)
        quantizer.follow(usage, train_step())
        torch.testing.assert_close(quantizer.books, book.embed, rtol=1e-4, atol=1e-4)  # it smooths its counts by 1e-5


def far_from_its_vectors(**options: Any) -> Quantizer:
    """A quantiser with half of its codes out of reach, and an average without memory (decay 0)."""
    quantizer = make(**{"decay": 0.0, "restart_below": 0.03, **options})
    quantizer.books[:, K // 2 :] = 100.0
    return quantizer


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("books", BOOKS)
def test_dead_codes_restart_from_current_vectors(books: str, grid: Grid) -> None:
    quantizer, (z, eps) = far_from_its_vectors(codebooks=books, grid=grid), inputs(grid)
    _, usage = run(quantizer, z, eps)
    used_MK = usage.counts_MK > 0.03 * usage.counts_MK.mean(1, keepdim=True)
    assert quantizer.follow(usage, train_step()) == int((~used_MK).sum())
    for book, used_K in enumerate(used_MK):
        assert not used_K[K // 2 :].any()
        steps = slice(book, book + 1) if books == "per_step" else slice(None)
        vectors_NC = usage.vectors_TBSC[steps].reshape(-1, C)
        distance = (quantizer.books[book, ~used_K].unsqueeze(1) - vectors_NC).abs().amax(2).amin(1)
        assert distance.max() < 1e-5, f"book {book}"
        assert len(quantizer.books[book, ~used_K].unique(dim=0)) > 1


def test_restarts_are_off_at_zero() -> None:
    quantizer, (z, eps) = far_from_its_vectors(decay=0.99, restart_below=0.0), inputs()
    before = quantizer.books.clone()
    assert quantizer.follow(run(quantizer, z, eps)[1], train_step()) == 0
    assert not torch.equal(quantizer.books, before)


def test_restarts_depend_only_on_seed_and_step() -> None:
    def books(seed: int, step: int) -> Tensor:
        quantizer = far_from_its_vectors()
        quantizer.follow(run(quantizer, *inputs())[1], train_step(seed, step))
        return quantizer.books

    first = books(0, 3)
    torch.rand(10)  # torch's global generator does not matter
    assert torch.equal(books(0, 3), first)
    assert not torch.equal(books(0, 4), first)
    assert not torch.equal(books(1, 3), first)


def test_micro_batches_merge_into_the_usage_of_the_whole() -> None:
    quantizer, (z, eps) = make(), inputs()
    whole = run(quantizer, z, eps)[1]
    merged = run(quantizer, z[:2], eps[:2])[1].merged(run(quantizer, z[2:], eps[2:])[1])
    assert torch.equal(merged.used_TK, whole.used_TK)
    for name in ("vectors_TBSC", "counts_MK", "sums_MKC"):
        torch.testing.assert_close(getattr(merged, name), getattr(whole, name), rtol=1e-5, atol=1e-5)


# ---- every option does something -----------------------------------------------------------------------------------


def codes_of(quantizer: Quantizer) -> Tensor:
    return run(quantizer, *inputs())[0].codes_BTS


def latents_of(quantizer: Quantizer) -> Tensor:
    return run(quantizer, *inputs())[0].z_BCS


def loss_of(quantizer: Quantizer) -> Tensor:
    return run(quantizer, *inputs())[0].loss


def moved_book(quantizer: Quantizer) -> Tensor:
    quantizer.follow(run(quantizer, *inputs())[1], train_step())
    return quantizer.books.detach()


@pytest.mark.parametrize(
    ("option", "values", "result"),
    [
        ("kind", KINDS, codes_of),
        ("base", [0.75, 0.5], codes_of),
        ("bias", BIASES, latents_of),
        ("codebooks", BOOKS, codes_of),
        ("codebook", ["ema", "gradient"], moved_book),
        ("weight", [True, False], loss_of),
        ("decay", [0.99, 0.5], moved_book),
        ("restart_below", [0.0, 0.9], moved_book),
    ],
)
def test_each_option_changes_something(option: str, values: list[Any], result: Callable[[Quantizer], Tensor]) -> None:
    common: dict[str, Any] = {"kind": "pow", "decay": 0.5}
    results = [result(make(**{**common, option: value})) for value in values]
    for first, second in itertools.combinations(results, 2):
        assert first.shape != second.shape or not torch.equal(first, second)

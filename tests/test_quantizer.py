"""The T-step noisy residual quantiser against independent computations: float64, numbers by hand, another library.

Legend: B batch, T steps, C code width, S positions of the flattened grid, N vectors, K codebook entries, M books."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from vector_quantize_pytorch import ResidualVQ

from rdpm_cli.distributed import TrainStep
from rdpm_cli.tokenizer import quantizer as module
from rdpm_cli.tokenizer.config import QuantizerConfig, ScheduleConfig
from rdpm_cli.tokenizer.quantizer import BLOCK_BYTES, Chain, Quantizer, Search, alphas, beta, lowest, lowest_by_tiles

B, C, K, T = 3, 8, 48, 5
GRID = (4, 5)
GRIDS = [(7,), (4, 4), (2, 3, 4)]
BIASES = ["none", "add", "blend"]
BOOKS = ["shared", "per_step"]
KINDS = ["pow", "linear", "sin", "rvq"]

Grid = tuple[int, ...]


def make(
    kind: str = "sin", base: float = 0.75, weight: bool = True, channels: int = C, grid: Grid = GRID, **options: Any
) -> Quantizer:
    """A quantiser in training mode; codes and bias convolution from a fixed seed, `add` away from zero too."""
    cfg = QuantizerConfig.model_validate({"codes": K, "steps": T, **options})
    schedule = ScheduleConfig.model_validate({"kind": kind, "base": base})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        quantizer = Quantizer(cfg, schedule, channels, grid, weight)
        for parameter, std in zip(quantizer.phi.parameters() if quantizer.phi else [], (0.05, 0.2), strict=False):
            torch.nn.init.normal_(parameter, std=std)  # the convolution's weight and constant
    return quantizer.train()


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(grid: Grid = GRID) -> tuple[Tensor, Tensor]:
    """z (B, C, S) of LayerNorm's scale and eps (B, T, C, S)."""
    S = math.prod(grid)
    return F.layer_norm(draw(B, S, C), (C,)).transpose(1, 2), draw(B, T, C, S, seed=2)


def train_step(seed: int = 0, step: int = 0, batch: int = B) -> TrainStep:
    return TrainStep(seed, step, range(batch), batch, torch.device("cpu"))


def follow(quantizer: Quantizer, *chains: Chain, step: TrainStep | None = None) -> tuple[int, Tensor]:
    """The codebook's step after these micro-batches."""
    passes = [(chain.codes_BTS, chain.vectors_TBSC) for chain in chains]
    return quantizer.follow(passes, step or train_step())


def bias(quantizer: Quantizer, q_BCS: Tensor) -> Tensor:
    """bias(q) as DESIGN §2 writes it."""
    if quantizer.phi is None:
        return q_BCS
    convolved: Tensor = quantizer.phi(q_BCS.unflatten(2, quantizer.grid)).flatten(2)
    return q_BCS + convolved if quantizer.cfg.bias == "add" else 0.5 * q_BCS + 0.5 * convolved


def brute_force(v_NC: Tensor, codebook_KC: Tensor) -> tuple[Tensor, Tensor]:
    """argmin_k |v - e_k|² in float64, all differences written out -> (codes, gap to the second best)."""
    distances = (v_NC.double().unsqueeze(1) - codebook_KC.double()).pow(2).sum(2)
    best = distances.topk(2, largest=False)
    return best.indices[:, 0], best.values[:, 1] - best.values[:, 0]


def nearest(v_NC: Tensor, codebook_KC: Tensor) -> Tensor:
    return Search(codebook_KC).nearest(v_NC)


@pytest.mark.parametrize(
    ("kind", "base", "expected"),
    [
        ("pow", 0.75, [0.421875, 0.5625, 0.75, 1.0]),
        ("pow", 0.5, [0.125, 0.25, 0.5, 1.0]),
        ("linear", 0.75, [0.25, 0.5, 0.75, 1.0]),
        ("sin", 0.75, [0.3826834323650898, math.sqrt(0.5), 0.9238795325112867, 1.0]),
        ("rvq", 0.75, [1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_formula_of_each_schedule_which_ends_at_exactly_one(kind: str, base: float, expected: list[float]) -> None:
    schedule = ScheduleConfig.model_validate({"kind": kind, "base": base})
    assert alphas(schedule, 4) == pytest.approx(expected, rel=1e-12)
    for steps in (1, 7, 64):
        values = alphas(schedule, steps)
        assert (len(values), values[-1], beta(values[-1])) == (steps, 1.0, 0.0)
        assert all(a**2 + beta(a) ** 2 == pytest.approx(1, abs=1e-12) for a in values)


@pytest.mark.parametrize("channels", [2, 32])
@pytest.mark.parametrize("codes", [2, 64, 65, 200, 4096])
def test_nearest_code_equals_float64_beyond_near_ties(codes: int, channels: int) -> None:
    """K = 4096: the scores are computed for 128 vectors at a time, and the last block is a short one."""
    v, book = draw(300 if codes > 1000 else 1500, channels), draw(codes, channels, seed=2)
    expected, gap = brute_force(v, book)
    clear = gap > 1e-6 * (1 + v.double().pow(2).sum(1))
    assert clear.float().mean() > 0.99
    assert torch.equal(nearest(v, book)[clear], expected[clear])


@pytest.mark.parametrize("copies", [2, 3])
@pytest.mark.parametrize("codes", [1, 5, 64, 65])
def test_ties_take_the_lowest_index(codes: int, copies: int) -> None:
    """Every code occurs `copies` times in the book, within a tile of 64 and across tiles."""
    book, v = draw(codes, 8, seed=2), draw(400, 8)
    once = nearest(v, book)
    assert torch.equal(nearest(v, book.repeat(copies, 1)), once)
    assert torch.equal(nearest(v, book.repeat_interleave(copies, 0)), copies * once)
    assert nearest(torch.zeros(1, 2), torch.tensor([[9.0, 0.0], [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])).tolist() == [1]


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


@pytest.mark.parametrize("training", [False, True])
def test_all_scores_never_exist_at_once(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """1,024 vectors and 4,096 codes are 4.2M scores a step, of which one block of 2 MiB is held."""
    sizes: list[int] = []

    def recorded(scores_NK: Tensor) -> Tensor:
        sizes.append(scores_NK.untyped_storage().nbytes())
        return lowest(scores_NK)

    monkeypatch.setattr(module, "lowest", recorded)
    make(codes=4096, steps=2, grid=(16, 16)).train(training)(draw(4, C, 256), draw(4, 2, C, 256, seed=2))
    assert set(sizes) == {BLOCK_BYTES["cpu"]}


def reference_chain(
    quantizer: Quantizer, z: Tensor, eps: Tensor, schedule: list[float], gammas: list[float]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """DESIGN §2 line by line: Alg. 1, the straight-through step, and L_quant. -> codes, z'_T, loss, error a step."""
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
    return torch.stack(codes, 1), total, loss, torch.stack(errors)


def assert_chain(chain: Chain, reference: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    codes, z, loss, errors = reference
    assert torch.equal(chain.codes_BTS, codes)
    torch.testing.assert_close(chain.z_BCS, z, rtol=0, atol=1e-5)
    torch.testing.assert_close(chain.loss, loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(chain.error_T, errors, rtol=1e-4, atol=1e-6)


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
    assert_chain(chain, expected)
    learnt = [z, *quantizer.parameters()]
    pairs = zip(torch.autograd.grad(chain.loss, learnt), torch.autograd.grad(expected[2], learnt), strict=True)
    for gradient, reference in pairs:
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-6)
        assert reference.abs().max() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_chain_follows_the_formula_under_every_schedule(kind: str) -> None:
    quantizer, (z, eps) = make(kind), inputs()
    schedule = alphas(ScheduleConfig.model_validate({"kind": kind}), T)
    assert_chain(quantizer(z, eps), reference_chain(quantizer, z, eps, schedule, schedule))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("bias_kind", BIASES)
@pytest.mark.parametrize("books", BOOKS)
def test_encoding_and_rebuilding_on_any_number_of_axes(books: str, bias_kind: str, grid: Grid) -> None:
    """Encode, every prefix, decode, guess and the codebook's step, each against its own computation."""
    quantizer = make(codebooks=books, bias=bias_kind, grid=grid, decay=0.0, restart_below=0.0)
    z, eps = inputs(grid)
    expected_codes, expected_z, *_ = reference_chain(quantizer, z, eps, SIN, SIN)
    codes = quantizer.encode(z, eps)
    assert torch.equal(codes, expected_codes)
    for dtype in (torch.uint8, torch.int32, torch.int64):
        torch.testing.assert_close(quantizer.decode(codes.to(dtype)), expected_z, rtol=0, atol=1e-5)

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

    chain = quantizer(z, eps)
    _, used_TK = follow(quantizer, chain)
    assert used_TK.tolist() == [[int((codes[:, t] == code).sum()) for code in range(K)] for t in range(T)]
    # decay 0: every code that is used is the gamma-weighted mean of its vectors, taken one at a time
    v_TNC, codes_TN = chain.vectors_TBSC.flatten(1, 2), codes.movedim(1, 0).flatten(1)
    for number, book_KC in enumerate(quantizer.books):
        steps = [number] if len(quantizer.books) > 1 else range(T)
        for code in codes_TN[list(steps)].unique().tolist():
            weighted = [(SIN[t], v_TNC[t, n]) for t in steps for n in (codes_TN[t] == code).nonzero().flatten()]
            mean = torch.stack([g * v for g, v in weighted]).sum(0) / sum(g for g, _ in weighted)
            torch.testing.assert_close(book_KC[code], mean, rtol=1e-4, atol=1e-5)


def test_evaluation_gives_the_same_chain_without_a_loss() -> None:
    quantizer, (z, eps) = make(), inputs()
    training, evaluating = quantizer(z, eps), quantizer.eval()(z, eps)
    for name in ("codes_BTS", "z_BCS", "error_T", "vectors_TBSC", "spread"):
        assert torch.equal(getattr(evaluating, name), getattr(training, name)), name
    assert float(training.loss.detach()) > float(evaluating.loss) == 0


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


def test_spread_is_the_share_of_energy_that_varies() -> None:
    """By hand: channel 0 is constant at 2; channel 1 is ±1. Energy 4 + 1, of which 1 varies."""
    quantizer = make(channels=2, grid=(4,), steps=1, bias="none")
    z = torch.stack([torch.full((2, 4), 2.0), torch.tensor([1.0, -1.0] * 4).view(2, 4)], 1)
    assert float(quantizer(z, torch.zeros(2, 1, 2, 4)).spread) == pytest.approx(0.2)
    assert float(quantizer(torch.ones_like(z), torch.zeros(2, 1, 2, 4)).spread) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("books", BOOKS)
def test_straight_through_is_exactly_the_identity_without_bias(kind: str, books: str) -> None:
    quantizer, (z, eps) = make(kind, bias="none", codebooks=books), inputs()
    z.requires_grad_()
    weights = draw(*z.shape, seed=3)
    (gradient,) = torch.autograd.grad((quantizer(z, eps).z_BCS * weights).sum(), z)
    assert torch.equal(gradient, weights)


@pytest.mark.parametrize("bias_kind", ["add", "blend"])
def test_reconstruction_teaches_the_bias_convolution(bias_kind: str) -> None:
    quantizer, (z, eps) = make(bias=bias_kind), inputs()
    (quantizer(z, eps).z_BCS * draw(*z.shape, seed=3)).sum().backward()
    assert quantizer.phi is not None
    assert all((parameter.grad != 0).all() for parameter in quantizer.phi.parameters() if parameter.grad is not None)
    assert quantizer.phi.weight.grad is not None


def test_add_starts_as_the_identity() -> None:
    cfg, q = QuantizerConfig(bias="add", codes=K, steps=T), draw(B, C, math.prod(GRID))
    assert torch.equal(Quantizer(cfg, ScheduleConfig(), C, GRID).bias(q), q)


def test_a_gradient_codebook_is_a_parameter_that_only_its_used_codes_move() -> None:
    quantizer, (z, eps) = make(codebook="gradient"), inputs()
    chain = quantizer(z, eps)
    chain.loss.backward()
    books = dict(quantizer.named_parameters())["books"]
    assert books.grad is not None
    moved = books.grad[0].abs().sum(1) > 0
    assert sorted(chain.codes_BTS.unique().tolist()) == moved.nonzero().flatten().tolist()
    before = books.detach().clone()
    restarted, used_TK = follow(quantizer, chain)
    assert restarted == 0
    assert torch.equal(books, before)
    assert used_TK.sum(1).tolist() == [B * math.prod(GRID)] * T  # counted nevertheless, for the log


@pytest.mark.parametrize(
    ("weight", "expected"),
    [(True, (0.75 * 1 + 0.25 * 4) / (0.75 + 0.25 * 1.5)), (False, (0.75 * 1 + 0.25 * 5) / (0.75 + 0.25 * 2))],
    ids=["gamma=alpha", "gamma=1"],
)
def test_ema_codebook_follows_gamma_weighted_means(weight: bool, expected: float) -> None:
    """By hand: alpha = (1/2, 1), z = 4, eps = 0, e_0 = 1, e_1 = 10. Then v = (2, 3), both coded 0; e_1 stays.

    Weighted: 1.5 vectors of sum 0.5·2 + 3 = 4; unweighted: 2 of sum 5. Both EMAs keep 0.75, from 1 vector of sum e."""
    quantizer = make(
        "linear", channels=1, grid=(1, 1), codes=2, steps=2, bias="none", decay=0.75, restart_below=0.0, weight=weight
    )
    quantizer.set_books(torch.tensor([[[1.0], [10.0]]]))
    chain = quantizer(torch.full((1, 1, 1), 4.0), torch.zeros(1, 2, 1, 1))
    assert chain.codes_BTS.flatten().tolist() == [0, 0]
    assert follow(quantizer, chain, step=train_step(batch=1))[0] == 0
    torch.testing.assert_close(quantizer.books, torch.tensor([[[expected], [10.0]]]))


def far_from_its_vectors(**options: Any) -> Quantizer:
    """A quantiser with half of its codes out of reach, and an average without memory (decay 0)."""
    quantizer = make(**{"decay": 0.0, "restart_below": 0.03, **options})
    quantizer.books[:, K // 2 :] = 100.0
    return quantizer


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("books", BOOKS)
def test_dead_codes_restart_from_current_vectors(books: str, grid: Grid) -> None:
    quantizer, (z, eps) = far_from_its_vectors(codebooks=books, grid=grid), inputs(grid)
    chains = [quantizer(z[rows], eps[rows]) for rows in (slice(0, 2), slice(2, 3))]  # micro-batches
    codes_BTS, vectors_TBSC = torch.cat([c.codes_BTS for c in chains]), torch.cat([c.vectors_TBSC for c in chains], 1)
    used_TK = torch.stack([SIN[t] * codes_BTS[:, t].flatten().bincount(minlength=K) for t in range(T)])
    counts_MK = used_TK if books == "per_step" else used_TK.sum(0, keepdim=True)
    dead_MK = counts_MK < 0.03 * counts_MK.mean(1, keepdim=True)
    assert follow(quantizer, *chains)[0] == int(dead_MK.sum())
    for book, dead_K in enumerate(dead_MK):
        assert dead_K[K // 2 :].all()
        pool_NC = (vectors_TBSC[book] if books == "per_step" else vectors_TBSC).reshape(-1, C)
        distance = torch.cdist(quantizer.books[book, dead_K].double(), pool_NC.double())
        assert distance.amin(1).max() < 1e-5, f"book {book}"
        rows = distance.argmin(1) // math.prod(grid) % B
        assert rows.min() < 2 <= rows.max()  # from both micro-batches


def test_restarts_depend_only_on_seed_and_step() -> None:
    def books(seed: int, step: int) -> Tensor:
        quantizer = far_from_its_vectors()
        follow(quantizer, quantizer(*inputs()), step=train_step(seed, step))
        return quantizer.books

    first = books(0, 3)
    torch.rand(10)  # torch's global generator does not matter
    assert torch.equal(books(0, 3), first)
    assert not torch.equal(books(0, 4), first)
    assert not torch.equal(books(1, 3), first)


def moved_book(quantizer: Quantizer) -> Tensor:
    follow(quantizer, quantizer(*inputs()))
    return quantizer.books.detach()


@pytest.mark.parametrize(
    ("option", "values", "result"),
    [
        ("kind", KINDS, lambda quantizer: quantizer(*inputs()).codes_BTS),
        ("base", [0.75, 0.5], lambda quantizer: quantizer(*inputs()).codes_BTS),
        ("bias", BIASES, lambda quantizer: quantizer(*inputs()).z_BCS),
        ("codebooks", BOOKS, lambda quantizer: quantizer(*inputs()).codes_BTS),
        ("codebook", ["ema", "gradient"], moved_book),
        ("weight", [True, False], lambda quantizer: quantizer(*inputs()).loss),
        ("decay", [0.99, 0.5], moved_book),
        ("restart_below", [0.0, 0.9], moved_book),
    ],
)
def test_each_option_changes_something(option: str, values: list[Any], result: Callable[[Quantizer], Tensor]) -> None:
    common: dict[str, Any] = {"kind": "pow", "decay": 0.5}
    results = [result(make(**{**common, option: value})) for value in values]
    for first, second in itertools.combinations(results, 2):
        assert first.shape != second.shape or not torch.equal(first, second)

"""The T-step noisy residual quantiser against independent computations: float64, numbers by hand, another library.

Legend: B batch, T steps, C code width, H W latent grid, N vectors, K codebook entries, S books.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rdpm_cli.config import QuantizerConfig, ScheduleConfig
from rdpm_cli.step import TrainStep
from rdpm_cli.threads import one_thread
from rdpm_cli.tokenizer.quantizer import BLOCK_BYTES, Quantizer, Usage, lowest, lowest_by_tiles, nearest_code

B, C, H, W, K, T = 3, 8, 4, 5, 48, 5
BIASES = ["none", "add", "blend"]
BOOKS = ["shared", "per_step"]
KINDS = ["pow", "linear", "sin", "rvq"]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors this small wait longer for a second thread than they compute: 400 ms a chain against 5 on a busy CPU."""
    with one_thread():
        yield


def make(kind: str = "sin", base: float = 0.75, weight: bool = True, channels: int = C, **options: Any) -> Quantizer:
    """A quantiser in training mode; codes and bias convolution drawn from a fixed seed, `add` away from zero too."""
    cfg = QuantizerConfig.model_validate({"codes": K, "steps": T, **options})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        quantizer = Quantizer(cfg, ScheduleConfig.model_validate({"kind": kind, "base": base}), channels, weight)
        if quantizer.phi is not None:
            torch.nn.init.normal_(quantizer.phi.weight, std=0.05)
            assert quantizer.phi.bias is not None
            torch.nn.init.normal_(quantizer.phi.bias, std=0.2)
    return quantizer.train()


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs() -> tuple[Tensor, Tensor]:
    """z (B, C, H, W) of LayerNorm's scale and eps (B, T, C, H, W)."""
    return F.layer_norm(draw(B, H, W, C), (C,)).movedim(-1, 1), draw(B, T, C, H, W, seed=2)


def train_step(seed: int = 0, step: int = 0, batch: int = B) -> TrainStep:
    return TrainStep(seed, step, range(batch), batch, torch.device("cpu"))


def bias(quantizer: Quantizer, q: Tensor) -> Tensor:
    """bias(q) as DESIGN §2 writes it, with PyTorch's own convolution layer."""
    if quantizer.phi is None:
        return q
    return q + quantizer.phi(q) if quantizer.cfg.bias == "add" else 0.5 * q + 0.5 * quantizer.phi(q)


def brute_force(v_NC: Tensor, codebook_KC: Tensor) -> tuple[Tensor, Tensor]:
    """argmin_k |v - e_k|² in float64, all differences written out -> (codes, gap to the second best)."""
    distances = (v_NC.double().unsqueeze(1) - codebook_KC.double()).pow(2).sum(2)
    best = distances.topk(2, largest=False)
    return best.indices[:, 0], best.values[:, 1] - best.values[:, 0]


# ---- nearest_code ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [2, 8, 32])
@pytest.mark.parametrize("codes", [2, 63, 64, 65, 200, 256])
def test_nearest_code_equals_float64_beyond_near_ties(codes: int, channels: int) -> None:
    v, book = draw(1500, channels), draw(codes, channels, seed=2)
    expected, gap = brute_force(v, book)
    clear = gap > 1e-6 * (1 + v.double().pow(2).sum(1))
    assert clear.float().mean() > 0.99
    assert torch.equal(nearest_code(v, book)[clear], expected[clear])


def test_nearest_code_in_blocks_equals_float64() -> None:
    """K = 4096: the scores are computed for 128 vectors at a time, and the last block is a short one."""
    v, book = draw(300, 8), draw(4096, 8, seed=2)
    expected, gap = brute_force(v, book)
    clear = gap > 1e-5
    assert clear.float().mean() > 0.99
    assert torch.equal(nearest_code(v, book)[clear], expected[clear])


@pytest.mark.parametrize("copies", [2, 3])
@pytest.mark.parametrize("codes", [1, 5, 64, 65, 100, 128])
def test_ties_take_the_lowest_index(codes: int, copies: int) -> None:
    """Every row stands in the book `copies` times, within a tile of 64 and across tiles."""
    book, v = draw(codes, 8, seed=2), draw(400, 8)
    once = nearest_code(v, book)
    assert torch.equal(nearest_code(v, book.repeat(copies, 1)), once)
    neighbours = book.repeat_interleave(copies, 0)
    assert torch.equal(nearest_code(v, neighbours), copies * once)


def test_equal_distances_of_different_codes_take_the_lowest_index() -> None:
    book = torch.tensor([[9.0, 0.0], [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    assert nearest_code(torch.zeros(1, 2), book).tolist() == [1]
    assert nearest_code(torch.zeros(1, 2), book.flip(0)).tolist() == [0]


def test_padding_of_the_last_tile_is_never_chosen() -> None:
    book = 100 + draw(70, 4)  # far from zero: a zero row of padding would be nearer
    assert int(nearest_code(torch.zeros(50, 4), book).max()) < 70


def test_nearest_code_stays_fp32_inside_bf16_autocast() -> None:
    v, book = draw(2000, 8), draw(256, 8, seed=2)
    outside = nearest_code(v, book)
    with torch.autocast("cpu", torch.bfloat16):
        inside = nearest_code(v, book)
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
    """Watches how many numbers the largest tensor made inside holds."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor):
                self.numbers = max(
                    self.numbers, value.numel(), value.untyped_storage().nbytes() // value.element_size()
                )
        return out


@pytest.mark.parametrize("training", [False, True])
def test_all_scores_never_exist_at_once(training: bool) -> None:
    """1,024 vectors and 4,096 codes: 4.2M scores a step, of which one block of 2 MiB is held."""
    quantizer = make(codes=4096, steps=2).train(training)
    with LargestTensor() as largest:
        quantizer(draw(4, C, 16, 16), draw(4, 2, C, 16, 16, seed=2))
    assert largest.numbers == BLOCK_BYTES["cpu"] // 4 < 1024 * 4096


def test_codes_of_the_recipes_size_equal_float64_at_every_step() -> None:
    """K = 4096, C = 32, T = 10: v_t of the chain, each searched by brute force."""
    quantizer = make("pow", channels=32, codes=4096, steps=10)
    chain = quantizer(draw(1, 32, 4, 4), draw(1, 10, 32, 4, 4, seed=2))
    v_NC = chain.usage.vectors_TBNC.reshape(-1, 32)
    expected, gap = brute_force(v_NC, quantizer.books[0])
    clear = gap > 1e-6 * (1 + v_NC.double().pow(2).sum(1))
    assert clear.all()
    assert torch.equal(chain.codes_BTHW.transpose(0, 1).flatten(), expected)


# ---- the loop against a direct transcription ---------------------------------------------------------------------


@dataclass
class Reference:
    codes_BTHW: Tensor
    z_BCHW: Tensor
    loss: Tensor
    error_T: Tensor


def reference_chain(
    quantizer: Quantizer, z: Tensor, eps: Tensor, alphas: list[float], gammas: list[float]
) -> Reference:
    """DESIGN §2 line by line: Alg. 1, the straight-through step, and L_quant."""
    z_t, total, loss = z, torch.zeros_like(z), z.new_zeros(())
    codes, errors = [], []
    for t in range(len(alphas)):
        book = quantizer.books[t if quantizer.cfg.codebooks == "per_step" else 0]
        v = alphas[t] * z_t + math.sqrt(1 - alphas[t] ** 2) * eps[:, t]
        flat = v.detach().movedim(1, -1).reshape(-1, v.shape[1])
        code = brute_force(flat, book.detach())[0].view(v.shape[0], *v.shape[2:])
        e = book[code].movedim(-1, 1)
        through = bias(quantizer, e.detach() + v - v.detach())
        learnt = e if quantizer.cfg.codebook == "gradient" else e.detach()
        square = (v - through.detach()) ** 2 + (v.detach() - bias(quantizer, learnt)) ** 2
        loss = loss + gammas[t] * square.mean()
        z_t, total = z_t - through, total + through
        codes.append(code)
        errors.append((z - total).detach().pow(2).mean())
    return Reference(torch.stack(codes, 1), total, loss, torch.stack(errors))


SIN = [math.sin(math.pi * t / (2 * T)) for t in range(1, T + 1)]


@pytest.mark.parametrize("weight", [True, False], ids=["gamma=alpha", "gamma=1"])
@pytest.mark.parametrize("codebook", ["ema", "gradient"])
@pytest.mark.parametrize("bias_kind", BIASES)
@pytest.mark.parametrize("books", BOOKS)
def test_chain_loss_and_gradients_equal_the_formula(books: str, bias_kind: str, codebook: str, weight: bool) -> None:
    quantizer = make(codebooks=books, bias=bias_kind, codebook=codebook, weight=weight)
    z, eps = inputs()
    z.requires_grad_()
    chain = quantizer(z, eps)
    expected = reference_chain(quantizer, z, eps, SIN, SIN if weight else [1.0] * T)

    assert torch.equal(chain.codes_BTHW, expected.codes_BTHW)
    torch.testing.assert_close(chain.z_BCHW, expected.z_BCHW, rtol=0, atol=1e-5)
    torch.testing.assert_close(chain.loss, expected.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(chain.error_T, expected.error_T, rtol=1e-4, atol=1e-6)
    learnt = [z, *quantizer.parameters()]
    for found, wanted in zip(
        torch.autograd.grad(chain.loss, learnt), torch.autograd.grad(expected.loss, learnt), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
        assert wanted.abs().max() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_chain_follows_the_formula_under_every_schedule(kind: str) -> None:
    alphas = {
        "pow": [0.75 ** (T - t) for t in range(1, T + 1)],
        "linear": [t / T for t in range(1, T + 1)],
        "sin": SIN,
        "rvq": [1.0] * T,
    }[kind]
    quantizer, (z, eps) = make(kind), inputs()
    expected = reference_chain(quantizer, z, eps, [*alphas[:-1], 1.0], alphas)
    chain = quantizer(z, eps)
    assert torch.equal(chain.codes_BTHW, expected.codes_BTHW)
    torch.testing.assert_close(chain.z_BCHW, expected.z_BCHW, rtol=0, atol=1e-5)
    torch.testing.assert_close(chain.loss, expected.loss, rtol=1e-5, atol=0)


def test_evaluation_changes_neither_codes_nor_latents() -> None:
    quantizer, (z, eps) = make(), inputs()
    training = quantizer(z, eps)
    evaluating = quantizer.eval()(z, eps)
    assert torch.equal(training.codes_BTHW, evaluating.codes_BTHW)
    assert torch.equal(training.z_BCHW, evaluating.z_BCHW)
    assert torch.equal(quantizer.encode(z, eps), training.codes_BTHW)
    assert evaluating.usage is None


@pytest.mark.parametrize("training", [False, True])
def test_codes_alone_are_the_codes_without_losses_and_usage(training: bool) -> None:
    quantizer, (z, eps) = make().train(training), inputs()
    whole, alone = quantizer(z, eps), quantizer(z, eps, codes_only=True)
    assert torch.equal(alone.codes_BTHW, whole.codes_BTHW)
    assert torch.equal(alone.z_BCHW, whole.z_BCHW)
    assert alone.usage is None
    assert float(alone.loss) == 0
    assert len(alone.error_T) == 0


@pytest.mark.parametrize("bias_kind", BIASES)
def test_chain_runs_in_fp32_inside_bf16_autocast(bias_kind: str) -> None:
    quantizer, (z, eps) = make(bias=bias_kind), inputs()
    outside = quantizer(z, eps)
    with torch.autocast("cpu", torch.bfloat16):
        inside = quantizer(z, eps)
    for name in ("codes_BTHW", "z_BCHW", "loss", "error_T"):
        assert torch.equal(getattr(inside, name), getattr(outside, name)), name


@pytest.mark.parametrize("bias_kind", BIASES)
def test_rebuilding_runs_in_fp32_inside_bf16_autocast(bias_kind: str) -> None:
    """A generator trains in bf16 on z'_{t-1} rebuilt from codes: it must be the z' that the tokenizer saw."""
    quantizer, (z, eps) = make(bias=bias_kind), inputs()
    codes, terms = quantizer.encode(z, eps), torch.full((B,), T - 1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        inside = quantizer.prefix(codes, terms)
    with torch.no_grad():
        torch.testing.assert_close(inside, quantizer.prefix(codes, terms), rtol=0, atol=1e-5)


def test_rvq_equals_an_independent_residual_quantizer() -> None:
    """vector-quantize-pytorch's ResidualVQ with a shared codebook, in evaluation, index for index."""
    from vector_quantize_pytorch import ResidualVQ

    quantizer, (z, eps) = make("rvq", bias="none").eval(), inputs()
    theirs = ResidualVQ(dim=C, num_quantizers=T, codebook_size=K, shared_codebook=True).eval()
    theirs.layers[0]._codebook.embed.data.copy_(quantizer.books)
    with torch.no_grad():
        quantized, indices_BNT, _ = theirs(z.flatten(2).transpose(1, 2))
        chain = quantizer(z, eps)
    assert torch.equal(chain.codes_BTHW, indices_BNT.view(B, H, W, T).movedim(-1, 1))
    torch.testing.assert_close(chain.z_BCHW.flatten(2).transpose(1, 2), quantized, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_one_step_is_plain_vector_quantisation(kind: str) -> None:
    """T = 1 means alpha = 1 under every schedule: z' is the nearest codebook entry, and the noise is not used."""
    quantizer, (z, eps) = make(kind, steps=1, bias="none"), inputs()
    chain = quantizer(z, eps[:, :1])
    nearest, _ = brute_force(z.movedim(1, -1).reshape(-1, C), quantizer.books[0])
    assert torch.equal(chain.codes_BTHW.flatten(), nearest)
    torch.testing.assert_close(chain.z_BCHW, quantizer.books[0][nearest].view(B, H, W, C).movedim(-1, 1))
    assert torch.equal(quantizer(z, 5 + eps[:, :1]).z_BCHW, chain.z_BCHW)


# ---- gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("books", BOOKS)
def test_straight_through_is_exactly_the_identity_without_bias(kind: str, books: str) -> None:
    quantizer, (z, eps) = make(kind, bias="none", codebooks=books), inputs()
    z.requires_grad_()
    weights = draw(*z.shape, seed=3)
    (gradient,) = torch.autograd.grad((quantizer(z, eps).z_BCHW * weights).sum(), z)
    assert torch.equal(gradient, weights)


@pytest.mark.parametrize("bias_kind", ["add", "blend"])
def test_reconstruction_teaches_the_bias_convolution(bias_kind: str) -> None:
    quantizer, (z, eps) = make(bias=bias_kind), inputs()
    (quantizer(z, eps).z_BCHW * draw(*z.shape, seed=3)).sum().backward()
    assert quantizer.phi is not None
    for parameter in quantizer.phi.parameters():
        assert parameter.grad is not None
        assert (parameter.grad != 0).all()


def test_add_starts_as_the_identity() -> None:
    quantizer, q = Quantizer(QuantizerConfig(bias="add", codes=K, steps=T), ScheduleConfig(), C), draw(B, C, H, W)
    assert torch.equal(quantizer.bias(q), q)


def test_gradient_codebook_is_a_parameter_that_its_chosen_codes_move() -> None:
    quantizer, (z, eps) = make(codebook="gradient"), inputs()
    chain = quantizer(z, eps)
    chain.loss.backward()
    books = dict(quantizer.named_parameters())["books"]
    assert books.grad is not None
    moved = books.grad[0].abs().sum(1) > 0
    assert sorted(chain.codes_BTHW.unique().tolist()) == moved.nonzero().flatten().tolist()


def test_ema_codebook_is_a_buffer_that_no_gradient_reaches() -> None:
    quantizer, (z, eps) = make(codebook="ema"), inputs()
    before = quantizer.books.clone()
    quantizer(z.requires_grad_(), eps).loss.backward()
    assert "books" in dict(quantizer.named_buffers())
    assert "books" not in dict(quantizer.named_parameters())
    assert "books" in quantizer.state_dict()
    assert not quantizer.books.requires_grad
    assert torch.equal(quantizer.books, before)


# ---- sums, prefixes, decoding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("terms", [0, 1, 4], ids=lambda n: f"n={n}")
@pytest.mark.parametrize("bias_kind", BIASES)
def test_one_convolution_of_the_sum_equals_the_sum_of_convolutions(bias_kind: str, terms: int) -> None:
    quantizer, q = make(bias=bias_kind), draw(terms, B, C, H, W)
    expected = sum((bias(quantizer, q[i]) for i in range(terms)), torch.zeros(B, C, H, W))
    found = quantizer.bias_of_sum(q.sum(0), terms)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # the whole grid: borders are padded once a term


@pytest.mark.parametrize("bias_kind", BIASES)
def test_each_row_of_a_sum_may_have_its_own_number_of_terms(bias_kind: str) -> None:
    quantizer, q, terms = make(bias=bias_kind), draw(4, B, C, H, W), torch.tensor([0, 3, 4])
    sums = torch.stack([q[:n, row].sum(0) for row, n in enumerate(terms.tolist())])
    expected = torch.stack(
        [
            sum((bias(quantizer, q[i : i + 1, row])[0] for i in range(n)), torch.zeros(C, H, W))
            for row, n in enumerate(terms.tolist())
        ]
    )
    torch.testing.assert_close(quantizer.bias_of_sum(sums, terms), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bias_kind", BIASES)
@pytest.mark.parametrize("books", BOOKS)
def test_prefix_equals_the_running_sum_of_the_chain(books: str, bias_kind: str) -> None:
    quantizer, (z, eps) = make(codebooks=books, bias=bias_kind).eval(), inputs()
    codes, running = quantizer.encode(z, eps), torch.zeros_like(z)
    assert torch.equal(quantizer.prefix(codes, torch.zeros(B, dtype=torch.int64)), running)
    sums = [running]
    for t in range(1, T + 1):
        e = quantizer.books[t - 1 if books == "per_step" else 0][codes[:, t - 1]].movedim(-1, 1)
        sums.append(sums[-1] + bias(quantizer, e))
        torch.testing.assert_close(quantizer.prefix(codes, torch.full((B,), t)), sums[-1], rtol=0, atol=1e-5)
    mixed = torch.stack([sums[n][row] for row, n in enumerate((4, 0, 1))])
    torch.testing.assert_close(quantizer.prefix(codes, torch.tensor([4, 0, 1])), mixed, rtol=0, atol=1e-5)


def test_prefix_of_the_wrong_number_of_terms_is_another() -> None:
    quantizer, (z, eps) = make(), inputs()
    codes = quantizer.encode(z, eps)
    three, four = (quantizer.prefix(codes, torch.full((B,), n)) for n in (3, 4))
    assert (three - four).abs().mean() > 0.1


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_codes_may_come_in_any_integer_type(dtype: torch.dtype) -> None:
    quantizer, (z, eps) = make(), inputs()
    codes = quantizer.encode(z, eps)
    assert torch.equal(quantizer.decode(codes.to(dtype)), quantizer.decode(codes))


@pytest.mark.parametrize("bias_kind", BIASES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("books", BOOKS)
def test_decode_inverts_encode(books: str, kind: str, bias_kind: str) -> None:
    quantizer, (z, eps) = make(kind, codebooks=books, bias=bias_kind).eval(), inputs()
    torch.testing.assert_close(quantizer.decode(quantizer.encode(z, eps)), quantizer(z, eps).z_BCHW, rtol=0, atol=1e-5)


# ---- the model-free guess ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("books", BOOKS)
def test_guess_is_the_code_nearest_to_what_is_known_without_z(books: str) -> None:
    quantizer, (previous, eps) = make(codebooks=books), inputs()
    for t in range(1, T + 1):
        alpha = SIN[t - 1]
        known = math.sqrt(1 - alpha**2) * eps[:, t - 1] - alpha * previous
        book = quantizer.books[t - 1 if books == "per_step" else 0]
        expected, gap = brute_force(known.movedim(1, -1).reshape(-1, C), book)
        assert gap.min() > 1e-5
        assert torch.equal(quantizer.guess(previous, eps[:, t - 1], t).flatten(), expected)


def test_guess_is_what_the_chain_of_zero_latents_chooses() -> None:
    quantizer, (_, eps) = make(), inputs()
    chain, previous = quantizer(torch.zeros(B, C, H, W), eps), torch.zeros(B, C, H, W)
    for t in range(1, T + 1):
        assert torch.equal(quantizer.guess(previous, eps[:, t - 1], t), chain.codes_BTHW[:, t - 1])
        previous = previous + quantizer.bias(quantizer.look_up(chain.codes_BTHW[:, t - 1], t))


# ---- the codebook follows its vectors ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "expected"),
    [(True, (0.75 * 1 + 0.25 * 4) / (0.75 + 0.25 * 1.5)), (False, (0.75 * 1 + 0.25 * 5) / (0.75 + 0.25 * 2))],
    ids=["gamma=alpha", "gamma=1"],
)
def test_ema_codebook_follows_gamma_weighted_means(weight: bool, expected: float) -> None:
    """By hand: alpha = (1/2, 1), z = 4, eps = 0, e_0 = 1, e_1 = 10. Then v = (2, 3), both coded 0; e_1 stays.

    Weighted: 1.5 vectors of sum 0.5·2 + 3 = 4; unweighted: 2 of sum 5. Both EMAs keep 0.75, from 1 vector of sum e.
    """
    quantizer = make("linear", channels=1, codes=2, steps=2, bias="none", decay=0.75, restart_below=0.0, weight=weight)
    quantizer.books[0] = quantizer.ema_sums[0] = torch.tensor([[1.0], [10.0]])
    chain = quantizer(torch.full((1, 1, 1, 1), 4.0), torch.zeros(1, 2, 1, 1, 1))
    assert chain.codes_BTHW.flatten().tolist() == [0, 0]
    assert quantizer.follow(chain.usage, train_step(batch=1)) == 0
    torch.testing.assert_close(quantizer.books, torch.tensor([[[expected], [10.0]]]))


@pytest.mark.parametrize("books", BOOKS)
def test_follow_equals_means_taken_one_vector_at_a_time(books: str) -> None:
    """decay 0: a used code becomes the gamma-weighted mean of its vectors, before the bias."""
    quantizer, (z, eps) = make(codebooks=books, decay=0.0, restart_below=0.0), inputs()
    before, chain = quantizer.books.clone(), quantizer(z, eps)
    v_TNC = chain.usage.vectors_TBNC.flatten(1, 2)
    codes_TN = chain.codes_BTHW.movedim(1, 0).flatten(1)
    quantizer.follow(chain.usage, train_step())
    checked = 0
    for book in range(len(before)):
        steps = [book] if books == "per_step" else range(T)
        for code in range(K):
            found = [(SIN[t], v_TNC[t, n]) for t in steps for n in (codes_TN[t] == code).nonzero().flatten()]
            if found:
                mean = torch.stack([g * v for g, v in found]).sum(0) / sum(g for g, _ in found)
                torch.testing.assert_close(quantizer.books[book, code], mean, rtol=1e-4, atol=1e-5)
                checked += 1
    assert checked > K // 2


def test_usage_counts_the_codes_of_each_step() -> None:
    quantizer, (z, eps) = make(), inputs()
    chain = quantizer(z, eps)
    for t in range(T):
        expected = torch.tensor([(chain.codes_BTHW[:, t] == code).sum() for code in range(K)])
        assert torch.equal(chain.usage.used_TK[t], expected.float())
    assert chain.usage.vectors_TBNC.shape == (T, B, H * W, C)


def far_from_its_vectors(**options: Any) -> Quantizer:
    """A quantiser of which half the codes are out of reach, and which forgets at once (decay 0)."""
    quantizer = make(decay=0.0, restart_below=0.03, **options)
    quantizer.books[:, K // 2 :] = 100.0
    return quantizer


@pytest.mark.parametrize("books", BOOKS)
def test_dead_codes_restart_from_current_vectors(books: str) -> None:
    quantizer, (z, eps) = far_from_its_vectors(codebooks=books), inputs()
    chain = quantizer(z, eps)
    used_SK = chain.usage.counts_SK > 0.03 * chain.usage.counts_SK.mean(1, keepdim=True)
    assert quantizer.follow(chain.usage, train_step()) == int((~used_SK).sum())
    for book, used_K in enumerate(used_SK):
        assert not used_K[K // 2 :].any()
        steps = slice(book, book + 1) if books == "per_step" else slice(None)
        vectors_NC = chain.usage.vectors_TBNC[steps].reshape(-1, C)
        distance = (quantizer.books[book, ~used_K].unsqueeze(1) - vectors_NC).abs().amax(2).amin(1)
        assert distance.max() < 1e-5, f"book {book}"
        assert len(quantizer.books[book, ~used_K].unique(dim=0)) > 1


def test_restarts_are_off_at_zero() -> None:
    quantizer, (z, eps) = far_from_its_vectors(), inputs()
    off = make(decay=0.99, restart_below=0.0)
    off.load_state_dict(quantizer.state_dict())
    before = off.books.clone()
    chain = off(z, eps)
    assert off.follow(chain.usage, train_step()) == 0
    assert not torch.equal(off.books, before)


def follow_once(seed: int, step: int) -> Tensor:
    quantizer, (z, eps) = far_from_its_vectors(), inputs()
    quantizer.follow(quantizer(z, eps).usage, train_step(seed, step))
    return quantizer.books


def test_restarts_depend_on_seed_and_step_alone() -> None:
    first = follow_once(0, 3)
    torch.rand(10)  # the global generator has no say
    assert torch.equal(follow_once(0, 3), first)
    assert not torch.equal(follow_once(0, 4), first)
    assert not torch.equal(follow_once(1, 3), first)


def test_gradient_codebook_is_left_alone() -> None:
    quantizer, (z, eps) = make(codebook="gradient"), inputs()
    before = quantizer.books.detach().clone()
    usage = quantizer(z, eps).usage
    assert quantizer.follow(usage, train_step()) == 0
    assert torch.equal(quantizer.books, before)
    assert usage.used_TK.sum(1).tolist() == [B * H * W] * T  # still counted, for the log


def test_micro_batches_merge_into_the_usage_of_the_whole() -> None:
    quantizer, (z, eps) = make(), inputs()
    whole: Usage = quantizer(z, eps).usage
    merged: Usage = quantizer(z[:2], eps[:2]).usage.merged(quantizer(z[2:], eps[2:]).usage)
    assert torch.equal(merged.used_TK, whole.used_TK)
    torch.testing.assert_close(merged.vectors_TBNC, whole.vectors_TBNC, rtol=0, atol=1e-5)
    torch.testing.assert_close(merged.counts_SK, whole.counts_SK, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merged.sums_SKC, whole.sums_SKC, rtol=1e-5, atol=1e-5)


# ---- every option does something ---------------------------------------------------------------------------------


def codes_of(quantizer: Quantizer) -> Tensor:
    codes: Tensor = quantizer(*inputs()).codes_BTHW
    return codes


def latents_of(quantizer: Quantizer) -> Tensor:
    latents: Tensor = quantizer(*inputs()).z_BCHW
    return latents


def loss_of(quantizer: Quantizer) -> Tensor:
    loss: Tensor = quantizer(*inputs()).loss
    return loss


def moved_book(quantizer: Quantizer) -> Tensor:
    quantizer.follow(quantizer(*inputs()).usage, train_step())
    return quantizer.books.detach()


@pytest.mark.parametrize(
    ("option", "values", "seen_in"),
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
def test_each_option_changes_something(option: str, values: list[Any], seen_in: Callable[[Quantizer], Tensor]) -> None:
    common: dict[str, Any] = {"kind": "pow", "decay": 0.5}
    seen = [seen_in(make(**{**common, option: value})) for value in values]
    for i, first in enumerate(seen):
        for second in seen[i + 1 :]:
            assert first.shape != second.shape or not torch.equal(first, second)


def test_books_of_their_own_part_from_a_shared_one_after_the_first_step() -> None:
    shared, per_step = make(codebooks="shared"), make(codebooks="per_step")
    per_step.books[0] = shared.books[0]
    one, other = codes_of(shared), codes_of(per_step)
    assert torch.equal(one[:, 0], other[:, 0])
    assert not any(torch.equal(one[:, t], other[:, t]) for t in range(1, T))

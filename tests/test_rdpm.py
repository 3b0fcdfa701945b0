"""The RDPM family: geometric head, batches, loss, held-out measurement and sampling, against hand computations.

Legend: B images, J values of t an image, R rows, T steps, C code width, S positions, K codes."""

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import generators
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from generators import Calls, fixed_seed, make_generator, make_quantizer, sample, sampling_options  # noqa: F401
from helpers import CPU
from stores import Making
from torch import Tensor

from rdpm_cli import noise
from rdpm_cli.codes.store import CodeStore
from rdpm_cli.data.open import open_source
from rdpm_cli.distributed import TrainStep
from rdpm_cli.errors import DataError, UsageError
from rdpm_cli.generator import rdpm
from rdpm_cli.generator.config import RDPMConfig, RDPMObjective
from rdpm_cli.generator.contract import Condition, Known, held_out
from rdpm_cli.generator.drawing import guide
from rdpm_cli.generator.rdpm import RDPM, CodeBatch, CodeBatches
from rdpm_cli.tokenizer import model
from rdpm_cli.tokenizer.model import Tokenizer
from rdpm_cli.tokenizer.quantizer import Quantizer, Search, beta, diffuse
from rdpm_cli.training.config import TrainConfig

CHANNELS, CLASSES, CODES, STEPS = generators.CHANNELS, generators.CLASSES, generators.CODES, generators.STEPS
S, SHAPE = generators.GRID**2, (CHANNELS, generators.GRID**2)


@pytest.fixture
def tokenizer(tiny_tokenizer_file: Path) -> Tokenizer:
    return model.load(tiny_tokenizer_file)[0]


def make_rows(generator: RDPM, count: int = 6) -> tuple[Tensor, Tensor, Tensor, Condition]:
    """eps, z'_{t-1}, t, condition of some rows."""
    eps, previous = torch.randn(2, count, *SHAPE)
    labels = torch.arange(count) % (CLASSES + 1)
    return eps, previous, torch.arange(count) % STEPS + 1, generator.condition({"labels": labels})


def step_by_step(quantizer: Quantizer, codes_TS: Tensor, count: int) -> Tensor:
    """z'_count = sum of bias(e_{C_i}) of one image, i <= count, one step at a time: (C, S)."""
    total = torch.zeros(*SHAPE)
    for t in range(1, count + 1):
        total = total + quantizer.bias(quantizer.look_up(codes_TS[None, t - 1], t))[0]
    return total


def noise_of(index: int, t: int, seed: int = 3) -> Tensor:
    """eps_t of a sample."""
    return torch.from_numpy(noise.normal("sample", seed, index, 0, t, SHAPE))


@pytest.mark.parametrize("head", ["linear", "geometric"])
def test_a_fresh_network_predicts_uniformly(head: str) -> None:
    generator = make_generator(awake=False, head=head)
    eps, previous, t, condition = make_rows(generator)
    logits, zhat = generator.scores(generator.network(eps, previous, t, condition), eps, previous, t)
    assert logits.shape == (6, S, CODES)
    assert (zhat is None) == (head == "linear")
    assert not (logits if zhat is None else zhat).any()


def scales_of(generator: RDPM) -> list[float]:
    """s_t of each t, from logits = -s_t |mu - e_k|² + const, mu = alpha_t (zhat - z'_{t-1}) + beta_t eps_t."""
    eps, previous, t, _ = make_rows(generator, STEPS)
    zhat, scales = torch.randn(STEPS, S, CHANNELS), []
    logits = generator.geometric_logits(zhat, eps, previous, t)
    for row, alpha in enumerate(generator.quantizer.alphas):
        mu = alpha * (zhat[row] - previous[row].T) + math.sqrt(1 - alpha**2) * eps[row].T
        by_hand = -(mu[:, None] - generator.quantizer.book(row + 1)).pow(2).sum(-1)
        centred, expected = (x - x.mean(1, keepdim=True) for x in (logits[row], by_hand))
        scales.append(float((centred * expected).sum() / expected.pow(2).sum()))
        torch.testing.assert_close(centred, scales[-1] * expected, rtol=0, atol=1e-3)
    return scales


@pytest.mark.parametrize("books", ["shared", "per_step"])
def test_geometric_logits_are_scaled_distances(books: str) -> None:
    generator = make_generator(make_quantizer(codebooks=books), awake=False, head="geometric")
    assert scales_of(generator) == pytest.approx([0.5] * STEPS)
    generator.network.raw_scale.add_(torch.tensor([0.0, -0.02, 0.03, 0.05]))
    scales = scales_of(generator)
    assert 0 < scales[1] < scales[0] < scales[2] < scales[3]  # each step has its own, and all stay positive


@pytest.mark.parametrize("books", ["shared", "per_step"])
def test_guided_logits_are_the_logits_of_the_guided_zhat(books: str) -> None:
    generator = make_generator(make_quantizer(codebooks=books), head="geometric")
    eps, previous, t, condition = make_rows(generator)
    inputs = eps.repeat(2, 1, 1), previous.repeat(2, 1, 1), t.repeat(2)
    hidden = generator.network(*inputs, condition.joined(generator.null_condition({"labels": torch.zeros(6).long()})))
    logits, zhat = generator.scores(hidden, *inputs)
    assert zhat is not None
    guided = generator.geometric_logits(guide(zhat, 1.7), eps, previous, t)
    torch.testing.assert_close(guide(logits, 1.7), guided + guide(generator.network.head(hidden), 1.7))


def test_the_geometric_head_is_fp32_under_autocast() -> None:
    generator = make_generator(head="geometric")
    rows = make_rows(generator)
    with torch.autocast("cpu", torch.bfloat16):
        logits, zhat = generator.predict(*rows)
        linear = generator.network.head(generator.network(*rows))
    assert zhat is not None
    assert (linear.dtype, logits.dtype, zhat.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    torch.testing.assert_close(logits, linear.float() + generator.geometric_logits(zhat, *rows[:3]))


def make_batches(root: Path, tokenizer: Tokenizer, seed: int = 0, batch: int = 16, **objective: Any) -> CodeBatches:
    cfg = RDPMConfig(objective=RDPMObjective(**objective), train=TrainConfig(batch=batch, steps=1))
    return CodeBatches(CodeStore(root), cfg, tokenizer.quantizer, seed)


def fields_of(batch: CodeBatch) -> dict[str, Tensor]:
    return {name: value for name, value in {**vars(batch), **batch.columns}.items() if isinstance(value, Tensor)}


def test_the_input_rebuilt_from_the_store_is_what_the_tokenizer_saw(
    digits_codes: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """v_t of the tokenizer = alpha_t (z - z'_{t-1}) + beta_t eps_t from stored codes, stored z and the seed."""
    batches, vectors = make_batches(digits_codes, tokenizer, steps_per_image=STEPS), list[Tensor]()
    batch, quantizer = batches.batch_at(0, range(16)), tokenizer.quantizer
    assert batch.eps_BJCS is not None
    assert batch.z_BCS is not None
    quantize = quantizer.quantize

    def spy(v_BCS: Tensor, t: int, search: Search) -> Tensor:
        vectors.append(v_BCS)
        return quantize(v_BCS, t, search)

    monkeypatch.setattr(quantizer, "quantize", spy)
    eps = tokenizer.noise("encode", batches.store.manifest.seed, *batches.addresses(batches.rows_at(0, range(16))))
    assert torch.equal(quantizer.encode(batch.z_BCS, eps), batch.codes_BTS)
    for j in range(STEPS):
        t, rows = batch.t_BJ[:, j], torch.arange(16)
        assert torch.equal(batch.eps_BJCS[:, j], eps[rows, t - 1])
        alpha = torch.tensor(quantizer.alphas)[t - 1].view(-1, 1, 1)
        rest = batch.z_BCS - quantizer.prefix(batch.codes_BTS, t - 1)
        rebuilt = alpha * rest + (1 - alpha**2).sqrt() * batch.eps_BJCS[:, j]
        torch.testing.assert_close(rebuilt, torch.stack(vectors)[t - 1, rows], rtol=0, atol=1e-5)


@pytest.mark.parametrize("noise", ["cached", "fresh", "fresh-from-codes"])
def test_a_batch_is_a_function_of_seed_and_step_and_a_rank_has_a_slice_of_it(
    digits_codes: Path, tokenizer: Tokenizer, noise: str
) -> None:
    def batches(seed: int = 0) -> CodeBatches:
        objective = {"perturb": 0.3, "label_drop": 0.5, "steps_per_image": 2, "noise": noise}
        return make_batches(digits_codes, tokenizer, seed, 48, **objective)

    rows = range(48)
    first, following = fields_of(batches().batch_at(5, rows)), fields_of(batches().batch_at(6, rows))
    reseeded, part = fields_of(batches(1).batch_at(5, rows)), fields_of(batches().batch_at(5, range(16, 32)))
    assert ("eps_BJCS" in first) == (noise == "cached")
    for name, value in first.items():
        assert torch.equal(value[16:32], part[name]), name
        assert not torch.equal(value, following[name]), name
        assert not torch.equal(value, reseeded[name]), name


@pytest.mark.parametrize("weights", ["uniform", "alpha"])
@pytest.mark.parametrize("values", [1, 3, 5])
def test_t_follows_its_weights(digits_codes: Path, tokenizer: Tokenizer, weights: str, values: int) -> None:
    batches = make_batches(digits_codes, tokenizer, t_weights=weights, steps_per_image=values)
    t_BJ = batches.draw_t(np.linspace(0, 1, 4000, endpoint=False, dtype=np.float32))
    expected = np.array(tokenizer.quantizer.alphas) + 0.2 if weights == "alpha" else np.ones(STEPS)
    assert t_BJ.shape == (4000, values)
    shares = np.bincount(t_BJ.flatten(), minlength=STEPS + 1) / t_BJ.size
    np.testing.assert_allclose(shares, [0, *(expected / expected.sum())], atol=1e-3)
    below_one = np.nextafter(np.float32(1), np.float32(0), dtype=np.float32)
    assert batches.draw_t(np.full(1, below_one)).max() == STEPS


def test_fresh_noise_without_latents_is_refused_with_the_command(
    image_folder: Path, tiny_tokenizer_file: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    source, root = open_source(str(image_folder)), tmp_path / "codes"
    Making(root, source, tiny_tokenizer_file, latents=False).finish()
    assert make_batches(root, tokenizer).batch_at(0, range(16)).z_BCS is None
    with pytest.raises(DataError) as refused:
        make_batches(root, tokenizer, noise="fresh")
    assert refused.value.exit_code == 3
    for token in (f"rdpm tokenize {source.spec}", "--keep latents", "objective.noise=fresh-from-codes"):
        assert token in refused.value.hint
    assert make_batches(root, tokenizer, noise="fresh-from-codes").batch_at(0, range(16)).eps_BJCS is None


def loss_by_hand(generator: RDPM, codes_BTS: Tensor, eps_BJCS: Tensor, batch: CodeBatch) -> float:
    """Eq. 7, a row at a time, plus the mean squared error of zhat."""
    entropies, errors = [], []
    for image, steps in enumerate(batch.t_BJ.tolist()):
        condition = generator.condition({"labels": batch.columns["labels"][image][None]})
        for j, t in enumerate(steps):
            previous = step_by_step(generator.quantizer, codes_BTS[image], t - 1)
            logits, zhat = generator.predict(eps_BJCS[image, j][None], previous[None], torch.tensor([t]), condition)
            entropies.append(-logits[0].log_softmax(-1).gather(1, codes_BTS[image, t - 1].view(-1, 1)).mean())
            if zhat is not None:
                goal = step_by_step(generator.quantizer, codes_BTS[image], STEPS)
                errors.append((zhat[0] - (goal if batch.z_BCS is None else batch.z_BCS[image]).T).pow(2).mean())
    return float(torch.stack(entropies).mean() + (torch.stack(errors).mean() if errors else 0.0))


def make_step(step: int = 0) -> TrainStep:
    return TrainStep(0, step, range(16), 16, CPU)


@pytest.mark.parametrize("head", ["linear", "geometric"])
@pytest.mark.parametrize("latents", [True, False], ids=["with z", "without z"])
def test_the_loss_is_the_cross_entropy_of_stored_codes(
    digits_codes: Path, tokenizer: Tokenizer, head: str, latents: bool
) -> None:
    generator = make_generator(tokenizer.quantizer, head=head)
    batch = make_batches(digits_codes, tokenizer, steps_per_image=2).batch_at(0, range(16))
    batch = batch if latents else replace(batch, z_BCS=None)
    assert batch.eps_BJCS is not None
    loss, logs = generator.loss(batch, make_step())
    assert float(loss) == pytest.approx(loss_by_hand(generator, batch.codes_BTS, batch.eps_BJCS, batch), rel=1e-4)
    assert set(logs) == {"ce", "accuracy"} | ({"latent_mse"} if head == "geometric" else set())


@pytest.mark.parametrize(("rows", "head"), [(1, "linear"), (3, "geometric"), (31, "geometric")])
def test_losses_of_some_rows_at_a_time_are_those_of_all(
    digits_codes: Path, tokenizer: Tokenizer, rows: int, head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = make_generator(tokenizer.quantizer, head=head)
    generator.network.requires_grad_(True)
    batch = make_batches(digits_codes, tokenizer, steps_per_image=2).batch_at(0, range(16))

    def results() -> list[Tensor]:
        loss, logs = generator.loss(batch, make_step())
        return [loss.detach(), *logs.values(), *torch.autograd.grad(loss, list(generator.network.parameters()))]

    expected, calls = results(), Calls(generator.network.head)
    monkeypatch.setattr(rdpm, "LOGITS_AT_ONCE", rows * S * CODES)
    torch.testing.assert_close(results(), expected, rtol=1e-4, atol=1e-6)
    assert (max(calls.rows), sum(calls.rows)) == (rows, 2 * 32)  # forward, and again in the backward pass


@pytest.mark.parametrize("noise", ["fresh", "fresh-from-codes"])
def test_fresh_noise_quantises_z_again(digits_codes: Path, tokenizer: Tokenizer, noise: str) -> None:
    """fresh: the stored z; fresh-from-codes: what the codes decode to, also where z is stored."""
    generator = make_generator(tokenizer.quantizer, head="geometric")
    batch = make_batches(digits_codes, tokenizer, steps_per_image=2, noise=noise).batch_at(0, range(16))
    assert (batch.z_BCS is None) == (noise == "fresh-from-codes")
    z = tokenizer.quantizer.decode(batch.codes_BTS) if batch.z_BCS is None else batch.z_BCS
    drawn = [batch.codes_BTS]
    for step in range(3):
        eps = make_step(step).normal(STEPS, *SHAPE)  # the first draw of the step
        drawn.append(tokenizer.quantizer.encode(z, eps))
        selected = torch.stack([eps[i, batch.t_BJ[i] - 1] for i in range(16)])
        by_hand = loss_by_hand(generator, drawn[-1], selected, replace(batch, z_BCS=z))
        assert float(generator.loss(batch, make_step(step))[0]) == pytest.approx(by_hand, rel=1e-4)
    assert all((a != b).float().mean() > 0.2 for a, b in itertools.combinations(drawn, 2))


def test_perturbation_moves_the_input_by_one_u_an_image(digits_codes: Path, tokenizer: Tokenizer) -> None:
    def inputs(perturb: float) -> tuple[CodeBatch, Tensor]:
        generator = make_generator(tokenizer.quantizer, head="geometric")
        calls = Calls(generator.network)
        batch = make_batches(digits_codes, tokenizer, steps_per_image=2, perturb=perturb).batch_at(0, range(16))
        generator.loss(batch, make_step())
        return batch, calls.inputs[0][1].view(16, 2, *SHAPE)

    (still, previous), (batch, shaken) = inputs(0.0), inputs(0.4)
    assert still.spread_B is None
    assert batch.spread_B is not None
    assert 0 < float(batch.spread_B.min()) < float(batch.spread_B.max()) < 0.4
    moved = shaken - previous
    torch.testing.assert_close(moved[:, 0], moved[:, 1], rtol=0, atol=1e-5)  # one draw for all t of an image
    widths = moved[:, 0].flatten(1).std(1) / batch.spread_B
    assert float((widths - 1).abs().max()) < 0.5  # N(0, spread²), 64 values an image


def test_held_out_accuracy_and_its_model_free_baseline_are_those_of_single_rows(
    digits_codes: Path, tokenizer: Tokenizer
) -> None:
    generator, quantizer = make_generator(tokenizer.quantizer, head="geometric"), tokenizer.quantizer
    batches = make_batches(digits_codes, tokenizer)
    store, measured = batches.store, held_out(generator, batches, CPU)
    values: dict[str, list[list[float]]] = {name: [[] for _ in range(STEPS)] for name in measured}
    for row in batches.held_out:
        codes = torch.from_numpy(store.codes(np.array([row]))[0].astype(np.int64))
        condition = generator.condition({"labels": torch.tensor([int(store.columns["labels"][row])])})
        index, view = int(store.index[row]), int(row) % store.manifest.views
        for t, target in enumerate(codes, 1):
            eps = torch.from_numpy(noise.normal("encode", store.manifest.seed, index, view, t, SHAPE))
            previous = step_by_step(quantizer, codes, t - 1)
            v = beta(quantizer.alphas[t - 1]) * eps - quantizer.alphas[t - 1] * previous
            guess = torch.cdist(v.T, quantizer.books[0]).argmin(1)
            logits = generator.predict(eps[None], previous[None], torch.tensor([t]), condition)[0][0]
            values["baseline"][t - 1].append(float((guess == target).float().mean()))
            values["ce"][t - 1].append(float(F.cross_entropy(logits, target)))
            values["accuracy"][t - 1].append(float((logits.argmax(-1) == target).float().mean()))
            values["norm"][t - 1].append(float(step_by_step(quantizer, codes, t).norm(dim=0).mean()))
    for name, per_t in values.items():
        assert measured[name] == pytest.approx([float(np.mean(row)) for row in per_t], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize(
    ("options", "first", "rows"),
    [
        ({"cfg": 0.0}, 1, [3, 3, 3, 3]),
        ({"cfg": 2.0, "cfg_schedule": "linear"}, 1, [3, 6, 6, 6]),
        ({"cfg": 2.0, "cfg_schedule": "constant", "skip_steps": 2}, 1, [6, 6]),
        ({"cfg": 2.0, "cfg_schedule": "interval", "cfg_first": 2, "cfg_last": 3}, 1, [3, 6, 6, 3]),
        ({"cfg": 2.0, "skip_steps": 1}, 3, [6, 6]),
    ],
    ids=str,
)
def test_only_guided_steps_have_an_unconditional_pass_and_known_ones_none(
    options: dict[str, Any], first: int, rows: list[int]
) -> None:
    generator, options_ = make_generator(), sampling_options(**options)
    calls = Calls(generator.network)
    keep = (torch.arange(1, 5).view(1, -1, 1) < first).expand(3, STEPS, S)
    sample(generator, range(3), range(3), options_, Known(torch.zeros(3, STEPS, S).long(), keep))
    assert calls.rows == rows
    assert 3 * generator.passes(options_, first) == sum(rows)
    both = generator.condition({"labels": torch.tensor([0, 1, 2, CLASSES, CLASSES, CLASSES])})
    for *_, condition in calls.inputs:
        assert torch.equal(condition.vector_BD, both.vector_BD[: len(condition.vector_BD)])


@pytest.mark.parametrize(
    "option",
    [
        {"seed": 1}, {"cfg": 4.0}, {"cfg": 4.0, "cfg_schedule": "constant"}, {"cfg": 3.0, "cfg_schedule": "cosine"},
        {"cfg": 3.0, "cfg_schedule": "power"}, {"cfg": 3.0, "cfg_schedule": "power", "cfg_power": 0.5},
        {"cfg": 3.0, "cfg_schedule": "interval", "cfg_first": 2}, {"tau": 0.3}, {"top_k": 3}, {"top_p": 0.3},
        {"cfg": 3.0, "cfg_schedule": "interval", "cfg_last": 3}, {"draw": "argmax"}, {"draw": "inverse"},
        {"tau": 1.5, "tau_schedule": "linear", "tau_end": 0.5}, {"skip_steps": 1},
    ],
    ids=str,
)  # fmt: skip
def test_each_option_changes_the_samples(option: dict[str, Any]) -> None:
    generator = make_generator(std=0.5)
    args = (generator, torch.arange(12) % 3, range(12))
    # An option that acts through guidance is compared with plain guidance.
    base = {name: value for name, value in option.items() if name in ("cfg", "tau") and len(option) > 1}
    codes = sample(*args, sampling_options(**option))
    assert not torch.equal(codes, sample(*args, sampling_options(**base)))
    if option.get("cfg_schedule") == "power":
        assert not torch.equal(codes, sample(*args, sampling_options(**{**option, "cfg_power": 4.0})))


def test_a_large_tau_is_argmax() -> None:
    generator, indices = make_generator(), [5, 9]
    condition = generator.condition({"labels": torch.arange(2)})
    codes = sample(generator, range(2), indices, sampling_options(tau=1e6, seed=3))
    assert torch.equal(codes, sample(generator, range(2), indices, sampling_options(draw="argmax", seed=3)))
    for t in range(1, STEPS + 1):
        eps = torch.stack([noise_of(index, t) for index in indices])
        previous = torch.stack([step_by_step(generator.quantizer, row, t - 1) for row in codes])
        logits = generator.predict(eps, previous, torch.full((2,), t), condition)[0]
        assert torch.equal(codes[:, t - 1], logits.argmax(-1))


def test_skipped_steps_are_the_model_free_guess_without_a_network_call() -> None:
    generator = make_generator()
    calls, quantizer = Calls(generator.network), generator.quantizer
    codes = sample(generator, range(2), [5, 9], sampling_options(skip_steps=2, seed=3))
    assert [int(t[0]) for _, _, t, _ in calls.inputs] == [3, 4]
    for t, (row, index) in itertools.product((1, 2), zip(codes, (5, 9), strict=True)):
        v = diffuse(-step_by_step(quantizer, row, t - 1), noise_of(index, t), quantizer.alphas[t - 1])
        assert torch.equal(row[t - 1], torch.cdist(v.T, quantizer.books[0]).argmin(1))


@pytest.mark.parametrize(("kind", "skip"), [("rvq", 1), ("sin", STEPS), ("pow", STEPS + 3)])
def test_skipping_what_the_tokenizer_cannot_guess_is_refused(kind: str, skip: int) -> None:
    generator = make_generator(make_quantizer(kind))
    for call in (generator.check, lambda options: sample(generator, [0], [0], options)):
        with pytest.raises(UsageError, match=f"--skip-steps {skip}") as refused:
            call(sampling_options(skip_steps=skip))
        assert refused.value.exit_code == 2


def test_guidance_from_a_step_beyond_the_last_is_refused() -> None:
    generator = make_generator()
    generator.check(sampling_options(cfg=2.0, cfg_schedule="interval", cfg_first=STEPS))
    with pytest.raises(UsageError, match=f"cfg_first={STEPS + 1}"):
        generator.check(sampling_options(cfg=2.0, cfg_schedule="interval", cfg_first=STEPS + 1))


def test_known_codes_are_kept_and_the_rest_is_drawn() -> None:
    generator, args = make_generator(), (range(2), range(2), sampling_options())
    free = sample(generator, *args)
    prompt, keep = (free + 1) % CODES, torch.zeros_like(free, dtype=torch.bool)
    keep[:, :, : S // 2] = True
    codes = sample(generator, *args, Known(prompt, keep))
    assert torch.equal(codes[keep], prompt[keep])
    assert not torch.equal(codes[~keep], prompt[~keep])
    assert not torch.equal(codes[~keep], free[~keep])  # the network sees the known codes
    assert torch.equal(sample(generator, *args, Known(prompt, torch.ones_like(keep))), prompt)


def test_samples_do_not_depend_on_the_thread_count() -> None:
    generator, codes = make_generator(make_quantizer(bias="blend"), std=0.5, class_latents=True, head="geometric"), []
    for threads in (2, 3, 1):  # the others have one
        torch.set_num_threads(threads)
        codes.append(sample(generator, [1], [1], sampling_options(cfg=1.0)))
    assert all(torch.equal(row, codes[0]) for row in codes)


@pytest.mark.parametrize("head", ["linear", "geometric"])
def test_plain_residual_codes_are_learnt_and_drawn_without_their_noise(head: str) -> None:
    """One image a class: what comes back is its codes, whatever the noise of the samples is."""
    quantizer = make_quantizer("rvq", codebooks="per_step", bias="none")
    generator = make_generator(quantizer, awake=False, head=head, eps_input=False, positions="both")
    generator.network.train().requires_grad_(True)
    z = torch.randn(3, 4, 16)
    codes = quantizer.encode(z, torch.zeros(3, 4, *z.shape[1:]))
    optimizer = torch.optim.Adam(generator.network.parameters(), 1e-2)
    losses = []
    for number in range(200):
        t = torch.randint(1, 4 + 1, (3, 2))
        batch = CodeBatch(codes, {"labels": torch.arange(3)}, t, torch.randn(3, 2, *z.shape[1:]))
        loss, _ = generator.loss(batch, TrainStep(0, number, range(3), 3, torch.device("cpu")))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    generator.network.eval()
    drawn = [sample(generator, range(3), range(3), sampling_options(seed, draw="argmax")) for seed in (0, 1)]
    assert torch.equal(*drawn)
    assert (drawn[0] == codes).float().mean() > 0.95

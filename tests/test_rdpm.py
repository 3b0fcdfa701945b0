"""The RDPM family: geometric head, batches, loss, held-out measurement and sampling, against hand computations.

Legend: B images, J values of t an image, R rows, T steps, C code width, S positions, K codes.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from generators import (
    CHANNELS,
    CLASSES,
    CODES,
    GRID,
    STEPS,
    Calls,
    make_generator,
    make_quantizer,
    network_config,
    sampling_options,
)
from helpers import CPU
from stores import Making
from torch import Tensor

from rdpm_cli import noise
from rdpm_cli.codes.store import CodeStore
from rdpm_cli.data.open import open_source
from rdpm_cli.data.pixels import chw, to_model
from rdpm_cli.device import one_thread
from rdpm_cli.distributed import TrainStep
from rdpm_cli.errors import DataError, UsageError
from rdpm_cli.generator import rdpm
from rdpm_cli.generator.batches import held_out
from rdpm_cli.generator.config import ObjectiveConfig, RDPMConfig
from rdpm_cli.generator.contract import Condition, Known, SampleOptions
from rdpm_cli.generator.drawing import guide
from rdpm_cli.generator.rdpm import RDPM, CodeBatch, CodeBatches, RDPMNetwork
from rdpm_cli.tokenizer import model
from rdpm_cli.tokenizer.model import Tokenizer
from rdpm_cli.tokenizer.quantizer import Quantizer, Search, beta, diffuse
from rdpm_cli.training.config import TrainConfig

S = GRID * GRID
Rows = tuple[Tensor, Tensor, Tensor, Condition]


@pytest.fixture(autouse=True)
def fixed_seed() -> Iterator[None]:
    with torch.random.fork_rng(), one_thread():  # networks this small lose time to threads
        torch.manual_seed(0)
        yield


@pytest.fixture
def tokenizer(tiny_tokenizer_file: Path) -> Tokenizer:
    return model.load(tiny_tokenizer_file)[0]


def generator_config(batch: int = 16, **objective: Any) -> RDPMConfig:
    train = TrainConfig(batch=batch, steps=1)
    return RDPMConfig(network=network_config(), objective=ObjectiveConfig(**objective), train=train)


def make_rows(generator: RDPM, count: int = 6) -> Rows:
    """eps, z'_{t-1}, t, condition of some rows."""
    eps, previous = torch.randn(2, count, CHANNELS, S)
    labels = torch.arange(count) % (CLASSES + 1)
    return eps, previous, torch.arange(count) % STEPS + 1, generator.condition({"labels": labels})


def step_by_step(quantizer: Quantizer, codes_TS: Tensor, count: int) -> Tensor:
    """z'_count = sum of bias(e_{C_i}) of one image, i <= count, one step at a time: (C, S)."""
    total = torch.zeros(CHANNELS, S)
    for t in range(1, count + 1):
        total = total + quantizer.bias(quantizer.look_up(codes_TS[None, t - 1], t))[0]
    return total


def heads_of(generator: RDPM, rows: Rows) -> tuple[Tensor, Tensor | None]:
    """Logits of the linear head, and zhat."""
    network = generator.network
    assert isinstance(network, RDPMNetwork)
    hidden = network(*rows)
    return network.head(hidden), network.latent_head(hidden) if network.latent_head else None


def sample(generator: RDPM, labels: Any, indices: Any, options: SampleOptions, known: Known | None = None) -> Tensor:
    """Codes of labels and noise indices."""
    condition = generator.condition({"labels": torch.as_tensor(labels)})
    return generator.sample(condition, torch.as_tensor(indices), options, known)


# ---- the heads -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["linear", "geometric"])
def test_a_fresh_network_predicts_uniformly(head: str) -> None:
    generator = make_generator(awake=False, head=head)
    logits, zhat = heads_of(generator, make_rows(generator))
    assert logits.shape == (6, S, CODES)
    assert not logits.any()
    assert (zhat is None) == (head == "linear")
    assert zhat is None or not zhat.any()


def scales_of(generator: RDPM) -> list[float]:
    """s_t of each t, from logits = -s_t |mu - e_k|² + const, mu = alpha_t (zhat - z'_{t-1}) + beta_t eps_t."""
    eps, previous, t, _ = make_rows(generator, 8)
    zhat, scales = torch.randn(8, S, CHANNELS), torch.zeros(8)
    logits = generator.geometric_logits(zhat, eps, previous, t)
    for row, step in enumerate(t.tolist()):
        alpha, books = generator.quantizer.alphas[step - 1], generator.quantizer.books
        mu = alpha * (zhat[row] - previous[row].T) + math.sqrt(1 - alpha**2) * eps[row].T
        by_hand = -(mu[:, None] - books[step - 1 if len(books) > 1 else 0]).pow(2).sum(-1)
        centred, expected = (x - x.mean(1, keepdim=True) for x in (logits[row], by_hand))
        scales[row] = (centred * expected).sum() / expected.pow(2).sum()
        torch.testing.assert_close(centred, scales[row] * expected, rtol=0, atol=1e-3)
    torch.testing.assert_close(scales[:STEPS], scales[STEPS:])  # one number a step
    return scales[:STEPS].tolist()


@pytest.mark.parametrize("books", ["shared", "per_step"])
def test_geometric_logits_are_scaled_distances(books: str) -> None:
    generator = make_generator(make_quantizer(codebooks=books), awake=False, head="geometric")
    assert scales_of(generator) == pytest.approx([0.5] * STEPS)
    generator.network.get_parameter("raw_scale").add_(torch.tensor([0.0, -0.02, 0.03, 0.05]))
    scales = scales_of(generator)
    assert 0 < scales[1] < scales[0] < scales[2] < scales[3]  # each step has its own, and all stay positive


@pytest.mark.parametrize("books", ["shared", "per_step"])
def test_guided_logits_are_the_logits_of_the_guided_zhat(books: str) -> None:
    generator = make_generator(make_quantizer(codebooks=books), head="geometric")
    eps, previous, t, condition = make_rows(generator)
    inputs = [(eps, previous, t, condition), (eps, previous, t, generator.null_condition(6))]
    (cond, zhat_cond), (uncond, zhat_uncond) = (generator.predict(*rows) for rows in inputs)
    (linear_cond, _), (linear_uncond, _) = (heads_of(generator, rows) for rows in inputs)
    assert zhat_cond is not None
    assert zhat_uncond is not None
    guided = generator.geometric_logits(guide(zhat_cond, zhat_uncond, 1.7), eps, previous, t)
    torch.testing.assert_close(guide(cond, uncond, 1.7), guided + guide(linear_cond, linear_uncond, 1.7))


def test_the_geometric_head_is_fp32_under_autocast() -> None:
    generator = make_generator(head="geometric")
    rows = make_rows(generator)
    with torch.autocast("cpu", torch.bfloat16):
        logits, zhat = generator.predict(*rows)
        linear, _ = heads_of(generator, rows)
    assert linear.dtype == torch.bfloat16
    assert zhat is not None
    assert logits.dtype == zhat.dtype == torch.float32
    torch.testing.assert_close(logits, linear.float() + generator.geometric_logits(zhat, *rows[:3]))


# ---- batches from the store ----------------------------------------------------------------------------------------


def make_batches(root: Path, tokenizer: Tokenizer, cfg: RDPMConfig, seed: int = 0) -> CodeBatches:
    return CodeBatches(CodeStore(root), cfg, tokenizer.quantizer, seed)


def fields_of(batch: CodeBatch) -> dict[str, Tensor]:
    return {name: value for name, value in {**vars(batch), **batch.columns}.items() if isinstance(value, Tensor)}


def test_the_input_rebuilt_from_the_store_is_what_the_tokenizer_saw(
    digits_codes: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """v_t of the tokenizer = alpha_t (z - z'_{t-1}) + beta_t eps_t from stored codes, stored z and the seed."""
    batches = make_batches(digits_codes, tokenizer, generator_config(steps_per_image=STEPS))
    batch, store = batches.batch_at(0, range(16)), batches.store
    assert batch.eps_BJCS is not None
    assert batch.z_BCS is not None
    vectors: list[Tensor] = []
    quantize = tokenizer.quantizer.quantize

    def spy(v_BCS: Tensor, t: int, search: Search) -> Tensor:
        vectors.append(v_BCS)
        return quantize(v_BCS, t, search)

    monkeypatch.setattr(tokenizer.quantizer, "quantize", spy)
    eps = tokenizer.noise("encode", store.manifest.seed, *batches.addresses(batches.rows_at(0, range(16))))
    assert torch.equal(tokenizer.quantizer.encode(batch.z_BCS, eps), batch.codes_BTS)
    rows = torch.arange(16)
    for j in range(STEPS):
        t = batch.t_BJ[:, j]
        assert torch.equal(batch.eps_BJCS[:, j], eps[rows, t - 1])
        previous = tokenizer.quantizer.prefix(batch.codes_BTS, t - 1)
        alpha = torch.tensor(tokenizer.quantizer.alphas)[t - 1].view(-1, 1, 1)
        rebuilt = alpha * (batch.z_BCS - previous) + (1 - alpha**2).sqrt() * batch.eps_BJCS[:, j]
        torch.testing.assert_close(rebuilt, torch.stack(vectors)[t - 1, rows], rtol=0, atol=1e-5)


def test_stored_latents_are_those_of_the_images(digits_codes: Path, tokenizer: Tokenizer, image_folder: Path) -> None:
    batches = make_batches(digits_codes, tokenizer, generator_config())
    z, source = batches.batch_at(0, range(16)).z_BCS, open_source(str(image_folder))
    indices, _ = batches.addresses(batches.rows_at(0, range(16)))
    pixels = np.stack([source.pixels(index, 16) for index in indices])
    assert z is not None
    torch.testing.assert_close(z, tokenizer.latents(to_model(chw(pixels))), rtol=0, atol=2e-3)


@pytest.mark.parametrize("noise", ["cached", "fresh", "fresh-from-codes"])
def test_a_batch_is_a_function_of_seed_and_step(digits_codes: Path, tokenizer: Tokenizer, noise: str) -> None:
    cfg = generator_config(perturb=0.3, label_drop=0.5, steps_per_image=2, noise=noise)
    batches = make_batches(digits_codes, tokenizer, cfg)
    first = fields_of(batches.batch_at(5, range(16)))
    following = fields_of(batches.batch_at(6, range(16)))
    repeated = fields_of(make_batches(digits_codes, tokenizer, cfg).batch_at(5, range(16)))
    reseeded = fields_of(make_batches(digits_codes, tokenizer, cfg, 1).batch_at(5, range(16)))
    assert ("eps_BJCS" in first) == (noise == "cached")
    for name, value in first.items():
        assert torch.equal(value, repeated[name]), name
        assert not torch.equal(value, following[name]), name
        assert not torch.equal(value, reseeded[name]), name


def test_the_rows_of_a_rank_are_a_slice_of_the_global_batch(digits_codes: Path, tokenizer: Tokenizer) -> None:
    cfg = generator_config(batch=48, perturb=0.3, label_drop=0.5, steps_per_image=2)
    batches = make_batches(digits_codes, tokenizer, cfg)
    whole = fields_of(batches.batch_at(3, range(48)))
    for start in (0, 16, 32):
        part = fields_of(batches.batch_at(3, range(start, start + 16)))
        for name, value in whole.items():
            assert torch.equal(value[start : start + 16], part[name]), name


@pytest.mark.parametrize("weights", ["uniform", "alpha"])
@pytest.mark.parametrize("values", [1, 3, 5])
def test_t_follows_its_weights(digits_codes: Path, tokenizer: Tokenizer, weights: str, values: int) -> None:
    batches = make_batches(digits_codes, tokenizer, generator_config(t_weights=weights, steps_per_image=values))
    t_BJ = batches.draw_t(np.linspace(0, 1, 4000, endpoint=False, dtype=np.float32))
    expected = np.array(tokenizer.quantizer.alphas) + 0.2 if weights == "alpha" else np.ones(STEPS)
    assert t_BJ.shape == (4000, values)
    shares = np.bincount(t_BJ.flatten(), minlength=STEPS + 1) / t_BJ.size
    np.testing.assert_allclose(shares, [0, *(expected / expected.sum())], atol=1e-3)


def test_several_t_of_an_image_spread_and_stay_in_range(digits_codes: Path, tokenizer: Tokenizer) -> None:
    batches = make_batches(digits_codes, tokenizer, generator_config(steps_per_image=STEPS))
    below_one = np.nextafter(np.float32(1), np.float32(0))
    uniform = np.array([0, *np.random.default_rng(0).random(100), below_one], np.float32)
    np.testing.assert_array_equal(batches.draw_t(uniform), np.tile(np.arange(1, STEPS + 1), (102, 1)))


def test_step_label_drop_and_perturbation_are_drawn_independently(digits_codes: Path, tokenizer: Tokenizer) -> None:
    batches = make_batches(digits_codes, tokenizer, generator_config(batch=64, label_drop=0.3, perturb=1.0))
    drawn = [batches.batch_at(step, range(64)) for step in range(30)]
    dropped = torch.cat([batch.columns["labels"] == CLASSES for batch in drawn]).double()
    assert float(dropped.mean()) == pytest.approx(0.3, abs=0.035)
    t = torch.cat([batch.t_BJ[:, 0] for batch in drawn]).double()
    spread = torch.cat([batch.spread_B for batch in drawn if batch.spread_B is not None]).double()
    correlation = np.corrcoef(torch.stack([t, dropped, spread]).numpy()) - np.eye(3)
    assert np.abs(correlation).max() < 0.1  # 1,920 rows: 4 standard errors


def test_fresh_noise_without_latents_is_refused_with_the_command(
    image_folder: Path, tiny_tokenizer_file: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    source, root = open_source(str(image_folder)), tmp_path / "codes"
    Making(root, source, tiny_tokenizer_file, latents=False).finish()
    assert make_batches(root, tokenizer, generator_config()).batch_at(0, range(16)).z_BCS is None
    with pytest.raises(DataError) as refused:
        make_batches(root, tokenizer, generator_config(noise="fresh"))
    assert refused.value.exit_code == 3
    for token in (f"rdpm tokenize {source.spec}", "--keep latents", "objective.noise=fresh-from-codes"):
        assert token in refused.value.hint
    batches = make_batches(root, tokenizer, generator_config(noise="fresh-from-codes"))
    assert batches.batch_at(0, range(16)).eps_BJCS is None


def test_held_out_images_are_never_trained_on(digits_codes: Path, tokenizer: Tokenizer) -> None:
    batches = make_batches(digits_codes, tokenizer, generator_config())
    trained, held = set(batches.store.index[batches.rows]), set(batches.store.index[batches.held_out])
    assert held
    assert not trained & held
    assert len(trained | held) == batches.store.manifest.images


# ---- the loss ------------------------------------------------------------------------------------------------------


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
                goal = goal if batch.z_BCS is None else batch.z_BCS[image]
                errors.append((zhat[0] - goal.T).pow(2).mean())
    return float(torch.stack(entropies).mean() + (torch.stack(errors).mean() if errors else 0.0))


def make_step(step: int = 0) -> TrainStep:
    return TrainStep(0, step, range(16), 16, CPU)


@pytest.mark.parametrize("head", ["linear", "geometric"])
@pytest.mark.parametrize("latents", [True, False], ids=["with z", "without z"])
def test_the_loss_is_the_cross_entropy_of_stored_codes(
    digits_codes: Path, tokenizer: Tokenizer, head: str, latents: bool
) -> None:
    generator = make_generator(tokenizer.quantizer, head=head)
    batch = make_batches(digits_codes, tokenizer, generator_config(steps_per_image=2)).batch_at(0, range(16))
    if not latents:
        batch.z_BCS = None
    assert batch.eps_BJCS is not None
    loss, logs = generator.loss(batch, make_step())
    assert float(loss) == pytest.approx(loss_by_hand(generator, batch.codes_BTS, batch.eps_BJCS, batch), rel=1e-4)
    assert set(logs) == {"ce", "accuracy"} | ({"latent_mse"} if head == "geometric" else set())


def test_the_first_loss_is_that_of_a_uniform_guess(digits_codes: Path, tokenizer: Tokenizer) -> None:
    batch = make_batches(digits_codes, tokenizer, generator_config()).batch_at(0, range(16))
    loss, _ = make_generator(tokenizer.quantizer, awake=False).loss(batch, make_step())
    assert float(loss) == pytest.approx(math.log(CODES), rel=1e-5)


@pytest.mark.parametrize("head", ["linear", "geometric"])
@pytest.mark.parametrize("rows", [1, 3, 31])
def test_losses_of_some_rows_at_a_time_are_those_of_all(
    digits_codes: Path, tokenizer: Tokenizer, rows: int, head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = make_generator(tokenizer.quantizer, head=head)
    generator.network.requires_grad_(True)
    batch = make_batches(digits_codes, tokenizer, generator_config(steps_per_image=2)).batch_at(0, range(16))
    counts: list[int] = []

    def results() -> list[Tensor]:
        generator.network.zero_grad()
        loss, logs = generator.loss(batch, make_step())
        loss.backward()
        gradients = [p.grad for p in generator.network.parameters() if p.grad is not None]
        return [loss.detach(), *logs.values(), *(gradient.clone() for gradient in gradients)]

    def spy(*inputs: Tensor) -> Tensor:
        counts.append(len(inputs[0]))
        return row_losses(*inputs)

    row_losses, expected = generator._row_losses, results()
    monkeypatch.setattr(rdpm, "LOGITS_AT_ONCE", rows * S * CODES)
    monkeypatch.setattr(generator, "_row_losses", spy)
    for value, whole in zip(results(), expected, strict=True):
        torch.testing.assert_close(value, whole, rtol=1e-4, atol=1e-6)
    assert max(counts) == rows
    assert sum(counts) == 2 * 32  # forward, and again in the backward pass


@pytest.mark.parametrize("noise", ["fresh", "fresh-from-codes"])
def test_fresh_noise_quantises_z_again(digits_codes: Path, tokenizer: Tokenizer, noise: str) -> None:
    """fresh: the stored z; fresh-from-codes: what the codes decode to, also where z is stored."""
    generator = make_generator(tokenizer.quantizer, head="geometric")
    cfg = generator_config(steps_per_image=2, noise=noise)
    batch = make_batches(digits_codes, tokenizer, cfg).batch_at(0, range(16))
    assert batch.eps_BJCS is None
    assert (batch.z_BCS is None) == (noise == "fresh-from-codes")
    z = tokenizer.quantizer.decode(batch.codes_BTS) if batch.z_BCS is None else batch.z_BCS
    drawn = [batch.codes_BTS]
    for step in range(3):
        eps = make_step(step).normal(STEPS, CHANNELS, S)  # the first draw of the step
        codes = tokenizer.quantizer.encode(z, eps)
        selected = torch.stack([eps[i, batch.t_BJ[i] - 1] for i in range(16)])
        by_hand = loss_by_hand(generator, codes, selected, replace(batch, z_BCS=z))
        assert float(generator.loss(batch, make_step(step))[0]) == pytest.approx(by_hand, rel=1e-4)
        drawn.append(codes)
    assert all((a != b).float().mean() > 0.2 for a, b in itertools.combinations(drawn, 2))


def test_perturbation_moves_the_input_by_one_u_an_image(digits_codes: Path, tokenizer: Tokenizer) -> None:
    def inputs(perturb: float) -> tuple[CodeBatch, Tensor, float]:
        generator = make_generator(tokenizer.quantizer, head="geometric")
        calls = Calls(generator.network)
        cfg = generator_config(steps_per_image=2, perturb=perturb)
        batch = make_batches(digits_codes, tokenizer, cfg).batch_at(0, range(16))
        loss = float(generator.loss(batch, make_step())[0])
        return batch, calls.inputs[0][1].view(16, 2, CHANNELS, S), loss

    (still, previous, still_loss), (batch, shaken, loss) = inputs(0.0), inputs(0.4)
    assert loss != still_loss
    assert still.spread_B is None
    assert batch.spread_B is not None
    assert 0 < float(batch.spread_B.min()) < float(batch.spread_B.max()) < 0.4
    moved = shaken - previous
    torch.testing.assert_close(moved[:, 0], moved[:, 1], rtol=0, atol=1e-5)  # one draw for all t of an image
    widths = moved[:, 0].flatten(1).std(1) / batch.spread_B
    assert float((widths - 1).abs().max()) < 0.5  # N(0, spread²), 64 values an image
    targets = fields_of(batch)
    assert all(torch.equal(value, targets[name]) for name, value in fields_of(still).items())


# ---- held-out measurement ------------------------------------------------------------------------------------------


def test_held_out_accuracy_and_its_model_free_baseline_are_those_of_single_rows(
    digits_codes: Path, tokenizer: Tokenizer
) -> None:
    generator, quantizer = make_generator(tokenizer.quantizer, head="geometric"), tokenizer.quantizer
    batches = make_batches(digits_codes, tokenizer, generator_config())
    store, measured = batches.store, held_out(generator, batches, CPU)
    values: dict[str, list[list[float]]] = {name: [[] for _ in range(STEPS)] for name in measured}
    for row in batches.held_out:
        codes = torch.from_numpy(store.codes(np.array([row]))[0].astype(np.int64))
        condition = generator.condition({"labels": torch.tensor([int(store.columns["labels"][row])])})
        index, view = int(store.index[row]), int(row) % store.manifest.views
        for t, target in enumerate(codes, 1):
            eps = torch.from_numpy(noise.normal("encode", store.manifest.seed, index, view, t, (CHANNELS, S)))
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


# ---- sampling ------------------------------------------------------------------------------------------------------

LABELS = [0, 2, 1, 1, 0, 2, 0]


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({"cfg": 0.0}, [3, 3, 3, 3]),
        ({"cfg": 2.0, "cfg_schedule": "constant"}, [6, 6, 6, 6]),
        ({"cfg": 2.0, "cfg_schedule": "linear"}, [3, 6, 6, 6]),
        ({"cfg": 2.0, "cfg_schedule": "constant", "skip_steps": 2}, [6, 6]),
        ({"cfg": 2.0, "cfg_schedule": "interval", "cfg_first": 2, "cfg_last": 3}, [3, 6, 6, 3]),
        ({"cfg": 2.0, "cfg_schedule": "interval", "cfg_first": 4, "skip_steps": 2}, [3, 6]),
    ],
    ids=str,
)
def test_only_guided_steps_have_an_unconditional_pass(options: dict[str, Any], rows: list[int]) -> None:
    generator, options_ = make_generator(), sampling_options(**options)
    calls = Calls(generator.network)
    sample(generator, range(3), range(3), options_)
    assert calls.rows == rows
    assert 3 * generator.passes(options_) == sum(rows)
    both = generator.condition({"labels": torch.tensor([0, 1, 2, CLASSES, CLASSES, CLASSES])})
    for *_, condition in calls.inputs:
        vector = condition[0]  # of the Condition
        assert torch.equal(vector, both.vector_BD[: len(vector)])


@pytest.mark.parametrize("first", [1, 3, 4])
def test_known_steps_have_no_pass(first: int) -> None:
    generator, options = make_generator(), sampling_options(cfg=2.0, skip_steps=1)
    calls = Calls(generator.network)
    keep = (torch.arange(1, 5).view(1, -1, 1) < first).expand(3, STEPS, S)
    sample(generator, range(3), range(3), options, Known(torch.zeros(3, STEPS, S, dtype=torch.int64), keep))
    assert 3 * generator.passes(options, first) == sum(calls.rows)


def test_a_sample_does_not_depend_on_its_place_in_the_batch() -> None:
    generator, order = make_generator(class_latents=True, class_tokens=2), torch.tensor([4, 0, 6, 2, 1, 5, 3])
    labels, indices = torch.tensor(LABELS), torch.arange(7)
    codes = sample(generator, labels, indices, sampling_options(cfg=1.0))
    assert torch.equal(sample(generator, labels[order], indices[order], sampling_options(cfg=1.0)), codes[order])


@pytest.mark.parametrize(
    "option",
    [
        {"seed": 1},
        {"cfg": 4.0},
        {"cfg": 4.0, "cfg_schedule": "constant"},
        {"cfg": 3.0, "cfg_schedule": "cosine"},
        {"cfg": 3.0, "cfg_schedule": "power"},
        {"cfg": 3.0, "cfg_schedule": "power", "cfg_power": 0.5},
        {"cfg": 3.0, "cfg_schedule": "interval", "cfg_first": 2},
        {"cfg": 3.0, "cfg_schedule": "interval", "cfg_last": 3},
        {"tau": 0.3},
        {"tau": 1.5, "tau_schedule": "linear", "tau_end": 0.5},
        {"skip_steps": 1},
        {"top_k": 3},
        {"top_p": 0.3},
        {"draw": "argmax"},
        {"draw": "inverse"},
    ],
    ids=str,
)
def test_each_option_changes_the_samples(option: dict[str, Any]) -> None:
    generator = make_generator(std=0.5)
    args = (generator, torch.arange(12) % 3, range(12))
    # An option that acts through guidance is compared with plain guidance.
    base = {name: value for name, value in option.items() if name in ("cfg", "tau") and len(option) > 1}
    codes = sample(*args, sampling_options(**option))
    assert not torch.equal(codes, sample(*args, sampling_options(**base)))
    if option.get("cfg_schedule") == "power":
        assert not torch.equal(codes, sample(*args, sampling_options(**{**option, "cfg_power": 4.0})))


def test_the_label_changes_the_sample() -> None:
    generator = make_generator(std=0.5)
    first, second = (sample(generator, [label] * 3, range(3), sampling_options()) for label in (0, 1))
    assert not torch.equal(first, second)


def test_a_large_tau_is_argmax() -> None:
    generator, indices = make_generator(), [5, 9]
    condition = generator.condition({"labels": torch.arange(2)})
    codes = sample(generator, range(2), indices, sampling_options(tau=1e6, seed=3))
    assert torch.equal(codes, sample(generator, range(2), indices, sampling_options(draw="argmax", seed=3)))
    for t in range(1, STEPS + 1):
        eps = torch.stack([torch.from_numpy(noise.normal("sample", 3, i, 0, t, (CHANNELS, S))) for i in indices])
        previous = torch.stack([step_by_step(generator.quantizer, row, t - 1) for row in codes])
        logits = generator.predict(eps, previous, torch.full((2,), t), condition)[0]
        assert torch.equal(codes[:, t - 1], logits.argmax(-1))


@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_codes_are_drawn_from_the_softmax_of_tau_times_the_logits(tau: float) -> None:
    generator = make_generator(make_quantizer(codes=4), awake=False)
    logits = torch.tensor([0.0, 0.5, 1.0, -1.0])
    generator.network.get_parameter("head.bias").copy_(logits)
    codes = sample(generator, [0] * 64, range(64), sampling_options(tau=tau))
    shares = torch.bincount(codes.flatten(), minlength=4) / codes.numel()
    np.testing.assert_allclose(shares, (tau * logits).softmax(0), atol=0.03)  # 4,096 draws: 4 standard errors


def test_skipped_steps_are_the_model_free_guess_without_a_network_call() -> None:
    generator, quantizer = make_generator(), make_quantizer()
    generator.quantizer = quantizer
    calls = Calls(generator.network)
    codes = sample(generator, range(2), [5, 9], sampling_options(skip_steps=2, seed=3))
    assert [int(t[0]) for _, _, t, _ in calls.inputs] == [3, 4]
    for t in (1, 2):
        for row, index in zip(codes, (5, 9), strict=True):
            eps = torch.from_numpy(noise.normal("sample", 3, index, 0, t, (CHANNELS, S)))
            v = diffuse(-step_by_step(quantizer, row, t - 1), eps, quantizer.alphas[t - 1])
            assert torch.equal(row[t - 1], torch.cdist(v.T, quantizer.books[0]).argmin(1))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("rvq", {"skip_steps": 1}),
        ("sin", {"skip_steps": STEPS}),
        ("pow", {"skip_steps": STEPS + 3}),
        ("sin", {"cfg": 1.0, "cfg_schedule": "interval", "cfg_last": 9}),
    ],
)
def test_options_that_the_tokenizer_cannot_use_are_refused(kind: str, options: dict[str, Any]) -> None:
    generator = make_generator(make_quantizer(kind))
    with pytest.raises(UsageError) as refused:
        generator.check(sampling_options(**options))
    assert refused.value.exit_code == 2
    with pytest.raises(UsageError):
        sample(generator, [0], [0], sampling_options(**options))


@pytest.mark.parametrize("kind", ["sin", "pow", "linear", "rvq"])
def test_every_schedule_can_be_sampled(kind: str) -> None:
    options = sampling_options(top_k=5, top_p=0.9, cfg=1.0)
    codes = sample(make_generator(make_quantizer(kind)), range(2), range(2), options)
    assert codes.shape == (2, STEPS, S)
    assert 0 <= int(codes.min()) <= int(codes.max()) < CODES


def test_known_codes_are_kept_and_the_rest_is_drawn() -> None:
    generator, args = make_generator(), (range(2), range(2), sampling_options())
    free = sample(generator, *args)
    given = (free + 1) % CODES
    keep = torch.zeros_like(free, dtype=torch.bool)
    keep[:, :, : S // 2] = True
    codes = sample(generator, *args, Known(given, keep))
    assert torch.equal(codes[keep], given[keep])
    assert not torch.equal(codes[~keep], given[~keep])
    assert not torch.equal(codes[~keep], free[~keep])  # the network sees the known codes
    assert torch.equal(sample(generator, *args, Known(given, torch.ones_like(keep))), given)


@pytest.mark.parametrize("bias", ["blend", "none"])
def test_samples_do_not_depend_on_the_thread_count(bias: str) -> None:
    generator = make_generator(make_quantizer(bias=bias), std=0.5, class_latents=True, head="geometric")
    codes = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)  # the fixture restores it
        codes.append(sample(generator, [1], [1], sampling_options(cfg=1.0)))
    assert all(torch.equal(row, codes[0]) for row in codes)

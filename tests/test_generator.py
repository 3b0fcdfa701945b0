"""The RDPM generator: network, loss, guidance, sampling and file, against the paper and against hand computations.

Legend: B images, R rows, T steps, C code width, H W grid, L = H·W, K codes.
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
    wake,
)
from helpers import sampling_options
from torch import Tensor, nn

from rdpm_cli import engine, modelfile, noise
from rdpm_cli.codes.store import CodeStore
from rdpm_cli.config import (
    NetworkConfig,
    ObjectiveConfig,
    RDPMArchitecture,
    RDPMConfig,
    RDPMSampling,
    TrainConfig,
)
from rdpm_cli.errors import CheckpointError, DataError, UsageError
from rdpm_cli.generator import model, sampler
from rdpm_cli.generator.contract import Known
from rdpm_cli.generator.guidance import guidance_at, guide
from rdpm_cli.generator.model import LoadedGenerator
from rdpm_cli.generator.rdpm import RDPM, RDPMNetwork, tokens
from rdpm_cli.generator.rdpm_batches import CodeBatch, CodeBatches
from rdpm_cli.generator.task import held_out
from rdpm_cli.generator.transformer import rope_table, rotate
from rdpm_cli.step import TrainStep
from rdpm_cli.threads import one_thread
from rdpm_cli.tokenizer import model as tokenizer_file
from rdpm_cli.tokenizer.model import Tokenizer
from rdpm_cli.tokenizer.quantizer import Quantizer, Search, diffuse
from rdpm_cli.tokenizer.schedule import beta

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fixed_seed() -> Iterator[None]:
    with torch.random.fork_rng(), one_thread():  # networks this small lose time to threads
        torch.manual_seed(0)
        yield


def generator_config(network: dict[str, Any] | None = None, batch: int = 16, **objective: Any) -> RDPMConfig:
    return RDPMConfig(
        network=network_config(**(network or {})),
        objective=ObjectiveConfig(**objective),
        train=TrainConfig(batch=batch, steps=1),
    )


def make_rows(count: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """eps, z'_{t-1}, t, labels of some rows."""
    eps, previous = torch.randn(2, count, CHANNELS, GRID, GRID)
    return eps, previous, torch.arange(count) % STEPS + 1, torch.arange(count) % (CLASSES + 1)


def step_by_step(quantizer: Quantizer, codes_THW: Tensor, count: int) -> Tensor:
    """z'_count = sum of bias(e_{C_i}) of one image, i <= count, one step at a time: (C, H, W)."""
    total = torch.zeros(CHANNELS, GRID, GRID)
    for t in range(1, count + 1):
        total = total + quantizer.bias(quantizer.look_up(codes_THW[None, t - 1], t))[0]
    return total


def heads_of(generator: RDPM, rows: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None]:
    """Logits of the linear head, and zhat."""
    assert isinstance(generator.network, RDPMNetwork)
    return generator.network.heads(generator.network(*rows))


# ---- the network ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "millions"), [(12, 133), (16, 310), (20, 602)])
def test_parameter_counts_are_those_of_table_1(depth: int, millions: int) -> None:
    with torch.device("meta"):
        network = RDPMNetwork(
            NetworkConfig(depth=depth), grid=(16, 16), channels=32, codes=4096, steps=10, classes=1000
        )
    count = sum(p.numel() for p in network.parameters())
    assert count / 1e6 == pytest.approx(millions, rel=0.01)


def test_class_latents_cost_8_million_parameters_at_imagenet_size() -> None:
    def count(**options: Any) -> int:
        with torch.device("meta"):
            network = RDPMNetwork(NetworkConfig(depth=12, **options), (16, 16), 32, 4096, 10, 1000)
        return sum(p.numel() for p in network.parameters())

    assert count(class_latents=True) - count() == 1001 * 256 * 32 + 32 * 768


@pytest.mark.parametrize("head", ["linear", "geometric"])
def test_a_fresh_network_predicts_uniformly(head: str) -> None:
    generator = make_generator(awake=False, head=head)
    logits, zhat = heads_of(generator, make_rows())
    assert logits.shape == (6, GRID * GRID, CODES)
    assert not logits.any()
    assert (zhat is None) == (head == "linear")
    if zhat is not None:
        assert zhat.shape == (6, GRID * GRID, CHANNELS)
        assert not zhat.any()


def test_the_null_class_is_number_classes() -> None:
    generator = make_generator(class_latents=True, class_tokens=2)
    eps, previous, t, _ = make_rows(2)
    null = torch.full((2,), CLASSES)
    assert generator.network(eps, previous, t, null).isfinite().all()
    assert {m.num_embeddings for m in generator.network.modules() if isinstance(m, nn.Embedding)} == {CLASSES + 1}
    with pytest.raises(IndexError):
        generator.network(eps, previous, t, null + 1)


@pytest.mark.parametrize(
    ("options", "parameter"),
    [
        ({"positions": "learned"}, "positions.weight"),
        ({"positions": "both"}, "positions.weight"),
        ({"class_latents": True}, "class_latents.weight"),
        ({"class_tokens": 3}, "class_tokens.weight"),
        ({"head": "geometric"}, "latent_head.weight"),
        ({"head": "geometric"}, "raw_scale"),
        ({"qk_norm": True}, "blocks.0.attn.q_norm.weight"),
        ({"qk_norm": True}, "blocks.1.attn.k_norm.weight"),
    ],
    ids=str,
)
def test_an_option_adds_parameters_that_change_the_prediction(options: dict[str, Any], parameter: str) -> None:
    generator, rows = make_generator(**options), make_rows()
    plain = {name for name, _ in make_generator().network.named_parameters()}
    (added,) = [p for name, p in generator.network.named_parameters() if name.endswith(parameter)]
    assert not any(name.endswith(parameter) for name in plain)
    before = generator.predict(*rows)[0]
    added.copy_(added + torch.randn(added.shape))
    after = generator.predict(*rows)[0]
    assert before.shape == after.shape == (6, GRID * GRID, CODES)
    assert not torch.allclose(before, after, atol=1e-3)


@pytest.mark.parametrize("option", [{"depth": 3}, {"width": 64}, {"heads": 4}], ids=str)
def test_the_size_changes_the_network(option: dict[str, Any]) -> None:
    small, other = make_generator().network, make_generator(**option).network
    if option == {"heads": 4}:  # the same parameters, used in another way
        other.load_state_dict(small.state_dict())
        rows = make_rows()
        assert not torch.allclose(small(*rows), other(*rows), atol=1e-4)
    else:
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in other.parameters())


@pytest.mark.parametrize("which", range(4), ids=["eps", "previous", "t", "label"])
def test_the_prediction_depends_on_every_input(which: int) -> None:
    generator, rows = make_generator(), list(make_rows(1))
    before = generator.predict(*rows)[0]
    rows[which] = rows[which] + 1
    assert not torch.allclose(before, generator.predict(*rows)[0], atol=1e-3)


@pytest.mark.parametrize(
    ("positions", "knows_places"), [("rope", True), ("learned", True), ("both", True), (None, False)]
)
def test_positions_are_known_through_rope_and_table_alone(positions: str | None, knows_places: bool) -> None:
    """Moving the tokens moves the logits along with them, unless the network knows places."""
    generator = make_generator(positions=positions or "learned", std=0.5)
    if positions is None:
        generator.network.get_parameter("trunk.positions.weight").zero_()
    eps, previous, t, labels = make_rows()
    order = torch.randperm(GRID * GRID)

    def moved(x_RCHW: Tensor) -> Tensor:
        return x_RCHW.flatten(2)[..., order].view_as(x_RCHW)

    straight = generator.predict(eps, previous, t, labels)[0][:, order]
    turned = generator.predict(moved(eps), moved(previous), t, labels)[0]
    assert torch.allclose(straight, turned, atol=1e-4) != knows_places


# ---- 2-D RoPE ------------------------------------------------------------------------------------------------------


def turned(x_NE: Tensor, extra: int = 0) -> Tensor:
    angles = rope_table((GRID, GRID), x_NE.shape[1], extra)
    return rotate(x_NE, angles.cos(), angles.sin())


def test_rotation_keeps_norms() -> None:
    x = torch.randn(GRID * GRID, 16)
    assert not torch.allclose(turned(x), x)
    torch.testing.assert_close(turned(x).norm(dim=1), x.norm(dim=1))


def test_attention_scores_depend_on_relative_place_alone() -> None:
    q, k = torch.randn(2, 16)
    scores = (turned(q.expand(GRID * GRID, 16)) @ turned(k.expand(GRID * GRID, 16)).T).view(GRID, GRID, GRID, GRID)
    by_offset: dict[tuple[int, int], list[float]] = {}
    for y1, x1, y2, x2 in np.ndindex(GRID, GRID, GRID, GRID):
        by_offset.setdefault((y2 - y1, x2 - x1), []).append(float(scores[y1, x1, y2, x2]))
    assert all(max(values) - min(values) < 1e-4 for values in by_offset.values())
    means = [values[0] for values in by_offset.values()]
    assert len({round(m, 4) for m in means}) == len(by_offset)  # and every offset has its own


def test_class_tokens_are_not_turned() -> None:
    x = torch.randn(2 + GRID * GRID, 16)
    out = turned(x, extra=2)
    torch.testing.assert_close(out[:2], x[:2], rtol=0, atol=0)
    torch.testing.assert_close(out[2:], turned(x[2:]))


# ---- the geometric head --------------------------------------------------------------------------------------------


def scales_of(generator: RDPM) -> list[float]:
    """s_t of each t, from logits = -s_t |mu - e_k|² + const, mu = alpha_t (zhat - z'_{t-1}) + beta_t eps_t."""
    eps, previous, t, _ = make_rows(8)
    zhat, scales = torch.randn(8, GRID * GRID, CHANNELS), torch.zeros(8)
    logits = generator.geometric_logits(zhat, eps, previous, t)
    for row, step in enumerate(t.tolist()):
        alpha, books = generator.quantizer.alphas[step - 1], generator.quantizer.books
        mu = alpha * (zhat[row] - previous[row].flatten(1).T) + math.sqrt(1 - alpha**2) * eps[row].flatten(1).T
        by_hand = -(mu[:, None] - books[step - 1 if len(books) > 1 else 0]).pow(2).sum(-1)
        found, wanted = (x - x.mean(1, keepdim=True) for x in (logits[row], by_hand))
        scales[row] = (found * wanted).sum() / wanted.pow(2).sum()
        torch.testing.assert_close(found, scales[row] * wanted, rtol=0, atol=1e-3)
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
    eps, previous, t, labels = make_rows()
    inputs = [(eps, previous, t, labels), (eps, previous, t, torch.full_like(labels, CLASSES))]
    (cond, zhat_cond), (uncond, zhat_uncond) = (generator.predict(*rows) for rows in inputs)
    (linear_cond, _), (linear_uncond, _) = (heads_of(generator, rows) for rows in inputs)
    assert zhat_cond is not None
    assert zhat_uncond is not None
    guided = generator.geometric_logits(guide(zhat_cond, zhat_uncond, 1.7), eps, previous, t)
    torch.testing.assert_close(guide(cond, uncond, 1.7), guided + guide(linear_cond, linear_uncond, 1.7))


def test_the_geometric_head_is_fp32_under_autocast() -> None:
    generator, rows = make_generator(head="geometric"), make_rows()
    with torch.autocast("cpu", torch.bfloat16):
        logits, zhat = generator.predict(*rows)
        linear, _ = heads_of(generator, rows)
    assert linear.dtype == torch.bfloat16
    assert logits.dtype == torch.float32
    assert zhat is not None
    assert zhat.dtype == torch.float32
    torch.testing.assert_close(logits, linear.float() + generator.geometric_logits(zhat, *rows[:3]))


# ---- batches from the store ----------------------------------------------------------------------------------------


@pytest.fixture
def tokenizer(tiny_tokenizer_file: Path) -> Tokenizer:
    return tokenizer_file.load(tiny_tokenizer_file)[0]


def make_batches(root: Path, tokenizer: Tokenizer, cfg: RDPMConfig, seed: int = 0) -> CodeBatches:
    return CodeBatches(CodeStore(root), cfg, tokenizer.quantizer, seed)


def fields_of(batch: CodeBatch) -> dict[str, Tensor]:
    return {name: value for name, value in vars(batch).items() if value is not None}


def test_the_input_rebuilt_from_the_store_is_what_the_tokenizer_saw(
    digits_codes: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """v_t of the tokenizer = alpha_t (z - z'_{t-1}) + beta_t eps_t from stored codes, stored z and the seed."""
    batches = make_batches(digits_codes, tokenizer, generator_config(steps_per_image=STEPS))
    batch, store = batches.batch_at(0, range(16)), batches.store
    own = batches.rows[noise.epoch_rows(0, 0, 16, len(batches.rows))]
    assert batch.eps_BSCHW is not None
    assert batch.z_BCHW is not None
    seen: list[Tensor] = []
    quantize = tokenizer.quantizer.quantize

    def watched(v_BCHW: Tensor, t: int, search: Search) -> Tensor:
        seen.append(v_BCHW)
        return quantize(v_BCHW, t, search)

    monkeypatch.setattr(tokenizer.quantizer, "quantize", watched)
    eps = tokenizer.noise("encode", store.manifest.seed, store.index[own].tolist(), store.view(own).tolist())
    codes = tokenizer.quantizer.encode(batch.z_BCHW, eps)
    torch.testing.assert_close(codes, batch.codes_BTHW)
    for s in range(STEPS):
        t = batch.t_BS[:, s]
        rows = torch.arange(16)
        torch.testing.assert_close(batch.eps_BSCHW[:, s], eps[rows, t - 1], rtol=0, atol=0)
        previous = tokenizer.quantizer.prefix(batch.codes_BTHW, t - 1)
        alpha = torch.tensor(tokenizer.quantizer.alphas)[t - 1].view(-1, 1, 1, 1)
        rebuilt = alpha * (batch.z_BCHW - previous) + (1 - alpha**2).sqrt() * batch.eps_BSCHW[:, s]
        torch.testing.assert_close(rebuilt, torch.stack(seen)[t - 1, rows], rtol=0, atol=1e-5)


def test_stored_latents_are_those_of_the_images(digits_codes: Path, tokenizer: Tokenizer, image_folder: Path) -> None:
    from rdpm_cli.images.sources import open_source
    from rdpm_cli.images.tensors import chw, to_model

    batches = make_batches(digits_codes, tokenizer, generator_config())
    batch = batches.batch_at(0, range(16))
    own = batches.rows[noise.epoch_rows(0, 0, 16, len(batches.rows))]
    source = open_source(str(image_folder))
    pixels = np.stack([source.pixels(int(i), 16) for i in batches.store.index[own]])
    assert batch.z_BCHW is not None
    torch.testing.assert_close(batch.z_BCHW, tokenizer.latents(to_model(chw(pixels))), rtol=0, atol=2e-3)


@pytest.mark.parametrize("objective", [{"noise": "cached"}, {"noise": "fresh"}, {"noise": "fresh-from-codes"}], ids=str)
def test_a_batch_is_a_function_of_seed_and_step(
    digits_codes: Path, tokenizer: Tokenizer, objective: dict[str, Any]
) -> None:
    cfg = generator_config(perturb=0.3, label_drop=0.5, steps_per_image=2, **objective)
    batches = make_batches(digits_codes, tokenizer, cfg)
    first = fields_of(batches.batch_at(5, range(16)))
    batches.batch_at(6, range(16))  # whatever happened in between
    again = fields_of(make_batches(digits_codes, tokenizer, cfg).batch_at(5, range(16)))
    assert ("eps_BSCHW" in first) == (objective["noise"] == "cached")
    for name, value in first.items():
        assert torch.equal(value, again[name]), name
    for others in (
        batches.batch_at(6, range(16)),
        make_batches(digits_codes, tokenizer, cfg, 1).batch_at(5, range(16)),
    ):
        for name, value in fields_of(others).items():
            assert not torch.equal(value, first[name]), name


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
    t_BS = batches.draw_t(np.linspace(0, 1, 4000, endpoint=False, dtype=np.float32))
    wanted = np.array(tokenizer.quantizer.alphas) + 0.2 if weights == "alpha" else np.ones(STEPS)
    assert t_BS.shape == (4000, values)
    found = np.bincount(t_BS.flatten(), minlength=STEPS + 1) / t_BS.size
    np.testing.assert_allclose(found, [0, *(wanted / wanted.sum())], atol=1e-3)


def test_several_t_of_an_image_spread(digits_codes: Path, tokenizer: Tokenizer) -> None:
    batches = make_batches(digits_codes, tokenizer, generator_config(steps_per_image=STEPS))
    t_BS = batches.draw_t(np.random.default_rng(0).random(100, dtype=np.float32))
    np.testing.assert_array_equal(t_BS, np.tile(np.arange(1, STEPS + 1), (100, 1)))


def test_t_stays_in_range_at_the_ends_of_the_unit_interval(digits_codes: Path, tokenizer: Tokenizer) -> None:
    batches = make_batches(digits_codes, tokenizer, generator_config(t_weights="alpha"))
    assert batches.draw_t(np.array([0, np.nextafter(np.float32(1), np.float32(0))], np.float32)).tolist() == [
        [1],
        [STEPS],
    ]


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_labels_are_dropped_at_the_given_rate(digits_codes: Path, tokenizer: Tokenizer, rate: float) -> None:
    batches = make_batches(digits_codes, tokenizer, generator_config(batch=64, label_drop=rate))
    labels = torch.cat([batches.batch_at(step, range(64)).labels_B for step in range(30)])
    assert labels.max() <= CLASSES
    assert float((labels == CLASSES).float().mean()) == pytest.approx(rate, abs=0.035)


def test_step_label_drop_and_perturbation_are_drawn_independently(digits_codes: Path, tokenizer: Tokenizer) -> None:
    batches = make_batches(digits_codes, tokenizer, generator_config(batch=64, label_drop=0.5, perturb=1.0))
    drawn = [batches.batch_at(step, range(64)) for step in range(30)]
    columns = [
        [b.t_BS[:, 0] for b in drawn],
        [b.labels_B == CLASSES for b in drawn],
        [b.spread_B for b in drawn if b.spread_B is not None],
    ]
    table = np.stack([torch.cat(parts).double().numpy() for parts in columns])
    correlation = np.corrcoef(table) - np.eye(3)
    assert np.abs(correlation).max() < 0.1  # 1,920 rows: 4 standard errors


def test_fresh_noise_without_latents_is_refused_with_the_command(
    image_folder: Path, tiny_tokenizer_file: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    engine.tokenize(str(image_folder), tmp_path / "codes", tiny_tokenizer_file, device="cpu")
    assert make_batches(tmp_path / "codes", tokenizer, generator_config()).batch_at(0, range(16)).z_BCHW is None
    with pytest.raises(DataError) as refused:
        make_batches(tmp_path / "codes", tokenizer, generator_config(noise="fresh"))
    assert refused.value.exit_code == 3
    assert f"rdpm tokenize {image_folder}" in refused.value.hint
    assert "--keep latents" in refused.value.hint
    assert "objective.noise=fresh-from-codes" in refused.value.hint
    batches = make_batches(tmp_path / "codes", tokenizer, generator_config(noise="fresh-from-codes"))
    assert batches.batch_at(0, range(16)).eps_BSCHW is None


# ---- the loss ------------------------------------------------------------------------------------------------------


def loss_by_hand(generator: RDPM, codes: Tensor, eps: Tensor, batch: CodeBatch) -> float:
    """Eq. 7, a row at a time, plus the mean squared error of zhat. codes (B, T, H, W), eps (B, S, C, H, W)."""
    entropies, errors = [], []
    for image, steps in enumerate(batch.t_BS.tolist()):
        for s, t in enumerate(steps):
            previous = step_by_step(generator.quantizer, codes[image], t - 1)
            row = (eps[image, s][None], previous[None], torch.tensor([t]), batch.labels_B[image][None])
            logits, zhat = generator.predict(*row)
            entropies.append(-logits[0].log_softmax(-1).gather(1, codes[image, t - 1].view(-1, 1)).mean())
            if zhat is not None:
                goal = step_by_step(generator.quantizer, codes[image], STEPS)
                goal = goal if batch.z_BCHW is None else batch.z_BCHW[image]
                errors.append((zhat[0] - goal.flatten(1).T).pow(2).mean())
    return float(torch.stack(entropies).mean() + (torch.stack(errors).mean() if errors else 0.0))


def make_step(step: int = 0, rows: range = range(16)) -> TrainStep:
    return TrainStep(0, step, rows, 16, CPU)


@pytest.mark.parametrize("head", ["linear", "geometric"])
@pytest.mark.parametrize("latents", [True, False], ids=["with z", "without z"])
def test_the_loss_is_the_cross_entropy_of_stored_codes(
    digits_codes: Path, tokenizer: Tokenizer, head: str, latents: bool
) -> None:
    generator = make_generator(tokenizer.quantizer, head=head)
    batch = make_batches(digits_codes, tokenizer, generator_config(steps_per_image=2)).batch_at(0, range(16))
    if not latents:
        batch.z_BCHW = None
    assert batch.eps_BSCHW is not None
    loss, logs = generator.loss(batch, make_step())
    assert float(loss) == pytest.approx(loss_by_hand(generator, batch.codes_BTHW, batch.eps_BSCHW, batch), rel=1e-4)
    assert set(logs) == {"ce", "accuracy"} | ({"latent_mse"} if head == "geometric" else set())


def test_the_first_loss_is_that_of_a_uniform_guess(digits_codes: Path, tokenizer: Tokenizer) -> None:
    batch = make_batches(digits_codes, tokenizer, generator_config()).batch_at(0, range(16))
    loss, _ = make_generator(tokenizer.quantizer, awake=False).loss(batch, make_step())
    assert float(loss) == pytest.approx(math.log(CODES), rel=1e-5)


def test_fresh_noise_quantises_z_again(digits_codes: Path, tokenizer: Tokenizer) -> None:
    generator = make_generator(tokenizer.quantizer, head="geometric")
    cfg = generator_config(steps_per_image=2, noise="fresh")
    batch = make_batches(digits_codes, tokenizer, cfg).batch_at(0, range(16))
    assert batch.eps_BSCHW is None
    assert batch.z_BCHW is not None
    eps = make_step().normal(STEPS, CHANNELS, GRID, GRID)  # the first draw of the step
    codes = tokenizer.quantizer.encode(batch.z_BCHW, eps)
    chosen = torch.stack([eps[i, batch.t_BS[i] - 1] for i in range(16)])
    loss = float(generator.loss(batch, make_step())[0])
    assert loss == pytest.approx(loss_by_hand(generator, codes, chosen, batch), rel=1e-4)
    assert not torch.equal(codes, batch.codes_BTHW)
    assert loss != float(generator.loss(batch, make_step(step=1))[0])


def test_fresh_noise_from_codes_quantises_what_they_decode_to(digits_codes: Path, tokenizer: Tokenizer) -> None:
    """Also where latents are stored: what is asked for is taken, and zhat's target is what was quantised."""
    generator = make_generator(tokenizer.quantizer, head="geometric")
    cfg = generator_config(steps_per_image=2, noise="fresh-from-codes")
    batch = make_batches(digits_codes, tokenizer, cfg).batch_at(0, range(16))
    assert batch.eps_BSCHW is None
    assert batch.z_BCHW is None
    drawn = []
    for step in range(3):
        eps = make_step(step).normal(STEPS, CHANNELS, GRID, GRID)
        z = tokenizer.quantizer.decode(batch.codes_BTHW)
        codes = tokenizer.quantizer.encode(z, eps)
        chosen = torch.stack([eps[i, batch.t_BS[i] - 1] for i in range(16)])
        by_hand = loss_by_hand(generator, codes, chosen, replace(batch, z_BCHW=z))
        assert float(generator.loss(batch, make_step(step))[0]) == pytest.approx(by_hand, rel=1e-4)
        assert codes.shape == batch.codes_BTHW.shape
        drawn.append(codes)
    assert all((a != b).float().mean() > 0.2 for a, b in itertools.combinations([batch.codes_BTHW, *drawn], 2))


def test_perturbation_moves_the_input_by_one_u_an_image(digits_codes: Path, tokenizer: Tokenizer) -> None:
    def inputs(perturb: float) -> tuple[CodeBatch, Tensor, float]:
        generator = make_generator(tokenizer.quantizer, head="geometric")
        calls = Calls(generator.network)
        cfg = generator_config(steps_per_image=2, perturb=perturb)
        batch = make_batches(digits_codes, tokenizer, cfg).batch_at(0, range(16))
        loss = float(generator.loss(batch, make_step())[0])
        return batch, calls.inputs[0][1].view(16, 2, CHANNELS, GRID, GRID), loss

    (still, previous, loss), (batch, shaken, other) = inputs(0.0), inputs(0.4)
    assert loss != other
    assert still.spread_B is None
    assert batch.spread_B is not None
    assert 0 < float(batch.spread_B.min()) < float(batch.spread_B.max()) < 0.4
    moved = shaken - previous
    torch.testing.assert_close(moved[:, 0], moved[:, 1], rtol=0, atol=1e-5)  # one draw for all t of an image
    widths = moved[:, 0].flatten(1).std(1) / batch.spread_B
    assert float((widths - 1).abs().max()) < 0.5  # N(0, spread²), 64 values an image
    for name in ("codes_BTHW", "t_BS", "labels_B", "z_BCHW"):  # the targets stay
        assert torch.equal(getattr(still, name), getattr(batch, name)), name


# ---- held-out measurement ------------------------------------------------------------------------------------------


def test_held_out_accuracy_stands_beside_the_model_free_baseline(digits_codes: Path, tokenizer: Tokenizer) -> None:
    generator = make_generator(tokenizer.quantizer, head="geometric")
    batches = make_batches(digits_codes, tokenizer, generator_config())
    found = held_out(generator, batches, CPU)
    quantizer, store = tokenizer.quantizer, batches.store
    hits, entropies, right = torch.zeros(3, STEPS, len(batches.held_out))
    for place, row in enumerate(batches.held_out):
        codes = torch.from_numpy(store.codes(np.array([row]))[0].astype(np.int64))
        for t in range(1, STEPS + 1):
            index, view = int(store.index[row]), int(row) % store.manifest.views
            eps = noise.normal("encode", store.manifest.seed, index, view, t, (CHANNELS, GRID, GRID))
            previous = step_by_step(quantizer, codes, t - 1)
            v = beta(quantizer.alphas[t - 1]) * torch.from_numpy(eps) - quantizer.alphas[t - 1] * previous
            guess = torch.cdist(v.flatten(1).T, quantizer.books[0]).argmin(1)
            hits[t - 1, place] = (guess == codes[t - 1].flatten()).float().mean()
    label = [int(store.labels[row]) for row in batches.held_out]
    for t in range(1, STEPS + 1):
        for place, (codes, _, eps_all) in enumerate(one_by_one(batches)):
            row_of = (eps_all[t - 1][None], step_by_step(quantizer, codes, t - 1)[None], torch.tensor([t]))
            logits = generator.predict(*row_of, torch.tensor([label[place]]))[0][0]
            entropies[t - 1, place] = F.cross_entropy(logits, codes[t - 1].flatten())
            right[t - 1, place] = (logits.argmax(-1) == codes[t - 1].flatten()).float().mean()
    assert found["baseline"] == pytest.approx(hits.mean(1).tolist(), abs=1e-6)
    assert found["ce"] == pytest.approx(entropies.mean(1).tolist(), rel=1e-4)
    assert found["accuracy"] == pytest.approx(right.mean(1).tolist(), abs=1e-6)
    assert len(found["norm"]) == STEPS


def one_by_one(batches: CodeBatches) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for batch in batches.held_out_batches():
        assert batch.eps_BSCHW is not None
        yield from zip(batch.codes_BTHW, batch.labels_B, batch.eps_BSCHW, strict=True)


def test_held_out_images_are_never_trained_on(digits_codes: Path, tokenizer: Tokenizer) -> None:
    batches = make_batches(digits_codes, tokenizer, generator_config())
    trained, held = set(batches.store.index[batches.rows]), set(batches.store.index[batches.held_out])
    assert held
    assert not trained & held
    assert len(trained | held) == batches.store.manifest.images


# ---- guidance ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "steps", "expected"),
    [
        ("constant", 4, [3.0, 3.0, 3.0, 3.0]),
        ("linear", 4, [0.0, 1.0, 2.0, 3.0]),  # lambda (t - 1) / (T - 1)
        ("linear", 1, [3.0]),
    ],
)
def test_guidance_follows_its_schedule(schedule: str, steps: int, expected: list[float]) -> None:
    assert [guidance_at(t, steps, 3.0, schedule) for t in range(1, steps + 1)] == pytest.approx(expected)


def test_guidance_is_an_extrapolation() -> None:
    cond, uncond = torch.randn(2, 5)
    torch.testing.assert_close(guide(cond, uncond, 1.5), 2.5 * cond - 1.5 * uncond)
    assert torch.equal(guide(cond, uncond, 0.0), cond)


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({"cfg": 0.0}, [3, 3, 3, 3]),
        ({"cfg": 2.0, "cfg_schedule": "constant"}, [6, 6, 6, 6]),
        ({"cfg": 2.0, "cfg_schedule": "linear"}, [3, 6, 6, 6]),
        ({"cfg": 2.0, "cfg_schedule": "constant", "skip_steps": 2}, [6, 6]),
    ],
    ids=str,
)
def test_there_is_no_unconditional_pass_without_guidance(options: dict[str, Any], rows: list[int]) -> None:
    generator = make_generator()
    calls = Calls(generator.network)
    generator.sample(torch.arange(3), torch.arange(3), sampling_options(**options))
    assert calls.rows == rows
    for *_, labels in calls.inputs:
        assert labels.tolist() == [0, 1, 2] + [CLASSES] * (len(labels) - 3)


# ---- sampling ------------------------------------------------------------------------------------------------------

LABELS = [0, 2, 1, 1, 0, 2, 0]


def load_generator(tokenizer: Tokenizer) -> LoadedGenerator:
    generator = make_generator(tokenizer.quantizer, head="geometric", class_latents=True)
    return LoadedGenerator(generator, tokenizer, RDPMSampling(), list("abc"), "", {})


def drawn(loaded: LoadedGenerator, count: int, micro_batch: int, **options: Any) -> tuple[Tensor, np.ndarray]:
    """codes and pixels of samples 0..count-1."""
    parts = list(
        sampler.sample(loaded.generator, loaded.tokenizer, LABELS[:count], sampling_options(**options), micro_batch)
    )
    assert [i for part in parts for i in part.indices] == list(range(count))
    assert [label for part in parts for label in part.labels] == LABELS[:count]
    return torch.cat([p.codes_BTHW for p in parts]), np.concatenate([p.pixels_BHWC for p in parts])


@pytest.mark.parametrize("count", [1, 3, 7])
def test_a_sample_does_not_depend_on_how_many_are_drawn(tokenizer: Tokenizer, count: int) -> None:
    loaded = load_generator(tokenizer)
    codes, pixels = drawn(loaded, 7, 4, cfg=1.5)
    fewer_codes, fewer_pixels = drawn(loaded, count, 4, cfg=1.5)
    assert codes.shape == (7, STEPS, GRID, GRID)
    assert pixels.shape == (7, 16, 16, 3)
    assert torch.equal(fewer_codes, codes[:count])
    np.testing.assert_array_equal(fewer_pixels, pixels[:count])


@pytest.mark.parametrize("micro_batch", [1, 3, 7])
def test_a_sample_does_not_depend_on_the_batch_size(tokenizer: Tokenizer, micro_batch: int) -> None:
    loaded = load_generator(tokenizer)
    assert torch.equal(drawn(loaded, 7, micro_batch)[0], drawn(loaded, 7, 4)[0])


def test_every_forward_pass_has_one_shape(tokenizer: Tokenizer) -> None:
    loaded = load_generator(tokenizer)
    calls = Calls(loaded.generator.network)
    drawn(loaded, 7, 4)
    assert set(calls.rows) == {4}


def test_a_sample_does_not_depend_on_its_place_in_the_batch() -> None:
    generator, order = make_generator(), torch.tensor([4, 0, 6, 2, 1, 5, 3])
    labels, indices = torch.tensor(LABELS), torch.arange(7)
    codes = generator.sample(labels, indices, sampling_options())
    assert torch.equal(generator.sample(labels[order], indices[order], sampling_options()), codes[order])


@pytest.mark.parametrize(
    "option",
    [
        {"seed": 1},
        {"cfg": 4.0},
        {"cfg": 4.0, "cfg_schedule": "constant"},
        {"tau": 0.3},
        {"tau": 5.0},
        {"skip_steps": 1},
    ],
    ids=str,
)
def test_each_option_changes_the_samples(option: dict[str, Any]) -> None:
    generator = make_generator(std=0.5)
    args = (torch.arange(3), torch.arange(3))
    plain = generator.sample(*args, sampling_options())
    assert not torch.equal(plain, generator.sample(*args, sampling_options(**option)))
    if "cfg_schedule" in option:
        ramp = sampling_options(**{**option, "cfg_schedule": "linear"})
        assert not torch.equal(generator.sample(*args, ramp), generator.sample(*args, sampling_options(**option)))


def test_the_label_changes_the_sample() -> None:
    generator, indices = make_generator(std=0.5), torch.arange(3)
    zeros = torch.zeros(3, dtype=torch.int64)
    first, second = (generator.sample(zeros + c, indices, sampling_options()) for c in (0, 1))
    assert not torch.equal(first, second)


def test_a_large_tau_is_argmax() -> None:
    generator = make_generator()
    labels = torch.arange(2)
    codes = generator.sample(labels, torch.tensor([5, 9]), sampling_options(tau=1e6, seed=3))
    for t in range(1, STEPS + 1):
        shape = (CHANNELS, GRID, GRID)
        eps = torch.stack([torch.from_numpy(noise.normal("sample", 3, i, 0, t, shape)) for i in (5, 9)])
        previous = torch.stack([step_by_step(generator.quantizer, row, t - 1) for row in codes])
        logits = generator.predict(eps, previous, torch.full((2,), t), labels)[0]
        assert torch.equal(codes[:, t - 1].flatten(1), logits.argmax(-1))


@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_codes_are_drawn_from_the_softmax_of_tau_times_the_logits(tau: float) -> None:
    quantizer = make_quantizer(codes=4)
    generator = make_generator(quantizer, awake=False)
    logits = torch.tensor([0.0, 0.5, 1.0, -1.0])
    generator.network.get_parameter("head.bias").copy_(logits)
    codes = generator.sample(torch.zeros(64, dtype=torch.int64), torch.arange(64), sampling_options(tau=tau))
    found = torch.bincount(codes.flatten(), minlength=4) / codes.numel()
    np.testing.assert_allclose(found, (tau * logits).softmax(0), atol=0.03)  # 4,096 draws: 4 standard errors


def test_skipped_steps_are_the_model_free_guess_and_ask_no_network() -> None:
    generator = make_generator()
    calls = Calls(generator.network)
    codes = generator.sample(torch.arange(2), torch.tensor([5, 9]), sampling_options(skip_steps=2, seed=3))
    assert [int(t[0]) for _, _, t, _ in calls.inputs] == [3, 4]
    quantizer = generator.quantizer
    for t in (1, 2):
        for row, index in zip(codes, (5, 9), strict=True):
            eps = torch.from_numpy(noise.normal("sample", 3, index, 0, t, (CHANNELS, GRID, GRID)))
            v = diffuse(-step_by_step(quantizer, row, t - 1), eps, quantizer.alphas[t - 1])
            assert torch.equal(row[t - 1].flatten(), torch.cdist(tokens(v[None])[0], quantizer.books[0]).argmin(1))


@pytest.mark.parametrize(("kind", "skip_steps"), [("rvq", 1), ("sin", STEPS), ("pow", STEPS + 3)])
def test_skip_steps_are_refused_where_they_make_no_sense(kind: str, skip_steps: int) -> None:
    generator = make_generator(make_quantizer(kind))
    with pytest.raises(UsageError, match="skip-steps") as refused:
        generator.check(sampling_options(skip_steps=skip_steps))
    assert refused.value.exit_code == 2
    with pytest.raises(UsageError):
        generator.sample(torch.arange(1), torch.arange(1), sampling_options(skip_steps=skip_steps))


@pytest.mark.parametrize("kind", ["sin", "pow", "linear", "rvq"])
def test_every_schedule_can_be_sampled(kind: str) -> None:
    generator = make_generator(make_quantizer(kind))
    codes = generator.sample(torch.arange(2), torch.arange(2), sampling_options())
    assert codes.shape == (2, STEPS, GRID, GRID)
    assert codes.min() >= 0
    assert codes.max() < CODES


def test_known_codes_are_kept_and_the_rest_is_drawn() -> None:
    generator = make_generator()
    labels, indices = torch.arange(2), torch.arange(2)
    free = generator.sample(labels, indices, sampling_options())
    given = (free + 1) % CODES
    keep = torch.zeros_like(free, dtype=torch.bool)
    keep[:, :, : GRID // 2] = True
    codes = generator.sample(labels, indices, sampling_options(), Known(given, keep))
    assert torch.equal(codes[keep], given[keep])
    assert not torch.equal(codes[~keep], given[~keep])
    assert not torch.equal(codes[~keep], free[~keep])  # what is known is also seen
    everything = Known(given, torch.ones_like(keep))
    assert torch.equal(generator.sample(labels, indices, sampling_options(), everything), given)


def test_balanced_labels_hold_every_class_equally_often_in_a_seeded_order() -> None:
    labels = sampler.balanced_labels([4, 7], 10, seed=0)
    assert sorted(labels) == [4] * 10 + [7] * 10
    assert labels != sorted(labels)
    assert labels == sampler.balanced_labels([4, 7], 10, seed=0)
    assert labels != sampler.balanced_labels([4, 7], 10, seed=1)


# ---- the file ------------------------------------------------------------------------------------------------------


@pytest.fixture
def content(tiny_tokenizer_file: Path) -> dict[str, Any]:
    loaded, inner = tokenizer_file.load(tiny_tokenizer_file)
    cfg = generator_config({"head": "geometric"})
    generator = model.build(cfg, loaded, CLASSES)
    wake(generator.network)
    return model.pack(generator, cfg, inner, list("abc"), provenance={"made": "by hand"})


def test_a_generator_file_round_trips(content: dict[str, Any], tmp_path: Path, tokenizer: Tokenizer) -> None:
    modelfile.save(tmp_path / "generator.pt", content)
    loaded = model.load(tmp_path / "generator.pt")
    assert loaded.class_names == ["a", "b", "c"]
    assert loaded.digest == content["digest"]
    assert loaded.provenance == {"made": "by hand"}
    assert loaded.sampling == RDPMSampling()
    assert not loaded.generator.network.training
    assert not any(p.requires_grad for p in loaded.generator.network.parameters())
    fresh = make_generator(tokenizer.quantizer, head="geometric")
    fresh.network.load_state_dict(content["weights"])
    labels, indices = torch.tensor(LABELS), torch.arange(7)
    again = loaded.generator.sample(labels, indices, sampling_options(cfg=1.0))
    assert torch.equal(again, fresh.sample(labels, indices, sampling_options(cfg=1.0)))


def test_a_generator_file_is_plain_data_and_carries_its_tokenizer(
    content: dict[str, Any], tmp_path: Path, tokenizer: Tokenizer
) -> None:
    modelfile.save(tmp_path / "generator.pt", content)
    raw = torch.load(tmp_path / "generator.pt", weights_only=True)
    assert raw["format"] == "rdpm-generator"
    assert raw["config"]["tokenizer"] == raw["tokenizer"]["digest"]
    assert raw["config"]["classes"] == CLASSES
    carried = model.load(tmp_path / "generator.pt").tokenizer
    for name, value in tokenizer.state_dict().items():
        assert torch.equal(carried.state_dict()[name], value), name


def test_equal_generators_have_equal_bytes_and_digests_whatever_their_provenance(
    content: dict[str, Any], tmp_path: Path
) -> None:
    modelfile.save(tmp_path / "a" / "one.pt", content)
    modelfile.save(tmp_path / "b" / "two.pt", content)
    assert (tmp_path / "a" / "one.pt").read_bytes() == (tmp_path / "b" / "two.pt").read_bytes()
    modelfile.save(tmp_path / "c.pt", {**content, "provenance": {"made": "elsewhere"}})
    assert model.load(tmp_path / "c.pt").digest == content["digest"]
    changed = {**content["config"], "classes": 4}
    assert modelfile.model_digest(content["weights"], changed) != content["digest"]


@pytest.mark.parametrize("where", ["weights", "tokenizer"])
def test_damaged_weights_are_refused(content: dict[str, Any], tmp_path: Path, where: str) -> None:
    weights = content["weights"] if where == "weights" else content["tokenizer"]["weights"]
    name = next(iter(weights))
    weights[name] = weights[name] + 1
    modelfile.save(tmp_path / "generator.pt", content)
    with pytest.raises(CheckpointError, match="damaged") as refused:
        model.load(tmp_path / "generator.pt")
    assert ("the tokenizer inside" in refused.value.message) == (where == "tokenizer")
    assert refused.value.exit_code == 3


def test_a_tokenizer_is_no_generator(tiny_tokenizer_file: Path, content: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a tokenizer, not a generator") as refused:
        model.load(tiny_tokenizer_file)
    assert "rdpm train-gen" in refused.value.hint
    modelfile.save(tmp_path / "generator.pt", content)
    with pytest.raises(CheckpointError, match="is a generator, not a tokenizer"):
        tokenizer_file.load(tmp_path / "generator.pt")


def test_a_generator_with_another_tokenizer_inside_is_refused(content: dict[str, Any], tmp_path: Path) -> None:
    """The config names the tokenizer by digest; an intact but different one is not it."""
    inner = content["tokenizer"]
    weights = {name: value + 1 for name, value in inner["weights"].items()}
    other = {**inner, "weights": weights, "digest": modelfile.model_digest(weights, inner["config"])}
    modelfile.save(tmp_path / "generator.pt", {**content, "tokenizer": other})
    with pytest.raises(CheckpointError):
        model.load(tmp_path / "generator.pt")


def test_parameters_count_the_generator_alone(content: dict[str, Any], tmp_path: Path) -> None:
    modelfile.save(tmp_path / "generator.pt", content)
    loaded = model.load(tmp_path / "generator.pt")
    assert model.parameters(loaded.generator) == sum(v.numel() for v in content["weights"].values())


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_a_grid_of_one_row_is_legal(positions: str) -> None:
    """Signals have h = 1; nothing in the family may assume a square."""
    network = network_config(positions=positions, class_latents=True, head="geometric")
    generator = RDPM(RDPMArchitecture(network=network), make_quantizer(), (1, 7), CLASSES)
    wake(generator.network)
    codes = generator.sample(torch.tensor([0, 2]), torch.tensor([5, 6]), sampling_options(seed=1))
    assert codes.shape == (2, STEPS, 1, 7)
    other = generator.sample(torch.tensor([0, 2]), torch.tensor([5, 7]), sampling_options(seed=1))
    assert torch.equal(codes[0], other[0])
    assert not torch.equal(codes[1], other[1])

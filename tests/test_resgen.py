"""The ResGen family: network, loss, batches, scales, requantising, sampling, runs.

Legend: B images, L positions, D depths, V codes, H code width. A slot is one (position, depth).
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from generators import Calls, wake
from helpers import CPU, metrics
from stores import Making
from torch import Tensor

from rdpm_cli import checkpoint
from rdpm_cli.cli.app import run
from rdpm_cli.codes.store import CodeStore
from rdpm_cli.data.open import open_source
from rdpm_cli.device import one_thread
from rdpm_cli.distributed import TrainStep
from rdpm_cli.engine.generator import train_gen
from rdpm_cli.errors import DataError, UsageError
from rdpm_cli.generator import masking, registry, resgen
from rdpm_cli.generator.batches import held_out
from rdpm_cli.generator.config import (
    MaskSchedule,
    ResGenArchitecture,
    ResGenConfig,
    ResGenNetwork,
    ResGenObjective,
    ResGenSampling,
)
from rdpm_cli.generator.contract import Condition, Known, SampleOptions
from rdpm_cli.generator.masking import finest
from rdpm_cli.generator.mixture import Mixture
from rdpm_cli.generator.resgen import MaskBatch, MaskBatches, ResGen
from rdpm_cli.generator.resgen_sampling import requantise
from rdpm_cli.runs import Result
from rdpm_cli.tokenizer import model
from rdpm_cli.tokenizer.config import QuantizerConfig, ScheduleConfig, TokenizerArchitecture
from rdpm_cli.tokenizer.quantizer import Quantizer, Search
from rdpm_cli.training.config import TrainConfig

L, D, V, H, CLASSES = 9, 4, 32, 4, 3
SLOTS = L * D


@pytest.fixture(autouse=True)
def fixed_seed() -> Iterator[None]:
    with torch.random.fork_rng(), one_thread():
        torch.manual_seed(0)
        yield


def network_config(**options: Any) -> ResGenNetwork:
    defaults = {"depth": 1, "width": 32, "heads": 2, "mixtures": 8, "rank": 2, "positions": "both"}
    return ResGenNetwork(**{**defaults, **options})


def make_quantizer(depths: int = D, **options: Any) -> Quantizer:
    """Plain residual quantisation; each book's codes are a third as long as the previous one's."""
    cfg = QuantizerConfig(**{"codes": V, "steps": depths, "bias": "none", "codebooks": "per_step", **options})
    quantizer = Quantizer(cfg, ScheduleConfig(kind="rvq"), H, (3, 3)).eval().requires_grad_(False)
    quantizer.set_books(quantizer.books * torch.tensor([3.0**-j for j in range(len(quantizer.books))]).view(-1, 1, 1))
    return quantizer


def make_generator(quantizer: Quantizer | None = None, *, awake: bool = True, **network: Any) -> ResGen:
    quantizer = quantizer or make_quantizer()
    generator = ResGen(ResGenArchitecture(network=network_config(**network)), quantizer, CLASSES)
    generator.network.get_buffer("rho").copy_(torch.cat([torch.ones(1), torch.linspace(0.1, 1.2, quantizer.steps)]))
    generator.network.get_buffer("sigma_psi").fill_(0.05)
    if awake:
        wake(generator.network, 0.3)
    generator.network.eval().requires_grad_(False)
    return generator


def some_codes(count: int = 5, seed: int = 0) -> Tensor:
    return torch.randint(V, (count, D, L), generator=torch.Generator().manual_seed(seed))


def make_batch(count: int = 5) -> MaskBatch:
    """A batch with a mask of 17 slots an image."""
    keys = torch.rand(count, L, D, generator=torch.Generator().manual_seed(3))
    masked = masking.mask_tokens(keys, torch.full((count,), 17), True)
    positions, slots = (float(x.sum()) / count for x in (masked.any(-1), masked))
    return MaskBatch(some_codes(count), {"labels": torch.arange(count) % CLASSES}, masked, positions, slots)


def is_closed(masked_BLD: Tensor) -> bool:
    """Whether no masked depth has a visible finer one."""
    return not bool((masked_BLD[..., :-1] & ~masked_BLD[..., 1:]).any())


STEP = TrainStep(0, 0, range(5), 5, CPU)


# ---- sums and the network ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("books", ["per_step", "shared"])
def test_masked_sums_are_exact_at_their_ends_and_add_up(books: str) -> None:
    generator, codes = make_generator(make_quantizer(codebooks=books)), some_codes()
    embedded, whole = generator.embed(codes), generator.quantizer.decode(codes).transpose(1, 2)
    for masked in (torch.ones(5, L, D, dtype=torch.bool), torch.zeros(5, L, D, dtype=torch.bool)):
        visible, z = generator.masked_sums(embedded, masked)
        full, empty = (z, visible) if masked.all() else (visible, z)
        assert not empty.any()
        torch.testing.assert_close(full, whole, rtol=1e-6, atol=1e-6)
    visible, z = generator.masked_sums(embedded, make_batch().masked_BLD)
    torch.testing.assert_close(visible + z, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("option", ["count_embed", "ratio_cond"])
def test_counts_and_the_masked_share_reach_the_network_if_their_option_is_on(option: str) -> None:
    """Equal visible sums under different masks look alike to a network that has neither."""
    few, many, visible = finest(torch.full((1, L), 1), D), finest(torch.full((1, L), 3), D), torch.randn(1, L, H)

    def differs(options: dict[str, Any]) -> bool:
        generator = make_generator(**{"count_embed": False, "ratio_cond": False, **options})
        condition = generator.condition({"labels": torch.tensor([0])})
        first, second = (generator.network(visible, masked, condition) for masked in (few, many))
        return not torch.allclose(first, second, atol=1e-4)

    assert differs({option: True})
    assert not differs({})


def test_the_first_losses_are_those_of_a_uniform_guess() -> None:
    loss, logs = make_generator(awake=False, target="direct").loss(make_batch(), STEP)
    assert float(loss) == pytest.approx(np.log(V), rel=1e-5)
    assert set(logs) == {"nll", "accuracy"}
    _, logs = make_generator(awake=False).loss(make_batch(), STEP)
    assert float(logs["components"]) == pytest.approx(8, rel=1e-5)


# ---- the loss ------------------------------------------------------------------------------------------------------


def with_objective(generator: ResGen, **objective: Any) -> ResGen:
    generator.objective = ResGenObjective(**objective)
    return generator


def test_the_loss_is_a_mean_over_positions_with_something_masked() -> None:
    """A position without a masked slot adds nothing, whatever its prediction."""
    generator, batch = with_objective(make_generator(), mog_loss="nll"), make_batch()
    batch.masked_BLD[:, 0] = False
    batch.positions = float(batch.masked_BLD.any(-1).sum()) / 5
    tally = generator.held_out(batch)["nll"]
    assert int(tally.count.sum()) == int(batch.masked_BLD.any(-1).sum())
    expected = float(tally.total.sum()) / int(tally.count.sum())
    assert float(generator.loss(batch, STEP)[0]) == pytest.approx(expected, rel=1e-5)


def test_bounds_are_ordered_and_the_exact_nll_is_logged_with_each() -> None:
    generator, logged = make_generator(), {}
    for kind in ("nll", "split", "clam"):
        loss, logs = with_objective(generator, mog_loss=kind).loss(make_batch(), STEP)
        logged[kind] = float(loss), float(logs["nll"])
    assert logged["nll"][0] == logged["nll"][1] == logged["split"][1] == logged["clam"][1]
    assert logged["nll"][0] < logged["split"][0] < logged["clam"][0]


@pytest.mark.parametrize("kind", ["nll", "split", "clam"])
def test_the_loss_has_no_unit(kind: str) -> None:
    """Ten times the books, sigma_psi and rho: the same loss."""
    generator = with_objective(make_generator(), mog_loss=kind)
    loss = float(generator.loss(make_batch(), STEP)[0])
    generator.quantizer.set_books(10 * generator.quantizer.books)
    generator.network.get_buffer("rho")[1:] *= 10
    generator.network.get_buffer("sigma_psi").mul_(10)
    assert float(generator.loss(make_batch(), STEP)[0]) == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("target", ["cumulative", "direct"])
def test_the_loss_does_not_depend_on_how_a_batch_is_shared(target: str) -> None:
    generator, whole = make_generator(target=target), make_batch(6)
    labels, total = whole.columns["labels"], 0.0
    for i in (slice(0, 2), slice(2, 6)):
        columns = {"labels": labels[i]}
        part = MaskBatch(whole.codes_BTS[i], columns, whole.masked_BLD[i], whole.positions, whole.slots)
        total += float(generator.loss(part, STEP)[0]) * len(part) / 6
    assert total == pytest.approx(float(generator.loss(whole, STEP)[0]), rel=1e-5)


@pytest.mark.parametrize("components", [1, 16, 1024])
def test_any_number_of_components_trains_and_samples(components: int) -> None:
    generator = make_generator(mixtures=components)
    generator.network.requires_grad_(True)
    loss, logs = generator.loss(make_batch(), STEP)
    loss.backward()
    norms = [p.grad.norm() for p in generator.network.parameters() if p.grad is not None]
    assert torch.stack(norms).isfinite().all()
    assert 1 <= float(logs["components"]) <= components + 1e-3
    assert sample(generator, range(3), range(3), options(steps=4, cfg=1.0)).shape == (3, D, L)


# ---- batches and scales --------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def rvq_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained tokenizer of plain residual quantisation with a book a depth, whose codes get shorter."""
    autoencoder = {
        "resolution": 16, "width": 8, "multipliers": (1, 1, 2), "res_blocks": 1, "attention": False, "groups": 4,
        "channels": 4,
    }  # fmt: skip
    quantizer = {"codes": 32, "steps": 4, "bias": "none", "codebooks": "per_step"}
    sections = {"autoencoder": autoencoder, "schedule": {"kind": "rvq"}, "quantizer": quantizer}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = model.Tokenizer(TokenizerArchitecture.model_validate(sections))
    tokenizer.quantizer.set_books(tokenizer.quantizer.books * torch.tensor([1, 0.6, 0.3, 0.2]).view(-1, 1, 1))
    path = tmp_path_factory.mktemp("rvq") / "tokenizer.pt"
    checkpoint.save(path, model.pack(tokenizer, class_names=[], provenance={}))
    return path


@pytest.fixture(scope="session")
def rvq_codes(tmp_path_factory: pytest.TempPathFactory, image_folder: Path, rvq_file: Path) -> Path:
    """A finished store of `image_folder` by it: 36 images, latents kept."""
    out = tmp_path_factory.mktemp("rvq-store") / "codes"
    Making(out, open_source(str(image_folder)), rvq_file, views=1, shard_images=4096).finish()
    return out


def resgen_config(batch: int = 16, network: dict[str, Any] | None = None, **objective: Any) -> ResGenConfig:
    train = TrainConfig(batch=batch, steps=1)
    return ResGenConfig(network=network_config(**(network or {})), objective=ResGenObjective(**objective), train=train)


def quantizer_of(root: Path) -> Quantizer:
    return model.load(root / "tokenizer.pt")[0].quantizer


def open_batches(root: Path, cfg: ResGenConfig, seed: int = 0) -> MaskBatches:
    return MaskBatches(CodeStore(root), cfg, quantizer_of(root), seed)


def test_a_batch_is_a_function_of_seed_and_step_and_a_rank_has_a_slice_of_it(rvq_codes: Path) -> None:
    cfg = resgen_config(batch=32, label_drop=0.5)
    batches = open_batches(rvq_codes, cfg)
    whole, following = batches.batch_at(5, range(32)), batches.batch_at(6, range(32))
    part = open_batches(rvq_codes, cfg).batch_at(5, range(16, 32))
    reseeded = open_batches(rvq_codes, cfg, seed=1).batch_at(5, range(32))
    assert (part.positions, part.slots) == (whole.positions, whole.slots)
    for read in (lambda b: b.codes_BTS, lambda b: b.columns["labels"], lambda b: b.masked_BLD):
        assert torch.equal(read(whole)[16:], read(part))
        assert not torch.equal(read(whole), read(following))
        assert not torch.equal(read(whole), read(reseeded))


@pytest.mark.parametrize("order", ["coarse-to-fine", "random"])
def test_training_masks_are_closed_under_depth_unless_the_order_is_random(rvq_codes: Path, order: str) -> None:
    masked = open_batches(rvq_codes, resgen_config(order=order)).batch_at(0, range(16)).masked_BLD
    assert is_closed(masked) == (order == "coarse-to-fine")


def test_labels_are_dropped_at_the_given_rate_and_never_held_out(rvq_codes: Path) -> None:
    batches = open_batches(rvq_codes, resgen_config(batch=64, label_drop=0.3))
    labels = torch.cat([batches.batch_at(step, range(64)).columns["labels"] for step in range(30)])
    assert float((labels == CLASSES).float().mean()) == pytest.approx(0.3, abs=0.04)
    assert max(int(batch.columns["labels"].max()) for batch in batches.held_out_batches()) < CLASSES


def test_scales_are_those_of_a_loop_over_the_store(rvq_codes: Path) -> None:
    store, quantizer = CodeStore(rvq_codes), quantizer_of(rvq_codes)
    rows = store.split()[0]
    codes = torch.from_numpy(store.codes(rows).astype(np.int64))
    e = torch.stack([quantizer.look_up(codes[:, t - 1], t) for t in range(1, 5)]).double()
    z = torch.from_numpy(store.latents(rows).astype(np.float64))
    scales = resgen.measure(store, quantizer, ResGenObjective())
    tails = [1.0] + [float(e[4 - k :].sum(0).pow(2).mean().sqrt()) for k in range(1, 5)]
    assert scales.rho_D1.tolist() == pytest.approx(tails, rel=1e-5)
    assert scales.sigma_psi == pytest.approx(float((z - e.sum(0)).pow(2).mean().sqrt()), rel=1e-5)
    random = resgen.measure(store, quantizer, ResGenObjective(order="random")).rho_D1
    for k in range(1, 5):
        sums = [e[list(subset)].sum(0).pow(2).mean() for subset in itertools.combinations(range(4), k)]
        assert float(random[k]) == pytest.approx(float(torch.stack(sums).mean().sqrt()), rel=1e-5)


def test_sigma_psi_is_measured_set_or_half_of_rho_1(
    image_folder: Path, rvq_file: Path, rvq_codes: Path, tmp_path: Path
) -> None:
    Making(tmp_path / "bare", open_source(str(image_folder)), rvq_file, latents=False).finish()
    tokenizer, _ = model.load(rvq_file)
    for root, sigma_psi, source in (
        (rvq_codes, None, "latents"),
        (rvq_codes, 0.25, "recipe"),
        (tmp_path / "bare", None, "rho"),
    ):
        cfg = resgen_config(sigma_psi=sigma_psi)
        generator = registry.build(cfg, tokenizer, CLASSES)
        record = generator.begin(cfg, CodeStore(root))
        network = generator.network
        assert record["sigma_psi"] == {"value": pytest.approx(float(network.get_buffer("sigma_psi"))), "source": source}
        assert record["rho"] == network.get_buffer("rho").tolist()
        if source == "rho":
            assert record["sigma_psi"]["value"] == pytest.approx(0.5 * record["rho"][1])


def test_codes_that_stand_for_nothing_are_refused(rvq_codes: Path) -> None:
    quantizer = quantizer_of(rvq_codes)
    quantizer.books[3] = 0
    with pytest.raises(DataError, match=str(rvq_codes)):
        resgen.measure(CodeStore(rvq_codes), quantizer, ResGenObjective())


@pytest.mark.parametrize("target", ["cumulative", "direct"])
def test_held_out_measurements_come_with_a_model_free_baseline(rvq_codes: Path, target: str) -> None:
    cfg = resgen_config(network={"target": target})
    generator = registry.build(cfg, model.load(rvq_codes / "tokenizer.pt")[0], CLASSES)
    generator.begin(cfg, CodeStore(rvq_codes))
    measured = held_out(generator, open_batches(rvq_codes, cfg), CPU)
    assert {name: len(values) for name, values in measured.items()} == {"nll": 4, "baseline": 4}
    assert measured == held_out(generator, open_batches(rvq_codes, cfg, seed=1), CPU)  # always the same masks
    if target == "direct":
        assert measured["nll"] == pytest.approx([np.log(32)] * 4, rel=1e-5)  # untrained: a uniform guess
        assert measured["baseline"] == pytest.approx([np.log(32)] * 4, rel=1e-5)


# ---- requantising --------------------------------------------------------------------------------------------------


def separated() -> Quantizer:
    """Unit codes × 0.05^j: finer depths add less than half of any two codes' distance."""
    quantizer = make_quantizer()
    unit = torch.nn.functional.normalize(torch.randn(D, V, H, generator=torch.Generator().manual_seed(2)), dim=-1)
    quantizer.set_books(unit * torch.tensor([0.05**j for j in range(D)]).view(-1, 1, 1))
    for j in range(D - 1):
        rest = sum(float(book.norm(dim=1).max()) for book in quantizer.books[j + 1 :])
        assert rest < 0.5 * float(torch.pdist(quantizer.books[j]).min())
    return quantizer


def searches_of(quantizer: Quantizer) -> list[Search]:
    return [Search(quantizer.book(t)) for t in range(1, quantizer.steps + 1)]


def test_the_exact_vector_gives_the_exact_tokens_on_separated_books() -> None:
    generator, batch = make_generator(separated()), make_batch()
    _, z = generator.masked_sums(generator.embed(batch.codes_BTS), batch.masked_BLD)
    tokens = requantise(generator.quantizer, searches_of(generator.quantizer), z, batch.masked_BLD)
    assert torch.equal(tokens[batch.masked_BLD], batch.codes_BTS.transpose(1, 2)[batch.masked_BLD])
    assert not tokens[~batch.masked_BLD].any()


def test_on_any_books_the_exact_vector_gives_back_its_value(rvq_codes: Path) -> None:
    """Tokens need not agree where books overlap; what they add up to lies within sigma_psi."""
    store, quantizer = CodeStore(rvq_codes), quantizer_of(rvq_codes)
    z = quantizer.decode(torch.from_numpy(store.codes(np.arange(36)).astype(np.int64)))
    everything = torch.ones(36, 16, 4, dtype=torch.bool)
    tokens = requantise(quantizer, searches_of(quantizer), z.transpose(1, 2), everything)
    error = quantizer.decode(tokens.transpose(1, 2)) - z
    assert float(error.pow(2).mean().sqrt()) < resgen.measure(store, quantizer, ResGenObjective()).sigma_psi


# ---- sampling ------------------------------------------------------------------------------------------------------

LABELS = [0, 2, 1, 1, 0, 2, 0]


def options(seed: int = 0, **sampling: Any) -> SampleOptions:
    return SampleOptions(ResGenSampling(**sampling), seed)


def sample(generator: ResGen, labels: Any, indices: Any, options: SampleOptions, known: Known | None = None) -> Tensor:
    """Codes of labels and noise indices."""
    condition = generator.condition({"labels": torch.as_tensor(labels)})
    return generator.sample(condition, torch.as_tensor(indices), options, known)


@pytest.mark.parametrize("steps", [1, 2, 5, 17, SLOTS])
@pytest.mark.parametrize("temperature", [0.0, 1.0, 100.0])
@pytest.mark.parametrize("conf", ["logp", "rand"])
def test_a_head_that_knows_the_truth_samples_it(
    steps: int, temperature: float, conf: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, codes = make_generator(separated()), some_codes(2)
    predict = generator.predict

    def oracle(visible: Tensor, masked: Tensor, condition: Condition) -> Mixture:
        mix = predict(visible, masked, condition)
        _, z = generator.masked_sums(generator.embed(codes), masked)
        mix.shift_BLH = z / generator.units(masked)[0].unsqueeze(-1)
        mix.low_BLKr, mix.means_KH = 0 * mix.low_BLKr, 0 * mix.means_KH
        return mix

    monkeypatch.setattr(generator, "predict", oracle)
    greedy = options(steps=steps, conf_temp=temperature, conf=conf, z_temp=0)
    assert torch.equal(sample(generator, [0, 0], range(2), greedy), codes)


@pytest.mark.parametrize("depths", [2, 8])
@pytest.mark.parametrize(("cfg", "rows"), [(0.0, [3] * 5), (2.0, [3, 6, 6, 6, 6])])
def test_there_are_as_many_forward_passes_as_steps_whatever_the_depth(depths: int, cfg: float, rows: list[int]) -> None:
    generator = make_generator(make_quantizer(depths))
    calls = Calls(generator.network)
    codes = sample(generator, range(3), range(3), options(steps=5, cfg=cfg))
    assert codes.shape == (3, depths, L)
    assert 3 * generator.passes(options(steps=5, cfg=cfg)) == sum(rows)
    assert calls.rows == rows
    both = generator.condition({"labels": torch.tensor([0, 1, 2, CLASSES, CLASSES, CLASSES])})
    for *_, condition in calls.inputs:
        vector = condition[0]  # of the Condition
        assert torch.equal(vector, both.vector_BD[: len(vector)])


@pytest.mark.parametrize("schedule", get_args(MaskSchedule))
def test_masks_shrink_closed_under_depth_and_revealed_tokens_stay(schedule: str) -> None:
    generator = make_generator()
    calls = Calls(generator.network)
    codes = sample(generator, range(3), range(3), options(steps=9, schedule=schedule))
    masks, whole = [args[1] for args in calls.inputs], generator.embed(codes)
    assert masks[0].all()
    for (visible, masked, _), following in zip(calls.inputs, [*masks[1:], torch.zeros_like(masks[0])], strict=True):
        assert is_closed(masked)
        assert not (following & ~masked).any()
        assert bool((following.flatten(1).sum(1) < masked.flatten(1).sum(1)).all())
        torch.testing.assert_close(visible, generator.masked_sums(whole, masked)[0])


@pytest.mark.parametrize("network", [{}, {"target": "direct"}], ids=str)
def test_a_sample_depends_on_seed_and_index_not_on_the_batch(network: dict[str, Any]) -> None:
    generator, labels, indices = make_generator(class_latents=True, **network), torch.tensor(LABELS), torch.arange(7)
    guided = options(steps=5, cfg=1.5, seed=3)
    codes = sample(generator, labels, indices, guided)
    assert torch.equal(codes, sample(generator, labels, indices, guided))
    order = torch.tensor([4, 0, 6])
    assert torch.equal(sample(generator, labels[order], indices[order], guided), codes[order])
    assert not torch.equal(sample(generator, labels, indices, options(steps=5, cfg=1.5)), codes)
    assert not torch.equal(sample(generator, labels, indices + 1, guided)[:-1], codes[:-1])


@pytest.mark.parametrize(
    "option",
    [
        {"steps": 4}, {"schedule": "linear"}, {"top_p": 0.3}, {"z_temp": 0.2}, {"conf": "comp"}, {"conf": "rand"},
        {"conf_temp": 30.0}, {"conf_anneal": False}, {"cfg": 3.0}, {"cfg": 3.0, "cfg_schedule": "constant"},
        {"cfg": 3.0, "cfg_mode": "logits"},
    ],
    ids=str,
)  # fmt: skip
def test_each_option_changes_the_samples(option: dict[str, Any]) -> None:
    generator, base = make_generator(), options(steps=6, cfg=3.0 if len(option) > 1 else 0.0)
    codes = sample(generator, LABELS, range(7), base)
    assert not torch.equal(codes, sample(generator, LABELS, range(7), options(**{"steps": 6, **option})))


def test_guidance_by_lambda_0_changes_nothing() -> None:
    generator = make_generator()
    inputs = (torch.randn(2, L, H), torch.ones(2, L, D, dtype=torch.bool))
    cond = generator.predict(*inputs, generator.condition({"labels": torch.tensor([0, 0])}))
    guided = cond.guided(generator.predict(*inputs, generator.null_condition(2)), 0.0, means=True)
    for name, value in vars(cond).items():
        assert torch.equal(getattr(guided, name), value)


def test_random_depth_models_reveal_any_depth() -> None:
    generator = make_generator()
    generator.network.get_buffer("coarse_first").fill_(False)
    calls = Calls(generator.network)
    sample(generator, range(3), range(3), options(steps=6))
    assert not all(is_closed(masked) for _, masked, _ in calls.inputs)


def test_known_codes_are_kept_and_seen() -> None:
    generator, given = make_generator(), some_codes(2, seed=9)
    args = (generator, range(2), range(2), options(steps=5))
    keep = torch.zeros_like(given, dtype=torch.bool)
    keep[:, :, :3] = True  # some positions
    keep[0, :2, 3:6] = True  # and the two coarsest depths of others
    calls = Calls(generator.network)
    codes = sample(*args, Known(given, keep))
    assert torch.equal(codes[keep], given[keep])
    assert torch.equal(calls.inputs[0][1], ~keep.transpose(1, 2))
    assert not torch.equal(codes[~keep], sample(*args)[~keep])
    assert torch.equal(sample(*args, Known(given, torch.ones_like(keep))), given)
    one_slot = torch.ones_like(keep)
    one_slot[:, -1, 0] = False  # fewer slots than steps
    assert torch.equal(sample(*args, Known(given, one_slot))[one_slot], given[one_slot])


def test_finer_codes_cannot_be_known_without_the_coarser_ones() -> None:
    keep = torch.zeros(1, D, L, dtype=torch.bool)
    keep[:, 2] = True
    with pytest.raises(UsageError):
        sample(make_generator(), [0], [0], options(), Known(some_codes(1), keep))


def test_more_steps_than_tokens_are_refused() -> None:
    with pytest.raises(UsageError, match=str(SLOTS)):
        make_generator().check(options(steps=SLOTS + 1))


def test_a_few_images_are_learnt_by_heart() -> None:
    """nll falls; at one token a step and no noise, the samples lie nearest to the images that were shown."""
    generator, codes = make_generator(separated(), awake=False, class_latents=True), some_codes(3)
    generator.network.get_buffer("rho")[1:] = torch.tensor([0.05**j / 2 for j in (3, 2, 1, 0)])
    generator.network.get_buffer("sigma_psi").fill_(2e-4)
    network = generator.network.train().requires_grad_(True)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    labels, nll = torch.arange(3), []
    for step in range(4 * SLOTS):  # each number of masked slots four times
        keys = torch.rand(3, L, D, generator=torch.Generator().manual_seed(step))
        masked = masking.mask_tokens(keys, torch.full((3,), 1 + 7 * step % SLOTS), True)
        batch = MaskBatch(codes, {"labels": labels}, masked, float(masked.any(-1).sum()) / 3)
        loss, logs = generator.loss(batch, STEP)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        nll.append(float(logs["nll"]))
    assert np.mean(nll[-SLOTS:]) < np.mean(nll[:SLOTS]) - 0.2
    network.eval()
    drawn = generator.quantizer.decode(sample(generator, labels, labels, options(steps=SLOTS, z_temp=0))).flatten(1)
    truth = generator.quantizer.decode(codes).flatten(1)
    assert torch.cdist(drawn, truth).argmin(1).tolist() == [0, 1, 2]


# ---- runs ----------------------------------------------------------------------------------------------------------

SMALL = [
    "network.depth=1", "network.width=32", "network.heads=2", "network.mixtures=8", "network.rank=2",
    "train.batch=16", "train.log_every=1", "train.eval_every=2", "train.save_every=2", "sampling.steps=3",
]  # fmt: skip


def train(store: Path, out: Path) -> Result:
    return train_gen(store, out, "resgen-digits", [*SMALL, "train.steps=4"], device="cpu")


def test_a_run_resumes_exactly_and_its_file_samples(
    rvq_codes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    result = train(rvq_codes, whole)
    assert {"nll", "heldout/nll", "heldout/baseline"} <= set(result.values)
    assert (whole / "curves.png").is_file()
    train(rvq_codes, cut)
    for path in (cut / "generator.pt", *(cut / "checkpoints").glob("step-000000004.pt*")):
        path.unlink()
    assert train(rvq_codes, cut).values["digest"] == result.values["digest"]
    assert metrics(cut)[-1] == metrics(whole)[-1]
    loaded = registry.load(whole / "generator.pt")
    sigma_psi = loaded.provenance["sigma_psi"]
    assert sigma_psi["source"] == "latents"
    assert float(loaded.generator.network.get_buffer("sigma_psi")) == pytest.approx(sigma_psi["value"])
    assert loaded.sampling == ResGenSampling(steps=3, cfg=0.3, micro_batch=32)
    args = ["sample", "--ckpt", str(whole / "generator.pt"), "--per-class", "1", "--device", "cpu", "--quiet"]
    args += ["--out", str(tmp_path / "samples"), "--json", "--steps", "2", "--cfg", "1"]
    assert run([*args, "schedule=cosine", "conf=comp", "top_p=0.9"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert [values[name] for name in ("steps", "schedule", "top_p", "cfg")] == [2, "cosine", 0.9, 1.0]

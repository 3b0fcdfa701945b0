"""The ResGen family: masks, network, loss, batches, scales, requantising, sampling, runs.

Legend: B images, L positions, D depths, V codes, H code width. A slot is one (position, depth)."""

import itertools
import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from generators import Calls, fixed_seed, sample, wake  # noqa: F401
from helpers import CPU, metrics
from stores import Making
from torch import Tensor

from rdpm_cli.cli.app import run
from rdpm_cli.codes.store import CodeStore
from rdpm_cli.data.open import open_source
from rdpm_cli.distributed import TrainStep
from rdpm_cli.engine.generator import train_gen
from rdpm_cli.errors import DataError, UsageError
from rdpm_cli.generator import masking, registry, resgen
from rdpm_cli.generator.config import MaskSchedule, ResGenConfig, ResGenNetwork, ResGenObjective, ResGenSampling
from rdpm_cli.generator.contract import Condition, Known, SampleOptions, held_out
from rdpm_cli.generator.masking import MaskBatch, MaskBatches, finest, mask_tokens, reveal
from rdpm_cli.generator.mixture import Mixture
from rdpm_cli.generator.resgen import ResGen, requantise
from rdpm_cli.runs import Result
from rdpm_cli.tokenizer import model
from rdpm_cli.tokenizer.config import QuantizerConfig, ScheduleConfig
from rdpm_cli.tokenizer.quantizer import Quantizer
from rdpm_cli.training.config import TrainConfig

L, D, V, H, CLASSES = 9, 4, 32, 4, 3
SLOTS = L * D
LABELS = [0, 2, 1, 1, 0, 2, 0]
STEP = TrainStep(0, 0, range(5), 5, CPU)


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
    generator = ResGen(network_config(**network), quantizer, CLASSES)
    generator.network.rho.copy_(torch.cat([torch.ones(1), torch.linspace(0.1, 1.2, quantizer.steps)]))
    generator.network.sigma_psi.fill_(0.05)
    if awake:
        wake(generator.network, 0.3)
    generator.network.eval().requires_grad_(False)
    return generator


def some_codes(count: int = 5, seed: int = 0) -> Tensor:
    return torch.randint(V, (count, D, L), generator=torch.Generator().manual_seed(seed))


def masked_batch(codes_BTS: Tensor, slots: int, seed: int = 3) -> MaskBatch:
    """A batch with a mask of this many slots an image."""
    B = len(codes_BTS)
    masked = mask_all(keys(B, seed), torch.full((B,), slots), True)
    columns = {"labels": torch.arange(B) % CLASSES}
    return MaskBatch(codes_BTS, columns, masked, float(masked.any(-1).sum()) / B, slots)


def make_batch(count: int = 5) -> MaskBatch:
    return masked_batch(some_codes(count), 17)


def is_closed(masked_BLD: Tensor) -> bool:
    """Whether no masked depth has a visible finer one."""
    return not bool((masked_BLD[..., :-1] & ~masked_BLD[..., 1:]).any())


SCHEDULES: tuple[MaskSchedule, ...] = get_args(MaskSchedule)


def mask_all(keys_BLD: Tensor, count_B: Tensor, coarse_first: bool) -> Tensor:
    """The mask where all slots are open."""
    return mask_tokens(keys_BLD, torch.ones_like(keys_BLD, dtype=torch.bool), count_B, coarse_first)


def keys(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, L, D, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("coarse_first", [True, False])
@pytest.mark.parametrize("count", [1, 11, SLOTS])
def test_a_training_mask_has_the_requested_number_of_slots(count: int, coarse_first: bool) -> None:
    masked = mask_all(keys(200), torch.full((200,), count), coarse_first)
    assert masked.flatten(1).sum(1).tolist() == [count] * 200
    assert is_closed(masked) == (coarse_first or count == SLOTS)


@pytest.mark.parametrize(("first", "n"), [(None, 3), (None, 30), (15, 10)])
def test_depths_a_position_follow_the_hypergeometric_law(first: int | None, n: int) -> None:
    """Also after two draws: one of `first` slots, then revealing all but n of them by lot."""
    masked = mask_all(keys(20_000), torch.full((20_000,), first or n), True)
    if first:
        masked = reveal(masked, keys(20_000, 1), torch.full((20_000,), first - n), True)
    k, variance = masked.sum(-1).double(), n * (1 / L) * (1 - 1 / L) * (SLOTS - n) / (SLOTS - 1)
    torch.testing.assert_close(k.mean(0), torch.full((L,), n / L).double(), rtol=0, atol=0.04)
    torch.testing.assert_close(k.var(0), torch.full((L,), variance).double(), rtol=0.06, atol=0)


def test_random_order_masks_every_slot_alike() -> None:
    shares = mask_all(keys(8000), torch.full((8000,), SLOTS // 2), False).float().mean(0)
    torch.testing.assert_close(shares, torch.full((L, D), 0.5), rtol=0, atol=0.025)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_fall_from_all_to_none(schedule: MaskSchedule) -> None:
    values = [masking.gamma(schedule, r / 100, 512) for r in range(101)]
    assert [values[0], values[-1]] == pytest.approx([1, 0], abs=2e-3)
    assert all(a > b for a, b in itertools.pairwise(values))
    means = {"square": 0.667, "cosine": 0.637, "circle": 0.785, "exp": 0.838, "linear": 0.5}
    assert sum(values) / 101 == pytest.approx(means[schedule], abs=0.01)
    counts = [masking.masked_count(schedule, r, SLOTS) for r in (0.0, 0.3, 0.9, 0.999999)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] >= SLOTS - 1
    assert counts[-1] >= 1  # a training example masks at least one slot
    for slots, steps in ((1, 1), (2, 1), (17, 5), (17, 17), (24, 23)):  # each step of sampling reveals something
        counts = masking.sampling_counts(schedule, steps, slots)
        assert (len(counts), counts[0], counts[-1]) == (steps + 1, slots, 0)
        assert all(a > b for a, b in itertools.pairwise(counts))
    assert masking.sampling_counts(schedule, 5, 2) == [2, 1, 0, 0, 0, 0]  # fewer slots than steps


def test_revealing_keeps_masks_closed_and_takes_the_best_slots() -> None:
    masked, scores = finest(torch.tensor([[4, 2, 0, 1, 4, 3, 0, 0, 0]]), D), torch.zeros(1, L, D)
    scores[0, 1, 2] = scores[0, 4, 3] = 5.0
    scores[0, 2] = 9.0  # visible already: no slot of it counts
    after = reveal(masked, scores, torch.tensor([2]), True)
    assert after.sum(-1).tolist() == [[4, 1, 0, 1, 3, 3, 0, 0, 0]]
    assert is_closed(after)
    loose = reveal(masked, scores, torch.tensor([2]), False)
    assert not loose[0, (1, 4), (2, 3)].any()
    assert int(loose.sum()) == int(masked.sum()) - 2
    each = reveal(torch.ones(3, L, D, dtype=torch.bool), keys(3), torch.tensor([0, 7, SLOTS]), True)
    assert each.flatten(1).sum(1).tolist() == [SLOTS, SLOTS - 7, 0]  # images of a batch reveal their own number


def test_very_noisy_confidence_reveals_by_lot() -> None:
    """tau -> infinity: a position reveals k_i (n_{t-1} - n_t) / n_{t-1} on average, whatever the confidence."""
    k = torch.tensor([4, 2, 1, 3, 4, 1, 0, 0, 0])
    masked = finest(k.expand(20_000, L), D)
    scores = torch.arange(L).view(1, L, 1) - 1e6 * torch.log(-torch.log(keys(20_000).clamp_min(1e-9)))
    revealed = (masked & ~reveal(masked, scores, torch.full((20_000,), 5), True)).sum(-1).float().mean(0)
    torch.testing.assert_close(revealed, k * 5 / 15, rtol=0, atol=0.03)


@pytest.mark.parametrize("books", ["per_step", "shared"])
def test_masked_sums_are_exact_at_their_ends_and_add_up(books: str) -> None:
    generator, codes = make_generator(make_quantizer(codebooks=books)), some_codes()
    whole, everything = generator.quantizer.decode(codes).transpose(1, 2), torch.ones(5, L, D, dtype=torch.bool)
    for masked in (everything, ~everything):
        sums = generator.sums(codes, masked)
        full, empty = reversed(sums) if masked.all() else sums
        assert not empty.any()
        torch.testing.assert_close(full, whole, rtol=1e-6, atol=1e-6)
    visible, z = generator.sums(codes, make_batch().masked_BLD)
    torch.testing.assert_close(visible + z, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("option", ["count_embed", "ratio_cond"])
def test_counts_and_the_masked_share_reach_the_network_if_their_option_is_on(option: str) -> None:
    """Equal visible sums under different masks look alike to a network that has neither."""
    few, many, visible = finest(torch.full((1, L), 1), D), finest(torch.full((1, L), 3), D), torch.randn(1, L, H)
    for options, differs in (({option: True}, True), ({}, False)):
        generator = make_generator(None, **{"count_embed": False, "ratio_cond": False, **options})
        condition = generator.condition({"labels": torch.tensor([0])})
        first, second = (generator.network(visible, masked, condition) for masked in (few, many))
        assert torch.allclose(first, second, atol=1e-4) != differs


def test_the_first_losses_are_those_of_a_uniform_guess() -> None:
    loss, logs = make_generator(awake=False, target="direct").loss(make_batch(), STEP)
    assert float(loss) == pytest.approx(np.log(V), rel=1e-5)
    assert set(logs) == {"nll", "accuracy"}
    _, logs = make_generator(awake=False).loss(make_batch(), STEP)
    assert float(logs["components"]) == pytest.approx(8, rel=1e-5)


def loss_of(generator: ResGen, batch: MaskBatch, kind: str = "nll") -> tuple[float, float]:
    """The loss, and the logged NLL."""
    generator.objective = ResGenObjective.model_validate({"mog_loss": kind})
    loss, logs = generator.loss(batch, STEP)
    return float(loss), float(logs["nll"])


def test_the_loss_is_a_mean_over_positions_with_something_masked() -> None:
    """A position without a masked slot adds nothing, whatever its prediction."""
    generator, batch = make_generator(), make_batch()
    batch.masked_BLD[:, 0] = False
    batch.positions = float(batch.masked_BLD.any(-1).sum()) / 5
    total, count = generator.held_out(batch)["nll"].sum(1).tolist()
    assert count == int(batch.masked_BLD.any(-1).sum())
    assert loss_of(generator, batch)[0] == pytest.approx(total / count, rel=1e-5)


def test_bounds_are_ordered_and_the_exact_nll_is_logged_with_each() -> None:
    generator = make_generator()
    (exact, nll), (split, nll_split), (clam, nll_clam) = (
        loss_of(generator, make_batch(), kind) for kind in ("nll", "split", "clam")
    )
    assert exact == nll == nll_split == nll_clam
    assert exact < split < clam


@pytest.mark.parametrize("kind", ["nll", "split", "clam"])
def test_the_loss_has_no_unit(kind: str) -> None:
    """Ten times the books, sigma_psi and rho: the same loss."""
    generator = make_generator()
    loss, _ = loss_of(generator, make_batch(), kind)
    generator.quantizer.set_books(10 * generator.quantizer.books)
    generator.network.rho[1:] *= 10
    generator.network.sigma_psi.mul_(10)
    assert loss_of(generator, make_batch(), kind)[0] == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("target", ["cumulative", "direct"])
def test_the_loss_does_not_depend_on_how_a_batch_is_shared(target: str) -> None:
    generator, whole, total = make_generator(target=target), make_batch(6), 0.0
    for i in (slice(0, 2), slice(2, 6)):
        columns = {"labels": whole.columns["labels"][i]}
        part = MaskBatch(whole.codes_BTS[i], columns, whole.masked_BLD[i], whole.positions, whole.slots)
        total += float(generator.loss(part, STEP)[0]) * len(part.masked_BLD) / 6
    assert total == pytest.approx(float(generator.loss(whole, STEP)[0]), rel=1e-5)


def quantizer_of(root: Path) -> Quantizer:
    return model.load(root / "tokenizer.pt")[0].quantizer


def resgen_config(batch: int = 16, target: Any = "cumulative", **objective: Any) -> ResGenConfig:
    train, network = TrainConfig(batch=batch, steps=1), network_config(target=target)
    return ResGenConfig(network=network, objective=ResGenObjective(**objective), train=train)


def open_batches(root: Path, seed: int = 0, **config: Any) -> MaskBatches:
    return MaskBatches(CodeStore(root), resgen_config(**config), quantizer_of(root), seed)


def test_a_batch_is_a_function_of_seed_and_step_and_a_rank_has_a_slice_of_it(rvq_codes: Path) -> None:
    first, second, reseeded = (open_batches(rvq_codes, seed, batch=32, label_drop=0.5) for seed in (0, 0, 1))
    whole, following, other = (b.batch_at(s, range(32)) for b, s in ((first, 5), (first, 6), (reseeded, 5)))
    part = second.batch_at(5, range(16, 32))
    assert (part.positions, part.slots) == (whole.positions, whole.slots)
    for read in (lambda b: b.codes_BTS, lambda b: b.columns["labels"], lambda b: b.masked_BLD):
        assert torch.equal(read(whole)[16:], read(part))
        assert not torch.equal(read(whole), read(following))
        assert not torch.equal(read(whole), read(other))


@pytest.mark.parametrize("order", ["coarse-to-fine", "random"])
def test_training_masks_are_closed_under_depth_unless_the_order_is_random(rvq_codes: Path, order: str) -> None:
    masked = open_batches(rvq_codes, order=order).batch_at(0, range(16)).masked_BLD
    assert is_closed(masked) == (order == "coarse-to-fine")


def test_labels_are_dropped_at_the_given_rate_and_never_held_out(rvq_codes: Path) -> None:
    batches = open_batches(rvq_codes, batch=64, label_drop=0.3)
    labels = torch.cat([batches.batch_at(step, range(64)).columns["labels"] for step in range(30)])
    assert float((labels == CLASSES).float().mean()) == pytest.approx(0.3, abs=0.04)
    assert max(int(batch.columns["labels"].max()) for batch in batches.held_out_batches()) < CLASSES


def test_scales_are_those_of_a_loop_over_the_store(rvq_codes: Path) -> None:
    store, quantizer = CodeStore(rvq_codes), quantizer_of(rvq_codes)
    rows = store.split()[0]
    codes = torch.from_numpy(store.codes(rows).astype(np.int64))
    e = torch.stack([quantizer.look_up(codes[:, t - 1], t) for t in range(1, 5)]).double()
    z = torch.from_numpy(store.latents(rows).astype(np.float64))
    rho, sigma_psi, _ = resgen.measure(store, quantizer, ResGenObjective())
    tails = [1.0] + [float(e[4 - k :].sum(0).pow(2).mean().sqrt()) for k in range(1, 5)]
    assert rho.tolist() == pytest.approx(tails, rel=1e-5)
    assert sigma_psi == pytest.approx(float((z - e.sum(0)).pow(2).mean().sqrt()), rel=1e-5)
    random, *_ = resgen.measure(store, quantizer, ResGenObjective(order="random"))
    for k in range(1, 5):
        sums = [e[list(subset)].sum(0).pow(2).mean() for subset in itertools.combinations(range(4), k)]
        assert float(random[k]) == pytest.approx(float(torch.stack(sums).mean().sqrt()), rel=1e-5)


@pytest.mark.parametrize(("sigma_psi", "source"), [(None, "latents"), (0.25, "recipe"), (None, "rho")])
def test_sigma_psi_is_measured_set_or_half_of_rho_1(
    sigma_psi: float | None, source: str, image_folder: Path, rvq_file: Path, tmp_path: Path
) -> None:
    images = open_source(str(image_folder))
    store = Making(tmp_path / "codes", images, rvq_file, latents=source == "latents").finish()
    cfg = resgen_config(sigma_psi=sigma_psi)
    generator = registry.build(cfg, model.load(rvq_file)[0], CLASSES)
    record, network = generator.begin(cfg, store), generator.network
    assert record["sigma_psi"] == {"value": pytest.approx(float(network.sigma_psi)), "source": source}
    assert record["rho"] == network.rho.tolist()
    if source != "latents":
        assert float(network.sigma_psi) == pytest.approx(sigma_psi or 0.5 * record["rho"][1])


def test_codes_that_stand_for_nothing_are_refused(rvq_codes: Path) -> None:
    quantizer = quantizer_of(rvq_codes)
    quantizer.books[3] = 0
    with pytest.raises(DataError, match=str(rvq_codes)):
        resgen.measure(CodeStore(rvq_codes), quantizer, ResGenObjective())


@pytest.mark.parametrize("target", ["cumulative", "direct"])
def test_held_out_measurements_come_with_a_model_free_baseline(rvq_codes: Path, target: str) -> None:
    cfg = resgen_config(target=target)
    generator = registry.build(cfg, model.load(rvq_codes / "tokenizer.pt")[0], CLASSES)
    generator.begin(cfg, CodeStore(rvq_codes))
    measured = held_out(generator, open_batches(rvq_codes, target=target), CPU)
    assert {name: len(values) for name, values in measured.items()} == {"nll": 4, "baseline": 4}
    assert measured == held_out(generator, open_batches(rvq_codes, seed=1), CPU)  # always the same masks
    if target == "direct":  # untrained: a uniform guess
        assert [*measured["nll"], *measured["baseline"]] == pytest.approx([np.log(32)] * 8, rel=1e-5)


def separated() -> Quantizer:
    """Unit codes × 0.05^j: finer depths add less than half of any two codes' distance."""
    quantizer = make_quantizer()
    unit = torch.nn.functional.normalize(torch.randn(D, V, H, generator=torch.Generator().manual_seed(2)), dim=-1)
    quantizer.set_books(unit * torch.tensor([0.05**j for j in range(D)]).view(-1, 1, 1))
    for j in range(D - 1):
        rest = sum(float(book.norm(dim=1).max()) for book in quantizer.books[j + 1 :])
        assert rest < 0.5 * float(torch.pdist(quantizer.books[j]).min())
    return quantizer


def test_the_exact_vector_gives_the_exact_tokens_on_separated_books() -> None:
    generator, batch = make_generator(separated()), make_batch()
    tokens = requantise(generator.quantizer, generator.sums(batch.codes_BTS, batch.masked_BLD)[1], batch.masked_BLD)
    assert torch.equal(tokens, batch.codes_BTS.transpose(1, 2) * batch.masked_BLD)


def options(seed: int = 0, **sampling: Any) -> SampleOptions:
    return SampleOptions(ResGenSampling(**sampling), seed)


@pytest.mark.parametrize("steps", [1, 5, 17, SLOTS])
@pytest.mark.parametrize("temperature", [0.0, 1.0, 100.0])
@pytest.mark.parametrize("conf", ["logp", "rand"])
def test_a_head_that_knows_the_truth_samples_it(
    steps: int, temperature: float, conf: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, codes = make_generator(separated()), some_codes(2)
    predict = generator.predict

    def oracle(visible: Tensor, masked: Tensor, condition: Condition) -> Mixture:
        mix = predict(visible, masked, condition)
        mix.shift_BLH = generator.sums(codes, masked)[1] / generator.units(masked)[0].unsqueeze(-1)
        mix.low_BLKr, mix.means_KH = 0 * mix.low_BLKr, 0 * mix.means_KH
        return mix

    monkeypatch.setattr(generator, "predict", oracle)
    greedy = options(steps=steps, conf_temp=temperature, conf=conf, z_temp=0)
    assert torch.equal(sample(generator, [0, 0], range(2), greedy), codes)


@pytest.mark.parametrize(("depths", "cfg", "rows"), [(2, 2.0, [3, 6, 6, 6, 6]), (8, 0.0, [3] * 5)])
def test_there_are_as_many_forward_passes_as_steps_whatever_the_depth(depths: int, cfg: float, rows: list[int]) -> None:
    generator = make_generator(make_quantizer(depths))
    calls = Calls(generator.network)
    assert sample(generator, range(3), range(3), options(steps=5, cfg=cfg)).shape == (3, depths, L)
    assert calls.rows == rows
    assert 3 * generator.passes(options(steps=5, cfg=cfg)) == sum(rows)
    both = generator.condition({"labels": torch.tensor([0, 1, 2, CLASSES, CLASSES, CLASSES])})
    for *_, condition in calls.inputs:
        assert torch.equal(condition.vector_BD, both.vector_BD[: len(condition.vector_BD)])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_masks_shrink_closed_under_depth_and_revealed_tokens_stay(schedule: str) -> None:
    generator = make_generator()
    calls = Calls(generator.network)
    codes = sample(generator, range(3), range(3), options(steps=9, schedule=schedule))
    masks = [args[1] for args in calls.inputs]
    assert masks[0].all()
    for (visible, masked, _), following in zip(calls.inputs, [*masks[1:], torch.zeros_like(masks[0])], strict=True):
        assert is_closed(masked)
        assert not (following & ~masked).any()
        assert bool((following.flatten(1).sum(1) < masked.flatten(1).sum(1)).all())
        torch.testing.assert_close(visible, generator.sums(codes, masked)[0])


@pytest.mark.parametrize("target", ["cumulative", "direct"])
def test_a_sample_depends_on_seed_and_index_not_on_the_batch(target: str) -> None:
    generator, labels, indices = (
        make_generator(class_latents=True, target=target),
        torch.tensor(LABELS),
        torch.arange(7),
    )
    guided = options(steps=5, cfg=1.5, seed=3)
    codes, order = sample(generator, labels, indices, guided), torch.tensor([4, 0, 6])
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


def test_random_depth_models_reveal_any_depth() -> None:
    generator = make_generator()
    generator.network.coarse_first.fill_(False)
    calls = Calls(generator.network)
    sample(generator, range(3), range(3), options(steps=6))
    assert not all(is_closed(masked) for _, masked, _ in calls.inputs)


def test_known_codes_are_kept_and_seen() -> None:
    generator, prompt = make_generator(), some_codes(2, seed=9)
    args = (generator, range(2), range(2), options(steps=5))
    keep = torch.zeros_like(prompt, dtype=torch.bool)
    keep[:, :, :3] = True  # some positions
    keep[0, :2, 3:6] = True  # and the two coarsest depths of others
    calls = Calls(generator.network)
    codes = sample(*args, Known(prompt, keep))
    assert torch.equal(codes[keep], prompt[keep])
    assert torch.equal(calls.inputs[0][1], ~keep.transpose(1, 2))
    assert not torch.equal(codes[~keep], sample(*args)[~keep])
    one_slot = torch.ones_like(keep)
    one_slot[:, -1, 0] = False  # fewer slots than steps
    assert torch.equal(sample(*args, Known(prompt, one_slot))[one_slot], prompt[one_slot])
    keep[:, 2], keep[:, 1] = True, False
    with pytest.raises(UsageError):  # finer codes without the coarser ones
        sample(*args, Known(prompt, keep))


def test_more_steps_than_tokens_are_refused() -> None:
    with pytest.raises(UsageError, match=str(SLOTS)):
        make_generator().check(options(steps=SLOTS + 1))


def test_a_few_images_are_learnt_by_heart() -> None:
    """nll falls; at one token a step and no noise, the samples lie nearest to the images that were shown."""
    generator, codes = make_generator(separated(), awake=False, class_latents=True), some_codes(3)
    generator.network.rho[1:] = torch.tensor([0.05**j / 2 for j in (3, 2, 1, 0)])
    generator.network.sigma_psi.fill_(2e-4)
    optimizer = torch.optim.Adam(generator.network.train().requires_grad_(True).parameters(), 3e-3)
    nll = []
    for step in range(4 * SLOTS):  # each number of masked slots four times
        loss, logs = generator.loss(masked_batch(codes, 1 + 7 * step % SLOTS, seed=step), STEP)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        nll.append(float(logs["nll"]))
    assert np.mean(nll[-SLOTS:]) < np.mean(nll[:SLOTS]) - 0.2
    generator.network.eval()
    drawn = sample(generator, range(3), range(3), options(steps=SLOTS, z_temp=0))
    drawn, truth = (generator.quantizer.decode(x).flatten(1) for x in (drawn, codes))
    assert torch.cdist(drawn, truth).argmin(1).tolist() == [0, 1, 2]


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
    assert sigma_psi == {"value": pytest.approx(float(loaded.generator.network.sigma_psi)), "source": "latents"}
    assert loaded.sampling == ResGenSampling(steps=3, cfg=0.3, micro_batch=32)
    args = ["sample", "--ckpt", str(whole / "generator.pt"), "--per-class", "1", "--device", "cpu", "--quiet"]
    args += ["--out", str(tmp_path / "samples"), "--json", "--steps", "2", "--cfg", "1"]
    assert run([*args, "schedule=cosine", "conf=comp", "top_p=0.9"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert [values[name] for name in ("steps", "schedule", "top_p", "cfg")] == [2, "cosine", 0.9, 1.0]

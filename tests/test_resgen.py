"""The ResGen family: network, loss, batches, held-out measurement, sampling, file, refusals.

Legend: B images, L positions, D depths, V codes, H code width, S steps.
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from helpers import CPU, metrics
from torch import Tensor

from rdpm_cli import engine, modelfile, recipe_files
from rdpm_cli.choices import MaskSchedule
from rdpm_cli.cli.app import run
from rdpm_cli.codes.store import CodeStore
from rdpm_cli.config import (
    QuantizerConfig,
    ResGenArchitecture,
    ResGenConfig,
    ResGenNetwork,
    ResGenObjective,
    ResGenSampling,
    ScheduleConfig,
    TokenizerArchitecture,
    TrainConfig,
)
from rdpm_cli.errors import CheckpointError, DataError, UsageError
from rdpm_cli.generator import masking, model, resgen_sampling, sampler, scales
from rdpm_cli.generator.contract import Known, SampleOptions
from rdpm_cli.generator.masking import finest
from rdpm_cli.generator.resgen import ResGen
from rdpm_cli.generator.resgen_batches import MaskBatch, MaskBatches, blank
from rdpm_cli.generator.resgen_sampling import requantise, to_codes, to_slots
from rdpm_cli.generator.task import held_out
from rdpm_cli.recipe_files import load_recipe
from rdpm_cli.step import TrainStep
from rdpm_cli.threads import one_thread
from rdpm_cli.tokenizer import model as tokenizer_file
from rdpm_cli.tokenizer.quantizer import Quantizer, Search

GRID, D, V, H, CLASSES = 3, 4, 32, 4, 3
L = GRID * GRID
SLOTS = L * D


@pytest.fixture(autouse=True)
def fixed_seed() -> Iterator[None]:
    with torch.random.fork_rng(), one_thread():
        torch.manual_seed(0)
        yield


def network_config(**options: Any) -> ResGenNetwork:
    return ResGenNetwork(
        **{"depth": 1, "width": 32, "heads": 2, "mixtures": 8, "rank": 2, "positions": "both", **options}
    )


def make_quantizer(depths: int = D, **options: Any) -> Quantizer:
    """Plain residual quantisation; each book's codes are a third as long as the one's before."""
    cfg = QuantizerConfig(**{"codes": V, "steps": depths, "bias": "none", "codebooks": "per_step", **options})
    quantizer = Quantizer(cfg, ScheduleConfig(kind="rvq"), H).eval().requires_grad_(False)
    quantizer.place(quantizer.books * torch.tensor([3.0**-j for j in range(len(quantizer.books))]).view(-1, 1, 1))
    return quantizer


def wake(generator: ResGen, std: float = 0.3) -> None:
    """Give zero-initialised weights values, so that an untrained network has something to say."""
    random = torch.Generator().manual_seed(1)
    for parameter in generator.network.parameters():
        if not parameter.detach().any():
            with torch.no_grad():
                parameter.copy_(std * torch.randn(parameter.shape, generator=random))


def make_generator(quantizer: Quantizer | None = None, *, awake: bool = True, **network: Any) -> ResGen:
    quantizer = quantizer or make_quantizer()
    made = ResGen(ResGenArchitecture(network=network_config(**network)), quantizer, (GRID, GRID), CLASSES)
    made.network.get_buffer("rho").copy_(torch.cat([torch.ones(1), torch.linspace(0.1, 1.2, quantizer.steps)]))
    made.network.get_buffer("sigma_psi").fill_(0.05)
    if awake:
        wake(made)
    made.network.eval().requires_grad_(False)
    return made


def some_codes(count: int = 5, depths: int = D, seed: int = 0) -> Tensor:
    return torch.randint(V, (count, depths, GRID, GRID), generator=torch.Generator().manual_seed(seed))


def batch_of(count: int = 5, masked: Tensor | None = None) -> MaskBatch:
    """A batch with a mask of 17 slots an image."""
    keys = torch.rand(count, L, D, generator=torch.Generator().manual_seed(3))
    masked = masking.mask_tokens(keys, torch.full((count,), 17), True) if masked is None else masked
    open_positions, slots = (float(x.sum()) / count for x in (masked.any(-1), masked))
    return MaskBatch(some_codes(count), torch.arange(count) % CLASSES, masked, open_positions, slots)


STEP = TrainStep(0, 0, range(5), 5, CPU)


# ---- sums and the network ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("books", ["per_step", "shared"])
def test_masked_sums_are_exact_at_their_ends_and_add_up(books: str) -> None:
    generator = make_generator(make_quantizer(codebooks=books))
    codes = some_codes()
    embedded, whole = generator.embed(codes), generator.quantizer.decode(codes).flatten(2).transpose(1, 2)
    everything, nothing = torch.ones(5, L, D, dtype=torch.bool), torch.zeros(5, L, D, dtype=torch.bool)
    visible, z = generator.masked_sums(embedded, everything)
    assert torch.equal(visible, torch.zeros_like(visible))
    torch.testing.assert_close(z, whole, rtol=1e-6, atol=1e-6)
    visible, z = generator.masked_sums(embedded, nothing)
    assert torch.equal(z, torch.zeros_like(z))
    torch.testing.assert_close(visible, whole, rtol=1e-6, atol=1e-6)
    visible, z = generator.masked_sums(embedded, batch_of().masked_BLD)
    torch.testing.assert_close(visible + z, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("option", ["count_embed", "ratio_cond"])
def test_the_network_is_told_counts_and_the_masked_share_unless_it_is_not(option: str) -> None:
    """Equal visible sums under different masks look alike to a network that is told neither."""
    few, many = finest(torch.full((1, L), 1), D), finest(torch.full((1, L), 3), D)
    visible, label = torch.randn(1, L, H), torch.zeros(1, dtype=torch.int64)

    def differs(told: dict[str, Any]) -> bool:
        network = make_generator(**{"count_embed": False, "ratio_cond": False, **told}).network
        return not torch.allclose(network(visible, few, label), network(visible, many, label), atol=1e-4)

    assert differs({option: True})
    assert not differs({})


def test_a_fresh_network_knows_nothing_and_its_losses_say_so() -> None:
    loss, logs = make_generator(awake=False, target="direct").loss(batch_of(), STEP)
    assert float(loss) == pytest.approx(np.log(V), rel=1e-5)
    mixture = make_generator(awake=False)
    assert float(mixture.loss(batch_of(), STEP)[1]["components"]) == pytest.approx(8, rel=1e-5)
    assert set(logs) == {"nll", "accuracy"}


# ---- the loss ------------------------------------------------------------------------------------------------------


def with_objective(generator: ResGen, **objective: Any) -> ResGen:
    generator.objective = ResGenObjective(**objective)
    return generator


def test_the_loss_is_a_mean_over_positions_with_something_masked() -> None:
    """A position without any adds nothing, whatever its prediction; the same as a loop over the others."""
    generator, batch = with_objective(make_generator(), mog_loss="nll"), batch_of()
    batch.masked_BLD[:, 0] = False
    batch.positions = float(batch.masked_BLD.any(-1).sum()) / 5
    loss = float(generator.loss(batch, STEP)[0])
    found = generator.held_out(batch)["nll"]
    assert loss == pytest.approx(float(found.total.sum()) / int(found.count.sum()), rel=1e-5)
    assert int(found.count.sum()) == int(batch.masked_BLD.any(-1).sum())


def test_bounds_are_ordered_and_the_exact_nll_is_logged_beside_each() -> None:
    generator, logged = make_generator(), {}
    for kind in ("nll", "split", "clam"):
        loss, logs = with_objective(generator, mog_loss=kind).loss(batch_of(), STEP)
        logged[kind] = float(loss), float(logs["nll"])
    assert logged["nll"][0] == logged["nll"][1] == logged["split"][1] == logged["clam"][1]
    assert logged["nll"][0] < logged["split"][0] < logged["clam"][0]


@pytest.mark.parametrize("kind", ["nll", "split", "clam"])
def test_the_loss_has_no_unit(kind: str) -> None:
    """Ten times the books, sigma_psi and rho: the same loss."""
    generator = with_objective(make_generator(), mog_loss=kind)
    before = float(generator.loss(batch_of(), STEP)[0])
    generator.quantizer.place(10 * generator.quantizer.books)
    generator.network.get_buffer("rho")[1:] *= 10
    generator.network.get_buffer("sigma_psi").mul_(10)
    assert float(generator.loss(batch_of(), STEP)[0]) == pytest.approx(before, rel=1e-4)


def test_the_loss_does_not_depend_on_how_a_batch_is_shared() -> None:
    generator, whole = make_generator(), batch_of(6)
    parts = [
        MaskBatch(whole.codes_BTHW[i], whole.labels_B[i], whole.masked_BLD[i], whole.positions, whole.slots)
        for i in (slice(0, 2), slice(2, 6))
    ]
    shared = sum(float(generator.loss(p, STEP)[0]) * n / 6 for p, n in zip(parts, (2, 4), strict=True))
    assert shared == pytest.approx(float(generator.loss(whole, STEP)[0]), rel=1e-5)


# ---- the store -----------------------------------------------------------------------------------------------------

TINY_AUTO = {
    "resolution": 16, "width": 8, "multipliers": (1, 1, 2), "res_blocks": 1, "attention": False, "groups": 4,
    "channels": 4,
}  # fmt: skip


@pytest.fixture(scope="session")
def rvq_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained tokenizer of plain residual quantisation with a book a depth, whose codes get shorter."""
    cfg = TokenizerArchitecture.model_validate(
        {
            "autoencoder": TINY_AUTO,
            "schedule": {"kind": "rvq"},
            "quantizer": {"codes": 32, "steps": 4, "bias": "none", "codebooks": "per_step"},
        }
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = tokenizer_file.Tokenizer(cfg)
    tokenizer.quantizer.place(tokenizer.quantizer.books * torch.tensor([1, 0.6, 0.3, 0.2]).view(-1, 1, 1))
    path = tmp_path_factory.mktemp("rvq") / "tokenizer.pt"
    modelfile.save(path, tokenizer_file.pack(tokenizer, class_names=[], provenance={}))
    return path


@pytest.fixture(scope="session")
def rvq_codes(tmp_path_factory: pytest.TempPathFactory, image_folder: Path, rvq_file: Path) -> Path:
    """A finished store of `image_folder` by it: 36 images, latents kept."""
    out = tmp_path_factory.mktemp("rvq-store") / "codes"
    engine.tokenize(str(image_folder), out, rvq_file, engine.StoreOptions(latents=True), device="cpu")
    return out


def config_of(batch: int = 16, network: dict[str, Any] | None = None, **objective: Any) -> ResGenConfig:
    return ResGenConfig(
        network=network_config(**(network or {})),
        objective=ResGenObjective(**objective),
        train=TrainConfig(batch=batch, steps=1),
    )


def open_batches(root: Path, cfg: ResGenConfig, seed: int = 0) -> MaskBatches:
    return MaskBatches(CodeStore(root), cfg, tokenizer_file.load(root / "tokenizer.pt")[0].quantizer, seed)


def test_a_batch_is_a_function_of_seed_and_step_and_a_rank_has_a_slice_of_it(rvq_codes: Path) -> None:
    cfg = config_of(batch=32, label_drop=0.5)
    batches = open_batches(rvq_codes, cfg)
    whole = batches.batch_at(5, range(32))
    batches.batch_at(6, range(32))
    again = open_batches(rvq_codes, cfg).batch_at(5, range(16, 32))
    for name in ("codes_BTHW", "labels_B", "masked_BLD"):
        assert torch.equal(getattr(whole, name)[16:], getattr(again, name)), name
    assert (again.positions, again.slots) == (whole.positions, whole.slots)
    other = open_batches(rvq_codes, cfg, seed=1).batch_at(5, range(32))
    assert not torch.equal(other.masked_BLD, whole.masked_BLD)
    assert not torch.equal(batches.batch_at(6, range(32)).masked_BLD, whole.masked_BLD)


@pytest.mark.parametrize("order", ["coarse-to-fine", "random"])
def test_training_masks_are_closed_under_depth_unless_any_depth_is_asked_for(rvq_codes: Path, order: str) -> None:
    masked = open_batches(rvq_codes, config_of(order=order)).batch_at(0, range(16)).masked_BLD
    assert bool((masked[..., :-1] & ~masked[..., 1:]).any()) == (order == "random")


def test_labels_are_dropped_at_the_given_rate_and_never_held_out(rvq_codes: Path) -> None:
    batches = open_batches(rvq_codes, config_of(batch=64, label_drop=0.3))
    labels = torch.cat([batches.batch_at(step, range(64)).labels_B for step in range(30)])
    assert float((labels == CLASSES).float().mean()) == pytest.approx(0.3, abs=0.04)
    assert max(int(b.labels_B.max()) for b in batches.held_out_batches()) < CLASSES


def test_what_is_measured_is_what_a_loop_over_the_store_finds(rvq_codes: Path) -> None:
    store, (tokenizer, _) = CodeStore(rvq_codes), tokenizer_file.load(rvq_codes / "tokenizer.pt")
    rows, quantizer = store.split()[0], tokenizer.quantizer
    codes = torch.from_numpy(store.codes(rows).astype(np.int64))
    e = torch.stack([quantizer.look_up(codes[:, t - 1], t) for t in range(1, 5)]).double()
    z = torch.from_numpy(store.latents(rows).astype(np.float64))
    found = scales.measure(store, quantizer, rows, True, None)
    tails = [1.0] + [float(e[4 - k :].sum(0).pow(2).mean().sqrt()) for k in range(1, 5)]
    assert found.rho_D1.tolist() == pytest.approx(tails, rel=1e-5)
    assert found.sigma_psi == pytest.approx(float((z - e.sum(0)).pow(2).mean().sqrt()), rel=1e-5)
    subsets = scales.measure(store, quantizer, rows, False, None).rho_D1
    for k in range(1, 5):
        sums = [e[list(chosen)].sum(0).pow(2).mean() for chosen in itertools.combinations(range(4), k)]
        assert float(subsets[k]) == pytest.approx(float(torch.stack(sums).mean().sqrt()), rel=1e-5)


def test_sigma_psi_is_measured_given_or_half_of_rho_1_and_said(
    image_folder: Path, rvq_file: Path, rvq_codes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.tokenize(str(image_folder), tmp_path / "bare", rvq_file, device="cpu")
    tokenizer, _ = tokenizer_file.load(rvq_file)
    for root, given, source in (
        (rvq_codes, None, "latents"),
        (rvq_codes, 0.25, "recipe"),
        (tmp_path / "bare", None, "rho"),
    ):
        cfg = config_of(sigma_psi=given)
        generator = model.build(cfg, tokenizer, CLASSES)
        said = generator.begin(cfg, CodeStore(root))
        network = generator.network
        assert said["sigma_psi"] == {"value": pytest.approx(float(network.get_buffer("sigma_psi"))), "source": source}
        assert said["rho"] == network.get_buffer("rho").tolist()
        if source == "rho":
            assert said["sigma_psi"]["value"] == pytest.approx(0.5 * said["rho"][1])
    assert "keeps no latents" in capsys.readouterr().err


def test_codes_that_stand_for_nothing_are_refused(rvq_codes: Path) -> None:
    tokenizer, _ = tokenizer_file.load(rvq_codes / "tokenizer.pt")
    tokenizer.quantizer.books[3] = 0
    store = CodeStore(rvq_codes)
    with pytest.raises(DataError, match="stand for 0"):
        scales.measure(store, tokenizer.quantizer, store.split()[0], True, None)


@pytest.mark.parametrize("target", ["cumulative", "direct"])
def test_held_out_measurements_stand_beside_a_model_free_baseline(rvq_codes: Path, target: str) -> None:
    cfg = config_of(network={"target": target})
    tokenizer, _ = tokenizer_file.load(rvq_codes / "tokenizer.pt")
    generator = model.build(cfg, tokenizer, CLASSES)
    generator.begin(cfg, CodeStore(rvq_codes))
    found = held_out(generator, open_batches(rvq_codes, cfg), CPU)
    assert {name: len(values) for name, values in found.items()} == {"nll": 4, "baseline": 4}
    assert found == held_out(generator, open_batches(rvq_codes, cfg, seed=1), CPU)  # always the same masks
    if target == "direct":
        assert found["nll"] == pytest.approx([np.log(32)] * 4, rel=1e-5)  # untrained: a uniform guess
        assert found["baseline"] == pytest.approx([np.log(32)] * 4, rel=1e-5)


# ---- requantising --------------------------------------------------------------------------------------------------


def separated(depths: int = D) -> Quantizer:
    """Unit codes × 0.05^j: what finer depths add is less than half of any two codes' distance."""
    quantizer = make_quantizer(depths)
    unit = torch.nn.functional.normalize(torch.randn(depths, V, H, generator=torch.Generator().manual_seed(2)), dim=-1)
    quantizer.place(unit * torch.tensor([0.05**j for j in range(depths)]).view(-1, 1, 1))
    for j in range(depths - 1):
        rest = sum(float(book.norm(dim=1).max()) for book in quantizer.books[j + 1 :])
        gaps = torch.pdist(quantizer.books[j])
        assert rest < 0.5 * float(gaps.min())
    return quantizer


def searches_of(quantizer: Quantizer) -> list[Search]:
    return [Search(quantizer.book(t)) for t in range(1, quantizer.steps + 1)]


def test_the_exact_vector_gives_the_exact_tokens_on_separated_books() -> None:
    generator, batch = make_generator(separated()), batch_of()
    _, z = generator.masked_sums(generator.embed(batch.codes_BTHW), batch.masked_BLD)
    found = requantise(generator.quantizer, searches_of(generator.quantizer), z, batch.masked_BLD)
    assert torch.equal(found[batch.masked_BLD], to_slots(batch.codes_BTHW)[batch.masked_BLD])
    assert not found[~batch.masked_BLD].any()


def test_on_any_books_the_exact_vector_gives_back_its_value(rvq_codes: Path) -> None:
    """Tokens need not agree where books overlap; what they add up to lies within sigma_psi."""
    store, (tokenizer, _) = CodeStore(rvq_codes), tokenizer_file.load(rvq_codes / "tokenizer.pt")
    codes = torch.from_numpy(store.codes(np.arange(36)).astype(np.int64))
    quantizer, masked = tokenizer.quantizer, torch.ones(36, 16, 4, dtype=torch.bool)
    z = quantizer.decode(codes)
    found = requantise(quantizer, searches_of(quantizer), to_slots(z), masked)
    again = quantizer.decode(to_codes(found, (4, 4)))
    sigma = scales.measure(store, quantizer, store.split()[0], True, None).sigma_psi
    assert float((again - z).pow(2).mean().sqrt()) < sigma


# ---- sampling ------------------------------------------------------------------------------------------------------

LABELS = torch.tensor([0, 2, 1, 1, 0, 2, 0])


def options(seed: int = 0, **sampling: Any) -> SampleOptions:
    return SampleOptions(ResGenSampling(**sampling), seed)


class Calls:
    """The inputs of every forward pass of a network."""

    def __init__(self, generator: ResGen) -> None:
        self.inputs: list[tuple[Tensor, ...]] = []
        generator.network.register_forward_pre_hook(lambda _, args: self.inputs.append(args))


def oracle(generator: ResGen, codes: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that knows the masked sums of these codes, without noise."""
    predict = generator.predict

    def knowing(visible: Tensor, masked: Tensor, labels: Tensor) -> Any:
        mix = predict(visible, masked, labels)
        _, z = generator.masked_sums(generator.embed(codes), masked)
        mix.shift_BLH = z / generator.units(masked)[0].unsqueeze(-1)
        mix.low_BLKr, mix.means_KH = 0 * mix.low_BLKr, 0 * mix.means_KH
        return mix

    monkeypatch.setattr(generator, "predict", knowing)


@pytest.mark.parametrize("steps", [1, 2, 5, 17, SLOTS])
@pytest.mark.parametrize("temperature", [0.0, 1.0, 100.0])
@pytest.mark.parametrize("conf", ["logp", "rand"])
def test_a_head_that_knows_the_truth_samples_it(
    steps: int, temperature: float, conf: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, codes = make_generator(separated()), some_codes(2)
    oracle(generator, codes, monkeypatch)
    how = options(steps=steps, conf_temp=temperature, conf=conf, z_temp=0)
    assert torch.equal(generator.sample(torch.zeros(2, dtype=torch.int64), torch.arange(2), how), codes)


@pytest.mark.parametrize("depths", [2, 8])
@pytest.mark.parametrize(("cfg", "rows"), [(0.0, [3] * 5), (2.0, [3, 6, 6, 6, 6])])
def test_there_are_as_many_forward_passes_as_steps_whatever_the_depth(depths: int, cfg: float, rows: list[int]) -> None:
    generator = make_generator(make_quantizer(depths))
    calls = Calls(generator)
    codes = generator.sample(torch.arange(3), torch.arange(3), options(steps=5, cfg=cfg))
    assert codes.shape == (3, depths, GRID, GRID)
    assert 3 * generator.passes(options(steps=5, cfg=cfg)) == sum(rows)
    assert [len(args[0]) for args in calls.inputs] == rows
    for *_, labels in calls.inputs:
        assert labels.tolist() == [0, 1, 2] + [CLASSES] * (len(labels) - 3)


@pytest.mark.parametrize("schedule", get_args(MaskSchedule))
def test_masks_shrink_closed_under_depth_and_revealed_tokens_stay(schedule: str) -> None:
    generator = make_generator()
    calls = Calls(generator)
    codes = generator.sample(torch.arange(3), torch.arange(3), options(steps=9, schedule=schedule))
    masks = [args[1] for args in calls.inputs]
    whole = generator.embed(codes)
    assert masks[0].all()
    for (visible, masked, _), later in zip(calls.inputs, [*masks[1:], torch.zeros_like(masks[0])], strict=True):
        assert not (masked[..., :-1] & ~masked[..., 1:]).any()
        assert not (later & ~masked).any()
        assert bool((later.flatten(1).sum(1) < masked.flatten(1).sum(1)).all())
        torch.testing.assert_close(visible, generator.masked_sums(whole, masked)[0])  # what is revealed is final


@pytest.mark.parametrize("network", [{}, {"target": "direct"}], ids=str)
def test_a_sample_depends_on_seed_and_index_not_on_the_batch(network: dict[str, Any]) -> None:
    generator = make_generator(class_latents=True, **network)
    how, indices = options(steps=5, cfg=1.5, seed=3), torch.arange(7)
    codes = generator.sample(LABELS, indices, how)
    assert torch.equal(codes, generator.sample(LABELS, indices, how))
    order = torch.tensor([4, 0, 6])
    assert torch.equal(generator.sample(LABELS[order], indices[order], how), codes[order])
    assert not torch.equal(generator.sample(LABELS, indices, options(steps=5, cfg=1.5)), codes)
    assert not torch.equal(generator.sample(LABELS, indices + 1, how)[:-1], codes[:-1])


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
    generator, indices = make_generator(), torch.arange(7)
    before = generator.sample(LABELS, indices, options(steps=6, cfg=3.0 if len(option) > 1 else 0.0))
    assert not torch.equal(before, generator.sample(LABELS, indices, options(**{"steps": 6, **option})))


def test_guidance_of_nothing_is_no_guidance() -> None:
    """lambda = 0 takes one pass, and equals the combination of two whose lambda is 0."""
    generator = make_generator()
    given = (torch.randn(2, L, H), torch.ones(2, L, D, dtype=torch.bool))
    cond, uncond = (generator.predict(*given, torch.full((2,), label)) for label in (0, CLASSES))
    same = cond.guided(uncond, 0.0, means=True)
    for name, value in vars(cond).items():
        assert torch.equal(getattr(same, name), value)


def test_random_depth_models_reveal_any_depth_and_sample_everything() -> None:
    generator = make_generator()
    generator.network.get_buffer("coarse_first").fill_(False)
    calls = Calls(generator)
    codes = generator.sample(torch.arange(3), torch.arange(3), options(steps=6))
    assert any((masked[..., :-1] & ~masked[..., 1:]).any() for _, masked, _ in calls.inputs)
    assert codes.shape == (3, D, GRID, GRID)


def test_known_codes_are_kept_seen_and_never_revealed_late() -> None:
    generator, indices = make_generator(), torch.arange(2)
    given = some_codes(2, seed=9)
    keep = torch.zeros_like(given, dtype=torch.bool)
    keep[:, :, 0] = True  # a row of positions
    keep[0, :2, 1] = True  # and the two coarsest depths of others
    calls = Calls(generator)
    codes = generator.sample(torch.arange(2), indices, options(steps=5), Known(given, keep))
    assert torch.equal(codes[keep], given[keep])
    assert torch.equal(calls.inputs[0][1], ~to_slots(keep))
    assert not torch.equal(codes[~keep], generator.sample(torch.arange(2), indices, options(steps=5))[~keep])
    everything = Known(given, torch.ones_like(keep))
    assert torch.equal(generator.sample(torch.arange(2), indices, options(steps=5), everything), given)
    nearly = torch.ones_like(keep)
    nearly[:, -1, 0, 0] = False  # one slot and five steps
    assert torch.equal(
        generator.sample(torch.arange(2), indices, options(steps=5), Known(given, nearly))[nearly], given[nearly]
    )


def test_finer_codes_cannot_be_known_without_the_coarser_ones() -> None:
    given = some_codes(1)
    keep = torch.zeros_like(given, dtype=torch.bool)
    keep[:, 2] = True
    with pytest.raises(UsageError, match="coarser"):
        make_generator().sample(torch.zeros(1, dtype=torch.int64), torch.zeros(1), options(), Known(given, keep))


def test_more_steps_than_tokens_are_refused() -> None:
    with pytest.raises(UsageError, match=f"{SLOTS} tokens"):
        make_generator().check(options(steps=SLOTS + 1))


@pytest.mark.parametrize("components", [1, 16, 256, 1024])
def test_any_number_of_components_trains_and_samples(components: int) -> None:
    generator = make_generator(mixtures=components)
    generator.network.requires_grad_(True)
    loss, logs = generator.loss(batch_of(), STEP)
    loss.backward()
    norms = [p.grad.norm() for p in generator.network.parameters() if p.grad is not None]
    assert torch.stack(norms).isfinite().all()
    assert 1 <= float(logs["components"]) <= components + 1e-3
    codes = generator.sample(torch.arange(3), torch.arange(3), options(steps=4, cfg=1.0))
    assert codes.shape == (3, D, GRID, GRID)


def test_a_few_images_are_learnt_by_heart() -> None:
    """nll falls; at one token a step and no noise, what is sampled lies nearest to what was shown."""
    generator, codes = make_generator(awake=False, class_latents=True), some_codes(3)
    generator.quantizer.place(separated().books)
    moments = [float(generator.quantizer.prefix(codes, torch.tensor([4] * 3)).pow(2).mean().sqrt())]
    generator.network.get_buffer("rho")[1:] = torch.tensor([0.05**j / 2 for j in (3, 2, 1, 0)])
    generator.network.get_buffer("sigma_psi").fill_(2e-4)
    assert moments[0] == pytest.approx(0.5, abs=0.15)
    network = generator.network.train().requires_grad_(True)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    labels, seen = torch.arange(3), []
    for step in range(4 * SLOTS):  # each number of masked slots four times
        keys = torch.rand(3, L, D, generator=torch.Generator().manual_seed(step))
        masked = masking.mask_tokens(keys, torch.full((3,), 1 + 7 * step % SLOTS), True)
        batch = MaskBatch(codes, labels, masked, float(masked.any(-1).sum()) / 3)
        loss, logs = generator.loss(batch, STEP)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(float(logs["nll"]))
    assert np.mean(seen[-SLOTS:]) < np.mean(seen[:SLOTS]) - 0.2
    network.eval()
    drawn = generator.quantizer.decode(generator.sample(labels, labels, options(steps=SLOTS, z_temp=0))).flatten(1)
    truth = generator.quantizer.decode(codes).flatten(1)
    assert torch.cdist(drawn, truth).argmin(1).tolist() == [0, 1, 2]


# ---- runs, files, refusals -----------------------------------------------------------------------------------------

SMALL = [
    "network.depth=1", "network.width=32", "network.heads=2", "network.mixtures=8", "network.rank=2",
    "train.batch=16", "train.log_every=1", "train.eval_every=2", "train.save_every=2", "sampling.steps=3",
]  # fmt: skip


def train(store: Path, out: Path, *changes: str) -> engine.Result:
    return engine.train_gen(store, out, "resgen-digits", [*SMALL, *changes], "cpu")


def test_a_run_resumes_exactly_and_its_file_samples(
    rvq_codes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = train(rvq_codes, tmp_path / "whole", "train.steps=4")
    assert {"nll", "heldout/nll", "heldout/baseline"} <= set(result.values)
    assert (tmp_path / "whole" / "curves.png").is_file()
    train(rvq_codes, tmp_path / "cut", "train.steps=4")
    (tmp_path / "cut" / "generator.pt").unlink()
    (tmp_path / "cut" / "checkpoints" / "step-000000004.pt").unlink()
    again = train(rvq_codes, tmp_path / "cut", "train.steps=4")
    assert again.values["digest"] == result.values["digest"]
    assert metrics(tmp_path / "cut")[-1] == metrics(tmp_path / "whole")[-1]
    loaded = model.load(tmp_path / "whole" / "generator.pt")
    assert loaded.provenance["sigma_psi"]["source"] == "latents"
    assert float(loaded.generator.network.get_buffer("sigma_psi")) == pytest.approx(
        loaded.provenance["sigma_psi"]["value"]
    )
    assert loaded.sampling == ResGenSampling(steps=3, cfg=0.3, micro_batch=32)
    ckpt = str(tmp_path / "whole" / "generator.pt")
    common = ["sample", "--ckpt", ckpt, "--per-class", "1", "--device", "cpu", "--quiet"]
    chosen = ["--steps", "2", "--schedule", "cosine", "--top-p", "0.9", "--cfg", "1", "--conf", "comp"]
    assert run([*common, "--out", str(tmp_path / "s"), *chosen, "--json", "--gif"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["steps"], said["schedule"], said["top_p"], said["cfg"]) == (2, "cosine", 0.9, 1.0)
    assert run([*common, "--out", str(tmp_path / "n"), "--tau", "2"]) == 2
    refused = capsys.readouterr().err
    assert "--tau" in refused
    assert "resgen" in refused
    assert run(["inspect", ckpt, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["config"]["family"] == "resgen"


def test_an_option_of_resgen_is_refused_for_rdpm(
    digits_codes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["network.depth=1", "network.width=16", "network.heads=1", "train.steps=1", "train.batch=16"]
    engine.train_gen(digits_codes, tmp_path / "rdpm", "digits", small, "cpu")
    args = ["sample", "--ckpt", str(tmp_path / "rdpm" / "generator.pt"), "--out", str(tmp_path / "s"), "--quiet"]
    assert run([*args, "--steps", "4"]) == 2
    assert "--steps" in (said := capsys.readouterr().err)
    assert "rdpm" in said
    assert not (tmp_path / "s").exists()


def test_a_family_refuses_codes_that_it_cannot_learn_from(
    rvq_codes: Path, digits_codes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "run"), "--device", "cpu", "--quiet"]
    assert run(["train-gen", str(rvq_codes), "--recipe", "digits", *out]) == 2
    assert "resgen-digits" in capsys.readouterr().err
    assert run(["train-gen", str(digits_codes), "--recipe", "resgen-digits", *out]) == 2
    said = capsys.readouterr().err
    assert "schedule sin" in said
    assert "resgen-digits" in said
    assert run(["train-gen", str(digits_codes), "--recipe", "resgen-digits", "--dry-run", "--quiet"]) == 2
    assert not (tmp_path / "run").exists()


def test_a_file_whose_codebooks_are_others_is_refused(rvq_file: Path, tmp_path: Path) -> None:
    tokenizer, inner = tokenizer_file.load(rvq_file)
    cfg = config_of()
    content = model.pack(model.build(cfg, tokenizer, CLASSES), cfg, inner, list("abc"), provenance={})
    weights = {**inner["weights"], "quantizer.books": inner["weights"]["quantizer.books"] + 1}
    other = {**inner, "weights": weights, "digest": modelfile.model_digest(weights, inner["config"])}
    modelfile.save(tmp_path / "generator.pt", {**content, "tokenizer": other})
    with pytest.raises(CheckpointError, match="another tokenizer"):
        model.load(tmp_path / "generator.pt")


def test_a_file_of_an_unknown_family_is_refused(rvq_file: Path, tmp_path: Path) -> None:
    tokenizer, inner = tokenizer_file.load(rvq_file)
    cfg = config_of()
    content = model.pack(model.build(cfg, tokenizer, CLASSES), cfg, inner, list("abc"), provenance={})
    config = {**content["config"], "family": "other"}
    digest = modelfile.model_digest(content["weights"], config)
    modelfile.save(tmp_path / "generator.pt", {**content, "config": config, "digest": digest})
    with pytest.raises(CheckpointError, match="family other"):
        model.load(tmp_path / "generator.pt")


# ---- recipes -------------------------------------------------------------------------------------------------------


def test_keys_are_those_of_the_recipes_family() -> None:
    recipe = load_recipe("resgen-digits", ["network.mixtures=16", "objective.order=random"], "generator")
    assert isinstance(recipe.generator, ResGenConfig)
    assert recipe.generator.network.mixtures == 16
    with pytest.raises(UsageError) as refused:
        load_recipe("resgen-digits", ["network.mixture=16"], "generator")
    assert "network.mixtures" in refused.value.hint
    with pytest.raises(UsageError, match="unknown recipe key"):
        load_recipe("resgen-digits", ["sampling.tau=1"], "generator")
    with pytest.raises(UsageError, match="unknown recipe key"):
        load_recipe("digits", ["network.mixtures=16"], "generator")
    with pytest.raises(UsageError, match="one of rdpm, resgen"):
        load_recipe("digits", ["family=resgan"], "generator")
    assert "generator.sampling.top_p" in set(recipe_files.leaf_keys(family="resgen"))
    assert load_recipe("resgen-digits").digest() != load_recipe("digits").digest()


def test_a_blank_batch_is_shaped_like_a_real_one(rvq_codes: Path) -> None:
    cfg = config_of()
    tokenizer, _ = tokenizer_file.load(rvq_codes / "tokenizer.pt")
    real, empty = open_batches(rvq_codes, cfg).batch_at(0, range(16)), blank(cfg, tokenizer.quantizer, (4, 4), 16)
    for name in ("codes_BTHW", "labels_B", "masked_BLD"):
        assert getattr(real, name).shape == getattr(empty, name).shape
        assert getattr(real, name).dtype == getattr(empty, name).dtype


def test_sampling_through_the_sampler_makes_pixels(rvq_codes: Path) -> None:
    tokenizer, _ = tokenizer_file.load(rvq_codes / "tokenizer.pt")
    cfg = config_of()
    generator = model.build(cfg, tokenizer, CLASSES)
    generator.begin(cfg, CodeStore(rvq_codes))
    parts = list(sampler.sample(generator, tokenizer, [0, 1, 2], options(steps=4), 2))
    assert np.concatenate([p.pixels_BHWC for p in parts]).shape == (3, 16, 16, 3)
    assert resgen_sampling.sampling_of(options(steps=4)).steps == 4


@pytest.mark.parametrize("depth", [4, 8, 16])
def test_the_imagenet_recipes_are_plain_residual_codes_of_64_positions(depth: int) -> None:
    recipe = load_recipe(f"imagenet256-resgen-rvq{depth}")
    codes, generator = recipe.tokenizer, recipe.generator
    assert codes is not None
    assert isinstance(generator, ResGenConfig)
    assert codes.autoencoder.grid == (8, 8)
    assert (codes.quantizer.steps, codes.quantizer.codebooks) == (depth, "per_step")
    model.check_codes("resgen", codes, "the recipe")
    with pytest.raises(UsageError, match="rvq"):
        model.check_codes("rdpm", codes, "the recipe")
    assert generator.sampling.steps <= 64 * depth
    with torch.device("meta"):
        built = model.build(generator, tokenizer_file.Tokenizer(codes), recipe.classes)
    assert model.parameters(built) / 1e6 == pytest.approx(695, rel=0.01)


@pytest.mark.parametrize("name", ["resgen-digits", "resgen-cifar10"])
def test_the_small_recipes_make_codes_that_their_generator_takes(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.tokenizer is not None
    model.check_codes("resgen", recipe.tokenizer, name)

"""The families that RDPM and ResGen are compared with, MaskGIT, AR and flow; and what holds for all five.

Legend: B samples, L positions, D depths, V codes, C code width."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from generators import fixed_seed, make_quantizer, sample, wake  # noqa: F401
from helpers import CPU, metrics
from PIL import Image
from stores import Making, latent_store
from torch import Tensor

from rdpm_cli.cli.app import run
from rdpm_cli.data.open import open_source
from rdpm_cli.distributed import TrainStep
from rdpm_cli.engine.generator import train_gen
from rdpm_cli.errors import DataError, UsageError
from rdpm_cli.generator import registry
from rdpm_cli.generator.ar import AR
from rdpm_cli.generator.config import RDPMObjective
from rdpm_cli.generator.contract import Generator, Known, SampleOptions, held_out
from rdpm_cli.generator.flow import Flow
from rdpm_cli.generator.maskgit import MaskGIT
from rdpm_cli.generator.registry import FAMILIES
from rdpm_cli.recipes import load_recipe
from rdpm_cli.tokenizer import model
from rdpm_cli.tokenizer.quantizer import Quantizer

L, D, V, C, CLASSES = 9, 4, 64, 4, 3
NETWORK = {"depth": 1, "width": 32, "heads": 2, "positions": "both"}
NEW = ("maskgit", "ar", "flow")
WITH_DEPTHS = ("flat", "depths")  # AR as one sequence, and with a transformer over the depths
all_families = pytest.mark.parametrize("name", FAMILIES)


def rvq(**options: Any) -> Quantizer:
    """Plain residual quantisation; each book's codes are a third as long as the previous one's."""
    quantizer = make_quantizer("rvq", (3, 3), bias="none", codebooks="per_step", **options)
    quantizer.set_books(quantizer.books * torch.tensor([3.0**-j for j in range(quantizer.steps)]).view(-1, 1, 1))
    return quantizer


def config(name: str, network: dict[str, Any] | None = None, **train: Any) -> Any:
    sections = {"network": {**NETWORK, **(network or {})}, "train": {"batch": 32, "steps": 1, **train}}
    return FAMILIES[name].config.model_validate(sections)


def make(name: str, quantizer: Quantizer | None = None, *, awake: bool = True, **network: Any) -> Generator:
    generator = FAMILIES[name].make(config(name, network).network, quantizer or rvq(), CLASSES)
    if awake:
        wake(generator.network, 0.3)
    generator.network.eval().requires_grad_(False)
    return generator


def options(name: str, seed: int = 0, **sampling: Any) -> SampleOptions:
    return SampleOptions(FAMILIES[name].sampling(**sampling), seed)


def some_codes(count: int = 2, seed: int = 9) -> Tensor:
    return torch.randint(V, (count, D, L), generator=torch.Generator().manual_seed(seed))


@all_families
def test_a_batch_is_a_function_of_seed_and_step_and_a_rank_has_a_slice_of_it(name: str, tmp_path: Path) -> None:
    quantizer = rvq()
    store, family = latent_store(tmp_path / "codes", quantizer, C), FAMILIES[name]
    first, second, reseeded = (family.batches(store, config(name), quantizer, seed) for seed in (0, 0, 1))
    whole, part, other = (
        first.batch_at(5, range(32)),
        second.batch_at(5, range(16, 32)),
        reseeded.batch_at(5, range(32)),
    )
    for field, value in vars(whole).items():
        if isinstance(value, Tensor):
            assert torch.equal(value[16:], getattr(part, field)), field
            assert not torch.equal(value, getattr(other, field)), field
    assert torch.equal(whole.columns["labels"][16:], part.columns["labels"])
    assert first.describe(5, range(16, 32)) == second.describe(5, range(16, 32))


VARIANTS = [*((name, {}) for name in FAMILIES), ("ar", {"depth_layers": 1, "class_tokens": 2})]
VARIANTS += [("rdpm", {"guidance": 2})]


@pytest.mark.parametrize(("name", "network"), VARIANTS, ids=str)
def test_every_parameter_is_trained(name: str, network: dict[str, Any], tmp_path: Path) -> None:
    """Several processes wait for the gradient of each."""
    quantizer, cfg = rvq(), config(name, network)
    store, family = latent_store(tmp_path / "codes", quantizer, C), FAMILIES[name]
    generator = family.make(cfg.network, quantizer, CLASSES)
    generator.begin(cfg, store)
    batch = family.batches(store, cfg, quantizer, 0).batch_at(0, range(32))
    generator.loss(batch, TrainStep(0, 0, range(32), 32, CPU))[0].backward()
    assert [name for name, p in generator.network.named_parameters() if p.grad is None] == []


@all_families
def test_the_loss_does_not_depend_on_how_a_batch_is_shared(name: str, tmp_path: Path) -> None:
    quantizer = rvq()
    store, family, generator = latent_store(tmp_path / "codes", quantizer, C), FAMILIES[name], make(name, quantizer)
    batches = family.batches(store, config(name), quantizer, 0)
    generator.begin(config(name), store)
    parts = [range(32), range(16), range(16, 32)]
    losses = [generator.loss(batches.batch_at(0, rows), TrainStep(0, 0, rows, 32, CPU))[0] for rows in parts]
    assert float(losses[0]) == pytest.approx(float(losses[1] + losses[2]) / 2, rel=1e-4)


@pytest.mark.parametrize(("name", "network"), VARIANTS, ids=str)
@pytest.mark.parametrize("cfg", [0.0, 1.5])
def test_a_sample_depends_on_seed_and_index_not_on_the_batch(name: str, network: dict[str, Any], cfg: float) -> None:
    generator = make(name, **{"class_latents": True, "class_tokens": 2, **network})
    labels, indices = torch.tensor([0, 2, 1, 1]), range(4)
    guided, order = options(name, 3, cfg=cfg), torch.tensor([3, 0])
    codes = sample(generator, labels, indices, guided)
    assert codes.shape == (4, D, L)
    assert torch.equal(sample(generator, labels[order], order, guided), codes[order])
    assert not torch.equal(sample(generator, labels, indices, options(name, 4, cfg=cfg)), codes)
    assert not torch.equal(sample(generator, labels, range(1, 5), guided)[2], codes[2])
    assert not torch.equal(sample(generator, labels.roll(1), indices, guided), codes)


@all_families
def test_eight_images_are_learnt_by_heart(name: str, tmp_path: Path) -> None:
    """One image a class: its sample lies nearest to it."""
    quantizer, family, everything = rvq(steps=2), FAMILIES[name], range(32)
    store = latent_store(tmp_path / "codes", quantizer, C, 60, 1)
    cfg = config(name, {"class_latents": True, **({"mixtures": 8, "rank": 2} if name == "resgen" else {})})
    if name == "rdpm":  # a cached draw of noise would be learnt instead of the image
        cfg = cfg.model_copy(update={"objective": RDPMObjective(noise="fresh", label_drop=0)})
    generator, batches = family.make(cfg.network, quantizer, 8), family.batches(store, cfg, quantizer, 0)
    batches.rows = rows = np.sort(batches.rows[:8])
    generator.begin(cfg, store)
    optimizer = torch.optim.Adam(generator.network.parameters(), 4e-3)
    for step in range(200):
        batch = batches.batch_at(step, everything)
        batch.columns["labels"] = torch.from_numpy(np.searchsorted(rows, batches.rows_at(step, everything)))
        loss, _ = generator.loss(batch, TrainStep(0, step, everything, 32, CPU))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    generator.network.eval().requires_grad_(False)
    truth = quantizer.decode(torch.from_numpy(store.codes(rows).astype(np.int64))).flatten(1)
    drawn = quantizer.decode(sample(generator, range(8), range(8), options(name))).flatten(1)
    assert torch.cdist(drawn, truth).argmin(1).tolist() == [*range(8)]


def kept(rows: slice, depths: slice = slice(None)) -> Tensor:
    keep = torch.zeros(2, D, L, dtype=torch.bool)
    keep[:, depths, rows] = True
    return keep


@pytest.mark.parametrize("name", NEW)
def test_known_codes_are_kept_and_seen(name: str) -> None:
    generator, prompt, keep = make(name), some_codes(), kept(slice(0, 6))
    if name == "flow":  # codes that stand for the latents that they decode to
        prompt = generator.quantizer.encode(generator.quantizer.decode(prompt), torch.zeros(2, D, C, L))  # type: ignore[attr-defined]
    args = (generator, [0, 0], range(2), options(name))
    codes = sample(*args, Known(prompt, keep))
    assert torch.equal(codes[keep], prompt[keep])
    assert not torch.equal(codes[~keep], sample(*args)[~keep])


def test_an_edit_that_a_family_cannot_see_is_refused() -> None:
    """AR does not see what follows; flow draws a position's codes at once."""
    for name, keep in (("ar", kept(slice(3, None))), ("flow", kept(slice(None), slice(0, 2)))):
        with pytest.raises(UsageError, match=name):
            sample(make(name), [0, 0], range(2), options(name), Known(some_codes(), keep))
        with pytest.raises(UsageError, match=name):  # and before a folder is claimed
            make(name).check_known(keep)


def test_maskgit_keeps_any_codes() -> None:
    prompt, keep = some_codes(), torch.rand(2, D, L, generator=torch.Generator().manual_seed(4)) < 0.5
    codes = sample(make("maskgit"), [0, 0], range(2), options("maskgit"), Known(prompt, keep))
    assert torch.equal(codes[keep], prompt[keep])


@pytest.mark.parametrize("steps", [1, 5, L * D])
def test_maskgit_reveals_each_token_once(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is visible at a step is what was visible before, with the drawn tokens of some more slots."""
    generator, seen = make("maskgit"), list[tuple[Tensor, Tensor]]()
    predict = MaskGIT.predict

    def spy(self: MaskGIT, codes: Tensor, masked: Tensor, condition: Any) -> Tensor:
        seen.append((codes.clone(), masked.clone()))
        return predict(self, codes, masked, condition)

    monkeypatch.setattr(MaskGIT, "predict", spy)
    codes = sample(generator, [0, 1], range(2), options("maskgit", steps=steps)).mT
    assert len(seen) == steps
    assert bool(seen[0][1].all())
    last = torch.zeros_like(seen[0][1])
    for (_, masked), (_, following) in zip(seen, [*seen[1:], (codes, last)], strict=True):
        assert not bool((following & ~masked).any())
        assert bool((following.flatten(1).sum(1) < masked.flatten(1).sum(1)).all())
    for visible, masked in seen:
        assert torch.equal(visible[~masked], codes[~masked])


def test_maskgits_bound_of_a_uniform_guess_is_its_entropy(tmp_path: Path) -> None:
    quantizer = rvq()
    store = latent_store(tmp_path / "codes", quantizer, C)
    generator = make("maskgit", quantizer, awake=False)
    batches = FAMILIES["maskgit"].batches(store, config("maskgit"), quantizer, 0)
    measured = held_out(generator, batches, CPU, generator.fit_baselines(store, batches.rows))
    assert measured["bound"] == pytest.approx([np.log(V)] * 10, rel=1e-5)
    assert np.mean(measured["unigram"]) == pytest.approx(np.log(V), rel=0.1)


@pytest.mark.parametrize("grid", [(3,), (3, 3), (4, 4)], ids=str)
def test_each_share_of_maskgits_bound_is_measured_once_also_of_few_slots(grid: tuple[int, ...], tmp_path: Path) -> None:
    quantizer = make_quantizer("rvq", grid, bias="none", steps=1)
    store = latent_store(tmp_path / "codes", quantizer, C)
    generator = FAMILIES["maskgit"].make(config("maskgit").network, quantizer, CLASSES)
    batches = FAMILIES["maskgit"].batches(store, config("maskgit"), quantizer, 0)
    assert held_out(generator, batches, CPU)["bound"] == pytest.approx([np.log(V)] * 10, rel=1e-5)
    slots = quantizer.grid[0] ** len(grid)
    counts = FAMILIES["maskgit"].batches(store, config("maskgit"), quantizer, 0).held_out_counts(slots)  # type: ignore[attr-defined]
    assert min(counts) >= 1
    assert max(counts) <= slots
    assert np.mean(counts) == pytest.approx((slots + 1) / 2, abs=0.6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_maskgits_loss_is_torchs_cross_entropy_of_masked_tokens(smoothing: float, tmp_path: Path) -> None:
    quantizer = rvq()
    store = latent_store(tmp_path / "codes", quantizer, C)
    generator = make("maskgit", quantizer)
    assert isinstance(generator, MaskGIT)
    generator.objective = generator.objective.model_copy(update={"label_smoothing": smoothing})
    batch: Any = FAMILIES["maskgit"].batches(store, config("maskgit"), quantizer, 0).batch_at(0, range(32))
    codes_BLD = batch.codes_BTS.mT
    logits = generator.predict(codes_BLD, batch.masked_BLD, generator.condition(batch.columns))
    expected = torch.nn.functional.cross_entropy(
        logits[batch.masked_BLD], codes_BLD[batch.masked_BLD], label_smoothing=smoothing
    )
    loss, logs = generator.loss(batch, TrainStep(0, 0, range(32), 32, CPU))
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert (float(logs["ce"]) == pytest.approx(float(loss))) == (smoothing == 0)


def make_ar(kind: str, **network: Any) -> AR:
    generator = make("ar", depth_layers=2 if kind == "depths" else 0, class_latents=True, class_tokens=2, **network)
    assert isinstance(generator, AR)
    return generator


@pytest.mark.parametrize("kind", WITH_DEPTHS)
@pytest.mark.parametrize("positions", ["rope", "learned", "both"])
def test_ar_gives_the_same_logits_one_token_at_a_time(kind: str, positions: str) -> None:
    generator, codes_BLD = make_ar(kind, positions=positions), some_codes().mT
    condition = generator.condition({"labels": torch.tensor([0, 2])})
    whole, decoding = generator.predict(codes_BLD, condition), generator.network.start()
    for slot in range(L * D):
        known = codes_BLD.flatten(1).clone()
        known[:, slot:] = 7  # must not be read
        logits = generator.network.next_logits(known.view(2, L, D), slot, condition, decoding)
        torch.testing.assert_close(logits, whole.flatten(1, 2)[:, slot], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", WITH_DEPTHS)
@pytest.mark.parametrize("slot", [0, 5, 18, L * D - 1])
def test_ar_sees_the_tokens_before_and_no_other(kind: str, slot: int) -> None:
    generator, codes_BLD = make_ar(kind), some_codes().mT
    condition = generator.condition({"labels": torch.tensor([0, 2])})
    changed = codes_BLD.flatten(1).clone()
    changed[:, slot] = (changed[:, slot] + 1) % V
    first, second = (generator.predict(x.view(2, L, D), condition).flatten(1, 2) for x in (codes_BLD, changed))
    torch.testing.assert_close(first[:, : slot + 1], second[:, : slot + 1], rtol=1e-5, atol=1e-5)
    assert slot == L * D - 1 or not torch.allclose(first[:, slot + 1], second[:, slot + 1], atol=1e-3)


@pytest.mark.parametrize("kind", WITH_DEPTHS)
def test_ars_samples_are_the_likeliest_codes_of_its_own_logits(kind: str) -> None:
    generator = make_ar(kind)
    codes = sample(generator, [0, 2], range(2), options("ar", draw="argmax"))
    logits = generator.predict(codes.mT, generator.condition({"labels": torch.tensor([0, 2])}))
    assert torch.equal(logits.argmax(-1), codes.mT)


@pytest.mark.parametrize(("option", "same"), [({"top_k": 1}, True), ({"top_p": 1e-6}, True), ({"tau": 0.5}, False)])
def test_ar_draws_among_the_likeliest_codes(option: dict[str, Any], same: bool) -> None:
    generator = make_ar("flat")
    greedy, drawn = (sample(generator, [0], [0], options("ar", **o)) for o in ({"draw": "argmax"}, option))
    assert torch.equal(greedy, drawn) == same


def test_ars_nats_are_those_of_the_chain_rule(tmp_path: Path) -> None:
    """-log p of a row, a token at a time, by the logits of sampling."""
    quantizer = rvq()
    store = latent_store(tmp_path / "codes", quantizer, C)
    generator = make("ar", quantizer)
    assert isinstance(generator, AR)
    batches = FAMILIES["ar"].batches(store, config("ar"), quantizer, 0)
    batch = next(iter(batches.held_out_batches()))
    codes_BLD, condition, decoding = batch.codes_BTS.mT, generator.condition(batch.columns), generator.network.start()
    nats = 0.0
    for slot in range(L * D):
        log_p = generator.network.next_logits(codes_BLD, slot, condition, decoding).log_softmax(-1)
        nats -= float(log_p.gather(1, codes_BLD.flatten(1)[:, slot : slot + 1]).mean())
    total, count = generator.held_out(batch)["nats"].sum(1).tolist()
    assert total / count == pytest.approx(nats / (L * D), rel=1e-4)


@pytest.mark.parametrize(("solver", "steps"), [("euler", 200), ("heun", 20)])
def test_flows_sampler_reproduces_a_known_gaussian(solver: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the exact velocity of z ~ N(m, s²) each noise ends at m + s·eps."""
    generator = make("flow", rvq(codes=64))
    assert isinstance(generator, Flow)
    mean, spread, ends = 0.7, 0.4, list[Tensor]()

    def exact(x: Tensor, t_B: Tensor, condition: Any) -> Tensor:
        t = float(t_B[0])
        variance = (1 - t) ** 2 * spread**2 + t**2
        z = mean + (1 - t) * spread**2 / variance * (x - (1 - t) * mean)
        eps = t / variance * (x - (1 - t) * mean)
        return eps - z

    def keep(z: Tensor, eps: Tensor) -> Tensor:
        ends.append(z)
        return torch.zeros(len(z), D, L, dtype=torch.int64)

    monkeypatch.setattr(generator.network, "forward", exact)
    monkeypatch.setattr(generator.quantizer, "encode", keep)
    generator.network.scale.fill_(2.0)
    sample(generator, [0] * 200, range(200), options("flow", solver=solver, steps=steps))
    assert float(ends[0].mean()) == pytest.approx(2 * mean, abs=0.03)
    assert float(ends[0].std()) == pytest.approx(2 * spread, rel=0.05)
    exact_ends = ends[0]
    sample(generator, [0] * 200, range(200), options("flow", solver="heun", steps=200))
    torch.testing.assert_close(exact_ends, ends[1], rtol=0, atol=0.04)


def test_flow_measures_against_the_best_linear_guess(tmp_path: Path) -> None:
    """An untrained network predicts 0, and the error of 0 is Var v = 2 where z has variance 1."""
    quantizer = rvq()
    store = latent_store(tmp_path / "codes", quantizer, C, 400)
    generator, cfg = make("flow", quantizer, awake=False), config("flow")
    provenance = generator.begin(cfg, store)
    assert provenance["latent_scale"] == pytest.approx(1, abs=0.05)
    measured = held_out(generator, FAMILIES["flow"].batches(store, cfg, quantizer, 0), CPU)
    assert measured["mse"] == pytest.approx([2.0] * 10, rel=0.1)
    assert measured["baseline"][0] == pytest.approx(2 - 0.9**2 / (0.95**2 + 0.05**2))


SMALL = [
    "network.depth=1", "network.width=32", "network.heads=2", "train.batch=16", "train.log_every=1",
    "train.eval_every=2", "train.save_every=2", "train.steps=4",
]  # fmt: skip
MEASURES = {"maskgit": "heldout/bound", "ar": "heldout/nats", "flow": "heldout/mse"}
FEWER = {"maskgit": ["sampling.steps=3"], "ar": [], "flow": ["sampling.steps=3"]}


@pytest.mark.parametrize("name", NEW)
def test_a_run_resumes_exactly_and_its_file_samples(
    name: str,
    rvq_codes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    overrides, whole, cut = [*SMALL, *FEWER[name]], tmp_path / "whole", tmp_path / "cut"
    digest = train_gen(rvq_codes, whole, f"shapes-{name}", overrides, device="cpu").values["digest"]
    assert MEASURES[name] in metrics(whole)[-1]
    assert (whole / "curves.png").is_file()
    train_gen(rvq_codes, cut, f"shapes-{name}", overrides, device="cpu")
    for path in (cut / "generator.pt", *(cut / "checkpoints").glob("step-000000004.pt*")):
        path.unlink()
    assert train_gen(rvq_codes, cut, f"shapes-{name}", overrides, device="cpu").values["digest"] == digest
    assert metrics(cut)[-1] == metrics(whole)[-1]
    args = ["sample", "--ckpt", str(whole / "generator.pt"), "--per-class", "1", "--device", "cpu", "--quiet", "--json"]
    assert run([*args, "--out", str(tmp_path / "samples"), "--cfg", "1"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["samples"], values["cfg"]) == (3, 1.0)
    passes = {"maskgit": 5, "ar": 2 * 16 * 4, "flow": 6}[name]  # maskgit's lambda is 0 at the first of its steps
    assert values["passes"] == passes
    with Image.open(tmp_path / "samples" / "previews" / "grid.png") as grid:
        assert grid.size[0] > 16


@pytest.mark.parametrize("name", NEW)
def test_sound_is_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = load_recipe("speech8-sin")
    assert recipe.tokenizer is not None
    with pytest.raises(UsageError, match="codes"):
        FAMILIES[name].make.check_codes(recipe.tokenizer, "codes")


def test_flow_needs_latents(image_folder: Path, rvq_file: Path, tmp_path: Path) -> None:
    store = Making(tmp_path / "codes", open_source(str(image_folder)), rvq_file, latents=False).finish()
    with pytest.raises(DataError, match=str(tmp_path)) as refused:
        FAMILIES["flow"].batches(store, config("flow"), model.load(rvq_file)[0].quantizer, 0)
    assert "latents" in str(refused.value)


@pytest.mark.parametrize(
    ("recipe", "millions"), [("imagenet256-maskgit", 259.4), ("imagenet256-ar", 491.1), ("imagenet256-flow", 674.9)]
)
def test_imagenet_recipes_have_the_sizes_that_they_state(recipe: str, millions: float) -> None:
    loaded = load_recipe(recipe)
    tokenizer = loaded.tokenizer or load_recipe("imagenet256-tokenizer").tokenizer
    assert loaded.generator is not None
    assert tokenizer is not None
    with torch.device("meta"):
        generator = registry.build(loaded.generator, model.Tokenizer(tokenizer), loaded.classes)
    assert model.parameters(generator.network) / 1e6 == pytest.approx(millions, rel=1e-3)


@pytest.mark.parametrize("name", ["flow", "ar"])
def test_the_cost_of_a_sample_is_that_of_its_passes(name: str, rvq_codes: Path, tmp_path: Path) -> None:
    overrides = [*SMALL, *FEWER[name], "train.eval_every=0", "train.steps=1"]
    train_gen(rvq_codes, tmp_path, f"shapes-{name}", overrides, device="cpu")
    script = Path(__file__).parent.parent / "recipes" / "ablations" / "cost.py"
    command = [sys.executable, str(script), str(tmp_path / "generator.pt"), "cfg=1", "--batch", "2", "--device", "cpu"]
    result = json.loads(subprocess.run(command, capture_output=True, text=True, timeout=600, check=True).stdout)
    network = registry.load(tmp_path / "generator.pt").generator.network
    # Two operations a weight of a matrix and position, in all passes; attention, decoder and small parts are more.
    weights = sum(p.numel() for p in network.trunk.blocks.parameters() if p.ndim == 2)
    least = 2 * weights * result["passes"] * (16 if name == "flow" else 1) / 1e9
    assert least * 0.3 < result["gflops_a_sample"] < least * 4
    assert 0 < result["memory_mib_a_sample"] < 100
    assert result["seconds_a_sample"] > 0

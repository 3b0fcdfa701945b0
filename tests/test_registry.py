"""Generator families: one table, files that carry their tokenizer, codes that fit, and grids of any number of axes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from generators import CHANNELS, CLASSES, STEPS, make_generator, make_quantizer, network_config, sampling_options, wake
from helpers import CPU
from stores import latent_store
from torch import Tensor

from rdpm_cli import checkpoint
from rdpm_cli.cli.app import run
from rdpm_cli.device import one_thread
from rdpm_cli.distributed import TrainStep
from rdpm_cli.errors import CheckpointError, UsageError
from rdpm_cli.generator import registry
from rdpm_cli.generator.batches import GeneratorTask, held_out
from rdpm_cli.generator.config import RDPMConfig, RDPMSampling, ResGenNetwork
from rdpm_cli.generator.contract import SampleOptions
from rdpm_cli.generator.registry import FAMILIES
from rdpm_cli.recipes import load_recipe
from rdpm_cli.tokenizer import model
from rdpm_cli.tokenizer.quantizer import Quantizer
from rdpm_cli.training.config import TrainConfig
from rdpm_cli.training.optim import make_optimizer

ONE_STEP = TrainConfig(batch=16, steps=1)


@pytest.fixture(autouse=True)
def fixed_seed() -> Iterator[None]:
    with torch.random.fork_rng(), one_thread():
        torch.manual_seed(0)
        yield


# ---- any number of axes --------------------------------------------------------------------------------------------

NETWORK = {"depth": 1, "width": 32, "heads": 2, "positions": "both", "class_latents": True, "class_tokens": 2}
OPTIONS: dict[str, dict[str, Any]] = {
    "rdpm": {"network": network_config(**NETWORK, head="geometric"), "objective": {"noise": "fresh"}},
    "resgen": {"network": ResGenNetwork.model_validate({**NETWORK, "mixtures": 4, "rank": 2})},
}


def quantizer_for(family: str, grid: tuple[int, ...]) -> Quantizer:
    if family == "rdpm":
        return make_quantizer(grid=grid)
    quantizer = make_quantizer("rvq", grid, bias="none", codebooks="per_step")
    quantizer.set_books(quantizer.books * torch.tensor([1, 0.6, 0.3, 0.2]).view(-1, 1, 1))
    return quantizer


@pytest.mark.parametrize("grid", [(7,), (1, 7), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_trains_and_samples_on_any_grid(name: str, grid: tuple[int, ...], tmp_path: Path) -> None:
    family, quantizer = FAMILIES[name], quantizer_for(name, grid)
    cfg = family.config.model_validate({**OPTIONS[name], "train": ONE_STEP})
    store = latent_store(tmp_path / "codes", quantizer, CHANNELS)
    generator = family.make(cfg, quantizer, CLASSES)
    batches = family.batches(store, cfg, quantizer, 0)
    generator.begin(cfg, store)
    task, optimizer = GeneratorTask(generator), make_optimizer(generator.network, cfg.train)

    def loss() -> Tensor:
        return task.loss(batches.batch_at(0, range(16)), TrainStep(0, 0, range(16), 16, CPU))[0]

    first = loss()
    first.backward()
    optimizer.step()
    assert float(loss().detach()) < float(first.detach())
    generator.network.eval()
    measured = held_out(generator, batches, CPU)
    assert {len(values) for values in measured.values()} == {STEPS}
    wake(generator.network)
    options = SampleOptions(family.sampling(cfg=1.0), seed=1)
    draws = [
        generator.sample(generator.condition({"labels": torch.tensor([0, 2])}), torch.tensor(indices), options)
        for indices in ([5, 6], [5, 7])
    ]
    assert quantizer.decode(draws[0]).shape == (2, CHANNELS, store.codes(store.index[:1]).shape[-1])
    assert torch.equal(draws[0][0], draws[1][0])
    assert not torch.equal(draws[0][1], draws[1][1])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_blank_batch_is_shaped_like_a_real_one(name: str, tmp_path: Path) -> None:
    family, quantizer = FAMILIES[name], quantizer_for(name, (7,))
    cfg = family.config.model_validate({"network": OPTIONS[name]["network"], "train": ONE_STEP})
    store = latent_store(tmp_path / "codes", quantizer, CHANNELS)
    real, blank = (
        family.batches(store, cfg, quantizer, 0).batch_at(0, range(16)),
        family.batches.blank(cfg, quantizer, 16),
    )
    for field, value in vars(blank).items():
        if isinstance(value, Tensor):
            assert (value.shape, value.dtype) == (getattr(real, field).shape, getattr(real, field).dtype), field
    assert blank.columns.keys() == real.columns.keys()


# ---- codes that fit ------------------------------------------------------------------------------------------------


def test_a_family_refuses_codes_that_it_cannot_learn(
    digits_codes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["train-gen", str(digits_codes), "--recipe", "resgen-digits", "--quiet"]
    for command in ([*args, "--out", str(tmp_path / "run"), "--device", "cpu"], [*args, "--dry-run"]):
        assert run(command) == 2
        message = capsys.readouterr().err
        for token in (str(digits_codes), "sin", "resgen-digits"):
            assert token in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("depth", [4, 8, 16])
def test_the_imagenet_recipes_of_resgen_are_of_64_positions(depth: int) -> None:
    recipe = load_recipe(f"imagenet256-resgen-rvq{depth}")
    assert recipe.tokenizer is not None
    assert recipe.generator is not None
    assert recipe.tokenizer.autoencoder.grid == (8, 8)
    registry.check_codes("resgen", recipe.tokenizer, "the recipe")
    with pytest.raises(UsageError, match="rvq"):
        registry.check_codes("rdpm", recipe.tokenizer, "the recipe")
    with torch.device("meta"):
        generator = registry.build(recipe.generator, model.Tokenizer(recipe.tokenizer), recipe.classes)
    generator.check(SampleOptions(recipe.generator.sampling))
    assert registry.parameters(generator) / 1e6 == pytest.approx(695, rel=0.01)


@pytest.mark.parametrize("name", ["resgen-digits", "resgen-cifar10", "digits"])
def test_the_small_recipes_make_codes_that_their_generator_takes(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.tokenizer is not None
    assert recipe.generator is not None
    registry.check_codes(recipe.generator.family, recipe.tokenizer, name)


# ---- files ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def content(tiny_tokenizer_file: Path) -> dict[str, Any]:
    tokenizer, inner = model.load(tiny_tokenizer_file)
    cfg = RDPMConfig(network=network_config(head="geometric"), train=ONE_STEP)
    generator = registry.build(cfg, tokenizer, CLASSES)
    wake(generator.network)
    return registry.pack(generator, cfg, inner, list("abc"), provenance={"made": "by hand"})


@pytest.fixture
def path(content: dict[str, Any], tmp_path: Path) -> Path:
    checkpoint.save(tmp_path / "generator.pt", content)
    return tmp_path / "generator.pt"


def test_a_generator_file_round_trips(content: dict[str, Any], path: Path, tiny_tokenizer_file: Path) -> None:
    loaded, (tokenizer, _) = registry.load(path), model.load(tiny_tokenizer_file)
    assert loaded.class_names == ["a", "b", "c"]
    assert loaded.digest == content["digest"]
    assert loaded.provenance == {"made": "by hand"}
    assert loaded.sampling == RDPMSampling()
    assert registry.parameters(loaded.generator) == sum(v.numel() for v in content["weights"].values())
    assert not loaded.generator.network.training
    assert not any(p.requires_grad for p in loaded.generator.network.parameters())
    fresh = make_generator(tokenizer.quantizer, head="geometric")
    fresh.network.load_state_dict(content["weights"])
    labels, indices, options = {"labels": torch.tensor([0, 2, 1])}, torch.arange(3), sampling_options(cfg=1.0)
    codes = [g.sample(g.condition(labels), indices, options) for g in (fresh, loaded.generator)]
    assert torch.equal(*codes)


def test_a_generator_file_is_plain_data_and_carries_its_tokenizer(path: Path, tiny_tokenizer_file: Path) -> None:
    raw = torch.load(path, weights_only=True)
    assert raw["format"] == "rdpm-generator"
    assert raw["config"]["tokenizer"] == raw["tokenizer"]["digest"]
    assert raw["config"]["classes"] == CLASSES
    carried = registry.load(path).tokenizer.state_dict()
    for name, value in model.load(tiny_tokenizer_file)[0].state_dict().items():
        assert torch.equal(carried[name], value), name


def test_equal_generators_have_equal_bytes_and_digests_whatever_their_provenance(
    content: dict[str, Any], path: Path, tmp_path: Path
) -> None:
    checkpoint.save(tmp_path / "b" / "two.pt", content)
    assert path.read_bytes() == (tmp_path / "b" / "two.pt").read_bytes()
    checkpoint.save(tmp_path / "c.pt", {**content, "provenance": {"made": "elsewhere"}})
    assert registry.load(tmp_path / "c.pt").digest == content["digest"]
    assert checkpoint.model_digest(content["weights"], {**content["config"], "classes": 4}) != content["digest"]


def test_a_file_of_version_0_1_has_its_sampling_options_in_the_config(content: dict[str, Any], tmp_path: Path) -> None:
    config = {**content["config"], "sampling": RDPMSampling(cfg=2.0).model_dump(mode="json")}
    old = {name: value for name, value in content.items() if name != "sampling"}
    for fields, cfg in ((config, 2.0), (content["config"], 0.0)):  # or nowhere: the family's defaults
        digest = checkpoint.model_digest(content["weights"], fields)
        checkpoint.save(tmp_path / "old.pt", {**old, "config": fields, "digest": digest})
        assert registry.load(tmp_path / "old.pt").sampling == RDPMSampling(cfg=cfg)


@pytest.mark.parametrize("part", ["generator", "tokenizer"])
def test_damaged_weights_are_refused(content: dict[str, Any], tmp_path: Path, part: str) -> None:
    weights = content["weights"] if part == "generator" else content["tokenizer"]["weights"]
    name = next(iter(weights))
    weights[name] = weights[name] + 1
    checkpoint.save(tmp_path / "generator.pt", content)
    with pytest.raises(CheckpointError, match=str(tmp_path)) as refused:
        registry.load(tmp_path / "generator.pt")
    assert refused.value.exit_code == 3
    assert ("tokenizer" in refused.value.message) == (part == "tokenizer")


def test_files_of_another_kind_family_or_tokenizer_are_refused(
    content: dict[str, Any], path: Path, tiny_tokenizer_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=str(tiny_tokenizer_file)):
        registry.load(tiny_tokenizer_file)
    with pytest.raises(CheckpointError, match=str(path)):
        model.load(path)
    inner, config = content["tokenizer"], {**content["config"], "family": "third"}
    weights = {name: value + 1 for name, value in inner["weights"].items()}
    tokenizer = {**inner, "weights": weights, "digest": checkpoint.model_digest(weights, inner["config"])}
    family = {"config": config, "digest": checkpoint.model_digest(content["weights"], config)}
    for changes, token in (({"tokenizer": tokenizer}, "tokenizer"), (family, "third")):
        checkpoint.save(tmp_path / "changed.pt", {**content, **changes})
        with pytest.raises(CheckpointError, match=token):
            registry.load(tmp_path / "changed.pt")


@pytest.mark.parametrize(
    ("option", "mode"), [("default", "default"), ("graphs", "reduce-overhead"), ("off", None)], ids=str
)
def test_a_compiled_network_draws_the_same_samples(
    option: str, mode: str | None, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced as a whole, with no code generated: a second, not minutes."""
    modes: list[str] = []
    original = torch.compile

    def traced(network: Any, *, mode: str) -> Any:
        modes.append(mode)
        return original(network, backend="eager", fullgraph=True)

    monkeypatch.setattr(torch, "compile", traced)
    loaded = registry.load(path)

    def codes() -> Tensor:
        condition = loaded.generator.condition({"labels": torch.arange(3)})
        return loaded.generator.sample(condition, torch.arange(3), sampling_options(cfg=1.0))

    expected = codes()
    loaded.to(CPU, option)
    assert torch.equal(codes(), expected)
    assert modes == ([mode] if mode else [])

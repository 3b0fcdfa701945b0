"""Generator families: one table, files that carry their tokenizer, codes that fit, and grids of any number of axes."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from generators import fixed_seed, make_generator, make_quantizer, network_config, sample, wake  # noqa: F401
from helpers import CPU
from processes import generator_command
from stores import Making, MemoryImages, latent_store
from torch import Tensor

from rdpm_cli import checkpoint
from rdpm_cli.cli.app import run
from rdpm_cli.distributed import TrainStep
from rdpm_cli.errors import CheckpointError
from rdpm_cli.generator import registry
from rdpm_cli.generator.config import RDPMConfig, RDPMSampling, ResGenNetwork
from rdpm_cli.generator.contract import SampleOptions, held_out
from rdpm_cli.generator.registry import FAMILIES
from rdpm_cli.recipes import load_recipe
from rdpm_cli.tokenizer import model
from rdpm_cli.tokenizer import model as tokenizer_model
from rdpm_cli.training.config import TrainConfig

ONE_STEP, CFG_1 = TrainConfig(batch=16, steps=1), SampleOptions(RDPMSampling(cfg=1.0))
NETWORK = {"depth": 1, "width": 32, "heads": 2, "positions": "both", "class_latents": True, "class_tokens": 2}
OPTIONS: dict[str, dict[str, Any]] = {
    "rdpm": {"network": network_config(**NETWORK, head="geometric"), "objective": {"noise": "fresh"}},
    "resgen": {"network": ResGenNetwork.model_validate({**NETWORK, "mixtures": 4, "rank": 2})},
    **{name: {"network": NETWORK} for name in ("maskgit", "ar", "flow")},
}
MEASURED = {"maskgit": 10, "flow": 10}  # values of a held-out measurement; of the others one a step or depth


@pytest.mark.parametrize("grid", [(7,), (1, 7), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_trains_and_samples_on_any_grid(name: str, grid: tuple[int, ...], tmp_path: Path) -> None:
    options = {"kind": "rvq", "bias": "none", "codebooks": "per_step"} if name == "resgen" else {}
    family, quantizer = FAMILIES[name], make_quantizer(grid=grid, **options)
    if name == "resgen":
        quantizer.set_books(quantizer.books * torch.tensor([1, 0.6, 0.3, 0.2]).view(-1, 1, 1))
    cfg = family.config.model_validate({**OPTIONS[name], "train": ONE_STEP})
    store = latent_store(tmp_path / "codes", quantizer, 4)
    generator, batches = family.make(cfg.network, quantizer, 3), family.batches(store, cfg, quantizer, 0)
    generator.begin(cfg, store)
    batch, step = batches.batch_at(0, range(16)), partial(TrainStep, 0, 0, range(16), 16, CPU)
    blank = family.batches.blank(cfg, quantizer, 16)
    for field, value in vars(blank).items():  # a blank batch is shaped like a real one
        if isinstance(value, Tensor) and getattr(batch, field) is not None:
            assert (value.shape, value.dtype) == (getattr(batch, field).shape, getattr(batch, field).dtype), field
    optimizer = torch.optim.AdamW(generator.network.parameters(), 1e-4)
    first, _ = generator.loss(batch, step())
    first.backward()
    optimizer.step()
    assert float(generator.loss(batch, step())[0].detach()) < float(first.detach())
    generator.network.eval()
    measured = held_out(generator, batches, CPU, generator.fit_baselines(store, batches.rows))
    assert {len(values) for values in measured.values() if isinstance(values, list)} == {MEASURED.get(name, 4)}
    wake(generator.network)
    options_ = SampleOptions(family.sampling(cfg=1.0), 1)
    draws = [sample(generator, [0, 2], indices, options_) for indices in ([5, 6], [5, 7])]
    assert quantizer.decode(draws[0]).shape == (2, 4, batch.codes_BTS.shape[-1])
    assert torch.equal(draws[0][0], draws[1][0])
    assert not torch.equal(draws[0][1], draws[1][1])


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


def test_default_guidance_with_codes_of_one_class_is_refused(
    tmp_path: Path, tiny_tokenizer_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = MemoryImages(60)
    images.class_names, images.labels = ["all"], [0] * 60
    Making(tmp_path / "codes", images, tiny_tokenizer_file, views=1).finish()
    length = ("train.steps=1", "train.batch=16", "train.epochs=null")
    args = generator_command(tmp_path / "codes", tmp_path / "run", *length)
    for guided in ([*args, "sampling.cfg=1.5"], [*args, "sampling.cfg=1.5", "--dry-run"]):
        assert run(guided) == 2
        message = capsys.readouterr().err
        assert all(token in message for token in (str(tmp_path / "codes"), "sampling.cfg=1.5"))
    assert not (tmp_path / "run").exists()
    assert run(args) == 0


@pytest.mark.parametrize("depth", [4, 8, 16])
def test_the_imagenet_recipes_of_resgen_are_of_64_positions(depth: int) -> None:
    recipe = load_recipe(f"imagenet256-resgen-rvq{depth}")
    assert recipe.tokenizer is not None
    assert recipe.generator is not None
    assert recipe.tokenizer.autoencoder.grid == (8, 8)
    with torch.device("meta"):
        generator = registry.build(recipe.generator, model.Tokenizer(recipe.tokenizer), recipe.classes)
    generator.check(SampleOptions(recipe.generator.sampling))
    assert tokenizer_model.parameters(generator.network) / 1e6 == pytest.approx(695, rel=0.01)


@pytest.mark.parametrize("name", ["resgen-digits", "resgen-cifar10", "digits", "imagenet256-resgen-rvq16"])
def test_recipes_make_codes_that_their_generator_takes(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.tokenizer is not None
    assert recipe.generator is not None
    FAMILIES[recipe.generator.family].make.check_codes(recipe.tokenizer, name)


@pytest.fixture
def content(tiny_tokenizer_file: Path) -> dict[str, Any]:
    tokenizer, inner = model.load(tiny_tokenizer_file)
    cfg = RDPMConfig(network=network_config(head="geometric"), train=ONE_STEP)
    generator = registry.build(cfg, tokenizer, 3)
    wake(generator.network)
    return registry.pack(generator, cfg, inner, list("abc"), provenance={"made": "by hand"})


@pytest.fixture
def path(content: dict[str, Any], tmp_path: Path) -> Path:
    checkpoint.save(tmp_path / "generator.pt", content)
    return tmp_path / "generator.pt"


def test_a_generator_file_round_trips_and_carries_its_tokenizer(
    content: dict[str, Any], path: Path, tiny_tokenizer_file: Path
) -> None:
    loaded, (tokenizer, _) = registry.load(path), model.load(tiny_tokenizer_file)
    assert (loaded.class_names, loaded.digest) == (["a", "b", "c"], content["digest"])
    assert (loaded.provenance, loaded.sampling) == ({"made": "by hand"}, RDPMSampling())
    assert tokenizer_model.parameters(loaded.generator.network) == sum(v.numel() for v in content["weights"].values())
    assert not loaded.generator.network.training
    assert not any(p.requires_grad for p in loaded.generator.network.parameters())
    fresh, args = (
        make_generator(tokenizer.quantizer, head="geometric"),
        ([0, 2, 1], range(3), CFG_1),
    )
    fresh.network.load_state_dict(content["weights"])
    assert torch.equal(sample(fresh, *args), sample(loaded.generator, *args))
    raw = torch.load(path, weights_only=True)  # plain data
    assert (raw["format"], raw["config"]["classes"]) == ("rdpm-generator", 3)
    assert raw["config"]["tokenizer"] == raw["tokenizer"]["digest"]
    carried = loaded.tokenizer.state_dict()
    assert all(torch.equal(carried[name], value) for name, value in tokenizer.state_dict().items())


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
    next(iter(weights.values())).add_(1)
    checkpoint.save(tmp_path / "generator.pt", content)
    with pytest.raises(CheckpointError, match=str(tmp_path)) as refused:
        registry.load(tmp_path / "generator.pt")
    assert refused.value.exit_code == 3
    assert ("tokenizer" in refused.value.message) == (part == "tokenizer")


def test_files_of_another_kind_family_or_tokenizer_are_refused(
    content: dict[str, Any], path: Path, tiny_tokenizer_file: Path
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
        checkpoint.save(path, {**content, **changes})
        with pytest.raises(CheckpointError, match=token):
            registry.load(path)


@pytest.mark.parametrize(("option", "modes"), [("default", ["default"]), ("graphs", ["reduce-overhead"]), ("off", [])])
def test_a_compiled_network_draws_the_same_samples(
    option: str, modes: list[str], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced as a whole, with no code generated: a second, not minutes."""
    original, used = torch.compile, list[str]()

    def traced(network: Any, *, mode: str) -> Any:
        used.append(mode)
        return original(network, backend="eager", fullgraph=True)

    monkeypatch.setattr(torch, "compile", traced)
    loaded, args = registry.load(path), (range(3), range(3), CFG_1)
    expected = sample(loaded.generator, *args)
    loaded.to(CPU, option)
    assert torch.equal(sample(loaded.generator, *args), expected)
    assert used == modes

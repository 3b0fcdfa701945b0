"""Recipes: the shipped ones, overrides, refusals with their hints, and digests."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import ValidationError

from rdpm_cli import recipes
from rdpm_cli.errors import EXIT_USAGE, RecipeError
from rdpm_cli.generator.config import RDPMConfig, ResGenConfig
from rdpm_cli.generator.registry import FAMILIES
from rdpm_cli.recipes import Recipe, load_recipe
from rdpm_cli.schema import Section, dump_yaml, parse_yaml
from rdpm_cli.tokenizer.config import TokenizerConfig
from rdpm_cli.training.config import TrainConfig, binding

SMALL = """
seed: 3
tokenizer:
  autoencoder: {resolution: 16, width: 8, multipliers: [1, 2], groups: 4, channels: 4}
  quantizer: {codes: 16, steps: 2}
  train: {batch: 16, steps: 10}
"""


def write(folder: Path, text: str, name: str = "mine") -> str:
    path = folder / f"{name}.yaml"
    path.write_text(text)
    return str(path)


def tokenizer(name_or_file: str, *overrides: str) -> TokenizerConfig:
    cfg = load_recipe(name_or_file, overrides, "tokenizer").tokenizer
    assert cfg is not None
    return cfg


def refusal(name_or_file: str, *overrides: str, section: str = "") -> RecipeError:
    """The RecipeError that loading raises; every one of them ends a command with exit code 2."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(name_or_file, overrides, section)
    assert caught.value.exit_code == EXIT_USAGE == 2
    return caught.value


@pytest.mark.parametrize("name", recipes.recipe_names())
def test_every_shipped_recipe_loads_and_opens_with_its_command(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.tokenizer or recipe.generator or recipe.judge
    assert recipes.find_recipe(name).read_text().startswith("# rdpm ")


@pytest.mark.parametrize(("depth", "width"), [(12, 768), (16, 1024), (20, 1280)])
def test_paper_recipes_hold_the_numbers_of_the_paper(depth: int, width: int) -> None:
    generator = load_recipe(f"imagenet256-d{depth}", section="generator").generator
    assert isinstance(generator, RDPMConfig)
    assert (generator.network.depth, generator.network.hidden, generator.network.heads or depth) == (
        depth,
        width,
        depth,
    )
    train = generator.train
    assert (train.batch, train.lr, train.betas, train.weight_decay) == (1024, 4e-4, (0.9, 0.95), 0.03)
    assert (train.warmup_steps, train.clip, train.ema, train.precision) == (1000, 1.0, 0.9999, "bf16")
    assert (train.lr_decay, generator.objective.noise, generator.network.head) == ("constant", "fresh", "linear")


@pytest.mark.parametrize("key", ["tokenizer.train.lr", "train.lr"], ids=["full", "short"])
def test_override_replaces_a_value(key: str) -> None:
    assert tokenizer("digits", f"{key}=0.5").train.lr == 0.5
    assert tokenizer("digits", f"{key}=0.5", "train.lr=0.25").train.lr == 0.25  # the last one wins


def test_short_keys_belong_to_the_section_of_the_command_and_full_keys_reach_others() -> None:
    recipe, plain = (
        load_recipe("digits", ["train.steps=7", "seed=4", "judge.width=8"], "tokenizer"),
        load_recipe("digits"),
    )
    assert recipe.tokenizer
    assert recipe.judge
    assert (recipe.tokenizer.train.steps, recipe.seed, recipe.judge.width) == (7, 4, 8)
    assert recipe.generator == plain.generator


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.lr=1e-4", 1e-4),  # YAML 1.1 reads this as a string
        ("train.betas=[0.1, 0.2]", (0.1, 0.2)), ("flip=true", True), ("quantizer.bias=none", "none"),
        ("train.micro_batch=null", None), ("train.micro_batch=~", None),
        # YAML 1.2: no octal numbers without 0o, no base 60; texts keep their meaning where a field is true or false
        ("train.steps=08", 8), ("train.steps=0123", 123), ("train.steps=0o17", 15), ("train.steps=0x1F", 31),
        ("train.steps=1_000", 1000), ("train.steps=1e3", 1000), ("train.lr=.5", 0.5), ("train.lr=007.5e-1", 0.75),
        ("flip=off", False), ("train.compile=on", True), ("train.compile=no", False),
    ],
)  # fmt: skip
def test_override_values_take_the_type_of_their_field(override: str, expected: Any) -> None:
    value: Any = tokenizer("digits", override)
    for name in override.partition("=")[0].split("."):
        value = getattr(value, name)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    "override",
    [
        "train.lr=fast", "train.steps=1:30", "train.steps=0b11", "train.lr=1e400", "train.lr=-.INF",
        "train.lr=-1", "train.lr=.nan", "train.lr=.inf", "train.lr=", "train.lr=[", "train.steps=1.5",
        "train.steps=0", "train.steps", "quantizer.bias=half", "quantizer.codes=100000", "train.micro_batch=20",
    ],
)  # fmt: skip
def test_values_that_do_not_fit_are_refused_by_name(override: str) -> None:
    assert override.partition("=")[0] in refusal("digits", override, section="tokenizer").message


def test_override_of_an_empty_section_fills_it(tmp_path: Path) -> None:
    assert tokenizer(write(tmp_path, "tokenizer:\n"), "train.steps=5").train.steps == 5  # without a value it is null


@pytest.mark.parametrize("section", ["tokenizer", "generator"])
@pytest.mark.parametrize(
    ("override", "nearest"), [("train.stps=5", "train.steps"), ("lr=1", "train.lr"), ("precison=1", "train.precision")]
)
def test_unknown_key_in_an_override_names_the_nearest_of_the_section(section: str, override: str, nearest: str) -> None:
    error = refusal("digits", override, section=section)
    assert f"'{section}.{override.partition('=')[0]}'" in error.message
    assert f"'{section}.{nearest}'" in error.hint


@pytest.mark.parametrize(
    ("old", "new", "key", "nearest"),
    [
        ("codes: 16", "code: 16", "tokenizer.quantizer.code", "tokenizer.quantizer.codes"),
        ("seed: 3", "sed: 3", "sed", "seed"),
    ],
)
def test_unknown_key_in_a_file_names_the_nearest(tmp_path: Path, old: str, new: str, key: str, nearest: str) -> None:
    path = write(tmp_path, SMALL.replace(old, new))
    error = refusal(path)
    assert f"'{key}'" in error.message
    assert path in error.message
    assert f"'{nearest}'" in error.hint


@pytest.mark.parametrize(
    "text",
    [
        "", "- 1\n- 2\n", "just words", "a: [1\n", "a: !!python/object:os.system {}\n", "seed: 3\nseed: 4\n",
        "seed: !!bool x", "seed: !!timestamp x", "[" * 5000,
    ],
)  # fmt: skip
def test_files_that_hold_no_recipe_are_refused(tmp_path: Path, text: str) -> None:
    assert "mine.yaml" in refusal(write(tmp_path, text)).message


def test_an_unreadable_absent_or_unknown_recipe_is_named_with_the_shipped_ones(tmp_path: Path) -> None:
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00seed")
    (tmp_path / "folder.yaml").mkdir()
    assert "bytes.yaml" in refusal(str(tmp_path / "bytes.yaml")).message
    for typed in (str(tmp_path / "folder.yaml"), str(tmp_path / "nowhere.yaml"), str(tmp_path), "digit"):
        error = refusal(typed)
        assert typed in error.message
        assert all(name in error.hint for name in recipes.recipe_names())


@pytest.mark.parametrize("overrides", [[], ["train.steps=5"]], ids=["plain", "with-override"])
@pytest.mark.parametrize(
    ("name", "section"), [("imagenet256-d16", "tokenizer"), ("imagenet256-tokenizer", "generator")]
)
def test_recipe_without_the_section_lists_those_that_have_it(name: str, section: str, overrides: list[str]) -> None:
    error = refusal(name, *overrides, section=section)
    assert name in error.message
    assert section in error.message
    assert "digits" in error.hint
    assert name not in error.hint.split(", ")
    assert any(name.endswith("-plus") for name in error.hint.split(", "))  # they inherit it


def test_extends_merges_and_the_child_wins(tmp_path: Path) -> None:
    parent = write(tmp_path, SMALL, "parent")
    child = write(tmp_path, f"extends: {parent}\ntokenizer:\n  quantizer: {{steps: 5}}\n  flip: false\n", "child")
    recipe, base = load_recipe(child), load_recipe(parent)
    assert recipe.tokenizer
    assert base.tokenizer
    quantizer = base.tokenizer.quantizer.model_copy(update={"steps": 5})
    assert recipe.tokenizer == base.tokenizer.model_copy(update={"quantizer": quantizer, "flip": False})
    assert (recipe.name, recipe.seed) == ("child", 3)


def test_extends_takes_a_shipped_name_or_a_file_next_to_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = load_recipe(write(tmp_path, "extends: digits\nseed: 9\n"))
    assert child == load_recipe("digits").model_copy(update={"seed": 9, "name": "mine"})
    write(tmp_path, SMALL, "parent")
    neighbour = write(tmp_path, "extends: parent.yaml\nseed: 8\n", "child")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert load_recipe(neighbour).seed == 8


def test_extends_in_a_circle_is_refused(tmp_path: Path) -> None:
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text(f"extends: {two}\n")
    two.write_text(f"extends: {one}\n")
    assert str(one) in refusal(str(one)).message
    assert "digitz" in refusal(write(tmp_path, "extends: digitz\n")).message


@pytest.mark.parametrize("length", [{}, {"steps": 1, "epochs": 1.0}], ids=["neither", "both"])
def test_length_is_given_exactly_once(length: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="exactly one of steps and epochs"):
        TrainConfig(**length)


@pytest.mark.parametrize(("override", "steps", "epochs"), [("train.steps=7", 7, None), ("train.epochs=2", None, 2.0)])
@pytest.mark.parametrize("recipe", ["digits", "imagenet256-tokenizer"])  # one counts steps, the other epochs
def test_an_override_or_a_child_may_set_the_other_length(
    recipe: str, override: str, steps: int | None, epochs: float | None, tmp_path: Path
) -> None:
    child = write(tmp_path, f"extends: {recipe}\ntokenizer: {{train: {{{override[6:].replace('=', ': ')}}}}}\n")
    for train in (tokenizer(recipe, override).train, tokenizer(child).train):
        assert (train.steps, train.epochs) == (steps, epochs)


@pytest.mark.parametrize(("length", "steps"), [({"steps": 12}, 12), ({"epochs": 2}, 20), ({"epochs": 0.001}, 1)])
def test_epochs_become_steps_of_the_data(length: dict[str, Any], steps: int) -> None:
    train = TrainConfig(batch=16, warmup_steps=3, warmup_epochs=0.5, **length)
    assert (train.total_steps(images=160), train.warmup(images=160)) == (steps, 8)


def undescribed(section: Any) -> list[str]:
    """The fields of a section, and of those in it, that have neither a description nor a section as their value."""
    names: list[str] = []
    for name, field in section.model_fields.items():
        annotations = (field.annotation, *get_args(field.annotation))
        inner = [part for part in annotations if isinstance(part, type) and issubclass(part, Section)]
        names += undescribed(inner[0]) if inner else [name] * (not field.description)
    return names


@pytest.mark.parametrize("section", [Recipe, *(family.config for family in FAMILIES.values())])
def test_every_value_has_a_description(section: type[Section]) -> None:
    assert undescribed(section) == []


@pytest.mark.parametrize(("name", "config"), [("digits", RDPMConfig), ("resgen-digits", ResGenConfig)])
def test_a_generator_section_takes_the_config_of_its_family_and_a_dump_keeps_its_fields(
    name: str, config: type
) -> None:
    recipe = load_recipe(name)
    assert recipe.generator
    assert type(recipe.generator) is config
    assert recipe.model_dump()["generator"] == recipe.generator.model_dump()
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


def test_an_unknown_family_or_a_key_of_another_one_is_refused() -> None:
    assert all(name in refusal("digits", "generator.family=gan").message for name in FAMILIES)
    assert "generator.network.components" in refusal("digits", "generator.network.components=1").message


@pytest.mark.parametrize(("name", "rate"), [("digits", 0), ("resgen-digits", 0), ("digits", 1)])
def test_default_guidance_of_a_training_without_null_class_is_refused(name: str, rate: int) -> None:
    override = f"objective.label_drop={rate}"
    with pytest.raises(RecipeError, match="label_drop"):
        load_recipe(name, [override, "sampling.cfg=1.5"], "generator")
    assert load_recipe(name, [override, "sampling.cfg=0"], "generator").generator is not None


def test_digest_changes_with_every_value() -> None:
    changes = ["seed=1", "views=3", "tokenizer.train.lr=0.5", "generator.network.depth=2", "judge.width=8"]
    digests = {load_recipe("digits", [change]).digest() for change in changes}
    assert len(digests | {load_recipe("digits").digest()}) == len(changes) + 1


def test_a_recipe_digests_alike_in_every_process() -> None:
    code = "from rdpm_cli import recipes; print(recipes.load_recipe('digits').digest())"
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [load_recipe("digits").digest()]


# First digits; runs and demos record them, so that a change would separate them from their recipes.
DIGESTS = {"digits": "e717e8591959", "resgen-digits": "717ed09f2bd8", "imagenet256-d16": "5d7ffe978e9b"}
DIGESTS |= {"imagenet256-tokenizer": "f7eb8f4acccc", "judge": "7a94076fd230", "cifar10-smoke": "c7799b3f7b34"}
DIGESTS |= {"imagenet256-d12": "b813663ac0ff", "imagenet256-d12-plus": "909c80249eac"}
DIGESTS |= {"imagenet256-d16-plus": "687fa5e04311", "imagenet256-d20": "4b98e9daadcc"}
DIGESTS |= {"imagenet256-d20-plus": "1d43e2360713", "imagenet256-tokenizer-plus": "dd8fe58b2f38"}
DIGESTS |= {"imagenet256-resgen-rvq4": "c0affc397392", "imagenet256-resgen-rvq8": "0e292d8b76aa"}
DIGESTS |= {"imagenet256-resgen-rvq16": "5e6818b27297", "resgen-cifar10": "388eeb3b83be"}


@pytest.mark.parametrize(
    "text", ["08", "1e-4", "0o17", "off", "no", "2024-01-01", "1:30", "1_000", "~", "<<", ".inf", ""]
)
def test_a_text_that_looks_like_another_value_is_printed_so_that_it_stays_a_text(text: str) -> None:
    assert parse_yaml(dump_yaml({"name": text}), "here") == {"name": text}
    assert yaml.safe_load(dump_yaml({"name": text})) == {"name": text}, "by YAML 1.1"


def test_yaml_1_2_has_no_dates_no_base_60_and_two_booleans() -> None:
    values = parse_yaml("[2024-01-01, 1:30, off, yes, True, 010, -0, 1e3, .nan]", "here")
    assert values[:8] == ["2024-01-01", "1:30", "off", "yes", True, 10, 0, 1000.0]
    assert values[8] != values[8]
    assert parse_yaml("a: &a {x: 1}\nb: {<<: *a, y: 2}", "here")["b"] == {"x": 1, "y": 2}


def test_digests_do_not_change() -> None:
    assert {name: load_recipe(name).digest()[:12] for name in DIGESTS} == DIGESTS


def test_an_unfinished_run_may_change_its_learning_rate_and_a_finished_one_is_bound_to_it() -> None:
    train = {"lr": 1.0, "clip": 0.0, "keep": 3, "batch": 16}
    settings = {"recipe": {"tokenizer": {"codebook_alarm": 0.5, "train": train}}}
    assert binding(settings)["recipe"]["tokenizer"] == {"train": {"batch": 16}}
    finished = binding(settings, finished=True)["recipe"]["tokenizer"]
    assert finished == {"train": {"lr": 1.0, "clip": 0.0, "batch": 16}}

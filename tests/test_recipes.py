"""Recipes: the shipped ones, overrides, refusals with their hints, and digests."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from rdpm_cli import recipes
from rdpm_cli.errors import EXIT_USAGE, RecipeError
from rdpm_cli.generator.config import RDPMConfig, ResGenConfig
from rdpm_cli.generator.registry import FAMILIES
from rdpm_cli.recipes import Recipe, load_recipe
from rdpm_cli.schema import Section, inner_section, leaf_keys
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


# ---- shipped recipes ----------------------------------------------------------------------------------------------


def test_recipes_ship() -> None:
    names = recipes.recipe_names()
    assert {"digits", "cifar10-smoke", "imagenet256-tokenizer", "imagenet256-d16"} <= set(names)
    assert names == sorted(names)


@pytest.mark.parametrize("name", recipes.recipe_names())
def test_every_shipped_recipe_loads(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.tokenizer or recipe.generator or recipe.judge


@pytest.mark.parametrize("name", recipes.recipe_names())
def test_every_shipped_recipe_opens_with_its_command(name: str) -> None:
    head = recipes.find_recipe(name).read_text().splitlines()[0]
    assert head.startswith("# rdpm ")


@pytest.mark.parametrize(("depth", "width"), [(12, 768), (16, 1024), (20, 1280)])
def test_paper_recipes_hold_the_numbers_of_the_paper(depth: int, width: int) -> None:
    generator = load_recipe(f"imagenet256-d{depth}", section="generator").generator
    assert isinstance(generator, RDPMConfig)
    assert (generator.network.depth, generator.network.hidden, generator.network.head_count) == (depth, width, depth)
    train = generator.train
    assert (train.batch, train.lr, train.betas, train.weight_decay) == (1024, 4e-4, (0.9, 0.95), 0.03)
    assert (train.warmup_steps, train.clip, train.ema, train.precision) == (1000, 1.0, 0.9999, "bf16")
    assert (train.lr_decay, generator.objective.noise, generator.network.head) == ("constant", "cached", "linear")


def test_digits_is_the_recipe_of_the_demo() -> None:
    recipe = load_recipe("digits")
    assert recipe.tokenizer
    assert recipe.generator
    assert recipe.judge
    assert recipe.tokenizer.autoencoder.grid == (4, 4)


# ---- overrides ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["tokenizer.train.lr", "train.lr"], ids=["full", "short"])
def test_override_replaces_a_value(key: str) -> None:
    assert tokenizer("digits", f"{key}=0.5").train.lr == 0.5
    assert tokenizer("digits").train.lr != 0.5


def test_short_keys_belong_to_the_section_of_the_command() -> None:
    recipe = load_recipe("digits", ["train.steps=7"], "tokenizer")
    plain = load_recipe("digits")
    assert recipe.tokenizer
    assert recipe.tokenizer.train.steps == 7
    assert recipe.generator == plain.generator
    assert recipe.judge == plain.judge


def test_full_keys_reach_other_sections() -> None:
    recipe = load_recipe("digits", ["seed=4", "generator.train.steps=7"], "tokenizer")
    assert recipe.seed == 4
    assert recipe.generator
    assert recipe.generator.train.steps == 7


def test_later_overrides_win() -> None:
    assert tokenizer("digits", "train.lr=0.5", "train.lr=0.25").train.lr == 0.25


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.lr=1e-4", 1e-4),  # YAML 1.1 reads this as a string
        ("train.lr=2.5E-3", 2.5e-3),
        ("train.betas=[0.1, 0.2]", (0.1, 0.2)),
        ("flip=true", True),
        ("quantizer.bias=none", "none"),
        ("train.micro_batch=null", None),
    ],
)
def test_override_values_take_the_type_of_their_field(override: str, expected: Any) -> None:
    value: Any = tokenizer("digits", override)
    for name in override.partition("=")[0].split("."):
        value = getattr(value, name)
    assert value == expected
    assert type(value) is type(expected)


def test_numbers_in_exponent_form_are_numbers_in_a_file_too(tmp_path: Path) -> None:
    path = write(tmp_path, SMALL.replace("steps: 10}", "steps: 10, lr: 1e-4}"))
    assert tokenizer(path).train.lr == 1e-4


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("train.lr=fast", "lr"),
        ("train.lr=-1", "lr"),
        ("train.lr=.nan", "lr"),
        ("train.lr=.inf", "lr"),
        ("train.steps=1.5", "steps"),
        ("train.steps=0", "steps"),
        ("train.lr=", "lr"),
        ("quantizer.bias=half", "bias"),
        ("quantizer.codes=100000", "codes"),
        ("train.micro_batch=20", "micro_batch"),
        ("autoencoder.resolution=15", "autoencoder"),
        ("train.lr=[", "train.lr"),
    ],
)
def test_values_that_do_not_fit_are_refused_by_name(override: str, key: str) -> None:
    assert key in refusal("digits", override, section="tokenizer").message


def test_override_without_equals_sign_is_refused() -> None:
    assert "train.steps" in refusal("digits", "train.steps", section="tokenizer").message


def test_override_of_an_empty_section_fills_it(tmp_path: Path) -> None:
    """`tokenizer:` without a value is null in YAML."""
    path = write(tmp_path, "tokenizer:\n")
    assert tokenizer(path, "train.steps=5").train.steps == 5


# ---- unknown keys ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("tokenizer.train.step=5", "tokenizer.train.steps"),
        ("train.stps=5", "train.steps"),
        ("tokenizer.quantiser.codes=5", "tokenizer.quantizer.codes"),
        ("sede=1", "seed"),
    ],
)
def test_unknown_key_in_an_override_names_the_nearest(override: str, nearest: str) -> None:
    error = refusal("digits", override, section="tokenizer")
    assert override.partition("=")[0] in error.message
    assert f"'{nearest}'" in error.hint


@pytest.mark.parametrize("key", ["lr", "precison", "optimizer.weight_decay"])
@pytest.mark.parametrize("section", ["tokenizer", "generator"])
def test_right_name_in_the_wrong_place_is_found_in_the_section_of_the_command(section: str, key: str) -> None:
    """A hint into another section would change the wrong thing."""
    hint = refusal("digits", f"{key}=1", section=section).hint
    nearest = {"lr": "lr", "precison": "precision", "optimizer.weight_decay": "weight_decay"}[key]
    assert any(f"'{prefix}train.{nearest}'" in hint for prefix in ("", f"{section}."))


@pytest.mark.parametrize(
    ("old", "new", "key", "nearest"),
    [
        ("codes: 16", "code: 16", "tokenizer.quantizer.code", "tokenizer.quantizer.codes"),
        ("batch: 16", "bacth: 16", "tokenizer.train.bacth", "tokenizer.train.batch"),
        ("seed: 3", "sed: 3", "sed", "seed"),
    ],
)
def test_unknown_key_in_a_file_names_the_nearest(tmp_path: Path, old: str, new: str, key: str, nearest: str) -> None:
    path = write(tmp_path, SMALL.replace(old, new))
    error = refusal(path)
    assert f"'{key}'" in error.message
    assert path in error.message
    assert f"'{nearest}'" in error.hint


def test_a_key_without_neighbours_gets_a_hint_too() -> None:
    assert refusal("digits", "xyzzyqqq=1").hint


# ---- files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["seed: 1\nseed: 2\n", "tokenizer:\n  train: {steps: 1, batch: 2, steps: 3}\n"], ids=["block", "flow"]
)
def test_key_written_twice_is_refused(tmp_path: Path, text: str) -> None:
    error = refusal(write(tmp_path, text))
    assert "mine.yaml" in error.message
    assert any(key in error.message for key in ("'seed'", "'steps'"))


@pytest.mark.parametrize("text", ["", "- 1\n- 2\n", "just words", "a: [1\n", "a: !!python/object:os.system {}\n"])
def test_files_without_keys_are_refused(tmp_path: Path, text: str) -> None:
    assert "mine.yaml" in refusal(write(tmp_path, text)).message


def test_file_of_bytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xff\xfe\x00seed")
    assert "mine.yaml" in refusal(str(path)).message


def test_folder_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    assert str(tmp_path) in refusal(str(tmp_path)).message


def test_missing_file_is_named_with_the_shipped_recipes(tmp_path: Path) -> None:
    path = str(tmp_path / "nowhere.yaml")
    error = refusal(path)
    assert path in error.message
    assert "digits" in error.hint


@pytest.mark.parametrize(
    ("typed", "nearest"),
    [("digit", "digits"), ("imagenet256-d61", "imagenet256-d16"), ("cifar10-smok", "cifar10-smoke")],
)
def test_unknown_recipe_names_the_nearest_and_all(typed: str, nearest: str) -> None:
    error = refusal(typed)
    assert f"'{typed}'" in error.message
    assert f"'{nearest}'" in error.hint
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
    assert name not in error.hint.replace(f"{name}-plus", "").split(", ")


def test_recipes_that_inherit_the_section_are_listed() -> None:
    hint = refusal("imagenet256-d16", section="tokenizer").hint
    assert "imagenet256-tokenizer-plus" in hint


# ---- extends -----------------------------------------------------------------------------------------------------


def test_extends_merges_and_the_child_wins(tmp_path: Path) -> None:
    parent = write(tmp_path, SMALL, "parent")
    child = write(tmp_path, f"extends: {parent}\ntokenizer:\n  quantizer: {{steps: 5}}\n  flip: false\n", "child")
    recipe, base = load_recipe(child), load_recipe(parent)
    assert recipe.name == "child"
    assert recipe.tokenizer
    assert base.tokenizer
    assert recipe.tokenizer.quantizer == base.tokenizer.quantizer.model_copy(update={"steps": 5})
    assert recipe.tokenizer.flip is False
    assert recipe.tokenizer.train == base.tokenizer.train
    assert recipe.seed == 3


def test_extends_takes_a_shipped_name(tmp_path: Path) -> None:
    child = load_recipe(write(tmp_path, "extends: digits\nseed: 9\n"))
    assert child == load_recipe("digits").model_copy(update={"seed": 9, "name": "mine"})


def test_extends_is_found_next_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In any current folder."""
    write(tmp_path, SMALL, "parent")
    child = write(tmp_path, "extends: parent.yaml\nseed: 9\n", "child")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert load_recipe(child).seed == 9


def test_extends_of_nothing_is_refused(tmp_path: Path) -> None:
    assert "digitz" in refusal(write(tmp_path, "extends: digitz\n")).message


def test_extends_in_a_circle_is_refused(tmp_path: Path) -> None:
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text(f"extends: {two}\n")
    two.write_text(f"extends: {one}\n")
    assert str(one) in refusal(str(one)).message


# ---- lengths -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [{}, {"steps": 1, "epochs": 1.0}], ids=["neither", "both"])
def test_length_is_given_exactly_once(length: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="exactly one of steps and epochs"):
        TrainConfig(**length)


@pytest.mark.parametrize(("override", "steps", "epochs"), [("train.steps=7", 7, None), ("train.epochs=2", None, 2.0)])
@pytest.mark.parametrize("recipe", ["digits", "imagenet256-tokenizer"])  # one counts steps, the other epochs
def test_an_override_of_one_length_replaces_the_other(
    recipe: str, override: str, steps: int | None, epochs: float | None
) -> None:
    train = tokenizer(recipe, override).train
    assert (train.steps, train.epochs) == (steps, epochs)


def test_a_child_may_set_the_other_length_and_drop_its_parents(tmp_path: Path) -> None:
    child = write(tmp_path, "extends: digits\ntokenizer: {train: {epochs: 2, steps: null}}\n")
    train = tokenizer(child).train
    assert (train.steps, train.epochs) == (None, 2.0)


@pytest.mark.parametrize(
    ("length", "steps"), [({"steps": 12}, 12), ({"epochs": 2}, 20), ({"epochs": 0.5}, 5), ({"epochs": 0.001}, 1)]
)
def test_epochs_become_steps_of_the_data(length: dict[str, Any], steps: int) -> None:
    assert TrainConfig(batch=16, **length).total_steps(images=160) == steps


def test_warmup_adds_steps_and_epochs() -> None:
    assert TrainConfig(batch=10, steps=1, warmup_steps=3, warmup_epochs=0.5).warmup(images=100) == 8


# ---- one frozen source -------------------------------------------------------------------------------


def test_recipes_are_frozen() -> None:
    recipe = load_recipe("digits")
    with pytest.raises(ValidationError, match="frozen"):
        recipe.seed = 1  # type: ignore[misc]
    assert recipe.tokenizer
    with pytest.raises(ValidationError, match="frozen"):
        recipe.tokenizer.train.batch = 1  # type: ignore[misc]


def sections(section: type[Section]) -> list[type[Section]]:
    """A section and those in it."""
    inner = [inner_section(field.annotation) for field in section.model_fields.values()]
    return [section, *(deeper for child in inner if child for deeper in sections(child))]


CONFIGS: list[type[Section]] = [Recipe, *(family.config for family in FAMILIES.values())]


@pytest.mark.parametrize(
    "section", list(dict.fromkeys(part for cfg in CONFIGS for part in sections(cfg))), ids=lambda s: s.__name__
)
def test_every_value_has_a_description(section: type[Section]) -> None:
    fields = section.model_fields.items()
    assert [name for name, field in fields if not field.description and not inner_section(field.annotation)] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_recipe_keys_are_the_values_of_the_schema(family: str) -> None:
    keys = recipes.recipe_keys(family)
    assert {"seed", "tokenizer.quantizer.codes", "generator.network.depth", "judge.train.lr"} <= set(keys)
    assert {key.removeprefix("generator.") for key in keys if key.startswith("generator.")} == set(
        leaf_keys(FAMILIES[family].config)
    )
    assert not {"tokenizer", "generator"} & set(keys)
    assert len(keys) == len(set(keys))


# ---- families --------------------------------------------------------------------------------------------------------


def test_a_generator_section_takes_the_config_of_its_family() -> None:
    assert type(load_recipe("digits").generator) is RDPMConfig
    assert type(load_recipe("resgen-digits").generator) is ResGenConfig


@pytest.mark.parametrize("name", ["digits", "resgen-digits"])
def test_a_dump_keeps_the_fields_of_the_family(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.generator
    assert recipe.model_dump()["generator"] == recipe.generator.model_dump()
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


def test_an_unknown_family_is_refused() -> None:
    error = refusal("digits", "generator.family=gan")
    assert "generator" in error.message
    assert all(name in error.message for name in FAMILIES)


def test_a_key_of_another_family_is_unknown(tmp_path: Path) -> None:
    only_resgen = sorted(set(recipes.recipe_keys("resgen")) - set(recipes.recipe_keys("rdpm")))[0]
    assert only_resgen in refusal("digits", f"{only_resgen}=1").message
    path = write(tmp_path, "extends: resgen-digits\ngenerator: {network: {dept: 2}}\n")
    error = refusal(path)
    assert "generator.network.dept" in error.message
    assert "generator.network.depth" in error.hint


def test_an_error_in_a_generator_names_the_whole_key() -> None:
    assert "generator.network.depth" in refusal("resgen-digits", "network.depth=0", section="generator").message


# ---- digests ---------------------------------------------------------------------------------------------------------


def test_digest_is_stable_and_changes_with_every_value() -> None:
    assert load_recipe("digits").digest() == load_recipe("digits").digest()
    changes = ["seed=1", "views=3", "tokenizer.train.lr=0.5", "generator.network.depth=2", "judge.width=8"]
    digests = {load_recipe("digits", [change]).digest() for change in changes}
    assert len(digests | {load_recipe("digits").digest()}) == len(changes) + 1


def test_digest_does_not_depend_on_how_the_recipe_is_written(tmp_path: Path) -> None:
    written = load_recipe(write(tmp_path, SMALL))
    reordered = SMALL.strip().split("\n")
    other = load_recipe(write(tmp_path, "\n".join(["# a comment", *reordered[1:], reordered[0], "views: 1"])))
    assert other.digest() == written.digest()


def test_a_recipe_digests_alike_in_every_process() -> None:
    code = "from rdpm_cli import recipes; print(recipes.load_recipe('digits').digest())"
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [load_recipe("digits").digest()]


DIGESTS = {  # first digits; runs and demos record them, so that a change would separate them from their recipes
    "digits": "e717e8591959",
    "resgen-digits": "717ed09f2bd8",
    "imagenet256-d16": "2687f0e83993",
    "imagenet256-tokenizer": "f7eb8f4acccc",
    "judge": "7a94076fd230",
}


def test_digests_do_not_change() -> None:
    assert {name: load_recipe(name).digest()[:12] for name in DIGESTS} == DIGESTS


def test_an_unfinished_run_may_change_its_learning_rate_and_a_finished_one_is_bound_to_it() -> None:
    train = {"lr": 1.0, "clip": 0.0, "keep": 3, "batch": 16}
    settings = {"recipe": {"tokenizer": {"codebook_alarm": 0.5, "train": train}}}
    assert binding(settings)["recipe"]["tokenizer"] == {"train": {"batch": 16}}
    finished = binding(settings, finished=True)["recipe"]["tokenizer"]
    assert finished == {"train": {"lr": 1.0, "clip": 0.0, "batch": 16}}

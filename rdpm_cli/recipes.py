"""Recipes: YAML files with `extends`, `key=value` overrides, and the one schema that they resolve to."""

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, SerializeAsAny, field_validator

from rdpm_cli import files
from rdpm_cli.errors import RecipeError
from rdpm_cli.evaluation.judge import JudgeConfig
from rdpm_cli.generator.config import GeneratorConfig
from rdpm_cli.generator.registry import FAMILIES
from rdpm_cli.schema import Section, leaf_keys, nearest_key, parse_yaml, recipe_folder, recipe_names, validate
from rdpm_cli.tokenizer.config import TokenizerConfig

__all__ = ["Recipe", "find_recipe", "load_recipe", "recipe_folder", "recipe_keys", "recipe_names", "to_yaml"]

DEFAULT_FAMILY = "rdpm"
EITHER_LENGTH = {"steps": "epochs", "epochs": "steps"}  # of a training: one replaces the other


class Recipe(Section):
    """Everything from images to samples. A recipe may hold only the sections that its commands need."""

    name: str = Field("", description="default: the file's name")
    seed: int = Field(0, ge=0, lt=2**63, description="of training and of the store's noise")
    classes: int = Field(1000, gt=0, description="only for `rdpm inspect`; training counts the store's classes")
    views: int = Field(1, ge=1, description="noise draws an image that the demo keeps in its store")
    tokenizer: TokenizerConfig | None = Field(None, description="for train-tokenizer")
    # Without SerializeAsAny a dump would hold only the fields that all families share.
    generator: SerializeAsAny[GeneratorConfig] | None = Field(None, description="for train-gen")
    judge: JudgeConfig | None = Field(None, description="for eval judge and the demo")

    @field_validator("generator", mode="before")
    @classmethod
    def _of_its_family(cls, value: Any) -> Any:
        """A plain generator section as the config of the family that it names."""
        if not isinstance(value, Mapping):
            return value
        family = value.get("family", DEFAULT_FAMILY)
        if family not in FAMILIES:
            raise ValueError(f"family is one of {', '.join(FAMILIES)}")
        return FAMILIES[family].config.model_validate(value)

    def digest(self) -> str:
        """sha256 of the resolved recipe."""
        return files.digest(self.model_dump(mode="json"))


def recipe_keys(family: str = DEFAULT_FAMILY) -> list[str]:
    """Every dotted key of a recipe whose generator is of this family."""
    config = FAMILIES.get(family, FAMILIES[DEFAULT_FAMILY]).config
    shared = [key for key in leaf_keys(Recipe) if not key.startswith("generator.")]
    return [*shared, *leaf_keys(config, "generator.")]


def find_recipe(name_or_file: str) -> Path:
    """A shipped recipe by name, or a YAML file by path. Raises RecipeError with near names."""
    path = Path(name_or_file)
    if path.suffix in {".yaml", ".yml"} or os.sep in name_or_file:
        if not path.is_file():
            raise RecipeError(f"recipe file {path} does not exist", f"shipped recipes: {', '.join(recipe_names())}")
        return path
    if name_or_file not in recipe_names():
        near = difflib.get_close_matches(name_or_file, recipe_names(), 1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise RecipeError(f"no recipe named '{name_or_file}'", f"{hint}shipped recipes: {', '.join(recipe_names())}")
    return recipe_folder() / f"{name_or_file}.yaml"


def load_recipe(name_or_file: str, overrides: Sequence[str] = (), section: str = "") -> Recipe:
    """Resolve a recipe: what it extends, the file, then the overrides in order. Raises RecipeError.

    section: one that the recipe must have, and to which short keys belong: `load_recipe("digits", ["train.steps=10"],
    "tokenizer")` sets tokenizer.train.steps.
    """
    path = find_recipe(name_or_file)
    raw = _read(path)
    raw.setdefault("name", path.stem)
    absent = section not in raw  # looked at first, since an override makes the section that it sets a key of
    for text in overrides:
        _override(raw, text, section)
    if section and (absent or raw[section] is None):
        able = [name for name in recipe_names() if section in _read(recipe_folder() / f"{name}.yaml")]
        raise RecipeError(f"recipe '{raw['name']}' has no {section} section", f"recipes that do: {', '.join(able)}")
    origin = f"{path} with {' '.join(overrides)}" if overrides else str(path)
    return validate(Recipe, raw, origin, _with_short(_valid_keys(raw), section))


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe as a recipe file: load_recipe of it gives an equal one, of the same digest."""
    values = {key: value for key, value in recipe.model_dump(mode="json").items() if value is not None}
    return f"# digest {recipe.digest()}\n{yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=110)}"


def _read(path: Path, extended_by: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The plain values of a recipe file, merged into those of the recipe that it extends."""
    if path in extended_by:
        raise RecipeError(f"{path} extends itself", "name another recipe in its `extends`, or leave it out")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read: {error}", "a recipe is a text file of YAML in UTF-8") from error
    raw = parse_yaml(text, str(path))
    if not isinstance(raw, dict):
        raise RecipeError(f"{path} holds no keys", "start from a shipped recipe")
    parent = raw.pop("extends", None)
    if parent is None:
        return raw
    neighbour = path.parent / str(parent)
    base = _read(neighbour if neighbour.is_file() else find_recipe(str(parent)), (*extended_by, path))
    base.pop("name", None)
    return _merge(base, raw)


def _merge(base: dict[str, Any], changes: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, Mapping):
            value = _merge(old, value, f"{path}.{key}")
        _set(merged, path, key, value)
    return merged


def _set(section: dict[str, Any], path: str, key: str, value: Any) -> None:
    """section[key] = value. path: of the section; in a train section a length replaces the length in the other unit."""
    section[key] = value
    if path.endswith("train") and key in EITHER_LENGTH and value is not None:
        section.pop(EITHER_LENGTH[key], None)


def _valid_keys(raw: Any) -> list[str]:
    """The whole keys of a raw recipe, with those of its generator's family."""
    generator = raw.get("generator")
    family = generator.get("family") if isinstance(generator, Mapping) else None
    return recipe_keys(family if isinstance(family, str) else DEFAULT_FAMILY)


def _with_short(keys: Sequence[str], section: str) -> list[str]:
    """Keys to suggest: the short ones of a command's section first."""
    return [*(key.removeprefix(f"{section}.") for key in keys if section and key.startswith(f"{section}.")), *keys]


def _override(raw: dict[str, Any], text: str, section: str) -> None:
    """Set the value of a `key=value`."""
    key, equals, value = text.partition("=")
    if not equals:
        example = f"{'' if section else 'generator.'}train.steps=100"
        raise RecipeError(f"override '{text}' is not key=value", f"write it as {example}")
    keys = _valid_keys(raw)
    full = next((name for name in (key, f"{section}.{key}") if name in keys), None)
    if full is None:
        raise RecipeError(f"unknown recipe key '{key}'", nearest_key(key, _with_short(keys, section)))
    *sections, leaf = full.split(".")
    values = raw
    for name in sections:
        if values.get(name) is None:
            values[name] = {}
        values = values[name]
        if not isinstance(values, dict):
            raise RecipeError(f"override '{text}': {name} is not a section", "correct the recipe file")
    _set(values, ".".join(sections), leaf, parse_yaml(value, f"override '{text}'") if value else "")

"""Recipes: YAML files with `extends`, `key=value` overrides, and the one schema that they resolve to."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, SerializeAsAny, field_validator

from rdpm_cli import files
from rdpm_cli.errors import RecipeError
from rdpm_cli.evaluation.judge import JudgeConfig
from rdpm_cli.evaluation.speech_judge import SpeechJudgeConfig
from rdpm_cli.generator.config import GeneratorConfig
from rdpm_cli.generator.registry import FAMILIES
from rdpm_cli.schema import Section, dump_yaml, leaf_keys, parse_yaml, recipe_folder, recipe_names, validate
from rdpm_cli.tokenizer.config import TokenizerConfig

__all__ = ["Recipe", "find_recipe", "load_recipe", "recipe_folder", "recipe_names", "to_yaml"]

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
    judge: JudgeConfig | SpeechJudgeConfig | None = Field(None, description="for eval judge and the demo")

    @field_validator("generator", mode="before")
    @classmethod
    def _of_its_family(cls, value: Any) -> Any:
        """A plain generator section as the config of the family that it names."""
        if not isinstance(value, Mapping):
            return value
        family = value.get("family", "rdpm")
        if family not in list(FAMILIES):
            raise ValueError(f"family is one of {', '.join(FAMILIES)}")
        return FAMILIES[family].config.model_validate(value)

    @field_validator("judge", mode="before")
    @classmethod
    def _of_its_items(cls, value: Any) -> Any:
        """A plain judge section as the config of a judge of sound, if `features` names a log-mel preset, or of images.

        Of a judge of images `features` is a number."""
        if not isinstance(value, Mapping):
            return value
        is_sound = isinstance(value.get("features"), str)
        return (SpeechJudgeConfig if is_sound else JudgeConfig).model_validate(value)

    def digest(self) -> str:
        """sha256 of the resolved recipe."""
        return files.digest(self.model_dump(mode="json"))


def find_recipe(name_or_file: str) -> Path:
    """A shipped recipe by name, or a YAML file by path. Raises RecipeError."""
    is_path = Path(name_or_file).suffix in {".yaml", ".yml"} or os.sep in name_or_file
    path = Path(name_or_file) if is_path else recipe_folder() / f"{name_or_file}.yaml"
    if not path.is_file():
        raise RecipeError(f"no recipe '{name_or_file}'", f"shipped recipes: {', '.join(recipe_names())}")
    return path


def load_recipe(name_or_file: str, overrides: Sequence[str] = (), section: str = "") -> Recipe:
    """Resolve a recipe: what it extends, the file, then the overrides in order. Raises RecipeError.

    section: one that the recipe must have, and to which short keys such as train.steps belong."""
    path = find_recipe(name_or_file)
    raw = {"name": path.stem, **_read(path)}
    absent = section not in raw  # looked at first, since an override makes the section that it sets a key of
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise RecipeError(f"override '{text}' is not key=value", "write it as train.steps=100")
        changes: Any = parse_yaml(value, f"override '{text}'") if value else ""
        if section and key.partition(".")[0] not in Recipe.model_fields:
            key = f"{section}.{key}"
        for name in reversed(key.split(".")):
            changes = {name: changes}
        raw = _merged(raw, changes)
    if section and (absent or raw[section] is None):
        able = [name for name in recipe_names() if section in _read(recipe_folder() / f"{name}.yaml")]
        raise RecipeError(f"recipe '{raw['name']}' has no {section} section", f"recipes that do: {', '.join(able)}")
    keys = [key for key in leaf_keys(Recipe) if key != "generator"]
    keys += [key for family in FAMILIES.values() for key in leaf_keys(family.config, "generator.")]
    keys += leaf_keys(SpeechJudgeConfig, "judge.")
    origin = f"{path} with {' '.join(overrides)}" if overrides else str(path)
    return validate(Recipe, raw, origin, keys)


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe as a recipe file: load_recipe of it gives an equal one, of the same digest."""
    values = {key: value for key, value in recipe.model_dump(mode="json").items() if value is not None}
    return f"# digest {recipe.digest()}\n{dump_yaml(values)}"


def _read(path: Path, extended_by: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The plain values of a recipe file, merged into those of the recipe that it extends."""
    try:
        raw = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read: {error}", "a recipe is a text file of YAML in UTF-8") from error
    if not isinstance(raw, dict) or path in extended_by:
        raise RecipeError(f"{path} holds no keys, or extends itself", "start from a shipped recipe")
    if (parent := raw.pop("extends", None)) is None:
        return raw
    neighbour = path.parent / str(parent)
    base = _read(neighbour if neighbour.is_file() else find_recipe(str(parent)), (*extended_by, path))
    base.pop("name", None)
    return _merged(base, raw)


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """base with these changes, section by section; a training length replaces the one in the other unit."""
    merged = dict(base)
    for key, value in changes.items():
        if key in EITHER_LENGTH and value is not None:
            merged.pop(EITHER_LENGTH[key], None)
        old = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged

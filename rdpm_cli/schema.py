"""The base of all configs: frozen sections, strict YAML, and errors that name the offending key.

A field is the single source of an option: recipe key, override, help, manifest entry and error derive from it.
"""

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rdpm_cli.errors import RecipeError

Share = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A part of a recipe: frozen, keyword-only, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


S = TypeVar("S", bound=Section)


def validate(section: type[S], raw: Any, origin: str, keys: Sequence[str] = ()) -> S:
    """Plain values as a section. keys: the valid ones; default: those of the section.

    Raises RecipeError naming `origin`, the key, and for an unknown key the nearest one.
    """
    try:
        return section.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            hint = nearest_key(key, keys or list(leaf_keys(section)))
            raise RecipeError(f"{origin}: unknown recipe key '{key}'", hint) from error
        reason = first["msg"].removeprefix("Value error, ")
        # A check over several fields has the whole section as its input, and names the values itself.
        hint = "" if isinstance(first["input"], dict) else f"got {first['input']!r}"[:200]
        raise RecipeError(f"{origin}: {f'{key}: ' if key else ''}{reason}", hint) from error


def leaf_keys(section: type[Section], prefix: str = "") -> Iterator[str]:
    """Every dotted key of a section that holds a value."""
    for name, field in section.model_fields.items():
        inner = inner_section(field.annotation)
        if inner is None:
            yield prefix + name
        else:
            yield from leaf_keys(inner, f"{prefix}{name}.")


def inner_section(annotation: Any) -> type[Section] | None:
    """The section in a field's annotation, such as `TokenizerConfig | None`; None for a plain value."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((inner for inner in map(inner_section, get_args(annotation)) if inner), None)


def nearest_key(key: str, keys: Sequence[str]) -> str:
    """The hint for an unknown key."""
    near = difflib.get_close_matches(key, keys, 1, cutoff=0.5)
    if not near:  # the right name in the wrong section: compare the last words
        words = {candidate.rsplit(".", 1)[-1]: candidate for candidate in reversed(keys)}
        near = [words[word] for word in difflib.get_close_matches(key.rsplit(".", 1)[-1], list(words), 1)]
    return f"did you mean '{near[0]}'?" if near else "see the recipe's keys with `rdpm inspect RECIPE`"


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML that refuses a key written twice. PyYAML itself silently keeps the last one."""


def _unique_mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    if repeated := [key for key in keys if keys.count(key) > 1]:
        raise RecipeError(f"key '{repeated[0]}' is written twice, from line {node.start_mark.line + 1} on")
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def parse_yaml(text: str, origin: str) -> Any:
    """Plain YAML values. Raises RecipeError, which names `origin`, for a syntax error or a key written twice."""
    loader = _StrictLoader(text)
    try:
        return loader.get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        line = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise RecipeError(f"{origin} is not valid YAML: {reason}{line}", "correct it there") from error
    except RecipeError as error:
        raise RecipeError(f"{origin}: {error.message}", "keep one of them") from error
    finally:
        loader.dispose()


def recipe_folder() -> Path:
    """The folder of the shipped recipes: inside the wheel, or at the root of a checkout."""
    packaged = Path(__file__).parent / "recipes"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "recipes"


def recipe_names() -> list[str]:
    """Names of the shipped recipes."""
    # published.yaml holds the papers' scores for the report; it is not a recipe.
    return sorted(path.stem for path in recipe_folder().glob("*.yaml") if path.stem != "published")

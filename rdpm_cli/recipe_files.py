"""Recipe files: YAML with `extends`, `key=value` overrides, one schema (`config.py`). Torch-free."""

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import ValidationError

from rdpm_cli.config import FAMILIES, Recipe, Section, family_of
from rdpm_cli.errors import RecipeError

S = TypeVar("S", bound=Section)


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML that refuses a key written twice, and takes `no` and `12:30` for what they look like.

    PyYAML keeps the last of two keys silently, and reads those two as False and 750, as YAML 1.1 has it.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012  # PyYAML's own name, by first character
        first: [(tag, pattern) for tag, pattern in found if not (tag.endswith((":bool", ":int", ":float")))]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def _unique_mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise RecipeError(f"key '{twice[0]}' stands twice, line {node.start_mark.line + 1} on")
    return loader.construct_mapping(node, deep=True)


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
):  # of YAML 1.2's core schema
    _StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))
_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def parse_yaml(text: str, where: str) -> Any:
    """Plain YAML values. Raises RecipeError, which names `where`, on a syntax error or a key written twice."""
    loader = _StrictLoader(text)
    try:
        return loader.get_single_data()
    except yaml.YAMLError as error:
        raise RecipeError(f"{where} is not valid YAML: {_of_yaml(error)}", "mend it there") from error
    except RecipeError as error:
        raise RecipeError(f"{where}: {error.message}", "keep one of them") from error
    finally:
        loader.dispose()


def _of_yaml(error: yaml.YAMLError) -> str:
    """PyYAML's own words in one line, with the place."""
    place = getattr(error, "problem_mark", None)
    said = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"{said}, line {place.line + 1}, column {place.column + 1}" if place else said


def recipe_folder() -> Path:
    """Where the shipped recipes are: inside the wheel, or at the root of a checkout."""
    inside = Path(__file__).parent / "recipes"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "recipes"


def recipe_names() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(path.stem for path in recipe_folder().glob("*.yaml"))


def find_recipe(name_or_file: str) -> Path:
    """A shipped recipe by name, or a YAML file by path. Raises RecipeError with near names."""
    path = Path(name_or_file)
    if path.suffix in {".yaml", ".yml"} or os.sep in name_or_file:
        if not path.is_file():
            raise RecipeError(f"recipe file {path} does not exist", f"shipped recipes: {', '.join(recipe_names())}")
        return path
    shipped = recipe_folder() / f"{name_or_file}.yaml"
    if not shipped.is_file():
        near = difflib.get_close_matches(name_or_file, recipe_names(), 1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise RecipeError(f"no recipe named '{name_or_file}'", f"{hint}shipped recipes: {', '.join(recipe_names())}")
    return shipped


def leaf_keys(section: type[Section] = Recipe, prefix: str = "", family: str = "rdpm") -> Iterator[str]:
    """Every dotted key of the schema, with the generator's of this family."""
    for name, field in section.model_fields.items():
        inner = _section_of(field.annotation, family)
        if inner is None:
            yield prefix + name
        else:
            yield from leaf_keys(inner, f"{prefix}{name}.", family)


def _section_of(annotation: Any, family: str = "rdpm") -> type[Section] | None:
    """The section that a field holds; of a generator's field, the family's."""
    found = _sections(annotation)
    return FAMILIES[family] if len(found) > 1 else next(iter(found), None)


def _sections(annotation: Any) -> list[type[Section]]:
    inner = get_args(annotation)
    if inner:
        return [section for each in inner for section in _sections(each)]
    return [annotation] if isinstance(annotation, type) and issubclass(annotation, Section) else []


def _family(raw: Any) -> str:
    """The generator family of a raw recipe; RDPM where it names none, or one that is unknown."""
    named = family_of(raw.get("generator") or {}) if isinstance(raw, Mapping) else None
    return named if named in FAMILIES else "rdpm"


def _nearest(key: str, section: str, family: str) -> str:
    keys = list(leaf_keys(family=family))
    keys += [k.removeprefix(f"{section}.") for k in keys if k.startswith(f"{section}.")]
    near = difflib.get_close_matches(key, keys, 1, cutoff=0.5)
    if not near:  # right name in the wrong place: compare last words
        word = key.rsplit(".", 1)[-1]
        words = {k.rsplit(".", 1)[-1]: k for k in (keys if section else reversed(keys))}
        near = [words[w] for w in difflib.get_close_matches(word, list(words), 1)]
    return f"did you mean '{near[0]}'?" if near else "see the recipe's own keys with `rdpm inspect RECIPE`"


RIVALS = {"steps": "epochs", "epochs": "steps"}  # two ways to give a length: the later one replaces the other


def _set(section: dict[str, Any], path: str, key: str, value: Any) -> None:
    """section[key] = value; in a train section a length also drops the other way to give it."""
    section[key] = value
    if path.endswith("train") and key in RIVALS and value is not None:
        section.pop(RIVALS[key], None)


def _merge(base: dict[str, Any], change: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    merged = dict(base)
    for key, value in change.items():
        old = merged.get(key)
        deeper = isinstance(old, dict) and isinstance(value, Mapping)
        _set(merged, path, key, _merge(old, value, f"{path}.{key}") if deeper and isinstance(old, dict) else value)
    return merged


def _parent(path: Path, name_or_file: str) -> Path:
    """What a recipe extends: a file beside it, else as on the command line."""
    beside = path.parent / name_or_file
    return beside if beside.is_file() else find_recipe(name_or_file)


def _read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The recipe's plain dict, after the recipe it extends."""
    if path in seen:
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
    base = _read(_parent(path, str(parent)), (*seen, path))
    base.pop("name", None)
    return _merge(base, raw)


def _override(raw: dict[str, Any], text: str, section: str) -> str:
    """Set what an override says. -> its whole key."""
    key, equals, value = text.partition("=")
    if not equals:
        raise RecipeError(
            f"override '{text}' is not key=value", f"write it as {'' if section else 'generator.'}train.steps=100"
        )
    family = _family(raw)
    known = set(leaf_keys(family=family))
    full = next((k for k in (key, f"{section}.{key}") if k in known), None)
    if full is None:
        raise RecipeError(f"unknown recipe key '{key}'", _nearest(key, section, family))
    *parents, leaf = full.split(".")
    here = raw
    for parent in parents:
        if here.get(parent) is None:
            here[parent] = {}
        here = here[parent]
        if not isinstance(here, dict):
            raise RecipeError(f"override '{text}': {parent} is not a section", "mend the recipe file")
    _set(here, ".".join(parents), leaf, parse_yaml(value, f"override '{text}'") if value else "")
    return full


def load_recipe(name_or_file: str, overrides: Sequence[str] = (), section: str = "") -> Recipe:
    """Resolve a recipe: file, what it extends, then overrides in order. `section` is where short keys are looked up.

    `load_recipe("digits", ["train.steps=10"], "tokenizer")` sets tokenizer.train.steps. Raises RecipeError.
    """
    path = find_recipe(name_or_file)
    raw = _read(path)
    raw.setdefault("name", path.stem)
    lacks = section != "" and section not in raw
    given = {_override(raw, text, section): f"override '{text}'" for text in overrides}
    recipe = None if lacks else validate(Recipe, raw, str(path), section, given)
    if recipe is None or (section and getattr(recipe, section) is None):
        able = [name for name in recipe_names() if section in _read(recipe_folder() / f"{name}.yaml")]
        raise RecipeError(f"recipe '{raw['name']}' has no {section} section", f"recipes that do: {', '.join(able)}")
    return recipe


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe as a recipe file: `load_recipe` of it gives an equal one, of the same digest."""
    values = {key: value for key, value in recipe.model_dump(mode="json").items() if value is not None}
    return f"# digest {recipe.digest()}\n{yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=110)}"


def validate(section: type[S], raw: Any, where: str, prefix: str = "", places: Mapping[str, str] | None = None) -> S:
    """raw as a section. Raises RecipeError naming `where`, the key, and the nearest key if it is unknown.

    places: where keys come from that are not from `where`.
    """
    try:
        return section.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"] if part not in FAMILIES)
        if first["type"] == "extra_forbidden":
            raise RecipeError(f"{where}: unknown recipe key '{key}'", _nearest(key, prefix, _family(raw))) from error
        what = first["msg"].removeprefix("Value error, ")
        where = (places or {}).get(key, where)
        got = "" if isinstance(first["input"], dict) else f"got {first['input']!r}"[:200]  # several fields: named above
        raise RecipeError(f"{where}: {f'{key}: ' if key else ''}{what}", got) from error

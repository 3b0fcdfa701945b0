"""The base of all configs: frozen sections, and errors that name the offending key."""

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from rdpm_cli.errors import RecipeError
from rdpm_cli.files import local_path

Share = Annotated[float, Field(ge=0, lt=1)]
FileName = Annotated[str, AfterValidator(local_path)]  # of a file of this machine


class Section(BaseModel):
    """A part of a recipe: frozen, keyword-only, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def added(default: Any, description: str) -> Any:
    """A field that older recipes and files lack: dumps leave out its default, so that these keep their digests."""
    return Field(default, description=description, exclude_if=lambda value: value == default)


S = TypeVar("S", bound=Section)


def validate(section: type[S], raw: Any, origin: str, keys: Sequence[str] = ()) -> S:
    """Plain values as a section. Raises RecipeError naming `origin`, the key, and the nearest of `keys` if unknown."""
    try:
        return section.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            keys, name = [k for k in keys or leaf_keys(section) if k != key], key.rpartition(".")[2]
            misplaced = [known for known in keys if known.rpartition(".")[2] == name]
            near = difflib.get_close_matches(key, misplaced or keys, 1, cutoff=0.5)
            hint = f"did you mean '{near[0]}'?" if near else "see the recipe's keys with `rdpm inspect RECIPE`"
            raise RecipeError(f"{origin}: unknown recipe key '{key}'", hint) from error
        # A check over several fields has the whole section as its input, and names the values itself.
        hint = "" if isinstance(first["input"], dict) else f"got {first['input']!r}"[:200]
        reason = first["msg"].removeprefix("Value error, ")
        raise RecipeError(f"{origin}: {key}: {reason}" if key else f"{origin}: {reason}", hint) from error


def leaf_keys(section: type[Section], prefix: str = "") -> Iterator[str]:
    """Every dotted key of a section that holds a value."""
    for name, field in section.model_fields.items():
        annotations = (field.annotation, *get_args(field.annotation))  # of `TokenizerConfig | None` both
        inner = [part for part in annotations if isinstance(part, type) and issubclass(part, Section)]
        yield from leaf_keys(inner[0], f"{prefix}{name}.") if inner else [prefix + name]


# Plain scalars of YAML 1.2's core schema (https://yaml.org/spec/1.2.2/#1032-tag-resolution): tag, pattern, beginnings.
# PyYAML follows YAML 1.1, which reads 0123 as 83, 1:30 as 90, off as false and 1e-4 as text.
SCALARS = [
    ("null", r"null|Null|NULL|~|", [*"nN~", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", [*"-+0123456789"]),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", [*"-+.0123456789"]),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.nan|\.NaN|\.NAN", [*"-+."]),
    ("merge", r"<<", ["<"]),  # of YAML 1.1, for recipes that share parts by anchors
]


class Loader(yaml.SafeLoader):
    """Reads YAML 1.2. A key that is written twice is refused: PyYAML would keep the last one in silence."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  # of PyYAML, filled below

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node)
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if repeated := [key for key in keys if keys.count(key) > 1]:
            raise yaml.YAMLError(f"key '{repeated[0]}' is written twice")
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """Quotes text that either version of YAML would not read as text."""


for _tag, _pattern, _letters in SCALARS:
    for _class in (Loader, Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), _letters)
Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)


def parse_yaml(text: str, origin: str) -> Any:
    """Plain YAML values. Raises RecipeError, which names `origin`, for a syntax error or a key written twice."""
    try:
        return Loader(text).get_single_data()
    # PyYAML raises the last three for values that do not fit an explicit tag, as !!bool x, and for deep nesting.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        raise RecipeError(f"{origin} is not valid YAML: {' '.join(str(error).split())}", "correct it there") from error


def dump_yaml(values: dict[str, Any]) -> str:
    """YAML text of plain values; parse_yaml gives them back."""
    return yaml.dump(values, Dumper=Dumper, sort_keys=False, default_flow_style=None, width=110)


def recipe_folder() -> Path:
    """The folder of the shipped recipes: inside the wheel, or at the root of a checkout."""
    packaged = Path(__file__).parent / "recipes"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "recipes"


def recipe_names() -> list[str]:
    """Names of the shipped recipes."""
    # published.yaml holds the papers' scores for the report; it is not a recipe.
    return sorted(path.stem for path in recipe_folder().glob("*.yaml") if path.stem != "published")

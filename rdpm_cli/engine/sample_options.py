"""What `sample` and `eval --ckpt` are asked for, from text: classes, options over a checkpoint's own, best of n."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rdpm_cli import recipe_files
from rdpm_cli.errors import UsageError

if TYPE_CHECKING:
    from rdpm_cli.config import SamplingConfig


@dataclass(frozen=True)
class Reject:
    """Best of `tries` candidates by a judge; --reject keep=RATE says 1 / tries."""

    tries: int
    judge: str


def ask_reject(text: str | None, judge: str | None) -> Reject | None:
    """--reject and --judge, which go together. Raises UsageError."""
    if text is None and judge is None:
        return None
    name, _, rate = (text or "").partition("=")
    try:
        share = float(rate) if name == "keep" else 0.0
    except ValueError:
        share = 0.0
    tries = round(1 / share) if 0 < share <= 1 else 0
    if text is None or judge is None or tries < 2:
        raise UsageError(
            "--reject keeps one sample of several candidates, by a judge",
            "write --reject keep=0.25 --judge judge.pt for the best of 4",
        )
    if abs(share * tries - 1) > 0.01:
        raise UsageError(f"--reject keep={rate} is not one of a whole number", f"keep={1 / tries:.4g} is 1 of {tries}")
    return Reject(tries, judge)


def parse_classes(text: str, class_names: Sequence[str]) -> list[int]:
    """`1,2,3`, `0-9`, `all`, `name:goldfish`, and mixtures, in order, each once; or `@FILE` of such lines.

    A name may have commas: after `name:` stands the longest one that is a class's. Raises UsageError.
    """
    if text.startswith("@"):
        text = ",".join(_lines(Path(text[1:])))
    chosen: list[int] = []
    for part in _parts(text, class_names):
        low, dash, high = part.partition("-")
        if part == "all":
            chosen += range(len(class_names))
        elif part.startswith("name:"):
            chosen.append(_class_named(part.removeprefix("name:"), class_names))
        elif part.isdecimal():
            chosen.append(int(part))
        elif dash and low.isdecimal() and high.isdecimal() and int(low) <= int(high):
            chosen += range(int(low), int(high) + 1)
        else:
            raise UsageError(f"--classes: '{part}' is not a class", "write 1,2,3 or 0-9 or all or name:goldfish")
    if outside := [c for c in chosen if c >= len(class_names)]:
        raise UsageError(f"--classes: there is no class {outside[0]}", f"this checkpoint has 0..{len(class_names) - 1}")
    return list(dict.fromkeys(chosen))


def _lines(path: Path) -> list[str]:
    """Those that are not empty."""
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not a text file"
        raise UsageError(f"--classes @{path}: {why}", "name a text file of classes, one a line") from error
    return [line for line in lines if line]


def _parts(text: str, class_names: Sequence[str]) -> Iterator[str]:
    """What stands between commas, names with commas whole."""
    left = text.split(",")
    while left:
        count = 1
        if left[0].strip().startswith("name:"):
            names = {n: ",".join(left[:n]).strip().removeprefix("name:") for n in range(len(left), 1, -1)}
            count = next((n for n, name in names.items() if name in class_names), 1)
        yield ",".join(left[:count]).strip()
        left = left[count:]


def _class_named(name: str, class_names: Sequence[str]) -> int:
    if name in class_names:
        return list(class_names).index(name)
    near = difflib.get_close_matches(name, class_names, 3)
    hint = f"did you mean {', '.join(near)}?" if near else "see the names with `rdpm inspect CKPT`"
    raise UsageError(f"--classes: no class is named '{name}'", hint)


def key_values(texts: Sequence[str], hint: str = "write it as precision=bf16") -> dict[str, Any]:
    """`key=value` arguments, values as YAML reads them. Raises UsageError, with this hint for what is none."""
    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"'{text}' is not key=value", hint)
        found[key] = recipe_files.parse_yaml(value, f"'{text}'")
    return found


def choose(own: SamplingConfig, preset: str | None, asked: Mapping[str, Any]) -> SamplingConfig:
    """A checkpoint's sampling options, with a preset's over them and what is asked for over both.

    Raises UsageError for a preset or an option that its family does not have, and for an option that does nothing.
    """
    section = type(own)
    if preset is not None and preset not in section.presets:
        have = ", ".join(section.presets) or "none"
        raise UsageError(f"--preset {preset}: this checkpoint's family has no such preset", f"it has {have}")
    for name in asked:
        if name not in section.model_fields:
            raise _no_option(name, section)
    wanted = {**own.model_dump(), **(section.presets[preset] if preset else {}), **asked}
    chosen = recipe_files.validate(section, wanted, "sampling options")
    if preset in section.guided and chosen.cfg == 0 and "cfg" not in asked:
        raise UsageError(
            f"--preset {preset} guides, and this checkpoint's own lambda is 0", f"write --preset {preset} cfg=1.5"
        )
    _check_effect(chosen, asked)
    return chosen


def _check_effect(chosen: SamplingConfig, asked: Mapping[str, Any]) -> None:
    """Raise UsageError where something asked for does nothing beside the other options."""
    for name, (switch, values) in type(chosen).effective_with.items():
        value = getattr(chosen, switch)
        if name in asked and value not in values:
            raise UsageError(
                f"{_flag(name)} does nothing with {_flag(switch)} {value}",
                f"leave it out, or give {_flag(switch)} {' or '.join(values)}",
            )


def _flag(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def _no_option(name: str, section: type[SamplingConfig]) -> UsageError:
    """For an option of another family, which the command line has as --name, or for key=value of none."""
    from rdpm_cli.config import SamplingConfig

    flag = any(name in family.model_fields for family in SamplingConfig.__subclasses__())
    write = _flag if flag else str
    near = difflib.get_close_matches(name, list(section.model_fields), 1)
    hint = f"did you mean {write(near[0])}? " if near else ""
    return UsageError(
        f"{write(name) if flag else repr(name)} is no sampling option of {section.family}, this checkpoint's family",
        f"{hint}it has {', '.join(map(write, section.model_fields))}",
    )

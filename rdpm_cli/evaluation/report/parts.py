"""What a report is made of: items of the chain from images to scores, what each claims, scores, plots, pictures."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeGuard

Stage = Literal["data", "judge", "tokenizer", "store", "generator", "samples", "reconstructions", "score"]
STAGES: dict[Stage, str] = {
    "data": "Images",
    "judge": "Judge",
    "tokenizer": "Tokenizer",
    "store": "Code store",
    "generator": "Generator",
    "samples": "Samples",
    "reconstructions": "Reconstructions",
    "score": "Scores",
}  # in the order the data walks


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What an item says it was made from. digest: "" where only a name is recorded."""

    stages: tuple[Stage, ...]
    digest: str
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One thing that was given, or the images that such things name.

    digest: what claims about it are compared with: of model and store their own, of pictures that of their pixels, of
    images that of their list of names and labels; "" where there is none. facts: a line each; settings: by dotted name;
    log: lines of metrics.jsonl.
    """

    stage: Stage
    name: str
    digest: str = ""
    claims: tuple[Claim, ...] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    log: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Score:
    """One value of one metric, and what it depends on. value: None where it was not computed; note says why.

    spread: standard deviation, over what `spread_over` says; interval: of confidence.
    """

    source: str
    target: str
    metric: str
    value: float | None
    n: int | None = None
    spread: float | None = None
    spread_over: str = ""
    interval: tuple[float, float] | None = None
    extractor: str = ""
    reference: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A drawing. alt: what it shows, in words; svg: the file; note: what its values share."""

    title: str
    alt: str
    svg: bytes
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """Images to look at, scaled down and encoded."""

    title: str
    alt: str
    kind: str  # image/png or image/jpeg
    data: bytes
    size: tuple[int, int]


@dataclass(kw_only=True)
class Report:
    """Everything that a page or a table shows. notes: what was left out, and why."""

    title: str
    version: str
    items: list[Item]
    scores: list[Score]
    pictures: list[Picture] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings by dotted name."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def clean(text: object) -> str:
    """Text that any file format can hold: what XML forbids, and halves of surrogate pairs, become U+FFFD."""
    return "".join(c if _is_text(ord(c)) else "\ufffd" for c in str(text))


def _is_text(code: int) -> bool:
    return code in (0x9, 0xA, 0xD) or 0x20 <= code < 0x7F or 0xA0 <= code < 0xD800 or 0xE000 <= code not in (
        0xFFFE, 0xFFFF)  # fmt: skip


def short(digest: str) -> str:
    """A digest as people compare it."""
    return digest[:12]


def said(value: Any) -> str:
    """A setting in words."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(said(one) for one in value)
    return clean(value)


def is_number(value: Any) -> TypeGuard[float]:
    """A number, not a truth value; it may be infinite."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def unique(values: Iterable[str]) -> list[str]:
    """Each once, in order."""
    return list(dict.fromkeys(values))

"""Text as the units that a generator is conditioned on: words of a closed vocabulary, bytes of UTF-8, or phones."""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Literal

from rdpm_cli.data.espeak import phonemes
from rdpm_cli.errors import UsageError, some_of

Kind = Literal["words", "bytes", "phones"]
MOST_WORDS = 10_000  # of a closed vocabulary


def normalise(text: str) -> str:
    """Lower case, composed accents, letters, digits and apostrophes only, one space between words."""
    kept = re.sub(r"[^\w' ]|_", " ", unicodedata.normalize("NFC", text).lower().replace("\u2019", "'"))
    return " ".join(kept.split())


def vocabulary(kind: Kind, texts: Iterable[str]) -> tuple[str, ...]:
    """The names of the units of these texts, in the order of their numbers."""
    if kind == "bytes":
        return tuple(f"0x{value:02x}" for value in range(256))
    if kind == "phones":
        return tuple(sorted({phone for text in texts for phone in phonemes(normalise(text))}))
    words = sorted({word for text in texts for word in normalise(text).split()})
    if len(words) > MOST_WORDS:
        raise UsageError(
            f"--units words: there are {len(words):,} words, more than {MOST_WORDS:,}", "give --units bytes"
        )
    return tuple(words)


def encode(kind: Kind, units: Sequence[str], text: str) -> list[int]:
    """The numbers of a text's units. Raises UsageError for a word outside the vocabulary, and for an empty text."""
    plain = normalise(text)
    if not plain:
        raise UsageError(f"the text '{text}' holds no word", "give a text of at least one word")
    if kind == "bytes":
        return list(plain.encode())
    names, noun = (list(phonemes(plain)), "sounds") if kind == "phones" else (plain.split(), "words")
    number_of = {unit: number for number, unit in enumerate(units)}
    if unknown := [name for name in names if name not in number_of]:
        hint = f"the {noun} that this generator knows are {some_of(units, 24)}"
        raise UsageError(f"'{unknown[0]}' of the text '{text}' is not among the {noun} it was trained on", hint)
    return [number_of[name] for name in names]


def spell(kind: Kind, units: Sequence[str], numbers: Sequence[int]) -> str:
    """The text of these units, or its phones: the inverse of `encode`."""
    if kind == "bytes":
        return bytes(numbers).decode(errors="replace")
    return ("" if kind == "phones" else " ").join(units[number] for number in numbers)

"""Units of text: words, bytes and phones, both ways."""

import pytest

from rdpm_cli.data import text
from rdpm_cli.data.text import Kind
from rdpm_cli.errors import UsageError

TEXTS = ["Seven, THREE!", "it\u2019s a caf\u00e9", "three  two"]


@pytest.mark.parametrize("kind", ["words", "bytes"])
def test_a_text_survives_its_units_normalised(kind: Kind) -> None:
    units = text.vocabulary(kind, TEXTS)
    for words in TEXTS:
        numbers = text.encode(kind, units, words)
        assert max(numbers) < len(units)
        assert text.spell(kind, units, numbers) == text.normalise(words)


def test_phones_are_those_of_the_word_whatever_its_spelling_and_neighbours() -> None:
    pytest.importorskip("espeakng_loader")
    units = text.vocabulary("phones", TEXTS)
    two, too, three = (text.encode("phones", units, words) for words in ("two", "TWO.", "three"))
    assert two == too != three
    assert text.encode("phones", units, "two three") == [*two, units.index(" "), *three]
    assert (
        text.spell("phones", units, three) == "\u03b8\u0279\u02c8i\u02d0"
    )  # Wiktionary: /\u03b8\u0279i\u02d0/, with eSpeak's stress


@pytest.mark.parametrize(("kind", "words"), [("words", "three four"), ("phones", "yacht")])
def test_units_that_were_not_there_are_named(kind: Kind, words: str) -> None:
    if kind == "phones":
        pytest.importorskip("espeakng_loader")
    units = text.vocabulary(kind, TEXTS)
    with pytest.raises(UsageError) as caught:
        text.encode(kind, units, words)
    assert ("four" if kind == "words" else "j") in str(caught.value)

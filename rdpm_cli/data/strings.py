"""Spoken strings made of recordings of single words: real voices, exact texts and exact durations of their words."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rdpm_cli import files, noise
from rdpm_cli.data.audio import AudioSource, write_wav
from rdpm_cli.data.mel import Wave
from rdpm_cli.data.recordings import MANIFEST
from rdpm_cli.errors import DataError, UsageError

RECORD = ".strings.json"  # the arguments; hidden, so that it is no file of the data set
MOST_GAPS = 2  # steps of silence behind a word


def write_strings(
    source: AudioSource, indices: Sequence[int], out: Path, count: int, words: int, seed: int, rate: int, step: int
) -> Path:
    """Write `count` strings of `words` recordings of one speaker each, as `wavs/` and a manifest -> the manifest.

    indices: the recordings to draw from. Speakers take turns; words are uniform, then the recordings of a word. A word
    lasts whole steps of `step` samples, with 0 to 2 steps of silence behind it, all of which its word_seconds count.
    String i depends on (seed, i) alone. A finished folder stays. Raises DataError for recordings that are not single
    words of known speakers, UsageError for a folder of other strings."""
    manifest = out / MANIFEST
    arguments = {
        "source": source.digest(), "indices": files.digest(list(map(int, indices))), "count": count, "words": words,
        "seed": seed, "rate": rate, "step": step,
    }  # fmt: skip
    if (out / RECORD).exists() or manifest.exists():
        previous = files.read_json(out / RECORD) if (out / RECORD).exists() else {}
        if changed := files.differences(previous, arguments):
            raise UsageError(f"{out} holds other strings: {'; '.join(changed)}", "choose another folder, or remove it")
    if manifest.exists():
        return manifest
    recordings = _by_word(source, indices)
    files.write_json(out / RECORD, arguments)
    rows = []
    for number in range(count):
        name = f"wavs/{number:06d}.wav"
        wave, row = _string(source, recordings, number, words, seed, rate, step)
        write_wav(out / name, wave, rate)
        rows.append({"audio_filepath": name, **row})
    return files.write_lines(manifest, rows)


def _by_word(source: AudioSource, indices: Sequence[int]) -> dict[str, dict[str, list[int]]]:
    """The indices of each word of each speaker, both in sorted order."""
    if source.texts is None or source.speakers is None:
        lacking = "speakers" if source.texts else "texts"
        raise DataError(f"{source.spec} has no {lacking}", "give recordings of single words, as FSDD has them")
    recordings: dict[str, dict[str, list[int]]] = {}
    for index in indices:
        if len((text := source.texts[index]).split()) != 1:
            message = f"{source.spec}: {source.names[index]} is more than one word: '{text:.80}'"
            raise DataError(message, "give recordings of single words, as FSDD has them")
        recordings.setdefault(source.speakers[index], {}).setdefault(text, []).append(index)
    if not recordings:
        raise DataError(f"{source.spec}: there are no recordings to make strings of", "give at least one")
    return {speaker: dict(sorted(words.items())) for speaker, words in sorted(recordings.items())}


def _string(
    source: AudioSource, recordings: dict[str, dict[str, list[int]]], number: int, words: int, seed: int, rate: int,
    step: int,
) -> tuple[Wave, dict[str, Any]]:  # fmt: skip
    """A string (n,) and its row of the manifest."""
    draw = noise.stream("strings", seed, number)
    speaker = list(recordings)[number % len(recordings)]
    texts, parts, seconds = list[str](), list[Wave](), list[float]()
    for _ in range(words):
        text = list(recordings[speaker])[draw.integers(len(recordings[speaker]))]
        choices = recordings[speaker][text]
        wave = source.wave(choices[draw.integers(len(choices))], rate)
        steps = -(-len(wave) // step) + int(draw.integers(MOST_GAPS + 1))
        texts.append(text)
        parts.append(np.pad(wave, (0, steps * step - len(wave))))
        seconds.append(steps * step / rate)
    return np.concatenate(parts), {"text": " ".join(texts), "speaker": speaker, "word_seconds": seconds}

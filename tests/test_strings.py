"""Spoken strings: their words, speakers, durations and gaps, and that they are the same again."""

import json
from pathlib import Path

import numpy as np
import pytest

from rdpm_cli.data.audio import AudioSource, open_audio, write_wav
from rdpm_cli.data.strings import write_strings
from rdpm_cli.errors import DataError, UsageError

RATE, STEP = 8000, 320
LEVEL = {"ann": 0.25, "bob": 0.5}  # the sign tells even from odd recordings


@pytest.fixture
def words(tmp_path: Path) -> AudioSource:
    """Recordings of constant samples: digits 0..2 of two speakers, three each, of 300, 400 and 500 samples."""
    for speaker, level in LEVEL.items():
        for digit in range(3):
            for take in range(3):
                wave = np.full(300 + 100 * take, level * (digit + 1) / 4, np.float32)
                write_wav(tmp_path / "words" / f"{digit}_{speaker}_{take}.wav", wave, RATE)
    return open_audio(str(tmp_path / "words"))


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_string_is_whole_steps_of_recordings_of_one_speaker_with_exact_durations(
    words: AudioSource, tmp_path: Path
) -> None:
    write_strings(words, range(18), tmp_path / "out", 40, 4, 0, RATE, STEP)
    strings = open_audio(str(tmp_path / "out"))
    assert (len(strings), strings.not_taken, strings.speakers) == (40, {"hidden": 1}, ["ann", "bob"] * 20)
    assert strings.texts is not None
    assert strings.word_seconds is not None
    gaps, used = set(), set()
    for index, (text, seconds) in enumerate(zip(strings.texts, strings.word_seconds, strict=True)):
        wave, start = strings.wave(index, RATE), 0
        for word, length in zip(text.split(), seconds, strict=True):
            steps = round(length * RATE / STEP)
            assert length == steps * STEP / RATE
            part, start = wave[start : start + steps * STEP], start + steps * STEP
            spoken = int(np.count_nonzero(part))
            assert spoken in (300, 400, 500)
            value = LEVEL[["ann", "bob"][index % 2]] * (["zero", "one", "two"].index(word) + 1) / 4
            assert np.allclose(part[:spoken], value, atol=1e-4)
            assert not part[spoken:].any()
            gaps.add(steps - -(-spoken // STEP))
            used.add((index % 2, word, spoken))
        assert start == len(wave)
    assert (gaps, len(used)) == ({0, 1, 2}, 18)  # every gap and every recording is drawn


def test_only_the_given_recordings_are_used(words: AudioSource, tmp_path: Path) -> None:
    chosen = [i for i, name in enumerate(words.names) if name.endswith("bob_0.wav")]
    write_strings(words, chosen, tmp_path / "out", 6, 2, 0, RATE, STEP)
    strings = open_audio(str(tmp_path / "out"))
    assert set(strings.speakers or ()) == {"bob"}
    assert {int(np.count_nonzero(strings.wave(index, RATE))) for index in range(6)} == {600}


def test_the_same_arguments_give_the_same_bytes_and_a_longer_list_the_same_beginning(
    words: AudioSource, tmp_path: Path
) -> None:
    for name, count, seed in (("a", 6, 0), ("b", 6, 0), ("more", 9, 0), ("other", 6, 1)):
        write_strings(words, range(18), tmp_path / name, count, 3, seed, RATE, STEP)
    a, more = content(tmp_path / "a"), content(tmp_path / "more")
    assert a == content(tmp_path / "b") != content(tmp_path / "other")
    assert more["manifest.jsonl"].startswith(a["manifest.jsonl"])
    assert all(more[name] == a[name] for name in a if name.endswith(".wav"))
    row = json.loads(a["manifest.jsonl"].split(b"\n")[0])
    assert set(row) == {"audio_filepath", "text", "speaker", "word_seconds"}


def test_a_finished_folder_stays_an_unfinished_one_is_finished_and_others_are_refused(
    words: AudioSource, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    manifest = write_strings(words, range(18), out, 4, 3, 0, RATE, STEP)
    before, times = content(out), {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert write_strings(words, range(18), out, 4, 3, 0, RATE, STEP) == manifest
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == times
    manifest.unlink()
    (out / "wavs" / "000002.wav").unlink()
    write_strings(words, range(18), out, 4, 3, 0, RATE, STEP)
    assert content(out) == before
    with pytest.raises(UsageError, match="seed"):
        write_strings(words, range(18), out, 4, 3, 1, RATE, STEP)
    assert content(out) == before


def test_recordings_of_several_words_or_of_unknown_speakers_are_refused(words: AudioSource, tmp_path: Path) -> None:
    words.texts = ["one two", *(words.texts or ())[1:]]
    with pytest.raises(DataError, match=r"0_ann_0\.wav"):
        write_strings(words, range(18), tmp_path / "out", 4, 3, 0, RATE, STEP)
    words.speakers = None
    with pytest.raises(DataError, match="speakers"):
        write_strings(words, range(18), tmp_path / "out", 4, 3, 0, RATE, STEP)
    assert not (tmp_path / "out").exists()

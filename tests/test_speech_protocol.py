"""`rdpm eval tts`: its list of prompts and texts, the samples, the scores and what it refuses."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
from sounds import RATE, STEP, save_speech_generator, speech_config, speech_store, strings, word, write_speech

from rdpm_cli.cli.app import run
from rdpm_cli.data.audio import open_audio, write_wav
from rdpm_cli.data.mel import Wave
from rdpm_cli.engine import speech_protocol
from rdpm_cli.engine.speech_scores import Judges
from rdpm_cli.errors import DataError
from rdpm_cli.evaluation import speech_networks
from rdpm_cli.evaluation.speech import Embeddings, Transcriber, Voices

Capture = pytest.CaptureFixture[str]
# Of ann and bob in turn: words and latents of 40 ms. 4.8 s each, 3.2 s, which can only be a prompt, and 1.2 s.
SPOKEN = [
    [("low", 30), ("high", 30), ("rise", 30), ("hiss", 30)], [("high", 50), ("low", 50), ("low", 20)],
    [("hiss", 75), ("low", 25), ("rise", 20)], [("rise", 40), ("rise", 40)], [("low", 30)], [("high", 30)],
]  # fmt: skip
PUBLISHED = {"VALL-E": "3.8", "ResGen (first version)": "1.79", "ground truth": ".754"}


class Ear(Transcriber):
    """Hears `low` in whatever lasts; keeps how long it lasts."""

    name, sha256, rate = "ear", "0", 16000

    def __init__(self) -> None:
        self.seconds = list[float]()

    def transcribe(self, waves: Any) -> list[str]:
        self.seconds += [len(wave) / self.rate for wave in waves]
        return ["low"] * len(waves)


class Loudness(Voices):
    """Tells ann, who is twice as loud, from bob."""

    name, sha256, rate = "loudness", "1", 16000

    def embed(self, waves: Any) -> Embeddings:
        return np.array([[1.0, float(np.abs(wave).max() > 0.3)] for wave in waves], np.float32)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_speech(tmp_path_factory.mktemp("sound"), SPOKEN)


@pytest.fixture(scope="module")
def generators(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of untrained generators by network.align."""
    root = tmp_path_factory.mktemp("generators")
    store = speech_store(root / "store", "sin", strings(8), latents=True)
    configs = {align: speech_config("rdpm", network={"align": align}) for align in ("durations", "cross")}
    return {align: save_speech_generator(root / f"{align}.pt", store.root, cfg) for align, cfg in configs.items()}


@pytest.fixture
def ear(monkeypatch: pytest.MonkeyPatch) -> Ear:
    ear = Ear()
    monkeypatch.setattr(speech_networks, "open_transcriber", lambda _: ear)
    monkeypatch.setattr(speech_networks, "open_voices", lambda _: Loudness())
    return ear


@pytest.fixture
def tested(recordings: str, tmp_path: Path, ear: Ear, capsys: Capture) -> Callable[..., dict[str, Any]]:
    def test(generator: Path, *words: str) -> dict[str, Any]:
        fixed = ["eval", "tts", str(generator), recordings, "--out", str(tmp_path / "out"), "--device", "cpu"]
        assert run([*fixed, "--asr", "x", "--speaker", "y", "--json", "--quiet", *words]) == 0, capsys.readouterr().err
        return dict(json.loads(capsys.readouterr().out))

    return test


def samples(out: Path) -> list[dict[str, Any]]:
    return list(json.loads((out / "samples/samples.json").read_text())["samples"])


def sound(path: Path) -> Wave:
    return np.asarray(soundfile.read(path, dtype="float32")[0])


def test_a_continuation_begins_with_the_whole_words_of_the_first_3_s(
    tested: Callable[..., dict[str, Any]], generators: dict[str, Path], recordings: str, tmp_path: Path, ear: Ear
) -> None:
    record = tested(generators["durations"], "--task", "continuation")
    rows, source = samples(tmp_path / "out"), open_audio(recordings)
    assert [(row["prompt_text"], row["text"]) for row in rows] == [
        ("low high", "rise hiss"), ("high", "low low"), ("hiss", "low rise"),
    ]  # fmt: skip
    assert [row["prompt_seconds"] for row in rows] == pytest.approx([2.4, 2.0, 3.0])
    for index, row in enumerate(rows):
        prompt = sound(tmp_path / "out/samples" / row["prompt"])
        assert np.allclose(prompt, source.wave(index, RATE)[: len(prompt)], atol=1e-4)
        assert len(prompt) / RATE == pytest.approx(row["prompt_seconds"])
    drawn = [sum(row["durations"]) * STEP / RATE - row["prompt_seconds"] for row in rows]
    assert ear.seconds == pytest.approx([*drawn, 2.4, 2.8, 1.8], abs=1e-3)  # the recordings have the rest of 4.8 s
    assert (record["n"], record["task"], record["target"]["count"]) == (3, "continuation", 3)
    assert (record["wer"], record["reference_words"]) == (pytest.approx(4 / 6), 6)
    assert record["ground_truth"]["sim_o"] == pytest.approx(1.0)  # a voice is as loud as its prompt
    assert record["sim_r"] is not None
    printed = {figure["name"]: {f["metric"]: f["value"] for f in record["published"] if f["name"] == figure["name"]}
               for figure in record["published"]}  # fmt: skip
    assert all(value in printed[name].values() for name, value in PUBLISHED.items())


def test_a_generator_of_joined_texts_continues_exactly_3_s_by_the_text_of_the_whole(
    tested: Callable[..., dict[str, Any]], generators: dict[str, Path], tmp_path: Path, ear: Ear
) -> None:
    record, rows = tested(generators["cross"]), samples(tmp_path / "out")
    assert [row["text"] for row in rows] == ["low high rise hiss", "high low low", "hiss low rise"]
    assert all("prompt_text" not in row and row["prompt_seconds"] == 3.0 for row in rows)
    assert [len(sound(tmp_path / "out/samples" / row["prompt"])) for row in rows] == [24000] * 3
    whole = [sum(row["durations"]) * STEP / RATE for row in rows]
    assert ear.seconds == pytest.approx([*whole, 4.8, 4.8, 4.8], abs=1e-3)
    assert record["reference_words"] == record["ground_truth"]["reference_words"] == 10


@pytest.mark.parametrize("align", ["durations", "cross"])
def test_a_cross_sentence_prompt_is_another_recording_of_the_speaker(
    align: str, tested: Callable[..., dict[str, Any]], generators: dict[str, Path], tmp_path: Path, ear: Ear
) -> None:
    tested(generators[align], "--task", "cross")
    rows = samples(tmp_path / "out")
    assert [row["text"] for row in rows] == ["low high rise hiss", "high low low", "hiss low rise"]
    assert [row["prompt_text"] for row in rows] == ["hiss", "rise", "low high"]
    assert [row["prompt_seconds"] for row in rows] == pytest.approx([3.0, 1.6, 2.4])
    assert ear.seconds[3:] == pytest.approx([4.8, 4.8, 4.8], abs=1e-3)


def test_the_choice_of_a_prompt_depends_on_the_seed_and_the_utterance_alone(tmp_path: Path) -> None:
    source = open_audio(write_speech(tmp_path, [[("low", 40), ("high", 40), ("rise", 40)]] * 12))
    seconds = [1.6, 1.6, 1.6]

    def prompts(seed: int, limit: int | None = None) -> dict[int, int]:
        rows = speech_protocol.make_rows(source, "cross", seed, lambda _: seconds, limit)
        return {row.index: row.prompt for row in rows}

    first = prompts(0)
    assert all(index % 2 == prompt % 2 and index != prompt for index, prompt in first.items())
    assert prompts(1) != first == prompts(0)
    assert prompts(0, 3) == {index: first[index] for index in (0, 4, 8)}


def test_the_same_command_again_draws_nothing_anew(
    tested: Callable[..., dict[str, Any]], generators: dict[str, Path], tmp_path: Path
) -> None:
    record = tested(generators["durations"], "--limit", "2", "top_k=3")
    wavs = sorted((tmp_path / "out/samples").glob("*.wav"))
    times = [path.stat().st_mtime_ns for path in wavs]
    assert tested(generators["durations"], "--limit", "2", "top_k=3") == record
    assert [path.stat().st_mtime_ns for path in wavs] == times
    assert len(times) == 2


def librispeech(root: Path) -> Path:
    """Two utterances of one speaker and one of another, without the times of their words."""
    for name, spoken in (("61-70-0000", SPOKEN[0]), ("61-70-0001", SPOKEN[1]), ("121-12-0000", SPOKEN[2])):
        folder = root / "/".join(name.split("-")[:2])
        write_wav(folder / f"{name}.wav", np.concatenate([word(x, n * STEP) for x, n in spoken]), RATE)
        with (folder / f"{'-'.join(name.split('-')[:2])}.trans.txt").open("a") as file:
            file.write(f"{name} {' '.join(x.upper() for x, _ in spoken)}\n")
    return root


def test_a_tree_of_librispeech_needs_the_times_of_words_only_where_they_are_used(
    generators: dict[str, Path], ear: Ear, tmp_path: Path, capsys: Capture
) -> None:
    tree = librispeech(tmp_path / "tree")

    def test(align: str, task: str, source: Path = tree) -> int:
        words = ["eval", "tts", str(generators[align]), str(source), "--task", task, "--device", "cpu", "--quiet"]
        return run([*words, "--out", str(tmp_path / align / task), "--asr", "x", "--speaker", "y"])

    assert test("cross", "continuation") == 0
    table = capsys.readouterr().out
    assert all(value in table for value in PUBLISHED.values())
    for align, task in (("durations", "continuation"), ("cross", "cross")):
        assert test(align, task) == 2
        assert "hubert-ctc" in capsys.readouterr().err
        assert not (tmp_path / align / task).exists()


def test_a_judge_or_hubert_tells_when_the_words_of_a_tree_are_said(tmp_path: Path) -> None:
    def align(rate: int, wave: Wave, words: str) -> list[float]:
        assert len(wave) == 4.8 * rate
        return [0.9 * (place + 1) for place, _ in enumerate(words.split())]

    source = open_audio(str(librispeech(tmp_path)))
    hubert = speech_networks.HubertCTC.__new__(speech_networks.HubertCTC)
    hubert.align = partial(align, 16000)  # type: ignore[method-assign]
    judge: Any = SimpleNamespace(features=SimpleNamespace(rate=RATE), align=partial(align, RATE))
    for judges in (Judges(None, hubert, None), Judges(judge, None, None)):
        rows = speech_protocol.make_rows(source, "continuation", 0, speech_protocol.word_times(source, judges), None)
        assert [(row.words, row.seconds) for row in rows][1:] == [(["low", "high"], 2.7), (["high", "low"], 2.7)]


def test_sources_without_utterances_or_prompts_are_refused(tmp_path: Path) -> None:
    tree, short = librispeech(tmp_path / "tree"), write_speech(tmp_path / "short", SPOKEN[3:])
    slow = write_speech(tmp_path / "slow", [[("low", 80), ("high", 40)]])
    for source, task, token in (
        (str(tree), "cross", "121"), (short, "continuation", "4 to 10"), (slow, "continuation", r"000\.wav"),
    ):  # fmt: skip
        opened = open_audio(source)
        times = partial((opened.word_seconds or [[0.5] * 3] * 3).__getitem__)
        with pytest.raises(DataError, match=token):
            speech_protocol.make_rows(opened, task, 0, times, None)  # type: ignore[arg-type]

"""Scores of speech: words against jiwer and by hand, voices, waves, and `eval speech` on recordings and samples."""

import importlib.machinery
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import jiwer
import numpy as np
import pytest
import torch
from tones import RATE, string, train_judge

from rdpm_cli import checkpoint
from rdpm_cli.cli.app import run
from rdpm_cli.data.audio import open_audio, write_wav
from rdpm_cli.data.mel import Wave
from rdpm_cli.errors import DataError, UsageError
from rdpm_cli.evaluation import speech, speech_networks
from rdpm_cli.evaluation.recon import encode_recording
from rdpm_cli.tokenizer import model
from rdpm_cli.tokenizer.config import TokenizerArchitecture
from rdpm_cli.tokenizer.model import Tokenizer


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    judge, unseen = train_judge(tmp_path_factory.mktemp("tones"))
    return str(judge), unseen


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    raw = {
        "autoencoder": {"kind": "mel1d", "features": "speech8", "width": 8, "multipliers": [1, 1, 1], "channels": 4},
        "schedule": {"kind": "sin"}, "quantizer": {"codes": 16, "steps": 2, "bias": "none"},
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Tokenizer(TokenizerArchitecture.model_validate(raw))
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.pt"
    checkpoint.save(path, model.pack(network, class_names=[], provenance={}))
    return path


def bursts(seed: int, rate: int = RATE, seconds: float = 2.0) -> Wave:
    """Noise in bursts of a fifth of a second, which PESQ takes for speech."""
    n = round(seconds * rate)
    gate = (np.arange(n) // (rate // 5)) % 2
    return (0.1 * gate * np.random.default_rng(seed).standard_normal(n)).astype(np.float32)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("Call 42, OK?", "call four two ok"), ("924", "nine two four"), ("Don\u2019t  stop_now!", "don't stop now"),
        ("3-4; B2", "three four b two"), ("Nine TWO four.", "nine two four"), ("\u2026", ""),
    ],
)  # fmt: skip
def test_texts_are_compared_by_a_table_of_rules(words: str, expected: str) -> None:
    assert speech.normalise(words) == expected
    assert speech.normalise(expected) == expected


COUNTED = [  # reference, hypothesis, and substitutions, deletions and insertions by hand
    ("one two three four", "one two three four", 0, 0, 0), ("one two three four", "one three three four five", 1, 0, 1),
    ("one two", "", 0, 2, 0), ("one", "two", 1, 0, 0), ("1, 2: three", "One two THREE", 0, 0, 0),
]  # fmt: skip


@pytest.mark.parametrize(("reference", "hypothesis", "substituted", "deleted", "inserted"), COUNTED)
def test_errors_are_those_counted_by_hand(
    reference: str, hypothesis: str, substituted: int, deleted: int, inserted: int
) -> None:
    n, scores = len(speech.normalise(reference).split()), speech.word_scores([reference], [hypothesis])
    assert scores["wer"] == pytest.approx((substituted + deleted + inserted) / n)
    assert scores["word_accuracy"] == pytest.approx((n - substituted - deleted) / n)
    assert scores["reference_words"] == n


def test_scores_are_of_all_texts_together_and_equal_jiwer() -> None:
    references, hypotheses = zip(*((row[0], row[1]) for row in COUNTED), strict=True)
    plain, heard = ([speech.normalise(x) for x in side] for side in (references, hypotheses))
    scores = speech.word_scores(references, hypotheses)
    assert scores["wer"] == pytest.approx(jiwer.wer(plain, heard))
    assert scores["cer"] == pytest.approx(jiwer.cer(plain, heard))
    assert scores["wer"] == pytest.approx(sum(sum(row[2:]) for row in COUNTED) / 14)


def test_a_hypothesis_counts_up_to_twice_the_words_of_its_reference() -> None:
    scores = speech.word_scores(["one two", "three"], ["one two " + "go " * 50, "three"])
    assert (scores["wer"], scores["word_accuracy"], scores["cut_hypotheses"]) == (2 / 3, 1.0, 1)


def test_a_reference_without_words_is_refused() -> None:
    with pytest.raises(DataError, match=r"\?!"):
        speech.word_scores(["one", "?!"], ["one", "two"])


def test_similarity_is_the_mean_cosine() -> None:
    a, b = np.array([[1, 0], [0, 2], [3, 4]], np.float32), np.array([[5, 0], [1, 0], [-3, -4]], np.float32)
    assert speech.similarity(a, b) == pytest.approx(0.0)
    assert speech.similarity(a, 7 * a) == pytest.approx(1.0)


@pytest.mark.parametrize(("rate", "used", "mode"), [(8000, 8000, "nb"), (16000, 16000, "wb"), (22050, 16000, "wb")])
def test_identical_waves_have_the_best_scores_and_noise_lowers_them(rate: int, used: int, mode: str) -> None:
    wave = bursts(0, rate)
    same = speech.wave_scores([wave], [wave], rate)
    noisy = speech.wave_scores([wave], [wave + 0.5 * bursts(1, rate)], rate)
    assert (same["pesq_rate"], same["pesq_mode"], same["wave_rate"]) == (used, mode, rate)
    assert same["pesq"] == pytest.approx(4.549 if mode == "nb" else 4.644, abs=0.01)
    assert same["stoi"] == pytest.approx(1.0, abs=1e-4)
    assert noisy["pesq"] < same["pesq"] - 0.5
    assert noisy["stoi"] < same["stoi"] - 0.05


def test_silent_and_short_waves_are_counted_as_not_scored() -> None:
    silent, short = np.zeros(RATE, np.float32), bursts(0)[: RATE // 10]
    scores = speech.wave_scores([silent, short, bursts(0)], [silent, short, bursts(0)], RATE)
    assert scores["not_scored"] == {"pesq": 2, "stoi": 2}
    assert scores["stoi"] == pytest.approx(1.0, abs=1e-4)
    assert speech.wave_scores([silent], [silent], RATE)["pesq"] is None


def scored(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    code = run(["eval", "speech", *words, "--json", "--quiet"])
    out, err = capsys.readouterr()
    assert code == 0, err
    return dict(json.loads(out))


def test_recordings_are_scored_against_their_own_texts_and_speakers(
    trained: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    judge, unseen = trained
    record = scored(capsys, unseen, "--judge", judge)
    held_out = {key: value for key, value in record["judge"].items() if key.startswith("heldout_")}
    assert record["word_accuracy"] == held_out["heldout_word_accuracy"] >= 0.95
    assert record["speaker_accuracy"] == held_out["heldout_speaker_accuracy"] == 1.0
    assert record["frechet_distance"] == pytest.approx(0, abs=1e-6)
    assert record["frechet_n"] == held_out["heldout_latents"]
    source = open_audio(unseen)
    assert record["seconds"] == pytest.approx(sum(source.seconds(index) for index in range(len(source))))
    assert (record["n"], record["judge"]["sha256"]) == (16, checkpoint.load(Path(judge))["digest"])
    assert set(record["not_computed"]) == {"sim_o", "sim_r"}
    assert scored(capsys, unseen, "--judge", judge, "--limit", "5")["n"] == 5


def test_reconstructions_are_scored_next_to_their_originals(
    trained: tuple[str, str], tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judge, unseen = trained
    words = [unseen, "--judge", judge, "--tokenizer", str(tokenizer), "--limit", "4"]
    record = scored(capsys, *words)
    assert record == scored(capsys, *words)
    assert record["tokenizer"] == checkpoint.load(tokenizer)["digest"]
    assert record["frechet_distance"] > scored(capsys, unseen, "--judge", judge, "--limit", "4")["frechet_distance"]
    assert (record["pesq_mode"], record["sim_o_n"], record["sim_r"]) == ("nb", 4, None)
    assert record["sim_o"] < 0.999
    source, network = open_audio(unseen), model.load(tokenizer)[0]
    pairs = [encode_recording(network, source.wave(i, RATE), i, 0) for i in (0, 4, 8, 12)]
    expected = np.mean([np.abs(a - network.decode(codes)[0].T.numpy()).mean() for a, codes in pairs])
    assert record["mel_distance"] == pytest.approx(float(expected), rel=1e-5)


def sample_folder(folder: Path, prompt_seconds: float = 0.6, **changes: Any) -> str:
    """Two samples of ann and bob, of a prompt of two words and a rest of three."""
    rows = []
    for index, speaker in enumerate(("ann", "bob")):
        prompt, rest = string("low high", speaker, [0.28, 0.32]), string("low high low", speaker, [0.24, 0.4, 0.2])
        write_wav(folder / f"{index}.wav", np.concatenate([prompt, rest]), RATE)
        write_wav(folder / f"prompts/{index}.wav", prompt, RATE)
        row = {"file": f"{index}.wav", "index": index, "text": "low high low", "speaker": speaker}
        row |= {"prompt_seconds": prompt_seconds, "prompt": f"prompts/{index}.wav", "prompt_text": "low high"}
        rows.append(row | changes)
    record = {"format": "rdpm-speech", "version": 1, "samples": rows}
    (folder / "samples.json").write_text(json.dumps(record))
    return str(folder)


def test_samples_are_scored_without_their_prompts(
    trained: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judge = trained[0]
    record = scored(capsys, sample_folder(tmp_path / "a"), "--judge", judge)
    assert (record["n"], record["reference_words"], record["seconds"]) == (2, 6, pytest.approx(2 * 0.84))
    assert (record["wer"], record["speaker_accuracy"]) == (0.0, 1.0)
    assert (record["sim_o_n"], record["sim_r_n"]) == (2, 2)
    assert record["sim_o"] == pytest.approx(record["sim_r"], abs=1e-4)  # the prompt was not coded
    whole = scored(capsys, sample_folder(tmp_path / "b", prompt_seconds=0.0), "--judge", judge)
    assert whole["wer"] == pytest.approx(2 / 3)
    assert (whole["sim_r"], whole["sim_r_n"]) == (None, 0)
    joined = sample_folder(tmp_path / "d", text="low high low high low", prompt_text="", continues=True)
    record_of_all = scored(capsys, joined, "--judge", judge)
    assert (record_of_all["wer"], record_of_all["reference_words"]) == (0.0, 10)
    assert (record_of_all["sim_o"], record_of_all["seconds"]) == (record["sim_o"], record["seconds"])
    unsaid = scored(
        capsys, sample_folder(tmp_path / "e", prompt_text=""), "--judge", judge
    )  # as real strings are listed
    assert (unsaid["wer"], unsaid["reference_words"]) == (0.0, 6)
    swapped = scored(capsys, sample_folder(tmp_path / "c", prompt="prompts/1.wav"), "--judge", judge)
    assert swapped["sim_o"] < record["sim_o"] - 0.1


def test_speakers_that_are_not_known_are_said_so(
    trained: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, speaker, token in (("a", None, "not known"), ("b", "carl", "carl")):
        record = scored(capsys, sample_folder(tmp_path / name, speaker=speaker), "--judge", trained[0])
        assert record["speaker_accuracy"] is None
        assert token in record["not_computed"]["speaker_accuracy"]


@pytest.mark.parametrize(
    ("changes", "token"),
    [
        ({"file": "7.wav"}, "7.wav"), ({"prompt": "prompts/7.wav"}, "7.wav"), ({"prompt_seconds": 9.0}, "0.wav"),
        ({"text": "low purple"}, "purple"), ({"text": "?"}, "?"), ({"prompt_seconds": "long"}, "prompt_seconds"),
    ],
)  # fmt: skip
def test_samples_that_cannot_be_scored_are_named(
    changes: dict[str, Any], token: str, trained: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["eval", "speech", sample_folder(tmp_path / "a", **changes), "--judge", trained[0]]) == 3
    assert token in capsys.readouterr().err


def test_wrong_targets_and_options_are_refused(
    trained: tuple[str, str], tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = sample_folder(tmp_path / "a")
    other = tmp_path / "b"
    other.mkdir()
    (other / "samples.json").write_text(json.dumps({"format": "rdpm-samples", "samples": []}))
    judged = ["--judge", trained[0]]
    for words, code, token in (
        ([folder], 2, "--judge"),
        ([folder, *judged, "--tokenizer", str(tokenizer)], 2, "--tokenizer"),
        ([str(other), *judged], 3, "rdpm-samples"),
        ([folder, "--judge", str(tokenizer)], 3, "tokenizer"),
        ([folder, *judged, "--asr", "hubert:x"], 2, "hubert"),
        ([folder, *judged, "--speaker", "wavlm"], 2, "wavlm"),
        ([folder, "--speaker", "resemblyzer"], 2, "--judge"),
        ([folder, *judged, "--asr", "hubert-ctc:gone.pth"], 3, "gone.pth"),
        ([folder, *judged, "--speaker", f"wavlm-tdnn:{tokenizer}"], 3, "tokenizer.pt"),
        ([folder, *judged, "--asr", "whisper:nowhere"], 2, "whisper"),
    ):
        assert run(["eval", "speech", *words]) == code, words
        assert token in capsys.readouterr().err


def test_absent_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="faster_whisper") as raised:
        speech_networks.open_transcriber("whisper:folder")
    assert "pip install" in raised.value.hint
    with pytest.raises(UsageError, match="resemblyzer"):
        speech_networks.open_voices("resemblyzer")


def fake(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    module = ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)


def test_other_recognisers_take_the_place_of_the_judge(
    trained: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whisper hears one word too few, and a voice is the energy of each half of a wave."""

    class Model:
        def __init__(self, *args: Any, **options: Any) -> None: ...

        def transcribe(self, wave: Wave, **options: Any) -> tuple[list[Any], None]:
            assert len(wave) == round(0.84 * 16000)
            segment = ModuleType("segment")
            segment.text = " Low, 1 "  # type: ignore[attr-defined]
            return [segment], None

    class Encoder:
        def __init__(self, *args: Any, **options: Any) -> None: ...

        def embed_utterance(self, wave: Wave) -> Any:
            return np.array([1.0, float(len(wave) == round(0.84 * 16000))], np.float32)

    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny/model.bin").write_bytes(b"weights")
    (tmp_path / "pretrained.pt").write_bytes(b"weights")
    fake(monkeypatch, "faster_whisper", WhisperModel=Model)
    file, plain = str(tmp_path / "__init__.py"), lambda wave, rate: wave
    fake(monkeypatch, "resemblyzer", VoiceEncoder=Encoder, preprocess_wav=plain, __file__=file)
    folder = sample_folder(tmp_path / "a", text="low one high")
    record = scored(
        capsys, folder, "--judge", trained[0], "--asr", f"whisper:{tmp_path / 'tiny'}", "--speaker", "resemblyzer"
    )
    assert (record["wer"], record["speaker_accuracy"]) == (pytest.approx(1 / 3), 1.0)
    assert record["sim_o"] == pytest.approx(0.5**0.5)
    assert (record["asr"]["name"], record["voices"]["name"]) == ("whisper tiny", "resemblyzer")
    assert record["asr"]["sha256"] == record["voices"]["sha256"]
    alone = scored(capsys, folder, "--asr", f"whisper:{tmp_path / 'tiny'}", "--speaker", "resemblyzer")
    assert (alone["wer"], alone["sim_o"], alone["sim_r"]) == (record["wer"], record["sim_o"], record["sim_r"])
    assert (alone["judge"], alone["speaker_accuracy"], alone["frechet_distance"]) == (None, None, None)
    assert {"speaker_accuracy", "frechet_distance"} == set(alone["not_computed"])

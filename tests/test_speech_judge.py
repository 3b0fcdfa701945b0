"""The judge of speech: its network and file, its batches and training, transcripts and alignments."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tones import RATE, string, train_judge, write_tones

from rdpm_cli import recipes
from rdpm_cli.cli.app import run
from rdpm_cli.data.audio import AudioSource, open_audio
from rdpm_cli.data.mel import PRESETS, log_mel
from rdpm_cli.errors import CheckpointError, DataError, RecipeError
from rdpm_cli.evaluation import speech_judge
from rdpm_cli.evaluation.judge import JudgeConfig
from rdpm_cli.evaluation.speech_judge import BLANK, Heard, SpeechBatches, SpeechJudge, SpeechJudgeConfig, padded

LATENT = 0.04  # seconds, of speech8
WORDS, SPEAKERS = ("high", "low", "mid"), ("ann", "bob")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return train_judge(tmp_path_factory.mktemp("tones"))


@pytest.fixture(scope="module")
def judge(trained: tuple[Path, str]) -> SpeechJudge:
    return speech_judge.load(trained[0])[0]


@pytest.fixture(scope="module")
def source(trained: tuple[Path, str]) -> AudioSource:
    return open_audio(trained[1])


def untrained(width: int = 16) -> SpeechJudge:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SpeechJudge("speech8", width, 8, WORDS, SPEAKERS, durations=True).eval()


def batches(source: AudioSource, seed: int = 0) -> SpeechBatches:
    return SpeechBatches(source, range(len(source)), untrained(), 16, seed)


def test_a_trained_judge_tells_the_words_and_speakers_of_unseen_strings(
    trained: tuple[Path, str], judge: SpeechJudge, source: AudioSource
) -> None:
    provenance = speech_judge.load(trained[0])[1]["provenance"]
    waves = [source.wave(index, RATE) for index in range(len(source))]
    right = sum(x == y for x, y in zip(judge.transcribe(waves), source.texts or (), strict=True))
    names, embeddings_NE = judge.speakers(waves)
    assert right >= 14
    assert names == source.speakers
    assert provenance["heldout_word_accuracy"] >= 0.95
    assert provenance["heldout_speaker_accuracy"] == 1.0
    assert np.allclose(np.linalg.norm(embeddings_NE, axis=1), 1, atol=1e-5)
    assert provenance["heldout_latents"] == sum(-(-len(wave) // 320) for wave in waves)


def test_a_finished_judge_is_not_trained_again_and_another_recipe_is_refused(trained: tuple[Path, str]) -> None:
    final, unseen = trained
    before = final.read_bytes()
    words = ["eval", "judge", str(final.parent.parent / "seen"), str(final.parent), "--recipe", "speech8-sin"]
    sizes = ["width=24", "embedding=8", "train.lr=4e-3", "train.warmup_steps=10"]
    assert run([*words, "--heldout", unseen, *sizes, "train.steps=300"]) == 0
    assert run([*words, "--heldout", unseen, *sizes, "train.steps=301"]) == 2
    assert final.read_bytes() == before


def test_a_file_can_be_inspected_and_verified(trained: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", str(trained[0])]) == 0
    capsys.readouterr()
    assert run(["inspect", str(trained[0]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["config"]["words"] == sorted(WORDS)


@pytest.mark.parametrize("make", [untrained, None])
def test_padding_changes_nothing(make: Callable[[], SpeechJudge] | None, judge: SpeechJudge) -> None:
    network = make() if make else judge
    waves = [string("low high", "ann", [0.3, 0.2]), string("mid mid low", "bob", [0.5, 0.6, 0.41])]
    mels = [log_mel(wave, network.features, 4) for wave in waves]
    x_BMF, frames_B = padded(mels, network.features)
    x_BMF[0, :, frames_B[0] :] = 100.0
    with torch.no_grad():
        together = network(x_BMF, frames_B)
        alone = [network(*padded([mel], network.features)) for mel in mels]
    for row, heard in enumerate(alone):
        S = int(frames_B[row]) // 4
        assert torch.allclose(together.log_p_BSU[row, :S], heard.log_p_BSU[0], atol=1e-4)
        assert torch.allclose(together.features_BDS[row, :, :S], heard.features_BDS[0], atol=1e-4)
        assert torch.allclose(together.embedding_BE[row], heard.embedding_BE[0], atol=1e-4)


def test_a_batch_depends_only_on_seed_and_step_and_a_rank_takes_its_rows(source: AudioSource) -> None:
    first, second, other = batches(source), batches(source), batches(source, seed=1)
    first.batch_at(0, range(16))
    a, b = first.batch_at(3, range(16)), second.batch_at(3, range(16))
    assert torch.equal(a.x_BMF, b.x_BMF)
    assert torch.equal(a.units_BN, b.units_BN)
    assert not torch.equal(a.frames_B, other.batch_at(3, range(16)).frames_B)
    part = second.batch_at(3, range(8, 16))
    F = part.x_BMF.shape[2]
    assert torch.equal(part.x_BMF, a.x_BMF[8:, :, :F])
    assert torch.equal(part.speakers_B, a.speakers_B[8:])


def test_the_path_of_a_batch_has_the_durations_of_the_words(source: AudioSource) -> None:
    assert source.word_seconds is not None
    made = batches(source)
    for index, seconds in enumerate(source.word_seconds):
        expected = [round(value / LATENT) for value in seconds]
        path = made._path(index, 0, 4 * sum(expected))
        units = [unit for unit, length in zip(made.units[index], expected, strict=True) for unit in [unit] * length]
        ends = np.cumsum(expected) - 1
        assert [path[end] for end in ends] == [BLANK] * len(ends)
        assert [x for place, x in enumerate(path) if place not in ends] == [
            x for place, x in enumerate(units) if place not in ends
        ]
        assert made._path(index, 4, 4 * sum(expected) + 4)[1:] == path


def test_greedy_decoding_merges_repetitions_and_drops_blanks() -> None:
    path = torch.tensor([0, 2, 2, 0, 2, 3, 3, 1, 0])
    log_p_BSU = torch.nn.functional.one_hot(path, 4).float().mul(5).log_softmax(1)[None]
    empty = torch.zeros(1, 0)
    heard = Heard(empty, log_p_BSU, log_p_BSU, empty, empty, torch.tensor([9]))
    assert untrained().spell(heard) == "low low mid high"


@pytest.mark.parametrize("durations", [True, False])
def test_an_alignment_is_near_the_known_ends_of_the_words(
    durations: bool, judge: SpeechJudge, source: AudioSource, tmp_path: Path
) -> None:
    """Within two latents at most, and of a judge that knows durations within one on average."""
    if not durations:
        judge = speech_judge.load(train_judge(tmp_path, durations=False)[0])[0]
    assert source.word_seconds is not None
    errors = []
    for index, seconds in enumerate(source.word_seconds):
        wave = source.wave(index, RATE)
        aligned = judge.align(wave, (source.texts or ())[index])
        assert sum(aligned) == pytest.approx(len(wave) / RATE)
        assert min(aligned) > 0
        errors += np.abs(np.cumsum(aligned) - np.cumsum(seconds)).tolist()
    assert np.mean(errors) <= (LATENT if durations else 2 * LATENT)


def test_texts_that_are_too_long_or_unknown_are_refused(judge: SpeechJudge) -> None:
    wave = string("low low", "ann", [0.08, 0.08])
    with pytest.raises(DataError, match="5 words"):
        judge.align(wave, "low mid low mid high")
    with pytest.raises(DataError, match="3 words"):  # four latents hold three words, but not with blanks between
        judge.align(wave, "low low low")
    assert len(judge.align(wave, "low mid low")) == 3
    with pytest.raises(CheckpointError, match="purple"):
        judge.align(wave, "low purple")


@pytest.mark.parametrize(
    ("rows", "token"),
    [
        ({"text": "low purple", "speaker": "ann"}, "purple"), ({"text": "low mid", "speaker": "carl"}, "carl"),
        ({"text": "low mid"}, "speakers"), ({}, "texts"),
    ],
)  # fmt: skip
def test_held_out_recordings_that_the_judge_cannot_know_are_refused(
    rows: dict[str, Any], token: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen, unseen = write_tones(tmp_path / "seen", 8, 0), write_tones(tmp_path / "unseen", 2, 1)
    lines = [json.dumps({"audio_filepath": f"{number:03d}.wav", **rows}) for number in range(2)]
    (tmp_path / "unseen/manifest.jsonl").write_text("\n".join(lines))
    words = ["eval", "judge", seen, str(tmp_path / "run"), "--recipe", "speech8-sin", "--heldout", unseen]
    assert run(words) == 3
    assert token in capsys.readouterr().err
    assert not (tmp_path / "run/judge.pt").exists()


def test_a_size_of_images_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen = write_tones(tmp_path / "seen", 8, 0)
    assert run(["eval", "judge", seen, str(tmp_path / "run"), "--recipe", "speech8-sin", "--resolution", "32"]) == 2
    assert "--resolution" in capsys.readouterr().err


def test_a_recipe_has_a_judge_of_sound_or_of_images() -> None:
    sound, images = recipes.load_recipe("speech8-sin").judge, recipes.load_recipe("judge").judge
    assert isinstance(sound, SpeechJudgeConfig)
    assert isinstance(images, JudgeConfig)
    assert sound.features in PRESETS
    with pytest.raises(RecipeError, match="embeding"):
        recipes.load_recipe("speech8-sin", ["embeding=3"], "judge")
    with pytest.raises(RecipeError, match="features"):
        recipes.load_recipe("speech8-sin", ["features=speech9"], "judge")


def test_a_printed_recipe_gives_the_same_judge(tmp_path: Path) -> None:
    recipe = recipes.load_recipe("speech8-sin")
    (tmp_path / "copy.yaml").write_text(recipes.to_yaml(recipe))
    again = recipes.load_recipe(str(tmp_path / "copy.yaml"))
    assert again.judge == recipe.judge
    assert again.digest() == recipe.digest()

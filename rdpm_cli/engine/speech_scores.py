"""eval speech: scores of recordings, of their reconstructions, and of the sounds that `rdpm sample` drew."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, Field, ValidationError

from rdpm_cli import files, progress
from rdpm_cli.data import audio, mel
from rdpm_cli.data.audio import AudioSource, open_audio, resampled
from rdpm_cli.data.folder import RECORD, SPEECH, is_unfinished
from rdpm_cli.data.mel import Wave
from rdpm_cli.data.source import spread
from rdpm_cli.distributed import one_thread, process_group
from rdpm_cli.errors import CheckpointError, DataError, UsageError, some_of
from rdpm_cli.evaluation import metrics, speech, speech_judge
from rdpm_cli.evaluation.recon import encode_recording
from rdpm_cli.evaluation.score import rank_notes
from rdpm_cli.evaluation.speech import Transcriber, Voices, normalise
from rdpm_cli.evaluation.speech_judge import SpeechJudge
from rdpm_cli.runs import Result, versions
from rdpm_cli.tokenizer import model
from rdpm_cli.tokenizer.inputs import MelInputs
from rdpm_cli.tokenizer.model import Tokenizer

NOISE_SEED = 0  # of the tokenizer's `eval` noise

At = Callable[[int], Wave]  # rate -> the wave at this number of samples a second


@dataclass
class Sound:
    """A sound to score. prompt: the original one; decoded_prompt: as it went through tokenizer and vocoder."""

    name: str
    wave: At
    text: str
    speaker: str | None
    prompt: At | None = None
    decoded_prompt: At | None = None


class SampleRow(BaseModel):
    """What samples.json says of a drawn sound. prompt_seconds: the beginning of the file that is the prompt."""

    file: str
    text: str
    speaker: str | None = None
    prompt_seconds: float = Field(0.0, ge=0)
    prompt: str | None = None


def eval_speech(
    target: str, judge: str, *, asr: str | None = None, speaker: str | None = None, tokenizer: Path | None = None,
    limit: int | None = None, device: str = "auto", reading: dict[str, Any] | None = None,
) -> Result:  # fmt: skip
    """Words, voices and their Fréchet distance of a source with texts or of drawn sounds, by a judge of speech.

    asr: whisper:FOLDER, speaker: resemblyzer, in the judge's place. tokenizer: score the reconstructions by it."""
    loaded, content = speech_judge.load(Path(judge))
    transcriber = speech.open_transcriber(asr) if asr else None
    voices = speech.open_voices(speaker) if speaker else None
    record: dict[str, Any] = {"metric": "speech"}
    with process_group(device) as rank_device:
        loaded.to(rank_device)
        if (Path(target) / RECORD).is_file():
            if tokenizer:
                message = "--tokenizer is for recordings: drawn sounds have been through their tokenizer"
                raise UsageError(message, "leave it out")
            sounds, digest, pairs = drawn_sounds(Path(target), limit), files.sha256_file(Path(target) / RECORD), None
        elif is_unfinished(Path(target)):
            raise DataError(f"{target} holds samples that are not finished", "run the same `rdpm sample` again")
        else:
            source = open_audio(target, **(reading or {}))
            indices, digest, pairs = spread(len(source), limit), source.digest(), None
            sounds = source_sounds(source, indices)
            if tokenizer:
                network, tokenizer_content = model.load(tokenizer)
                sounds, pairs = _reconstructed(source, indices, sounds, network.to(rank_device))
                record["tokenizer"] = tokenizer_content["digest"]
        record |= _scores(sounds, loaded, transcriber, voices)
        record |= pairs or {}
    identity = {"name": Path(judge).name, "sha256": content["digest"]}
    provenance = content["provenance"]
    identity |= {name: value for name, value in provenance.items() if name.startswith("heldout")}
    identity |= {"rate": loaded.features.rate}
    libraries = {name: version(name) for name in ("jiwer", *(("pesq", "pystoi") if pairs else ()))}
    return Result("score", {
        **record, "normaliser": speech.NORMALISER, "judge": identity,
        "asr": transcriber.identity() if transcriber else "judge", "voices": voices.identity() if voices else "judge",
        "target": {"name": target, "count": len(sounds), "digest": digest}, "options": {"limit": limit},
        "versions": {**versions(), **libraries},
    })  # fmt: skip


def source_sounds(source: AudioSource, indices: Sequence[int]) -> list[Sound]:
    """Recordings with their own texts, and speakers where they are known. Raises DataError without texts."""
    if source.texts is None:
        raise DataError(f"{source.spec} has no texts", "name recordings whose texts are listed, or a folder of samples")
    speakers: Sequence[str | None] = source.speakers or [None] * len(source)
    return [
        Sound(source.names[index], partial(source.wave, index), source.texts[index], speakers[index])
        for index in indices
    ]


def drawn_sounds(folder: Path, limit: int | None) -> list[Sound]:
    """The sounds of a folder that `rdpm sample` wrote, without their prompts. Raises DataError."""
    record, hint = files.read_json(folder / RECORD), "sample again with `rdpm sample`"
    if record.get("format") != SPEECH:
        raise DataError(f"{folder / RECORD} is not a record of drawn sounds: {record.get('format')}", hint)
    try:
        rows = [SampleRow.model_validate(row) for row in record["samples"]]
    except (KeyError, TypeError, ValidationError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{folder / RECORD} is damaged: {reason}", hint) from error
    if not rows:
        raise DataError(f"{folder} holds no samples", hint)
    return [_drawn(folder, rows[number]) for number in spread(len(rows), limit)]


def _drawn(folder: Path, row: SampleRow) -> Sound:
    """A sound of a folder. Raises AudioError naming a file that cannot be read or is all prompt."""

    def read(name: str) -> tuple[Wave, int]:
        with audio.audio_errors(str(folder), name):
            return audio.decode((folder / name).read_bytes())

    whole, stored = read(row.file)
    start = round(row.prompt_seconds * stored)
    if start >= len(whole):
        reason = f"it lasts {len(whole) / stored:g} s, and its prompt {row.prompt_seconds:g}"
        raise audio.unreadable(str(folder), row.file, reason)
    return Sound(
        row.file, partial(resampled, whole[start:], stored), row.text, row.speaker,
        partial(resampled, *read(row.prompt)) if row.prompt else None,
        partial(resampled, whole[:start], stored) if start else None,
    )  # fmt: skip


def _reconstructed(
    source: AudioSource, indices: Sequence[int], sounds: Sequence[Sound], tokenizer: Tokenizer
) -> tuple[list[Sound], dict[str, Any]]:
    """Sounds passed through the tokenizer and Griffin-Lim, and how near they are to the originals.

    A sound's prompt is the original, so that SIM-o says whether the voice has stayed."""
    if not isinstance(tokenizer.inputs, MelInputs):
        raise CheckpointError("the tokenizer is one of images", "give one of sound, of a recipe with kind: mel1d")
    rate, recons, distances = tokenizer.inputs.features.rate, list[Sound](), list[float]()
    originals, others = list[Wave](), list[Wave]()
    with progress.Bar("reconstruct", len(indices), "sounds") as bar:
        for sound, index in zip(sounds, indices, strict=True):
            original = sound.wave(rate)
            spectrum, codes_BTS = encode_recording(tokenizer, original, index, NOISE_SEED)
            with one_thread():
                recon = tokenizer.inputs.items(tokenizer.decode(codes_BTS))[0]
            distances.append(mel.mel_distance(spectrum, recon))
            wave = mel.griffin_lim(recon, tokenizer.inputs.features, len(original))
            originals.append(original)
            others.append(wave)
            recons.append(Sound(sound.name, partial(resampled, wave, rate), sound.text, sound.speaker, sound.wave))
            bar.advance(1)
    values = {"mel_distance": float(np.mean(distances)), **speech.wave_scores(originals, others, rate)}
    return recons, values


def _scores(
    sounds: Sequence[Sound], judge: SpeechJudge, transcriber: Transcriber | None, voices: Voices | None
) -> dict[str, Any]:
    """The scores of words, speakers, voices and features, and why some are not computed."""
    references = [sound.text for sound in sounds]
    if transcriber is None:
        check_words(judge, references)
    waves, rate = [sound.wave(judge.features.rate) for sound in sounds], judge.features.rate
    heard = list(_shown(judge.hear(waves), len(waves)))
    hypotheses = [judge.spell(one) for one in heard]
    if transcriber:
        hypotheses = transcriber.transcribe([sound.wave(transcriber.rate) for sound in sounds])
    features_ND = torch.cat([one.features_BDS[0].mT for one in heard]).cpu().numpy()
    names = [judge.speaker_names[int(one.speakers_BP.argmax())] for one in heard]
    values = {"n": len(sounds), "seconds": sum(map(len, waves)) / rate, **speech.word_scores(references, hypotheses)}
    right, absent = _speakers(sounds, names, judge)
    values |= {"speaker_accuracy": None if right is None else float(np.mean(right)), "speakers_n": len(right or ())}
    for name, prompts in (("sim_o", [s.prompt for s in sounds]), ("sim_r", [s.decoded_prompt for s in sounds])):
        values[name], values[f"{name}_n"] = _similarity(sounds, prompts, judge, voices)
        if values[name] is None:
            absent[name] = "no sound has a prompt in its file" if name == "sim_r" else "no sound has a prompt"
    real = metrics.Statistics(judge.real_mean_D.cpu().numpy(), judge.real_covariance_DD.cpu().numpy(), 0)
    values["frechet_distance"], values["frechet_n"] = None, len(features_ND)
    if len(features_ND) > 1:
        values["frechet_distance"] = metrics.frechet_distance(metrics.statistics(features_ND), real)
    else:
        absent["frechet_distance"] = "it needs at least 2 latents"
    note = "frechet_distance: of the judge's latents to those of the recordings that were held out from its training"
    return {**values, "not_computed": absent, "notes": [note, *rank_notes(len(features_ND), features_ND.shape[1])]}


def check_words(judge: SpeechJudge, texts: Sequence[str]) -> None:
    """Raise CheckpointError naming a word of these texts that the judge does not know."""
    words = set(normalise(" ".join(judge.words)).split())
    for sentence in texts:
        if unknown := [word for word in normalise(sentence).split() if word not in words]:
            hint = f"it knows {some_of(judge.words, 24)}; train one on texts with this word, or give --asr"
            raise CheckpointError(f"the judge does not know the word '{unknown[0]}' of '{sentence:.80}'", hint)


def _speakers(
    sounds: Sequence[Sound], heard: Sequence[str], judge: SpeechJudge
) -> tuple[list[bool] | None, dict[str, str]]:
    """Whether each sound with a speaker is taken for that speaker; or None, and why."""
    pairs = [(sound.speaker, name) for sound, name in zip(sounds, heard, strict=True) if sound.speaker is not None]
    if unknown := sorted({speaker for speaker, _ in pairs} - set(judge.speaker_names)):
        return None, {"speaker_accuracy": f"the judge does not know the speakers {some_of(unknown)}"}
    if not pairs:
        return None, {"speaker_accuracy": "the speakers of the sounds are not known"}
    return [speaker == name for speaker, name in pairs], {}


def _similarity(
    sounds: Sequence[Sound], prompts: Sequence[At | None], judge: SpeechJudge, voices: Voices | None
) -> tuple[float | None, int]:
    """The mean cosine of sounds and their prompts, and the number of sounds that have one."""
    pairs = [(sound.wave, prompt) for sound, prompt in zip(sounds, prompts, strict=True) if prompt]
    if not pairs:
        return None, 0
    rate = voices.rate if voices else judge.features.rate
    sides = [[wave(rate) for wave in side] for side in zip(*pairs, strict=True)]
    a_NE, b_NE = (voices.embed(side) if voices else judge.speakers(side)[1] for side in sides)
    return speech.similarity(a_NE, b_NE), len(pairs)


def _shown(items: Iterator[Any], count: int) -> Iterator[Any]:
    """The items, with a bar of how many there were."""
    with progress.Bar("score", count, "sounds") as bar:
        for item in items:
            yield item
            bar.advance(1)

"""eval speech: scores of recordings, of their reconstructions, and of the sounds that `rdpm sample` drew."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
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
from rdpm_cli.data.vocoders import open_vocoder
from rdpm_cli.distributed import one_thread, process_group
from rdpm_cli.errors import CheckpointError, DataError, UsageError, some_of
from rdpm_cli.evaluation import metrics, speech, speech_judge, speech_networks
from rdpm_cli.evaluation.recon import encode_recording
from rdpm_cli.evaluation.score import rank_notes
from rdpm_cli.evaluation.speech import Transcriber, Voices, normalise
from rdpm_cli.evaluation.speech_judge import Heard, SpeechJudge
from rdpm_cli.runs import Result, versions
from rdpm_cli.tokenizer import model
from rdpm_cli.tokenizer.inputs import MelInputs
from rdpm_cli.tokenizer.model import Tokenizer

NOISE_SEED = 0  # of the tokenizer's `eval` noise

SIMILARITY = {
    "sim_o": "mean cosine of the generated sound, or the reconstruction, and the original prompt, or recording",
    "sim_r": "mean cosine of the generated sound and the prompt as tokenizer and vocoder return it",
}

At = Callable[[int], Wave]  # rate -> the wave at this number of samples a second


@dataclass
class Sound:
    """A sound to score. prompt: the original one; decoded_prompt: as it went through tokenizer and vocoder.

    spoken: where the text is said, if not in `wave`: the prompt and the wave."""

    name: str
    wave: At
    text: str
    speaker: str | None
    prompt: At | None = None
    decoded_prompt: At | None = None
    spoken: At | None = None


class SampleRow(BaseModel):
    """What samples.json says of a drawn sound. prompt_seconds: the beginning of the file that is the prompt.

    continues: `text` is that of the prompt, too."""

    file: str
    text: str
    speaker: str | None = None
    prompt_seconds: float = Field(0.0, ge=0)
    prompt: str | None = None
    continues: bool = False


@dataclass
class Judges:
    """Who scores. transcriber, voices: in the place of the judge, which then may be absent. content: of its file."""

    judge: SpeechJudge | None
    transcriber: Transcriber | None
    voices: Voices | None
    name: str = ""
    content: dict[str, Any] = field(default_factory=dict)

    def to(self, device: torch.device) -> None:
        others = [one.network for one in (self.transcriber, self.voices) if one]
        for network in filter(None, (self.judge, *others)):
            network.to(device)

    def record(self) -> dict[str, Any]:
        """For results: names, hashes, rates, the normaliser, and what each similarity compares."""
        judge = None
        if self.judge:
            provenance = self.content["provenance"]
            judge = {"name": self.name, "sha256": self.content["digest"], "rate": self.judge.features.rate}
            judge |= {name: value for name, value in provenance.items() if name.startswith("heldout")}
        asr, voices = (one.identity() if one else "judge" for one in (self.transcriber, self.voices))
        return {"normaliser": speech.NORMALISER, "judge": judge, "asr": asr, "voices": voices, "similarity": SIMILARITY}


def open_judges(judge: str | None, asr: str | None, speaker: str | None) -> Judges:
    """The judges that options name. Raises UsageError, without which there is nobody to score, and CheckpointError."""
    if judge is None and not (asr and speaker):
        message = "speech is scored by a --judge, or by other judges of both words and voices"
        raise UsageError(message, "give --judge FILE, of `rdpm eval judge`, or both --asr and --speaker")
    loaded, content = speech_judge.load(Path(judge)) if judge else (None, {})
    transcriber = speech_networks.open_transcriber(asr) if asr else None
    voices = speech_networks.open_voices(speaker) if speaker else None
    return Judges(loaded, transcriber, voices, Path(judge or "").name, content)


def eval_speech(
    target: str, judge: str | None = None, *, asr: str | None = None, speaker: str | None = None,
    tokenizer: Path | None = None, vocoder: str | None = None, limit: int | None = None, device: str = "auto",
    reading: dict[str, Any] | None = None,
) -> Result:  # fmt: skip
    """Words, voices and their Fréchet distance of a source with texts or of drawn sounds, by a judge of speech.

    asr: whisper:FOLDER or hubert-ctc:FILE, speaker: resemblyzer or wavlm-tdnn:FILE, in the judge's place.
    tokenizer: score the reconstructions by it, with the vocoder's waves; None: Griffin-Lim's."""
    if vocoder and not tokenizer:
        raise UsageError("--vocoder makes the waves of --tokenizer", "give --tokenizer, or leave it out")
    judges = open_judges(judge, asr, speaker)
    record: dict[str, Any] = {"metric": "speech"}
    with process_group(device) as rank_device:
        judges.to(rank_device)
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
                sounds, pairs = _reconstructed(source, indices, sounds, network.to(rank_device), vocoder)
                record["tokenizer"] = tokenizer_content["digest"]
        record |= scores(sounds, judges)
        record |= pairs or {}
    libraries = {name: version(name) for name in ("jiwer", *(("pesq", "pystoi") if pairs else ()))}
    return Result("score", {
        **record, **judges.record(), "target": {"name": target, "count": len(sounds), "digest": digest},
        "options": {"limit": limit}, "versions": {**versions(), **libraries},
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
        partial(resampled, whole, stored) if row.continues else None,
    )  # fmt: skip


def _reconstructed(
    source: AudioSource, indices: Sequence[int], sounds: Sequence[Sound], tokenizer: Tokenizer, vocoder: str | None
) -> tuple[list[Sound], dict[str, Any]]:
    """Sounds passed through the tokenizer and a vocoder, and how near they are to the originals.

    A sound's prompt is the original, so that SIM-o says whether the voice has stayed."""
    if not isinstance(tokenizer.inputs, MelInputs):
        raise CheckpointError("the tokenizer is one of images", "give one of sound, of a recipe with kind: mel1d")
    rate, recons, distances = tokenizer.inputs.features.rate, list[Sound](), list[float]()
    voice = open_vocoder(vocoder, tokenizer.inputs.features, next(tokenizer.parameters()).device)
    originals, others = list[Wave](), list[Wave]()
    with progress.Bar("reconstruct", len(indices), "sounds") as bar:
        for sound, index in zip(sounds, indices, strict=True):
            original = sound.wave(rate)
            spectrum, codes_BTS = encode_recording(tokenizer, original, index, NOISE_SEED)
            with one_thread():
                recon = tokenizer.inputs.items(tokenizer.decode(codes_BTS))[0]
            distances.append(mel.mel_distance(spectrum, recon))
            wave = voice.wave(recon)[: len(original)]
            originals.append(original)
            others.append(wave)
            recons.append(Sound(sound.name, partial(resampled, wave, rate), sound.text, sound.speaker, sound.wave))
            bar.advance(1)
    values = {"mel_distance": float(np.mean(distances)), **speech.wave_scores(originals, others, rate)}
    return recons, {**values, "vocoder": voice.identity}


def scores(sounds: Sequence[Sound], judges: Judges) -> dict[str, Any]:
    """The scores of words, speakers, voices and features, and why some are not computed."""
    references, absent = [sound.text for sound in sounds], dict[str, str]()
    if judges.judge and not judges.transcriber:
        check_words(judges.judge, references)
    rate = judges.judge.features.rate if judges.judge else speech_networks.RATE
    waves = [sound.wave(rate) for sound in sounds]
    heard = list(_shown(judges.judge.hear(waves), len(waves))) if judges.judge else []
    values: dict[str, Any] = {"n": len(sounds), "seconds": sum(map(len, waves)) / rate}
    values |= speech.word_scores(references, _transcripts(sounds, heard, judges))
    notes = list[str]()
    if joined := sum(sound.spoken is not None for sound in sounds):
        notes.append(f"words: of {joined} sounds with their prompts, whose words are in their texts")
    if judges.judge:
        of_judge, why, more = _of_judge(sounds, heard, judges.judge)
        values, absent, notes = values | of_judge, absent | why, notes + more
    else:
        unknown = ("speaker_accuracy", "frechet_distance")
        values, absent = values | dict.fromkeys(unknown), dict.fromkeys(unknown, "it needs --judge")
    for name, prompts in (("sim_o", [s.prompt for s in sounds]), ("sim_r", [s.decoded_prompt for s in sounds])):
        values[name], values[f"{name}_n"] = _similarity(sounds, prompts, judges)
        if values[name] is None:
            absent[name] = "no sound has a prompt in its file" if name == "sim_r" else "no sound has a prompt"
    return {**values, "not_computed": absent, "notes": notes}


def _transcripts(sounds: Sequence[Sound], heard: Sequence[Heard], judges: Judges) -> list[str]:
    """What is said in each sound."""
    if transcriber := judges.transcriber:
        texts = (transcriber.transcribe([(sound.spoken or sound.wave)(transcriber.rate)])[0] for sound in sounds)
        return list(_shown(texts, len(sounds)))
    judge = judges.judge
    assert judge is not None
    return [
        judge.transcribe([sound.spoken(judge.features.rate)])[0] if sound.spoken else judge.spell(one)
        for sound, one in zip(sounds, heard, strict=True)
    ]


def _of_judge(
    sounds: Sequence[Sound], heard: Sequence[Heard], judge: SpeechJudge
) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """The scores that only a judge has: speaker accuracy and Fréchet distance; why some are absent; notes."""
    features_ND = torch.cat([one.features_BDS[0].mT for one in heard]).cpu().numpy()
    names = [judge.speaker_names[int(one.speakers_BP.argmax())] for one in heard]
    right, absent = _speakers(sounds, names, judge)
    values = {"speaker_accuracy": None if right is None else float(np.mean(right)), "speakers_n": len(right or ())}
    real = metrics.Statistics(judge.real_mean_D.cpu().numpy(), judge.real_covariance_DD.cpu().numpy(), 0)
    values |= {"frechet_distance": None, "frechet_n": len(features_ND)}
    if len(features_ND) > 1:
        values["frechet_distance"] = metrics.frechet_distance(metrics.statistics(features_ND), real)
    else:
        absent["frechet_distance"] = "it needs at least 2 latents"
    note = "frechet_distance: of the judge's latents to those of the recordings that were held out from its training"
    return values, absent, [note, *rank_notes(len(features_ND), features_ND.shape[1])]


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


def _similarity(sounds: Sequence[Sound], prompts: Sequence[At | None], judges: Judges) -> tuple[float | None, int]:
    """The mean cosine of sounds and their prompts, and the number of sounds that have one."""
    pairs = [(sound.wave, prompt) for sound, prompt in zip(sounds, prompts, strict=True) if prompt]
    if not pairs:
        return None, 0
    judge, voices = judges.judge, judges.voices
    if voices:
        embed, rate = voices.embed, voices.rate
    else:
        assert judge is not None
        embed, rate = lambda waves: judge.speakers(waves)[1], judge.features.rate
    a_NE, b_NE = (np.concatenate([embed([wave(rate)]) for wave in side]) for side in zip(*pairs, strict=True))
    return speech.similarity(a_NE, b_NE), len(pairs)


def _shown(items: Iterator[Any], count: int) -> Iterator[Any]:
    """The items, with a bar of how many there were."""
    with progress.Bar("score", count, "sounds") as bar:
        for item in items:
            yield item
            bar.advance(1)

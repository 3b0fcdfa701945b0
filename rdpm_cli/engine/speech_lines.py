"""What is to be said, as a user writes it, and as numbers: texts, prompts of voices, and how long it takes."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pydantic
import torch
from torch import Tensor

from rdpm_cli import progress
from rdpm_cli.codes.ragged import fits, latents_of
from rdpm_cli.data import audio, mel
from rdpm_cli.data import text as texts
from rdpm_cli.distributed import one_thread
from rdpm_cli.errors import UsageError
from rdpm_cli.evaluation.speech_judge import SpeechJudge
from rdpm_cli.generator.conditions import LONGEST
from rdpm_cli.generator.registry import LoadedGenerator
from rdpm_cli.generator.speech_sampler import Spoken, predicted_durations, predicted_length, spoken
from rdpm_cli.tokenizer.inputs import MelInputs

Seconds = Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]
SILENCE = 1e-3  # the largest sample of a prompt without a voice
LOUDEST, CLIPPED = 0.999, 0.01  # a sample that is clipped; the share of them that is warned of
Rule = Literal["predictor", "rate"]  # of the length of what is said, where no seconds are given


@pydantic.dataclasses.dataclass(frozen=True, config=pydantic.ConfigDict(extra="forbid"))
class Line:
    """A sample to draw. prompt: a sound file, and what is said in it. speaker: its name, where that is known.

    prompt_seconds, word_seconds: how long each word of the prompt, and of the text, lasts; default: the prompt's are
    aligned by a judge, the text's are predicted. seconds: of the text as a whole. cut: the stretch of the prompt, from
    and to in seconds, in whose place new sound is drawn. With it, or where the text continues the prompt, `text` is
    that of the prompt, too."""

    text: str
    prompt: str | None = None
    prompt_text: str = ""
    speaker: str | None = None
    prompt_seconds: tuple[Seconds, ...] | None = None
    word_seconds: tuple[Seconds, ...] | None = None
    seconds: Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)] | None = None
    cut: tuple[Seconds, Seconds] | None = None
    continues: bool = False


@dataclasses.dataclass
class Prepared(Spoken):
    """A line as numbers. wave: the prompt's. source: where the durations of the prompt and of the text come from."""

    wave: mel.Wave
    source: dict[str, str]


def read_lines(path: Path) -> list[Line]:
    """A .jsonl file with the fields of a Line; prompts are relative to it. Raises UsageError."""
    lines = []
    try:
        rows = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--list {path} cannot be read: {error}", "give a .jsonl file") from error
    for number, row in enumerate(rows, 1):
        if not row.strip():
            continue
        try:
            line = Line(**dict(json.loads(row)))
        except (ValueError, TypeError) as error:
            reason = str(error)
            if isinstance(error, pydantic.ValidationError):
                first = error.errors()[0]
                reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
            hint = 'each line is {"text": ..., "prompt": "a.wav", "prompt_text": ...}'
            raise UsageError(f"{path}, line {number}: {reason}", hint) from error
        lines.append(dataclasses.replace(line, prompt=str(path.parent / line.prompt) if line.prompt else None))
    if not lines:
        raise UsageError(f"{path} holds no lines", "write one sample a line")
    return lines


def lines_of(words: Mapping[str, Any], init: str | None) -> list[Line]:
    """The lines of `rdpm sample`'s options: of --list, or one. Raises UsageError for those that exclude each other."""
    prompt, (start, end) = words["prompt"], (words["start"], words["end"])
    one = {"--text": words["text"], "--prompt": prompt, "--prompt-text": words["prompt_text"], "--init": init}
    one |= {"--seconds": words["seconds"], "--from": start, "--to": end}
    if words["lines"]:
        if named := [name for name, value in one.items() if value is not None and value != ""]:
            raise UsageError(f"{named[0]} is for one sample, and --list has the samples", "leave one of them out")
        return read_lines(words["lines"])
    if init and prompt:
        raise UsageError("--init and --prompt exclude each other", "the voice is that of --init")
    if (init is None, start is None, end is None) not in ((True,) * 3, (False,) * 3):
        raise UsageError("--init, --from and --to go together", "they name a stretch of sound that is drawn again")
    if init and words["prompt_text"]:
        raise UsageError("--prompt-text is for --prompt", "with --init --text is that of the whole recording")
    cut = (start, end) if init else None
    text = words["text"] or ""
    return [Line(text, init or prompt, words["prompt_text"], seconds=words["seconds"], cut=cut)]


def sentences_of(line: Line) -> list[Line]:
    """A line for each sentence of its text. Raises UsageError where only its whole text has a duration or a place."""
    pieces = [piece for piece in re.split(r"(?<=[.!?])\s+", line.text) if texts.normalise(piece)]
    if len(pieces) < 2:
        return [line]
    if line.word_seconds or line.seconds or line.cut:
        message = f"--sentences: '{line.text:.80}' has word_seconds, seconds or a cut, as a whole"
        raise UsageError(message, "leave one of them out")
    return [dataclasses.replace(line, text=piece) for piece in pieces]


def prepare(
    loaded: LoadedGenerator, line: Line, aligner: SpeechJudge | None, duration_scale: float = 1.0,
    rule: Rule = "predictor",
) -> Prepared:  # fmt: skip
    """Units, durations and the prompt's latents of a line. Raises UsageError and DataError."""
    if not line.prompt and (line.prompt_text or line.prompt_seconds or line.cut):
        raise UsageError(f"'{line.text:.80}' has no prompt, but what belongs to one", "give a prompt")
    if line.seconds is not None and duration_scale != 1:
        raise UsageError("--seconds and --duration-scale exclude each other", "leave one of them out")
    wave, prompt_CS = _read_prompt(loaded, line)
    if loaded.attends_to_text:
        plan = _plan_text(loaded, line, prompt_CS, rule)
    elif rule == "rate":
        raise UsageError("--length rate is for generators of network.align=cross", "leave it out")
    else:
        plan = _plan_durations(loaded, line, prompt_CS, aligner)
    rate, factor = _rate(loaded), duration_scale
    if line.seconds is not None:
        if line.seconds * rate < len(plan.drawn):
            raise UsageError(f"'{line.text:.80}' does not fit into {line.seconds:g} s", "give it more --seconds")
        factor, plan.source["durations_from"] = line.seconds * rate / sum(plan.drawn), "seconds"
    scaled = latents_of(plan.drawn, factor, round(sum(plan.drawn) * factor))
    drawn = [max(1, length) for length in scaled]
    if (longest := prompt_CS.shape[1] + sum(drawn)) > LONGEST:
        raise UsageError(
            f"'{line.text:.80}' would last {longest / rate:.0f} s", f"at most {LONGEST / rate:.0f} s can be"
        )
    known_CS = torch.cat([prompt_CS[:, : sum(plan.before)], prompt_CS[:, prompt_CS.shape[1] - plan.behind :]], 1)
    durations = [*plan.before, *drawn, *([plan.behind] if plan.behind else [])]
    numbers = spoken(plan.units, durations, known_CS, len(plan.before), plan.behind)
    return Prepared(**vars(numbers), wave=wave, source=plan.source)


@dataclasses.dataclass
class Plan:
    """Units, and the latents that they take: known ones in front, those to be drawn, and known ones behind."""

    units: list[int]
    before: list[int]
    drawn: list[int]
    behind: int
    source: dict[str, str]


def _rate(loaded: LoadedGenerator) -> float:
    """Latents a second."""
    assert isinstance(loaded.tokenizer.inputs, MelInputs)
    return loaded.tokenizer.inputs.rate


def _units(loaded: LoadedGenerator, text: str) -> list[int]:
    assert loaded.text is not None
    return texts.encode(loaded.text, loaded.class_names, text)


def _read_prompt(loaded: LoadedGenerator, line: Line) -> tuple[mel.Wave, Tensor]:
    """The prompt's wave (n,) and its latents (C, S); empty without a prompt."""
    inputs = loaded.tokenizer.inputs
    assert isinstance(inputs, MelInputs)
    if not line.prompt:
        return np.zeros(0, np.float32), torch.zeros(loaded.tokenizer.latent_shape[0], 0)
    wave = audio.read_wave(Path(line.prompt), inputs.features.rate)
    if len(wave) < inputs.features.hop * inputs.stride or np.abs(wave).max() < SILENCE:
        reason = "silent" if len(wave) >= inputs.features.hop * inputs.stride else "shorter than a latent"
        raise UsageError(f"the prompt {line.prompt} is {reason}", "give a second or more of the voice")
    if (clipped := float(np.mean(np.abs(wave) > LOUDEST))) > CLIPPED:
        progress.warn(f"{clipped:.0%} of the samples of the prompt {line.prompt} are clipped: so will be the voice")
    item = mel.log_mel(wave, inputs.features, inputs.stride)
    with torch.no_grad(), one_thread():
        x = inputs.tensor([item]).to(loaded.tokenizer.quantizer.books.device)
        return wave, loaded.tokenizer.latents(x)[0].cpu()


def _plan_durations(loaded: LoadedGenerator, line: Line, prompt_CS: Tensor, aligner: SpeechJudge | None) -> Plan:
    """Durations of each unit, of a generator with align: durations."""
    if line.cut:
        raise UsageError("a stretch is drawn again by generators of network.align=cross", "train one, or leave it out")
    rate, units, source = _rate(loaded), _units(loaded, line.text), dict[str, str]()
    prompt_units, known = list[int](), list[int]()
    if line.prompt:
        if not line.prompt_text:
            raise UsageError(f"what is said in {line.prompt} is not known", "give --prompt-text, or prompt_text")
        prompt_units = _units(loaded, line.prompt_text)
        seconds: Sequence[float] | None = line.prompt_seconds
        source["prompt_durations_from"] = "line" if seconds else "alignment"
        if seconds is None:
            if aligner is None:
                hint = "give --judge FILE of `rdpm eval judge`, which aligns it, or prompt_seconds in --list"
                raise UsageError(f"the durations of the words of {line.prompt} are not known", hint)
            seconds = aligner.align(audio.read_wave(Path(line.prompt), aligner.features.rate), line.prompt_text)
        _one_each("prompt_seconds", line, seconds, prompt_units)
        if not fits(seconds, rate, prompt_CS.shape[1]):
            message = f"prompt_seconds of {line.prompt} sum to {sum(seconds):.4g} s, of {prompt_CS.shape[1] / rate:.4g}"
            raise UsageError(message, "count silence to the word before it")
        known = latents_of(seconds, rate, prompt_CS.shape[1])
    if line.word_seconds is not None:
        _one_each("word_seconds", line, line.word_seconds, units)
        drawn, source["durations_from"] = [max(1, round(s * rate)) for s in line.word_seconds], "line"
    else:
        one = spoken(prompt_units + units, known + [1] * len(units), prompt_CS, len(known))
        drawn, source["durations_from"] = predicted_durations(loaded, one), "predictor"
    return Plan(prompt_units + units, known, drawn, 0, source)


def _one_each(name: str, line: Line, seconds: Sequence[float], units: Sequence[object]) -> None:
    """Raise UsageError if there are more or fewer values than words."""
    if len(seconds) != len(units):
        raise UsageError(
            f"{name} of '{line.text:.80}' has {len(seconds)} values for {len(units)} words", "give one a word"
        )


def _plan_text(loaded: LoadedGenerator, line: Line, prompt_CS: Tensor, rule: Rule) -> Plan:
    """The length as a whole, of a generator with align: cross."""
    rate, count, prompt_units = _rate(loaded), prompt_CS.shape[1], list[int]()
    units = _units(loaded, line.text)
    if line.prompt_text:
        prompt_units, units = (_units(loaded, words) for words in (line.prompt_text, f"{line.prompt_text} {line.text}"))
    elif line.prompt and not (line.cut or line.continues):
        raise UsageError(f"what is said in {line.prompt} is not known", "give --prompt-text, or prompt_text")
    start, end = _known(line, count, rate)
    if line.word_seconds is not None:
        _one_each("word_seconds", line, line.word_seconds, texts.normalise(line.text).split())
        drawn, source = sum(line.word_seconds) * rate, "line"
    elif rule == "rate":
        if not prompt_units:
            message = f"--length rate: what is said in the prompt of '{line.text:.80}' is not known"
            raise UsageError(message, "give --prompt and --prompt-text, or leave --length out")
        drawn, source = count / len(prompt_units) * (len(units) - len(prompt_units)), "rate"
    else:
        known_CS = torch.cat([prompt_CS[:, :start], prompt_CS[:, end:]], 1)
        one = spoken(units, [start, 1, count - end], known_CS, 1, count - end)
        drawn, source = predicted_length(loaded, one), "predictor"
    return Plan(units, [start], [max(1, round(drawn))], count - end, {"durations_from": source})


def _known(line: Line, count: int, rate: float) -> tuple[int, int]:
    """The latents of the prompt between which sound is drawn: the others are known."""
    if line.cut is None:
        return count, count
    start, end = (round(second * rate) for second in line.cut)
    if not start < end <= count:
        message = f"{line.prompt} has no stretch from {line.cut[0]:g} to {line.cut[1]:g} s"
        raise UsageError(message, f"it lasts {count / rate:.4g} s, of which one latent is {1 / rate:.2g}")
    return start, end

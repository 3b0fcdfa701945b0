"""eval tts: zero-shot speech as the papers test it, next to their numbers.

Of the utterances of 4 to 10 s (VALL-E, arXiv 2301.02111), `continuation` draws what follows the first 3 s of each, and
`cross` its whole text in the voice of 3 s of another utterance of the speaker. Where the words of a prompt must be
known, it ends with the last of them that ends within the 3 s."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rdpm_cli import noise, progress
from rdpm_cli.data import audio, text
from rdpm_cli.data.audio import AudioSource, open_audio
from rdpm_cli.data.mel import Wave
from rdpm_cli.data.source import spread
from rdpm_cli.distributed import pick_device
from rdpm_cli.engine.report import read_published
from rdpm_cli.engine.sample import key_values
from rdpm_cli.engine.speech import sample_speech
from rdpm_cli.engine.speech_lines import Line
from rdpm_cli.engine.speech_scores import Judges, Sound, check_words, drawn_sounds, open_judges, scores
from rdpm_cli.errors import DataError, UsageError
from rdpm_cli.evaluation.speech_networks import HubertCTC
from rdpm_cli.generator import registry
from rdpm_cli.runs import Result, text_table, versions
from rdpm_cli.tokenizer.inputs import MelInputs

SECONDS, PROMPT_SECONDS = (4.0, 10.0), 3.0  # of an utterance; of a prompt
METRICS = {"wer": "WER %", "cer": "CER %", "sim_o": "SIM-o", "sim_r": "SIM-r"}
Task = Literal["continuation", "cross"]
Times = Callable[[int], Sequence[float]]  # index -> seconds of each word of a recording, which sum to its length


@dataclass
class Row:
    """An utterance and its prompt: the first `seconds` of the recording number `prompt`.

    words, word_seconds: of the prompt; none where `text` begins with words of the prompt."""

    index: int
    text: str
    prompt: int
    seconds: float = PROMPT_SECONDS
    words: Sequence[str] = ()
    word_seconds: Sequence[float] = ()


def eval_tts(
    ckpt: Path, recordings: str, out: Path, task: Task, *, judge: str | None = None, asr: str | None = None,
    speaker: str | None = None, seed: int = 0, settings: Sequence[str] = (), limit: int | None = None,
    device: str = "auto", vocoder: str | None = None, reading: dict[str, Any] | None = None,
) -> Result:  # fmt: skip
    """Make the list, draw it into out/samples, and score it and the recordings by the same judges.

    judge, asr, speaker: as of eval_speech. settings: of sampling, key=value. limit: utterances, evenly spaced. The same
    command again resumes."""
    judges, loaded = open_judges(judge, asr, speaker), registry.load(ckpt)
    if not isinstance(inputs := loaded.tokenizer.inputs, MelInputs):
        raise UsageError(f"{ckpt} draws images", "give a generator of sound")
    judges.to(pick_device(device))
    source, rate, lines = open_audio(recordings, **(reading or {})), inputs.features.rate, list[Line]()
    joined = loaded.attends_to_text
    times = None if joined and task == "continuation" else word_times(source, judges)
    whole = (
        math.floor(PROMPT_SECONDS * inputs.rate) / inputs.rate
    )  # latents: the rest of one would be padded with zeros
    rows = make_rows(source, task, seed, times, limit, PROMPT_SECONDS if times else whole)
    if judges.judge and not judges.transcriber:
        check_words(judges.judge, [row.text for row in rows])
    for number, row in enumerate(rows):
        path = out / "prompts" / f"{number:06d}.wav"
        audio.write_wav(path, _piece(source, row.prompt, 0.0, row.seconds, rate), rate)
        seconds = None if joined else tuple(row.word_seconds)
        words = " ".join(row.words)
        lines.append(Line(row.text, str(path), words, prompt_seconds=seconds, continues=not words))
    options: dict[str, Any] = {"seed": seed, "vocoder": vocoder}
    drawn = sample_speech(ckpt, lines, out / "samples", sampling=key_values(settings), device=device, **options)
    values = {"metric": "tts", "task": task, **scores(drawn_sounds(out / "samples", None), judges)}
    values["ground_truth"] = scores([_real(source, row) for row in rows], judges)
    values["published"] = [figure for figure in read_published() if "task" in figure]
    values |= {**judges.record(), "checkpoint": loaded.digest, "folder": drawn.values["folder"]}
    values |= {"target": {"name": recordings, "count": len(rows), "digest": source.digest()}}
    values |= {"options": {**options, "limit": limit}, "versions": versions()}
    return Result("score", values, text=_table(values))


def word_times(source: AudioSource, judges: Judges) -> Times:
    """The seconds of each word of a recording: the source's, else by alignment. Raises UsageError without either."""
    judge, recogniser, texts = judges.judge, judges.transcriber, source.texts or ()
    if source.word_seconds is not None:
        return source.word_seconds.__getitem__
    if judge is not None:
        return lambda index: judge.align(source.wave(index, judge.features.rate), texts[index])
    if isinstance(recogniser, HubertCTC):
        return lambda index: recogniser.align(source.wave(index, recogniser.rate), texts[index])
    hint = "give --asr hubert-ctc:FILE or a --judge, which align them, or word_seconds in a manifest.jsonl"
    raise UsageError(f"it is not known when the words of {source.spec} are said", hint)


def make_rows(
    source: AudioSource, task: Task, seed: int, times: Times | None, limit: int | None, seconds: float = PROMPT_SECONDS
) -> list[Row]:
    """A row an utterance. times: where prompts end with a word, at the latest after `seconds`; None: after these.

    Raises DataError where there is no utterance, or one without a prompt."""
    if source.texts is None or (source.speakers is None and task == "cross"):
        lacking = "texts" if source.texts is None else "speakers"
        raise DataError(f"{source.spec} has no {lacking}", "give recordings whose texts and speakers are listed")
    lengths, rows = [source.seconds(index) for index in range(len(source))], list[Row]()
    fitting = [index for index, seconds in enumerate(lengths) if SECONDS[0] <= seconds <= SECONDS[1]]
    if not fitting:
        raise DataError(f"{source.spec} has no recording of 4 to 10 s", "give whole utterances, as LibriSpeech's")
    indices = [fitting[place] for place in spread(len(fitting), limit)]
    with progress.Bar("prompts", len(indices), "utterances") as bar:
        for index in indices:
            prompt = index if task == "continuation" else _other(source, lengths, index, seed)
            row = Row(index, source.texts[index], prompt, seconds)
            rows.append(_cut(source, row, source.texts[prompt], times(prompt)) if times else row)
            bar.advance(1)
    return rows


def _other(source: AudioSource, lengths: Sequence[float], index: int, seed: int) -> int:
    """Another recording of the speaker, of more than 3 s."""
    speakers = source.speakers or ()
    others = [i for i, s in enumerate(speakers) if s == speakers[index] and i != index and lengths[i] > PROMPT_SECONDS]
    if not others:
        message = f"{source.spec}: {source.names[index]} is the only recording of more than 3 s by {speakers[index]}"
        raise DataError(message, "give more of this speaker, or --task continuation")
    return others[int(noise.stream("prompt", seed, index).integers(len(others)))]


def _cut(source: AudioSource, row: Row, spoken: str, seconds: Sequence[float]) -> Row:
    """The row with a prompt that ends with a word. spoken, seconds: of the whole recording that it is taken from."""
    words, ends = text.normalise(spoken).split(), list(itertools.accumulate(seconds))
    count = sum(end <= PROMPT_SECONDS for end in ends)
    if len(words) != len(ends) or not 0 < count < len(words):
        name = source.names[row.prompt]
        message = f"{source.spec}: {name} has {len(words)} words, of which {count} of {len(ends)} end within 3 s"
        raise DataError(message, "leave it out, or correct its text or word_seconds")
    rest = " ".join(words[count:]) if row.prompt == row.index else row.text
    return Row(row.index, rest, row.prompt, ends[count - 1], words[:count], seconds[:count])


def _piece(source: AudioSource, index: int, start: float, end: float | None, rate: int) -> Wave:
    """Seconds `start` to `end` of a recording."""
    return source.wave(index, rate)[round(start * rate) : None if end is None else round(end * rate)]


def _real(source: AudioSource, row: Row) -> Sound:
    """What the generator is to say, as the recording has it."""
    rest = partial(_piece, source, row.index, row.seconds if row.prompt == row.index else 0.0, None)
    prompt, whole = partial(_piece, source, row.prompt, 0.0, row.seconds), partial(source.wave, row.index)
    return Sound(source.names[row.index], rest, row.text, None, prompt, spoken=None if row.words else whole)


def _table(values: Mapping[str, Any]) -> str:
    """Our scores, those of the recordings, and the published ones."""
    lines, published = [["", *METRICS.values()]], dict[str, dict[str, str]]()
    for name, record in (("this generator", values), ("these recordings", values["ground_truth"])):
        percent = {**record, **{metric: 100 * record[metric] for metric in ("wer", "cer")}}
        lines.append([name, *("" if percent[x] is None else f"{percent[x]:.3f}" for x in METRICS)])
    for figure in values["published"]:
        name = f"{figure['name']}, {figure['task']} ({figure['source']})"
        published.setdefault(name, {})[figure["metric"]] = figure["value"]
    lines += [[name, *(row.get(metric, "") for metric in METRICS)] for name, row in published.items()]
    judges = [one["name"] if isinstance(one, dict) else "the judge" for one in (values["asr"], values["voices"])]
    title = f"{values['task']}: {values['n']} utterances; words by {judges[0]}, voices by {judges[1]}"
    return "\n".join([title, text_table(lines), *(f"  {note}" for note in values["notes"])]) + "\n"

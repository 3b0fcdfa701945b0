"""The chain of many voices: synthetic speakers of eSpeak NG, some of which no training hears.

Sentences have a closed vocabulary of 200 words and the durations that eSpeak says. The judge is trained on all training
voices, so it knows those; an unseen voice is compared with its prompt by resemblyzer where it is installed, else by the
judge's embedding. Voices, sentences and the judge do not depend on a training seed."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from experiments import OUT, Cell, Command
from tables import Record, Score, numbers

if TYPE_CHECKING:
    from run import Experiment

Row = dict[str, Any]  # of a manifest, or of a list of lines

LISTS = {
    key: words.split() for key, words in yaml.safe_load((Path(__file__).parent / "voices.yaml").read_text()).items()
}
VOICES = LISTS["voices"]
UNSEEN = VOICES[4::8][:10]
SEEN = [voice for voice in VOICES if voice not in UNSEEN]
COUNTS = (10, 25, len(SEEN))  # training voices
SENTENCES = 2400  # of all training voices together, so that the number of voices is the only change
HELD_OUT = 10  # sentences a voice: half of them are said, half are prompts
RATE = 8000


def sentence(draw: np.random.Generator) -> str:
    """Nine to fourteen words."""

    def one(key: str) -> str:
        return LISTS[key][draw.integers(len(LISTS[key]))]

    subject, thing = (f"{one('articles')} {one('adjectives')} {one('nouns')}" for _ in range(2))
    more = ("", f" {one('adverbs')}", f" with {one('nouns')} and {one('nouns')}")[draw.integers(3)]
    return f"{subject} {one('verbs')} {thing} {one('prepositions')} the {one('places')}{more}"


def voices_of(count: int) -> list[str]:
    """Evenly spaced training voices."""
    return [SEEN[n] for n in np.linspace(0, len(SEEN) - 1, count).round().astype(int)]


def write(out: Path) -> tuple[str, str]:
    """The recordings, once, with manifests of the training voices, and lists of the lines to be said.

    -> the manifests of all training voices, and of held-out sentences of theirs."""
    from rdpm_cli import files, noise  # seconds to import
    from rdpm_cli.data import audio, espeak

    train, heldout = out / f"train-{len(SEEN)}.jsonl", out / "heldout.jsonl"
    if heldout.is_file():
        return str(train), str(heldout)
    say, rows = espeak.synthesiser(), dict[str, list[Row]]()
    for number, voice in enumerate(VOICES):
        trained = max((-(-SENTENCES // count) for count in COUNTS if voice in voices_of(count)), default=0)
        for place in range(HELD_OUT + trained):  # the held-out ones come first
            draw = noise.stream("strings", 1, number, place)
            pitch, pace, text = int(draw.integers(35, 66)), int(draw.integers(140, 181)), sentence(draw)
            wave, rate, seconds = say(text, voice, pitch, pace)
            name = f"wavs/{voice}-{place:03d}.wav"
            audio.write_wav(out / name, audio.resampled(wave, rate, RATE), RATE)
            row = {"audio_filepath": name, "text": text, "speaker": voice, "word_seconds": seconds}
            rows.setdefault(voice, []).append(row)
    lists: dict[str, list[Row]] = {}
    for count in COUNTS:
        each = -(-SENTENCES // count)
        lists[f"train-{count}"] = [row for voice in voices_of(count) for row in rows[voice][HELD_OUT : HELD_OUT + each]]
    lists["seen"] = [line_of(rows[voice], place) for voice in voices_of(10) for place in range(HELD_OUT // 2)]
    lists["unseen"] = [line_of(rows[voice], place) for voice in UNSEEN for place in range(HELD_OUT // 2)]
    lists["heldout"] = [row for voice in SEEN for row in rows[voice][:2]]
    for name, lines in lists.items():  # the one by which a finished folder is known comes last
        files.write_lines(out / f"{name}.jsonl", lines)
    return str(train), str(heldout)


def line_of(rows: list[Row], place: int) -> Row:
    """The fields of a Line: a held-out sentence, with another one as the prompt, and the durations of both."""
    said, prompt = rows[place], rows[place + HELD_OUT // 2]
    return {
        "text": said["text"], "prompt": prompt["audio_filepath"], "prompt_text": prompt["text"],
        "speaker": said["speaker"], "prompt_seconds": prompt["word_seconds"], "word_seconds": said["word_seconds"],
    }  # fmt: skip


def score(experiment: "Experiment", cell: Cell, seed: str) -> Record:
    """Run a cell for one seed. -> scores of seen and of unseen voices, and of controls, each with its beginning.

    shuffled: against the text of the next sample; other: similarity to the prompt of another voice."""
    from rdpm_cli.engine import speech_demo

    data, stage = Path(experiment.parts[1]).parent, experiment.stage
    voices = ("--speaker", "resemblyzer") if importlib.util.find_spec("resemblyzer") else ()

    def heard(target: str | Path, *options: str | Path) -> Score:
        return numbers(stage("scores", "eval", "speech", target, "--judge", experiment.judge(), *options)[1])

    train = str(data / f"train-{cell.images or len(SEEN)}.jsonl")
    tokenizer = experiment.tokenizer(cell, seed, train)
    run, trained = experiment.train(cell, experiment.codes(cell, tokenizer, seed, train), seed)
    scores = numbers(trained)
    for group in ("seen", "unseen"):
        draw: Command = (
            "--ckpt",
            run / "generator.pt",
            *cell.sampling,
            "--list",
            data / f"{group}.jsonl",
            "--seed",
            seed,
        )
        folder, _ = stage("samples", "sample", *draw, "--out", OUT)
        shuffled, other = (folder.with_name(f"{folder.name}-{name}") for name in ("shuffled", "other"))
        rows = {f"{group}.": heard(folder, *voices)}
        rows[f"{group}.shuffled."] = heard(speech_demo.exchanged(folder, shuffled, "text"))
        rows[f"{group}.other."] = heard(speech_demo.exchanged(folder, other, "prompt"), *voices)
        scores |= {beginning + name: value for beginning, row in rows.items() for name, value in row.items()}
    return {"cell": scores, "real sentences": {f"seen.{name}": v for name, v in heard(experiment.parts[1]).items()}}

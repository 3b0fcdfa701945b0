"""demo speech: from recordings of single words to scored speech, and a page to listen to.

Words are spoken digits, joined into strings of one speaker. The prompt of a sample is the first two words of a string
whose recordings no training saw; the sample says the other four, with their durations in that string."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, FileSystemLoader

from rdpm_cli import files, progress
from rdpm_cli.data import audio, espeak, folder, mel, pictures
from rdpm_cli.data.audio import AudioSource, open_audio
from rdpm_cli.data.strings import write_strings
from rdpm_cli.engine.generator import train_gen
from rdpm_cli.engine.judge import eval_judge
from rdpm_cli.engine.speech import name_of, sample_speech
from rdpm_cli.engine.speech_lines import Line, read_lines
from rdpm_cli.engine.speech_scores import eval_speech
from rdpm_cli.engine.tokenizer import StoreOptions, tokenize, train_tokenizer
from rdpm_cli.errors import DataError
from rdpm_cli.evaluation.judge import split_indices
from rdpm_cli.recipes import load_recipe
from rdpm_cli.runs import Result, versions
from rdpm_cli.tokenizer.inputs import MelInputs, inputs_of

RECIPES = {"rdpm": "speech8-sin", "resgen": "speech8-rvq"}
# What `rdpm sample --list` takes; files of write_data.
LISTS = {
    "samples": "lines.jsonl", "another text": "another-text.jsonl", "the wrong speaker's prompt": "wrong-prompt.jsonl",
}  # fmt: skip
STRINGS, HELD_OUT_STRINGS = 1800, 48  # of WORDS words; 48 give 192 target words
WORDS, PROMPT_WORDS = 6, 2
HEARD = 6  # strings on the page
SCORES = ["word_accuracy", "speaker_accuracy", "wer", "cer", "sim_o", "sim_r", "frechet_distance"]
SCORES += ["mel_distance", "pesq", "stoi"]  # of reconstructions
ESTIMATE = "about 10 minutes on 2 CPU cores, 20 for both families"


def run(out: Path, seed: int, family: str = "rdpm", data: str | None = None, overrides: Sequence[str] = ()) -> Result:
    """Everything under `out`. The same command again continues. data: recordings of single words, named speakers."""
    families = list(RECIPES) if family == "both" else [family]
    changes = [f"seed={seed}", *overrides]
    source = open_audio(data) if data else espeak.write_digits(out / "espeak")
    facts: dict[str, Any] = {"data": source.spec if data else "espeak: synthetic voices, easier than real ones"}
    facts |= {"seed": seed, "recipes": {name: load_recipe(RECIPES[name], changes).digest() for name in families}}
    if (out / "result.json").is_file():
        previous: dict[str, Any] = files.read_json(out / "result.json")
        made = {**facts, **{name: previous.get(name) for name in ("data", "seed")}}
        made["recipes"] = {name: previous.get("recipes", {}).get(name) for name in families}
        if made == facts:
            progress.say(f"{out}/ holds this demo already; remove it, or name another --out, to run it again")
            return Result(f"demo of speech finished; listen to {out / 'index.html'}", previous)
    start = time.monotonic()
    progress.say(f"rdpm demo speech: recordings -> strings of words -> {' and '.join(families)}; {ESTIMATE}")
    paths = write_data(source, out / "data", seed)
    train, heldout, lines = str(paths["train"]), str(paths["heldout"]), read_lines(paths["samples"])
    progress.say("[1] a judge: a recogniser of the words and speakers of real strings, which scores the samples later")
    judge = eval_judge(train, out / "runs" / "judge", RECIPES["rdpm"], changes, heldout=heldout)

    def scores(target: Path, **options: Any) -> dict[str, Any]:
        values = eval_speech(str(target), judge.values["judge"], **options).values
        return {name: values[name] for name in SCORES if values.get(name) is not None}

    result: dict[str, Any] = {
        "judge": {name: value for name, value in judge.values.items() if name.startswith("heldout")},
        "real words joined": scores(paths["real"]),
    }
    # the judge's statistics are those of these strings
    del result["real words joined"]["frechet_distance"]
    for name in families:
        result[name] = _family(name, out, changes, paths, scores, seed)
    facts |= {"strings": HELD_OUT_STRINGS, "target_words": HELD_OUT_STRINGS * (WORDS - PROMPT_WORDS)}
    result |= {**facts, "seconds": round(time.monotonic() - start, 1), "versions": versions()}
    files.write_json(out / "result.json", result)
    _page(out, families, lines, result)
    return Result(f"demo of speech finished; listen to {out / 'index.html'}", result)


def write_data(source: AudioSource, out: Path, seed: int) -> dict[str, Path]:
    """Write strings of words of these recordings, and lists of the lines to be said. -> the paths by name.

    train, heldout: manifests of strings that share no recording. real: a folder that lists the held-out strings as if
    they were samples, with their first words as the prompt. The titles of LISTS: their files. Raises DataError."""
    seen, unseen = split_indices(source)
    tokenizer = load_recipe(RECIPES["rdpm"], section="tokenizer").tokenizer
    assert tokenizer is not None
    inputs = inputs_of(tokenizer.autoencoder)
    assert isinstance(inputs, MelInputs)
    rate, step = inputs.features.rate, inputs.features.hop * inputs.stride
    train = write_strings(source, seen, out / "train", STRINGS, WORDS, seed, rate, step)
    heldout = write_strings(source, unseen, out / "heldout", HELD_OUT_STRINGS, WORDS, seed, rate, step)
    rows = [json.loads(text) for text in heldout.read_text("utf-8").splitlines()]
    lines = [_line(row, out, f"prompts/{name_of(number)}", rate) for number, row in enumerate(rows)]
    real = [
        {
            "file": f"../heldout/{row['audio_filepath']}", "prompt": f"../{line['prompt']}", "text": line["text"],
            "speaker": line["speaker"], "prompt_seconds": sum(line["prompt_seconds"]),
        }
        for row, line in zip(rows, lines, strict=True)
    ]  # fmt: skip
    files.write_json(out / "real" / folder.RECORD, {"format": folder.SPEECH, "samples": real})
    paths = {"train": train, "heldout": heldout, "real": out / "real"}
    for (title, name), kind in zip(LISTS.items(), (lines, _other_texts(lines), _other_prompts(lines)), strict=True):
        paths[title] = files.write_lines(out / name, kind)
    return paths


def _line(row: dict[str, Any], out: Path, prompt: str, rate: int) -> dict[str, Any]:
    """The fields of a Line that says a held-out string, by its row of the manifest; its first words are the prompt."""
    words, seconds = row["text"].split(), row["word_seconds"]
    wave = audio.read_wave(out / "heldout" / row["audio_filepath"], rate)
    audio.write_wav(out / prompt, wave[: round(sum(seconds[:PROMPT_WORDS]) * rate)], rate)
    return {
        "text": " ".join(words[PROMPT_WORDS:]), "prompt": prompt, "prompt_text": " ".join(words[:PROMPT_WORDS]),
        "speaker": row["speaker"], "prompt_seconds": seconds[:PROMPT_WORDS], "word_seconds": seconds[PROMPT_WORDS:],
    }  # fmt: skip


def _other_texts(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines with each word replaced by the third one behind it, in sorted order."""
    words = sorted({word for line in lines for word in line["text"].split()})
    following = {word: words[(index + 3) % len(words)] for index, word in enumerate(words)}
    return [{**line, "text": " ".join(map(following.__getitem__, line["text"].split()))} for line in lines]


def _other_prompts(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines, each with the prompt of the next one of another speaker. Raises DataError if there is only one."""
    if len({line["speaker"] for line in lines}) == 1:
        raise DataError(f"all recordings are of {lines[0]['speaker']}", "give those of two speakers or more")
    doubled, names = [*lines, *lines], ("prompt", "prompt_text", "prompt_seconds")
    strangers = [next(x for x in doubled[i:] if x["speaker"] != line["speaker"]) for i, line in enumerate(lines)]
    return [{**line, **{name: x[name] for name in names}} for line, x in zip(lines, strangers, strict=True)]


def _family(
    name: str, out: Path, changes: Sequence[str], paths: dict[str, Path], scores: Callable[..., dict[str, Any]],
    seed: int,
) -> dict[str, Any]:  # fmt: skip
    """Train, sample and score one family."""
    recipe, runs, train = RECIPES[name], out / "runs", str(paths["train"])
    progress.say(f"[{name}] train-tokenizer: log-mel spectrograms -> codes, recipe {recipe}")
    tokenizer = Path(train_tokenizer(train, runs / f"{name}-tokenizer", recipe, changes).values["tokenizer"])
    options = StoreOptions(views=load_recipe(recipe, changes).views, latents=True, seed=seed, text="words")
    codes = out / "codes" / name
    tokenize(train, codes, tokenizer, options)
    progress.say(f"[{name}] train-gen: codes, texts and prompts -> transformer")
    trained = train_gen(codes, runs / f"{name}-generator", recipe, changes)
    ckpt = Path(trained.values["generator"])
    progress.say(f"[{name}] sample and score: as the held-out strings; another text; the prompt of another speaker")
    values: dict[str, Any] = {}
    for title in LISTS:
        target = out / name / title.replace(" ", "-").replace("'", "")
        sample_speech(ckpt, read_lines(paths[title]), target, seed=seed)
        values[title] = scores(target)
    values["samples against shuffled texts"] = scores(
        exchanged(out / name / "samples", out / name / "shuffled", "text")
    )
    values["reconstructions"] = scores(paths["heldout"], tokenizer=tokenizer)
    main = values.pop("samples")
    return {
        "digit_accuracy": main["word_accuracy"], "speaker_accuracy": main["speaker_accuracy"], **main, **values,
        "parameters": trained.values["parameters"],
    }  # fmt: skip


def exchanged(samples: Path, out: Path, field: Literal["text", "prompt"]) -> Path:
    """A folder that lists the same sounds, each with the text, or the prompt, of the next one by another speaker."""
    record = files.read_json(samples / folder.RECORD)
    rows, where = record["samples"], f"../{samples.name}"
    nexts = [
        next(other for other in rows[i + 1 :] + rows[: i + 1] if other["speaker"] != row["speaker"] or other is row)
        for i, row in enumerate(rows)
    ]
    record["samples"] = [
        {
            **row, "file": f"{where}/{row['file']}", "text": (other if field == "text" else row)["text"],
            "prompt": f"{where}/{other['prompt']}" if field == "prompt" else None,
        }
        for row, other in zip(rows, nexts, strict=True)
    ]  # fmt: skip
    out.mkdir(exist_ok=True)
    files.write_json(out / folder.RECORD, record)
    return out


def _page(out: Path, families: Sequence[str], lines: Sequence[Line], result: dict[str, Any]) -> None:
    """index.html: players and spectrograms of the first strings, and the scores."""
    rows = []
    for number, line in enumerate(lines[:HEARD]):
        name = name_of(number)
        sounds = {"prompt": out / "data" / "prompts" / name, "real": out / "data" / "heldout" / "wavs" / name}
        sounds |= {family: out / family / "samples" / name for family in families}
        sounds |= {f"{family}, another text": out / family / "another-text" / name for family in families}
        figures = [_figure(out, f"{number}-{place}", title, path) for place, (title, path) in enumerate(sounds.items())]
        rows.append({"line": line, "figures": figures})
    template = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True).get_template(
        "speech.html.jinja"
    )
    text = template.render(rows=rows, result=result, families=families)
    files.write_atomic(out / "index.html", lambda file: file.write(text.encode()))


def _figure(out: Path, name: str, title: str, sound: Path) -> dict[str, str]:
    """A sound with its spectrogram, by paths below `out`."""
    features, picture = mel.PRESETS["speech8"], out / "spectrograms" / f"{name}.png"
    pixels = mel.mel_pixels(mel.log_mel(audio.read_wave(sound, features.rate), features)[None])[0]
    pictures.save_png(picture, pixels)
    return {"title": title, "sound": str(sound.relative_to(out)), "picture": str(picture.relative_to(out))}

"""sample for sound: texts, and prompts of the voices that are to speak them -> WAV files.

Legend: B lines, N units of a text, S latents of a line (its prompt's come first), C code width, T steps."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pydantic
import torch
from torch import Tensor

from rdpm_cli import files, progress
from rdpm_cli.codes.ragged import fits, latents_of
from rdpm_cli.data import audio, folder, mel, pictures
from rdpm_cli.data import text as texts
from rdpm_cli.distributed import one_thread, pick_device
from rdpm_cli.engine.sample import sampling_options
from rdpm_cli.errors import UsageError, rdpm_command
from rdpm_cli.evaluation import speech_judge
from rdpm_cli.evaluation.recon import encode_recording
from rdpm_cli.generator import registry
from rdpm_cli.generator.contract import Known, SampleOptions
from rdpm_cli.generator.registry import LoadedGenerator
from rdpm_cli.generator.transformer import LONGEST
from rdpm_cli.runs import Result, stop_on_signal
from rdpm_cli.tokenizer.inputs import MelInputs
from rdpm_cli.tokenizer.model import Tokenizer

RECONSTRUCTIONS = "rdpm-speech-reconstructions"
BUCKET = 32  # latents: lines are padded to whole ones, so that a sample does not depend on its neighbours' lengths
SHOWN = 8  # spectrograms
Seconds = Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]


@pydantic.dataclasses.dataclass(frozen=True, config=pydantic.ConfigDict(extra="forbid"))
class Line:
    """A sample to draw. prompt: a sound file, and what is said in it. speaker: its name, where that is known.

    prompt_seconds, word_seconds: how long each word of the prompt, and of the text, lasts; default: the prompt's are
    aligned by a judge, the text's are predicted."""

    text: str
    prompt: str | None = None
    prompt_text: str = ""
    speaker: str | None = None
    prompt_seconds: tuple[Seconds, ...] | None = None
    word_seconds: tuple[Seconds, ...] | None = None


@dataclasses.dataclass
class Prepared:
    """A line as numbers. latents (C, S of the prompt); wave: the prompt's."""

    units: list[int]
    durations: list[int]
    known: int
    latents: Tensor
    wave: mel.Wave
    source: dict[str, str]  # where the durations of the prompt and of the text come from

    @property
    def length(self) -> int:
        return sum(self.durations)


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


def sample_speech(
    ckpt: Path, lines: Sequence[Line], out: Path, *, seed: int = 0, sampling: Mapping[str, Any] | None = None,
    preset: str | None = None, judge: Path | None = None, duration_scale: float = 1.0, device: str = "auto",
) -> Result:  # fmt: skip
    """Draw lines into out/*.wav, each with its prompt in front; continues an interrupted job. judge: aligns prompts."""
    picked, loaded = pick_device(device), registry.load(ckpt)
    inputs = loaded.tokenizer.inputs
    if not isinstance(inputs, MelInputs):
        raise UsageError(f"{ckpt} draws images", "give --classes instead of --text")
    options = SampleOptions(sampling_options(loaded.sampling, preset, sampling or {}), seed)
    loaded.check(options)
    aligner = speech_judge.load(judge)[0] if judge else None
    loaded.to(picked, options.sampling.compile)
    rows = [
        {"file": name_of(i), "index": i, **{k: v for k, v in vars(line).items() if v}} for i, line in enumerate(lines)
    ]
    recorded = {**options.sampling.model_dump(), "seed": seed, "duration_scale": duration_scale}
    record = folder.picture_record(folder.SPEECH, {"checkpoint": loaded.digest}, recorded, rows=rows)
    prepared = [prepare(loaded, line, aligner, duration_scale) for line in lines]
    folder.claim(out, record)
    with files.only_writer(out):
        _write_waves(out, loaded, options, prepared)
        made = [_finished(out, row, p, inputs) for row, p in zip(rows, prepared, strict=True)]
        _spectrograms(out, rows, inputs)
        folder.finish(out, {**record, "rate": inputs.features.rate, "samples": made})
    seconds = sum(p.length for p in prepared) / inputs.rate
    values = {"folder": str(out), "samples": len(lines), "seconds": seconds, "checkpoint": loaded.digest, "seed": seed}
    values |= {"cfg": options.sampling.cfg, "durations": sorted({p.source["durations_from"] for p in prepared})}
    return Result("samples written", values, rdpm_command("eval", "speech", out, "--judge", judge or "judge.pt"))


def name_of(index: int) -> str:
    return f"{index:06d}.wav"


def _write_waves(out: Path, loaded: LoadedGenerator, options: SampleOptions, lines: Sequence[Prepared]) -> None:
    """Draw the lines that have no file yet, a batch at a time."""
    inputs, device = loaded.tokenizer.inputs, loaded.tokenizer.quantizer.books.device
    assert isinstance(inputs, MelInputs)
    with stop_on_signal() as stop, progress.Bar("sample", len(lines), "lines") as bar:
        for batch in batches_of([line.length for line in lines], options.sampling.images_at_once(device.type)):
            # all of a batch, since its shape is part of what fixes a sample
            if any(not (out / name_of(i)).is_file() for i in batch):
                for i, wave in zip(batch, waves(loaded, options, batch, [lines[i] for i in batch]), strict=True):
                    audio.write_wav(out / name_of(i), wave, inputs.features.rate)
            bar.advance(len(batch))
            if bar.done < len(lines):
                stop.leave(f"{bar.done} of {len(lines)} lines are in {out}")


def _finished(out: Path, row: dict[str, Any], line: Prepared, inputs: MelInputs) -> dict[str, Any]:
    """The row of a sample in samples.json, after its prompt is written."""
    prompt = f"prompts/{row['file']}" if line.known else None
    if prompt:
        audio.write_wav(out / prompt, line.wave, inputs.features.rate)
    seconds = sum(line.durations[: line.known]) / inputs.rate
    return {**row, "prompt": prompt, "prompt_seconds": seconds, "durations": line.durations, **line.source}


def prepare(
    loaded: LoadedGenerator, line: Line, aligner: speech_judge.SpeechJudge | None, duration_scale: float
) -> Prepared:
    """Units, durations and the prompt's latents of a line. Raises UsageError and DataError."""
    inputs, kind = loaded.tokenizer.inputs, loaded.text
    assert isinstance(inputs, MelInputs)
    assert kind is not None
    device, rate = loaded.tokenizer.quantizer.books.device, inputs.rate
    units = texts.encode(kind, loaded.class_names, line.text)
    prompt_units: list[int] = []
    known: list[int] = []
    latents, wave, source = torch.zeros(loaded.tokenizer.latent_shape[0], 0), np.zeros(0, np.float32), {}
    if line.prompt:
        if not line.prompt_text:
            raise UsageError(f"what is said in {line.prompt} is not known", "give --prompt-text, or prompt_text")
        prompt_units = texts.encode(kind, loaded.class_names, line.prompt_text)
        wave = audio.read_wave(Path(line.prompt), inputs.features.rate)
        item = mel.log_mel(wave, inputs.features, inputs.stride)
        with torch.no_grad(), one_thread():
            latents = loaded.tokenizer.latents(inputs.tensor([item]).to(device))[0].cpu()
        seconds: Sequence[float] | None = line.prompt_seconds
        source["prompt_durations_from"] = "line" if seconds else "alignment"
        if seconds is None:
            if aligner is None:
                hint = "give --judge FILE of `rdpm eval judge`, which aligns it, or prompt_seconds in --list"
                raise UsageError(f"the durations of the words of {line.prompt} are not known", hint)
            seconds = aligner.align(wave, line.prompt_text)
        _one_each("prompt_seconds", line, seconds, prompt_units)
        if not fits(seconds, rate, latents.shape[1]):
            message = f"prompt_seconds of {line.prompt} sum to {sum(seconds):.4g} s, of {latents.shape[1] / rate:.4g}"
            raise UsageError(message, "count silence to the word before it")
        known = latents_of(seconds, rate, latents.shape[1])
    elif line.prompt_text or line.prompt_seconds:
        raise UsageError(f"there is a prompt_text or prompt_seconds, but no prompt, of '{line.text}'", "give a prompt")
    if line.word_seconds is not None:
        _one_each("word_seconds", line, line.word_seconds, units)
        lengths = [max(1, round(s * rate)) for s in line.word_seconds]
        source["durations_from"] = "line"
    else:
        lengths = _predicted(loaded, prompt_units, known, latents, units)
        source["durations_from"] = "predictor"
    lengths = [max(1, round(length * duration_scale)) for length in lengths]
    if (longest := sum(known) + sum(lengths)) > LONGEST:
        raise UsageError(f"'{line.text}' would last {longest / rate:.0f} s", f"at most {LONGEST / rate:.0f} s can be")
    return Prepared(prompt_units + units, known + lengths, len(known), latents, wave, source)


def _one_each(name: str, line: Line, seconds: Sequence[float], units: Sequence[int]) -> None:
    """Raise UsageError if there are more or fewer values than words."""
    if len(seconds) != len(units):
        raise UsageError(f"{name} of '{line.text:.80}' has {len(seconds)} values for {len(units)} words", "one a word")


@torch.no_grad()
def _predicted(
    loaded: LoadedGenerator, prompt_units: list[int], known: list[int], latents: Tensor, units: list[int]
) -> list[int]:
    """Durations of units in latents, by the generator's predictor."""
    line = Prepared(prompt_units + units, known + [1] * len(units), len(known), latents, np.zeros(0, np.float32), {})
    device = loaded.tokenizer.quantizer.books.device
    columns = columns_of([line], line.length, device)
    log_N = loaded.generator.network.trunk.speech.duration(columns)[0, len(known) :]
    return [max(1, round(float(x))) for x in log_N.exp()]


def batches_of(lengths: Sequence[int], micro_batch: int) -> list[list[int]]:
    """Lines whose lengths round up to the same number of buckets, a micro-batch at a time."""
    by_size: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        by_size.setdefault(-(-length // BUCKET), []).append(index)
    rows = [by_size[size] for size in sorted(by_size)]
    return [row[start : start + micro_batch] for row in rows for start in range(0, len(row), micro_batch)]


def columns_of(lines: Sequence[Prepared], length: int, device: torch.device) -> dict[str, Tensor]:
    """The columns of these lines, padded to the longest text and to `length` latents."""
    N = max(len(line.units) for line in lines)
    text, durations = torch.full((len(lines), N), -1), torch.zeros(len(lines), N, dtype=torch.int64)
    latents = torch.zeros(len(lines), len(lines[0].latents), length)
    for row, line in enumerate(lines):
        text[row, : len(line.units)] = torch.tensor(line.units)
        durations[row, : len(line.durations)] = torch.tensor(line.durations)
        latents[row, :, : line.latents.shape[1]] = line.latents
    known = torch.tensor([line.known for line in lines])
    columns = {"text": text, "durations": durations, "known": known, "latents": latents}
    return {name: column.to(device) for name, column in columns.items()}


@torch.no_grad()
def draw(
    loaded: LoadedGenerator, options: SampleOptions, indices: Sequence[int], lines: Sequence[Prepared]
) -> list[Tensor]:
    """codes (T, S) of each line, its prompt's in front. The lines have one number of buckets."""
    micro_batch = options.sampling.images_at_once(loaded.tokenizer.quantizer.books.device.type)
    count, padding = len(lines), micro_batch - len(lines)  # on the CPU sums depend on the shape of a pass
    lines, indices = [*lines, *[lines[-1]] * padding], [*indices, *[indices[-1]] * padding]
    length, device = -(-lines[0].length // BUCKET) * BUCKET, loaded.tokenizer.quantizer.books.device
    columns, tokenizer = columns_of(lines, length, device), loaded.tokenizer
    keep = torch.zeros(len(lines), tokenizer.quantizer.steps, length, dtype=torch.bool, device=device)
    for row, line in enumerate(lines):
        keep[row, :, : line.latents.shape[1]] = True
    # Codes of the prompt are made under the sample's noise: in training the network saw such pairs of noise and codes.
    eps = tokenizer.noise("sample", options.seed, indices, [0] * len(indices), length).to(device)
    with one_thread():
        known = Known(tokenizer.quantizer.encode(columns["latents"], eps), keep)
        codes_BTS = loaded.generator.sample(columns, torch.tensor(indices), options, known)
    return [codes_TS[:, : line.length].cpu() for codes_TS, line in zip(codes_BTS, lines, strict=True)][:count]


@torch.no_grad()
def waves(
    loaded: LoadedGenerator, options: SampleOptions, indices: Sequence[int], lines: Sequence[Prepared]
) -> list[mel.Wave]:
    """The sound of each line: its latents decoded alone, since padding would change the decoder's output."""
    inputs, device = loaded.tokenizer.inputs, loaded.tokenizer.quantizer.books.device
    assert isinstance(inputs, MelInputs)
    sounds = []
    for codes_TS in draw(loaded, options, indices, lines):
        with one_thread():
            item = inputs.items(loaded.tokenizer.decode(codes_TS[None].to(device)))[0]
            sounds.append(mel.griffin_lim(item, inputs.features))
    return sounds


def reconstruct(
    source: audio.AudioSource, tokenizer: Tokenizer, digest: str, out: Path, seed: int, indices: Sequence[int]
) -> Result:
    """Recordings through the tokenizer and back: out/NAME.wav and its spectrograms, and of the first D(z'_1)..D(z'_T).

    Partial decodes are out/partial/NAME-tNN.wav."""
    inputs, distances, T = tokenizer.inputs, list[float](), tokenizer.quantizer.steps
    assert isinstance(inputs, MelInputs)
    rate = inputs.features.rate
    rows = [{"file": name_of(index), "index": index, "source": source.names[index]} for index in indices]
    record = folder.picture_record(RECONSTRUCTIONS, {"tokenizer": digest}, {"seed": seed}, rows=rows)
    folder.claim(out, record)
    with files.only_writer(out), stop_on_signal() as stop, progress.Bar("reconstruct", len(indices), "sounds") as bar:
        for number, index in enumerate(indices):
            wave, name = source.wave(index, rate), f"{index:06d}"
            item, codes_BTS = encode_recording(tokenizer, wave, index, seed)
            for t in [T] if number else range(1, T + 1):
                decoded = _decoded(tokenizer, inputs, codes_BTS, t)
                path = out / f"{name}.wav" if t == T else out / "partial" / f"{name}-t{t:02d}.wav"
                audio.write_wav(path, mel.griffin_lim(decoded, inputs.features, len(wave)), rate)
            if number < SHOWN:
                sheet = pictures.grid(
                    mel.mel_pixels(np.stack([item, decoded])), 1, ["real", "recon"], source.names[index]
                )
                pictures.save_png(out / "previews" / f"{name}.png", sheet)
            distances.append(mel.mel_distance(item, decoded))
            bar.advance(1)
            if bar.done < len(indices):
                stop.leave(f"{bar.done} of {len(indices)} sounds are in {out}")
        folder.finish(out, {**record, "rate": rate, "scores": {"mel_distance": float(np.mean(distances))}})
    values = {"folder": str(out), "n": len(indices), "seed": seed, "mel_distance": float(np.mean(distances))}
    return Result("sounds reconstructed", values)


@torch.no_grad()
def _decoded(tokenizer: Tokenizer, inputs: MelInputs, codes_BTS: Tensor, t: int) -> mel.Mel:
    """D(z'_t) of one recording, (F, M)."""
    with one_thread():
        z_BCS = tokenizer.quantizer.prefix(codes_BTS, torch.tensor([t], device=codes_BTS.device))
        return inputs.items(tokenizer.decode_latents(z_BCS))[0]


def _spectrograms(out: Path, rows: Sequence[dict[str, Any]], inputs: MelInputs) -> None:
    """previews/*.png of the first samples."""
    for row in rows[:SHOWN]:
        item = mel.log_mel(audio.read_wave(out / row["file"], inputs.features.rate), inputs.features, inputs.stride)
        pictures.save_png(out / "previews" / f"{row['index']:06d}.png", mel.mel_pixels(item[None])[0])

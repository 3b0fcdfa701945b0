"""sample for sound: texts, and prompts of the voices that are to speak them -> WAV files.

Legend: B lines, N units of a text, S latents of a line (its prompt's come first), C code width, T steps."""

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rdpm_cli import files, progress
from rdpm_cli.data import audio, folder, mel, pictures
from rdpm_cli.data.vocoders import Vocoder, open_vocoder
from rdpm_cli.distributed import one_thread, pick_device
from rdpm_cli.engine.sample import UNFINISHED, digests_of, share_of, shared
from rdpm_cli.engine.speech_lines import Line, Prepared, Rule, lines_of, prepare, sentences_of
from rdpm_cli.errors import UsageError, rdpm_command
from rdpm_cli.evaluation import speech_judge
from rdpm_cli.evaluation.recon import encode_recording
from rdpm_cli.generator import registry
from rdpm_cli.generator.contract import SampleOptions
from rdpm_cli.generator.registry import LoadedGenerator
from rdpm_cli.generator.speech_sampler import Spoken, batches_of, draw
from rdpm_cli.runs import Result, stop_on_signal
from rdpm_cli.tokenizer.inputs import MelInputs
from rdpm_cli.tokenizer.model import Tokenizer

RECONSTRUCTIONS = "rdpm-speech-reconstructions"
SHOWN = 8  # spectrograms
FADE, PAUSE = 0.01, 0.2  # seconds, at the ends of joined sentences and between them


def sample_words(
    ckpt: Path, out: Path, words: Mapping[str, Any], init: str | None, judge: str | None, **options: Any
) -> Result:
    """`sample_speech` by the options of the command. words: those of sound."""
    options |= {name: words[name] for name in ("duration_scale", "length", "sentences", "vocoder")}
    return sample_speech(ckpt, lines_of(words, init), out, judge=Path(judge) if judge else None, **options)


def sample_speech(
    ckpt: Path, lines: Sequence[Line], out: Path, *, seed: int = 0, sampling: Mapping[str, Any] | None = None,
    preset: str | None = None, judge: Path | None = None, duration_scale: float = 1.0,
    length: Rule = "predictor", sentences: bool = False, shard: str = "1/1", device: str = "auto",
    vocoder: str | None = None,
) -> Result:  # fmt: skip
    """Draw lines into out/*.wav, each with its prompt in front; continues an interrupted job. judge: aligns prompts.

    sentences: a sample a sentence; the texts as wholes, without prompts, are out/joined/*.wav."""
    share, picked, loaded = share_of(shard), pick_device(device), registry.load(ckpt)
    inputs = loaded.tokenizer.inputs
    if not isinstance(inputs, MelInputs):
        raise UsageError(f"{ckpt} draws images", "give --classes instead of --text")
    options = loaded.options(seed, preset, sampling or {})
    if judge and loaded.attends_to_text:
        raise UsageError("--judge aligns prompts for generators of network.align=durations", "leave it out")
    voice = open_vocoder(vocoder, inputs.features, picked)
    aligner = speech_judge.load(judge)[0] if judge else None
    loaded.to(picked, options.sampling.compile)
    wholes = [sentences_of(line) if sentences else [line] for line in lines]
    lines, counts = [line for whole in wholes for line in whole], [len(whole) for whole in wholes]
    prepared = [prepare(loaded, line, aligner, duration_scale, length) for line in lines]
    rows = [_row(i, *pair, inputs.rate) for i, pair in enumerate(zip(lines, prepared, strict=True))]
    recorded = {**options.sampling.model_dump(), "seed": seed, "duration_scale": duration_scale, "length": length}
    made_from = {**digests_of(loaded, options), **voice.made_from}
    record = folder.picture_record(folder.SPEECH, made_from, recorded, rows=rows, vocoder=voice.identity)
    with folder.one_at_a_time(out):
        folder.claim(out, record)

    def is_missing(batch: list[int]) -> bool:
        return any(not (out / name_of(i)).is_file() for i in batch)

    def make(batch: list[int]) -> None:
        for i in batch:
            if rows[i]["prompt"]:
                audio.write_wav(out / rows[i]["prompt"], prepared[i].wave, inputs.features.rate)
        for i, wave in zip(batch, waves(loaded, options, batch, [prepared[i] for i in batch], voice), strict=True):
            audio.write_wav(out / name_of(i), wave, inputs.features.rate)

    def finish() -> None:
        _spectrograms(out, rows, inputs)
        if sentences:
            _join(out, rows, counts, inputs.features.rate)
        folder.finish(out, {**record, "rate": inputs.features.rate})

    batches = batches_of(prepared, options.sampling.images_at_once(picked.type))
    shared(out, share, batches, "lines", is_missing, make, finish)
    seconds = sum(p.length for p in prepared) / inputs.rate
    values = {"folder": str(out), "samples": len(lines), "seconds": seconds, "checkpoint": loaded.digest, "seed": seed}
    values |= {"cfg": options.sampling.cfg, "durations": sorted({p.source["durations_from"] for p in prepared})}
    if not (out / folder.RECORD).is_file():
        return Result(UNFINISHED, values)
    return Result("samples written", values, rdpm_command("eval", "speech", out, "--judge", judge or "judge.pt"))


def name_of(index: int) -> str:
    return f"{index:06d}.wav"


def _row(index: int, line: Line, prepared: Prepared, rate: float) -> dict[str, Any]:
    """The row of a sample in samples.json. rate: latents a second. Where a stretch is drawn again there is no prompt.

    It binds the folder to the prompt's sound and to all durations, whatever they come from."""
    name, fields = name_of(index), {key: value for key, value in vars(line).items() if value and key != "prompt"}
    row: dict[str, Any] = {"file": name, "index": index, **fields, "prompt": None, "prompt_seconds": 0.0}
    if len(prepared.wave):
        row["prompt_sha256"] = hashlib.sha256(prepared.wave.tobytes()).hexdigest()
    if len(prepared.wave) and not line.cut:
        seconds = sum(prepared.durations[: prepared.prompt]) / rate
        row |= {"prompt": f"prompts/{name}", "prompt_seconds": seconds}
    return {**row, "durations": prepared.durations, **prepared.source}


def _join(out: Path, rows: Sequence[dict[str, Any]], counts: Sequence[int], rate: int) -> None:
    """joined/*.wav: so many samples each, without their prompts, faded at both ends, and a pause between."""
    places = iter(rows)
    for number, count in enumerate(counts):
        waves = []
        for row in itertools.islice(places, count):
            wave = audio.read_wave(out / row["file"], rate)[round(row["prompt_seconds"] * rate) :]
            fade = np.minimum(1, np.arange(len(wave)) / (FADE * rate)).astype(np.float32)
            waves += [wave * fade * fade[::-1], np.zeros(round(PAUSE * rate), np.float32)]
        audio.write_wav(out / "joined" / name_of(number), np.concatenate(waves[:-1]), rate)


@torch.no_grad()
def waves(
    loaded: LoadedGenerator, options: SampleOptions, indices: Sequence[int], lines: Sequence[Spoken], vocoder: Vocoder
) -> list[mel.Wave]:
    """The sound of each line: its latents decoded alone, since padding would change the decoder's output."""
    inputs, device = loaded.tokenizer.inputs, loaded.tokenizer.quantizer.books.device
    assert isinstance(inputs, MelInputs)
    sounds = []
    for codes_TS in draw(loaded, options, indices, lines):
        with one_thread():
            sounds.append(vocoder.wave(inputs.items(loaded.tokenizer.decode(codes_TS[None].to(device)))[0]))
    return sounds


def reconstruct(
    source: audio.AudioSource, tokenizer: Tokenizer, digest: str, out: Path, seed: int, indices: Sequence[int],
    vocoder: str | None = None,
) -> Result:  # fmt: skip
    """Recordings through the tokenizer and back: out/NAME.wav and its spectrograms, and of the first D(z'_1)..D(z'_T).

    Partial decodes are out/partial/NAME-tNN.wav."""
    inputs, distances, T = tokenizer.inputs, list[float](), tokenizer.quantizer.steps
    assert isinstance(inputs, MelInputs)
    rate, voice = inputs.features.rate, open_vocoder(vocoder, inputs.features, next(tokenizer.parameters()).device)
    rows = [{"file": name_of(index), "index": index, "source": source.names[index]} for index in indices]
    made_from = {"tokenizer": digest, **voice.made_from}
    record = folder.picture_record(RECONSTRUCTIONS, made_from, {"seed": seed}, rows=rows, vocoder=voice.identity)
    folder.claim(out, record)
    with files.only_writer(out), stop_on_signal() as stop, progress.Bar("reconstruct", len(indices), "sounds") as bar:
        for number, index in enumerate(indices):
            wave, name = source.wave(index, rate), f"{index:06d}"
            item, codes_BTS = encode_recording(tokenizer, wave, index, seed)
            for t in [T] if number else range(1, T + 1):
                decoded = _decoded(tokenizer, inputs, codes_BTS, t)
                path = out / f"{name}.wav" if t == T else out / "partial" / f"{name}-t{t:02d}.wav"
                audio.write_wav(path, voice.wave(decoded)[: len(wave)], rate)
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
    return Result("sounds reconstructed", {**values, "vocoder": voice.identity})


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

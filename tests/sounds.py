"""Sounds of words made on the fly, and tiny tokenizers, stores and generators of speech that several test files share.

A word is a signal of its own: a sine, a chirp, a burst of noise. Legend: T steps, C channels, S latents."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from generators import wake
from stores import Making

from rdpm_cli import checkpoint
from rdpm_cli.codes.ragged import RaggedStore, open_store
from rdpm_cli.data.audio import AudioSource, open_audio, write_wav
from rdpm_cli.data.mel import Wave
from rdpm_cli.generator import registry
from rdpm_cli.generator.config import GeneratorConfig, RDPMConfig, ResGenConfig
from rdpm_cli.generator.contract import Generator, GeneratorBatches
from rdpm_cli.tokenizer import model
from rdpm_cli.tokenizer.config import TokenizerArchitecture
from rdpm_cli.tokenizer.training import initialise

RATE, STEP = 8000, 320  # samples a second; samples a latent of the tiny tokenizer
WORDS = ("low", "high", "rise", "hiss")
TINY_MEL: dict[str, Any] = {
    "kind": "mel1d", "features": "speech8", "frames": 32, "width": 16, "multipliers": [1, 1, 1], "res_blocks": 1,
    "final_blocks": 1, "channels": 4,
}  # fmt: skip
QUANTIZERS: dict[str, dict[str, Any]] = {"sin": {}, "rvq": {"codebooks": "per_step", "init": "data"}}
NETWORK: dict[str, Any] = {"depth": 2, "width": 32, "heads": 2}
FAMILIES = {"rdpm": "sin", "resgen": "rvq"}  # and the schedules of the tokenizers that they learn


def sine(hertz: float, samples: int, rate: int = RATE) -> Wave:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(samples) / rate)).astype(np.float32)


def chirp(first: float, last: float, samples: int, rate: int = RATE) -> Wave:
    """A sine whose frequency moves from first to last."""
    hertz = np.linspace(first, last, samples)
    return (0.5 * np.sin(2 * np.pi * np.cumsum(hertz) / rate)).astype(np.float32)


def burst(samples: int, seed: int = 0) -> Wave:
    return (0.2 * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


def word(name: str, samples: int) -> Wave:
    signals = {"low": sine(300, samples), "high": sine(2400, samples), "rise": chirp(400, 3000, samples)}
    return signals.get(name, burst(samples))


def write_speech(root: Path, strings: Sequence[Sequence[tuple[str, int]]]) -> str:
    """A manifest of recordings of (word, latents), of speakers ann and bob in turn. -> what a user names."""
    lines = []
    for number, string in enumerate(strings):
        wave = np.concatenate([word(name, latents * STEP) for name, latents in string]) / (1 + number % 2)
        write_wav(root / f"{number:03d}.wav", wave.astype(np.float32), RATE)
        row: dict[str, Any] = {"audio_filepath": f"{number:03d}.wav", "text": " ".join(name for name, _ in string)}
        row |= {"speaker": ["ann", "bob"][number % 2], "word_seconds": [n * STEP / RATE for _, n in string]}
        lines.append(json.dumps(row) + "\n")
    (root / "manifest.jsonl").write_text("".join(lines))
    return str(root)


def strings(count: int, seed: int = 0) -> list[list[tuple[str, int]]]:
    """Strings of two to four words of one to six latents."""
    random = np.random.default_rng(seed)
    return [
        [(WORDS[random.integers(4)], int(random.integers(1, 7))) for _ in range(random.integers(2, 5))]
        for _ in range(count)
    ]


def mel_tokenizer(kind: str, source: AudioSource, **sections: dict[str, Any]) -> model.Tokenizer:
    """An untrained tokenizer with the scale, and the codes of rvq, that a training would begin with."""
    plain: dict[str, Any] = {"autoencoder": TINY_MEL, "schedule": {"kind": kind}}
    plain["quantizer"] = {"codes": 32, "steps": 3, "bias": "none", **QUANTIZERS[kind]}
    cfg = TokenizerArchitecture.model_validate({name: v | sections.get(name, {}) for name, v in plain.items()})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = model.Tokenizer(cfg)
    windows = tokenizer.inputs.windows(source, range(len(source)), np.zeros(len(source), np.float32), False)
    initialise(tokenizer, windows, 0)
    return tokenizer.eval().requires_grad_(False)


def save_tokenizer(path: Path, kind: str, source: AudioSource, **sections: dict[str, Any]) -> Path:
    tokenizer = mel_tokenizer(kind, source, **sections)
    checkpoint.save(path, model.pack(tokenizer, class_names=[], provenance={}))
    return path


def making(root: Path, source: AudioSource, tokenizer_file: Path, **settings: Any) -> Making:
    """A store of sound in the making, in shards of 4 recordings."""
    options = {"views": 1, "shard_images": 4, "text": "words", **settings}
    return Making(root, source, tokenizer_file, **options)  # type: ignore[arg-type]


def finish(one: Making) -> RaggedStore:
    assert sum(one.run()) == one.plan.data.count
    store = open_store(one.root)
    assert isinstance(store, RaggedStore)
    return store


def speech_store(root: Path, kind: str, spoken: Sequence[Sequence[tuple[str, int]]], **settings: Any) -> RaggedStore:
    """A store of these strings by a fresh tokenizer, all under one folder."""
    source = open_audio(write_speech(root / "sound", spoken))
    file = save_tokenizer(root / "tokenizer.pt", kind, source)
    return finish(making(root / "codes", source, file, **settings))


def speech_config(family: str, batch: int = 8, **sections: dict[str, Any]) -> GeneratorConfig:
    """A tiny network of a family."""
    cfg = {"rdpm": RDPMConfig, "resgen": ResGenConfig}[family]
    network = NETWORK | ({"head": "geometric"} if family == "rdpm" else {"mixtures": 8, "rank": 2})
    plain: dict[str, Any] = {"network": network, "train": {"batch": batch, "steps": 1}, "sampling": {"micro_batch": 4}}
    return cfg.model_validate({**sections, **{name: v | sections.get(name, {}) for name, v in plain.items()}})


def open_generator(
    root: Path, cfg: GeneratorConfig, awake: bool = True
) -> tuple[Generator, GeneratorBatches, registry.Codes]:
    """A fresh generator for a store. awake: also the parts that start at zero have an effect."""
    opened = registry.open_codes(root, cfg, 0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        generator = registry.build(cfg, opened.tokenizer, len(opened.store.manifest.condition_names))
    generator.begin(cfg, opened.store)
    registry.prepare(generator, cfg)
    if awake:
        wake(generator.network)
    return generator, opened.batches, opened


def save_speech_generator(path: Path, root: Path, cfg: GeneratorConfig, generator: Generator | None = None) -> Path:
    """The file of a generator for a store, as train-gen writes it; default: an untrained one."""
    fresh, _, opened = open_generator(root, cfg)
    names = list(opened.store.manifest.condition_names)
    speech = opened.store.manifest.speech
    assert speech is not None
    content = registry.pack(generator or fresh, cfg, opened.content, names, provenance={}, text=speech.text)
    checkpoint.save(path, content)
    return path

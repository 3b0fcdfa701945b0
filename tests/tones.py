"""Spoken strings of tones: a word is a frequency, a speaker an overtone. A judge learns them in seconds."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rdpm_cli.cli.app import run
from rdpm_cli.data.audio import write_wav
from rdpm_cli.data.mel import Wave

RATE = 8000
HERTZ = {"low": 300.0, "mid": 800.0, "high": 1900.0}
OVERTONE = {"ann": 1.0, "bob": 1.7}  # times the frequency


def tone(word: str, speaker: str, seconds: float) -> Wave:
    """A word, with 20 ms of silence at its end."""
    time = np.arange(round(seconds * RATE)) / RATE
    turns = 2 * np.pi * HERTZ[word] * time
    wave = (0.3 * (np.sin(turns) + np.sin(OVERTONE[speaker] * turns))).astype(np.float32)
    wave[-160:] = 0.0
    return wave


def string(words: str, speaker: str, seconds: Sequence[float]) -> Wave:
    return np.concatenate([tone(*word) for word in zip(words.split(), [speaker] * len(seconds), seconds, strict=True)])


def write_tones(folder: Path, count: int, seed: int, durations: bool = True) -> str:
    """A folder of `count` strings of 2 to 4 words of 160 to 400 ms, in whole latents of 40 ms."""
    draw, rows = np.random.default_rng(seed), []
    for number in range(count):
        words = draw.choice(list(HERTZ), draw.integers(2, 5)).tolist()
        seconds = (0.04 * draw.integers(4, 11, len(words))).round(2).tolist()
        name, speaker = f"{number:03d}.wav", list(OVERTONE)[number % 2]
        write_wav(folder / name, string(" ".join(words), speaker, seconds), RATE)
        row = {"audio_filepath": name, "text": " ".join(words), "speaker": speaker}
        rows.append(row | ({"word_seconds": seconds} if durations else {}))
    (folder / "manifest.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(folder)


def train_judge(root: Path, durations: bool = True) -> tuple[Path, str]:
    """A trained judge of tones and the held-out strings."""
    seen, unseen = (
        write_tones(root / name, *size, durations) for name, size in (("seen", (64, 0)), ("unseen", (16, 1)))
    )
    sizes = ["width=24", "embedding=8", "train.steps=300", "train.lr=4e-3", "train.warmup_steps=10"]
    words = ["eval", "judge", seen, str(root / "run"), "--recipe", "speech8-sin", "--heldout", unseen, "--json"]
    assert run([*words, *sizes]) == 0
    return root / "run/judge.pt", unseen

"""Scores of speech: of words, of voices, and of reconstructions of waves. Optional recognisers of words and voices.

Legend: N sounds, E width of an embedding."""

import importlib.util
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from rdpm_cli import files
from rdpm_cli.data import text
from rdpm_cli.data.audio import resampled
from rdpm_cli.data.mel import Wave
from rdpm_cli.data.recordings import DIGITS
from rdpm_cli.errors import DataError, UsageError

# The rule by which texts are compared. Change the number with the rule: scores by different rules do not compare.
NORMALISER = "rdpm-words 1: lower case, letters, digits and apostrophes, each digit as a word"
MOST_WORDS = 2  # of a hypothesis, times those of its reference: recognisers repeat themselves on odd sounds
PESQ_RATES = {8000: "nb", 16000: "wb"}  # ITU-T P.862 and P.862.2
WHISPER_RATE = RESEMBLYZER_RATE = 16000
Embeddings = NDArray[np.float32]


def normalise(words: str) -> str:
    """A text as it is compared, by NORMALISER: `Call 42, OK?` is `call four two ok`."""
    return text.normalise(re.sub("[0-9]", lambda digit: f" {DIGITS[int(digit[0])]} ", text.normalise(words)))


def cut(reference: str, hypothesis: str) -> str:
    """The first words of a normalised hypothesis, at most twice as many as the reference has."""
    return " ".join(hypothesis.split()[: MOST_WORDS * len(reference.split())])


def word_scores(references: Sequence[str], hypotheses: Sequence[str]) -> dict[str, Any]:
    """wer, cer and word_accuracy (hits / reference words) over all texts together, with the words of the references.

    Raises DataError for a reference without a word."""
    import jiwer  # an optional package

    plain = [normalise(reference) for reference in references]
    if "" in plain:
        message = f"the reference text '{references[plain.index('')]}' holds no word"
        raise DataError(message, "give texts of at least one word")
    whole = [normalise(hypothesis) for hypothesis in hypotheses]
    heard = [cut(*pair) for pair in zip(plain, whole, strict=True)]
    counts = jiwer.process_words(plain, heard)
    words = counts.hits + counts.substitutions + counts.deletions
    return {
        "wer": counts.wer, "cer": jiwer.process_characters(plain, heard).cer, "word_accuracy": counts.hits / words,
        "reference_words": words, "cut_hypotheses": sum(map(str.__ne__, heard, whole)),
    }  # fmt: skip


def similarity(a_NE: Embeddings, b_NE: Embeddings) -> float:
    """The mean cosine of pairs of embeddings."""
    lengths_N = np.linalg.norm(a_NE, axis=1) * np.linalg.norm(b_NE, axis=1)
    return float(((a_NE * b_NE).sum(1) / lengths_N).mean())


def wave_scores(originals: Sequence[Wave], others: Sequence[Wave], rate: int) -> dict[str, Any]:
    """Means of PESQ (narrow band at 8 kHz, wide band at 16) and STOI over pairs of waves of equal lengths.

    Other rates are resampled for PESQ to the nearest lower one of these. not_scored: pairs that are too short or too
    silent, which the means leave out."""
    import pesq  # optional packages
    import pystoi

    pesq_rate = max((x for x in PESQ_RATES if x <= rate), default=min(PESQ_RATES))
    quality, clarity = list[float](), list[float]()
    for pair in zip(originals, others, strict=True):
        a, b = (resampled(wave, rate, pesq_rate) for wave in pair)
        with warnings.catch_warnings(record=True) as problems:
            warnings.simplefilter("always")
            intelligible = float(pystoi.stoi(*pair, rate))  # it warns of fewer than 30 frames that are not silent
            similar = pesq.pesq(pesq_rate, a, b, PESQ_RATES[pesq_rate], on_error=pesq.PesqError.RETURN_VALUES)
        clarity += [] if problems else [intelligible]
        quality += [similar] if similar > 0 else []  # -1, or NaN for zeros, where it finds no speech
    return {
        "pesq": float(np.mean(quality)) if quality else None, "stoi": float(np.mean(clarity)) if clarity else None,
        "pesq_mode": PESQ_RATES[pesq_rate], "pesq_rate": pesq_rate, "wave_rate": rate,
        "not_scored": {"pesq": len(originals) - len(quality), "stoi": len(originals) - len(clarity)},
    }  # fmt: skip


class Recogniser(ABC):
    """name and sha256: for records. rate: of the waves that it takes, samples a second. network: what a GPU can run."""

    name: str
    sha256: str
    rate: int
    network: nn.Module | None = None

    def identity(self) -> dict[str, Any]:
        return {"name": self.name, "sha256": self.sha256, "rate": self.rate}


class Transcriber(Recogniser):
    @abstractmethod
    def transcribe(self, waves: Sequence[Wave]) -> list[str]:
        """The text of each wave."""


class Voices(Recogniser):
    @abstractmethod
    def embed(self, waves: Sequence[Wave]) -> Embeddings:
        """(N, E): waves of the same voice have similar directions."""


def need(package: str, option: str, install: str) -> None:
    """Raise UsageError if an optional package is not installed."""
    if importlib.util.find_spec(package) is None:
        raise UsageError(f"{option} needs the package {package}", f"install it with `uv pip install {install}`")


class Whisper(Transcriber):
    """faster-whisper with the weights of a folder: English, a beam of 5, temperature 0, each sound on its own."""

    rate = WHISPER_RATE

    def __init__(self, folder: Path) -> None:
        """Raises UsageError without the package or the folder."""
        need("faster_whisper", "--asr whisper", "faster-whisper")
        if not (folder / "model.bin").is_file():
            message = f"--asr whisper:{folder}: no model.bin in this folder"
            raise UsageError(message, "name a folder in faster-whisper's format (CTranslate2), with model.bin in it")
        from faster_whisper import WhisperModel

        self.model = WhisperModel(str(folder), device="cpu", compute_type="float32", local_files_only=True)
        self.name, self.sha256 = f"whisper {folder.name}", files.sha256_file(folder / "model.bin")

    def transcribe(self, waves: Sequence[Wave]) -> list[str]:
        options = {"language": "en", "temperature": 0.0, "condition_on_previous_text": False}
        texts = (self.model.transcribe(wave, **options)[0] for wave in waves)
        return [" ".join(segment.text.strip() for segment in segments) for segments in texts]


class Resemblyzer(Voices):
    """GE2E embeddings of the package resemblyzer, which brings its weights. It cuts silence out first."""

    rate = RESEMBLYZER_RATE

    def __init__(self) -> None:
        """Raises UsageError without the package."""
        need("resemblyzer", "--speaker resemblyzer", "resemblyzer 'setuptools<81'")
        import resemblyzer

        self.package, self.encoder = resemblyzer, resemblyzer.VoiceEncoder("cpu", verbose=False)
        weights = Path(resemblyzer.__file__).parent / "pretrained.pt"
        self.name, self.sha256 = "resemblyzer", files.sha256_file(weights)

    def embed(self, waves: Sequence[Wave]) -> Embeddings:
        plain = [self.package.preprocess_wav(wave, self.rate) for wave in waves]
        return np.stack([self.encoder.embed_utterance(wave) for wave in plain])

"""The judge of speech: a small network that tells the words of a sound, when each is spoken, and the speaker.

Legend: B batch, F frames, M mel bands, S latents (4 frames), D width, E width of the embedding, U words, P speakers."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from rdpm_cli import checkpoint, noise
from rdpm_cli.codes.ragged import latents_of
from rdpm_cli.data import text
from rdpm_cli.data.audio import AudioSource
from rdpm_cli.data.mel import PRESETS, Features, Mel, Wave, log_mel
from rdpm_cli.distributed import TrainStep
from rdpm_cli.errors import CheckpointError, DataError, some_of
from rdpm_cli.evaluation import metrics
from rdpm_cli.evaluation.speech import word_scores
from rdpm_cli.schema import Section
from rdpm_cli.tokenizer.mel_networks import FrameNorm, Scale
from rdpm_cli.training.config import TrainConfig
from rdpm_cli.training.loop import DeviceBatch, Player

KIND = "rdpm-speech-judge"
STRIDE = 4  # frames a latent
BLANK = 0  # of CTC (Graves et al. 2006); word u has the number u + 1
SHARPNESS = 16.0  # the speakers' logits are this times cosines
BATCH = 16  # sounds a forward pass
CACHE_BYTES = 1 << 28  # of spectrograms that a training keeps
GAIN, NOISE, SHIFT = (-1.5, 0.7), 4.0, 8  # augmentation: nats; most nats above the floor; most frames
MASKS = (10, 6)  # most frames, and bands, that SpecAugment (Park et al. 2019) blanks
Preset = Literal["speech8", "speech16", "melvae22", "rvqvae44"]


class SpeechJudgeConfig(Section):
    """A small recogniser of words and speakers, trained on real recordings, that scores what a generator says."""

    features: Preset = Field(description="the log-mel preset; it makes the section one of sound")
    width: int = Field(96, gt=0, description="channels")
    embedding: int = Field(64, gt=0, description="width of the speaker embedding")
    train: TrainConfig


class Block(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), the first one dilated; frames behind the end count as zeros."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = FrameNorm(width), FrameNorm(width)
        self.conv1 = nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation)
        self.conv2 = nn.Conv1d(width, width, 3, padding=1)

    def forward(self, x_BDS: Tensor, exists_B1S: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x_BDS)) * exists_B1S)
        return x_BDS + self.conv2(F.silu(self.norm2(y)) * exists_B1S)


@dataclass
class Heard:
    """features_BDS: penultimate; log_p_BSU: of blank and the words by CTC, (B, S, U + 1); embeddings; speaker logits.

    path_BSU: log p of the unit that is spoken in each latent, blank in the last one of a word. lengths_B: latents of
    each sound; what is behind them means nothing."""

    features_BDS: Tensor
    log_p_BSU: Tensor
    path_BSU: Tensor
    embedding_BE: Tensor
    speakers_BP: Tensor
    lengths_B: Tensor


class SpeechJudge(nn.Module):
    """Convolutions of log-mel frames at a half and a quarter of their rate, then a layer a question.

    Norms are over channels and padding is zeros, so a sound's outcome does not depend on those it is padded to."""

    def __init__(
        self, features: str, width: int, embedding: int, words: Sequence[str], speakers: Sequence[str],
        durations: bool = False,
    ) -> None:  # fmt: skip
        """durations: it is trained on recordings whose words have known durations, and so learns them."""
        super().__init__()
        self.config = {"features": features, "width": width, "embedding": embedding}
        self.config |= {"words": list(words), "speakers": list(speakers), "durations": durations}
        self.features: Features = PRESETS[features]
        self.words, self.speaker_names = tuple(words), tuple(speakers)
        self.scale = Scale()
        self.conv_in = nn.Conv1d(self.features.bands, width, 5, stride=2, padding=2)
        self.early = nn.ModuleList([Block(width, 1)])
        self.down = nn.Conv1d(width, width, 4, stride=2, padding=1)
        self.late = nn.ModuleList([Block(width, 1), Block(width, 2), Block(width, 1)])
        self.norm = FrameNorm(width)
        self.units = nn.Conv1d(width, len(self.words) + 1, 1)
        # CTC learns spikes between blanks; where durations are known, a layer of its own learns how long words last.
        self.path = nn.Conv1d(width, len(self.words) + 1, 1) if durations else None
        self.embedding = nn.Linear(width, embedding)
        self.speakers_layer = nn.Linear(embedding, len(self.speaker_names), bias=False)
        # Of the features of held-out real sounds, for a Fréchet distance; 0 before they are measured.
        self.real_mean_D = nn.Buffer(torch.zeros(width, dtype=torch.float64))
        self.real_covariance_DD = nn.Buffer(torch.zeros(width, width, dtype=torch.float64))

    def forward(self, x_BMF: Tensor, frames_B: Tensor) -> Heard:
        """x: log-mel in nats, F a multiple of 4. frames: those of each sound, a multiple of 4; anything may follow."""
        exists_B1F = (torch.arange(x_BMF.shape[2], device=x_BMF.device) < frames_B[:, None])[:, None].to(x_BMF.dtype)
        halves, quarters = exists_B1F[..., ::2], exists_B1F[..., ::STRIDE]
        y = self.conv_in(self.scale(x_BMF) * exists_B1F)
        for block in self.early:
            y = block(y, halves)
        y = self.down(y * halves)
        for block in self.late:
            y = block(y, quarters)
        features_BDS = F.silu(self.norm(y)) * quarters
        mean_BD = features_BDS.sum(2) / quarters.sum(2)
        embedding_BE = F.normalize(self.embedding(mean_BD))
        cosines_BP = F.linear(embedding_BE, F.normalize(self.speakers_layer.weight))
        log_p_BSU = self.units(features_BDS).mT.float().log_softmax(2)
        path_BSU = self.path(features_BDS).mT.float().log_softmax(2) if self.path else log_p_BSU
        return Heard(features_BDS, log_p_BSU, path_BSU, embedding_BE, SHARPNESS * cosines_BP, frames_B // STRIDE)

    @torch.no_grad()
    def hear(self, waves: Sequence[Wave]) -> Iterator[Heard]:
        """The outcome of each wave (n,), at the rate of `features`, whatever the lengths of the others."""
        device = self.real_mean_D.device
        for start in range(0, len(waves), BATCH):
            mels = [log_mel(wave, self.features, STRIDE) for wave in waves[start : start + BATCH]]
            x_BMF, frames_B = padded(mels, self.features)
            heard = self(x_BMF.to(device), frames_B.to(device))
            for row, S in enumerate(heard.lengths_B.tolist()):
                one = slice(row, row + 1)
                yield Heard(
                    heard.features_BDS[one, :, :S], heard.log_p_BSU[one, :S], heard.path_BSU[one, :S],
                    heard.embedding_BE[one], heard.speakers_BP[one], heard.lengths_B[one],
                )  # fmt: skip

    def spell(self, heard: Heard) -> str:
        """The text of a sound: the likeliest unit of each latent, repetitions merged, without blanks (greedy CTC)."""
        path = heard.log_p_BSU[0].argmax(1).unique_consecutive().tolist()
        return " ".join(self.words[unit - 1] for unit in path if unit != BLANK)

    def transcribe(self, waves: Sequence[Wave]) -> list[str]:
        """The text of each wave."""
        return [self.spell(heard) for heard in self.hear(waves)]

    def speakers(self, waves: Sequence[Wave]) -> tuple[list[str], NDArray[np.float32]]:
        """The likeliest speaker of each wave, and the embeddings (N, E), of length 1."""
        heard = list(self.hear(waves))
        names = [self.speaker_names[int(one.speakers_BP.argmax())] for one in heard]
        return names, torch.cat([one.embedding_BE for one in heard]).cpu().numpy()

    def align(self, wave: Wave, words: str) -> list[float]:
        """How long each word of a text lasts, in seconds, which sum to the wave's: Viterbi's path through the units.

        A judge that does not know durations places a word's end in the middle of the blanks behind it. Raises
        CheckpointError for a word that it does not know, DataError for a text that is longer than the sound."""
        import torchaudio.functional as audio  # an optional package

        numbers, heard = self.encode(words), next(self.hear([wave]))
        self.check_length(numbers, int(heard.lengths_B), f"the text '{words:.80}'")
        path, scores = audio.forced_align(heard.path_BSU.cpu().contiguous(), torch.tensor([numbers]), blank=BLANK)
        spans = itertools.pairwise(audio.merge_tokens(path[0], scores[0], blank=BLANK))
        starts = [right.start if self.path else (left.end + right.start) / 2 for left, right in spans]
        latent = STRIDE * self.features.hop / self.features.rate
        ends = np.array([*(start * latent for start in starts), len(wave) / self.features.rate])
        return np.diff(ends.clip(max=ends[-1]), prepend=0.0).tolist()

    def encode(self, words: str) -> list[int]:
        """The units of a text. Raises CheckpointError for a word that the judge does not know."""
        if unknown := [word for word in text.normalise(words).split() if word not in self.words]:
            hint = f"it knows {some_of(self.words, 24)}; train one on texts with this word by `rdpm eval judge`"
            raise CheckpointError(f"the judge does not know the word '{unknown[0]}' of '{words:.80}'", hint)
        return [unit + 1 for unit in text.encode("words", self.words, words)]

    @staticmethod
    def check_length(units: Sequence[int], latents: int, name: str) -> None:
        """Raise DataError for a text that no path of CTC can spell: a latent a word, and one between equal ones."""
        needed = len(units) + sum(left == right for left, right in itertools.pairwise(units))
        if needed > latents:
            message = f"{name} has {len(units)} words, too many for the {latents} latents of its sound"
            raise DataError(message, "check that text and sound belong together")


def padded(mels: Sequence[Mel], features: Features) -> tuple[Tensor, Tensor]:
    """Spectrograms (F, M) followed by silence -> (B, M, F) of the longest, and the frames of each."""
    frames_B = torch.tensor([len(mel) for mel in mels])
    x_BFM = torch.full((len(mels), int(frames_B.max()), features.bands), float(np.log(features.floor)))
    for row, mel in zip(x_BFM, mels, strict=True):
        row[: len(mel)] = torch.from_numpy(mel)
    return x_BFM.mT.contiguous(), frames_B


def load(path: Path, device: torch.device | str = "cpu") -> tuple[SpeechJudge, dict[str, Any]]:
    """The judge of a file, frozen, and the file's content. Raises CheckpointError."""
    content = checkpoint.load(path, KIND)
    judge = SpeechJudge(**content["config"])
    checkpoint.fill(judge, content, str(path))
    return judge.eval().requires_grad_(False).to(device), content


@dataclass
class SpeechBatch(DeviceBatch):
    """Spectrograms and their frames, units (-1 behind the end of a text), and speakers.

    path_BS: the unit of each latent, where the durations of words are known; -1 behind the end of a sound."""

    x_BMF: Tensor
    frames_B: Tensor
    units_BN: Tensor
    speakers_B: Tensor
    path_BS: Tensor | None = None


class SpeechBatches:
    """batch_at(step, rows) of recordings, each with another gain, some noise and some silence in front of it."""

    def __init__(self, source: AudioSource, indices: Sequence[int], judge: SpeechJudge, batch: int, seed: int) -> None:
        """Raises DataError without texts and speakers. indices: of the recordings that are trained on."""
        texts, speakers = known(source)
        self.source, self.features, self.batch, self.seed = source, judge.features, batch, seed
        self.indices, self.durations = list(indices), judge.path is not None
        self.units = {index: judge.encode(texts[index]) for index in self.indices}
        self.speakers = {index: judge.speaker_names.index(speakers[index]) for index in self.indices}
        self._kept: dict[int, Mel] = {}
        self._bytes = 0

    def batch_at(self, step: int, rows: range) -> SpeechBatch:
        """rows: this process's rows of the global batch."""
        items = self._items(step, rows)
        # block_uniform draws at t = 0
        draws = [noise.stream("batch", self.seed, step, row, 1) for row in rows]
        shifts = [int(draw.integers(SHIFT + 1)) for draw in draws]
        changes = zip(items, shifts, draws, strict=True)
        mels = [changed(self._mel(item), self.features, shift, draw) for item, shift, draw in changes]
        for item, mel in zip(items, mels, strict=True):
            SpeechJudge.check_length(self.units[item], len(mel) // STRIDE, self.source.names[item])
        units_BN, path_BS = _rows([self.units[item] for item in items]), None
        if self.durations:
            path_BS = _rows([self._path(*row) for row in zip(items, shifts, map(len, mels), strict=True)])
        speakers_B = torch.tensor([self.speakers[item] for item in items])
        return SpeechBatch(*padded(mels, self.features), units_BN, speakers_B, path_BS)

    def describe(self, step: int, rows: range) -> str:
        """The names of those recordings."""
        return f"recordings {some_of(self.source.names[index] for index in self._items(step, rows))}"

    def _items(self, step: int, rows: range) -> list[int]:
        places = noise.epoch_rows(self.seed, step, self.batch, len(self.indices), rows)
        return [self.indices[place] for place in places]

    def _path(self, index: int, shift: int, frames: int) -> list[int]:
        """The unit of each latent of a recording that begins after `shift` frames; blank in a word's last latent.

        It is one of the paths that CTC allows, and on it words last as long as they are spoken."""
        assert self.source.word_seconds is not None
        seconds, frame = list(self.source.word_seconds[index]), self.features.hop / self.features.rate
        seconds[0] += shift * frame
        lengths = np.array(latents_of(seconds, 1 / (STRIDE * frame), frames // STRIDE))
        path = np.repeat(self.units[index], lengths)
        path[lengths.cumsum()[lengths > 1] - 1] = BLANK
        return path.tolist()

    def _mel(self, index: int) -> Mel:
        """The spectrogram of a recording, kept as long as there is room: decoding takes longer than a step."""
        if index in self._kept:
            return self._kept[index]
        mel = log_mel(self.source.wave(index, self.features.rate), self.features, STRIDE)
        if self._bytes + mel.nbytes <= CACHE_BYTES:
            self._kept[index], self._bytes = mel, self._bytes + mel.nbytes
        return mel


def _rows(values: Sequence[Sequence[int]]) -> Tensor:
    """Rows of one length: -1 behind the end of each."""
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in values], batch_first=True, padding_value=-1)


def changed(mel: Mel, features: Features, shift: int, draw: np.random.Generator) -> Mel:
    """The spectrogram (F, M) at a random gain, with noise of a random level, behind `shift` frames of silence.

    Some frames, and some bands, are blanked."""
    gain, level = draw.uniform(*GAIN), features.floor * np.exp(draw.uniform(0.0, NOISE))
    silent = ((shift, -shift % STRIDE), (0, 0))
    shifted = np.pad(mel, silent, constant_values=np.log(features.floor))
    magnitudes = np.exp(shifted + np.float32(gain))
    magnitudes += np.float32(level) * np.abs(draw.standard_normal(shifted.shape, dtype=np.float32))
    for axis, most in enumerate(MASKS):
        width = int(draw.integers(most + 1))
        start = int(draw.integers(max(1, magnitudes.shape[axis] - width)))
        magnitudes[(slice(None),) * axis + (slice(start, start + width),)] = features.floor
    return np.log(np.maximum(magnitudes, features.floor, dtype=np.float32))


class SpeechJudgeTask(Player):
    """CTC of the words and cross-entropy of the speakers of real recordings."""

    name = "speech judge"

    def __init__(self, judge: SpeechJudge) -> None:
        self.model = judge

    def loss(self, batch: SpeechBatch, step: TrainStep) -> tuple[Tensor, dict[str, Tensor]]:
        """-> loss, and its parts and the accuracy of speakers for the log."""
        heard: Heard = self.model(batch.x_BMF, batch.frames_B)
        counts_B = (batch.units_BN > 0).sum(1)
        ctc = F.ctc_loss(heard.log_p_BSU.mT.permute(2, 0, 1), batch.units_BN, heard.lengths_B, counts_B, BLANK)
        cross_entropy = F.cross_entropy(heard.speakers_BP, batch.speakers_B)
        accuracy = (heard.speakers_BP.argmax(1) == batch.speakers_B).float().mean()
        logs = {"ctc": ctc, "speaker_loss": cross_entropy, "speaker_accuracy": accuracy}
        loss = ctc + cross_entropy
        if batch.path_BS is not None:
            logs["path_loss"] = F.nll_loss(heard.path_BSU.mT, batch.path_BS, ignore_index=-1)
            loss = loss + logs["path_loss"]
        return loss, logs


def known(source: AudioSource) -> tuple[Sequence[str], Sequence[str]]:
    """The texts and speakers of a source. Raises DataError without them."""
    if source.texts is None or source.speakers is None:
        lacking = "speakers" if source.texts else "texts"
        raise DataError(f"{source.spec} has no {lacking}", "give recordings whose texts and speakers are listed")
    return source.texts, source.speakers


def make_judge(cfg: SpeechJudgeConfig, source: AudioSource) -> SpeechJudge:
    """A judge of the words and speakers of a source, which is not yet trained."""
    texts, speakers = known(source)
    words = text.vocabulary("words", texts)
    durations = source.word_seconds is not None
    return SpeechJudge(cfg.features, cfg.width, cfg.embedding, words, sorted(set(speakers)), durations)


def check_known(judge: SpeechJudge, source: AudioSource, indices: Sequence[int]) -> None:
    """Raise CheckpointError unless the judge knows all words and speakers of these recordings."""
    texts, speakers = known(source)
    for index in indices:
        judge.encode(texts[index])
        if speakers[index] not in judge.speaker_names:
            hint = f"it knows {some_of(judge.speaker_names)}"
            raise CheckpointError(f"the judge does not know the speaker {speakers[index]} of {source.spec}", hint)


def measure(judge: SpeechJudge, source: AudioSource, indices: Sequence[int]) -> dict[str, Any]:
    """Accuracy of words and speakers, and where durations are known the error of word ends, on these recordings.

    The judge keeps the statistics of their features."""
    texts, speakers = known(source)
    hypotheses, right, features, errors = list[str](), list[bool](), [], list[float]()
    for index in indices:
        wave = source.wave(index, judge.features.rate)
        heard = next(judge.hear([wave]))
        hypotheses.append(judge.spell(heard))
        right.append(judge.speaker_names[int(heard.speakers_BP.argmax())] == speakers[index])
        features.append(heard.features_BDS[0].mT.cpu().numpy())
        if source.word_seconds is not None:
            ends, expected = (np.cumsum(x)[:-1] for x in (judge.align(wave, texts[index]), source.word_seconds[index]))
            errors += np.abs(ends - expected).tolist()
    real = metrics.statistics(np.concatenate(features))
    judge.real_mean_D.copy_(torch.from_numpy(real.mean_D))
    judge.real_covariance_DD.copy_(torch.from_numpy(real.covariance_DD))
    values = {"heldout_word_accuracy": word_scores([texts[i] for i in indices], hypotheses)["word_accuracy"]}
    values |= {"heldout_speaker_accuracy": float(np.mean(right)), "heldout_latents": real.count}
    return values | ({"heldout_end_error": float(np.mean(errors))} if errors else {})

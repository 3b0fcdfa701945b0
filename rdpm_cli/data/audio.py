"""Sound: an AudioSource of the recordings that a user names, decoded and resampled, and WAV files written.

Its packages, soundfile and torchaudio, are optional."""

import contextlib
import importlib.util
import io
import math
import re
import shlex
import wave as wav_format
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rdpm_cli import files
from rdpm_cli.data import labels, pixels
from rdpm_cli.data.labels import is_hidden, split_key
from rdpm_cli.data.mel import Wave
from rdpm_cli.data.open import path_errors, warn_of
from rdpm_cli.data.recordings import HINT, SUFFIXES, Listing, Recordings, find_recordings, list_files
from rdpm_cli.data.source import UNLABELLED, Items, ItemSource, Reading
from rdpm_cli.errors import AudioError, DataError, RdpmError, UsageError

MOST_SAMPLES = 1 << 28  # of a recording: damaged headers claim any number
MOST_TAPS = 1 << 27  # of a resampling filter: damaged headers claim any rate, and 44,101 to 16,000 takes 3 GB
SLACK = 0.05  # seconds by which the duration in a manifest may exceed the file, as rounded ones do


class AudioSource(ItemSource):
    """Recordings. texts, speakers: None unless known of all. word_seconds: how long each word of each text lasts."""

    label_hint = "put the recordings into one folder a class, or give --unlabelled"

    def __init__(self, spec: str, reading: Reading, recordings: Recordings, items: Items) -> None:
        self.spec, self.reading = spec, reading
        self.hold(items)
        self.locations = [item.location for item in recordings.items]
        self.pieces = [(item.start, item.seconds) for item in recordings.items]
        self.texts: Sequence[str] | None = self._column("text", [item.text for item in recordings.items])
        self.speakers: Sequence[str] | None = self._column("speaker", [item.speaker for item in recordings.items])
        seconds = [item.word_seconds for item in recordings.items if item.word_seconds is not None]
        self.word_seconds: Sequence[Sequence[float]] | None = seconds if len(seconds) == len(self) else None
        if seconds and self.word_seconds is None:
            reason = f"only {len(seconds)} of {len(self)} recordings have it"
            self.warnings = [*self.warnings, f"{spec}: word_seconds is not used, as {reason}"]

    def _column(self, kind: str, values: Sequence[str | None]) -> list[str] | None:
        """The values, or None where no item has one. Raises DataError for a mixture."""
        known = [value for value in values if value is not None]
        if known and len(known) < len(values):
            lacking = (
                f"{len(values) - len(known)} of {len(values)} recordings, such as {self.names[values.index(None)]}"
            )
            raise DataError(f"{self.spec}: {lacking}, have no {kind}, unlike others", f"give all a {kind}, or none")
        return known or None

    def wave(self, index: int, rate: int) -> Wave:
        """(n,) mono at `rate` samples a second: the mean of the channels, resampled by torchaudio.

        Raises AudioError naming a recording that cannot be read."""
        with audio_errors(self.spec, self.names[index]):
            return resampled(*decode(self.locations[index].read(), *self.pieces[index]), rate)

    def seconds(self, index: int) -> float:
        """The duration by the file's header. Raises AudioError naming a recording that cannot be read."""
        import soundfile  # an optional package

        location, piece = self.locations[index], self.pieces[index]
        with audio_errors(self.spec, self.names[index]), location.open() as file, soundfile.SoundFile(file) as sound:
            return span(sound.frames, sound.samplerate, *piece)[1] / sound.samplerate

    def digest(self) -> str:
        """sha256 over names, labels, texts, speakers and word_seconds: the identity of the list, not of the sound."""
        columns = ("names", "labels", "texts", "speakers", "word_seconds")
        return files.digest({name: getattr(self, name) for name in columns})


def span(frames: int, rate: int, start: float, seconds: float | None) -> tuple[int, int]:
    """(first sample, number of samples) of a piece of a file. Raises ValueError if the file ends before it."""
    first = round(start * rate)
    count = frames - first if seconds is None else round(seconds * rate)
    if (first and first >= frames) or first + count > frames + SLACK * rate:
        end = "" if seconds is None else f" to {start + seconds:g} s"
        raise ValueError(f"it lasts {frames / rate:g} s, too short for the piece from {start:g} s{end}")
    return first, min(count, frames - first)


def decode(content: bytes, start: float = 0.0, seconds: float | None = None) -> tuple[Wave, int]:
    """A file of sound -> mono samples (n,) and their rate. Raises ValueError, or what soundfile raises."""
    import soundfile

    with soundfile.SoundFile(io.BytesIO(content)) as sound:
        # libsndfile shortens a WAV that is cut, and an Ogg; 0xffffffff is the size of a WAV written to a pipe.
        size = re.search(r"^data : (\d+) \(should be (\d+)\)", sound.extra_info, re.MULTILINE)
        is_cut = size is not None and int(size[2]) < int(size[1]) < 0xFFFFFF00
        if sound.format == "OGG":
            is_cut = not content[content.rfind(b"OggS") + 5] & 4  # the flag of the last page
        first, count = span(sound.frames, sound.samplerate, start, seconds)
        if count * sound.channels > MOST_SAMPLES:
            raise ValueError(f"its header claims {count:,} samples of {sound.channels} channels")
        if first:
            sound.seek(first)
        samples = sound.read(count, dtype="float32", always_2d=True)
        if is_cut or len(samples) < count:
            raise ValueError("it is truncated")
        if not count:
            raise ValueError("it has 0 samples")
        if not np.isfinite(samples).all():
            raise ValueError("it has NaN or infinite samples")
        return samples.mean(1), sound.samplerate


def resampled(samples: Wave, stored: int, rate: int) -> Wave:
    """Samples at another rate, by torchaudio. Raises ValueError for rates that no recording has."""
    from torchaudio.functional import resample  # an optional package

    taps = stored * rate // math.gcd(stored, rate) ** 2
    if taps > MOST_TAPS or len(samples) * rate // stored > MOST_SAMPLES:
        raise ValueError(f"it cannot be resampled from {stored} to {rate} samples a second")
    return samples if stored == rate else resample(torch.from_numpy(samples), stored, rate).numpy()


def read_wave(path: Path, rate: int) -> Wave:
    """A file of sound as mono (n,) at `rate`. Raises UsageError where there is none, and AudioError."""
    if not path.is_file():
        raise UsageError(f"{path} is not a file of sound", "give a .wav, .flac, .ogg or .mp3 file")
    with audio_errors(str(path.parent), path.name):
        return resampled(*decode(path.read_bytes()), rate)


@contextlib.contextmanager
def audio_errors(source: str, name: str) -> Iterator[None]:
    """Turn what a bad recording raises into an AudioError, and a fault of the machine into a RunError or DataError."""
    try:
        yield
    except (RdpmError, MemoryError):
        raise
    except Exception as error:  # decoders of damaged bytes raise almost anything
        pixels.raise_machine_fault(error, source, name)
        reason = getattr(error, "error_string", "") or str(error) or type(error).__name__
        raise unreadable(source, name, reason) from error


def unreadable(source: str, name: str, reason: str) -> AudioError:
    """The error for the recording `name` of `source`."""
    hint = "replace or remove this file; rdpm tokenize can leave such recordings out with --on-bad skip"
    return AudioError(f"{source}: {name} cannot be read as audio: {reason}", hint, name=name, reason=reason)


def open_audio(spec: str, **reading: Any) -> AudioSource:
    """The recordings that a user names, with a warning of what is not taken. reading: fields of `Reading`.

    Raises UsageError for a path that does not exist or without the extra `audio`, DataError without recordings."""
    how = Reading(**reading)
    if absent := [name for name in ("soundfile", "torchaudio") if importlib.util.find_spec(name) is None]:
        raise UsageError(f"{spec}: sound needs {' and '.join(absent)}", 'uv pip install "rdpm[audio]"')
    if how.image_column:
        raise UsageError("--image-column is for images", "leave it out")
    with path_errors(spec):
        opened = _arrange(list_files(spec, how.follow_links), how)
    warn_of(opened)
    return opened


def _arrange(listing: Listing, how: Reading) -> AudioSource:
    """The source of a listing: its recordings, their labels and the files that are not taken."""
    visible = [name for name in listing.locations if not is_hidden(listing.inside(name))]
    recordings = find_recordings(listing, visible, how.label_column)
    names, locations = [item.name for item in recordings.items], {item.location for item in recordings.items}
    note = next((name for name in visible if name.rpartition("/")[2].lower() == labels.CLASSES), None)
    lines = labels.read_classes(listing.locations[note].read(), listing.spec) if note else recordings.lines
    others = [x for x in visible if listing.locations[x] not in locations and x not in recordings.used and x != note]
    kinds = [split_key(name)[1] or "no suffix" for name in others]
    not_taken = Counter(f"{kind} not listed" if kind in SUFFIXES else kind for kind in kinds)
    not_taken.update(["hidden"] * (len(listing.locations) - len(visible)))
    if images := sum(kind in pixels.SUFFIXES for kind in kinds) if not names else 0:
        hint = f"images need a recipe of images: `rdpm train-tokenizer {shlex.quote(listing.spec)} --recipe NAME`"
        raise DataError(f"{listing.spec} holds {images} images and no audio", hint)
    if not names:
        raise DataError("; ".join(filter(None, [f"{listing.spec} holds no audio", labels.describe(not_taken)])), HINT)
    values = [item.label for item in recordings.items]
    if how.label_column and not any(value is not None for value in values):
        raise UsageError(f"{listing.spec} has no column {how.label_column}", "leave --label-column out")
    if how.unlabelled:
        numbers: labels.Labels = [0] * len(names), [UNLABELLED]
    elif recordings.by == "folders":
        numbers = labels.by_folder([listing.inside(x) for x in names], listing.spec, lines, names, listing.folders)
    else:
        numbers = labels.numbered(values, names, listing.spec, lines)
    if recordings.by not in ("folders", "manifest"):
        _check_splits(names, listing.spec)
    items = Items(names, *numbers, dict(sorted(not_taken.items())), recordings.warnings)
    return AudioSource(listing.spec, how, recordings, items)


def _check_splits(names: Sequence[str], source: str) -> None:
    """Refuse train-clean-100, dev-clean and the like as one set."""
    tops = {name.partition("/")[0] for name in labels.without_wrapper(names) if "/" in name}
    words = {word: top for top in sorted(tops) for word in re.split("[-_.]", top) if labels.SPLIT.fullmatch(word)}
    if len(words) > 1:
        message = f"{source} holds data splits ({', '.join(sorted(set(words.values())))}), not one set"
        raise DataError(message, "name or pack one of them")


def wav_bytes(wave: Wave, rate: int) -> bytes:
    """A WAV file, 16-bit PCM, of mono samples (n,); values beyond [-1, 1] are clipped."""
    buffer = io.BytesIO()
    with wav_format.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.clip(np.rint(wave * 32768.0), -32768, 32767).astype("<i2").tobytes())
    return buffer.getvalue()


def write_wav(path: Path, wave: Wave, rate: int) -> None:
    """Write `wav_bytes` atomically."""
    files.write_atomic(path, lambda file: file.write(wav_bytes(wave, rate)))

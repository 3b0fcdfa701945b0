"""eSpeak NG, whose library comes with the package espeakng-loader: phonemes of a text, and recordings of the digits."""

import ctypes
import functools
import importlib.util
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from rdpm_cli import progress
from rdpm_cli.data.audio import AudioSource, open_audio, resampled, write_wav
from rdpm_cli.data.mel import Wave
from rdpm_cli.data.recordings import DIGITS
from rdpm_cli.errors import RunError, UsageError

VOICES = ("m1", "m2", "m3", "m4", "m7", "f1", "f2", "f3", "f4", "f5")  # variants of the English voice
TAKES = 12  # of each digit and voice, which differ in pitch and pace
RATE = 8000  # samples a second, of the files
RETRIEVAL, UTF8, ESPEAKRATE, ESPEAKPITCH, IPA, WORD = 1, 1, 1, 3, 2, 1  # constants of speak_lib.h
LANGUAGE = b"en-us"  # of phonemes
LOUDNESS = 0.5  # largest sample of a file
DONE = ".espeak.done"


def write_digits(out: Path) -> AudioSource:
    """The recordings, written once as digit_voice_take.wav: the same text may sound different in another run."""
    if not (out / DONE).is_file():
        say = synthesiser()
        progress.say(f"writing {len(DIGITS) * len(VOICES) * TAKES:,} synthetic recordings into {out}/")
        for voice in VOICES:
            for number, digit in enumerate(DIGITS):
                for take in range(TAKES):
                    wave, rate, _ = say(digit, voice, 40 + 2 * take, 150 + 5 * (take % 7))
                    write_wav(out / f"{number}_{voice}_{take}.wav", resampled(wave, rate, RATE), RATE)
        (out / DONE).touch()
    return open_audio(str(out))


@functools.cache
def _library() -> tuple[ctypes.CDLL, int]:
    """The library, started once a process, and the rate of its waves. Raises UsageError without the package."""
    if importlib.util.find_spec("espeakng_loader") is None:
        hint = 'uv pip install "rdpm[phones]"; without it give --data RECORDINGS, or --units words or bytes'
        raise UsageError("built-in speech and phones need espeakng-loader, which is not installed", hint)
    import espeakng_loader  # an optional package

    library = ctypes.cdll.LoadLibrary(espeakng_loader.get_library_path())
    rate = library.espeak_Initialize(RETRIEVAL, 0, espeakng_loader.get_data_path().encode(), 0)
    if rate <= 0:
        raise RunError("eSpeak NG cannot be started", "give --data RECORDINGS, or --units words or bytes")
    return library, rate


def phonemes(text: str) -> str:
    """The International Phonetic Alphabet of an English text, its words apart: `two` is `t\u02c8u\u02d0`."""
    library, _ = _library()
    library.espeak_SetVoiceByName(LANGUAGE)
    library.espeak_TextToPhonemes.restype = ctypes.c_char_p
    rest, clauses = ctypes.c_char_p(text.encode()), list[str]()
    while rest.value is not None:
        clauses.append(library.espeak_TextToPhonemes(ctypes.byref(rest), UTF8, IPA).decode())
    return " ".join(" ".join(clauses).split())


class Event(ctypes.Structure):
    """espeak_EVENT of speak_lib.h. sample: where it is in the wave of the whole text."""

    _fields_ = [(name, ctypes.c_int) for name in ("type", "identifier", "place", "length", "milliseconds", "sample")]
    _fields_ += [("user_data", ctypes.c_void_p), ("value", ctypes.c_char * 8)]


Say = Callable[[str, str, int, int], tuple[Wave, int, list[float]]]


def synthesiser() -> Say:
    """A function (text, variant of the voice, pitch of 0 to 99, words a minute) -> wave (n,), rate, seconds a word."""
    library, rate = _library()
    pieces, starts = list[Wave](), list[int]()

    def receive(samples: "ctypes._Pointer[ctypes.c_short]", count: int, events: "ctypes._Pointer[Event]") -> int:
        if count > 0:
            pieces.append((np.ctypeslib.as_array(samples, (count,)) / 32768).astype(np.float32))
        for event in itertools.takewhile(lambda event: event.type, (events[n] for n in itertools.count())):
            starts.extend([event.sample] * (event.type == WORD))
        return 0

    pointers = ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(Event)
    callback = ctypes.CFUNCTYPE(ctypes.c_int, *pointers)(receive)

    def say(text: str, voice: str, pitch: int, pace: int) -> tuple[Wave, int, list[float]]:
        pieces.clear()
        starts.clear()
        library.espeak_SetSynthCallback(callback)
        library.espeak_SetVoiceByName(f"en+{voice}".encode())
        library.espeak_SetParameter(ESPEAKPITCH, pitch, 0)
        library.espeak_SetParameter(ESPEAKRATE, pace, 0)
        content = text.encode()
        library.espeak_Synth(content, len(content) + 1, 0, 0, 0, UTF8, None, None)
        library.espeak_Synchronize()
        wave = np.concatenate(pieces)
        loud = np.flatnonzero(np.abs(wave) > 1e-3)
        first, end = int(loud[0]), int(loud[-1]) + 1  # without the silence around it
        edges = np.array([first, *starts[1:], end]).clip(first, end)
        return wave[first:end] * (LOUDNESS / np.abs(wave).max()), rate, (np.diff(edges) / rate).tolist()

    return say

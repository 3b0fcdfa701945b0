"""Synthetic recordings of the ten digits by eSpeak NG, whose library comes with the package espeakng-loader."""

import ctypes
import importlib.util
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
RETRIEVAL, UTF8, ESPEAKRATE, ESPEAKPITCH = 1, 1, 1, 3  # constants of speak_lib.h
LOUDNESS = 0.5  # largest sample of a file
DONE = ".espeak.done"


def write_digits(out: Path) -> AudioSource:
    """The recordings, written once as digit_voice_take.wav: the same text may sound different in another run."""
    if not (out / DONE).is_file():
        if importlib.util.find_spec("espeakng_loader") is None:
            hint = 'uv pip install "rdpm[phones]", or give --data RECORDINGS'
            raise UsageError("the built-in speech is made by espeakng-loader, which is not installed", hint)
        say = _synthesiser()
        progress.say(f"writing {len(DIGITS) * len(VOICES) * TAKES:,} synthetic recordings into {out}/")
        for voice in VOICES:
            for number, digit in enumerate(DIGITS):
                for take in range(TAKES):
                    wave, rate = say(digit, voice, 40 + 2 * take, 150 + 5 * (take % 7))
                    write_wav(out / f"{number}_{voice}_{take}.wav", resampled(wave, rate, RATE), RATE)
        (out / DONE).touch()
    return open_audio(str(out))


def _synthesiser() -> Callable[[str, str, int, int], tuple[Wave, int]]:
    """A function (text, voice variant, pitch of 0 to 99, words a minute) -> wave (n,) and its rate."""
    import espeakng_loader  # an optional package

    library = ctypes.cdll.LoadLibrary(espeakng_loader.get_library_path())
    rate = library.espeak_Initialize(RETRIEVAL, 0, espeakng_loader.get_data_path().encode(), 0)
    if rate <= 0:
        raise RunError("eSpeak NG cannot be started", "give --data RECORDINGS")
    pieces: list[Wave] = []

    def receive(samples: "ctypes._Pointer[ctypes.c_short]", count: int, events: int) -> int:
        if count > 0:
            pieces.append((np.ctypeslib.as_array(samples, (count,)) / 32768).astype(np.float32))
        return 0

    callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)(receive)
    library.espeak_SetSynthCallback(callback)

    def say(text: str, voice: str, pitch: int, pace: int) -> tuple[Wave, int]:
        pieces.clear()
        library.espeak_SetVoiceByName(f"en+{voice}".encode())
        library.espeak_SetParameter(ESPEAKPITCH, pitch, 0)
        library.espeak_SetParameter(ESPEAKRATE, pace, 0)
        content = text.encode()
        library.espeak_Synth(content, len(content) + 1, 0, 0, 0, UTF8, None, None)
        library.espeak_Synchronize()
        wave = np.concatenate(pieces)
        loud = np.flatnonzero(np.abs(wave) > 1e-3)
        wave = wave[loud[0] : loud[-1] + 1]  # without the silence around it
        return wave * (LOUDNESS / np.abs(wave).max()), rate

    say.callback = callback  # type: ignore[attr-defined]  # the library keeps no reference to it
    return say

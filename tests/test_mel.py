"""Log-mel spectrograms, and sound made of them: against librosa, and by what must come back."""

import math

import librosa
import numpy as np
import pytest
from sounds import burst, chirp, sine

from rdpm_cli.data.mel import PRESETS, Features, Wave, filters, griffin_lim, log_mel, magnitudes, mel_distance

presets = pytest.mark.parametrize("name", PRESETS)
SPEECH8 = PRESETS["speech8"]


def sound(features: Features, hertz: float = 440.0) -> Wave:
    """Half a second of a sine, then of a chirp, then of noise, all over faint noise; and half a second of silence."""
    n, rate = features.rate // 2, features.rate
    loud = np.concatenate([sine(hertz, n, rate), chirp(200, rate / 3, n, rate), burst(n)])
    return np.concatenate([loud + burst(3 * n, 1) / 10, np.zeros(n, np.float32)])


def by_librosa(wave: Wave, f: Features) -> np.ndarray:
    spectrum = librosa.feature.melspectrogram(
        y=wave, sr=f.rate, n_fft=f.n_fft, hop_length=f.hop, win_length=f.window, power=1.0, n_mels=f.bands,
        pad_mode="constant",
    )  # fmt: skip
    return np.log(np.maximum(spectrum, f.floor)).T


@presets
def test_values_are_those_of_librosa(name: str) -> None:
    features = PRESETS[name]
    wave = sound(features)
    ours = log_mel(wave, features)
    assert (str(ours.dtype), ours.shape) == ("float32", (math.ceil(len(wave) / features.hop), features.bands))
    assert np.abs(ours - by_librosa(wave, features)[: len(ours)]).max() < 1e-4


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("samples", [0, 1, 79, 80, 81, 320, 321, 2000])
def test_a_wave_is_padded_to_whole_latents(samples: int, multiple: int) -> None:
    whole = multiple * SPEECH8.hop
    latents = max(1, -(-samples // whole))
    wave = burst(samples)
    item = log_mel(wave, SPEECH8, multiple)
    assert item.shape == (latents * multiple, SPEECH8.bands)
    silence = np.zeros(latents * whole - samples, np.float32)
    assert np.array_equal(item, log_mel(np.concatenate([wave, silence]), SPEECH8))
    assert np.isfinite(item).all()
    assert samples or np.array_equal(item, np.full_like(item, np.log(np.float32(SPEECH8.floor))))


def loudest(wave: Wave, rate: int) -> float:
    """The frequency with the most energy."""
    return float(np.abs(np.fft.rfft(wave * np.hanning(len(wave)))).argmax()) * rate / len(wave)


@presets
@pytest.mark.parametrize("hertz", [310.0, 1234.0])
def test_griffin_lim_keeps_the_frequency_of_a_sine_within_a_bin(name: str, hertz: float) -> None:
    features = PRESETS[name]
    item = log_mel(sine(hertz, features.rate, features.rate), features, 4)
    wave = griffin_lim(item, features)
    assert (str(wave.dtype), wave.shape) == ("float32", (len(item) * features.hop,))
    assert abs(loudest(wave, features.rate) - hertz) <= features.rate / features.n_fft
    assert np.array_equal(griffin_lim(item, features), wave)  # no random phase
    assert 0.1 < np.abs(wave).max() < 2
    assert griffin_lim(item, features, 1001).shape == (1001,)


@pytest.mark.parametrize("frames", [1, 2])
def test_griffin_lim_takes_the_shortest_sounds(frames: int) -> None:
    wave = griffin_lim(log_mel(sine(440, frames * 80), SPEECH8), SPEECH8)
    assert (wave.shape, bool(np.isfinite(wave).all())) == ((frames * 80,), True)


@presets
def test_magnitudes_have_the_mel_that_they_are_made_of(name: str) -> None:
    features = PRESETS[name]
    item = log_mel(sound(features), features)
    spectrum = magnitudes(item, features)
    assert spectrum.shape == (features.n_fft // 2 + 1, len(item))
    assert float(spectrum.min()) >= 0
    again = (filters(features).T @ spectrum).clamp_min(features.floor).log().T.numpy()
    assert mel_distance(item, again) < 0.1

"""Sound as log-mel spectrograms, and back by Griffin-Lim.

Legend: n samples of a wave, F frames, M mel bands, K = n_fft / 2 + 1 frequencies. A frame is `hop` samples; frame f is
centred on sample f · hop, with zeros around the wave. Values are natural logarithms of magnitudes."""

import functools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rdpm_cli.data.pixels import Pixels
from rdpm_cli.schema import Section

Wave = NDArray[np.float32]  # (n,) mono, about [-1, 1]
Mel = NDArray[np.float32]  # (F, M)

GRIFFIN_LIM_STEPS, MEL_INVERSION_STEPS = 32, 20
SILENCE = 1e-8  # magnitudes below count as zero where they divide


class Features(Section):
    """A log-mel spectrogram: Slaney's scale and norm, magnitudes (power 1), Hann window."""

    rate: int  # samples a second
    n_fft: int
    window: int
    hop: int
    bands: int
    floor: float  # magnitudes are clamped to it


PRESETS = {
    "speech8": Features(rate=8000, n_fft=256, window=256, hop=80, bands=64, floor=1e-4),
    "speech16": Features(rate=16000, n_fft=1024, window=640, hop=160, bands=80, floor=1e-5),
    "melvae22": Features(rate=22050, n_fft=1024, window=1024, hop=256, bands=80, floor=1e-5),  # CLaM-TTS, BigVGAN
    "rvqvae44": Features(rate=44100, n_fft=2048, window=2048, hop=512, bands=128, floor=1e-5),
}


@functools.cache
def filters(features: Features) -> Tensor:
    """The mel filters, (K, M)."""
    import torchaudio.functional as audio  # an optional package

    K, top = features.n_fft // 2 + 1, features.rate / 2
    return audio.melscale_fbanks(K, 0.0, top, features.bands, features.rate, norm="slaney", mel_scale="slaney")


def log_mel(wave: Wave, features: Features, multiple: int = 1) -> Mel:
    """The spectrogram of a wave, which is padded with zeros to a whole number of `multiple` frames: (F, M)."""
    samples = features.hop * multiple
    padded = np.pad(wave, (0, max(samples, -(-len(wave) // samples) * samples) - len(wave)))
    spectrum = torch.stft(
        torch.from_numpy(padded), features.n_fft, features.hop, features.window, torch.hann_window(features.window),
        pad_mode="constant", return_complex=True,
    ).abs()[:, :-1]  # the last frame is centred on the end of the wave  # fmt: skip
    mel_MF = filters(features).T @ spectrum
    return mel_MF.clamp_min(features.floor).log().T.contiguous().numpy()


def magnitudes(mel: Mel, features: Features) -> Tensor:
    """Magnitudes (K, F) whose mel is this one: the pseudo-inverse, then multiplicative updates of the KL divergence.

    These are Lee and Seung's (2001) with fixed filters, and keep the magnitudes positive."""
    filters_KM = filters(features)
    target_MF = torch.from_numpy(mel).double().exp().T
    filters_MK = filters_KM.T.double()
    spectrum_KF = (torch.linalg.pinv(filters_MK) @ target_MF).clamp_min(SILENCE)
    weight_K1 = filters_MK.sum(0).clamp_min(SILENCE)[:, None]
    for _ in range(MEL_INVERSION_STEPS):
        ratio = target_MF / (filters_MK @ spectrum_KF).clamp_min(SILENCE)
        spectrum_KF = spectrum_KF * (filters_MK.T @ ratio) / weight_K1
    return spectrum_KF.float()


def griffin_lim(mel: Mel, features: Features, samples: int | None = None) -> Wave:
    """A wave of this spectrogram, by 32 steps of the fast Griffin-Lim algorithm from phase 0. samples: its length."""
    import torchaudio.functional as audio  # an optional package

    # One frame more, at the end, which log_mel leaves out; and torchaudio needs more than half a window of samples.
    more = max(1, features.n_fft // 2 // features.hop + 2 - len(mel))
    spectrum_KF = magnitudes(np.pad(mel, ((0, more), (0, 0)), mode="edge"), features)
    length = (len(mel) + more - 1) * features.hop
    wave = audio.griffinlim(
        spectrum_KF, torch.hann_window(features.window), features.n_fft, features.hop, features.window, power=1.0,
        n_iter=GRIFFIN_LIM_STEPS, momentum=0.99, length=length, rand_init=False,
    ).numpy()  # fmt: skip
    return wave[: len(mel) * features.hop if samples is None else samples]


def mel_pixels(mel_BFM: Mel) -> Pixels:
    """Spectrograms as pictures, low frequencies at the bottom, each band 2 pixels high: (B, 2M, F, 3)."""
    from matplotlib import colormaps  # slow to import

    scaled = (mel_BFM - mel_BFM.min()) / max(float(np.ptp(mel_BFM)), 1e-6)
    pixels = (255 * colormaps["magma"](scaled)[..., :3]).round().astype(np.uint8)
    return np.ascontiguousarray(pixels.transpose(0, 2, 1, 3)[:, ::-1].repeat(2, 1))


def mel_distance(real: Mel, other: Mel) -> float:
    """Mean absolute difference of two log-mel spectrograms, in nats."""
    return float(np.abs(real - other).mean())

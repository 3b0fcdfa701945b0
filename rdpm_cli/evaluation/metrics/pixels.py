"""Metrics of two images: MSE, PSNR, SSIM."""

import torch
from torch import Tensor


def mean_squared_error(a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
    """Per image, on [-1, 1]: uint8 inputs of (B, 3, H, W) -> (B,)."""
    difference = (a_BCHW.double() - b_BCHW.double()) / 127.5
    return difference.pow(2).flatten(1).mean(1)


def psnr(a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
    """Per image, dB, uint8/255 with data range 1.0: (B,). Equal images give infinity."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    a, b = a_BCHW.double() / 255, b_BCHW.double() / 255
    value: Tensor = peak_signal_noise_ratio(a, b, data_range=1.0, reduction="none", dim=(1, 2, 3))
    return value


def ssim(a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
    """Per image, uint8/255 with data range 1.0, Gaussian window 11 with sigma 1.5: (B,).

    torchmetrics averages over mirrored borders too, Wang et al. over whole windows alone.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    a, b = a_BCHW.float() / 255, b_BCHW.float() / 255
    value = structural_similarity_index_measure(a, b, data_range=1.0, reduction="none")
    assert isinstance(value, Tensor)
    return torch.atleast_1d(value)

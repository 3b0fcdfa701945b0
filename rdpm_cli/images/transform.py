"""Pixels: the ADM centre crop, and uint8 <-> [-1, 1]."""

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

Pixels = NDArray[np.uint8]  # (H, W, 3) RGB
TRANSFORM = "adm-center-crop"  # its name in manifests


def center_crop(image: Image.Image, size: int) -> Pixels:
    """ADM's `center_crop_arr`: halve with BOX while the short side is at least 2·size, BICUBIC until it is size, crop.

    -> (size, size, 3) uint8. The same pixels as DiT, MAR, LlamaGen and EDM2's dhariwal crop.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    if min(image.size) != size:
        scale = size / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def to_model(pixels_BCHW: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return pixels_BCHW.float() / 127.5 - 1.0


def to_pixels(x_BCHW: Tensor) -> Tensor:
    """[-1, 1] -> uint8: round(127.5 x + 127.5), clamped. The inverse of `to_model`."""
    return (127.5 * x_BCHW.float() + 127.5).round().clamp(0, 255).to(torch.uint8)


def hwc(pixels_BCHW: Tensor) -> Pixels:
    """uint8 (B, 3, H, W) -> numpy (B, H, W, 3), C-order."""
    return np.ascontiguousarray(pixels_BCHW.cpu().permute(0, 2, 3, 1).numpy())


def chw(pixels_BHWC: Pixels) -> Tensor:
    """numpy (B, H, W, 3) -> uint8 tensor (B, 3, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(pixels_BHWC)).permute(0, 3, 1, 2).contiguous()

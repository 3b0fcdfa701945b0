"""uint8 pixels <-> float tensors in [-1, 1]."""

import numpy as np
import torch
from torch import Tensor

from rdpm_cli.images.transform import Pixels


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

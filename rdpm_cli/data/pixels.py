"""Pixels: bytes -> RGB -> the ADM centre crop -> tensors in [-1, 1], and back.

As ADM and torchvision decode: alpha is dropped, not composited; EXIF orientation and ICC profiles are not applied; an
animation gives its first frame; the content decides the format. docs/images.md says why.
Suffixes of tensors: B batch, C = 3 channels, H W height and width."""

import contextlib
import errno
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from rdpm_cli.errors import DataError, ImageError, RdpmError, RunError

Pixels = NDArray[np.uint8]  # (H, W, 3) RGB, or (B, H, W, 3)
Cut = Literal["round", "floor"]  # of values to 8 bits
TRANSFORM = "adm-center-crop"  # its name in manifests
EXACT_PSNR = 100.0  # dB of an exact copy, so that means stay finite
# Formats that start other programs (EPS), or that no data set consists of, are left out.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
SUFFIXES = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}
# Pillow's limit of 1 MiB guards against bombs, but also refuses PNG files with a long text or a printer's profile.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 1 << 28
ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENXIO}


def open_image(file: BinaryIO | Path) -> Image.Image:
    """The image with its header read and its pixels not yet decoded. Raises what Pillow raises."""
    return Image.open(file, formats=FORMATS)


def is_image_head(head: bytes) -> bool:
    """Whether a file without a suffix begins as an image of a known format."""
    head = head[:16].ljust(16, b"\0")
    accept = (Image.OPEN[name][1] for name in FORMATS if name in Image.OPEN and name not in ("DIB", "PPM"))
    return any(accepts and accepts(head) is True for accepts in accept) or re.match(rb"P[1-6]\s", head) is not None


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB. Raises ValueError for 32 bits a pixel, which have no agreed range."""
    # 16-bit grey keeps its high byte; Pillow's own conversion would clip everything above 255 to white.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("32 bits a pixel have no agreed range")
    return image.convert("RGB")


def center_crop(image: Image.Image, size: int) -> Pixels:
    """ADM's `center_crop_arr`: halve with BOX while the short side is at least 2·size, BICUBIC to size, crop.

    -> (size, size, 3) uint8, the same pixels as DiT, MAR, LlamaGen and EDM2's dhariwal crop."""
    if Image.MAX_IMAGE_PIXELS and size * size * max(image.size) > Image.MAX_IMAGE_PIXELS * min(image.size):
        raise ValueError(f"{image.width}×{image.height} pixels are too thin to be enlarged to {size}")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    if min(image.size) != size:
        scale = size / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


@contextlib.contextmanager
def image_errors(source: str, name: str) -> Iterator[None]:
    """Turn what a bad image raises into an ImageError for the item `name` of `source`.

    A fault of the machine becomes a RunError, or a DataError for a deleted file: `--on-bad skip` must not skip them."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow's warnings only the one about huge images counts
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except (RdpmError, MemoryError):
        raise
    except Exception as error:  # decoders of damaged bytes raise almost anything
        raise_machine_fault(error, source, name)
        unknown = isinstance(error, UnidentifiedImageError)  # its text names the path, which no store should hold
        reason = "it is empty or of no known image format" if unknown else str(error) or type(error).__name__
        raise unreadable(source, name, reason) from error


def raise_machine_fault(error: Exception, source: str, name: str) -> None:
    """Raise a RunError, or a DataError for a deleted file, if reading an item failed by a fault of the machine."""
    # The errors of decoders, and those of damaged bytes, carry no error number or EINVAL.
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
        kind = DataError if error.errno in ABSENT else RunError
        raise kind(f"{source}: reading {name} failed: {error.strerror}", "run the command again") from error


def unreadable(source: str, name: str, reason: str) -> ImageError:
    """The error for the item `name` of `source`."""
    hint = "replace or remove this file; rdpm tokenize can leave such images out with --on-bad skip"
    return ImageError(f"{source}: {name} cannot be read as an image: {reason}", hint, name=name, reason=reason)


def cells(mask: Pixels, grid: tuple[int, ...]) -> NDArray[np.bool_]:
    """The cells of a grid (h, w) that a mask (H, W, 3) touches: those with a pixel of at least half white. -> (h, w)"""
    h, w = grid
    white = mask.max(2) >= 128
    touched: NDArray[np.bool_] = white.reshape(h, white.shape[0] // h, w, white.shape[1] // w).any((1, 3))
    return touched


def to_model(pixels_BCHW: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return pixels_BCHW.float() / 127.5 - 1.0


def to_pixels(x_BCHW: Tensor, cut: Cut = "round") -> Tensor:
    """[-1, 1] -> uint8: round(127.5 x + 127.5), clamped. The inverse of `to_model`.

    cut: `floor` is what pipelines do that convert to uint8 without rounding."""
    values_BCHW = 127.5 * x_BCHW.float() + 127.5
    return (values_BCHW.round() if cut == "round" else values_BCHW.floor()).clamp(0, 255).to(torch.uint8)


def hwc(pixels_BCHW: Tensor) -> Pixels:
    """uint8 (B, 3, H, W) -> numpy (B, H, W, 3), C-order."""
    return np.ascontiguousarray(pixels_BCHW.cpu().permute(0, 2, 3, 1).numpy())


def chw(pixels_BHWC: Pixels) -> Tensor:
    """numpy (B, H, W, 3) -> uint8 tensor (B, 3, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(pixels_BHWC)).permute(0, 3, 1, 2).contiguous()

"""Bytes -> RGB as ADM and torchvision read them. What a bad image may raise, whatever it is, comes out as ImageError.

What the machine does to a good image does not: it would be left out of a code store for ever.

Alpha is dropped by `convert("RGB")`, not composited; EXIF orientation is not applied (Pillow itself turns TIFF); of an
animation the first frame counts; the format is told by the content, not by the suffix.
"""

import contextlib
import errno
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from rdpm_cli.errors import DataError, ImageError, RdpmError, RunError

# What Pillow may read a file as. Left out: formats that start other programs (EPS) or that no data set is made of.
GONE = {errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENXIO}
# Of the machine, not of the image: Pillow's own errors, and those of damaged bytes, have no number or EINVAL.
FAULTS = {
    errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENODEV, errno.EINTR, errno.EAGAIN,
    errno.EBADF, errno.EBUSY, errno.ETIMEDOUT, errno.ENOTCONN, errno.ECONNRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH,
    errno.EREMOTEIO, errno.ENOLINK, errno.ENOSPC, errno.EDQUOT,
}  # fmt: skip
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")


def open_image(file: BinaryIO | Path) -> Image.Image:
    """The image, its header read and its pixels not yet. Raises what Pillow raises, one over the limit included."""
    return Image.open(file, formats=FORMATS)


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB. 16-bit grey keeps its high byte: Pillow's own conversion clips it to white."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("32 bits a pixel have no agreed range")
    return image.convert("RGB")


def use_draft(image: Image.Image, size: int) -> None:
    """Let a JPEG be decoded at 1/2, 1/4 or 1/8, the smallest whose short side is still at least `size`.

    So nothing changes below 2·size, from there on the scaled DCT stands in for the halvings of ADM's crop. It rounds
    odd sides up, they round down: the crop may also lie a part of a pixel elsewhere.
    """
    image.draft("RGB", (size, size))


def need_room(image: Image.Image, size: int) -> None:
    """Refuse an image so thin that its short side, enlarged to `size`, would make a bomb of the long one."""
    width, height = image.size
    if Image.MAX_IMAGE_PIXELS and size * size * max(width, height) > Image.MAX_IMAGE_PIXELS * min(width, height):
        raise ValueError(f"{width}×{height} pixels are too thin to be enlarged to {size}")


@contextlib.contextmanager
def naming(spec: str, name: str) -> Iterator[None]:
    """Whatever goes wrong inside is an ImageError about this image; of Pillow's warnings only the bomb's counts."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except (RdpmError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise unreadable(spec, name, "it is empty or of no known image format") from error
    except OSError as error:
        if error.errno in GONE:
            raise DataError(
                f"{spec}: {name} is not there any more: {error.strerror}", "name the images anew"
            ) from error
        if error.errno in FAULTS:
            raise RunError(f"{spec}: reading {name} failed: {error.strerror}", "run the same command again") from error
        raise unreadable(spec, name, str(error) or type(error).__name__) from error
    except Exception as error:  # decoders of damaged bytes raise nearly everything
        raise unreadable(spec, name, str(error) or type(error).__name__) from error


def unreadable(spec: str, name: str, reason: str, way_out: str = "") -> ImageError:
    """The error of the image `name` in the source `spec`. way_out: what else to do than to mend it."""
    hint = f"replace or remove this file{way_out}"
    return ImageError(f"{spec}: {name} cannot be read as an image: {reason}", hint, name=name, reason=reason)

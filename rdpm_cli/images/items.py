"""One image: a file, or item N of a source."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rdpm_cli.errors import UsageError
from rdpm_cli.images import decode
from rdpm_cli.images.arrange import is_image
from rdpm_cli.images.sources import open_source
from rdpm_cli.images.transform import Pixels, center_crop

HOW = "give an image file, or item N of a source as SOURCE#N: photo.png, digits:heldout#3, 'imagenet.zip#12'"


def open_item(spec: str) -> Image.Image:
    """RGB. Raises UsageError for what names no image, ImageError for one that cannot be read."""
    path = Path(spec)
    if path.is_file() and is_image(path.name):
        with decode.naming(str(path.parent), path.name), decode.open_image(path) as image:
            return decode.to_rgb(image)
    name, mark, number = spec.rpartition("#")
    if not mark or not number.isdecimal():
        raise UsageError(f"{spec} is no image" if path.exists() else f"{spec} does not exist", HOW)
    source = open_source(name)
    if int(number) >= len(source):
        raise UsageError(f"{spec}: {name} has items 0 to {len(source) - 1}", HOW)
    return source.image(int(number))


def crop(image: Image.Image, size: int, spec: str) -> Pixels:
    """(size, size, 3) uint8 after the ADM centre crop. spec: its name, for the error."""
    with decode.naming("", spec):
        decode.need_room(image, size)
        return center_crop(image, size)


def cells(mask: Pixels, grid: tuple[int, int]) -> NDArray[np.bool_]:
    """Which cells of a grid (h, w) a mask touches: those with a pixel of at least half white. mask: (H, W, 3) uint8."""
    h, w = grid
    white = mask.max(2) >= 128
    found: NDArray[np.bool_] = white.reshape(h, white.shape[0] // h, w, white.shape[1] // w).any((1, 3))
    return found

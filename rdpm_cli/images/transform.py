"""Pixels: the ADM centre crop. Torch-free, so that a wrong path is refused before torch is imported."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]  # (H, W, 3) RGB
TRANSFORM = "adm-center-crop"  # its name in manifests
DRAFT_TRANSFORM = "adm-center-crop-jpeg-draft"  # of the same after a JPEG decode at a reduced scale


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

"""The built-in images: real scans of handwritten digits."""

import functools

import numpy as np
from PIL import Image

from rdpm_cli.images.interface import ImageSource
from rdpm_cli.images.transform import Pixels

DIGIT_PARTS = ("train", "heldout")


class DigitsSource(ImageSource):
    """scikit-learn's 1,797 real scans of handwritten digits, 8×8, 10 classes, enlarged to 16×16.

    `digits:train` 1,500 and `digits:heldout` 297, stratified with a fixed seed; `digits` is `digits:train`.
    """

    def __init__(self, part: str) -> None:
        scans, labels, rows = _digits(part)
        self.spec = f"digits:{part}"
        self.scans, self.labels = scans, [int(v) for v in labels]
        self.names = [f"{part}/{label}/{row:04d}" for row, label in zip(rows, labels, strict=True)]
        self.class_names = [str(d) for d in range(10)]

    def open(self, index: int) -> Image.Image:
        return Image.fromarray(self.scans[index]).resize((16, 16), Image.Resampling.BICUBIC)


@functools.cache
def _digits(part: str) -> tuple[Pixels, np.ndarray, np.ndarray]:
    """scans (n, 8, 8) uint8, labels (n,), rows in scikit-learn's order (n,)."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    rows = np.arange(len(data.target))
    train, heldout = train_test_split(rows, test_size=297, stratify=data.target, random_state=0)
    chosen = np.sort(train if part == "train" else heldout)
    scans = np.round(data.images[chosen] * (255 / 16)).astype(np.uint8)
    return scans, data.target[chosen], chosen

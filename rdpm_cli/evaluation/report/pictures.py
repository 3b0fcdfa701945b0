"""Pictures for a page: scaled down, encoded small, with words for those who cannot see them."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from rdpm_cli.errors import DataError
from rdpm_cli.evaluation.report.parts import Picture, clean
from rdpm_cli.images.transform import Pixels

WIDEST, HIGHEST = 1120, 1400  # pixels
MOST_BYTES = 300_000  # of one encoded picture
STEPS_SHOWN, STEPS_A_ROW = 8, 4
PAPER, GAP = (255, 255, 255), 4
HINT = "make it again, or leave its folder out"


def read(path: Path, title: str, alt: str) -> Picture:
    """A PNG of a previews folder. Raises DataError."""
    try:
        with Image.open(path) as opened:
            return encode(opened.convert("RGB"), title, alt)
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path} cannot be read as an image: {error}", HINT) from error


def strip(path: Path, title: str, alt: str) -> Picture:
    """The frames of a GIF of partial decodes, some of them, evenly spaced, side by side. Raises DataError."""
    try:
        with Image.open(path) as opened:
            count = getattr(opened, "n_frames", 1)
            shown = sorted({round(place * (count - 1) / (STEPS_SHOWN - 1)) for place in range(STEPS_SHOWN)})
            frames = []
            for number in shown:
                opened.seek(number)
                frames.append(opened.convert("RGB"))
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read as an image: {error}", HINT) from error
    return encode(_sheet(frames), title, f"{alt} Shown: {len(frames)} of {count} steps.")


def _sheet(frames: Sequence[Image.Image]) -> Image.Image:
    columns = min(len(frames), STEPS_A_ROW)
    rows = -(-len(frames) // columns)
    width = (WIDEST - (columns - 1) * GAP) // columns
    small = [frame.resize((width, max(1, round(frame.height * width / frame.width)))) for frame in frames]
    height = max(frame.height for frame in small)
    sheet = Image.new("RGB", (columns * width + (columns - 1) * GAP, rows * (height + GAP) - GAP), PAPER)
    for place, frame in enumerate(small):
        sheet.paste(frame, (place % columns * (width + GAP), place // columns * (height + GAP)))
    return sheet


def encode(image: Image.Image, title: str, alt: str) -> Picture:
    """At most WIDEST × HIGHEST pixels and MOST_BYTES: PNG where that is small enough, else JPEG, else smaller."""
    image.thumbnail((WIDEST, HIGHEST), Image.Resampling.LANCZOS)
    data, kind = _saved(image, "PNG"), "image/png"
    quality = 88
    while len(data) > MOST_BYTES:
        data, kind = _saved(image, "JPEG", quality), "image/jpeg"
        if quality > 60:
            quality -= 14
        else:
            image = image.resize((max(1, image.width * 3 // 4), max(1, image.height * 3 // 4)))
    return Picture(title=clean(title), alt=clean(alt), kind=kind, data=data, size=image.size)


def _saved(image: Image.Image, form: str, quality: int = 0) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, optimize=True, **({"quality": quality} if quality else {}))
    return buffer.getvalue()


def pixels(path: Path) -> Pixels:
    """One image of a folder, (H, W, 3) uint8. Raises DataError."""
    try:
        with Image.open(path) as opened:
            return np.asarray(opened.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path} cannot be read as an image: {error}", HINT) from error

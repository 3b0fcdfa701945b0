"""Pictures for a page: scaled down, encoded small, with words for those who cannot see them."""

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from rdpm_cli.errors import DataError
from rdpm_cli.evaluation.report.parts import Picture, clean
from rdpm_cli.images import writers
from rdpm_cli.images.transform import Pixels

WIDEST, HIGHEST = 1120, 1400  # pixels
MOST_BYTES = 300_000  # of one encoded picture
STEPS_SHOWN = 16
HINT = "make it again, or leave its folder out"


def read(path: Path, title: str, alt: str) -> Picture:
    """A PNG of a previews folder. Raises DataError."""
    try:
        with Image.open(path) as opened:
            return encode(opened.convert("RGB"), title, alt)
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path} cannot be read as an image: {error}", HINT) from error


def strip(path: Path, title: str, alt: str, side: int, columns: int) -> Picture:
    """The frames of a GIF of partial decodes as one strip: the first image of every row, a step a column.

    side, columns: of the images in a frame, in pixels as `writers.grid` draws them. A GIF of another layout is shown
    by its whole last frame. Raises DataError.
    """
    try:
        with Image.open(path) as opened:
            count = getattr(opened, "n_frames", 1)
            shown = sorted({round(place * (count - 1) / (STEPS_SHOWN - 1)) for place in range(STEPS_SHOWN)})
            frames = {}
            for number in shown:
                opened.seek(number)
                frames[number + 1] = opened.convert("RGB")
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read as an image: {error}", HINT) from error
    left = opened.width - columns * (side + writers.GAP) - writers.GAP
    if not 0 <= left <= opened.width // 2:
        return encode(frames[count], title, alt)
    return encode(_strip(frames, left, side), title, alt)


def _strip(frames: Mapping[int, Image.Image], left: int, side: int) -> Image.Image:
    """Row labels, then the first column of each frame with its t above it. left: the width of the labels."""
    first, width = next(iter(frames.values())), side + writers.GAP
    height = first.height % (side + writers.GAP)  # of the title and one gap
    sheet = Image.new("RGB", (left + len(frames) * width + writers.GAP, first.height), writers.PAPER)
    sheet.paste(first.crop((0, height, left, first.height)), (0, height))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for place, (t, frame) in enumerate(frames.items()):
        x = left + place * width
        sheet.paste(frame.crop((left, height, left + width + writers.GAP, frame.height)), (x, height))
        draw.text((x + width // 2, height - 4), f"t = {t}", writers.INK, font, anchor="ms")
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

"""Pictures for people: PNG files, labelled grids, GIFs of partial decodes, curves."""

import io
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from rdpm_cli import files
from rdpm_cli.errors import DataError
from rdpm_cli.images.transform import Pixels

INK, PAPER, GAP = (40, 40, 40), (255, 255, 255), 2


def save_png(path: Path, pixels_HWC: Pixels) -> None:
    """One image, written atomically."""
    files.write_atomic(path, lambda file: Image.fromarray(pixels_HWC).save(file, format="PNG"))


def read_png(path: Path) -> Pixels:
    """An image that save_png has written, (H, W, 3). Raises DataError."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        hint = "delete it, and the command that drew it draws it again"
        raise DataError(f"{path} cannot be read as an image: {error}", hint) from error


def save_npz(path: Path, shape: tuple[int, int, int, int], batches: Iterable[Pixels], labels: Sequence[int]) -> None:
    """ADM's sample format: arr_0 uint8 NHWC in C-order, arr_1 labels; uncompressed, streamed batch by batch.

    The same content makes the same bytes: no time goes in.
    """

    def write(file: BinaryIO) -> None:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        with zipfile.ZipFile(file, "w") as archive:
            with archive.open(_member("arr_0.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                for batch in batches:
                    member.write(np.ascontiguousarray(batch).tobytes())
            with archive.open(_member("arr_1.npy"), "w") as member:
                np.lib.format.write_array(member, np.asarray(labels, dtype=np.int64), allow_pickle=False)

    files.write_atomic(path, write)


def _member(name: str) -> zipfile.ZipInfo:
    """A member of a zip, uncompressed, of no date, readable once extracted."""
    member = zipfile.ZipInfo(name)
    member.external_attr = 0o644 << 16
    return member


def enlargement(side: int, target: int = 64) -> int:
    """Whole factor that brings a small image near `target` pixels, so that a person can judge it."""
    return max(1, round(target / side))


def grid(images_BHWC: Pixels, columns: int, row_labels: Sequence[str] = (), title: str = "") -> Pixels:
    """Images row by row, `columns` a row, enlarged without smoothing, each row with its label. -> (H, W, 3) uint8."""
    zoom = enlargement(images_BHWC.shape[1])
    side = images_BHWC.shape[1] * zoom
    rows = -(-len(images_BHWC) // columns)
    font = ImageFont.load_default(size=14)
    left = max((int(font.getlength(text)) for text in row_labels), default=-8) + 8
    top = 24 if title else 0
    size = (left + columns * (side + GAP) + GAP, top + rows * (side + GAP) + GAP)
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((left + GAP, 4), title, INK, font)
    for row, text in enumerate(row_labels[:rows]):
        draw.text((left - 6, top + row * (side + GAP) + side // 2), text, INK, font, anchor="rm")
    for place, pixels in enumerate(images_BHWC):
        tile = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
        x, y = left + GAP + place % columns * (side + GAP), top + GAP + place // columns * (side + GAP)
        sheet.paste(tile, (x, y))
    return np.asarray(sheet)


def save_gif(path: Path, frames: Sequence[Pixels], seconds: float = 0.4) -> None:
    """An endless GIF; the last frame stays four times as long."""
    pictures = [Image.fromarray(frame) for frame in frames]
    durations = [int(1000 * seconds)] * (len(frames) - 1) + [int(4000 * seconds)]

    def write(file: BinaryIO) -> None:
        pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0)

    files.write_atomic(path, write)


PANELS_A_ROW = 3
Curve = tuple[Sequence[float], Sequence[float]]


def save_curves(path: Path, panels: Mapping[str, Mapping[str, Curve]], log_panels: Sequence[str] = ()) -> None:
    """One panel a title, one line a name: {title: {name: (x, y)}}. The x label follows '|' in the title."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(len(panels), PANELS_A_ROW)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.8 * rows), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for place, (title, lines) in enumerate(panels.items(), 1):
        axis = figure.add_subplot(rows, columns, place)
        text, _, x_label = title.partition("|")
        for name, (x, y) in lines.items():
            axis.plot(x, y, label=name, marker="o" if len(x) < 30 else None, markersize=4)
        axis.set(title=text, xlabel=x_label or "step")
        if title in log_panels:
            axis.set_yscale("log")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    files.write_atomic(path, lambda file: file.write(buffer.getvalue()))

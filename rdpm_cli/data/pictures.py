"""Pictures for people and other programs: PNG files, labelled grids, GIFs, curves, and .npz files of images."""

import contextlib
import math
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from rich.text import Text

from rdpm_cli import files
from rdpm_cli.data.pixels import Pixels, image_errors, open_image, to_rgb
from rdpm_cli.errors import DataError

INK, PAPER, GAP = (40, 40, 40), (255, 255, 255), 2  # colours of a grid; pixels between its tiles
NPZ_HINT = "images are `arr_0`, (N, H, W, 3) uint8, as np.savez writes them; references have `mu` and `sigma`"
Curve = tuple[Sequence[float], Sequence[float]]  # x, y


def save_png(path: Path, pixels_HWC: Pixels) -> None:
    """One image, written atomically."""
    files.write_atomic(path, lambda file: Image.fromarray(pixels_HWC).save(file, format="PNG"))


def read_png(path: Path) -> Pixels:
    """An image that save_png has written, (H, W, 3). Raises DataError."""
    with image_errors(str(path.parent), path.name), open_image(path) as image:
        return np.asarray(to_rgb(image))


def grid(images_BHWC: Pixels, columns: int, row_labels: Sequence[str] = (), title: str = "") -> Pixels:
    """Images row by row, `columns` a row, enlarged without smoothing, each row with its label. -> (H, W, 3) uint8."""
    side = images_BHWC.shape[1] * max(1, round(64 / images_BHWC.shape[1]))  # near 64 pixels, for people to judge
    rows = -(-len(images_BHWC) // columns)
    font = ImageFont.load_default(size=14)
    left = max((int(font.getlength(text)) for text in row_labels), default=-8) + 8
    top = 24 if title else 0
    sheet = Image.new("RGB", (left + columns * (side + GAP) + GAP, top + rows * (side + GAP) + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((left + GAP, 4), title, INK, font)
    for row, text in enumerate(row_labels[:rows]):
        draw.text((left - 6, top + row * (side + GAP) + side // 2), text, INK, font, anchor="rm")
    for index, pixels in enumerate(images_BHWC):
        tile = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
        row, column = divmod(index, columns)
        sheet.paste(tile, (left + GAP + column * (side + GAP), top + GAP + row * (side + GAP)))
    return np.asarray(sheet)


def for_terminal(image: Image.Image, columns: int = 32) -> Text:
    """An image as coloured half blocks, two rows of pixels a line of text."""
    rows = max(2, round(columns * image.height / image.width) // 2 * 2)
    pixels = np.asarray(image.resize((columns, min(rows, 2 * columns)), Image.Resampling.BOX))
    text = Text()
    for upper, lower in zip(pixels[::2].tolist(), pixels[1::2].tolist(), strict=True):
        for top, bottom in zip(upper, lower, strict=True):
            text.append("▀", f"rgb({','.join(map(str, top))}) on rgb({','.join(map(str, bottom))})")
        text.append("\n")
    return text


def save_gif(path: Path, frames: Sequence[Pixels], seconds: float = 0.4) -> None:
    """An endless GIF; the last frame stays four times as long."""
    first, *rest = map(Image.fromarray, frames)
    times = [int(1000 * seconds)] * len(rest) + [int(4000 * seconds)]
    options = {"save_all": True, "append_images": rest, "duration": times, "loop": 0}
    files.write_atomic(path, lambda file: first.save(file, "GIF", **options))


def save_curves(path: Path, panels: Mapping[str, Mapping[str, Curve]], log_panels: Sequence[str] = ()) -> None:
    """A PNG of one panel a title, one line a name: {title: {name: (x, y)}}. The x label follows '|' in the title."""
    # Imported here because matplotlib takes a second, and few commands draw curves.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.8 * rows), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for number, (title, lines) in enumerate(panels.items(), 1):
        axis = figure.add_subplot(rows, columns, number)
        text, _, x_label = title.partition("|")
        for name, (x, y) in lines.items():
            axis.plot(x, y, label=name, marker="o" if len(x) < 30 else None, markersize=4)
        axis.set(title=text, xlabel=x_label or "step", yscale="log" if title in log_panels else "linear")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    files.write_atomic(path, canvas.print_png)


def save_npz(path: Path, shape: tuple[int, int, int, int], batches: Iterable[Pixels], labels: Sequence[int]) -> None:
    """ADM's sample format: arr_0 uint8 NHWC in C-order, arr_1 labels; uncompressed, streamed batch by batch."""
    # Without a date, so that equal content makes equal bytes; without permissions an extracted file is unreadable.
    images, numbers = zipfile.ZipInfo("arr_0.npy"), zipfile.ZipInfo("arr_1.npy")
    images.external_attr = numbers.external_attr = 0o644 << 16

    def write(file: BinaryIO) -> None:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        with zipfile.ZipFile(file, "w") as archive:
            with archive.open(images, "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                for batch in batches:
                    member.write(np.ascontiguousarray(batch).tobytes())
            with archive.open(numbers, "w") as member:
                np.lib.format.write_array(member, np.asarray(labels, dtype=np.int64), allow_pickle=False)

    files.write_atomic(path, write)


@contextlib.contextmanager
def _npz(path: Path) -> Iterator[Any]:
    """numpy's NpzFile. Raises DataError, also for an array of Python objects: nothing is unpickled."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            yield archive
    except (OSError, ValueError, TypeError, EOFError, KeyError, struct.error, zlib.error, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read as an .npz: {error}", NPZ_HINT) from error


def npz_names(path: Path) -> list[str]:
    """The names of the arrays in an .npz. Raises DataError."""
    with _npz(path) as archive:
        return list(archive.files)


def npz_array(path: Path, name: str) -> NDArray[Any]:
    """One array of an .npz. Raises DataError."""
    with _npz(path) as archive:
        array: NDArray[Any] = archive[name]
        return array


class NpzImages:
    """`arr_0` of an .npz, read in pieces: 50,000 images of 256×256 are 10 GB. Raises DataError.

    shape: (N, H, W, 3). labels: `arr_1`, where it holds one whole number an image."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with _npz(path) as archive:
            with archive.zip.open("arr_0.npy") as file:
                np.lib.format.read_magic(file)
                self.shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
                self.start = file.tell()  # of the pixels
            numbers: NDArray[Any] = archive["arr_1"] if "arr_1" in archive.files else np.empty(0)
        if dtype != np.uint8 or fortran or len(self.shape) != 4 or self.shape[-1] != 3:
            raise DataError(f"{path}: arr_0 is {dtype} {self.shape} in {'Fortran' if fortran else 'C'} order", NPZ_HINT)
        known = numbers.shape == self.shape[:1] and numbers.dtype.kind in "iu"
        self.labels: list[int] | None = numbers.tolist() if known else None

    def read(self, pieces: Iterable[range]) -> Iterator[Pixels]:
        """The images of ascending ranges, an array (n, H, W, 3) a range."""
        image_bytes = math.prod(self.shape[1:])
        with _npz(self.path) as archive, archive.zip.open("arr_0.npy") as file:
            for piece in pieces:
                file.seek(self.start + piece.start * image_bytes)
                content = bytearray(file.read(len(piece) * image_bytes))  # torch warns about read-only arrays
                yield np.frombuffer(content, dtype=np.uint8).reshape(len(piece), *self.shape[1:])

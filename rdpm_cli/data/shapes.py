"""The built-in set `shapes`: coloured shapes on a grey ground, drawn at any size from six factors that are uniform.

Ten classes without rotational symmetry, so that the angle of every picture is defined. Since the true distribution of
the factors is known, samples can be compared with it: see evaluation/factors.py."""

import colorsys
import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rdpm_cli import noise
from rdpm_cli.data.pixels import Pixels
from rdpm_cli.data.source import Source
from rdpm_cli.errors import UsageError

FACTORS = ("x", "y", "size", "angle", "hue", "background")  # each uniform in [0, 1)
CIRCULAR = ("angle", "hue")  # 0 and 1 are the same
PARTS = {"train": (20_000, 0), "heldout": (2_000, 1)}  # images, seed
SIDE = 32  # pixels, unless another size is asked for
FINE = 8  # subpixels a side of a pixel

Points = list[tuple[float, float]]


def _arc(x: float, y: float, radius: float, start: float, end: float, points: int = 24) -> Points:
    """Points on the circle around (x, y), from one angle to another, in degrees."""
    angles = (math.radians(start + (end - start) * n / points) for n in range(points + 1))
    return [(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles]


def _bar(left: float, top: float, right: float, bottom: float) -> Points:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


# Outlines inside the circle of radius 1, all of one orientation: where two overlap, both are filled.
SHAPES: dict[str, list[Points]] = {
    "arrow": [[(1, 0), (0.1, 0.75), (0.1, 0.3), (-0.95, 0.3), (-0.95, -0.3), (0.1, -0.3), (0.1, -0.75)]],
    "chevron": [[(0.95, 0), (-0.3, 0.9), (-0.75, 0.6), (0.1, 0), (-0.75, -0.6), (-0.3, -0.9)]],
    "crescent": [_arc(0, 0, 1, 60, 300) + _arc(0.45, 0, 0.87, 263, 97)],
    "drop": [[(1, 0), *_arc(-0.32, 0, 0.62, 62, 298)]],
    "f": [_bar(-0.55, -0.83, -0.15, 0.83), _bar(-0.15, -0.83, 0.55, -0.45), _bar(-0.15, -0.12, 0.35, 0.22)],
    "fish": [
        _arc(0.25, -0.55, 0.9, 38, 142) + _arc(0.25, 0.55, 0.9, 218, 322),
        [(-0.3, 0), (-0.85, 0.5), (-0.85, -0.5)],
    ],
    "heart": [
        _arc(-0.41, -0.32, 0.47, 0, 360),
        _arc(0.41, -0.32, 0.47, 0, 360),
        [(-0.77, 0), (0, -0.4), (0.77, 0), (0, 0.95)],
    ],
    "mushroom": [_arc(0, 0, 0.9, 180, 360), _bar(-0.28, 0, 0.28, 0.8)],
    "pacman": [[(-0.1, 0), *_arc(0, 0, 0.9, 40, 320)]],
    "t": [_bar(-0.75, -0.66, 0.75, -0.22), _bar(-0.22, -0.22, 0.22, 0.95)],
}
KINDS = tuple(SHAPES)


def draw(kind: int, factors: NDArray[np.float32], size: int) -> Pixels:
    """The picture of a class and its factors (6,), as (size, size, 3) uint8, antialiased."""
    x, y, scale, angle, hue, background = map(float, factors)
    side = size * FINE
    radius = side * (0.19 + 0.13 * scale)
    centre_x, centre_y = side * (0.34 + 0.32 * x), side * (0.34 + 0.32 * y)  # the largest shape stays inside
    cos, sin = radius * math.cos(2 * math.pi * angle), radius * math.sin(2 * math.pi * angle)
    outlines = [
        [(round(centre_x + cos * u - sin * v), round(centre_y + sin * u + cos * v)) for u, v in outline]
        for outline in SHAPES[KINDS[kind]]
    ]
    cover_HW1 = fill(outlines, side).reshape(size, FINE, size, FINE).sum(1, dtype=np.uint8).sum(2)[..., None]
    colour = np.array([round(255 * value) for value in colorsys.hsv_to_rgb(hue, 0.85, 1.0)])
    ground, full = round(16 + 112 * background), FINE**2
    return ((cover_HW1 * colour + (full - cover_HW1) * ground + full // 2) // full).astype(np.uint8)


def fill(outlines: list[list[tuple[int, int]]], side: int) -> NDArray[np.bool_]:
    """The squares of a grid, (side, side), whose centres lie inside outlines with vertices on the grid's lines.

    Inside is where the winding number is not 0. In integers, so that every machine draws the same bytes."""
    edges = [(*a, *b) for outline in outlines for a, b in zip(outline, outline[1:] + outline[:1], strict=True)]
    x0, y0, x1, y1 = 2 * np.array(edges, dtype=np.int64).T  # twice, so that centres of squares are odd numbers
    centres = np.arange(1, 2 * side, 2)
    edge, column = np.nonzero((x0[:, None] <= centres) != (x1[:, None] <= centres))
    crossing = y0[edge] + (centres[column] - x0[edge]) * (y1 - y0)[edge] // (x1 - x0)[edge]
    winding = np.zeros((side + 1, side), dtype=np.int8)
    np.add.at(winding, (crossing // 2, column), np.sign(x1 - x0)[edge].astype(np.int8))
    return winding.cumsum(0, dtype=np.int8)[:-1] != 0


class ShapesSource(Source):
    """20,000 pictures in `shapes:train`, 2,000 in `shapes:heldout`, the classes in equal numbers."""

    def __init__(self, part: str) -> None:
        if part not in PARTS:
            raise UsageError(f"shapes has no part '{part}'", "parts: shapes:train, shapes:heldout")
        count, seed = PARTS[part]
        self.spec, self.class_names = f"shapes:{part}", list(KINDS)
        # Twice, since --unlabelled replaces labels and factors, and the pictures stay.
        self.kinds = self.labels = [index * len(KINDS) // count for index in range(count)]
        self.names = [f"{part}/{KINDS[kind]}/{index:05d}" for index, kind in enumerate(self.kinds)]
        self.rows = self.factors = noise.stream("shapes", seed).random((count, len(FACTORS)), dtype=np.float32)

    def open(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels(index, SIDE))

    def pixels(self, index: int, size: int) -> Pixels:
        """The picture drawn at this size: nothing is cropped or resized."""
        return draw(self.kinds[index], self.rows[index], size)

"""Pictures for `eval report`: the previews of runs and of folders of pictures, or grids of what lies in these."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rdpm_cli.errors import some_of
from rdpm_cli.evaluation.report import pictures
from rdpm_cli.evaluation.report.parts import STAGES, Picture, Stage

STEPS = "Decodes of t = 1 to T"
STEPS_IN_WORDS = "The first sample of each class, a class a row, as it decodes after each step t, from left to right."
PER_CLASS, CLASSES = 8, 10  # of the grids that `sample` draws, and of one made from a folder's files


@dataclass(frozen=True)
class Row:
    """A picture of a folder. file: "" where it is none."""

    file: str
    label: int | None

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> Row:
        """Of a line of samples.json. Raises KeyError, ValueError."""
        label = given["label"]
        return cls(file=Path(given.get("file", "")).name, label=None if label is None else int(label))


def last_preview(path: Path, stage: Stage) -> list[Callable[[], Picture]]:
    """The last picture a run has drawn of what it makes."""
    found = {int(p.stem[5:]): p for p in (path / "previews").glob("step-*.png") if p.stem[5:].isdecimal()}
    if not found:
        return []
    step = max(found)
    if stage == "tokenizer":
        title = f"Inputs and the decodes of t = 1 to T: {path}, step {step:,}"
        alt = "Rows from top to bottom: input images, their partial decodes after each step t, and the reconstruction."
    else:
        title = f"Samples while training: {path}, step {step:,}"
        alt = "A grid of samples, a class a row, from fixed seeds."
    return [lambda: pictures.read(found[step], title, alt)]


def grids_of(
    path: Path, stage: Stage, rows: Sequence[Row], names: Sequence[str], resolution: int
) -> list[Callable[[], Picture]]:
    """The folder's own grid, or one of its files, and the steps of its GIF."""
    whole = f"{STAGES[stage]}: {path}"
    if stage == "samples":
        alt = f"A grid of samples, a class a row. Classes: {some_of(names)}."
    else:
        alt = "Rows of real images, where they were there, above their reconstructions."
    found: list[Callable[[], Picture]] = []
    if (path / "previews" / "grid.png").is_file():
        found.append(lambda: pictures.read(path / "previews" / "grid.png", whole, alt))
    elif rows:
        found.append(lambda: _grid_of(path, rows, names, whole))
    title, sheet, gif = f"{STEPS}: {path}", path / "previews" / "steps.png", path / "previews" / "steps.gif"
    if sheet.is_file():
        found.append(lambda: pictures.read(sheet, title, STEPS_IN_WORDS))
    elif gif.is_file():
        side, columns = _layout(rows, resolution)
        found.append(lambda: pictures.strip(gif, title, STEPS_IN_WORDS, side, columns))
    return found


def _layout(rows: Sequence[Row], resolution: int) -> tuple[int, int]:
    """(side, columns) of the images that `sample` puts into its grids."""
    from rdpm_cli.images import writers

    each = Counter(row.label for row in rows)
    columns = max((min(count, PER_CLASS) for count in each.values()), default=1)
    return resolution * writers.enlargement(resolution), columns


def _grid_of(path: Path, rows: Sequence[Row], names: Sequence[str], title: str) -> Picture:
    """The first few pictures of each of the first classes; of those without classes, the first few alone."""
    import numpy as np
    from PIL import Image

    from rdpm_cli.images import writers

    labels = _first_labels(rows)
    chosen = [[row for row in rows if row.label == label][:PER_CLASS] for label in labels]
    columns = min(len(row) for row in chosen)
    tiles = [pictures.pixels(path / row.file) for group in chosen for row in group[:columns]]
    texts = [names[label] if label is not None and label < len(names) else "" for label in labels]
    sheet = writers.grid(np.stack(tiles), columns, texts)
    alt = f"The first {columns} pictures of each class, a class a row: {some_of(texts)}." if texts[0] else "Pictures."
    return pictures.encode(Image.fromarray(sheet), title, alt)


def _first_labels(rows: Sequence[Row]) -> list[int | None]:
    """The labels that a grid shows; of pictures without labels, none."""
    labelled = sorted({row.label for row in rows if row.label is not None})
    return list(labelled[:CLASSES]) or [None]

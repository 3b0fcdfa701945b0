"""Looking at samples: a labelled grid, the T partial decodes as GIF and contact sheet, how they came about."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rdpm_cli import files
from rdpm_cli.engine.sample_files import Files

if TYPE_CHECKING:
    from torch import Tensor

    from rdpm_cli.generator.model import LoadedGenerator
    from rdpm_cli.generator.sampler import Job, Samples
    from rdpm_cli.images.transform import Pixels

    Draw = Callable[[Sequence[int]], Samples]

CLASSES, A_CLASS = 16, 8  # classes in the pictures, samples of each
FOLDER = "previews"


def previewed(labels: Sequence[int]) -> list[int]:
    """Indices of the first few samples of each of the first classes, by class."""
    chosen = sorted(set(labels))[:CLASSES]
    places: dict[int, list[int]] = {label: [] for label in chosen}
    for index, label in enumerate(labels):
        if label in places and len(places[label]) < A_CLASS:
            places[label].append(index)
    return [index for label in chosen for index in places[label]]


class Previews:
    """The pictures of a job. What it draws is noted as it goes by; what others drew is read, or drawn again."""

    def __init__(self, loaded: LoadedGenerator, labels: Sequence[int], out: Path) -> None:
        self.loaded, self.labels, self.folder = loaded, labels, out / FOLDER
        self.shown = previewed(labels)
        self.codes: dict[int, Tensor] = {}
        self.pixels: dict[int, Pixels] = {}

    def note(self, samples: Samples) -> None:
        """Keep what is shown of these."""
        wanted = set(self.shown)
        for place, index in enumerate(samples.indices):
            if index in wanted:
                self.codes[index], self.pixels[index] = samples.codes_BTHW[place], samples.pixels_BHWC[place]

    def grid(self, written: Files, draw: Draw) -> str:
        """The labelled grid: a class a row."""
        import numpy as np

        from rdpm_cli.images import writers

        path = self.folder / "grid.png"
        for index in set(self.shown) - set(self.pixels):
            pixels = written.pixels(index)
            if pixels is None and path.is_file():  # in samples.npz alone, and drawn before
                return str(path)
            if pixels is not None:
                self.pixels[index] = pixels
        self._draw_missing(self.pixels, draw)
        sheet = writers.grid(np.stack([self.pixels[i] for i in self.shown]), self._columns(), self._names())
        writers.save_png(path, sheet)
        return str(path)

    def steps(self, draw: Draw) -> dict[str, str]:
        """The T partial decodes: a GIF of the grid, and a contact sheet of one sample a class, T to a row."""
        import numpy as np
        import torch

        from rdpm_cli.engine import observers
        from rdpm_cli.images import writers

        self._draw_missing(self.codes, draw)
        device = next(self.loaded.tokenizer.parameters()).device
        codes = torch.stack([self.codes[index] for index in self.shown]).to(device)
        frames = observers.decode_prefixes(self.loaded.tokenizer, codes)
        columns, names, T = self._columns(), self._names(), len(frames)
        titled = [writers.grid(f, columns, names, f"t = {t} of {T}") for t, f in enumerate(frames, 1)]
        writers.save_gif(self.folder / "steps.gif", titled)
        rows = np.stack([frame[::columns] for frame in frames], 1)  # (classes, T, H, W, 3)
        sheet = writers.grid(rows.reshape(-1, *rows.shape[2:]), T, names, f"t = 1 to {T}")
        writers.save_png(self.folder / "steps.png", sheet)
        return {"gif": str(self.folder / "steps.gif"), "sheet": str(self.folder / "steps.png")}

    def trajectory(self, job: Job) -> str:
        """How the shown samples came about: mean and spread of each number at each t, as JSON and as curves."""
        import numpy as np

        from rdpm_cli.images import writers

        found = job.trajectory(self.shown, [self.labels[index] for index in self.shown])
        told: dict[str, Any] = {"samples": len(self.shown), "indices": self.shown, "numbers": {}}
        panels: dict[str, dict[str, writers.Curve]] = {}
        for name, values_BT in found.items():
            mean, spread = np.mean(values_BT, 0).tolist(), np.std(values_BT, 0).tolist()
            told["numbers"][name] = {"mean": list(map(_number, mean)), "std": list(map(_number, spread))}
            at = [t for t, value in enumerate(mean, 1) if math.isfinite(value)]
            panels[f"{name}|t"] = {"mean over samples": (list(map(float, at)), [mean[t - 1] for t in at])}
        files.write_json(self.folder / "trajectory.json", told)
        writers.save_curves(self.folder / "trajectory.png", panels)
        return str(self.folder / "trajectory.json")

    def _draw_missing(self, have: dict[int, Any], draw: Draw) -> None:
        if missing := [index for index in self.shown if index not in have]:
            self.note(draw(missing))

    def _names(self) -> list[str]:
        return [self.loaded.class_names[label] for label in sorted({self.labels[index] for index in self.shown})]

    def _columns(self) -> int:
        return -(-len(self.shown) // len(self._names()))


def _number(value: float) -> float | None:
    """JSON knows no NaN: a step without the number."""
    return value if math.isfinite(value) else None

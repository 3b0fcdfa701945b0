"""alpha_t of every tokenizer that a folder of cells holds, and each cell's score over its base -> schedules.png."""

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rdpm_cli.config import ScheduleConfig
from rdpm_cli.tokenizer.schedule import alphas


def tokenizers(folder: Path) -> dict[str, dict[str, Any]]:
    """Cell -> its tokenizer's recipe section, of the first seed."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.tokenizer/run.json")):
        name = path.parent.name.removesuffix(".tokenizer").rsplit(".", 1)[0]
        found.setdefault(name, json.loads(path.read_text())["settings"]["recipe"]["tokenizer"])
    return found


def scores(folder: Path, name: str) -> list[float]:
    """Fréchet distances of a cell, a seed each."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob(f"{name}.*.json"))]
    return [score.get("fid", score.get("frechet_distance")) for score in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, recipe in tokenizers(folder).items():
        schedule, steps = ScheduleConfig(**recipe["schedule"]), recipe["quantizer"]["steps"]
        line = left.plot(range(1, steps + 1), alphas(schedule, steps), marker=".", label=name)[0]
        for value in scores(folder, name):
            right.plot(schedule.base, value, "o", color=line.get_color())
    left.set(xlabel="t", ylabel="alpha_t", title="schedule")
    left.legend(fontsize=8)
    right.set(xlabel="base", ylabel="Fréchet distance", title="samples, a point a seed")
    FigureCanvasAgg(figure).print_png(str(folder / "schedules.png"))


if __name__ == "__main__":
    main()

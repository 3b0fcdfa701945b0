"""alpha_t of every cell's tokenizer, and each cell's score over its base -> schedules.png."""

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from table import read_cells, value_of

from rdpm_cli.config import ScheduleConfig
from rdpm_cli.tokenizer.schedule import alphas


def tokenizer(folder: Path, name: str, seed: int) -> dict[str, Any]:
    """Its recipe's section."""
    run: dict[str, Any] = json.loads((folder / f"{name}.{seed}.tokenizer" / "run.json").read_text())
    return dict(run["settings"]["recipe"]["tokenizer"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cells", nargs="+", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, required=True)
    options = parser.parse_args()
    figure = Figure(figsize=(8, 3.2), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, scores in read_cells(options.folder, options.cells, options.seeds).items():
        recipe = tokenizer(options.folder, name, options.seeds[0])
        schedule, steps = ScheduleConfig(**recipe["schedule"]), recipe["quantizer"]["steps"]
        line = left.plot(range(1, steps + 1), alphas(schedule, steps), marker=".", label=f"{schedule.base}")[0]
        for score in scores.values():
            right.plot(schedule.base, value_of(score, "fid/frechet_distance"), "o", color=line.get_color())
    left.set(xlabel="t", ylabel="alpha_t", title="schedule")
    left.legend(title="base", fontsize=8, loc="upper left")
    right.set(xlabel="base", ylabel="Fréchet distance", title="samples, a point a seed")
    FigureCanvasAgg(figure).print_png(str(options.folder / "schedules.png"))


if __name__ == "__main__":
    main()

"""Scores of cells named depth-D-in-S over S, a line a depth -> steps.png: mean and standard deviation over seeds."""

import argparse
import re
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from table import read_cells, summary

SCORES = (("class_accuracy", "class accuracy"), ("fid/frechet_distance", "Fréchet distance"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cells", nargs="+", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, required=True)
    options = parser.parse_args()
    lines: dict[int, dict[int, str]] = {}
    cells = read_cells(options.folder, options.cells, options.seeds)
    for name in cells:
        if found := re.fullmatch(r"depth-(\d+)-in-(\d+)", name):
            lines.setdefault(int(found[1]), {})[int(found[2])] = name
    figure = Figure(figsize=(8, 3.2), dpi=120, layout="constrained")
    for axis, (column, title) in zip(figure.subplots(1, 2), SCORES, strict=True):
        for depth, by_steps in sorted(lines.items()):
            told = {steps: summary(cells[name], column) for steps, name in sorted(by_steps.items())}
            points = {steps: found for steps, found in told.items() if found}
            means, spreads = [mean for mean, _ in points.values()], [spread for _, spread in points.values()]
            axis.errorbar(list(points), means, yerr=spreads, marker="o", capsize=3, label=f"depth {depth}")
        axis.set_xscale("log", base=2)
        axis.set_xticks(sorted({steps for by_steps in lines.values() for steps in by_steps}))
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.set(xlabel="sampling steps", title=title)
    figure.axes[0].legend(fontsize=8)
    FigureCanvasAgg(figure).print_png(str(options.folder / "steps.png"))


if __name__ == "__main__":
    main()

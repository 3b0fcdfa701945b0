"""Scores of an ablation's cells, NAME.<seed>.json each -> table.md, table.csv, plot.png.

table.md has mean and standard deviation over seeds, table.csv each seed's numbers.
"""

import argparse
import csv
import json
import math
import statistics
from pathlib import Path
from typing import Any

Cells = dict[str, dict[int, dict[str, Any]]]

LABELS = {  # a column's axis, and which way is better
    "psnr": "PSNR in dB; higher is better",
    "class_accuracy": "class accuracy; higher is better",
    "fid/frechet_distance": "Fréchet distance; lower is better",
}
WIDE = 8.0  # a plot over more than this ratio of its values has a logarithmic axis


def read_cells(folder: Path, names: list[str], seeds: list[int]) -> Cells:
    """Cell -> seed -> its scores, in the order of the names."""
    return {name: {s: json.loads((folder / f"{name}.{s}.json").read_text()) for s in seeds} for name in names}


def value_of(score: dict[str, Any], column: str) -> int | float | None:
    """column: a/b is a, or else b."""
    return next((score[name] for name in column.split("/") if name in score), None)


def summary(scores: dict[int, dict[str, Any]], column: str) -> tuple[float, float] | None:
    """Mean and standard deviation over seeds, or None where a seed lacks the score."""
    values = [value_of(score, column) for score in scores.values()]
    known = [float(value) for value in values if value is not None]
    if len(known) < len(values) or not known:
        return None
    return statistics.mean(known), statistics.stdev(known) if len(known) > 1 else 0.0


def text(scores: dict[int, dict[str, Any]], column: str) -> str:
    """`12.34 ± 0.05`, three to five digits; a count that all seeds share as it is; n/a."""
    values = {value_of(score, column) for score in scores.values()}
    if len(values) == 1 and isinstance(only := next(iter(values)), int):
        return str(only)
    found = summary(scores, column)
    if found is None:
        return "n/a"
    mean, spread = found
    digits = 4 if abs(mean) < 10 else 2 if abs(mean) < 100 else 1
    return f"{mean:.{digits}f}" + (f" ± {spread:.{digits}f}" if len(scores) > 1 else "")


def plot(path: Path, cells: Cells, column: str, title: str) -> None:
    """One point a cell with its spread over seeds. Points, not bars: the axis need not start at 0."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    found = {name: value for name, scores in cells.items() if (value := summary(scores, column))}
    means, spreads = [m for m, _ in found.values()], [s for _, s in found.values()]
    seeds = max(map(len, cells.values()))
    figure = Figure(figsize=(7, 0.32 * len(found) + 1.5), dpi=120, layout="constrained")
    axis = figure.add_subplot()
    axis.errorbar(means, list(found), xerr=spreads, fmt="o", color="#2f5d8c", ecolor="#333333", capsize=3)
    axis.grid(axis="x", color="#dddddd")
    axis.set_ylim(len(found) - 0.5, -0.5)
    axis.margins(x=0.06)
    if means and min(means) > 0 and max(means) > WIDE * min(means):
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
    spread = f"mean and standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    axis.set_xlabel(f"{LABELS.get(column, column)}\n{spread}", fontsize=9)
    axis.set_title(title)
    FigureCanvasAgg(figure).print_png(str(path))


def number(value: int | float | None) -> str:
    """For the csv: up to six significant digits; empty where there is none."""
    if value is None or not math.isfinite(value):
        return ""
    return str(value) if isinstance(value, int) else f"{value:.6g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--title", default="")
    parser.add_argument("--cells", nargs="+", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, required=True)
    parser.add_argument("--columns", nargs="+", required=True)
    parser.add_argument("--paper", nargs="*", default=[], metavar="CELL=TEXT", help="what the paper says of a cell")
    options = parser.parse_args()
    cells = read_cells(options.folder, options.cells, options.seeds)
    paper = {cell: said for cell, said in (one.split("=", 1) for one in options.paper) if cell in cells}
    said = {name: [paper.get(name, "")] if paper else [] for name in cells}
    header = ["cell", "seeds", *options.columns, *(["paper"] if paper else [])]
    rows = [
        [name, str(len(scores)), *(text(scores, column) for column in options.columns), *said[name]]
        for name, scores in cells.items()
    ]
    table = "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *rows]) + "\n"
    (options.folder / "table.md").write_text(table)
    with (options.folder / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["cell", "seed", *options.columns, *(["paper"] if paper else [])])
        for name, scores in cells.items():
            for seed, score in scores.items():
                numbers = [number(value_of(score, column)) for column in options.columns]
                writer.writerow([name, seed, *numbers, *said[name]])
    plot(options.folder / "plot.png", cells, options.columns[0], options.title)
    print(table, end="")


if __name__ == "__main__":
    main()

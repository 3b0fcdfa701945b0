"""Scores of an ablation's cells, NAME.<seed>.json each -> table.md, table.csv, plot.png: mean and spread over seeds."""

import argparse
import csv
import json
import statistics
from pathlib import Path
from typing import Any


def read_cells(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Cell -> its scores, a seed each, in the order in which the cells were first finished."""
    cells: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.*.json"), key=lambda p: p.stat().st_mtime):
        cells.setdefault(path.name.rsplit(".", 2)[0], []).append(json.loads(path.read_text()))
    return cells


def summary(scores: list[dict[str, Any]], column: str) -> tuple[float, float] | None:
    """Mean and standard deviation over seeds, or None where a seed lacks the score. column: a/b is a, or else b."""
    values = [next((score[name] for name in column.split("/") if name in score), None) for score in scores]
    known = [float(value) for value in values if value is not None]
    if len(known) < len(values) or not known:
        return None
    return statistics.mean(known), statistics.stdev(known) if len(known) > 1 else 0.0


def text(found: tuple[float, float] | None, seeds: int) -> str:
    """`12.34 ± 0.05`, three to five digits; a count that all seeds share as it is; n/a."""
    if found is None:
        return "n/a"
    mean, spread = found
    if mean == int(mean) and spread == 0 and mean >= 1:
        return str(int(mean))
    digits = 4 if abs(mean) < 10 else 2 if abs(mean) < 100 else 1
    return f"{mean:.{digits}f}" + (f" ± {spread:.{digits}f}" if seeds > 1 else "")


def plot(path: Path, cells: dict[str, list[dict[str, Any]]], column: str, title: str) -> None:
    """One point a cell with its spread over seeds. Points, not bars: the axis need not start at 0."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = {name: value for name, scores in cells.items() if (value := summary(scores, column))}
    means, spreads = [m for m, _ in found.values()], [s for _, s in found.values()]
    figure = Figure(figsize=(7, 0.32 * len(found) + 1.2), layout="constrained")
    axis = figure.add_subplot()
    axis.errorbar(means, list(found), xerr=spreads, fmt="o", color="#2f5d8c", ecolor="#333333", capsize=3)
    axis.grid(axis="x", color="#dddddd")
    axis.invert_yaxis()
    axis.set(xlabel=column, title=title)
    FigureCanvasAgg(figure).print_png(str(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--title", default="")
    parser.add_argument("--columns", nargs="+", required=True)
    parser.add_argument("--paper", nargs="*", default=[], metavar="CELL=TEXT", help="what the paper says of a cell")
    options = parser.parse_args()
    cells = read_cells(options.folder)
    paper = dict(said.split("=", 1) for said in options.paper)
    header = ["cell", "seeds", *options.columns, *(["paper"] if paper else [])]
    rows = [
        [name, str(len(scores)), *(text(summary(scores, column), len(scores)) for column in options.columns)]
        + ([paper.get(name, "")] if paper else [])
        for name, scores in cells.items()
    ]
    lines = [header, ["---"] * len(header), *rows]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
    (options.folder / "table.md").write_text(table)
    with (options.folder / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    plot(options.folder / "plot.png", cells, options.columns[0], options.title)
    print(table, end="")


if __name__ == "__main__":
    main()

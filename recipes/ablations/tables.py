"""The table of an experiment and its plot, from the scores of its cells."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from experiments import Cell, Table
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

PUBLISHED = Path(__file__).parent.parent / "published.yaml"

Score = dict[str, Any]  # name -> [value, spread over sample or noise seeds, or None]; the paper's: name -> text
Record = dict[str, Score]  # of a cell and seed: its own scores as `cell`, and rows that need no generator
DATA = ("gaussian", "training", "heldout", "real strings")  # rows of a record that depend on no tokenizer
NOTES = {
    "images": " The paper's rows: ImageNet 256×256, Inception.",
    "strings": "\nSamples say the texts of held-out strings; `another`: another text, same prompt and durations.",
    "voices": "\nshuffled: against the text of the next sample; other: similarity to the prompt of another voice.",
}


def numbers(result: Mapping[str, Any]) -> Score:
    """The scores of a command's JSON, or of a row of `eval baselines`, by dotted name."""
    spreads, values = result.get("spread_over_seeds") or {}, Score()
    for name, value in result.items():
        if isinstance(value, dict) and {"mean", "std"} <= set(value):
            values[name] = [value["mean"], value["std"]]
        elif name in ("continuous", "factor_coverage", "heldout") and value:
            for key, inner in value.items():
                if isinstance(inner, float):
                    values[f"{name}.{key}"] = [inner, spreads.get(f"{name}.{key}")]
        elif isinstance(value, int | float) and not isinstance(value, bool):
            values[name] = [value, spreads.get(name)]
    return values


def pick(score: Score, column: str) -> Any:
    """The first of the column's names that the score has; None without any."""
    return next((score[name] for name in column.split("/") if score.get(name)), None)


@dataclass
class Row:
    """A row of a table. by_seed: training seed -> scores."""

    name: str
    by_seed: dict[str, Score]

    def value(self, column: str) -> tuple[float, float | None, float | None] | None:
        """Mean over training seeds, standard deviation over them, mean of those over sample seeds; None: no score."""
        pairs = [pick(score, column) for score in self.by_seed.values()]
        if None in pairs:
            return None
        means, spreads = [pair[0] for pair in pairs], [pair[1] for pair in pairs if pair[1] is not None]
        over_seeds = statistics.stdev(means) if len(means) > 1 else None
        return statistics.mean(means), over_seeds, statistics.mean(spreads) if spreads else None

    def text(self, column: str) -> str:
        """`12.34 ± 0.05 (0.02)`; a whole number as it is."""
        if (value := self.value(column)) is None:
            return ""
        mean, over_seeds, over_samples = value
        if over_samples is None and not over_seeds and float(mean).is_integer():
            return f"{mean:,.0f}"
        digits = max(0, 3 - math.floor(math.log10(abs(mean) or 1)))
        text = f"{mean:.{digits}f}" + ("" if over_seeds is None else f" ± {over_seeds:.{digits}f}")
        return text + ("" if over_samples is None else f" ({over_samples:.{digits}f})")


def rows_of(cells: Sequence[Cell], records: Mapping[str, Mapping[str, Record]]) -> list[Row]:
    """The cells; then the data, and what the tokenizer and the linear baseline of each store make of them."""
    rows = [Row(cell.name, {seed: record["cell"] for seed, record in records[cell.name].items()}) for cell in cells]
    trained = [cell for cell in cells if cell.generator]
    first: Record = next(iter(records[trained[0].name].values())) if trained else {}
    rows += [Row(name, {"": first[name]}) for name in DATA if name in first]
    tokenizers = {cell.tokenizer: cell.name for cell in reversed(trained)}
    stores = {(cell.tokenizer, cell.tokenize, cell.images): cell.name for cell in reversed(trained)}
    for part, label, owners in (
        ("reconstructions", "reconstructions", tokenizers.values()),
        ("linear", "linear baseline", stores.values()),
    ):
        for owner in reversed(owners):
            name = f"{label} of {owner}" if len(owners) > 1 else label
            scores = {seed: record[part] for seed, record in records[owner].items() if part in record}
            rows.append(Row(name, scores))
    return [row for row in rows if row.by_seed]


def published(table: Table) -> dict[str, Score]:
    """The paper's rows of its own models, by name, as it prints them."""
    rows: dict[str, Score] = {}
    for figure in yaml.safe_load(PUBLISHED.read_text("utf-8")):
        if figure.get("table") == table.published and figure["name"].startswith(("RDPM", "tokenizer")):
            rows.setdefault(f"the paper: {figure['row']}", {})[figure["metric"]] = figure["value"]
    return rows


def markdown(table: Table, rows: Sequence[Row], title: str) -> str:
    columns = [column for column in table.columns if any(row.value(column) for row in rows)]
    names = [next(n for n in column.split("/") if any(row.value(n) for row in rows)) for column in columns]
    lines = [["", *names], ["---"] * (len(columns) + 1)]
    lines += [[row.name, *map(row.text, columns)] for row in rows]
    if table.published:
        lines += [[name, *(pick(score, c) or "" for c in columns)] for name, score in published(table).items()]
    seeds = ", ".join(rows[0].by_seed)
    return "".join("| " + " | ".join(line) + " |\n" for line in lines) + (
        f"\n{title}, training seeds {seeds}. Mean ± standard deviation over training seeds; in brackets that over\n"
        f"sample seeds, or over noise seeds of reconstructions.{NOTES[table.chain]}\n"
    )


def dots(path: Path, rows: Sequence[Row], column: str, title: str) -> None:
    """A point a row and its spread over training seeds; no bars, since the axis need not start at 0."""
    points = {row.name: value for row in rows if (value := row.value(column))}
    means, spreads = [value[0] for value in points.values()], [value[1] or 0.0 for value in points.values()]
    figure = Figure(figsize=(7, 0.32 * len(points) + 1.5), dpi=120, layout="constrained")
    axis = figure.add_subplot()
    axis.errorbar(means, list(points), xerr=spreads, fmt="o", color="#2f5d8c", ecolor="#333333", capsize=3)
    if 0 < 20 * min(means) < max(means):
        axis.set_xscale("log")
    axis.grid(axis="x", color="#dddddd")
    axis.set_ylim(len(points) - 0.5, -0.5)
    axis.set(xlabel=f"{column}: mean and standard deviation over training seeds", title=title)
    FigureCanvasAgg(figure).print_png(str(path))


def costs(path: Path, rows: Sequence[Row], column: str, title: str) -> None:
    """A column against operations and, where measured, seconds a sample; a line a family, named before ` in `."""
    names = [name for name in ("gflops_a_sample", "seconds_a_sample") if any(row.value(name) for row in rows)]
    figure = Figure(figsize=(1 + 5 * len(names), 5), dpi=120, layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axes, cost in zip(panels, names, strict=True):
        lines: dict[str, list[tuple[float, float, float]]] = {}
        for row in rows:
            if (x := row.value(cost)) and (y := row.value(column)):
                lines.setdefault(row.name.partition(" in ")[0], []).append((x[0], y[0], y[1] or 0.0))
        for name, points in lines.items():
            x_, y_, spreads = zip(*points, strict=True)
            axes.errorbar(x_, y_, yerr=spreads, fmt="o-", capsize=3, label=name)
        axes.set(xlabel=cost, ylabel=column, xscale="log", yscale="log")
        axes.grid(color="#dddddd")
    panels[-1].legend()
    figure.suptitle(title)
    FigureCanvasAgg(figure).print_png(str(path))


def curves(path: Path, rows: Sequence[Row], column: str, title: str) -> None:
    """A column a generator, a line a draw and schedule, a point a lambda: the score, and precision against recall.

    rows: those of Table 3's cells, named `generator, draw, schedule, lambda`."""
    lines: dict[str, dict[str, list[tuple[float, Row]]]] = {}
    for row in rows:
        strength, draw, schedule, cfg = row.name.split(", ")
        lines.setdefault(strength, {}).setdefault(f"{draw}, {schedule}", []).append((float(cfg), row))
    figure = Figure(figsize=(4 * len(lines) + 1, 7), dpi=120, layout="constrained")
    axes = figure.subplots(2, len(lines), squeeze=False)
    for (strength, by_label), (upper, lower) in zip(lines.items(), axes.T, strict=True):
        for label, points in by_label.items():
            score, precision, recall = (
                [(row.value(name) or [math.nan])[0] for _, row in points] for name in (column, "precision", "recall")
            )
            upper.plot([cfg for cfg, _ in points], score, "o-", label=label)
            lower.plot(recall, precision, "o-", label=label)
        upper.set(title=strength, xlabel="lambda", ylabel=column, yscale="log")
        lower.set(xlabel="recall", ylabel="precision")
    axes[0, 0].legend()
    figure.suptitle(title)
    FigureCanvasAgg(figure).print_png(str(path))

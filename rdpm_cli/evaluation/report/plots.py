"""Plots as SVG whose colours follow the page's light or dark scheme. The same values give the same bytes."""

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rdpm_cli.evaluation.report.parts import Item, Plot, clean, is_number
from rdpm_cli.evaluation.report.scores import TradeOff, metric

Curve = tuple[Sequence[float], Sequence[float]]

MOST_POINTS = 300  # of a curve; more are thinned out evenly, first and last kept
SIZE = (4.6, 2.9)  # inches; a page scales it to its column
# colours matplotlib writes -> (light, dark); each becomes a variable of the SVG's own style sheet
COLOURS = {
    "#010101": ("ink", "#1c1f24", "#e6e8eb"),
    "#020202": ("soft", "#5b6470", "#9aa4b0"),
    "#030303": ("line", "#dfe3e8", "#333a43"),
    "#040404": ("c0", "#1f5fbf", "#7fb0ff"),
    "#050505": ("c1", "#b8560f", "#f0a35e"),
    "#060606": ("c2", "#1b7a43", "#67c58a"),
    "#070707": ("c3", "#7a3fa0", "#c79be8"),
    "#080808": ("c4", "#8a6d00", "#d9c25a"),
    "#090909": ("c5", "#b3261e", "#ff8a80"),
}
INK, SOFT, LINE, *SERIES = COLOURS
DASHES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1.5)))
FONT = "system-ui, sans-serif"
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "rdpm",
    "text.parse_math": False,
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": SOFT,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


def draw(
    title: str, curves: Mapping[str, Curve], x: str, y: str = "", *, log: bool = False, whole: bool = False,
    between: tuple[str, str] | None = None, note: str = "", words: Mapping[str, Sequence[str]] | None = None,
) -> Plot:  # fmt: skip
    """One plot of named curves. x, y: labels of the axes; log: y logarithmic where all is positive; whole: y from 0.

    between: two curves with the area between them filled. note: under the title; words: beside the points of a curve.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    thinned = {clean(name): _thin(curve) for name, curve in curves.items()}
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        settings: Any = matplotlib.rcParams
        settings.update(STYLE)
        figure = Figure(figsize=SIZE, layout="constrained")
        canvas, axis = FigureCanvasSVG(figure), figure.add_subplot()
        _fill(axis, thinned, between)
        axis.set(xlabel=x, ylabel=y)
        _scale(axis, [value for _, values in thinned.values() for value in values], log, whole)
        for name, texts in (words or {}).items():
            points = list(zip(*thinned[clean(name)], strict=True))
            for text, point in zip(texts, points, strict=True) if len(texts) == len(points) else ():
                axis.annotate(text, point, xytext=(4, 4), textcoords="offset points", fontsize=7, color=SOFT)
        buffer = io.BytesIO()
        canvas.print_svg(buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    alt = _in_words(f"{title}, {note}" if note else title, thinned, x)
    return Plot(title=title, alt=alt, svg=_with_scheme(buffer.getvalue()), note=note)


def _fill(axis: Any, curves: Mapping[str, Curve], between: tuple[str, str] | None) -> None:
    handles = []
    for place, (x, y) in enumerate(curves.values()):
        colour, dash = SERIES[place % len(SERIES)], DASHES[place // len(SERIES) % len(DASHES)]
        style = {"color": colour, "linestyle": dash, "linewidth": 1.4, "markersize": 3.5}
        handles += axis.plot(x, y, marker="o" if len(x) <= 24 else None, **style)
    if between and curves[between[0]][0] == curves[between[1]][0]:
        (x, low), (_, high) = curves[between[0]], curves[between[1]]
        axis.fill_between(x, low, high, color=SERIES[0], alpha=0.12, linewidth=0)
    if len(curves) > 1:
        axis.legend(handles, list(curves), frameon=False, fontsize=8, ncols=1 if len(curves) < 5 else 2)


def _scale(axis: Any, values: Sequence[float], log: bool, whole: bool) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    axis.grid(axis="y")
    axis.xaxis.set_major_locator(
        MaxNLocator(8, steps=[1, 2, 5, 10], integer=all(edge >= 2 for edge in axis.get_xlim()[1:]))
    )
    if log and values and min(values) > 0:
        axis.set_yscale("log")
        decades = math.log10(max(values) / min(values))
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0,) if decades > 3 else (1.0, 2.0, 5.0)))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    elif whole and values and max(values) > 0:
        axis.set_ylim(0, 1.08 * max(values))


def _thin(curve: Curve) -> Curve:
    """Finite points alone, at most MOST_POINTS of them."""
    points = [(a, b) for a, b in zip(*curve, strict=True) if math.isfinite(a) and math.isfinite(b)]
    if len(points) > MOST_POINTS:
        last = len(points) - 1
        points = [points[round(place * last / (MOST_POINTS - 1))] for place in range(MOST_POINTS)]
    return [a for a, _ in points], [b for _, b in points]


def _with_scheme(svg: bytes) -> bytes:
    """Colours as variables of the SVG itself, which an <img> resolves by the page's scheme; the reader's own font."""
    text = svg.decode().replace("'DejaVu Sans'", FONT)
    light, dark = "", ""
    for written, (name, on_light, on_dark) in COLOURS.items():
        text = text.replace(written, f"var(--{name})")
        light, dark = f"{light}--{name}:{on_light};", f"{dark}--{name}:{on_dark};"
    sheet = f"<style>svg{{{light}}}@media (prefers-color-scheme:dark){{svg{{{dark}}}}}</style>"
    head, defs, rest = text.partition("<defs>")
    return f"{head}{sheet}{defs}{rest}".encode()


def _in_words(title: str, curves: Mapping[str, Curve], x: str) -> str:
    parts = []
    for name, (along, values) in curves.items():
        if values:
            parts.append(f"{name}: {values[0]:.3g} at {x} {along[0]:g} to {values[-1]:.3g} at {along[-1]:g}")
    shown = "; ".join(parts[:8]) + (f"; and {len(parts) - 8} more" if len(parts) > 8 else "")
    return f"{clean(title)}. {shown or 'No points'}."


# ---- what a run's log shows ----------------------------------------------------------------------------------------

LOSSES = ("loss", "ce", "latent_mse", "recon", "quant", "lpips", "gan", "discriminator/loss")
PANELS: tuple[tuple[str, tuple[str, ...], bool], ...] = (
    ("Loss", LOSSES, True),
    ("Learning rate", ("lr",), False),
    ("Images a second", ("images_per_second",), False),
    ("Codebook usage", ("usage/book", "latent_spread"), False),
    ("Proxy score", ("proxy/frechet_distance",), False),
)


def training_curves(item: Item) -> list[Plot]:
    """Of a run's log over its steps: what is there of loss, learning rate, throughput, codebook usage."""
    found = []
    for title, names, log in PANELS:
        curves = {name: curve for name in names if (curve := over_steps(item.log, name))}
        if curves:
            found.append(draw(title, curves, "step", log=log, whole=not log))
    return found


def over_steps(log: Iterable[Mapping[str, Any]], name: str) -> Curve | None:
    """The named number of a log's lines; None where no line has it."""
    points = [(float(row["step"]), float(row[name])) for row in log if is_number(row.get(name)) and "step" in row]
    return ([a for a, _ in points], [b for _, b in points]) if points else None


def together(items: Sequence[Item]) -> Plot | None:
    """The losses of several runs of one kind in one plot."""
    curves = {item.name: curve for item in items if (curve := over_steps(item.log, "loss"))}
    return draw("Loss of all runs", curves, "step", log=True) if len(curves) > 1 else None


# ---- what counts at every t ----------------------------------------------------------------------------------------

ACCURACY, BASELINE, NORM, SAMPLED = "heldout/accuracy", "heldout/baseline", "heldout/norm", "sampled/norm"


def held_out(item: Item) -> Mapping[str, Sequence[float]] | None:
    """The last line of a run's log with held-out numbers a t: those that are whole lists; None without accuracies."""
    rows = [row for row in item.log if isinstance(row.get(ACCURACY), list) and isinstance(row.get(BASELINE), list)]
    if not rows:
        return None
    kept = {
        name: rows[-1][name] for name in (ACCURACY, BASELINE, NORM, SAMPLED) if isinstance(rows[-1].get(name), list)
    }
    same = len(kept[ACCURACY])
    whole = {name: values for name, values in kept.items() if len(values) == same and all(map(is_number, values))}
    return whole if same and {ACCURACY, BASELINE} <= whole.keys() else None


def per_t(found: Mapping[str, Sequence[float]]) -> list[Plot]:
    """Accuracy beside the model-free baseline, the gap between them, the norm of z'_t."""
    t = [float(i) for i in range(1, len(found[ACCURACY]) + 1)]
    model, free = "model", "model-free baseline"
    gap = [a - b for a, b in zip(found[ACCURACY], found[BASELINE], strict=True)]
    both = {model: (t, found[ACCURACY]), free: (t, found[BASELINE])}
    plots = [
        draw("Held-out accuracy at every t", both, "t", "accuracy", whole=True, between=(free, model)),
        draw("Gap to the model-free baseline", {"gap": (t, gap)}, "t", "accuracy", whole=min(gap) >= 0),
    ]
    names = {NORM: "teacher-forced", SAMPLED: "sampled"}
    norms = {names[key]: (t, found[key]) for key in names if key in found}
    return [*plots, draw("Norm of z'_t", norms, "t", "norm", whole=True)] if norms else plots


KNOBS = {"cfg": "guidance λ (--cfg)", "tau": "inverse temperature τ (--tau)"}


def trade_off(found: TradeOff) -> Plot:
    """A metric against guidance or temperature, or against another metric as that option moves."""
    curves = {name: ([a for a, _, _ in points], [b for _, b, _ in points]) for name, points in found.curves.items()}
    label = metric(found.metric).label
    if found.against is None:
        return draw(f"{label} against {found.knob}", curves, KNOBS[found.knob], label, note=found.like)
    other = metric(found.against).label
    words = {name: [f"{found.knob} {knob:g}" for _, _, knob in points] for name, points in found.curves.items()}
    title = f"{label} against {other}, as {found.knob} moves"
    return draw(title, curves, other, label, note=found.like, words=words)

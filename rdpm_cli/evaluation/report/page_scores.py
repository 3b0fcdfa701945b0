"""The page's tables of scores: ours, and ours beside published figures."""

from collections.abc import Sequence
from xml.etree.ElementTree import Element

from rdpm_cli.evaluation.report import scores
from rdpm_cli.evaluation.report.markup import el, head, section, small, some, table
from rdpm_cli.evaluation.report.parts import Report, Score, said
from rdpm_cli.evaluation.report.published import RDPM

LEADING = ("fid", "frechet_distance", "class_accuracy", "inception_score", "rfid", "psnr")


def leading_figures(report: Report) -> Element | None:
    """The best value of each leading metric among those that can be compared, of the largest N there is."""
    cells = []
    for name in LEADING:
        ours = [s for s in report.scores if s.metric == name and s.value is not None]
        if ours:
            most = max(ours, key=lambda s: s.n or 0)
            alike = [s for s in ours if (s.n, s.extractor, s.reference) == (most.n, most.extractor, most.reference)]
            better = scores.metric(name).better
            best = max(alike, key=lambda s: better * (s.value or 0.0))
            with_what = ", ".join(filter(None, [f"N = {best.n:,}" if best.n else "", best.extractor, best.target]))
            label = f"{scores.metric(name).label}{f', best of {len(alike)}' if len(alike) > 1 else ''}"
            value = el("dd", scores.written(name, best.value), cls="value")
            cells.append(el("div", el("dt", label), value, el("dd", with_what, cls="with")))
    return el("dl", *cells, cls="figures") if cells else None


def own_scores(report: Report) -> Element:
    """Ours: of samples and images, of reconstructions, and what was not computed."""
    every = scores.rows(report.scores)
    if not every:
        return section("scores", "Scores", el("p", "None among what was given: not yet run.", cls="lead"))
    content: list[Element] = []
    for title, rows in scores.by_kind(every).items():
        content += [el("h3", title), *_scores_table(title, rows)]
    hint = "In bold the best of those that share N, extractor and reference; other rows cannot be compared."
    notes = el("ul", *(el("li", line) for line in scores.notes(report.scores)), cls="plain")
    return section("scores", "Scores", el("p", hint, cls="note"), *content, notes if len(notes) else None)


def _scores_table(label: str, rows: Sequence[scores.Row]) -> list[Element]:
    """The table, and a line of what all its rows share, which then has no column."""
    metrics, options = scores.columns(rows)
    settings: dict[str, list[str]] = {"N": ["–" if row.n is None else f"{row.n:,}" for row in rows]}
    settings |= {name: [said(row.options.get(name)) for row in rows] for name in options}
    settings["extractor"] = [row.extractor or "–" for row in rows]
    settings["reference"] = [row.reference or "–" for row in rows]
    shared = {name: values[0] for name, values in settings.items() if len(rows) > 1 and len(set(values)) == 1}
    kept = {name: values for name, values in settings.items() if name not in shared}
    texts = [name for name in kept if name in ("extractor", "reference")]
    top = [*head("Of"), *head(numbers=[scores.metric(m).label for m in metrics])]
    top += [*head(numbers=[name for name in kept if name not in texts]), *head(*texts)]
    body = []
    for place, row in enumerate(rows):
        cells = [
            el(
                "th",
                row.target or row.source,
                small(row.source if row.target not in ("", row.source) else ""),
                scope="row",
            )
        ]
        cells += [number(row.scores.get(m), "number best" if m in row.best else "number") for m in metrics]
        cells += [el("td", values[place], cls="" if name in texts else "number") for name, values in kept.items()]
        body.append(el("tr", *cells))
    line = "All: " + ", ".join(f"{name} {value}" for name, value in shared.items() if value != "–") + "."
    return [table(label, top, body), *([el("p", line, cls="note")] if shared else [])]


def number(score: Score | None, cls: str) -> Element:
    """A cell: the value, its spread, its interval."""
    if score is None:
        return el("td", "–", cls=cls)
    spread = f"± {score.spread:.2g}" if score.spread is not None else ""
    between = scores.between(score)
    text = scores.written(score.metric, score.value)
    return el("td", text, small(spread), small(score.spread_over if spread else ""), small(between), cls=cls)


def beside_published(report: Report) -> Element:
    """Published figures, ours beside them, and why the two cannot be compared where they cannot."""
    rows, group = [], ""
    for one in scores.beside_published(report.items, report.scores):
        if one.published.source != group:
            group = one.published.source
            rows.append(el("tr", el("th", group, colspan="5", scope="colgroup"), cls="group"))
        rows.append(_published_row(one))
    lead = (
        "Figures of papers and code releases as this project's documents quote them. A score of ours stands beside one "
        f"only where it is of the same thing. Of {RDPM}, Tables 3 and 4 are quoted without figures, so they are absent."
    )
    top = [*head("Published"), *head("Metric"), *head(numbers=["Theirs", "Ours"]), *head("Comparable?")]
    return section("published", "Beside published figures", el("p", lead, cls="lead"),
                    table("Published figures", top, rows))  # fmt: skip


def _published_row(one: scores.Beside) -> Element:
    published, score = one.published, one.score
    if published.of == "other":
        ours, verdict = el("td", "–", cls="number"), "another method"
    elif score is None:
        ours, verdict = el("td", "not yet run", cls="number"), ""
    else:
        ours = number(score, "number")
        ours.extend(some(small(score.source)))
        verdict = f"not comparable: {'; '.join(one.reasons)}" if one.reasons else _difference(published.value, score)
    cells = [el("th", published.what, scope="row"), el("td", scores.metric(published.metric).label)]
    cells.append(el("td", published.quoted, cls="number"))
    return el("tr", *cells, ours, el("td", verdict, cls="words"))


def _difference(theirs: float, score: Score) -> str:
    return f"yes: {(score.value or 0.0) / theirs - 1:+.2%}"

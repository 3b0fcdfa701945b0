"""The page: one HTML file that needs nothing else. Text is escaped by the serialiser, never by hand."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from rdpm_cli.evaluation.report import chain, plots, scores
from rdpm_cli.evaluation.report.chain import Link
from rdpm_cli.evaluation.report.parts import STAGES, Item, Picture, Plot, Report, Score, clean, said, short, unique
from rdpm_cli.evaluation.report.published import RDPM

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STATES = {"matches": "✓ matches", "broken": "✗ broken", "absent": "○ not given"}
Content = Element | str | None


def render(report: Report) -> bytes:
    """The file: UTF-8, one element tree, no script, no address but data: ones."""
    found = chain.links(report.items)
    sections = [section for section in _sections(report, found) if section is not None]
    links = [el("li", el("a", section[0].text or "", href=f"#{section.get('id')}")) for section in sections]
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", {"http-equiv": "Content-Security-Policy"}, content=POLICY),
        el("meta", name="color-scheme", content="light dark"),
        el("title", report.title),
        el("style", files(__package__).joinpath("page.css").read_text(encoding="utf-8")),
    )
    top = el(
        "header", el("h1", report.title), el("p", _summary(report, found), cls="lead"), el("nav", el("ul", *links))
    )
    top.extend(some(_figures(report)))
    last = el("footer", el("p", f"Made by rdpm {report.version} from the files named above; it holds no clock's time."))
    page = el("html", head, el("body", top, el("main", *sections), last), lang="en")
    return b"<!DOCTYPE html>\n" + ElementTree.tostring(page, encoding="utf-8", method="html") + b"\n"


def el(name: str, /, *children: Content | dict[str, str], cls: str = "", **attributes: str) -> Element:
    """An element. children: elements and text in order, and mappings of attributes that are no Python names."""
    found = Element(name, {key: clean(value) for key, value in attributes.items()})
    if cls:
        found.set("class", cls)
    for child in children:
        if isinstance(child, dict):
            found.attrib.update(child)
        elif isinstance(child, str):
            _append_text(found, clean(child))
        elif child is not None:
            found.append(child)
    return found


def _append_text(parent: Element, text: str) -> None:
    if len(parent):
        parent[-1].tail = (parent[-1].tail or "") + text
    else:
        parent.text = (parent.text or "") + text


def some(element: Element | None) -> list[Element]:
    """An element that may be none, as a list."""
    return [] if element is None else [element]


def _section(name: str, title: str, *content: Content) -> Element:
    return el("section", el("h2", title), *content, id=name)


def _sections(report: Report, found: Sequence[Sequence[Link]]) -> list[Element | None]:
    return [
        _chain_section(report, found),
        _scores_section(report),
        _published_section(report),
        _trade_off_section(report),
        _curves_section(report),
        _per_t_section(report),
        _pictures_section(report),
        _settings_section(report),
    ]


def _summary(report: Report, found: Sequence[Sequence[Link]]) -> str:
    number = chain.counts(found)
    given = sum(item.stage != "data" for item in report.items)
    broken = f"{number['broken']} broken" if number["broken"] else "none broken"
    return (
        f"{given} things given, {len(report.scores)} scores. Links of the chain: {number['matches']} match, {broken}."
    )


# ---- what a person sees first --------------------------------------------------------------------------------------

LEADING = ("fid", "frechet_distance", "class_accuracy", "is", "rfid", "psnr")


def _figures(report: Report) -> Element | None:
    """The best value of each leading metric, with what it was computed with."""
    cells = []
    for name in LEADING:
        ours = [s for s in report.scores if s.metric == name and s.value is not None]
        if ours:
            better = scores.metric(name).better
            best = max(ours, key=lambda s: better * (s.value or 0.0))
            with_what = ", ".join(filter(None, [f"N = {best.n:,}" if best.n else "", best.extractor]))
            label = f"{scores.metric(name).label}, best of {len(ours)}" if len(ours) > 1 else scores.metric(name).label
            cells.append(el("div", el("dt", label), el("dd", scores.written(name, best.value), cls="value"),
                            el("dd", with_what, cls="with")))  # fmt: skip
    return el("dl", *cells, cls="figures") if cells else None


# ---- the chain -----------------------------------------------------------------------------------------------------


def _chain_section(report: Report, found: Sequence[Sequence[Link]]) -> Element:
    rows = [_chain_item(item, links) for item, links in zip(report.items, found, strict=True)]
    text = "From images to scores, each with its digest, and whether what it was made from is what was given."
    return _section("chain", "What was run", el("p", text, cls="lead"), el("ol", *rows, cls="chain"))


def _chain_item(item: Item, links: Sequence[Link]) -> Element:
    broken = any(link.state == "broken" for link in links)
    body = el("div", el("div", item.name, cls="name"))
    if item.digest:
        body.append(el("div", item.digest, cls="digest"))
    if item.facts:
        body.append(el("dl", *(el("div", el("dt", name), el("dd", value)) for name, value in item.facts.items())))
    if links:
        body.append(el("ul", *map(_link, links)))
    return el("li", el("div", STAGES[item.stage], cls="stage"), body, cls="broken" if broken else "")


def _link(link: Link) -> Element:
    stages = " or ".join(STAGES[stage].lower() for stage in link.claim.stages)
    digest = el("span", short(link.claim.digest), cls="digest") if link.claim.digest else None
    state = el("span", STATES[link.state], cls=f"state {link.state}")
    return el("li", state, f" {stages} ", digest, f" {'· ' if digest is not None else ''}{link.says}")


# ---- tables --------------------------------------------------------------------------------------------------------


def table(label: str, head: Sequence[Element], rows: Iterable[Element], cls: str = "") -> Element:
    """A table that scrolls by itself where the page is narrow. label: for those who hear it."""
    inner = el("table", el("thead", el("tr", *head)), el("tbody", *rows), cls=cls)
    return el("div", inner, {"aria-label": label, "tabindex": "0"}, cls="scroll", role="region")


def _head(*texts: str, numbers: Sequence[str] = ()) -> list[Element]:
    left = [el("th", text, scope="col") for text in texts]
    return left + [el("th", text, scope="col", cls="number") for text in numbers]


def _small(text: str) -> Element | None:
    return el("span", text, cls="small") if text else None


def _scores_section(report: Report) -> Element:
    found = scores.rows(report.scores)
    if not found:
        return _section("scores", "Scores", el("p", "None among what was given: not yet run.", cls="lead"))
    metrics, options = scores.columns(found)
    head = [*_head("Of"), *_head(numbers=[scores.metric(name).label for name in metrics]), *_head(numbers=["N"]),
            *_head(numbers=options), *_head("Extractor", "Reference")]  # fmt: skip
    rows = [_score_row(row, metrics, options) for row in found]
    hint = "In bold the best of those that share N, extractor and reference; other rows cannot be compared."
    missing = [s for s in report.scores if s.value is None]
    lines = unique(
        f"{scores.metric(s.metric).label}, {s.source}: not computed, {s.note or 'no reason given'}" for s in missing
    )
    lines += unique(f"{s.source}: {s.note}" for s in report.scores if s.value is not None and s.note)
    notes = el("ul", *(el("li", line) for line in lines), cls="plain") if lines else None
    return _section("scores", "Scores", table("Scores", head, rows), el("p", hint, cls="note"), notes)


def _score_row(row: scores.Row, metrics: Sequence[str], options: Sequence[str]) -> Element:
    cells = [el("th", row.target or row.source, _small(row.source if row.target else ""), scope="row")]
    for name in metrics:
        score = row.scores.get(name)
        cells.append(_number(score, "number best" if name in row.best else "number"))
    cells.append(el("td", "–" if row.n is None else f"{row.n:,}", cls="number"))
    cells += [el("td", said(row.options.get(name)), cls="number") for name in options]
    return el("tr", *cells, el("td", row.extractor or "–"), el("td", row.reference or "–"))


def _number(score: Score | None, cls: str) -> Element:
    if score is None:
        return el("td", "–", cls=cls)
    form = scores.metric(score.metric).form
    spread = f"± {score.spread:.2g} {score.spread_over}" if score.spread is not None else ""
    between = f"{score.interval[0]:{form}} to {score.interval[1]:{form}}" if score.interval else ""
    return el("td", scores.written(score.metric, score.value), _small(spread), _small(between), cls=cls)


def _published_section(report: Report) -> Element:
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
    head = [*_head("Published"), *_head("Metric"), *_head(numbers=["Theirs", "Ours"]), *_head("Comparable?")]
    return _section("published", "Beside published figures", el("p", lead, cls="lead"),
                    table("Published figures", head, rows))  # fmt: skip


def _published_row(one: scores.Beside) -> Element:
    published, score = one.published, one.score
    if published.of == "other":
        ours, verdict = el("td", "–", cls="number"), "another method"
    elif score is None:
        ours, verdict = el("td", "not yet run", cls="number"), ""
    else:
        ours = _number(score, "number")
        ours.extend(some(_small(score.source)))
        verdict = f"not comparable: {'; '.join(one.reasons)}" if one.reasons else _difference(published.value, score)
    cells = [el("th", published.what, scope="row"), el("td", scores.metric(published.metric).label)]
    cells.append(el("td", scores.written(published.metric, published.value), cls="number"))
    return el("tr", *cells, ours, el("td", verdict, cls="words"))


def _difference(theirs: float, score: Score) -> str:
    return f"yes: {(score.value or 0.0) / theirs - 1:+.2%}"


# ---- plots and pictures --------------------------------------------------------------------------------------------


def _plot(plot: Plot) -> Element:
    address = f"data:image/svg+xml;base64,{base64.b64encode(plot.svg).decode()}"
    width, height = (round(96 * side) for side in plots.SIZE)
    image = el("img", src=address, alt=plot.alt, width=str(width), height=str(height))
    return el("figure", el("figcaption", plot.title), image)


def _picture(picture: Picture) -> Element:
    address = f"data:{picture.kind};base64,{base64.b64encode(picture.data).decode()}"
    width, height = map(str, picture.size)
    image = el("img", src=address, alt=picture.alt, width=width, height=height)
    return el("figure", el("figcaption", picture.title), image)


def _trade_off_section(report: Report) -> Element | None:
    drawn = [plots.trade_off(found) for found in scores.trade_offs(report.scores)]
    if not drawn:
        return None
    lead = "Scores of one N, extractor and reference against the options they were sampled with."
    return _section("trade-offs", "Guidance and temperature", el("p", lead, cls="lead"),
                    el("div", *map(_plot, drawn), cls="plots"))  # fmt: skip


def _curves_section(report: Report) -> Element | None:
    logged = [item for item in report.items if item.log]
    content: list[Content] = []
    for stage in unique(item.stage for item in logged):
        same = [item for item in logged if item.stage == stage]
        for item in same:
            drawn = plots.training_curves(item)
            content += [el("h3", f"{STAGES[item.stage]}: {item.name}"), el("div", *map(_plot, drawn), cls="plots")]
        if all_of_them := plots.together(same):
            content.append(el("div", _plot(all_of_them), cls="plots"))
    return _section("curves", "Training", *content) if content else None


def _per_t_section(report: Report) -> Element | None:
    content: list[Content] = []
    for item in report.items:
        if found := plots.held_out(item):
            content += [el("h3", f"{STAGES[item.stage]}: {item.name}")]
            content += [el("div", *map(_plot, plots.per_t(found)), cls="plots"), _per_t_table(found)]
    if not content:
        return None
    lead = (
        "The noise is known, so a guess with no model is right for many codes at early t. What counts is the gap to "
        "that model-free baseline, on held-out images under held-out noise; and that sampled latents keep their norm."
    )
    return _section("per-t", "At every step t", el("p", lead, cls="lead"), *content)


def _per_t_table(found: Mapping[str, Sequence[float]]) -> Element:
    model, free = found[plots.ACCURACY], found[plots.BASELINE]
    columns: dict[str, Sequence[float]] = {"model": model, "model-free": free}
    columns["gap"] = [a - b for a, b in zip(model, free, strict=True)]
    names = {plots.NORM: "norm, teacher-forced", plots.SAMPLED: "norm, sampled"}
    columns |= {names[key]: found[key] for key in names if key in found}
    rows = [
        el("tr", el("th", str(t), scope="row", cls="number"),
           *(el("td", f"{values[t - 1]:.3f}", cls="number") for values in columns.values()))
        for t in range(1, len(model) + 1)
    ]  # fmt: skip
    return table("Held-out accuracy and norms at every t", _head(numbers=["t", *columns]), rows)


def _pictures_section(report: Report) -> Element | None:
    if not report.pictures:
        return None
    notes = el("ul", *(el("li", note) for note in report.notes), cls="plain") if report.notes else None
    return _section("pictures", "Pictures", el("div", *map(_picture, report.pictures), cls="pictures"), notes)


# ---- settings ------------------------------------------------------------------------------------------------------


def _settings_section(report: Report) -> Element | None:
    content: list[Content] = []
    for stage in STAGES:
        same = [item for item in report.items if item.stage == stage and item.settings]
        if same:
            content += [el("h3", STAGES[stage]), _settings_table(STAGES[stage], same)]
    lead = "Rows in which what is compared differs are shaded."
    return _section("settings", "Settings", el("p", lead, cls="note"), *content) if content else None


def _settings_table(label: str, items: Sequence[Item]) -> Element:
    rows = []
    for name in unique(name for item in items for name in item.settings):
        values: list[Any] = [item.settings.get(name) for item in items]
        differs = len({said(value) for value in values}) > 1
        cells = [el("td", said(value), cls="" if isinstance(value, str) else "number") for value in values]
        rows.append(el("tr", el("th", name, scope="row"), *cells, cls="differs" if differs else ""))
    head = [*_head("Setting"), *_head(*(item.name for item in items))]
    return table(f"Settings: {label}", head, rows, cls="settings")

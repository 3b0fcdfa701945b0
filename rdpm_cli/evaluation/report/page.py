"""The page: one HTML file that needs nothing else."""

import base64
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any
from xml.etree.ElementTree import Element

from rdpm_cli.evaluation.report import chain, page_scores, plots, scores
from rdpm_cli.evaluation.report.chain import Link
from rdpm_cli.evaluation.report.markup import Content, el, head, section, serialised, small, some, table
from rdpm_cli.evaluation.report.parts import STAGES, Item, Picture, Plot, Report, said, short, unique

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
MOST_RUNS = 12  # of a kind that are drawn one by one, so that a page stays small
STATES = {"matches": "✓ matches", "broken": "✗ broken", "absent": "○ not given"}


def render(report: Report) -> bytes:
    """The file: UTF-8, one element tree, no script, no address but data: ones."""
    found = chain.links(report.items)
    sections = [one for one in _sections(report, found) if one is not None]
    links = [el("li", el("a", one[0].text or "", href=f"#{one.get('id')}")) for one in sections]
    preamble = el(
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
    top.extend(some(page_scores.leading_figures(report)))
    last = el("footer", el("p", f"Made by rdpm {report.version} from the files named above; it holds no clock's time."))
    page = el("html", preamble, el("body", top, el("main", *sections), last), lang="en")
    return f"<!DOCTYPE html>\n{serialised(page)}\n".encode()


def _sections(report: Report, found: Sequence[Sequence[Link]]) -> list[Element | None]:
    return [
        _chain_section(report, found),
        page_scores.own_scores(report),
        page_scores.beside_published(report),
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


# ---- the chain -----------------------------------------------------------------------------------------------------


def _chain_section(report: Report, found: Sequence[Sequence[Link]]) -> Element:
    rows = [_chain_item(item, links) for item, links in zip(report.items, found, strict=True)]
    text = "From images to scores, each with its digest, and whether what it was made from is what was given."
    return section("chain", "What was run", el("p", text, cls="lead"), el("ol", *rows, cls="chain"))


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


# ---- plots and pictures --------------------------------------------------------------------------------------------


def _plot(plot: Plot) -> Element:
    address = f"data:image/svg+xml;base64,{base64.b64encode(plot.svg).decode()}"
    width, height = (round(96 * side) for side in plots.SIZE)
    image = el("img", src=address, alt=plot.alt, width=str(width), height=str(height))
    return el("figure", el("figcaption", plot.title, small(plot.note)), image)


def _plots(drawn: Sequence[Plot]) -> Element:
    """In rows of three, or of two where three would leave one alone."""
    return el("div", *map(_plot, drawn), cls="plots pairs" if len(drawn) % 3 == 1 else "plots")


def _picture(picture: Picture) -> Element:
    address = f"data:{picture.kind};base64,{base64.b64encode(picture.data).decode()}"
    width, height = map(str, picture.size)
    image = el("img", src=address, alt=picture.alt, width=width, height=height)
    wide = picture.size[0] > 1.25 * picture.size[1]
    return el("figure", el("figcaption", picture.title), image, cls="wide" if wide else "")


def _trade_off_section(report: Report) -> Element | None:
    drawn = [plots.trade_off(found) for found in scores.trade_offs(report.scores)]
    if not drawn:
        return None
    lead = "Scores of one N, extractor and reference against the options they were sampled with."
    return section("trade-offs", "Guidance and temperature", el("p", lead, cls="lead"), _plots(drawn))


def _curves_section(report: Report) -> Element | None:
    logged = [item for item in report.items if item.log]
    content: list[Content] = []
    for stage in unique(item.stage for item in logged):
        same = [item for item in logged if item.stage == stage]
        for item in same[:MOST_RUNS]:
            drawn = plots.training_curves(item)
            content += [el("h3", f"{STAGES[item.stage]}: {item.name}"), _plots(drawn)]
        if len(same) > MOST_RUNS:
            content.append(el("p", f"Of {len(same) - MOST_RUNS} more runs only the loss is drawn.", cls="note"))
        if all_of_them := plots.together(same):
            content.append(_plots([all_of_them]))
    return section("curves", "Training", *content) if content else None


def _per_t_section(report: Report) -> Element | None:
    content: list[Content] = []
    every = [(item, found) for item in report.items if (found := plots.held_out(item))]
    if not every:
        return None
    for item, found in every[:MOST_RUNS]:
        content += [el("h3", f"{STAGES[item.stage]}: {item.name}")]
        content += [_plots(plots.per_t(found)), _per_t_table(found)]
    if len(every) > MOST_RUNS:
        content.append(el("p", f"{len(every) - MOST_RUNS} more runs are left out.", cls="note"))
    lead = (
        "The noise is known, so a guess with no model is right for many codes at early t. What counts is the gap to "
        "that model-free baseline, on held-out images under held-out noise; and that sampled latents keep their norm."
    )
    return section("per-t", "At every step t", el("p", lead, cls="lead"), *content)


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
    return table("Held-out accuracy and norms at every t", head(numbers=["t", *columns]), rows, cls="compact")


def _pictures_section(report: Report) -> Element | None:
    if not report.pictures:
        return None
    notes = el("ul", *(el("li", note) for note in report.notes), cls="plain") if report.notes else None
    return section("pictures", "Pictures", el("div", *map(_picture, report.pictures), cls="pictures"), notes)


# ---- settings ------------------------------------------------------------------------------------------------------


def _settings_section(report: Report) -> Element | None:
    content: list[Content] = []
    for stage in STAGES:
        same = [item for item in report.items if item.stage == stage and item.settings]
        if same:
            content += [el("h3", STAGES[stage]), _settings_table(STAGES[stage], same)]
    lead = "Rows in which what is compared differs are shaded."
    return section("settings", "Settings", el("p", lead, cls="note"), *content) if content else None


def _settings_table(label: str, items: Sequence[Item]) -> Element:
    rows = []
    for name in unique(name for item in items for name in item.settings):
        values: list[Any] = [item.settings.get(name) for item in items]
        differs = len({said(value) for value in values}) > 1
        cells = [el("td", said(value)) for value in values]
        rows.append(el("tr", el("th", name, scope="row"), *cells, cls="differs" if differs else ""))
    return table(f"Settings: {label}", head("Setting", *(item.name for item in items)), rows, cls="settings")

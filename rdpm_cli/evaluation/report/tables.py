"""The report as data: Markdown and CSV tables and JSON of scores, links of the chain, published figures, settings."""

import csv
import io
import json
from collections.abc import Callable, Sequence
from typing import Any

from rdpm_cli.evaluation.report import chain, page, scores
from rdpm_cli.evaluation.report.parts import STAGES, Report, Score, clean, said, short


def as_markdown(report: Report) -> bytes:
    """Tables for a paper or a README."""
    own = scores.by_kind(scores.rows(report.scores))
    tables = [part for title, rows in own.items() for part in (f"### {title}", _scores_table(rows))]
    notes = "\n".join(f"- {_cell(note)}" for note in (*scores.notes(report.scores), *report.notes))
    parts = [f"# {_cell(report.title)}", "## Scores", *(tables or ["Not yet run."]), *([notes] if notes else [])]
    parts += [
        "## Beside published figures",
        _published_table(report),
        "## What was run",
        _chain_table(report),
        "## Settings",
        _settings_table(report),
    ]
    return ("\n\n".join(parts) + "\n").encode()


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """numbers: columns to align right."""
    rule = ["---:" if place in numbers else "---" for place in range(len(head))]
    return "\n".join("| " + " | ".join(map(_cell, row)) + " |" for row in (head, rule, *rows))


def _cell(text: str) -> str:
    """Text that ends no cell and starts no markup."""
    flat = " ".join(clean(text).split())
    for mark in "\\|<>`*_[]":
        flat = flat.replace(mark, f"\\{mark}")
    return flat


def _scores_table(found: Sequence[scores.Row]) -> str:
    metrics, options = scores.columns(found)
    head = ["of", *(scores.metric(name).label for name in metrics), "N", *options, "extractor", "reference"]
    rows = []
    for row in found:
        values = [_value(row.scores.get(name)) for name in metrics]
        count = "–" if row.n is None else str(row.n)
        chosen = [said(row.options.get(name)) for name in options]
        rows.append([row.target or row.source, *values, count, *chosen, row.extractor or "–", row.reference or "–"])
    return _markdown(head, rows, range(1, len(metrics) + len(options) + 2))


def _value(score: Score | None) -> str:
    if score is None:
        return "–"
    text = scores.written(score.metric, score.value)
    spread = "" if score.spread is None else f" ± {score.spread:.2g}"
    return f"{text}{spread} ({scores.between(score)})" if score.interval else f"{text}{spread}"


def _published_table(report: Report) -> str:
    rows = []
    for one in scores.beside_published(report.items, report.scores):
        p, ours = one.published, "–" if one.published.of == "other" else "not yet run"
        if one.score:
            ours = f"{scores.written(p.metric, one.score.value)} ({one.score.source})"
        label, theirs = scores.metric(p.metric).label, p.quoted
        rows.append([p.source, p.what, label, theirs, ours, _verdict(one)])
    return _markdown(["source", "of", "metric", "theirs", "ours", "comparable"], rows, (3, 4))


def _verdict(one: scores.Beside) -> str:
    if one.score is None:
        return "another method" if one.published.of == "other" else ""
    return f"no: {'; '.join(one.reasons)}" if one.reasons else "yes"


def _chain_table(report: Report) -> str:
    rows = []
    for item, links in zip(report.items, chain.links(report.items), strict=True):
        rows.append([STAGES[item.stage], item.name, short(item.digest) or "–", "", ""])
        for link in links:
            stages = " or ".join(STAGES[stage].lower() for stage in link.claim.stages)
            rows.append(["", f"made from {stages}", short(link.claim.digest) or "–", link.state, link.says])
    return _markdown(["stage", "what", "digest", "link", ""], rows)


def _settings_table(report: Report) -> str:
    rows = [[item.name, name, said(value)] for item in report.items for name, value in item.settings.items()]
    return _markdown(["of", "setting", "value"], rows) if rows else "None recorded."


CSV_HEAD = ["table", "of", "name", "value", "n", "spread", "low", "high", "extractor", "reference", "options", "note"]


def as_csv(report: Report) -> bytes:
    """One table of long form: a row a score (`table` is score) and a row a setting (setting)."""
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_HEAD)
    for s in report.scores:
        low, high = s.interval or ("", "")
        options = json.dumps(dict(s.options), sort_keys=True)
        numbers = ["" if number is None else number for number in (s.value, s.n, s.spread)]
        texts = map(clean, (s.extractor, s.reference, options, s.note))
        writer.writerow(["score", clean(s.target or s.source), s.metric, *numbers, low, high, *texts])
    for item in report.items:
        for name, value in item.settings.items():
            writer.writerow(["setting", clean(item.name), clean(name), said(value), *[""] * (len(CSV_HEAD) - 4)])
    return out.getvalue().encode()


def as_json(report: Report) -> bytes:
    """Everything but plots and pictures."""
    items: list[dict[str, Any]] = []
    for item, links in zip(report.items, chain.links(report.items), strict=True):
        made_from = [
            {
                "stages": list(k.claim.stages),
                "digest": k.claim.digest,
                "name": k.claim.name,
                "state": k.state,
                "says": k.says,
            }
            for k in links
        ]
        items.append({"stage": item.stage, "name": item.name, "digest": item.digest, "facts": dict(item.facts),
                      "made_from": made_from, "settings": dict(item.settings)})  # fmt: skip
    published = [
        {"source": p.source, "of": p.what, "metric": p.metric, "theirs": p.value, "ours": one.score and one.score.value,
         "our_source": one.score and one.score.source, "comparable": one.score and not one.reasons,
         "reasons": list(one.reasons)}
        for one in scores.beside_published(report.items, report.scores) for p in [one.published]
    ]  # fmt: skip
    found = [
        {**s.__dict__, "options": dict(s.options), "interval": s.interval and list(s.interval)} for s in report.scores
    ]
    whole = {"title": report.title, "rdpm": report.version, "chain": items, "scores": found, "published": published}
    text = json.dumps(_plain({**whole, "notes": report.notes}), indent=2, allow_nan=False)
    return (text + "\n").encode()


def _plain(value: Any) -> Any:
    """What JSON can hold: numbers that are none become None, text is clean."""
    if isinstance(value, dict):
        return {clean(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return value if value - value == 0 else None
    return clean(value) if isinstance(value, str) else value


FORMATS: dict[str, Callable[[Report], bytes]] = {
    "html": page.render, "md": as_markdown, "csv": as_csv, "json": as_json,
}  # fmt: skip

"""report: run folders, stores, pictures, checkpoints and scores -> one page, or tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rdpm_cli import __version__, files
from rdpm_cli.engine.runs import Result
from rdpm_cli.errors import UsageError

if TYPE_CHECKING:
    from rdpm_cli.engine.report_inputs import Found
    from rdpm_cli.evaluation.report.parts import Item, Picture

TITLE = "RDPM: what was run, and how it scores"
SUFFIXES = {".html": "html", ".htm": "html", ".md": "md", ".csv": "csv", ".json": "json"}
MOST_PICTURES = 24
MOST_COMPARED = 10_000  # pictures of a folder whose pixels are read to compare them with a score's


def make_report(
    runs: Sequence[Path], out: Path | None = None, form: str | None = None, title: str | None = None
) -> Result:
    """Read what was given, any mix, and write it as one file. form: html, md, csv, json; by the suffix of `out`.

    Raises UsageError for what is not there, DataError for what is not recognised or damaged.
    """
    chosen = form or SUFFIXES.get(out.suffix.lower() if out else ".html")
    if chosen is None:
        raise UsageError(f"{out} does not say which format it is", "add --format html, md, csv or json")
    target = out or Path(f"report.{chosen}")
    _check(runs, target)
    from rdpm_cli.engine import report_inputs
    from rdpm_cli.evaluation.report import chain, tables
    from rdpm_cli.evaluation.report.parts import Report

    found = report_inputs.read(runs, with_pictures=chosen == "html")
    report = Report(
        title=title or TITLE,
        version=__version__,
        items=chain.with_images(_compared(found)),
        scores=[score for one in found for score in one.scores],
    )
    _take_pictures(report.pictures, report.notes, found)
    content = tables.FORMATS[chosen](report)
    files.write_atomic(target, lambda file: file.write(content))
    links = chain.counts(chain.links(report.items))
    values = {"report": str(target), "format": chosen, "bytes": len(content), "given": len(found)}
    return Result("report written", {**values, "scores": len(report.scores), "links": dict(links)})


def _check(runs: Sequence[Path], target: Path) -> None:
    """What is cheap: everything given is there, the report goes where something can be written, and over none of it."""
    for path in runs:
        if not path.exists():
            raise UsageError(f"{path} does not exist", "name run folders, stores, sample folders, .pt or score files")
    if target.is_dir():
        raise UsageError(f"{target} is a folder", "name a file with -o")
    if target.resolve() in [path.resolve() for path in runs]:
        raise UsageError(f"{target} is one of what is reported", "name another file with -o")
    files.check_folder(target.parent)


def _compared(found: Sequence[Found]) -> list[Item]:
    """The items, pictures with the identity of their pixels where a score says which it is of."""
    from rdpm_cli.engine import report_inputs

    scored = any(one.item.stage == "score" for one in found)
    items = []
    for one in found:
        item = one.item
        if scored and one.folder and one.count > MOST_COMPARED:
            note = f"no: more than {MOST_COMPARED:,} pictures"
            item = dataclasses.replace(item, facts={**item.facts, "pixels compared with scores": note})
        elif scored and one.folder and one.count:
            item = dataclasses.replace(item, digest=report_inputs.pixels_digest(one.folder))
        items.append(item)
    return items


def _take_pictures(pictures: list[Picture], notes: list[str], found: Sequence[Found]) -> None:
    """The first pictures, as many as a page may hold; a note of what is left out."""
    left_out = 0
    for one in found:
        for make in one.pictures:
            if len(pictures) < MOST_PICTURES:
                pictures.append(make())
            else:
                left_out += 1
    if left_out:
        notes.append(f"{left_out} more pictures were left out: a page holds {MOST_PICTURES}.")

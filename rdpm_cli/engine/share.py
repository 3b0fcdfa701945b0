"""export and import: a model file <-> a folder for the Hugging Face hub, with a model card."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from rdpm_cli import __version__, checkpoint, hub
from rdpm_cli.engine import look, report
from rdpm_cli.engine.report import Item
from rdpm_cli.errors import DataError, UsageError, rdpm_command
from rdpm_cli.runs import Result
from rdpm_cli.schema import dump_yaml

SHARED = ("generator", "tokenizer")  # kinds of model files that are exported


def export(ckpt: Path, out: Path, shown: Sequence[Path] = (), license: str | None = None) -> Result:
    """Write a model file as the new folder `out`. shown: samples and scores of this model, for its card.

    Raises UsageError for a folder with files in it, DataError for what another model has made."""
    content = checkpoint.load(ckpt)
    kind = checkpoint.FORMATS[content["format"]]
    if kind not in SHARED:
        raise UsageError(f"{ckpt} is a {kind}", f"export a {' or a '.join(SHARED)}")
    if license and not re.fullmatch(r"[a-z0-9.-]+", license):
        raise UsageError(f"--license {license!r} is not an identifier", "write mit, apache-2.0, cc-by-4.0 or other")
    items = report.read_items(shown)
    for item in items:
        if item.made_from.get(kind) != content["digest"]:
            raise DataError(f"{item.name} was not made by {ckpt}", "name samples and scores of this checkpoint")
    listed = [picture for item in items for picture in item.pictures]
    pictures = {f"picture-{number}.png": path.read_bytes() for number, (_, path) in enumerate(listed, 1)}
    titles = [title.partition(":")[0] for title, _ in listed]  # without the path
    card = _card(out.resolve().name, content, items, dict(zip(pictures, titles, strict=True)), license)
    hub.write(out, content, card, pictures)
    size = sum(path.stat().st_size for path in out.iterdir())
    values = {"folder": str(out), "digest": content["digest"], "files": sorted(p.name for p in out.iterdir())}
    return Result(f"{kind} exported", {**values, "bytes": size}, f"hf upload OWNER/NAME {out}")


def _card(
    title: str, content: dict[str, Any], items: Sequence[Item], pictures: dict[str, str], license: str | None
) -> str:
    """The model card of a model file's content. pictures: titles by file name."""
    kind, values = checkpoint.FORMATS[content["format"]], look.described(content, title)
    parts = {kind: content, "tokenizer": content.get("tokenizer", content)}
    of_parts = {part: each["provenance"].get("recipe") or {} for part, each in parts.items()}
    recipes = {
        part: dump_yaml({"seed": recipe.get("seed"), part: recipe[part]})
        for part, recipe in of_parts.items()
        if part in recipe
    }
    origin, scores = content["provenance"], report.read_scores(items)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True, autoescape=False
    )
    return environment.get_template("card.md.jinja").render(
        title=title, kind=kind, license=license, version=__version__, values=values, pictures=pictures,
        classes=len(content["class_names"]), recipes=recipes,
        data=(origin.get("reference") or origin.get("data") or {}).get("digest"),
        scores=f"#{report.as_markdown('Scores', scores)}" if scores else "",
    )  # fmt: skip


def import_folder(folder: Path, out: Path) -> Result:
    """Write the model file that a folder was made from. Raises CheckpointError, and UsageError if `out` exists."""
    if out.exists():
        raise UsageError(f"{out} exists already", "name another file, or remove it")
    facts = look.inspect(str(folder)).values  # builds the networks, and so finds what does not fit before it writes
    checkpoint.save(out, checkpoint.load(folder))
    kind = facts["kind"]
    values = {kind: str(out), "digest": facts["digest"], "parameters": facts["parameters"]}
    command = ("sample", "--ckpt", out) if kind == "generator" else ("reconstruct", "IMAGES", "OUT", "--tokenizer", out)
    return Result(f"{kind} imported", values, rdpm_command(*command))

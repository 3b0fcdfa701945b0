"""export and import: a model file <-> a folder for the Hugging Face hub, with a model card."""

from collections.abc import Sequence
from pathlib import Path

import jinja2

from rdpm_cli import __version__, checkpoint, hub, recipes
from rdpm_cli.engine import look, report
from rdpm_cli.engine.report import Item
from rdpm_cli.errors import DataError, UsageError, rdpm_command
from rdpm_cli.recipes import Recipe
from rdpm_cli.runs import Result

SHARED = ("generator", "tokenizer")  # kinds of model files that are exported


def export(ckpt: Path, out: Path, shown: Sequence[Path] = (), license: str | None = None) -> Result:
    """Write a model file as the new folder `out`. shown: samples and scores of this model, for its card.

    Raises UsageError for a folder with files in it, DataError for what another model has made."""
    content = checkpoint.load(ckpt)
    kind = checkpoint.FORMATS[content["format"]]
    if kind not in SHARED:
        raise UsageError(f"{ckpt} is a {kind}", f"export a {' or a '.join(SHARED)}")
    items = report.read_items(shown)
    for item in items:
        if item.made_from.get(kind) != content["digest"]:
            raise DataError(f"{item.name} was not made by {ckpt}", "name samples and scores of this checkpoint")
    listed = [picture for item in items for picture in item.pictures]
    pictures = {f"picture-{number}.png": path.read_bytes() for number, (_, path) in enumerate(listed, 1)}
    titles = [title.partition(":")[0] for title, _ in listed]  # without the path
    card = _card(out.resolve().name, kind, ckpt, items, dict(zip(pictures, titles, strict=True)), license)
    hub.write(out, content, card, pictures)
    size = sum(path.stat().st_size for path in out.iterdir())
    values = {"folder": str(out), "digest": content["digest"], "files": sorted(p.name for p in out.iterdir())}
    return Result(f"{kind} exported", {**values, "bytes": size}, f"hf upload OWNER/NAME {out}")


def _card(
    title: str, kind: str, ckpt: Path, items: Sequence[Item], pictures: dict[str, str], license: str | None
) -> str:
    """The model card. pictures: titles by file name."""
    values = look.inspect(str(ckpt)).values
    origin, rows = values["provenance"], report.read_scores(items)
    store = origin.get("reference") or origin.get("data") or {}
    recipe = recipes.to_yaml(Recipe.model_validate(origin["recipe"])) if origin.get("recipe") else ""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True, autoescape=False
    )
    return environment.get_template("card.md.jinja").render(
        title=title, kind=kind, license=license, version=__version__, values=values, data=store.get("digest"),
        classes=len(values.get("class_names") or ()), pictures=pictures, recipe=recipe,
        scores=report.as_markdown("Scores", rows) if rows else "",
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

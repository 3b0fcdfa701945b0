"""eval report: run folders, code stores, sample folders, model files and score files -> one page, or tables.

Everything is recognised by its content. A page is one HTML file with its pictures inside, from `report.html.jinja`;
`md` is a table of the scores, `json` holds everything but the pictures."""

import base64
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from rdpm_cli import __version__, files, recipes
from rdpm_cli.data.pictures import read_png
from rdpm_cli.engine import look
from rdpm_cli.errors import DataError, UsageError
from rdpm_cli.runs import Result
from rdpm_cli.schema import parse_yaml
from rdpm_cli.training.log import read_metrics

STAGES = ("judge", "tokenizer", "store", "generator", "samples", "reconstructions", "score")  # in the data's order
COMMANDS = {"train-tokenizer": "tokenizer", "train-gen": "generator", "train-judge": "judge"}
DEMO_PARTS = ("runs/judge", "runs/tokenizer", "codes", "runs/generator", "samples", "reconstructions", "result.json")
# dotted keys of what `rdpm inspect` says: the digests of what something was made from, by role, and its facts
ORIGINS = {
    "data.digest": "images", "provenance.data.digest": "images", "tokenizer": "tokenizer",
    "tokenizer.digest": "tokenizer", "made_from.tokenizer": "tokenizer", "provenance.store.digest": "store",
    "made_from.checkpoint": "generator",
}  # fmt: skip
FACTS = {
    "parameters": "parameters", "config.family": "family", "config.network.depth": "depth", "config.classes": "classes",
    "config.quantizer.steps": "T", "config.quantizer.codes": "K", "provenance.heldout_accuracy": "held-out accuracy",
    "samples": "images",
    **{key: key for key in ("images", "views", "codes", "grid", "bad", "resolution", "flip", "latents")},
}  # fmt: skip
PICTURES = {  # in a folder; of several files the last one
    "Curves": "curves.png", "Preview": "previews/step-*", "Grid": "previews/grid.png",
    "Partial decodes, t = 1 to T": "previews/steps.png",
}  # fmt: skip
HINT = "give runs, code stores, sample folders, a demo's folder, .pt files or what `rdpm eval ... --json` printed"
SPECIAL = ("edit", "reject", "perturb", "dtype_cut")  # options that make scores incomparable
SETTINGS = ("type", "weight", "bias", "T")  # columns of the paper's tables that are no scores
MAX_PICTURES, MAX_PICTURE_SIZE = 24, (1120, 1400)  # on a page; pixels

# metric -> label, +1 if higher is better, -1 if lower is better, 0 if neither
METRICS = {
    "fid": ("FID", -1), "sfid": ("sFID", -1), "rfid": ("rFID", -1), "pfid": ("pFID", -1), "kid": ("KID", -1),
    "frechet_distance": ("Fréchet distance", -1), "spatial_frechet_distance": ("spatial Fréchet distance", -1),
    "frechet_distance_heldout": ("Fréchet distance of held-out images", 0), "kernel_distance": ("kernel distance", -1),
    "inception_score": ("IS", 1), "classifier_score": ("classifier score", 1), "precision": ("precision", 1),
    "recall": ("recall", 1), "density": ("density", 1), "coverage": ("coverage", 1), "mind": ("MIND", -1),
    "cmmd": ("CMMD", -1), "fd_infinity": ("FD∞", -1), "fdr": ("FDr", -1), "near_copies": ("near copies", -1),
    "near_copies_features": ("near copies by features", -1), "authpct": ("authentic share", 1),
    "recalled": ("recalled under the training noise", -1), "recalled_unseen": ("recalled under other noise", 0),
    "class_accuracy": ("class accuracy", 1), "validity": ("validity, dB", 1),
    "psnr": ("PSNR, dB", 1), "ssim": ("SSIM", 1), "lpips_alex": ("LPIPS (alex)", -1),
    "lpips_vgg": ("LPIPS (vgg)", -1), "mse": ("MSE", -1), "latent_mse": ("latent error", -1),
    "parameters": ("parameters", 0),
}  # fmt: skip

Row = dict[str, Any]  # a figure of published.yaml by field; a table of them, or a row of it


@dataclass
class Item:
    """One thing of the chain from images to scores. made_from: role -> digest, as its own record says."""

    stage: str
    name: str
    digest: str = ""
    made_from: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    held_out: list[tuple[float, float]] = field(default_factory=list)  # accuracies by t: of the model, model-free
    pictures: list[tuple[str, Path]] = field(default_factory=list)  # title, file
    record: dict[str, Any] = field(default_factory=dict)  # of a score file or a scored folder


@dataclass
class Score:
    """One value of one metric. value: None where it was not computed, with the reason in `note`."""

    source: str
    target: str
    metric: str
    value: float | None
    n: int | None
    spread: float | None
    interval: list[float] | None
    extractor: str
    reference: str
    options: dict[str, Any]
    note: str = ""
    best: bool = False  # among the scores that it can be compared with

    @property
    def text(self) -> str:
        """`12.34 ± 0.05 (11.9 to 12.8)`: value, spread, 95% interval."""
        spread = f" ± {self.spread:.2g}" if self.spread is not None else ""
        interval = " ({:.4g} to {:.4g})".format(*self.interval) if self.interval else ""
        return "not computed" if self.value is None else f"{self.value:.4g}{spread}{interval}"

    @property
    def setting(self) -> tuple[Any, ...]:
        """What two scores must share to be compared; edits and best-of-n samples only with their like."""
        special = (str(self.options.get(name)) for name in SPECIAL)
        return self.metric, self.n, self.extractor, self.reference, *special


def read_items(paths: Sequence[Path]) -> list[Item]:
    """Read everything, in the order of the data; a demo's folder counts as its parts. Raises DataError, UsageError."""
    parts: list[Path] = []
    for path in paths:
        if not path.exists():
            raise UsageError(f"{path} does not exist", HINT)
        demo = (path / "result.json").is_file() and (path / "runs").is_dir()
        parts += [path / part for part in DEMO_PARTS if (path / part).exists()] if demo else [path]
    return sorted((_read(part) for part in dict.fromkeys(parts)), key=lambda item: STAGES.index(item.stage))


def _read(path: Path) -> Item:
    """An item by its content, as `rdpm inspect` describes it. Raises DataError."""
    if path.suffix == ".json":
        record = files.read_json(path)
        if not isinstance(record, dict) or not any(name in record for name in (*METRICS, "value", "rows")):
            raise DataError(f"{path} holds no scores", HINT)
        roles = {"generator": "checkpoint", "tokenizer": "tokenizer"}
        made_from = {role: record[key] for role, key in roles.items() if record.get(key)}
        sheet = Path(record.get("sheet") or "")
        pictures = [(f"Closest pairs, sample and training image: {path}", sheet)] if sheet.is_file() else []
        return Item("score", str(path), made_from=made_from, record=record, pictures=pictures)
    values = look.inspect(str(path)).values
    stage = {"code store": "store"}.get(values["kind"], values["kind"])
    stage = "reconstructions" if values.get("format") == "rdpm-reconstructions" else stage
    if stage == "run":
        item = _read_run(path, values["settings"])
    elif stage not in STAGES:
        raise DataError(f"{path} is not something a report can show", HINT)
    else:
        flat = _flat(values)
        prefixes = (f"provenance.recipe.{stage}.", "config.", "options.")
        prefix = next((p for p in prefixes if any(key.startswith(p) for key in flat)), "options.")
        item = Item(
            stage, str(path), values.get("digest", ""),
            {role: str(flat[key]) for key, role in ORIGINS.items() if flat.get(key)},
            {name: flat[key] for key, name in FACTS.items() if key in flat},
            {key.removeprefix(prefix): value for key, value in flat.items() if key.startswith(prefix)},
        )  # fmt: skip
        if scores := values.get("scores"):
            reference = {"name": (values.get("reference") or {}).get("source", "")}
            item.record = {"metric": "reconstruction", "target": {"name": str(path)}, "reference": reference, **scores}
    matches = {title: sorted(path.glob(pattern)) for title, pattern in PICTURES.items()}
    item.pictures = [(f"{title}: {path}", files_of[-1]) for title, files_of in matches.items() if files_of]
    return item


def _read_run(path: Path, settings: dict[str, Any]) -> Item:
    """A training's folder, finished or not."""
    stage, log = COMMANDS[settings["command"]], read_metrics(path)
    final = path / f"{stage}.pt"
    item = _read(final) if final.is_file() else Item(stage, "", facts={"finished": "no"})
    item.name, item.settings = str(path), _flat(settings["recipe"][stage])
    item.facts["steps"] = log[-1]["step"] if log else 0
    for row in log:
        if "heldout/accuracy" in row:  # the last measurement counts
            item.held_out = list(zip(row["heldout/accuracy"], row["heldout/baseline"], strict=True))
    return item


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of nested mappings by dotted name."""
    leaves: dict[str, Any] = {}
    for name, value in values.items():
        leaves |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return leaves


def read_scores(items: Sequence[Item]) -> list[Score]:
    """Every score of the items; `best` is marked among scores of one metric, N, extractor and reference."""
    scores = [score for item in items if item.record for score in _scores_of(item)]
    for score in scores:
        better = METRICS.get(score.metric, ("", 0))[1]
        values = [better * s.value for s in scores if s.setting == score.setting and s.value is not None]
        if score.value is not None and better and len(values) > 1:
            score.best = better * score.value == max(values)
    return scores


def _scores_of(item: Item) -> Iterator[Score]:
    """A record of one metric has `value`, one of several has the metrics as keys and `METRIC_...` for what follows.

    That of `eval baselines` has `rows`, each of which is read as a record of several."""
    record, single = item.record, "value" in item.record
    for row_name, row in record.get("rows", {}).items():
        columns = {metric: row[metric] for metric in METRICS if metric in row}
        scores: dict[str, Any] = {metric: column["mean"] for metric, column in columns.items()}
        scores["spread_over_seeds"] = {metric: column["std"] for metric, column in columns.items()}
        of_row = {**record, **scores, "rows": {}, "n": row["n"], "target": f"{row_name}: {row['images']}"}
        yield from _scores_of(replace(item, record=of_row))
    heldout = record.get("heldout") or {}
    if any(name in heldout for name in METRICS):  # of `eval memory`
        yield from _scores_of(
            replace(item, record={**record, **heldout, "heldout": None, "n": heldout["count"], "target": heldout})
        )
    named = {name: record[name] for name in METRICS if name in record}
    if single:
        named = {record["metric"]: record["value"], **{k: v for k, v in named.items() if v is not None}}
    for metric, value in named.items():
        main = single and metric == record["metric"]
        key, prefix = ("value", "") if main else (metric, f"{metric}_")
        spreads = [record.get(f"{prefix}spread_over_{kind}") for kind in ("subsets", "splits")]
        reason = (record.get("not_computed") or {}).get(key, "")
        yield Score(
            item.name, _name(record.get("target")) or item.name, metric, value,
            n=record.get(f"{prefix}n") or record.get("n"),
            spread=spreads[0] or spreads[1] or (record.get("spread_over_seeds") or {}).get(key),
            interval=record.get(f"{prefix}ci95"),
            extractor=_name(record.get("extractor")),
            reference=_name(record.get("reference")) + (f", held-out {_name(heldout)}" if metric == "fdr" else ""),
            options={"checkpoint": record.get("checkpoint"), **(record.get("options") or {})},
            note=reason if value is None else "; ".join(record.get("notes") or []),
        )  # fmt: skip


def _name(part: Any) -> str:
    """A name with the start of the hash that tells it from others of the same name."""
    if not isinstance(part, Mapping):
        return str(part or "")
    return str(part.get("name", "")) + (f" ({part['sha256'][:8]})" if part.get("sha256") else "")


def read_published() -> list[Row]:
    """Every published figure of recipes/published.yaml, with its value as printed."""
    path = recipes.recipe_folder() / "published.yaml"
    figures: list[Row] = parse_yaml(path.read_text("utf-8"), str(path))
    return figures


def published_tables(items: Sequence[Item], scores: Sequence[Score]) -> list[Row]:
    """The published figures as printed, in a table a source, and `ours`: rows of our scores in the same columns.

    reasons: why a row of ours cannot be compared; empty where it can."""
    by_source: dict[str, list[Row]] = {}
    for figure in read_published():
        if "task" not in figure:  # speech, which `eval tts` prints
            by_source.setdefault(figure["source"], []).append(figure)
    tables = []
    for source, figures in by_source.items():
        settings = [name for name in SETTINGS if name in figures[0]]
        rows: dict[str, Row] = {}
        for figure in figures:
            name = figure["row"] if "row" in figure else figure["name"]
            row = rows.setdefault(name, {"name": name, "values": {key: figure[key] for key in settings}, "note": ""})
            row["values"][figure["metric"]] = figure["value"]
            row["note"] += figure.get("note", "")
        columns = [*settings, *dict.fromkeys(figure["metric"] for figure in figures)]
        ours = _our_rows(figures, items, scores)
        tables.append({"source": source, "columns": columns, "rows": list(rows.values()), "ours": ours})
    return tables


def _our_rows(figures: Sequence[Row], items: Sequence[Item], scores: Sequence[Score]) -> list[Row]:
    """Every target with one of the figures' scores; every generator where the figures are of sizes."""
    metrics, targets = {figure["metric"] for figure in figures}, dict[tuple[Any, ...], list[Score]]()
    for score in scores:
        if score.metric in metrics and score.value is not None:
            targets.setdefault((score.source, score.target, score.n), []).append(score)
    rows = [
        {"source": source, "target": target, "values": {score.metric: score.value for score in group},
         "reasons": _reasons(figures, group)}
        for (source, target, _), group in targets.items()
    ]  # fmt: skip
    for item in items if "depth" in figures[0] else []:
        if item.stage == "generator" and "parameters" in item.facts:
            reasons = _differences(figures, {"depth": item.facts.get("depth")})
            values = {"parameters": item.facts["parameters"]}
            rows.append({"source": item.name, "target": item.name, "values": values, "reasons": reasons})
    return rows


def _reasons(figures: Sequence[Row], group: Sequence[Score]) -> list[str]:
    """Why the scores of a target cannot be compared with published figures."""
    score, metrics = group[0], {score.metric for score in group}
    guidance = score.options.get("cfg_schedule", "constant") if score.options.get("cfg") else "none"
    facts = {"data": score.reference or score.target, "n": score.n, "guidance": guidance}
    if "target" in figures[0]:
        facts["target"] = score.target
    if metrics - {"psnr", "ssim"}:  # which compare pixels
        facts["extractor"] = score.extractor or "not recorded"
    reasons = _differences(figures, facts)
    reasons += [f"made with {name}" for name in SPECIAL if score.options.get(name)]
    return reasons + [figure["note"] for figure in figures if "note" in figure and figure["metric"] in metrics]


def _differences(figures: Sequence[Row], facts: Row) -> list[str]:
    """What none of the figures shares with `facts`: field of published.yaml -> value; names by what they contain."""
    differences = []
    for field_name, value in facts.items():
        published = dict.fromkeys(figure[field_name] for figure in figures if field_name in figure)
        label = "N" if field_name == "n" else field_name
        if not published:
            differences.append(f"its {label} is not stated")
        elif not any(one == value or (isinstance(value, str) and one in value.lower()) for one in published):
            differences.append(f"{label} {value}, not {' or '.join(map(str, published))}")
    return differences


def _unstated(table: Row) -> list[str]:
    """The reasons that lie with the source, which the page gives once a table."""
    return list(dict.fromkeys(text for row in table["ours"] for text in row["reasons"] if text.startswith("its ")))


def _data_uri(image: Image.Image) -> str:
    """The picture, scaled down to MAX_PICTURE_SIZE, as the address of an <img>."""
    image.thumbnail(MAX_PICTURE_SIZE, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def as_html(title: str, items: Sequence[Item], scores: Sequence[Score]) -> str:
    """The page."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    listed = [entry for item in items for entry in item.pictures]
    return environment.get_template("report.html.jinja").render(
        title=title, version=__version__, items=items, scores=scores,
        names={item.digest: item.name for item in items if item.digest},
        label_of=lambda metric: METRICS.get(metric, (metric, 0))[0],
        published=published_tables(items, scores), unstated_of=_unstated,
        held_out=[item for item in items if item.held_out],
        pictures=[(text, _data_uri(Image.fromarray(read_png(path)))) for text, path in listed[:MAX_PICTURES]],
        pictures_left_out=max(0, len(listed) - MAX_PICTURES),
    )  # fmt: skip


def as_markdown(title: str, scores: Sequence[Score]) -> str:
    """A table of the scores."""
    header = ["of", "metric", "value", "N", "extractor", "reference", "note"]
    rows = [[s.target, s.metric, s.text, str(s.n), s.extractor, s.reference, s.note] for s in scores]
    lines = (" | ".join(cell.replace("|", "\\|") for cell in row) for row in (header, ["---"] * len(header), *rows))
    return f"# {title}\n\n" + "".join(f"| {line} |\n" for line in lines)


def as_json(title: str, items: Sequence[Item], scores: Sequence[Score]) -> str:
    """Everything but the pictures."""
    chain = [{k: v for k, v in asdict(item).items() if k not in ("pictures", "record", "held_out")} for item in items]
    whole = {"title": title, "rdpm": __version__, "chain": chain, "scores": [asdict(s) for s in scores]}
    return json.dumps({**whole, "published": published_tables(items, scores)}, indent=2, allow_nan=False) + "\n"


FORMATS = {"html": as_html, "md": lambda title, items, scores: as_markdown(title, scores), "json": as_json}


def make_report(runs: list[Path], out: Path | None = None, form: str | None = None, title: str | None = None) -> Result:
    """Read RUNS and write one file in the format of `form` or of the suffix of `out`. Raises UsageError, DataError."""
    form = form or (out.suffix.lower()[1:] if out else "html")
    if form not in FORMATS:
        raise UsageError(f"{out}: no format has this suffix", "add --format html, md or json")
    target = out or Path(f"report.{form}")
    if target.is_dir() or target.resolve() in [path.resolve() for path in runs]:
        raise UsageError(f"{target} is a folder or an input", "name another file with --out")
    items = read_items(runs)
    scores = read_scores(items)
    content = FORMATS[form](title or "RDPM runs and scores", items, scores).encode(errors="backslashreplace")
    files.write_atomic(target, lambda file: file.write(content))
    values = {"report": str(target), "format": form, "bytes": len(content), "items": len(items), "scores": len(scores)}
    return Result("" if files.descriptor_of(target) == 1 else "report written", values)

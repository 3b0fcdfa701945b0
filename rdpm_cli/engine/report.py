"""eval report: run folders, code stores, sample folders, model files and score files -> one page, or tables.

Everything is recognised by its content. A page is one HTML file with its pictures inside, from `report.html.jinja`;
`md` and `csv` hold the scores, `json` everything but the pictures.
"""

import base64
import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2
import torch
import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from rdpm_cli import __version__, checkpoint, files, recipes
from rdpm_cli.codes.store import Manifest
from rdpm_cli.data import folder
from rdpm_cli.errors import DataError, UsageError
from rdpm_cli.generator import registry
from rdpm_cli.runs import Result
from rdpm_cli.tokenizer import model as tokenizer_model
from rdpm_cli.training.log import read_metrics

SUFFIXES = {".html": "html", ".htm": "html", ".md": "md", ".csv": "csv", ".json": "json"}
STAGES = ("judge", "tokenizer", "store", "generator", "samples", "reconstructions", "score")  # in the data's order
COMMANDS = {"train-tokenizer": "tokenizer", "train-gen": "generator", "train-judge": "judge"}
DEMO_PARTS = ("runs/judge", "runs/tokenizer", "codes", "runs/generator", "samples", "reconstructions", "result.json")
HINT = (
    "give run folders, code stores, sample folders, a demo's folder, .pt files or what `rdpm eval ... --json` printed"
)
MAX_PICTURES = 24  # on a page
MAX_PICTURE_SIZE = (1120, 1400)  # pixels

# metric -> label, +1 if higher is better, -1 if lower is better, 0 if neither
METRICS = {
    "fid": ("FID", -1), "sfid": ("sFID", -1), "rfid": ("rFID", -1), "kid": ("KID", -1),
    "frechet_distance": ("Fréchet distance", -1), "spatial_frechet_distance": ("spatial Fréchet distance", -1),
    "frechet_distance_heldout": ("Fréchet distance of held-out images", 0), "kernel_distance": ("kernel distance", -1),
    "inception_score": ("IS", 1), "classifier_score": ("classifier score", 1), "precision": ("precision", 1),
    "recall": ("recall", 1), "class_accuracy": ("class accuracy", 1), "psnr": ("PSNR, dB", 1), "ssim": ("SSIM", 1),
    "lpips_alex": ("LPIPS (alex)", -1), "lpips_vgg": ("LPIPS (vgg)", -1), "mse": ("MSE", -1),
    "latent_mse": ("latent error", -1), "parameters": ("parameters", 0),
}  # fmt: skip
KNOBS = ("cfg", "tau")  # sampling options whose trade-offs are drawn


@dataclass
class Item:
    """One thing of the chain from images to scores. made_from: role -> digest, as its own record says."""

    stage: str
    name: str
    digest: str = ""
    made_from: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    log: list[dict[str, Any]] = field(default_factory=list)
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


# ---- reading -----------------------------------------------------------------------------------------------------


def read_items(paths: Sequence[Path]) -> list[Item]:
    """Read everything, in the order of the data; a demo's folder counts as its parts. Raises DataError, UsageError."""
    for path in paths:
        if not path.exists():
            raise UsageError(f"{path} does not exist", HINT)
    parts = [part for path in paths for part in _parts(path)]
    return sorted((_read(part) for part in dict.fromkeys(parts)), key=lambda item: STAGES.index(item.stage))


def _parts(path: Path) -> Iterator[Path]:
    demo = (path / "result.json").is_file() and (path / "runs").is_dir()
    yield from (path / part for part in DEMO_PARTS if (path / part).exists()) if demo else [path]


def _read(path: Path) -> Item:
    readers: dict[str, Callable[[Path], Item]] = {
        "manifest.json": _read_store, "samples.json": _read_folder, "run.json": _read_run,
    }  # fmt: skip
    for name, reader in readers.items():
        if (path / name).is_file():
            return reader(path)
    if path.suffix == ".pt":
        return _read_model(path)
    if path.suffix == ".json":
        return _read_score(path)
    raise DataError(f"{path} is nothing that a report can show", HINT)


def _read_model(path: Path) -> Item:
    content = checkpoint.load(path)
    stage, config, provenance = checkpoint.FORMATS[content["format"]], content["config"], content["provenance"]
    made_from = {"images": (provenance.get("data") or {}).get("digest", "")} if stage == "tokenizer" else {}
    facts: dict[str, Any] = {"parameters": f"{_parameters(stage, path, content):,}"}
    if stage == "generator":
        made_from = {"tokenizer": content["tokenizer"]["digest"], "store": provenance["store"]["digest"]}
        facts |= {"family": config["family"], "depth": config["network"]["depth"], "classes": config["classes"]}
    elif stage == "tokenizer":
        quantizer = config["quantizer"]
        facts |= {"T": quantizer["steps"], "K": quantizer["codes"], "schedule": config["schedule"]["kind"]}
    else:
        facts |= {"held-out accuracy": provenance["heldout_accuracy"]}
    settings = dict(_flat((provenance.get("recipe") or {}).get(stage) or config))
    return Item(stage, str(path), content["digest"], made_from, facts, settings)


def _parameters(stage: str, path: Path, content: dict[str, Any]) -> int:
    if stage == "generator":
        return registry.parameters(registry.load(path).generator)
    if stage == "tokenizer":
        return tokenizer_model.parameters(tokenizer_model.unpack(content, str(path)))
    return sum(weight.numel() for weight in content["weights"].values() if isinstance(weight, torch.Tensor))


def _read_run(path: Path) -> Item:
    """A training's folder, finished or not."""
    record = files.read_json(path / "run.json")
    settings = record.get("settings") or {}
    stage = COMMANDS.get(settings.get("command", ""))
    if stage is None:
        raise DataError(f"{path} is not a training's folder", HINT)
    log = read_metrics(path)
    final = path / f"{stage}.pt"
    item = _read_model(final) if final.is_file() else Item(stage, "", facts={"finished": "no"})
    item.name, item.log = str(path), log
    item.facts["steps"] = log[-1]["step"] if log else 0
    item.settings = dict(_flat(settings.get("recipe", {}).get(stage, {})))
    previews = sorted((path / "previews").glob("step-*.png"))
    pictures = [("Curves", path / "curves.png"), *([("Last preview", previews[-1])] if previews else [])]
    item.pictures = [(f"{title}: {path}", file) for title, file in pictures if file.is_file()]
    return item


def _read_store(path: Path) -> Item:
    m = Manifest.load(path)
    shape = " × ".join(map(str, (m.steps, *m.grid)))
    facts = {"images": m.images, "views": m.views, "codes": f"{shape} of {m.codes}", "classes": len(m.class_names)}
    if m.bad:
        facts["left out"] = m.bad
    settings = m.model_dump(mode="json", include={"steps", "grid", "views", "flip", "latents", "seed", "transform"})
    made_from = {"images": m.data.digest, "tokenizer": m.tokenizer}
    return Item("store", str(path), m.digest(), made_from, facts, settings)


def _read_folder(path: Path) -> Item:
    """A folder of samples or reconstructions."""
    record = folder.read_record(path)
    stage = "samples" if record["format"] == "rdpm-samples" else "reconstructions"
    made_from = {("generator" if role == "checkpoint" else role): str(d) for role, d in record["made_from"].items()}
    facts = {"images": len(record["samples"]), "resolution": record["resolution"]}
    titles = {"grid.png": "Grid", "steps.png": "Partial decodes, t = 1 to T"}
    shown = [(f"{title}: {path}", path / "previews" / name) for name, title in titles.items()]
    reference = (record.get("reference") or {}).get("source", "")
    scores = {"metric": "reconstruction", "target": {"name": str(path)}, "reference": {"name": reference}}
    return Item(
        stage,
        str(path),
        made_from=made_from,
        facts=facts,
        settings=dict(_flat(record["options"])),
        pictures=[(title, file) for title, file in shown if file.is_file()],
        record={**scores, **record["scores"]} if record.get("scores") else {},
    )


def _read_score(path: Path) -> Item:
    record = files.read_json(path)
    if not isinstance(record, dict) or not any(name in record for name in (*METRICS, "value")):
        raise DataError(f"{path} holds no scores", HINT)
    made_from = {"generator": record["checkpoint"]} if record.get("checkpoint") else {}
    if record.get("tokenizer"):
        made_from["tokenizer"] = record["tokenizer"]
    return Item("score", str(path), made_from=made_from, record=record)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings by dotted name."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


# ---- scores ------------------------------------------------------------------------------------------------------


def read_scores(items: Sequence[Item]) -> list[Score]:
    """Every score of the items; `best` is marked among scores of one metric, N, extractor and reference."""
    scores = [score for item in items if item.record for score in _scores_of(item)]
    for score in scores:
        better = METRICS.get(score.metric, ("", 0))[1]
        values = [s.value for s in scores if _comparable(s) == _comparable(score) and s.value is not None]
        if score.value is not None and better and len(values) > 1:
            score.best = score.value == (max(values) if better > 0 else min(values))
    return scores


def _comparable(score: Score) -> tuple[Any, ...]:
    # Edits and best-of-n samples are compared only with their like.
    special = tuple(str(score.options.get(name)) for name in ("edit", "reject"))
    return score.metric, score.n, score.extractor, score.reference, *special


def _scores_of(item: Item) -> Iterator[Score]:
    """A record of one metric has `value`, one of several has the metrics as keys and `METRIC_...` for what follows."""
    record = item.record
    reasons = record.get("not_computed") or {}
    named = {name: record[name] for name in METRICS if name in record}
    single = "value" in record
    if single:
        named = {record["metric"]: record["value"], **{k: v for k, v in named.items() if v is not None}}
    for metric, value in named.items():
        main = single and metric == record["metric"]

        def entry(key: str, main: bool = main, metric: str = metric) -> Any:
            return record.get(key if main else f"{metric}_{key}")

        spread = entry("spread_over_subsets") or entry("spread_over_splits")
        spread = spread or (record.get("spread_over_seeds") or {}).get(metric)
        reason = reasons.get("value" if main else metric, "")
        options = {k: v for k, v in (record.get("options") or {}).items() if not isinstance(v, dict) or v}
        notes = record.get("notes") or []
        yield Score(
            source=item.name,
            target=_name(record.get("target")) or item.name,
            metric=metric,
            value=value,
            n=entry("n") or record.get("n"),
            spread=spread,
            interval=entry("ci95"),
            extractor=_name(record.get("extractor")),
            reference=_name(record.get("reference")),
            options=options,
            note=reason if value is None else "; ".join(notes),
        )


def _name(part: Any) -> str:
    """A name with the start of the hash that tells it from others of the same name."""
    if not isinstance(part, Mapping):
        return str(part or "")
    sha256 = part.get("sha256")
    return f"{part.get('name', '')} ({sha256[:8]})" if sha256 else str(part.get("name", ""))


def beside_published(items: Sequence[Item], scores: Sequence[Score]) -> list[dict[str, Any]]:
    """The published figures, each with our scores of the same metric and why the two cannot be compared."""
    rows: list[dict[str, Any]] = []
    for published in yaml.safe_load((recipes.recipe_folder() / "published.yaml").read_text()):
        ours = _ours(published, items, scores)
        rows += [{**published, "ours": value, "our_source": source, "reasons": why} for value, source, why in ours]
        if not ours:
            rows.append({**published, "ours": None, "our_source": "", "reasons": []})
    return rows


def _ours(
    published: Mapping[str, Any], items: Sequence[Item], scores: Sequence[Score]
) -> list[tuple[float, str, list[str]]]:
    if published["metric"] == "parameters":
        sized = [item for item in items if item.stage == "generator" and item.facts.get("depth") == published["depth"]]
        return [(float(item.facts["parameters"].replace(",", "")), item.name, []) for item in sized]
    if published["kind"] == "method":
        return []
    alike = [s for s in scores if s.metric == published["metric"] and s.value is not None]
    if published["kind"] == "evaluator":
        alike = [s for s in alike if "admnet_guided_upsampled_imagenet256" in s.target]
    return [(s.value, s.source, _reasons(published, s)) for s in alike if s.value is not None]


def _reasons(published: Mapping[str, Any], score: Score) -> list[str]:
    """Why a score of ours and a published figure cannot be compared; empty where they can."""
    reasons = []
    if published.get("data") and published["data"] not in (score.reference + score.target).lower():
        reasons.append(f"other images: {score.reference or score.target}")
    if published.get("n") != score.n:
        reasons.append(f"N = {score.n}, not {published['n']}" if published.get("n") else "its N is not stated")
    if published.get("extractor") and not score.extractor.startswith(published["extractor"]):
        reasons.append(f"extractor {score.extractor or 'not recorded'}")
    return [*reasons, *([published["note"]] if published.get("note") else [])]


# ---- pictures ----------------------------------------------------------------------------------------------------


def data_uri(image: Image.Image) -> str:
    """The picture, scaled down to MAX_PICTURE_SIZE, as the address of an <img>."""
    image.thumbnail(MAX_PICTURE_SIZE, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def trade_offs(scores: Sequence[Score]) -> list[tuple[str, str]]:
    """(title, data URI) of every distance or accuracy against guidance or temperature, at one N and extractor."""
    plots = []
    for knob in KNOBS:
        usable = [s for s in scores if s.value is not None and isinstance(s.options.get(knob), int | float)]
        for key, group in groupby(sorted(usable, key=lambda s: repr(_comparable(s))), key=_comparable):
            points = sorted((float(s.options[knob]), s.value) for s in group if s.value is not None)
            if len({x for x, _ in points}) > 1:
                label = METRICS.get(key[0], (key[0], 0))[0]
                plots.append((f"{label} against {knob}, N = {key[1]}", _plot(points, knob, label)))
    return plots


def _plot(points: Sequence[tuple[float, float]], x: str, y: str) -> str:
    figure = Figure(figsize=(4.6, 2.9), dpi=120, layout="constrained")
    axis = figure.add_subplot()
    axis.plot(*zip(*points, strict=True), marker="o")
    axis.set(xlabel=x, ylabel=y)
    axis.grid(alpha=0.3)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return data_uri(Image.open(buffer))


def held_out_rows(item: Item) -> list[dict[str, float]]:
    """The last held-out measurement of a run by t: accuracy, model-free baseline, gap; empty for other families."""
    measured = [row for row in item.log if "heldout/accuracy" in row]
    if not measured:
        return []
    pairs = zip(measured[-1]["heldout/accuracy"], measured[-1]["heldout/baseline"], strict=True)
    return [{"t": t, "model": a, "baseline": b, "gap": a - b} for t, (a, b) in enumerate(pairs, 1)]


# ---- writing -----------------------------------------------------------------------------------------------------


def text_of(score: Score) -> str:
    """`12.34 ± 0.05 (11.9 to 12.8)`: value, spread, 95% interval."""
    if score.value is None:
        return "not computed"
    spread = f" ± {score.spread:.2g}" if score.spread is not None else ""
    interval = f" ({score.interval[0]:.4g} to {score.interval[1]:.4g})" if score.interval else ""
    return f"{score.value:.4g}{spread}{interval}"


def as_html(title: str, items: Sequence[Item], scores: Sequence[Score]) -> str:
    """The page."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    names = {item.digest: item.name for item in items if item.digest}
    pictures = [entry for item in items for entry in item.pictures]
    images = []
    for caption, path in pictures[:MAX_PICTURES]:
        try:
            with Image.open(path) as image:
                images.append((caption, data_uri(image.convert("RGB"))))
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read as an image: {error}", "remove it, or make it again") from error
    return environment.get_template("report.html.jinja").render(
        title=title,
        version=__version__,
        items=items,
        names=names,
        scores=scores,
        text_of=text_of,
        label_of=lambda metric: METRICS.get(metric, (metric, 0))[0],
        published=beside_published(items, scores),
        trade_offs=trade_offs(scores),
        held_out=[(item.name, rows) for item in items if (rows := held_out_rows(item))],
        pictures=images,
        pictures_left_out=max(0, len(pictures) - MAX_PICTURES),
    )


COLUMNS = (
    "source",
    "target",
    "metric",
    "value",
    "n",
    "spread",
    "interval",
    "extractor",
    "reference",
    "options",
    "note",
)


def as_csv(title: str, items: Sequence[Item], scores: Sequence[Score]) -> str:
    """One row a score."""
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({**asdict(s), "options": json.dumps(s.options, sort_keys=True)} for s in scores)
    return out.getvalue()


def as_markdown(title: str, items: Sequence[Item], scores: Sequence[Score]) -> str:
    """A table of the scores."""
    header = ["of", "metric", "value", "N", "extractor", "reference", "note"]
    rows = [[s.target, s.metric, text_of(s), str(s.n), s.extractor, s.reference, s.note] for s in scores]
    lines = [header, ["---"] * len(header), *rows]
    table = "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)
    return f"# {title}\n\n{table}"


def as_json(title: str, items: Sequence[Item], scores: Sequence[Score]) -> str:
    """Everything but the pictures."""
    chain = [{k: v for k, v in asdict(item).items() if k not in ("pictures", "record", "log")} for item in items]
    whole = {"title": title, "rdpm": __version__, "chain": chain, "scores": [asdict(s) for s in scores]}
    return files.json_text({**whole, "published": beside_published(items, scores)})


FORMATS = {"html": as_html, "md": as_markdown, "csv": as_csv, "json": as_json}


def make_report(
    runs: Sequence[Path], out: Path | None = None, form: str | None = None, title: str | None = None
) -> Result:
    """Read RUNS and write one file in the format of `form` or of the suffix of `out`. Raises UsageError, DataError."""
    form = form or SUFFIXES.get(out.suffix.lower() if out else ".html")
    if form is None:
        raise UsageError(f"{out}: no format has this suffix", "add --format html, md, csv or json")
    target = out or Path(f"report.{form}")
    if target.resolve() in [path.resolve() for path in runs]:
        raise UsageError(f"{target} would overwrite an input", "name another file with --out")
    if target.is_dir():
        raise UsageError(f"{target} is a folder", "name a file with --out")
    items = read_items(runs)
    scores = read_scores(items)
    content = FORMATS[form](title or "RDPM runs and scores", items, scores).encode()
    files.write_atomic(target, lambda file: file.write(content))
    values = {"report": str(target), "format": form, "bytes": len(content), "items": len(items), "scores": len(scores)}
    return Result("report written", values)

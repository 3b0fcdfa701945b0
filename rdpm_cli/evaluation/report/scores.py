"""Scores: read from JSON records of `rdpm eval`, grouped for a table, put beside published figures."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rdpm_cli.errors import some_of
from rdpm_cli.evaluation.report.parts import Item, Score, is_number, said, unique
from rdpm_cli.evaluation.report.published import IMAGENET, PUBLISHED, Published


@dataclass(frozen=True)
class Metric:
    """How a metric is written. better: -1 where lower is, 1 where higher is, 0 where neither; form: of its values."""

    label: str
    better: int
    form: str = ".4f"


METRICS = {
    "fid": Metric("FID", -1, ".3f"),
    "sfid": Metric("sFID", -1),
    "rfid": Metric("rFID", -1, ".3f"),
    "frechet_distance": Metric("Fréchet distance", -1, ".3f"),
    "frechet_distance_heldout": Metric("the same, held-out images", 0, ".3f"),
    "kid": Metric("KID", -1, ".5f"),
    "spatial_frechet_distance": Metric("Spatial Fréchet distance", -1, ".3f"),
    "kernel_distance": Metric("Kernel distance", -1, ".5f"),
    "inception_score": Metric("IS", 1, ".2f"),
    "inception_score_order_free": Metric("IS, order-free", 1, ".2f"),
    "classifier_score": Metric("Classifier score", 1, ".3f"),
    "classifier_score_order_free": Metric("Classifier score, order-free", 1, ".3f"),
    "precision": Metric("Precision", 1),
    "recall": Metric("Recall", 1),
    "class_accuracy": Metric("Class accuracy", 1),
    "psnr": Metric("PSNR, dB", 1, ".2f"),
    "ssim": Metric("SSIM", 1),
    "lpips_alex": Metric("LPIPS (alex)", -1),
    "lpips_vgg": Metric("LPIPS (vgg)", -1),
    "mse": Metric("MSE", -1, ".5f"),
    "frechet_distance_recon": Metric("Fréchet distance", -1, ".3f"),
    "latent_mse": Metric("Latent error", -1),
    "parameters": Metric("Parameters", 0, ",.0f"),
}
OF_RECONSTRUCTIONS = frozenset(
    ("rfid", "psnr", "ssim", "lpips_alex", "lpips_vgg", "mse", "frechet_distance_recon", "latent_mse")
)
OPTIONS = (
    "cfg", "cfg_schedule", "cfg_power", "cfg_first", "cfg_last", "draw", "tau", "tau_schedule", "tau_end", "top_k",
    "top_p", "skip_steps", "steps", "schedule", "z_temp", "conf", "conf_temp", "conf_anneal", "cfg_mode", "seed",
)  # fmt: skip
CHOSEN = ("edit", "reject")  # of samples that are not plain ones


def metric(name: str) -> Metric:
    """Of any name; one that is not known is written as it stands."""
    return METRICS.get(name, Metric(name, 0, ".4g"))


def written(name: str, value: float | None) -> str:
    """A value of a metric."""
    return "not computed" if value is None else format(value, metric(name).form)


def between(score: Score) -> str:
    """Its interval; empty where there is none."""
    form = metric(score.metric).form
    return f"{score.interval[0]:{form}} to {score.interval[1]:{form}}" if score.interval else ""


def notes(found: Sequence[Score]) -> list[str]:
    """What to know of the scores, each once with the files it is said of."""
    said_of: dict[str, list[str]] = {}
    for s in found:
        absent = f"{metric(s.metric).label} not computed: {s.note or 'no reason given'}"
        if note := absent if s.value is None else s.note:
            said_of.setdefault(note, []).append(s.source)
    return [f"{note} ({some_of(unique(sources), 4)})" for note, sources in said_of.items()]


def is_record(record: Any) -> bool:
    """Is it what `rdpm eval ... --json` prints, or the result of a demo?"""
    return isinstance(record, dict) and ("reference" in record or "metric" in record) and any(_values(record))


def read(record: Mapping[str, Any], source: str) -> list[Score]:
    """The scores of a record; source: what it was read from."""
    reasons = _section(record, "not_computed")
    return [_score(record, name, raw, source, reasons.get(name)) for name, raw in _values(record)]


def _values(record: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(metric, number, or for a record of one metric the record) of everything that a record has a value for."""
    if "value" in record and isinstance(record.get("metric"), str):
        yield record["metric"], record
        if "order_free" in record:
            yield f"{record['metric']}_order_free", record["order_free"]
    for name, raw in record.items():
        if name in METRICS and (raw is None or is_number(raw)):
            yield name, raw


def _score(record: Mapping[str, Any], name: str, raw: Any, source: str, reason: object) -> Score:
    of_reconstructions = record.get("metric") == "reconstruction"
    alone = raw is record
    value = record["value"] if alone else raw
    finite = float(value) if is_number(value) and math.isfinite(value) else None
    count = _more(record, alone, name, "n") or record.get("n")
    spread, over = _spread(record, alone, name)
    missing = reason or (_section(record, "not_computed").get("value") if alone else None)
    notes = [str(missing)] if finite is None and missing else _notes(record)
    return Score(
        source=source,
        target=_name(record.get("target")),
        metric="frechet_distance_recon" if of_reconstructions and name == "frechet_distance" else name,
        value=finite,
        n=count if isinstance(count, int) else None,
        spread=spread,
        spread_over=over,
        interval=_interval(record, alone, name),
        extractor=_known(record.get("extractor")),
        reference=_known(record.get("reference")),
        options=_options(record),
        note="; ".join(notes),
    )


def _options(record: Mapping[str, Any]) -> dict[str, Any]:
    """How samples were drawn, by which checkpoint, and what was done to them beside."""
    given = _section(record, "options")
    found = {key: value for key, value in given.items() if key in OPTIONS}
    if checkpoint := record.get("checkpoint") or given.get("checkpoint"):
        found["checkpoint"] = str(checkpoint)[:8]
    for key in CHOSEN:
        if isinstance(given.get(key), Mapping):
            found[key] = ", ".join(f"{name} {value}" for name, value in given[key].items() if is_number(value))
    return found


def _notes(record: Mapping[str, Any]) -> list[str]:
    found = record.get("notes")
    return [str(note) for note in found] if isinstance(found, list) else []


def _more(record: Mapping[str, Any], alone: bool, name: str, key: str) -> Any:
    """What a record says beside a value: as `key` where the value stands alone, else as `name_key`."""
    return record.get(key if alone else f"{name}_{key}")


def _interval(record: Mapping[str, Any], alone: bool, name: str) -> tuple[float, float] | None:
    """Of confidence."""
    found = _more(record, alone, name, "ci95")
    if found is None and name.endswith("_order_free"):
        found = record.get("order_free_ci95")
    return (float(found[0]), float(found[1])) if _is_pair(found) else None


def _spread(record: Mapping[str, Any], alone: bool, name: str) -> tuple[float | None, str]:
    """(standard deviation, over what)."""
    for parts in ("subsets", "splits"):
        found = _more(record, alone, name, f"spread_over_{parts}")
        if is_number(found):
            return float(found), f"over {_more(record, alone, name, parts) or 'the'} {parts}"
    of_seeds = _section(record, "spread_over_seeds").get(name)
    if is_number(of_seeds):
        return float(of_seeds), f"over {len(record.get('seeds') or ())} noise seeds"
    return None, ""


def _section(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = record.get(name)
    return found if isinstance(found, Mapping) else {}


def _is_pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(is_number(end) for end in value)


def _known(part: Any) -> str:
    """A name, with the beginning of the sha256 that tells it from others of that name."""
    sha256 = part.get("sha256") if isinstance(part, Mapping) else None
    return f"{_name(part)} ({sha256[:8]})" if isinstance(sha256, str) and sha256 else _name(part)


def _name(part: Any) -> str:
    return str(part.get("name", "")) if isinstance(part, Mapping) else str(part or "")


# ---- a table of our own --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Row:
    """Scores of one target under one setting, by metric. best: of which metrics it has the best value of its like."""

    source: str
    target: str
    n: int | None
    extractor: str
    reference: str
    options: Mapping[str, Any]
    scores: Mapping[str, Score]
    best: frozenset[str] = frozenset()


def rows(scores: Sequence[Score]) -> list[Row]:
    """Computed scores, one row a source and setting. Best is named among rows of one N, extractor and reference."""
    groups: dict[tuple[Any, ...], dict[str, Score]] = {}
    for score in scores:
        if score.value is not None:
            key = (score.source, score.target, score.n, score.extractor, score.reference, _key(score.options))
            groups.setdefault(key, {})[score.metric] = score
    found = [
        Row(source=source, target=target, n=n, extractor=extractor, reference=reference,
            options=next(iter(group.values())).options, scores=group)
        for (source, target, n, extractor, reference, _), group in groups.items()
    ]  # fmt: skip
    return [_with_best(row, found) for row in found]


def _key(options: Mapping[str, Any]) -> str:
    return repr(sorted(options.items()))


def _like(row: Row) -> tuple[Any, ...]:
    """What rows share that can be compared: best of n, or of edits, is another thing than samples."""
    return row.n, row.extractor, row.reference, *(row.options.get(key) for key in CHOSEN)


def _with_best(row: Row, every: Sequence[Row]) -> Row:
    alike = [other for other in every if _like(other) == _like(row)]
    best = set()
    for name, score in row.scores.items():
        values = [o.scores[name].value for o in alike if name in o.scores]
        better, own = metric(name).better, score.value
        if (
            len(values) > 1
            and better
            and own is not None
            and all(better * (own - v) >= 0 for v in values if v is not None)
        ):
            best.add(name)
    return Row(**{**row.__dict__, "best": frozenset(best)})


def by_kind(found: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows for a table of their own, by its title."""
    of_recons = [row for row in found if OF_RECONSTRUCTIONS & set(row.scores)]
    others = [row for row in found if row not in of_recons]
    tables = {"Samples and images": others, "Reconstructions": of_recons}
    return {title: rows for title, rows in tables.items() if rows}


def columns(found: Sequence[Row]) -> tuple[list[str], list[str]]:
    """(metrics, options) that a table of the rows needs, in their usual order."""
    metrics = unique(name for row in found for name in row.scores)
    known = [name for name in METRICS if name in metrics]
    options = [name for name in OPTIONS if any(name in row.options for row in found)]
    return known + [name for name in metrics if name not in METRICS], options


# ---- beside published figures --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Beside:
    """A published figure, ours beside it, and why the two cannot be compared; no reasons: they can."""

    published: Published
    score: Score | None
    reasons: tuple[str, ...] = ()


def beside_published(items: Sequence[Item], scores: Sequence[Score]) -> list[Beside]:
    """Every published figure, once for each of our scores that stands beside it, or once with none."""
    found, own = [], [*_sizes(items), *scores]
    for published in PUBLISHED:
        ours = [] if published.of == "other" else [s for s in own if _stands_beside(s, published, items)]
        found += [Beside(published=published, score=s, reasons=_reasons(published, s)) for s in ours]
        if not ours:
            found.append(Beside(published=published, score=None))
    return found


def _sizes(items: Sequence[Item]) -> list[Score]:
    """Parameters of the generators."""
    sized = [(item.name, item.settings.get("parameters")) for item in items if item.stage == "generator"]
    return [Score(source=name, target=name, metric="parameters", value=float(n)) for name, n in sized if is_number(n)]


def _stands_beside(score: Score, published: Published, items: Sequence[Item]) -> bool:
    if score.metric != published.metric or score.value is None:
        return False
    if published.of == "evaluator":
        return "admnet_guided_upsampled_imagenet256" in score.target
    if published.depth is not None:
        maker = next((item for item in items if item.name == score.source), None)
        return maker is not None and maker.settings.get("network.depth") == published.depth
    return True


def _reasons(published: Published, score: Score) -> tuple[str, ...]:
    """Why a score and a published figure cannot be compared."""
    if published.metric == "parameters":
        return ()
    found = []
    if published.data == IMAGENET and IMAGENET not in (score.reference + score.target).lower():
        found.append(f"images: {score.reference or score.target or 'not recorded'}, not ImageNet")
    if published.n is None:
        found.append("its N is not stated")
    elif score.n != published.n:
        found.append(f"N = {'not recorded' if score.n is None else f'{score.n:,}'}, not {published.n:,}")
    if published.extractor and not score.extractor.startswith(published.extractor):
        found.append(f"extractor: {score.extractor or 'not recorded'}, not {published.extractor}")
    return (*found, published.note) if published.note else tuple(found)


# ---- trade-offs ----------------------------------------------------------------------------------------------------

KNOBS = ("cfg", "tau")
Point = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class TradeOff:
    """A metric against a sampling option, or, as that option moves, against another metric.

    curves: by the other options, a Point (option or other metric, value, option) a setting, in its order. like: N,
    extractor and reference that all values share.
    """

    metric: str
    knob: str
    against: str | None
    curves: Mapping[str, list[Point]]
    like: str


DISTANCES, RICHNESS = ("fid", "frechet_distance"), ("inception_score", "classifier_score", "class_accuracy", "recall")


def trade_offs(scores: Sequence[Score]) -> list[TradeOff]:
    """Of every metric with values at two or more settings of cfg or tau, among scores that can be compared."""
    likes: dict[str, list[Row]] = {}
    for row in rows(scores):
        if all(is_number(row.options.get(knob)) for knob in KNOBS):
            count = "" if row.n is None else f"N = {row.n:,}"
            like = ", ".join(filter(None, (count, row.extractor, row.reference and f"against {row.reference}")))
            likes.setdefault(like, []).append(row)
    found = []
    for like, group in likes.items():
        names = [name for name in columns(group)[0] if metric(name).better and name not in OF_RECONSTRUCTIONS]
        for knob in KNOBS:
            if len({row.options[knob] for row in group}) < 2:
                continue
            for name in names:
                others = [None, *(n for n in names if n in RICHNESS)] if name in DISTANCES else [None]
                found += [TradeOff(metric=name, knob=knob, against=other, like=like,
                                   curves=_curves(group, name, knob, other)) for other in others]  # fmt: skip
    return [one for one in found if any(len(points) > 1 for points in one.curves.values())]


def _curves(group: Sequence[Row], name: str, knob: str, other: str | None) -> dict[str, list[Point]]:
    """The points of each setting of the other options that differ."""
    every = (*OPTIONS, *CHOSEN, "checkpoint")
    differ = [key for key in every if key != knob and len({repr(row.options.get(key)) for row in group}) > 1]
    found: dict[str, list[Point]] = {}
    for row in sorted(group, key=lambda row: float(row.options[knob])):
        value, along = _value(row, name), float(row.options[knob]) if other is None else _value(row, other)
        if value is not None and along is not None:
            label = ", ".join(f"{key} = {said(row.options.get(key))}" for key in differ) or metric(name).label
            found.setdefault(label, []).append((along, value, float(row.options[knob])))
    return dict(sorted(found.items()))


def _value(row: Row, name: str) -> float | None:
    return row.scores[name].value if name in row.scores else None

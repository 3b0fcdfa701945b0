"""What `eval report` is given, recognised by its contents and read into items of the chain, scores and pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from rdpm_cli import files, modelfile
from rdpm_cli.engine import report_pictures
from rdpm_cli.engine.report_pictures import Row
from rdpm_cli.errors import DataError, some_of
from rdpm_cli.evaluation.report import scores
from rdpm_cli.evaluation.report.parts import STAGES, Claim, Item, Picture, Score, Stage, flat, said

KNOWN = (
    "a report takes run folders of train-tokenizer, train-gen and a judge, code stores, folders of samples or "
    "reconstructions, a demo's folder, .pt files, and what `rdpm eval ... --json` prints"
)
MODELS: dict[str, Literal["tokenizer", "generator", "judge"]] = {
    "train-tokenizer": "tokenizer", "train-gen": "generator", "train-judge": "judge",
}  # fmt: skip
ROLES: dict[str, Stage] = {"checkpoint": "generator", "tokenizer": "tokenizer", "store": "store"}  # in samples.json
DEMO = ("runs/judge", "runs/tokenizer", "codes", "runs/generator", "samples", "reconstructions", "result.json")
PLAN = {
    "steps", "grid", "codes", "channels", "views", "flip", "latents", "seed", "transform", "resolution", "device",
    "precision", "micro_batch",
}  # fmt: skip


@dataclass(kw_only=True)
class Found:
    """One thing that was given. folder, count: of pictures, where they lie as files. pictures: made when asked for."""

    item: Item
    scores: list[Score] = field(default_factory=list)
    pictures: list[Callable[[], Picture]] = field(default_factory=list)
    folder: Path | None = None
    count: int = 0


def read(runs: Sequence[Path], with_pictures: bool) -> list[Found]:
    """Everything, in the order the data walks; what is given twice, once. Raises DataError, CheckpointError."""
    seen, found = set(), []
    for path in (part for run in runs for part in _parts(run)):
        if path.resolve() not in seen:
            seen.add(path.resolve())
            found.append(_recognise(path))
    if not with_pictures:
        for one in found:
            one.pictures = []
    order = list(STAGES)
    return sorted(_merged(found), key=lambda one: order.index(one.item.stage))


def _parts(path: Path) -> Iterator[Path]:
    """A demo's folder is what it holds; anything else is itself."""
    if (path / "result.json").is_file() and (path / "runs").is_dir():
        yield from (path / part for part in DEMO if (path / part).exists())
    else:
        yield path


def _recognise(path: Path) -> Found:
    """By what is inside. Raises DataError."""
    if path.is_dir():
        for name, reader in FOLDERS.items():
            if (path / name).is_file():
                return reader(path)
        raise DataError(f"{path} is no folder that a report knows", KNOWN)
    if path.suffix == ".pt":
        return _model(path)
    if path.suffix == ".json":
        return _score_file(path)
    raise DataError(f"{path} is no file that a report knows", KNOWN)


def _merged(found: Sequence[Found]) -> list[Found]:
    """A copy of a model that is given too, a run's file elsewhere, adds only its name."""
    kept: list[Found] = []
    for one in sorted(found, key=lambda one: not one.item.log):  # run folders first: they know most
        same = [
            k for k in kept if one.item.digest and (k.item.stage, k.item.digest) == (one.item.stage, one.item.digest)
        ]
        if same and one.item.stage in MODELS.values():
            also = ", ".join(filter(None, (same[0].item.facts.get("also"), one.item.name)))
            same[0].item = replace(same[0].item, facts={**same[0].item.facts, "also": also})
        else:
            kept.append(one)
    return sorted(kept, key=found.index)


# ---- models and the runs that train them ---------------------------------------------------------------------------


def _model(path: Path) -> Found:
    content = modelfile.load(path)
    stage: Any = modelfile.FORMATS[content["format"]]
    provenance = content["provenance"]
    recipe = (provenance.get("recipe") or {}).get(stage)
    size = _parameters(stage, content)
    versions = {name: provenance[name] for name in ("rdpm", "torch", "numpy", "python") if name in provenance}
    settings = {"parameters": size, **dict(flat(recipe or content["config"])), **dict(flat({"versions": versions}))}
    return Found(
        item=Item(
            stage=stage,
            name=str(path),
            digest=content["digest"],
            claims=_model_claims(stage, content),
            facts={"parameters": f"{size:,}", **_model_facts(stage, content)},
            settings=settings,
        )
    )


def _parameters(stage: Stage, content: Mapping[str, Any]) -> int:
    """Trained numbers; of a generator those of its network alone."""
    import torch

    from rdpm_cli.config import TokenizerArchitecture
    from rdpm_cli.generator import model
    from rdpm_cli.tokenizer import model as tokenizer_file

    if stage == "judge":
        return sum(weight.numel() for weight in content["weights"].values())
    inner = content if stage == "tokenizer" else content["tokenizer"]
    with torch.device("meta"):
        tokenizer = tokenizer_file.Tokenizer(modelfile.config_of(TokenizerArchitecture, inner["config"], "tokenizer"))
        if stage == "tokenizer":
            return tokenizer_file.parameters(tokenizer)
        own = {k: v for k, v in content["config"].items() if k not in ("sampling", "classes", "tokenizer")}
        cfg = modelfile.config_of(model.FAMILIES[own["family"]].architecture, own, "generator")
        return model.parameters(model.build(cfg, tokenizer, content["config"]["classes"]))


def _model_claims(stage: Stage, content: Mapping[str, Any]) -> tuple[Claim, ...]:
    provenance = content["provenance"]
    found = []
    if stage == "generator":
        store = provenance.get("store") or {}
        found.append(Claim(stages=("tokenizer",), digest=content["tokenizer"]["digest"]))
        found.append(Claim(stages=("store",), digest=store.get("digest", ""), name=str(store.get("path", ""))))
        found += _images(provenance.get("reference"))
    elif stage == "judge":
        found += _images({"source": provenance.get("data"), "digest": provenance.get("digest")})
    else:
        found += _images(provenance.get("data"))
    return tuple(found)


def _images(named: Any) -> list[Claim]:
    """A claim about images, where a record names them."""
    if not isinstance(named, Mapping) or not named.get("digest"):
        return []
    return [Claim(stages=("data",), digest=str(named["digest"]), name=str(named.get("source", "")))]


def _model_facts(stage: Stage, content: Mapping[str, Any]) -> dict[str, str]:
    config, provenance = content["config"], content["provenance"]
    if stage == "judge":
        return {"images": said(provenance.get("data")), "held-out accuracy": f"{provenance['heldout_accuracy']:.4f}"}
    if stage == "generator":
        network = config["network"]
        names = {"family": config["family"], "depth": network["depth"], "head": network["head"]}
        return {**{key: said(value) for key, value in names.items()}, "classes": _classes(content["class_names"])}
    q, a = config["quantizer"], config["autoencoder"]
    return {"resolution": said(a["resolution"]), "T": said(q["steps"]), "K": said(q["codes"]),
            "C": said(a["channels"]), "schedule": config["schedule"]["kind"], "bias": q["bias"]}  # fmt: skip


def _classes(names: Sequence[str]) -> str:
    return f"{len(names)}: {some_of(names)}" if names else "none"


def _run(path: Path) -> Found:
    """A folder of a training command, finished or not. Raises DataError for another command's, unfinished."""
    from rdpm_cli.training.logging import read_metrics

    note = files.read_json(path / "run.json")
    settings = note.get("settings") if isinstance(note, dict) else None
    stage = MODELS.get(settings.get("command", "")) if isinstance(settings, dict) else None
    if stage is None:
        raise DataError(f"{path} is unfinished, or no run of rdpm", "run the command that makes it again, to its end")
    assert isinstance(settings, dict)
    log = tuple(row for row in read_metrics(path) if isinstance(row, dict))
    final = path / f"{stage}.pt"
    finished = _model(final).item if final.is_file() else None
    steps = max((row["step"] for row in log if isinstance(row.get("step"), int)), default=0)
    facts = {"steps": f"{steps:,}" + ("" if finished else ", unfinished")}
    for key in ("processes", "threads"):
        facts |= {key: said(note[key])} if key in note else {}
    if note.get("resumed"):
        facts["resumed"] = f"{len(note['resumed'])} times"
    recipe = _mapping(settings, "recipe")
    versions = dict(flat({"versions": _mapping(note, "versions")}))
    own = {"seed": recipe.get("seed"), **dict(flat(_mapping(recipe, stage))), **versions}
    if finished:
        own = {"parameters": finished.settings["parameters"], **own}
        facts = {**finished.facts, **facts}
    claims = finished.claims if finished else _unfinished_claims(settings)
    item = Item(stage=stage, name=str(path), digest=finished.digest if finished else "", claims=claims, facts=facts,
                settings=own, log=log)  # fmt: skip
    return Found(item=item, pictures=report_pictures.last_preview(path, stage))


def _unfinished_claims(settings: Mapping[str, Any]) -> tuple[Claim, ...]:
    """What a run that has not made its model yet says it trains on."""
    store = settings.get("store")
    from_store = [Claim(stages=("store",), digest=str(store))] if store else []
    return (*from_store, *_images(settings.get("data")))


# ---- stores, pictures, scores --------------------------------------------------------------------------------------


def _store(path: Path) -> Found:
    from rdpm_cli.codes.manifest import Manifest

    m = Manifest.load(path)
    facts = {
        "images": f"{m.images:,}",
        "views": said(m.views),
        "rows": f"{m.rows:,}",
        "codes": f"{m.steps} × {m.grid[0]} × {m.grid[1]} of {m.codes:,}",
        "classes": _classes(m.class_names),
    }
    if m.bad:
        facts["left out"] = f"{m.bad:,}"
    plan = m.model_dump(mode="json", include=PLAN)
    claims = (Claim(stages=("tokenizer",), digest=m.tokenizer), *_images(m.data.model_dump()))
    item = Item(stage="store", name=str(path), digest=m.digest(), claims=claims, facts=facts, settings=dict(flat(plan)))
    return Found(item=item)


def _pictures(path: Path) -> Found:
    record = files.read_json(path / "samples.json")
    try:
        stage: Stage = "samples" if record["format"] == "rdpm-samples" else "reconstructions"
        made, options = dict(record["made_from"]), dict(record["options"])
        rows = [Row.read(row) for row in record["samples"]]
        names, resolution = [str(name) for name in record["class_names"]], int(record["resolution"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path / 'samples.json'} lacks {error}", "make the folder again") from error
    reference, there = _mapping(record, "reference"), all((path / row.file).is_file() for row in rows)
    packed = isinstance(record.get("npz"), str) and (path / record["npz"]).is_file()
    facts = {"pictures": f"{len(rows):,}", "resolution": said(resolution), "classes": said(len(names))}
    facts |= {key: said(options[key]) for key in scores.OPTIONS if key in options}
    claims = [Claim(stages=(ROLES[role],), digest=str(digest)) for role, digest in made.items() if role in ROLES]
    settings = {**dict(flat(options)), **dict(flat({"versions": _mapping(record, "versions")}))}
    own = {"metric": "reconstruction", "target": {"name": str(path)}, "options": options}
    own |= {"reference": {"name": reference.get("source", "")}, **_mapping(record, "scores")}
    return Found(
        item=Item(stage=stage, name=str(path), claims=(*claims, *_images(reference)), facts=facts, settings=settings),
        scores=scores.read(own, str(path)),
        pictures=report_pictures.grids_of(path, stage, rows if there else [], names, resolution),
        folder=path if there or packed else None,
        count=len(rows),
    )


def pixels_digest(folder: Path) -> str:
    """The identity of a folder's pictures, as a score records it of its target."""
    from rdpm_cli.evaluation.features import hash_pixels
    from rdpm_cli.evaluation.reference import open_samples

    digest = hashlib.sha256()
    for batch in open_samples(folder).batches:
        hash_pixels(digest, batch)
    return digest.hexdigest()


def _score_file(path: Path) -> Found:
    """What `rdpm eval ... --json` printed, or a demo's result. Raises DataError."""
    record = files.read_json(path)
    if not scores.is_record(record):
        raise DataError(f"{path} holds no scores", KNOWN)
    if "frechet_ratio" in record:  # of a demo, whose judge and numbers of images are known
        names, n = ("frechet_distance_n", "frechet_distance_heldout_n"), record.get("frechet_n")
        record |= {"extractor": {"name": "judge judge.pt"}, "class_accuracy_n": record.get("samples")}
        record |= dict.fromkeys(names, n)
    found = scores.read(record, str(path))
    facts = {scores.metric(s.metric).label: scores.written(s.metric, s.value) for s in found if s.value is not None}
    if found[0].reference:
        facts["against"] = found[0].reference
    return Found(item=Item(stage="score", name=str(path), claims=_score_claims(record), facts=facts), scores=found)


def _score_claims(record: Mapping[str, Any]) -> tuple[Claim, ...]:
    """What a score says it is of: pictures by their pixels, a model or images by their digests; and its judge."""
    target, options = _mapping(record, "target"), _mapping(record, "options")
    extractor = _mapping(record, "extractor")
    found = []
    if record.get("tokenizer"):
        found.append(Claim(stages=("tokenizer",), digest=str(record["tokenizer"])))
        found += _images({"source": target.get("name"), "digest": target.get("digest")})
    elif options.get("checkpoint"):  # drawn as they were scored
        found.append(Claim(stages=("generator",), digest=str(options["checkpoint"])))
    elif options and target.get("sha256"):
        name = str(target.get("name", ""))
        found.append(Claim(stages=("samples", "reconstructions"), digest=str(target["sha256"]), name=name))
    if str(extractor.get("name", "")).startswith("judge") and extractor.get("sha256"):
        found.append(Claim(stages=("judge",), digest=str(extractor["sha256"]), name=str(extractor["name"])))
    return tuple(found)


def _mapping(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = record.get(name)
    return found if isinstance(found, Mapping) else {}


FOLDERS: dict[str, Callable[[Path], Found]] = {"manifest.json": _store, "samples.json": _pictures, "run.json": _run}

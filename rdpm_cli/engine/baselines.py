"""eval baselines: scores of images that need no generator, to read a generator's scores by."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rdpm_cli import noise
from rdpm_cli.data.folder import ImageSet
from rdpm_cli.data.open import open_source
from rdpm_cli.data.pixels import Pixels
from rdpm_cli.data.source import Source, Subset
from rdpm_cli.distributed import process_group
from rdpm_cli.engine.tokenizer import find_tokenizer
from rdpm_cli.errors import CheckpointError, UsageError
from rdpm_cli.evaluation import gaussian, score
from rdpm_cli.evaluation.features import identity, open_extractor
from rdpm_cli.evaluation.gaussian import ClassGaussian
from rdpm_cli.evaluation.recon import reconstructions
from rdpm_cli.runs import Result, versions
from rdpm_cli.tokenizer import model
from rdpm_cli.tokenizer.model import Tokenizer

SLOW = ("kid",)  # left out: 100 kernels of 1,000 images take longer than all other scores

Sources = Mapping[str, Source]  # "training", and "heldout" where it is named
Record = dict[str, Any]


def eval_baselines(
    images: str, tokenizer: Path | None = None, *, seeds: range, heldout: str | None = None, per_class: int = 80,
    ref: str | None = None, resolution: int | None = None, extractor: str | Path | None = None,
    weights: Path | None = None, download: bool = False, device: str = "auto", reading: Mapping[str, Any] | None = None,
) -> Result:  # fmt: skip
    """Every score but KID of a class Gaussian and of real images: its mean, spread and values over sample seeds."""
    named = {"training": images} if heldout is None else {"training": images, "heldout": heldout}
    sources = {name: open_source(spec, **(reading or {})) for name, spec in named.items()}
    loaded, digest, absent = _open_tokenizer(tokenizer)
    with process_group(device, several=True) as rank_device:
        opened = open_extractor(extractor, weights, rank_device, download)
        side = resolution or score.crop_side(*sources.values(), default=opened.resolution)
        if loaded and (of_tokenizer := loaded.cfg.autoencoder.resolution) != side:
            message = f"the images are {side}×{side}, and the tokenizer's {of_tokenizer}×{of_tokenizer}"
            raise UsageError(message, f"give --resolution {of_tokenizer}")
        training = score.open_images(sources["training"], side)
        compared = training if ref is None else score.open_reference(ref, training, opened, reading)
        reference, fitted = score.measured(opened, compared, score.METRICS), gaussian.fit(training)
        records: dict[str, list[Record]] = {}
        for seed in seeds:
            for name, drawn in _rows(fitted, sources, loaded and loaded.to(rank_device), per_class, seed).items():
                if record := score.score("all", opened, drawn, reference, without=SLOW):
                    records.setdefault(name, []).append(record)
    if not records:
        return Result("baselines")
    values = {
        "rows": {name: _summary(row) for name, row in records.items()},
        "seeds": list(seeds), "per_class": per_class, "resolution": side, "tokenizer": digest,
        "images": {name: source.record() for name, source in sources.items()},
        "reference": records["gaussian"][0]["reference"], "extractor": identity(opened),
        "notes": list(dict.fromkeys(note for row in records.values() for record in row for note in record["notes"])),
        "not_computed": absent, "versions": versions(),
    }  # fmt: skip
    return Result("baselines", values, text=_table(values))


def _open_tokenizer(path: Path | None) -> tuple[Tokenizer | None, str | None, dict[str, str]]:
    """The tokenizer and its digest; where none is named, the reason why there is no row of reconstructions."""
    try:
        file = find_tokenizer(path)
    except CheckpointError as error:
        return None, None, {"reconstructions": error.message}
    tokenizer, content = model.load(file)
    return tokenizer, content["digest"], {}


def _rows(
    fitted: ClassGaussian, sources: Sources, tokenizer: Tokenizer | None, per_class: int, seed: int
) -> dict[str, ImageSet]:
    """The images of every row for one seed. Reconstructions are of held-out images where there are any."""
    subsets = {name: class_subset(source, per_class, seed) for name, source in sources.items()}
    rows = {"gaussian": fitted.samples(per_class, seed)}
    rows["training"] = score.open_images(subsets["training"], fitted.side)
    if tokenizer:
        rows["reconstructions"] = _reconstructed(subsets.get("heldout", subsets["training"]), tokenizer, seed)
    if "heldout" in subsets:
        rows["heldout"] = score.open_images(subsets["heldout"], fitted.side)
    return rows


def class_subset(source: Source, per_class: int, seed: int) -> Subset:
    """At most per_class random images of every class, without replacement, in random order: IS depends on it."""
    order_N = noise.stream("subset", seed).permutation(len(source))
    labels_N = np.zeros(len(source)) if source.labels is None else np.asarray(source.labels)[order_N]
    places = np.concatenate([np.flatnonzero(labels_N == label)[:per_class] for label in np.unique(labels_N)])
    return Subset(source, order_N[np.sort(places)].tolist(), f"{per_class} a class, seed {seed}")


def _reconstructed(subset: Subset, tokenizer: Tokenizer, seed: int) -> ImageSet:
    """The images after the tokenizer and back, under the noise that `eval recon` has for them and this seed."""
    device = next(tokenizer.parameters()).device

    def read(pieces: Iterable[range]) -> Iterator[Pixels]:
        for piece in pieces:
            indices = subset.indices[piece.start : piece.stop]
            batches = reconstructions(subset.source, tokenizer, [seed], device, indices)
            yield np.concatenate([by_seed[0][0] for _, _, by_seed in batches])

    originals = score.open_images(subset, tokenizer.cfg.autoencoder.resolution)
    return replace(originals, name=f"reconstructions of {subset.spec}", read=read)


def _summary(records: Sequence[Record]) -> Record:
    """n, and every score of the records that is a number: mean, standard deviation and values, one a seed."""
    columns: dict[str, list[float]] = {}
    for record in records:
        coverage = {f"factor_coverage.{name}": value for name, value in record.get("factor_coverage", {}).items()}
        for name, value in {**record, **coverage}.items():
            if isinstance(value, float) and "_spread_over_" not in name:
                columns.setdefault(name, []).append(value)
    scores = {
        name: {"mean": float(np.mean(values)), "std": float(np.std(values)), "values": values}
        for name, values in columns.items()
    }
    return {"n": records[0]["target"]["count"], "images": records[0]["target"]["name"], **scores}


def _table(values: Record) -> str:
    """One line a score, one column a row of `rows`."""
    rows = values["rows"]
    names = dict.fromkeys(name for row in rows.values() for name, score in row.items() if isinstance(score, dict))
    lines = [["", *rows], ["n", *(str(row["n"]) for row in rows.values())]]
    lines += [[name, *(_cell(row.get(name)) for row in rows.values())] for name in names]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = ["  " + "  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    seeds, (reference, extractor) = values["seeds"], (values[side]["name"] for side in ("reference", "extractor"))
    title = f"mean ± standard deviation over seeds {seeds[0]} to {seeds[-1]}; against {reference}, by {extractor}"
    return "\n".join([title, *table, *(f"  no {row}: {why}" for row, why in values["not_computed"].items())]) + "\n"


def _cell(score: Record | None) -> str:
    # Rounded, since the spread of a set that is drawn whole is that of its order: 1e-11.
    return "" if score is None else f"{score['mean']:.4g} ± {round(score['std'], 6):.2g}"

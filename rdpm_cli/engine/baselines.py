"""eval baselines: scores of images that need no generator, to read a generator's scores by.

Legend: B samples, T steps, C channels, S positions of the flattened grid."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rdpm_cli import noise
from rdpm_cli.codes.store import TOKENIZER, CodeStore
from rdpm_cli.data.folder import ImageSet
from rdpm_cli.data.open import open_source
from rdpm_cli.data.pixels import Pixels, hwc, to_pixels
from rdpm_cli.data.source import Source, Subset
from rdpm_cli.distributed import one_thread, process_group
from rdpm_cli.engine.tokenizer import find_tokenizer
from rdpm_cli.errors import CheckpointError, UsageError
from rdpm_cli.evaluation import gaussian, metrics, score
from rdpm_cli.evaluation.backbones import open_extractor
from rdpm_cli.evaluation.features import identity
from rdpm_cli.evaluation.gaussian import ClassGaussian
from rdpm_cli.evaluation.recon import BATCH, reconstructions
from rdpm_cli.evaluation.reference import crop_side, open_images, open_reference
from rdpm_cli.generator.baselines import fit, sample
from rdpm_cli.generator.sampler import balanced_labels
from rdpm_cli.runs import Result, text_table, versions
from rdpm_cli.tokenizer import model
from rdpm_cli.tokenizer.model import Tokenizer

SLOW = ("kid",)  # left out: 100 kernels of 1,000 images take longer than all other scores

Sources = Mapping[str, Source]  # "training", and "heldout" where it is named
Record = dict[str, Any]


def eval_baselines(
    images: str, tokenizer: Path | None = None, *, seeds: range, heldout: str | None = None, codes: Path | None = None,
    per_class: int = 80, ref: str | None = None, resolution: int | None = None, extractor: str | Path | None = None,
    weights: Path | None = None, download: bool = False, device: str = "auto", reading: Mapping[str, Any] | None = None,
) -> Result:  # fmt: skip
    """Every score but KID of simple models and of real images: its mean, spread and values over sample seeds."""
    if tokenizer and codes:
        raise UsageError("--tokenizer does not go with --codes, whose store has its own", "leave it out")
    named = {"training": images} if heldout is None else {"training": images, "heldout": heldout}
    sources = {name: open_source(spec, **(reading or {})) for name, spec in named.items()}
    loaded, digest, absent = _open_tokenizer(codes / TOKENIZER if codes else tokenizer)
    store = codes and CodeStore(codes, digest)
    with process_group(device, several=True) as rank_device:
        opened, loaded = open_extractor(extractor, weights, rank_device, download), loaded and loaded.to(rank_device)
        side = resolution or crop_side(*sources.values(), default=opened.resolution)
        if loaded and (of_tokenizer := loaded.cfg.autoencoder.resolution) != side:
            message = f"the images are {side}×{side}, and the tokenizer's {of_tokenizer}×{of_tokenizer}"
            raise UsageError(message, f"give --resolution {of_tokenizer}")
        training = open_images(sources["training"], side)
        compared = training if ref is None else open_reference(ref, training, opened, reading)
        reference = score.measured(opened, compared, score.METRICS)
        models: dict[str, ClassGaussian | LinearBaseline] = {"gaussian": gaussian.fit(training)}
        if loaded and store:
            models["linear"] = LinearBaseline(store, loaded)
        rows = [_rows(models, sources, loaded, per_class, seed) for seed in seeds]
        records = {
            name: score.score("all", opened, [row[name] for row in rows], reference, without=SLOW) for name in rows[0]
        }
    if not records["gaussian"]:
        return Result("baselines")
    origins = {name: source.record() for name, source in sources.items()}
    values = {
        "rows": {name: _summary(row) for name, row in records.items()},
        "seeds": list(seeds), "per_class": per_class, "resolution": side, "tokenizer": digest,
        "images": origins | ({"linear": {"source": str(codes), "digest": store.manifest.digest()}} if store else {}),
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


class LinearBaseline:
    """The linear baseline that the log of train-gen has, as a generator of the store's codes."""

    def __init__(self, store: CodeStore, tokenizer: Tokenizer) -> None:
        self.store, self.tokenizer = store, tokenizer
        self.fits = fit(store, store.split()[0], tokenizer.quantizer)  # on the rows that train-gen trains on

    def samples(self, per_class: int, seed: int) -> ImageSet:
        """per_class samples of every class in random order, drawn when they are read, under the noise of `sample`."""
        tokenizer, names = self.tokenizer, list(self.store.manifest.class_names)
        labels = balanced_labels(range(len(names)), per_class, seed)

        def draw(indices: range) -> Pixels:
            eps_BTCS = tokenizer.noise("sample", seed, indices, [0] * len(indices)).to(tokenizer.quantizer.books.device)
            labels_B = torch.tensor(labels[indices.start : indices.stop])
            with one_thread():
                codes_BTS = sample(self.fits, tokenizer.quantizer, labels_B, eps_BTCS)
                return hwc(to_pixels(tokenizer.decode(codes_BTS)))

        def read(pieces: Iterable[range]) -> Iterator[Pixels]:
            for piece in pieces:
                yield np.concatenate([draw(piece[start : start + BATCH]) for start in range(0, len(piece), BATCH)])

        name, side = f"linear baseline of {self.store.root}", self.store.manifest.resolution
        return ImageSet(name, len(labels), side, labels, names, read)


def _rows(
    models: Mapping[str, ClassGaussian | LinearBaseline], sources: Sources, tokenizer: Tokenizer | None,
    per_class: int, seed: int,
) -> dict[str, ImageSet]:  # fmt: skip
    """The images of every row for one seed. Reconstructions are of held-out images where there are any."""
    subsets = {name: class_subset(source, per_class, seed) for name, source in sources.items()}
    rows = {name: model.samples(per_class, seed) for name, model in models.items()}
    side = rows["gaussian"].resolution
    rows["training"] = open_images(subsets["training"], side)
    if tokenizer:
        rows["reconstructions"] = _reconstructed(subsets.get("heldout", subsets["training"]), tokenizer, seed)
    if "heldout" in subsets:
        rows["heldout"] = open_images(subsets["heldout"], side)
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

    originals = open_images(subset, tokenizer.cfg.autoencoder.resolution)
    return replace(originals, name=f"reconstructions of {subset.spec}", read=read)


def _summary(records: Sequence[Record]) -> Record:
    """n, and every score of the records that is a number: mean, standard deviation and values, one a seed."""
    scores = {
        name: {"mean": float(np.mean(values)), "std": metrics.deviation(values), "values": values}
        for name, values in score.columns_of(records).items()
    }
    return {"n": records[0]["target"]["count"], "images": records[0]["target"]["name"], **scores}


def _table(values: Record) -> str:
    """One line a score, one column a row of `rows`."""
    rows = values["rows"]
    names = dict.fromkeys(name for row in rows.values() for name, score in row.items() if isinstance(score, dict))
    lines = [["", *rows], ["n", *(str(row["n"]) for row in rows.values())]]
    lines += [[name, *(_cell(row.get(name)) for row in rows.values())] for name in names]
    seeds, (reference, extractor) = values["seeds"], (values[side]["name"] for side in ("reference", "extractor"))
    title = f"mean ± standard deviation over seeds {seeds[0]} to {seeds[-1]}; against {reference}, by {extractor}"
    return (
        "\n".join([title, text_table(lines), *(f"  no {row}: {why}" for row, why in values["not_computed"].items())])
        + "\n"
    )


def _cell(score: Record | None) -> str:
    # Rounded, since the spread of a set that is drawn whole is that of its order: 1e-11.
    return "" if score is None else f"{score['mean']:.4g} ± {round(score['std'], 6):.2g}"

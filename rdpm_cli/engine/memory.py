"""eval memory: whether samples are copies of training images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rdpm_cli import files
from rdpm_cli.codes.ragged import open_store
from rdpm_cli.codes.store import evenly_spaced
from rdpm_cli.data.folder import ImageSet
from rdpm_cli.data.pictures import grid, save_png
from rdpm_cli.data.pixels import Pixels
from rdpm_cli.distributed import process_group
from rdpm_cli.engine.sample import key_values, load
from rdpm_cli.engine.score import Target, made_with, open_compared, open_scored
from rdpm_cli.errors import DataError, UsageError
from rdpm_cli.evaluation import judge, memory
from rdpm_cli.evaluation.features import Extractor, identity
from rdpm_cli.evaluation.memory import Neighbours
from rdpm_cli.runs import Result, text_table

PAIRS = 16  # closest pairs that are listed and drawn
REPLAYED = 500  # training images whose noise is drawn under again
FEWEST = 3  # training images: a nearest one, and two others for it to be compared with

Record = dict[str, Any]


@dataclass(frozen=True)
class Replay:
    """A generator and the store that it was trained on: what it draws under the noise of the store's own images."""

    ckpt: Path
    codes: Path
    overrides: tuple[str, ...] = ()
    preset: str | None = None

    def shares(self, training: ImageSet, pixels_MD: Pixels, device: torch.device) -> dict[str, float]:
        """Of up to REPLAYED training images, the share whose sample has it as its nearest image by pixels.

        `recalled`: drawn under the noise of its codes, in its class; `recalled_unseen`: under noise of a view that the
        store does not have, so what chance and the class give. training: the store's images, pixels_MD: shrunk."""
        loaded, options, _ = load(self.ckpt, "all", 0, key_values(self.overrides), self.preset)
        if not loaded.generator.replays:
            raise UsageError(f"--codes: {self.ckpt} does not draw codes under their noise", "leave --codes out")
        store = open_store(self.codes, loaded.tokenizer_digest)
        m, side = store.manifest, loaded.tokenizer.cfg.autoencoder.resolution
        if (training.count, side) != (m.data.count, training.resolution):
            raise DataError(f"--ref {training.name} is not what {self.codes} was made from", f"give {m.data.source}")
        rows = evenly_spaced(np.unique(store.split()[0] // m.views), REPLAYED) * m.views
        index_N, labels = store.index[rows], store.columns["labels"][rows].tolist()
        loaded.to(device)
        shares = {}
        for name, view in {"recalled": 0, "recalled_unseen": m.views + m.views % 2}.items():
            replayed = replace(options, seed=m.seed, noise=("encode", view))
            drawn = loaded.job(replayed).draw(index_N.tolist(), labels)
            nearest = memory.nearest_two(memory.shrink(drawn.pixels_BHWC), pixels_MD, device=device).rows_N2[:, 0]
            shares[name] = float(np.mean(nearest == index_N))
        return shares


def eval_memory(
    target: Target, ref: str | None = None, *, heldout: str | None = None, sheet: Path | None = None,
    replay: Replay | None = None,
    resolution: int | None = None, extractor: str | Path | None = None, weights: Path | None = None,
    download: bool = False, device: str = "auto", reading: Mapping[str, Any] | None = None,
) -> Result:  # fmt: skip
    """Shares of copies among samples, and among held-out images; the closest pairs. sheet: PNG of these pairs.

    replay: samples under the training's own noise, too."""
    if sheet is not None:
        if sheet.suffix != ".png":
            raise UsageError(f"--sheet {sheet} is not a .png file", f"give {sheet.with_suffix('.png')}")
        files.make_folder(sheet.parent)  # before the pass, not after it
    with process_group(device, several=True) as rank_device:
        (opened,), (samples, *_) = open_scored(
            target, rank_device, [extractor], weights, download, resolution, reading
        )  # fmt: skip
        training = open_compared(ref, samples, opened, reading)
        sets = [training, samples] + ([] if heldout is None else [open_compared(heldout, samples, opened, reading)])
        _check(sets, opened)
        views = [view for images in sets if (view := memory.views(opened, images)) is not None]
        if not views:
            return Result("memory")
        known: dict[bytes, Any] = {}
        for view in views:
            memory.equal_features(view.features, known)
        (values, neighbours), *others = [memory.compare(view, views[0], rank_device) for view in views[1:]]
        if replay:
            values |= replay.shares(training, views[0].pixels_ND, rank_device)
        pairs = _closest(neighbours)
        if sheet is not None:
            save_png(sheet, _draw(pairs, samples, training))
    facts = [
        {"name": images.name, "count": images.count, "sha256": view.features.sha256}
        for images, view in zip(sets, views, strict=True)
    ]
    whole = {
        "metric": "memory", **values, "n": samples.count, "target": facts[1], "reference": facts[0],
        "heldout": {**others[0][0], **facts[2]} if others else None, "extractor": identity(opened),
        "closest": [_pair(samples, training, *pair) for pair in pairs], "sheet": sheet and str(sheet),
        "notes": [opened.note] if opened.note else [], **made_with(samples, opened),
    }  # fmt: skip
    return Result("memory", whole, text=_table(whole, list(values)))


def _check(sets: Sequence[ImageSet], extractor: Extractor) -> None:
    """Raise DataError for training images, samples or held-out images that are too few, or not of a judge's size."""
    judge.check_size(extractor.resolution, sets[0].resolution)
    for images in sets:
        if images.count < (fewest := FEWEST if images is sets[0] else 1):
            message = f"`eval memory` needs at least {fewest} images of {images.name}, not {images.count}"
            raise DataError(message, "take more images")


def _closest(neighbours: Neighbours) -> list[tuple[int, int, float, float]]:
    """The closest pairs by ratio, then distance: rows of sample and training image, distance, ratio."""
    nearest_N, distances_N = neighbours.rows_N2[:, 0], neighbours.distances_N2[:, 0]
    ratios_N = memory.ratios(neighbours.distances_N2)
    rows = np.lexsort((distances_N, ratios_N))[:PAIRS].tolist()
    return [(row, int(nearest_N[row]), float(distances_N[row]), float(ratios_N[row])) for row in rows]


def _pair(samples: ImageSet, training: ImageSet, row: int, other: int, distance: float, ratio: float) -> Record:
    """A pair as results record it: images by their names, or by their numbers where they have none."""
    sample, image = (images.names[at] if images.names else at for images, at in ((samples, row), (training, other)))
    return {"sample": sample, "training": image, "distance": distance, "ratio": ratio}


def _draw(pairs: Sequence[tuple[int, int, float, float]], samples: ImageSet, training: ImageSet) -> Pixels:
    """A sheet with a row a pair: the sample, its nearest training image, their distance and ratio."""
    rows = [(images, row) for pair in pairs for images, row in zip((samples, training), pair[:2], strict=True)]
    pictures = [next(iter(images.read([range(row, row + 1)]))) for images, row in rows]
    captions = [f"{distance:.3f}, ratio {ratio:.2f}" for *_, distance, ratio in pairs]
    return grid(np.concatenate(pictures), 2, captions, "sample, training")


def _table(values: Record, names: Sequence[str]) -> str:
    """The scores of the samples next to those of held-out images; the closest pairs."""
    columns = {"samples": {**values, **values["target"]}, "heldout": values["heldout"]}
    columns = {name: column for name, column in columns.items() if column}
    scores = [["", *columns], ["n", *(str(column["count"]) for column in columns.values())]]
    scores += [
        [name, *(f"{column[name]:.4g}" if name in column else "" for column in columns.values())] for name in names
    ]
    pairs = [["closest sample", "training image", "distance", "ratio"]]
    pairs += [
        [str(pair["sample"]), str(pair["training"]), f"{pair['distance']:.4g}", f"{pair['ratio']:.4g}"]
        for pair in values["closest"]
    ]
    title = f"copies of {values['reference']['name']}, by pixels and by {values['extractor']['name']}"
    return f"{title}\n{text_table(scores)}\n{text_table(pairs)}\n" + "".join(f"  {note}\n" for note in values["notes"])

"""eval: scores of images and of checkpoints; references."""

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rdpm_cli import files
from rdpm_cli.data.folder import ImageSet
from rdpm_cli.data.open import is_there
from rdpm_cli.data.pixels import TRANSFORM
from rdpm_cli.data.source import spread
from rdpm_cli.distributed import process_group
from rdpm_cli.errors import DataError, UsageError, rdpm_command
from rdpm_cli.evaluation import score
from rdpm_cli.evaluation.backbones import Backbone, open_extractor
from rdpm_cli.evaluation.features import Extractor, Inception, identity
from rdpm_cli.evaluation.reference import holds_statistics, measure, open_reference, open_target, save_statistics
from rdpm_cli.runs import Result, versions

# metric -> options that it takes
TAKES = {"fid": ("--subset", "--ci"), "is": ("--ci",), "fdr": ("--heldout",), "all": ("--subset", "--ci", "--heldout")}

Target = str | Callable[[torch.device], Sequence[ImageSet]]  # images, or the samples of each seed, drawn when read


def open_scored(
    target: Target, device: torch.device, extractors: Sequence[str | Path | None], weights: Path | None,
    download: bool, resolution: int | None, reading: Mapping[str, Any] | None,
) -> tuple[list[Extractor], Sequence[ImageSet]]:  # fmt: skip
    """The extractors, and the images or the sets of samples to score. Raises UsageError."""
    if isinstance(target, str) and not is_there(target):
        raise UsageError(f"{target} does not exist", "name a folder of samples or images, an .npz, or give --ckpt FILE")
    if callable(target) and resolution:
        raise UsageError("--resolution is that of the checkpoint", "leave it out")
    # A checkpoint first: one that draws no images must not ask for the weights of Inception.
    sets: Sequence[ImageSet] = [] if isinstance(target, str) else target(device)
    opened = [open_extractor(name, weights, device, download) for name in extractors]
    return opened, [open_target(target, resolution, opened[0], reading)] if isinstance(target, str) else sets


def open_compared(
    spec: str | None, samples: ImageSet, extractor: Extractor, reading: Mapping[str, Any] | None
) -> ImageSet:
    """Images of the samples' size: those named, or those that the samples' record names. Raises DataError."""
    images = None if spec and holds_statistics(spec) else open_reference(spec, samples, extractor, reading)
    if not isinstance(images, ImageSet):
        raise DataError(f"{spec} holds statistics, and images are needed here", "name the images")
    return images


def made_with(images: ImageSet, *extractors: Extractor) -> dict[str, Any]:
    """Options, checkpoint and resolution of scored images, and the versions of libraries."""
    of_type = {Inception: "torch-fidelity", Backbone: "timm"}
    libraries = {name: version(name) for each in extractors if (name := of_type.get(type(each)))}
    return {
        "options": images.record.get("options"), "versions": {**versions(), **libraries},
        "checkpoint": images.record.get("made_from", {}).get("checkpoint"), "resolution": images.resolution,
    }  # fmt: skip


def eval_images(
    metric: str, target: Target, ref: str | None = None, *,
    extractor: str | Path | None = None, weights: Path | None = None, download: bool = False,
    heldout: str | None = None, features: Path | None = None, subset: int | None = None, ci: bool = False,
    resolution: int | None = None, device: str = "auto", reading: Mapping[str, Any] | None = None,
) -> Result:  # fmt: skip
    """A metric of `score.METRICS`, or all, of images or of samples that `target` draws. features: file to keep them.

    extractor: of `fdr` several, separated by commas. Of samples of several seeds the result has the means and standard
    deviations."""
    named = {"--subset": subset, "--ci": ci, "--heldout": heldout}
    if foreign := [option for option, value in named.items() if value and option not in TAKES.get(metric, ())]:
        taking = [name for name, options in TAKES.items() if foreign[0] in options]
        raise UsageError(f"`eval {metric}` does not take {foreign[0]}", f"{' and '.join(taking)} do")
    if subset and ci:
        raise UsageError("--subset does not go with --ci", "leave one out")
    if metric == "fdr" and heldout is None:
        raise UsageError("`eval fdr` needs --heldout", "name real images that were not trained on")
    if ref is not None and metric == "is":
        raise UsageError("--ref: `eval is` compares with no reference", "leave it out")
    if features:
        files.make_folder(features.parent)  # before the pass, not after it
    extractors = str(extractor).split(",") if extractor and metric == "fdr" else [extractor]
    if len(extractors) > 1:
        if features or weights:
            raise UsageError("--features and --weights are for one extractor", "put weight files into $RDPM_WEIGHTS")
        if "" in extractors or len(set(extractors)) < len(extractors):
            raise UsageError(f"--extractor {extractor}: a name is empty or given twice", "name each once: A,B,C")
    with process_group(device, several=True) as rank_device:
        opened, sets = open_scored(target, rank_device, extractors, weights, download, resolution, reading)
        if {"sfid": opened[0].spatial_width, "is": opened[0].classes}.get(metric) == 0:
            needed = "spatial features" if metric == "sfid" else "classes"
            raise UsageError(f"`eval {metric}` needs {needed}; {opened[0].name} has none", "leave --extractor out")
        by_extractor = []
        for each in opened:
            reference = None if metric == "is" else open_reference(ref, sets[0], each, reading)
            real = open_compared(heldout, sets[0], each, reading) if heldout else None
            by_extractor.append(
                score.score(metric, each, sets, reference, heldout=real, subset=subset, ci=ci, file=features)
            )
    if not by_extractor[0]:
        return Result("score")
    records = by_extractor[0] if len(opened) == 1 else [_averaged(each) for each in zip(*by_extractor, strict=True)]
    values = records[0]
    if len(sets) > 1:
        seeds = [drawn.record["options"].pop("seed") for drawn in sets]
        values = score.average(records, seeds)
        if "by_extractor" in values:
            values["by_extractor"] = [_part(score.average(each, seeds)) for each in by_extractor]
    return Result("score", values | made_with(sets[0], *opened))


def _part(record: Mapping[str, Any]) -> dict[str, Any]:
    """What one extractor adds to an FDr over several."""
    kept = {name: record[name] for name in ("extractor", "n", "heldout_distance")}
    return {
        **kept,
        "fdr": record["value"],
        **({"spread_over_seeds": record["spread_over_seeds"]["value"]} if "seeds" in record else {}),
    }


def _averaged(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """FDr of one set as the mean over extractors, with that of each."""
    return {
        **{name: records[0][name] for name in ("metric", "n", "target", "reference", "heldout")},
        "value": float(np.mean([record["value"] for record in records])),
        "extractor": {"name": ", ".join(record["extractor"]["name"] for record in records)},
        "by_extractor": [_part(record) for record in records],
        "notes": list(dict.fromkeys(note for record in records for note in record["notes"])),
    }  # fmt: skip


def eval_reference(
    images: str, out: Path, *, features: int = 10_000, resolution: int | None = None,
    extractor: str | Path | None = None, weights: Path | None = None, download: bool = False, device: str = "auto",
    reading: Mapping[str, Any] | None = None,
) -> Result:  # fmt: skip
    """Images, cropped as in training -> an .npz to compare with. features: number of images whose features it holds."""
    if out.suffix != ".npz":
        raise UsageError(f"{out} is not an .npz file", f"give {out.with_suffix('.npz')}")
    files.make_folder(out.parent)
    with process_group(device, several=True) as rank_device:
        opened = open_extractor(extractor, weights, rank_device, download)
        target = open_target(images, resolution, opened, reading)
        if target.count < 2:
            raise DataError(f"a covariance needs at least 2 images, not {target.count}", "take more images")
        reference = measure(opened, target, True, spread(target.count, features))
    if reference is None or reference.features_ND is None:
        return Result("reference written")
    save_statistics(out, reference, {"transform": TRANSFORM, "versions": versions()}, opened)
    values = {
        "reference": str(out), "name": target.name, "count": target.count, "resolution": target.resolution,
        "features": len(reference.features_ND), "sha256": reference.sha256, "extractor": identity(opened),
        "bytes": out.stat().st_size,
    }  # fmt: skip
    return Result("reference written", values, rdpm_command("eval", "fid", "samples/", "--ref", out))

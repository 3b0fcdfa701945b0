"""eval: scores of images and of checkpoints; references."""

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

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
from rdpm_cli.evaluation.features import Inception, identity
from rdpm_cli.runs import Result, versions


def eval_images(
    metric: str, target: str | Callable[[torch.device], Sequence[ImageSet]], ref: str | None = None, *,
    extractor: str | Path | None = None, weights: Path | None = None, download: bool = False,
    features: Path | None = None, subset: int | None = None, ci: bool = False, resolution: int | None = None,
    device: str = "auto", reading: Mapping[str, Any] | None = None,
) -> Result:  # fmt: skip
    """A metric of `score.METRICS`, or all, of images or of samples that `target` draws. features: file to keep them.

    Of samples of several seeds the result has the means and standard deviations."""
    taken = {"fid": ["--subset", "--ci"], "all": ["--subset", "--ci"], "is": ["--ci"]}.get(metric, [])
    named = " and ".join(["--subset"] * bool(subset) + ["--ci"] * ci)
    if named and named not in taken:
        raise UsageError(f"`eval {metric}` does not take {named}", "fid and all take --subset or --ci, is takes --ci")
    if ref is not None and metric == "is":
        raise UsageError("--ref: `eval is` compares with no reference", "leave it out")
    if isinstance(target, str) and not is_there(target):
        raise UsageError(f"{target} does not exist", "name a folder of samples or images, an .npz, or give --ckpt FILE")
    if callable(target) and resolution:
        raise UsageError("--resolution is that of the checkpoint", "leave it out")
    if features:
        files.make_folder(features.parent)  # before the pass, not after it
    with process_group(device, several=True) as rank_device:
        # A checkpoint first: one that draws no images must not ask for the weights of Inception.
        sets: Sequence[ImageSet] = [] if isinstance(target, str) else target(rank_device)
        opened = open_extractor(extractor, weights, rank_device, download)
        if {"sfid": opened.spatial_width, "is": opened.classes}.get(metric) == 0:
            needed = "spatial features" if metric == "sfid" else "classes"
            raise UsageError(f"`eval {metric}` needs {needed}; {opened.name} has none", "leave --extractor out")
        if isinstance(target, str):
            sets = [score.open_target(target, resolution, opened, reading)]
        images = sets[0]
        reference = None if metric == "is" else score.open_reference(ref, images, opened, reading)
        records = score.score(metric, opened, sets, reference, subset=subset, ci=ci, file=features)
    if not records:
        return Result("score")
    values = records[0]
    if len(sets) > 1:
        values = score.average(records, [drawn.record["options"].pop("seed") for drawn in sets])
    library = {Inception: "torch-fidelity", Backbone: "timm"}.get(type(opened))
    libraries = {library: version(library)} if library else {}
    values |= {"options": images.record.get("options"), "versions": {**versions(), **libraries}}
    values |= {"checkpoint": images.record.get("made_from", {}).get("checkpoint"), "resolution": images.resolution}
    return Result("score", values)


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
        target = score.open_target(images, resolution, opened, reading)
        if target.count < 2:
            raise DataError(f"a covariance needs at least 2 images, not {target.count}", "take more images")
        reference = score.measure(opened, target, True, spread(target.count, features))
    if reference is None or reference.features_ND is None:
        return Result("reference written")
    score.save_statistics(out, reference, {"transform": TRANSFORM, "versions": versions()}, opened)
    values = {
        "reference": str(out), "name": target.name, "count": target.count, "resolution": target.resolution,
        "features": len(reference.features_ND), "sha256": reference.sha256, "extractor": identity(opened),
        "bytes": out.stat().st_size,
    }  # fmt: skip
    return Result("reference written", values, rdpm_command("eval", "fid", "samples/", "--ref", out))

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
from rdpm_cli.evaluation.features import Extractor, Inception, identity, open_extractor
from rdpm_cli.runs import Result, versions

Target = str | Callable[[torch.device], Sequence[ImageSet]]  # images, or the samples of each seed, drawn when read


def open_target(
    target: Target, device: torch.device, extractor: str | Path | None, weights: Path | None, download: bool,
    resolution: int | None, reading: Mapping[str, Any] | None,
) -> tuple[Extractor, Sequence[ImageSet]]:  # fmt: skip
    """The extractor, and the images or the sets of samples to score. Raises UsageError."""
    if isinstance(target, str):
        if not is_there(target):
            hint = "name a folder of samples or images, an .npz, or give --ckpt FILE"
            raise UsageError(f"{target} does not exist", hint)
        opened = open_extractor(extractor, weights, device, download)
        return opened, [score.open_target(target, resolution, opened, reading)]
    if resolution:
        raise UsageError("--resolution is that of the checkpoint", "leave it out")
    # A checkpoint first: one that draws no images must not ask for the weights of Inception.
    sets = target(device)
    return open_extractor(extractor, weights, device, download), sets


def made_with(images: ImageSet, extractor: Extractor) -> dict[str, Any]:
    """Options, checkpoint and resolution of scored images, and the versions of libraries."""
    libraries = {"torch-fidelity": version("torch-fidelity")} if isinstance(extractor, Inception) else {}
    return {
        "options": images.record.get("options"), "versions": {**versions(), **libraries},
        "checkpoint": images.record.get("made_from", {}).get("checkpoint"), "resolution": images.resolution,
    }  # fmt: skip


def eval_images(
    metric: str, target: Target, ref: str | None = None, *,
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
    if metric == "sfid" and extractor not in (None, "inception"):
        raise UsageError("sFID needs spatial features; a judge has none", "leave --extractor out")
    if features:
        files.make_folder(features.parent)  # before the pass, not after it
    with process_group(device, several=True) as rank_device:
        opened, sets = open_target(target, rank_device, extractor, weights, download, resolution, reading)
        images = sets[0]
        reference = None if metric == "is" else score.open_reference(ref, images, opened, reading)
        records = score.score(metric, opened, sets, reference, subset=subset, ci=ci, file=features)
    if not records:
        return Result("score")
    values = records[0]
    if len(sets) > 1:
        values = score.average(records, [drawn.record["options"].pop("seed") for drawn in sets])
    return Result("score", values | made_with(images, opened))


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

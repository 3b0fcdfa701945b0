"""eval fid, is, sfid, pr, kid, all, and eval reference."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rdpm_cli import files, team
from rdpm_cli.engine import runs
from rdpm_cli.engine.drawing import Drawn
from rdpm_cli.engine.runs import Result, versions
from rdpm_cli.errors import DataError, UsageError

if TYPE_CHECKING:
    import torch

    from rdpm_cli.evaluation.cache import Cache
    from rdpm_cli.evaluation.features import Extractor
    from rdpm_cli.evaluation.reference import ImageSet
    from rdpm_cli.evaluation.statfile import StatFile
    from rdpm_cli.team import Team


@dataclass(frozen=True)
class Ruler:
    """What scores: a judge's file, or Inception's weights; download: fetch these. cache: keep activations."""

    extractor: Path | None = None
    weights: Path | None = None
    download: bool = False
    cache: bool = False

    def find(self, device: torch.device) -> Extractor:
        """Raises CheckpointError and UsageError."""
        from rdpm_cli.evaluation import features

        return features.make_extractor(self.extractor, self.weights, device, self.download)

    def kept(self, extractor: Extractor) -> Cache | None:
        """Where its activations are kept."""
        from rdpm_cli.evaluation import cache

        return cache.Cache(cache.folder(), extractor.sha256) if self.cache else None


def eval_fid(
    target: str,
    ref: str | None = None,
    *,
    extractor: Path | None = None,
    weights: Path | None = None,
    subset: int | None = None,
    resolution: int | None = None,
    device: str = "auto",
) -> Result:
    """Fréchet distance of samples, or of any images, to a reference; nothing is kept in the cache."""
    ruler = Ruler(extractor, weights)
    return eval_images("fid", target, ref, ruler, subset=subset, resolution=resolution, device=device)


def eval_images(
    metric: str,
    target: str | Drawn,
    ref: str | None = None,
    ruler: Ruler | None = None,
    *,
    subset: int | None = None,
    ci: bool = False,
    resolution: int | None = None,
    device: str = "auto",
    team: Team | None = None,
) -> Result:
    """fid, sfid, is, pr, kid or all of them, of images, or of what a checkpoint draws. team: as --gpus."""
    _need_there(target)
    from rdpm_cli.evaluation import scores

    ruler = ruler or Ruler()
    wanted = scores.Options(subset, ci)
    scores.check(metric, wanted, judged=ruler.extractor is not None)
    if ref is not None and not scores.needs_reference(metric):
        raise UsageError(f"--ref has no use for `eval {metric}`", "leave it out")
    if team and team.processes > 1:
        return Result("score", by_team(team, device))
    from rdpm_cli.training.distributed import process_group

    with process_group(device, several=True) as chosen:
        extractor = ruler.find(chosen)
        images = _target(target, resolution, chosen)
        reference = _reference(ref, images) if scores.needs_reference(metric) else None
        options = scores.Options(subset, ci, ruler.kept(extractor))
        values = scores.score(metric, extractor, images, reference, options)
    if values is not None:
        values |= {"options": images.origin.get("options"), "versions": {**versions(), **_more_versions(extractor)}}
        values |= {"checkpoint": images.origin.get("made_from", {}).get("checkpoint"), "resolution": images.resolution}
    return answer("score", values)


def _need_there(target: str | Drawn) -> None:
    """Raise where nothing is, before slow imports and before weights are looked for."""
    if isinstance(target, Drawn):
        runs.need_generator(target.ckpt)
        return
    from rdpm_cli.images.sources import is_there

    if not is_there(target) and not Path(target).exists():
        raise UsageError(f"{target} does not exist", "name a folder of samples or images, an .npz, or give --ckpt FILE")


def eval_reference(
    images: str,
    out: Path,
    ruler: Ruler | None = None,
    *,
    features: int = 10_000,
    resolution: int | None = None,
    device: str = "auto",
    team: Team | None = None,
) -> Result:
    """Images, cropped as in training -> an .npz to compare with. features: images whose features it holds.

    resolution: default the first image's short side; samples and .npz keep theirs.
    """
    if out.suffix != ".npz":
        raise UsageError(f"{out} is no .npz", f"give {out.with_suffix('.npz')}")
    files.check_folder(out.parent)
    if team and team.processes > 1:
        return Result("reference written", by_team(team, device))
    from rdpm_cli.evaluation import passes, reference, statfile
    from rdpm_cli.evaluation.features import identity
    from rdpm_cli.evaluation.metrics import frechet
    from rdpm_cli.images.sources import spread
    from rdpm_cli.images.transform import TRANSFORM
    from rdpm_cli.training.distributed import process_group

    ruler = ruler or Ruler()
    with process_group(device, several=True) as chosen:
        extractor = ruler.find(chosen)
        found = reference.open_target(images, resolution)
        frechet.need_images(found.count)
        wanted = passes.Wanted(spread(found.count, features), spatial=bool(extractor.spatial))
        seen = passes.look(extractor, found, wanted, ruler.kept(extractor))
    if seen is None:
        return answer("reference written", None)
    record = {"name": found.name, "resolution": found.resolution, "transform": TRANSFORM, "versions": versions()}
    statfile.save(out, seen, record, extractor)
    values = {"reference": str(out), "name": found.name, "count": seen.count, "resolution": found.resolution}
    values |= {"features": len(seen.features_ND), "sha256": seen.sha256, "extractor": identity(extractor)}
    values |= {"bytes": out.stat().st_size}
    return answer("reference written", values, f"rdpm eval fid samples/ --ref {out}")


def _target(target: str | Drawn, resolution: int | None, device: torch.device) -> ImageSet:
    from rdpm_cli.evaluation import statfile
    from rdpm_cli.evaluation.reference import open_target

    if isinstance(target, Drawn):
        if resolution:
            raise UsageError("--resolution is that of the checkpoint", "leave it out")
        return target.images(device)
    if found := statfile.find(target):
        raise DataError(f"{found.path} holds statistics, not images to score", "give it as --ref")
    return open_target(target, resolution)


def _reference(ref: str | None, images: ImageSet) -> ImageSet | StatFile:
    from rdpm_cli.evaluation import statfile
    from rdpm_cli.evaluation.reference import open_reference

    found = statfile.find(ref) or open_reference(ref, images)
    if found.resolution not in (None, images.resolution):
        sides = f"images of {found.resolution}×{found.resolution}, {images.name} of {images.resolution}"
        raise DataError(
            f"the reference {found.name} is of {sides}", "compare one size: `rdpm eval reference --resolution`"
        )
    return found


def _more_versions(extractor: Extractor) -> dict[str, str]:
    from importlib.metadata import version

    return {} if extractor.class_names else {"torch-fidelity": version("torch-fidelity")}


def by_team(asked: Team, device: str) -> dict[str, Any]:
    """What the first of the team's processes answers."""
    from rdpm_cli.training import launch

    launch.check(asked, device)
    return launch.launch(asked) or {}


def answer(title: str, values: dict[str, Any] | None, following: str = "") -> Result:
    """The result; of a process that `--gpus` started, for its launcher."""
    if values is not None:
        team.answer(values)
    return Result(title, values or {}, following)

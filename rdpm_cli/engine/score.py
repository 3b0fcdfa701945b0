"""eval: scores of images and checkpoints, references, reconstructions; training of judges."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from rdpm_cli import files, progress
from rdpm_cli.data.folder import ImageSet
from rdpm_cli.data.open import is_there, open_source
from rdpm_cli.data.pixels import TRANSFORM
from rdpm_cli.data.source import Source, spread
from rdpm_cli.distributed import process_group
from rdpm_cli.engine.sample import Drawn
from rdpm_cli.engine.tokenizer import find_tokenizer
from rdpm_cli.engine.train import Training, recipe_settings, train_once
from rdpm_cli.errors import DataError, UsageError
from rdpm_cli.evaluation import judge, recon, reference, score
from rdpm_cli.evaluation.features import INCEPTION_NAME, Extractor, identity, open_extractor
from rdpm_cli.evaluation.judge import JudgeConfig
from rdpm_cli.evaluation.metrics import need_images
from rdpm_cli.evaluation.reference import StatisticsFile
from rdpm_cli.recipes import Recipe, load_recipe
from rdpm_cli.runs import Result, versions
from rdpm_cli.tokenizer import model
from rdpm_cli.tokenizer.losses import Net
from rdpm_cli.training.log import last_metrics


@dataclass(frozen=True)
class Ruler:
    """The extractor of a score: Inception, or a judge's file.

    weights: Inception's file; download: fetch it where it is absent; features: file that keeps the target's features.
    """

    extractor: str | Path | None = None
    weights: Path | None = None
    download: bool = False
    features: Path | None = None

    @property
    def judged(self) -> bool:
        """Whether a judge is the extractor."""
        return self.extractor is not None and str(self.extractor) != INCEPTION_NAME

    def open(self, device: torch.device) -> Extractor:
        """Raises CheckpointError and UsageError."""
        return open_extractor(self.extractor, self.weights, device, self.download)


# ---- eval fid, sfid, is, pr, kid, all ------------------------------------------------------------------------------


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
) -> Result:
    """A metric of `score.METRICS`, or all of them, of images or of the samples that a checkpoint draws."""
    ruler = ruler or Ruler()
    options = score.Options(subset, ci, ruler.features)
    score.check(metric, options, ruler.judged)
    if ref is not None and metric == "is":
        raise UsageError("--ref: `eval is` compares with no reference", "leave it out")
    if isinstance(target, str) and not is_there(target):
        raise UsageError(f"{target} does not exist", "name a folder of samples or images, an .npz, or give --ckpt FILE")
    if ruler.features:
        files.make_folder(ruler.features.parent)  # before the pass, not after it
    with process_group(device, several=True) as rank_device:
        extractor = ruler.open(rank_device)
        images = _open_target(target, resolution, rank_device)
        compared = None if metric == "is" else _open_reference(ref, images)
        values = score.score(metric, extractor, images, compared, options)
    if values is None:
        return Result("score")
    torch_fidelity = {} if ruler.judged else {"torch-fidelity": version("torch-fidelity")}
    values |= {"options": images.record.get("options"), "versions": {**versions(), **torch_fidelity}}
    values |= {"checkpoint": images.record.get("made_from", {}).get("checkpoint"), "resolution": images.resolution}
    return Result("score", values)


def _open_target(target: str | Drawn, resolution: int | None, device: torch.device) -> ImageSet:
    if isinstance(target, Drawn):
        if resolution:
            raise UsageError("--resolution is that of the checkpoint", "leave it out")
        return target.images(device)
    if statistics := reference.find_statistics(target):
        raise DataError(f"{statistics.path} holds statistics, not images to score", "give it as --ref")
    return reference.open_target(target, resolution)


def _open_reference(ref: str | None, images: ImageSet) -> ImageSet | StatisticsFile:
    compared = reference.find_statistics(ref) or reference.open_reference(ref, images)
    if compared.resolution not in (None, images.resolution):
        sizes = f"{compared.resolution}×{compared.resolution}, but {images.name} of {images.resolution}"
        raise DataError(
            f"the reference {compared.name} is of images of {sizes}",
            "compare images of one size: `rdpm eval reference --resolution`",
        )
    return compared


# ---- eval reference ------------------------------------------------------------------------------------------------


def eval_reference(
    images: str,
    out: Path,
    ruler: Ruler | None = None,
    *,
    features: int = 10_000,
    resolution: int | None = None,
    device: str = "auto",
) -> Result:
    """Images, cropped as in training -> an .npz to compare with. features: number of images whose features it holds.

    resolution: default the first image's short side; samples and .npz keep theirs.
    """
    if out.suffix != ".npz":
        raise UsageError(f"{out} is not an .npz file", f"give {out.with_suffix('.npz')}")
    files.make_folder(out.parent)
    with process_group(device, several=True) as rank_device:
        extractor = (ruler or Ruler()).open(rank_device)
        source = reference.open_target(images, resolution)
        need_images(source.count, 2, "a covariance")
        measured = reference.measure(extractor, source, True, spread(source.count, features))
    if measured is None or measured.features_ND is None:
        return Result("reference written")
    record = {"name": source.name, "resolution": source.resolution, "transform": TRANSFORM, "versions": versions()}
    reference.save_statistics(out, measured, record, extractor)
    values = {"reference": str(out), "name": source.name, "count": source.count, "resolution": source.resolution}
    values |= {"features": len(measured.features_ND), "sha256": measured.sha256, "extractor": identity(extractor)}
    return Result("reference written", {**values, "bytes": out.stat().st_size}, f"rdpm eval fid samples/ --ref {out}")


# ---- eval recon ----------------------------------------------------------------------------------------------------


def eval_recon(
    images: str,
    tokenizer: Path | None = None,
    *,
    seed: int = 0,
    seeds: int = 4,
    limit: int | None = None,
    ruler: Ruler | None = None,
    lpips: dict[Net, Path | None] | None = None,
    device: str = "auto",
) -> Result:
    """Scores of reconstructions: means over noise seeds seed..seed+seeds-1 and their spread; rFID of the first seed.

    lpips: weight file of each backbone; without it, looked up.
    """
    ruler, path = ruler or Ruler(), find_tokenizer(tokenizer)
    source = open_source(images)
    loaded, content = model.load(path)
    count, size = len(spread(len(source), limit)), loaded.cfg.autoencoder.resolution
    with process_group(device, several=True) as rank_device:
        networks = recon.open_networks(
            count,
            size,
            rank_device,
            extractor=ruler.extractor,
            weights=ruler.weights,
            download=ruler.download,
            lpips=lpips,
        )
        noise_seeds = range(seed, seed + seeds)
        record = recon.score(source, loaded.to(rank_device), networks, noise_seeds, rank_device, limit)
    if record is None:
        return Result("score")
    libraries = {name: version(name) for name in ("lpips", "torch-fidelity", "torchmetrics")}
    values = {"metric": "reconstruction", **record, "tokenizer": content["digest"]}
    values |= {"target": {"name": source.spec, "count": count, "digest": source.digest()}}
    values |= {"options": {"resolution": size, "limit": limit}, "versions": {**versions(), **libraries}}
    return Result("score", values)


# ---- eval judge ----------------------------------------------------------------------------------------------------


def eval_judge(
    images: str,
    out: Path,
    recipe: str = "judge",
    overrides: Sequence[str] = (),
    *,
    heldout: str | None = None,
    resolution: int | None = None,
    device: str = "auto",
) -> Result:
    """`train_judge` by the name or file of a recipe."""
    return train_judge(images, heldout, out, load_recipe(recipe, overrides, "judge"), device, resolution)


def train_judge(
    images: str,
    heldout: str | None,
    out: Path,
    recipe: Recipe,
    device: str = "auto",
    resolution: int | None = None,
) -> Result:
    """A classifier of real images -> OUT/judge.pt, with its accuracy on held-out images. Resumes OUT.

    heldout: further images of the same classes; None: a tenth of `images`. resolution: default that of the recipe's
    tokenizer, else the short side of the first image.
    """
    cfg = recipe.judge
    assert cfg is not None
    if out.suffix == ".pt":
        raise UsageError(f"{out} is not a run folder", f"give {out.with_suffix('')}; judge.pt is written into it")
    whole = open_source(images)
    if resolution is None:
        resolution = recipe.tokenizer.autoencoder.resolution if recipe.tokenizer else min(whole.image(0).size)
    source, unseen = judge.split(whole) if heldout is None else (whole, open_source(heldout))
    _need_same_classes(source, unseen)
    data = {"source": source.spec, "digest": source.digest(), "resolution": resolution}
    data |= {"heldout": unseen.spec, "heldout_digest": unseen.digest()}
    final = out / "judge.pt"
    settings = {"command": "train-judge", "recipe": recipe_settings(recipe, "judge"), "data": data}
    train_once(final, recipe.seed, settings, device, lambda training: _train(training, source, unseen, cfg, resolution))
    _, content = judge.load(final)
    values = {"judge": str(final), "digest": content["digest"], "resolution": resolution, "images": len(source)}
    values |= {name: content["provenance"][name] for name in ("heldout", "heldout_images", "heldout_accuracy")}
    values |= {f"train_{name}": value for name, value in last_metrics(out, ["loss", "accuracy"]).items()}
    return Result("judge trained", values, f"rdpm eval fid samples/ --extractor {final}")


def _train(training: Training, source: Source, unseen: Source, cfg: JudgeConfig, resolution: int) -> dict[str, Any]:
    """Train and measure a judge. -> the content of its file."""
    network = judge.Judge(resolution, cfg.width, cfg.features, len(source.class_names), cfg.blocks)
    progress.say(f"{len(source):,} images, {len(source.class_names):,} classes, {resolution}×{resolution}")
    batches = judge.JudgeBatches(source, cfg, resolution, training.seed)
    task = judge.JudgeTask(network.to(training.device).train())
    trained = training.fit([task], batches, cfg.train, len(source))
    assert isinstance(trained, judge.Judge)
    accuracy = judge.accuracy(trained.eval(), unseen, training.device)
    provenance = {"data": source.spec, "heldout": unseen.spec, "heldout_accuracy": accuracy}
    provenance |= {"heldout_images": len(unseen), "recipe": cfg.model_dump(mode="json"), "digest": source.digest()}
    return judge.pack(trained, source.class_names, provenance={**provenance, **versions()})


def _need_same_classes(source: Source, unseen: Source) -> None:
    for images in (source, unseen):
        images.need_labels()
    if source.class_names != unseen.class_names:
        message = f"{unseen.spec} has other classes than {source.spec}"
        raise DataError(message, "hold out images of the same class folders")

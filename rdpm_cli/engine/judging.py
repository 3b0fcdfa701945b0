"""eval judge: labelled images -> RUN/judge.pt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rdpm_cli import progress, recipe_files
from rdpm_cli.config import Recipe
from rdpm_cli.engine import runs
from rdpm_cli.engine.runs import Result, Training, check_team, last_metrics, train_once, versions
from rdpm_cli.errors import DataError, UsageError

if TYPE_CHECKING:
    from rdpm_cli.images.sources import ImageSource
    from rdpm_cli.team import Team


def eval_judge(
    images: str,
    out: Path,
    recipe_name: str = "judge",
    overrides: Sequence[str] = (),
    *,
    heldout: str | None = None,
    resolution: int | None = None,
    device: str = "auto",
    team: Team | None = None,
) -> Result:
    """`train_judge` by the recipe of a name."""
    recipe = recipe_files.load_recipe(recipe_name, overrides, "judge")
    return train_judge(images, heldout, out, recipe, device, resolution, team)


def train_judge(
    images: str,
    heldout: str | None,
    out: Path,
    recipe: Recipe,
    device: str = "auto",
    resolution: int | None = None,
    team: Team | None = None,
) -> Result:
    """A classifier of real images -> RUN/judge.pt, with its accuracy on held-out images. Resumes RUN.

    heldout: other images of the same classes; None: a tenth of these. resolution: default the recipe's tokenizer's,
    else the short side of the first image. team: as --gpus.
    """
    cfg = recipe.judge
    assert cfg is not None
    if out.suffix == ".pt":
        raise UsageError(f"{out}: a run folder is wanted", f"give {out.with_suffix('')}; judge.pt is written into it")
    from rdpm_cli.images.sources import open_source

    whole = open_source(images)
    size = resolution or _resolution(recipe, whole)
    check_team(team, device, cfg.train.batch)
    from rdpm_cli.evaluation import judge

    source, unseen = judge.split(whole) if heldout is None else (whole, open_source(heldout))
    _need_same_classes(source, unseen)
    data = {"source": source.spec, "digest": source.digest(), "resolution": size}
    data |= {"heldout": unseen.spec, "heldout_digest": unseen.digest()}

    def make(training: Training) -> dict[str, Any]:
        network = judge.Judge(size, cfg.width, cfg.features, len(source.class_names), cfg.blocks)
        progress.say(f"{len(source):,} images, {len(source.class_names):,} classes, {size}×{size}")
        batches = judge.JudgeBatches(source, cfg, size, recipe.seed)
        task = judge.JudgeTask(network.to(training.device).train())
        kept = training.fit([task], batches, cfg.train, len(source))
        assert isinstance(kept, judge.Judge)
        accuracy = judge.accuracy(kept.eval(), unseen, training.device)
        provenance = {"data": source.spec, "heldout": unseen.spec, "heldout_accuracy": accuracy}
        provenance |= {"heldout_images": len(unseen), "recipe": cfg.model_dump(mode="json"), "digest": data["digest"]}
        return judge.pack(kept, source.class_names, provenance={**provenance, **versions()})

    final, chosen = out / "judge.pt", runs.chosen(recipe, "judge")
    train_once(final, recipe.seed, {"command": "train-judge", "recipe": chosen, "data": data}, device, make, team)
    _, content = judge.load(final)
    values = {"judge": str(final), "digest": content["digest"], "resolution": size, "images": len(source)}
    values |= {name: content["provenance"][name] for name in ("heldout", "heldout_images", "heldout_accuracy")}
    values |= {f"train_{name}": value for name, value in last_metrics(out, ["loss", "accuracy"]).items()}
    return Result("judge trained", values, f"rdpm eval fid samples/ --extractor {final}")


def _resolution(recipe: Recipe, source: ImageSource) -> int:
    return recipe.tokenizer.autoencoder.resolution if recipe.tokenizer else min(source.image(0).size)


def _need_same_classes(source: ImageSource, unseen: ImageSource) -> None:
    for images in (source, unseen):
        images.need_labels()
    if source.class_names != unseen.class_names:
        raise DataError(
            f"{unseen.spec} has other classes than {source.spec}", "hold out images of the same class folders"
        )

"""train-tokenizer: images -> RUN/tokenizer.pt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rdpm_cli import files, progress, recipe_files
from rdpm_cli.engine import flops, runs, warming
from rdpm_cli.engine.runs import (
    Result,
    Training,
    check_team,
    first_process,
    last_metrics,
    train_once,
    training_curves,
    versions,
)
from rdpm_cli.training import tracking

if TYPE_CHECKING:
    from rdpm_cli.config import TokenizerConfig
    from rdpm_cli.images.sources import ImageSource
    from rdpm_cli.team import Team
    from rdpm_cli.tokenizer.model import Tokenizer
    from rdpm_cli.tokenizer.perceptual import Perceptual


def train_tokenizer(
    images: str,
    out: Path | None,
    recipe_name: str,
    overrides: Sequence[str] = (),
    device: str = "auto",
    from_weights: Path | None = None,
    team: Team | None = None,
    track: str | None = None,
) -> Result:
    """Images -> RUN/tokenizer.pt. Resumes RUN; a finished run returns at once.

    from_weights: what a run begins with. team, track: as --gpus, --track.
    """
    recipe = recipe_files.load_recipe(recipe_name, overrides, "tokenizer")
    cfg = recipe.tokenizer
    assert cfg is not None
    out = out or runs.default_folder(recipe, "tokenizer")
    files.refuse_second_writer(out)
    from rdpm_cli.images.sources import open_source

    tracking.check(track)
    given = warming.identity(from_weights)
    source = open_source(images)
    check_team(team, device, cfg.train.batch)
    perceptual = _perceptual(cfg)
    warm = warming.prepare(cfg, recipe.seed, out, from_weights)  # before the run folder is claimed for these settings
    from rdpm_cli.tokenizer import model

    data = {"source": source.spec, "digest": source.digest()}
    backbone = {"name": perceptual.name, "sha256": perceptual.sha256} if perceptual else None

    def make(training: Training) -> dict[str, Any]:
        tokenizer = warm.tokenizer if warm else model.Tokenizer(cfg, cfg.loss.weight)
        imported = warming.record(out, given, warm)
        placed = warm is not None and warm.placed_codebook
        kept = _train(training, tokenizer.to(training.device).train(), cfg, source, perceptual, placed)
        provenance = {"recipe": recipe.model_dump(mode="json"), "data": data, "perceptual": backbone, **imported}
        provenance |= {"parameters": model.parameters(tokenizer), "parameters_of": model.parameter_table(tokenizer)}
        return model.pack(kept, class_names=source.class_names, provenance={**provenance, **versions()})

    final, chosen = out / "tokenizer.pt", runs.chosen(recipe, "tokenizer")
    settings = {"command": "train-tokenizer", "recipe": chosen, "data": data, "perceptual": backbone, **given}
    train_once(final, recipe.seed, settings, device, make, team, track)
    tokenizer, content = model.load(final)
    losses = last_metrics(out, ["loss", "recon", "quant", "lpips", "gan"])
    counts = {"parameters": model.parameters(tokenizer), "parameters_of": model.parameter_table(tokenizer)}
    values = {"tokenizer": str(final), "digest": content["digest"], **losses, **counts}
    return Result("tokenizer trained", values, f"rdpm tokenize {images} out/codes --tokenizer {final}")


def _train(
    training: Training,
    tokenizer: Tokenizer,
    cfg: TokenizerConfig,
    source: ImageSource,
    perceptual: Perceptual | None,
    placed: bool,
) -> Tokenizer:
    """Train in the run's folder; with its curves. placed: the codebook has its start already. -> what to keep."""
    from rdpm_cli.engine import observers
    from rdpm_cli.tokenizer import codebook, model
    from rdpm_cli.tokenizer.task import ImageBatches, players_of

    batches = ImageBatches(source, cfg, training.seed)
    progress.say(
        f"{len(source):,} images, {len(source.class_names):,} classes; {model.parameters(tokenizer):,} parameters"
    )
    if not (placed or training.begun):
        first = batches.batch_at(0, range(cfg.train.batch))
        codebook.initialise(tokenizer, first, training.seed, lambda: training.stop.leave("nothing is trained yet"))
    players = players_of(tokenizer, cfg, training.device, perceptual and perceptual.to(training.device))

    def draw() -> None:
        training_curves(training.out / "curves.png", tokenizer_run=training.out)

    look = [observers.tokenizer_preview(tokenizer, source, cfg.train), observers.redrawn(draw, cfg.train)]
    watch = [*look, observers.codebook_alarm(cfg)]
    flops_an_image = sum(flops.tokenizer_step(cfg).values())
    kept = training.fit(players, batches, cfg.train, len(source), watch, flops_an_image)
    assert isinstance(kept, model.Tokenizer)
    if first_process():
        draw()
    return kept


def _perceptual(cfg: TokenizerConfig) -> Perceptual | None:
    """The perceptual network of a recipe, where it asks for one: before a run folder is claimed."""
    if cfg.loss.perceptual == "none":
        return None
    from rdpm_cli.tokenizer import perceptual

    given = Path(cfg.loss.perceptual_weights) if cfg.loss.perceptual_weights else None
    option, without = "loss.perceptual_weights=FILE", "go on without by loss.perceptual=none"
    return perceptual.load("vgg", given, option, without, cfg.autoencoder.resolution)

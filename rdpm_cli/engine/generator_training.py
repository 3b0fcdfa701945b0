"""train-gen: a code store -> RUN/generator.pt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rdpm_cli import files, progress, recipe_files
from rdpm_cli.engine import flops, pictures, runs
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
    from rdpm_cli.codes.store import CodeStore
    from rdpm_cli.config import GeneratorConfig
    from rdpm_cli.generator.contract import Generator, GeneratorBatches
    from rdpm_cli.team import Team
    from rdpm_cli.tokenizer.model import Tokenizer


def train_gen(
    codes: Path,
    out: Path | None,
    recipe_name: str,
    overrides: Sequence[str] = (),
    device: str = "auto",
    team: Team | None = None,
    track: str | None = None,
) -> Result:
    """Code store -> RUN/generator.pt. Resumes RUN; a finished run returns at once. team, track: as --gpus, --track."""
    recipe = recipe_files.load_recipe(recipe_name, overrides, "generator")
    cfg = recipe.generator
    assert cfg is not None
    tracking.check(track)
    out = out or runs.default_folder(recipe, "generator")
    files.refuse_second_writer(out)
    from rdpm_cli.codes.manifest import Manifest
    from rdpm_cli.codes.store import CodeStore
    from rdpm_cli.engine import proxy
    from rdpm_cli.generator import model
    from rdpm_cli.tokenizer import model as tokenizer_file

    m = Manifest.load(codes)
    check_team(team, device, cfg.train.batch)
    tokenizer, tokenizer_content = tokenizer_file.load(codes / "tokenizer.pt")
    model.check_codes(cfg.family, tokenizer.cfg, str(codes))
    store = CodeStore(codes, tokenizer_content["digest"])
    batches = model.batches(cfg, store, tokenizer, recipe.seed)
    kernel = model.find_kernel(cfg, device)
    if cfg.proxy.samples:
        proxy.check(cfg.proxy, m, codes)

    if first_process() and not team and not (out / "generator.pt").exists():
        store.verify()  # before the folder is begun

    def make(training: Training) -> dict[str, Any]:
        generator = model.build(cfg, tokenizer.to(training.device), len(m.class_names))
        generator.network.to(training.device).train()
        model.prepare(generator, cfg, kernel)
        measured = generator.begin(cfg, store)
        _train(training, generator, tokenizer, cfg, store, batches)
        provenance = {
            "recipe": recipe.model_dump(mode="json"),
            "store": {"path": str(codes.resolve()), "digest": m.digest()},
            "reference": pictures.store_reference(codes, m),
            **measured,
            **versions(),
        }
        return model.pack(generator, cfg, tokenizer_content, list(m.class_names), provenance=provenance)

    final = out / "generator.pt"
    settings = {"command": "train-gen", "recipe": runs.chosen(recipe, "generator"), "store": m.digest()}
    train_once(final, recipe.seed, settings, device, make, team, track)
    return _answer(final)


def _train(
    training: Training,
    generator: Generator,
    tokenizer: Tokenizer,
    cfg: GeneratorConfig,
    store: CodeStore,
    batches: GeneratorBatches,
) -> None:
    """Train in the run's folder; with its curves. generator.network becomes what to keep."""
    from rdpm_cli.engine import observers, proxy
    from rdpm_cli.generator import model
    from rdpm_cli.generator.task import GeneratorTask

    m, names = store.manifest, list(store.manifest.class_names)
    progress.say(f"{model.parameters(generator):,} parameters, {batches.images:,} images × {m.views} views")

    def draw() -> None:
        training_curves(training.out / "curves.png", generator_run=training.out)

    watch: list[Callable[..., Any]] = [
        observers.generator_monitor(generator, tokenizer, cfg, names, batches),
        observers.redrawn(draw, cfg.train),
    ]
    if cfg.proxy.samples:
        watch.append(proxy.score(generator, tokenizer, cfg, m, store.root))
    flops_an_image = sum(flops.generator_step(cfg, flops.Latent.of(tokenizer.cfg)).values())
    task = GeneratorTask(generator)
    generator.network = training.fit([task], batches, cfg.train, batches.images, watch, flops_an_image)
    if first_process():
        draw()


def _answer(final: Path) -> Result:
    """What a finished run has to say."""
    from rdpm_cli.generator import model

    loaded, out = model.load(final), final.parent
    values = {
        "generator": str(final),
        "digest": loaded.digest,
        "parameters": model.parameters(loaded.generator),
        **last_metrics(out, ["ce", "accuracy"]),
        **last_metrics(out, ["nll"]),
        **last_metrics(out, ["heldout/accuracy", "heldout/baseline"]),
        **last_metrics(out, ["heldout/nll", "heldout/baseline"]),
        **last_metrics(out, ["proxy/frechet_distance", "proxy/class_accuracy"]),
    }
    return Result("generator trained", values, f"rdpm sample --ckpt {final} --classes all")

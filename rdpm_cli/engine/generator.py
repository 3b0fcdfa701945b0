"""train-gen: a code store -> RUN/generator.pt."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rdpm_cli import progress, recipes
from rdpm_cli.codes.heldout import open_heldout
from rdpm_cli.codes.store import store_reference, verify
from rdpm_cli.engine import plan, watch
from rdpm_cli.engine.train import (
    Training,
    default_folder,
    is_new,
    recipe_settings,
    train_once,
    warm_start_record,
    weights_setting,
)
from rdpm_cli.errors import rdpm_command
from rdpm_cli.generator import registry
from rdpm_cli.generator.contract import GeneratorTask
from rdpm_cli.generator.importers import metadata, warm_start
from rdpm_cli.runs import Result, versions
from rdpm_cli.tokenizer.model import parameters
from rdpm_cli.training.log import last_metrics

# Values of the log in the result; each group is taken from the last line that has its first name.
NAMED = ("heldout_images", "heldout_recordings")  # of --heldout
MEASURES = (  # of a family each
    ("ce", "accuracy", "baseline", "class_mean", "linear", "gap"), ("nll", "baseline"), ("bound", "unigram"),
    ("nats", "unigram"), ("mse", "baseline"),
)  # fmt: skip
REPORTED = (
    ("ce", "accuracy"), ("nll",), ("mse",),
    *(tuple(f"{group}/{name}" for name in names) for group in ("heldout", *NAMED) for names in MEASURES),
    ("proxy/frechet_distance", "proxy/class_accuracy"),
)  # fmt: skip


def train_gen(
    codes: Path, out: Path | None, recipe: str, overrides: Sequence[str] = (), *, device: str = "auto",
    from_weights: Path | None = None, track: str | None = None, heldout: str | None = None,
    reading: dict[str, Any] | None = None,
) -> Result:  # fmt: skip
    """Code store -> RUN/generator.pt. Resumes RUN; a finished run returns at once. track, heldout: as the options.

    from_weights: a generator's file, or a training state, whose tensors a new run begins with."""
    resolved = recipes.load_recipe(recipe, overrides, "generator")
    cfg = resolved.generator
    assert cfg is not None
    opened = registry.open_codes(codes, cfg, resolved.seed)
    store, tokenizer, batches, m = opened.store, opened.tokenizer, opened.batches, opened.store.manifest
    named = open_heldout(heldout, m, reading) if heldout else None
    kernel = registry.find_kernel(cfg, device)
    if cfg.proxy.samples:
        watch.open_proxy(cfg.proxy, store, torch.device("cpu"))  # fails, if it does, before the run folder is claimed
    final = (out or default_folder(resolved, "generator")) / "generator.pt"
    setting = weights_setting(from_weights)
    warm, imported = None, None
    if from_weights and is_new(final):  # fails, if it does, before the run folder has these settings
        warm, imported = warm_start(cfg, opened, resolved.seed, from_weights)
    if not final.exists():
        verify(codes)

    def make(training: Training) -> dict[str, Any]:
        """Train in the run's folder. -> the content of generator.pt, with the trained weights or their average."""
        tokenizer.to(training.device)
        generator = warm or registry.build(cfg, tokenizer, len(m.condition_names))
        generator.network.to(training.device).train()
        record = warm_start_record(training.out, setting, imported)
        registry.prepare(generator, cfg, kernel)
        measured = generator.begin(cfg, store)
        items = f"{batches.images:,} {'recordings' if m.speech else 'images'} × {m.views} views"
        progress.say(f"{parameters(generator.network):,} parameters, {items}")
        draw = partial(watch.training_curves, training.out / "curves.png", generator_run=training.out)
        observers = [watch.generator_monitor(generator, tokenizer, cfg, batches, named)]
        if cfg.proxy.samples:
            observers.append(watch.proxy_score(generator, tokenizer, cfg, store))
        flops = plan.generator_flops(cfg, tokenizer.cfg, plan.mean_of(store))
        players = [GeneratorTask(generator, metadata(generator, cfg.family, m.tokenizer, m.condition_names))]
        generator.network = training.fit(players, batches, cfg.train, batches.images, observers, flops, draw)
        provenance: dict[str, Any] = {"recipe": resolved.model_dump(mode="json"), **record}
        provenance |= {"store": {"path": str(codes.resolve()), "digest": m.digest()}}
        speech = {"text": m.speech.text} if m.speech else {}
        provenance |= {"reference": store_reference(codes, m), **measured, **versions()}
        return registry.pack(generator, cfg, opened.content, list(m.condition_names), provenance=provenance, **speech)

    recorded = recipe_settings(resolved, "generator")
    settings = {"command": "train-gen", "recipe": recorded, "store": m.digest(), **setting}
    train_once(final, resolved.seed, settings, device, make, track)
    loaded = registry.load(final)
    count = parameters(loaded.generator.network)
    values = {"generator": str(final), "digest": loaded.digest, "parameters": count}
    for names in REPORTED:
        values |= last_metrics(final.parent, names)
    asked = ("--text", "...", "--prompt", "a.wav", "--prompt-text", "...") if m.speech else ("--classes", "all")
    return Result("generator trained", values, rdpm_command("sample", "--ckpt", final, *asked))

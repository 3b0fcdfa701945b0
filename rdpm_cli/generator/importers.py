"""Warm starts of generators from rdpm's own files, whose classes, grid, codes and sizes may be others.

Legend: K classes or units of text, L positions of a grid, C code width, D width."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rdpm_cli import checkpoint, files, progress
from rdpm_cli.errors import CheckpointError, some_of
from rdpm_cli.generator import registry
from rdpm_cli.generator.config import GeneratorConfig
from rdpm_cli.generator.contract import Generator
from rdpm_cli.runs import text_table
from rdpm_cli.tokenizer.importers import fit

POSITIONS, CLASS_LATENTS = "trunk.positions.weight", "trunk.class_latents.weight"
OUTCOMES = ("taken", "interpolated", "fresh")
MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}  # by the axes of a grid


class Imported(NamedTuple):
    """The outcome of a warm start."""

    file: str
    weights: str  # ema, or raw: as the optimiser left them
    model: str | None  # digest of a generator's file
    outcome: dict[str, str]  # one of OUTCOMES for every tensor here, in the network's order
    left: dict[str, str]  # names of the file that nothing here took, and the reason
    tables: list[str]  # tensors here with a row a class
    classes: dict[str, list[str]]  # names: matched, fresh (here alone), left (in the file alone)
    notes: list[str]

    def named(self, outcome: str) -> list[str]:
        return [name for name, value in self.outcome.items() if value == outcome]

    def record(self) -> dict[str, Any]:
        """For the generator's provenance."""
        lists = {"interpolated": self.named("interpolated"), "fresh": self.named("fresh")}
        left = [f"{name}: {reason}" for name, reason in self.left.items()]
        counts = {"weights": self.weights, "model": self.model, "taken": len(self.named("taken"))}
        return {**counts, **lists, "left": left, "classes": self.classes, "notes": self.notes}

    def summary(self) -> str:
        taken, interpolated, fresh = (len(self.named(outcome)) for outcome in OUTCOMES)
        counts = f"{taken} tensors taken, {interpolated} interpolated, {len(self.left)} left, {fresh} initialised here"
        return f"{self.file} (weights: {self.weights}): {counts}"

    def lines(self) -> Iterator[str]:
        """A table of the groups of tensors for the terminal; the record has every name."""
        yield f"warm start from {self.summary()}"
        groups: dict[str, list[str]] = {}
        for name in self.outcome:
            parts = [part for part in name.split(".")[:-1] if not part.isdigit()]
            groups.setdefault(".".join(parts[:2]) or name, []).append(name)
        matched, fresh, left = (self.classes[name] for name in ("matched", "fresh", "left"))
        rows = f"{len(matched) + 1} of {len(matched) + len(fresh) + 1}"
        table = [["tensors", *OUTCOMES, "rows of classes"]]
        for group, names in groups.items():
            counts = [sum(self.outcome[name] == outcome for name in names) for outcome in OUTCOMES]
            by_name = any(name in self.tables and self.outcome[name] != "fresh" for name in names)
            table.append([group, *map(str, counts), rows if by_name else ""])
        yield text_table(table)
        lists = [f"; {word}: {some_of(names)}" for word, names in (("fresh", fresh), ("not here", left)) if names]
        yield f"  classes by name: {len(matched)} of {len(matched) + len(fresh)}, and the null class{''.join(lists)}"
        yield from (f"  note: {note}" for note in self.notes)


def metadata(generator: Generator, family: str, tokenizer: str, class_names: Sequence[str]) -> dict[str, Any]:
    """What no tensor of a generator shows, kept in its training states. tokenizer: digest."""
    trunk = generator.network.trunk
    sizes = {"family": family, "network": trunk.cfg.model_dump(mode="json"), "grid": list(trunk.grid)}
    return {**sizes, "tokenizer": tokenizer, "class_names": list(class_names)}


def warm_start(cfg: GeneratorConfig, opened: registry.Codes, seed: int, path: Path) -> tuple[Generator, Imported]:
    """A new generator that begins with the weights of a file. What the file does not fill is a function of the seed."""
    torch.manual_seed(seed)
    m = opened.store.manifest
    generator = registry.build(cfg, opened.tokenizer, len(m.condition_names))
    here = metadata(generator, cfg.family, m.tokenizer, m.condition_names)
    return generator, load_weights(generator, here, path)


def load_weights(generator: Generator, here: dict[str, Any], path: Path) -> Imported:
    """Fill a generator with every layer of the file that fits. Raises CheckpointError if no block does.

    here: the generator's `metadata`. Rows of classes go by name; positions of another grid are interpolated."""
    tensors, there, kind, digest = _read(path)
    network = generator.network
    state = {name: parameter.detach() for name, parameter in network.named_parameters()}
    left = {name: "measured on the store" for name, _ in network.named_buffers() if name in tensors}
    values = {name: value for name, value in tensors.items() if name not in left}
    interpolated = _onto_grid(values, there["grid"], here["grid"], left)
    tables = [f"trunk.{name}" for name in network.trunk.class_tables]
    numbers = {name: number for number, name in enumerate(there["class_names"])}
    matched = [name for name in here["class_names"] if name in numbers]
    # the null class is the last row
    rows = [here["class_names"].index(name) for name in matched] + [len(here["class_names"])]
    rows_there = [numbers[name] for name in matched] + [len(numbers)]
    for name in values.keys() & tables:
        if values[name].shape[1] == state[name].shape[1]:
            values[name] = state[name].index_copy(0, torch.tensor(rows), values[name][rows_there])
    filled, refused = fit(values, state)
    if not any(".attn.qkv." in name for name in filled):
        reason = next((why for name, why in refused.items() if ".attn.qkv." in name), "it has no such network")
        raise CheckpointError(f"no block of {path} fits this recipe: {reason}", "give the recipe the file's sizes")
    for name, value in filled.items():
        state[name].copy_(value)
    outcome = dict.fromkeys(state, "fresh") | dict.fromkeys(filled, "taken")
    outcome |= dict.fromkeys(filled.keys() & interpolated, "interpolated")
    classes = {"matched": matched, "fresh": [name for name in here["class_names"] if name not in numbers]}
    classes["left"] = [name for name in numbers if name not in set(matched)]
    notes = _differences(there, here, path)
    return Imported(path.name, kind, digest, outcome, left | refused, tables, classes, notes)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], str, str | None]:
    """The tensors of a training state, the raw ones, or of a generator's file; their metadata; raw or ema; the digest.

    Raises CheckpointError."""
    if checkpoint.STATE_NAME.fullmatch(path.name):
        player = checkpoint.load_state(path, hint="copy both again").get("players", {}).get("generator", {})
        if "metadata" not in player:
            message = f"{path} is no training state of a generator, or does not record its classes, as earlier ones"
            raise CheckpointError(message, "name a generator.pt; `rdpm ema RUN` makes one of a run's snapshots")
        return player["model"], player["metadata"], "raw", None
    loaded = registry.load(path)
    recipe = loaded.provenance.get("recipe", {}).get("generator") or {}
    there = metadata(loaded.generator, loaded.sampling.family, loaded.tokenizer_digest, loaded.class_names)
    kind = "ema" if recipe.get("train", {}).get("ema") else "raw"
    return loaded.generator.network.state_dict(), there, kind, loaded.digest


def _onto_grid(values: dict[str, Tensor], old: list[int], new: list[int], left: dict[str, str]) -> list[str]:
    """Bring the tables with a vector a position to another grid. -> their names; those that cannot be brought, left."""
    names = [name for name in (POSITIONS, CLASS_LATENTS) if name in values and old != new]
    if len(old) != len(new):
        left |= dict.fromkeys(names, f"the grid is {old} in the file, {new} here")
        for name in names:
            del values[name]
        return []
    for name in names:
        K = len(values[name]) if name == CLASS_LATENTS else 1
        table_KLC = resample(values[name].reshape(K, math.prod(old), -1), old, new)
        values[name] = table_KLC.flatten(1) if name == CLASS_LATENTS else table_KLC[0]
    return names


def resample(table_KLC: Tensor, old: Sequence[int], new: Sequence[int]) -> Tensor:
    """The vectors of positions on another grid of as many axes, linear along each: (K, prod(new), C).

    Corners keep their vectors, so that no new position lies outside the old ones."""
    grid = table_KLC.mT.unflatten(2, tuple(old))
    return F.interpolate(grid, tuple(new), mode=MODES[len(old)], align_corners=True).flatten(2).mT


def _differences(there: dict[str, Any], here: dict[str, Any], path: Path) -> list[str]:
    """What differs and no shape shows. Another tokenizer is a warning."""
    if there["tokenizer"] != here["tokenizer"]:
        reason = "what it says about codes (heads, embeddings of codes, inputs) is of another codebook"
        progress.warn(f"{path} is a generator of another tokenizer: {reason}", once=True)
    old, new = ({**fields, "class_names": None} for fields in (there, here))
    return files.differences(old, new)

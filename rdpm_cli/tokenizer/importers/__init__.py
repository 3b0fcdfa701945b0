"""Warm starts: a tokenizer filled from a public VQ tokenizer's weights (VAR, taming-transformers, LlamaGen) or our own.

reading.py opens a file and finds its layout; one module a layout maps names; fitting.py compares shapes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rdpm_cli.errors import CheckpointError
from rdpm_cli.tokenizer.importers import fitting, reading
from rdpm_cli.tokenizer.model import Tokenizer

__all__ = ["Imported", "load_weights"]


@dataclass(frozen=True)
class Imported:
    """What came of a file. taken, left: names as in the file; fresh: names here that keep their initial values."""

    file: str
    layout: str
    taken: list[str]
    left: dict[str, str]  # name -> why
    fresh: list[str]
    notes: list[str]
    overrides: list[str]  # of the recipe, with which more would fit

    def record(self) -> dict[str, Any]:
        """For the tokenizer's provenance."""
        left = [f"{name}: {why}" for name, why in self.left.items()]
        return {"layout": self.layout, "taken": len(self.taken), "left": left, "fresh": self.fresh, "notes": self.notes}

    def lines(self) -> Iterator[str]:
        """For the person watching."""
        yield f"warm start from {self.file} ({self.layout}): {len(self.taken)} tensors taken, {len(self.left)} left"
        for prefix, names in _grouped(self.left).items():
            example = f"{names[0]} is " if " there, " in self.left[names[0]] else ""
            yield f"  left {prefix} ({len(names)}): {example}{self.left[names[0]]}"
        if self.fresh:
            yield f"  not in it, begun anew: {', '.join(f'{p} ({len(n)})' for p, n in _grouped(self.fresh).items())}"
        yield from (f"  note: {note}" for note in self.notes)
        if self.overrides:
            yield f"  the file's own sizes: {' '.join(self.overrides)}"


def _grouped(names: "dict[str, str] | list[str]") -> dict[str, list[str]]:
    """Names by the part they belong to: `encoder`, `loss`, `quantize.quant_resi`."""
    groups: dict[str, list[str]] = {}
    for name in names:
        first, second = [*name.split("."), ""][:2]
        groups.setdefault(f"{first}.{second}" if first in {"quantize", "quantizer"} else first, []).append(name)
    return groups


def load_weights(tokenizer: Tokenizer, path: Path) -> Imported:
    """Fill a tokenizer with every layer of the file that fits it.

    Raises CheckpointError for a file that cannot be read, is of no known layout, or of whose encoder nothing fits.
    """
    found = reading.read(path)
    plan, cfg, state = found.plan, tokenizer.cfg, tokenizer.state_dict()
    values = {ours: _join(found, names) for ours, names in plan.sources.items()}
    overrides = fitting.overrides(values, plan, cfg)
    fitting.take_codebook(values, plan, state)
    filled, refused = fitting.fit(values, state)
    if not any(name.startswith("encoder.") for name in filled):
        first = next((f": {name} is {why}" for name, why in refused.items() if name.startswith("encoder.")), "")
        raise CheckpointError(
            f"nothing of the encoder in {path} ({found.layout}) fits this recipe{first}",
            f"these recipe overrides fit it: {' '.join(overrides)}"
            if overrides
            else "the file lacks layers: get it again",
        )
    notes = fitting.notes(plan, cfg)
    if fitting.same_bias(filled, plan, cfg.quantizer):
        notes.append(f"quantizer.phi is rewritten so that bias(q) under {cfg.quantizer.bias} stays what it was there")
    if cfg.quantizer.bias == "none" and plan.bias != "none":
        notes.append("quantizer.bias is none: the file's bias convolution is left")
    tokenizer.load_state_dict({**state, **filled})
    left = plan.left | {name: why for ours, why in refused.items() for name in plan.sources.get(ours, [])}
    return Imported(
        path.name,
        found.layout,
        taken=[name for ours in filled for name in plan.sources.get(ours, [])],
        left=left,
        fresh=[name for name in state if name not in filled],
        notes=notes,
        overrides=overrides,
    )


def _join(found: reading.WeightFile, names: list[str]) -> Tensor:
    """Several public tensors as one of ours, fp32. Raises CheckpointError where they are spoiled."""
    parts = [found.weights[name].float() for name in names]
    if len(parts) > 1 and (parts[0].ndim == 0 or len({part.shape for part in parts}) > 1):
        raise CheckpointError(f"{found.path}: {', '.join(names)} do not fit together", "get the file again")
    if broken := [name for name, part in zip(names, parts, strict=True) if not part.isfinite().all()]:
        raise CheckpointError(f"{found.path}: {broken[0]} holds values that are not finite", "get the file again")
    return parts[0] if len(parts) == 1 else torch.cat(parts)

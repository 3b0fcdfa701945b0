"""Warm starts of train-tokenizer: what --from-weights does to a run's beginning, and what a resumed run knows of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rdpm_cli import config, files, progress
from rdpm_cli.errors import CheckpointError

if TYPE_CHECKING:
    from rdpm_cli.tokenizer.importers import Imported
    from rdpm_cli.tokenizer.model import Tokenizer

NOTE = "from_weights.json"  # in the run folder


@dataclass
class WarmTokenizer:
    """A new tokenizer that took what fits of a file."""

    tokenizer: Tokenizer
    imported: Imported

    @property
    def placed_codebook(self) -> bool:
        """Did the codebook come with it?"""
        return "quantizer.books" not in self.imported.fresh


def identity(path: Path | None) -> dict[str, Any]:
    """The run setting that tells the file, wherever it lies; none without one. Raises CheckpointError."""
    if path is None:
        return {}
    if not path.is_file():
        raise CheckpointError(f"--from-weights: {files.no_file(path)}", "give the file of the weights")
    return {"from_weights": {"sha256": files.sha256_file(path)}}


def prepare(cfg: config.TokenizerConfig, seed: int, out: Path, path: Path | None) -> WarmTokenizer | None:
    """The tokenizer a warm run begins with; None where there is no file, or the run has begun and keeps its own state.

    Raises CheckpointError, before anything is written, for a file that is of no use for this recipe.
    """
    import torch

    from rdpm_cli.tokenizer import importers
    from rdpm_cli.tokenizer.model import Tokenizer
    from rdpm_cli.training import checkpoint

    if path is None or (out / "tokenizer.pt").exists() or checkpoint.found(out / "checkpoints"):
        return None
    torch.manual_seed(seed)  # as every run: what the file does not fill is a function of the seed
    tokenizer = Tokenizer(cfg, cfg.loss.weight)
    return WarmTokenizer(tokenizer, importers.load_weights(tokenizer, path))


def record(out: Path, given: dict[str, Any], warm: WarmTokenizer | None) -> dict[str, Any]:
    """The provenance of a warm start, said and kept in the run folder as it happens, read from there later."""
    if not given:
        return {}
    if warm is None:
        return {"from_weights": files.read_json(out / NOTE)}
    from rdpm_cli.engine.runs import first_process

    found = {**given["from_weights"], "file": warm.imported.file, **warm.imported.record()}
    if first_process():
        for line in warm.imported.lines():
            progress.say(line)
        files.write_json(out / NOTE, found)
    return {"from_weights": found}

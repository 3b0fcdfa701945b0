"""A weight file, ours or public, as plain tensors and the plan of its layout. Nothing in it is ever run."""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from rdpm_cli import files, modelfile, tensorfile
from rdpm_cli.config import TokenizerArchitecture
from rdpm_cli.errors import CheckpointError
from rdpm_cli.tokenizer.importers import llamagen, taming, var
from rdpm_cli.tokenizer.importers.layout import Layout, Plan
from rdpm_cli.tokenizer.model import KIND

LAYOUTS: tuple[Layout, ...] = (var, taming, llamagen)
WRAPPERS = ("ema", "model", "state_dict")  # where public files keep their weights, the best first
KNOWN = (
    "known are VAR (vae_ch160v4096z32.pth), taming-transformers (VQGAN f16, last.ckpt), LlamaGen (vq_ds16_c2i.pt), "
    "and rdpm's own tokenizer.pt"
)


@dataclass(frozen=True)
class WeightFile:
    """layout: the name people know it by. weights: public name -> tensor."""

    path: Path
    layout: str
    weights: dict[str, Tensor]
    plan: Plan


def read(path: Path) -> WeightFile:
    """The tensors of a file and what becomes of them. Raises CheckpointError."""
    content = _load(path)
    if isinstance(content, dict) and str(content.get("format")) in modelfile.FORMATS:
        return _own(content, path)
    for weights in _state_dicts(content):
        for layout in LAYOUTS:
            if layout.MARK in weights:
                return WeightFile(path, layout.NAME, weights, layout.plan(weights))
    raise CheckpointError(f"{path} holds the weights of no known tokenizer", KNOWN)


def _load(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(files.no_file(path), KNOWN)
    try:
        return tensorfile.read(path)
    except tensorfile.Unreadable as error:
        what = tensorfile.unknown(error)
        if what is None:
            raise CheckpointError(f"{path} cannot be read as weights: it holds none, or is truncated", KNOWN) from error
        if tensorfile.is_refused(error):
            raise CheckpointError(f"{path} is refused: {tensorfile.reason(error)}", KNOWN) from error
        raise CheckpointError(
            f"{path} holds more than tensors ({what}), which could run code", convert(path)
        ) from error


def convert(path: Path) -> str:
    """The command that copies the tensors of a file, and runs nothing that is in it."""
    copy = path.with_name(f"{path.stem}-tensors.pt")
    command = f"python -m rdpm_cli.tensorfile {shlex.quote(str(path))} {shlex.quote(str(copy))}"
    return f"copy its tensors, which runs nothing of it, and give the copy: {command}"


def _state_dicts(content: Any) -> Iterator[dict[str, Tensor]]:
    """What may be the state dict in a file: its wrapped ones, then itself."""
    if not isinstance(content, dict):
        return
    for found in (*(content.get(key) for key in WRAPPERS), content):
        if isinstance(found, dict):
            yield {name: value for name, value in found.items() if isinstance(value, Tensor) and isinstance(name, str)}


def _own(content: dict[str, Any], path: Path) -> WeightFile:
    """A tokenizer.pt: every name is ours already."""
    modelfile.check(content, str(path), KIND)
    cfg = modelfile.config_of(TokenizerArchitecture, content["config"], str(path))
    weights: dict[str, Tensor] = content["weights"]
    plan = Plan(
        {name: [name] for name in weights},
        {},
        bias=cfg.quantizer.bias,
        latents=cfg.autoencoder.latent_norm,
        groups=cfg.autoencoder.groups,
    )
    return WeightFile(path, "rdpm", weights, plan)

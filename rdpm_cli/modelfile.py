"""Model files: one plain dict that `torch.load(weights_only=True)` reads (DESIGN: checkpoints).

{format, version, config, weights, class_names, provenance, ...}. A model's digest covers weights and config, never
provenance: the same for the file, a store's copy of it and the one inside a generator.
"""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rdpm_cli import __version__, files, tensorfile
from rdpm_cli.errors import CheckpointError, RecipeError
from rdpm_cli.recipe_files import S, validate

VERSION = 1
FORMATS = {"rdpm-tokenizer": "tokenizer", "rdpm-generator": "generator", "rdpm-judge": "judge"}
KINDS = "name a tokenizer.pt, generator.pt or judge.pt"
MAKERS = {
    "": KINDS,
    "rdpm-tokenizer": "make one with `rdpm train-tokenizer IMAGES --recipe NAME`",
    "rdpm-generator": "make one with `rdpm train-gen CODES --recipe NAME`",
    "rdpm-judge": "make one with `rdpm eval judge IMAGES OUT`",
}


def model_digest(weights: dict[str, Tensor], config: dict[str, Any]) -> str:
    """sha256 over the sorted (name, dtype, shape, bytes) and the canonical JSON of the config."""
    total = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name].detach().cpu().contiguous()
        total.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    total.update(files.canonical_json(config).encode())
    return total.hexdigest()


def pack(kind: str, config: dict[str, Any], model: nn.Module, **more: Any) -> dict[str, Any]:
    """The plain dict of a model file. more: class_names, provenance, or what the kind needs."""
    weights = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
    head = {"format": kind, "version": VERSION, "rdpm": __version__, "torch": str(torch.__version__)}
    return {**head, "config": config, "weights": weights, "digest": model_digest(weights, config), **more}


def save(path: Path, content: dict[str, Any]) -> None:
    """Write atomically, through an open file: a path would put its name into the zip and change the bytes.

    Raises RunError where the disk is full.
    """
    with files.space_is_told(path.parent, lambda: tensorfile.size(content)):
        files.write_atomic(path, lambda file: tensorfile.write(file, content))


def load(path: Path, kind: str = "") -> dict[str, Any]:
    """The dict of a model file of the given kind. Raises CheckpointError."""
    if not path.is_file():
        raise CheckpointError(files.no_file(path), MAKERS[kind])
    try:
        content = tensorfile.read(path)
    except tensorfile.Unreadable as error:
        why = f"it is none, or is truncated, at {path.stat().st_size:,} bytes"
        if tensorfile.unknown(error):
            why = tensorfile.reason(error)
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {why}", MAKERS[kind]) from error
    check(content, str(path), kind)
    return dict(content)


def check(content: Any, where: str, kind: str = "") -> None:
    """Raise CheckpointError unless content is one of our files, of the kind asked for, with an intact digest."""
    found = content.get("format") if isinstance(content, dict) else None
    if not isinstance(found, str) or found not in FORMATS:
        raise CheckpointError(f"{where} is not an rdpm checkpoint", MAKERS[kind])
    needed = {"version", "config", "weights", "digest", "class_names", "provenance"}
    if lacking := needed - set(content):
        raise CheckpointError(f"{where} is damaged: it lacks {', '.join(sorted(lacking))}", "copy or make it again")
    if kind and found != kind:
        raise CheckpointError(f"{where} is a {FORMATS[found]}, not a {FORMATS[kind]}", MAKERS[kind])
    if content["version"] != VERSION:
        said = f"{where} has format version {content['version']}; this rdpm reads {VERSION}"
        raise CheckpointError(said, "use the rdpm that made it, or make it again")
    if content["digest"] != model_digest(content["weights"], content["config"]):
        raise CheckpointError(f"{where} is damaged: its weights do not match its digest", "copy or make it again")


def config_of(section: type[S], raw: Any, where: str) -> S:
    """A file's config as a section. Raises CheckpointError: another rdpm wrote it."""
    try:
        return validate(section, raw, where)
    except RecipeError as error:
        hint = "another version of rdpm made it; use that one, or make the file again"
        raise CheckpointError(f"{error.message} (in the file's own config)", hint) from error


def fill(model: nn.Module, content: dict[str, Any], where: str) -> None:
    """Load the weights strictly."""
    try:
        model.load_state_dict(content["weights"])
    except RuntimeError as error:
        raise CheckpointError(f"{where} does not fit its own config: {str(error).splitlines()[-1].strip()}") from error

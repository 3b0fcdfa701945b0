"""A model as a folder for the Hugging Face hub, and names of models there: hf://owner/name[@revision].

The folder has the files that huggingface_hub's `save_pretrained` writes: model.safetensors has the tensors, as
generator.NAME and tokenizer.NAME, config.json the rest of the model file, README.md the model card."""

import contextlib
import os
import re
import shutil
from pathlib import Path
from typing import Any

from rdpm_cli import files, progress
from rdpm_cli.errors import CheckpointError, RunError, UsageError

TENSORS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
NAME = re.compile(r"hf:/+(?!datasets/)([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")


def is_exported(path: Path) -> bool:
    """Whether a folder holds a model."""
    return (path / CONFIG).is_file() and (path / TENSORS).is_file()


def weights_file(path: Path) -> Path:
    """The file with the tensors of a model file or an exported folder."""
    return path / TENSORS if is_exported(path) else path


def find(name: str) -> Path:
    """The folder of a model of the hub, fetched where it is not in the hub's cache yet; of other names their path.

    Raises UsageError for a name of another form, RunError where it cannot be fetched."""
    if not name.startswith("hf:/"):
        return Path(name)
    name = re.sub("^hf:/+", "hf://", name)  # pathlib makes one slash of several
    if not (match := NAME.fullmatch(name)):
        raise UsageError(f"{name} is not a name of the hub", "write hf://owner/name or hf://owner/name@revision")
    if progress.quiet or progress.as_json:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # read when the package is imported
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise UsageError(f"{name} needs the package huggingface_hub", "uv pip install 'rdpm[hub]'") from error
    try:
        return Path(snapshot_download(match[1], revision=match[2], allow_patterns=[TENSORS, CONFIG]))
    except (OSError, ValueError) as error:  # huggingface_hub's errors are among them
        reason = str(error).strip().splitlines()[0]
        raise RunError(f"{name} cannot be fetched: {reason}", "check the name, the connection and `hf auth`") from error


def write(folder: Path, content: dict[str, Any], card: str, pictures: dict[str, bytes]) -> None:
    """Write a model file's content as a new folder, all of it or nothing. pictures: PNG files of the card by name.

    Raises UsageError for a folder with files in it, or without the package safetensors."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists already", "name a new folder, or remove it")
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise UsageError("export needs the package safetensors", "uv pip install 'rdpm[hub]'") from error
    tensors, config = _parted(content)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    files.make_folder(temporary)
    with contextlib.ExitStack() as stack:
        stack.enter_context(files.report_full_disk(folder.parent))
        stack.callback(shutil.rmtree, temporary, ignore_errors=True)  # of what fails; else it has its name by then
        save_file(tensors, temporary / TENSORS, metadata={"format": "pt"})
        files.write_json(temporary / CONFIG, config)
        (temporary / TENSORS).chmod((temporary / CONFIG).stat().st_mode)  # safetensors lets only the owner read it
        for name, picture in {CARD: card.encode(), **pictures}.items():
            (temporary / name).write_bytes(picture)
        temporary.replace(folder)


def read(folder: Path) -> Any:
    """The content of the model file that a folder was made from. Raises CheckpointError."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise UsageError(f"{folder} needs the package safetensors", "uv pip install 'rdpm[hub]'") from error
    try:
        tensors = load_file(folder / TENSORS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder / TENSORS} cannot be read: {error}", "copy or fetch it again") from error
    try:
        return _joined(files.read_json(folder / CONFIG), tensors)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / CONFIG} is not of `rdpm export`", "copy or export it again") from error


def _prefix(content: dict[str, Any]) -> str:
    """Of the names of the tensors: the kind of model file."""
    return str(content["format"]).removeprefix("rdpm-") + "."


def _parted(content: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors by name, also those of the tokenizer inside, and the rest."""
    tensors = {_prefix(content) + name: tensor.contiguous() for name, tensor in content["weights"].items()}
    config = {name: value for name, value in content.items() if name != "weights"}
    if "tokenizer" in content:
        inner, config["tokenizer"] = _parted(content["tokenizer"])
        tensors |= inner
    return tensors, config


def _joined(config: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `_parted`."""
    prefix = _prefix(config)
    weights = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    inner = {"tokenizer": _joined(config["tokenizer"], tensors)} if "tokenizer" in config else {}
    return {**config, **inner, "weights": weights}

"""Files of tensors: model files, training states, published weights. The only module that calls torch.load.

A model file is one plain dict, {format, version, config, weights, class_names, provenance, digest, ...}. Its digest
covers weights and config, never provenance, so that it is the same for the file, for a store's copy of it and for
the tokenizer inside a generator.
"""

import hashlib
import http.client
import os
import pickle
import re
import shutil
import urllib.request
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from rdpm_cli import __version__, files, progress
from rdpm_cli.errors import AbsentWeightsError, CheckpointError, RecipeError, RunError
from rdpm_cli.schema import S, validate

VERSION = 1
FORMATS = {"rdpm-tokenizer": "tokenizer", "rdpm-generator": "generator", "rdpm-judge": "judge"}
NEEDED = {"version", "config", "weights", "digest", "class_names", "provenance"}
HINTS = {
    "": "name a tokenizer.pt, generator.pt or judge.pt",
    "rdpm-tokenizer": "make one with `rdpm train-tokenizer IMAGES --recipe NAME`",
    "rdpm-generator": "make one with `rdpm train-gen CODES --recipe NAME`",
    "rdpm-judge": "make one with `rdpm eval judge IMAGES OUT`",
}
RECORD_BYTES = 512  # of a tensor's name, headers and padding in the zip that torch.save writes
STATE_NAME = re.compile(r"step-(\d{9})\.pt")


# ---- files of tensors ----------------------------------------------------------------------------------------------


def read_tensors(path: Path, device: torch.device | str = "cpu", hint: str = "copy the file again") -> Any:
    """The content of a file that torch.save wrote; pickled code never runs. Raises CheckpointError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's warnings about old formats address the caller of torch.load
            return torch.load(path, map_location=device, weights_only=True)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    # In a file that is no checkpoint torch's unpickler raises almost anything, KeyError and IndexError included.
    except Exception as error:
        if isinstance(error, FileNotFoundError | IsADirectoryError):
            raise CheckpointError(files.describe_missing(path), hint) from error
        raise CheckpointError(f"{path} cannot be read as a file of tensors: {_reason(error)}", hint) from error


def _reason(error: Exception) -> str:
    """One line, without torch's advice to load the file without its guard."""
    name = re.search(r"GLOBAL (\S+)|Unsupported class (\S+)", str(error))
    if isinstance(error, pickle.UnpicklingError) and name:
        return f"it holds {(name[1] or name[2]).rstrip('.')} besides tensors, and code in a file is never run"
    text = str(error).partition("Re-running")[0].strip() or type(error).__name__
    return text.splitlines()[0][:200].rstrip(" .")


class _HashedFile:
    """A file to write into: hashes the bytes, and keeps its OSError, of which torch.save makes a RuntimeError."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256 = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _write_tensors(file: BinaryIO, content: Any) -> str:
    """Write content into an open file. -> its sha256. A path instead of a file would put its name into the bytes."""
    hashed = _HashedFile(file)
    try:
        torch.save(content, hashed)  # type: ignore[arg-type]  # torch calls only write and flush
    except RuntimeError:
        if hashed.error:
            raise hashed.error from None
        raise
    return hashed.sha256.hexdigest()


def _file_bytes(content: Any) -> int:
    """Bytes that a file of the tensors in nested dicts and lists takes, rounded up."""
    tensors = [leaf for leaf in tree_leaves(content) if isinstance(leaf, Tensor)]
    return sum(tensor.numel() * tensor.element_size() + RECORD_BYTES for tensor in tensors)


# ---- model files ---------------------------------------------------------------------------------------------------


def model_digest(weights: dict[str, Tensor], config: dict[str, Any]) -> str:
    """sha256 over the sorted (name, dtype, shape, bytes) and the canonical JSON of the config."""
    total = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name].detach().cpu().contiguous()
        total.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    total.update(files.canonical_json(config).encode())
    return total.hexdigest()


def pack(kind: str, config: dict[str, Any], model: nn.Module, **extra: Any) -> dict[str, Any]:
    """The content of a model file. extra: class_names, provenance, and what else the kind needs."""
    weights = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
    head = {"format": kind, "version": VERSION, "rdpm": __version__, "torch": str(torch.__version__)}
    return {**head, "config": config, "weights": weights, "digest": model_digest(weights, config), **extra}


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a model file atomically. Raises RunError if the disk is full."""
    with files.report_full_disk(path.parent, lambda: _file_bytes(content)):
        files.write_atomic(path, lambda file: _write_tensors(file, content))


def load(path: Path, kind: str = "") -> dict[str, Any]:
    """The content of a model file of this kind; "": of any. Raises CheckpointError."""
    content = read_tensors(path, hint=HINTS[kind])
    check(content, str(path), kind)
    return dict(content)


def check(content: Any, origin: str, kind: str = "") -> None:
    """Raise CheckpointError unless content is a model file of this kind with an intact digest."""
    name = content.get("format") if isinstance(content, dict) else None
    if not isinstance(name, str) or name not in FORMATS:
        raise CheckpointError(f"{origin} is not an rdpm checkpoint", HINTS[kind])
    if absent := NEEDED - set(content):
        raise CheckpointError(f"{origin} is damaged: it lacks {', '.join(sorted(absent))}", "copy or make it again")
    if kind and name != kind:
        raise CheckpointError(f"{origin} is a {FORMATS[name]}, not a {FORMATS[kind]}", HINTS[kind])
    if content["version"] != VERSION:
        message = f"{origin} has format version {content['version']}; this rdpm reads {VERSION}"
        raise CheckpointError(message, "use the rdpm that made it, or make it again")
    if content["digest"] != model_digest(content["weights"], content["config"]):
        raise CheckpointError(f"{origin} is damaged: its weights do not match its digest", "copy or make it again")


def config_of(section: type[S], raw: Any, origin: str) -> S:
    """The config in a file as a section. Raises CheckpointError if another version of rdpm wrote it."""
    try:
        return validate(section, raw, origin)
    except RecipeError as error:
        hint = "another version of rdpm made it; use that one, or make the file again"
        raise CheckpointError(f"{error.message} (in the file's config)", hint) from error


def fill(model: nn.Module, content: dict[str, Any], origin: str) -> None:
    """Load the weights strictly. Raises CheckpointError."""
    try:
        model.load_state_dict(content["weights"])
    except RuntimeError as error:
        raise CheckpointError(f"{origin} does not fit its own config: {str(error).splitlines()[-1].strip()}") from error


# ---- training states: RUN/checkpoints/step-000000100.pt and its .sha256 ----------------------------------------------


def states(folder: Path) -> list[tuple[int, Path]]:
    """(step, file) of the training states in a folder, oldest first."""
    matches = [(STATE_NAME.fullmatch(path.name), path) for path in folder.glob("step-*.pt")]
    return sorted((int(match.group(1)), path) for match, path in matches if match)


def save_state(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write the state of a step atomically, then delete all but the newest `keep`. Raises RunError.

    All randomness is a function of (seed, step), so the step alone places a resumed run in its data.
    """
    path, size = folder / f"step-{step:09d}.pt", _file_bytes(state)

    def write(file: BinaryIO) -> None:
        line = f"{_write_tensors(file, state)}  {path.name}\n"  # in the format of `sha256sum --check`
        files.write_atomic(_sum_file(path), lambda sums: sums.write(line.encode()))

    files.need_space(folder, size)
    with files.report_full_disk(folder, lambda: size):
        files.write_atomic(path, write)
    outdated = states(folder)[:-keep]
    if outdated and not _is_intact(path):  # a failing disk must not cost the states that are still good
        path.unlink()
        hint = "it was removed, earlier states are kept; check the disk, then run the same command again"
        raise RunError(f"{path} failed verification after writing", hint)
    for _, previous in outdated:
        previous.unlink()
        _sum_file(previous).unlink(missing_ok=True)
    return path


def _sum_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _is_intact(path: Path) -> bool:
    """Whether the file has the recorded sha256."""
    return _sum_file(path).read_text().split()[:1] == [files.sha256_file(path)]


def load_state(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """One training state. Raises CheckpointError if it is damaged."""
    hint = "delete this file to continue from the state before it"
    if not _sum_file(path).is_file():
        progress.warn(f"{path} has no .sha256 next to it and is not verified")
    elif not _is_intact(path):
        raise CheckpointError(f"{path} is damaged: it differs from {_sum_file(path).name}", hint)
    return dict(read_tensors(path, device, hint))


def load_newest_state(folder: Path, device: torch.device) -> dict[str, Any] | None:
    """The newest state of a run; None if there is none. Raises CheckpointError."""
    saved = states(folder)
    return load_state(saved[-1][1], device) if saved else None


# ---- published weight files of other networks --------------------------------------------------------------------


@dataclass(frozen=True)
class Published:
    """A weight file as its authors publish it; its name ends in the first digits of its sha256."""

    file: str
    url: str

    @property
    def sha256_start(self) -> str:
        """The first digits of its sha256."""
        return Path(self.file).stem.rpartition("-")[2]


@dataclass(frozen=True)
class WeightFile:
    """A weight file on this disk. published: whether it has the published sha256."""

    path: Path
    sha256: str
    published: bool


def weights_hint(published: Published, option: str) -> str:
    """The hint of every error about a weight file. option: how to name another file, e.g. `--weights FILE`."""
    return (
        f"give {option}, or put {published.file} into the folder $RDPM_WEIGHTS or {_hub_folder()}; "
        f"it is published at {published.url}"
    )


def find_weights(published: Published, path: Path | None, option: str, download: bool = False) -> WeightFile:
    """The file at `path`, else in $RDPM_WEIGHTS, else in torch hub's folder; else, with download, fetched there.

    A file named by path may hold other weights of the layout. Raises AbsentWeightsError if there is no file, and
    CheckpointError for a path that is no file, or a looked-up file of another sha256.
    """
    if path and not path.is_file():
        raise CheckpointError(files.describe_missing(path), weights_hint(published, option))
    folders = [Path(os.environ["RDPM_WEIGHTS"])] if os.environ.get("RDPM_WEIGHTS") else []
    candidates = [folder / published.file for folder in (*folders, _hub_folder())]
    file = path or next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None and download:
        file = _fetch(published, candidates[0])
    if file is None:
        raise AbsentWeightsError(published.file, candidates, weights_hint(published, option))
    sha256, start = files.sha256_file(file), published.sha256_start
    if path is None and not sha256.startswith(start):
        raise CheckpointError(
            f"{file} is damaged or another file: its sha256 begins with {sha256[: len(start)]}, not {start}",
            f"copy it again from {published.url}; name other weights of this layout by {option}",
        )
    return WeightFile(file, sha256, sha256.startswith(start))


def _hub_folder() -> Path:
    """Where torch hub, and with it torchvision and torch-fidelity, keep what they fetched."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def _fetch(published: Published, target: Path) -> Path:
    """Download the file to `target`, whole or not at all. Raises RunError, and CheckpointError for other bytes."""
    progress.say(f"fetching {published.url} to {target}")

    def write(file: BinaryIO) -> None:
        hashed, start = _HashedFile(file), published.sha256_start
        with urllib.request.urlopen(published.url, timeout=60) as answer:
            shutil.copyfileobj(answer, hashed)
        if not (sha256 := hashed.sha256.hexdigest()).startswith(start):
            message = f"{published.url} gave a file whose sha256 begins with {sha256[: len(start)]}, not {start}"
            raise CheckpointError(message, "try again, or fetch it in another way")

    try:
        files.write_atomic(target, write)
    except (OSError, http.client.HTTPException) as error:
        hint = f"fetch it in another way and put it into {target.parent}"
        raise RunError(f"{published.url} cannot be fetched: {error}", hint) from error
    return target


def read_weights(path: Path, network: str, hint: str) -> dict[str, Tensor]:
    """The tensors of a weight file by name, on the CPU. network: whose weights, for the error (CheckpointError)."""
    content = read_tensors(path, hint=hint)
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise misfit(path, network, hint, "it is not a dict of tensors")
    return content


def misfit(path: Path, network: str, hint: str, error: Exception | str) -> CheckpointError:
    """The error for a file that does not hold this network's weights."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return CheckpointError(f"{path} does not hold {network} weights: {reason}", hint)

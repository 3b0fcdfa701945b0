"""Files of tensors: model files, training states, published weights. The only module that calls torch.load.

A model file is one plain dict. Its digest covers weights and config, never provenance, so copies of it share it."""

import functools
import hashlib
import io
import os
import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from rdpm_cli import __version__, files, hub, progress
from rdpm_cli.errors import AbsentWeightsError, CheckpointError, RecipeError, RunError
from rdpm_cli.schema import S, validate

VERSION = 1
FORMATS = {"rdpm-tokenizer": "tokenizer", "rdpm-generator": "generator", "rdpm-judge": "judge"}
FORMATS |= {"rdpm-speech-judge": "speech judge"}
NEEDED = {"version", "config", "weights", "digest", "class_names", "provenance"}
STATE_NAME = re.compile(r"step-(\d{9})\.pt")
REBUILD = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter")  # of torch._utils
# Segments that DistributedDataParallel, torch.compile, FSDP and activation checkpointing put into the names of tensors.
WRAPPERS = re.compile(r"(?<![^.])(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


class _Inert(type):
    """A type whose only instance is the class itself, whatever a pickle does to it."""

    def __call__(cls, *_: object, **__: object) -> Any:
        return cls

    def _ignore(cls, *_: object) -> None: ...

    __setstate__ = __setitem__ = append = extend = add = _ignore


class Inert(metaclass=_Inert):
    """Stands for every class, function and object in a public weight file that is not a tensor or a plain container."""

    def __new__(cls, *_: object, **__: object) -> Any:
        return cls


class InertPickle:
    """A pickle module for torch.load that imports and calls nothing but torch's functions for tensors."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if module == "torch._utils" and name in REBUILD:
                return functools.partial(getattr(torch._utils, name))  # new each time: a pickle may set its attributes
            if (module, name) == ("collections", "OrderedDict"):
                return OrderedDict
            value = vars(torch).get(name) if module == "torch" else None
            return value if isinstance(value, torch.dtype) else Inert

    @staticmethod
    def load(file: BinaryIO, **options: Any) -> Any:
        return InertPickle.Unpickler(file, **options).load()


def read_tensors(
    path: Path, device: torch.device | str = "cpu", hint: str = "copy the file again", foreign: bool = False
) -> Any:
    """The content of a file that torch.save wrote; pickled code never runs. Raises CheckpointError.

    foreign: the file may hold objects of any class next to its tensors; they become `Inert`."""
    files.check_tensors(path, hint)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's warnings about old formats address the caller of torch.load
            try:
                return torch.load(path, map_location=device, weights_only=True)
            except pickle.UnpicklingError:  # of TorchScript and of tar files torch raises RuntimeError
                if not foreign:
                    raise
                return torch.load(path, map_location=device, pickle_module=InertPickle)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    # In a file that is no checkpoint torch's unpickler raises almost anything, KeyError and IndexError included.
    except Exception as error:
        message = f"{path} holds no tensors, or holds code, which is never run ({type(error).__name__})"
        raise CheckpointError(message, hint) from error


def _write_tensors(file: BinaryIO, content: Any) -> str:
    """Write content into an open file. -> its sha256. A path instead of a file would put its name into the bytes."""
    sha256 = hashlib.sha256()

    def write(data: Any) -> int:
        sha256.update(data)
        return file.write(data)

    try:
        torch.save(content, SimpleNamespace(write=write, flush=file.flush))  # all that it calls
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # of write; torch closes its zip nevertheless, and fails again
            raise error.__context__ from None
        raise
    return sha256.hexdigest()


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
    with files.report_full_disk(path.parent):
        files.write_atomic(path, lambda file: _write_tensors(file, content))


def file_bytes(path: Path) -> bytes:
    """A model file; of an exported folder the file that it stands for. Raises CheckpointError."""
    if not hub.is_exported(path):
        return path.read_bytes()
    file = io.BytesIO()
    _write_tensors(file, load(path))
    return file.getvalue()


def load(path: Path, kind: str = "") -> dict[str, Any]:
    """The content of a model file, or exported folder, of this kind; "": of any. Raises CheckpointError."""
    content = hub.read(path) if hub.is_exported(path) else read_tensors(path, hint=files.HINTS[kind])
    check(content, str(path), kind)
    return dict(content)


def check(content: Any, origin: str, kind: str = "") -> None:
    """Raise CheckpointError unless content is a model file of this kind with an intact digest."""
    name = content.get("format") if isinstance(content, dict) else None
    if not isinstance(name, str) or name not in FORMATS:
        raise CheckpointError(f"{origin} is not an rdpm checkpoint", files.HINTS[kind])
    if kind and name != kind:
        raise CheckpointError(f"{origin} is a {FORMATS[name]}, not a {FORMATS[kind]}", files.HINTS[kind])
    if content.get("version") != VERSION:
        raise CheckpointError(f"{origin} has format version {content.get('version')}, not {VERSION}", files.HINTS[kind])
    if NEEDED - set(content) or content["digest"] != model_digest(content["weights"], content["config"]):
        raise CheckpointError(f"{origin} is damaged: its weights do not match its digest", "copy or make it again")


def config_of(section: type[S], raw: Any, origin: str) -> S:
    """The config in a file as a section. Raises CheckpointError if another version of rdpm wrote it."""
    try:
        return validate(section, raw, origin)
    except RecipeError as error:
        raise CheckpointError(f"{error.message} (in the file's config)", "another version of rdpm made it") from error


def fill(model: nn.Module, content: dict[str, Any], origin: str) -> None:
    """Load the weights strictly. Raises CheckpointError."""
    try:
        model.load_state_dict(content["weights"])
    except RuntimeError as error:
        raise CheckpointError(f"{origin} does not fit its own config: {_first_fault(error)}") from error


def states(folder: Path) -> list[tuple[int, Path]]:
    """(step, file) of the training states in a folder, RUN/checkpoints/step-000000100.pt, oldest first."""
    matches = ((STATE_NAME.fullmatch(path.name), path) for path in sorted(folder.glob("step-*.pt")))
    return [(int(match[1]), path) for match, path in matches if match]


def save_state(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write the state of a step and its .sha256 atomically, then delete all but the newest `keep`. Raises RunError."""
    path = folder / f"step-{step:09d}.pt"

    def write(file: BinaryIO) -> None:
        line = f"{_write_tensors(file, state)}  {path.name}\n"  # in the format of `sha256sum --check`
        files.write_atomic(Path(f"{path}.sha256"), lambda sums: sums.write(line.encode()))

    with files.report_full_disk(folder):
        files.write_atomic(path, write)
    outdated = states(folder)[:-keep]
    if outdated and not _is_intact(path):  # a failing disk must not cost the states that are still good
        path.unlink()
        raise RunError(f"{path} failed verification after writing and was removed", "check the disk")
    for _, previous in outdated:
        previous.unlink()
        Path(f"{previous}.sha256").unlink(missing_ok=True)
    return path


def _is_intact(path: Path) -> bool:
    """Whether the file has the recorded sha256."""
    record = Path(f"{path}.sha256")
    return record.is_file() and record.read_text("utf-8").split()[:1] == [files.sha256_file(path)]


def load_state(
    path: Path, device: torch.device | str = "cpu", hint: str = "delete this file to continue from the state before it"
) -> dict[str, Any]:
    """One training state. Raises CheckpointError if it is damaged."""
    if not _is_intact(path):
        raise CheckpointError(f"{path} is damaged, or its {path.name}.sha256 is missing", hint)
    return dict(read_tensors(path, device, hint))


def load_newest_state(folder: Path, device: torch.device) -> dict[str, Any] | None:
    """The newest state of a run; None if there is none. Raises CheckpointError."""
    saved = states(folder)
    return load_state(saved[-1][1], device) if saved else None


@dataclass(frozen=True)
class Published:
    """A weight file as its authors publish it. digits: the first of its sha256; None: those at the end of its name."""

    file: str
    url: str
    digits: str | None = None

    def places(self) -> list[Path]:
        """Where it may be: in $RDPM_WEIGHTS, then where torchvision and torch-fidelity keep what they fetched."""
        folders = [os.environ.get("RDPM_WEIGHTS"), f"{torch.hub.get_dir()}/checkpoints"]
        return [Path(folder) / self.file for folder in folders if folder]


@dataclass(frozen=True)
class WeightFile:
    """A weight file on this disk. published: whether it has the published sha256."""

    path: Path
    sha256: str
    published: bool


def weights_hint(published: Published, option: str) -> str:
    """The hint of every error about a weight file. option: how to name another file, e.g. `--weights FILE`."""
    return f"give {option}, or put {published.url} into the folder $RDPM_WEIGHTS or {published.places()[-1].parent}"


def find_weights(published: Published, path: Path | None, option: str, download: bool = False) -> WeightFile:
    """The file at `path`, which may hold other weights, else in one of its places; else, with download, fetched."""
    hint, start = weights_hint(published, option), published.digits
    if start is None:
        start = Path(published.file).stem.rpartition("-")[2]
    places = published.places()
    file = path or next((place for place in places if place.is_file()), None)
    if file is None and download:
        file = places[0]
        files.make_folder(file.parent)
        progress.say(f"fetching {published.url} to {file}")
        try:
            torch.hub.download_url_to_file(published.url, str(file), start, progress=False)
        except (OSError, RuntimeError) as error:
            raise RunError(f"{published.url} cannot be fetched: {error}", hint) from error
    if file is None:
        raise AbsentWeightsError(f"weights absent: {published.file} (searched: {', '.join(map(str, places))})", hint)
    if not file.is_file():
        raise CheckpointError(f"{file} is not a file", hint)
    sha256 = files.sha256_file(file)
    if path is None and not sha256.startswith(start):
        raise CheckpointError(f"{file} is damaged or another file: its sha256 is {sha256}, not {start}...", hint)
    return WeightFile(file, sha256, sha256.startswith(start))


def read_weights(path: Path, network: str, mark: str, hint: str) -> dict[str, Tensor]:
    """The tensors of a weight file by name, on the CPU. network: whose weights, for the error (CheckpointError).

    mark: a name that only this network has."""
    tensors = named_tensors(read_tensors(path, hint=hint, foreign=True), [mark])
    if not tensors:
        raise misfit(path, network, hint, f"it has no dict of tensors with {mark}")
    return tensors


def named_tensors(content: Any, marks: Iterable[str]) -> dict[str, Tensor]:
    """The tensors next to one of these names, in the file's outer dict or one level below; {} if there are none.

    Names lose the segments of wrappers: `module._orig_mod.conv.weight` is `conv.weight`."""
    outer = content if isinstance(content, dict) else {}
    for inner in (outer.get("ema"), outer.get("model"), outer.get("state_dict"), outer):  # of LlamaGen the best first
        items = inner.items() if isinstance(inner, dict) else ()
        named = ((name, value) for name, value in items if isinstance(name, str) and isinstance(value, Tensor))
        tensors = {WRAPPERS.sub("", name): value for name, value in named}
        if not tensors.keys().isdisjoint(marks):
            return tensors
    return {}


def misfit(path: Path, network: str, hint: str, error: Exception | str) -> CheckpointError:
    """The error for a file that does not hold this network's weights."""
    return CheckpointError(f"{path} does not hold {network} weights: {_first_fault(error)}", hint)


def _first_fault(error: Exception | str) -> str:
    """The beginning of an error on one line, without the first line of load_state_dict's, which names only a class."""
    return " ".join(re.sub(r"Error\(s\) in loading state_dict for .*\n", "", str(error)).split())[:200]

"""Published weight files of other networks: looked up, and fetched only when asked. A plain helper of every room."""

import http.client
import os
import shutil
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rdpm_cli import files, progress, tensorfile
from rdpm_cli.errors import AbsentWeightsError, CheckpointError, RunError


@dataclass(frozen=True)
class Published:
    """A weight file as its authors publish it; its name ends in the first digits of its sha256."""

    file: str
    url: str

    @property
    def sha(self) -> str:
        """The first digits of its sha256."""
        return Path(self.file).stem.rpartition("-")[2]


@dataclass(frozen=True)
class Found:
    """A weight file on this disk. published: has it the published sha256?"""

    path: Path
    sha256: str
    published: bool


def hub_folder() -> Path:
    """Where torch hub, and with it torchvision and torch-fidelity, keep what they fetched."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def where_to_put(what: Published, option: str) -> str:
    """The hint of every error about a weight file. option: how to name another file, e.g. `--weights FILE`."""
    return (
        f"give {option}, or put {what.file} into the folder $RDPM_WEIGHTS or {hub_folder()}; "
        f"it is published at {what.url}"
    )


def find(what: Published, given: Path | None, option: str, download: bool = False) -> Found:
    """The path given, else the file in $RDPM_WEIGHTS, else in torch hub's folder; else, with download, fetched there.

    A path that is given may hold other weights of the layout: its sha256 tells. A file found under the published name
    must be the published one. Raises AbsentWeightsError where none is found, and CheckpointError for a given path
    that is no file or a found one of another sha256.
    """
    folder = os.environ.get("RDPM_WEIGHTS")
    if given and not given.is_file():
        raise CheckpointError(files.no_file(given), where_to_put(what, option))
    places = [*([Path(folder) / what.file] if folder else []), hub_folder() / what.file]
    path = given or next((place for place in places if place.is_file()), None)
    if path is None and download:
        path = fetch(what, places[0])
    if path is None:
        raise AbsentWeightsError(what.file, places, where_to_put(what, option))
    sha256 = files.sha256_file(path)
    published = sha256.startswith(what.sha)
    if given is None and not published:
        raise CheckpointError(
            f"{path} is damaged or another file: its sha256 begins with {sha256[: len(what.sha)]}, not {what.sha}",
            f"copy it again from {what.url}; other weights of this layout go by {option}",
        )
    return Found(path, sha256, published)


def fetch(what: Published, target: Path) -> Path:
    """Download the file to `target`, whole or not at all. Raises RunError, and CheckpointError for other bytes."""
    progress.say(f"fetching {what.url} to {target}")
    beside = target.with_name(f"{target.name}.part")
    files.make_folder(target.parent)
    try:
        with urllib.request.urlopen(what.url, timeout=60) as answer, beside.open("wb") as file:
            shutil.copyfileobj(answer, file)
        if not (sha256 := files.sha256_file(beside)).startswith(what.sha):
            raise CheckpointError(
                f"{what.url} gave a file whose sha256 begins with {sha256[: len(what.sha)]}, not {what.sha}",
                "try again, or fetch it in another way",
            )
        os.replace(beside, target)
    except (OSError, http.client.HTTPException) as error:
        raise RunError(
            f"{what.url} cannot be fetched: {error}", f"fetch it in another way and put it into {target.parent}"
        ) from error
    finally:
        beside.unlink(missing_ok=True)
    return target


def read(path: Path, what: str, hint: str) -> dict[str, Tensor]:
    """The tensors of a weight file, by name, on the CPU; no pickle runs. what: whose weights, for the error."""
    try:
        content = tensorfile.read(path)
    except tensorfile.Unreadable as error:
        raise misfit(path, what, hint, tensorfile.reason(error)) from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path} does not hold {what} weights: it is no dict of tensors", hint)
    return content


def misfit(path: Path, what: str, hint: str, error: Exception | str) -> CheckpointError:
    """The error of a file that cannot be read, or does not fit, in one line."""
    first = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return CheckpointError(f"{path} does not hold {what} weights: {first}", hint)

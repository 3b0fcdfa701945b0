"""What a code store says of itself: the plan that fixes its bytes, the table of its shards, checksums of every file.

Files (DESIGN: Code store), for shard s of n images and V views, rows = n·V, a row is one (image, view), view fastest:
codes-s.npy uint16 (rows, T, h, w), labels-s.npy int32 (rows,), index-s.npy int64 (rows,) source index,
latents-s.npy fp16 (n·F, C, h, w) where kept, F = 2 with flips else 1. Beside them: names.jsonl, the tokenizer's file,
bad.jsonl where images were left out, and manifest.json, which is written last.
"""

import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError

from rdpm_cli import files, noise
from rdpm_cli.config import Section
from rdpm_cli.errors import DataError, UsageError

VERSION: Literal[2] = 2
MANIFEST, NAMES, TOKENIZER, BAD = "manifest.json", "names.jsonl", "tokenizer.pt", "bad.jsonl"
AGAIN = "copy it again, or remove it and run the same `rdpm tokenize` again"
LABEL_AND_INDEX = 12  # bytes a row
WITHOUT = f"{AGAIN}: without it every shard is made anew"
THESE_AGAIN = "copy these files again, or remove them and run the same `rdpm tokenize` again"


def image_bytes(positions: int, steps: int, views: int, latents: int) -> int:
    """Bytes of one image in the shards. latents: numbers of z a position, over the images that are kept, fp16."""
    return views * (2 * steps * positions + LABEL_AND_INDEX) + 2 * latents * positions


class DataOrigin(Section):
    """Which images a store was made from."""

    source: str
    count: int
    digest: str


class Plan(Section):
    """Everything that fixes a store's bytes before the first image is read."""

    format: Literal["rdpm-codes"] = "rdpm-codes"
    version: Literal[2] = VERSION
    tokenizer: str
    steps: int
    grid: tuple[int, int]
    codes: int
    channels: int
    views: int
    flip: bool
    latents: bool
    seed: int
    noise: tuple[float, ...]
    transform: str
    resolution: int
    class_names: tuple[str, ...]
    data: DataOrigin
    dtype: str = "uint16"
    device: str
    precision: Literal["fp32", "bf16"]
    micro_batch: int
    shard_images: int

    @property
    def shard_count(self) -> int:
        """Number of shards."""
        return -(-self.data.count // self.shard_images)

    @property
    def mirrored(self) -> int:
        """F, latents an image: the plain one, and the mirrored one with flips."""
        return 2 if self.flip else 1

    def shard_range(self, shard: int) -> range:
        """Source indices of a shard, also of images that were left out."""
        return range(shard * self.shard_images, min((shard + 1) * self.shard_images, self.data.count))

    def image_bytes(self) -> int:
        """Bytes of one image in the shards: codes, labels and index of its views, latents where kept."""
        latents = self.mirrored * self.channels if self.latents else 0
        return image_bytes(math.prod(self.grid), self.steps, self.views, latents)


class Shard(Section):
    """One row of the shard table."""

    images: int
    rows: int
    sha256: dict[str, str]


class Sample(Section):
    """How well one image of the store decodes: its source index, and the PSNR in dB of its first view."""

    index: int
    psnr: float


class Manifest(Plan):
    """The plan and what came of it."""

    images: int
    rows: int
    bad: int
    samples: tuple[Sample, ...]
    files: dict[str, str]
    shards: tuple[Shard, ...]
    sha256: str = ""

    @classmethod
    def load(cls, root: Path) -> "Manifest":
        """Read and check root/manifest.json. Raises UsageError where there is no folder, DataError."""
        if not root.is_dir():
            raise UsageError(f"there is no code store {root}", "make one with `rdpm tokenize IMAGES OUT`")
        path = root / MANIFEST
        if not path.is_file():
            note = root / "run.json"
            started = note.is_file() and "plan" in files.read_json(note)
            hint = "run the same `rdpm tokenize` again to finish it" if started else "make one with `rdpm tokenize`"
            raise DataError(f"{root} is not a finished code store: it has no manifest.json", hint)
        manifest = cls._parse(path)
        if not np.allclose(manifest.noise, noise.fingerprint(manifest.seed), rtol=0, atol=1e-5):
            raise DataError(
                f"{root}: this numpy ({np.__version__}) draws other noise than the one that made the store",
                "install the numpy of the store's run.json, or run `rdpm tokenize` again into a new folder",
            )
        return manifest

    @classmethod
    def _parse(cls, path: Path) -> "Manifest":
        try:
            raw = files.read_json(path)
        except DataError as error:
            raise DataError(error.message, WITHOUT) from error
        version = raw.get("version") if isinstance(raw, dict) else None
        if isinstance(version, int) and version != VERSION:
            hint = "run `rdpm tokenize` again into a new folder"
            raise DataError(f"{path} has format version {version}; this rdpm reads {VERSION}", hint)
        try:
            manifest = cls.model_validate(raw)
        except ValidationError as error:
            raise DataError(f"{path} is not a code store's manifest: {error.errors()[0]['msg']}", WITHOUT) from error
        if manifest.sha256 != manifest.digest():
            raise DataError(f"{path} is damaged: it does not match its own checksum", WITHOUT)
        return manifest

    def digest(self) -> str:
        """Identity of the store: sha256 of the manifest's content."""
        return files.digest(self.model_dump(mode="json", exclude={"sha256"}))

    def sealed(self) -> "Manifest":
        """The same with its own checksum."""
        return self.model_copy(update={"sha256": self.digest()})

    def text(self) -> str:
        """The bytes of manifest.json, as text."""
        return files.json_text(self.model_dump(mode="json"))


def shard_files(shard: int, latents: bool) -> dict[str, str]:
    """kind -> file name; the index is renamed last and marks a whole shard."""
    kinds = ["codes", "labels", *(["latents"] if latents else []), "index"]
    return {kind: f"{kind}-{shard:05d}.npy" for kind in kinds}


def shard_arrays(plan: Plan, images: int) -> dict[str, tuple[type[np.generic], tuple[int, ...]]]:
    """kind -> dtype and shape of a shard's array of so many images."""
    rows = images * plan.views
    arrays: dict[str, tuple[type[np.generic], tuple[int, ...]]] = {
        "codes": (np.uint16, (rows, plan.steps, *plan.grid)),
        "labels": (np.int32, (rows,)),
        "index": (np.int64, (rows,)),
    }
    if plan.latents:
        arrays["latents"] = (np.float16, (images * plan.mirrored, plan.channels, *plan.grid))
    return arrays


class BadImage(Section):
    """A line of bad.jsonl: an image that was left out."""

    index: int
    name: str
    reason: str


def bad_file(shard: int) -> str:
    """Where a shard of an unfinished store notes its bad images."""
    return f"bad-{shard:05d}.jsonl"


def sums_file(shard: int) -> str:
    """Where a shard of an unfinished store notes the sha256 of its files, as they were written."""
    return f"sums-{shard:05d}.json"


def wrong_files(root: Path, sums: dict[str, str], sizes: dict[str, int] | None = None) -> Iterator[str]:
    """A line for every file that is not there, cannot be read, or has another sha256. sizes: bytes, where known."""
    for name, sha256 in sums.items():
        try:
            if files.sha256_file(root / name) != sha256:
                size = of_another_size(root / name, sizes[name]) if sizes and name in sizes else ""
                yield f"{name} {size or 'differs from its checksum'}"
        except (FileNotFoundError, IsADirectoryError):
            yield f"{name} is missing"
        except OSError as error:
            yield f"{name} cannot be read: {error.strerror}"


def npy_bytes(dtype: type[np.generic], shape: tuple[int, ...]) -> int:
    """Size of the file of such an array."""
    header = io.BytesIO()
    about = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, about)
    return header.tell() + math.prod(shape) * np.dtype(dtype).itemsize


def of_another_size(path: Path, wanted: int) -> str:
    """What a file holds and should, where these are not the same; else nothing."""
    size = path.stat().st_size
    return "" if size == wanted else f"holds {size:,} bytes of {wanted:,}"


def bad_lines(bad: list[BadImage]) -> bytes:
    """The content of a file of bad images, in the order of the source."""
    return "".join(json.dumps(b.model_dump()) + "\n" for b in sorted(bad, key=lambda b: b.index)).encode()


def read_bad(path: Path) -> list[BadImage]:
    """The images of such a file; none where it is absent. Raises DataError."""
    if not path.is_file():
        return []
    try:
        return [BadImage.model_validate(line) for line in read_lines(path)]
    except ValidationError as error:
        raise DataError(f"{path} is no list of bad images: {error.errors()[0]['msg']}", AGAIN) from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file. Raises DataError where it is not one."""
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}", AGAIN) from error
    if not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path} does not hold a JSON object a line", AGAIN)
    return rows

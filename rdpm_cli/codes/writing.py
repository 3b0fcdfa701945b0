"""Writing a code store: begun or resumed under one plan, a shard at a time, the manifest last."""

import contextlib
import errno
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdpm_cli import files
from rdpm_cli.codes.manifest import (
    AGAIN,
    BAD,
    MANIFEST,
    NAMES,
    TOKENIZER,
    BadImage,
    Manifest,
    Plan,
    Shard,
    bad_file,
    bad_lines,
    read_bad,
    shard_files,
)
from rdpm_cli.errors import DataError, RunError, UsageError

FULL = (errno.ENOSPC, errno.EDQUOT)
MANIFEST_BYTES = 1000  # about so many a shard
FREE = "free some space and run the same command again"


def check(root: Path, plan: Plan) -> None:
    """Raise UsageError when the folder holds another plan, or something else. Writes nothing."""
    wanted = plan.model_dump(mode="json")
    if (root / MANIFEST).exists():
        there = Manifest.load(root).model_dump(mode="json", include=set(Plan.model_fields))
    elif (root / "run.json").exists():
        there = files.read_json(root / "run.json").get("plan", {})
    elif root.is_dir() and any(p for p in root.iterdir() if not p.name.startswith(".")):
        raise UsageError(f"{root} is not empty and not a code store", "choose another folder")
    else:
        there = wanted
    if changed := files.differences(there, wanted):
        raise UsageError(
            f"{root} was begun with other settings: {'; '.join(changed[:6])}", "choose another folder, or remove it"
        )


def begin(root: Path, plan: Plan, record: dict[str, Any], tokenizer: bytes, names: Sequence[str]) -> None:
    """Start or resume writing: note the plan in run.json, write the files beside the shards.

    A finished store is left alone, unless files of it are gone: then it is unfinished again. Raises UsageError for
    another plan, RunError when the disk is too small.
    """
    check(root, plan)
    files.write_json(root / "run.json", {**record, "plan": plan.model_dump(mode="json")})
    if is_finished(root, plan):
        return
    for left in root.glob(".*.tmp"):  # of a process that was killed; we hold the lock
        left.unlink()
    (root / MANIFEST).unlink(missing_ok=True)
    lines = "".join(json.dumps({"index": i, "name": name}) + "\n" for i, name in enumerate(names)).encode()
    need_space(root, plan, len(tokenizer) + len(lines))
    files.write_atomic(root / TOKENIZER, lambda file: file.write(tokenizer))
    files.write_atomic(root / NAMES, lambda file: file.write(lines))


def is_finished(root: Path, plan: Plan) -> bool:
    """Is there a manifest, and every file that it lists?"""
    if not (root / MANIFEST).exists() or missing_shards(root, plan):
        return False
    return all((root / name).exists() for name in Manifest.load(root).files)


def missing_shards(root: Path, plan: Plan) -> list[int]:
    """Shards that lack a file, or the reason why an image was left out."""
    reasons = {bad.index for bad in read_bad(root / BAD)}
    return [shard for shard in range(plan.shard_count) if not _is_whole(root, plan, shard, reasons)]


def _is_whole(root: Path, plan: Plan, shard: int, reasons: set[int]) -> bool:
    if not all((root / name).exists() for name in shard_files(shard, plan.latents).values()):
        return False
    left_out = set(plan.shard_range(shard)) - set(_index(root, shard).tolist())
    return not left_out or left_out <= reasons | {bad.index for bad in read_bad(root / bad_file(shard))}


def _index(root: Path, shard: int) -> NDArray[np.int64]:
    """The source indices of a shard's rows. Raises DataError."""
    path = root / shard_files(shard, False)["index"]
    try:
        index: NDArray[np.int64] = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read: {error}", AGAIN) from error
    return index


def write_shard(root: Path, shard: int, arrays: dict[str, NDArray[Any]], bad: list[BadImage]) -> None:
    """Write a shard's bad images and arrays, the index last."""
    if bad:
        lines = bad_lines(bad)
        files.write_atomic(root / bad_file(shard), lambda file: file.write(lines))
    else:
        (root / bad_file(shard)).unlink(missing_ok=True)
    for kind, name in shard_files(shard, "latents" in arrays).items():
        buffer = io.BytesIO()
        np.save(buffer, arrays[kind], allow_pickle=False)
        files.write_atomic(root / name, lambda file, data=buffer: file.write(data.getbuffer()))  # type: ignore[misc]


def gather_bad(root: Path, plan: Plan) -> list[BadImage]:
    """The images that the shards leave out, written to bad.jsonl; no such file where there are none."""
    noted = [read_bad(root / BAD), *(read_bad(root / bad_file(shard)) for shard in range(plan.shard_count))]
    reasons = {bad.index: bad for part in noted for bad in part}
    kept = [_index(root, shard).tolist() for shard in range(plan.shard_count)]
    stored = {index for part in kept for index in part}
    bad = [reasons[index] for index in sorted(reasons) if index not in stored]
    if bad:
        files.write_atomic(root / BAD, lambda file: file.write(bad_lines(bad)))
    else:
        (root / BAD).unlink(missing_ok=True)
    return bad


def tabulate(root: Path, plan: Plan, bad: list[BadImage]) -> Manifest:
    """The manifest of the shards as they lie there, with their checksums, not yet written."""
    table = []
    for shard in range(plan.shard_count):
        rows = len(_index(root, shard))
        sums = {name: files.sha256_file(root / name) for name in shard_files(shard, plan.latents).values()}
        table.append(Shard(images=rows // plan.views, rows=rows, sha256=sums))
    beside = [TOKENIZER, NAMES, *([BAD] if bad else [])]
    return Manifest(
        **plan.model_dump(),
        images=sum(s.images for s in table),
        rows=sum(s.rows for s in table),
        bad=len(bad),
        samples=(),
        files={name: files.sha256_file(root / name) for name in beside},
        shards=tuple(table),
    )


def finish(root: Path, manifest: Manifest) -> None:
    """Write the manifest: no manifest, no store."""
    for shard in range(manifest.shard_count):
        (root / bad_file(shard)).unlink(missing_ok=True)
    text = manifest.sealed().text().encode()
    files.write_atomic(root / MANIFEST, lambda file: file.write(text))


def bytes_missing(root: Path, plan: Plan) -> int:
    """What the missing shards will take, and the manifest."""
    images = sum(len(plan.shard_range(shard)) for shard in missing_shards(root, plan))
    return plan.image_bytes() * images + MANIFEST_BYTES * plan.shard_count


def need_space(root: Path, plan: Plan, beside: int = 0) -> None:
    """Raise RunError when the disk cannot hold what is missing of the store, and `beside` bytes of other files."""
    if bytes_missing(root, plan) + beside > files.free_bytes(root):
        raise no_space(root, plan, beside)


def no_space(root: Path, plan: Plan, beside: int = 0) -> RunError:
    """What to say of a disk that is too small: what is needed, what is there."""
    need, have = bytes_missing(root, plan) + beside, files.free_bytes(root)
    return RunError(f"disk full: {root} needs {_size(need)} more, {_size(have)} are free", FREE)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


@contextlib.contextmanager
def space_is_told(root: Path, plan: Plan) -> Iterator[None]:
    """Turn the system's 'no space left' into `no_space`."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise no_space(root, plan) from error

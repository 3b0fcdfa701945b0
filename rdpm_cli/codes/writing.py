"""Writing a code store: begun or resumed under one plan, a shard at a time, the manifest last."""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdpm_cli import files
from rdpm_cli.codes.manifest import (
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
    sums_file,
    wrong_files,
)
from rdpm_cli.errors import DataError, RunError, UsageError, some_of

MANIFEST_BYTES = 1000  # about so many a shard


def check(root: Path, plan: Plan) -> None:
    """Raise UsageError when the folder holds another plan, or something else. Writes nothing."""
    wanted = plan.model_dump(mode="json")
    if (root / MANIFEST).exists():
        there = Manifest.load(root).model_dump(mode="json", include=set(Plan.model_fields))
    elif (root / "run.json").exists():
        there = _begun_plan(root)
    elif root.is_dir() and any(p for p in root.iterdir() if not p.name.startswith(".")):
        raise UsageError(f"{root} is not empty and not a code store", "choose another folder")
    else:
        there = wanted
    if there.get("seed") != wanted["seed"]:  # which draws other noise
        there, wanted = ({**settings, "noise": ()} for settings in (there, wanted))
    if changed := files.differences(there, wanted):
        raise UsageError(
            f"{root} was begun with other settings: {'; '.join(changed[:6])}", "choose another folder, or remove it"
        )


def _begun_plan(root: Path) -> dict[str, Any]:
    try:
        note = files.read_json(root / "run.json")
    except DataError as error:
        raise DataError(error.message, "remove the folder, or choose another") from error
    plan = note.get("plan") if isinstance(note, dict) else None
    if not isinstance(plan, dict):
        raise UsageError(f"{root} is not a code store: its run.json is of another command", "choose another folder")
    return plan


def begin(root: Path, plan: Plan, record: dict[str, Any], tokenizer: bytes, names: Sequence[str]) -> None:
    """Start or resume writing: note the plan in run.json, write the files beside the shards.

    A finished store is left alone, unless files of it are gone: then it is unfinished again. Of an unfinished one
    every shard is compared with its checksums; what differs, or has none, is missing. Raises UsageError for another
    plan, RunError when the disk is too small.
    """
    check(root, plan)
    for left in root.glob(".*.tmp"):  # of a process that was killed; we hold the lock
        left.unlink()
    files.write_json(root / "run.json", {**record, "plan": plan.model_dump(mode="json")})
    if is_finished(root):
        _remove_notes(root, plan)
        return
    todo, lines = missing_shards(root, plan), name_lines(names)
    files.need_space(root, bytes_missing(plan, todo) + len(tokenizer) + len(lines))
    if (root / MANIFEST).exists():
        _reopen(root, plan)
    drop(root, todo)
    files.write_atomic(root / TOKENIZER, lambda file: file.write(tokenizer))
    files.write_atomic(root / NAMES, lambda file: file.write(lines))


def name_lines(names: Sequence[str]) -> bytes:
    """The content of names.jsonl."""
    return "".join(json.dumps({"index": i, "name": name}) + "\n" for i, name in enumerate(names)).encode()


def is_finished(root: Path) -> bool:
    """Is there a manifest, and every file that it lists?"""
    if not (root / MANIFEST).exists():
        return False
    m = Manifest.load(root)
    return all((root / name).exists() for table in (m.files, *(s.sha256 for s in m.shards)) for name in table)


def missing_shards(root: Path, plan: Plan) -> list[int]:
    """Shards whose files are not all as they were written. Reads them all."""
    sums = _sums(root, plan)
    return [shard for shard in range(plan.shard_count) if shard not in sums or any(wrong_files(root, sums[shard]))]


def unwritten_shards(root: Path, plan: Plan) -> list[int]:
    """Shards that lack a file, in a run: begin has dropped what is not as it was written."""
    every = {shard: shard_files(shard, plan.latents).values() for shard in range(plan.shard_count)}
    return [shard for shard, names in every.items() if not all((root / name).exists() for name in names)]


def drop(root: Path, shards: Sequence[int]) -> None:
    """Let these shards be written again: without an index a shard is none."""
    for shard in shards:
        for name in (shard_files(shard, False)["index"], sums_file(shard), bad_file(shard)):
            (root / name).unlink(missing_ok=True)


def _sums(root: Path, plan: Plan) -> dict[int, dict[str, str]]:
    """shard -> file -> sha256 as written, by the manifest, else by the shards' notes; whole ones only."""
    if (root / MANIFEST).exists():
        m, bad = Manifest.load(root), _bad_of(root, plan)
        lacking = {n: len(plan.shard_range(n)) - shard.images for n, shard in enumerate(m.shards)}
        found = {n: shard.sha256 for n, shard in enumerate(m.shards) if len(bad.get(n, [])) == lacking[n]}
    else:
        found = {shard: _note(root, shard) for shard in range(plan.shard_count)}
    return {n: sums for n, sums in found.items() if set(shard_files(n, plan.latents).values()) <= set(sums)}


def _note(root: Path, shard: int) -> dict[str, str]:
    """The checksums that a shard of an unfinished store has noted; none where the note is absent or damaged."""
    try:
        note = files.read_json(root / sums_file(shard))
    except DataError:
        return {}
    return note if isinstance(note, dict) else {}


def _bad_of(root: Path, plan: Plan) -> dict[int, list[BadImage]]:
    """shard -> images that a finished store left out; none where their list is not as it was written."""
    m, found = Manifest.load(root), dict[int, list[BadImage]]()
    if BAD in m.files and not any(wrong_files(root, {BAD: m.files[BAD]})):
        for bad in read_bad(root / BAD):
            found.setdefault(bad.index // plan.shard_images, []).append(bad)
    return found


def _reopen(root: Path, plan: Plan) -> None:
    """Make a finished store unfinished: what its manifest knows of whole shards goes into their notes."""
    bad = _bad_of(root, plan)
    for shard, sums in _sums(root, plan).items():
        files.write_json(root / sums_file(shard), {**_write_bad(root, shard, bad.get(shard, [])), **sums})
    (root / MANIFEST).unlink()


def _remove_notes(root: Path, plan: Plan) -> None:
    """Remove what only an unfinished store has."""
    for shard in range(plan.shard_count):
        for name in (bad_file(shard), sums_file(shard)):
            (root / name).unlink(missing_ok=True)


def _write_bad(root: Path, shard: int, bad: list[BadImage]) -> dict[str, str]:
    """Write a shard's list of bad images, where there are any. -> its checksum by its name."""
    path, lines = root / bad_file(shard), bad_lines(bad)
    if not bad:
        path.unlink(missing_ok=True)
        return {}
    files.write_atomic(path, lambda file: file.write(lines))
    return {path.name: hashlib.sha256(lines).hexdigest()}


def write_shard(root: Path, shard: int, arrays: dict[str, NDArray[Any]], bad: list[BadImage]) -> None:
    """Write a shard's bad images and arrays, then the checksums of what was in memory, the index last."""
    sums = _write_bad(root, shard, bad)
    for kind, name in shard_files(shard, "latents" in arrays).items():
        buffer = io.BytesIO()
        np.save(buffer, arrays[kind], allow_pickle=False)
        sums[name] = hashlib.sha256(buffer.getbuffer()).hexdigest()
        if kind == "index":
            files.write_json(root / sums_file(shard), sums)
        files.write_atomic(root / name, lambda file, data=buffer: file.write(data.getbuffer()))  # type: ignore[misc]


def listed_bad(root: Path, plan: Plan) -> dict[int, list[BadImage]]:
    """shard -> images that it leaves out, of an unfinished store. Raises DataError."""
    found = {shard: read_bad(root / bad_file(shard)) for shard in range(plan.shard_count)}
    return {shard: bad for shard, bad in found.items() if bad}


def gather_bad(root: Path, plan: Plan) -> list[BadImage]:
    """The images that the shards leave out, written to bad.jsonl; no such file where there are none."""
    bad = [one for part in listed_bad(root, plan).values() for one in part]
    if bad:
        files.write_atomic(root / BAD, lambda file: file.write(bad_lines(bad)))
    else:
        (root / BAD).unlink(missing_ok=True)
    return bad


def tabulate(root: Path, plan: Plan, bad: list[BadImage]) -> Manifest:
    """The manifest of the shards, with their checksums, not yet written. Raises RunError where a file has changed."""
    sums = _sums(root, plan)
    lost = [f"{sums_file(shard)} is damaged" for shard in range(plan.shard_count) if shard not in sums]
    if wrong := [*lost, *(line for note in sums.values() for line in wrong_files(root, note))]:
        raise RunError(f"{root} changed while it was written: {some_of(wrong)}", "run the same command again")
    left_out = Counter(one.index // plan.shard_images for one in bad)
    table = []
    for shard, note in sums.items():
        images = len(plan.shard_range(shard)) - left_out[shard]
        sha256 = {name: note[name] for name in shard_files(shard, plan.latents).values()}
        table.append(Shard(images=images, rows=images * plan.views, sha256=sha256))
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
    """Write the manifest: no manifest, no store. The notes go after it: a kill between the two costs no shard."""
    text = manifest.sealed().text().encode()
    files.write_atomic(root / MANIFEST, lambda file: file.write(text))
    _remove_notes(root, manifest)


def bytes_missing(plan: Plan, todo: Sequence[int]) -> int:
    """What these shards will take, and the manifest."""
    return plan.image_bytes() * sum(len(plan.shard_range(shard)) for shard in todo) + MANIFEST_BYTES * plan.shard_count


def bytes_unwritten(root: Path, plan: Plan) -> int:
    """What a run still has to write."""
    return bytes_missing(plan, unwritten_shards(root, plan))

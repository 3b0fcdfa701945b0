"""Writing a code store: a shard at a time, resumable, the manifest last.

While a store is unfinished, sums-s.json notes the sha256 of the files of shard s as they were written, and bad-s.jsonl
the items that the shard leaves out. Both are removed once the manifest is there.
"""

import contextlib
import hashlib
import io
import math
import time
from collections import defaultdict
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from rdpm_cli import files, runs
from rdpm_cli.codes import store
from rdpm_cli.codes.encode import Encoded, encode_all, micro_batches, report_killed_worker
from rdpm_cli.codes.store import BadItem, CodeStore, DecodedItem, Manifest, Plan, Shard
from rdpm_cli.data.pixels import Pixels, hwc, to_pixels, unreadable
from rdpm_cli.data.source import Source, spread
from rdpm_cli.device import one_thread
from rdpm_cli.distributed import barrier, world
from rdpm_cli.errors import DataError, ImageError, RunError, UsageError, some_of
from rdpm_cli.tokenizer.model import Tokenizer

SUMS_OF_SHARD, BAD_OF_SHARD = "sums-{:05d}.json", "bad-{:05d}.jsonl"
POLL = 0.5  # seconds between looks at the shards of the other ranks
MANIFEST_BYTES = 1000  # about the size of a shard's row in the manifest
DECODED, DIGITS, EXACT = 16, 2, 100.0  # items whose PSNR is recorded; its decimals; dB of an exact copy


@dataclass(frozen=True)
class Work:
    """How a store is made; nothing here changes its bytes, except by the items that are left out.

    workers: processes that share the work. on_bad: stop at the first unreadable item, or leave it out.
    max_bad: share of the items that may be left out.
    """

    workers: int = 1
    on_bad: Literal["stop", "skip"] = "stop"
    max_bad: float = 0.0001

    def bad_allowed(self, count: int) -> int:
        """How many of `count` items may be left out: the share rounded up, without the error of binary fractions."""
        return math.ceil(self.max_bad * count - 1e-9)


def write_store(
    root: Path, source: Source, tokenizer: Tokenizer, tokenizer_file: bytes, plan: Plan, work: Work
) -> Generator[int, None, None]:
    """Write what is missing of the store, yielding the number of items that each piece of work here has finished.

    The first number counts the items that were there already. Several ranks share the shards; the first one holds the
    lock and finishes. tokenizer_file: the bytes of its file. Raises UsageError, ImageError, DataError, RunError.
    """
    rank, size = world()
    with report_killed_worker(), contextlib.ExitStack() as stack:
        stack.enter_context(files.report_full_disk(root, lambda: _bytes(plan, unwritten_shards(root, plan))))
        if rank == 0:
            stack.enter_context(files.only_writer(root))
            _open(root, source, plan, tokenizer_file, work.workers)
        barrier()
        if is_finished(root):
            yield plan.data.count
            return
        shards = unwritten_shards(root, plan)[rank::size]
        barrier()  # every rank has listed the same shards before any of them writes one
        yield plan.data.count - sum(len(plan.shard_range(shard)) for shard in shards)
        yield from _write_shards(root, source, tokenizer, plan, shards, work)
        while unwritten_shards(root, plan):  # of the other ranks; polled, so that a signal can end the wait
            time.sleep(POLL)
            yield 0
        if rank == 0:
            _finish(root, source, tokenizer, plan, work)
        barrier()


# ---- what is there -------------------------------------------------------------------------------------------------


def is_finished(root: Path) -> bool:
    """Whether there is a manifest, and every file that it lists."""
    if not (root / store.MANIFEST).exists():
        return False
    m = Manifest.load(root)
    return all((root / name).exists() for table in (m.files, *(shard.sha256 for shard in m.shards)) for name in table)


def missing_shards(root: Path, plan: Plan) -> list[int]:
    """Shards whose files are not as they were written. Reads all of them."""
    sums = _sums(root, plan)
    return [shard for shard in range(plan.shard_count) if shard not in sums or store.damage(root, sums[shard])]


def unwritten_shards(root: Path, plan: Plan) -> list[int]:
    """Shards that lack a file: less to read than missing_shards, and enough once a run has begun."""
    names = {shard: store.shard_files(shard, plan.latents).values() for shard in range(plan.shard_count)}
    return [shard for shard in names if not all((root / name).exists() for name in names[shard])]


def _sums(root: Path, plan: Plan) -> dict[int, dict[str, str]]:
    """shard -> file -> sha256 as written, by the manifest if there is one, else by the notes of complete shards."""
    sums: dict[int, dict[str, str]] = {}
    if (root / store.MANIFEST).exists():
        bad = _bad(root, plan)
        for shard, row in enumerate(Manifest.load(root).shards):
            # Without the reasons of its bad items, from bad.jsonl, a shard has to be made again.
            if row.images + len(bad[shard]) == len(plan.shard_range(shard)):
                sums[shard] = row.sha256
        return sums
    for shard in range(plan.shard_count):
        with contextlib.suppress(DataError):  # absent or damaged
            sums[shard] = files.read_json(root / SUMS_OF_SHARD.format(shard))
    return {n: note for n, note in sums.items() if set(store.shard_files(n, plan.latents).values()) <= set(note)}


def _bad(root: Path, plan: Plan) -> dict[int, list[BadItem]]:
    """shard -> the items that it leaves out, by the list of a finished store, else by the notes of the shards."""
    bad: dict[int, list[BadItem]] = defaultdict(list)
    if (root / store.MANIFEST).exists():
        sums = {name: sha256 for name, sha256 in Manifest.load(root).files.items() if name == store.BAD}
        items = [] if store.damage(root, sums) else store.read_bad(root / store.BAD)
    else:
        items = [item for n in range(plan.shard_count) for item in store.read_bad(root / BAD_OF_SHARD.format(n))]
    for item in items:
        bad[item.index // plan.shard_images].append(item)
    return bad


# ---- begin or resume -----------------------------------------------------------------------------------------------


def _open(root: Path, source: Source, plan: Plan, tokenizer_file: bytes, workers: int) -> None:
    """Check the plan, drop the shards that are not as they were written, write the files next to the shards.

    A finished store that lost a file becomes an unfinished one. Raises UsageError, RunError when the disk is too small.
    """
    _check_plan(root, plan)
    for leftover in root.glob(".*.tmp"):  # of a process that was killed; this one holds the lock
        leftover.unlink()
    runs.write_run(root, {"workers": workers, "plan": plan.model_dump(mode="json")})
    if is_finished(root):
        _remove_notes(root, range(plan.shard_count))
        return
    missing, names = missing_shards(root, plan), store.name_lines(source.names)
    files.need_space(root, _bytes(plan, missing) + len(tokenizer_file) + len(names))
    if (root / store.MANIFEST).exists():
        bad = _bad(root, plan)
        for shard, sums in _sums(root, plan).items():
            _write_note(root, shard, sums, bad[shard])
        (root / store.MANIFEST).unlink()
    _drop(root, missing)
    # Items that can be read again, for example because a disk has come back, return with their shards.
    _drop(root, [n for n, bad in _bad(root, plan).items() if any(_is_readable(source, plan, item) for item in bad)])
    files.write_atomic(root / store.TOKENIZER, partial(_write, tokenizer_file))
    files.write_atomic(root / store.NAMES, partial(_write, names))


def _check_plan(root: Path, plan: Plan) -> None:
    """Raise UsageError if the folder holds a store of another plan, or something else."""
    new = plan.model_dump(mode="json")
    if (root / store.MANIFEST).exists():
        old = Manifest.load(root).model_dump(mode="json", include=set(Plan.model_fields))
    else:
        old = runs.read_run(root).get("plan", {})
    if not old and any(not path.name.startswith(".") for path in root.iterdir()):
        raise UsageError(f"{root} is not empty and not a code store", "choose another folder")
    if old and old.get("seed") != new["seed"]:  # its noise then differs too, which says nothing more
        old, new = ({**settings, "noise": ()} for settings in (old, new))
    if changed := files.differences(old or new, new):
        hint = "choose another folder, or remove it"
        raise UsageError(f"{root} was begun with other settings: {'; '.join(changed[:6])}", hint)


def _is_readable(source: Source, plan: Plan, item: BadItem) -> bool:
    try:
        source.pixels(item.index, plan.resolution)
    except ImageError:
        return False
    return True


def _drop(root: Path, shards: Sequence[int]) -> None:
    """Have these shards written again."""
    for shard in shards:
        (root / store.shard_files(shard, False)["index"]).unlink(missing_ok=True)
    _remove_notes(root, shards)


def _remove_notes(root: Path, shards: Sequence[int]) -> None:
    for shard in shards:
        for name in (BAD_OF_SHARD, SUMS_OF_SHARD):
            (root / name.format(shard)).unlink(missing_ok=True)


def _bytes(plan: Plan, shards: Sequence[int]) -> int:
    """About what these shards and the manifest take on the disk."""
    return plan.image_bytes() * sum(len(plan.shard_range(s)) for s in shards) + MANIFEST_BYTES * plan.shard_count


# ---- shards --------------------------------------------------------------------------------------------------------


def _write_shards(
    root: Path, source: Source, tokenizer: Tokenizer, plan: Plan, shards: list[int], work: Work
) -> Iterator[int]:
    """Encode and write these shards. One shard is held in memory at a time."""
    batches = {shard: micro_batches(plan, shard) for shard in shards}
    queue = [batch for shard in shards for batch in batches[shard]]
    with contextlib.closing(encode_all(source, tokenizer, plan, queue, work.workers)) as results:
        for shard in shards:
            encoded: list[Encoded] = []
            for _ in batches[shard]:
                if encoded:
                    yield encoded[-1].items
                encoded.append(next(results))
                if encoded[-1].bad and work.on_bad == "stop":
                    raise _bad_item(source, encoded[-1].bad[0])
            write_shard(root, shard, _arrays(encoded, source, plan), [item for batch in encoded for item in batch.bad])
            yield encoded[-1].items


def _arrays(encoded: Sequence[Encoded], source: Source, plan: Plan) -> dict[str, NDArray[Any]]:
    """The arrays of a shard, with the axes of the grid."""
    indices = [index for batch in encoded for index in batch.indices]
    rows = len(indices) * plan.views
    arrays: dict[str, NDArray[Any]] = {
        "codes": np.concatenate([batch.codes for batch in encoded]).reshape(rows, plan.steps, *plan.grid),
        "index": np.repeat(np.array(indices, dtype=np.int64), plan.views),
    }
    for name, dtype in store.COLUMNS.items():
        column = source.columns[name]
        arrays[name] = np.repeat(np.array([column[i] for i in indices], dtype=dtype), plan.views)
    if plan.latents:
        latents = np.concatenate([batch.latents for batch in encoded if batch.latents is not None])
        arrays["latents"] = latents.reshape(len(indices) * plan.mirrored, plan.channels, *plan.grid)
    return arrays


def write_shard(root: Path, shard: int, arrays: dict[str, NDArray[Any]], bad: Sequence[BadItem]) -> None:
    """Write a shard's arrays, as `store.shard_arrays` describes them, and its notes before the index, which comes last.

    The checksums are those of the bytes in memory, so a disk that writes others is noticed.
    """
    sums = {}
    for kind, name in store.shard_files(shard, "latents" in arrays).items():
        buffer = io.BytesIO()
        np.save(buffer, arrays[kind], allow_pickle=False)
        content = buffer.getvalue()
        sums[name] = hashlib.sha256(content).hexdigest()
        if kind == "index":
            _write_note(root, shard, sums, bad)
        files.write_atomic(root / name, partial(_write, content))


def _write_note(root: Path, shard: int, sums: dict[str, str], bad: Sequence[BadItem]) -> None:
    """Write a shard's list of bad items, where there are any, and the checksums of its files and of that list."""
    path, lines = root / BAD_OF_SHARD.format(shard), store.bad_lines(bad)
    path.unlink(missing_ok=True)
    if bad:
        files.write_atomic(path, partial(_write, lines))
        sums = {path.name: hashlib.sha256(lines).hexdigest(), **sums}
    files.write_json(root / SUMS_OF_SHARD.format(shard), sums)


def _write(content: bytes, file: BinaryIO) -> None:
    file.write(content)


# ---- the end -------------------------------------------------------------------------------------------------------


def _finish(root: Path, source: Source, tokenizer: Tokenizer, plan: Plan, work: Work) -> None:
    """Join the lists of bad items, decode a few items, write the manifest. Raises DataError beyond work.max_bad."""
    bad = [item for items in _bad(root, plan).values() for item in items]
    if bad:
        files.write_atomic(root / store.BAD, partial(_write, store.bad_lines(bad)))
    else:
        (root / store.BAD).unlink(missing_ok=True)
    _check_bad(root, source, bad, work)
    manifest = tabulate(root, plan)
    samples = decoded_items(root, manifest, tokenizer, source)
    manifest.model_copy(update={"samples": samples}).write(root)
    _remove_notes(root, range(plan.shard_count))  # after the manifest: a kill between the two costs no shard


def _bad_item(source: Source, item: BadItem) -> ImageError:
    return unreadable(source.spec, item.name, item.reason, ", or leave out such images with --on-bad skip")


def _check_bad(root: Path, source: Source, bad: Sequence[BadItem], work: Work) -> None:
    """Raise ImageError or DataError if more items were left out than may be."""
    allowed = work.bad_allowed(len(source))
    if bad and work.on_bad == "stop":  # an earlier run left them out
        raise _bad_item(source, bad[0])
    if len(bad) == len(source):
        message = f"no image of {source.spec} can be read; the {len(bad)} reasons are in {root / store.BAD}"
        raise DataError(message, "repair the images and run the same command again")
    if len(bad) > allowed:
        names = some_of((item.name for item in bad), 3)
        raise DataError(
            f"{len(bad)} of {len(source)} images cannot be read ({names}), and --max-bad {work.max_bad:g} allows "
            f"{allowed}; all of them, with the reasons, are in {root / store.BAD}",
            "repair them and run the same command again, or give a larger --max-bad to finish without them",
        )


def tabulate(root: Path, plan: Plan) -> Manifest:
    """The manifest of the written shards, not yet on disk. Raises RunError if a shard's checksums were deleted."""
    sums, bad, shards = _sums(root, plan), _bad(root, plan), []
    if lost := [n for n in range(plan.shard_count) if n not in sums]:
        raise RunError(f"{root / SUMS_OF_SHARD.format(lost[0])} is damaged", "run the same command again")
    for number, note in sums.items():
        images = len(plan.shard_range(number)) - len(bad[number])
        sha256 = {name: note[name] for name in store.shard_files(number, plan.latents).values()}
        shards.append(Shard(images=images, rows=images * plan.views, sha256=sha256))
    names = (store.TOKENIZER, store.NAMES, *([store.BAD] if any(bad.values()) else []))
    return Manifest(
        **plan.model_dump(),
        images=sum(shard.images for shard in shards),
        rows=sum(shard.rows for shard in shards),
        bad=sum(map(len, bad.values())),
        samples=(),
        files={name: files.sha256_file(root / name) for name in names},
        shards=tuple(shards),
    )


def decoded_items(root: Path, manifest: Manifest, tokenizer: Tokenizer, source: Source) -> tuple[DecodedItem, ...]:
    """The PSNR of 16 items, evenly spaced: the first view of each, decoded alone and on one thread."""
    codes, device = CodeStore(root, manifest=manifest), next(tokenizer.parameters()).device
    items = []
    for number in spread(manifest.images, DECODED):
        row = np.array([number * manifest.views])
        codes_BTS = torch.from_numpy(codes.codes(row).astype(np.int64)).to(device)
        with one_thread():
            recon = hwc(to_pixels(tokenizer.decode(codes_BTS)))[0]
        index = int(codes.index[row[0]])
        items.append(DecodedItem(index=index, psnr=psnr(source.pixels(index, manifest.resolution), recon)))
    return tuple(items)


def psnr(image: Pixels, recon: Pixels) -> float:
    """10 log10(255² / MSE) of uint8 pixels, in dB, rounded; an exact copy counts as 100."""
    error = int(np.square(image.astype(np.int64) - recon).sum())
    return round(10 * math.log10(255**2 * image.size / error), DIGITS) if error else EXACT

"""Images -> a finished store: who writes, in which order, and what happens to images that cannot be read."""

import contextlib
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdpm_cli import files
from rdpm_cli.codes import writing
from rdpm_cli.codes.encode import Encoded, encode_parts, original, parts
from rdpm_cli.codes.manifest import BAD, BadImage, Plan
from rdpm_cli.codes.quality import measure
from rdpm_cli.codes.work import Work
from rdpm_cli.errors import DataError, ImageError, some_of
from rdpm_cli.images.decode import unreadable
from rdpm_cli.images.sources import ImageSource
from rdpm_cli.step import world
from rdpm_cli.tokenizer.model import Tokenizer

POLL = 0.5  # seconds between looks at what the other ranks have written


def write_store(
    root: Path,
    source: ImageSource,
    tokenizer: Tokenizer,
    tokenizer_file: bytes,
    plan: Plan,
    record: dict[str, Any],
    work: Work,
) -> Generator[int, None, None]:
    """Write what is missing of the store, yielding how many images each piece of work finished, here.

    Several ranks share the shards; the first one holds the lock and finishes. record: what run.json keeps about this
    run (not part of the store). tokenizer_file: the bytes of its file. Raises ImageError, DataError, RunError.
    """
    rank, size = world()
    with contextlib.ExitStack() as stack:
        stack.enter_context(files.space_is_told(root, lambda: writing.bytes_unwritten(root, plan)))
        if rank == 0:
            stack.enter_context(files.only_writer(root))
            writing.begin(root, plan, record, tokenizer_file, source.names)
            if not writing.is_finished(root):
                writing.drop(root, _readable_again(root, source, plan))
        work.together()
        if writing.is_finished(root):
            yield plan.data.count
            return
        todo = writing.unwritten_shards(root, plan)
        work.together()
        yield plan.data.count - sum(len(plan.shard_range(shard)) for shard in todo[rank::size])
        yield from _write_shards(root, source, tokenizer, plan, todo[rank::size], work)
        while writing.unwritten_shards(root, plan):  # the other ranks'
            time.sleep(POLL)
            yield 0
        if rank == 0:
            if len(writing.gather_bad(root, plan)) > work.bad_allowed(plan.data.count):
                again = _readable_again(root, source, plan)
                writing.drop(root, again)
                for _ in _write_shards(root, source, tokenizer, plan, again, work):
                    yield 0
            _finish(root, source, tokenizer, plan, work)
        work.together()


def _readable_again(root: Path, source: ImageSource, plan: Plan) -> list[int]:
    """Shards with an image that could not be read and now can, as when the disk that it lies on has come back."""
    listed = writing.listed_bad(root, plan)
    return [shard for shard, bad in listed.items() if any(_is_readable(source, plan, one.index) for one in bad)]


def _is_readable(source: ImageSource, plan: Plan, index: int) -> bool:
    try:
        original(source, plan, index)
    except ImageError:
        return False
    return True


def _write_shards(
    root: Path, source: ImageSource, tokenizer: Tokenizer, plan: Plan, todo: list[int], work: Work
) -> Iterator[int]:
    """Encode and write these shards, one after the other: one shard is held at a time."""
    every = {shard: parts(plan, shard) for shard in todo}
    encoded = encode_parts(source, tokenizer, plan, [part for shard in todo for part in every[shard]], work.workers)
    with contextlib.closing(encoded):
        for shard in todo:
            found: list[Encoded] = []
            for _ in every[shard]:
                if found:
                    yield found[-1].looked_at
                found.append(next(encoded))
                if found[-1].bad and work.on_bad == "stop":
                    raise bad_image(source, found[-1].bad[0])
            writing.write_shard(root, shard, _arrays(found, source, plan), [b for part in found for b in part.bad])
            yield found[-1].looked_at


def _arrays(found: list[Encoded], source: ImageSource, plan: Plan) -> dict[str, NDArray[Any]]:
    """The arrays of a shard."""
    labels = source.need_labels()
    indices = [index for part in found for index in part.indices]
    arrays: dict[str, NDArray[Any]] = {
        "codes": np.concatenate([part.codes for part in found]).reshape(
            len(indices) * plan.views, plan.steps, *plan.grid
        ),
        "labels": np.repeat(np.array([labels[i] for i in indices], dtype=np.int32), plan.views),
        "index": np.repeat(np.array(indices, dtype=np.int64), plan.views),
    }
    if plan.latents:
        kept = [part.latents for part in found if part.latents is not None]
        arrays["latents"] = np.concatenate(kept).reshape(len(indices) * plan.mirrored, plan.channels, *plan.grid)
    return arrays


def bad_image(source: ImageSource, bad: BadImage) -> ImageError:
    """What --on-bad stop says of an image that cannot be read."""
    return unreadable(source.spec, bad.name, bad.reason, ", or leave out such images by --on-bad skip")


def _finish(root: Path, source: ImageSource, tokenizer: Tokenizer, plan: Plan, work: Work) -> None:
    """Count what was left out, look at a few images, write the manifest. Raises DataError beyond work.max_bad."""
    bad, allowed = writing.gather_bad(root, plan), work.bad_allowed(plan.data.count)
    if bad and work.on_bad == "stop":  # found under --on-bad skip
        raise bad_image(source, bad[0])
    if len(bad) == plan.data.count:
        raise DataError(
            f"no image of {source.spec} can be read; the {len(bad)} reasons are in {root / BAD}",
            "mend the images and run the same command again",
        )
    if len(bad) > allowed:
        named = some_of((b.name for b in bad), 3)
        raise DataError(
            f"{len(bad)} of {plan.data.count} images cannot be read ({named}), and --max-bad {work.max_bad:g} allows "
            f"{allowed}; all of them, with the reasons, are in {root / BAD}",
            "mend them and run the same command again, or give a larger --max-bad to finish without them",
        )
    manifest = writing.tabulate(root, plan, bad)
    writing.finish(root, manifest.model_copy(update={"samples": measure(root, manifest, tokenizer, source)}))

"""Items -> codes -> shards of a store: resumable, the manifest last, the same bytes whatever the number of processes.

Convolutions move by 1e-7 with the batch's shape and the thread count, and a near-tie then flips a code: a micro-batch
has one fixed shape, padded by its last image, and a CPU encodes it on one thread; more speed comes from more processes.
A *growing* store has its plan in run.json. A shard is written once its note-s.json is there, with its manifest entry
and the items that it leaves out; processes that share only the folder may write other shards, or the same one, at the
same time. A *finished* store has manifest.json and every file that it lists, and its notes go. One that lost a file
grows again: the notes of its whole shards are restored from the manifest, which goes.
Legend: n good items of B, V views, F = 2 with flips else 1, T steps, C channels, S positions."""

import contextlib
import hashlib
import io
import math
import re
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from rdpm_cli import files, noise, runs
from rdpm_cli.codes import ragged, store
from rdpm_cli.codes.store import BadItem, DataOrigin, Manifest, Plan, Shard, Split
from rdpm_cli.data.folder import one_at_a_time
from rdpm_cli.data.source import ItemSource, spread
from rdpm_cli.data.text import Kind
from rdpm_cli.distributed import barrier, one_thread, world
from rdpm_cli.errors import DataError, ItemError, RunError, UsageError, some_of
from rdpm_cli.tokenizer.inputs import Inputs, Item
from rdpm_cli.tokenizer.model import Tokenizer
from rdpm_cli.workers import in_order

NOTE = "note-{:05d}.json"


@dataclass(frozen=True)
class StoreOptions:
    """What fixes a store apart from source and tokenizer. precision, micro_batch: None for the device's default."""

    views: int = 1
    flip: bool = False
    latents: bool = False
    seed: int = 0
    shard_images: int = 4096
    precision: Literal["fp32", "bf16"] | None = None
    micro_batch: int | None = None
    text: Kind | None = None  # units of the texts of sound
    split: Split = "row"  # of sound


def images_at_once(grid: Sequence[int], device: torch.device) -> int:
    """Images of a forward pass of the autoencoder, by their latent positions."""
    return max(1, (2048 if device.type == "cpu" else 16384) // math.prod(grid))


def make_plan(
    source: ItemSource, tokenizer: Tokenizer, digest: str, options: StoreOptions, device: torch.device
) -> Plan:
    """Everything that fixes the store. digest: of the tokenizer. Raises UsageError, and DataError without classes."""
    cpu, auto, inputs, speech = device.type == "cpu", tokenizer.cfg.autoencoder, tokenizer.inputs, None
    if inputs.rate:
        speech = ragged.conditions(source, options.text, options.split, inputs.rate)
    else:
        if options.text or options.split != "row":
            raise UsageError(f"--units and --split are for sound, and {source.spec} holds images", "leave them out")
        source.need_labels()
    if options.flip and options.views % 2:
        raise UsageError(f"--flip mirrors every second view, but --views is {options.views}", "give an even number")
    if cpu and (options.precision == "bf16" or options.micro_batch):
        reason = "a store made on a CPU has the same bytes on every machine of its type"
        raise UsageError(f"--precision and --micro-batch are for GPUs: {reason}", "leave them out")
    quant, fixed = tokenizer.cfg.quantizer, asdict(options)
    del fixed["text"], fixed["split"]
    # Latent positions of a forward pass. Items of any length are encoded alone: padding would change their codes.
    batch = 1 if speech else images_at_once(auto.grid, device)
    defaults = {"precision": "fp32" if cpu else "bf16", "micro_batch": batch}
    return Plan(
        tokenizer=digest, transform=inputs.transform, noise=tuple(noise.fingerprint(options.seed)), device=device.type,
        steps=quant.steps, codes=quant.codes, grid=auto.grid, channels=auto.channels, resolution=inputs.resolution,
        class_names=tuple(source.class_names), speech=speech,
        data=DataOrigin(source=source.spec, count=len(source), digest=source.digest(), reading=source.reading.record()),
        **{name: defaults[name] if value is None else value for name, value in fixed.items()},
    )  # fmt: skip


@dataclass(frozen=True)
class Work:
    """How a store is made; nothing here changes its bytes, except by the items that are left out.

    on_bad: stop at the first unreadable item, or leave it out. max_bad: share that may be left out, rounded up.
    shards: to write, next to other processes that write others; None: all, and the manifest. make: False: none is made.
    stopped: whether a signal has come; asked while a worker keeps this process waiting."""

    workers: int = 1
    on_bad: Literal["stop", "skip"] = "stop"
    max_bad: float = 0.0001
    shards: Sequence[int] | None = None
    make: bool = True
    stopped: Callable[[], bool] = lambda: False


class Note(Shard):
    """The content of a note: a written shard, and the items that it leaves out."""

    bad: list[BadItem]


def write_store(
    root: Path, source: ItemSource, tokenizer: Tokenizer, tokenizer_file: bytes, plan: Plan, work: Work
) -> Generator[int, None, None]:
    """Write what is missing of the store, yielding the number of items done: first those that were there already.

    Several ranks share the shards; the first one holds the lock and finishes. Raises DataError if shards are missing
    that are not to be made."""
    rank, size = world()
    shards = range(len(plan.shard_ranges)) if work.shards is None else work.shards
    with contextlib.ExitStack() as stack:
        stack.enter_context(files.report_full_disk(root))
        if rank == 0:
            if work.shards is None:
                stack.enter_context(files.only_writer(root))
            with one_at_a_time(root):
                _open(root, source, tokenizer.inputs, plan, tokenizer_file, work)
        barrier()
        if is_finished(root):
            yield items_of(plan, shards)
            return
        missing = unwritten_shards(root, plan, shards)
        if missing and not work.make:
            numbers = shards_text(missing)
            hint = f"make them by the same command with --shards {numbers} instead of --finish"
            raise DataError(f"{root} lacks {len(missing)} of {len(shards)} shards: {numbers}", hint)
        missing = missing[rank::size]
        barrier()  # every rank has listed the same shards before any of them writes one
        yield items_of(plan, shards) - items_of(plan, missing)
        yield from _write_shards(root, source, tokenizer, plan, missing, work)
        # The other ranks' shards, or this one's after a request to stop; polled, so that a signal can end the wait.
        while (size > 1 or work.stopped()) and unwritten_shards(root, plan, shards):
            time.sleep(0.5)
            yield 0
        if rank == 0 and work.shards is None:
            _finish(root, source, tokenizer, plan, work)
        barrier()


def is_finished(root: Path) -> bool:
    """Whether there is a manifest, and every file that it lists."""
    return (root / store.MANIFEST).exists() and all((root / name).exists() for name in Manifest.load(root).sums())


def shards_of(text: str, count: int) -> list[int]:
    """`0-99`, `7` or `3,7-8` -> the numbers of these of `count` shards, cut to the last one. Raises UsageError."""
    shards: set[int] = set()
    for word in text.split(","):
        span = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", word.strip())
        first, last = (int(span[1]), int(span[2] or span[1])) if span else (1, 0)
        if first > last:
            raise UsageError(f"--shards: '{word}' is not a range", "write 0-99, 7 or 3,7-8")
        if first >= count:
            raise UsageError(f"--shards: {word} is beyond the last shard, {count - 1}", "shards are counted from 0")
        shards |= {*range(first, min(last + 1, count))}
    return sorted(shards)


def shards_text(shards: Sequence[int]) -> str:
    """Its inverse, for ascending numbers: [3, 7, 8] -> `3,7-8`."""
    numbers = set(shards)
    starts, ends = ([n for n in shards if n + side not in numbers] for side in (-1, 1))
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def items_of(plan: Plan, shards: Sequence[int]) -> int:
    """The number of items in these shards."""
    ranges = plan.shard_ranges
    return sum(len(ranges[shard]) for shard in shards)


def unwritten_shards(root: Path, plan: Plan, shards: Sequence[int] | None = None) -> list[int]:
    """Shards that lack a file or their note, of these or of all."""
    shards = range(len(plan.shard_ranges)) if shards is None else shards
    written = _notes(root, plan, shards)
    return [shard for shard in shards if shard not in written]


def _notes(root: Path, plan: Plan, shards: Sequence[int] | None = None) -> dict[int, Note]:
    """The notes of the written ones of these shards, or of all. A finished store has them in its manifest."""
    ranges = plan.shard_ranges
    shards = range(len(ranges)) if shards is None else shards
    if (root / store.MANIFEST).exists():
        lines = store.read_lines(root / store.BAD) if (root / store.BAD).exists() else []
        bad = {n: [item for item in lines if item["index"] in ranges[n]] for n in shards}
        rows = Manifest.load(root).shards
        notes = {n: Note(**rows[n].model_dump(), bad=bad[n]) for n in shards}
    else:
        paths = {n: root / NOTE.format(n) for n in shards}
        notes = {n: Note.model_validate(files.read_json(path)) for n, path in paths.items() if path.exists()}
    # Without the reasons of its bad items, from bad.jsonl, a shard has to be made again.
    whole = {n: note for n, note in notes.items() if note.images + len(note.bad) == len(ranges[n])}
    return {n: note for n, note in whole.items() if all((root / name).exists() for name in note.sha256)}


def _open(root: Path, source: ItemSource, inputs: Inputs, plan: Plan, tokenizer_file: bytes, work: Work) -> None:
    """Check the plan, restore the notes of a store that lost a file, write the files next to the shards."""
    new = plan.model_dump(mode="json")
    old = new if all(path.name.startswith(".") for path in root.iterdir()) else runs.read_run(root).get("plan", {})
    if (root / store.MANIFEST).exists():
        old = Manifest.load(root).model_dump(mode="json", include=set(Plan.model_fields))
    moved = {"data": {**new["data"], "source": old.get("data", {}).get("source")}}  # may differ: the digest decides
    if changed := files.differences(old, new | moved):
        message = f"{root} holds something else, or was begun with other settings: {'; '.join(changed[:6])}"
        raise UsageError(message, "choose another folder, or remove it")
    runs.write_run(root, {"workers": work.workers, "plan": new})
    if is_finished(root):
        _clean(root)
        return
    notes, shards = _notes(root, plan), range(len(plan.shard_ranges)) if work.shards is None else work.shards
    names = store.json_lines({"index": index, "name": name} for index, name in enumerate(source.names))
    items = items_of(plan, [shard for shard in shards if shard not in notes])
    rows = 1000 * len(plan.shard_ranges)  # a shard's row in the manifest takes about 1,000 bytes
    files.need_space(root, items * plan.image_bytes() + rows + len(tokenizer_file) + len(names))
    for number, note in notes.items():
        path = root / NOTE.format(number)
        # Items that can be read again, for example because a disk has come back, return with their shards.
        if work.make and number in shards and read_items(source, inputs, [item["index"] for item in note.bad])[0]:
            path.unlink(missing_ok=True)
        elif not path.exists():
            files.write_json(path, note.model_dump())
    (root / store.MANIFEST).unlink(missing_ok=True)
    for name, content in ((store.TOKENIZER, tokenizer_file), (store.NAMES, names)):
        if work.shards is None or not (root / name).exists():
            _write(root / name, content)


@dataclass
class MicroBatch:
    """Some items of a source: the indices of the good ones, and the bad ones.

    arrays: before the network the items and eps_VBTCS, padded to the plan's micro-batch; after it codes (n, V, T, S)
    uint16, and latents (n, F, C, S) fp16 where kept; or those of codes/ragged.py."""

    indices: list[int]
    bad: list[BadItem]
    arrays: dict[str, NDArray[Any]]


def micro_batches(plan: Plan, shard: int) -> list[range]:
    """The source indices of a shard's micro-batches."""
    indices = plan.shard_ranges[shard]
    return [range(start, min(start + plan.micro_batch, indices.stop)) for start in indices[:: plan.micro_batch]]


def read_items(source: ItemSource, inputs: Inputs, indices: Sequence[int]) -> tuple[dict[int, Item], list[BadItem]]:
    """The good items by index, and the bad ones."""
    items: dict[int, Item] = {}
    bad: list[BadItem] = []
    for index in indices:
        try:
            items[index] = inputs.read(source, index)
        except ItemError as error:
            reason = " ".join(re.sub(" at 0x[0-9a-f]+", "", error.reason).split())  # the address of a Python object
            bad.append({"index": index, "name": error.name, "reason": reason})
    return items, bad


def prepare(source: ItemSource, inputs: Inputs, plan: Plan, batch: range) -> MicroBatch:
    """Read, draw the noise. A row depends on its own item only, whichever others are bad."""
    items, bad = read_items(source, inputs, batch)
    rows = items or {batch.start: inputs.blank()}
    padded = [*rows, *[list(rows)[-1]] * (plan.micro_batch - len(rows))]
    shape, by_position = (plan.channels, inputs.positions(rows[padded[0]])), plan.speech is not None
    views = [[view] * len(padded) for view in range(plan.views)]
    eps = [noise.normal_steps("encode", plan.seed, padded, view, plan.steps, shape, by_position) for view in views]
    arrays = {"items": np.stack([rows[index] for index in padded]), "eps_VBTCS": np.stack(eps)}
    return MicroBatch(list(items), bad, arrays)


@torch.no_grad()
def encode(tokenizer: Tokenizer, plan: Plan, batch: MicroBatch) -> MicroBatch:
    """E and Q of a micro-batch on the tokenizer's device: E in the plan's precision, Q in fp32."""
    device, count, half = next(tokenizer.parameters()).device, len(batch.indices), plan.precision == "bf16"
    layout = torch.channels_last if half else torch.contiguous_format  # channels_last: of a GPU's fast convolutions
    inputs = tokenizer.inputs
    x = inputs.to_model(inputs.tensor(list(batch.arrays["items"])).to(device))
    views = (x, x.flip(-1))[: plan.mirrored]
    if x.ndim == 4:
        views = tuple(view.contiguous(memory_format=layout) for view in views)
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        z_F = [tokenizer.latents(view) for view in views]  # z = LN(E(x)), (B, C, S)
    eps = torch.from_numpy(batch.arrays["eps_VBTCS"])
    codes_V = [tokenizer.quantizer.encode(z_F[v % plan.mirrored], eps[v].to(device)) for v in range(plan.views)]
    # torch has no conversion from int64 to uint16 on every device, numpy has
    codes_nVTS = torch.stack(codes_V, 1)[:count].int().cpu().numpy().astype(np.uint16)
    z_nFCS = torch.stack(z_F, 1)[:count].half().cpu().numpy() if plan.latents else None
    if plan.speech:
        return MicroBatch(
            batch.indices, batch.bad, ragged.encoded_arrays(codes_nVTS, z_nFCS if z_nFCS is None else z_nFCS[:, 0])
        )
    arrays: dict[str, NDArray[Any]] = {"codes": codes_nVTS}
    if z_nFCS is not None:
        arrays["latents"] = z_nFCS
    return MicroBatch(batch.indices, batch.bad, arrays)


def prepare_and_encode(source: ItemSource, tokenizer: Tokenizer, plan: Plan, batch: range) -> MicroBatch:
    """All of a micro-batch, on one thread."""
    with one_thread():
        return encode(tokenizer, plan, prepare(source, tokenizer.inputs, plan, batch))


def encode_all(
    source: ItemSource, tokenizer: Tokenizer, plan: Plan, batches: Sequence[range], jobs: Work
) -> Generator[MicroBatch, None, None]:
    """Every micro-batch, in order, unless stopped. A CPU's workers do all of it; a GPU encodes what they prepare."""
    cpu, workers = plan.device == "cpu", jobs.workers if jobs.workers > 1 else 0
    work = (
        partial(prepare_and_encode, source, tokenizer, plan)
        if cpu
        else partial(prepare, source, tokenizer.inputs, plan)
    )
    with contextlib.closing(in_order(work, batches, workers, "--workers 1", jobs.stopped)) as results:
        for batch in results:
            yield batch if cpu else encode(tokenizer, plan, batch)


def _write_shards(
    root: Path, source: ItemSource, tokenizer: Tokenizer, plan: Plan, shards: list[int], work: Work
) -> Iterator[int]:
    """Encode and write these shards. One shard is held in memory at a time."""
    queue = [(shard, batch) for shard in shards for batch in micro_batches(plan, shard)]
    encoded: list[MicroBatch] = []
    with contextlib.closing(encode_all(source, tokenizer, plan, [batch for _, batch in queue], work)) as results:
        for shard, items in queue:
            if (result := next(results, None)) is None:  # a signal came while a worker kept this process waiting
                assert work.stopped()
                return
            encoded.append(result)
            bad = [item for batch in encoded for item in batch.bad]
            if bad and work.on_bad == "stop":
                raise tokenizer.inputs.unreadable(source.spec, bad[0]["name"], bad[0]["reason"])
            if items.stop == plan.shard_ranges[shard].stop:  # before its last items count as done
                if unwritten_shards(root, plan, [shard]):  # else another process has written it by now
                    write_shard(root, shard, shard_arrays(encoded, source, plan), bad)
                encoded.clear()
            yield len(items)


def shard_arrays(encoded: Sequence[MicroBatch], source: ItemSource, plan: Plan) -> dict[str, NDArray[Any]]:
    """The arrays of a shard, as `store.shard_arrays` describes them."""
    indices = [index for batch in encoded for index in batch.indices]
    values = {kind: np.concatenate([batch.arrays[kind] for batch in encoded]) for kind in encoded[0].arrays}
    values["index"] = np.repeat(np.array(indices, dtype=np.int64), plan.views)
    if "labels" in plan.columns:
        values["labels"] = np.repeat([source.columns["labels"][index] for index in indices], plan.views)
    if plan.speech:
        values |= ragged.text_arrays(source, plan, indices, values["lengths"][:: plan.views].tolist())
    shapes = store.shard_arrays(plan, shard_entry(values))
    return {kind: values[kind].astype(dtype).reshape(shape) for kind, (dtype, shape) in shapes.items()}


def shard_entry(arrays: dict[str, NDArray[Any]], **sums: str) -> Shard:
    """A shard's row in the manifest. sums: sha256 by file name."""
    index, sizes = arrays["index"], ragged.shard_sizes(arrays) if "lengths" in arrays else {}
    return Shard(images=len(np.unique(index)), rows=len(index), sha256=sums, **sizes)


def write_shard(root: Path, shard: int, arrays: dict[str, NDArray[Any]], bad: Sequence[BadItem]) -> None:
    """Write a shard's arrays, and its note last, which marks a written shard."""
    (root / NOTE.format(shard)).unlink(missing_ok=True)
    sums = {}
    for kind, array in arrays.items():
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        name, content = f"{kind}-{shard:05d}.npy", buffer.getvalue()
        sums[name] = hashlib.sha256(content).hexdigest()  # of the bytes in memory: a disk that writes others is noticed
        _write(root / name, content)
    note = Note(**shard_entry(arrays, **sums).model_dump(), bad=list(bad))
    files.write_json(root / NOTE.format(shard), note.model_dump())


def _write(path: Path, content: bytes) -> None:
    files.write_atomic(path, lambda file: file.write(content))


def _finish(root: Path, source: ItemSource, tokenizer: Tokenizer, plan: Plan, work: Work) -> None:
    """Join the lists of bad items, decode a few items, write the manifest. Raises DataError beyond work.max_bad."""
    bad = [item for _, note in sorted(_notes(root, plan).items()) for item in note.bad]
    (root / store.BAD).unlink(missing_ok=True)
    if bad:
        _write(root / store.BAD, store.json_lines(bad))
        if work.on_bad == "stop":  # an earlier run left them out
            raise tokenizer.inputs.unreadable(source.spec, bad[0]["name"], bad[0]["reason"])
    allowed = math.ceil(work.max_bad * len(source) - 1e-9)  # without the error of binary fractions
    if len(bad) > min(allowed, len(source) - 1):
        names = some_of((item["name"] for item in bad), 3)
        reason = f"--max-bad allows {allowed}; the reasons are in {root / store.BAD}"
        message = f"{len(bad)} of {len(source)} images of {source.spec} cannot be read ({names}), and {reason}"
        raise DataError(message, "repair them and run the same command again, or give a larger --max-bad")
    manifest = tabulate(root, plan)
    samples = tuple(decoded_items(root, manifest, tokenizer, source))
    manifest.model_copy(update={"samples": samples}).write(root)
    _clean(root)  # after the manifest: a kill between the two costs no shard


def _clean(root: Path) -> None:
    """Remove the notes of a finished store, and what killed processes left; earlier, others may be writing there."""
    for path in [*root.glob("note-*.json"), *root.glob(".*.tmp")]:
        path.unlink(missing_ok=True)


def tabulate(root: Path, plan: Plan) -> Manifest:
    """The manifest of the written shards, not yet on disk. Raises RunError if a shard was deleted."""
    notes = list(_notes(root, plan).values())
    if len(notes) < len(plan.shard_ranges):
        raise RunError(f"shards of {root} were deleted while it was written", "run the same command again")
    bad = sum(len(note.bad) for note in notes)
    names = [store.TOKENIZER, store.NAMES] + [store.BAD] * bool(bad)
    return Manifest(
        **plan.model_dump(), samples=(), bad=bad,
        images=sum(note.images for note in notes), rows=sum(note.rows for note in notes),
        files={name: files.sha256_file(root / name) for name in names},
        shards=tuple(Shard(**note.model_dump(exclude={"bad"})) for note in notes),
    )  # fmt: skip


def decoded_items(
    root: Path, manifest: Manifest, tokenizer: Tokenizer, source: ItemSource
) -> list[dict[str, int | float]]:
    """The fidelity of 16 items, evenly spaced: of the first view of each, decoded alone and on one thread."""
    codes, device = ragged.open_store(root, manifest=manifest), next(tokenizer.parameters()).device
    items: list[dict[str, int | float]] = []
    for number in spread(manifest.images, 16):
        row = np.array([number * manifest.views])
        with one_thread():
            codes_BTS = torch.from_numpy(codes.codes(row).astype(np.int64)).to(device)
            recon = tokenizer.inputs.items(tokenizer.decode(codes_BTS))[0]
        index = int(codes.index[row[0]])
        fidelity = tokenizer.inputs.fidelity(tokenizer.inputs.read(source, index), recon)
        items.append({"index": index, **fidelity})
    return items

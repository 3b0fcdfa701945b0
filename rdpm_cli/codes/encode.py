"""Items -> codes, a micro-batch at a time and in order: the same codes whatever the number of processes.

Convolutions move by 1e-7 with the shape of the batch and with the thread count, and a near-tie then flips a code. So
every micro-batch has one fixed shape, padded by its last image, and a CPU encodes it on one thread; more speed comes
from more processes.

Legend: n items, V views, F = 2 with flips else 1, B items of a micro-batch, T steps, C channels, S positions.
"""

import contextlib
import math
import multiprocessing
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rdpm_cli import noise, runs
from rdpm_cli.codes.store import BadItem, DataOrigin, Plan
from rdpm_cli.data.pixels import TRANSFORM, Pixels, chw, to_model
from rdpm_cli.data.source import Source
from rdpm_cli.device import one_thread
from rdpm_cli.errors import ImageError, RdpmError, RunError, UsageError
from rdpm_cli.tokenizer.model import Tokenizer

POSITIONS_AT_ONCE = {"cpu": 2048, "cuda": 16384}  # latent positions of a forward pass
ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # of a Python object, in other libraries' messages


# ---- the plan ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoreOptions:
    """What fixes a store besides source and tokenizer. precision, micro_batch: None for the device's default."""

    views: int = 1
    flip: bool = False
    latents: bool = False
    seed: int = 0
    shard_images: int = 4096
    precision: Literal["fp32", "bf16"] | None = None
    micro_batch: int | None = None


def make_plan(source: Source, tokenizer: Tokenizer, digest: str, options: StoreOptions, device: torch.device) -> Plan:
    """Everything that fixes the store. digest: of the tokenizer. Raises UsageError, and DataError without classes."""
    source.need_labels()
    cpu = device.type == "cpu"
    if options.flip and options.views % 2:
        raise UsageError(f"--flip mirrors every second view, but --views is {options.views}", "give an even number")
    for option, value in {"--precision": options.precision == "bf16", "--micro-batch": options.micro_batch}.items():
        if cpu and value:
            reason = "a store made on a CPU has the same bytes on every machine of its type"
            raise UsageError(f"{option} is for GPUs: {reason}", "leave it out, or give --device cuda")
    auto, quant = tokenizer.cfg.autoencoder, tokenizer.cfg.quantizer
    positions = POSITIONS_AT_ONCE["cpu" if cpu else "cuda"]
    fields = asdict(options)
    fields["precision"] = options.precision or ("fp32" if cpu else "bf16")
    fields["micro_batch"] = options.micro_batch or max(1, positions // math.prod(auto.grid))
    return Plan(
        tokenizer=digest,
        steps=quant.steps,
        grid=auto.grid,
        codes=quant.codes,
        channels=auto.channels,
        noise=tuple(noise.fingerprint(options.seed)),
        transform=TRANSFORM,
        resolution=auto.resolution,
        class_names=tuple(source.class_names),
        data=DataOrigin(source=source.spec, count=len(source), digest=source.digest()),
        device=device.type,
        **fields,
    )


# ---- a micro-batch -------------------------------------------------------------------------------------------------


@dataclass
class Prepared:
    """A micro-batch before the network, in numpy: worker processes then need no shared memory to pass it on."""

    items: int  # of the source, including the bad ones
    indices: list[int]  # of the good ones
    bad: list[BadItem]
    pixels_BHWC: Pixels | None = None  # padded to the plan's micro-batch; None where no item is good
    eps_VBTCS: NDArray[np.float32] | None = None


@dataclass
class Encoded:
    """A micro-batch of codes."""

    items: int
    indices: list[int]
    bad: list[BadItem]
    codes: NDArray[np.uint16]  # (n, V, T, S)
    latents: NDArray[np.float16] | None  # (n, F, C, S)


def micro_batches(plan: Plan, shard: int) -> list[range]:
    """The source indices of a shard's micro-batches."""
    indices = plan.shard_range(shard)
    return [range(start, min(start + plan.micro_batch, indices.stop)) for start in indices[:: plan.micro_batch]]


def prepare(source: Source, plan: Plan, batch: range) -> Prepared:
    """Decode, crop, draw the noise. A row depends on its own item only, whichever others are bad."""
    pixels, bad = {}, []
    for index in batch:
        try:
            pixels[index] = source.pixels(index, plan.resolution)
        except ImageError as error:
            reason = " ".join(ADDRESS.sub("", error.reason).split())
            bad.append(BadItem(index=index, name=error.name, reason=reason))
    indices = list(pixels)
    if not indices:
        return Prepared(len(batch), [], bad)
    padded = indices + indices[-1:] * (plan.micro_batch - len(indices))
    shape = (plan.channels, math.prod(plan.grid))
    eps = [
        noise.normal_steps("encode", plan.seed, padded, [view] * len(padded), plan.steps, shape)
        for view in range(plan.views)
    ]
    return Prepared(len(batch), indices, bad, np.stack([pixels[index] for index in padded]), np.stack(eps))


@torch.no_grad()
def encode(tokenizer: Tokenizer, plan: Plan, batch: Prepared) -> Encoded:
    """E and Q of a micro-batch on the tokenizer's device: E in the plan's precision, Q in fp32."""
    positions, count = math.prod(plan.grid), len(batch.indices)
    if batch.pixels_BHWC is None or batch.eps_VBTCS is None:
        codes = np.empty((0, plan.views, plan.steps, positions), np.uint16)
        latents = np.empty((0, plan.mirrored, plan.channels, positions), np.float16) if plan.latents else None
        return Encoded(batch.items, [], batch.bad, codes, latents)
    device = next(tokenizer.parameters()).device
    x = to_model(chw(batch.pixels_BHWC).to(device))
    z_F = [_latents(x.flip(3) if mirrored else x, tokenizer, plan) for mirrored in range(plan.mirrored)]
    eps = torch.from_numpy(batch.eps_VBTCS)
    codes_V = [tokenizer.quantizer.encode(z_F[v % plan.mirrored], eps[v].to(device)) for v in range(plan.views)]
    # torch has no conversion from int64 to uint16 on every device, numpy has
    codes = torch.stack(codes_V, 1)[:count].to(torch.int32).cpu().numpy().astype(np.uint16)
    latents = torch.stack(z_F, 1)[:count].to(torch.float16).cpu().numpy() if plan.latents else None
    return Encoded(batch.items, batch.indices, batch.bad, codes, latents)


def _latents(x_BCHW: Tensor, tokenizer: Tokenizer, plan: Plan) -> Tensor:
    """z = LN(E(x)), (B, C, S). In bf16 the encoder runs in channels_last, the layout of a GPU's fast convolutions."""
    if plan.precision == "fp32":
        return tokenizer.latents(x_BCHW)
    with torch.autocast(x_BCHW.device.type, torch.bfloat16):
        return tokenizer.latents(x_BCHW.contiguous(memory_format=torch.channels_last))


def prepare_and_encode(source: Source, tokenizer: Tokenizer, plan: Plan, batch: range) -> Encoded:
    """All of a micro-batch, on one thread."""
    with one_thread():
        return encode(tokenizer, plan, prepare(source, plan, batch))


# ---- worker processes ----------------------------------------------------------------------------------------------


class Results(Dataset[Any]):
    """work(batch) of every micro-batch, by number. An error of ours is an element too: DataLoader would reword it."""

    def __init__(self, work: Callable[[range], Any], batches: Sequence[range]) -> None:
        self.work, self.batches = work, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> Any:
        try:
            return self.work(self.batches[number])
        except RdpmError as error:
            return error


def _unchanged(result: Any) -> Any:
    return result  # DataLoader's default would turn arrays into tensors


@contextlib.contextmanager
def report_killed_worker() -> Iterator[None]:
    """Turn DataLoader's error for a worker that was killed into a RunError."""
    # DataLoader raises it from a signal handler, wherever the process is then: while it writes a shard, for example.
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        hint = "out of memory? run the same command again with fewer --workers; finished shards are kept"
        raise RunError(str(error).splitlines()[0], hint) from error


def in_order(work: Callable[[range], Any], batches: Sequence[range], workers: int) -> Generator[Any, None, None]:
    """work(batch) of every micro-batch, in order, by this number of processes; 1: in this process.

    Raises the RdpmError of a batch in its turn. No worker outlives the iterator. Use it inside `report_killed_worker`.
    """
    workers = 0 if min(workers, len(batches)) <= 1 else min(workers, len(batches))
    loader = DataLoader(
        Results(work, batches),
        batch_size=None,
        num_workers=workers,
        collate_fn=_unchanged,
        worker_init_fn=runs.serve_parent,  # DataLoader itself sets one thread
        multiprocessing_context="fork" if workers else None,  # workers share the model and the source's index
    )
    previous = set(multiprocessing.active_children())
    results = iter(loader)
    try:
        for result in results:
            if isinstance(result, RdpmError):
                raise result
            yield result
    finally:
        # The end of `results` would wait for workers that are in the middle of a micro-batch, or of a read that hangs.
        for worker in set(multiprocessing.active_children()) - previous:
            with contextlib.suppress(RuntimeError):  # DataLoader reports each one that is killed
                worker.kill()
                worker.join()


def encode_all(
    source: Source, tokenizer: Tokenizer, plan: Plan, batches: Sequence[range], workers: int
) -> Generator[Encoded, None, None]:
    """Every micro-batch, in order. On a CPU the workers do all of it; a GPU encodes what they prepare."""
    if plan.device == "cpu":
        yield from in_order(partial(prepare_and_encode, source, tokenizer, plan), batches, workers)
        return
    with contextlib.closing(in_order(partial(prepare, source, plan), batches, workers)) as prepared:
        for batch in prepared:
            try:
                yield encode(tokenizer, plan, batch)
            except torch.OutOfMemoryError as error:  # the micro-batch is a field of the store: codes depend on it
                raise RunError(
                    f"out of memory with micro-batches of {plan.micro_batch} images",
                    f"give --micro-batch {max(1, plan.micro_batch // 2)} and another OUT, or remove this one",
                ) from error

"""Counter-based noise: the same numbers in every process, batch and order.

A value is addressed, never drawn in sequence: `normal(purpose, seed, index, view, t, shape)` is a pure function.
Each purpose has its own Philox key, so that equal seeds and indices of different purposes share no value;
otherwise `sample --seed 0` would replay the training images' noise.
"""

import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# Stores, samples and checkpoints depend on these numbers: never renumber, only add.
PURPOSES = {"encode": 1, "sample": 2, "gumbel": 3, "heldout": 4, "eval": 5, "labels": 6, "intervals": 9, "uniform": 10}
PURPOSES |= {"mask": 7, "component": 8}  # ResGen: held-out masks; the components of a sample
# Training: rows of an epoch, small draws of a batch, seeds of the device's generators, draws that all processes share.
PURPOSES |= {"epoch": 16, "batch": 17, "device": 18, "shared": 19, "torch": 20}
BLOCK = 16  # rows of the global batch that share one training stream

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


def stream(purpose: str, seed: int, index: int = 0, view: int = 0, t: int = 0) -> np.random.Generator:
    """The generator of one address. index: image or step, view: noise draw or block, t: step 1..T (0 = none)."""
    counter = np.array([0, t, view, index], dtype=np.uint64)
    key = np.array([seed, PURPOSES[purpose]], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def normal(purpose: str, seed: int, index: int, view: int, t: int, shape: Sequence[int]) -> Floats:
    """Standard normal values of one address, float32, of the given shape."""
    return stream(purpose, seed, index, view, t).standard_normal(tuple(shape), dtype=np.float32)


def gumbel(seed: int, index: int, t: int, shape: Sequence[int]) -> Floats:
    """Standard Gumbel values -log(E), E ~ Exp(1), for sample `index` at step t, float32."""
    exponential = stream("gumbel", seed, index, 0, t).standard_exponential(tuple(shape), dtype=np.float32)
    # An exponential of exactly 0 would give infinity, and infinity minus infinity where logits are masked.
    return -np.log(np.maximum(exponential, np.finfo(np.float32).tiny))


def uniform_rows(
    purpose: str, seed: int, indices: Sequence[int], views: Sequence[int], t: int, shape: Sequence[int]
) -> Floats:
    """Uniform values in [0, 1) at step t, one address a row: (len(indices), *shape) float32."""
    rows = [
        stream(purpose, seed, int(index), int(view), t).random(tuple(shape), dtype=np.float32)
        for index, view in zip(indices, views, strict=True)
    ]
    return np.stack(rows)


def normal_rows(
    purpose: str, seed: int, indices: Sequence[int], views: Sequence[int], ts: Sequence[int], shape: Sequence[int]
) -> Floats:
    """One address a row: (len(indices), *shape)."""
    out = np.empty((len(indices), *shape), dtype=np.float32)
    for row, (index, view, t) in enumerate(zip(indices, views, ts, strict=True)):
        out[row] = normal(purpose, seed, int(index), int(view), int(t), shape)
    return out


def normal_steps(
    purpose: str, seed: int, indices: Sequence[int], views: Sequence[int], steps: int, shape: Sequence[int]
) -> Floats:
    """All steps 1..T of each row: (len(indices), T, *shape)."""
    out = np.empty((len(indices), steps, *shape), dtype=np.float32)
    for row, (index, view) in enumerate(zip(indices, views, strict=True)):
        for t in range(1, steps + 1):
            out[row, t - 1] = normal(purpose, seed, int(index), int(view), t, shape)
    return out


def fingerprint(seed: int) -> list[float]:
    """16 values of the encode stream. A store keeps them, to refuse a numpy that draws other numbers."""
    return [float(v) for v in normal("encode", seed, 0, 0, 1, (16,))]


# ---- training: a step's randomness is a function of (seed, step, block of rows) -----------------------------------


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, count: int) -> Ints:
    return stream("epoch", seed, epoch).permutation(count)


def epoch_rows(seed: int, step: int, batch: int, count: int) -> Ints:
    """Rows of the global batch of a step: every row once an epoch, in an order of (seed, epoch). (batch,) int64."""
    positions = np.arange(step * batch, (step + 1) * batch)
    rows = [
        _permutation(seed, int(epoch), count)[positions[positions // count == epoch] % count]
        for epoch in np.unique(positions // count)
    ]
    return np.concatenate(rows)


def block_uniform(seed: int, step: int, rows: range, columns: int) -> Floats:
    """Uniform values in [0, 1) for `rows` of the global batch (whole blocks): (len(rows), columns)."""
    blocks = []
    for start in range(rows.start, rows.stop, BLOCK):
        count = min(BLOCK, rows.stop - start)
        blocks.append(stream("batch", seed, step, start // BLOCK).random((count, columns), dtype=np.float32))
    return np.concatenate(blocks)


def seed_of(purpose: str, seed: int, step: int, block: int) -> int:
    """A 63-bit seed for a device's own generator."""
    return int(stream(purpose, seed, step, block).integers(2**63))

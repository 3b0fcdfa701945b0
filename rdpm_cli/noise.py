"""Counter-based noise, addressed and never drawn in sequence: the same numbers in every process, batch and order."""

import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# Philox keys, without which `sample --seed 0` would replay the training images' noise. Stores, samples and checkpoints
# depend on these numbers: never renumber, only add.
PURPOSES = {"encode": 1, "sample": 2, "gumbel": 3, "heldout": 4, "eval": 5, "labels": 6, "intervals": 9, "uniform": 10}
PURPOSES |= {"mask": 7, "component": 8}  # ResGen: held-out masks; the components of a sample
# Training: rows of an epoch, small draws of a batch, seeds of the device's generators, draws that all processes share.
PURPOSES |= {"epoch": 16, "batch": 17, "device": 18, "shared": 19, "torch": 20}
PURPOSES |= {"shapes": 24}  # the factors of the built-in set
PURPOSES |= {"gaussian": 25, "subset": 26}  # eval baselines: samples of a class Gaussian; which images are drawn again
PURPOSES |= {"strings": 27, "prompt": 28}  # sound: words, recordings and gaps of strings; prompts in training
PURPOSES |= {"sorted": 29}  # the order of batches of rows that are sorted by length
PURPOSES |= {"flow": 30}  # held-out noise of flow matching
PURPOSES |= {"mind": 31, "infinity": 32, "perturb": 33}  # scores: directions, the order of images, codes of pFID
PURPOSES |= {"guidance": 34}  # lambda in training
BLOCK = 16  # rows of the global batch that share one training stream
Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Integers = Sequence[int]


def stream(purpose: str, seed: int, index: int = 0, view: int = 0, t: int = 0) -> np.random.Generator:
    """The generator of one address. index: image or step, view: noise draw or block, t: step 1..T (0 = none)."""
    counter = np.array([0, t, view, index], dtype=np.uint64)
    key = np.array([seed, PURPOSES[purpose]], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def normal(purpose: str, seed: int, index: int, view: int, t: int, shape: Integers) -> Floats:
    """Standard normal values of one address, float32, of the given shape."""
    return stream(purpose, seed, int(index), int(view), int(t)).standard_normal(tuple(shape), dtype=np.float32)


def gumbel(seed: int, index: int, t: int, shape: Integers) -> Floats:
    """Standard Gumbel values -log(E), E ~ Exp(1), for sample `index` at step t, float32."""
    exponential = stream("gumbel", seed, index, 0, t).standard_exponential(tuple(shape), dtype=np.float32)
    # An exponential of exactly 0 would give infinity, and infinity minus infinity where logits are masked.
    return -np.log(np.maximum(exponential, np.finfo(np.float32).tiny))


def uniform_rows(purpose: str, seed: int, indices: Integers, views: Integers, t: int, shape: Integers) -> Floats:
    """Uniform values in [0, 1) at step t, one address a row: (len(indices), *shape) float32."""
    streams = [stream(purpose, seed, int(index), int(view), t) for index, view in zip(indices, views, strict=True)]
    return np.stack([row.random(tuple(shape), dtype=np.float32) for row in streams])


def normal_rows(
    purpose: str, seed: int, indices: Integers, views: Integers, ts: Integers, shape: Integers,
    by_position: bool = False,
) -> Floats:  # fmt: skip
    """One address a row: (len(indices), *shape).

    by_position: shape is (C, S), drawn position by position: a longer item begins with the noise of a shorter."""
    addresses, drawn = zip(indices, views, ts, strict=True), shape[::-1] if by_position else shape
    rows = np.stack([normal(purpose, seed, index, view, t, drawn) for index, view, t in addresses])
    return np.ascontiguousarray(rows.swapaxes(1, 2)) if by_position else rows


def normal_steps(
    purpose: str, seed: int, indices: Integers, views: Integers, steps: int, shape: Integers, by_position: bool = False
) -> Floats:
    """All steps 1..T of each row: (len(indices), T, *shape). by_position: as `normal_rows`."""
    ts = [*range(1, steps + 1)] * len(indices)
    index_of, view_of = (np.repeat(np.asarray(x), steps).tolist() for x in (indices, views))
    rows = normal_rows(purpose, seed, index_of, view_of, ts, shape, by_position)
    return rows.reshape(len(indices), steps, *shape)


def fingerprint(seed: int) -> list[float]:
    """16 values of the encode stream. A store keeps them, to refuse a numpy that draws other numbers."""
    return [float(v) for v in normal("encode", seed, 0, 0, 1, (16,))]


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, count: int) -> Ints:
    return stream("epoch", seed, epoch).permutation(count)


def epoch_rows(seed: int, step: int, batch: int, count: int, rows: range | None = None) -> Ints:
    """Rows of the global batch of a step: every row once an epoch, in an order of (seed, epoch). (batch,) int64.

    rows: only these places of the batch."""
    first, last = (rows.start, rows.stop) if rows is not None else (0, batch)
    epochs, places = np.divmod(np.arange(step * batch + first, step * batch + last), count)
    for epoch in np.unique(epochs):
        places[epochs == epoch] = _permutation(seed, int(epoch), count)[places[epochs == epoch]]
    return places


def block_uniform(seed: int, step: int, rows: range, columns: int, purpose: str = "batch") -> Floats:
    """Uniform values in [0, 1) for `rows` of the global batch (whole blocks): (len(rows), columns)."""
    blocks = [rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK)]
    streams = [stream(purpose, seed, step, block.start // BLOCK) for block in blocks]
    draws = [s.random((len(block), columns), dtype=np.float32) for s, block in zip(streams, blocks, strict=True)]
    return np.concatenate(draws)


def seed_of(purpose: str, seed: int, step: int, block: int) -> int:
    """A 63-bit seed for a device's own generator."""
    return int(stream(purpose, seed, step, block).integers(2**63))

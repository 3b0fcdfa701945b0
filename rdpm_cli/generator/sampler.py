"""Labels -> images. Sample i depends on (checkpoint, options, seed, i): not on batch, order or restart."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rdpm_cli import noise
from rdpm_cli.generator.contract import Generator, SampleOptions
from rdpm_cli.images.tensors import hwc, to_pixels
from rdpm_cli.images.transform import Pixels
from rdpm_cli.threads import one_thread
from rdpm_cli.tokenizer.model import Tokenizer


@dataclass
class Samples:
    """One micro-batch of finished samples."""

    indices: list[int]
    labels: list[int]
    codes_BTHW: Tensor  # int64, CPU
    pixels_BHWC: Pixels


def balanced_labels(classes: Sequence[int], per_class: int, seed: int) -> list[int]:
    """Each class per_class times, in a seeded permutation: order-dependent scores are then right."""
    labels = np.repeat(np.asarray(classes, dtype=np.int64), per_class)
    return [int(v) for v in noise.stream("labels", seed).permutation(labels)]


def sample(
    generator: Generator,
    tokenizer: Tokenizer,
    labels: Sequence[int],
    options: SampleOptions,
    micro_batch: int,
    wanted: Callable[[list[int]], bool] = bool,
) -> Iterator[Samples]:
    """Samples 0..n-1 in micro-batches; the last is padded, so that every forward pass has one shape.

    wanted(indices): is this micro-batch still to be made?
    """
    device = next(generator.network.parameters()).device
    for start in range(0, len(labels), micro_batch):
        indices = list(range(start, min(start + micro_batch, len(labels))))
        if not wanted(indices):
            continue
        rows = indices + [indices[-1]] * (micro_batch - len(indices))
        labels_B = torch.tensor([labels[i] for i in rows], device=device)
        codes = generator.sample(labels_B, torch.tensor(rows), options)
        pixels = decode(tokenizer, codes)[: len(indices)]
        yield Samples(indices, [labels[i] for i in indices], codes[: len(indices)].cpu(), pixels)


def decode(tokenizer: Tokenizer, codes_BTHW: Tensor) -> Pixels:
    """codes -> uint8 (B, H, W, 3), on one thread: convolutions move with the thread count."""
    with one_thread():
        return hwc(to_pixels(tokenizer.decode(codes_BTHW)))

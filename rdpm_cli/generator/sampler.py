"""Labels -> images. Sample i depends on (checkpoint, options, seed, i): not on batch, order or restart.

Legend: B samples, T steps, S positions of the flattened grid, H W height and width of an image."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rdpm_cli import noise, progress
from rdpm_cli.data.pixels import Cut, Pixels, hwc, to_pixels
from rdpm_cli.distributed import one_thread
from rdpm_cli.generator.contract import Generator, Known, SampleOptions
from rdpm_cli.tokenizer.model import Tokenizer

KnownCodes = Callable[[list[int]], Known]  # noise indices -> the codes that these samples keep
Judge = Callable[[Pixels, list[int]], NDArray[np.float64]]  # images and their labels -> scores, larger is better


@dataclass
class Samples:
    indices: list[int]
    labels: list[int]
    codes_BTS: Tensor  # int64, CPU
    pixels_BHWC: Pixels


def balanced_labels(classes: Sequence[int], per_class: int, seed: int) -> list[int]:
    """Each class per_class times, in a seeded permutation, which scores that depend on the order need."""
    labels = np.repeat(np.asarray(classes, dtype=np.int64), per_class)
    return [int(v) for v in noise.stream("labels", seed).permutation(labels)]


def sample(
    generator: Generator, tokenizer: Tokenizer, labels: Sequence[int], options: SampleOptions, micro_batch: int
) -> Iterator[Samples]:
    """Samples 0..n-1, a micro-batch at a time."""
    job = Job(generator, tokenizer, options, micro_batch)
    for start in range(0, len(labels), micro_batch):
        indices = range(len(labels))[start : start + micro_batch]
        yield job.draw(indices, labels[indices.start : indices.stop])


@dataclass
class Job:
    """Draws samples of one network under one set of options."""

    generator: Generator
    tokenizer: Tokenizer
    options: SampleOptions
    micro_batch: int  # images a pass
    known_codes: KnownCodes | None = None  # for editing
    cut: Cut = "round"

    def __post_init__(self) -> None:
        self.device = next(self.generator.network.parameters()).device
        self.precision = self.options.sampling.precision if self.device.type == "cuda" else "fp32"
        layout = torch.channels_last if self.options.sampling.channels_last else torch.contiguous_format
        for part in (self.tokenizer.post_quant_conv, self.tokenizer.decoder):
            part.to(memory_format=layout)

    @property
    def made_with(self) -> dict[str, Any]:
        """What a sample depends on apart from its options: the device, the precision there, images a pass."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        return {"device": name, "precision": self.precision, "micro_batch": self.micro_batch}

    def draw(self, indices: Sequence[int], labels: Sequence[int]) -> Samples:
        """The samples of noise indices, a micro-batch at a time."""
        drawn: list[tuple[Tensor, Pixels]] = []
        done = 0
        while done < len(indices):
            rows = slice(done, done + self.micro_batch)
            try:
                drawn.append(self._micro_batch(list(indices[rows]), list(labels[rows])))
                done = rows.stop
                continue
            except torch.OutOfMemoryError:
                if self.micro_batch == 1:
                    raise
            # Not in the handler, where the exception still holds the tensors of the pass. Noise and labels stay.
            self.micro_batch //= 2
            torch.cuda.empty_cache()
            progress.warn(f"out of memory: continuing with {self.micro_batch} images a pass, under the same noise")
        codes, pixels = zip(*drawn, strict=True)
        return Samples(list(indices), list(labels), torch.cat(codes), np.concatenate(pixels))

    def best(self, indices: Sequence[int], labels: Sequence[int], tries: int, judge: Judge) -> Samples:
        """Of `tries` candidates a sample, of noise indices i · tries + j, the first one with the best score."""
        repeated = [label for label in labels for _ in range(tries)]
        candidates = self.draw([index * tries + j for index in indices for j in range(tries)], repeated)
        scores = judge(candidates.pixels_BHWC, repeated).reshape(len(indices), tries)
        rows = np.arange(len(indices)) * tries + scores.argmax(1)
        codes = candidates.codes_BTS[torch.from_numpy(rows)]
        return Samples(list(indices), list(labels), codes, candidates.pixels_BHWC[rows])

    @torch.no_grad()
    def _micro_batch(self, indices: list[int], labels: list[int]) -> tuple[Tensor, Pixels]:
        count, padding = len(indices), self.micro_batch - len(indices)
        # The last row is repeated up to a whole micro-batch: on the CPU sums depend on the shape of a pass.
        indices, labels = indices + indices[-1:] * padding, labels + labels[-1:] * padding
        known = Known(*(x.to(self.device) for x in self.known_codes(indices))) if self.known_codes else None
        bf16 = torch.autocast("cuda", torch.bfloat16) if self.precision == "bf16" else contextlib.nullcontext()
        with bf16:
            columns = {"labels": torch.tensor(labels, device=self.device)}
            codes = self.generator.sample(columns, torch.tensor(indices), self.options, known)
            with one_thread():  # convolutions depend on the number of threads
                pixels = hwc(to_pixels(self.tokenizer.decode(codes), self.cut))
        return codes[:count].cpu(), pixels[:count]

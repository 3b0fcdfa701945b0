"""Labels -> images. Sample i depends on (checkpoint, options, seed, i): not on batch, order or restart.

Legend: B samples, T steps, S positions of the flattened grid, H W height and width of an image.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rdpm_cli import noise, progress
from rdpm_cli.data.pixels import Pixels, hwc, to_pixels
from rdpm_cli.device import one_thread
from rdpm_cli.generator.contract import Generator, Known, SampleOptions
from rdpm_cli.tokenizer.model import Tokenizer

KnownCodes = Callable[[list[int]], Known]  # noise indices -> the codes that these samples keep
Judge = Callable[[Pixels, list[int]], NDArray[np.float64]]  # images and their labels -> scores, larger is better


@dataclass
class Samples:
    """Finished samples."""

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
        indices = range(start, min(start + micro_batch, len(labels)))
        yield job.draw(indices, labels[indices.start : indices.stop])


class Job:
    """Draws samples of one network under one set of options."""

    def __init__(
        self,
        generator: Generator,
        tokenizer: Tokenizer,
        options: SampleOptions,
        micro_batch: int,
        known_codes: KnownCodes | None = None,
    ) -> None:
        """micro_batch: images a pass. known_codes: for editing."""
        self.generator, self.tokenizer, self.options = generator, tokenizer, options
        self.micro_batch, self.known_codes = micro_batch, known_codes
        self.device = next(generator.network.parameters()).device
        layout = torch.channels_last if options.sampling.channels_last else torch.contiguous_format
        for part in (tokenizer.post_quant_conv, tokenizer.decoder):
            part.to(memory_format=layout)

    @property
    def made_with(self) -> dict[str, Any]:
        """What a sample depends on besides its options: the device, the precision there, images a pass."""
        cuda = self.device.type == "cuda"
        name = torch.cuda.get_device_name(self.device) if cuda else self.device.type
        precision = self.options.sampling.precision if cuda else "fp32"
        return {"device": name, "precision": precision, "micro_batch": self.micro_batch}

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
        codes = torch.cat([codes for codes, _ in drawn])
        return Samples(list(indices), list(labels), codes, np.concatenate([pixels for _, pixels in drawn]))

    def best(self, indices: Sequence[int], labels: Sequence[int], tries: int, judge: Judge) -> Samples:
        """Of `tries` candidates a sample the one with the best score, the first one on a tie.

        Candidate j of sample i has noise index i · tries + j, so sample i depends only on its own candidates.
        """
        repeated = [label for label in labels for _ in range(tries)]
        candidates = self.draw([index * tries + j for index in indices for j in range(tries)], repeated)
        scores = judge(candidates.pixels_BHWC, repeated).reshape(len(indices), tries)
        rows = np.arange(len(indices)) * tries + scores.argmax(1)
        codes = candidates.codes_BTS[torch.from_numpy(rows)]
        return Samples(list(indices), list(labels), codes, candidates.pixels_BHWC[rows])

    @torch.no_grad()
    def _micro_batch(self, indices: list[int], labels: list[int]) -> tuple[Tensor, Pixels]:
        """Codes and pixels of up to a micro-batch of samples."""
        count, padding = len(indices), self.micro_batch - len(indices)
        # The last row is repeated up to a whole micro-batch: on the CPU sums depend on the shape of a pass.
        indices, labels = indices + indices[-1:] * padding, labels + labels[-1:] * padding
        known = self.known_codes(indices) if self.known_codes else None
        if known is not None:
            known = Known(known.codes_BTS.to(self.device), known.keep_BTS.to(self.device))
        with self._precision():
            condition = self.generator.condition({"labels": torch.tensor(labels, device=self.device)})
            codes = self.generator.sample(condition, torch.tensor(indices), self.options, known)
            pixels = decode(self.tokenizer, codes)
        return codes[:count].cpu(), pixels[:count]

    def _precision(self) -> contextlib.AbstractContextManager[object]:
        if self.device.type == "cuda" and self.options.sampling.precision == "bf16":
            return torch.autocast("cuda", torch.bfloat16)
        return contextlib.nullcontext()


def decode(tokenizer: Tokenizer, codes_BTS: Tensor) -> Pixels:
    """codes -> uint8 (B, H, W, 3), on one thread, since convolutions depend on the number of threads."""
    with one_thread():
        return hwc(to_pixels(tokenizer.decode(codes_BTS)))

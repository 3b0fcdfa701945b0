"""Labels -> images. Sample i depends on (checkpoint, options, seed, i): not on batch, order or restart."""

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

KnownCodes = Callable[[list[int]], Known]  # noise indices -> the codes that are given for them, on the CPU
Judge = Callable[[Pixels, list[int]], NDArray[np.float64]]  # images and their labels -> scores, larger is better


@dataclass
class Samples:
    """Finished samples."""

    indices: list[int]
    labels: list[int]
    codes_BTS: Tensor  # int64, CPU
    pixels_BHWC: Pixels


def balanced_labels(classes: Sequence[int], per_class: int, seed: int) -> list[int]:
    """Each class per_class times, in a seeded permutation: order-dependent scores are then right."""
    labels = np.repeat(np.asarray(classes, dtype=np.int64), per_class)
    return [int(v) for v in noise.stream("labels", seed).permutation(labels)]


class Job:
    """Draws samples of one network under one set of options. Made by `job`."""

    def __init__(
        self,
        generator: Generator,
        tokenizer: Tokenizer,
        options: SampleOptions,
        micro_batch: int,
        known_codes: KnownCodes | None,
    ) -> None:
        self.generator, self.tokenizer, self.options = generator, tokenizer, options
        self.micro_batch, self.known_codes = micro_batch, known_codes
        self.device = next(generator.network.parameters()).device

    @property
    def made_with(self) -> dict[str, Any]:
        """What a sample depends on beside its options: the kind of device, the precision there, images a pass."""
        cuda = self.device.type == "cuda"
        name = torch.cuda.get_device_name(self.device) if cuda else self.device.type
        precision = self.options.sampling.precision if cuda else "fp32"
        return {"device": name, "precision": precision, "micro_batch": self.micro_batch}

    def draw(self, indices: Sequence[int], labels: Sequence[int]) -> Samples:
        """The samples of noise indices, a micro-batch at a time; the last one is padded: all passes have one shape.

        Where a GPU's memory is too small the micro-batch is halved for good; noise and labels stay what they were.
        """
        parts: list[tuple[Tensor, Pixels]] = []
        done = 0
        while done < len(indices):
            rows = slice(done, done + self.micro_batch)
            part = self._try(list(indices[rows]), list(labels[rows]))
            if part is None:
                self._halve()
            else:
                parts.append(part)
                done += len(part[1])
        codes, pixels = torch.cat([codes for codes, _ in parts]), np.concatenate([pixels for _, pixels in parts])
        return Samples(list(indices), list(labels), codes, pixels)

    def best(self, indices: Sequence[int], labels: Sequence[int], tries: int, judge: Judge) -> Samples:
        """Of `tries` candidates a sample the one that the judge likes best, the first one on a tie.

        Candidate j of sample i has noise index i · tries + j: sample i depends on nothing but its own candidates.
        """
        repeated = [label for label in labels for _ in range(tries)]
        candidates = self.draw([index * tries + j for index in indices for j in range(tries)], repeated)
        scores = judge(candidates.pixels_BHWC, repeated).reshape(len(indices), tries)
        best = np.arange(len(indices)) * tries + scores.argmax(1)
        codes = candidates.codes_BTS[torch.from_numpy(best)]
        return Samples(list(indices), list(labels), codes, candidates.pixels_BHWC[best])

    def _try(self, indices: list[int], labels: list[int]) -> tuple[Tensor, Pixels] | None:
        """codes and pixels of one micro-batch; None where a GPU's memory is too small for it and not for less."""
        rows, labels_B = self._padded(indices, labels)
        try:
            with self._precision():
                condition = self.generator.condition({"labels": labels_B})
                codes = self.generator.sample(condition, torch.tensor(rows), self.options, self._known(rows))
                pixels = decode(self.tokenizer, codes)
        except torch.OutOfMemoryError:
            if self.micro_batch == 1:
                raise
            return None
        return codes[: len(indices)].cpu(), pixels[: len(indices)]

    def _halve(self) -> None:
        self.micro_batch //= 2
        torch.cuda.empty_cache()
        progress.warn(f"out of memory: going on with micro-batches of {self.micro_batch} images, under the same noise")

    def _padded(self, indices: list[int], labels: list[int]) -> tuple[list[int], Tensor]:
        """Noise indices of a whole micro-batch, the last one repeated, and its labels on the device."""
        missing = self.micro_batch - len(indices)
        return indices + indices[-1:] * missing, torch.tensor(labels + labels[-1:] * missing, device=self.device)

    def _known(self, rows: list[int]) -> Known | None:
        if self.known_codes is None:
            return None
        known = self.known_codes(rows)
        return Known(known.codes_BTS.to(self.device), known.keep_BTS.to(self.device))

    def _precision(self) -> contextlib.AbstractContextManager[object]:
        if self.device.type == "cuda" and self.options.sampling.precision == "bf16":
            return torch.autocast("cuda", torch.bfloat16)
        return contextlib.nullcontext()


def job(
    generator: Generator,
    tokenizer: Tokenizer,
    options: SampleOptions,
    micro_batch: int,
    known_codes: KnownCodes | None = None,
) -> Job:
    """A job of one network under one set of options. known_codes: codes that are given, for in-painting."""
    form = torch.channels_last if options.sampling.channels_last else torch.contiguous_format
    for part in (tokenizer.post_quant_conv, tokenizer.decoder):
        part.to(memory_format=form)
    return Job(generator, tokenizer, options, micro_batch, known_codes)


def sample(
    generator: Generator,
    tokenizer: Tokenizer,
    labels: Sequence[int],
    options: SampleOptions,
    micro_batch: int,
    needed: Callable[[list[int]], bool] = bool,
) -> Iterator[Samples]:
    """Samples 0..n-1 in micro-batches; the last is padded, so that every pass has one shape.

    needed(indices): whether this micro-batch is still to be drawn.
    """
    drawing = job(generator, tokenizer, options, micro_batch)
    for start in range(0, len(labels), micro_batch):
        indices = list(range(start, min(start + micro_batch, len(labels))))
        if needed(indices):
            yield drawing.draw(indices, [labels[i] for i in indices])


def decode(tokenizer: Tokenizer, codes_BTS: Tensor) -> Pixels:
    """codes -> uint8 (B, H, W, 3), on one thread: convolutions move with the thread count."""
    with one_thread():
        return hwc(to_pixels(tokenizer.decode(codes_BTS)))

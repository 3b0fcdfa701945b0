"""The Python API: `import rdpm_cli as rdpm`. Checkpoints as objects that draw, encode and decode images.

The command line is made of the same parts, so both give the same bytes: `sample` here draws what `rdpm sample` draws,
and `encode` has the codes that `rdpm tokenize` writes. Legend: B images, T steps, H W height and width, (h, w) the grid
of codes, S = h·w. Errors are those of rdpm_cli.errors; a hint of what to do next is a note below the traceback."""

import math
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from rdpm_cli import checkpoint, hub
from rdpm_cli.codes.ragged import open_store
from rdpm_cli.codes.write import StoreOptions, Work, encode_all, images_at_once, make_plan, micro_batches
from rdpm_cli.data.open import open_source
from rdpm_cli.data.pixels import Pixels
from rdpm_cli.data.source import Source
from rdpm_cli.distributed import one_thread, pick_device
from rdpm_cli.errors import UsageError
from rdpm_cli.generator import registry, sampler
from rdpm_cli.tokenizer import model

CodeStore, open_images = open_store, open_source  # under the names of the API


class ArraySource(Source):
    """Images in memory, as one class."""

    spec, class_names = "these images", ["image"]

    def __init__(self, images: Pixels | Sequence[Any]) -> None:
        if not len(images):
            raise UsageError("there are no images", "give at least one")
        for image in (np.asarray(image) for image in images if not isinstance(image, Image.Image)):
            if image.dtype != np.uint8 or image.shape[2:] != (3,):
                raise UsageError(f"an image is {image.dtype} of shape {image.shape}", "give uint8 arrays (H, W, 3)")
        self.images, self.names, self.labels = images, [str(index) for index in range(len(images))], [0] * len(images)

    def open(self, index: int) -> Image.Image:
        """A copy, which the caller may close."""
        image = self.images[index]
        return image.copy() if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))


class Tokenizer:
    """A tokenizer: images to codes and back. `network` is its torch module, which takes and gives tensors."""

    def __init__(self, network: model.Tokenizer, content: dict[str, Any], device: torch.device) -> None:
        """content: of its file."""
        self.network, self.device = network.to(device), device
        self.digest, self.provenance = content["digest"], content["provenance"]
        self.resolution, self.grid = network.inputs.resolution, network.grid
        self.steps, self.codes = network.cfg.quantizer.steps, network.cfg.quantizer.codes
        self.micro_batch = images_at_once(self.grid, device)

    def encode(self, images: Source | Pixels | Sequence[Any], *, seed: int = 0) -> NDArray[np.uint16]:
        """The codes of images, (B, T, h, w) in [0, K), as `rdpm tokenize --seed` writes them.

        images: a source of `open_images`, an array (B, H, W, 3) uint8, or a list of such arrays or of Pillow's images,
        of any size; they are cropped as in training. Image i is encoded under the noise of (seed, i). Raises
        ImageError, and UsageError for other arrays."""
        source = images if isinstance(images, Source) else ArraySource(images)
        plan = make_plan(source, self.network, self.digest, StoreOptions(seed=seed), self.device)
        batches = [batch for shard in range(len(plan.shard_ranges)) for batch in micro_batches(plan, shard)]
        encoded = list(encode_all(source, self.network, plan, batches, Work()))
        for bad in (item for batch in encoded for item in batch.bad):
            raise self.network.inputs.unreadable(source.spec, bad["name"], bad["reason"])
        shape = (len(source), self.steps, *self.grid)
        return np.concatenate([batch.arrays["codes"] for batch in encoded]).reshape(shape)

    def decode(self, codes: ArrayLike) -> Pixels:
        """Images (B, H, W, 3) uint8 of codes (B, T, h, w) or (B, T, S), as `rdpm reconstruct CODES` writes them.

        Raises UsageError for codes of another shape, or outside [0, K)."""
        array = np.asarray(codes)
        if array.dtype.kind not in "iu":
            raise UsageError(f"codes are {array.dtype}", "give integers")
        if array.shape[1:] not in ((self.steps, *self.grid), (self.steps, math.prod(self.grid))):
            raise UsageError(
                f"codes have the shape {array.shape}", f"give (B, {self.steps}, {', '.join(map(str, self.grid))})"
            )
        if array.size and not 0 <= array.min() <= array.max() < self.codes:
            raise UsageError(f"codes from {array.min()} to {array.max()}", f"this tokenizer has 0 to {self.codes - 1}")
        codes_BTS = torch.from_numpy(array.astype(np.int64).reshape(*array.shape[:2], math.prod(self.grid)))
        with one_thread():  # convolutions depend on the number of threads
            parts = [self.network.decode(part.to(self.device)) for part in codes_BTS.split(self.micro_batch)]
        return np.concatenate([self.network.inputs.items(x) for x in parts])


class Generator:
    """A generator with its tokenizer: classes to images. `network` is its torch module."""

    def __init__(self, loaded: registry.LoadedGenerator, tokenizer: Tokenizer) -> None:
        self.loaded, self.tokenizer, self.device = loaded.to(tokenizer.device), tokenizer, tokenizer.device
        self.network, self.sampling = loaded.generator.network, loaded.sampling
        self.class_names, self.digest, self.provenance = loaded.class_names, loaded.digest, loaded.provenance

    def sample_codes(
        self, classes: Sequence[int | str], *, seed: int = 0, preset: str | None = None, **sampling: Any
    ) -> NDArray[np.uint16]:
        """The codes of these samples, (B, T, h, w): see `sample`."""
        samples = self._draw(classes, seed, preset, sampling)
        return samples.codes_BTS.numpy().astype(np.uint16).reshape(len(classes), -1, *self.tokenizer.grid)

    def sample(
        self, classes: Sequence[int | str], *, seed: int = 0, preset: str | None = None, **sampling: Any
    ) -> Pixels:
        """Images (B, H, W, 3) uint8, one of each of these classes, by number or by name.

        Image i depends on the checkpoint, the options, its class and (seed, i): not on the others. sampling: options
        such as cfg=1.5, tau=2.0, steps=16 over those of the preset and of the checkpoint, which `self.sampling` has.
        Raises UsageError for a class or an option that the checkpoint does not have."""
        return self._draw(classes, seed, preset, sampling).pixels_BHWC

    def _draw(
        self, classes: Sequence[int | str], seed: int, preset: str | None, sampling: dict[str, Any]
    ) -> sampler.Samples:
        options = self.loaded.options(operator.index(seed), preset, sampling)
        names = {name: number for number, name in enumerate(self.class_names)}
        if isinstance(classes, str) or not len(classes):
            raise UsageError(f"classes are {classes!r}", "give a list of numbers or names")
        labels = [names.get(c, -1) if isinstance(c, str) else operator.index(c) for c in classes]
        if wrong := [c for c, label in zip(classes, labels, strict=True) if not 0 <= label < len(self.class_names)]:
            raise UsageError(f"{wrong[0]!r} is not a class", f"give 0 to {len(self.class_names) - 1}, or a name")
        return self.loaded.job(options).draw(range(len(labels)), labels)


def load(name: str | Path, device: str = "auto") -> Generator | Tokenizer:
    """The generator or tokenizer of a .pt file, of a folder of `rdpm export`, or of the hub: hf://owner/name[@revision].

    device: auto, cpu, cuda or cuda:N. Raises CheckpointError, and UsageError for a judge or a checkpoint of sound."""
    path, picked = hub.find(str(name)), pick_device(device)
    content = checkpoint.load(path)
    kind = content["format"]
    if kind not in (registry.KIND, model.KIND):
        raise UsageError(f"{path} is a {checkpoint.FORMATS[kind]}", "load a generator or a tokenizer")
    loaded = registry.unpack(content, str(path)) if kind == registry.KIND else None
    network = loaded.tokenizer if loaded else model.unpack(content, str(path))
    if network.inputs.rate:
        raise UsageError(f"{path} is of sound, and the Python API is for images", "see `rdpm sample --help`")
    tokenizer = Tokenizer(network, content["tokenizer"] if loaded else content, picked)
    return Generator(loaded, tokenizer) if loaded else tokenizer

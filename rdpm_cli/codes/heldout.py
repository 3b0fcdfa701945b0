"""Images outside a store, encoded by its tokenizer, for measurements during training."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from rdpm_cli.codes.store import CodeStore, Ints, Manifest
from rdpm_cli.data.labels import match_classes
from rdpm_cli.data.open import open_source
from rdpm_cli.data.pixels import chw, to_model
from rdpm_cli.data.source import Source, spread
from rdpm_cli.distributed import one_thread
from rdpm_cli.errors import DataError, UsageError
from rdpm_cli.tokenizer.model import Tokenizer

LEAST, MOST, AT_ONCE = 256, 2000, 32  # images: fewer say little; of more some are taken, evenly spaced
PURPOSE = "heldout"  # of their noise


def open_heldout(spec: str, manifest: Manifest, reading: Mapping[str, Any] | None = None) -> Source:
    """Images of classes that the store has, with its numbers of them. Raises DataError for others, and for too few."""
    if manifest.speech:
        raise UsageError("--heldout is for images", "leave it out: 2% of the store are held out")
    source = open_source(spec, **(reading or {}))
    if len(source) < LEAST:
        raise DataError(f"--heldout {spec} holds {len(source)} images, fewer than {LEAST}", "give more, or none")
    labels = source.need_labels()
    numbers, fault = match_classes(manifest.class_names, source.class_names, labels, "the store")
    if fault:
        raise DataError(f"--heldout {spec}: {fault}", "give images of its classes")
    source.labels, source.class_names = [numbers[label] for label in labels], list(manifest.class_names)
    return source


class EncodedImages(CodeStore):
    """Codes in memory, one view an image, held out as a whole. index: in the source, which addresses the noise."""

    def __init__(self, source: Source, tokenizer: Tokenizer, manifest: Manifest, device: torch.device) -> None:
        """source: of `open_heldout`."""
        numbers, size = spread(len(source), MOST), manifest.resolution
        labels = source.need_labels()
        self.manifest = manifest.model_copy(update={"views": 1, "flip": False, "latents": False, "seed": 0})
        self.index = np.array(numbers)
        self.columns = {"labels": np.array([labels[number] for number in numbers], dtype=np.int32)}
        codes = []
        for start in range(0, len(numbers), AT_ONCE):
            part = numbers[start : start + AT_ONCE]
            pixels = np.stack([source.pixels(number, size) for number in part])
            eps_BTCS = tokenizer.noise(PURPOSE, self.manifest.seed, part, [0] * len(part)).to(device)
            with one_thread():
                codes.append(tokenizer.encode(to_model(chw(pixels)).to(device), eps_BTCS).cpu().numpy())
        self.codes_NTS = np.concatenate(codes).astype(np.uint16)

    def __len__(self) -> int:
        return len(self.index)

    def codes(self, rows: Ints) -> np.ndarray[Any, np.dtype[np.uint16]]:
        return self.codes_NTS[rows]

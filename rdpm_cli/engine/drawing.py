"""A checkpoint as images to score: drawn as `sample` draws them, with no files between."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rdpm_cli.engine.sample_options import choose, key_values, parse_classes

if TYPE_CHECKING:
    import torch

    from rdpm_cli.evaluation.features import Extractor, Features
    from rdpm_cli.evaluation.reference import ImageSet
    from rdpm_cli.generator.contract import Generator, SampleOptions
    from rdpm_cli.images.transform import Pixels
    from rdpm_cli.tokenizer.model import Tokenizer


@dataclass(frozen=True)
class Drawn:
    """The samples of a checkpoint.

    overrides: `key=value` of its sampling options, e.g. cfg=1.5; preset: as `sample --preset`, below them.
    """

    ckpt: Path
    classes: str = "all"
    per_class: int = 8
    seed: int = 0
    overrides: tuple[str, ...] = ()
    preset: str | None = None

    def images(self, device: torch.device) -> ImageSet:
        """Drawn as they are read, each process only its own."""
        import numpy as np

        from rdpm_cli.evaluation.reference import ImageSet
        from rdpm_cli.generator import model, sampler
        from rdpm_cli.generator.contract import SampleOptions

        loaded = model.load(self.ckpt)
        asked = key_values(self.overrides, "write it as cfg=1.5; with --ckpt there is no TARGET")
        sampling = choose(loaded.sampling, self.preset, asked)
        options = SampleOptions(sampling, self.seed)
        labels = sampler.balanced_labels(parse_classes(self.classes, loaded.class_names), self.per_class, self.seed)
        loaded.generator.check(options)

        def read(pieces: Iterable[range]) -> Iterator[Pixels]:
            own = list(pieces)
            wanted = {index for piece in own for index in piece}
            loaded.to(device, sampling.compile)
            parts = sampler.sample(
                loaded.generator,
                loaded.tokenizer,
                labels,
                options,
                sampling.images_at_once(device.type),
                lambda indices: not wanted.isdisjoint(indices),
            )
            held: dict[int, Any] = {}
            for piece in own:
                while not held.keys() >= set(piece):
                    part = next(parts)
                    held |= dict(zip(part.indices, part.pixels_BHWC, strict=True))
                yield np.stack([held[index] for index in piece])
                held = {index: pixels for index, pixels in held.items() if index >= piece.stop}

        origin = {
            "reference": loaded.provenance.get("reference"),
            "options": {
                **sampling.model_dump(),
                "seed": self.seed,
                "classes": self.classes,
                "per_class": self.per_class,
                "checkpoint": loaded.digest,
            },
        }
        size = loaded.tokenizer.cfg.autoencoder.resolution
        return ImageSet(str(self.ckpt), len(labels), size, labels, loaded.class_names, read, origin)


def spread_labels(samples: int, classes: int) -> list[int]:
    """Labels of so many samples, in order, every class as often as possible."""
    return [place * classes // samples for place in range(samples)]


def features_of(
    extractor: Extractor,
    generator: Generator,
    tokenizer: Tokenizer,
    labels: Sequence[int],
    options: SampleOptions,
    device: torch.device,
) -> Features:
    """What an extractor sees of samples drawn for it."""
    from rdpm_cli.evaluation import features
    from rdpm_cli.generator import sampler

    parts = sampler.sample(generator, tokenizer, labels, options, options.sampling.images_at_once(device.type))
    return features.collect(extractor, (part.pixels_BHWC for part in parts))

"""The interface of everything that holds items: a fixed order, names and condition columns."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from rdpm_cli import files
from rdpm_cli.data.pixels import Pixels, center_crop, image_errors, to_rgb
from rdpm_cli.errors import DataError

UNLABELLED = "unlabelled"  # the one class of --unlabelled


@dataclass(frozen=True)
class Reading:
    """How a source is read, where a user asks for something else than the default.

    follow_links: read class folders that are links. exif: turn images as their EXIF orientation says. unlabelled: put
    all images into one class. image_column, label_column: of parquet; the second also of metadata.csv and .jsonl."""

    follow_links: bool = False
    exif: bool = False
    unlabelled: bool = False
    image_column: str | None = None
    label_column: str | None = None

    def record(self) -> dict[str, Any]:
        """What differs from the default, for `open_source` to read the same again."""
        return {name: value for name, value in asdict(self).items() if value}


@dataclass
class Items:
    """What a folder or archive holds: the items' names, labels (None without classes), and what was not taken."""

    names: Sequence[str]
    labels: Sequence[int] | None
    class_names: list[str]
    not_taken: Mapping[str, int] = field(default_factory=dict)  # number of files by the reason: hidden, or their suffix
    warnings: list[str] = field(default_factory=list)


class ItemSource:
    """Items 0..n-1 in a fixed order, with names and, where there are classes, labels.

    spec, reading: what opens it again. Labels count the sorted class folders, as torchvision's ImageFolder does, or
    are those that the data itself records. A source can be pickled, and several processes may read it at a time."""

    spec: str
    names: Sequence[str]
    labels: Sequence[int] | None
    class_names: list[str]
    reading = Reading()
    not_taken: Mapping[str, int] = {}
    warnings: Sequence[str] = ()
    label_hint = "put the items into one folder a class, or give --unlabelled"

    def __len__(self) -> int:
        return len(self.names)

    def hold(self, items: Items) -> None:
        """Take over names, labels and the rest of the items."""
        self.names, self.labels, self.class_names = items.names, items.labels, items.class_names
        self.not_taken, self.warnings = items.not_taken, items.warnings

    @property
    def columns(self) -> dict[str, Sequence[int]]:
        """The conditions of the items by name, one value an item: {"labels": ...}, or {} without classes."""
        return {} if self.labels is None else {"labels": self.labels}

    def need_labels(self) -> Sequence[int]:
        """The labels. Raises DataError when the items are not sorted into classes."""
        if self.labels is None:
            raise DataError(f"{self.spec} has no classes", self.label_hint)
        return self.labels

    def digest(self) -> str:
        """sha256 over names and labels: the identity of the list, not of the content."""
        return files.digest({"names": list(self.names), "labels": self.labels and list(map(int, self.labels))})

    def record(self) -> dict[str, Any]:
        """Where the items lie, how they are read where that is not the default, and their digest."""
        reading = {"reading": self.reading.record()} if self.reading.record() else {}
        return {"source": self.spec, **reading, "digest": self.digest()}


class Source(ItemSource, ABC):
    """A source of images."""

    factors: NDArray[np.float32] | None = None  # (n, F) in [0, 1): what the items were drawn from, where that is known
    label_hint = "put the images into one folder a class, or give --unlabelled"

    @abstractmethod
    def open(self, index: int) -> Image.Image:
        """The image as it is stored, its pixels not yet read. May raise anything that Pillow raises."""

    def image(self, index: int) -> Image.Image:
        """RGB. Raises ImageError naming an image that cannot be read."""
        with image_errors(self.spec, self.names[index]), self.open(index) as image:
            if self.reading.exif:
                ImageOps.exif_transpose(image, in_place=True)  # a copy would lose its format, which to_rgb needs
            return to_rgb(image)

    def pixels(self, index: int, size: int) -> Pixels:
        """(size, size, 3) uint8 after the ADM centre crop. Raises ImageError naming an image that cannot be read."""
        image = self.image(index)
        with image_errors(self.spec, self.names[index]):
            return center_crop(image, size)


class Subset(Source):
    """Some items of a source, in its order, with its classes. note: names the part in `spec`."""

    def __init__(self, source: Source, indices: Sequence[int], note: str) -> None:
        self.source, self.indices = source, [int(index) for index in indices]
        self.spec, self.class_names, self.reading = f"{source.spec} ({note})", source.class_names, source.reading
        self.names = [source.names[index] for index in self.indices]
        self.labels = None if source.labels is None else [int(source.labels[index]) for index in self.indices]
        self.factors = None if source.factors is None else source.factors[self.indices]

    def open(self, index: int) -> Image.Image:
        return self.source.open(self.indices[index])

    def pixels(self, index: int, size: int) -> Pixels:
        return self.source.pixels(self.indices[index], size)


def spread(count: int, limit: int | None) -> list[int]:
    """`limit` of the indices 0..count-1, evenly spaced, since sources are sorted by class."""
    few = min(count, limit or count)
    return [number * count // few for number in range(few)]

"""The interface of everything that holds items: a fixed order, names, and the condition columns that go with them."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from PIL import Image

from rdpm_cli import files
from rdpm_cli.data.pixels import Pixels, center_crop, image_errors, to_rgb
from rdpm_cli.errors import DataError


class Source(ABC):
    """Items 0..n-1 in a fixed order, with names and, where there are classes, labels.

    spec: the text that opens it again. Labels count the sorted class folders, as torchvision's ImageFolder does, or
    are those that the data itself records. A source can be pickled, and several processes may read it at a time.
    """

    spec: str
    names: Sequence[str]
    labels: Sequence[int] | None
    class_names: list[str]

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def open(self, index: int) -> Image.Image:
        """The image as it is stored, its pixels not yet read. May raise anything that Pillow raises."""

    @property
    def columns(self) -> dict[str, Sequence[int]]:
        """The conditions of the items by name, one value an item: {"labels": ...}, or {} without classes."""
        return {} if self.labels is None else {"labels": self.labels}

    def image(self, index: int) -> Image.Image:
        """RGB. Raises ImageError naming an image that cannot be read."""
        with image_errors(self.spec, self.names[index]), self.open(index) as image:
            return to_rgb(image)

    def pixels(self, index: int, size: int) -> Pixels:
        """(size, size, 3) uint8 after the ADM centre crop. Raises ImageError naming an image that cannot be read."""
        with image_errors(self.spec, self.names[index]), self.open(index) as image:
            return center_crop(to_rgb(image), size)

    def need_labels(self) -> Sequence[int]:
        """The labels. Raises DataError when the images are not sorted into classes."""
        if self.labels is None:
            raise DataError(f"{self.spec} has no classes", "put the images into one folder a class")
        return self.labels

    def digest(self) -> str:
        """sha256 over names and labels: the identity of the list, not of the pixels."""
        return files.digest({"names": list(self.names), "labels": self.labels and list(map(int, self.labels))})


class Subset(Source):
    """Some items of a source, in its order, with its classes."""

    def __init__(self, source: Source, indices: Sequence[int], note: str) -> None:
        """note: which part of the source this is; it becomes part of `spec`."""
        self.source, self.indices = source, [int(index) for index in indices]
        self.spec, self.class_names = f"{source.spec} ({note})", source.class_names
        self.names = [source.names[index] for index in self.indices]
        self.labels = None if source.labels is None else [int(source.labels[index]) for index in self.indices]

    def open(self, index: int) -> Image.Image:
        return self.source.open(self.indices[index])


def spread(count: int, limit: int | None) -> list[int]:
    """`limit` of the indices 0..count-1, evenly spaced, since sources are sorted by class."""
    few = min(count, limit or count)
    return [number * count // few for number in range(few)]

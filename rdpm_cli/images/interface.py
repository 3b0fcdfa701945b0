"""What an image source is to everything else."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from PIL import Image

from rdpm_cli import files
from rdpm_cli.errors import DataError
from rdpm_cli.images import decode
from rdpm_cli.images.transform import Pixels, center_crop


class ImageSource(ABC):
    """Images 0..n-1 in a fixed order, with names and, where there are classes, labels.

    spec: what opens it again. Labels count the sorted class folders, as ImageFolder does, or are those that the data
    gives. It may be pickled, and read in several processes at a time.
    """

    spec: str
    names: Sequence[str]
    labels: Sequence[int] | None
    class_names: list[str]

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def open(self, index: int) -> Image.Image:
        """The image as it is stored, its pixels not yet read. May raise what Pillow raises."""

    def image(self, index: int) -> Image.Image:
        """RGB. Raises ImageError naming the image that cannot be read."""
        with decode.naming(self.spec, self.names[index]), self.open(index) as image:
            return decode.to_rgb(image)

    def pixels(self, index: int, size: int, draft: bool = False) -> Pixels:
        """(size, size, 3) uint8 after the ADM centre crop. Raises ImageError naming the image that cannot be read.

        draft: a JPEG whose short side is at least 2·size is decoded at 1/2, 1/4 or 1/8 (`decode.use_draft`): faster,
        and other pixels, so what is made of them is of the transform DRAFT_TRANSFORM.
        """
        with decode.naming(self.spec, self.names[index]), self.open(index) as image:
            decode.need_room(image, size)
            if draft:
                decode.use_draft(image, size)
            return center_crop(decode.to_rgb(image), size)

    def need_labels(self) -> Sequence[int]:
        """The labels. Raises DataError when the images are not sorted into classes."""
        if self.labels is None:
            raise DataError(f"{self.spec} has no classes", "put the images into one folder a class")
        return self.labels

    def digest(self) -> str:
        """sha256 over names and labels: the identity of the list, not of the pixels."""
        return files.digest({"names": list(self.names), "labels": self.labels and list(map(int, self.labels))})


class PartOfSource(ImageSource):
    """Some images of a source, in its order; classes stay what they are there."""

    def __init__(self, source: ImageSource, indices: Sequence[int], note: str) -> None:
        """note: which part, for its name."""
        self.source, self.indices = source, [int(index) for index in indices]
        self.spec, self.class_names = f"{source.spec} ({note})", source.class_names
        self.names = [source.names[index] for index in self.indices]
        self.labels = None if source.labels is None else [int(source.labels[index]) for index in self.indices]

    def open(self, index: int) -> Image.Image:
        return self.source.open(self.indices[index])


def spread(count: int, limit: int | None) -> list[int]:
    """`limit` of the indices 0..count-1, evenly spaced: sources are sorted by class, so the first ones are of one."""
    few = min(count, limit or count)
    return [place * count // few for place in range(few)]

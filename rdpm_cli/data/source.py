"""The interface of everything that holds items: a fixed order, names, condition columns; and names -> classes."""

import json
import posixpath
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from PIL import Image

from rdpm_cli import files
from rdpm_cli.data.pixels import Pixels, center_crop, image_errors, to_rgb
from rdpm_cli.errors import DataError, UsageError, some_of

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".jp2", ".avif"}
SPLITS = {"train", "val", "valid", "validation", "test"}
CLASSES, EDM = "classes.txt", "dataset.json"
MOST_CLASSES = 1_000_000  # one absurd label would otherwise make a list of that many names
HIDDEN = re.compile(r"(?:^|/)(?:\.(?!\.?(?:/|\Z))|__MACOSX)")  # a part that starts with '.', except '.' and '..'
HINT = "give a folder or .zip of class folders, a flat folder of images, plain .tar shards, parquet, or `digits`"

Labels = tuple[list[int] | None, list[str]]  # of the items, None without classes; class names in label order


class Source(ABC):
    """Items 0..n-1 in a fixed order, with names and, where there are classes, labels.

    spec: the text that opens it again. Labels count the sorted class folders, as torchvision's ImageFolder does, or
    are those that the data itself records. A source can be pickled, and several processes may read it at a time."""

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
    """Some items of a source, in its order, with its classes. note: names the part in `spec`."""

    def __init__(self, source: Source, indices: Sequence[int], note: str) -> None:
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


def is_image(name: str) -> bool:
    """Whether the suffix of `name` is one of an image."""
    return posixpath.splitext(name)[1].lower() in SUFFIXES


def is_hidden(name: str) -> bool:
    """Whether a file, or a folder above it, is hidden."""
    return HIDDEN.search(name) is not None


def arrange(members: Sequence[str], source: str, read: Callable[[str], bytes]) -> tuple[list[str], Labels]:
    """The images among relative paths -> sorted names, and labels with class names.

    EDM's `dataset.json` decides the labels where there is one; else the first folder of a path is its class.
    `classes.txt` names the classes. read(path): the content of one of these, at the root or in a wrapping folder."""
    names = sorted(name for name in members if is_image(name) and not is_hidden(name))
    if not names:
        raise DataError(f"{source} holds no images", HINT)
    noted = sorted((m for m in members if posixpath.basename(m) in (CLASSES, EDM)), key=len, reverse=True)
    notes = {posixpath.basename(path): path for path in noted}  # the outermost one comes last and wins
    lines = read_classes(read(notes[CLASSES]), source) if CLASSES in notes else None
    if EDM in notes:
        try:
            whole = json.loads(read(notes[EDM]))
            if isinstance(whole, dict) and "labels" in whole:  # else a file of another program
                recorded = {name.replace("\\", "/"): label for name, label in whole["labels"] or []}
                start = len(notes[EDM]) - len(EDM)  # its names are relative to its folder
                return names, numbered([recorded.get(name[start:]) for name in names], names, source, lines)
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            hint = 'it should hold {"labels": [[name, number], ...]}'
            raise DataError(f"{source}: {EDM} is not in EDM's format: {error}", hint) from error
    return names, by_folder(names, source, lines)


def read_classes(content: bytes, source: str) -> list[str]:
    """The lines of `classes.txt`: one name a line, in label order."""
    lines = [line.strip() for line in content.decode(errors="replace").rstrip().splitlines()]
    if not lines or "" in lines or "\ufffd" in "".join(lines):
        raise DataError(f"{source}: {CLASSES} has an empty line or is not UTF-8 text", "write one class name a line")
    return lines


def numbered(values: Sequence[object], names: Sequence[str], source: str, lines: list[str] | None) -> Labels:
    """Labels recorded in the data, for all items or none -> labels, and `lines` or the numbers as class names."""
    if all(value is None for value in values):
        return None, []
    limit = len(lines) if lines else MOST_CLASSES
    labels: list[int] = []
    for name, value in zip(names, values, strict=True):
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < limit:
            hint = f"label all images by whole numbers from 0, one for each line of {CLASSES} if there is one; or none"
            raise DataError(f"{source}: '{name}' has the label {value!r}, which is not one of 0..{limit - 1}", hint)
        labels.append(value)
    return labels, lines or [str(label) for label in range(max(labels) + 1)]


def by_folder(names: Sequence[str], source: str, lines: list[str] | None = None) -> Labels:
    """The first folder of a path is its class -> labels and class names, for image names in any order.

    lines: the names in `classes.txt`: the folders themselves, whose order they fix, or names for the sorted folders."""
    inner = without_wrapper(names)
    tops = [name.partition("/")[0] if "/" in name else "" for name in inner]
    splits = sorted(SPLITS.intersection(tops))
    if splits and all(name.count("/") >= 2 for name in inner):
        raise DataError(f"{source} holds data splits ({', '.join(splits)}), not classes", "name or pack one of them")
    folders = order = sorted(set(tops))
    if folders == [""]:
        return None, []
    if "" in folders:
        raise DataError(f"{source} mixes class folders with loose images such as '{names[tops.index('')]}'", HINT)
    if lines and len(set(lines)) == len(lines) and set(folders) <= set(lines):
        order = lines
    elif lines and (len(lines) != len(folders) or set(folders) & set(lines)):
        lacking = some_of(sorted(set(folders) - set(lines)), 3)
        message = f"{source}: {CLASSES} has {len(lines):,} lines for {len(folders):,} class folders and lacks {lacking}"
        raise DataError(message, f"correct or remove {CLASSES}")
    label_of = {name: label for label, name in enumerate(order)}
    return [label_of[top] for top in tops], lines or folders


def without_wrapper(names: Sequence[str]) -> Sequence[str]:
    """The names below a single folder that wraps all class folders, as many archives have."""
    while all(name.count("/") >= 2 for name in names) and len({name.partition("/")[0] for name in names}) == 1:
        names = [name.partition("/")[2] for name in names]
    return names


def parse_classes(text: str, class_names: Sequence[str]) -> list[int]:
    """`1,2,3`, `0-9`, `all`, `name:goldfish`, and mixtures, in order, each once.

    A class name may contain commas: the longest text after `name:` that is a class counts. Raises UsageError."""
    classes: list[int] = []
    words, count = text.split(","), len(class_names)
    while words:
        word, used = words[0].strip(), 1
        span = re.fullmatch(r"(\d+)(?:-(\d+))?", word)
        names = {n: ",".join(words[:n]).strip()[5:] for n in range(1, len(words) + 1) if word.startswith("name:")}
        if known := [n for n, name in names.items() if name in class_names]:
            used = known[-1]
            classes.append(list(class_names).index(names[used]))
        elif word == "all":
            classes += range(count)
        elif span and int(span[1]) <= int(span[2] or span[1]) < count:
            classes += range(int(span[1]), int(span[2] or span[1]) + 1)
        else:
            hint = f"write 1,2,3 or 0-9, of 0..{count - 1}, or all or name:goldfish; see `rdpm inspect CKPT`"
            raise UsageError(f"--classes: '{word}' is not a class", hint)
        words = words[used:]
    return list(dict.fromkeys(classes))

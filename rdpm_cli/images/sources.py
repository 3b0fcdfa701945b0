"""Where images come from: folders, zips of folders, the built-in digits. One interface for all."""

import functools
import io
import os
import warnings
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, UnidentifiedImageError

from rdpm_cli import files
from rdpm_cli.errors import DataError, ImageError, UsageError
from rdpm_cli.images.transform import Pixels, center_crop

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff"}
SPLITS = {"train", "val", "valid", "validation", "test"}
DIGIT_PARTS = ("train", "heldout")
HINT = "give a folder or .zip of class folders, a flat folder of images, or the built-in `digits`"


class ImageSource(ABC):
    """Images 0..n-1 in a fixed order, with names and, where there are classes, labels.

    spec: what opens it again. Labels count the sorted class names, as ImageFolder does.
    """

    spec: str
    names: Sequence[str]
    labels: Sequence[int] | None
    class_names: list[str]

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def open(self, index: int) -> Image.Image:
        """The image as it is stored. May raise what Pillow raises."""

    def image(self, index: int, least: int = 0) -> Image.Image:
        """RGB. Raises ImageError naming the image that cannot be read. least: sides that a JPEG draft must keep."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                opened = self.open(index)
                if least:
                    opened.draft("RGB", (least, least))
                return _rgb(opened)
        except (
            OSError,
            SyntaxError,
            ValueError,
            UnidentifiedImageError,
            RuntimeError,  # an encrypted member, or one packed by an unknown method
            zipfile.BadZipFile,
            zlib.error,
            Image.DecompressionBombError,
            Image.DecompressionBombWarning,
        ) as error:
            where = f"{self.spec}: {self.names[index]}"
            raise ImageError(
                f"{where} cannot be read as an image: {error}",
                "replace or remove this file",
                name=self.names[index],
                reason=str(error),
            ) from error

    def pixels(self, index: int, size: int, draft: bool = False) -> Pixels:
        """(size, size, 3) uint8 after the ADM centre crop. draft: of a JPEG decoded at a scale that keeps 2·size."""
        return center_crop(self.image(index, 2 * size if draft else 0), size)

    def need_labels(self) -> Sequence[int]:
        """The labels. Raises DataError when the images are not sorted into classes."""
        if self.labels is None:
            raise DataError(f"{self.spec} has no classes", "put the images into one folder a class")
        return self.labels

    def digest(self) -> str:
        """sha256 over names and labels: the identity of the list, not of the pixels."""
        return files.digest({"names": list(self.names), "labels": self.labels and list(map(int, self.labels))})


def _rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB. 16-bit grey is scaled: Pillow's own conversion clips it to white."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


class FolderSource(ImageSource):
    """A folder of class folders, or a flat folder without labels."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.spec = str(root.resolve())
        found = [path.relative_to(root).as_posix() for path in _walk(root)]
        if (root / "samples.json").is_file():  # our own pictures: the grids beside them are not images of the set
            found = [name for name in found if not name.startswith("previews/")]
        self.names, self.labels, self.class_names = arrange(found, self.spec)

    def open(self, index: int) -> Image.Image:
        return Image.open(self.root / self.names[index])


def _refuse(error: OSError) -> None:
    raise DataError(f"{error.filename} cannot be read: {error.strerror}", "mend its permissions") from error


def _walk(root: Path) -> Iterator[Path]:
    """Every file below root, through symbolic links, each folder once (a link may lead back up)."""
    seen = set()
    for folder, below, names in os.walk(root, followlinks=True, onerror=_refuse):
        real = os.path.realpath(folder)
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        yield from (Path(folder) / name for name in names)


class ZipSource(ImageSource):
    """A .zip of class folders, read as a stream, never extracted; each process opens it for itself."""

    def __init__(self, path: Path) -> None:
        self.path, self.spec = path, str(path.resolve())
        self._handles: dict[int, zipfile.ZipFile] = {}
        try:
            members = [m.filename for m in self._zip().infolist() if not m.is_dir()]
        except (zipfile.BadZipFile, OSError) as error:
            raise DataError(f"{path} cannot be read as a zip: {error}", HINT) from error
        self.names, self.labels, self.class_names = arrange(members, self.spec)

    def _zip(self) -> zipfile.ZipFile:
        process = os.getpid()
        if process not in self._handles:
            self._handles[process] = zipfile.ZipFile(self.path)
        return self._handles[process]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_handles": {}}

    def open(self, index: int) -> Image.Image:
        return Image.open(io.BytesIO(self._zip().read(self.names[index])))


class DigitsSource(ImageSource):
    """scikit-learn's 1,797 real scans of handwritten digits, 8×8, 10 classes, enlarged to 16×16.

    `digits:train` 1,500 and `digits:heldout` 297, stratified with a fixed seed; `digits` is `digits:train`.
    """

    def __init__(self, part: str) -> None:
        scans, labels, rows = _digits(part)
        self.spec = f"digits:{part}"
        self.scans, self.labels = scans, [int(v) for v in labels]
        self.names = [f"{part}/{label}/{row:04d}" for row, label in zip(rows, labels, strict=True)]
        self.class_names = [str(d) for d in range(10)]

    def open(self, index: int) -> Image.Image:
        return Image.fromarray(self.scans[index]).resize((16, 16), Image.Resampling.BICUBIC)


@functools.cache
def _digits(part: str) -> tuple[Pixels, np.ndarray, np.ndarray]:
    """scans (n, 8, 8) uint8, labels (n,), rows in scikit-learn's order (n,)."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    rows = np.arange(len(data.target))
    train, heldout = train_test_split(rows, test_size=297, stratify=data.target, random_state=0)
    chosen = np.sort(train if part == "train" else heldout)
    scans = np.round(data.images[chosen] * (255 / 16)).astype(np.uint8)
    return scans, data.target[chosen], chosen


def arrange(found: list[str], where: str) -> tuple[list[str], list[int] | None, list[str]]:
    """Relative paths -> (sorted image names, labels or None, class names). The first folder of a path is its class."""
    names = sorted(n for n in found if PurePosixPath(n).suffix.lower() in SUFFIXES and not _hidden(n))
    if bad := [n for n in names if n.startswith("/") or ".." in PurePosixPath(n).parts]:
        raise DataError(f"{where}: member '{bad[0]}' points outside the archive", "pack it again")
    if not names:
        raise DataError(f"{where} holds no images", HINT)
    inner = _without_wrapper(names)
    tops = [n.split("/", 1)[0] if "/" in n else None for n in inner]
    splits = sorted(SPLITS.intersection(top for top in tops if top))
    if splits and all(n.count("/") >= 2 for n in inner):
        raise DataError(f"{where} holds data splits ({', '.join(splits)}), not classes", f"give {where}/{splits[-1]}")
    if all(top is None for top in tops):
        return names, None, []
    if None in tops:
        loose = names[tops.index(None)]
        raise DataError(f"{where} mixes class folders with loose images such as '{loose}'", HINT)
    class_names = sorted({top for top in tops if top is not None})
    label_of = {name: label for label, name in enumerate(class_names)}
    return names, [label_of[top] for top in tops if top is not None], class_names


def _without_wrapper(names: list[str]) -> list[str]:
    """The names below a single folder that wraps all class folders, as many archives have."""
    while all(n.count("/") >= 2 for n in names) and len({n.split("/", 1)[0] for n in names}) == 1:
        names = [n.split("/", 1)[1] for n in names]
    return names


def _hidden(name: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) and part != ".." for part in PurePosixPath(name).parts)


def spread(count: int, limit: int | None) -> list[int]:
    """`limit` of the indices 0..count-1, evenly spaced: sources are sorted by class, so the first ones are of one."""
    few = min(count, limit or count)
    return [place * count // few for place in range(few)]


def is_builtin(spec: str) -> bool:
    """Is `spec` the built-in data? A folder of that name is given as ./digits."""
    return spec == "digits" or spec.startswith("digits:")


def open_source(spec: str) -> ImageSource:
    """The images a user named. Raises UsageError for a path that is not there, DataError for one without images."""
    if is_builtin(spec):
        part = spec.partition(":")[2] or "train"
        if part not in DIGIT_PARTS:
            raise UsageError(f"no part '{part}' of digits", f"parts: {', '.join('digits:' + p for p in DIGIT_PARTS)}")
        return DigitsSource(part)
    path = Path(spec)
    if path.is_dir():
        return FolderSource(path)
    if path.is_file() and path.suffix.lower() == ".zip":
        return ZipSource(path)
    if path.is_file():
        raise DataError(f"{path} is not a folder or a .zip", HINT)
    raise UsageError(f"{path} does not exist", HINT)

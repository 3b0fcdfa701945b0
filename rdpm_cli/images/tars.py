"""WebDataset shards: .tar of `key.jpg` and `key.cls` or `key.json`, read in place by offset, never extracted.

Members are grouped by the key, their path up to the first dot of the base name. Nothing else is read: a pickled member
(.pyd, .pkl, .pth, .npy ...) is passed over like any unknown one.
"""

import io
import json
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from rdpm_cli.errors import DataError
from rdpm_cli.images import decode
from rdpm_cli.images.arrange import HINT, by_folder, check_member, is_hidden, numbered
from rdpm_cli.images.byteranges import ByteRanges
from rdpm_cli.images.interface import ImageSource
from rdpm_cli.images.patterns import short_names

IMAGES, LABELS = {"jpg", "jpeg", "png", "webp"}, {"cls", "json"}
MOST_LABEL_BYTES = 1 << 20
CUT = "is cut short: its end mark is missing"


class TarSource(ImageSource):
    """Shards in the order given, images in the order of their members, so that reading in order reads front to back.

    An image's name is `shard.tar/member`. Without labels in the shards the members' folders are the classes.
    """

    def __init__(self, spec: str, shards: Sequence[Path], lines: list[str] | None) -> None:
        """lines: the class names, where they are known."""
        self.spec, self.files = spec, ByteRanges(shards)
        self.names: list[str] = []
        self.shards, self.offsets, self.sizes = array("i"), array("q"), array("q")
        labels: list[int | None] = []
        members: list[str] = []
        for place, (path, short) in enumerate(zip(shards, short_names(shards), strict=True)):
            for member, offset, size, label in _Shard(path).rows():
                members.append(member)
                self.names.append(f"{short}/{member}")
                labels.append(label)
                self.shards.append(place)
                self.offsets.append(offset)
                self.sizes.append(size)
        if not self.names:
            raise DataError(f"{spec} holds no images", "shards hold jpg, jpeg, png or webp, with cls or json beside")
        self.labels, self.class_names = numbered(labels, self.names, spec, lines)
        if self.labels is None:
            self.labels, self.class_names = by_folder(members, spec, lines)

    def open(self, index: int) -> Image.Image:
        raw = self.files.read(self.shards[index], self.offsets[index], self.sizes[index])
        return decode.open_image(io.BytesIO(raw))


class _Shard:
    """One .tar while it is listed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.images: dict[str, tuple[str, int, int]] = {}  # by key: member, offset, size
        self.labels: dict[str, int] = {}
        self.needed: set[str] = set()  # keys with a .cls, which is of no use without its image
        try:
            _need_plain(path)
            with tarfile.open(path, "r:") as tar:
                for member in _members(tar):
                    self._take(tar, member)
        except (tarfile.TarError, OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read as a tar: {error}", HINT) from error
        if alone := self.needed - self.images.keys():
            raise DataError(f"{path}: '{min(alone)}' has a label and no image", "shards hold jpg, jpeg, png or webp")

    def rows(self) -> Iterator[tuple[str, int, int, int | None]]:
        """(member, offset, size, label) of every image."""
        for key, (member, offset, size) in self.images.items():
            yield member, offset, size, self.labels.get(key)

    def _take(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        check_member(member.name, member.issym() or member.islnk(), str(self.path))
        name = member.name.removeprefix("./")
        if member.isdir() or is_hidden(name):
            return
        folder, slash, base = name.rpartition("/")
        stem, _, kind = base.partition(".")
        key, kind = folder + slash + stem, kind.lower()
        if kind not in IMAGES | LABELS:
            return
        if not member.isreg() or member.issparse():
            raise DataError(f"{self.path}: member '{name}' is no regular file", "pack it again")
        if kind in LABELS:
            self._label(key, kind, name, tar, member)
        elif key in self.images:
            raise DataError(f"{self.path} has two images for '{key}'", "give each image a name of its own")
        else:
            self.images[key] = name, member.offset_data, member.size

    def _label(self, key: str, kind: str, name: str, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        content = tar.extractfile(member)
        if content is None or member.size > MOST_LABEL_BYTES:
            raise DataError(
                f"{self.path}: '{name}' is too large to be a label", "cls holds a number, json a small dict"
            )
        label = _number(content.read(), kind, f"{self.path}: '{name}'")
        if label is not None and self.labels.setdefault(key, label) != label:
            raise DataError(f"{self.path} has two labels for '{key}'", "keep the cls or the json")
        if kind == "cls":
            self.needed.add(key)


def _number(content: bytes, kind: str, where: str) -> int | None:
    """The label in a cls (a number as text) or json (`label` or `cls`; None without either)."""
    hint = "cls holds a whole number as text, json one as `label` or `cls`"
    try:
        if kind == "cls":
            return int(content.decode("ascii"))
        whole = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} holds no label: {error}", hint) from error
    label = whole.get("label", whole.get("cls")) if isinstance(whole, dict) else None
    if label is not None and type(label) is not int:
        raise DataError(f"{where} has the label {label!r}", hint)
    return label


def _need_plain(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(2) == b"\x1f\x8b":
            raise ValueError("it is compressed; unpack it with gunzip")


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Every member, none of them kept. Raises ValueError where the file ends, or goes wrong, before its end mark."""
    while (member := tar.next()) is not None:
        yield member
        tar.members.clear()  # type: ignore[attr-defined]  # it would keep a kilobyte for each
    assert tar.fileobj is not None, "it is open"
    tar.fileobj.seek(tar.offset)  # of what ended the list: a block of zeros, or damage that tarfile takes for an end
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise ValueError(CUT)

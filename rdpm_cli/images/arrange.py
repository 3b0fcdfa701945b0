"""Names -> a list of images with labels and class names: by folder, or as the data itself says."""

import json
import posixpath
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rdpm_cli.errors import DataError, some_of

SUFFIXES = {
    ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".jp2", ".avif",
}  # fmt: skip
SPLITS = {"train", "val", "valid", "validation", "test"}
CLASSES, EDM = "classes.txt", "dataset.json"
MOST_CLASSES = 1_000_000
HINT = "give a folder or .zip of class folders, a flat folder of images, .tar shards, parquet, or `digits`"


@dataclass(frozen=True)
class Listing:
    """Images in order. labels: one an image, or None where there are none; class_names: in label order.

    by_folder: are the classes the folders that hold images, and nothing else?
    """

    names: list[str]
    labels: list[int] | None
    class_names: list[str]
    by_folder: bool


def arrange(found: Iterable[str], where: str, read: Callable[[str], bytes]) -> Listing:
    """The images among relative paths, sorted. read(path): the content of a note.

    EDM's `dataset.json` gives the labels where there is one (or says that there are none); else the first folder of a
    path is its class. `classes.txt` names the classes.
    """
    members = list(found)
    names = sorted(name for name in members if is_image(name) and not is_hidden(name))
    if not names:
        raise DataError(f"{where} holds no images", HINT)
    notes = _notes(members, names)
    lines = read_classes(read(notes[CLASSES]), where) if CLASSES in notes else None
    if EDM in notes and (listed := _edm_labels(read(notes[EDM]), where)) is not None:
        start = len(notes[EDM]) - len(EDM)
        labels, class_names = numbered([listed.get(name[start:]) for name in names], names, where, lines)
    else:
        labels, class_names = by_folder(names, where, lines)
    return Listing(names, labels, class_names, labels is not None and not notes)


def is_image(name: str) -> bool:
    return posixpath.splitext(name)[1].lower() in SUFFIXES


def is_hidden(name: str) -> bool:
    """Is the file, or a folder it is in, one that people do not see?"""
    if not (name.startswith((".", "__MACOSX")) or "/." in name or "/__MACOSX" in name):
        return False
    return any(part.startswith((".", "__MACOSX")) and part not in (".", "..") for part in name.split("/"))


def check_member(name: str, is_link: bool, where: str) -> None:
    """Refuse what no archive of images holds: a link, an absolute path, one that climbs out."""
    if is_link:
        raise DataError(f"{where}: member '{name}' is a link", "pack the file it points to instead")
    plain = name.replace("\\", "/")
    if plain.startswith("/") or re.match("[A-Za-z]:/", plain) or (".." in plain and ".." in plain.split("/")):
        raise DataError(f"{where}: member '{name}' points outside the archive", "pack it again")


def read_note(path: Path) -> bytes:
    """The content of a note beside the images. Raises DataError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", "mend its permissions, or remove it") from error


def _notes(members: list[str], names: list[str]) -> dict[str, str]:
    """{base name: path} of the notes about all images: at the root, or in a folder that wraps everything."""
    shared = posixpath.commonprefix([names[0], names[-1]]).rpartition("/")[0]  # they are sorted: common to all
    notes: dict[str, str] = {}
    for path in sorted((m for m in members if posixpath.basename(m) in (CLASSES, EDM)), key=len, reverse=True):
        folder, base = posixpath.split(path)
        if not folder or f"{shared}/".startswith(f"{folder}/"):
            notes[base] = path
    return notes


def read_classes(content: bytes, where: str) -> list[str]:
    """`classes.txt`: one name a line, in label order."""
    try:
        lines = [line.strip() for line in content.decode().rstrip().splitlines()]
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: {CLASSES} is not UTF-8 text", "write one class name a line") from error
    if not lines or "" in lines:
        raise DataError(f"{where}: line {len(lines) and lines.index('') + 1} of {CLASSES} names no class",
                        "write one class name a line")  # fmt: skip
    return lines


def _edm_labels(content: bytes, where: str) -> dict[str, object] | None:
    """{image: label} of EDM's `dataset.json`: {"labels": [[name, label], ...]}; empty for null. None: not EDM's."""
    try:
        whole = json.loads(content)
        if not isinstance(whole, dict) or "labels" not in whole:
            return None
        return {name.replace("\\", "/"): label for name, label in whole["labels"] or []}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{where}: {EDM} is not EDM's: {error}", 'it holds {"labels": [[name, number], ...]}'
        ) from error


def numbered(
    given: Sequence[object], names: Sequence[str], where: str, lines: list[str] | None
) -> tuple[list[int] | None, list[str]]:
    """Labels that the data gives, None where it gives none -> (labels, class names). All images have one, or none has.

    lines: the class names where they are known; else the numbers themselves.
    """
    without = sum(label is None for label in given)
    if without == len(given):
        return None, []
    if without:
        first = names[next(place for place, label in enumerate(given) if label is None)]
        raise DataError(
            f"{where}: {without:,} of {len(given):,} images have no label, such as '{first}'", "label all or none"
        )
    most = len(lines) if lines else MOST_CLASSES
    labels: list[int] = []
    numbers: dict[int, int] = {}  # one object a class, not one an image
    for name, label in zip(names, given, strict=True):
        if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < most:
            raise DataError(
                f"{where}: '{name}' has the label {label!r}, which is not one of 0..{most - 1}",
                "labels are whole numbers from 0; class names, where given, are one for each",
            )
        labels.append(numbers.setdefault(label, label))
    return labels, lines or [str(label) for label in range(max(labels) + 1)]


def by_folder(names: Sequence[str], where: str, lines: list[str] | None = None) -> tuple[list[int] | None, list[str]]:
    """The first folder of a path is its class -> (labels or None, class names), for image names in any order.

    lines: the names in `classes.txt`: the folders' own, which then fix the order, or others for the sorted folders.
    """
    inner = without_wrapper(names)
    tops = [name.partition("/")[0] if "/" in name else None for name in inner]
    splits = sorted(SPLITS.intersection(top for top in tops if top))
    if splits and all(name.count("/") >= 2 for name in inner):
        one = "train" if "train" in splits else splits[0]
        hint = f"give {where}/{one}" if Path(where).is_dir() else "pack each of them by itself"
        raise DataError(f"{where} holds data splits ({', '.join(splits)}), not classes", hint)
    if all(top is None for top in tops):
        return None, []
    if None in tops:
        loose = names[tops.index(None)]
        raise DataError(f"{where} mixes class folders with loose images such as '{loose}'", HINT)
    folders = sorted({top for top in tops if top is not None})
    class_names, order = _named_folders(folders, lines, where)
    label_of = {name: label for label, name in enumerate(order)}
    return [label_of[top] for top in tops if top is not None], class_names


def _named_folders(folders: list[str], lines: list[str] | None, where: str) -> tuple[list[str], list[str]]:
    """(class names, folders), both in label order."""
    if lines is None:
        return folders, folders
    if len(set(lines)) == len(lines) and set(folders) <= set(lines):
        return lines, lines
    if len(lines) == len(folders) and not set(folders) & set(lines):
        return lines, folders
    odd = sorted(set(folders) - set(lines))
    raise DataError(
        f"{where}: {CLASSES} has {len(lines):,} lines for {len(folders):,} class folders and lacks {some_of(odd, 3)}",
        f"mend or remove {CLASSES}",
    )


def without_wrapper(names: Sequence[str]) -> Sequence[str]:
    """The names below a single folder that wraps all class folders, as many archives have."""
    while all(name.count("/") >= 2 for name in names) and len({name.partition("/")[0] for name in names}) == 1:
        names = [name.partition("/")[2] for name in names]
    return names

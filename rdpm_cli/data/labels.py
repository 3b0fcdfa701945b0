"""Names -> classes: of items by folder or by what the data records, and those that a user asks for."""

import difflib
import json
import posixpath
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from rdpm_cli.errors import DataError, UsageError, some_of

SUFFIXES = {
    ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".jp2", ".avif",
}  # fmt: skip
SPLITS = {"train", "val", "valid", "validation", "test"}
CLASSES, EDM = "classes.txt", "dataset.json"
MOST_CLASSES = 1_000_000  # one absurd label would otherwise make a list of that many names
HIDDEN = re.compile(r"(?:^|/)(?:\.(?!\.?(?:/|\Z))|__MACOSX)")  # a part that starts with '.', except '.' and '..'
HINT = "give a folder or .zip of class folders, a flat folder of images, plain .tar shards, parquet, or `digits`"


def is_image(name: str) -> bool:
    """Whether the suffix of `name` is one of an image."""
    return posixpath.splitext(name)[1].lower() in SUFFIXES


def is_hidden(name: str) -> bool:
    """Whether a file, or a folder above it, is hidden."""
    return HIDDEN.search(name) is not None


def arrange(
    paths: Iterable[str], source: str, read: Callable[[str], bytes]
) -> tuple[list[str], list[int] | None, list[str]]:
    """The images among relative paths -> (sorted names, labels or None, class names in label order).

    EDM's `dataset.json` decides the labels where there is one (or says that there are none); else the first folder of
    a path is its class. `classes.txt` names the classes. read(path): the content of one of these two files, which are
    at the root or in a folder that wraps everything.
    """
    members = list(paths)
    names = sorted(name for name in members if is_image(name) and not is_hidden(name))
    if not names:
        raise DataError(f"{source} holds no images", HINT)
    shared = posixpath.commonprefix([names[0], names[-1]]).rpartition("/")[0]  # sorted, so common to all of them
    notes: dict[str, str] = {}
    for path in sorted((m for m in members if posixpath.basename(m) in (CLASSES, EDM)), key=len, reverse=True):
        folder, base = posixpath.split(path)
        if not folder or f"{shared}/".startswith(f"{folder}/"):
            notes[base] = path  # the outermost one comes last and wins
    lines = read_classes(read(notes[CLASSES]), source) if CLASSES in notes else None
    if EDM in notes and (recorded := _edm_labels(read(notes[EDM]), source)) is not None:
        start = len(notes[EDM]) - len(EDM)  # EDM's names are relative to the folder of its file
        return names, *numbered([recorded.get(name[start:]) for name in names], names, source, lines)
    return names, *by_folder(names, source, lines)


def read_classes(content: bytes, source: str) -> list[str]:
    """The lines of `classes.txt`: one name a line, in label order."""
    lines = [line.strip() for line in content.decode(errors="replace").rstrip().splitlines()]
    if not lines or "" in lines or "\ufffd" in "".join(lines):
        raise DataError(f"{source}: {CLASSES} has an empty line or is not UTF-8 text", "write one class name a line")
    return lines


def _edm_labels(content: bytes, source: str) -> dict[str, object] | None:
    """{image: label} of EDM's `dataset.json`, {"labels": [[name, label], ...] or null}; None for any other file."""
    try:
        whole = json.loads(content)
        if not isinstance(whole, dict) or "labels" not in whole:
            return None
        return {name.replace("\\", "/"): label for name, label in whole["labels"] or []}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        hint = 'it should hold {"labels": [[name, number], ...]}'
        raise DataError(f"{source}: {EDM} is not in EDM's format: {error}", hint) from error


def numbered(
    values: Sequence[object], names: Sequence[str], source: str, lines: list[str] | None
) -> tuple[list[int] | None, list[str]]:
    """Labels recorded in the data, None for an item without -> (labels, class names). All items have one, or none has.

    lines: the class names where they are known; else the numbers themselves become the names.
    """
    if all(value is None for value in values):
        return None, []
    limit = len(lines) if lines else MOST_CLASSES
    labels: list[int] = []
    numbers: dict[int, int] = {}  # one object a class instead of one an image: 50 MB less for ImageNet
    for name, value in zip(names, values, strict=True):
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < limit:
            label = "no label" if value is None else f"the label {value!r}, which is not one of 0..{limit - 1}"
            hint = f"label all images by whole numbers from 0, one for each line of {CLASSES} if there is one; or none"
            raise DataError(f"{source}: '{name}' has {label}", hint)
        labels.append(numbers.setdefault(value, value))
    return labels, lines or [str(label) for label in range(max(labels) + 1)]


def by_folder(names: Sequence[str], source: str, lines: list[str] | None = None) -> tuple[list[int] | None, list[str]]:
    """The first folder of a path is its class -> (labels or None, class names), for image names in any order.

    lines: the names in `classes.txt`: the folders themselves, whose order they fix, or names for the sorted folders.
    """
    inner = without_wrapper(names)
    tops = [name.partition("/")[0] if "/" in name else "" for name in inner]
    splits = sorted(SPLITS.intersection(tops))
    if splits and all(name.count("/") >= 2 for name in inner):
        hint = f"name one of them, such as {source}/{splits[0]}, or pack each into a file of its own"
        raise DataError(f"{source} holds data splits ({', '.join(splits)}), not classes", hint)
    folders = order = sorted(set(tops))
    if folders == [""]:
        return None, []
    if "" in folders:
        loose = names[tops.index("")]
        raise DataError(f"{source} mixes class folders with loose images such as '{loose}'", HINT)
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
    """`1,2,3`, `0-9`, `all`, `name:goldfish`, and mixtures, in order, each once; or `@FILE` of such lines.

    A class name may contain commas: the longest text after `name:` that is a class counts. Raises UsageError.
    """
    if text.startswith("@"):
        try:
            text = ",".join(line.strip() for line in Path(text[1:]).read_text().splitlines() if line.strip())
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--classes {text}: {error}", "name a text file of classes, one a line") from error
    classes: list[int] = []
    words = text.split(",")
    while words:
        word, used = words[0].strip(), 1
        span = re.fullmatch(r"(\d+)(?:-(\d+))?", word)
        if word.startswith("name:"):
            candidates = [",".join(words[:count]).strip()[5:] for count in range(len(words), 0, -1)]
            name = next((name for name in candidates if name in class_names), None)
            if name is None:
                near = difflib.get_close_matches(word[5:], class_names, 3)
                hint = f"did you mean {', '.join(near)}?" if near else "see the names with `rdpm inspect CKPT`"
                raise UsageError(f"--classes: no class is named '{word[5:]}'", hint)
            used = len(words) - candidates.index(name)
            classes.append(list(class_names).index(name))
        elif word == "all":
            classes += range(len(class_names))
        elif span and int(span[1]) <= int(span[2] or span[1]) < len(class_names):
            classes += range(int(span[1]), int(span[2] or span[1]) + 1)
        else:
            hint = f"write 1,2,3 or 0-9, of 0..{len(class_names) - 1}, or all or name:goldfish"
            raise UsageError(f"--classes: '{word}' is not a class", hint)
        words = words[used:]
    return list(dict.fromkeys(classes))

"""Names of files -> the items among them, and their classes: by folder, or as the data itself records them.

One set of rules for folders, zips, tars and parquet. Names are compared by `fold`, and stay as they are in the data."""

import csv
import io
import json
import os
import posixpath
import re
import shlex
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from rdpm_cli import runs
from rdpm_cli.data.pixels import SUFFIXES, is_image_head
from rdpm_cli.data.source import Items
from rdpm_cli.errors import DataError, UsageError, some_of

SPLIT = re.compile(
    r"(?P<set>\w+[-_. ])?(?P<split>train|training|val|valid|validation|test|testing|dev|eval)"
    r"([-_. ]?(\d\w*|images|imgs|set|data|split))?"
)
CLASSES, EDM, METADATA, SAMPLES = "classes.txt", "dataset.json", ("metadata.csv", "metadata.jsonl"), "samples.json"
NOTES = {CLASSES, EDM, *METADATA}  # files about the images, in any case
SOUND = (".wav", ".flac", ".ogg", ".mp3")
MOST_CLASSES = 100_000  # unless there are more images: an identity number as label would make a table of that size
LABEL_COLUMNS = ("label", "labels", "fine_label", "cls", "class", "class_label", "target")  # the first one counts
HIDDEN = re.compile(r"(?:^|/)(?:\.(?!\.?(?:/|\Z))|__MACOSX(?:/|\Z))")  # a part that starts with '.', but '.' and '..'
HINT = "give a folder or .zip of class folders, a flat folder of images, .tar shards, parquet, `digits` or `shapes`"

Labels = tuple[list[int] | None, list[str]]  # of the items, None without classes; class names in label order
Read = Callable[[str], bytes]  # the content of a member


def fold(name: str) -> str:
    """A class name as it is compared: with composed accents, which macOS decomposes, and without spaces around it."""
    return unicodedata.normalize("NFC", name).strip()


def fold_path(path: str) -> str:
    """A path as it is compared: such a name, written as in archives."""
    return fold(member_name(path))


def split_key(name: str) -> tuple[str, str]:
    """(key, kind): a path up to the last dot of its base name, and the suffix behind it in lower case."""
    key, suffix = posixpath.splitext(name)
    return key, suffix.lower()


def member_name(text: str) -> str:
    """The name of a member of an archive: with '/' between folders, without './', '//' or '/' in front."""
    return posixpath.normpath("/" + text.replace("\\", "/")).lstrip("/")


def says_something(name: str) -> bool:
    """Whether a file of this name may be an image, a class folder that is a link, or a file about the images."""
    return not is_hidden(name) and (split_key(name)[1] in {"", *SUFFIXES} or posixpath.basename(name).lower() in NOTES)


def is_hidden(name: str) -> bool:
    """Whether a file, or a folder above it, is hidden."""
    return HIDDEN.search(name) is not None


def arrange(
    members: Mapping[str, str], source: str, read: Read, *, head: Read | None = None, folders: Collection[str] = (),
    column: str | None = None, lines: list[str] | None = None, keyed: Mapping[str, Any] | None = None,
) -> Items:  # fmt: skip
    """The items among the files of a folder or archive, in the order of `members`, and their labels.

    Labels are those of EDM's `dataset.json`, else of `metadata.csv` or `.jsonl`, else of `keyed`, else the first
    folders of the paths. `classes.txt` names the classes.
    members: name -> path inside its folder or shard. read, head: the content of a member, and its beginning.
    folders: all of them, as paths. column: of metadata. lines: of a classes.txt elsewhere. keyed: labels by key."""
    is_samples = SAMPLES in members.values()
    warnings = _check_ours(members, source, read, is_samples)
    names, notes, others, not_taken = _sort_out(members, head or read, is_samples)
    if not names:
        is_sound = any(suffix in not_taken for suffix in SOUND)
        hint = "recordings take a recipe of sound, such as speech8-sin, and are scored by `rdpm eval speech`"
        message = "; ".join(filter(None, [f"{source} holds no images", describe(not_taken)]))
        raise DataError(message, hint if is_sound else HINT)
    if notes[CLASSES]:
        lines = read_classes(read(min(notes[CLASSES], key=len)), source)
    tables = [name for base in METADATA for name in notes[base]]
    if column and not tables:
        raise UsageError(f"{source} has no {' or '.join(METADATA)} with a column {column}", "leave --label-column out")
    recorded = None if column else _edm(notes[EDM], source, read)
    if recorded is None:
        _check_splits([members[name] for name in tables], source)
        recorded, told = _metadata(tables, source, read, column)
        warnings += told
    if recorded is None and keyed:
        names, recorded = _by_key(names, keyed, source, not_taken)
        _check_splits([members[name] for name in names], source)
    if recorded is None:
        paths = [members[name] for name in names]
        labels = by_folder(paths, source, lines, names, {*folders, *others})
        warnings += _warn_of_numbers(labels[1] if lines is None and labels[0] else [], source)
    else:
        folded = [fold_path(name) for name in names]
        if absent := sorted(recorded.keys() - set(folded)):
            warnings.append(f"{source}: {len(absent)} images are listed but not there, such as {absent[0]}")
        labels = numbered([recorded.get(name) for name in folded], names, source, lines)
    return Items(names, *labels, dict(sorted(not_taken.items())), warnings)


def _sort_out(
    members: Mapping[str, str], head: Read, is_samples: bool
) -> tuple[list[str], dict[str, list[str]], set[str], Counter[str]]:
    """(images, notes by their base name, folders of other files, number of these by reason) among all members.

    is_samples: of a folder of samples, whose grids are not images of the set."""
    names, notes, folders, not_taken = list[str](), {base: list[str]() for base in NOTES}, set[str](), Counter[str]()
    for name, path in members.items():
        kind, base = split_key(name)[1], posixpath.basename(name).lower()
        if is_hidden(path):
            not_taken["hidden"] += 1
        elif base in NOTES:
            notes[base].append(name)
        elif is_samples and path.startswith("previews/"):
            continue
        elif kind in SUFFIXES or (not kind and is_image_head(head(name))):
            names.append(name)
        else:
            not_taken[kind or "no suffix"] += 1
            folders.add(posixpath.dirname(path))
    return names, notes, folders, not_taken


def describe(not_taken: Mapping[str, int]) -> str:
    """`3 files not taken: .heic 2, no suffix 1`; empty for none."""
    total, parts = sum(not_taken.values()), ", ".join(f"{kind} {count}" for kind, count in not_taken.items())
    return f"{total} {'file' if total == 1 else 'files'} not taken: {parts}" if total else ""


def _check_ours(members: Mapping[str, str], source: str, read: Read, is_samples: bool) -> list[str]:
    """Refuse runs, stores and pictures that rdpm wrote among the images. -> a warning if all of it is samples."""
    warnings = []
    for name, path in members.items():
        folder, base = posixpath.split(path)
        if base != runs.RUN_FILE or is_hidden(path):
            continue
        if b'"argv"' in (content := read(name)) and b'"versions"' in content:
            if folder or not is_samples:
                message = f"{source}: '{folder or '.'}' was written by rdpm ({name}), so it holds no data set"
                raise DataError(message, "name the folder of images alone, or move what rdpm wrote out of it")
            warnings.append(f"{source} is a folder of samples; they are read as images")
    return warnings


def read_classes(content: bytes, source: str) -> list[str]:
    """The lines of `classes.txt`: one name a line, in label order."""
    lines = [line.strip() for line in content.decode("utf-8-sig", errors="replace").rstrip().splitlines()]
    if not lines or "" in lines or "\ufffd" in "".join(lines):
        raise DataError(f"{source}: {CLASSES} has an empty line or is not UTF-8 text", "write one class name a line")
    return lines


def _edm(paths: Sequence[str], source: str, read: Read) -> dict[str, Any] | None:
    """Labels by folded name of the outermost EDM dataset.json; None if another program wrote it."""
    for path in sorted(paths, key=len)[:1]:
        try:
            whole = json.loads(read(path))
            if isinstance(whole, dict) and "labels" in whole:
                folder = path[: -len(EDM)]  # its names are relative to its folder
                return {fold_path(folder + name): label for name, label in whole["labels"] or []}
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            hint = 'it should hold {"labels": [[name, number], ...]}'
            raise DataError(f"{source}: {path} is not in EDM's format: {error}", hint) from error
    return None


def _metadata(
    paths: Sequence[str], source: str, read: Read, column: str | None
) -> tuple[dict[str, Any] | None, list[str]]:
    """Labels by folded name of Hugging Face's metadata files, a row `file_name, label` an image; and warnings."""
    recorded: dict[str, Any] = {}
    warnings, labeled = [], False
    for path in paths:
        try:
            text = read(path).decode("utf-8-sig")
            csv.field_size_limit(sys.maxsize)  # captions may be long
            is_csv = path.lower().endswith(".csv")
            lines = io.StringIO(text, newline="") if is_csv else filter(str.strip, text.split("\n"))
            rows = list(csv.DictReader(lines) if is_csv else map(json.loads, lines))
            columns = list(dict.fromkeys(key for row in rows for key in row))
            chosen = column or next((name for name in LABEL_COLUMNS if name in columns), None)
            if column and column not in columns:
                raise ValueError(f"it has no column {column}, only {', '.join(columns)}")
            if chosen not in columns or "file_name" not in columns:
                lacking = f"`file_name` or {chosen or 'a column of labels'}"
                warnings.append(f"{source}: {path} is not used: it has no {lacking}, only {some_of(map(str, columns))}")
                continue
            labeled = True
            for row in rows:
                path_in = posixpath.join(posixpath.dirname(path), row["file_name"].replace("\\", "/"))
                if posixpath.normpath(path_in).startswith(("/", "../")):
                    raise ValueError(f"'{row['file_name']}' is no path inside {source}")
                name, label = fold_path(path_in), row.get(chosen)
                if str(recorded.setdefault(name, label)) != str(label):
                    raise ValueError(f"'{name}' has two labels, {recorded[name]!r:.80} and {label!r:.80}")
        except (ValueError, KeyError, TypeError, AttributeError, csv.Error, RecursionError) as error:
            hint = "it should have a row an image with `file_name`, relative to it, and `label`"
            reason = f"{type(error).__name__}: {error}"  # its repr would hold the whole file
            raise DataError(f"{source}: {path} cannot be read as a table of images: {reason}", hint) from error
    return (recorded if labeled else None), warnings


def _by_key(
    names: list[str], keyed: Mapping[str, Any], source: str, not_taken: Counter[str]
) -> tuple[list[str], dict[str, Any]]:
    """The images of a WebDataset with the labels of their keys: `c.v2.png` and `c.v2.cls` belong together.

    A label whose key has no image goes to that of `key.<anything>.png`, as WebDataset itself splits names; beside an
    image of its own such others, `c.seg.png` beside `c.png`, are not taken."""
    images: dict[str, tuple[list[str], list[str]]] = {key: ([], []) for key in keyed}  # of the key itself; of its kinds
    key_of: dict[str, str] = {}
    for name in names:
        key = split_key(name)[0]
        folder, base = posixpath.split(key)
        first = posixpath.join(folder, base.partition(".")[0])
        key_of[name] = key if key in keyed or first not in keyed else first
        if key_of[name] in keyed:
            images[key_of[name]][key not in keyed].append(name)
    left_out = set[str]()
    for key, (exact, others) in images.items():
        taken = exact or others
        if len(taken) != 1:
            message = (
                f"{source}: '{key}' has a label and {'two images' if taken else 'no image'}: {', '.join(taken[:2])}"
            )
            raise DataError(message.removesuffix(": "), "pack one image and one label a key")
        left_out.update(others if exact else ())
    for name in left_out:
        not_taken[f"{name.removeprefix(key_of[name])} beside a labelled image"] += 1
    return [n for n in names if n not in left_out], {
        fold_path(n): keyed.get(key_of[n]) for n in names if n not in left_out
    }


def numbered(values: Sequence[Any], names: Sequence[str], source: str, lines: list[str] | None) -> Labels:
    """Recorded labels, for all items or none -> labels and class names.

    Whole numbers count from 0, as digits too, up to the lines of classes.txt; other text is a class each, in sorted
    order or that of `lines`. None, an empty text, and -1 for all (as test sets are packed) are no label."""
    texts = list(map(_whole, values))
    if all(value in (None, "") for value in texts) or all(value in (-1, "-1") for value in texts):
        return None, []
    if lacking := next((name for name, value in zip(names, texts, strict=True) if value in (None, "")), None):
        raise DataError(f"{source}: '{lacking}' has no label, unlike others", "label all images, or none")
    is_text = all(isinstance(value, str) and value for value in texts)
    classes = [fold(line) for line in lines] if lines else sorted({fold(str(value)) for value in texts})
    limit = len(lines) if lines else max(MOST_CLASSES, len(names))
    counts = Counter(classes)  # a name of two classes says nothing
    number_of = {name: number for number, name in enumerate(classes) if counts[name] == 1} if is_text else {}
    labels: list[int] = []
    for name, value in zip(names, texts, strict=True):
        label = number_of.get(fold(value)) if is_text else value
        if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < limit:
            hint = f"label all images by whole numbers from 0 or by names, as in {CLASSES} if there is one; or none"
            expected = f"one of the {limit} names of {CLASSES}" if is_text else f"one of 0..{limit - 1}"
            raise DataError(f"{source}: '{name}' has the label {value!r:.200}, which is not {expected}", hint)
        labels.append(label)
    return labels, lines or (classes if is_text else [str(label) for label in range(max(labels) + 1)])


def _whole(value: Any) -> Any:
    """A whole number for 3, 3.0, "3" and "3.0", which pandas writes where others are missing; else text, stripped."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str):
        number = re.fullmatch(r"(\d{1,18})(\.0+)?", value.strip(), re.ASCII)
        return int(number[1]) if number else value.strip()
    return value


def by_folder(
    paths: Sequence[str], source: str, lines: list[str] | None, names: Sequence[str], folders: Collection[str] = ()
) -> Labels:
    """The first folder of a path is its class -> labels and class names. names: of the items, for errors.

    lines: the names in `classes.txt`: the folders themselves, whose order they fix, or names for the sorted folders.
    folders: all of them: a class folder without images would shift the labels of later classes."""
    inner = _check_splits(paths, source, classes=True)
    tops = [path.partition("/")[0] if "/" in path else "" for path in inner]
    order = sorted(set(tops))
    wrapper = paths[0].removesuffix(inner[0])
    if order == [""]:
        return None, []
    if "" in order:
        raise DataError(f"{source} mixes class folders with loose images such as '{names[tops.index('')]}'", HINT)
    folded = [fold(top) for top in order]
    if twice := [name for name, count in Counter(folded).items() if count > 1]:
        raise DataError(f"{source} has two class folders that read as '{twice[0]}'", "move their images into one")
    if lines is None:
        start = f"{fold_path(wrapper)}/".lstrip("/")
        below = (path.removeprefix(start) for path in map(fold_path, folders) if path.startswith(start))
        inside = {path.partition("/")[0] for path in below} - {""}
        if empty := sorted({name for name in inside if not is_hidden(name)} - set(folded)):
            hint = f"name the folder that holds the images, or list its classes in {CLASSES}, one a line"
            raise DataError(f"{source}: {wrapper}{empty[0]} is a class folder without images", hint)
        label_of = {name: label for label, name in enumerate(order)}
        return [label_of[top] for top in tops], order
    known = [fold(line) for line in lines]
    if len(set(known)) == len(known) and set(folded) <= set(known):
        label_of = {top: known.index(fold(top)) for top in order}
    elif len(lines) == len(order) and set(folded).isdisjoint(known):
        label_of = {name: label for label, name in enumerate(order)}
    else:
        lacking = some_of(sorted(set(folded) - set(known)), 3)
        message = f"{source}: {CLASSES} has {len(lines):,} lines for {len(order):,} class folders and lacks {lacking}"
        raise DataError(message, f"correct or remove {CLASSES}")
    return [label_of[top] for top in tops], lines


def _check_splits(paths: Sequence[str], source: str, classes: bool = False) -> Sequence[str]:
    """Refuse train, val, test and the like as one set. classes: where folders would be classes, also a single one.

    -> the paths below a folder that wraps all of them."""
    inner = without_wrapper(paths)
    tops = {path.partition("/")[0] if "/" in path else "" for path in inner}
    matches = {top: match for top in tops if (match := SPLIT.fullmatch(top.lower()))}
    # seg_train and seg_test are splits of one set; bullet_train and steam_train are classes, and so is a lone one.
    words = Counter(prefix for prefix, _ in {(match["set"], match["split"]) for match in matches.values()})
    splits = sorted(top for top, match in matches.items() if not match["set"] or words[match["set"]] > 1)
    alone = classes and splits and (tops <= {*splits, ""} or all(path.count("/") >= 2 for path in inner))
    if len(splits) > 1 or alone:
        wrapper = paths[0].removesuffix(inner[0])
        best = posixpath.join(source, wrapper, next((top for top in splits if "train" in top.lower()), splits[0]))
        hint = f"give one of them: {shlex.quote(best)}" if os.path.isdir(best) else "name or pack one of them"
        raise DataError(f"{source} holds data splits ({', '.join(splits)}), not one set of classes", hint)
    return inner


def _warn_of_numbers(class_names: Sequence[str], source: str) -> list[str]:
    """A warning where folders named by numbers do not have those numbers as classes, since names are sorted as text."""
    if not all(re.fullmatch(r"\d+", name, re.ASCII) for name in class_names):
        return []
    moved = [(name, label) for label, name in enumerate(class_names) if int(name) != label]
    order = f"{source}: class folders are sorted as text, as ImageFolder does"
    return [f"{order}: folder {name} is class {label}, or name:{name}" for name, label in moved[:1]]


def without_wrapper(names: Sequence[str]) -> Sequence[str]:
    """The names below a single folder that wraps all class folders, as many archives have."""
    while all(name.count("/") >= 2 for name in names) and len({name.partition("/")[0] for name in names}) == 1:
        names = [name.partition("/")[2] for name in names]
    return names


def match_classes(
    known: Sequence[str], names: Sequence[str], classes: Iterable[int], owner: str
) -> tuple[dict[int, int], str]:
    """The numbers that the list `known`, of this owner, gives to classes of the list `names`; and why it cannot, or ''.

    Equal lists agree by number, others by name: two files may number the same classes differently."""
    if list(known) == list(names):
        return {label: label for label in classes}, ""
    labels, numbers = sorted(set(classes)), {name: number for number, name in enumerate(known)}
    counts = Counter(known) | Counter(names)
    for label in labels:
        if names[label] not in numbers or counts[names[label]] > 1:
            fault = "is the name of several classes" if names[label] in numbers else f"is no class of {owner}"
            return {}, f"'{names[label]}' {fault}"
    return {label: numbers[names[label]] for label in labels}, ""


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
            numbers = [number for number, name in enumerate(class_names) if name == names[used]]
            if len(numbers) > 1:
                message = f"--classes: {' and '.join(map(str, numbers))} are all named '{names[used]}'"
                raise UsageError(message, f"give the number of one of them, such as --classes {numbers[0]}")
            classes += numbers
        elif word == "all":
            classes += range(count)
        elif span and int(span[1]) <= int(span[2] or span[1]) < count:
            classes += range(int(span[1]), int(span[2] or span[1]) + 1)
        else:
            hint = f"write 1,2,3 or 0-9, of 0..{count - 1}, or all or name:goldfish; see `rdpm inspect CKPT`"
            raise UsageError(f"--classes: '{word}' is not a class", hint)
        words = words[used:]
    return list(dict.fromkeys(classes))

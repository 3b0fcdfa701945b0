"""Files of a folder, a zip, tar shards or a manifest -> recordings, and what is said in them by whom.

Where texts, speakers and labels come from is recognised by the files, the first that fits: `manifest.jsonl`; the
`metadata` of LJSpeech or of Hugging Face's AudioFolder; transcripts of LibriSpeech, LibriTTS or MLS; WebDataset's
`key.txt`, `.json` and `.cls` next to `key.flac`; names as in FSDD or LibriSpeech; else class folders."""

import contextlib
import csv
import io
import json
import math
import os
import posixpath
import re
import stat
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from rdpm_cli import files
from rdpm_cli.data import labels
from rdpm_cli.data.archives import LARGEST, ZIP_FIELDS, members_of, open_zipped, read_at
from rdpm_cli.data.labels import fold_path, is_hidden, member_name, split_key
from rdpm_cli.data.open import expand, walk
from rdpm_cli.errors import DataError, UsageError

SUFFIXES = labels.SOUND
NOTES = (".cls", ".json", ".txt")  # next to a recording of the same key; of two texts the last one counts
MANIFEST = "manifest.jsonl"
TRANSCRIPTS = (".trans.txt", ".trans.tsv", "transcripts.txt")  # of LibriSpeech, LibriTTS and MLS
TEXTS, SPEAKERS = ("transcription", "text"), ("speaker_id", "speaker")  # columns; the first one counts
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
FSDD = re.compile(r"(?P<digit>\d)_(?P<speaker>.+)_\d+")  # names without suffix
LIBRISPEECH = re.compile(r"(?P<speaker>\d+)-\d+-\d+")
HINT = "give a folder or .zip of .wav, .flac, .ogg or .mp3 files, .tar shards, or a manifest .jsonl"


@dataclass(frozen=True, slots=True)
class Location:
    """A file of its own, or a member of an archive: (offset, size) in a tar, ZIP_FIELDS in a zip."""

    path: Path
    member: tuple[int, ...] = ()

    def open(self) -> BinaryIO:
        """Raises OSError, or an error of the member's packing, where its bytes are damaged."""
        if not self.member:
            if not stat.S_ISREG(self.path.stat().st_mode):  # a pipe would wait for ever
                raise OSError("it is no regular file")
            return self.path.open("rb")
        if len(self.member) == 2:
            return io.BytesIO(read_at(self.path, *self.member))
        return open_zipped(self.path, self.member)

    def read(self) -> bytes:
        with self.open() as file:
            return file.read(LARGEST)


@dataclass(frozen=True)
class Listing:
    """All files by name, in order. folders: all of them, as paths. root: of a folder. manifest: its base name."""

    spec: str
    locations: dict[str, Location]
    folders: Sequence[str] = ()
    root: Path | None = None
    manifest: str = MANIFEST

    def inside(self, name: str) -> str:
        """The path of a file in its folder, zip or shard: names begin with the shard."""
        return re.sub(r"(?i)^.*?\.tar/", "", name) if len(self.locations[name].member) == 2 else name

    def locate(self, path: str) -> Location | None:
        """The file of a path in a manifest, which may lead out of a folder."""
        if path in self.locations or self.root is None or not (self.root / path).is_file():
            return self.locations.get(path)
        return Location(self.root / path)


def list_files(spec: str, follow_links: bool) -> Listing:
    """All files of what a user names. Raises UsageError where there is nothing, and DataError."""
    path = Path(files.local_path(spec))
    if path.is_dir() and spec:  # '' would be the working folder
        names, folders = walk(path, follow_links)
        shards = sorted(name for name in names if name.lower().endswith(".tar") and not is_hidden(name))
        if shards and not any(name.lower().endswith(SUFFIXES) for name in names):
            return _list_tar(str(path.resolve()), {name: path / name for name in shards})
        return Listing(str(path.resolve()), {name: Location(path / name) for name in sorted(names)}, folders, path)
    if path.is_file() and path.suffix.lower() == ".zip":
        return _list_zip(path)
    if path.is_file() and path.suffix.lower() == ".jsonl":
        return Listing(str(path.resolve()), {path.name: Location(path)}, (), path.parent, path.name)
    paths = [path] if path.is_file() else expand(spec)
    if not paths:
        raise UsageError(f"{spec} does not exist, or a file of this pattern does not", HINT)
    if odd := [shard for shard in paths if shard.suffix.lower() != ".tar" or not shard.is_file()]:
        raise DataError(f"{odd[0]} is not a .tar file", HINT)
    folder = os.path.commonpath([shard.absolute().parent for shard in paths])
    return _list_tar(os.path.abspath(spec), {os.path.relpath(shard, folder): shard for shard in paths})


def _list_zip(path: Path) -> Listing:
    locations: dict[str, Location] = {}
    folders: list[str] = []
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except Exception as error:  # zipfile raises almost anything for damaged bytes
        raise DataError(f"{path} cannot be read as a zip: {error}", HINT) from error
    for member in members:
        name = member_name(member.filename)
        if member.filename.endswith(("/", "\\")):  # some Windows programs write '\\'
            folders.append(name)
        elif name in locations or member.flag_bits & 1 or stat.S_ISLNK(member.external_attr >> 16):
            raise DataError(f"{path}: {name} occurs twice, is encrypted or is a link", "pack it again")
        else:
            locations[name] = Location(path, tuple(getattr(member, attribute) for attribute in ZIP_FIELDS))
    return Listing(str(path.resolve()), dict(sorted(locations.items())), folders)


def _list_tar(spec: str, shards: Mapping[str, Path]) -> Listing:
    """Files are named `shard.tar/member`."""
    locations: dict[str, Location] = {}
    folders: list[str] = []
    for short, shard in shards.items():
        for path, offset, size, _ in members_of(shard):
            if size < 0:
                folders.append(path)
            elif locations.setdefault(f"{short}/{path}", new := Location(shard, (offset, size))) is not new:
                raise DataError(f"{shard} holds two files named {path}", "pack it again")
    return Listing(spec, locations, folders)


@dataclass
class Recording:
    """An item. word_seconds: of each word of the text. start, seconds: the piece of the file that is meant."""

    name: str
    location: Location
    text: str | None = None
    speaker: str | None = None
    label: Any = None
    word_seconds: list[float] | None = None
    start: float = 0.0
    seconds: float | None = None

    def describe(self, row: Mapping[str, Any], label_column: str | None) -> "Recording":
        """Take over the text, speaker and label of a row; empty ones are none."""
        columns = (TEXTS, SPEAKERS, (label_column,) if label_column else labels.LABEL_COLUMNS)
        text, speaker, self.label = (next((row[k] for k in ks if row.get(k) is not None), None) for ks in columns)
        self.text, self.speaker = (None if x is None else str(x).strip() or None for x in (text, speaker))
        return self


@dataclass
class Recordings:
    """The recordings of a listing. used: names of the notes that describe them. lines: class names, where known.

    by: where texts, speakers and labels come from."""

    items: list[Recording]
    by: str
    used: set[str] = field(default_factory=set)
    lines: list[str] | None = None
    warnings: list[str] = field(default_factory=list)


def find_recordings(listing: Listing, visible: Sequence[str], label_column: str | None) -> Recordings:
    """The recordings among the visible files, in order. Raises DataError for notes that cannot be read."""
    sounds = [name for name in visible if split_key(name)[1] in SUFFIXES]
    base = {name: posixpath.basename(name).lower() for name in visible}
    if manifests := [name for name in visible if posixpath.basename(name) == listing.manifest]:
        return _read_manifest(listing, manifests, label_column)
    keys = {split_key(name)[0] for name in sounds}
    notes = [name for name in visible if split_key(name)[1] in NOTES and base[name] != labels.CLASSES]
    kinds = {
        "metadata": [name for name in visible if base[name] in labels.METADATA],
        "transcripts": [name for name in visible if base[name].endswith(TRANSCRIPTS)],
        "notes": notes if any(split_key(name)[0] in keys for name in notes) else [],
    }
    if (by := next((by for by, used in kinds.items() if used), None)) and sounds:
        return _join(listing, sounds, by, kinds[by], label_column)
    items = [Recording(name, listing.locations[name]) for name in sounds]
    stems = [posixpath.basename(split_key(name)[0]) for name in sounds]
    is_flat = len({posixpath.dirname(name) for name in sounds}) == 1
    if is_flat and all(matches := [FSDD.fullmatch(stem) for stem in stems]):
        for item, match in zip(items, filter(None, matches), strict=True):
            item.label, item.text, item.speaker = int(match["digit"]), DIGITS[int(match["digit"])], match["speaker"]
        return Recordings(items, "names", lines=DIGITS)
    if sounds and all(matches := [LIBRISPEECH.fullmatch(stem) for stem in stems]):
        for item, match in zip(items, filter(None, matches), strict=True):
            item.speaker = match["speaker"]
        return Recordings(items, "names")
    return Recordings(items, "folders")


def _join(listing: Listing, sounds: Sequence[str], by: str, used: Sequence[str], column: str | None) -> Recordings:
    """The recordings with the rows of notes: those of a path without suffix, or of a base name in transcripts."""
    keys: dict[str, str] = {}
    for name in sounds:
        if (other := keys.setdefault(fold_path(split_key(name)[0]), name)) != name:
            raise DataError(f"{listing.spec}: {other} and {name} would share one text", "remove one of them")
    key_of_stem = {posixpath.basename(key): key for key in keys} if by == "transcripts" else {}
    rows: dict[str, dict[str, Any]] = {}
    for note in sorted(used, key=lambda name: split_key(name)[1]):  # NOTES are sorted by suffix
        with _reading(listing.spec, note):
            for stem, row in _rows_of(note, listing.locations[note].read().decode("utf-8-sig")):
                path = fold_path(posixpath.join(posixpath.dirname(note), stem))
                key = key_of_stem.get(fold_path(stem), path)
                if key in rows and by != "notes":
                    raise ValueError(f"'{stem}' occurs twice")
                rows[key] = rows.get(key, {}) | row
    items = [Recording(name, listing.locations[name]).describe(rows.get(key, {}), column) for key, name in keys.items()]
    for item in items if by == "transcripts" else ():  # speaker/chapter/speaker-chapter-utterance.flac
        folders = listing.inside(item.name).split("/")[:-1]
        item.speaker = folders[-2] if len(folders) > 1 else re.split("[-_]", posixpath.basename(item.name))[0]
    warnings = []
    if absent := sorted(rows.keys() - keys.keys()):
        warnings.append(f"{listing.spec}: {len(absent)} recordings are listed but not there, such as {absent[0]}")
    if all(item.text is None and item.speaker is None and item.label is None for item in items):
        warnings.append(f"{listing.spec}: there are no texts, speakers or labels in {', '.join(sorted(used)[:3])}")
    return Recordings(items, by, set(used), warnings=warnings)


def _rows_of(note: str, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(path of a recording without its suffix, its columns) of a file of texts. Raises what parsers raise."""
    stem, kind = split_key(posixpath.basename(note))
    lines = [line.rstrip("\r") for line in text.split("\n") if line.strip()]
    if note.lower().endswith(TRANSCRIPTS):
        for line in lines:  # `id text`, or `id<tab>text<tab>normalised text`
            name, *texts = line.split("\t") if "\t" in line else line.split(" ", 1)
            yield name, {"text": "".join(texts[-1:])}
    elif kind == ".json":
        yield stem, dict(json.loads(text))
    elif kind in NOTES:
        yield stem, {"transcription" if kind == ".txt" else "label": text}
    elif kind == ".csv" and "file_name" not in next(csv.reader(lines[:1]), []):
        for line in lines:  # LJSpeech: `id|text|normalised text`
            name, first, *normalised = line.split("|")
            yield f"wavs/{name}", {"text": "".join(normalised[-1:]) or first}
    else:
        csv.field_size_limit(LARGEST)
        for row in csv.DictReader(io.StringIO(text, newline="")) if kind == ".csv" else map(json.loads, lines):
            yield split_key(row["file_name"].replace("\\", "/"))[0], row


def _read_manifest(listing: Listing, manifests: Sequence[str], label_column: str | None) -> Recordings:
    if len(manifests) > 1:
        raise DataError(f"{listing.spec} holds several manifests: {', '.join(manifests[:3])}", "name one of them")
    note = manifests[0]
    items: dict[str, Recording] = {}
    for number, line in enumerate(listing.locations[note].read().decode("utf-8-sig", "replace").split("\n"), 1):
        with _reading(listing.spec, f"line {number} of {note}"):
            if line.strip():
                item = _manifest_item(json.loads(line), posixpath.dirname(note), listing, label_column)
                if items.setdefault(item.name, item) is not item:
                    raise ValueError(f"'{item.name}' occurs twice")
    return Recordings(list(items.values()), "manifest", {note})


def _manifest_item(row: Mapping[str, Any], folder: str, listing: Listing, label_column: str | None) -> Recording:
    """A row of a manifest. Raises ValueError and the like."""
    path = posixpath.normpath(posixpath.join(folder, row["audio_filepath"]))
    if (location := listing.locate(path)) is None:
        raise ValueError(f"{path} is not there")
    start, seconds = (None if row.get(key) is None else float(row[key]) for key in ("offset", "duration"))
    if not all(value is None or 0 <= value < math.inf for value in (start, seconds)):
        raise ValueError("offset and duration should be seconds, from 0")
    name = path if start is None else f"{path}@{start}"
    item = Recording(name, location, start=start or 0.0, seconds=seconds).describe(row, label_column)
    if row.get("word_seconds") is not None:
        item.word_seconds = list(map(float, row["word_seconds"]))
        words = len((item.text or "").split())
        if len(item.word_seconds) != words or not all(0 <= value < math.inf for value in item.word_seconds):
            raise ValueError(f"word_seconds should hold the seconds of each of the {words} words")
    return item


@contextlib.contextmanager
def _reading(source: str, note: str) -> Iterator[None]:
    """Turn what a parser raises into a DataError."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, csv.Error, RecursionError) as error:
        hint = "correct it, or remove it to read the recordings without texts"
        raise DataError(f"{source}: {note} cannot be used: {type(error).__name__}: {error}", hint) from error

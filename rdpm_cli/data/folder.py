"""A folder of samples or reconstructions: PNG files, or samples.npz, and samples.json, which is written last.

While a job runs, run.json says whose samples the folder holds; `.parts/` has locks, and notes on how they were drawn.
"""

import contextlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from rdpm_cli import files, progress, runs
from rdpm_cli.data.pictures import NpzImages, read_png, save_npz, save_png
from rdpm_cli.data.pixels import Pixels
from rdpm_cli.errors import DataError, UsageError

RECORD, NPZ, NOTES = "samples.json", "samples.npz", ".parts"
SPEECH = "rdpm-speech"  # format of a record of drawn sounds
SAMPLE_AGAIN = "sample again with `rdpm sample`"

Record = dict[str, Any]
Reader = Callable[[Iterable[range]], Iterator[Pixels]]  # ascending ranges of images -> (n, H, W, 3) uint8 of each


def picture_record(kind: str, made_from: dict[str, str], options: Record, *, rows: list[Record], **more: Any) -> Record:
    """The content of samples.json. made_from: digests by kind; more: resolution, class_names and reference."""
    head = {"format": kind, "version": 1, "made_from": made_from, "options": options}
    return {**head, **more, "versions": runs.versions(), "samples": rows}


def sample_rows(labels: Sequence[int], png: bool) -> list[Record]:
    """One row a sample for the record. Without PNG files a sample is an image of samples.npz."""
    return [{**({"file": png_name(i)} if png else {}), "index": i, "label": label} for i, label in enumerate(labels)]


def claim(folder: Path, record: Record) -> None:
    """Begin writing a record's images into a folder, or continue. Raises UsageError if it holds anything else."""
    files.make_folder(folder)
    identity = {key: record[key] for key in ("format", "made_from", "options")}
    identity |= {"count": len(record["samples"]), "samples": files.digest(record["samples"])}
    is_new = all(path.name.startswith(".") for path in folder.iterdir())
    previous = identity if is_new else runs.read_run(folder).get("pictures", {})
    if changed := files.differences(previous, identity):
        raise UsageError(f"{folder} holds something else: {'; '.join(changed[:4])}", "choose another folder")
    runs.write_run(folder, {"pictures": identity})


def is_unfinished(folder: Path) -> bool:
    """Whether a command has begun to write images into this folder and not yet finished."""
    return not (folder / RECORD).is_file() and "pictures" in runs.read_run(folder)


def finish(folder: Path, record: Record) -> None:
    """Write samples.json: all images of the record are there. The notes of the job go."""
    files.write_json(folder / RECORD, record)
    shutil.rmtree(folder / NOTES, ignore_errors=True)


@dataclass(frozen=True)
class ImageSet:
    """Images to score, in order. labels: None unless all are known. record: of samples, samples.json.

    names: of their files; empty where they have none."""

    name: str
    count: int
    resolution: int
    labels: list[int] | None
    class_names: list[str]
    read: Reader
    record: Record = field(default_factory=dict)
    names: list[str] = field(default_factory=list)


def open_samples(folder: Path) -> ImageSet:
    """A folder of `rdpm sample` or `rdpm reconstruct`: its PNG files, or else its .npz. Raises DataError."""
    record = files.read_json(folder / RECORD)
    try:
        rows, size = record["samples"], int(record["resolution"])
        packed = not any("file" in row for row in rows)
        paths = [folder / name for name in ([record["npz"]] if packed else [row["file"] for row in rows])]
        labels = None if any(row["label"] is None for row in rows) else [int(row["label"]) for row in rows]
        class_names = list(record["class_names"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{folder / RECORD} lacks {error}", SAMPLE_AGAIN) from error
    if absent := [path for path in paths if not path.is_file()]:
        raise DataError(f"{len(absent)} of {len(paths)} files are missing, first {absent[0]}", SAMPLE_AGAIN)

    def check_shape(path: Path, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if shape != expected:
            raise DataError(f"{path} holds {shape}, but {RECORD} lists {expected}", SAMPLE_AGAIN)

    def read(pieces: Iterable[range]) -> Iterator[Pixels]:
        for piece in pieces:
            images = [(path, read_png(path)) for path in paths[piece.start : piece.stop]]
            for path, image in images:
                check_shape(path, image.shape, (size, size, 3))
            yield np.stack([image for _, image in images])

    if packed:
        npz = NpzImages(paths[0])
        check_shape(paths[0], npz.shape, (len(rows), size, size, 3))
        return ImageSet(str(folder), len(rows), size, labels, class_names, npz.read, record)
    names = [row["file"] for row in rows]
    return ImageSet(str(folder), len(rows), size, labels, class_names, read, record, names)


def open_npz(path: Path) -> ImageSet:
    """The images `arr_0` of an .npz, with the record and labels of the samples.json next to it if that lists them."""
    npz = NpzImages(path)
    if npz.shape[1] != npz.shape[2]:
        raise DataError(
            f"{path} holds images of {npz.shape[2]}×{npz.shape[1]}", "scores are of square images: crop them"
        )
    images = ImageSet(str(path), npz.shape[0], npz.shape[1], npz.labels, [], npz.read)
    if not (path.parent / RECORD).is_file() or files.read_json(path.parent / RECORD).get("npz") != path.name:
        return images
    listed = open_samples(path.parent)
    labels = listed.labels if npz.labels is None else npz.labels
    if (listed.count, listed.resolution, listed.labels or labels) != (images.count, images.resolution, labels):
        progress.warn(f"{path.parent / RECORD} lists other images than {path} holds: its options are left out")
        return images
    return replace(images, labels=labels, class_names=listed.class_names, record=listed.record)


def png_name(index: int) -> str:
    """The file name of a sample."""
    return f"{index:06d}.png"


class SampleFiles:
    """The files of a sampling job, in micro-batches that any process may draw in any order: nothing else is progress.

    A sample is a PNG file; samples.npz, made of all of them, may take their place in the end."""

    def __init__(self, folder: Path, count: int, micro_batch: int, *, png: bool) -> None:
        self.folder, self.count, self.png = folder, count, png
        self.batches = [range(start, min(start + micro_batch, count)) for start in range(0, count, micro_batch)]

    def _paths(self, batch: range) -> list[Path]:
        return [self.folder / png_name(index) for index in batch]

    def has_pngs(self, batch: range) -> bool:
        """Whether every sample of these has a PNG file."""
        return all(path.is_file() for path in reversed(self._paths(batch)))  # the last one is written last

    def is_missing(self, batch: range) -> bool:
        """Whether a sample of the micro-batch is still to be drawn or written."""
        return not self.has_pngs(batch) and (self.png or not (self.folder / NPZ).is_file())

    def read(self, batch: range) -> Pixels | None:
        """The images of a micro-batch (n, H, W, 3) from its PNG files or samples.npz; None if it has none."""
        if self.has_pngs(batch):
            return np.stack([read_png(path) for path in self._paths(batch)])
        return next(NpzImages(self.folder / NPZ).read([batch])) if (self.folder / NPZ).is_file() else None

    def write(self, batch: range, pixels_BHWC: Pixels) -> None:
        """Write the files of a micro-batch that are missing."""
        for path, pixels in zip(self._paths(batch), pixels_BHWC, strict=True):
            if not path.is_file():
                save_png(path, pixels)

    def save_npz(self, resolution: int, labels: Sequence[int]) -> None:
        """Write samples.npz from the PNG files, with one micro-batch in memory at a time; without `png` they go."""
        if not (self.folder / NPZ).is_file():
            pixels = (np.stack([read_png(path) for path in self._paths(batch)]) for batch in self.batches)
            save_npz(self.folder / NPZ, (self.count, resolution, resolution, 3), pixels, labels)
        if not self.png and not (self.folder / RECORD).is_file():  # which lists those of an earlier command
            for path in self._paths(range(self.count)):
                path.unlink(missing_ok=True)

    def note(self, made_with: Record) -> None:
        """Keep the device and precision of some samples for the record, once for all processes."""
        path = self.folder / NOTES / f"{files.digest(made_with)[:16]}.json"
        if not path.is_file():
            files.write_json(path, made_with)

    def notes(self) -> list[Record]:
        """All that was noted, after the notes of the folder's previous record; each once."""
        previous = (
            files.read_json(self.folder / RECORD).get("made_with", []) if (self.folder / RECORD).is_file() else []
        )
        notes = [*previous, *(files.read_json(path) for path in sorted((self.folder / NOTES).glob("*.json")))]
        return [note for index, note in enumerate(notes) if note not in notes[:index]]


@contextlib.contextmanager
def writing(folder: Path, index: int, count: int) -> Iterator[None]:
    """Hold part `index` of `count` of a job for writing. Raises RunError if another process writes it."""
    with files.only_writer(folder / NOTES / f"{index + 1}-of-{count}" if count > 1 else folder):
        for leftover in folder.glob(".*.tmp") if count == 1 else ():  # of a killed process
            leftover.unlink()
        yield


@contextlib.contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Wait until no other process of a job is in such a block, and keep them out of it."""
    files.make_folder(folder)
    with FileLock(folder / ".claim.lock"):
        yield

"""A folder of samples or reconstructions: PNG files, or samples.npz, and samples.json, which says what they are.

samples.json is written last: a folder without it is unfinished. While a job runs, run.json says whose samples the
folder holds; `.parts/` has the locks of the job's processes and their notes on how they drew.
"""

import contextlib
import functools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from rdpm_cli import files, progress, runs
from rdpm_cli.data.pictures import NpzImages, read_png, save_npz, save_png
from rdpm_cli.data.pixels import TRANSFORM, Pixels
from rdpm_cli.data.source import Source
from rdpm_cli.errors import DataError, RunError, UsageError

RECORD, NPZ, CHUNKS, NOTES = "samples.json", "samples.npz", "chunks", ".parts"
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"  # the last bytes of a complete PNG file
SAMPLE_AGAIN = "sample again with `rdpm sample`"

Reader = Callable[[Iterable[range]], Iterator[Pixels]]  # ascending ranges of images -> (n, H, W, 3) uint8 of each


# ---- the record ----------------------------------------------------------------------------------------------------


def picture_record(
    kind: str,
    made_from: dict[str, str],
    options: dict[str, Any],
    *,
    resolution: int,
    class_names: list[str],
    reference: dict[str, Any] | None,
    rows: list[dict[str, Any]],
) -> dict[str, Any]:
    """The content of samples.json. made_from: digests by kind; rows: file, index, label and more of each image."""
    return {
        "format": kind,
        "version": 1,
        "made_from": made_from,
        "options": options,
        "resolution": resolution,
        "class_names": class_names,
        "reference": reference,
        "versions": runs.versions(),
        "samples": rows,
    }


def sample_rows(labels: Sequence[int], png: bool) -> list[dict[str, Any]]:
    """One row a sample for the record. Without PNG files a sample is an image of samples.npz."""
    rows: list[dict[str, Any]] = [{"index": index, "label": label} for index, label in enumerate(labels)]
    return [{"file": png_name(row["index"]), **row} if png else row for row in rows]


def source_reference(source: Source, resolution: int) -> dict[str, Any]:
    """The reference for later scores: the images of a source after the same crop."""
    return {"source": source.spec, "digest": source.digest(), "resolution": resolution, "transform": TRANSFORM}


def claim(folder: Path, record: dict[str, Any]) -> None:
    """Begin writing a record's images into a folder, or continue. Raises UsageError if it holds anything else."""
    files.make_folder(folder)
    identity = {key: record[key] for key in ("format", "made_from", "options")}
    identity |= {"count": len(record["samples"]), "samples": files.digest(record["samples"])}
    if previous := runs.read_run(folder):
        if changed := files.differences(previous.get("pictures", {}), identity):
            raise UsageError(f"{folder} holds other pictures: {'; '.join(changed[:4])}", "choose another folder")
    elif any(not path.name.startswith(".") for path in folder.iterdir()):
        raise UsageError(f"{folder} is not empty and not a folder of samples", "choose another folder")
    runs.write_run(folder, {"pictures": identity})


def is_unfinished(folder: Path) -> bool:
    """Whether a command has begun to write images into this folder and not yet finished."""
    return not (folder / RECORD).is_file() and "pictures" in runs.read_run(folder)


def read_record(folder: Path) -> dict[str, Any]:
    """samples.json of a folder. Raises DataError."""
    record = files.read_json(folder / RECORD)
    if not isinstance(record, dict):
        raise DataError(f"{folder / RECORD} is not the record of a folder of samples", SAMPLE_AGAIN)
    return record


def finish(folder: Path, record: dict[str, Any]) -> None:
    """Write samples.json: all images of the record are there. The notes of the job go."""
    files.write_json(folder / RECORD, record)
    shutil.rmtree(folder / NOTES, ignore_errors=True)


# ---- reading -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageSet:
    """Images to score, in order. labels: None unless all are known. record: of samples, samples.json."""

    name: str
    count: int
    resolution: int
    labels: list[int] | None
    class_names: list[str]
    read: Reader
    record: dict[str, Any] = field(default_factory=dict)


def open_samples(folder: Path) -> ImageSet:
    """A folder of `rdpm sample` or `rdpm reconstruct`: its PNG files, or its .npz if no row names a file.

    Raises DataError for a record that lacks something, and for files that are missing.
    """
    record = read_record(folder)
    try:
        rows, size = record["samples"], int(record["resolution"])
        packed = bool(rows) and not any("file" in row for row in rows)
        names = [record["npz"]] if packed else [row["file"] for row in rows]
        labels = None if any(row["label"] is None for row in rows) else [int(row["label"]) for row in rows]
        class_names = list(record["class_names"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{folder / RECORD} lacks {error}", SAMPLE_AGAIN) from error
    if outside := [name for name in names if Path(name).name != name]:
        raise DataError(f"{folder / RECORD} names a file outside its folder: {outside[0]}", SAMPLE_AGAIN)
    paths = [folder / name for name in names]
    if absent := [path for path in paths if not path.is_file()]:
        count = "all samples" if packed else f"{len(absent)} of {len(paths)} samples"
        raise DataError(f"{folder}: {count} are missing, first {absent[0].name}", SAMPLE_AGAIN)
    read = _npz_reader(paths[0], (len(rows), size, size, 3)) if packed else functools.partial(_read_pngs, paths, size)
    return ImageSet(str(folder), len(rows), size, labels, class_names, read, record)


def open_npz(path: Path) -> ImageSet:
    """The images `arr_0` of an .npz, with the record and labels of the samples.json next to it if that lists them."""
    npz = NpzImages(path)
    labels = npz.labels()
    images = ImageSet(str(path), npz.count, npz.shape[1], labels, [], npz.read)
    if not (path.parent / RECORD).is_file() or read_record(path.parent).get("npz") != path.name:
        return images
    listed = open_samples(path.parent)
    same_labels = labels is None or listed.labels in (None, labels)
    if (listed.count, listed.resolution) != (images.count, images.resolution) or not same_labels:
        progress.warn(f"{path.parent / RECORD} lists other images than {path} holds: its options are left out")
        return images
    labels = listed.labels if labels is None else labels
    return replace(images, labels=labels, class_names=listed.class_names, record=listed.record)


def _npz_reader(path: Path, shape: tuple[int, ...]) -> Reader:
    npz = NpzImages(path)
    if npz.shape != shape:
        raise DataError(f"{path} holds images {npz.shape}, but {RECORD} lists {shape}", SAMPLE_AGAIN)
    return npz.read


def _read_pngs(paths: list[Path], size: int, pieces: Iterable[range]) -> Iterator[Pixels]:
    for piece in pieces:
        images = [read_png(path) for path in paths[piece.start : piece.stop]]
        for path, image in zip(paths[piece.start : piece.stop], images, strict=True):
            if image.shape != (size, size, 3):
                raise DataError(f"{path} is {image.shape}, not {size}×{size}", SAMPLE_AGAIN)
        yield np.stack(images)


# ---- the files of a sampling job -----------------------------------------------------------------------------------


def png_name(index: int) -> str:
    """The file name of a sample."""
    return f"{index:06d}.png"


def is_complete(path: Path) -> bool:
    """Whether a PNG file is there up to its last bytes. One that was cut or emptied is drawn again."""
    try:
        with path.open("rb") as file:
            file.seek(-len(PNG_END), os.SEEK_END)
            return file.read() == PNG_END
    except OSError:  # absent, or shorter than the end
        return False


class SampleFiles:
    """The files of a sampling job, in micro-batches that any process may draw in any order.

    A micro-batch is finished once its files are there: its PNG files and, for samples.npz, its chunk
    `chunks/START.npy` (n, H, W, 3) uint8. Nothing else records progress, so a job continues after any end, and its
    processes need not talk to each other.
    """

    def __init__(self, folder: Path, count: int, micro_batch: int, *, png: bool, npz: bool) -> None:
        self.folder, self.count, self.png, self.npz = folder, count, png, npz
        self.batches = [range(start, min(start + micro_batch, count)) for start in range(0, count, micro_batch)]

    def is_missing(self, batch: range) -> bool:
        """Whether a file of the micro-batch is still to be written."""
        if self.npz and not ((self.folder / NPZ).is_file() or self._has_chunk(batch)):
            return True
        return self.png and not self._has_pngs(batch)

    @property
    def has_pngs(self) -> bool:
        """Whether every sample has a PNG file."""
        return all(map(self._has_pngs, self.batches))

    def read(self, batch: range) -> Pixels | None:
        """The images of a micro-batch (n, H, W, 3) from its chunk, PNG files or samples.npz; None if it has none."""
        if self._has_chunk(batch):
            pixels: Pixels = np.load(self._chunk(batch), allow_pickle=False)
            return pixels
        if self._has_pngs(batch):
            return np.stack([read_png(self._image(index)) for index in batch])
        return next(NpzImages(self.folder / NPZ).read([batch])) if (self.folder / NPZ).is_file() else None

    def write(self, batch: range, pixels_BHWC: Pixels) -> None:
        """Write the files of a micro-batch that are missing."""
        for index, pixels in zip(batch, pixels_BHWC, strict=True):
            if self.png and not is_complete(self._image(index)):
                save_png(self._image(index), pixels)
        if self.npz and not (self.folder / NPZ).is_file():
            files.write_atomic(self._chunk(batch), lambda file: np.save(file, pixels_BHWC, allow_pickle=False))

    def note(self, made_with: dict[str, Any]) -> None:
        """Keep the device and precision of some samples for the record, once for all processes."""
        path = self.folder / NOTES / f"{files.digest(made_with)[:16]}.json"
        if not path.is_file():
            files.write_json(path, made_with)

    def notes(self) -> list[dict[str, Any]]:
        """All that was noted, after the notes of the folder's previous record; each once."""
        previous = read_record(self.folder).get("made_with", []) if (self.folder / RECORD).is_file() else []
        notes = [*previous, *(files.read_json(path) for path in sorted((self.folder / NOTES).glob("*.json")))]
        return [note for index, note in enumerate(notes) if note not in notes[:index]]

    def save_npz(self, resolution: int, labels: Sequence[int]) -> None:
        """Write samples.npz from the chunks, or from PNG files, with one micro-batch in memory at a time."""
        if not (self.folder / NPZ).is_file():
            shape = (self.count, resolution, resolution, 3)
            save_npz(self.folder / NPZ, shape, map(self._require, self.batches), labels)
        shutil.rmtree(self.folder / CHUNKS, ignore_errors=True)

    def _require(self, batch: range) -> Pixels:
        pixels = self.read(batch)
        if pixels is None:
            raise RunError(f"samples {batch.start} to {batch.stop - 1} were deleted", "run the same command again")
        return pixels

    def _has_pngs(self, batch: range) -> bool:
        # The last one is checked first, because it is written last.
        return all(is_complete(self._image(index)) for index in reversed(batch))

    def _has_chunk(self, batch: range) -> bool:
        path = self._chunk(batch)
        # A job that began on another kind of device has chunks of another size.
        return path.is_file() and len(np.load(path, mmap_mode="r", allow_pickle=False)) == len(batch)

    def _image(self, index: int) -> Path:
        return self.folder / png_name(index)

    def _chunk(self, batch: range) -> Path:
        return self.folder / CHUNKS / f"{batch.start:06d}.npy"


@contextlib.contextmanager
def writing(folder: Path, index: int, count: int) -> Iterator[None]:
    """Hold part `index` of `count` of a job for writing. Raises RunError if another process writes it."""
    if count > 1:
        with files.only_writer(folder / NOTES / f"{index + 1}-of-{count}"):
            yield
        return
    with files.only_writer(folder):
        for leftover in [*folder.glob(".*.tmp"), *folder.glob(f"{CHUNKS}/.*.tmp")]:  # of a killed process
            leftover.unlink()
        yield


@contextlib.contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Wait until no other process of a job is in such a block, and keep them out of it."""
    files.make_folder(folder)
    with FileLock(folder / ".claim.lock"):
        yield

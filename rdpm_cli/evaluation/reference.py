"""What is scored, and against what: sample folders, image sources, the reference recorded along the chain."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rdpm_cli import files, progress
from rdpm_cli.errors import DataError
from rdpm_cli.evaluation import npz
from rdpm_cli.images import writers
from rdpm_cli.images.sources import ImageSource, is_builtin, is_there, open_source, spread
from rdpm_cli.images.transform import DRAFT_TRANSFORM, TRANSFORM, Pixels

BATCH, RECORD = 64, "samples.json"
Reader = Callable[[Iterable[range]], Iterator[Pixels]]  # ascending places in the set -> (B, H, W, 3) uint8 of each


@dataclass
class ImageSet:
    """Images to score, in order. labels: where known."""

    name: str
    count: int
    resolution: int
    labels: list[int] | None
    class_names: list[str]
    read: Reader
    origin: dict[str, Any]  # of samples: the record in samples.json

    @property
    def batches(self) -> Iterator[Pixels]:
        """All of them, BATCH at a time."""
        return self.read(cut(self.count, BATCH))


def cut(count: int, size: int) -> list[range]:
    """0..count-1 in ranges of `size`."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def open_samples(folder: Path) -> ImageSet:
    """A folder of `rdpm sample` or `rdpm reconstruct`: exactly the images that samples.json lists.

    Files of their own, or where no row names one, the images of the record's `npz`. Raises DataError.
    """
    listed = _listed(folder)
    if outside := [name for name in listed.names if Path(name).name != name]:
        raise DataError(f"{folder / RECORD} names a file outside its folder: {outside[0]}", "sample again")
    paths = [folder / name for name in listed.names]
    if absent := [p for p in paths if not p.is_file()]:
        some = "all samples" if listed.packed else f"{len(absent)} of {len(paths)} samples"
        raise DataError(f"{folder}: {some} are missing, first {absent[0].name}", "sample again with `rdpm sample`")
    if listed.packed:
        read = _read_packed(paths[0], listed.count, listed.resolution)
    else:
        read = functools.partial(_read_samples, paths, listed.resolution)
    return ImageSet(
        str(folder), listed.count, listed.resolution, listed.labels, listed.class_names, read, origin=listed.record
    )


@dataclass
class _Listed:
    """What samples.json says. names: of the images' files, or where it is `packed` of the one that holds all."""

    record: dict[str, Any]
    count: int
    resolution: int
    packed: bool
    names: list[str]
    labels: list[int] | None
    class_names: list[str]


def _listed(folder: Path) -> _Listed:
    record = files.read_json(folder / RECORD)
    try:
        rows, resolution = record["samples"], int(record["resolution"])
        packed = bool(rows) and not any("file" in row for row in rows)
        names, given = [record["npz"]] if packed else [row["file"] for row in rows], [row["label"] for row in rows]
        labels = None if None in given else [int(label) for label in given]
        return _Listed(record, len(rows), resolution, packed, names, labels, list(record["class_names"]))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{folder / RECORD} lacks {error}", "sample again with `rdpm sample`") from error


def _read_packed(path: Path, count: int, resolution: int) -> Reader:
    images = npz.Images(path)
    wanted = (count, resolution, resolution, 3)
    if images.shape != wanted:
        raise DataError(f"{path} holds images {images.shape}, not {wanted} as samples.json has it", "sample again")
    return images.read


def _read_samples(paths: list[Path], resolution: int, pieces: Iterable[range]) -> Iterator[Pixels]:
    for piece in pieces:
        images = []
        for path in paths[piece.start : piece.stop]:
            images.append(writers.read_png(path))
            if images[-1].shape != (resolution, resolution, 3):
                raise DataError(f"{path} is {images[-1].shape}, not {resolution}×{resolution}", "sample again")
        yield np.stack(images)


def open_images(
    source: ImageSource,
    resolution: int,
    *,
    limit: int | None = None,
    without: Collection[int] = (),
    draft: bool = False,
) -> ImageSet:
    """Images of a source after the ADM crop.

    without: indices left out; limit: so many of the others, evenly spaced; draft: as `tokenize --draft` read them.
    """
    left_out = set(without)
    kept = [i for i in range(len(source)) if i not in left_out]
    indices = [kept[place] for place in spread(len(kept), limit)]
    labels = None if source.labels is None else [int(source.labels[i]) for i in indices]

    def read(pieces: Iterable[range]) -> Iterator[Pixels]:
        for piece in pieces:
            yield np.stack([source.pixels(i, resolution, draft) for i in indices[piece.start : piece.stop]])

    return ImageSet(source.spec, len(indices), resolution, labels, source.class_names, read, origin={})


def open_target(spec: str, resolution: int | None) -> ImageSet:
    """A sample folder, an .npz of images (`arr_0`), or any image source.

    Sources are cropped to `resolution`, else to the size of their first image's short side.
    """
    if (found := _ready(spec)) is not None:
        return found
    source = open_source(spec)
    return open_images(source, resolution or min(source.image(0).size))


def _ready(spec: str) -> ImageSet | None:
    """Images that are not cropped any more: a sample folder, an .npz. None where `spec` is neither."""
    if is_builtin(spec):
        return None
    path = Path(spec)
    if (path / RECORD).is_file():
        return open_samples(path)
    if path.suffix == ".npz" and path.is_file():
        return _with_record(open_npz(path), path)
    _refuse_unfinished(spec)
    return None


def open_npz(path: Path) -> ImageSet:
    """The images `arr_0`, (N, H, W, 3) uint8, read in place and in flat memory; `arr_1` holds labels, if any."""
    images = npz.Images(path)
    labels = images.labels()
    return ImageSet(str(path), images.count, images.shape[1], labels, [], images.read, origin={})


def _with_record(images: ImageSet, path: Path) -> ImageSet:
    """The images with what samples.json beside them says, where it names this file and lists what it holds."""
    beside = path.parent / RECORD
    record = files.read_json(beside) if beside.is_file() else None
    if not isinstance(record, dict) or record.get("npz") != path.name:
        return images
    listed = _listed(path.parent)
    labels = images.labels if listed.labels is None else listed.labels
    theirs, ours = (listed.count, listed.resolution, labels), (images.count, images.resolution, images.labels or labels)
    if theirs != ours:
        progress.warn(f"{beside} lists other images than {path} holds: its options and labels are left out")
        return images
    return dataclasses.replace(images, labels=labels, class_names=listed.class_names, origin=record)


def _refuse_unfinished(spec: str) -> None:
    note = Path(spec) / "run.json"
    if not is_builtin(spec) and note.is_file() and "pictures" in files.read_json(note):
        raise DataError(f"{spec} is an unfinished folder of pictures", "run the command that makes it again")


def open_reference(ref: str | None, target: ImageSet) -> ImageSet:
    """The images named by the user, else those recorded along samples -> checkpoint -> store -> data."""
    if ref is None:
        return open_recorded(target.origin.get("reference"), target.name, "give the reference with --ref IMAGES")
    return _ready(ref) or open_images(open_source(ref), target.resolution)


def open_recorded(recorded: dict[str, Any] | None, where: str, hint: str, limit: int | None = None) -> ImageSet:
    """The images that a record names, if they are still those; limit: so many of them, evenly spaced.

    where: whose record. hint: the way out.

    Raises DataError.
    """
    if not recorded:
        raise DataError(f"{where} records no reference", hint)
    if recorded["transform"] not in (TRANSFORM, DRAFT_TRANSFORM):
        raise DataError(f"{where} names a reference with transform {recorded['transform']}", hint)
    name = recorded["source"]
    if not is_there(name):
        raise DataError(f"the recorded reference {name} is not here", hint)
    source = open_source(name)
    if source.digest() != recorded["digest"]:
        raise DataError(f"{name} holds other images than when it was tokenised", hint)
    draft = recorded["transform"] == DRAFT_TRANSFORM
    return open_images(
        source, int(recorded["resolution"]), limit=limit, without=recorded.get("left_out", ()), draft=draft
    )

"""The files of a sampling job: pieces of indices, written whole by whoever draws them, in any order and process.

A piece is a range of samples, whole micro-batches but for the last. It is finished once its files are there: its PNGs,
and with samples.npz its chunk `chunks/START.npy`, (n, H, W, 3) uint8. Nothing else records progress, so a job goes on
after any end, and its processes need no word from each other. `.parts/` has who writes and how, until the job is done.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rdpm_cli import files
from rdpm_cli.errors import RunError, UsageError

if TYPE_CHECKING:
    from rdpm_cli.images.transform import Pixels
    from rdpm_cli.signals import StopRequest

CHUNKS, NPZ, PARTS = "chunks", "samples.npz", ".parts"
PIECE = 64  # images of a piece, where a micro-batch has fewer: 13 MB at 256×256
SHARE = 64  # pieces of a job at least, where its micro-batches allow: what processes share
LOOK_AGAIN = 0.2  # seconds between looks at what other processes have finished
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"  # the last bytes of a whole one


@dataclass(frozen=True)
class Part:
    """Which pieces a process makes: number `place` of every `count`."""

    place: int = 0
    count: int = 1
    rank: int = 0  # among the processes of one command
    ranks: int = 1


def part_of(shard: str | None) -> Part:
    """This process's part: of --shard I/N (1/4 to 4/4), and of torchrun's or --gpus' processes. Raises UsageError."""
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if shard is None:
        return Part(rank, ranks, rank, ranks)
    first, _, of = shard.partition("/")
    if not (first.isdecimal() and of.isdecimal() and 1 <= int(first) <= int(of)):
        raise UsageError(f"--shard {shard} is not I/N", "write 1/4, 2/4, 3/4 and 4/4 for four shards")
    return Part((int(first) - 1) * ranks + rank, int(of) * ranks, rank, ranks)


class Files:
    """What a job writes under `out`."""

    def __init__(self, out: Path, count: int, micro_batch: int, *, png: bool, npz: bool) -> None:
        self.out, self.count, self.micro_batch, self.png, self.npz = out, count, micro_batch, png, npz
        batches = -(-count // micro_batch)
        size = micro_batch * max(1, min(PIECE // micro_batch, batches // SHARE))
        self.pieces = [range(start, min(start + size, count)) for start in range(0, count, size)]

    def image(self, index: int) -> Path:
        """The PNG of a sample."""
        return self.out / name_of(index)

    def chunk(self, piece: range) -> Path:
        """The chunk of a piece."""
        return self.out / CHUNKS / f"{piece.start:06d}.npy"

    def lacks(self, piece: range) -> bool:
        """Is a file of the piece still to be written?"""
        if self.npz and not ((self.out / NPZ).is_file() or self.chunk(piece).is_file()):
            return True
        return self.png and not self.has_pngs(piece)

    def has_pngs(self, piece: range) -> bool:
        """Is every PNG there, to its end? The last one is looked for first: it was written last."""
        return all(is_whole(self.image(index)) for index in reversed(piece))

    def read(self, piece: range) -> Pixels | None:
        """The images of a piece, or of a part of one, from what is there; None where that is not all of them."""
        import numpy as np

        from rdpm_cli.images import writers

        if self.chunk(piece).is_file():
            pixels: Pixels = np.load(self.chunk(piece), allow_pickle=False)
            if len(pixels) == len(piece):
                return pixels
        if self.has_pngs(piece):
            return np.stack([writers.read_png(self.image(index)) for index in piece])
        return None

    def pixels(self, index: int) -> Pixels | None:
        """One sample from what is there."""
        import numpy as np

        from rdpm_cli.images import writers

        if is_whole(self.image(index)):
            return writers.read_png(self.image(index))
        piece = next(piece for piece in self.pieces if index in piece)
        if self.chunk(piece).is_file():
            return np.array(np.load(self.chunk(piece), mmap_mode="r", allow_pickle=False)[index - piece.start])
        return None

    def write_pngs(self, part: range, pixels_BHWC: Pixels) -> None:
        """The PNGs of some samples, those that are missing."""
        from rdpm_cli.images import writers

        for index, pixels in zip(part, pixels_BHWC, strict=True):
            if self.png and not is_whole(self.image(index)):
                writers.save_png(self.image(index), pixels)

    def write_chunk(self, piece: range, pixels_BHWC: Pixels) -> None:
        """The chunk of a piece, if it is missing."""
        import numpy as np

        if self.npz and not (self.out / NPZ).is_file():
            files.write_atomic(self.chunk(piece), lambda file: np.save(file, pixels_BHWC, allow_pickle=False))

    def wait(self, pieces: Sequence[range], stop: StopRequest) -> None:
        """Until these pieces, which other processes of this command make, are there."""
        for piece in pieces:
            while self.lacks(piece):
                stop.leave(f"finished samples are kept in {self.out}")
                time.sleep(LOOK_AGAIN)

    def note(self, how: dict[str, Any]) -> None:
        """Note with what samples are made, for the record: a way once, whoever makes them."""
        path = self.out / PARTS / f"{files.digest(how)[:16]}.json"
        if not path.is_file():
            files.write_json(path, how)

    def notes(self, before: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """All that was noted, after what an earlier record of the folder says; each way once."""
        found = [*before, *(files.read_json(path) for path in sorted((self.out / PARTS).glob("*.json")))]
        return [how for place, how in enumerate(found) if how not in found[:place]]

    def save_npz(self, resolution: int, labels: Sequence[int]) -> str:
        """samples.npz, streamed from chunks, or PNGs where there are none; a piece is in memory at a time."""
        from rdpm_cli.images import writers

        path = self.out / NPZ
        if not path.is_file():
            shape = (self.count, resolution, resolution, 3)
            writers.save_npz(path, shape, map(self._need, self.pieces), labels)
        if (self.out / CHUNKS).is_dir():
            shutil.rmtree(self.out / CHUNKS)
        return str(path)

    def _need(self, piece: range) -> Pixels:
        pixels = self.read(piece)
        if pixels is None:
            raise RunError(f"samples {piece.start} to {piece.stop - 1} went away", "run the same command again")
        return pixels


def name_of(index: int) -> str:
    """The PNG's name."""
    return f"{index:06d}.png"


def is_whole(path: Path) -> bool:
    """Is a PNG there, with its last bytes? One that was cut or emptied is drawn again."""
    try:
        with path.open("rb") as file:
            file.seek(-len(PNG_END), os.SEEK_END)
            return file.read() == PNG_END
    except OSError:  # absent, or shorter
        return False


@contextlib.contextmanager
def writing(out: Path, part: Part) -> Iterator[None]:
    """Hold the part of a folder that this process writes. Raises RunError where another process does."""
    if part.count == 1:
        with files.only_writer(out):
            for left in [*out.glob(".*.tmp"), *out.glob(f"{CHUNKS}/.*.tmp")]:  # of a killed process
                left.unlink()
            yield
        return
    with files.only_writer(out / PARTS / f"{part.place + 1}-of-{part.count}"):
        yield


@contextlib.contextmanager
def one_at_a_time(out: Path) -> Iterator[None]:
    """Inside, no other process of a job is inside."""
    from filelock import FileLock

    files.make_folder(out)
    with FileLock(out / ".claim.lock"):
        yield


def parts_of(piece: range, micro_batch: int) -> list[range]:
    """The micro-batches of a piece."""
    return [range(start, min(start + micro_batch, piece.stop)) for start in range(piece.start, piece.stop, micro_batch)]


def rows_of(labels: Sequence[int], png: bool) -> list[dict[str, Any]]:
    """The record's line of each sample. Without PNGs a sample is a row of samples.npz."""
    return [
        {"file": name_of(index), "index": index, "label": label} if png else {"index": index, "label": label}
        for index, label in enumerate(labels)
    ]

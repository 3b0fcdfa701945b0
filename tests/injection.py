"""Faults of the disk, injected into this process: a kill at a counted event of writing, and a disk of limited size.

Events are the middle of a write, and before and after a file is synced, renamed or removed. Nothing that SIGKILL would
prevent, such as the removal of temporary files, is done after one."""

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import pytest

from rdpm_cli import files


def write_through(patch: pytest.MonkeyPatch, write: Callable[[BinaryIO, bytes], int]) -> None:
    """Let atomic files be written by write(file, data)."""
    original = files.write_atomic

    def write_atomic(path: Path, save: Callable[[Any], object]) -> None:
        original(path, lambda file: save(SimpleNamespace(write=lambda x: write(file, bytes(x)), flush=file.flush)))

    patch.setattr(files, "write_atomic", write_atomic)


class Killed(BaseException):
    """Raised instead of SIGKILL."""


class Faults:
    """Counts events of the disk and strikes at one of them."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch
        self.aim(-1)
        for home, name in ((os, "fsync"), (os, "replace"), (Path, "unlink")):
            self._wrap(home, name)
        write_through(patch, self._write)

    def also_before(self, home: Any, name: str) -> None:
        """Count calls of this function as events too."""
        self._wrap(home, name, after=False)

    def _wrap(self, home: Any, name: str, after: bool = True) -> None:
        original = getattr(home, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.dead:
                return None  # nothing cleans up after SIGKILL
            self.event()
            result = original(*args, **kwargs)
            if after:
                self.event()
            return result

        self.patch.setattr(home, name, call)

    def _write(self, file: BinaryIO, data: bytes) -> int:
        file.write(data[: len(data) // 2])
        file.flush()
        self.event()
        file.write(data[len(data) // 2 :])
        return len(data)

    def event(self) -> None:
        self.seen += 1
        if self.seen == self.strike_at:
            self.strike()

    def strike(self) -> None:
        self.dead = True
        raise Killed

    def aim(self, event: int) -> None:
        """Strike at this event, counted from now on; -1: at none."""
        self.seen, self.strike_at, self.dead = 0, event, False

    def end(self) -> None:
        self.aim(-1)


class Kills(Faults):
    """The same with a real SIGKILL of this process."""

    def strike(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Disk:
    """A disk of `size` bytes under `root`: writes beyond it fail as the system lets them fail."""

    def __init__(self, root: Path, size: int, patch: pytest.MonkeyPatch) -> None:
        self.root, self.size, self.refused = root, size, False
        write_through(patch, self._write)
        patch.setattr(os, "statvfs", self._status)

    @property
    def free(self) -> int:
        return max(0, self.size - sum(path.stat().st_size for path in self.root.rglob("*") if path.is_file()))

    def _status(self, _: object) -> Any:
        """os.statvfs: at first there is room, since another process takes the rest later."""
        return SimpleNamespace(f_bavail=self.free if self.refused else 1 << 40, f_frsize=1)

    def _write(self, file: BinaryIO, data: bytes) -> int:
        free = self.free
        file.write(data[:free])
        if len(data) > free:
            self.refused = True
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        file.flush()
        return len(data)

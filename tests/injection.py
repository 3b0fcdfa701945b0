"""Faults of the disk, injected into this process: a kill at a counted event of writing, and a disk of limited size.

Events are the middle of a write, and before and after a file is synced, renamed or removed. Nothing that SIGKILL would
prevent, such as the removal of temporary files, is done after one.
"""

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import pytest

from rdpm_cli import files


class Killed(BaseException):
    """Raised instead of SIGKILL."""


class Faults:
    """Counts events of the disk and strikes at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.patch = monkeypatch
        self.seen, self.strike_at, self.dead = 0, -1, False
        self._wrap(os, "fsync")
        self._wrap(os, "replace")
        self._wrap(Path, "unlink")
        original = files.write_atomic

        def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
            original(path, lambda file: write(Interrupted(file, self)))  # type: ignore[arg-type]

        monkeypatch.setattr(files, "write_atomic", write_atomic)

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

    def event(self) -> None:
        self.seen += 1
        if self.seen == self.strike_at:
            self.strike()

    def strike(self) -> None:
        self.dead = True
        raise Killed

    def aim(self, event: int) -> None:
        self.seen, self.strike_at, self.dead = 0, event, False

    def end(self) -> None:
        self.seen, self.strike_at, self.dead = 0, -1, False


class Interrupted:
    """A file whose writes are events in their middle."""

    def __init__(self, file: BinaryIO, faults: Faults) -> None:
        self.file, self.faults = file, faults

    def write(self, data: Any) -> int:
        whole = bytes(data)
        self.file.write(whole[: len(whole) // 2])
        self.file.flush()
        self.faults.event()
        self.file.write(whole[len(whole) // 2 :])
        return len(whole)

    def flush(self) -> None:
        self.file.flush()


class Kills(Faults):
    """The same with a real SIGKILL of this process."""

    def strike(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Disk:
    """A disk of `size` bytes under `root`: writes beyond it fail as the system lets them fail."""

    def __init__(self, root: Path, size: int, patch: pytest.MonkeyPatch) -> None:
        self.root, self.size, self.refused = root, size, False
        original = files.write_atomic

        def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
            original(path, lambda file: write(Bounded(file, self)))  # type: ignore[arg-type]

        patch.setattr(files, "write_atomic", write_atomic)
        patch.setattr(os, "statvfs", self._status)

    @property
    def free(self) -> int:
        return self.size - sum(path.stat().st_size for path in self.root.rglob("*") if path.is_file())

    def _status(self, _: object) -> Any:
        """os.statvfs: at first there is room, since another process takes the rest later."""
        return SimpleNamespace(f_bavail=max(0, self.free) if self.refused else 1 << 40, f_frsize=1)


class Bounded:
    """A file on that disk."""

    def __init__(self, file: BinaryIO, disk: Disk) -> None:
        self.file, self.disk = file, disk

    def write(self, data: Any) -> int:
        whole = bytes(data)
        if len(whole) <= self.disk.free:
            written = self.file.write(whole)
            self.file.flush()
            return written
        self.file.write(whole[: max(0, self.disk.free)])
        self.disk.refused = True
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def flush(self) -> None:
        self.file.flush()

"""Faults of the disk, injected into this process: a kill at a counted event of writing, and a disk of so many bytes.

Events are: the middle of a write, before and after a file is synced, renamed or removed. What SIGKILL would not do,
such as removing temporary files, is not done.
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
    """What stands for SIGKILL."""


class Faults:
    """Counts events of the disk, and strikes at one of them."""

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
        """Let the call of a function be an event too."""
        self._wrap(home, name, after=False)

    def _wrap(self, home: Any, name: str, after: bool = True) -> None:
        original = getattr(home, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.dead:
                return None  # nobody cleans up behind SIGKILL
            self.event()
            found = original(*args, **kwargs)
            if after:
                self.event()
            return found

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


class Kills(Faults):
    """The same by a real SIGKILL of this process."""

    def strike(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Disk:
    """A disk of so many bytes under the store: what goes beyond is refused as the system refuses it."""

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
        """What the system says: at first that all is well, for another process takes the rest later."""
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

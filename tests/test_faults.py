"""What kills, full disks and signals leave of a store in the making: nothing half-written, and the same bytes after.

A fault strikes at one event of a run, counted: before a micro-batch, in the middle of a write, before and after a file
is synced and renamed. It is deterministic, and in this process: what SIGKILL would not do, such as removing temporary
files, is not done.
"""

import errno
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import numpy as np
import pytest
from helpers import Making, MemoryImages, content, encoded
from processes import FORKS, alive, exit_code, spawn, wait_for

from rdpm_cli import engine, files, signals
from rdpm_cli.codes import encode, writing
from rdpm_cli.errors import EXIT_STOPPED, RunError
from rdpm_cli.images import sources

IMAGES, SHARD, BATCH = 2000, 256, 64


class Killed(BaseException):
    """What stands for SIGKILL."""


class Faults:
    """Counts events, and strikes at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.patch = monkeypatch
        self.seen, self.strike_at, self.dead = 0, -1, False
        self._wrap(encode, "encode_part", after=False)
        self._wrap(os, "fsync")
        self._wrap(os, "replace")
        self._wrap(Path, "unlink")
        original = files.write_atomic

        def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
            original(path, lambda file: write(Interrupted(file, self)))  # type: ignore[arg-type]

        monkeypatch.setattr(files, "write_atomic", write_atomic)

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
            self.dead = True
            raise Killed

    def strike(self, event: int) -> None:
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
        self.faults.event()
        return self.file.write(whole[len(whole) // 2 :])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_file: Path) -> dict[str, bytes]:
    """The files of the store, written at one go."""
    work = big(tmp_path_factory.mktemp("whole") / "codes", tiny_tokenizer_file)
    work.finish()
    return content(work.root)


def big(root: Path, tokenizer_file: Path, **more: Any) -> Making:
    settings = {"views": 1, "latents": False, "shard_images": SHARD, "micro_batch": BATCH, **more}
    return Making(root, MemoryImages(IMAGES), tokenizer_file, **settings)


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_file: Path) -> int:
    """How many events a whole run has."""
    with pytest.MonkeyPatch.context() as patch:
        faults = Faults(patch)
        big(tmp_path_factory.mktemp("events") / "codes", tiny_tokenizer_file).finish()
        return faults.seen


def kill_and_resume(root: Path, tokenizer_file: Path, events: list[int], patch: pytest.MonkeyPatch) -> list[int]:
    """Run until each event in turn, then to the end. -> the source indices encoded, over all runs."""
    seen = encoded(patch)
    faults = Faults(patch)
    for event in events:
        faults.strike(event)
        with pytest.raises(Killed):
            big(root, tokenizer_file).finish()
    faults.end()
    big(root, tokenizer_file).finish()
    return seen


POINTS = [
    pytest.param(point, marks=[pytest.mark.long] if point >= 5 else []) for point in range(50)
]  # five in every run of the tests


@pytest.mark.parametrize("point", POINTS)
def test_bytes_do_not_depend_on_a_kill(
    point: int, events: int, whole: dict[str, bytes], tiny_tokenizer_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    event = int(np.random.default_rng(point).integers(1, events + 1))
    seen = kill_and_resume(tmp_path / "codes", tiny_tokenizer_file, [event], monkeypatch)
    assert content(tmp_path / "codes") == whole
    times = Counter(seen)
    assert set(times) == set(range(IMAGES))
    twice = sorted(index for index, count in times.items() if count > 1)
    assert len({index // SHARD for index in twice}) <= 1
    assert max(times.values()) <= 2


def test_bytes_do_not_depend_on_being_killed_again_and_again(
    events: int, whole: dict[str, bytes], tiny_tokenizer_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = kill_and_resume(tmp_path / "codes", tiny_tokenizer_file, [40, 7, 3, 90, 5], monkeypatch)
    assert content(tmp_path / "codes") == whole
    assert len({index // SHARD for index, count in Counter(seen).items() if count > 1}) <= 5


# ---- a disk that is full -------------------------------------------------------------------------------------------


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
        return self.size - sum(path.stat().st_size for path in self.root.iterdir())

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


@pytest.mark.parametrize("tenth", range(10))
def test_a_full_disk_is_told_and_the_run_goes_on_after(
    tenth: int, whole: dict[str, bytes], tiny_tokenizer_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "codes"
    size = sum(map(len, whole.values())) + 2000  # and run.json
    with monkeypatch.context() as patch:
        Disk(root, size * tenth // 10 + 50, patch)
        with pytest.raises(
            RunError, match=r"disk full: .*codes needs [\d.]+ MB more, [-\d.]+ (MB|GB) are free"
        ) as caught:
            big(root, tiny_tokenizer_file).finish()
    assert (caught.value.exit_code, "free some space" in caught.value.hint) == (1, True)
    assert not list(root.glob(".*.tmp"))
    assert not (root / "manifest.json").exists()
    big(root, tiny_tokenizer_file).finish()
    assert content(root) == whole


def test_other_errors_of_the_system_are_not_taken_for_a_full_disk(
    tiny_tokenizer_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(writing, "write_shard", fail)
    with pytest.raises(OSError, match="input/output"):
        big(tmp_path / "codes", tiny_tokenizer_file).finish()


@pytest.mark.parametrize("number", [errno.EDQUOT, errno.ENOSPC])
def test_what_is_full_beside_the_disk_keeps_the_systems_text(
    number: int, tiny_tokenizer_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(writing, "write_shard", fail)
    with pytest.raises(RunError, match=rf"cannot be written: {os.strerror(number)}, though .* are free") as caught:
        big(tmp_path / "codes", tiny_tokenizer_file).finish()
    assert "quota" in caught.value.hint


# ---- signals -------------------------------------------------------------------------------------------------------


def slow_command(images: int, pause: float, args: list[str]) -> None:
    """Be `rdpm tokenize memory OUT ...` on images that take a while."""
    paused_command(images, lambda _: pause, args)


def hanging_command(images: int, at: int, args: list[str]) -> None:
    """The same where reading one image never ends."""
    paused_command(images, lambda index: 1000 if index == at else 0, args)


def paused_command(images: int, pause: Callable[[int], float], args: list[str]) -> None:
    class Slow(MemoryImages):
        def open(self, index: int) -> Any:
            time.sleep(pause(index))
            return super().open(index)

    def open_source(spec: str) -> sources.ImageSource:
        return Slow(images)

    sources.open_source = open_source
    sys.argv = ["rdpm", *args]
    from rdpm_cli.cli import main

    main()


@pytest.fixture
def command(tmp_path: Path, tiny_tokenizer_file: Path) -> list[str]:
    fixed = ["--tokenizer", str(tiny_tokenizer_file), "--shard-size", "128", "--device", "cpu", "--quiet"]
    return ["tokenize", "memory", str(tmp_path / "codes"), *fixed]


def begun(root: Path, target: Callable[..., None], *args: Any) -> tuple[ForkServerProcess, int]:
    """A command that has written the first shard of its store, and its process id."""
    process = spawn(target, *args)
    wait_for((root / "index-00000.npy").exists, process)
    assert process.pid is not None
    return process, process.pid


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize(
    ("number", "workers", "code"),
    [
        (signal.SIGTERM, 1, EXIT_STOPPED),
        (signal.SIGTERM, 3, EXIT_STOPPED),
        (signal.SIGUSR1, 3, EXIT_STOPPED),
        (signal.SIGINT, 3, 130),
        (signal.SIGKILL, 3, -signal.SIGKILL),
    ],
)
def test_a_signal_leaves_whole_shards_and_no_process(
    number: signal.Signals, workers: int, code: int, command: list[str], tiny_tokenizer_file: Path, tmp_path: Path
) -> None:
    root = tmp_path / "codes"
    process, pid = begun(root, slow_command, 640, 0.002, [*command, "--workers", str(workers)])
    crew = children(pid)
    assert len(crew) == (workers if workers > 1 else 0)
    os.kill(pid, number)
    assert exit_code(process, 20) == code
    wait_until_gone(crew)
    assert not (root / "manifest.json").exists()
    if number != signal.SIGKILL:
        assert not list(root.glob(".*.tmp"))
    again, alone = (Making(place, MemoryImages(640), tiny_tokenizer_file, **SMALL) for place in (root, tmp_path / "a"))
    assert 0 < len(writing.missing_shards(root, again.plan)) < 5
    again.finish()
    alone.finish()
    assert content(root) == content(alone.root)


SMALL: dict[str, Any] = {"views": 1, "latents": False, "shard_images": 128}


def wait_until_gone(pids: list[int]) -> None:
    spare = FORKS.Process(target=signal.pause)
    spare.start()
    wait_for(lambda: not any(alive(pid) for pid in pids), spare, 20)
    spare.kill()


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_a_read_that_hangs(
    number: signal.Signals, workers: int, command: list[str], tiny_tokenizer_file: Path, tmp_path: Path
) -> None:
    root = tmp_path / "codes"
    process, pid = begun(root, hanging_command, 256, 200, [*command, "--workers", str(workers)])
    crew = children(pid)
    time.sleep(0.5)  # for it to hang
    start = time.monotonic()
    os.kill(pid, number)
    assert exit_code(process, 20) == EXIT_STOPPED
    assert time.monotonic() - start < signals.PATIENCE + 3
    wait_until_gone(crew)
    assert not list(root.glob(".*.tmp"))
    again = Making(root, MemoryImages(256), tiny_tokenizer_file, **SMALL)
    assert writing.missing_shards(root, again.plan) == [1]


def test_the_whole_group_may_get_the_signal(command: list[str], tmp_path: Path) -> None:
    """Launchers signal groups: the workers leave it to their parent."""
    process, pid = begun(tmp_path / "codes", in_own_group, 640, 0.002, [*command, "--workers", "2"])
    os.killpg(pid, signal.SIGTERM)
    assert exit_code(process, 20) == EXIT_STOPPED


def in_own_group(*args: Any) -> None:
    os.setpgid(0, 0)
    slow_command(*args)


def test_a_finished_store_of_workers_is_that_of_one_process(command: list[str], tmp_path: Path) -> None:
    process = spawn(slow_command, 640, 0.0, [*command, "--workers", "3"])
    assert exit_code(process) == 0
    assert engine.verify(tmp_path / "codes").values["images"] == 640

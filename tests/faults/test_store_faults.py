"""What kills, full disks and signals leave of a store in the making: nothing half-written, and the same bytes after.

A kill strikes at one event of a run, counted: before a micro-batch, or one of the disk (injection.py).
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
from typing import Any

import numpy as np
import pytest
from helpers import Making, MemoryImages, content, encoded
from injection import Disk, Faults, Killed
from processes import children, exit_code, spawn, wait_for, wait_until_gone
from rows import Rows

from rdpm_cli import engine, signals
from rdpm_cli.codes import encode, writing
from rdpm_cli.errors import EXIT_STOPPED, RunError
from rdpm_cli.images import sources

IMAGES, SHARD, BATCH = 2000, 256, 64


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
        faults = store_faults(patch)
        big(tmp_path_factory.mktemp("events") / "codes", tiny_tokenizer_file).finish()
        return faults.seen


def store_faults(patch: pytest.MonkeyPatch) -> Faults:
    """A micro-batch that begins is an event too."""
    faults = Faults(patch)
    faults.also_before(encode, "encode_part")
    return faults


def kill_and_resume(root: Path, tokenizer_file: Path, events: list[int], patch: pytest.MonkeyPatch) -> list[int]:
    """Run until each event in turn, then to the end. -> the source indices encoded, over all runs."""
    seen = encoded(patch)
    faults = store_faults(patch)
    for event in events:
        faults.aim(event)
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
    monkeypatch: pytest.MonkeyPatch, rows: Rows,
) -> None:  # fmt: skip
    event = int(np.random.default_rng(point).integers(1, events + 1))
    with rows.count("kills while tokenising 2,000 images, the store's bytes after"):
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


@pytest.mark.parametrize("tenth", range(10))
def test_a_full_disk_is_told_and_the_run_goes_on_after(
    tenth: int, whole: dict[str, bytes], tiny_tokenizer_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    rows: Rows,
) -> None:  # fmt: skip
    root = tmp_path / "codes"
    size = sum(map(len, whole.values())) + 2000  # and run.json
    with monkeypatch.context() as patch, rows.count("disk full while tokenising"):
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

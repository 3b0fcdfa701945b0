"""Kills, full disks, flipped bytes and signals while a store is made: nothing half-written, and the same bytes after.

A kill strikes at one event of a run, counted: before a micro-batch, or one of the disk (injection.py)."""

import os
import shutil
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
from injection import Disk, Faults, Killed
from processes import children, exit_code, spawn, wait_for, wait_until_gone
from rows import Rows
from stores import Making, MemoryImages, content, encoded, flip

from rdpm_cli.codes import write
from rdpm_cli.codes.store import verify
from rdpm_cli.codes.write import unwritten_shards
from rdpm_cli.errors import EXIT_STOPPED, DataError, RunError

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
    faults.also_before(write, "prepare_and_encode")
    return faults


POINTS = [
    pytest.param(point, marks=[pytest.mark.long] if point >= 5 else []) for point in range(50)
]  # five in every run of the tests


@pytest.mark.parametrize("point", POINTS)
def test_bytes_do_not_depend_on_a_kill_or_several(
    point: int, events: int, whole: dict[str, bytes], tiny_tokenizer_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, rows: Rows,
) -> None:  # fmt: skip
    kills = [int(np.random.default_rng(point).integers(1, events + 1))] if point else [40, 7, 3, 90, 5]
    root, indices, faults = tmp_path / "codes", encoded(monkeypatch), store_faults(monkeypatch)
    with rows.count("kills while tokenising 2,000 images, the store's bytes after"):
        for event in kills:
            faults.aim(event)
            with pytest.raises(Killed):
                big(root, tiny_tokenizer_file).finish()
        faults.end()
        big(root, tiny_tokenizer_file).finish()
        assert content(root) == whole
        times = Counter(indices)
        assert set(times) == set(range(IMAGES))
        assert len({index // SHARD for index, count in times.items() if count > 1}) <= len(kills)
        assert max(times.values()) <= len(kills) + 1


# ---- a disk that is full -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tenth", range(10))
def test_a_full_disk_is_reported_and_the_run_goes_on_after(
    tenth: int, whole: dict[str, bytes], tiny_tokenizer_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    rows: Rows,
) -> None:  # fmt: skip
    root = tmp_path / "codes"
    size = sum(map(len, whole.values())) + 2000  # and run.json
    with monkeypatch.context() as patch, rows.count("disk full while tokenising"):
        Disk(root, size * tenth // 10 + 50, patch)
        with pytest.raises(RunError) as caught:
            big(root, tiny_tokenizer_file).finish()
    assert (caught.value.exit_code, str(root) in caught.value.message) == (1, True)
    assert "disk full" in caught.value.message
    assert not list(root.glob(".*.tmp"))
    assert not (root / "manifest.json").exists()
    big(root, tiny_tokenizer_file).finish()
    assert content(root) == whole


# ---- damaged and deleted files -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_file: Path) -> Path:
    """A finished store of 36 images in shards of 10, two of them left out. Read only."""
    root = tmp_path_factory.mktemp("finished") / "codes"
    small(root, tiny_tokenizer_file).finish()
    return root


def small(root: Path, tokenizer_file: Path) -> Making:
    source = MemoryImages(36, bad=(4, 30))
    return Making(root, source, tokenizer_file, on_bad="skip", max_bad=0.1, micro_batch=4)


@pytest.fixture
def copy(finished: Path, tmp_path: Path, tiny_tokenizer_file: Path) -> Making:
    """A copy that a test may damage, to be written on."""
    return small(Path(shutil.copytree(finished, tmp_path / "codes")), tiny_tokenizer_file)


NAMES = ["codes-00000.npy", "labels-00001.npy", "index-00002.npy", "latents-00003.npy", "bad.jsonl", "tokenizer.pt"]


@pytest.mark.parametrize("name", [*NAMES, "names.jsonl"])
def test_a_damaged_file_is_named_and_deleting_it_makes_it_again(
    name: str, copy: Making, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip(copy.root / name, -3)
    with pytest.raises(DataError) as caught:
        verify(copy.root)
    assert [line.split()[0] for line in caught.value.message.splitlines()[1:]] == [name]
    (copy.root / name).unlink()
    indices = encoded(monkeypatch)
    copy.cut(1)  # the manifest has gone by then; what it recorded is noted shard by shard
    assert not (copy.root / "manifest.json").exists()
    copy.finish()
    assert len({index // 10 for index in indices}) == {"bad.jsonl": 2, "tokenizer.pt": 0, "names.jsonl": 0}.get(name, 1)
    assert content(copy.root) == content(finished)


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_broken_manifest_is_refused_until_it_is_deleted(text: str, copy: Making, finished: Path) -> None:
    (copy.root / "manifest.json").write_text(text)
    for look in (lambda: verify(copy.root), lambda: next(copy.run())):
        with pytest.raises(DataError, match=r"manifest\.json") as caught:
            look()
        assert "delete" in caught.value.hint
    (copy.root / "manifest.json").unlink()
    copy.finish()
    assert content(copy.root) == content(finished)


# ---- signals -------------------------------------------------------------------------------------------------------


def slow_command(images: int, pause: float, args: list[str]) -> None:
    """Be `rdpm tokenize memory OUT ...` on images that take a while."""

    class Slow(MemoryImages):
        def open(self, index: int) -> Any:
            time.sleep(pause)
            return super().open(index)

    from rdpm_cli.tokenizer import inputs

    setattr(inputs, "open_source", lambda spec: Slow(images))  # noqa: B010
    sys.argv = ["rdpm", *args]
    from rdpm_cli.cli import main

    main()


@pytest.fixture
def command(tmp_path: Path, tiny_tokenizer_file: Path) -> list[str]:
    fixed = ["--tokenizer", str(tiny_tokenizer_file), "--shard-size", "128", "--device", "cpu", "--quiet"]
    return ["tokenize", "memory", str(tmp_path / "codes"), *fixed]


def started(root: Path, target: Callable[..., None], *args: Any) -> tuple[ForkServerProcess, int]:
    """A command that has written the first shard of its store, and its process id."""
    process = spawn(target, *args)
    wait_for((root / "note-00000.json").exists, process)
    assert process.pid is not None
    return process, process.pid


SMALL: dict[str, Any] = {"views": 1, "latents": False, "shard_images": 128}


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
    process, pid = started(root, slow_command, 640, 0.002, [*command, "--workers", str(workers)])
    pids = children(pid)
    assert len(pids) == (workers if workers > 1 else 0)
    os.kill(pid, number)
    assert exit_code(process, 20) == code
    wait_until_gone(pids)
    assert not (root / "manifest.json").exists()
    if number != signal.SIGKILL:
        assert not list(root.glob(".*.tmp"))
    resumed, alone = (
        Making(place, MemoryImages(640), tiny_tokenizer_file, **SMALL) for place in (root, tmp_path / "a")
    )
    assert 0 < len(unwritten_shards(root, resumed.plan)) < 5
    resumed.finish()
    alone.finish()
    assert content(root) == content(alone.root)


def test_a_worker_killed_from_outside_leaves_whole_shards(
    command: list[str], tiny_tokenizer_file: Path, tmp_path: Path
) -> None:
    root = tmp_path / "codes"
    process, pid = started(root, slow_command, 640, 0.002, [*command, "--workers", "3"])
    pids = children(pid)
    os.kill(pids[0], signal.SIGKILL)
    assert exit_code(process, 20) == 1
    wait_until_gone(pids)
    resumed = Making(root, MemoryImages(640), tiny_tokenizer_file, **SMALL)
    assert 0 not in unwritten_shards(root, resumed.plan)
    resumed.finish()
    assert verify(root).images == 640


def test_the_whole_group_may_get_the_signal(command: list[str], tmp_path: Path) -> None:
    """Launchers signal groups: the workers leave it to their parent."""
    process, pid = started(tmp_path / "codes", in_own_group, 640, 0.002, [*command, "--workers", "2"])
    os.killpg(pid, signal.SIGTERM)
    assert exit_code(process, 20) == EXIT_STOPPED


def in_own_group(*args: Any) -> None:
    os.setpgid(0, 0)
    slow_command(*args)

"""Making a store: interrupted and resumed, with items that cannot be read, by several processes."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from processes import command_line, exit_code, spawn, wait_for
from stores import Making, MemoryImages, content, encoded

from rdpm_cli.cli.app import run as run_cli
from rdpm_cli.codes import write
from rdpm_cli.codes.store import CodeStore, Manifest
from rdpm_cli.codes.write import Work, missing_shards
from rdpm_cli.errors import DataError, ImageError, RunError, UsageError

MakeStore = Callable[..., Making]
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture
def making(tmp_path: Path, tiny_tokenizer_file: Path) -> MakeStore:
    """making(name="codes", count=40, bad=(), **settings): a store of images in memory, in shards of 10."""

    def make(name: str = "codes", count: int = 40, bad: Any = (), **settings: Any) -> Making:
        options = {"views": 1, "latents": False, "micro_batch": 4, **settings}
        return Making(tmp_path / name, MemoryImages(count, bad), tiny_tokenizer_file, **options)

    return make


# ---- interrupted and resumed ---------------------------------------------------------------------------------------

SHAPES: list[dict[str, Any]] = [{}, {"views": 4, "flip": True, "latents": True}]


@pytest.mark.parametrize("settings", SHAPES)
@pytest.mark.parametrize("pieces", [1, 2, 4, 6])
def test_bytes_do_not_depend_on_an_interruption(making: MakeStore, settings: dict[str, Any], pieces: int) -> None:
    """One piece: before the first image; two: inside the first shard; four: between shards; six: inside the second."""
    cut, whole = making(**settings), making("whole", **settings)
    cut.cut(pieces)
    assert missing_shards(cut.root, cut.plan) == ([0, 1, 2, 3] if pieces < 4 else [1, 2, 3])
    assert not (cut.root / "manifest.json").exists()
    cut.finish()
    whole.finish()
    assert content(cut.root) == content(whole.root)


def test_bytes_do_not_depend_on_a_kill_in_the_middle_of_a_write(making: MakeStore) -> None:
    """SIGKILL leaves a temporary file of a process that has gone, and shards without their index."""
    cut, whole = making(), making("whole")
    cut.cut(5)
    (cut.root / "codes-00001.npy").write_bytes(b"of a shard without index")
    (cut.root / ".labels-00001.npy.4194999.tmp").write_bytes(b"half")
    cut.finish()
    whole.finish()
    assert content(cut.root) == content(whole.root)


def test_finished_shards_are_not_encoded_again(making: MakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = making(micro_batch=10)
    cut.cut(2)
    assert missing_shards(cut.root, cut.plan) == [1, 2, 3]
    indices = encoded(monkeypatch)
    assert next(cut.run()) == 10
    cut.finish()
    assert indices == list(range(10, 40))


@pytest.mark.parametrize("name", ["index-00002.npy", "codes-00002.npy", "labels-00002.npy"])
def test_a_shard_without_one_of_its_files_is_made_again(
    making: MakeStore, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = making()
    one.finish()
    original = content(one.root)
    (one.root / name).unlink()
    indices = encoded(monkeypatch)
    one.finish()
    assert indices == list(range(20, 30))
    assert content(one.root) == original


def test_a_finished_store_is_left_alone(making: MakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    one = making()
    one.finish()
    original = content(one.root)
    (one.root / ".run.json.99.tmp").write_text("half")  # of a kill
    (one.root / "sums-00000.json").write_text("{}")  # of a kill between the manifest and the last removal
    indices = encoded(monkeypatch)
    assert list(one.run()) == [40]
    assert (indices, content(one.root)) == ([], original)


# ---- folders that are refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("settings", "token"),
    [
        ({"views": 2}, "views: 1 -> 2"),
        ({"seed": 7}, "settings: seed: 0 -> 7"),
        ({"views": 2, "flip": True}, "flip: False -> True"),
        ({"latents": True}, "latents: False -> True"),
        ({"shard_images": 9}, "shard_images: 10 -> 9"),
        ({"count": 41}, "data.count: 40 -> 41"),
    ],
)
def test_other_settings_are_refused_by_name(
    making: MakeStore, settings: dict[str, Any], token: str, finished: bool
) -> None:
    first = making()
    first.cut(1)
    if finished:
        first.finish()
    original = content(first.root)
    with pytest.raises(UsageError) as caught:
        next(making(**settings).run())
    assert (caught.value.exit_code, bool(caught.value.hint)) == (2, True)
    assert token in caught.value.message
    assert "noise" not in caught.value.message  # another seed draws other noise, which says nothing more
    assert content(first.root) == original


def test_another_tokenizer_is_refused(making: MakeStore) -> None:
    first, second = making(), making()
    first.cut(1)
    second.plan = second.plan.model_copy(update={"tokenizer": "0" * 64})
    with pytest.raises(UsageError) as caught:
        next(second.run())
    assert "tokenizer: " in caught.value.message


@pytest.mark.parametrize(("name", "text"), [("thesis.tex", "precious"), ("run.json", '{"recipe": {"seed": 0}}')])
def test_a_folder_of_something_else_is_refused_and_left_alone(making: MakeStore, name: str, text: str) -> None:
    foreign = making()
    foreign.root.mkdir()
    (foreign.root / name).write_text(text)
    with pytest.raises(UsageError) as caught:
        next(foreign.run())
    assert (caught.value.exit_code, str(foreign.root) in caught.value.message) == (2, True)
    assert (foreign.root / name).read_text() == text


def test_a_second_writer_is_refused_and_the_first_goes_on(making: MakeStore) -> None:
    first, second = making(), making()
    running = first.run()
    done = next(running)
    with pytest.raises(RunError) as caught:
        next(second.run())
    assert (caught.value.exit_code, f"pid {os.getpid()}" in caught.value.message) == (1, True)
    assert done + sum(running) == 40
    assert len(CodeStore(first.root)) == 40


def disk_with(free_bytes: int) -> Callable[[object], Any]:
    return lambda path: SimpleNamespace(f_bavail=free_bytes, f_frsize=1)


def test_a_full_disk_is_noticed_before_the_first_image(making: MakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    tight, roomy = making(), making("roomy")
    roomy.finish()
    size = sum(map(len, content(roomy.root).values()))
    indices = encoded(monkeypatch)
    monkeypatch.setattr(os, "statvfs", disk_with(size // 2))
    with pytest.raises(RunError) as caught:
        next(tight.run())
    assert (caught.value.exit_code, str(tight.root) in caught.value.message, indices) == (1, True, [])
    monkeypatch.setattr(os, "statvfs", disk_with(2 * size))
    assert len(tight.finish()) == 40


def test_resuming_needs_room_for_what_is_missing_only(making: MakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = making(latents=True)
    cut.cut(10)
    assert missing_shards(cut.root, cut.plan) == [3]
    shard = sum(p.stat().st_size for p in cut.root.glob("*-00000.npy"))
    others = sum((cut.root / name).stat().st_size for name in ("tokenizer.pt", "names.jsonl"))
    monkeypatch.setattr(os, "statvfs", disk_with(shard + others + 4 * write.MANIFEST_BYTES))
    assert len(cut.finish()) == 40


# ---- items that cannot be read -------------------------------------------------------------------------------------

BAD = (3, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 39)  # one, the whole second shard, the last image


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_bad_image_stops_with_its_name(making: MakeStore, workers: int) -> None:
    broken = making(bad=(17, 23, 9), workers=workers)
    with pytest.raises(ImageError) as caught:
        broken.finish()
    assert (caught.value.exit_code, caught.value.name) == (3, "a/00009.png")
    assert "a/00009.png" in caught.value.message
    assert "--on-bad skip" in caught.value.hint
    assert not (broken.root / "manifest.json").exists()
    assert not (broken.root / "bad.jsonl").exists()


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("settings", SHAPES)
def test_skipped_images_move_nothing(making: MakeStore, workers: int, settings: dict[str, Any]) -> None:
    whole = making("whole", **settings).finish()
    some = making(bad=BAD, on_bad="skip", max_bad=0.5, workers=workers, **settings).finish()
    m, views = some.manifest, some.manifest.views
    good = [i for i in range(40) if i not in BAD]
    assert (m.images, m.rows, m.bad, len(some)) == (28, 28 * views, 12, 28 * views)
    assert [s.images for s in m.shards] == [9, 0, 10, 9]
    assert some.index.tolist() == np.repeat(good, views).tolist()
    rows, same = np.arange(len(some)), np.flatnonzero(np.isin(whole.index, good))
    assert np.array_equal(some.codes(rows), whole.codes(same))
    assert np.array_equal(some.columns["labels"], whole.columns["labels"][same])
    assert np.array_equal(some.view(rows), whole.view(same))
    if settings:
        assert np.array_equal(some.latents(rows), whole.latents(same))


def test_bad_images_are_listed_in_order_and_belong_to_the_store(making: MakeStore) -> None:
    one = making(bad=BAD, on_bad="skip", max_bad=0.5)
    one.finish()
    listed = [json.loads(line) for line in (one.root / "bad.jsonl").read_text().splitlines()]
    assert [line["index"] for line in listed] == list(BAD)
    assert listed[0] == {"index": 3, "name": "a/00003.png", "reason": "image file is truncated <object>"}
    cut = making("cut", bad=BAD, on_bad="skip", max_bad=0.5, workers=2)
    cut.cut(6)
    cut.finish()
    assert content(cut.root) == content(one.root)
    assert not list(one.root.glob("bad-*"))


def test_without_bad_images_skip_is_stop(making: MakeStore) -> None:
    stop, skip = making(), making("skip", on_bad="skip")
    stop.finish()
    skip.finish()
    assert content(stop.root) == content(skip.root)


def test_too_many_bad_images_fail_at_the_end(making: MakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = making(bad=BAD, on_bad="skip", max_bad=0.25)
    with pytest.raises(DataError) as caught:
        broken.finish()
    assert all(token in caught.value.message for token in ("12 of 40", "a/00003.png", "--max-bad", "bad.jsonl"))
    assert len((broken.root / "bad.jsonl").read_text().splitlines()) == 12
    assert not (broken.root / "manifest.json").exists()
    indices = encoded(monkeypatch)
    with pytest.raises(ImageError) as stopped:  # left out before; now they may no longer be
        making(bad=BAD).finish()
    assert stopped.value.name == "a/00003.png"
    assert making(bad=BAD, on_bad="skip", max_bad=0.3).finish().manifest.bad == 12
    assert not indices


def test_a_share_of_bad_images_is_rounded_up(making: MakeStore) -> None:
    assert making(bad=[7], on_bad="skip", max_bad=0.0001).finish().manifest.bad == 1
    with pytest.raises(DataError):
        making("none", bad=[7], on_bad="skip", max_bad=0).finish()
    with pytest.raises(DataError) as caught:
        making("all", bad=range(40), on_bad="skip", max_bad=1).finish()
    assert "memory:40" in caught.value.message
    assert [Work(max_bad=share).bad_allowed(100) for share in (0.07, 0.29, 0.0701)] == [7, 29, 8]


def test_images_that_can_be_read_again_return_at_the_next_run(
    making: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError):
        making(bad=range(5, 25), on_bad="skip", max_bad=0.1).finish()
    indices = encoded(monkeypatch)
    back, fresh = (making(name, bad=(7,), on_bad="skip", max_bad=0.1) for name in ("codes", "fresh"))
    assert back.finish().manifest.bad == 1
    assert indices == list(range(30))
    fresh.finish()
    assert content(back.root) == content(fresh.root)


def test_a_repaired_image_returns_when_its_shard_is_deleted(making: MakeStore) -> None:
    making(bad=BAD, on_bad="skip", max_bad=0.5).finish()
    root = making().root
    (root / "index-00000.npy").unlink()
    resumed = making(bad=BAD[1:], on_bad="skip", max_bad=0.5).finish()
    assert [s.images for s in resumed.manifest.shards] == [10, 0, 10, 9]
    assert 3 not in [json.loads(line)["index"] for line in (root / "bad.jsonl").read_text().splitlines()]


def test_deleting_the_list_of_bad_images_makes_their_shards_again(
    making: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = making(bad=BAD, on_bad="skip", max_bad=0.5)
    first.finish()
    original = content(first.root)
    (first.root / "bad.jsonl").unlink()
    indices = encoded(monkeypatch)
    first.finish()
    assert indices == [*range(20), *range(30, 40)]
    assert content(first.root) == original


# ---- several processes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", SHAPES)
@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize("pieces", [0, 9])
def test_bytes_do_not_depend_on_the_number_of_processes(
    making: MakeStore, settings: dict[str, Any], workers: int, pieces: int
) -> None:
    """Also if the store was interrupted and continued with another number."""
    alone, several = making("alone", **settings), making("several", workers=workers, **settings)
    alone.finish()
    several.cut(pieces)
    making("several", workers=6 - workers, **settings).finish()
    assert content(several.root) == content(alone.root)


def test_bytes_do_not_depend_on_the_threads_of_the_process_that_forks(making: MakeStore) -> None:
    """A process that has convolved on several threads, as training does, is one whose forks may hang."""
    alone, several = making("alone", views=2), making("several", views=2, workers=2)
    alone.finish()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.nn.functional.conv2d(torch.randn(16, 8, 64, 64), torch.randn(8, 8, 3, 3))
        several.finish()
    finally:
        torch.set_num_threads(threads)
    assert content(several.root) == content(alone.root)


class Deadly(MemoryImages):
    """Images of which one kills the process that reads it, as the system does when memory runs out."""

    def open(self, index: int) -> Any:
        if index == 25 and os.getpid() != self.parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().open(index)

    parent = os.getpid()


def test_a_killed_worker_leaves_the_finished_shards(making: MakeStore, tiny_tokenizer_file: Path) -> None:
    one, whole = making(workers=2), making("whole")
    one.source = Deadly(40)
    one.source.parent = os.getpid()
    with pytest.raises(RunError) as caught:
        one.finish()
    assert (caught.value.exit_code, "--workers" in caught.value.hint) == (1, True)
    assert set(missing_shards(one.root, one.plan)) <= {1, 2, 3}
    making(workers=2).finish()
    whole.finish()
    assert content(one.root) == content(whole.root)


# ---- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def command(image_folder: Path, tiny_tokenizer_file: Path, tmp_path: Path) -> list[str]:
    fixed = ["--tokenizer", str(tiny_tokenizer_file), "--device", "cpu", "--quiet", "--json"]
    return ["tokenize", str(image_folder), str(tmp_path / "codes"), *fixed]


def answer(args: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert run_cli(args) == 0
    values: dict[str, Any] = json.loads(capsys.readouterr().out)
    return values


def test_tokenize_reports_the_store_it_wrote(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = answer(command, capsys)
    m = Manifest.load(tmp_path / "codes")
    assert values["digest"] == m.digest()
    assert (values["images"], values["views"], values["shape"]) == (36, 1, [4, 4, 4])
    assert (m.latents, m.views, (tmp_path / "codes" / "latents-00000.npy").exists()) == (False, 1, False)
    assert values["bytes"] == sum(p.stat().st_size for p in (tmp_path / "codes").glob("*.npy"))
    assert answer(command, capsys) == values  # finished already


def test_every_option_reaches_the_store(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--views", "2", "--flip", "--keep", "latents", "--shard-size", "10", "--seed", "5", "--workers", "2"]
    answer([*command, *more], capsys)
    m = Manifest.load(tmp_path / "codes")
    assert (m.views, m.flip, m.latents, m.shard_images, m.seed) == (2, True, True, 10, 5)
    assert json.loads((tmp_path / "codes" / "run.json").read_text())["workers"] == 2


@pytest.mark.parametrize(
    "option",
    [
        ["--micro-batch", "4"], ["--precision", "bf16"], ["--batch-size", "4"], ["--workers", "0"],
        ["--keep", "codes"], ["--on-bad", "go-on"], ["--max-bad", "2"], ["--shard-size", "0"],
    ],
)  # fmt: skip
def test_values_that_cannot_be_are_usage_errors(
    option: list[str], command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli([*command, *option]) == 2
    assert option[0] in capsys.readouterr().err
    assert not (tmp_path / "codes").exists()


def test_images_without_classes_are_refused_before_anything_is_written(
    command: list[str], image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli([command[0], str(image_folder / "a"), *command[2:]]) == 3
    assert str(image_folder / "a") in capsys.readouterr().err
    assert not (tmp_path / "codes").exists()


def test_a_store_with_bad_images_is_reconstructed(
    command: list[str], image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    for path in sorted(image_folder.rglob("*.*")):
        (images / path.parent.name).mkdir(parents=True, exist_ok=True)
        (images / path.parent.name / path.name).write_bytes(path.read_bytes())
    (images / "a" / "00.png").write_bytes((images / "a" / "00.png").read_bytes()[:60])
    (images / "b" / "01.png").write_bytes(b"")
    command = [command[0], str(images), *command[2:]]
    assert run_cli(command) == 3
    assert "a/00.png" in capsys.readouterr().err
    assert run_cli([*command, "--on-bad", "skip"]) == 3
    assert "2 of 36" in capsys.readouterr().err
    values = answer([*command, "--on-bad", "skip", "--max-bad", "0.1"], capsys)
    assert (values["images"], values["bad"]) == (34, 2)
    recon = ["reconstruct", str(tmp_path / "codes"), str(tmp_path / "recon"), "--device", "cpu", "--quiet", "--json"]
    assert answer(recon, capsys)["n"] == 34


@pytest.mark.slow
def test_two_ranks_write_the_same_store(command: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    more = ["--shard-size", "7"]
    alone = answer([*command, *more], capfd)
    several = answer([*command[:2], str(tmp_path / "ranks"), *command[3:], *more, "--gpus", "2"], capfd)
    assert several["digest"] == alone["digest"]
    assert content(tmp_path / "ranks") == content(tmp_path / "codes")


@pytest.mark.slow
def test_two_ranks_stop_on_a_signal_and_go_on(command: list[str], tmp_path: Path) -> None:
    long = ["tokenize", "digits", *command[2:], "--shard-size", "50", "--views", "20", "--gpus", "2", "--workers", "2"]
    process = spawn(command_line, long, {})
    wait_for((tmp_path / "codes" / "index-00000.npy").exists, process)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGTERM)
    assert exit_code(process, 60) == 75
    assert not (tmp_path / "codes" / "manifest.json").exists()
    assert exit_code(spawn(command_line, long, {}), 300) == 0
    assert exit_code(spawn(command_line, ["verify", str(tmp_path / "codes")], {})) == 0

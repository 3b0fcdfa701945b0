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
from rdpm_cli.codes.store import Manifest
from rdpm_cli.codes.write import shards_of, shards_text, unwritten_shards
from rdpm_cli.errors import DataError, ImageError, RunError, UsageError

MakeStore = Callable[..., Making]


@pytest.fixture
def making(tmp_path: Path, tiny_tokenizer_file: Path) -> MakeStore:
    """making(name="codes", count=40, bad=(), **settings): a store of images in memory, in shards of 10."""

    def make(name: str = "codes", count: int = 40, bad: Any = (), **settings: Any) -> Making:
        options = {"views": 1, "latents": False, "micro_batch": 4, **settings}
        return Making(tmp_path / name, MemoryImages(count, bad), tiny_tokenizer_file, **options)

    return make


def assert_same_store(one: Making, other: Making) -> None:
    """Finish both: equal bytes."""
    one.finish()
    other.finish()
    assert content(one.root) == content(other.root)


# ---- interrupted and resumed ---------------------------------------------------------------------------------------

SHAPES: list[dict[str, Any]] = [{}, {"views": 4, "flip": True, "latents": True}]


@pytest.mark.parametrize("settings", SHAPES)
@pytest.mark.parametrize("pieces", [1, 2, 4, 6])
def test_bytes_do_not_depend_on_an_interruption(making: MakeStore, settings: dict[str, Any], pieces: int) -> None:
    """One piece: before the first image; two: inside the first shard; four: between shards; six: inside the second."""
    cut = making(**settings)
    cut.cut(pieces)
    assert unwritten_shards(cut.root, cut.plan) == ([0, 1, 2, 3] if pieces < 4 else [1, 2, 3])
    assert not (cut.root / "manifest.json").exists()
    assert_same_store(cut, making("whole", **settings))


def test_finished_shards_are_not_encoded_again(making: MakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = making(micro_batch=10)
    cut.cut(2)
    indices = encoded(monkeypatch)
    assert next(cut.run()) == 10
    cut.finish()
    assert indices == list(range(10, 40))


def test_a_finished_store_is_left_alone(making: MakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    one = making()
    one.finish()
    original = content(one.root)
    (one.root / ".run.json.99.tmp").write_text("half")  # of a kill
    (one.root / "note-00000.json").write_text("{}")  # of a kill between the manifest and the last removal
    indices = encoded(monkeypatch)
    assert list(one.run()) == [40]
    assert (indices, content(one.root)) == ([], original)


# ---- folders that are refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("settings", "token"),
    [
        ({"seed": 7}, "seed: 0 -> 7"),
        ({"views": 2, "flip": True}, "flip: False -> True"),
        ({"shard_images": 9}, "shard_images: 10 -> 9"),
        ({"count": 41}, "data.count: 40 -> 41"),
        ({"tokenizer": "0" * 64}, "tokenizer: "),
    ],
)
def test_other_settings_are_refused_by_name(
    making: MakeStore, settings: dict[str, Any], token: str, finished: bool
) -> None:
    settings = dict(settings)
    first, tokenizer = making(), settings.pop("tokenizer", None)
    first.cut(1)
    if finished:
        first.finish()
    original, second = content(first.root), making(**settings)
    if tokenizer:
        second.plan = second.plan.model_copy(update={"tokenizer": tokenizer})
    with pytest.raises(UsageError) as caught:
        next(second.run())
    assert (caught.value.exit_code, bool(caught.value.hint)) == (2, True)
    assert token in caught.value.message
    assert content(first.root) == original


@pytest.mark.parametrize(("name", "text"), [("thesis.tex", "precious"), ("run.json", '{"recipe": {"seed": 0}}')])
def test_a_folder_of_something_else_is_refused_and_left_alone(making: MakeStore, name: str, text: str) -> None:
    foreign = making()
    foreign.root.mkdir()
    (foreign.root / name).write_text(text)
    with pytest.raises(UsageError, match=str(foreign.root)):
        next(foreign.run())
    assert (foreign.root / name).read_text() == text


def test_a_full_disk_is_noticed_before_the_first_image(making: MakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    tight, cut, roomy = making(), making("cut"), making("roomy")
    roomy.finish()
    size = sum(map(len, content(roomy.root).values()))
    cut.cut(10)
    assert unwritten_shards(cut.root, cut.plan) == [3]
    indices = encoded(monkeypatch)
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=size // 2, f_frsize=1))
    with pytest.raises(RunError, match=str(tight.root)):
        next(tight.run())
    assert indices == []
    shard = sum(p.stat().st_size for p in cut.root.glob("*-00000.npy"))
    others = sum((cut.root / name).stat().st_size for name in ("tokenizer.pt", "names.jsonl"))
    room = shard + others + 4000
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=room, f_frsize=1))
    assert len(cut.finish()) == 40  # which needs room for what is missing only


# ---- items that cannot be read -------------------------------------------------------------------------------------

BAD = (3, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 39)  # one, the whole second shard, the last image


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_bad_image_stops_with_its_name(making: MakeStore, workers: int) -> None:
    broken = making(bad=(17, 23, 9), workers=workers)
    with pytest.raises(ImageError, match=r"a/00009\.png") as caught:
        broken.finish()
    assert (caught.value.exit_code, caught.value.name) == (3, "a/00009.png")
    assert "--on-bad skip" in caught.value.hint
    assert not any((broken.root / name).exists() for name in ("manifest.json", "bad.jsonl"))


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
    assert_same_store(cut, one)
    assert not list(one.root.glob("note-*"))


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


@pytest.mark.parametrize(("bad", "share", "fits"), [([7], 0.0001, True), ([7], 0, False), (range(40), 1, False)])
def test_a_share_of_bad_images_is_rounded_up_and_never_all(
    making: MakeStore, bad: Any, share: float, fits: bool
) -> None:
    one = making(bad=bad, on_bad="skip", max_bad=share)
    if fits:
        assert one.finish().manifest.bad == len(bad)
        return
    with pytest.raises(DataError, match="memory:40"):
        one.finish()


def test_images_that_can_be_read_again_return_at_the_next_run(
    making: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError):
        making(bad=range(5, 25), on_bad="skip", max_bad=0.1).finish()
    indices = encoded(monkeypatch)
    back, fresh = (making(name, bad=(7,), on_bad="skip", max_bad=0.1) for name in ("codes", "fresh"))
    assert back.finish().manifest.bad == 1
    assert indices == list(range(30))
    assert_same_store(back, fresh)


@pytest.mark.parametrize(
    ("name", "again"), [("index-00000.npy", [*range(10)]), ("bad.jsonl", [*range(20), *range(30, 40)])]
)
def test_deleting_a_file_makes_its_shards_again(
    making: MakeStore, monkeypatch: pytest.MonkeyPatch, name: str, again: list[int]
) -> None:
    first = making(bad=BAD, on_bad="skip", max_bad=0.5)
    first.finish()
    original = content(first.root)
    (first.root / name).unlink()
    indices = encoded(monkeypatch)
    first.finish()
    assert (indices, content(first.root)) == (again, original)
    (first.root / "index-00000.npy").unlink()
    repaired = making(bad=BAD[1:], on_bad="skip", max_bad=0.5).finish()  # its image has been repaired
    assert [s.images for s in repaired.manifest.shards] == [10, 0, 10, 9]
    assert 3 not in [json.loads(line)["index"] for line in (first.root / "bad.jsonl").read_text().splitlines()]


# ---- several processes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", SHAPES)
@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize("pieces", [0, 9])
def test_bytes_do_not_depend_on_the_number_of_processes(
    making: MakeStore, settings: dict[str, Any], workers: int, pieces: int
) -> None:
    """Also if the store was interrupted and continued with another number."""
    making("several", workers=workers, **settings).cut(pieces)
    assert_same_store(making("several", workers=6 - workers, **settings), making("single", **settings))


def test_bytes_do_not_depend_on_the_threads_of_the_process_that_forks(making: MakeStore) -> None:
    """A process that has convolved on several threads, as training does, is one whose forks may hang."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.nn.functional.conv2d(torch.randn(16, 8, 64, 64), torch.randn(8, 8, 3, 3))
        making("several", views=2, workers=2).finish()
    finally:
        torch.set_num_threads(threads)
    assert_same_store(making("several", views=2), making("single", views=2))


# ---- shards, by processes that share only the folder --------------------------------------------------------------


@pytest.mark.parametrize("parts", [[[0, 1, 2, 3]], [[2, 3], [0], [1]], [[1, 2], [0, 1], [0, 2, 3]]])
@pytest.mark.parametrize("settings", SHAPES)
def test_shards_in_any_parts_and_a_finish_are_the_store_of_one_process(
    making: MakeStore, settings: dict[str, Any], parts: list[list[int]]
) -> None:
    settings = {**settings, "bad": BAD, "on_bad": "skip", "max_bad": 0.5}
    for shards in parts:
        part = making("parts", **settings, shards=shards)
        part.cut(3)  # inside its first shard, if that is not there yet
        assert sum(part.run()) == 10 * len(shards)
        assert not (part.root / "manifest.json").exists()
    assert_same_store(making("parts", **settings, make=False), making("whole", **settings))


def test_a_finish_makes_nothing_and_names_the_missing_shards(making: MakeStore) -> None:
    list(making(shards=[1]).run())
    before = content(making().root)
    with pytest.raises(DataError) as caught:
        list(making(make=False).run())
    assert "0,2-3" in caught.value.message
    assert "--shards 0,2-3" in caught.value.hint
    assert content(making().root) == before


def test_shards_of_other_settings_are_refused(making: MakeStore) -> None:
    list(making(shards=[1]).run())
    with pytest.raises(UsageError, match="seed: 0 -> 1"):
        list(making(shards=[2], seed=1).run())


def test_a_shard_that_another_process_has_written_is_left_alone(making: MakeStore) -> None:
    late, whole = making(bad=[5], on_bad="skip", shards=[0]).run(), making("whole")
    for _ in range(2):  # it has begun to encode
        next(late)
    assert_same_store(making(), whole)
    list(late)
    assert content(making().root) == content(whole.root)


def test_what_other_processes_write_and_leave_out_is_theirs(making: MakeStore) -> None:
    skip: dict[str, Any] = {"on_bad": "skip", "max_bad": 0.1}
    list(making(bad=[3], shards=[0], **skip).run())
    note, half = making().root / "note-00000.json", making().root / ".codes-00002.npy.0.tmp"
    original = note.stat().st_mtime_ns
    half.write_bytes(b"half")
    list(making(shards=[1, 3], **skip).run())
    assert (note.stat().st_mtime_ns, half.exists()) == (original, True)
    list(making(shards=[0, 2], **skip).run())  # whose image can be read by now
    assert_same_store(making(make=False), making("whole"))
    assert not half.exists()


@pytest.mark.parametrize(
    ("text", "shards"), [("7", [7]), ("0-3", [0, 1, 2, 3]), ("8,0-1", [0, 1, 8]), ("8-99999999999", [8, 9])]
)
def test_ranges_of_shards_are_cut_to_the_last_one(text: str, shards: list[int]) -> None:
    assert shards_of(text, 10) == shards
    assert shards_of(shards_text(shards), 10) == shards


# ---- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def command(image_folder: Path, tiny_tokenizer_file: Path, tmp_path: Path) -> list[str]:
    fixed = ["--tokenizer", str(tiny_tokenizer_file), "--device", "cpu", "--quiet", "--json"]
    return ["tokenize", str(image_folder), str(tmp_path / "codes"), *fixed]


def answer(args: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert run_cli(args) == 0
    values: dict[str, Any] = json.loads(capsys.readouterr().out)
    return values


def test_every_option_reaches_the_store_and_the_result(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--views", "2", "--flip", "--keep", "latents", "--shard-size", "10", "--seed", "5", "--workers", "2"]
    values, m = answer([*command, *more], capsys), Manifest.load(tmp_path / "codes")
    assert (m.views, m.flip, m.latents, m.shard_images, m.seed) == (2, True, True, 10, 5)
    assert json.loads((tmp_path / "codes" / "run.json").read_text())["workers"] == 2
    assert (values["digest"], values["images"], values["views"], values["shape"]) == (m.digest(), 36, 2, [4, 4, 4])
    assert values["bytes"] == sum(p.stat().st_size for p in (tmp_path / "codes").glob("*.npy"))
    assert answer([*command, *more], capsys) == values  # finished already


@pytest.mark.parametrize(
    "option",
    [
        ["--micro-batch", "4"], ["--batch-size", "4"], ["--workers", "0"], ["--keep", "codes"], ["--on-bad", "go-on"],
        ["--max-bad", "2"], ["--shard-size", "0"], ["--shards", "1-0"], ["--shards", "x"],
        ["--shards", "1", "--finish"],
    ],
)  # fmt: skip
def test_values_that_cannot_be_are_usage_errors(
    option: list[str], command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli([*command, *option]) == 2
    assert option[0] in capsys.readouterr().err
    assert not (tmp_path / "codes").exists()


def test_processes_that_start_at_once_make_their_shards(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*command, "--shard-size", "5", "--workers", "1"]
    running = [spawn(command_line, [*command, "--shards", part], {}) for part in ("0-2", "1-4", "4-99", "4-99")]
    assert [exit_code(process) for process in running] == [0] * 4
    assert answer([*command, "--shards", "3"], capsys).items() >= {"shards": 8, "written": 8}.items()
    values = answer([*command, "--finish"], capsys)
    assert answer([*command, "--shards", "3"], capsys) == values  # finished already
    whole = answer([*command[:2], str(tmp_path / "whole"), *command[3:]], capsys)
    assert values == {**whole, "store": str(tmp_path / "codes")}
    assert content(tmp_path / "codes") == content(tmp_path / "whole")


def test_missing_shards_and_those_beyond_the_last_are_named(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*command, "--shard-size", "10"]
    for words, code, token in ((["--shards", "4-9"], 2, "last shard, 3"), (["--finish"], 3, str(tmp_path / "codes"))):
        assert run_cli([*command, *words]) == code
        assert token in capsys.readouterr().err
    assert not (tmp_path / "codes").exists()
    assert answer([*command, "--shards", "1"], capsys)["missing"] == "0,2-3"
    assert run_cli([*command, "--finish"]) == 3
    assert "--shards 0,2-3" in capsys.readouterr().err


@pytest.mark.slow
def test_two_ranks_stop_on_a_signal_and_go_on(command: list[str], tmp_path: Path) -> None:
    long = ["tokenize", "digits", *command[2:], "--shard-size", "50", "--views", "20", "--gpus", "2", "--workers", "2"]
    process = spawn(command_line, long, {})
    wait_for((tmp_path / "codes" / "note-00000.json").exists, process)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGTERM)
    assert exit_code(process, 60) == 75
    assert not (tmp_path / "codes" / "manifest.json").exists()
    assert exit_code(spawn(command_line, long, {}), 300) == 0
    assert exit_code(spawn(command_line, ["verify", str(tmp_path / "codes")], {})) == 0

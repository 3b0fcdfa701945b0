"""Going on with a store: what was damaged meanwhile is made again, and so is what can be read again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import Making, MemoryImages, content, encoded

from rdpm_cli import engine
from rdpm_cli.cli.app import run as run_cli
from rdpm_cli.codes import writing
from rdpm_cli.codes.store import CodeStore
from rdpm_cli.errors import DamagedError, DataError, RunError, UsageError

MakeStore = Callable[..., Making]
BAD = (4, 30)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_file: Path) -> Path:
    """36 images in shards of 10, two of them left out. Read only."""
    work = make_store(tmp_path_factory.mktemp("whole") / "codes", tiny_tokenizer_file)
    work.finish()
    return work.root


@pytest.fixture
def copy(whole: Path, tmp_path: Path, tiny_tokenizer_file: Path) -> Making:
    """A copy that a test may damage, to be written on."""
    return make_store(Path(shutil.copytree(whole, tmp_path / "codes")), tiny_tokenizer_file)


def make_store(root: Path, tokenizer_file: Path, bad: tuple[int, ...] = BAD) -> Making:
    wanted = {"on_bad": "skip", "max_bad": 0.1, "micro_batch": 4}
    return Making(root, MemoryImages(36, bad=bad), tokenizer_file, **wanted)


def cut(work: Making, pieces: int) -> None:
    running = work.run()
    for _ in range(pieces):
        next(running)
    running.close()


def flip(path: Path, place: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0xFF
    path.write_bytes(data)


# ---- damage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("removed", ["codes-00000.npy", "tokenizer.pt", "manifest.json"])
@pytest.mark.parametrize("other", ["labels-00001.npy", "codes-00002.npy", "index-00003.npy", "bad.jsonl"])
def test_removing_one_of_two_damaged_files_mends_both(removed: str, other: str, copy: Making, whole: Path) -> None:
    flip(copy.root / removed)
    flip(copy.root / other, -3)
    (copy.root / removed).unlink()
    copy.finish()
    assert content(copy.root) == content(whole)


def test_only_the_damaged_shards_are_made_again(copy: Making, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(copy.root / "latents-00001.npy")
    (copy.root / "codes-00003.npy").unlink()
    seen = encoded(monkeypatch)
    assert writing.missing_shards(copy.root, copy.plan) == [1, 3]
    copy.finish()
    assert seen == [*range(10, 20), *range(30, 36)]


@pytest.mark.parametrize("name", ["codes-00000.npy", "sums-00000.json", "bad-00000.jsonl", "index-00000.npy"])
def test_a_flip_in_an_unfinished_store_is_not_sealed(
    name: str, whole: Path, tmp_path: Path, tiny_tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = make_store(tmp_path / "codes", tiny_tokenizer_file)
    cut(work, 7)
    assert writing.missing_shards(work.root, work.plan) == [2, 3]
    flip(work.root / name)
    seen = encoded(monkeypatch)
    work.finish()
    assert seen == [*range(10), *range(20, 36)]
    assert content(work.root) == content(whole)


def test_what_changes_while_it_is_written_is_not_sealed(whole: Path, tmp_path: Path, tiny_tokenizer_file: Path) -> None:
    work = make_store(tmp_path / "codes", tiny_tokenizer_file)
    running = work.run()
    for _ in range(7):
        next(running)
    flip(work.root / "codes-00000.npy")
    with pytest.raises(RunError, match=r"codes-00000\.npy differs from its checksum"):
        list(running)
    work.finish()
    assert content(work.root) == content(whole)


def test_a_cut_second_run_keeps_the_checksums(copy: Making, whole: Path) -> None:
    """The manifest is gone by then; what it knew is noted shard by shard."""
    (copy.root / "codes-00003.npy").unlink()
    cut(copy, 1)
    assert not (copy.root / "manifest.json").exists()
    assert writing.missing_shards(copy.root, copy.plan) == [3]
    flip(copy.root / "codes-00000.npy")
    copy.finish()
    assert content(copy.root) == content(whole)


def test_notes_that_a_kill_left_behind_go(copy: Making, whole: Path) -> None:
    (copy.root / "sums-00000.json").write_text("{}")
    assert list(copy.run()) == [36]
    assert content(copy.root) == content(whole)


def test_every_damaged_file_is_listed(copy: Making, capsys: pytest.CaptureFixture[str]) -> None:
    names = sorted(path.name for path in copy.root.glob("*-0000?.npy"))
    assert len(names) == 16
    for name in names:
        flip(copy.root / name)
    assert run_cli(["verify", str(copy.root), "--json"]) == 3
    told = capsys.readouterr()
    assert sorted(line.split()[0] for line in json.loads(told.out)["damaged"]) == names
    assert sorted(line.split()[0] for line in told.err.splitlines() if line.startswith("  ")) == names
    with pytest.raises(DamagedError) as caught:
        CodeStore(copy.root).verify()
    assert len(caught.value.found) == 16


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_the_hint_for_a_broken_manifest_is_true(text: str, copy: Making, whole: Path) -> None:
    (copy.root / "manifest.json").write_text(text)
    for look in (lambda: engine.verify(copy.root), lambda: next(copy.run())):
        with pytest.raises(DataError) as caught:
            look()
        assert (
            "remove it and run the same `rdpm tokenize` again: without it every shard is made anew" in caught.value.hint
        )
    (copy.root / "manifest.json").unlink()
    copy.finish()
    assert content(copy.root) == content(whole)


# ---- images that can be read again ---------------------------------------------------------------------------------


def test_images_that_can_be_read_again_come_back_at_the_next_run(
    tmp_path: Path, tiny_tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = make_store(tmp_path / "codes", tiny_tokenizer_file, tuple(range(5, 25)))
    with pytest.raises(DataError, match="20 of 36 images") as caught:
        away.finish()
    assert "run the same command again" in caught.value.hint
    seen = encoded(monkeypatch)
    back = make_store(tmp_path / "codes", tiny_tokenizer_file, (7,))
    assert back.finish().manifest.bad == 1
    assert sorted(set(seen)) == list(range(30))
    fresh = make_store(tmp_path / "fresh", tiny_tokenizer_file, (7,))
    fresh.finish()
    assert content(back.root) == content(fresh.root)


def test_images_are_tried_once_more_before_the_run_fails(tmp_path: Path, tiny_tokenizer_file: Path) -> None:
    work = make_store(tmp_path / "codes", tiny_tokenizer_file, tuple(range(5, 25)))
    done = 0
    for piece in work.run():
        done += piece
        if done == 36:
            work.source.bad.clear()  # type: ignore[attr-defined]
    assert (done, CodeStore(work.root).manifest.bad) == (36, 0)


def test_a_finished_store_takes_mended_images_once_its_list_is_removed(copy: Making, tiny_tokenizer_file: Path) -> None:
    mended = make_store(copy.root, tiny_tokenizer_file, ())
    assert list(mended.run()) == [36]
    (copy.root / "bad.jsonl").unlink()
    assert mended.finish().manifest.bad == 0


# ---- refusals ------------------------------------------------------------------------------------------------------


def test_another_seed_is_named_without_the_noise_it_draws(copy: Making, tiny_tokenizer_file: Path) -> None:
    other = Making(copy.root, copy.source, tiny_tokenizer_file, seed=3, micro_batch=4)
    with pytest.raises(UsageError, match=r"seed: 0 -> 3$"):
        next(other.run())


def test_the_folder_of_another_command_is_no_store(copy: Making) -> None:
    for name in content(copy.root):
        (copy.root / name).unlink()
    (copy.root / "run.json").write_text('{"recipe": {"seed": 0}}')
    with pytest.raises(UsageError, match="is not a code store"):
        next(copy.run())


def test_a_finished_store_is_cleared_of_what_a_kill_left(copy: Making) -> None:
    (copy.root / ".run.json.99.tmp").write_text("half")
    assert list(copy.run()) == [36]
    assert not list(copy.root.glob(".*.tmp"))

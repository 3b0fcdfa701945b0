"""Making a store: images that cannot be read, several processes, interruptions, and what is said of it."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Making, MemoryImages, content, encoded
from PIL import Image

from rdpm_cli import engine
from rdpm_cli.cli.app import run as run_cli
from rdpm_cli.codes.store import CodeStore
from rdpm_cli.config import GeneratorConfig
from rdpm_cli.errors import DataError, ImageError
from rdpm_cli.generator.task import CodeBatches

MakeStore = Callable[..., Making]


@pytest.fixture
def making(tmp_path: Path, tiny_tokenizer_file: Path) -> MakeStore:
    """making(name="codes", count=40, bad=(), **settings): a store of images in memory, in shards of 10."""

    def make(name: str = "codes", count: int = 40, bad: Any = (), **settings: Any) -> Making:
        wanted = {"views": 1, "latents": False, "micro_batch": 4, **settings}
        return Making(tmp_path / name, MemoryImages(count, bad), tiny_tokenizer_file, **wanted)

    return make


# ---- images that cannot be read -----------------------------------------------------------------------------------

BAD = (3, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 39)  # one, the whole second shard, the last image


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_bad_image_stops_with_its_name(making: MakeStore, workers: int) -> None:
    broken = making(bad=(17, 23, 9), workers=workers)
    with pytest.raises(ImageError, match=r"a/00009\.png cannot be read as an image: image file is trunc") as caught:
        broken.finish()
    assert (caught.value.exit_code, caught.value.name) == (3, "a/00009.png")
    assert "--on-bad skip" in caught.value.hint
    assert not (broken.root / "manifest.json").exists()
    assert not (broken.root / "bad.jsonl").exists()


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("settings", [{}, {"views": 4, "flip": True, "latents": True}])
def test_skipped_images_move_nothing(making: MakeStore, workers: int, settings: dict[str, Any]) -> None:
    whole = making("whole", **settings).finish()
    some = making(bad=BAD, on_bad="skip", max_bad=0.5, workers=workers, **settings).finish()
    m, views = some.manifest, some.manifest.views
    good = [i for i in range(40) if i not in BAD]
    assert (m.images, m.rows, m.bad, len(some)) == (28, 28 * views, 12, 28 * views)
    assert [s.images for s in m.shards] == [9, 0, 10, 9]
    assert some.index.tolist() == np.repeat(good, views).tolist()
    rows, theirs = np.arange(len(some)), np.flatnonzero(np.isin(whole.index, good))
    assert np.array_equal(some.codes(rows), whole.codes(theirs))
    assert np.array_equal(some.labels, whole.labels[theirs])
    assert np.array_equal(some.view(rows), whole.view(theirs))
    if settings:
        assert np.array_equal(some.latents(rows), whole.latents(theirs))


def test_bad_images_are_listed_in_order_and_belong_to_the_store(making: MakeStore) -> None:
    one = making(bad=BAD, on_bad="skip", max_bad=0.5)
    one.finish()
    listed = [json.loads(line) for line in (one.root / "bad.jsonl").read_text().splitlines()]
    assert [line["index"] for line in listed] == list(BAD)
    assert listed[0] == {"index": 3, "name": "a/00003.png", "reason": "image file is truncated <object>"}
    other = making("other", bad=BAD, on_bad="skip", max_bad=0.5, workers=2)
    running = other.run()
    for _ in range(6):
        next(running)
    running.close()
    other.finish()
    assert content(other.root) == content(one.root)
    assert not list(one.root.glob("bad-*"))


def test_without_bad_images_skip_is_stop(making: MakeStore) -> None:
    stop, skip = making(), making("skip", on_bad="skip")
    stop.finish()
    skip.finish()
    assert content(stop.root) == content(skip.root)


def test_too_many_bad_images_fail_at_the_end(making: MakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = making(bad=BAD, on_bad="skip", max_bad=0.25)
    with pytest.raises(DataError, match=r"12 of 40 images .*a/00003\.png.* --max-bad 0\.25 allows 10; .*bad\.jsonl"):
        broken.finish()
    assert len((broken.root / "bad.jsonl").read_text().splitlines()) == 12
    assert not (broken.root / "manifest.json").exists()
    seen = encoded(monkeypatch)
    with pytest.raises(ImageError, match=r"a/00003\.png"):  # found before; now they are no longer to be left out
        making(bad=BAD).finish()
    assert making(bad=BAD, on_bad="skip", max_bad=0.3).finish().manifest.bad == 12
    assert not seen


def test_a_share_of_bad_images_is_rounded_up(making: MakeStore) -> None:
    assert making(bad=[7], on_bad="skip", max_bad=0.0001).finish().manifest.bad == 1
    with pytest.raises(DataError, match=r"--max-bad 0 allows 0"):
        making("none", bad=[7], on_bad="skip", max_bad=0).finish()
    with pytest.raises(DataError, match=r"40 of 40 images"):
        making("all", bad=range(40), on_bad="skip", max_bad=1).finish()


def test_a_bad_image_that_was_mended_comes_back_with_its_shard(making: MakeStore) -> None:
    making(bad=BAD, on_bad="skip", max_bad=0.5).finish()
    root = making().root
    (root / "index-00000.npy").unlink()  # what `rdpm verify` says to do with a damaged shard
    again = making(bad=BAD[1:], on_bad="skip", max_bad=0.5).finish()
    assert [s.images for s in again.manifest.shards] == [10, 0, 10, 9]
    assert 3 not in [json.loads(line)["index"] for line in (root / "bad.jsonl").read_text().splitlines()]


def test_lost_reasons_are_found_again(making: MakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    first = making(bad=BAD, on_bad="skip", max_bad=0.5)
    first.finish()
    before = content(first.root)
    (first.root / "bad.jsonl").unlink()
    seen = encoded(monkeypatch)
    making(bad=BAD, on_bad="skip", max_bad=0.5).finish()
    assert seen == [*range(20), *range(30, 40)]
    assert content(first.root) == before


@pytest.fixture
def spoilt_folder(tmp_path: Path, image_folder: Path) -> Path:
    """The image folder with a truncated file and one of zero bytes."""
    root = tmp_path / "images"
    for path in sorted(image_folder.rglob("*.*")):
        (root / path.parent.name).mkdir(parents=True, exist_ok=True)
        (root / path.parent.name / path.name).write_bytes(path.read_bytes())
    (root / "a" / "00.png").write_bytes((root / "a" / "00.png").read_bytes()[:60])
    (root / "b" / "01.png").write_bytes(b"")
    return root


def test_a_store_with_bad_images_is_reconstructed_and_trained_on(
    spoilt_folder: Path, tiny_tokenizer_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["tokenize", str(spoilt_folder), str(tmp_path / "codes"), "--tokenizer", str(tiny_tokenizer_file)]
    fixed = ["--device", "cpu", "--quiet", "--json"]
    assert run_cli([*command, *fixed]) == 3
    assert "a/00.png" in capsys.readouterr().err
    assert run_cli([*command, *fixed, "--on-bad", "skip"]) == 3
    assert "2 of 36 images" in capsys.readouterr().err
    assert run_cli([*command, *fixed, "--on-bad", "skip", "--max-bad", "0.1"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["images"], answer["bad"]) == (34, 2)
    assert run_cli(["reconstruct", str(tmp_path / "codes"), str(tmp_path / "recon"), *fixed]) == 0
    assert json.loads(capsys.readouterr().out)["n"] == 34
    store = CodeStore(tmp_path / "codes")
    cfg = GeneratorConfig.model_validate({"train": {"batch": 16, "steps": 1}})
    batches = CodeBatches(store, cfg, [1.0] * 4, 0)
    assert batches.images + len(batches.held_out) == 34
    assert batches.batch_at(0, range(16)).codes_BTHW.shape == (16, 4, 4, 4)

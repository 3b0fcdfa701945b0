"""Making a store: images that cannot be read, several processes, interruptions, and what is said of it."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Making, MemoryImages, content, encoded
from PIL import Image
from processes import command_line, exit_code, spawn, wait_for
from torch import Tensor

from rdpm_cli import crew
from rdpm_cli.cli.app import run as run_cli
from rdpm_cli.codes import encode, writing
from rdpm_cli.codes.encode import Encoded, Prepared
from rdpm_cli.codes.store import CodeStore
from rdpm_cli.codes.work import Work
from rdpm_cli.config import RDPMConfig
from rdpm_cli.errors import DataError, ImageError
from rdpm_cli.generator.rdpm_batches import CodeBatches
from rdpm_cli.images.sources import open_source
from rdpm_cli.tokenizer import model

MakeStore = Callable[..., Making]


@pytest.fixture
def making(tmp_path: Path, tiny_tokenizer_file: Path) -> MakeStore:
    """making(name="codes", count=40, bad=(), **settings): a store of images in memory, in shards of 10."""

    def make(name: str = "codes", count: int = 40, bad: Any = (), **settings: Any) -> Making:
        wanted = {"views": 1, "latents": False, "micro_batch": 4, **settings}
        return Making(tmp_path / name, MemoryImages(count, bad), tiny_tokenizer_file, **wanted)

    return make


# ---- images that cannot be read -----------------------------------------------------------------------------------

SHAPES: list[dict[str, Any]] = [{}, {"views": 4, "flip": True, "latents": True}]
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
@pytest.mark.parametrize("settings", SHAPES)
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
    with pytest.raises(DataError, match=r"no image of memory:40 can be read; the 40"):
        making("all", bad=range(40), on_bad="skip", max_bad=1).finish()
    assert [Work(max_bad=share).bad_allowed(100) for share in (0.07, 0.29, 0.0701)] == [7, 29, 8]


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
    cfg = RDPMConfig.model_validate({"train": {"batch": 16, "steps": 1}})
    batches = CodeBatches(store, cfg, model.load(tiny_tokenizer_file)[0].quantizer, 0)
    assert batches.images + len(batches.held_out) == 34
    assert batches.batch_at(0, range(16)).codes_BTHW.shape == (16, 4, 4, 4)


# ---- several processes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", SHAPES)
@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize("pieces", [0, 1, 4, 9])
def test_bytes_do_not_depend_on_the_number_of_processes(
    making: MakeStore, settings: dict[str, Any], workers: int, pieces: int
) -> None:
    """Also where it was interrupted, and went on with another number."""
    alone, several = making("alone", **settings), making("several", workers=workers, **settings)
    alone.finish()
    running = several.run()
    for _ in range(pieces):
        next(running)
    running.close()
    making("several", workers=6 - workers, **settings).finish()
    assert content(several.root) == content(alone.root)


def test_bytes_do_not_depend_on_the_threads_of_the_process_that_forks(
    image_folder: Path, tiny_tokenizer_file: Path, tmp_path: Path
) -> None:
    """A process that has convolved on several threads, as training does, is one whose forks may hang."""
    settings: dict[str, Any] = {"micro_batch": 4, "views": 2}
    alone = Making(tmp_path / "alone", open_source(str(image_folder)), tiny_tokenizer_file, **settings)
    alone.finish()
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.nn.functional.conv2d(torch.randn(16, 8, 64, 64), torch.randn(8, 8, 3, 3))
        several = Making(
            tmp_path / "several", open_source(str(image_folder)), tiny_tokenizer_file, workers=2, **settings
        )
        several.finish()
    finally:
        torch.set_num_threads(before)
    assert content(several.root) == content(alone.root)


def test_a_few_images_in_one_shard_use_every_worker(making: MakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    one = making(count=36, shard_images=100, workers=3)
    original = encode.encode

    def spy(batch: Prepared, *rest: Any) -> Encoded:
        return replace(original(batch, *rest), looked_at=os.getpid())

    monkeypatch.setattr(encode, "encode", spy)
    pids = list(one.run())[1:]
    assert len(set(pids)) == 3


def test_no_more_processes_than_micro_batches(making: MakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def in_order(work: Callable[[range], Encoded], tasks: list[range], workers: int) -> Iterator[Encoded]:
        asked.append(workers)
        return map(work, tasks)

    monkeypatch.setattr(crew, "in_order", in_order)
    making(count=10, workers=64).finish()
    assert asked == [3]


# ---- what a GPU may do, and a CPU may not -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option", [["--micro-batch", "4"], ["--precision", "bf16"], ["--batch-size", "4"], ["--workers", "0"]]
)
def test_what_would_change_the_bytes_on_a_cpu_is_refused(
    option: list[str], image_folder: Path, tiny_tokenizer_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["tokenize", str(image_folder), str(tmp_path / "codes"), "--tokenizer", str(tiny_tokenizer_file)]
    assert run_cli([*command, "--device", "cpu", *option]) == 2
    assert option[0] in capsys.readouterr().err
    assert not (tmp_path / "codes").exists()


def test_a_gpus_plan_records_precision_and_micro_batch(tiny_tokenizer_file: Path) -> None:
    tokenizer, file = model.load(tiny_tokenizer_file)
    fixed: dict[str, Any] = {"views": 1, "flip": False, "latents": False, "seed": 0, "shard_images": 10}
    cases: list[tuple[dict[str, Any], tuple[str, int]]] = [
        ({}, ("bf16", 1024)),
        ({"precision": "fp32", "micro_batch": 6}, ("fp32", 6)),
    ]
    for more, wanted in cases:
        plan = encode.make_plan(
            MemoryImages(9), tokenizer, file["digest"], device=torch.device("cuda"), **fixed, **more
        )
        assert (plan.device, plan.precision, plan.micro_batch) == ("cuda", *wanted)


def test_bf16_encodes_in_channels_last_and_quantises_in_fp32(
    making: MakeStore,
) -> None:
    """The path of a GPU, taken on the CPU: z moves by what bf16 moves, the codes are Q of the z that is kept."""
    one = making(latents=True)
    exact, half = one.plan, one.plan.model_copy(update={"precision": "bf16"})
    tokenizer = one.tokenizer.to(memory_format=torch.channels_last)
    batch = encode.prepare(one.source, exact, range(4))
    seen: list[torch.dtype] = []
    layouts: list[bool] = []

    def note(_: object, __: object, y: Tensor) -> None:
        layouts.append(y.dtype == torch.bfloat16 and y.is_contiguous(memory_format=torch.channels_last))

    tokenizer.encoder.conv_in.register_forward_hook(note)
    tokenizer.quantizer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    fp32, bf16 = encode.encode(batch, tokenizer, exact), encode.encode(batch, tokenizer, half)
    assert layouts == [False, True]
    assert seen == [torch.float32, torch.float32]
    assert fp32.latents is not None
    assert bf16.latents is not None
    a, b = fp32.latents.astype(np.float32), bf16.latents.astype(np.float32)
    assert 0 < np.abs(a - b).max() < 0.2
    z = torch.from_numpy(b[:, 0])
    assert np.array_equal(tokenizer.quantizer.encode(z, batch.eps_VBTCHW[0]).numpy(), bf16.codes[:, 0])
    assert (fp32.codes == bf16.codes).mean() > 0.9


def test_what_workers_prepare_is_what_one_process_prepares(making: MakeStore) -> None:
    """The decode workers of a GPU: uint8 pixels and noise, padded; the network stays where it is."""
    one = making(bad=[5])
    plan = one.plan.model_copy(update={"device": "cuda"})
    todo = encode.parts(plan, 0)
    alone, several = (list(encode.encode_parts(one.source, one.tokenizer, plan, todo, n)) for n in (1, 2))
    assert [part.indices for part in several] == [[0, 1, 2, 3], [4, 6, 7], [8, 9]]
    for a, b in zip(alone, several, strict=True):
        assert np.array_equal(a.codes, b.codes)
        assert a.bad == b.bad


# ---- options ------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(image_folder: Path, tiny_tokenizer_file: Path, tmp_path: Path) -> list[str]:
    fixed = ["--tokenizer", str(tiny_tokenizer_file), "--device", "cpu", "--quiet", "--json"]
    return ["tokenize", str(image_folder), str(tmp_path / "codes"), *fixed]


def answer(args: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert run_cli(args) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_dry_run_says_what_comes_and_writes_nothing(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--shard-size", "10", "--views", "2", "--keep", "latents", "--workers", "2"]
    told = answer([*command, *more, "--dry-run"], capsys)
    assert not (tmp_path / "codes").exists()
    assert (told["images"], told["images_missing"], told["shards"], told["shards_missing"]) == (36, 36, 4, 4)
    assert (told["classes"], told["workers"], told["micro_batch"]) == (3, 2, 128)
    assert 0 < told["seconds_per_micro_batch"] < 5
    turns = 4 // min(2, crew.cores())  # four shards of a micro-batch each
    assert told["seconds"] == pytest.approx(turns * told["seconds_per_micro_batch"], abs=0.06)
    arrays = told["bytes_of_shards"]
    made = answer([*command, *more], capsys)
    assert arrays == made["bytes"] - 16 * 128  # the heads of 16 .npy files
    root = tmp_path / "codes"
    (root / "codes-00003.npy").unlink()
    before = {path: path.stat().st_mtime_ns for path in root.iterdir()}
    again = answer([*command, *more, "--dry-run"], capsys)
    assert (again["images_missing"], again["shards_missing"]) == (6, 1)
    assert told["bytes_missing"] - again["bytes_missing"] == told["bytes_of_shards"] * 5 // 6
    assert told["bytes_missing"] - told["bytes_of_shards"] == 4 * writing.MANIFEST_BYTES + sum(
        (root / name).stat().st_size for name in ("tokenizer.pt", "names.jsonl")
    )
    assert {path: path.stat().st_mtime_ns for path in root.iterdir()} == before


def test_a_dry_run_refuses_what_the_run_would(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(command, capsys)
    assert run_cli([*command, "--views", "2", "--dry-run"]) == 2
    assert "views: 1 -> 2" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    assert run_cli([*command[:2], str(tmp_path / "full"), *command[3:], "--dry-run"]) == 2
    assert "is not empty" in capsys.readouterr().err
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=10, f_frsize=1, f_blocks=10))
    assert run_cli([*command[:2], str(tmp_path / "new" / "codes"), *command[3:], "--dry-run"]) == 1
    assert "disk full" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("place", ["file", "file/codes", "link/codes", "/proc/codes"])
def test_a_dry_run_refuses_a_place_as_the_run_does(
    place: str, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "file")
    told = []
    for more in ([], ["--dry-run"]):
        assert run_cli([*command[:2], str(tmp_path / place), *command[3:], *more]) == 2
        told.append(capsys.readouterr().err)
    assert told[0] == told[1]
    assert "is a file" in told[0] or "cannot be a folder" in told[0]


def test_a_dry_run_tells_of_bad_images(
    spoilt_folder: Path, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [command[0], str(spoilt_folder), *command[2:], "--dry-run"]
    assert run_cli(command) == 3
    assert "a/00.png cannot be read as an image" in capsys.readouterr().err
    assert answer([*command, "--on-bad", "skip"], capsys)["bad_in_first_micro_batch"] == 2
    assert not (tmp_path / "codes").exists()


def test_a_finished_store_says_what_was_compared(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    answer(command, capsys)
    assert run_cli([part for part in command if part != "--quiet"]) == 0
    assert "names were compared with it, not their pixels" in capsys.readouterr().err


def test_a_draft_is_another_transform(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer([*command, "--draft"], capsys)
    assert CodeStore(tmp_path / "codes").manifest.transform == "adm-center-crop-jpeg-draft"
    assert run_cli(command) == 2
    assert "transform: adm-center-crop-jpeg-draft -> adm-center-crop" in capsys.readouterr().err


def test_a_draft_reads_other_pixels(tiny_tokenizer_file: Path, tmp_path: Path) -> None:
    """A JPEG of four times the size: the decoder halves it, where the exact crop halves pixels."""
    for name in "ab":
        (tmp_path / "images" / name).mkdir(parents=True)
        pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / name / "0.jpg")
    source = open_source(str(tmp_path / "images"))
    for draft in (False, True):
        one = Making(tmp_path / f"{draft}", source, tiny_tokenizer_file, draft=draft)
        found = encode.prepare(one.source, one.plan, range(2)).pixels_BCHW[0].permute(1, 2, 0).numpy()
        assert np.array_equal(found, source.pixels(0, 16, draft=draft))
    assert not np.array_equal(source.pixels(0, 16), source.pixels(0, 16, draft=True))


@pytest.mark.parametrize(
    "option", [["--keep", "codes"], ["--on-bad", "go-on"], ["--max-bad", "2"], ["--shard-size", "0"]]
)
def test_values_outside_an_option_are_usage_errors(
    option: list[str], command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli([*command, *option]) == 2
    assert option[0] in capsys.readouterr().err


# ---- `--gpus N` ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_team_writes_the_same_store(command: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    more = ["--shard-size", "7"]
    alone = answer([*command, *more], capfd)
    team = answer([*command[:2], str(tmp_path / "team"), *command[3:], *more, "--gpus", "2"], capfd)
    assert team["digest"] == alone["digest"]
    assert content(tmp_path / "team") == content(tmp_path / "codes")


@pytest.mark.slow
def test_a_team_stops_on_a_signal_and_goes_on(command: list[str], tmp_path: Path) -> None:
    long = ["tokenize", "digits", *command[2:], "--shard-size", "50", "--views", "100", "--gpus", "2", "--workers", "2"]
    process = spawn(command_line, long, {})
    wait_for((tmp_path / "codes" / "index-00000.npy").exists, process)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGTERM)
    assert exit_code(process, 60) == 75
    assert not (tmp_path / "codes" / "manifest.json").exists()
    assert exit_code(spawn(command_line, long, {}), 300) == 0
    assert exit_code(spawn(command_line, ["verify", str(tmp_path / "codes")], {})) == 0

"""`rdpm sample` as a job: image i depends on (checkpoint, options, seed, i), whoever draws it, in whatever order."""

import json
import os
import signal
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from generators import CLASSES, GRID, STEPS, save_generator
from helpers import sampling_options
from PIL import Image
from processes import command_line, exit_code, killed_after_samples, spawn, torchrun

from rdpm_cli import engine, files, modelfile, progress
from rdpm_cli.cli.app import run as run_cli
from rdpm_cli.engine import editing, sample_files, sample_options
from rdpm_cli.engine.sample_files import Files, Part
from rdpm_cli.errors import CheckpointError, RunError, UsageError
from rdpm_cli.evaluation import judge as judge_file
from rdpm_cli.evaluation import rejection
from rdpm_cli.generator import model, sampler, transformer
from rdpm_cli.generator.contract import Known
from rdpm_cli.images import items, writers
from rdpm_cli.threads import one_thread

CPU = torch.device("cpu")
PER_CLASS = 7
COUNT = CLASSES * PER_CLASS


@pytest.fixture(autouse=True)
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_file: Path) -> Path:
    return save_generator(tmp_path_factory.mktemp("generator") / "generator.pt", tiny_tokenizer_file, cfg=1.0)


def draw(generator: Path, out: Path, *args: str) -> dict[str, Any]:
    """The command, and what its record says."""
    fixed = ["sample", "--ckpt", str(generator), "--out", str(out), "--per-class", str(PER_CLASS)]
    assert run_cli([*fixed, "--device", "cpu", "--quiet", *args]) == 0
    record = out / "samples.json"
    return json.loads(record.read_text()) if record.is_file() else {}


def content(out: Path) -> dict[str, bytes]:
    """The files that are samples: not what notes how they were made."""
    return {
        str(p.relative_to(out)): p.read_bytes()
        for p in sorted(out.rglob("*"))
        if p.is_file() and not p.relative_to(out).parts[0].startswith(".") and p.name != "run.json"
    }


@pytest.fixture(scope="module")
def whole(generator: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All samples of one process, with everything that can be looked at. Read only."""
    out = tmp_path_factory.mktemp("whole") / "samples"
    with one_thread():
        draw(generator, out, "--npz", "--gif", "--trajectory")
    return out


# ---- whoever draws them, in whatever order -------------------------------------------------------------------------


def test_shards_in_any_order_write_the_same_files(generator: Path, whole: Path, tmp_path: Path) -> None:
    everything = ["--npz", "--gif", "--trajectory"]
    for number in (3, 1):
        assert not draw(generator, tmp_path / "s", "--shard", f"{number}/3", *everything)
        assert len(list((tmp_path / "s").glob("*.png"))) < COUNT
    assert not (tmp_path / "s" / "samples.npz").exists()
    draw(generator, tmp_path / "s", "--shard", "2/3", *everything)
    assert content(tmp_path / "s") == content(whole)


def test_two_processes_of_torchrun_write_the_same_files(generator: Path, whole: Path, tmp_path: Path) -> None:
    command = ["sample", "--ckpt", str(generator), "--out", str(tmp_path / "s"), "--per-class", str(PER_CLASS)]
    more = ["--npz", "--gif", "--trajectory", "--quiet", "--device", "cpu"]
    ranks = [spawn(command_line, [*command, *more], environment) for environment in torchrun(2)]
    assert [exit_code(process) for process in ranks] == [0, 0]
    assert content(tmp_path / "s") == content(whole)


@pytest.mark.slow
def test_gpus_n_writes_the_same_files(
    generator: Path, whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    draw(generator, tmp_path / "s", "--npz", "--gif", "--trajectory", "--gpus", "2", "--json")
    shown = capfd.readouterr()
    assert json.loads(shown.out)["samples"] == COUNT
    assert not shown.err
    assert content(tmp_path / "s") == content(whole)


def test_samples_are_packed_in_flat_memory(tmp_path: Path) -> None:
    written = Files(tmp_path, 640, 8, png=False, npz=True)
    each = 64 * 64 * 3
    for piece in written.pieces:
        written.write_chunk(piece, np.full((len(piece), 64, 64, 3), piece.start % 251, np.uint8))
    tracemalloc.start()
    written.save_npz(64, list(range(640)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 640 * each / 4  # a piece and its copy, not the whole of them
    with np.load(tmp_path / "samples.npz") as archive:
        assert archive["arr_0"][:, 0, 0, 0].tolist() == [p.start % 251 for p in written.pieces for _ in p]


@pytest.mark.parametrize("png", [True, False], ids=["png", "no png"])
def test_a_killed_job_goes_on_to_the_same_bytes(generator: Path, whole: Path, tmp_path: Path, png: bool) -> None:
    out = tmp_path / "s"
    command = ["sample", "--ckpt", str(generator), "--out", str(out), "--per-class", str(PER_CLASS), "--device", "cpu"]
    more = ["--npz", "--gif", "--trajectory", "--quiet", *([] if png else ["--no-png"])]
    for after in (1, 3):
        process = spawn(killed_after_samples, after, [*command, *more], {})
        assert exit_code(process) == -signal.SIGKILL
        assert not (out / "samples.json").exists()
    there = {p: p.stat().st_mtime_ns for p in [*out.glob("*.png"), *out.glob("chunks/*.npy")]}
    assert 0 < len(there) < COUNT
    (out / ".000001.png.99.tmp").write_bytes(b"half")
    assert run_cli([*command, *more]) == 0
    assert not list(out.rglob("*.tmp"))
    assert not (out / "chunks").exists()
    assert {p: p.stat().st_mtime_ns for p in there if p.suffix == ".png"} == {
        p: t for p, t in there.items() if p.suffix == ".png"
    }
    wanted = content(whole)
    if not png:
        wanted = {name: data for name, data in wanted.items() if not name[:6].isdecimal() and name != "samples.json"}
        assert "file" not in json.loads((out / "samples.json").read_text())["samples"][0]
    found = content(out)
    assert {name: found.get(name) for name in wanted} == wanted


@pytest.mark.parametrize(
    ("number", "code", "said", "there"),
    [(signal.SIGTERM, 75, "8 of 21 samples are there", 8), (signal.SIGINT, 130, "interrupted", 6)],
)
def test_a_stopped_job_says_what_is_there_and_goes_on(
    generator: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    code: int,
    said: str,
    there: int,
) -> None:
    out = tmp_path / "s"
    command = ["sample", "--ckpt", str(generator), "--out", str(out), "--per-class", str(PER_CLASS), "--device", "cpu"]
    original = sampler.Job.draw

    def signalled(job: sampler.Job, indices: Sequence[int], labels: Sequence[int]) -> sampler.Samples:
        if 6 in indices:
            os.kill(os.getpid(), number)
        return original(job, indices, labels)

    monkeypatch.setattr(sampler.Job, "draw", signalled)
    assert run_cli(command) == code
    assert said in capsys.readouterr().err
    assert len(list(out.glob("*.png"))) == there
    monkeypatch.undo()
    draw(generator, out, "--npz", "--gif", "--trajectory")
    assert content(out) == content(whole)


def test_a_finished_job_draws_nothing_again(generator: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(generator, tmp_path / "s", "--npz")
    before = content(tmp_path / "s")
    monkeypatch.setattr(sampler.Job, "draw", None)
    draw(generator, tmp_path / "s", "--npz")
    assert content(tmp_path / "s") == before


def test_a_sample_that_was_cut_or_emptied_is_drawn_again(generator: Path, tmp_path: Path) -> None:
    draw(generator, tmp_path / "s")
    before = content(tmp_path / "s")
    first, second = tmp_path / "s" / "000001.png", tmp_path / "s" / "000004.png"
    first.write_bytes(b"")
    second.write_bytes(second.read_bytes()[:-7])
    draw(generator, tmp_path / "s")
    assert content(tmp_path / "s") == before


def test_a_sample_that_is_damaged_inside_is_named_and_can_be_deleted(
    generator: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(generator, tmp_path / "s")
    before, one = content(tmp_path / "s"), tmp_path / "s" / "000003.png"
    one.write_bytes(b"no image" + one.read_bytes()[8:])
    (tmp_path / "s" / "previews" / "grid.png").unlink()
    fixed = ["sample", "--ckpt", str(generator), "--out", str(tmp_path / "s"), "--per-class", str(PER_CLASS)]
    assert run_cli([*fixed, "--device", "cpu"]) == 3
    said = capsys.readouterr().err
    assert "000003.png cannot be read as an image" in said
    assert "hint: delete it" in said
    one.unlink()
    draw(generator, tmp_path / "s")
    assert content(tmp_path / "s") == before


def test_an_npz_asked_for_later_is_made_of_the_pngs(
    generator: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = draw(generator, tmp_path / "s")
    assert "npz" not in record
    monkeypatch.setattr(sampler.Job, "draw", None)
    assert draw(generator, tmp_path / "s", "--npz")["npz"] == "samples.npz"
    assert (tmp_path / "s" / "samples.npz").read_bytes() == (whole / "samples.npz").read_bytes()


@pytest.mark.parametrize("part", [Part(), Part(1, 4)], ids=str)
def test_two_writers_of_one_part_are_refused(tmp_path: Path, part: Part) -> None:
    with sample_files.writing(tmp_path, part), sample_files.writing(tmp_path, Part(2, 4)):
        again = sample_files.writing(tmp_path, part)
        with pytest.raises(RunError, match="is being written by pid"):
            again.__enter__()


@pytest.mark.parametrize(
    ("shard", "environment", "expected"),
    [
        (None, {}, Part()),
        ("2/3", {}, Part(1, 3)),
        (None, {"RANK": "1", "WORLD_SIZE": "4"}, Part(1, 4, 1, 4)),
        ("2/3", {"RANK": "1", "WORLD_SIZE": "4"}, Part(5, 12, 1, 4)),
    ],
)
def test_shards_and_ranks_share_the_pieces(
    shard: str | None, environment: dict[str, str], expected: Part, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert sample_files.part_of(shard) == expected


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "a/b", "1/0", "-1/2"])
def test_a_shard_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not I/N"):
        sample_files.part_of(text)


@pytest.mark.parametrize(
    ("count", "micro_batch", "length", "pieces"),
    [(50_000, 1, 64, 782), (50_000, 64, 64, 782), (50_000, 256, 256, 196), (800, 32, 32, 25), (3, 8, 3, 1)],
)
def test_pieces_are_whole_micro_batches(count: int, micro_batch: int, length: int, pieces: int) -> None:
    made = Files(Path("s"), count, micro_batch, png=True, npz=True).pieces
    assert [index for piece in made for index in piece] == list(range(count))
    assert (len(made[0]), len(made)) == (length, pieces)
    assert all(len(piece) % micro_batch == 0 for piece in made[:-1])


def test_the_record_names_every_sample_and_how_it_was_made(generator: Path, whole: Path) -> None:
    record = json.loads((whole / "samples.json").read_text())
    assert [row["file"] for row in record["samples"]] == sorted(p.name for p in whole.glob("*.png"))
    assert record["options"]["cfg"] == 1.0
    assert record["made_from"] == {"checkpoint": modelfile.load(generator)["digest"]}
    with np.load(whole / "samples.npz") as arrays:
        assert arrays["arr_0"].shape == (COUNT, 16, 16, 3)
        assert arrays["arr_1"].tolist() == [row["label"] for row in record["samples"]]
        for row, pixels in zip(record["samples"], arrays["arr_0"], strict=True):
            np.testing.assert_array_equal(writers.read_png(whole / row["file"]), pixels)


# ---- looking -------------------------------------------------------------------------------------------------------


def test_pictures_and_trajectory_are_there(whole: Path) -> None:
    assert sorted(p.name for p in (whole / "previews").iterdir()) == [
        "grid.png", "steps.gif", "steps.png", "trajectory.json", "trajectory.png"
    ]  # fmt: skip
    with Image.open(whole / "previews" / "steps.gif") as gif, Image.open(whole / "previews" / "steps.png") as sheet:
        assert getattr(gif, "n_frames", 1) == STEPS
        assert sheet.width > STEPS * 64
    told = json.loads((whole / "previews" / "trajectory.json").read_text())
    assert told["samples"] == len(told["indices"]) == COUNT
    assert {name: len(v["mean"]) for name, v in told["numbers"].items()} == dict.fromkeys(
        ("norm", "entropy", "confidence"), STEPS
    )


def test_steps_without_a_network_call_have_no_entropy(generator: Path, tmp_path: Path) -> None:
    draw(generator, tmp_path / "s", "--skip-steps", "2", "--trajectory")
    told = json.loads((tmp_path / "s" / "previews" / "trajectory.json").read_text())["numbers"]
    assert [value is None for value in told["entropy"]["mean"]] == [True, True, False, False]
    assert all(value > 0 for value in told["norm"]["mean"])


# ---- options -------------------------------------------------------------------------------------------------------


def test_options_come_from_checkpoint_preset_and_command_in_this_order(generator: Path, tmp_path: Path) -> None:
    plain = draw(generator, tmp_path / "a")["options"]
    assert (plain["cfg"], plain["cfg_schedule"], plain["draw"]) == (1.0, "linear", "gumbel")
    preset = draw(generator, tmp_path / "b", "--preset", "cfg")["options"]
    assert (preset["cfg"], preset["cfg_schedule"], preset["draw"]) == (1.0, "constant", "argmax")
    both = draw(generator, tmp_path / "c", "--preset", "cfg", "--draw", "inverse", "channels_last=true")["options"]
    assert (both["cfg_schedule"], both["draw"], both["channels_last"]) == ("constant", "inverse", True)
    assert len({(tmp_path / name / "000003.png").read_bytes() for name in "abc"}) == 3


def test_tau_end_makes_the_schedule_linear(generator: Path, tmp_path: Path) -> None:
    told = draw(generator, tmp_path / "s", "--tau", "2", "--tau-end", "1")["options"]
    assert (told["tau"], told["tau_schedule"], told["tau_end"]) == (2.0, "linear", 1.0)


# ---- the file ------------------------------------------------------------------------------------------------------


def test_sampling_defaults_are_beside_the_digest(generator: Path, tmp_path: Path) -> None:
    content = modelfile.load(generator)
    assert "sampling" not in content["config"]
    modelfile.save(tmp_path / "other.pt", {**content, "sampling": {**content["sampling"], "cfg": 4.0}})
    other = model.load(tmp_path / "other.pt")
    assert (other.digest, other.sampling.cfg) == (content["digest"], 4.0)


def as_before(content: dict[str, Any], sampling: dict[str, Any] | None) -> dict[str, Any]:
    """The file as rdpm 0.1.0 wrote it: sampling inside the config, and inside the digest."""
    config = {**content["config"], **({"sampling": sampling} if sampling else {})}
    kept = {name: value for name, value in content.items() if name != "sampling"}
    return {**kept, "config": config, "digest": modelfile.model_digest(content["weights"], config)}


def test_older_files_load(generator: Path, tmp_path: Path) -> None:
    old = as_before(modelfile.load(generator), {"cfg": 2.0, "micro_batch": 4, "cfg_schedule": "constant"})
    modelfile.save(tmp_path / "old.pt", old)
    loaded = model.load(tmp_path / "old.pt")
    assert (loaded.sampling.cfg, loaded.sampling.micro_batch, loaded.digest) == (2.0, 4, old["digest"])


def test_a_file_without_sampling_options_takes_the_defaults_and_says_so(
    generator: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    progress.quiet = False
    modelfile.save(tmp_path / "none.pt", as_before(modelfile.load(generator), None))
    assert model.load(tmp_path / "none.pt").sampling == sampling_options().sampling
    said = capsys.readouterr().err
    assert "none.pt records no sampling options" in said
    assert "cfg=0.0" in said


def test_the_record_has_what_samples_were_made_with(generator: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    made = draw(generator, out)["made_with"]
    assert [(how["device"], how["precision"]) for how in made] == [("cpu", "fp32")]
    assert not (out / ".parts").exists()
    (out / "000003.png").unlink()
    files.write_json(out / "samples.json", {**files.read_json(out / "samples.json"), "made_with": [{"device": "else"}]})
    assert draw(generator, out)["made_with"] == [{"device": "else"}, *made]


def test_passes_are_those_of_what_is_drawn(
    generator: Path, image: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def passes(name: str, *args: str) -> int:
        command = ["sample", "--ckpt", str(generator), "--per-class", "1", "--out", str(tmp_path / name), "--json"]
        assert run_cli([*command, *args]) == 0
        found: int = json.loads(capsys.readouterr().out)["passes"]
        return found

    assert passes("whole") == 7
    assert passes("late", "--init", image, "--from-step", "3") == 4
    assert passes("both", "--init", image, "--from-step", "3", "--cfg", "0") == 2


# ---- memory that is too small --------------------------------------------------------------------------------------


def test_out_of_memory_halves_the_micro_batch_and_changes_no_sample(
    generator: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = model.load(generator)
    labels, options = [0, 1, 2, 1, 0, 2, 1], sampling_options(cfg=1.0)
    wanted = list(sampler.sample(loaded.generator, loaded.tokenizer, labels, options, 1))
    original, asked = loaded.generator.sample, []

    def small(labels_B: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        asked.append(len(labels_B))
        if len(labels_B) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(labels_B, *args, **kwargs)

    monkeypatch.setattr(loaded.generator, "sample", small)
    with sampler.job(loaded.generator, loaded.tokenizer, options, 8) as job:
        before = job.made_with
        found = job.draw(range(7), labels)
        assert job.made_with == {**before, "micro_batch": 2}
        memory = transformer.trunk_of(loaded.generator.network).memory
        assert memory is not None
        assert not memory.rows  # its memory was needed
    assert before == {"device": "cpu", "precision": "fp32", "micro_batch": 8}
    assert asked == [8, 4, 2, 2, 2, 2]
    np.testing.assert_array_equal(found.pixels_BHWC, np.concatenate([part.pixels_BHWC for part in wanted]))
    said = capsys.readouterr().err
    assert "micro-batches of 4 images, under the same noise" in said
    assert "micro-batches of 2" in said
    monkeypatch.setattr(loaded.generator, "sample", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("none")))
    with pytest.raises(torch.OutOfMemoryError):
        list(sampler.sample(loaded.generator, loaded.tokenizer, labels, options, 2))


# ---- editing -------------------------------------------------------------------------------------------------------


@pytest.fixture
def image(image_folder: Path) -> str:
    return f"{image_folder}#3"


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    """White, to be drawn, on the right quarter: one column of the grid of 4×4."""
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:, 12:] = 255
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    return tmp_path / "mask.png"


def codes_of(generator: Path, edit: editing.Edit | None, indices: Sequence[int] = range(3)) -> tuple[Any, ...]:
    """Codes of a few samples, and of the image under their noise."""
    loaded, options = model.load(generator), sampling_options(cfg=1.0)
    own: Known | None = None
    given = None
    if edit:
        given = editing.given(editing.read(edit, loaded.tokenizer), loaded.tokenizer, 0, CPU)
        own = given(list(indices))
    with sampler.job(loaded.generator, loaded.tokenizer, options, 2, given) as job:
        return job.draw(indices, [1] * len(indices)).codes_BTHW, own, loaded.tokenizer


@pytest.mark.parametrize("bias", ["blend", "none"])
def test_kept_codes_and_latents_are_the_images_own(
    tmp_path: Path, image: str, mask: Path, tiny_tokenizer_file: Path, bias: str
) -> None:
    tokenizer = tiny_tokenizer_file
    if bias == "none":
        tokenizer = without_bias(tiny_tokenizer_file, tmp_path / "none.pt")
    path = save_generator(tmp_path / "g.pt", tokenizer)
    codes, own, loaded = codes_of(path, editing.Edit(image, str(mask)))
    assert torch.equal(own.keep_BTHW, (torch.arange(GRID) < 3).expand(3, STEPS, GRID, GRID))
    assert torch.equal(codes[own.keep_BTHW], own.codes_BTHW[own.keep_BTHW])
    assert not torch.equal(codes[~own.keep_BTHW], own.codes_BTHW[~own.keep_BTHW])
    assert not torch.equal(codes[0], codes[1])
    sampled, wanted = (loaded.quantizer.decode(c) for c in (codes, own.codes_BTHW))
    kept = 3 if bias == "none" else 2  # columns whose whole 3×3 neighbourhood is kept
    torch.testing.assert_close(sampled[..., :kept], wanted[..., :kept], rtol=0, atol=1e-6)
    assert not torch.allclose(sampled[..., kept], wanted[..., kept])


def without_bias(tokenizer: Path, path: Path) -> Path:
    content = modelfile.load(tokenizer)
    config = {**content["config"], "quantizer": {**content["config"]["quantizer"], "bias": "none"}}
    weights = {name: value for name, value in content["weights"].items() if ".phi." not in name}
    digest = modelfile.model_digest(weights, config)
    modelfile.save(path, {**content, "config": config, "weights": weights, "digest": digest})
    return path


@pytest.mark.parametrize("first", [1, 3])
def test_from_a_step_on_everything_is_drawn_anew(generator: Path, image: str, first: int) -> None:
    codes, own, _ = codes_of(generator, editing.Edit(image, from_step=first))
    assert torch.equal(codes[:, : first - 1], own.codes_BTHW[:, : first - 1])
    assert not torch.equal(codes[:, first - 1], own.codes_BTHW[:, first - 1])
    if first == 1:
        assert torch.equal(codes, codes_of(generator, None)[0])


def test_mask_and_step_keep_what_either_keeps(generator: Path, image: str, mask: Path) -> None:
    loaded = model.load(generator)
    keep = editing.read(editing.Edit(image, str(mask), 3), loaded.tokenizer).keep_THW
    assert keep[:2].all()
    assert keep[2:, :, :3].all()
    assert not keep[2:, :, 3].any()


def test_an_edit_is_recorded_and_another_is_refused(
    generator: Path, image: str, mask: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit = ["--init", image, "--mask", str(mask)]
    record = draw(generator, tmp_path / "s", *edit)
    assert set(record["made_from"]) == {"checkpoint", "init", "mask"}
    assert record["options"]["edit"] == {"from_step": 1, "masked": True}
    other = ["sample", "--ckpt", str(generator), "--out", str(tmp_path / "s"), "--per-class", str(PER_CLASS)]
    assert run_cli([*other, "--init", image.replace("#3", "#4"), "--mask", str(mask)]) == 2
    assert "made_from.init" in capsys.readouterr().err


@pytest.mark.parametrize("spec", ["{folder}/b/05.jpg", "{folder}#17"])
def test_an_image_is_a_file_or_an_item_of_a_source(image_folder: Path, spec: str) -> None:
    found = items.open_item(spec.format(folder=image_folder))
    assert found.mode == "RGB"
    with Image.open(image_folder / "b" / "05.jpg") as there:
        np.testing.assert_array_equal(np.asarray(found), np.asarray(there.convert("RGB")))


def test_a_mask_is_of_the_images_size(generator: Path, image_folder: Path, mask: Path, tmp_path: Path) -> None:
    loaded = model.load(generator)
    with Image.open(image_folder / "a" / "00.png") as image:
        size = image.size
    Image.new("RGB", size, "white").save(tmp_path / "same.png")
    same = editing.Edit(str(image_folder / "a" / "00.png"), str(tmp_path / "same.png"))
    assert not editing.read(same, loaded.tokenizer).keep_THW.any()
    Image.new("RGB", (50, 60), "white").save(tmp_path / "other.png")
    with pytest.raises(UsageError, match="is 50×60, the image"):
        editing.read(editing.Edit(same.init, str(tmp_path / "other.png")), loaded.tokenizer)
    Image.new("RGB", size).save(tmp_path / "black.png")
    with pytest.raises(UsageError, match="no white pixel"):
        editing.read(editing.Edit(same.init, str(tmp_path / "black.png")), loaded.tokenizer)


def test_one_white_pixel_opens_its_cell() -> None:
    mask = np.zeros((16, 16, 3), np.uint8)
    mask[5, 9] = (0, 200, 0)
    cells = items.cells(mask, (4, 4))
    assert np.argwhere(cells).tolist() == [[1, 2]]


# ---- best of n -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("judge") / "judge.pt"
    with torch.random.fork_rng():
        torch.manual_seed(3)
        network = judge_file.Judge(16, 8, 8, CLASSES)
    modelfile.save(path, judge_file.pack(network, list("cab"), provenance={"heldout_accuracy": 0.5}))
    return path


def test_the_best_of_its_own_candidates_is_kept(generator: Path, judge: Path) -> None:
    loaded, labels = model.load(generator), [0, 2, 1]
    seen = rejection.open_judge(str(judge), list("abc"), CPU)
    with sampler.job(loaded.generator, loaded.tokenizer, sampling_options(), 2) as job:
        kept = job.best([0, 1, 2], labels, 4, seen)
        candidates = job.draw(range(12), [label for label in labels for _ in range(4)])
        alone = job.best([1], [2], 4, seen)
    network, _ = judge_file.load(judge)
    for place, label in enumerate(labels):
        own = candidates.pixels_BHWC[4 * place : 4 * place + 4]
        logits = network(torch.from_numpy(own).permute(0, 3, 1, 2).float() / 127.5 - 1)[1]
        best = int(logits.log_softmax(1)[:, "cab".index("abc"[label])].argmax())
        np.testing.assert_array_equal(kept.pixels_BHWC[place], own[best])
        assert torch.equal(kept.codes_BTHW[place], candidates.codes_BTHW[4 * place + best])
    np.testing.assert_array_equal(alone.pixels_BHWC[0], kept.pixels_BHWC[1])


def test_the_rate_and_the_judge_are_recorded(generator: Path, judge: Path, tmp_path: Path) -> None:
    rejection_of = ["--reject", "keep=0.25", "--judge", str(judge)]
    record = draw(generator, tmp_path / "a", *rejection_of)
    assert record["options"]["reject"] == {
        "keep": 0.25,
        "candidates": 4,
        "judge": "judge judge.pt",
        "judge_sha256": modelfile.load(judge)["digest"],
    }
    for number in (2, 1):
        draw(generator, tmp_path / "b", "--shard", f"{number}/2", *rejection_of)
    assert content(tmp_path / "b") == content(tmp_path / "a")


@pytest.mark.parametrize("text", ["keep=1", "keep=0", "keep=x", "0.25", "keep=-1", "keep=2"])
def test_a_rate_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="keeps one sample of several"):
        sample_options.ask_reject(text, "judge.pt")


def test_a_torchvision_classifier_may_judge(tmp_path: Path) -> None:
    from torchvision import models

    network = models.get_model("squeezenet1_1", weights=None).eval()
    torch.save(network.state_dict(), tmp_path / "net.pth")
    spec = f"squeezenet1_1:{tmp_path / 'net.pth'}"
    with pytest.raises(CheckpointError, match="has 1000 classes, this checkpoint 3"):
        rejection.open_judge(spec, list("abc"), CPU)
    judge = rejection.open_judge(spec, [str(i) for i in range(1000)], CPU)
    assert judge.sha256 == files.sha256_file(tmp_path / "net.pth")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    x = torch.nn.functional.interpolate(
        torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255, (224, 224), mode="bilinear", antialias=True
    )
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    wanted = network((x - mean) / std).log_softmax(1)[[0, 1], [7, 3]]
    np.testing.assert_allclose(judge(pixels, [7, 3]), wanted.detach().numpy(), rtol=1e-4)
    with pytest.raises(CheckpointError, match="does not exist"):
        rejection.open_judge("squeezenet1_1:no-such.pth", list("abc"), CPU)


def test_a_judge_that_does_not_know_the_classes_is_refused(judge: Path) -> None:
    with pytest.raises(CheckpointError, match="does not know class 'd'"):
        rejection.open_judge(str(judge), list("abcd"), CPU)


def test_engine_functions_take_what_the_command_takes(generator: Path, tmp_path: Path) -> None:
    told: Callable[..., engine.Result] = engine.sample
    result = told(generator, "0", 2, tmp_path / "s", sampling={"cfg": 0.5}, outputs=engine.Outputs(grid=False))
    assert result.values["cfg"] == 0.5
    assert "grid" not in result.values

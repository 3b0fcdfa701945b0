"""`rdpm sample` as a job: image i depends on (checkpoint, options, seed, i), whoever draws it and in whatever order."""

import json
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from generators import CLASSES, GRID, STEPS, sampling_options, save_generator
from PIL import Image
from processes import command_line, exit_code, killed_after_samples, spawn, torchrun

from rdpm_cli import checkpoint, files
from rdpm_cli.cli.app import run as run_cli
from rdpm_cli.data.pictures import read_png
from rdpm_cli.data.pixels import cells, to_pixels
from rdpm_cli.device import one_thread
from rdpm_cli.engine import sample as engine
from rdpm_cli.engine.sample import Drawn, Edit, Outputs, Share
from rdpm_cli.errors import CheckpointError, UsageError
from rdpm_cli.evaluation import judge as judges
from rdpm_cli.generator import registry, sampler
from rdpm_cli.generator.config import ResGenSampling, SamplingConfig
from rdpm_cli.generator.contract import Known, SampleOptions
from rdpm_cli.tokenizer.model import Tokenizer

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


@pytest.fixture(scope="module")
def whole(generator: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All samples by one process, with every output. Read only."""
    out = tmp_path_factory.mktemp("whole") / "samples"
    with one_thread():
        draw(generator, out, "--npz", "--gif")
    return out


def command(generator: Path, out: Path, *args: str) -> list[str]:
    fixed = ["sample", "--ckpt", str(generator), "--out", str(out), "--per-class", str(PER_CLASS), "--device", "cpu"]
    return [*fixed, "--quiet", *args]


def draw(generator: Path, out: Path, *args: str) -> dict[str, Any]:
    """The record that the command writes."""
    assert run_cli(command(generator, out, *args)) == 0
    record = out / "samples.json"
    return json.loads(record.read_text()) if record.is_file() else {}


def content(out: Path) -> dict[str, bytes]:
    """The files that hold samples, not those that record how they were drawn."""
    return {
        str(p.relative_to(out)): p.read_bytes()
        for p in sorted(out.rglob("*"))
        if p.is_file() and not p.relative_to(out).parts[0].startswith(".") and p.name != "run.json"
    }


# ---- whoever draws them, in whatever order -------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3, 7])
def test_a_sample_depends_on_seed_and_index_not_on_its_batch(generator: Path, batch: int) -> None:
    """The codes bit for bit; the pixels too, since every pass is padded to one shape."""
    loaded, labels = registry.load(generator), [0, 1, 2, 1, 0, 2, 1]

    def samples(indices: Sequence[int], seed: int, size: int) -> sampler.Samples:
        options = sampling_options(seed, cfg=1.0)
        job = sampler.Job(loaded.generator, loaded.tokenizer, options, size)
        return job.draw(indices, [labels[i] for i in indices])

    together = samples(range(7), 5, 7)
    backwards = samples([6, 2, 0], 5, batch)
    assert torch.equal(backwards.codes_BTS, together.codes_BTS[[6, 2, 0]])
    assert np.abs(backwards.pixels_BHWC.astype(int) - together.pixels_BHWC[[6, 2, 0]]).max() <= 1
    assert not torch.equal(samples([6, 2, 0], 6, batch).codes_BTS, backwards.codes_BTS)


def test_shards_in_any_order_write_the_same_files(generator: Path, whole: Path, tmp_path: Path) -> None:
    for number in (3, 1):
        assert not draw(generator, tmp_path / "s", "--shard", f"{number}/3", "--npz", "--gif")
        assert len(list((tmp_path / "s").glob("*.png"))) < COUNT
    assert not (tmp_path / "s" / "samples.npz").exists()
    draw(generator, tmp_path / "s", "--shard", "2/3", "--npz", "--gif")
    assert content(tmp_path / "s") == content(whole)


def test_two_processes_of_torchrun_write_the_same_files(generator: Path, whole: Path, tmp_path: Path) -> None:
    args = command(generator, tmp_path / "s", "--npz", "--gif")
    ranks = [spawn(command_line, args, environment) for environment in torchrun(2)]
    assert [exit_code(process) for process in ranks] == [0, 0]
    assert content(tmp_path / "s") == content(whole)


@pytest.mark.slow
def test_gpus_n_writes_the_same_files(
    generator: Path, whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    draw(generator, tmp_path / "s", "--npz", "--gif", "--gpus", "2", "--json")
    assert json.loads(capfd.readouterr().out)["samples"] == COUNT
    assert content(tmp_path / "s") == content(whole)


@pytest.mark.parametrize("png", [True, False], ids=["png", "no png"])
def test_a_killed_job_continues_to_the_same_bytes(generator: Path, whole: Path, tmp_path: Path, png: bool) -> None:
    out = tmp_path / "s"
    args = command(generator, out, "--npz", "--gif", *([] if png else ["--no-png"]))
    for batches in (1, 3):
        assert exit_code(spawn(killed_after_samples, batches, args, {})) == -signal.SIGKILL
        assert not (out / "samples.json").exists()
    written = {p: p.stat().st_mtime_ns for p in [*out.glob("*.png"), *out.glob("chunks/*.npy")]}
    assert 0 < len(written) < COUNT + COUNT / 2
    assert run_cli(args) == 0
    assert not (out / "chunks").exists()
    assert all(p.stat().st_mtime_ns == time for p, time in written.items() if p.suffix == ".png")
    expected = content(whole)
    if not png:
        expected = {name: data for name, data in expected.items() if not name[:6].isdecimal()}
        assert "file" not in json.loads((out / "samples.json").read_text())["samples"][0]
        expected.pop("samples.json")
    assert expected.items() <= content(out).items()


@pytest.mark.parametrize(("number", "code", "count"), [(signal.SIGTERM, 75, 8), (signal.SIGINT, 130, 6)])
def test_a_stopped_job_keeps_its_samples_and_continues(
    generator: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    code: int,
    count: int,
) -> None:
    original = sampler.Job.draw

    def signalled(job: sampler.Job, indices: Sequence[int], labels: Sequence[int]) -> sampler.Samples:
        if 6 in indices:
            os.kill(os.getpid(), number)
        return original(job, indices, labels)

    monkeypatch.setattr(sampler.Job, "draw", signalled)
    assert run_cli(command(generator, tmp_path / "s")) == code
    assert len(list((tmp_path / "s").glob("*.png"))) == count
    monkeypatch.undo()
    draw(generator, tmp_path / "s", "--npz", "--gif")
    assert content(tmp_path / "s") == content(whole)


@pytest.mark.parametrize("outputs", [["--npz"], ["--npz", "--no-png"]], ids=" ".join)
def test_a_finished_job_draws_nothing_again(
    generator: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outputs: list[str]
) -> None:
    draw(generator, tmp_path / "s", *outputs)
    expected = content(tmp_path / "s")
    monkeypatch.setattr(sampler.Job, "draw", None)
    draw(generator, tmp_path / "s", *outputs)
    assert content(tmp_path / "s") == expected


def test_outputs_requested_later_are_made_of_those_that_are_there(
    generator: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "npz" not in draw(generator, tmp_path / "a")
    draw(generator, tmp_path / "b", "--npz", "--no-png")
    monkeypatch.setattr(sampler.Job, "draw", None)
    for name in "ab":
        assert draw(generator, tmp_path / name, "--npz")["npz"] == "samples.npz"
        assert content(tmp_path / name).items() <= content(whole).items()


def test_a_damaged_sample_is_drawn_again_or_named(
    generator: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "s"
    draw(generator, out)
    expected = content(out)
    emptied, cut, damaged = (out / f"{index:06d}.png" for index in (1, 4, 3))
    emptied.write_bytes(b"")
    cut.write_bytes(cut.read_bytes()[:-7])
    draw(generator, out)
    assert content(out) == expected
    damaged.write_bytes(b"no image" + damaged.read_bytes()[8:])
    assert run_cli(command(generator, out)) == 3
    assert "000003.png" in capsys.readouterr().err
    damaged.unlink()
    draw(generator, out)
    assert content(out) == expected


# ---- shares of a job -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shard", "environment", "expected"),
    [
        (None, {}, Share()),
        ("2/3", {}, Share(1, 3)),
        (None, {"RANK": "1", "WORLD_SIZE": "4"}, Share(1, 4, 1, 4)),
        ("2/3", {"RANK": "1", "WORLD_SIZE": "4"}, Share(5, 12, 1, 4)),
    ],
)
def test_shards_and_ranks_share_a_job(
    shard: str | None, environment: dict[str, str], expected: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert engine.share_of(shard) == expected


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "a/b", "1/0", "-1/2", ""])
def test_an_impossible_shard_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--shard"):
        engine.share_of(text)


def test_the_first_rank_waits_for_the_batches_of_its_own_command() -> None:
    batches = [range(n, n + 1) for n in range(12)]
    assert Share(4, 12, 0, 4).of_command(batches) == batches[4:8]


# ---- the record and the pictures -----------------------------------------------------------------------------------


def test_the_record_lists_every_sample(generator: Path, whole: Path) -> None:
    record = json.loads((whole / "samples.json").read_text())
    assert list(record) == [
        "format", "version", "made_from", "options", "resolution", "class_names", "reference", "versions", "samples",
        "checkpoint", "npz", "made_with",
    ]  # fmt: skip
    assert [row["file"] for row in record["samples"]] == sorted(p.name for p in whole.glob("*.png"))
    assert record["options"] == {**registry.load(generator).sampling.model_dump(), "seed": 0}
    assert record["made_from"] == {"checkpoint": checkpoint.load(generator)["digest"]}
    assert record["checkpoint"] == str(generator.resolve())
    with np.load(whole / "samples.npz") as arrays:
        assert arrays["arr_1"].tolist() == [row["label"] for row in record["samples"]]
        for row, pixels in zip(record["samples"], arrays["arr_0"], strict=True):
            np.testing.assert_array_equal(read_png(whole / row["file"]), pixels)


def test_the_record_has_device_and_precision_of_every_run(generator: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    notes = draw(generator, out)["made_with"]
    assert [(note["device"], note["precision"]) for note in notes] == [("cpu", "fp32")]
    (out / "000003.png").unlink()
    files.write_json(out / "samples.json", {**files.read_json(out / "samples.json"), "made_with": [{"device": "gpu"}]})
    assert draw(generator, out)["made_with"] == [{"device": "gpu"}, *notes]


def test_the_previews_show_every_step(whole: Path) -> None:
    assert sorted(p.name for p in (whole / "previews").iterdir()) == ["grid.png", "steps.gif", "steps.png"]
    with Image.open(whole / "previews" / "steps.gif") as gif, Image.open(whole / "previews" / "steps.png") as sheet:
        assert getattr(gif, "n_frames", 1) == STEPS
        assert sheet.width > STEPS * 64


def test_passes_are_counted_as_they_are_made(
    generator: Path, image: str, judge: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def passes(name: str, *args: str) -> int:
        assert run_cli([*command(generator, tmp_path / name), "--per-class", "1", "--json", *args]) == 0
        values: dict[str, int] = json.loads(capsys.readouterr().out)
        return values["passes"]

    assert passes("whole") == 7  # of T = 4 steps only the first has lambda 0
    assert passes("late", "--init", image, "--from-step", "3") == 4
    assert passes("no guidance", "--init", image, "--from-step", "3", "--cfg", "0") == 2
    assert passes("best of 4", "--reject", "keep=0.25", "--judge", str(judge)) == 28


def test_the_result_has_the_requested_files_only(generator: Path, tmp_path: Path) -> None:
    outputs = Outputs(grid=False, npz=True)
    result = engine.sample(generator, "0", 2, tmp_path / "s", sampling={"cfg": 0.5}, outputs=outputs, device="cpu")
    assert result.values["cfg"] == 0.5
    assert result.values["npz"] == str(tmp_path / "s" / "samples.npz")
    assert "grid" not in result.values
    with pytest.raises(UsageError, match="--no-png"):
        engine.sample(generator, "0", 2, tmp_path / "t", outputs=Outputs(png=False))
    assert not (tmp_path / "t").exists()


# ---- eval --ckpt ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [[range(21)], [range(3, 8), range(11, 12), range(15, 21)]], ids=["all", "some"])
def test_drawn_images_are_those_of_the_folder(generator: Path, whole: Path, pieces: list[range]) -> None:
    images = Drawn(generator, per_class=PER_CLASS).images(CPU)
    with np.load(whole / "samples.npz") as arrays:
        assert images.labels == arrays["arr_1"].tolist()
        for piece, pixels in zip(pieces, images.read(pieces), strict=True):
            np.testing.assert_array_equal(pixels, arrays["arr_0"][piece.start : piece.stop])
    assert images.count == COUNT


def test_drawn_images_take_options_over_those_of_the_preset(generator: Path) -> None:
    images = Drawn(generator, "0,2", 3, 4, ("cfg=2.5", "top_k=3", "draw=gumbel"), "cfg").images(CPU)
    options = images.record["options"]
    assert (options["cfg"], options["cfg_schedule"], options["draw"], options["top_k"]) == (
        2.5,
        "constant",
        "gumbel",
        3,
    )
    assert (options["seed"], options["classes"], options["per_class"]) == (4, "0,2", 3)
    assert (images.count, sorted(images.labels or [])) == (6, [0, 0, 0, 2, 2, 2])
    with pytest.raises(UsageError, match="samples/"):
        Drawn(generator, overrides=("samples/",)).images(CPU)


# ---- options -------------------------------------------------------------------------------------------------------


def test_options_come_from_checkpoint_preset_and_command_in_this_order(generator: Path, tmp_path: Path) -> None:
    plain = draw(generator, tmp_path / "a")["options"]
    assert (plain["cfg"], plain["cfg_schedule"], plain["draw"]) == (1.0, "linear", "gumbel")
    preset = draw(generator, tmp_path / "b", "--preset", "cfg")["options"]
    assert (preset["cfg"], preset["cfg_schedule"], preset["draw"]) == (1.0, "constant", "argmax")
    both = draw(generator, tmp_path / "c", "--preset", "cfg", "draw=inverse", "channels_last=true")["options"]
    assert (both["cfg_schedule"], both["draw"], both["channels_last"]) == ("constant", "inverse", True)
    assert len({(tmp_path / name / "000003.png").read_bytes() for name in "abc"}) == 3


@pytest.mark.parametrize(
    ("preset", "requested", "token"),
    [
        ("gumble", {}, "gumble"),
        ("cfg", {}, "cfg"),  # guidance without a lambda
        (None, {"temperature": 1}, "temperature"),
        (None, {"cfg": -1}, "cfg"),
        (None, {"cfg_power": 3.0}, "cfg_power"),  # of another schedule
        (None, {"draw": "argmax", "tau": 2.0}, "tau"),  # the likeliest code has no temperature
        ("raw", {"top_k": 3}, "top_k"),
    ],
)
def test_options_that_cannot_be_or_have_no_effect_are_refused(
    preset: str | None, requested: dict[str, Any], token: str
) -> None:
    with pytest.raises(UsageError) as error:
        engine.sampling_options(sampling_options().sampling, preset, requested)
    assert token in error.value.message


@pytest.mark.parametrize(
    ("recorded", "name"),
    [(sampling_options().sampling, "conf_temp"), (ResGenSampling(), "tau"), (ResGenSampling(), "skip_steps")],
)
def test_an_option_of_another_family_is_refused_with_those_of_this_one(recorded: SamplingConfig, name: str) -> None:
    with pytest.raises(UsageError) as error:
        engine.sampling_options(recorded, None, {name: 1})
    assert name in error.value.message
    assert all(field in error.value.hint for field in type(recorded).model_fields)


def test_recorded_options_without_effect_are_no_error() -> None:
    assert engine.sampling_options(sampling_options(tau=2.0).sampling, "raw", {}).model_dump()["draw"] == "argmax"


@pytest.mark.parametrize("text", ["keep=1", "keep=0", "keep=x", "0.25", "keep=-1", "keep=2", "keep=0.3"])
def test_an_impossible_rate_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--reject"):
        engine.reject_options(text, "judge.pt")


def test_options_that_go_together_are_refused_alone() -> None:
    for text, judge in (("keep=0.5", None), (None, "judge.pt")):
        with pytest.raises(UsageError, match="--reject"):
            engine.reject_options(text, judge)
    assert engine.reject_options("keep=0.5", "judge.pt") == engine.Reject(2, "judge.pt")
    for edit, option in (
        ((None, "m.png", None), "--mask"),
        ((None, None, 2), "--from-step"),
        (("i", None, None), "--init"),
    ):
        with pytest.raises(UsageError, match=option):
            engine.edit_options(*edit)
    assert engine.edit_options(None, None, None) is None


# ---- the sampling options in a checkpoint --------------------------------------------------------------------------


def test_sampling_defaults_are_no_part_of_the_digest(generator: Path, tmp_path: Path) -> None:
    content = checkpoint.load(generator)
    assert "sampling" not in content["config"]
    checkpoint.save(tmp_path / "other.pt", {**content, "sampling": {**content["sampling"], "cfg": 4.0}})
    other = registry.load(tmp_path / "other.pt")
    assert (other.digest, other.sampling.cfg) == (content["digest"], 4.0)


# ---- memory that is too small --------------------------------------------------------------------------------------


def test_out_of_memory_halves_the_micro_batch_and_changes_no_sample(
    generator: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = registry.load(generator)
    labels, options = [0, 1, 2, 1, 0, 2, 1], sampling_options(cfg=1.0)
    expected = list(sampler.sample(loaded.generator, loaded.tokenizer, labels, options, 1))
    original, rows = loaded.generator.sample, []

    def small(condition: Any, indices_B: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        rows.append(len(indices_B))
        if len(indices_B) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(condition, indices_B, *args, **kwargs)

    monkeypatch.setattr(loaded.generator, "sample", small)
    job = sampler.Job(loaded.generator, loaded.tokenizer, options, 8)
    made_with = job.made_with
    samples = job.draw(range(7), labels)
    assert job.made_with == {**made_with, "micro_batch": 2}
    assert made_with == {"device": "cpu", "precision": "fp32", "micro_batch": 8}
    assert rows == [8, 4, 2, 2, 2, 2]
    np.testing.assert_array_equal(samples.pixels_BHWC, np.concatenate([part.pixels_BHWC for part in expected]))
    assert "out of memory" in capsys.readouterr().err
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


def codes_of(generator: Path, edit: Edit | None) -> tuple[torch.Tensor, Known | None, Tokenizer]:
    """Codes (3, T, S) of three samples, and those of the image under their noise."""
    loaded, options, indices = registry.load(generator), sampling_options(cfg=1.0), range(3)
    known = engine.read_original(edit, loaded.tokenizer).known_codes(loaded.tokenizer, 0, CPU) if edit else None
    job = sampler.Job(loaded.generator, loaded.tokenizer, options, 2, known)
    codes_BTS = job.draw(indices, [1] * len(indices)).codes_BTS
    return codes_BTS, known(list(indices)) if known else None, loaded.tokenizer


@pytest.mark.parametrize("bias", ["blend", "none"])
def test_kept_codes_and_latents_are_those_of_the_image(
    tmp_path: Path, image: str, mask: Path, tiny_tokenizer_file: Path, bias: str
) -> None:
    tokenizer_file = tiny_tokenizer_file
    if bias == "none":
        tokenizer_file = without_bias(tiny_tokenizer_file, tmp_path / "none.pt")
    generator = save_generator(tmp_path / "g.pt", tokenizer_file)
    codes, known, tokenizer = codes_of(generator, Edit(image, str(mask)))
    assert known is not None
    left_S = (torch.arange(GRID * GRID) % GRID < 3).expand(3, STEPS, -1)
    assert torch.equal(known.keep_BTS, left_S)
    assert torch.equal(codes[left_S], known.codes_BTS[left_S])
    assert not torch.equal(codes[~left_S], known.codes_BTS[~left_S])
    assert not torch.equal(codes[0], codes[1])
    sampled, original = (tokenizer.quantizer.decode(c).unflatten(2, (GRID, GRID)) for c in (codes, known.codes_BTS))
    kept = 3 if bias == "none" else 2  # columns whose whole 3×3 neighbourhood is kept
    torch.testing.assert_close(sampled[..., :kept], original[..., :kept], rtol=0, atol=1e-6)
    assert not torch.allclose(sampled[..., kept], original[..., kept])


def without_bias(tokenizer: Path, path: Path) -> Path:
    content = checkpoint.load(tokenizer)
    config = {**content["config"], "quantizer": {**content["config"]["quantizer"], "bias": "none"}}
    weights = {name: value for name, value in content["weights"].items() if ".phi." not in name}
    digest = checkpoint.model_digest(weights, config)
    checkpoint.save(path, {**content, "config": config, "weights": weights, "digest": digest})
    return path


@pytest.mark.parametrize("first", [1, 3])
def test_from_a_step_on_every_code_is_drawn(generator: Path, image: str, first: int) -> None:
    codes, known, _ = codes_of(generator, Edit(image, from_step=first))
    assert known is not None
    assert torch.equal(codes[:, : first - 1], known.codes_BTS[:, : first - 1])
    assert not torch.equal(codes[:, first - 1], known.codes_BTS[:, first - 1])
    if first == 1:
        assert torch.equal(codes, codes_of(generator, None)[0])


def test_mask_and_step_keep_what_either_keeps(generator: Path, image: str, mask: Path) -> None:
    keep_TS = engine.read_original(Edit(image, str(mask), 3), registry.load(generator).tokenizer).keep_TS
    keep_THW = keep_TS.unflatten(1, (GRID, GRID))
    assert keep_THW[:2].all()
    assert keep_THW[2:, :, :3].all()
    assert not keep_THW[2:, :, 3].any()


def test_an_edit_is_recorded_and_another_one_is_refused(
    generator: Path, image: str, mask: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = draw(generator, tmp_path / "s", "--init", image, "--mask", str(mask))
    assert set(record["made_from"]) == {"checkpoint", "init", "mask"}
    assert record["options"]["edit"] == {"from_step": 1, "masked": True}
    other = ["--init", image.replace("#3", "#4"), "--mask", str(mask)]
    assert run_cli(command(generator, tmp_path / "s", *other)) == 2
    assert "made_from.init" in capsys.readouterr().err


def test_a_mask_has_the_images_size_and_a_white_pixel(generator: Path, image_folder: Path, tmp_path: Path) -> None:
    tokenizer, init = registry.load(generator).tokenizer, str(image_folder / "a" / "00.png")
    with Image.open(init) as image:
        size = image.size
    Image.new("RGB", size, "white").save(tmp_path / "same.png")
    assert not engine.read_original(Edit(init, str(tmp_path / "same.png")), tokenizer).keep_TS.any()
    Image.new("RGB", (50, 60), "white").save(tmp_path / "other.png")
    Image.new("RGB", size).save(tmp_path / "black.png")
    for name, token in (("other.png", "50×60"), ("black.png", "black.png")):
        with pytest.raises(UsageError, match=token):
            engine.read_original(Edit(init, str(tmp_path / name)), tokenizer)
    for step in (0, STEPS + 1):
        with pytest.raises(UsageError, match="--from-step"):
            engine.read_original(Edit(init, None, step), tokenizer)


def test_one_white_pixel_opens_its_cell() -> None:
    mask = np.zeros((16, 16, 3), np.uint8)
    mask[5, 9] = (0, 200, 0)
    assert np.argwhere(cells(mask, (4, 4))).tolist() == [[1, 2]]


# ---- best of n -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("judge") / "judge.pt"
    with torch.random.fork_rng():
        torch.manual_seed(3)
        network = judges.Judge(16, 8, 8, CLASSES)
    checkpoint.save(path, judges.pack(network, list("cab"), provenance={"heldout_accuracy": 0.5}))
    return path


def test_the_best_of_a_samples_candidates_is_kept(generator: Path, judge: Path) -> None:
    loaded, labels = registry.load(generator), [0, 2, 1]
    scores = judges.open_judge(str(judge), list("abc"), CPU)
    job = sampler.Job(loaded.generator, loaded.tokenizer, sampling_options(), 2)
    best = job.best([0, 1, 2], labels, 4, scores)
    candidates = job.draw(range(12), [label for label in labels for _ in range(4)])
    alone = job.best([1], [2], 4, scores)
    network, _ = judges.load(judge)
    for row, label in enumerate(labels):
        images = candidates.pixels_BHWC[4 * row : 4 * row + 4]
        logits = network(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1)[1]
        row_of_best = int(logits.log_softmax(1)[:, "cab".index("abc"[label])].argmax())
        np.testing.assert_array_equal(best.pixels_BHWC[row], images[row_of_best])
        assert torch.equal(best.codes_BTS[row], candidates.codes_BTS[4 * row + row_of_best])
    np.testing.assert_array_equal(alone.pixels_BHWC[0], best.pixels_BHWC[1])


def test_rate_and_judge_are_recorded_and_shards_agree(generator: Path, judge: Path, tmp_path: Path) -> None:
    best = ["--reject", "keep=0.25", "--judge", str(judge)]
    record = draw(generator, tmp_path / "a", *best)
    digest = checkpoint.load(judge)["digest"]
    expected = {"keep": 0.25, "candidates": 4, "judge": "judge judge.pt", "judge_sha256": digest}
    assert record["options"]["reject"] == expected
    for number in (2, 1):
        draw(generator, tmp_path / "b", "--shard", f"{number}/2", *best)
    assert content(tmp_path / "b") == content(tmp_path / "a")


def test_a_judge_that_does_not_know_the_classes_is_refused(judge: Path) -> None:
    with pytest.raises(CheckpointError, match="'d'"):
        judges.open_judge(str(judge), list("abcd"), CPU)


def test_decoding_is_the_tokenizers(generator: Path) -> None:
    """The sampler's pixels are the tokenizer's reconstruction of its codes."""
    loaded = registry.load(generator)
    job = sampler.Job(loaded.generator, loaded.tokenizer, SampleOptions(loaded.sampling), 3)
    samples = job.draw(range(3), [0, 1, 2])
    images = to_pixels(loaded.tokenizer.decode(samples.codes_BTS)).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(samples.pixels_BHWC, images)

"""`rdpm sample` as a job: image i depends on (checkpoint, options, seed, i), whoever draws it and in whatever order."""

import json
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import extractors
import numpy as np
import pytest
import torch
from extractors import save_judge
from generators import CLASSES, GRID, STEPS, sampling_options, save_generator
from helpers import CPU
from PIL import Image
from processes import exit_code, killed_after_samples, run_all, spawn

from rdpm_cli import checkpoint, files
from rdpm_cli.cli.app import run as run_cli
from rdpm_cli.data.pixels import Pixels, cells, hwc, to_pixels
from rdpm_cli.distributed import one_thread
from rdpm_cli.engine import sample as engine
from rdpm_cli.engine.sample import Drawn, Edit
from rdpm_cli.errors import UsageError
from rdpm_cli.generator import registry, sampler
from rdpm_cli.generator.config import ResGenSampling
from rdpm_cli.generator.contract import Known
from rdpm_cli.tokenizer.model import Tokenizer

Capture = pytest.CaptureFixture[str]
PER_CLASS = 7
COUNT = CLASSES * PER_CLASS
LABELS = [0, 1, 2, 1, 0, 2, 1]


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
    return files.read_json(out / "samples.json") if (out / "samples.json").is_file() else {}


def content(out: Path) -> dict[str, bytes]:
    """The files that hold samples, not those that record how they were drawn."""
    paths = [path for path in out.rglob("*") if path.is_file() and path.name != "run.json"]
    names = {path.relative_to(out).as_posix(): path for path in paths}
    return {name: path.read_bytes() for name, path in names.items() if not name.startswith(".")}


@pytest.mark.parametrize("batch", [1, 3, 7])
def test_a_sample_depends_on_seed_and_index_not_on_its_batch(generator: Path, batch: int) -> None:
    """The codes bit for bit; the pixels, those of the tokenizer, up to rounding in passes of another shape."""
    loaded = registry.load(generator)

    def samples(indices: Sequence[int], seed: int, size: int) -> sampler.Samples:
        job = sampler.Job(loaded.generator, loaded.tokenizer, sampling_options(seed, cfg=1.0), size)
        return job.draw(indices, [LABELS[i] for i in indices])

    together = samples(range(7), 5, 7)
    backwards = samples([6, 2, 0], 5, batch)
    assert torch.equal(backwards.codes_BTS, together.codes_BTS[[6, 2, 0]])
    assert not torch.equal(samples([6, 2, 0], 6, batch).codes_BTS, backwards.codes_BTS)
    for expected in (together.pixels_BHWC[[6, 2, 0]], hwc(to_pixels(loaded.tokenizer.decode(backwards.codes_BTS)))):
        assert np.abs(backwards.pixels_BHWC.astype(int) - expected).max() <= 1


@pytest.mark.parametrize(("shards", "processes"), [([3, 1, 2], 1), ([2, 1], 2)])
def test_shards_in_any_order_and_processes_of_torchrun_write_the_same_files(
    generator: Path, whole: Path, tmp_path: Path, shards: list[int], processes: int
) -> None:
    for number in shards:
        assert not (tmp_path / "s" / "samples.npz").exists()
        args = command(generator, tmp_path / "s", "--shard", f"{number}/{len(shards)}", "--npz", "--gif")
        assert run_all(args, processes) == [0] * processes
    assert content(tmp_path / "s") == content(whole)


def test_a_killed_job_continues_to_the_same_bytes(generator: Path, whole: Path, tmp_path: Path) -> None:
    args = command(generator, tmp_path / "s", "--npz", "--gif")
    for batches in (1, 3):
        assert exit_code(spawn(killed_after_samples, batches, args, {})) == -signal.SIGKILL
        assert not (tmp_path / "s" / "samples.json").exists()
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "s").glob("*.png")}
    assert 0 < len(written) < COUNT
    assert run_cli(args) == 0
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())
    assert content(tmp_path / "s") == content(whole)


@pytest.mark.parametrize(("number", "code", "count"), [(signal.SIGTERM, 75, 8), (signal.SIGINT, 130, 6)])
def test_a_stopped_job_keeps_its_samples_and_continues(
    generator: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int, count: int
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


@pytest.mark.parametrize("outputs", [[], ["--npz", "--no-png"]], ids=["png", "npz"])
def test_a_finished_job_draws_nothing_again_also_for_other_outputs(
    generator: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outputs: list[str]
) -> None:
    record = draw(generator, tmp_path / "s", *outputs)
    assert ("npz" in record) != ("file" in record["samples"][0])
    expected = content(tmp_path / "s")
    monkeypatch.setattr(sampler.Job, "draw", None)
    draw(generator, tmp_path / "s", *outputs)
    assert content(tmp_path / "s") == expected
    assert draw(generator, tmp_path / "s", "--npz")["npz"] == "samples.npz"
    assert content(tmp_path / "s").items() <= content(whole).items()


def test_record_and_previews_show_how_samples_were_drawn(generator: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    record = draw(generator, out)
    assert record["options"] == {**registry.load(generator).sampling.model_dump(), "seed": 0}
    assert record["made_from"] == {"checkpoint": checkpoint.load(generator)["digest"]}
    assert record["checkpoint"] == str(generator.resolve())
    assert [(note["device"], note["precision"]) for note in record["made_with"]] == [("cpu", "fp32")]
    assert sorted(path.name for path in (whole / "previews").iterdir()) == ["grid.png", "steps.gif", "steps.png"]
    with Image.open(whole / "previews" / "steps.gif") as gif:
        assert getattr(gif, "n_frames", 1) == STEPS
    (out / "000003.png").unlink()
    files.write_json(out / "samples.json", {**record, "made_with": [{"device": "gpu"}]})
    assert draw(generator, out)["made_with"] == [{"device": "gpu"}, *record["made_with"]]


def test_passes_are_counted_as_they_are_made(
    generator: Path, image_folder: Path, judge: Path, capsys: Capture, tmp_path: Path
) -> None:
    def passes(name: str, *args: str) -> int:
        assert run_cli([*command(generator, tmp_path / name), "--per-class", "1", "--json", *args]) == 0
        values: dict[str, int] = json.loads(capsys.readouterr().out)
        return values["passes"]

    assert passes("whole") == 7  # of T = 4 steps only the first has lambda 0
    assert passes("late", "--init", f"{image_folder}#3", "--from-step", "3") == 4
    assert passes("no guidance", "--init", f"{image_folder}#3", "--from-step", "3", "--cfg", "0") == 2
    assert passes("best of 4", "--reject", "keep=0.25", "--judge", str(judge)) == 28


def test_images_to_score_are_those_of_the_folder_and_take_options_over_the_presets(
    generator: Path, whole: Path
) -> None:
    (images,) = Drawn(generator, per_class=PER_CLASS).sets(CPU)
    pieces = [range(3, 8), range(11, 12), range(15, 21)]
    with np.load(whole / "samples.npz") as arrays:
        assert images.labels == arrays["arr_1"].tolist()
        for piece, pixels in zip(pieces, images.read(pieces), strict=True):
            np.testing.assert_array_equal(pixels, arrays["arr_0"][piece.start : piece.stop])
    (images,) = Drawn(generator, "0,2", 3, range(4, 5), ("cfg=2.5", "draw=gumbel"), "cfg").sets(CPU)
    options = images.record["options"]
    assert {"cfg": 2.5, "cfg_schedule": "constant", "draw": "gumbel", "classes": "0,2"}.items() <= options.items()


def test_options_come_from_checkpoint_preset_and_command_in_this_order(generator: Path, tmp_path: Path) -> None:
    plain = draw(generator, tmp_path / "a")["options"]
    assert (plain["cfg"], plain["cfg_schedule"], plain["draw"]) == (1.0, "linear", "gumbel")
    preset = draw(generator, tmp_path / "b", "--preset", "cfg")["options"]
    assert (preset["cfg"], preset["cfg_schedule"], preset["draw"]) == (1.0, "constant", "argmax")
    both = draw(generator, tmp_path / "c", "--preset", "cfg", "draw=inverse", "channels_last=true")["options"]
    assert (both["cfg_schedule"], both["draw"], both["channels_last"]) == ("constant", "inverse", True)
    assert len({(tmp_path / name / "000003.png").read_bytes() for name in "abc"}) == 3


@pytest.mark.parametrize(
    ("args", "token"),
    [
        ("--preset gumble", "gumble"), ("temperature=1", "temperature"), ("samples/", "samples/"), ("cfg=-1", "cfg"),
        ("conf_temp=1", "conf_temp"),  # of another family
        ("cfg_power=3.0", "cfg_power"),  # of another schedule
        ("draw=argmax tau=2.0", "tau"),  # the likeliest code has no temperature
        ("--preset raw top_k=3", "top_k"), ("--no-png", "--no-png"),
        ("--mask m.png", "--mask"), ("--from-step 2", "--from-step"), ("--init i.png", "--init"),
        ("--reject keep=0.5", "--reject"), ("--judge judge.pt", "--reject"),
        *((f"--judge judge.pt --reject {text}", "--reject") for text in ("keep=1", "keep=0", "keep=x", "keep=0.3")),
        *((f"--shard {text}", "--shard") for text in ("0/3", "4/3", "1", "a/b", "1/0")),
    ],
)  # fmt: skip
def test_arguments_that_cannot_be_or_have_no_effect_are_refused(
    args: str, token: str, generator: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("judge.pt").write_bytes(b"PK\3\4")  # enough like a checkpoint for the options to be read
    assert run_cli(command(generator, tmp_path / "s", *args.split())) == 2
    assert token in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


UNGUIDED: dict[str, dict[str, Any]] = {
    "label_drop=0": {"label_drop": 0.0}, "label_drop=1": {"label_drop": 1.0}, "only one": {"names": "a"},
}  # fmt: skip


@pytest.mark.parametrize("token", UNGUIDED)
def test_guidance_that_the_training_cannot_give_is_refused_wherever_it_comes_from(
    token: str, tmp_path: Path, tiny_tokenizer_file: Path, capsys: Capture
) -> None:
    plain, recorded = (
        save_generator(tmp_path / f"{cfg}.pt", tiny_tokenizer_file, cfg=cfg, **UNGUIDED[token]) for cfg in (0.0, 1.0)
    )
    scores = ["--device", "cpu", "--extractor", str(save_judge(tmp_path / "judge.pt"))]
    refused = [
        command(plain, tmp_path / "s", "--cfg", "1.5"), command(plain, tmp_path / "s", "cfg=1.5"),
        command(plain, tmp_path / "s", "--preset", "cfg", "cfg=1.5"), command(recorded, tmp_path / "s"),
        ["eval", "is", "--ckpt", str(plain), "cfg=1.5", *scores], ["eval", "is", "--ckpt", str(recorded), *scores],
        ["tune-sampling", str(recorded), *scores],
    ]  # fmt: skip
    for args in refused:
        assert run_cli(args) == 2, args
        assert token in capsys.readouterr().err
        assert not (tmp_path / "s").exists()
    draw(recorded, tmp_path / "s", "--cfg", "0", "--per-class", "1")


def test_options_are_checked_against_those_of_the_checkpoint() -> None:
    for name in ("tau", "skip_steps"):
        with pytest.raises(UsageError, match=name) as error:
            ResGenSampling().changed(None, {name: 1})
        assert all(field in error.value.hint for field in ResGenSampling.model_fields)
    with pytest.raises(UsageError, match="cfg"):
        sampling_options().sampling.changed("cfg", {})  # guidance without a lambda
    sampling_options(tau=2.0).sampling.changed("raw", {})  # recorded, not requested


def test_out_of_memory_halves_the_micro_batch_and_changes_no_sample(
    generator: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    loaded, options = registry.load(generator), sampling_options(cfg=1.0)
    expected = list(sampler.sample(loaded.generator, loaded.tokenizer, LABELS, options, 1))
    original, rows = loaded.generator.sample, []

    def small(condition: Any, indices_B: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        rows.append(len(indices_B))
        if len(indices_B) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(condition, indices_B, *args, **kwargs)

    monkeypatch.setattr(loaded.generator, "sample", small)
    job = sampler.Job(loaded.generator, loaded.tokenizer, options, 8)
    samples = job.draw(range(7), LABELS)
    assert job.made_with == {"device": "cpu", "precision": "fp32", "micro_batch": 2}
    assert rows == [8, 4, 2, 2, 2, 2]
    np.testing.assert_array_equal(samples.pixels_BHWC, np.concatenate([part.pixels_BHWC for part in expected]))
    assert "out of memory" in capsys.readouterr().err


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    """White, to be drawn, on the right quarter: one column of the grid of 4×4."""
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:, 12:] = 255
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    return tmp_path / "mask.png"


def edited(generator: Path, edit: Edit) -> tuple[torch.Tensor, Known, Tokenizer]:
    """Codes (3, T, S) of three samples, and those of the image under their noise."""
    loaded = registry.load(generator)
    _, known = engine.open_edit(edit, loaded, 0)
    job = sampler.Job(loaded.generator, loaded.tokenizer, sampling_options(cfg=1.0), 2, known)
    return job.draw(range(3), [1, 1, 1]).codes_BTS, known([0, 1, 2]), loaded.tokenizer


@pytest.mark.parametrize("bias", ["blend", "none"])
def test_kept_codes_and_latents_are_those_of_the_image(
    tmp_path: Path, image_folder: Path, mask: Path, tiny_tokenizer_file: Path, bias: str
) -> None:
    tokenizer_file = tiny_tokenizer_file
    if bias == "none":
        content = checkpoint.load(tokenizer_file)
        config = {**content["config"], "quantizer": {**content["config"]["quantizer"], "bias": "none"}}
        weights = {name: value for name, value in content["weights"].items() if ".phi." not in name}
        model = {"config": config, "weights": weights, "digest": checkpoint.model_digest(weights, config)}
        checkpoint.save(tokenizer_file := tmp_path / "none.pt", {**content, **model})
    codes, known, tokenizer = edited(
        save_generator(tmp_path / "g.pt", tokenizer_file), Edit(f"{image_folder}#3", str(mask))
    )
    left_S = (torch.arange(GRID * GRID) % GRID < 3).expand(3, STEPS, -1)
    assert torch.equal(known.keep_BTS, left_S)
    assert torch.equal(codes[left_S], known.codes_BTS[left_S])
    assert not torch.equal(codes[~left_S], known.codes_BTS[~left_S])
    assert not torch.equal(codes[0], codes[1])
    sampled, original = (tokenizer.quantizer.decode(c).unflatten(2, (GRID, GRID)) for c in (codes, known.codes_BTS))
    kept = 3 if bias == "none" else 2  # columns whose whole 3×3 neighbourhood is kept
    torch.testing.assert_close(sampled[..., :kept], original[..., :kept], rtol=0, atol=1e-6)
    assert not torch.allclose(sampled[..., kept], original[..., kept])


@pytest.mark.parametrize("first", [1, 3])
def test_from_a_step_on_every_code_is_drawn(generator: Path, image_folder: Path, first: int) -> None:
    codes, known, tokenizer = edited(generator, Edit(f"{image_folder}#3", from_step=first))
    assert torch.equal(codes[:, : first - 1], known.codes_BTS[:, : first - 1])
    assert not torch.equal(codes[:, first - 1], known.codes_BTS[:, first - 1])
    job = sampler.Job(registry.load(generator).generator, tokenizer, sampling_options(cfg=1.0), 2)
    assert torch.equal(codes, job.draw(range(3), [1, 1, 1]).codes_BTS) == (first == 1)


def test_mask_and_step_keep_what_either_keeps(generator: Path, image_folder: Path, mask: Path) -> None:
    keep_THW = edited(generator, Edit(f"{image_folder}#3", str(mask), 3))[1].keep_BTS[0].unflatten(1, (GRID, GRID))
    assert keep_THW[:2].all()
    assert keep_THW[2:, :, :3].all()
    assert not keep_THW[2:, :, 3].any()
    dot = np.zeros((16, 16, 3), np.uint8)
    dot[5, 9] = (0, 200, 0)  # one bright pixel opens its whole cell
    assert np.argwhere(cells(dot, (4, 4))).tolist() == [[1, 2]]


def test_an_edit_is_recorded_and_another_one_or_an_impossible_one_is_refused(
    generator: Path, image_folder: Path, mask: Path, tmp_path: Path, capsys: Capture
) -> None:
    record = draw(generator, tmp_path / "s", "--init", f"{image_folder}#3", "--mask", str(mask))
    assert set(record["made_from"]) == {"checkpoint", "init", "mask"}
    assert record["options"]["edit"] == {"from_step": 1, "masked": True}
    Image.new("RGB", (50, 60), "white").save(tmp_path / "large.png")
    Image.new("RGB", (16, 16)).save(tmp_path / "black.png")
    other = ["--init", f"{image_folder}#4", "--mask", str(mask)]
    impossible = {
        "50×60": ["--mask", str(tmp_path / "large.png")],
        "black.png": ["--mask", str(tmp_path / "black.png")],
    }
    impossible |= {f"--from-step {step}": ["--from-step", str(step)] for step in (0, STEPS + 1)}
    for token, args in {"made_from.init": other, **impossible}.items():
        assert run_cli(command(generator, tmp_path / "s", "--init", f"{image_folder}#3", *args)) == 2
        assert token in capsys.readouterr().err


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_judge(tmp_path_factory.mktemp("judge") / "judge.pt", seed=3)


def test_the_best_of_a_samples_candidates_is_kept(generator: Path) -> None:
    def score(pixels_BHWC: Pixels, labels: list[int]) -> Any:
        return pixels_BHWC[..., 0].mean((1, 2)) * np.where(np.array(labels) == 2, -1, 1)  # red, but of class 2 not

    loaded, labels = registry.load(generator), [0, 2, 1]
    job = sampler.Job(loaded.generator, loaded.tokenizer, sampling_options(), 2)
    best, single = job.best([0, 1, 2], labels, 4, score), job.best([1], [2], 4, score)
    candidates = job.draw(range(12), [label for label in labels for _ in range(4)])
    for row, choose in enumerate((np.argmax, np.argmin, np.argmax)):
        index = 4 * row + int(choose(candidates.pixels_BHWC[4 * row : 4 * row + 4, ..., 0].mean((1, 2))))
        np.testing.assert_array_equal(best.pixels_BHWC[row], candidates.pixels_BHWC[index])
        assert torch.equal(best.codes_BTS[row], candidates.codes_BTS[index])
    np.testing.assert_array_equal(single.pixels_BHWC[0], best.pixels_BHWC[1])


def test_a_judge_of_other_images_is_refused_before_the_folder_is_claimed(
    generator: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(extractors, "SIDE", 64)
    large = save_judge(tmp_path / "large.pt")
    assert run_cli(command(generator, tmp_path / "s", "--reject", "keep=0.5", "--judge", str(large))) == 3
    message = capsys.readouterr().err
    assert all(token in message for token in ("64×64", "16×16"))
    assert not (tmp_path / "s").exists()


def test_rate_and_judge_are_recorded_and_shards_agree(generator: Path, judge: Path, tmp_path: Path) -> None:
    best = ["--reject", "keep=0.25", "--judge", str(judge)]
    record, digest = draw(generator, tmp_path / "a", *best), checkpoint.load(judge)["digest"]
    expected = {"keep": 0.25, "candidates": 4, "judge": "judge judge.pt", "judge_sha256": digest}
    assert record["options"]["reject"] == expected
    for number in (2, 1):
        draw(generator, tmp_path / "b", "--shard", f"{number}/2", *best)
    assert content(tmp_path / "b") == content(tmp_path / "a")

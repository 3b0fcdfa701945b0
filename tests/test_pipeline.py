"""All commands in a row, on a few images: images -> tokenizer -> codes -> generator -> samples -> scores."""

import contextlib
import io
import json
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rdpm_cli import checkpoint, files
from rdpm_cli.cli.app import run
from rdpm_cli.data.pixels import hwc, to_pixels
from rdpm_cli.device import one_thread
from rdpm_cli.tokenizer import model as tokenizer_model

TINY_TOKENIZER = [
    "autoencoder.width=8", "autoencoder.channels=4", "quantizer.codes=64", "quantizer.steps=4",
    "train.batch=16", "train.steps=6", "train.log_every=1",
]  # fmt: skip
TINY_GENERATOR = [
    "network.depth=1", "network.width=32", "network.heads=2", "objective.steps_per_image=2",
    "train.batch=16", "train.steps=6", "train.log_every=1",
]  # fmt: skip
JUDGE = ["width=8", "features=16", "train.batch=16", "train.steps=6"]
STEPS = 4


def rdpm(*args: object) -> dict[str, Any]:
    """Run a command that must succeed. -> its JSON"""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), one_thread():
        code = run([*map(str, args), "--json"])
    assert code == 0
    values: dict[str, Any] = json.loads(out.getvalue())
    return values


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def pngs(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


@pytest.fixture(scope="module")
def walk(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, dict[str, Any]]]:
    """Every command once, as in the README, in an empty folder. -> the JSON of each"""
    with contextlib.chdir(tmp_path_factory.mktemp("walk")):
        Path("images").symlink_to(image_folder)
        results: dict[str, dict[str, Any]] = {}
        results["train-tokenizer"] = rdpm(
            "train-tokenizer", "images", "--recipe", "digits", "--out", "runs/tok", *TINY_TOKENIZER
        )
        shutil.copy("runs/tok/tokenizer.pt", "tokenizer.pt")
        results["tokenize"] = rdpm("tokenize", "images", "out/codes", "--views", 2)
        results["reconstruct"] = rdpm("reconstruct", "images", "recon")
        results["decode"] = rdpm("reconstruct", "out/codes", "decoded")
        results["train-gen"] = rdpm(
            "train-gen", "out/codes", "--recipe", "digits", "--out", "runs/gen", *TINY_GENERATOR
        )
        results["sample"] = rdpm(
            "sample", "--ckpt", "runs/gen/generator.pt", "--per-class", 5, "--out", "samples", "--npz", "--gif"
        )
        results["judge"] = rdpm(
            "eval", "judge", "images", "runs/judge", "--heldout", "images", "--resolution", 16, *JUDGE
        )
        results["fid"] = rdpm("eval", "fid", "samples/", "--extractor", "runs/judge/judge.pt")
        results["recon"] = rdpm("eval", "recon", "images", "--seeds", 1)
        yield results


# ---- the files of each command -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "runs/tok/tokenizer.pt", "runs/tok/run.json", "runs/tok/metrics.jsonl", "runs/tok/curves.png",
        "runs/tok/previews/step-0000006.png", "runs/tok/checkpoints/step-000000006.pt",
        "out/codes/manifest.json", "out/codes/names.jsonl", "out/codes/tokenizer.pt", "out/codes/codes-00000.npy",
        "recon/000000.png", "recon/000035.png", "recon/previews/grid.png", "recon/samples.json",
        "decoded/000035.png", "decoded/previews/grid.png",
        "runs/gen/generator.pt", "runs/gen/run.json", "runs/gen/metrics.jsonl", "runs/gen/curves.png",
        "runs/gen/previews/step-0000006.png", "runs/gen/checkpoints/step-000000006.pt",
        "samples/samples.json", "samples/samples.npz", "samples/000014.png",
        "samples/previews/grid.png", "samples/previews/steps.gif", "runs/judge/judge.pt",
    ],
)  # fmt: skip
def test_the_commands_write(walk: dict[str, dict[str, Any]], path: str) -> None:
    assert Path(path).stat().st_size > 0
    if path.endswith((".png", ".gif")):
        assert len(np.unique(pixels(Path(path)))) > 2


def test_the_chain_of_digests_holds(walk: dict[str, dict[str, Any]], image_folder: Path) -> None:
    tokenizer, store = walk["train-tokenizer"]["digest"], walk["tokenize"]["digest"]
    assert walk["tokenize"]["tokenizer"] == tokenizer
    assert Path("out/codes/tokenizer.pt").read_bytes() == Path("runs/tok/tokenizer.pt").read_bytes()
    generator = checkpoint.load(Path("runs/gen/generator.pt"))
    assert generator["tokenizer"]["digest"] == tokenizer
    assert generator["provenance"]["store"]["digest"] == store
    assert generator["digest"] == walk["train-gen"]["digest"] == walk["sample"]["checkpoint"]
    assert generator["class_names"] == ["a", "b", "c"]
    assert walk["fid"]["reference"]["name"] == str(image_folder.resolve())  # samples -> checkpoint -> store -> data
    assert walk["fid"]["extractor"]["sha256"] == checkpoint.load(Path("runs/judge/judge.pt"))["digest"]
    assert walk["recon"]["tokenizer"] == tokenizer


def test_scores_say_what_they_were_computed_with(walk: dict[str, dict[str, Any]]) -> None:
    fid, recon = walk["fid"], walk["recon"]
    assert fid["n"] == 15
    assert fid["reference"]["count"] == 36
    assert fid["metric"] == "frechet_distance"  # a judge's, never called FID
    assert fid["value"] > 0
    assert 0 <= fid["class_accuracy"] <= 1
    assert fid["options"]["seed"] == 0
    assert recon["n"] == 36
    assert recon["mse"] == pytest.approx(walk["reconstruct"]["mse"])  # one seed, one purpose of the noise
    assert recon["psnr"] == pytest.approx(walk["reconstruct"]["psnr"])


def test_held_out_accuracy_is_measured_per_step_like_the_baseline(walk: dict[str, dict[str, Any]]) -> None:
    assert len(walk["train-gen"]["heldout/accuracy"]) == len(walk["train-gen"]["heldout/baseline"]) == STEPS


def test_training_logs_the_health_of_the_codebook_per_step(walk: dict[str, dict[str, Any]]) -> None:
    rows = [json.loads(line) for line in Path("runs/tok/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 7))
    for name in ("usage", "perplexity", "dead"):
        assert {f"{name}/t{t:02d}" for t in range(1, STEPS + 1)} <= set(rows[-1])


# ---- samples -------------------------------------------------------------------------------------------------------


def test_png_i_is_npz_row_i_is_sample_i(walk: dict[str, dict[str, Any]]) -> None:
    record = json.loads(Path("samples/samples.json").read_text())
    with np.load("samples/samples.npz", allow_pickle=False) as arrays:
        images, labels = arrays["arr_0"], arrays["arr_1"]
    rows = record["samples"]
    assert images.shape == (15, 16, 16, 3)
    assert images.dtype == np.uint8
    assert [row["index"] for row in rows] == list(range(15))
    assert [row["file"] for row in rows] == list(pngs(Path("samples")))
    assert [row["label"] for row in rows] == labels.tolist()
    for row, image in zip(rows, images, strict=True):
        np.testing.assert_array_equal(pixels(Path("samples") / row["file"]), image)


def test_labels_are_a_permutation_of_balanced_classes(walk: dict[str, dict[str, Any]]) -> None:
    record = json.loads(Path("samples/samples.json").read_text())
    labels = [row["label"] for row in record["samples"]]
    assert sorted(labels) == [0] * 5 + [1] * 5 + [2] * 5
    assert labels != sorted(labels)


def test_the_gif_has_one_frame_a_step(walk: dict[str, dict[str, Any]]) -> None:
    with Image.open("samples/previews/steps.gif") as gif:
        assert getattr(gif, "n_frames", 1) == STEPS


@pytest.mark.parametrize(
    ("classes", "labels"),
    [("0,2", [0, 0, 2, 2]), ("1-2", [1, 1, 2, 2]), ("name:b", [1, 1]), ("all", [0, 0, 1, 1, 2, 2])],
)
def test_classes_choose_the_labels(
    walk: dict[str, dict[str, Any]], classes: str, labels: list[int], tmp_path: Path
) -> None:
    out = tmp_path / "samples"
    rdpm("sample", "--ckpt", "runs/gen/generator.pt", "--classes", classes, "--per-class", 2, "--out", out)
    record = json.loads((out / "samples.json").read_text())
    assert sorted(row["label"] for row in record["samples"]) == labels
    assert len(pngs(out)) == len(labels)
    assert not (out / "samples.npz").exists()
    assert not (out / "previews" / "steps.gif").exists()


def test_sampling_twice_gives_identical_files(walk: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    command = ["sample", "--ckpt", "runs/gen/generator.pt", "--per-class", 5, "--out"]
    rdpm(*command, tmp_path / "again")
    assert pngs(tmp_path / "again") == pngs(Path("samples"))
    rdpm(*command, tmp_path / "other", "--seed", 1)
    assert pngs(tmp_path / "other") != pngs(Path("samples"))
    (tmp_path / "again" / "000003.png").unlink()  # as if it had been stopped
    rdpm(*command, tmp_path / "again")
    assert pngs(tmp_path / "again") == pngs(Path("samples"))


@pytest.mark.parametrize("option", ["--seed 1", "--cfg 2", "--tau 3", "--skip-steps 1", "--classes 0", "--per-class 2"])
def test_samples_of_other_options_are_not_mixed_in_one_folder(
    walk: dict[str, dict[str, Any]], option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    original = pngs(Path("samples"))
    base = ["sample", "--ckpt", "runs/gen/generator.pt", "--per-class", "5", "--out", "samples"]
    assert run([*base, *option.split()]) == 2
    assert "options." in (error := capsys.readouterr().err) or "count" in error
    assert pngs(Path("samples")) == original


def test_record_and_result_have_the_options(walk: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    options = ["--cfg", 1.5, "--cfg-schedule", "constant", "--tau", 2, "--skip-steps", 1, "--seed", 7]
    answer = rdpm("sample", "--ckpt", "runs/gen/generator.pt", "--per-class", 1, "--out", tmp_path / "s", *options)
    expected = {"cfg": 1.5, "cfg_schedule": "constant", "tau": 2.0, "skip_steps": 1, "seed": 7}
    record = json.loads((tmp_path / "s" / "samples.json").read_text())
    assert expected.items() <= record["options"].items()
    assert expected.items() <= answer.items()


# ---- reconstructions and other targets of eval ---------------------------------------------------------------------


def test_a_store_is_decoded_as_its_tokenizer_decodes(walk: dict[str, dict[str, Any]]) -> None:
    tokenizer, _ = tokenizer_model.load(Path("out/codes/tokenizer.pt"))
    codes = np.load("out/codes/codes-00000.npy")[::2]  # the first view of each image
    with one_thread():
        images = hwc(to_pixels(tokenizer.decode(torch.from_numpy(codes.astype(np.int64)).flatten(2))))
    assert len(images) == 36
    for index, image in enumerate(images):
        difference = pixels(Path(f"decoded/{index:06d}.png")).astype(int) - image
        assert np.abs(difference).max() <= 1  # batches of another size may round another way


def test_reconstructions_are_a_target_of_eval_and_samples_a_reference(walk: dict[str, dict[str, Any]]) -> None:
    judge = ["--extractor", "runs/judge/judge.pt"]
    recon = rdpm("eval", "fid", "recon", *judge)
    assert recon["n"] == 36
    assert recon["reference"]["name"] == walk["fid"]["reference"]["name"]
    itself = rdpm("eval", "fid", "samples", "--ref", "samples", *judge)
    assert itself["value"] == pytest.approx(0, abs=1e-6)
    real = rdpm("eval", "fid", "images", "--ref", "images", "--resolution", 16, *judge)
    assert real["value"] == pytest.approx(0, abs=1e-6)
    assert real["target"]["sha256"] == walk["fid"]["reference"]["sha256"]


def test_a_zip_and_a_flat_folder_are_sources_too(
    walk: dict[str, dict[str, Any]], image_folder: Path, tmp_path: Path
) -> None:
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for path in sorted(image_folder.rglob("*.*")):
            archive.write(path, path.relative_to(image_folder))
    rdpm("tokenize", tmp_path / "images.zip", tmp_path / "codes", "--views", 2)
    assert (tmp_path / "codes" / "codes-00000.npy").read_bytes() == Path("out/codes/codes-00000.npy").read_bytes()
    (tmp_path / "flat").mkdir()
    for path in sorted((image_folder / "a").iterdir())[:3]:
        shutil.copy(path, tmp_path / "flat")
    assert rdpm("reconstruct", tmp_path / "flat", tmp_path / "recon")["n"] == 3


# ---- inspect -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "kind", "keys"),
    [
        ("runs/tok/tokenizer.pt", "tokenizer", ["config", "digest", "parameters", "provenance"]),
        ("runs/gen/generator.pt", "generator", ["config", "digest", "parameters", "provenance", "tokenizer"]),
        ("runs/judge/judge.pt", "judge", ["config", "digest", "provenance"]),
        ("out/codes", "code store", ["digest", "tokenizer", "data", "views"]),
        ("samples", "samples", ["options", "made_from", "reference"]),
        ("runs/tok", "run", ["settings", "finished"]),
        ("runs/gen", "run", ["settings", "finished"]),
        ("images", "images", ["images", "classes", "digest"]),
        ("digits:heldout", "images", ["images", "classes", "digest"]),
        ("digits", "recipe", ["recipe", "parameters", "digest"]),
    ],
)
def test_inspect_names_the_kind(
    walk: dict[str, dict[str, Any]], target: str, kind: str, keys: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    answer = rdpm("inspect", target)
    assert set(keys) <= set(answer)
    assert run(["inspect", target]) == 0
    assert capsys.readouterr().out.splitlines()[0] == kind


def test_inspect_counts_the_parameters_of_the_generator_alone(walk: dict[str, dict[str, Any]]) -> None:
    weights = checkpoint.load(Path("runs/gen/generator.pt"))["weights"]
    count = sum(value.numel() for value in weights.values())
    assert rdpm("inspect", "runs/gen/generator.pt")["parameters"] == walk["train-gen"]["parameters"] == count


# ---- the same command again ----------------------------------------------------------------------------------------

AGAIN: dict[str, list[str]] = {
    "train-tokenizer": ["images", "--recipe", "digits", "--out", "runs/tok", *TINY_TOKENIZER],
    "tokenize": ["images", "out/codes", "--views", "2"],
    "train-gen": ["out/codes", "--recipe", "digits", "--out", "runs/gen", *TINY_GENERATOR],
}


def states(*folders: str) -> dict[Path, int]:
    """The time of the last write of each file."""
    excluded = {"run.json", ".lock", ".lock.owner"}
    paths = [path for folder in folders for path in Path(folder).rglob("*") if path.is_file()]
    return {path: path.stat().st_mtime_ns for path in paths if path.name not in excluded}


@pytest.mark.parametrize("command", AGAIN)
def test_a_finished_command_does_nothing_again(walk: dict[str, dict[str, Any]], command: str) -> None:
    times = states("runs", "out")
    assert rdpm(command, *AGAIN[command]) == walk[command]
    assert states("runs", "out") == times


@pytest.mark.parametrize("command", AGAIN)
def test_the_same_command_elsewhere_gives_the_same_digest(
    walk: dict[str, dict[str, Any]], command: str, tmp_path: Path
) -> None:
    renamed = {"runs/tok": tmp_path / "run", "runs/gen": tmp_path / "run", "out/codes": tmp_path / "codes"}
    if command == "train-gen":
        renamed.pop("out/codes")
    answer = rdpm(command, *(renamed.get(word, word) for word in AGAIN[command]))
    assert answer["digest"] == walk[command]["digest"]


@pytest.mark.parametrize(
    ("command", "change", "difference"),
    [
        ("train-tokenizer", "train.lr=0.5", "tokenizer.train.lr: 0.002 -> 0.5"),
        ("train-tokenizer", "seed=3", "seed: 0 -> 3"),
        ("train-gen", "train.micro_batch=16", "generator.train.micro_batch: None -> 16"),
        ("train-gen", "train.channels_last=true", "generator.train.channels_last: False -> True"),
        ("train-gen", "network.depth=2", "generator.network.depth: 1 -> 2"),
        ("tokenize", "--views=3", "views: 2 -> 3"),
        ("tokenize", "--seed=4", "seed: 0 -> 4"),
        ("tokenize", "--keep=latents", "latents: False -> True"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused_with_the_difference(
    walk: dict[str, dict[str, Any]], command: str, change: str, difference: str, capsys: pytest.CaptureFixture[str]
) -> None:
    times = states("runs", "out")
    assert run([command, *AGAIN[command], change]) == 2
    shown = capsys.readouterr()
    assert difference in shown.err
    assert "Traceback" not in shown.err
    assert states("runs", "out") == times


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ("--keep=7", "recipe.generator.train.keep: 3 -> 7"),
        ("train.keep=8", "recipe.generator.train.keep: 3 -> 8"),
        ("train.log_every=2", "recipe.generator.train.log_every: 1 -> 2"),
        ("train.workers=2", "recipe.generator.train.workers: 0 -> 2"),
    ],
)
def test_settings_that_no_step_depends_on_may_change_and_are_noted(
    walk: dict[str, dict[str, Any]], change: str, difference: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rdpm("train-gen", *AGAIN["train-gen"], change) == walk["train-gen"]
    assert difference in capsys.readouterr().err
    note = json.loads(Path("runs/gen/run.json").read_text())
    assert note["settings"]["recipe"]["generator"]["train"]["keep"] == 3  # as the run was started
    assert note["resumed"][-1]["changed"] == [difference]
    assert note["resumed"][-1]["processes"] == 1


def test_other_images_in_the_same_run_are_refused(
    walk: dict[str, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["train-tokenizer", "digits:heldout", *AGAIN["train-tokenizer"][1:]]) == 2
    assert "data.source" in capsys.readouterr().err


def test_the_environment_may_name_the_tokenizer(
    walk: dict[str, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RDPM_TOKENIZER", str(Path("runs/tok/tokenizer.pt").resolve()))
    images = Path("images").resolve()
    monkeypatch.chdir(tmp_path)
    answer = rdpm("tokenize", images, "out/codes", "--views", 2)
    assert answer["tokenizer"] == walk["train-tokenizer"]["digest"]


# ---- the demo ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """`rdpm demo` with a few steps of everything. -> its folder and its JSON"""
    out = tmp_path_factory.mktemp("demo") / "demo"
    return out, rdpm(*demo_command(out))


def demo_command(out: Path) -> list[str]:
    tokenizer = ["tokenizer.train.steps=8", "tokenizer.train.batch=16", "tokenizer.autoencoder.width=8"]
    generator = ["generator.train.steps=8", "generator.network.depth=1", "generator.network.width=32"]
    judge = [f"judge.{change}" for change in JUDGE]
    small = [*tokenizer, *generator, *judge, "views=1", "tokenizer.quantizer.steps=3"]
    return ["demo", "--out", str(out), "--seed", "2", *small]


@pytest.mark.parametrize("name", ["samples.png", "reconstructions.png", "steps.gif", "curves.png"])
def test_the_demo_draws(demo: tuple[Path, dict[str, Any]], name: str) -> None:
    picture = pixels(demo[0] / name)
    assert min(picture.shape[:2]) >= 64
    assert len(np.unique(picture)) > 10


def test_the_demo_writes_its_result(demo: tuple[Path, dict[str, Any]]) -> None:
    out, answer = demo
    result = json.loads((out / "result.json").read_text())
    assert list(result) == [
        "class_accuracy", "frechet_distance", "frechet_distance_heldout", "frechet_ratio", "frechet_n",
        "frechet_subsets", "samples", "reference", "reconstruction_mse", "reconstruction_psnr", "judge_accuracy",
        "generator_parameters", "heldout_accuracy_per_t", "baseline_accuracy_per_t", "seconds", "resumed", "seed",
        "recipe", "versions",
    ]  # fmt: skip
    assert result.items() <= answer.items()
    assert not result["resumed"]
    assert result["seed"] == 2
    assert result["samples"] == 800
    assert result["frechet_n"] == 297  # the held-out digits and the samples are compared at equal size
    assert result["reference"]["name"] == "digits:train"


def test_other_commands_continue_from_the_demos_folder(demo: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, _ = demo
    store = rdpm("inspect", out / "codes")
    assert store["images"] == 1500
    assert store["tokenizer"] == checkpoint.load(out / "tokenizer.pt")["digest"]
    answer = rdpm(
        "sample", "--ckpt", out / "generator.pt", "--classes", "3,7", "--per-class", 1, "--out", tmp_path / "s"
    )
    assert answer["samples"] == 2
    judge = rdpm("inspect", out / "runs" / "judge" / "judge.pt")
    assert judge["provenance"]["heldout"] == "digits:heldout"


def test_a_finished_demo_is_not_run_again(
    demo: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    out, answer = demo
    result = files.read_json(out / "result.json")
    files.write_json(out / "result.json", {**result, "seconds": -1})
    assert rdpm(*demo_command(out)) == {**answer, "seconds": -1}
    assert str(out) in capsys.readouterr().err

"""All commands in a row, on a few images: images -> tokenizer -> codes -> generator -> samples -> scores."""

import contextlib
import io
import json
import shutil
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
from rdpm_cli.distributed import one_thread
from rdpm_cli.tokenizer import model as tokenizer_model

STEPS = 4
FEW = ["train.batch=16", "train.steps=6"]
JUDGE = ["width=8", "features=16", *FEW]
TOKENIZER = ["autoencoder.width=8", "autoencoder.channels=4", "quantizer.codes=64", f"quantizer.steps={STEPS}"]
GENERATOR = ["network.depth=1", "network.width=32", "network.heads=2", "objective.steps_per_image=2"]
COMMANDS: dict[str, list[str]] = {
    "train-tokenizer": ["images", "--recipe", "digits", "--out", "runs/tok", *TOKENIZER, *FEW, "train.log_every=1"],
    "tokenize": ["images", "out/codes", "--views", "2"],
    "train-gen": ["out/codes", "--recipe", "digits", "--out", "runs/gen", *GENERATOR, *FEW, "train.log_every=1"],
}
Walk = dict[str, dict[str, Any]]
Capture = pytest.CaptureFixture[str]


def rdpm(*args: object) -> dict[str, Any]:
    """Run a command that must succeed. -> its JSON"""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), one_thread():
        assert run([*map(str, args), "--json"]) == 0
    values: dict[str, Any] = json.loads(out.getvalue())
    return values


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def states() -> dict[Path, int]:
    """The time of the last write of each file of runs and store."""
    paths = [path for folder in ("runs", "out") for path in Path(folder).rglob("*") if path.is_file()]
    return {p: p.stat().st_mtime_ns for p in paths if p.name not in {"run.json", ".lock", ".lock.owner"}}


@pytest.fixture(scope="module")
def walk(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Walk]:
    """Every command once, as in the README, in an empty folder. -> the JSON of each"""
    with contextlib.chdir(tmp_path_factory.mktemp("walk")):
        Path("images").symlink_to(image_folder)
        results: Walk = {"train-tokenizer": rdpm("train-tokenizer", *COMMANDS["train-tokenizer"])}
        shutil.copy("runs/tok/tokenizer.pt", "tokenizer.pt")
        sample = ["--ckpt", "runs/gen/generator.pt", "--per-class", 5, "--out", "samples", "--npz", "--gif"]
        judge = ["images", "runs/judge", "--heldout", "images", "--resolution", 16, *JUDGE]
        results["tokenize"] = rdpm("tokenize", *COMMANDS["tokenize"])
        results["reconstruct"] = rdpm("reconstruct", "images", "recon")
        rdpm("reconstruct", "out/codes", "decoded")
        results["train-gen"] = rdpm("train-gen", *COMMANDS["train-gen"])
        results["sample"] = rdpm("sample", *sample)
        rdpm("eval", "judge", *judge)
        results["fid"] = rdpm("eval", "fid", "samples/", "--extractor", "runs/judge/judge.pt")
        results["recon"] = rdpm("eval", "recon", "images", "--seeds", 1)
        yield results


def test_the_commands_write_their_files(walk: Walk) -> None:
    run_files = ["run.json", "metrics.jsonl", "curves.png", "previews/step-0000006.png"]
    run_files.append("checkpoints/step-000000006.pt")
    for folder, names in {
        "runs/tok": ["tokenizer.pt", *run_files],
        "out/codes": ["manifest.json", "names.jsonl", "tokenizer.pt", "codes-00000.npy"],
        "recon": ["000000.png", "000035.png", "previews/grid.png", "samples.json"],
        "decoded": ["000035.png", "previews/grid.png"],
        "runs/gen": ["generator.pt", *run_files],
        "samples": ["samples.json", "samples.npz", "000014.png", "previews/grid.png", "previews/steps.gif"],
        "runs/judge": ["judge.pt"],
    }.items():
        for path in (Path(folder) / name for name in names):
            assert path.stat().st_size > 0
            assert path.suffix not in {".png", ".gif"} or len(np.unique(pixels(path))) > 2


def test_the_chain_of_digests_holds(walk: Walk, image_folder: Path) -> None:
    tokenizer, store = walk["train-tokenizer"]["digest"], walk["tokenize"]["digest"]
    assert walk["tokenize"]["tokenizer"] == walk["recon"]["tokenizer"] == tokenizer
    assert Path("out/codes/tokenizer.pt").read_bytes() == Path("runs/tok/tokenizer.pt").read_bytes()
    generator = checkpoint.load(Path("runs/gen/generator.pt"))
    assert generator["tokenizer"]["digest"] == tokenizer
    assert generator["provenance"]["store"]["digest"] == store
    assert generator["digest"] == walk["train-gen"]["digest"] == walk["sample"]["checkpoint"]
    assert generator["class_names"] == ["a", "b", "c"]
    assert walk["fid"]["reference"]["name"] == str(image_folder.resolve())  # samples -> checkpoint -> store -> data
    assert walk["fid"]["extractor"]["sha256"] == checkpoint.load(Path("runs/judge/judge.pt"))["digest"]
    assert (walk["fid"]["metric"], walk["fid"]["n"]) == ("frechet_distance", 15)  # a judge's, never called FID
    assert walk["recon"]["mse"] == pytest.approx(walk["reconstruct"]["mse"])  # one seed, one purpose of the noise


def test_png_i_is_npz_row_i_is_sample_i_of_shuffled_balanced_classes(walk: Walk) -> None:
    rows = files.read_json(Path("samples/samples.json"))["samples"]
    with np.load("samples/samples.npz", allow_pickle=False) as arrays:
        images, labels = arrays["arr_0"], arrays["arr_1"].tolist()
    assert (images.shape, images.dtype) == ((15, 16, 16, 3), np.uint8)
    assert [row["index"] for row in rows] == list(range(15))
    assert [row["file"] for row in rows] == sorted(path.name for path in Path("samples").glob("*.png"))
    assert [row["label"] for row in rows] == labels != sorted(labels) == [0] * 5 + [1] * 5 + [2] * 5
    for row, image in zip(rows, images, strict=True):
        np.testing.assert_array_equal(pixels(Path("samples") / row["file"]), image)


@pytest.mark.parametrize(("classes", "labels"), [("0,2", [0, 0, 2, 2]), ("1-2", [1, 1, 2, 2]), ("name:b", [1, 1])])
def test_classes_and_options_reach_record_and_result(
    walk: Walk, classes: str, labels: list[int], tmp_path: Path
) -> None:
    out, options = tmp_path / "s", {"cfg": 1.5, "cfg_schedule": "constant", "tau": 2.0, "skip_steps": 1, "seed": 7}
    args = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    command = ["sample", "--ckpt", "runs/gen/generator.pt", "--classes", classes, "--per-class", 2, *args]
    result, record = rdpm(*command, "--out", out), files.read_json(out / "samples.json")
    assert options.items() <= record["options"].items()
    assert options.items() <= result.items()
    assert sorted(row["label"] for row in record["samples"]) == labels
    assert len(list(out.glob("*.png"))) == len(labels)
    assert not (out / "samples.npz").exists()
    assert not (out / "previews" / "steps.gif").exists()


def test_a_store_is_decoded_as_its_tokenizer_decodes(walk: Walk) -> None:
    tokenizer, _ = tokenizer_model.load(Path("out/codes/tokenizer.pt"))
    codes = np.load("out/codes/codes-00000.npy")[::2]  # the first view of each image
    with one_thread():
        images = hwc(to_pixels(tokenizer.decode(torch.from_numpy(codes.astype(np.int64)).flatten(2))))
    for index in range(36):
        difference = pixels(Path(f"decoded/{index:06d}.png")).astype(int) - images[index]
        assert np.abs(difference).max() <= 1  # batches of another size may round another way


def test_reconstructions_are_a_target_of_eval_and_samples_a_reference(walk: Walk) -> None:
    judge = ["--extractor", "runs/judge/judge.pt"]
    recon = rdpm("eval", "fid", "recon", *judge)
    assert (recon["n"], recon["reference"]["name"]) == (36, walk["fid"]["reference"]["name"])
    itself = rdpm("eval", "fid", "samples", "--ref", "samples", *judge)
    real = rdpm("eval", "fid", "images", "--ref", "images", "--resolution", 16, *judge)
    assert [itself["value"], real["value"]] == pytest.approx([0, 0], abs=1e-6)
    assert real["target"]["sha256"] == walk["fid"]["reference"]["sha256"]


@pytest.mark.parametrize(
    ("target", "kind", "keys"),
    [
        ("runs/tok/tokenizer.pt", "tokenizer", "config digest parameters provenance"),
        ("runs/gen/generator.pt", "generator", "config digest parameters provenance tokenizer"),
        ("runs/judge/judge.pt", "judge", "config digest provenance"), ("runs/gen", "run", "settings finished"),
        ("out/codes", "code store", "digest tokenizer data views"), ("samples", "samples", "options reference"),
        ("images", "images", "images classes digest"), ("digits:heldout", "images", "images classes digest"),
        ("digits", "recipe", "recipe parameters digest"),  # not the images of that name
    ],
)  # fmt: skip
def test_inspect_names_the_kind(walk: Walk, target: str, kind: str, keys: str) -> None:
    values = rdpm("inspect", target)
    assert values["kind"] == kind
    assert set(keys.split()) <= values.keys()
    if kind == "generator":  # without the tokenizer in the same file
        count = sum(value.numel() for value in checkpoint.load(Path(target))["weights"].values())
        assert values["parameters"] == walk["train-gen"]["parameters"] == count


@pytest.mark.parametrize("command", COMMANDS)
def test_a_finished_command_does_nothing_again_and_gives_the_same_digest_elsewhere(
    walk: Walk, command: str, tmp_path: Path
) -> None:
    times, args = states(), COMMANDS[command]
    assert rdpm(command, *args) == walk[command]
    assert states() == times
    out = "out/codes" if command == "tokenize" else args[args.index("--out") + 1]
    elsewhere = rdpm(command, *(tmp_path / "elsewhere" if word == out else word for word in args))
    assert elsewhere["digest"] == walk[command]["digest"]


@pytest.mark.parametrize(
    ("command", "change", "difference"),
    [
        ("train-tokenizer", "train.lr=0.5", "tokenizer.train.lr: 0.002 -> 0.5"),
        ("train-tokenizer", "seed=3", "seed: 0 -> 3"),
        ("train-tokenizer", "digits:heldout", "data.digest"),
        ("train-gen", "train.micro_batch=16", "generator.train.micro_batch: None -> 16"),
        ("train-gen", "network.depth=2", "generator.network.depth: 1 -> 2"),
        ("tokenize", "--views=3", "views: 2 -> 3"),
        ("tokenize", "--keep=latents", "latents: False -> True"),
        ("sample", "--seed=1", "options.seed"),
        ("sample", "--classes=0", "count"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused_with_the_difference(
    walk: Walk, command: str, change: str, difference: str, capsys: Capture
) -> None:
    times = states()
    sample = ["--ckpt", "runs/gen/generator.pt", "--per-class", "5", "--out", "samples"]
    args = COMMANDS.get(command, sample)
    assert run([command, change, *args[1:]] if change == "digits:heldout" else [command, *args, change]) == 2
    assert difference in capsys.readouterr().err
    assert states() == times


@pytest.mark.parametrize(
    ("change", "difference"), [("--keep=7", "keep: 3 -> 7"), ("train.workers=2", "workers: 0 -> 2")]
)
def test_settings_that_no_step_depends_on_may_change_and_are_noted(
    walk: Walk, change: str, difference: str, capsys: Capture
) -> None:
    assert rdpm("train-gen", *COMMANDS["train-gen"], change) == walk["train-gen"]
    assert difference in capsys.readouterr().err
    record = files.read_json(Path("runs/gen/run.json"))
    assert record["settings"]["recipe"]["generator"]["train"]["keep"] == 3  # as the run was started
    assert record["resumed"][-1]["changed"] == [f"recipe.generator.train.{difference}"]


def test_the_demo_writes_its_result_and_pictures_once(tmp_path: Path, capsys: Capture) -> None:
    changes = {"tokenizer": [TOKENIZER[0], *FEW], "generator": [*GENERATOR[:2], *FEW], "judge": JUDGE}
    small = [f"{section}.{change}" for section, texts in changes.items() for change in texts]
    out = tmp_path / "demo"
    command = ["demo", "--out", str(out), "--seed", "2", *small, "views=1", "tokenizer.quantizer.steps=3"]
    answer = rdpm(*command)
    for name in ("samples.png", "reconstructions.png", "steps.gif", "curves.png"):
        assert min(pixels(out / name).shape[:2]) >= 64
        assert len(np.unique(pixels(out / name))) > 10
    result = files.read_json(out / "result.json")
    assert list(result) == [
        "class_accuracy", "frechet_distance", "gaussian", "frechet_distance_heldout", "frechet_ratio", "frechet_n",
        "frechet_subsets", "samples", "reference", "reconstruction_mse", "reconstruction_psnr", "judge_accuracy",
        "generator_parameters", "heldout_accuracy_per_t", "baseline_accuracy_per_t", "seconds", "resumed", "seed",
        "recipe", "versions",
    ]  # fmt: skip
    assert result.items() <= answer.items()
    assert (result["resumed"], result["seed"], result["samples"]) == (False, 2, 800)
    assert set(result["gaussian"]) == {"class_accuracy", "frechet_distance"}
    assert result["frechet_n"] == 297  # the held-out digits and the samples are compared at equal size
    assert result["reference"]["name"] == "digits:train"
    files.write_json(out / "result.json", {**result, "seconds": -1})
    assert rdpm(*command) == {**answer, "seconds": -1}
    assert str(out) in capsys.readouterr().err

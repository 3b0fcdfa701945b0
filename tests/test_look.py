"""rdpm inspect, --print-config and doctor; rdpm verify as a command."""

import json
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rdpm_cli import checkpoint, files
from rdpm_cli.cli.app import run
from rdpm_cli.codes.store import Manifest
from rdpm_cli.data.folder import finish
from rdpm_cli.data.pictures import save_png
from rdpm_cli.engine import look
from rdpm_cli.errors import DataError, RecipeError, UsageError
from rdpm_cli.evaluation import features
from rdpm_cli.tokenizer import losses

VGG = losses.BACKBONES["vgg"].published


def samples_folder(root: Path, count: int = 3) -> Path:
    """A folder of samples, as `rdpm sample` writes it, as far as readers care."""
    rows = []
    for index in range(count):
        save_png(root / f"{index:06d}.png", np.full((8, 8, 3), index, dtype=np.uint8))
        rows.append({"file": f"{index:06d}.png", "index": index, "label": 0})
    finish(root, {"format": "rdpm-samples", "resolution": 8, "class_names": ["a"], "samples": rows})
    return root


def test_inspect_names_the_kind(
    digits_codes: Path, tiny_tokenizer_file: Path, image_folder: Path, tmp_path: Path
) -> None:
    samples_folder(tmp_path / "samples")
    (tmp_path / "run").mkdir()
    files.write_json(tmp_path / "run" / "run.json", {"settings": {"command": "train-gen"}})
    (tmp_path / "run" / "generator.pt").touch()
    files.write_json(tmp_path / "begun" / "run.json", {"plan": {}})
    files.write_json(tmp_path / "demo" / "result.json", {"accuracy": 1})
    targets = {
        "code store": digits_codes,
        "tokenizer": tiny_tokenizer_file,
        "images": image_folder,
        "samples": tmp_path / "samples",
        "run": tmp_path / "run",
        "unfinished code store": tmp_path / "begun",
        "demo": tmp_path / "demo",
        "recipe": "digits",  # not the images of that name, for which a user writes digits:train
    }
    for kind, target in targets.items():
        result = look.inspect(str(target))
        assert (result.title, result.values["kind"]) == (kind, kind)
    assert look.inspect("digits:heldout").values["images"] == 297
    assert look.inspect(str(tmp_path / "samples")).values["samples"] == 3
    assert look.inspect(str(tmp_path / "run")).values["finished"] == ["generator.pt"]


def test_inspect_counts_the_parameters_of_a_recipe() -> None:
    values = look.inspect("imagenet256-d12").values
    assert values["parameters"] == pytest.approx(133e6, rel=0.01)
    assert values["parameters_assume"] == {"classes": 1000, "positions": 256, "codes": 4096, "channels": 32}


@pytest.mark.parametrize(
    ("target", "error"),
    [("no-such-thing", UsageError), ("no/such.yaml", RecipeError), ("notes.txt", DataError), (".", DataError)],
)
def test_inspect_refuses_anything_else(
    target: str, error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("text")
    with pytest.raises(error, match=target if target != "." else str(tmp_path)):
        look.inspect(target)


def test_print_config_is_a_recipe_again(tmp_path: Path) -> None:
    result = look.resolve("digits", ["train.steps=7"], "generator")
    assert result.values["generator"]["train"]["steps"] == 7
    (tmp_path / "again.yaml").write_text(result.text)
    assert look.resolve(str(tmp_path / "again.yaml"), [], "generator").values["generator"] == result.values["generator"]


def test_verify_answers_in_json_and_by_its_exit_code(
    digits_codes: Path, tiny_tokenizer_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["verify", str(digits_codes), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["images"], answer["rows"], answer["digest"]) == (36, 72, Manifest.load(digits_codes).digest())
    assert run(["verify", str(tiny_tokenizer_file), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["kind"], answer["digest"]) == ("tokenizer", checkpoint.load(tiny_tokenizer_file)["digest"])
    assert answer["sha256"] == files.sha256_file(tiny_tokenizer_file)
    store = Path(shutil.copytree(digits_codes, tmp_path / "copy"))
    (store / "index-00000.npy").unlink()
    assert run(["verify", str(store)]) == 3
    assert "index-00000.npy" in capsys.readouterr().err
    assert run(["verify", str(tmp_path / "nothing")]) == 2
    (tmp_path / "empty").mkdir()
    assert run(["verify", str(tmp_path / "empty")]) == 3


def test_verify_of_samples_names_the_damaged_file(tmp_path: Path) -> None:
    root = samples_folder(tmp_path / "samples")
    assert look.verify(root).values["samples"] == 3
    path = root / "000001.png"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(DataError, match=path.name):
        look.verify(root)
    path.unlink()
    with pytest.raises(DataError, match=path.name):
        look.verify(root)


@pytest.fixture
def weights_folder(no_weights: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine without launcher and driver. -> its empty folder of weights."""
    for name in look.TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    if not torch.cuda.is_available():
        monkeypatch.setattr(look, "DRIVER", tmp_path / "no-driver")
    return no_weights / "weights"


@pytest.fixture
def examine(weights_folder: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """The JSON of `rdpm doctor`, which agrees with its exit code."""

    def examined(code: int = 0) -> dict[str, Any]:
        assert run(["doctor", "--json"]) == code
        captured = capsys.readouterr()
        answer: dict[str, Any] = json.loads(captured.out)
        assert answer["ready"] == (code == 0) == (answer["broken"] == [])
        assert set(answer["broken"]) <= set(answer["fix"])
        assert code == 0 or answer["broken"][0] in captured.err
        return answer

    return examined


def test_doctor_reports_versions_devices_disk_weights_and_extras(examine: Any) -> None:
    answer = examine()
    assert answer["versions"]["numpy"] == metadata.version("numpy")
    assert {"rdpm", "python", "torch", "torch-fidelity", "libjpeg-turbo"} <= set(answer["versions"])
    assert set(answer["extras"]) == {"flash", "parquet", "wandb"}
    absent = {f"weights.{name}" for name in ("inception", "vgg16", "alexnet")}
    absent |= {f"extras.{name}" for name, version in answer["extras"].items() if look.FAILED in version}
    absent |= set() if torch.cuda.is_available() else {"devices.gpus"}
    assert set(answer["fix"]) == absent
    assert VGG.file in answer["fix"]["weights.vgg16"]


def test_doctor_finds_a_weight_file_and_its_sha256(
    examine: Any, weights_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (weights_folder / "file").write_bytes(b"weights")
    sha256 = files.sha256_file(weights_folder / "file")
    published = checkpoint.Published(f"inception-{sha256[:8]}.pth", "https://example.org")
    path = (weights_folder / "file").rename(weights_folder / published.file)
    monkeypatch.setattr(features, "INCEPTION", published)
    answer = examine()
    assert answer["weights"]["inception"] == {
        "state": "found", "file": published.file, "path": str(path), "sha256": sha256
    }  # fmt: skip
    assert "weights.inception" not in answer["fix"]


def test_what_stops_commands_is_broken(examine: Any, weights_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", "2")
    monkeypatch.setitem(sys.modules, "lpips", None)
    (weights_folder / VGG.file).write_bytes(b"half of it")
    answer = examine(3)
    assert answer["broken"] == ["launcher", "versions.lpips", "weights.vgg16"]
    assert answer["launcher"] == {"MASTER_PORT": "2"}
    assert "lpips" in answer["fix"]["versions.lpips"]
    assert VGG.url in answer["fix"]["weights.vgg16"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use the GPU")
def test_a_driver_that_torch_cannot_use_is_broken_unless_the_gpu_is_hidden(
    examine: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release\n")
    monkeypatch.setattr(look, "DRIVER", tmp_path / "version")
    answer = examine(3)
    assert (answer["broken"], answer["devices"]["driver"]) == (["devices.gpus"], "580.65.06")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert examine()["settings"]["CUDA_VISIBLE_DEVICES"] == ""


def test_an_unfinished_folder_of_samples_is_neither_a_run_nor_a_store(tmp_path: Path) -> None:
    files.write_json(tmp_path / "run.json", {"pictures": {"count": 3}})
    assert look.inspect(str(tmp_path)).values["kind"] == "unfinished samples"
    with pytest.raises(DataError, match=tmp_path.name):
        look.verify(tmp_path)

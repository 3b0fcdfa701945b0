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
from pictures import make_files, random_image
from PIL import Image

from rdpm_cli import checkpoint, files, launcher
from rdpm_cli.cli.app import run
from rdpm_cli.codes.store import Manifest
from rdpm_cli.data.folder import finish
from rdpm_cli.data.pictures import save_png
from rdpm_cli.engine import look
from rdpm_cli.errors import DataError, RecipeError, UsageError
from rdpm_cli.evaluation import features
from rdpm_cli.tokenizer import losses

VGG = losses.BACKBONES["vgg"].published


def test_inspect_names_unfinished_folders_and_the_demo(tmp_path: Path) -> None:
    for kind, name, record in (
        ("unfinished code store", "run.json", {"plan": {}}),
        ("unfinished samples", "run.json", {"pictures": {"count": 3}}),
        ("demo", "result.json", {"accuracy": 1}),
    ):
        files.write_json(tmp_path / kind / name, record)
        assert look.inspect(str(tmp_path / kind)).values["kind"] == kind
    with pytest.raises(DataError, match="unfinished samples"):
        look.verify(tmp_path / "unfinished samples")


def test_inspect_refuses_anything_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("text")
    for target, error in {"no-such-thing": UsageError, "no/such.yaml": RecipeError, "notes.txt": DataError}.items():
        with pytest.raises(error, match=target):
            look.inspect(target)


def make_odd_images(root: Path) -> Path:
    """Five images of two sizes in three classes, and files of other kinds. a/0.png cannot be read."""
    make_files(root, "a/0.png", "a/1.png", "b/2.JPG", "b/3.png", "b/4.webp", "c/5.png")
    random_image(30, 40).save(root / "c" / "5.png")
    (root / "a" / "0.png").write_text("text")
    for name in ("b/x.heic", "b/y.heic", "notes.txt", "a/.hidden"):
        (root / name).write_text("x")
    return root


def test_inspect_counts_images_classes_sizes_and_what_is_not_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_odd_images(tmp_path / "x")
    assert run(["inspect", str(root), "--json"]) == 0
    captured = capsys.readouterr()
    answer = json.loads(captured.out)
    assert (answer["kind"], answer["images"], answer["classes"]) == ("images", 6, 3)
    assert (answer["class_names"], answer["class_counts"]) == (["a", "b", "c"], [2, 3, 1])
    assert (answer["smallest_class"], answer["largest_class"]) == ("c (1)", "b (3)")
    assert answer["not_taken"] == {".heic": 2, ".txt": 1, "hidden": 1}
    assert (answer["sizes"], answer["sizes_of"]) == ({"20×18": 4, "30×40": 1}, 6)
    assert (answer["first"], len(answer["unreadable"])) == ("a/0.png", 1)
    assert "a/0.png" in answer["unreadable"][0]
    assert "first_size" not in answer
    warnings = [line for line in captured.err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert "3 files not taken: .heic 2, .txt 1" in warnings[0]


def test_inspect_draws_the_first_image_for_terminals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Half blocks: the upper pixel is the colour of the text, the lower one that of its background."""
    image = Image.new("RGB", (64, 64), (255, 0, 0))
    image.paste((0, 0, 255), (0, 32, 64, 64))
    image.save(tmp_path / "1.png")
    result = look.inspect(str(tmp_path))
    assert (result.values["first_size"], result.values["classes"]) == ([64, 64], 0)
    lines = result.picture.split("\n")
    assert [len(line) for line in lines if line] == [32] * 16
    assert {str(span.style) for span in lines[0].spans} == {"rgb(255,0,0) on rgb(255,0,0)"}
    assert {str(span.style) for span in lines[15].spans} == {"rgb(0,0,255) on rgb(0,0,255)"}
    assert run(["inspect", str(tmp_path), "--json"]) == 0
    assert "▀" not in capsys.readouterr().out


def test_inspect_reads_as_the_reading_options_ask(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, exif = make_files(tmp_path / "x", "b/1.jpg"), Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    (tmp_path / "elsewhere").mkdir()
    random_image(20, 18).save(tmp_path / "elsewhere" / "2.jpg", exif=exif)
    (root / "a").symlink_to(tmp_path / "elsewhere")
    assert run(["inspect", str(root)]) == 3
    assert "--follow-links" in capsys.readouterr().err
    for options, size in (([], [20, 18]), (["--exif"], [18, 20])):
        assert run(["inspect", str(root), "--follow-links", "--json", *options]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert (answer["images"], answer["first"], answer["first_size"]) == (2, "a/2.jpg", size)
        assert answer["reading"] == {"follow_links": True, **({"exif": True} if options else {})}


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
    (tmp_path / "empty").mkdir()
    for path, code, token in ((store, 3, "index-00000.npy"), (tmp_path / "nothing", 2, "nothing"), (tmp_path, 3, "")):
        assert run(["verify", str(path)]) == code
        assert token in capsys.readouterr().err


def test_verify_of_samples_names_the_damaged_file(tmp_path: Path) -> None:
    rows = [{"file": f"{index:06d}.png", "index": index, "label": 0} for index in range(3)]
    for index, row in enumerate(rows):
        save_png(tmp_path / str(row["file"]), np.full((8, 8, 3), index, dtype=np.uint8))
    finish(tmp_path, {"format": "rdpm-samples", "resolution": 8, "class_names": ["a"], "samples": rows})
    assert look.verify(tmp_path).values["samples"] == 3
    path = tmp_path / "000001.png"
    path.write_bytes(path.read_bytes()[:40])
    for change in (lambda: None, path.unlink):
        change()
        with pytest.raises(DataError, match=path.name):
            look.verify(tmp_path)


@pytest.fixture
def examine(no_weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """The JSON of `rdpm doctor`, which agrees with its exit code, without launcher, driver and weights."""
    for name in launcher.TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    if not torch.cuda.is_available():
        monkeypatch.setattr(look, "DRIVER", no_weights / "no-driver")

    def examined(code: int = 0) -> dict[str, Any]:
        assert run(["doctor", "--json"]) == code
        captured = capsys.readouterr()
        answer: dict[str, Any] = json.loads(captured.out)
        assert answer["ready"] == (code == 0) == (answer["broken"] == [])
        assert set(answer["broken"]) <= set(answer["fix"])
        assert code == 0 or answer["broken"][0] in captured.err
        return answer

    return examined


def test_doctor_reports_versions_extras_and_weights(
    examine: Any, no_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer, file = examine(), no_weights / "weights" / "file"
    assert answer["versions"]["numpy"] == metadata.version("numpy")
    assert {"rdpm", "python", "torch", "torch-fidelity", "libjpeg-turbo"} <= set(answer["versions"])
    assert set(answer["extras"]) == {
        "audio",
        "flash",
        "hub",
        "mlflow",
        "parquet",
        "phones",
        "play",
        "ray",
        "remote",
        "timm",
        "trackio",
        "wandb",
    }
    assert {f"weights.{name}" for name in ("inception", "dinov2", "clip", "vgg16", "alexnet")} <= set(answer["fix"])
    assert VGG.file in answer["fix"]["weights.vgg16"]
    file.write_bytes(b"weights")
    sha256 = files.sha256_file(file)
    published = checkpoint.Published(f"inception-{sha256[:8]}.pth", "https://example.org")
    path = file.rename(file.with_name(published.file))
    monkeypatch.setattr(features, "INCEPTION", published)
    expected = {"state": "found", "file": published.file, "path": str(path), "sha256": sha256}
    answer = examine()
    assert answer["weights"]["inception"] == expected
    assert "weights.inception" not in answer["fix"]


def test_what_stops_commands_is_broken(examine: Any, no_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", "2")
    monkeypatch.setitem(sys.modules, "lpips", None)
    (no_weights / "weights" / VGG.file).write_bytes(b"half of it")
    answer = examine(3)
    assert set(answer["broken"]) == {"launcher", "versions.lpips", "weights.vgg16"}
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

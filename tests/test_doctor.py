"""rdpm doctor: what is missing has a line that mends it, and what is broken an exit code."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rdpm_cli import files, weights
from rdpm_cli.cli.app import run
from rdpm_cli.engine import doctor as medicine
from rdpm_cli.evaluation import features
from rdpm_cli.tokenizer import perceptual

VGG = perceptual.BACKBONES["vgg"].published


@pytest.fixture(autouse=True)
def healthy(no_weights: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No weights, no launcher, no driver. -> the folder of weights."""
    for name in (*medicine.LAUNCHER, *medicine.AROUND, *medicine.SETTINGS):
        if name not in {"RDPM_WEIGHTS", "TORCH_HOME"}:
            monkeypatch.delenv(name, raising=False)
    if not torch.cuda.is_available():
        monkeypatch.setattr(medicine, "DRIVER", tmp_path / "no-driver")
    return no_weights / "weights"


def examined(capsys: pytest.CaptureFixture[str], code: int = 0) -> dict[str, Any]:
    """The JSON of `rdpm doctor`, which says the same as its exit code."""
    assert run(["doctor", "--json"]) == code
    shown = capsys.readouterr()
    answer: dict[str, Any] = json.loads(shown.out)
    assert answer["ready"] == (code == 0) == (answer["broken"] == [])
    assert set(answer["broken"]) <= set(answer["fix"])
    if code:
        assert [line.partition(": ")[0] for line in shown.err.splitlines()] == ["rdpm", "hint"]
        assert answer["broken"][0] in shown.err
    return answer


def test_it_names_versions_devices_attention_disk_weights_and_extras(capsys: pytest.CaptureFixture[str]) -> None:
    answer = examined(capsys)
    assert set(medicine.NEEDED) | {"rdpm", "python", "libjpeg-turbo"} == set(answer["versions"])
    assert answer["devices"]["cpu_cores"] >= 1
    assert answer["devices"]["gpus"] == torch.cuda.device_count()
    assert "math" in answer["attention"]["sdpa"]
    assert answer["disk"]["free_gib"] > 0
    assert answer["allocator"]["malloc"]
    assert set(answer["weights"]) == {"inception", "vgg16", "alexnet"}
    assert set(answer["extras"]) == {"flash", "parquet", "wandb"}


def test_every_missing_thing_has_a_line_that_mends_it(capsys: pytest.CaptureFixture[str]) -> None:
    answer = examined(capsys)
    assert {name for name, told in answer["weights"].items() if told["state"] == "absent"} == set(answer["weights"])
    absent = {f"weights.{name}" for name in answer["weights"]}
    absent |= {f"extras.{name}" for name, told in answer["extras"].items() if told == "absent"}
    absent |= {"devices.gpus"} if not torch.cuda.is_available() else set()
    assert set(answer["fix"]) == absent
    assert all(VGG.file in line or "vgg" not in name for name, line in answer["fix"].items())


def test_text_says_it_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("ready\n")
    assert "fix.weights.vgg16" in shown


def test_a_weight_file_is_found_with_its_sha256(
    healthy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (healthy / "file").write_bytes(b"weights")
    sha = files.sha256_file(healthy / "file")
    published = weights.Published(f"inception-{sha[:8]}.pth", "https://example.org")
    (healthy / "file").rename(healthy / published.file)
    monkeypatch.setattr(features, "INCEPTION", published)
    told = examined(capsys)
    assert told["weights"]["inception"] == {
        "state": "found", "file": published.file, "path": str(healthy / published.file), "sha256": sha
    }  # fmt: skip
    assert "weights.inception" not in told["fix"]


def test_a_damaged_weight_file_is_broken(healthy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (healthy / VGG.file).write_bytes(b"half of it")
    answer = examined(capsys, 3)
    assert answer["broken"] == ["weights.vgg16"]
    assert "damaged" in answer["weights"]["vgg16"]["state"]
    assert VGG.url in answer["fix"]["weights.vgg16"]


@pytest.mark.parametrize("distribution", ["lpips", "torch"])
def test_a_package_that_cannot_be_imported_is_broken(
    distribution: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, distribution, None)
    answer = examined(capsys, 3)
    assert f"versions.{distribution}" in answer["broken"]
    assert distribution in answer["fix"][f"versions.{distribution}"]
    assert "weights" not in answer


def test_half_a_launcher_is_broken(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    answer = examined(capsys, 3)
    assert answer["launcher"] == {"WORLD_SIZE": "2"}
    assert "unset WORLD_SIZE" in answer["fix"]["launcher"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use the GPU")
def test_a_driver_that_torch_cannot_use_is_broken_unless_the_gpu_is_hidden(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    told = (
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\nGCC version:  gcc 12.3.0\n"
    )
    (tmp_path / "version").write_text(told)
    monkeypatch.setattr(medicine, "DRIVER", tmp_path / "version")
    assert medicine.driver() == "580.65.06"
    assert examined(capsys, 3)["broken"] == ["devices.gpus"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert examined(capsys)["settings"]["CUDA_VISIBLE_DEVICES"] == ""

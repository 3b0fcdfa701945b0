"""What a run makes of its machine, in its log and on its progress line."""

from pathlib import Path

import pytest
import torch
from helpers import CPU
from processes import tokenizer_command

from rdpm_cli import progress
from rdpm_cli.cli.app import run as run_cli
from rdpm_cli.config import TokenizerConfig
from rdpm_cli.engine import flops, monitoring, observers
from rdpm_cli.engine.gpus import GIB
from rdpm_cli.recipe_files import load_recipe
from rdpm_cli.signals import StopRequest
from rdpm_cli.training.logging import read_metrics
from rdpm_cli.training.loop import Run

GPU = torch.device("cuda:0")


def run_on(device: torch.device) -> Run:
    return Run(Path("run"), 0, device, steps=4, warmup=0, stop=StopRequest(), step=1)


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes, each on an H200 that has given out 3 GiB at most."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * GIB)
    monkeypatch.setattr(monitoring, "world", lambda: (0, 2))


@pytest.mark.usefixtures("a_gpu")
def test_utilisation_is_the_share_of_all_gpus_peaks() -> None:
    logs = {"loss": 1.0, "images_per_second": 1000.0}
    monitoring.machine(10**12)(run_on(GPU), logs)
    assert logs["flops_per_second"] == 1e15
    assert logs["utilisation"] == pytest.approx(1e15 / 2 / 989.4e12)
    assert logs["memory_gib"] == 3


@pytest.mark.usefixtures("a_gpu")
def test_the_progress_line_shows_utilisation() -> None:
    logs = {"loss": 1.0, "images_per_second": 1000.0}
    monitoring.machine(10**12)(run_on(GPU), logs)
    bar = progress.Bar("train", 4, "steps")
    with bar:
        observers.progress(bar)(run_on(GPU), logs)
    assert bar.note == "loss 1.0000, 1000 images/s, 51% of peak"


def test_no_utilisation_where_the_gpu_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200 MIG 1g.18gb")
    assert monitoring.known_gpu(GPU) is None
    logs = {"loss": 1.0, "images_per_second": 10.0}
    monitoring.machine(100)(run_on(CPU), logs)
    assert "utilisation" not in logs


def test_nothing_is_added_between_logged_steps() -> None:
    assert monitoring.machine(100)(run_on(CPU), None) is None


def test_peak_memory_of_a_process_is_what_it_had_resident() -> None:
    before = monitoring.peak_memory(CPU)
    size = before + (64 << 20)  # more than ever was resident
    held = torch.ones(size // 4)
    assert before < monitoring.peak_memory(CPU) < 3 * size
    assert len(held) > 0


def test_every_line_of_a_run_carries_them(tmp_path: Path) -> None:
    assert run_cli(tokenizer_command(tmp_path / "run", "train.steps=2", "train.batch=16")) == 0
    overrides = [word for word in tokenizer_command(tmp_path) if "=" in word]
    cfg = load_recipe("digits", overrides, "tokenizer").tokenizer
    assert isinstance(cfg, TokenizerConfig)
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        expected = row["images_per_second"] * sum(flops.tokenizer_step(cfg).values())
        assert row["flops_per_second"] == pytest.approx(expected)
        assert 0.05 < row["memory_gib"] < 100
        assert "utilisation" not in row

"""One, two and four processes: the same bytes of codes and samples on a CPU, and losses within 1e-3."""

import json
from pathlib import Path

import numpy as np
import pytest
from generators import save_generator
from helpers import metrics
from processes import run_all, training_command
from rows import Rows
from stores import content


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.long)])
def test_a_store_is_that_of_one_process(
    processes: int, image_folder: Path, tiny_tokenizer_file: Path, tmp_path: Path, rows: Rows
) -> None:
    def command(out: str) -> list[str]:
        fixed = ["--tokenizer", str(tiny_tokenizer_file), "--shard-size", "5", "--views", "2", "--device", "cpu"]
        return ["tokenize", str(image_folder), str(tmp_path / out), *fixed, "--quiet", "--workers", "1"]

    assert run_all(command("alone")) == [0]
    with rows.count(f"store of {processes} processes, byte-identical"):
        assert run_all(command("ranks"), processes) == [0] * processes
        assert content(tmp_path / "ranks") == content(tmp_path / "alone")
        assert json.loads((tmp_path / "ranks" / "run.json").read_text())["processes"] == processes


@pytest.mark.long
@pytest.mark.parametrize("processes", [2, 4])
def test_samples_are_those_of_one_process(
    processes: int, tiny_tokenizer_file: Path, tmp_path: Path, rows: Rows
) -> None:
    """In every run of the tests: two processes, in test_sample.py. Equal samples have equal scores."""
    generator = save_generator(tmp_path / "generator.pt", tiny_tokenizer_file, cfg=1.0)

    def command(out: str) -> list[str]:
        fixed = ["sample", "--ckpt", str(generator), "--out", str(tmp_path / out), "--per-class", "7", "--npz"]
        return [*fixed, "--quiet", "--device", "cpu"]

    assert run_all(command("alone")) == [0]
    with rows.count(f"samples of {processes} processes, byte-identical"):
        assert run_all(command("ranks"), processes) == [0] * processes
        names = sorted(path.name for path in (tmp_path / "alone").glob("*.png"))
        assert len(names) == 21
        for name in [*names, "samples.npz", "samples.json"]:
            assert (tmp_path / "ranks" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes(), name


@pytest.mark.long
@pytest.mark.parametrize(("training", "same"), [("tokenizer", 3), ("generator", 100)])
def test_losses_are_those_of_one_process(
    training: str, same: int, digits_codes: Path, tmp_path: Path, rows: Rows
) -> None:
    """100 steps: what differs is the order of sums. same: steps whose losses agree; the first code flips at step 5."""
    losses = {}
    for processes in (1, 2, 4):
        out = tmp_path / str(processes)
        args = training_command(training, digits_codes, out, "train.batch=64", "train.steps=100")
        assert run_all(args, processes) == [0] * processes
        losses[processes] = np.array([row["loss"] for row in metrics(out) if "loss" in row])
    assert len(losses[1]) == 100
    for processes in (2, 4):
        with rows.count(f"losses of 1 and {processes} processes within 1e-3 over 100 steps; tokenizer: over 3"):
            most = np.abs(losses[processes] - losses[1])[:same].max()
            last = abs(float((losses[processes] - losses[1])[-20:].mean()))
            text = f"at most {most:.1e} apart in {same} steps, mean of the last 20 {last:.1e}"
            rows.note(f"{training}, losses of 1 and {processes} processes", text)
            assert most < 1e-3
            assert last < 5e-3

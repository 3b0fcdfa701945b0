"""The experiments over a stand-in for `rdpm`: the cells, what is not run again, the table."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rdpm_cli import recipes

SCRIPTS = Path(__file__).parent.parent / "recipes" / "ablations"
STAND_IN = """#!{python}
import json, pathlib, sys
words = sys.argv[3:]  # behind --log-format json
with open("{log}", "a") as log:
    log.write(json.dumps(words) + "\\n")
def after(option):
    return pathlib.Path(words[words.index(option) + 1])
answer = {{}}
if words[0] == "demo":
    after("--out").mkdir(parents=True)
    (after("--out") / "result.json").write_text("x")
if words[0] == "train-gen":
    after("--out").mkdir(parents=True, exist_ok=True)
    steps = int(([word for word in words if word.startswith("train.steps=")] or ["=9"])[-1].split("=")[1])
    rows = [{{"step": 40, "images_per_second": 32.0}}, {{"step": 80, "images_per_second": 48.0}}]  # 30 s, then 10 s
    last = {{"step": steps, "heldout/ce": [1.0, 2.0], "heldout/accuracy": [0.9, 0.5], "heldout/baseline": [0.8, 0.0]}}
    (after("--out") / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in [*rows, last]))
    record = {{"settings": {{"recipe": {{"generator": {{"train": {{"batch": 24}}}}}}}}}}
    (after("--out") / "run.json").write_text(json.dumps(record))
    answer = {{"parameters": 1000}}
if words[0] == "sample":
    print(json.dumps({{"kind": "finished", "job": "sample", "done": 4, "before": 0, "seconds": 8.0}}), file=sys.stderr)
    answer = {{"samples": 4, "passes": 10}}
if words[:2] == ["eval", "judge"]:
    pathlib.Path(words[3]).mkdir(parents=True, exist_ok=True)
    (pathlib.Path(words[3]) / "judge.pt").write_text("x")
if words[:2] == ["eval", "all"]:
    answer = {{"frechet_distance": 5.5, "spatial_frechet_distance": None, "precision": 0.7, "class_accuracy": 0.5}}
if words[:2] == ["eval", "recon"]:
    name = after("--tokenizer").parent.name
    if name == "{fails}":
        print("no score", file=sys.stderr)
        sys.exit(3)
    seed = name.rpartition(".")[2]
    psnr = 20 + len(name.split(".")[0]) + (int(seed) if seed.isdecimal() else 0)
    answer = {{"psnr": psnr, "ssim": 0.5, "mse": 0.01, "rfid": None, "lpips_vgg": None}}
print(json.dumps(answer))
"""


def ablate(folder: Path, table: str, *options: str, fails: str = "") -> subprocess.CompletedProcess[str]:
    """Run an experiment with the stand-in first on the PATH. Every recipe that it asks for must be valid."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    (programs / "rdpm").write_text(STAND_IN.format(python=sys.executable, log=folder / "calls.jsonl", fails=fails))
    (programs / "rdpm").chmod(0o755)
    variables = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    command = [sys.executable, str(SCRIPTS / "run.py"), table, "--out", str(folder / "out"), *options]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=600, check=False)
    for kind, section in {"train-tokenizer": "tokenizer", "train-gen": "generator"}.items():
        for call in calls(folder, kind):
            recipes.load_recipe(call[call.index("--recipe") + 1], overrides(call), section)
    return done


def overrides(call: list[str]) -> list[str]:
    return [word for word in call if "=" in word]


def calls(folder: Path, kind: str) -> list[list[str]]:
    log = folder / "calls.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    return [call for call in map(json.loads, lines) if call[0] == kind]


def rows_of(done: subprocess.CompletedProcess[str]) -> list[dict[str, str]]:
    assert done.returncode == 0, done.stderr
    header, _, *rows = [[part.strip() for part in line.strip("|").split("|")] for line in done.stdout.splitlines()]
    return [dict(zip(header, row, strict=True)) for row in rows]


def test_every_cell_of_table2_is_another_valid_recipe(tmp_path: Path) -> None:
    rows = rows_of(ablate(tmp_path, "table2", "--seeds", "0", "1"))
    assert [row["cell"] for row in rows][:4] == ["default", "T2", "T5", "T20"]
    assert rows[0]["psnr"] == "27.50 ± 0.71"
    assert rows[0]["rfid"] == "n/a"
    assert rows[7]["paper"] == "best (row 9)"
    trained = calls(tmp_path, "train-tokenizer")
    assert len(trained) == 24
    digests = {
        recipes.load_recipe(call[call.index("--recipe") + 1], overrides(call), "tokenizer").digest() for call in trained
    }
    assert len(digests) == 12
    assert (tmp_path / "out" / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "out" / "table.csv").read_text().splitlines()) == 1 + 24


def test_a_finished_cell_is_not_run_again_and_a_failed_one_is(tmp_path: Path) -> None:
    assert ablate(tmp_path, "table2", "--seeds", "0", fails="sin.0").returncode == 3
    assert not (tmp_path / "out" / "table.md").exists()
    first = len(calls(tmp_path, "train-tokenizer"))
    assert ablate(tmp_path, "table2", "--seeds", "0").returncode == 0
    assert len(calls(tmp_path, "train-tokenizer")) == first + 1


def test_a_cell_that_was_made_with_other_options_is_refused(tmp_path: Path) -> None:
    assert ablate(tmp_path, "table3", "--seeds", "0", "--cfg", "1").returncode == 0
    done = ablate(tmp_path, "table3", "--seeds", "0", "--cfg", "3")
    assert done.returncode == 2
    assert "cfg.0.json" in done.stderr


@pytest.mark.parametrize(
    ("options", "token"),
    [(("--scale", "huge"), "huge"), (("--scale", "cifar10"), "--images"), (("--cells", "none"), "none")],
)
def test_bad_options_end_before_any_command(options: tuple[str, ...], token: str, tmp_path: Path) -> None:
    done = ablate(tmp_path, "table2", *options)
    assert done.returncode == 2
    assert token in done.stderr
    assert not calls(tmp_path, "train-tokenizer")


def test_cells_at_equal_time_get_the_steps_that_fit(tmp_path: Path) -> None:
    rows = rows_of(ablate(tmp_path, "paper-vs-plus", "--seeds", "0", "--seconds", "50"))
    assert len(rows) == 12
    assert {row["steps"] for row in rows} == {"200"}  # 40 steps in 10 s, start-up left out
    assert rows[0]["accuracy_gap"] == "0.3000"
    trained = calls(tmp_path, "train-gen")
    assert len(trained) == 24  # a probe and a run each
    digests = {recipes.load_recipe("digits", overrides(call), "generator").digest() for call in trained[1::2]}
    assert len(digests) == 12


def test_several_gpus_reach_every_command_that_takes_them(tmp_path: Path) -> None:
    scale = ("--scale", "imagenet256", "--images", "x", "--heldout", "y", "--gpus", "8", "--ref", "adm.npz")
    rows = rows_of(ablate(tmp_path, "table5", *scale))
    assert [row["cell"] for row in rows] == ["d12", "d16", "d20", "resgen"]
    for kind in ("train-tokenizer", "tokenize", "train-gen", "sample"):
        assert all(call[call.index("--gpus") + 1] == "8" for call in calls(tmp_path, kind))
    scored = calls(tmp_path, "eval")
    assert all(call[call.index("--ref") + 1] == "adm.npz" for call in scored)
    assert not any("--extractor" in call for call in scored)


def test_table3_samples_two_generators_in_every_way(tmp_path: Path) -> None:
    rows = rows_of(ablate(tmp_path, "table3", "--seeds", "0", "1", "--cfg", "2"))
    names = ["raw", "cfg", "cfg-linear", "gumbel", "gumbel-alone"]
    assert [row["cell"] for row in rows] == [*names, "weak", *(f"weak-{name}" for name in names)]
    assert rows[0]["precision"] == "0.7000 ± 0.0000"


@pytest.mark.parametrize(("table", "cells"), [("table4", 3), ("table4-early", 5), ("figure5", 5)])
def test_a_schedule_has_a_tokenizer_and_a_generator_of_its_own(tmp_path: Path, table: str, cells: int) -> None:
    rows = rows_of(ablate(tmp_path, table, "--seeds", "3"))
    assert len(rows) == cells
    assert float(rows[0]["recon_psnr"]) > 20
    assert len(calls(tmp_path, "tokenize")) == len(calls(tmp_path, "train-tokenizer"))


@pytest.mark.parametrize(
    ("table", "trained", "sampled"),
    [
        ("resgen", 2 * 5, 5),
        ("resgen-steps", 2 * 3, 3 + 15),
        ("resgen-switches", 7, 7),
        ("resgen-nucleus", 2, 10),
        ("resgen-schedules", 5, 25),
    ],
)
def test_resgen_learns_from_plain_residual_codes(table: str, trained: int, sampled: int, tmp_path: Path) -> None:
    rows_of(ablate(tmp_path, table, "--seeds", "0"))
    runs = calls(tmp_path, "train-gen")
    assert len(runs) == trained
    assert len(calls(tmp_path, "sample")) == sampled
    for call in runs:
        recipe = recipes.load_recipe(call[call.index("--recipe") + 1], overrides(call), "generator")
        assert recipe.generator is not None
        assert (recipe.generator.family == "resgen") == ("rvq-" in call[1])


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.sh")), ids=lambda path: path.stem)
def test_every_script_calls_its_table(script: Path) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command, environment = ["sh", str(script), "--help"], {**os.environ, "PATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0
    assert "--scale" in done.stdout

"""The experiments over a stand-in for `rdpm`: the cells, what is not run again, the table."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rdpm_cli.recipes import Recipe, load_recipe

SCRIPTS = Path(__file__).parent.parent / "recipes" / "ablations"
STAND_IN = """#!{python}
import json, pathlib, sys
words = sys.argv[3:]  # behind --log-format json
with open("{log}", "a") as log:
    log.write(json.dumps(words) + "\\n")
def folder(path):
    pathlib.Path(path).mkdir(parents=True, exist_ok=True)
    return pathlib.Path(path)
def after(option):
    return words[words.index(option) + 1]
answer = {{}}
if words[0] == "demo":
    (folder(after("--out")) / "result.json").write_text("x")
if words[0] == "train-gen":
    steps = int(([word for word in words if word.startswith("train.steps=")] or ["=9"])[-1].split("=")[1])
    rows = [{{"step": 40, "images_per_second": 32.0}}, {{"step": 80, "images_per_second": 48.0}}]  # 30 s, then 10 s
    rows += [{{"step": steps, "heldout/ce": [1.0], "heldout/accuracy": [0.9, 0.5], "heldout/baseline": [0.8, 0.0]}}]
    (folder(after("--out")) / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
    record = {{"settings": {{"recipe": {{"generator": {{"train": {{"batch": 24}}}}}}}}}}
    (folder(after("--out")) / "run.json").write_text(json.dumps(record))
    answer = {{"parameters": 1000}}
if words[0] == "sample":
    print(json.dumps({{"kind": "finished", "job": "sample", "done": 4, "before": 0, "seconds": 8.0}}), file=sys.stderr)
    answer = {{"samples": 4, "passes": 10}}
if words[:2] == ["eval", "judge"]:
    (folder(words[3]) / "judge.pt").write_text("x")
if words[:2] == ["eval", "all"]:
    answer = {{"frechet_distance": 5.5, "spatial_frechet_distance": None, "precision": 0.7, "class_accuracy": 0.5}}
if words[:2] == ["eval", "recon"]:
    name = pathlib.Path(after("--tokenizer")).parent.name
    if name == "{fails}":
        sys.exit(3)
    seed = name.rpartition(".")[2]
    psnr = 20 + len(name.split(".")[0]) + (int(seed) if seed.isdecimal() else 0)
    answer = {{"psnr": psnr, "ssim": 0.5, "mse": 0.01, "rfid": None, "lpips_vgg": None}}
print(json.dumps(answer))
"""


def ablate(folder: Path, *args: str, fails: str = "") -> subprocess.CompletedProcess[str]:
    """Run an experiment with the stand-in first on the PATH. Every recipe that it asks for must be valid."""
    (folder / "bin").mkdir(exist_ok=True)
    rdpm = folder / "bin" / "rdpm"
    rdpm.write_text(STAND_IN.format(python=sys.executable, log=folder / "calls.jsonl", fails=fails))
    rdpm.chmod(0o755)
    variables = {**os.environ, "PATH": f"{rdpm.parent}:{os.environ['PATH']}"}
    command = [sys.executable, str(SCRIPTS / "run.py"), *args, "--out", str(folder / "out")]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=600, check=False)
    for call in [*calls(folder, "train-tokenizer"), *calls(folder, "train-gen")]:
        recipe_of(call)
    return done


def recipe_of(call: list[str]) -> Recipe:
    """The recipe that a training asks for."""
    section = {"train-tokenizer": "tokenizer", "train-gen": "generator"}[call[0]]
    return load_recipe(call[call.index("--recipe") + 1], [word for word in call if "=" in word], section)


def calls(folder: Path, kind: str) -> list[list[str]]:
    log = folder / "calls.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    return [call for call in map(json.loads, lines) if call[0] == kind]


def rows_of(done: subprocess.CompletedProcess[str]) -> list[dict[str, str]]:
    assert done.returncode == 0, done.stderr
    header, _, *rows = [[part.strip() for part in line.strip("|").split("|")] for line in done.stdout.splitlines()]
    return [dict(zip(header, row, strict=True)) for row in rows]


def test_every_cell_of_table2_is_another_recipe_and_only_failed_ones_are_run_again(tmp_path: Path) -> None:
    args = ("table2", "--seeds", "0", "1")
    assert ablate(tmp_path, *args, fails="sin.0").returncode == 3
    assert not (tmp_path / "out" / "table.md").exists()
    rows = rows_of(ablate(tmp_path, *args))
    assert [row["cell"] for row in rows][:4] == ["default", "T2", "T5", "T20"]
    assert (rows[0]["psnr"], rows[0]["rfid"], rows[7]["paper"]) == ("27.50 ± 0.71", "n/a", "best (row 9)")
    trained = calls(tmp_path, "train-tokenizer")
    assert len(trained) == 24 + 1
    assert len({recipe_of(call).digest() for call in trained}) == 12
    assert (tmp_path / "out" / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "out" / "table.csv").read_text().splitlines()) == 1 + 24


def test_a_cell_that_was_made_with_other_options_is_refused(tmp_path: Path) -> None:
    rows = rows_of(ablate(tmp_path, "table3", "--seeds", "0", "--cfg", "2"))
    names = ["raw", "cfg", "cfg-linear", "gumbel", "gumbel-alone"]
    assert [row["cell"] for row in rows] == [*names, "weak", *(f"weak-{name}" for name in names)]
    assert rows[0]["precision"].startswith("0.7000")
    done = ablate(tmp_path, "table3", "--seeds", "0", "--cfg", "3")
    assert done.returncode == 2
    assert "cfg.0.json" in done.stderr


def test_an_experiment_without_its_images_ends_before_any_command(tmp_path: Path) -> None:
    done = ablate(tmp_path, "table2", "--scale", "cifar10")
    assert (done.returncode, calls(tmp_path, "train-tokenizer")) == (2, [])
    assert "--images" in done.stderr


def test_cells_at_equal_time_get_the_steps_that_fit(tmp_path: Path) -> None:
    rows = rows_of(ablate(tmp_path, "paper-vs-plus", "--seeds", "0", "--seconds", "50"))
    assert [row["steps"] for row in rows] == ["200"] * 12  # 40 steps in 10 s, start-up left out
    assert rows[0]["accuracy_gap"] == "0.3000"
    trained = calls(tmp_path, "train-gen")  # a probe and a run each
    assert (len(trained), len({recipe_of(call).digest() for call in trained[1::2]})) == (24, 12)


def test_several_gpus_reach_every_command_that_takes_them(tmp_path: Path) -> None:
    scale = ("--scale", "imagenet256", "--images", "x", "--heldout", "y", "--gpus", "8", "--ref", "adm.npz")
    rows = rows_of(ablate(tmp_path, "table5", *scale))
    assert [row["cell"] for row in rows] == ["d12", "d16", "d20", "resgen"]
    for kind in ("train-tokenizer", "tokenize", "train-gen", "sample"):
        assert all(call[call.index("--gpus") + 1] == "8" for call in calls(tmp_path, kind))
    assert all(call[call.index("--ref") + 1] == "adm.npz" for call in calls(tmp_path, "eval"))
    assert not any("--extractor" in call for call in calls(tmp_path, "eval"))


@pytest.mark.parametrize(
    ("table", "tokenizers", "generators", "samples"),
    [
        ("table4", 3, 3, 3), ("table4-early", 2, 2, 5), ("figure5", 5, 5, 5), ("resgen", 0, 10, 5),
        ("resgen-steps", 0, 6, 18), ("resgen-switches", 0, 7, 7), ("resgen-nucleus", 0, 2, 10),
        ("resgen-schedules", 0, 5, 25),
    ],
)  # fmt: skip
def test_tables_train_what_they_compare_and_resgen_on_plain_residual_codes(
    table: str, tokenizers: int, generators: int, samples: int, tmp_path: Path
) -> None:
    rows = rows_of(ablate(tmp_path, table, "--seeds", "3"))
    numbers = [len(calls(tmp_path, kind)) for kind in ("tokenize", "train-tokenizer", "train-gen", "sample")]
    assert numbers == [numbers[0], numbers[0], generators, samples]
    assert not tokenizers or (numbers[0], len(rows)) == (tokenizers, samples)
    assert not tokenizers or float(rows[0]["recon_psnr"]) > 20
    for call in calls(tmp_path, "train-gen"):
        generator = recipe_of(call).generator
        assert generator is not None
        assert (generator.family == "resgen") == ("rvq-" in call[1])


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.sh")), ids=lambda path: path.stem)
def test_every_script_calls_its_table(script: Path) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    assert b"--scale" in subprocess.check_output(["sh", str(script), "--help"], env=environment)

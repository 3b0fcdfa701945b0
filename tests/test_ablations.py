"""The ablation scripts over a stand-in for `rdpm`: which cells are run, what is not run again, the table."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rdpm_cli import recipe_files

SCRIPTS = Path(__file__).parent.parent / "recipes" / "ablations"
STAND_IN = """#!{python}
import json, pathlib, sys
with open("{log}", "a") as log:
    log.write(json.dumps(sys.argv[1:]) + "\\n")
if sys.argv[1] == "eval":
    cell = pathlib.Path(sys.argv[sys.argv.index("--tokenizer") + 1]).parent.name
    if cell == "{fails}":
        sys.exit("no score")
    psnr = 20 + len(cell.split(".")[0]) + int(cell.split(".")[1])
    print(json.dumps({{"psnr": psnr, "ssim": 0.5, "mse": 0.01, "rfid": None, "lpips_vgg": None}}))
"""


def ablate(folder: Path, fails: str = "nothing", **environment: str) -> subprocess.CompletedProcess[str]:
    """table2.sh with the stand-in first on the path; its calls go to calls.jsonl."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    stand_in = STAND_IN.format(python=sys.executable, log=folder / "calls.jsonl", fails=fails)
    for name, text in {"rdpm": stand_in, "python": f'#!/bin/sh\nexec {sys.executable} "$@"\n'}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    path = f"{programs}:{os.environ['PATH']}"
    variables = {**os.environ, "PATH": path, "OUT": str(folder / "out"), **environment}
    script = str(SCRIPTS / "table2.sh")
    return subprocess.run(["sh", script], env=variables, capture_output=True, text=True, timeout=120, check=False)


def calls(folder: Path, kind: str) -> list[list[str]]:
    lines = (folder / "calls.jsonl").read_text().splitlines()
    return [call for call in map(json.loads, lines) if call[0] == kind]


def test_every_cell_varies_one_factor_of_recipes_that_are_valid(tmp_path: Path) -> None:
    done = ablate(tmp_path, SEEDS="0 1")
    assert done.returncode == 0, done.stderr
    trained = calls(tmp_path, "train-tokenizer")
    assert len(trained) == 24
    assert len(calls(tmp_path, "eval")) == 24
    assert {f"seed={seed}" for seed in range(2)} == {word for call in trained for word in call if "seed=" in word}
    resolved = set()
    for call in trained:
        overrides = [word for word in call if "=" in word]
        recipe = recipe_files.load_recipe(call[call.index("--recipe") + 1], overrides, "tokenizer")
        resolved.add(recipe.model_copy(update={"seed": 0}).digest())
    assert len(resolved) == 12


def test_a_finished_cell_is_not_run_again_and_a_broken_one_is(tmp_path: Path) -> None:
    assert ablate(tmp_path, fails="sin.0", SEEDS="0").returncode != 0
    assert not (tmp_path / "out" / "sin.0.json").exists()
    assert not (tmp_path / "out" / "table.md").exists()
    before = len(calls(tmp_path, "train-tokenizer"))
    assert ablate(tmp_path, SEEDS="0").returncode == 0
    assert len(calls(tmp_path, "train-tokenizer")) == before + 1


def test_the_table_gives_mean_and_spread_beside_the_paper(tmp_path: Path) -> None:
    done = ablate(tmp_path, SEEDS="0 1")
    rows = [[part.strip() for part in line.strip("|").split("|")] for line in done.stdout.splitlines()]
    assert rows[0] == ["cell", "seeds", "psnr", "ssim", "mse", "rfid", "lpips_vgg", "paper"]
    assert rows[2][:6] == ["default", "2", "27.50 ± 0.71", "0.5000 ± 0.0000", "0.0100 ± 0.0000", "n/a"]
    assert rows[2][7] == "best (row 9)"
    assert len(rows) == 2 + 12
    assert (tmp_path / "out" / "table.md").read_text() == done.stdout
    assert (tmp_path / "out" / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("scale", "says"), [("huge", "none of digits"), ("cifar10", "CIFAR10"), ("imagenet256", "")])
def test_what_is_missing_is_said(scale: str, says: str, tmp_path: Path) -> None:
    done = ablate(tmp_path, SCALE=scale)
    assert done.returncode == 2
    assert says in done.stderr
    assert not (tmp_path / "calls.jsonl").exists()

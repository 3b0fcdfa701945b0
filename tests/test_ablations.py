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
logs = sys.argv[1:3] == ["--log-format", "json"]
if logs:
    del sys.argv[1:3]
with open("{log}", "a") as log:
    log.write(json.dumps(sys.argv[1:]) + "\\n")
def after(option):
    return pathlib.Path(sys.argv[sys.argv.index(option) + 1])
if sys.argv[1] == "demo":
    after("--out").mkdir()
    (after("--out") / "result.json").write_text("x")
if sys.argv[1] == "train-gen":
    after("--out").mkdir(exist_ok=True)
    steps = int(([word for word in sys.argv if word.startswith("train.steps=")] or ["=9"])[-1].split("=")[1])
    rows = [{{"step": 40, "images_per_second": 32.0}}, {{"step": 80, "images_per_second": 48.0}}]  # 30 s, then 10 s
    last = {{"step": steps, "heldout/ce": [1.0, 2.0], "heldout/accuracy": [0.9, 0.5], "heldout/baseline": [0.8, 0.0]}}
    (after("--out") / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in [*rows, last]))
    train = {{"batch": 24}}
    note = {{"settings": {{"recipe": {{"generator": {{"train": train}}}}}}}}
    (after("--out") / "run.json").write_text(json.dumps(note))
    print(json.dumps({{"parameters": 1000}}))
if sys.argv[1] == "train-tokenizer":
    after("--out").mkdir(parents=True, exist_ok=True)
    given = dict(word.split("=") for word in sys.argv if word.startswith("schedule."))
    schedule = {{"kind": given["schedule.kind"], "base": float(given.get("schedule.base", 0.75))}} if given else {{}}
    recipe = {{"tokenizer": {{"schedule": schedule, "quantizer": {{"steps": 10}}}}}}
    (after("--out") / "run.json").write_text(json.dumps({{"settings": {{"recipe": recipe}}}}))
if sys.argv[1] == "tokenize":
    pathlib.Path(sys.argv[3]).mkdir(parents=True, exist_ok=True)
    (pathlib.Path(sys.argv[3]) / "manifest.json").write_text("x")
if sys.argv[1] == "doctor":
    print(json.dumps({{"weights": {{"inception": {{"state": "{inception}"}}}}}}))
    sys.exit(3)
if sys.argv[1] == "sample":
    told = {{"kind": "finished", "job": "sample", "done": 4, "before": 0, "seconds": 8.0}}
    print(json.dumps(told), file=sys.stderr)
    print(json.dumps({{"samples": 4, "passes": 10}}))
if sys.argv[1:3] == ["eval", "all"]:
    scores = {{"frechet_distance": 5.5, "spatial_frechet_distance": None, "precision": 0.7, "class_accuracy": 0.5}}
    print(json.dumps(scores))
if sys.argv[1:3] == ["eval", "recon"]:
    cell = after("--tokenizer").parent.name
    if cell == "{fails}":
        sys.exit("no score")
    psnr = 20 + len(cell.split(".")[0]) + int(cell.split(".")[1])
    print(json.dumps({{"psnr": psnr, "ssim": 0.5, "mse": 0.01, "rfid": None, "lpips_vgg": None}}))
"""


def ablate(
    folder: Path, which: str = "table2", fails: str = "nothing", inception: str = "found", **environment: str
) -> subprocess.CompletedProcess[str]:
    """A script with the stand-in first on the path; its calls go to calls.jsonl. Every recipe it asks for is valid."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    stand_in = STAND_IN.format(python=sys.executable, log=folder / "calls.jsonl", fails=fails, inception=inception)
    for name, text in {"rdpm": stand_in, "python": f'#!/bin/sh\nexec {sys.executable} "$@"\n'}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    path = f"{programs}:{os.environ['PATH']}"
    variables = {**os.environ, "PATH": path, "OUT": str(folder / "out"), "DEMO": str(folder / "demo"), **environment}
    script = str(SCRIPTS / f"{which}.sh")
    done = subprocess.run(["sh", script], env=variables, capture_output=True, text=True, timeout=600, check=False)
    for command, part in {"train-tokenizer": "tokenizer", "train-gen": "generator"}.items():
        for call in calls(folder, command):
            recipe_files.load_recipe(call[call.index("--recipe") + 1], overrides(call), part)
    return done


def overrides(call: list[str]) -> list[str]:
    return [word for word in call if "=" in word]


def calls(folder: Path, kind: str) -> list[list[str]]:
    log = folder / "calls.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
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
        recipe = recipe_files.load_recipe(call[call.index("--recipe") + 1], overrides(call), "tokenizer")
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
    assert rows[9][0] == "bias-add"
    assert rows[9][7] == "best (row 9)"
    assert len(rows) == 2 + 12
    assert (tmp_path / "out" / "table.md").read_text() == done.stdout
    assert (tmp_path / "out" / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"SCALE": "huge"}, "SCALE=huge is none of digits, cifar10, imagenet256"),
        ({"SCALE": "cifar10"}, "SCALE=cifar10 needs CIFAR10"),
        ({"SCALE": "imagenet256"}, "SCALE=imagenet256 needs IMAGENET:"),
        ({"SCALE": "imagenet256", "IMAGENET": "x"}, "SCALE=imagenet256 needs IMAGENET_VAL"),
        ({"PATH": "/bin:/usr/bin"}, "rdpm is not on the PATH"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_done(given: dict[str, str], says: str, tmp_path: Path) -> None:
    done = ablate(tmp_path, **given)
    assert done.returncode == 2
    assert says in done.stderr
    assert not (tmp_path / "calls.jsonl").exists()
    assert not (tmp_path / "out").exists()


def test_scores_of_the_papers_size_ask_for_inception_before_a_run_of_days(tmp_path: Path) -> None:
    done = ablate(tmp_path, "table5", inception="absent", SCALE="imagenet256", IMAGENET="x", IMAGENET_VAL="y")
    assert done.returncode == 2
    assert "Inception's weights" in done.stderr
    assert not calls(tmp_path, "train-tokenizer")


def test_a_cell_of_other_settings_is_refused(tmp_path: Path) -> None:
    assert ablate(tmp_path, "table3", SEEDS="0", CFG="1").returncode == 0
    done = ablate(tmp_path, "table3", SEEDS="0", CFG="3")
    assert done.returncode == 2
    assert "cell cfg, seed 0 was made with other settings; choose another OUT" in done.stderr
    assert "--cfg 1\n" in done.stderr
    assert "--cfg 3\n" in done.stderr
    assert ablate(tmp_path, "table3", SEEDS="0", CFG="1", PER_CLASS="9").returncode == 2


def test_the_table_has_the_cells_and_seeds_of_the_call_in_its_order(tmp_path: Path) -> None:
    first = table(ablate(tmp_path, "paper-vs-plus", SEEDS="0", TIME="50", CELLS="plus"))
    assert [row["cell"] for row in first] == ["plus"]
    both = table(ablate(tmp_path, "paper-vs-plus", SEEDS="1", TIME="50", CELLS="paper plus"))
    assert [(row["cell"], row["seeds"]) for row in both] == [("paper", "1"), ("plus", "1")]
    assert (tmp_path / "out" / "table.csv").read_text().splitlines()[1:] == [
        "paper,1,0.5,5.5,1.5,0.3,0.5,200",
        "plus,1,0.5,5.5,1.5,0.3,0.5,200",
    ]


def test_several_gpus_are_passed_on_to_every_command_that_takes_them(tmp_path: Path) -> None:
    scale = {"SCALE": "imagenet256", "IMAGENET": "x", "IMAGENET_VAL": "y", "GPUS": "8", "REF": "adm.npz"}
    assert ablate(tmp_path, "table5", **scale).returncode == 0
    for command in ("train-tokenizer", "tokenize", "train-gen", "sample", "eval"):
        found = calls(tmp_path, command)
        assert found
        assert all(call[call.index("--gpus") + 1] == "8" for call in found)
    assert all(call[call.index("--ref") + 1] == "adm.npz" for call in calls(tmp_path, "eval"))


# ---- paper-vs-plus -------------------------------------------------------------------------------------------------


def test_every_generator_gets_the_steps_that_fit_into_the_time(tmp_path: Path) -> None:
    done = ablate(tmp_path, "paper-vs-plus", SEEDS="0 1", TIME="50")
    assert done.returncode == 0, done.stderr
    trained = calls(tmp_path, "train-gen")
    assert len(calls(tmp_path, "demo")) == 2
    assert len(trained) == 2 * 24  # a probe and a run each
    steps = [next(word for word in call if word.startswith("train.steps=")) for call in trained]
    assert steps == ["train.steps=80", "train.steps=200"] * 24  # 40 steps in 10 s, without the start
    seeds = [(call[1][-7:], next(word for word in call if "seed=" in word)) for call in trained]
    assert set(seeds) == {("0/codes", "seed=0"), ("1/codes", "seed=1")}
    resolved = {
        recipe_files.load_recipe("digits", [word for word in call if "=" in word], "generator").digest()
        for call in trained[1::2]
    }
    assert len(resolved) == 24


def test_the_table_of_generators_has_the_gap_to_the_baseline(tmp_path: Path) -> None:
    done = ablate(tmp_path, "paper-vs-plus", SEEDS="0")
    rows = [[part.strip() for part in line.strip("|").split("|")] for line in done.stdout.splitlines()]
    head = [
        "cell",
        "seeds",
        "class_accuracy",
        "fid/frechet_distance",
        "heldout_ce",
        "accuracy_gap",
        "gap_at_T",
        "steps",
    ]
    assert rows[0] == head
    assert rows[2] == ["paper", "1", "0.5000", "5.5000", "1.5000", "0.3000", "0.5000", "80"]
    assert len(rows) == 2 + 12
    before = len(calls(tmp_path, "train-gen"))
    assert ablate(tmp_path, "paper-vs-plus", SEEDS="0").returncode == 0
    assert len(calls(tmp_path, "train-gen")) == before


def test_the_papers_size_is_judged_by_inception_and_trained_as_the_recipes_say(tmp_path: Path) -> None:
    scale = {"SCALE": "imagenet256", "IMAGENET": "x", "IMAGENET_VAL": "y"}
    rows = table(ablate(tmp_path, "table5", **scale))
    assert [row["cell"] for row in rows] == ["d12", "d16", "d20", "resgen"]
    assert rows[0]["parameters"] == "1000"
    assert rows[0]["seconds_an_image"] == "2.0000"
    assert not any("--extractor" in call for call in calls(tmp_path, "eval"))
    trained = {call[call.index("--recipe") + 1]: call for call in calls(tmp_path, "train-gen")}
    assert list(trained) == ["imagenet256-d12", "imagenet256-d16", "imagenet256-d20", "imagenet256-resgen-rvq8"]
    assert not any(word.startswith("train.") for call in trained.values() for word in call)


def test_the_sizes_of_small_scales_are_of_the_papers_form(tmp_path: Path) -> None:
    rows = table(ablate(tmp_path, "table5", SEEDS="0"))
    assert [row["cell"] for row in rows] == ["d2", "d3", "d4", "resgen"]


def test_some_cells_alone_share_the_tokenizer_of_cifar10(tmp_path: Path) -> None:
    scale = {"SCALE": "cifar10", "CIFAR10": "x", "CELLS": "paper plus", "SEEDS": "0 1"}
    done = ablate(tmp_path, "paper-vs-plus", **scale)
    assert done.returncode == 0, done.stderr
    assert [line.split("|")[1].strip() for line in done.stdout.splitlines()[2:]] == ["paper", "plus"]
    codes = [call[1] for call in calls(tmp_path, "train-gen")]
    assert codes == [str(tmp_path / "out" / "codes")] * 8  # two cells, two seeds, each with its probe of the rate
    assert len(calls(tmp_path, "tokenize")) == 1


def table(done: subprocess.CompletedProcess[str]) -> list[dict[str, str]]:
    """The printed table, a row a cell."""
    assert done.returncode == 0, done.stderr
    head, _, *rows = [[part.strip() for part in line.strip("|").split("|")] for line in done.stdout.splitlines()]
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_table3_draws_every_row_from_two_generators(tmp_path: Path) -> None:
    rows = table(ablate(tmp_path, "table3", SEEDS="0 1", CFG="2"))
    names = ["raw", "cfg", "cfg-linear", "gumbel", "gumbel-alone"]
    assert [row["cell"] for row in rows] == [*names, *(f"weak-{name}" for name in names)]
    assert rows[0]["precision"] == "0.7000 ± 0.0000"
    assert rows[0]["sfid/spatial_frechet_distance"] == "n/a"
    drawn = calls(tmp_path, "sample")
    assert len(drawn) == 20
    assert {call[call.index("--cfg") + 1] for call in drawn if "--cfg" in call} == {"2", "0"}
    assert table(ablate(tmp_path, "table3", SEEDS="0 1", CFG="2")) == rows
    assert len(calls(tmp_path, "sample")) == 20


@pytest.mark.parametrize(
    ("script", "cells", "sampled"),
    [
        ("table4", ["sin", "linear", "pow", "pow-T5"], ["pow-skip-2", "pow-skip-4", "pow-skip-6"]),
        ("figure5", ["base-0.5", "base-0.65", "base-0.75", "base-0.85", "base-0.95"], []),
    ],
)
def test_a_schedule_has_a_tokenizer_and_a_generator_of_its_own(
    tmp_path: Path, script: str, cells: list[str], sampled: list[str]
) -> None:
    rows = table(ablate(tmp_path, script, SEEDS="3", PARTS="schedules early"))
    assert [row["cell"] for row in rows] == cells + sampled
    assert all(float(row["recon_psnr"]) > 20 for row in rows[: len(cells)])
    assert rows[0]["accuracy_gap"] == "0.3000"
    codes = [call[2] for call in calls(tmp_path, "tokenize")]
    assert codes == [str(tmp_path / "out" / f"{cell}.3.codes") for cell in cells]
    assert (tmp_path / "out" / "schedules.png").exists() == (script == "figure5")


def test_a_part_of_table4_begins_with_the_papers_schedule(tmp_path: Path) -> None:
    assert [row["cell"] for row in table(ablate(tmp_path, "table4", SEEDS="3"))] == ["sin", "linear", "pow"]
    rows = table(ablate(tmp_path, "table4", SEEDS="3", PARTS="early"))
    assert [row["cell"] for row in rows] == ["pow", "pow-T5", "pow-skip-2", "pow-skip-4", "pow-skip-6"]
    assert len(calls(tmp_path, "train-tokenizer")) == 4


# ---- resgen --------------------------------------------------------------------------------------------------------


def test_resgen_and_rdpm_are_trained_on_their_own_codes_and_sampled_in_many_ways(tmp_path: Path) -> None:
    everything = {"SEEDS": "0", "TIME": "50", "PARTS": "families steps switches nucleus schedules"}
    done = ablate(tmp_path, "resgen", **everything)
    assert done.returncode == 0, done.stderr
    assert len(calls(tmp_path, "demo")) == 1
    assert len(calls(tmp_path, "train-tokenizer")) == len(calls(tmp_path, "tokenize")) == 3  # a depth each
    trained = calls(tmp_path, "train-gen")
    by_time, by_steps = trained[1 : 2 * 5 : 2], trained[2 * 5 :]  # by time: each after a probe of its rate
    assert all("train.steps=200" in call for call in by_time)
    assert all("train.steps=700" in call for call in by_steps)
    assert len(by_steps) == 7 + 5
    runs = [*by_time, *by_steps]
    for call in runs:
        recipe = call[call.index("--recipe") + 1]
        load = recipe_files.load_recipe(recipe, [word for word in call if "=" in word], "generator")
        assert load.generator is not None
        assert (load.generator.family == "resgen") == ("rvq-" in call[1])
    for call in calls(tmp_path, "train-tokenizer"):
        recipe_files.load_recipe("resgen-digits", [word for word in call if "=" in word], "tokenizer")
    sampled = calls(tmp_path, "sample")
    assert sum("--steps" in call for call in sampled) == 3 * 5
    assert sum("--schedule" in call for call in sampled) == 5 * 4  # and each with square, as the recipe says
    assert sum("--top-p" in call for call in sampled) == 2 * 4
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + 5 + 15 + 7 + 8 + 25
    assert (tmp_path / "out" / "steps.png").exists()
    before = len(calls(tmp_path, "sample"))
    assert ablate(tmp_path, "resgen", **everything).returncode == 0
    assert len(calls(tmp_path, "sample")) == before


@pytest.mark.parametrize(
    ("parts", "runs", "samples"), [("", 2 * 5, 5), ("steps", 2 * 3, 3 + 15), ("switches", 7, 7), ("nucleus", 2, 10)]
)
def test_a_part_of_the_resgen_script_can_be_run(parts: str, runs: int, samples: int, tmp_path: Path) -> None:
    assert ablate(tmp_path, "resgen", SEEDS="0", PARTS=parts).returncode == 0
    assert len(calls(tmp_path, "train-gen")) == runs
    assert len(calls(tmp_path, "sample")) == samples


def test_the_gap_of_a_resgen_run_is_that_of_its_likelihood(tmp_path: Path) -> None:
    last = {"step": 9, "heldout/nll": [1.0, None, 2.0], "heldout/baseline": [1.5, None, 4.0]}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(last) + "\n")
    score, drawn, log = tmp_path / "score.json", tmp_path / "drawn.json", tmp_path / "log.jsonl"
    score.write_text("{}")
    drawn.write_text(json.dumps({"samples": 8, "passes": 31}))
    finished = {"kind": "finished", "job": "sample", "done": 8, "before": 6, "seconds": 3.0}
    nothing = {**finished, "before": 8, "seconds": 0.1}  # a call that found all samples there
    log.write_text("".join(json.dumps(line) + "\n" for line in ({"kind": "info"}, finished, nothing)))
    command = [sys.executable, str(SCRIPTS / "facts.py"), str(tmp_path), "--into", str(score), "--log", str(log)]
    subprocess.run([*command, "--drawn", str(drawn)], check=True, timeout=60)
    told = {"steps": 9, "heldout_nll": 1.5, "nll_gap": 1.25, "passes": 31, "seconds_an_image": 1.5}
    assert json.loads(score.read_text()) == told

"""The experiments over a stand-in for `rdpm`: the cells, what is not run again, the table."""

import importlib
import itertools
import json
import math
import os
import runpy
import statistics
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sounds import RATE, word

from rdpm_cli.data.audio import open_audio, write_wav
from rdpm_cli.engine import speech_demo
from rdpm_cli.engine.report import read_published
from rdpm_cli.engine.speech_lines import read_lines
from rdpm_cli.generator.config import NetworkConfig
from rdpm_cli.recipes import Recipe, load_recipe
from rdpm_cli.tokenizer.quantizer import alphas

SCRIPTS = Path(__file__).parent.parent / "recipes" / "ablations"
STAND_IN = """#!{python} -IS
import json, pathlib, sys
words = sys.argv[3:]  # behind --log-format json
with open("{log}", "a") as log:
    log.write(json.dumps(words) + "\\n")
if "{fails}" in words:
    sys.exit(3)
def after(option):
    return words[words.index(option) + 1]
answer = {{}}
if words[0] == "train-gen" and "--dry-run" in words:
    answer = {{"flops": {{"step": 10**10}}}}
elif words[0] == "train-gen":
    out = pathlib.Path(after("--out"))
    out.mkdir(exist_ok=True)
    steps = ["9", *(word.partition("=")[2] for word in words if word.startswith("train.steps="))][-1]
    rows = [{{"step": 40, "images_per_second": 32.0}}, {{"step": 80, "images_per_second": 48.0}}]  # 30 s, then 10 s
    rows[0] |= {{"loss": 9.0, "grad_norm": 9.0}}
    rows[1] |= {{"loss": 2.0, "grad_norm": 0.5}}
    rows += [{{"step": 0 if steps == "null" else int(steps)}}]
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
    record = {{"settings": {{"recipe": {{"generator": {{"train": {{"batch": 24}}}}}}}}}}
    (out / "run.json").write_text(json.dumps(record))
    answer = {{"parameters": 1000, "heldout_images/ce": [1.0, 2.0], "heldout_images/gap": 0.25}}
if words[0] == "sample":
    print(json.dumps({{"kind": "finished", "job": "sample", "done": 4, "before": 0, "seconds": 8.0}}), file=sys.stderr)
    answer = {{"samples": 4, "passes": 10}}
if words[:2] == ["eval", "all"]:
    answer = {{"frechet_distance": 5.5, "precision": 0.7, "spread_over_seeds": {{"frechet_distance": 0.5}}}}
if words[:2] == ["eval", "baselines"]:
    distance = {{"frechet_distance": {{"mean": 9.0, "std": 0.25, "values": [8.75, 9.25]}}, "n": 800}}
    answer = {{"rows": {{name: distance for name in ("gaussian", "training", "reconstructions", "linear", "heldout")}}}}
if words[:2] == ["eval", "speech"]:
    said = pathlib.Path(words[2], "said.json")
    named = json.loads(said.read_text()) if said.is_file() else {{}}
    right = 0.5 + 0.25 * int(named.get("--seed", 2)) - 0.125 * ("another" in named.get("--list", ""))
    answer = {{"word_accuracy": right, "sim_o": 0.5, **({{"mel_distance": 0.375}} if "--tokenizer" in words else {{}})}}
if words[0] == "sample" and "--list" in words:
    out = pathlib.Path(after("--out"))
    out.mkdir(exist_ok=True)
    (out / "said.json").write_text(json.dumps({{name: after(name) for name in ("--list", "--seed")}}))
if words[0] == "inspect":
    answer = {{"provenance": {{"rho": [1.0, 0.125, 0.5]}}}}
if words[:2] == ["eval", "recon"]:
    answer = {{"psnr": float(after("--seeds")) + 20, "frechet_distance": 1.5, "continuous": {{"psnr": 30.5}}}}
print(json.dumps(answer))
"""


def ablate(folder: Path, *args: str, fails: str = "-") -> subprocess.CompletedProcess[str]:
    """Run experiments with the stand-in first on the PATH; commands with the word `fails` fail."""
    variables = {**os.environ, "PATH": stand_in(folder, fails)}
    command = [sys.executable, str(SCRIPTS / "run.py"), *args, *places(folder)]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=600, check=False)


def stand_in(folder: Path, fails: str = "-") -> str:
    """A PATH on which it comes first."""
    (folder / "bin").mkdir(exist_ok=True)
    rdpm = folder / "bin" / "rdpm"
    rdpm.write_text(STAND_IN.format(python=sys.executable, log=folder / "calls.jsonl", fails=fails))
    python = folder / "bin" / "python"
    python.write_text('#!/bin/sh\necho \'{"passes": 7, "gflops_a_sample": 0.5, "seconds_a_sample": 0.25}\'\n')
    for program in (rdpm, python):
        program.chmod(0o755)
    return f"{rdpm.parent}:{os.environ['PATH']}"


def places(folder: Path) -> tuple[str, ...]:
    return ("--out", str(folder / "out"), "--work", str(folder / "work"))


def calls(folder: Path, kind: str) -> list[list[str]]:
    """The command lines of a command, without the program."""
    log = folder / "calls.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    return [call for call in map(json.loads, lines) if kind in (call[0], " ".join(call[:2]))]


def recipe_of(call: list[str]) -> Recipe:
    """The recipe that a training asks for."""
    section = {"train-tokenizer": "tokenizer", "train-gen": "generator"}[call[0]]
    return load_recipe(call[call.index("--recipe") + 1], [word for word in call if "=" in word], section)


def rows_of(done: subprocess.CompletedProcess[str]) -> dict[str, dict[str, str]]:
    """The rows of the printed table by name, each a text by column."""
    assert done.returncode == 0, done.stderr
    return parsed(done.stdout)


def parsed(text: str) -> dict[str, dict[str, str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    header, _, *rows = [[part.strip() for part in line.strip("|").split("|")] for line in lines]
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


def tokenizers(folder: Path) -> list[Any]:
    recipes = [recipe_of(call).tokenizer for call in calls(folder, "train-tokenizer")]
    assert all(recipes)
    return recipes


def generators(folder: Path) -> list[Any]:
    recipes = [recipe_of(call).generator for call in calls(folder, "train-gen")]
    assert all(recipes)
    return recipes


@pytest.mark.parametrize("scale", ["digits", "shapes"])
def test_table2_has_the_papers_rows_and_controls_of_equal_bits_and_of_an_equal_total_of_the_loss(
    scale: str, tmp_path: Path
) -> None:
    rows = rows_of(ablate(tmp_path, "table2", "--scale", scale, "--seeds", "0"))
    made = dict(zip(rows, tokenizers(tmp_path), strict=False))
    assert len({json.dumps(cfg.model_dump(mode="json")) for cfg in made.values()}) == len(made) == 19
    for figure in read_published():
        if figure.get("table") == "2":
            cfg = made[f"row {figure['row']}"]
            assert cfg.quantizer.steps == figure["T"]
            assert (cfg.loss.weight, cfg.quantizer.bias) == (figure["weight"], "add" if figure["bias"] else "none")
            assert rows[f"the paper: {figure['row']}"].get(figure["metric"], figure["value"]) == figure["value"]

    def total(cfg: Any) -> float:
        T = cfg.quantizer.steps
        of_kind = {"pow": lambda t: 0.75 ** (T - t), "linear": lambda t: t / T, "rvq": lambda t: 1.0}
        alphas = map(of_kind.get(cfg.schedule.kind, lambda t: math.sin(math.pi * t / (2 * T))), range(1, T + 1))
        weights = [alpha if cfg.loss.weight else 1.0 for alpha in alphas]
        return float(cfg.loss.quant) * (sum(weights) if cfg.loss.quant_reduce == "sum" else 1.0)

    equal = [total(cfg) for name, cfg in made.items() if "equal" in name or name in ("row 9", "one VQ of a finer grid")]
    assert len(equal) == 9
    assert equal == pytest.approx([total(made["row 9"])] * 9, rel=1e-3)

    def bits(cfg: Any) -> float:
        side = cfg.autoencoder.resolution >> (len(cfg.autoencoder.multipliers) - 1)
        return float(side * side * cfg.quantizer.steps * math.log2(cfg.quantizer.codes))

    names = [name for name in made if "rvq" in name or "VQ" in name]
    assert [bits(made[name]) for name in names] == pytest.approx([bits(made["row 9"])] * 4)


def test_only_cells_that_failed_are_run_again(tmp_path: Path) -> None:
    args = ("table2", "--seeds", "0", "1")
    done = ablate(tmp_path, *args, fails="schedule.kind=sin")
    assert done.returncode == 3
    assert "schedule.kind=sin" in done.stderr
    assert not (tmp_path / "out" / "table2-digits" / "table.md").exists()
    rows = rows_of(ablate(tmp_path, *args))
    assert len(calls(tmp_path, "train-tokenizer")) == 19 * 2 + 1
    assert rows["row 9"]["continuous.psnr"].startswith("30.5")
    assert (tmp_path / "out" / "table2-digits" / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "out" / "table2-digits" / "cells.jsonl").read_text().splitlines()) == 19 * 2
    ablate(tmp_path, *args)
    assert len(calls(tmp_path, "train-tokenizer")) == 19 * 2 + 1


def test_cells_that_differ_in_sampling_share_a_generator_and_rows_without_one_stand_beside(tmp_path: Path) -> None:
    names = [f"{strength}, gumbel, linear, {cfg}" for strength in ("weak", "middle", "strong") for cfg in (0, 0.5, 2)]
    rows = rows_of(
        ablate(tmp_path, "table3", "--scale", "shapes", "--seeds", "0", "1", "--jobs", "2", "--cells", *names)
    )
    counts = {kind: len(calls(tmp_path, kind)) for kind in ("train-tokenizer", "tokenize", "train-gen", "eval all")}
    assert counts == {"train-tokenizer": 2, "tokenize": 2, "train-gen": 6, "eval all": 9 * 2}
    assert len(calls(tmp_path, "eval judge")) == len(calls(tmp_path, "eval reference")) == 1
    assert rows["strong, gumbel, linear, 0.5"]["frechet_distance"] == "5.500 ± 0.000 (0.500)"
    assert rows["gaussian"]["frechet_distance"] == "9.000 (0.250)"
    assert {"training", "heldout", "reconstructions", "linear baseline"} < set(rows)
    assert rows["the paper: + Gumbel"]["frechet_distance"] == "3.68"
    steps = [cfg.train.steps for cfg in generators(tmp_path)[:3]]
    assert len(set(steps)) == 3


def test_a_table_tells_the_spread_over_training_seeds_from_that_over_sample_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    row_of = importlib.import_module("tables").Row
    values = [3.0, 5.0, 7.0]
    row = row_of("cell", {str(seed): {"score": [value, 0.5 * value]} for seed, value in enumerate(values)})
    assert row.text("absent/score") == f"5.000 ± {statistics.stdev(values):.3f} (2.500)"
    assert row_of("cell", {"0": {"score": [1, None]}, "1": {}}).text("score") == ""


def test_an_experiment_without_its_images_ends_before_any_command(tmp_path: Path) -> None:
    for scale, named in (("cifar10", ()), ("imagenet256", ("--images", "x"))):
        done = ablate(tmp_path, "table2", "--scale", scale, *named)
        assert (done.returncode, calls(tmp_path, "train-tokenizer")) == (2, [])
    assert "--heldout" in done.stderr


def test_an_unknown_cell_is_named(tmp_path: Path) -> None:
    done = ablate(tmp_path, "noise", "--cells", "pow", "poww")
    assert done.returncode == 2
    assert "poww" in done.stderr


def test_cells_at_equal_time_get_the_steps_that_fit(tmp_path: Path) -> None:
    rows = rows_of(ablate(tmp_path, "paper-vs-plus", "--seeds", "0", "--seconds", "50"))
    cells = [row for row in rows.values() if row["train_steps"]]
    assert [row["train_steps"] for row in cells] == ["200"] * 12  # 40 steps in 10 s, start-up left out
    assert cells[0]["heldout.gap"] == "0.2500"
    trained = calls(tmp_path, "train-gen")  # a probe and a run each
    assert (len(trained), len({recipe_of(call).digest() for call in trained[1::2]})) == (24, 12)


@pytest.mark.parametrize("table", ["table3", "table4", "figure5"])
def test_at_the_papers_size_its_captions_hold(table: str, tmp_path: Path) -> None:
    scale = ("--scale", "imagenet256", "--images", "x", "--heldout", "y", "--gpus", "8", "--ref", "adm.npz")
    rows_of(ablate(tmp_path, table, *scale, "--sample-seeds", "1"))
    for generator in generators(tmp_path):
        assert (generator.network.depth, generator.network.hidden, generator.network.head) == (12, 768, "linear")
        if table != "table3":
            assert generator.train.epochs == 100
            assert (generator.sampling.cfg, generator.sampling.cfg_schedule) == (1.5, "linear")
    for tokenizer in tokenizers(tmp_path):
        assert (tokenizer.quantizer.steps, tokenizer.quantizer.bias, tokenizer.train.epochs) == (10, "add", 10)
    for kind in ("train-tokenizer", "tokenize", "train-gen", "sample", "eval"):
        assert all(call[call.index("--gpus") + 1] == "8" for call in calls(tmp_path, kind))
    baselines = calls(tmp_path, "eval baselines")
    assert all(call[call.index("--resolution") + 1] == "256" for call in baselines)  # photographs are of several sizes
    scored = calls(tmp_path, "eval all")
    assert all(call[call.index("--ref") + 1] == "adm.npz" for call in scored)
    assert all(call[call.index("--per-class") + 1] == "50" for call in scored)
    assert not any("--extractor" in call for call in scored)
    assert table == "table3" or not any("=" in word for call in scored for word in call)


def test_views_have_equal_exposures_of_each_image_and_step(tmp_path: Path) -> None:
    rows_of(ablate(tmp_path, "views", "--scale", "shapes", "--seeds", "0"))
    made = generators(tmp_path)
    assert [cfg.objective.noise for cfg in made] == ["cached", "cached", "cached", "fresh"]
    for cfg in made:
        assert cfg.train.epochs * cfg.objective.steps_per_image / 10 == 20
        assert cfg.objective.t_weights == "uniform"
    with zipfile.ZipFile(calls(tmp_path, "tokenize")[0][1]) as archive:
        assert len(archive.namelist()) == 500


def test_a_tenth_of_the_images_is_held_out_where_none_are_named(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for index in range(60):
        path = tmp_path / "images" / f"class{index % 2}" / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    images = ("--scale", "cifar10", "--images", str(tmp_path / "images"))
    assert ablate(tmp_path, "table4", *images).returncode == 0
    parts = []
    for named in (calls(tmp_path, "train-tokenizer")[0][1], calls(tmp_path, "eval recon")[0][2]):
        with zipfile.ZipFile(named) as archive:
            parts.append({archive.read(name) for name in archive.namelist()})
    assert len(parts[0] | parts[1]) == 60
    assert 0 < len(parts[1]) < 20


@pytest.mark.parametrize(
    ("table", "tokenizers", "generators", "samples"),
    [
        ("table4", 3, 3, 3), ("table4-early", 2, 2, 5), ("figure5", 5, 5, 5), ("noise", 4, 5, 5), ("bits", 6, 6, 6),
        ("ruler", 2, 5, 5), ("table5", 2, 4, 4), ("resgen", 4, 10, 5), ("resgen-steps", 3, 6, 15),
        ("resgen-switches", 1, 7, 7), ("resgen-nucleus", 1, 2, 10), ("resgen-schedules", 1, 5, 25),
        ("families", 2, 7, 15), ("targets", 3, 10, 10),
    ],
)  # fmt: skip
def test_tables_train_what_they_compare_and_resgen_on_plain_residual_codes(
    table: str, tokenizers: int, generators: int, samples: int, tmp_path: Path
) -> None:
    rows = rows_of(ablate(tmp_path, table, "--seeds", "3"))
    kinds = ("train-tokenizer", "tokenize", "train-gen", "sample")
    made = [sum("--dry-run" not in call for call in calls(tmp_path, kind)) for kind in kinds]
    assert made == [tokenizers, tokenizers, generators, samples]
    assert sum(row["frechet_distance"].startswith("5.5") for row in rows.values()) >= samples
    for call in calls(tmp_path, "train-gen"):
        family = recipe_of(call).generator
        assert family is not None
        store = next(made for made in calls(tmp_path, "tokenize") if made[2] == call[1])
        tokenizer = store[store.index("--tokenizer") + 1].removesuffix("/tokenizer.pt")
        trained = next(made for made in calls(tmp_path, "train-tokenizer") if tokenizer in made)
        cfg = recipe_of(trained).tokenizer
        assert cfg is not None
        if family.family != "rdpm":
            assert cfg.schedule.kind == "rvq"


def test_families_have_equal_operations_of_training_and_rows_of_what_a_sample_costs(tmp_path: Path) -> None:
    rows = rows_of(ablate(tmp_path, "families", "--scale", "shapes", "--seeds", "3"))
    made = [call for call in calls(tmp_path, "train-gen") if "--dry-run" not in call]
    assert {word for call in made for word in call if word.startswith("train.steps=")} == {"train.steps=1050"}
    assert rows["AR"]["gflops_a_sample"] == "0.5000"
    assert rows["AR"]["seconds_a_sample"] == "0.2500"
    (tmp_path / "beside").mkdir()
    beside = ablate(tmp_path / "beside", "families", "--scale", "shapes", "--seeds", "3", "--jobs", "2")
    assert "seconds_a_sample" not in beside.stdout  # other jobs would slow it down
    families = [recipe_of(call).generator for call in made]
    assert sorted(cfg.family for cfg in families if cfg) == ["ar", "ar", "flow", "maskgit", "rdpm", "rdpm", "resgen"]
    sizes = {(cfg.network.depth, cfg.network.width, cfg.objective.label_drop) for cfg in families if cfg}
    assert sizes == {(3, 96, 0.1)}


def test_guidance_compares_two_trainings_of_equal_operations_one_of_them_with_its_own_earlier_steps(
    tmp_path: Path,
) -> None:
    ablate(tmp_path, "guidance", "--scale", "shapes", "--seeds", "3")
    made = [call for call in calls(tmp_path, "train-gen") if "--dry-run" not in call]
    networks = [cfg.network for call in made if (cfg := recipe_of(call).generator)]
    assert sorted(network.guidance for network in networks if isinstance(network, NetworkConfig)) == [0, 2]
    drawn = calls(tmp_path, "sample")
    guides = [(name, call) for call in drawn for name in call if name.startswith("guide=")]
    assert len(guides) == 8
    for name, call in guides:
        run, _, step = name.removeprefix("guide=").rpartition("@")
        assert Path(call[call.index("--ckpt") + 1]).parent == Path(run)
        assert step in ("100", "400")


Speak = Callable[..., dict[str, dict[str, str]]]


@pytest.fixture
def speak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Speak:
    """Experiments of sound with the stand-in, in this process, on few strings. -> the rows of the printed table."""
    for name, speaker, take in itertools.product(range(4), ("ann", "bob"), range(5)):
        wave = word(("low", "high", "rise", "hiss")[name], 800 + 16 * take)
        write_wav(tmp_path / "words" / f"{name}_{speaker}_{take}.wav", wave, RATE)
    monkeypatch.setattr(speech_demo, "STRINGS", 3)
    monkeypatch.setattr(speech_demo, "HELD_OUT_STRINGS", 4)
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setenv("PATH", stand_in(tmp_path))

    def run(*args: str) -> dict[str, dict[str, str]]:
        words = ("--scale", "speech", "--images", str(tmp_path / "words"), "--sample-seeds", "1", *args)
        monkeypatch.setattr(sys, "argv", ["run.py", *words, *places(tmp_path)])
        runpy.run_path(str(SCRIPTS / "run.py"), run_name="__main__")
        return parsed(capsys.readouterr().out)

    return run


@pytest.mark.parametrize(
    ("table", "tokenizer_count", "generator_count", "cells"),
    [
        ("speech-families", 2, 4, 2), ("speech-depths", 6, 6, 6), ("speech-guidance", 2, 2, 10),
        ("speech-steps", 1, 1, 5), ("speech-collapse", 5, 5, 5), ("speech-noise", 4, 5, 5),
    ],
)  # fmt: skip
def test_tables_of_sound_train_what_they_compare(
    table: str, tokenizer_count: int, generator_count: int, cells: int, speak: Speak, tmp_path: Path
) -> None:
    rows = speak(table, "--seeds", "3")
    assert len(tokenizers(tmp_path)) == len(calls(tmp_path, "tokenize")) == tokenizer_count
    assert (len(generators(tmp_path)), len(calls(tmp_path, "eval judge"))) == (generator_count, 1)
    assert len(calls(tmp_path, "sample")) == 2 * cells  # the held-out strings' texts, and others
    assert len(rows) == cells + 1 + tokenizer_count


def test_a_table_of_sound_has_both_texts_the_spread_over_sample_seeds_and_rows_without_a_generator(
    speak: Speak, tmp_path: Path
) -> None:
    args = ("speech-guidance", "--seeds", "0", "1", "--sample-seeds", "2", "--cells", "RDPM, cfg 0", "ResGen, cfg 2")
    rows = speak(*args)
    row = rows["ResGen, cfg 2"]
    assert row["word_accuracy"] == "0.6250 ± 0.0000 (0.1768)"  # 0.5 and 0.75
    assert row["another.word_accuracy"] == "0.5000 ± 0.0000 (0.1768)"
    assert (row["recon.word_accuracy"], row["recon.mel_distance"]) == ("1", "0.3750 ± 0.0000")
    assert (row["rho"], row["seconds_a_sample"]) == ("0.2500 ± 0.0000", "2.000 ± 0.000 (0.000)")
    assert rows["real strings"]["sim_o"] == "0.5000"
    assert rows["reconstructions of RDPM, cfg 0"]["recon.mel_distance"] == "0.3750 ± 0.0000"
    (tmp_path / "out" / "speech-guidance-speech" / "cells.jsonl").unlink()
    assert speak(*args) == rows  # by what --work holds
    speak(*args)
    assert len(calls(tmp_path, "sample")) == 2 * 2**4


def test_depths_and_schedules_of_sound_have_an_equal_total_of_the_loss(speak: Speak, tmp_path: Path) -> None:
    speak("speech-depths", "speech-noise", "--seeds", "0")
    totals: dict[str, set[float]] = {"speech8-sin": set(), "speech8-rvq": set()}
    for call, cfg in zip(calls(tmp_path, "train-tokenizer"), tokenizers(tmp_path), strict=True):
        summed = sum(alphas(cfg.schedule, cfg.quantizer.steps)) if cfg.loss.quant_reduce == "sum" else 1.0
        totals[call[call.index("--recipe") + 1]].add(round(cfg.loss.quant * summed, 3))
    assert [len(total) for total in totals.values()] == [1, 1]


def test_collapse_changes_one_setting_of_the_tokenizer_at_a_time(speak: Speak, tmp_path: Path) -> None:
    speak("speech-collapse", "--seeds", "0")
    made = [(cfg.loss.quant, cfg.autoencoder.noise, cfg.quantizer.dropout) for cfg in tokenizers(tmp_path)]
    assert made == [(0.25, 0, 0), (0.03, 0, 0), (0.25, 0.1, 0), (0.25, 0, 0.3), (0.03, 0.1, 0.3)]


def test_lines_of_another_text_differ_in_words_only_and_those_of_the_wrong_prompt_in_the_voice(
    speak: Speak, tmp_path: Path
) -> None:
    paths = speech_demo.write_data(open_audio(str(tmp_path / "words")), tmp_path / "data", 0)
    lines, texts, prompts = (read_lines(paths[title]) for title in speech_demo.LISTS)
    speakers = {line.prompt: line.speaker for line in lines}
    for line, changed, wrong in zip(lines, texts, prompts, strict=True):
        assert replace(changed, text=line.text) == line
        assert not any(a == b for a, b in zip(line.text.split(), changed.text.split(), strict=True))
        assert (wrong.text, wrong.word_seconds, wrong.speaker) == (line.text, line.word_seconds, line.speaker)
        assert speakers[wrong.prompt] != line.speaker


@pytest.mark.parametrize("args", ["table2", "speech-steps --scale shapes", "speech-steps --images none.zip"])
def test_what_is_not_for_sound_or_not_there_is_named_before_any_command(
    args: str, speak: Speak, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        speak(*args.split())
    assert ended.value.code in (2, 3)
    assert args.split()[-1] in capsys.readouterr().err
    assert not (tmp_path / "calls.jsonl").exists()

"""demo: all commands in a row on the built-in digits, and one table of scores."""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rdpm_cli import files, progress
from rdpm_cli.data.open import open_source
from rdpm_cli.engine.generator import train_gen
from rdpm_cli.engine.judge import eval_judge
from rdpm_cli.engine.sample import Outputs, sample
from rdpm_cli.engine.score import eval_images
from rdpm_cli.engine.tokenizer import StoreOptions, reconstruct, tokenize, train_tokenizer
from rdpm_cli.engine.watch import training_curves
from rdpm_cli.errors import rdpm_command
from rdpm_cli.evaluation import gaussian
from rdpm_cli.evaluation.reference import open_images
from rdpm_cli.recipes import load_recipe
from rdpm_cli.runs import Result, versions

TRAIN, HELDOUT = "digits:train", "digits:heldout"
PER_CLASS = 80
PICTURES = ("samples.png", "reconstructions.png", "steps.gif", "curves.png")
ESTIMATE = "4 to 6 minutes on 2 CPU cores"


def run(out: Path, seed: int, overrides: Sequence[str] = ()) -> Result:
    """Everything from images to scores under `out`. The same command again continues an interrupted demo."""
    changes = [f"seed={seed}", *overrides]
    recipe = load_recipe("digits", changes)
    if (out / "result.json").is_file():
        previous = files.read_json(out / "result.json")
        if previous.get("recipe") == recipe.digest():
            progress.say(f"{out}/ holds this demo already; remove it, or name another --out, to run it again")
            return _result(out, previous)
    start, resumed, runs = time.monotonic(), (out / "runs").exists(), out / "runs"
    progress.say(f"rdpm demo: {TRAIN} -> tokenizer -> codes -> generator -> samples -> scores; {ESTIMATE}")
    progress.say("[1/7] a judge: a classifier of real digits, which scores the samples later")
    judge = eval_judge(TRAIN, runs / "judge", "digits", changes, heldout=HELDOUT)
    assert recipe.tokenizer is not None
    q = recipe.tokenizer.quantizer
    progress.say(f"[2/7] train-tokenizer: images -> codebook of {q.codes} codes, T = {q.steps} noisy residual steps")
    train_tokenizer(TRAIN, runs / "tokenizer", "digits", changes)
    _copy(runs / "tokenizer" / "tokenizer.pt", out / "tokenizer.pt")
    progress.say(f"[3/7] tokenize: {recipe.views} noise draws per image -> codes/")
    tokenize(TRAIN, out / "codes", out / "tokenizer.pt", StoreOptions(views=recipe.views, seed=seed))
    progress.say("[4/7] train-gen: codes -> transformer, by cross-entropy")
    trained = train_gen(out / "codes", runs / "generator", "digits", changes)
    _copy(runs / "generator" / "generator.pt", out / "generator.pt")
    recon = _draw(out, seed)
    progress.say("[7/7] eval: the judge looks at samples, at held-out digits and at those of a class Gaussian")
    scores = _scores(out, Path(judge.values["judge"]), seed)
    training_curves(out / "curves.png", runs / "tokenizer", runs / "generator")
    result = {
        **scores,
        "reconstruction_mse": recon.values["mse"], "reconstruction_psnr": recon.values["psnr"],
        "judge_accuracy": judge.values["heldout_accuracy"],
        "generator_parameters": trained.values["parameters"],
        "heldout_accuracy_per_t": trained.values["heldout/accuracy"],
        "baseline_accuracy_per_t": trained.values["heldout/baseline"],
        "seconds": round(time.monotonic() - start, 1),  # of this call: less than the whole if it resumed
        "resumed": resumed, "seed": seed, "recipe": recipe.digest(), "versions": versions(),
    }  # fmt: skip
    files.write_json(out / "result.json", result)
    return _result(out, result)


def _draw(out: Path, seed: int) -> Result:
    """Samples and reconstructions, with their pictures where a person looks first. -> the result of reconstruct"""
    progress.say(f"[5/7] sample: {PER_CLASS} of every class")
    samples = sample(out / "generator.pt", "all", PER_CLASS, out / "samples", seed=seed, outputs=Outputs(gif=True))
    progress.say("[6/7] reconstruct: held-out digits")
    recon = reconstruct(HELDOUT, out / "reconstructions", out / "tokenizer.pt", seed=seed)
    _copy(Path(samples.values["grid"]), out / "samples.png")
    _copy(Path(samples.values["gif"]), out / "steps.gif")
    _copy(Path(recon.values["grid"]), out / "reconstructions.png")
    return recon


def _copy(source: Path, target: Path) -> None:
    """Copy a finished file, atomically."""
    with source.open("rb") as content:
        files.write_atomic(target, lambda file: shutil.copyfileobj(content, file))


def _scores(out: Path, judge: Path, seed: int) -> dict[str, Any]:
    """Class accuracy and Fréchet distance of samples, and of a class Gaussian and held-out digits at the same N."""
    real = eval_images("fid", HELDOUT, TRAIN, extractor=judge).values
    sampled = eval_images("fid", str(out / "samples"), extractor=judge, subset=real["n"]).values
    fitted = gaussian.fit(open_images(open_source(TRAIN), sampled["resolution"]))
    drawn = fitted.samples(PER_CLASS, seed)
    baseline = eval_images("fid", lambda _: [drawn], TRAIN, extractor=judge, subset=real["n"]).values
    return {
        "class_accuracy": sampled["class_accuracy"], "frechet_distance": sampled["value"],
        "gaussian": {"class_accuracy": baseline["class_accuracy"], "frechet_distance": baseline["value"]},
        "frechet_distance_heldout": real["value"], "frechet_ratio": sampled["value"] / real["value"],
        "frechet_n": real["n"], "frechet_subsets": sampled["subsets"], "samples": sampled["target"]["count"],
        "reference": sampled["reference"],
    }  # fmt: skip


def _result(out: Path, values: dict[str, Any]) -> Result:
    paths = {name.split(".")[0]: str(out / name) for name in PICTURES}
    command = rdpm_command("sample", "--ckpt", out / "generator.pt", "--classes", "3,7", "--out", "more")
    return Result(f"demo finished; everything is in {out}/", {**values, "pictures": paths}, command)

"""`rdpm demo`: the six commands in a row on the built-in digits, and one table. No method of its own."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rdpm_cli import engine, files, progress, recipe_files

TRAIN, HELDOUT = "digits:train", "digits:heldout"
PER_CLASS = 80
PICTURES, CURVES = ("samples.png", "reconstructions.png", "steps.gif"), "curves.png"
ESTIMATE = "about 4 minutes on 2 CPU cores"


def run(out: Path, seed: int, overrides: Sequence[str] = ()) -> engine.Result:
    """Everything from images to scores under `out`. Run again, it goes on where it stopped."""
    changes = [f"seed={seed}", *overrides]
    recipe = recipe_files.load_recipe("digits", changes)
    assert recipe.tokenizer is not None
    if (out / "result.json").is_file() and (done := files.read_json(out / "result.json")).get(
        "recipe"
    ) == recipe.digest():
        progress.say(f"{out}/ holds this demo already; remove it, or name another --out, to run it again")
        return _result(out, done)
    started, resumed = time.monotonic(), (out / "runs").exists()
    progress.say(f"rdpm demo: {TRAIN} -> tokenizer -> codes -> generator -> samples -> scores; {ESTIMATE}")
    say = _steps(7)
    say("a judge: a classifier of real digits, which scores the samples later")
    judge = engine.train_judge(TRAIN, HELDOUT, out / "runs" / "judge", recipe)
    quantizer = recipe.tokenizer.quantizer
    say(f"train-tokenizer: images -> codebook of {quantizer.codes} codes, T = {quantizer.steps} noisy residual steps")
    engine.train_tokenizer(TRAIN, out / "runs" / "tokenizer", "digits", changes)
    tokenizer = out / "tokenizer.pt"
    engine.copy_file(out / "runs" / "tokenizer" / "tokenizer.pt", tokenizer)
    say(f"tokenize: {recipe.views} noise draws an image -> codes/")
    engine.tokenize(TRAIN, out / "codes", tokenizer, engine.StoreOptions(views=recipe.views, seed=seed))
    say("train-gen: codes -> transformer, by cross-entropy")
    trained = engine.train_gen(out / "codes", out / "runs" / "generator", "digits", changes)
    generator = out / "generator.pt"
    engine.copy_file(out / "runs" / "generator" / "generator.pt", generator)
    say(f"sample: {PER_CLASS} of every class")
    samples = engine.sample(generator, "all", PER_CLASS, out / "samples", seed=seed, outputs=engine.Outputs(gif=True))
    say("reconstruct: held-out digits")
    recon = engine.reconstruct(HELDOUT, out / "reconstructions", tokenizer, seed=seed)
    say("eval: the judge looks at samples and at held-out digits")
    scores = _scores(out, Path(judge.values["judge"]))
    _pictures(out, samples, recon)
    result: dict[str, Any] = {
        **scores,
        "reconstruction_mse": recon.values["mse"],
        "reconstruction_psnr": recon.values["psnr"],
        "judge_accuracy": judge.values["heldout_accuracy"],
        "generator_parameters": trained.values["parameters"],
        "heldout_accuracy_per_t": trained.values["heldout/accuracy"],
        "baseline_accuracy_per_t": trained.values["heldout/baseline"],
        "seconds": round(time.monotonic() - started, 1),  # of this call; less than the whole where it resumed
        "resumed": resumed,
        "seed": seed,
        "recipe": recipe.digest(),
        "versions": engine.versions(),
    }
    files.write_json(out / "result.json", result)
    return _result(out, result)


def _result(out: Path, values: dict[str, Any]) -> engine.Result:
    pictures = {name.split(".")[0]: str(out / name) for name in (*PICTURES, CURVES)}
    following = f"rdpm sample --ckpt {out / 'generator.pt'} --classes 3,7 --out more"
    return engine.Result(f"demo finished; everything is in {out}/", {**values, "pictures": pictures}, following)


def _steps(total: int) -> Any:
    """say(text): the next of `total` stages begins."""
    count = iter(range(1, total + 1))
    return lambda text: progress.say(f"[{next(count)}/{total}] {text}")


def _scores(out: Path, judge: Path) -> dict[str, Any]:
    """Class accuracy and Fréchet distance of samples, beside the distance of held-out digits, at equal N."""
    real = engine.eval_fid(HELDOUT, TRAIN, extractor=judge).values
    ours = engine.eval_fid(str(out / "samples"), extractor=judge, subset=real["n"]).values
    return {
        "class_accuracy": ours["class_accuracy"],
        "frechet_distance": ours["value"],
        "frechet_distance_heldout": real["value"],
        "frechet_ratio": ours["value"] / real["value"],
        "frechet_n": real["n"],
        "frechet_subsets": ours["subsets"],
        "samples": ours["target"]["count"],
        "reference": ours["reference"],
    }


def _pictures(out: Path, samples: engine.Result, recon: engine.Result) -> None:
    """Put the pictures where a person looks first."""
    found = [samples.values["grid"], recon.values["grid"], samples.values["gif"]]
    for name, path in zip(PICTURES, found, strict=True):
        engine.copy_file(Path(path), out / name)
    engine.training_curves(out / CURVES, out / "runs" / "tokenizer", out / "runs" / "generator")

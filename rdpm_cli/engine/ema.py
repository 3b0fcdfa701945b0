"""ema: a finished training with train.ema=power -> its model with an average of another length."""

from pathlib import Path

from rdpm_cli import checkpoint
from rdpm_cli.errors import CheckpointError, UsageError, rdpm_command, some_of
from rdpm_cli.runs import Result, read_run, versions
from rdpm_cli.training.ema import FOLDER, reconstruct, snapshot_steps
from rdpm_cli.training.log import read_metrics

NEXT = {"generator": ("sample", "--ckpt"), "tokenizer": ("eval", "recon", "IMAGES", "--tokenizer")}


def average(run: Path, length: float, out: Path) -> Result:
    """Write a copy of the run's model file whose parameters are averaged over `length` after its last step."""
    recipe = read_run(run).get("settings", {}).get("recipe", {})
    section = next((name for name in NEXT if name in recipe), None)
    if section is None:  # a judge's file has its accuracy, which other weights would change
        raise UsageError(f"{run} is not a run folder of train-gen or train-tokenizer", "name the folder of such a run")
    if (kind := recipe[section]["train"]["ema"]) != "power":
        raise UsageError(
            f"{run} was trained with train.ema={kind:g}: it has no snapshots", "train with train.ema=power"
        )
    if out.exists():
        raise UsageError(f"{out} exists already", "name another file with --out, or remove it")
    if not (run / f"{section}.pt").exists():
        raise CheckpointError(f"{run} is not finished: it has no {section}.pt", "run its training command again")
    content, snapshots = checkpoint.load(run / f"{section}.pt"), dict(checkpoint.states(run / FOLDER))
    steps = read_metrics(run)[-1]["step"]
    if missing := sorted(set(snapshot_steps(steps)) - set(snapshots)):
        names = some_of(map(str, missing))
        raise CheckpointError(f"{run / FOLDER} lacks the snapshots of steps {names}", "copy them from another copy")
    parameters, updates, error = reconstruct(snapshots.values(), length)
    weights = {**content["weights"], **parameters}
    digest = checkpoint.model_digest(weights, content["config"])
    facts = {"length": length, "updates": updates, "snapshots": len(snapshots), "error": error}
    provenance = {**content["provenance"], "ema": {**facts, "digest": content["digest"], **versions()}}
    checkpoint.save(out, {**content, "weights": weights, "digest": digest, "provenance": provenance})
    values = {section: str(out), "digest": digest, **facts}
    return Result("average written", values, rdpm_command(*NEXT[section], out))

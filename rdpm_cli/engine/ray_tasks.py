"""`--engine ray`: the shards of a store, or the shares of a sampling job, as tasks of a Ray cluster.

A task is what a command does: `tokenize --shards s`, `sample --shard i/n`. It runs in the folder of the command, on any
machine that shares the file system. Ray starts it again where its process is killed."""

import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rdpm_cli import launcher, progress
from rdpm_cli.codes.write import StoreOptions, shards_of
from rdpm_cli.engine import tokenizer as engine
from rdpm_cli.engine.sample import UNFINISHED
from rdpm_cli.errors import RdpmError, RunError, UsageError
from rdpm_cli.runs import Result, stop_on_signal
from rdpm_cli.tokenizer import model

RETRIES = 3  # of a task whose process is killed; an error is reported at once
LOOK_SECONDS = 1.0  # between two looks for a signal

Task = Callable[[], Result]


def tokenize(
    images: str, out: Path, tokenizer: Path | None, options: StoreOptions, *, shards: str | None = None,
    finish: bool = False, workers: int | None = None, device: str = "auto", reading: engine.Reading | None = None,
    **more: Any,
) -> Result:  # fmt: skip
    """`engine.tokenizer.tokenize` with a task a shard, and one for the manifest. workers: CPUs of a task, default 1."""
    path, cpus = engine.find_tokenizer(tokenizer), workers or 1
    count = -(-len(model.load(path)[0].inputs.open(images, **(reading or {}))) // options.shard_images)
    make = partial(engine.tokenize, images, out, path, options, workers=cpus, device=device, reading=reading, **more)
    if not finish:
        numbers = range(count) if shards is None else shards_of(shards, count)
        results = run([partial(make, shards=str(number)) for number in numbers], "tokenize", "shards", device, cpus)
        if shards is not None:
            return results[-1]
    return run([partial(make, shards=shards, finish=True)], "finish", "stores", device, cpus)[0]


def sample(draw: Callable[..., Result], shard: str, device: str) -> Result:
    """A sampling job with a task for each GPU of the cluster, or for each CPU. draw: takes --shard and --device."""
    if shard != "1/1":
        raise UsageError("--engine ray shares all samples out", "leave --shard out")
    count = max(1, int(connect(device)[1]))
    tasks = [partial(draw, shard=f"{number}/{count}", device=device) for number in range(1, count + 1)]
    return next(result for result in run(tasks, "sample", "shares", device) if result.title != UNFINISHED)


def connect(device: str) -> tuple[bool, float]:
    """Join the cluster of RAY_ADDRESS, or start one here. -> whether a task takes a GPU; number of these, else of CPUs.

    Raises UsageError without Ray, and in processes of torchrun or --gpus."""
    try:
        import ray
    except ImportError as error:
        raise UsageError("--engine ray needs Ray", "uv pip install 'rdpm[ray]'") from error
    if launcher.is_started():
        raise UsageError("--engine ray starts its processes itself", "leave --gpus and torchrun out")
    if not ray.is_initialized():
        ray.init(logging_level=logging.ERROR)
    resources = ray.cluster_resources()
    gpu = device.startswith("cuda") or (device == "auto" and "GPU" in resources)
    return gpu, resources.get("GPU" if gpu else "CPU", 1)


def run(tasks: Sequence[Task], label: str, unit: str, device: str = "auto", cpus: int = 1) -> list[Result]:
    """Run tasks in the cluster. -> their results, in the order in which they end. Raises the first error of a task."""
    gpu, _ = connect(device)
    import ray

    task = ray.remote(_in_folder).options(num_cpus=cpus, num_gpus=int(gpu), max_retries=RETRIES)
    pending, results = [task.remote(call, os.getcwd()) for call in tasks], list[Result]()
    try:
        with stop_on_signal() as stop, progress.Bar(label, len(tasks), unit) as bar:
            while pending:
                ready, pending = ray.wait(pending, timeout=LOOK_SECONDS)
                results += [_result(reference) for reference in ready]
                bar.advance(len(ready))
                if pending:
                    stop.leave(f"{bar.done} of {len(tasks)} {unit} are done")
    finally:
        for reference in pending:
            ray.cancel(reference, force=True)
    return results


def _in_folder(call: Task, folder: str) -> Result:
    """Be a task: relative paths mean the same as for the command."""
    os.chdir(folder)
    progress.quiet = True
    return call()


def _result(reference: Any) -> Result:
    """The result of a task that has ended. Raises its error; RunError if its process was killed again and again."""
    import ray

    try:
        result: Result = ray.get(reference)
        return result
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, RdpmError):
            raise error.cause from error
        raise
    except ray.exceptions.RayError as error:
        reason = str(error).splitlines()[0]
        hint = "out of memory? run the same command again: it continues from what is saved"
        raise RunError(f"a task of Ray was lost {RETRIES + 1} times: {reason}", hint) from error

"""Child processes of tests, forked from a server that has imported torch: an import costs more than a tiny training."""

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import offline
import torch

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "torch._dynamo",
        "torch.utils.tensorboard",
        "sklearn.datasets",
        "rdpm_cli.engine.watch",
        "rdpm_cli.distributed",
    ]
)


def command_line(args: list[str], environment: dict[str, str]) -> None:
    """Run `rdpm ARGS` in this process."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.argv = ["rdpm", *args]
    from rdpm_cli.cli import main

    main()


def killed_at(step: int, args: list[str], environment: dict[str, str]) -> None:
    """Run `rdpm ARGS`, killed when it has logged this step."""
    from rdpm_cli.training.log import MetricsLog

    write = MetricsLog.write

    def write_and_die(log: MetricsLog, at: int, values: dict[str, Any]) -> None:
        write(log, at, values)
        if at == step:
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(MetricsLog, "write", write_and_die)  # noqa: B010
    command_line(args, environment)


def signalled_after(steps: int, number: int, note: Path, args: list[str], environment: dict[str, str]) -> None:
    """Run `rdpm ARGS`, which sends itself a signal after `steps` steps and notes the time and its children."""
    from rdpm_cli import distributed

    average, taken = distributed.average_logs, 0

    def count_and_signal(logs: dict[str, Any]) -> dict[str, float]:
        nonlocal taken
        taken += 1
        if taken == steps:
            note.write_text(f"{time.time()} " + " ".join(map(str, children(os.getpid()))))
            os.kill(os.getpid(), number)
        return average(logs)

    distributed.average_logs = count_and_signal
    command_line(args, environment)


def children(pid: int) -> list[int]:
    """The process ids of a process's children."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def without_network(target: Callable[..., None], *args: Any) -> None:
    """Call target(*args) in this process without network."""
    multiprocessing.set_start_method(None, force=True)  # else data workers start from a forkserver and import torch
    offline.block()
    target(*args)


def spawn(target: Callable[..., None], *args: Any) -> ForkServerProcess:
    process = FORKS.Process(target=without_network, args=(target, *args))
    process.start()
    return process


def exit_code(process: ForkServerProcess, seconds: float = 120) -> int | None:
    """The exit code; None, after a kill, if it takes longer."""
    process.join(timeout=seconds)
    if process.is_alive():
        process.kill()
    return process.exitcode


def torchrun(processes: int) -> list[dict[str, str]]:
    """The environment torchrun gives to each of its processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def tokenizer_command(out: Path, *overrides: str) -> list[str]:
    """train-tokenizer of a tiny recipe on the built-in digits."""
    small = [
        "autoencoder.width=8",
        "autoencoder.channels=8",
        "autoencoder.res_blocks=1",
        "quantizer.codes=64",
        "quantizer.steps=2",
    ]
    fixed = ["train-tokenizer", "digits", "--recipe", "digits", "--quiet", "--out", str(out)]
    return [*fixed, *small, "train.log_every=1", *overrides]


def generator_command(codes: Path, out: Path, *overrides: str) -> list[str]:
    """train-gen of a tiny recipe on a store."""
    small = ["network.depth=1", "network.width=32", "network.heads=2", "train.ema=0.9", "train.eval_every=0"]
    fixed = ["train-gen", str(codes), "--recipe", "digits", "--device", "cpu", "--quiet", "--out", str(out)]
    return [*fixed, *small, "train.log_every=1", *overrides]


def run_all(args: list[str], processes: int = 1, seconds: float = 300) -> list[int | None]:
    """Run `rdpm ARGS` in this many processes, as torchrun starts them. -> exit codes."""
    running = [spawn(command_line, args, environment) for environment in environments(processes)]
    return [exit_code(process, seconds) for process in running]


def environments(processes: int) -> list[dict[str, str]]:
    """The environment of each of this many processes."""
    return torchrun(processes) if processes > 1 else [{}]


def wait_for(condition: Callable[[], object], process: ForkServerProcess, seconds: float = 120) -> None:
    """Wait until it is true, while the process lives."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pids: list[int], seconds: float = 5) -> None:
    """Wait until none of the processes runs."""
    deadline = time.monotonic() + seconds
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def touch(path: str) -> None:
    """The call in a malicious pickle."""
    Path(path).touch()


def killed_after_samples(micro_batches: int, args: list[str], environment: dict[str, str]) -> None:
    """Run `rdpm ARGS`, killed when it begins the micro-batch of samples after the first `micro_batches`."""
    from rdpm_cli.generator.sampler import Job

    draw, done = Job.draw, 0

    def draw_or_die(job: Job, indices: Any, labels: Any) -> Any:
        nonlocal done
        if done == micro_batches:
            os.kill(os.getpid(), signal.SIGKILL)
        done += 1
        return draw(job, indices, labels)

    setattr(Job, "draw", draw_or_die)  # noqa: B010
    command_line(args, environment)


def ranks(args: list[str], out: Path) -> dict[str, Any]:
    """The JSON that `rdpm eval ARGS` in two gloo processes prints."""
    processes = [spawn(printing, args, environment, out) for environment in torchrun(2)]
    assert [exit_code(process) for process in processes] == [0, 0]
    values: dict[str, Any] = json.loads(out.read_text())
    return values


def printing(args: list[str], environment: dict[str, str], out: Path) -> None:
    """Run `rdpm ARGS`, with the stdout of all processes in one file."""
    descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    command_line(args, environment)

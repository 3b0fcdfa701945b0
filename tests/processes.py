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
FORKS.set_forkserver_preload(["torch._dynamo", "torch.utils.tensorboard", "sklearn.datasets", "rdpm_cli.engine.watch"])


def spawn(target: Callable[..., None], *args: Any) -> ForkServerProcess:
    """Call target(*args) in a process without network."""
    process = FORKS.Process(target=_without_network, args=(target, *args))
    process.start()
    return process


def _without_network(target: Callable[..., None], *args: Any) -> None:
    multiprocessing.set_start_method(None, force=True)  # else data workers start from a forkserver and import torch
    offline.block()
    target(*args)


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


def environments(processes: int) -> list[dict[str, str]]:
    """The environment of each of this many processes; one is started without torchrun."""
    return torchrun(processes) if processes > 1 else [{}]


def run_all(args: list[str], processes: int = 1, seconds: float = 300) -> list[int | None]:
    """Run `rdpm ARGS` in this many processes, as torchrun starts them. -> exit codes."""
    running = [spawn(command_line, args, environment) for environment in environments(processes)]
    return [exit_code(process, seconds) for process in running]


def ranks(args: list[str], out: Path) -> dict[str, Any]:
    """The JSON that `rdpm eval ARGS` in two gloo processes prints."""
    processes = [spawn(_printing, args, environment, out) for environment in torchrun(2)]
    assert [exit_code(process) for process in processes] == [0, 0]
    values: dict[str, Any] = json.loads(out.read_text())
    return values


def _printing(args: list[str], environment: dict[str, str], out: Path) -> None:
    os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)  # the stdout of both processes
    command_line(args, environment)


# Targets of spawn: `rdpm ARGS`, undisturbed or not. They import the package themselves, in the child process.


def command_line(args: list[str], environment: dict[str, str]) -> None:
    """Run `rdpm ARGS` in this process."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.argv = ["rdpm", *args]
    from rdpm_cli.cli import main

    main()


def _before_call(number: int, home: Any, name: str, act: Callable[[], object]) -> None:
    """Act before the call of this number, from 1, of a function."""
    original, calls = getattr(home, name), 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            act()
        return original(*args, **kwargs)

    setattr(home, name, call)


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


def killed_after_samples(micro_batches: int, args: list[str], environment: dict[str, str]) -> None:
    """Run `rdpm ARGS`, killed when it begins the micro-batch of samples after the first `micro_batches`."""
    from rdpm_cli.generator.sampler import Job

    _before_call(micro_batches + 1, Job, "draw", lambda: os.kill(os.getpid(), signal.SIGKILL))
    command_line(args, environment)


def signalled_after(steps: int, number: int, note: Path, args: list[str], environment: dict[str, str]) -> None:
    """Run `rdpm ARGS`, which sends itself a signal after `steps` steps and notes the time and its children."""
    from rdpm_cli import distributed

    def note_and_signal() -> None:
        note.write_text(f"{time.time()} " + " ".join(map(str, children(os.getpid()))))
        os.kill(os.getpid(), number)

    _before_call(steps, distributed, "average_logs", note_and_signal)
    command_line(args, environment)


def touch(path: str) -> None:
    """The call in a malicious pickle."""
    Path(path).touch()


def tokenizer_command(out: Path, *overrides: str) -> list[str]:
    """train-tokenizer of a tiny recipe on the built-in digits."""
    fixed = ["train-tokenizer", "digits", "--recipe", "digits", "--quiet", "--out", str(out), "train.log_every=1"]
    network = ["autoencoder.width=8", "autoencoder.channels=8", "autoencoder.res_blocks=1"]
    return [*fixed, *network, "quantizer.codes=64", "quantizer.steps=2", *overrides]


def generator_command(codes: Path, out: Path, *overrides: str) -> list[str]:
    """train-gen of a tiny recipe on a store."""
    fixed = ["train-gen", str(codes), "--recipe", "digits", "--device", "cpu", "--quiet", "--out", str(out)]
    network = ["network.depth=1", "network.width=32", "network.heads=2"]
    return [*fixed, *network, "train.ema=0.9", "train.eval_every=0", "train.log_every=1", *overrides]


def training_command(training: str, codes: Path, out: Path, *overrides: str) -> list[str]:
    """Either of them. training: tokenizer or generator."""
    if training == "generator":
        return generator_command(codes, out, *overrides)
    return tokenizer_command(out, "train.ema=0.9", "--device", "cpu", *overrides)


def wait_for(condition: Callable[[], object], process: ForkServerProcess | None, seconds: float = 120) -> None:
    """Wait until it is true, while the process lives."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process is None or process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def children(pid: int) -> list[int]:
    """The process ids of a process's children."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pids: list[int], seconds: float = 5) -> None:
    """Wait until none of the processes runs."""
    wait_for(lambda: not any(map(alive, pids)), None, seconds)

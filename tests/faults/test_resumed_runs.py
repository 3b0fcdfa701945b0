"""A generator through the real command line: killed and resumed, by one process and by two, and the same by both."""

import signal
from pathlib import Path

import numpy as np
import pytest
from helpers import assert_same, metrics, newest_state
from processes import command_line, exit_code, killed_at, spawn, torchrun

from rdpm_cli import modelfile

STEPS = 60
SMALL = [
    "network.depth=1", "network.width=32", "network.heads=2", "train.batch=32", f"train.steps={STEPS}", "train.ema=0.9",
    "train.save_every=30", "train.log_every=1", "train.eval_every=0",
]  # fmt: skip


def command(codes: Path, out: Path) -> list[str]:
    return ["train-gen", str(codes), "--recipe", "digits", "--out", str(out), "--device", "cpu", "--quiet", *SMALL]


def environments(processes: int) -> list[dict[str, str]]:
    return torchrun(processes) if processes > 1 else [{}]


def run(codes: Path, out: Path, processes: int) -> list[int | None]:
    """Exit codes of its processes."""
    running = [spawn(command_line, command(codes, out), environment) for environment in environments(processes)]
    return [exit_code(process) for process in running]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, digits_codes: Path) -> dict[int, Path]:
    """60 steps without a break, by one process and by two."""
    folders = {processes: tmp_path_factory.mktemp("whole") / str(processes) for processes in (1, 2)}
    for processes, out in folders.items():
        assert run(digits_codes, out, processes) == [0] * processes
    return folders


@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_run_resumes_as_the_uninterrupted_one(
    processes: int, whole: dict[int, Path], digits_codes: Path, tmp_path: Path
) -> None:
    """The process that writes is killed at step 33; steps 31 to 33 are taken again from the checkpoint of step 30."""
    out = tmp_path / "run"
    first, *others = environments(processes)
    running = [spawn(killed_at, 33, command(digits_codes, out), first)]
    running += [spawn(command_line, command(digits_codes, out), environment) for environment in others]
    codes = [exit_code(process) for process in running]
    assert codes[0] == -signal.SIGKILL
    assert all(codes[1:])  # nobody goes on alone
    assert newest_state(out)["step"] == 30
    assert run(digits_codes, out, processes) == [0] * processes
    assert_same(newest_state(out), newest_state(whole[processes]))
    assert metrics(out) == metrics(whole[processes])
    digests = [modelfile.load(folder / "generator.pt")["digest"] for folder in (out, whole[processes])]
    assert digests[0] == digests[1]


def test_two_processes_have_the_losses_of_one(whole: dict[int, Path]) -> None:
    one, two = (metrics(whole[processes])[:50] for processes in (1, 2))
    for name in ("loss", "ce", "accuracy", "latent_mse"):
        np.testing.assert_allclose(
            [row[name] for row in two], [row[name] for row in one], rtol=1e-4, atol=1e-4, err_msg=name
        )


def test_a_finished_run_exits_at_once(whole: dict[int, Path], digits_codes: Path) -> None:
    before = (whole[1] / "generator.pt").read_bytes()
    assert run(digits_codes, whole[1], 1) == [0]
    assert (whole[1] / "generator.pt").read_bytes() == before

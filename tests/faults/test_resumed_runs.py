"""Both trainings through the real command line: killed and resumed, by one process and by two, to the same bits.

200 steps, killed by SIGKILL at step 103, go on from the checkpoint of step 100; in every run of the tests 60 steps."""

import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import assert_same, metrics, newest_state
from processes import command_line, environments, exit_code, killed_at, run_all, spawn, training_command
from rows import Rows

from rdpm_cli import checkpoint

WholeRun = Callable[[str, int, int], Path]


def command(training: str, codes: Path, out: Path, steps: int) -> list[str]:
    settings = ["train.batch=32", f"train.steps={steps}", f"train.save_every={steps // 2}"]
    if training == "tokenizer":  # with a critic, which starts later, and codes that restart
        settings += [
            "loss.adversarial=hinge",
            "discriminator.width=8",
            "discriminator.layers=2",
            "discriminator.start=10",
        ]
        settings += ["quantizer.codes=32", "quantizer.decay=0.5"]
    return training_command(training, codes, out, *settings)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, digits_codes: Path) -> WholeRun:
    """whole(training, processes, steps): a run without a break. Read only."""
    made: dict[tuple[str, int, int], Path] = {}

    def find(training: str, processes: int, steps: int) -> Path:
        case = training, processes, steps
        if case not in made:
            made[case] = tmp_path_factory.mktemp("whole") / "run"
            assert run_all(command(training, digits_codes, made[case], steps), processes) == [0] * processes
        return made[case]

    return find


LONG = [(training, processes, 200) for training in ("tokenizer", "generator") for processes in (1, 2)]
SHORT = [("tokenizer", 1, 60), ("generator", 1, 60), ("generator", 2, 60)]
CASES = [*SHORT, *(pytest.param(*case, marks=pytest.mark.long) for case in LONG)]


@pytest.mark.parametrize(("training", "processes", "steps"), CASES)
def test_a_killed_run_resumes_as_the_uninterrupted_one(
    training: str, processes: int, steps: int, whole: WholeRun, digits_codes: Path, tmp_path: Path, rows: Rows
) -> None:
    """The process that writes is killed three steps after its checkpoint; these are taken again."""
    out, half = tmp_path / "run", steps // 2
    args = command(training, digits_codes, out, steps)
    first, *others = environments(processes)
    with rows.count(f"bitwise resume after a kill, {training}, {processes} processes"):
        running = [spawn(killed_at, half + 3, args, first)]
        running += [spawn(command_line, args, environment) for environment in others]
        codes = [exit_code(process) for process in running]
        assert codes[0] == -signal.SIGKILL
        assert all(codes[1:])  # nobody goes on alone
        assert newest_state(out)["step"] == half
        assert run_all(args, processes) == [0] * processes
        unbroken = whole(training, processes, steps)
        assert_same(newest_state(out), newest_state(unbroken))
        assert metrics(out) == metrics(unbroken)
        digests = [checkpoint.load(folder / f"{training}.pt")["digest"] for folder in (out, unbroken)]
        assert digests[0] == digests[1]


def test_two_processes_have_the_losses_of_one(whole: WholeRun) -> None:
    one, two = (metrics(whole("generator", processes, 60))[:50] for processes in (1, 2))
    for name in ("loss", "ce", "accuracy", "latent_mse"):
        values = [[row[name] for row in rows] for rows in (one, two)]
        np.testing.assert_allclose(values[1], values[0], rtol=1e-4, atol=1e-4, err_msg=name)


def test_a_finished_run_exits_at_once(whole: WholeRun, digits_codes: Path) -> None:
    run = whole("generator", 1, 60)
    before = (run / "generator.pt").read_bytes()
    assert run_all(command("generator", digits_codes, run, 60)) == [0]
    assert (run / "generator.pt").read_bytes() == before

"""Averages by power functions: what they weigh, the reconstruction of other lengths, and the command that writes it."""

import json
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import newest_state, tiny_config, tiny_players
from processes import generator_command, tokenizer_command
from scipy.optimize import brentq
from torch import Tensor, nn

from rdpm_cli import checkpoint
from rdpm_cli.cli.app import run
from rdpm_cli.distributed import one_thread
from rdpm_cli.engine.plan import fixed_memory
from rdpm_cli.generator import registry
from rdpm_cli.tokenizer import model as tokenizer_model
from rdpm_cli.training.ema import Ema, coefficients, reconstruct

STEPS = 400


@cache
def gamma_of(length: float) -> float:
    """The exponent of the power function on [0, 1] that has this standard deviation, by numerical integration."""
    u = (np.arange(20_000) + 0.5) / 20_000

    def excess(gamma: float) -> float:
        p = u**gamma / (u**gamma).sum()
        return float(np.sqrt(p @ u**2 - (p @ u) ** 2)) - length

    return float(brentq(excess, 0, 100))


def weights_over_time(length: float, end: int = STEPS) -> np.ndarray:
    """The integrals over steps 1..STEPS of the power function up to `end` whose standard deviation is length × end."""
    return np.diff((np.arange(STEPS + 1) / end).clip(max=1) ** (gamma_of(length) + 1))


class Walk:
    """A network whose parameters drift from 1 and diffuse, as in a training, and their whole history."""

    def __init__(self, folder: Path) -> None:
        draws = torch.Generator().manual_seed(0)
        model, self.ema = nn.Linear(20, 5), Ema(nn.Linear(20, 5), "power")
        nn.init.ones_(model.weight)
        history = []
        for step in range(1, STEPS + 1):
            with torch.no_grad():
                model.weight += (torch.randn(5, 20, generator=draws) + 0.2) / step**0.5 / 20
            self.ema.update(model)
            self.ema.keep(folder, step, STEPS)
            history.append(model.weight.detach().double().clone())
        self.history = torch.stack(history)
        self.snapshots = [path for _, path in checkpoint.states(folder / "ema")]

    def average(self, length: float) -> Tensor:
        """By its definition."""
        return torch.einsum("s,sij->ij", torch.from_numpy(weights_over_time(length)), self.history)


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Walk:
    return Walk(tmp_path_factory.mktemp("walk"))


def test_the_recursion_gives_the_average_of_the_history_by_a_power_function_of_that_width(walk: Walk) -> None:
    for name, length in (("model", 0.10), ("short", 0.05)):
        average = walk.ema.averages[name].get_parameter("weight")
        torch.testing.assert_close(average.double(), walk.average(length), rtol=0, atol=2e-6)


@pytest.mark.parametrize("length", [0.02, 0.05, 0.07, 0.15, 0.25])
def test_the_fit_combines_what_the_snapshots_weigh_and_knows_its_error(length: float) -> None:
    ends = np.repeat(np.arange(1, 33) * STEPS // 32, 2).tolist()
    x_I, error = coefficients(ends, [0.10, 0.05] * 32, length)
    known = [weights_over_time(each, end) for end, each in zip(ends, [0.10, 0.05] * 32, strict=True)]
    expected = weights_over_time(length)
    distance = np.linalg.norm(x_I @ np.array(known) - expected) / np.linalg.norm(expected)
    assert distance == pytest.approx(error, rel=0.1, abs=1e-6)
    assert x_I.sum() == pytest.approx(1)  # so that a parameter that does not change is kept


# Shares of the distance of the two averages that are kept, 1% of the parameters here. Their rounding to fp16 costs 0.02
# and the more the further a length lies from both, the fit to 32 snapshots up to 0.1.
@pytest.mark.parametrize(
    ("length", "share"), [(0.02, 0.35), (0.05, 0.03), (0.07, 0.03), (0.10, 0.03), (0.15, 0.03), (0.25, 0.12)]
)
def test_any_length_is_reconstructed_from_the_snapshots(length: float, share: float, walk: Walk) -> None:
    parameters, updates, _ = reconstruct(walk.snapshots, length)
    unit = (walk.average(0.10) - walk.average(0.05)).norm()
    assert (parameters["weight"].double() - walk.average(length)).norm() < share * unit
    assert updates == STEPS


def test_a_repeated_snapshot_does_not_spoil_the_fit() -> None:
    """Two are the same where the steps between them were skipped."""
    x_I, error = coefficients([5, 5, 10, 10, 10, 10], [0.1, 0.05] * 3, 0.1)
    assert error == pytest.approx(0, abs=1e-6)
    assert np.abs(x_I).max() <= 1


def test_two_averages_take_the_memory_of_two() -> None:
    sizes = []
    for kind in (0.0, 0.9, "power"):
        cfg = tiny_config(train={"ema": kind})
        sizes.append(fixed_memory(tiny_players(cfg), cfg.train)["ema"])
    assert sizes == [0, sizes[1], 2 * sizes[1]]


# ---- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, digits_codes: Path) -> Path:
    """Finished runs of 40 steps, a generator's and a tokenizer's. Read-only."""
    folder, short = tmp_path_factory.mktemp("runs"), ["train.batch=16", "train.steps=40"]
    with one_thread():
        assert run(generator_command(digits_codes, folder / "generator", *short, "train.ema=power")) == 0
        assert run(tokenizer_command(folder / "tokenizer", *short, "train.ema=power", "--device", "cpu")) == 0
    return folder


@pytest.mark.parametrize("kind", ["generator", "tokenizer"])
def test_the_model_has_the_average_of_the_length_and_all_else_of_the_run(
    kind: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, trained = tmp_path / "new.pt", checkpoint.load(runs / kind / f"{kind}.pt")
    state = newest_state(runs / kind)
    capsys.readouterr()
    assert run(["ema", str(runs / kind), "--length", "0.05", "--out", str(out), "--json"]) == 0
    answer, written = json.loads(capsys.readouterr().out), checkpoint.load(out)
    model = registry.load(out).generator.network if kind == "generator" else tokenizer_model.load(out)[0]
    averaged = {name for name, _ in model.named_parameters()}
    for name, value in written["weights"].items():
        expected = state["ema"]["short" if name in averaged else "model"][name]
        torch.testing.assert_close(value, expected, rtol=1e-3 if name in averaged else 0, atol=1e-4, msg=name)
    assert answer["digest"] == written["digest"] != trained["digest"]
    facts = {"length": 0.05, "updates": 40, "snapshots": 32}
    assert facts.items() <= written["provenance"].pop("ema").items()
    assert facts.items() <= answer.items()
    assert answer["error"] < 1e-5
    for key in written.keys() - {"weights", "digest"}:
        assert str(written[key]) == str(trained[key]), key


@pytest.mark.parametrize(
    ("fault", "option", "code", "token"),
    [
        ("", "0.3", 2, "--length"), ("", "0", 2, "--length"), ("run.json", "0.05", 2, "run"),
        ("decay", "0.05", 2, "train.ema=0.9"), ("ema", "0.05", 3, "ema"), ("generator.pt", "0.05", 3, "generator.pt"),
        ("step-000000040.pt", "0.05", 3, "40"), ("step-000000005.pt", "0.05", 3, "5"),
    ],
)  # fmt: skip
def test_what_cannot_be_averaged_is_named(
    fault: str, option: str, code: int, token: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """fault: what a copy of the run lacks; decay: it was trained with another kind of average."""
    absent = shutil.ignore_patterns(fault)
    shutil.copytree(runs / "generator", tmp_path / "run", ignore=absent)
    if fault == "decay":
        record = tmp_path / "run" / "run.json"
        record.write_text(record.read_text().replace('"power"', "0.9"))
    capsys.readouterr()
    assert run(["ema", str(tmp_path / "run"), "--length", option, "--out", str(tmp_path / "new.pt")]) == code
    assert token in capsys.readouterr().err
    assert not (tmp_path / "new.pt").exists()


def test_nothing_is_overwritten_and_a_damaged_snapshot_is_refused(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    final, copied = runs / "generator" / "generator.pt", tmp_path / "run"
    before = final.read_bytes()
    assert run(["ema", str(final.parent), "--length", "0.05", "--out", str(final)]) == 2
    assert final.read_bytes() == before
    shutil.copytree(final.parent, copied)
    snapshot = sorted((copied / "ema").glob("*.pt"))[3]
    content = bytearray(snapshot.read_bytes())
    content[len(content) // 2] ^= 1
    snapshot.write_bytes(content)
    capsys.readouterr()
    assert run(["ema", str(copied), "--length", "0.05", "--out", str(tmp_path / "new.pt")]) == 3
    assert snapshot.name in capsys.readouterr().err

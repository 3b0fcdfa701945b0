"""A tokenizer and its discriminator through the real command line: killed, stopped, resumed, on two processes."""

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_same, distance, leaves, metrics, newest_state
from processes import command_line, exit_code, killed_at, spawn, tokenizer_command, torchrun
from torch import Tensor

from rdpm_cli import checkpoint
from rdpm_cli.cli.app import run as run_cli
from rdpm_cli.device import one_thread
from rdpm_cli.training.log import read_metrics

ADVERSARIAL = [
    "autoencoder.channels=4", "quantizer.codes=32", "quantizer.decay=0.5", "loss.adversarial=hinge",
    "discriminator.width=8", "discriminator.layers=2", "train.ema=0.9", "--device", "cpu",
]  # fmt: skip
STEPS = 60


def command(out: Path, *more: str) -> list[str]:
    batch = ["train.batch=16", f"train.steps={STEPS}", "train.save_every=30", "discriminator.start=10"]
    return tokenizer_command(out, *ADVERSARIAL, *batch, *more)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 steps without a break."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with one_thread():
        assert run_cli(command(out)) == 0
    return out


def the_same_run(out: Path, whole: Path) -> None:
    """Parameters and optimisers of both players, the average, the codebook's statistics, the log, the model file."""
    found, wanted = newest_state(out), newest_state(whole)
    assert found["step"] == STEPS
    assert_same(found, wanted)
    assert metrics(out) == metrics(whole)
    assert [row["step"] for row in metrics(out)] == list(range(1, STEPS + 1))
    assert checkpoint.load(out / "tokenizer.pt")["digest"] == checkpoint.load(whole / "tokenizer.pt")["digest"]


def test_the_run_in_question_has_all_that_a_resume_must_keep(whole: Path) -> None:
    state = newest_state(whole)
    assert state["players"].keys() == {"tokenizer", "discriminator"}
    assert all(player["optimizer"]["state"] for player in state["players"].values())
    assert {"quantizer.ema_counts", "quantizer.ema_sums", "quantizer.books"} <= state["players"]["tokenizer"][
        "model"
    ].keys()
    assert state["ema"]["updates"] == STEPS
    assert sum(row["restarted"] for row in metrics(whole)) > 0
    assert "gan_weight" not in metrics(whole)[9]
    assert all(0 < row["gan_weight"] < 1e4 for row in metrics(whole)[10:])


def test_a_killed_run_resumes_as_the_uninterrupted_one(whole: Path, tmp_path: Path) -> None:
    """Killed at step 33: steps 31 to 33 stand in the log, and are taken again from the checkpoint of step 30."""
    out = tmp_path / "run"
    assert exit_code(spawn(killed_at, 33, command(out), {})) == -signal.SIGKILL
    assert read_metrics(out)[-1]["step"] == 33
    assert newest_state(out)["step"] == 30
    assert not (out / "tokenizer.pt").exists()
    with one_thread():
        assert run_cli(command(out)) == 0
    the_same_run(out, whole)


def test_the_model_file_holds_the_average_of_the_weights(whole: Path) -> None:
    state, weights = newest_state(whole), checkpoint.load(whole / "tokenizer.pt")["weights"]
    assert_same(weights, state["ema"]["model"])
    trained = state["players"]["tokenizer"]["model"]
    moved = [name for name, value in weights.items() if not torch.equal(value, trained[name])]
    assert "decoder.conv_out.weight" in moved
    assert not [name for name in moved if "books" in name or "ema_" in name]  # the codebook is copied, not averaged
    assert not [name for name in weights if name.startswith("layers.")]  # nothing of the discriminator


@pytest.mark.parametrize(
    ("steps", "batch"), [(12, ["train.batch=32"]), (8, ["train.batch=64", "train.micro_batch=16"])]
)
def test_two_processes_train_two_players_as_one_does(steps: int, batch: list[str], tmp_path: Path) -> None:
    """With the adaptive weight, restarts and the average: both ranks hold the same, one process nearly so.

    Also where gradients accumulate: four micro-batches in one process, two in each of two.
    """

    def args(name: str) -> list[str]:
        more = [f"train.steps={steps}", "quantizer.restart_below=0.1", "train.lr=1e-3"]
        return tokenizer_command(tmp_path / name, *ADVERSARIAL, *batch, *more)

    pair = [spawn(keep_rank_state, args("two"), environment, tmp_path) for environment in torchrun(2)]
    with one_thread():
        assert run_cli(args("one")) == 0
    assert [exit_code(process) for process in pair] == [0, 0]
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert_same(ranks[1], ranks[0])
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert sum(row["restarted"] for row in one) > 0
    for name in ("loss", "recon", "quant", "gan", "gan_weight", "discriminator/loss", "restarted", "usage/t01"):
        values = [np.array([row[name] for row in rows]) for rows in (one, two)]
        np.testing.assert_allclose(values[1], values[0], atol=1e-4, rtol=1e-4, err_msg=name)
    assert two[1]["gan_weight"] == pytest.approx(one[1]["gan_weight"], rel=1e-5)  # of the mean gradient, not the sum
    assert two[1]["gan_weight"] > 0
    state = newest_state(tmp_path / "one")["players"]["tokenizer"]["model"]
    for name in ("books", "ema_counts", "ema_sums"):
        assert distance(ranks[0][f"/tokenizer/quantizer.{name}"], state[f"quantizer.{name}"]) < 1e-3, name


def keep_rank_state(args: list[str], environment: dict[str, str], out: Path) -> None:
    """Be one of torchrun's processes; keep the state of its players at the end."""
    from rdpm_cli.training import loop

    plain = loop._save

    def save(seats: Any, run: Any, cfg: Any) -> None:
        state = {seat.player.name: dict(seat.player.model.state_dict()) for seat in seats}
        tensors = {name: value for name, value in leaves(state).items() if isinstance(value, Tensor)}
        torch.save(tensors, out / f"{environment['RANK']}.pt")
        plain(seats, run, cfg)

    loop._save = save
    command_line(args, environment)

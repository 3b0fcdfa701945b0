"""A tokenizer and its discriminator through the real command line: what is saved, and two processes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_same, distance, metrics, newest_state
from processes import run_all, tokenizer_command

from rdpm_cli import checkpoint

ADVERSARIAL = [
    "autoencoder.channels=4", "quantizer.codes=32", "quantizer.decay=0.5", "loss.adversarial=hinge",
    "discriminator.width=8", "discriminator.layers=2", "train.ema=0.9", "--device", "cpu",
]  # fmt: skip


def test_the_state_has_all_that_a_resume_must_keep_and_the_model_file_the_average(tmp_path: Path) -> None:
    more = ["train.batch=16", "train.steps=30", "discriminator.start=10"]
    assert run_all(tokenizer_command(tmp_path, *ADVERSARIAL, *more)) == [0]
    state = newest_state(tmp_path)
    assert state["players"].keys() == {"tokenizer", "discriminator"}
    assert all(player["optimizer"]["state"] for player in state["players"].values())
    trained = state["players"]["tokenizer"]["model"]
    assert {"quantizer.ema_counts", "quantizer.ema_sums", "quantizer.books"} <= trained.keys()
    assert state["ema"]["updates"] == 30
    assert sum(row["restarted"] for row in metrics(tmp_path)) > 0
    assert "gan_weight" not in metrics(tmp_path)[9]
    assert all(0 < row["gan_weight"] < 1e4 for row in metrics(tmp_path)[10:])
    weights = checkpoint.load(tmp_path / "tokenizer.pt")["weights"]
    assert_same(weights, state["ema"]["model"])
    moved = [name for name, value in weights.items() if not torch.equal(value, trained[name])]
    assert "decoder.conv_out.weight" in moved
    assert not [name for name in moved if "books" in name or "ema_" in name]  # the codebook is copied, not averaged
    assert not [name for name in weights if name.startswith("layers.")]  # nothing of the discriminator


@pytest.mark.parametrize(
    ("steps", "batch"), [(12, ["train.batch=32"]), (8, ["train.batch=64", "train.micro_batch=16"])]
)
def test_two_processes_train_two_players_as_one_does(steps: int, batch: list[str], tmp_path: Path) -> None:
    """With the adaptive weight, restarts and the average.

    Also where gradients accumulate: four micro-batches in one process, two in each of two."""

    def args(name: str) -> list[str]:
        more = [f"train.steps={steps}", "quantizer.restart_below=0.1", "train.lr=1e-3"]
        return tokenizer_command(tmp_path / name, *ADVERSARIAL, *batch, *more)

    assert run_all(args("two"), 2) == [0, 0]
    assert run_all(args("one")) == [0]
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert sum(row["restarted"] for row in one) > 0
    for name in ("loss", "recon", "quant", "gan", "gan_weight", "discriminator/loss", "restarted", "usage/t01"):
        values = [np.array([row[name] for row in rows]) for rows in (one, two)]
        np.testing.assert_allclose(values[1], values[0], atol=1e-4, rtol=1e-4, err_msg=name)
    # of the mean gradient, not the sum
    assert two[1]["gan_weight"] == pytest.approx(one[1]["gan_weight"], rel=1e-5) != 0
    states = [newest_state(tmp_path / name)["players"]["tokenizer"]["model"] for name in ("one", "two")]
    for name in ("books", "ema_counts", "ema_sums"):
        assert distance(states[1][f"quantizer.{name}"], states[0][f"quantizer.{name}"]) < 1e-3, name

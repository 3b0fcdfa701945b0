"""A step whose loss or gradient is not finite: named, skipped as often as the recipe allows, and of no effect."""

import math
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same, digits, leaves, metrics, newest_state, tiny_config, tiny_players, train
from processes import exit_code, spawn, torchrun
from rows import Rows
from torch import Tensor

from rdpm_cli import distributed
from rdpm_cli.distributed import TrainStep, world
from rdpm_cli.errors import RunError
from rdpm_cli.tokenizer import inputs as inputs_module
from rdpm_cli.tokenizer.config import TokenizerConfig
from rdpm_cli.tokenizer.training import DiscriminatorTask, Players, TokenizerTask


def config(**options: Any) -> TokenizerConfig:
    return tiny_config(train={"steps": 6, "save_every": 1, "keep": 10, **options})


def spoil(player: TokenizerTask | DiscriminatorTask, steps: set[int], part: str = "loss") -> None:
    """Make a player's loss, its gradient alone, or the images that it sees NaN at these steps."""
    plain, weight = player.loss, next(player.model.parameters())

    def loss(batch: Tensor, step: TrainStep) -> tuple[Tensor, dict[str, Tensor]]:
        if step.step not in steps:
            return plain(batch, step)
        with pytest.MonkeyPatch.context() as patch:
            if part == "images":
                patch.setattr(inputs_module, "to_model", lambda pixels: torch.full(pixels.shape, math.nan))
            total, logs = plain(batch, step)
        if part == "gradient":  # 0 × inf
            total = total + (weight - weight.detach()).sum().abs().sqrt()
        return total * math.nan if part == "loss" else total, logs

    setattr(player, "loss", loss)  # noqa: B010


def spoiled(steps: set[int], part: str = "loss", player: int = 0) -> Players:
    players = tiny_players(config())
    spoil(players[player], steps, part)
    return players


def test_as_many_are_skipped_as_the_recipe_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RunError, match="not finite at step 5"):
        train(spoiled({1, 3, 5}), config(skip_bad=2), tmp_path)
    assert [row["step"] for row in metrics(tmp_path)] == [1, 3, 5]  # a line for each step that was taken
    warnings = [line for line in capsys.readouterr().err.splitlines() if "skipped (" in line]
    assert ["at step 1," in warnings[0], "at step 3," in warnings[1]] == [True, True]
    with pytest.raises(RunError, match="not finite at step 1") as failed:
        train(spoiled({1}), config(), tmp_path / "none")
    assert "train.skip_bad=1" in failed.value.hint
    assert newest_state(tmp_path / "none")["step"] == 1


@pytest.mark.parametrize(("player", "part"), [(0, "loss"), (0, "gradient"), (0, "images"), (1, "loss")])
def test_a_skipped_step_changes_nothing_of_any_player(tmp_path: Path, player: int, part: str) -> None:
    """Parameters, codebook and its statistics, both optimisers, the average: the step counter apart."""
    train(spoiled({2}, part, player), config(skip_bad=1, steps=4), tmp_path)
    paths = [tmp_path / "checkpoints" / f"step-{step:09d}.pt" for step in (2, 3, 4)]
    before, after, later = (torch.load(path, weights_only=True) for path in paths)
    assert (before.pop("step"), after.pop("step")) == (2, 3)
    assert (before.pop("skipped"), after.pop("skipped")) == (0, 1)
    assert_same(after, before)
    assert before["players"]["discriminator"]["optimizer"]["state"]
    earlier, moved = leaves(before["players"]), leaves(later["players"])
    for name in ("tokenizer/model/quantizer.ema_counts", "tokenizer/model/decoder.conv_out.weight",
                 "discriminator/model/layers.0.weight", "discriminator/optimizer/state/0/step"):  # fmt: skip
        assert not torch.equal(moved[f"/{name}"], earlier[f"/{name}"])  # the step after it trains all again


def test_the_count_survives_a_resume(tmp_path: Path) -> None:
    for _ in range(2):  # the second run starts at step 4, where the first one failed
        with pytest.raises(RunError, match="not finite at step 4"):
            train(spoiled({1, 4}), config(skip_bad=1), tmp_path)
        assert (newest_state(tmp_path)["step"], newest_state(tmp_path)["skipped"]) == (4, 1)


@pytest.mark.parametrize(("player", "name"), [(0, "tokenizer"), (1, "discriminator")])
def test_the_message_names_the_player_and_the_images(tmp_path: Path, player: int, name: str) -> None:
    with pytest.raises(RunError) as failed:
        train(spoiled({2}, player=player), config(), tmp_path)
    assert f"at step 2, {digits(config()).describe(2, range(16))} (" in failed.value.message
    assert f"{name}: loss nan" in failed.value.message


# ---- two processes -------------------------------------------------------------------------------------------------

Case = tuple[str, str, set[int]]  # a folder's name, what goes bad, at which steps


def second_rank_goes_bad(environment: dict[str, str], out: Path, cases: list[Case]) -> None:
    """Train runs in which steps of the second process are bad, with one to be skipped."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    with distributed.process_group("cpu", several=True):
        results: dict[str, dict[str, Any]] = {}
        for name, part, steps in cases:
            cfg = tiny_config(train={"steps": max(steps) + 3, "batch": 32, "skip_bad": 1, "save_every": 1})
            players = tiny_players(cfg)
            if world()[0] == 1:
                spoil(players[0], steps, part)
            with pytest.raises(RunError) as failed:
                train(players, cfg, out / name)
            state = [dict(p.model.state_dict()) for p in players]
            results[name] = {"message": failed.value.message, "state": state}
        torch.save(results, out / f"{world()[0]}.pt")


def assert_both_stop(out: Path, cases: list[Case], rows: Rows) -> None:
    """Both processes skip the first bad step and stop at the second as they were, each with its images named."""
    pair = [spawn(second_rank_goes_bad, environment, out, cases) for environment in torchrun(2)]
    assert [exit_code(process, 300) for process in pair] == [0, 0]
    ranks = [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name, part, steps in cases:
        with rows.count(f"NaN in {part} on one of two processes: both stop, nothing moves"):
            skipped, last = sorted(steps)
            batches = digits(tiny_config(train={"batch": 32}))
            for rank, result in enumerate(ranks):
                images = batches.describe(last, range(16 * rank, 16 * rank + 16))
                assert f"not finite at step {last}, {images} (" in result[name]["message"]
                # The process that it comes from is known by its loss; gradients are means over both.
                assert ("loss nan" in result[name]["message"]) == (rank == 1 and part != "gradient")
                assert_same(result[name]["state"], ranks[0][name]["state"])
            saved = newest_state(out / name)
            assert (saved["step"], saved["skipped"]) == (last, 1)
            players = [saved["players"][player]["model"] for player in ("tokenizer", "discriminator")]
            assert_same(players, ranks[0][name]["state"])
            assert [row["step"] for row in metrics(out / name)] == [step + 1 for step in range(last) if step != skipped]


def test_a_bad_batch_of_one_process_stops_both(tmp_path: Path, rows: Rows) -> None:
    assert_both_stop(tmp_path, [("images", "images", {1, 3}), ("gradient", "gradient", {1, 3})], rows)


@pytest.mark.long
def test_a_bad_step_stops_both_wherever_it_is(tmp_path: Path, rows: Rows) -> None:
    """Ten pairs of steps drawn from seed 0, in the loss and in the gradient."""
    draw = random.Random(0)
    steps = [set(draw.sample(range(6), 2)) for _ in range(10)]
    cases = [(f"{part} {number}", part, pair) for part in ("loss", "gradient") for number, pair in enumerate(steps)]
    assert_both_stop(tmp_path, cases, rows)

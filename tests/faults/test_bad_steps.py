"""A step whose loss or gradient is not finite: named, skipped as often as the recipe allows, and of no effect."""

import math
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same, digits, leaves, metrics, newest_state, tiny_config, tiny_players, train
from processes import exit_code, spawn, torchrun
from rows import Rows
from torch import Tensor

from rdpm_cli import distributed
from rdpm_cli.device import one_thread
from rdpm_cli.distributed import TrainStep, world
from rdpm_cli.errors import RunError
from rdpm_cli.tokenizer import training as task_module
from rdpm_cli.tokenizer.config import TokenizerConfig
from rdpm_cli.tokenizer.training import DiscriminatorTask, Players, TokenizerTask


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def config(**options: Any) -> TokenizerConfig:
    return tiny_config(train={"steps": 6, "save_every": 1, "keep": 10, **options})


def spoil(player: TokenizerTask | DiscriminatorTask, steps: set[int], what: str = "loss") -> None:
    """Make a player's loss, its gradient alone, or the images that it sees NaN at these steps."""
    plain, weight = player.loss, next(player.model.parameters())

    def loss(batch: Tensor, step: TrainStep) -> tuple[Tensor, dict[str, Tensor]]:
        if step.step not in steps:
            return plain(batch, step)
        with pytest.MonkeyPatch.context() as patch:
            if what == "images":
                patch.setattr(task_module, "to_model", lambda pixels: torch.full(pixels.shape, math.nan))
            total, logs = plain(batch, step)
        if what == "gradient":  # 0 × inf
            total = total + (weight - weight.detach()).sum().abs().sqrt()
        return total * math.nan if what == "loss" else total, logs

    setattr(player, "loss", loss)  # noqa: B010


def spoiled(steps: set[int], what: str = "loss", player: int = 0) -> Players:
    players = tiny_players(config())
    spoil(players[player], steps, what)
    return players


def state_at(folder: Path, step: int) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / "checkpoints" / f"step-{step:09d}.pt", weights_only=True)
    return found


# ---- one process ---------------------------------------------------------------------------------------------------


def test_exactly_so_many_are_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RunError, match="not finite at step 5") as failed:
        train(spoiled({1, 3, 5}), config(skip_bad=2), tmp_path)
    assert failed.value.exit_code == 1
    assert [row["step"] for row in metrics(tmp_path)] == [1, 3, 5]  # a line for each step that was taken
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: skipped")]
    assert [line.removeprefix("warning: ").partition(":")[0] for line in said] == [
        "skipped (1 of 2)",
        "skipped (2 of 2)",
    ]
    assert "at step 1" in said[0]
    assert "at step 3" in said[1]


def test_none_is_passed_over_unless_the_recipe_says_so(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not finite at step 1") as failed:
        train(spoiled({1}), config(), tmp_path)
    assert "train.skip_bad" in failed.value.hint
    assert newest_state(tmp_path)["step"] == 1  # where nothing was due to be saved


@pytest.mark.parametrize(("player", "what"), [(0, "loss"), (0, "gradient"), (0, "images"), (1, "loss")])
def test_a_step_passed_over_changes_nothing_of_any_player(tmp_path: Path, player: int, what: str) -> None:
    """Parameters, codebook and its statistics, both optimisers, the average: the step counter apart."""
    train(spoiled({2}, what, player), config(skip_bad=1, steps=4), tmp_path)
    before, after, later = (state_at(tmp_path, step) for step in (2, 3, 4))
    assert (before.pop("step"), after.pop("step")) == (2, 3)
    assert (before.pop("skipped"), after.pop("skipped")) == (0, 1)
    assert_same(after, before)
    assert before["players"]["discriminator"]["optimizer"]["state"]
    moved = {
        name for name, value in leaves(later["players"]).items() if not same(value, leaves(before["players"])[name])
    }
    for part in ("tokenizer/model/quantizer.ema_counts", "tokenizer/model/decoder.conv_out.weight",
                 "discriminator/model/layers.0.weight", "discriminator/optimizer/state/0/step"):  # fmt: skip
        assert f"/{part}" in moved  # the step after it trains all again


def same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else bool(a == b)


def test_a_step_passed_over_does_not_shift_the_next(tmp_path: Path) -> None:
    """Its batch is skipped, not taken again: step 3 sees the images of step 3."""
    players, seen = spoiled({2}), list[Tensor]()
    plain = players[0].loss

    def noted(batch: Tensor, step: TrainStep) -> tuple[Tensor, dict[str, Tensor]]:
        seen.append(batch)
        return plain(batch, step)

    setattr(players[0], "loss", noted)  # noqa: B010
    train(players, config(skip_bad=1, steps=4), tmp_path)
    batches = digits(config())
    assert all(torch.equal(batch, batches.batch_at(step, range(16))) for step, batch in enumerate(seen))


def test_the_count_survives_a_resume(tmp_path: Path) -> None:
    for _ in range(2):  # the second run starts at step 4, where the first one failed
        with pytest.raises(RunError, match="not finite at step 4"):
            train(spoiled({1, 4}), config(skip_bad=1), tmp_path)
        assert (newest_state(tmp_path)["step"], newest_state(tmp_path)["skipped"]) == (4, 1)


@pytest.mark.parametrize(("player", "name"), [(0, "tokenizer"), (1, "discriminator")])
def test_the_message_names_the_player_and_the_images(tmp_path: Path, player: int, name: str) -> None:
    with pytest.raises(RunError) as failed:
        train(spoiled({2}, player=player), config(), tmp_path)
    names = named(2, range(16))
    assert len(set(names)) == 8
    start = f"{name}: loss or gradient is not finite at step 2, images {', '.join(names)} and 8 more; "
    assert failed.value.message.startswith(start)


def named(step: int, rows: range) -> list[str]:
    """Names of the first eight of those rows' images: those whose pixels the batch holds."""
    cfg = config()
    batches = digits(cfg)
    pixels = batches.batch_at(step, rows)
    names = batches.describe(step, rows).removeprefix("images ").partition(" and ")[0].split(", ")
    source = batches.source
    for name, image in zip(names, pixels[:8], strict=True):
        shown = source.pixels(source.names.index(name), 16)
        assert any((view == image.permute(1, 2, 0).numpy()).all() for view in (shown, shown[:, ::-1]))
    return names


# ---- two processes -------------------------------------------------------------------------------------------------


Case = tuple[str, str, set[int]]  # a folder's name, what goes bad, at which steps


def second_rank_goes_bad(environment: dict[str, str], out: Path, cases: list[Case]) -> None:
    """Train runs in which steps of the second process are bad, with one to be skipped."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    with distributed.process_group("cpu", several=True):
        rank, found = world()[0], dict[str, dict[str, Any]]()
        for name, what, steps in cases:
            cfg = tiny_config(train={"steps": max(steps) + 3, "batch": 32, "skip_bad": 1, "save_every": 1})
            players = tiny_players(cfg)
            if rank == 1:
                spoil(players[0], steps, what)
            try:
                train(players, cfg, out / name)
                found[name] = {"message": "finished"}
            except RunError as error:
                found[name] = {"message": error.message, "state": [dict(p.model.state_dict()) for p in players]}
        torch.save(found, out / f"{rank}.pt")


def assert_both_stop(out: Path, cases: list[Case], rows: Rows) -> None:
    """Both processes pass the first bad step over, and stop at the second as they were, with its images named."""
    pair = [spawn(second_rank_goes_bad, environment, out, cases) for environment in torchrun(2)]
    assert [exit_code(process, 300) for process in pair] == [0, 0]
    first, second = (torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(2))
    for name, what, steps in cases:
        with rows.count(f"NaN in {what} on one of two processes: both stop, nothing moves"):
            passed, last = sorted(steps)
            wanted = digits(tiny_config(train={"batch": 32})).describe(last, range(16, 32))
            assert first[name]["message"] == second[name]["message"]
            start = f"tokenizer: loss or gradient is not finite at step {last}, {wanted}; "
            assert first[name]["message"].startswith(start)
            assert_same(second[name]["state"], first[name]["state"])
            saved = newest_state(out / name)
            assert (saved["step"], saved["skipped"]) == (last, 1)
            assert_same([saved["players"][p]["model"] for p in ("tokenizer", "discriminator")], first[name]["state"])
            assert [row["step"] for row in metrics(out / name)] == [step + 1 for step in range(last) if step != passed]


def test_a_bad_batch_of_one_process_stops_both_with_its_images(tmp_path: Path, rows: Rows) -> None:
    assert_both_stop(tmp_path, [("images", "images", {1, 3}), ("gradient", "gradient", {1, 3})], rows)


@pytest.mark.long
def test_a_bad_step_stops_both_wherever_it_is(tmp_path: Path, rows: Rows) -> None:
    """Ten steps drawn from seed 0, in the loss and in the gradient."""
    draw = random.Random(0)
    steps = [set(draw.sample(range(6), 2)) for _ in range(10)]
    cases = [(f"{what} {number}", what, chosen) for what in ("loss", "gradient") for number, chosen in enumerate(steps)]
    assert_both_stop(tmp_path, cases, rows)

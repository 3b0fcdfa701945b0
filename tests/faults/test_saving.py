"""Saving the state of training: killed, on a full disk, given back otherwise than written. What was saved stays."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from generators import save_generator
from helpers import CPU, assert_same, newest_state, tiny_config, tiny_players, train
from injection import Disk, Faults, Kills
from processes import command_line, exit_code, spawn, tokenizer_command
from rows import Rows

from rdpm_cli import checkpoint, runs
from rdpm_cli.cli.app import run
from rdpm_cli.errors import RunError
from rdpm_cli.training.config import binding

STEPS, KEEP = 6, 2
SETTINGS = {"command": "train-gen", "recipe": "of a test"}


def state(step: int) -> dict[str, Any]:
    """What a run holds after a step."""
    random = torch.Generator().manual_seed(step)
    tensors = {f"layer {n}": torch.randn(50, 40, generator=random) for n in range(4)}
    players = {"toy": {"model": tensors, "optimizer": {"lr": 0.1}}}
    return {"step": step, "skipped": 0, "threads": 1, "players": players, "ema": None}


def save_all(run: Path, saved: Callable[[int], object]) -> None:
    """Save every step. saved: told of each that is on the disk."""
    for step in range(1, STEPS + 1):
        checkpoint.save_state(run / "checkpoints", step, state(step), KEEP)
        saved(step)


# ---- killed --------------------------------------------------------------------------------------------------------


def killed_saver(run: Path, event: int) -> None:
    """Save the steps of a run in a real process, and get a real SIGKILL at this event."""
    notes = os.open(run / "saved", os.O_CREAT | os.O_WRONLY)
    with pytest.MonkeyPatch.context() as patch:
        Kills(patch).aim(event)
        save_all(run, lambda step: os.pwrite(notes, str(step).encode(), 0))


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> int:
    """The number of events of saving them all."""
    with pytest.MonkeyPatch.context() as patch:
        faults = Faults(patch)
        save_all(tmp_path_factory.mktemp("events"), lambda _: None)
    return faults.seen


def seeds(count: int, in_every_run: int) -> list[Any]:
    """Seeds from which events are drawn; most of them only with -m long."""
    return [pytest.param(seed, marks=[pytest.mark.long] if seed >= in_every_run else []) for seed in range(count)]


@pytest.mark.parametrize("seed", seeds(50, 5))
def test_a_kill_while_saving_costs_one_interval_at_most(seed: int, events: int, tmp_path: Path, rows: Rows) -> None:
    event = int(np.random.default_rng(seed).integers(1, events + 1))
    runs.claim_run(tmp_path, SETTINGS, False, binding)
    with rows.count("kills while saving"):
        assert exit_code(spawn(killed_saver, tmp_path, event)) == -signal.SIGKILL
        saved = int((tmp_path / "saved").read_text() or 0)
        runs.claim_run(tmp_path, SETTINGS, False, binding)  # the next start
        assert not list(tmp_path.rglob("*.tmp"))
        newest = checkpoint.load_newest_state(tmp_path / "checkpoints", CPU)
        assert newest is not None or not saved
        if newest is not None:
            assert newest["step"] in (saved, saved + 1)
            assert_same(newest, state(newest["step"]))
        for _, path in checkpoint.states(tmp_path / "checkpoints"):
            checkpoint.load_state(path)


def faulty_command(event: int, note: Path, args: list[str]) -> None:
    """Be `rdpm ARGS`, killed at an event of the disk; else note the number of events."""
    with pytest.MonkeyPatch.context() as patch:
        kills = Kills(patch)
        kills.aim(event)
        try:
            command_line(args, {})
        finally:
            note.write_text(str(kills.seen))


SHORT = ["train.batch=16", "train.steps=4", "train.save_every=1", "train.keep=2", "--device", "cpu"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of four steps."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert exit_code(spawn(faulty_command, -1, run.parent / "events", tokenizer_command(run, *SHORT))) == 0
    return run


@pytest.mark.parametrize("seed", seeds(10, 1))
def test_a_killed_command_ends_as_the_uninterrupted_one(
    seed: int, uninterrupted: Path, tmp_path: Path, rows: Rows
) -> None:
    """The same for everything that a training writes; events are drawn among all of them."""
    most = int((uninterrupted.parent / "events").read_text())
    event = int(np.random.default_rng(seed).integers(1, most + 1))
    args = tokenizer_command(tmp_path, *SHORT)
    with rows.count("kills of a training command, its model after"):
        assert exit_code(spawn(faulty_command, event, tmp_path / "events", args)) == -signal.SIGKILL
        assert exit_code(spawn(command_line, args, {})) == 0
        assert not list(tmp_path.rglob("*.tmp"))
        digests = [checkpoint.load(run / "tokenizer.pt")["digest"] for run in (tmp_path, uninterrupted)]
        assert digests[0] == digests[1]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_the_mode_of_a_file_follows_the_umask(umask: int, mode: int, tmp_path: Path, rows: Rows) -> None:
    before = os.umask(umask)
    try:
        with rows.count("modes by umask"):
            path = checkpoint.save_state(tmp_path, 1, state(1), KEEP)
            assert path.stat().st_mode & 0o777 == mode
    finally:
        os.umask(before)


# ---- a full disk ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A run of four steps on a disk with room, and what is on it at most."""
    run = tmp_path_factory.mktemp("trained") / "run"
    train(tiny_players(small()), small(), run)
    sizes = [path.stat().st_size for path in (run / "checkpoints").glob("*.pt")]
    return run, 3 * max(sizes)  # two that are kept and the one that is written


def small() -> Any:
    return tiny_config(train={"steps": 4, "save_every": 1, "keep": KEEP})


@pytest.mark.parametrize("tenth", range(10))
def test_a_full_disk_is_reported_and_the_run_goes_on_after(
    tenth: int, trained: tuple[Path, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: Rows
) -> None:
    whole, most = trained
    run = tmp_path / "run"
    run.mkdir()
    with rows.count("disk full while training"):
        with monkeypatch.context() as patch:
            Disk(run / "checkpoints", most * tenth // 10 + 100, patch)
            with pytest.raises(RunError, match=r"disk full: .*checkpoints"):
                train(tiny_players(small()), small(), run)
        assert not list((run / "checkpoints").glob(".*"))
        before = checkpoint.load_newest_state(run / "checkpoints", CPU)
        assert (before or {"step": 0})["step"] == tenth * 3 // 10
        train(tiny_players(small()), small(), run)
        assert_same(newest_state(run), newest_state(whole))


# ---- retention -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kilobytes", [4, 9, 14])
def test_samples_on_a_full_disk_are_one_clear_error_and_the_command_goes_on_after(
    kilobytes: int, tiny_tokenizer_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: Rows
) -> None:
    """Full while PNG files, the grid or samples.npz are written."""
    out, generator = tmp_path / "out", save_generator(tmp_path / "generator.pt", tiny_tokenizer_file)
    command = ["sample", "--ckpt", str(generator), "--out", str(out), "--per-class", "1", "--npz", "--gif", "--quiet"]
    with rows.count("samples on a full disk, reported in one line and finished afterwards"):
        with pytest.MonkeyPatch.context() as patch:
            out.mkdir()
            Disk(out, kilobytes << 10, patch)
            assert run(command) == 1
        assert [line.partition(": ")[0] for line in capsys.readouterr().err.splitlines()] == ["rdpm", "hint"]
        assert not list(out.rglob(".*.tmp"))
        assert not (out / "samples.json").exists()
        assert run(command) == 0
        assert (out / "samples.npz").is_file()


def test_no_checkpoint_goes_before_the_new_one_is_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: Rows
) -> None:
    for step in (1, 2):
        checkpoint.save_state(tmp_path, step, state(step), KEEP)
    replace = os.replace

    def damage(source: Path, target: Path) -> None:
        data = bytearray(Path(source).read_bytes())
        data[len(data) // 2] ^= 1
        Path(source).write_bytes(data)
        replace(source, target)

    with rows.count("retention: a new checkpoint that is not what was written costs no older one"):
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", damage)
            with pytest.raises(RunError, match=r"step-000000003\.pt"):
                checkpoint.save_state(tmp_path, 3, state(3), KEEP)
        assert [step for step, _ in checkpoint.states(tmp_path)] == [1, 2]
        checkpoint.save_state(tmp_path, 3, state(3), KEEP)
        assert [step for step, _ in checkpoint.states(tmp_path)] == [2, 3]

"""Two writers of one folder, codes of another tokenizer, secrets of the environment, and the network."""

import os
import random
import shutil
import socket
import sys
import time
from pathlib import Path

import filelock
import offline
import pytest
from helpers import Making, MemoryImages, content
from processes import command_line, exit_code, spawn, tokenizer_command, wait_for
from rows import Rows

from rdpm_cli import engine, files, modelfile
from rdpm_cli.cli.app import run as run_cli
from rdpm_cli.errors import RunError
from rdpm_cli.tokenizer import model

# ---- two writers ---------------------------------------------------------------------------------------------------


def late_writer(folder: Path, args: list[str]) -> None:
    """Be `rdpm ARGS`; what it says and the seconds of CPU it takes go into files."""
    os.dup2(os.open(folder / "said", os.O_WRONLY | os.O_CREAT), 2)
    started = time.process_time()
    sys.argv = ["rdpm", *args]
    from rdpm_cli.cli import main

    try:
        main()
    finally:
        (folder / "seconds").write_text(str(time.process_time() - started))


def holder(folder: Path) -> None:
    """Hold a folder as its writer."""
    with files.only_writer(folder):
        (folder / ".held").touch()
        time.sleep(1000)


@pytest.mark.parametrize("command", ["tokenize", "train-tokenizer"])
def test_a_second_writer_leaves_at_once_and_names_the_first(
    command: str, tiny_tokenizer_file: Path, tmp_path: Path, rows: Rows
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    first = spawn(holder, out)
    wait_for((out / ".held").exists, first)
    args = {
        "tokenize": ["tokenize", "digits", str(out), "--tokenizer", str(tiny_tokenizer_file), "--device", "cpu"],
        "train-tokenizer": tokenizer_command(out, "--device", "cpu"),
    }[command]
    with rows.count("a second writer, refused within 2 s with pid and host of the first"):
        assert exit_code(spawn(late_writer, tmp_path, args)) == 1
        said = (tmp_path / "said").read_text()
        assert f"is being written by pid {first.pid} on {socket.gethostname()}" in said
        seconds = float((tmp_path / "seconds").read_text())
        rows.note(f"second writer of {command}", f"leaves after {seconds:.2f} s of CPU")
        assert seconds < 2
    first.kill()


class NoLock:
    """A lock of a file system that has none."""

    def __init__(self, _: Path) -> None: ...
    def acquire(self, timeout: float) -> None: ...
    def release(self) -> None: ...


@pytest.mark.parametrize("seed", range(5))
def test_two_writers_without_a_lock_leave_a_whole_store(
    seed: int, tiny_tokenizer_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: Rows
) -> None:
    """Two runs take turns as the seed has it; one may fail, and the same command then finishes."""

    def making(name: str) -> Making:
        settings = {"views": 1, "latents": False, "shard_images": 10, "micro_batch": 4}
        return Making(tmp_path / name, MemoryImages(40), tiny_tokenizer_file, **settings)

    making("alone").finish()
    monkeypatch.setattr(filelock, "FileLock", NoLock)
    draw, running = random.Random(seed), [making("codes").run(), making("codes").run()]
    with rows.count("two writers without a lock, a whole store"):
        while running:
            one = draw.choice(running)
            try:
                next(one)
            except (StopIteration, RunError):
                running.remove(one)
        making("codes").finish()
        engine.verify(tmp_path / "codes")
        assert content(tmp_path / "codes") == content(tmp_path / "alone")


# ---- the tokenizer of a store --------------------------------------------------------------------------------------


def test_a_store_with_another_tokenizer_is_not_trained_on(
    digits_codes: Path, tiny_tokenizer_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: Rows
) -> None:
    root = Path(shutil.copytree(digits_codes, tmp_path / "codes"))
    loaded, _ = model.load(tiny_tokenizer_file)
    next(loaded.parameters()).data.add_(1e-3)
    (root / "tokenizer.pt").unlink()
    modelfile.save(root / "tokenizer.pt", model.pack(loaded, class_names=[], provenance={}))
    with rows.count("codes of another tokenizer refused"):
        assert run_cli(["train-gen", str(root), "--recipe", "digits", "--out", str(tmp_path / "run")]) == 3
        assert "was coded by tokenizer" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


# ---- secrets -------------------------------------------------------------------------------------------------------


def test_no_file_holds_what_the_environment_does(tmp_path: Path, rows: Rows) -> None:
    secret = "hf_not-a-real-token-2718281828"
    short = ["train.batch=16", "train.steps=1", "--device", "cpu"]
    with rows.count("no value of the environment in any file of a run"):
        assert exit_code(spawn(command_line, tokenizer_command(tmp_path, *short), {"SOME_TOKEN": secret})) == 0
        written = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert tmp_path / "run.json" in written
        assert not [path for path in written if secret.encode() in path.read_bytes()]


# ---- the network ---------------------------------------------------------------------------------------------------

ELSEWHERE = ("192.0.2.1", 80)  # of the addresses that documentation may use


def connects(path: Path) -> None:
    """Say in a file whether a child process gets out."""
    try:
        socket.create_connection(ELSEWHERE, timeout=1)
    except offline.Refused as error:
        path.write_text(str(error))


def test_the_tests_have_no_network(tmp_path: Path) -> None:
    with socket.socket() as connection, pytest.raises(offline.Refused, match=r"192\.0\.2\.1"):
        connection.connect(ELSEWHERE)
    assert exit_code(spawn(connects, tmp_path / "said")) == 0
    assert "192.0.2.1" in (tmp_path / "said").read_text()


def test_absent_weights_are_not_fetched_unless_asked(
    no_weights: Path, capsys: pytest.CaptureFixture[str], rows: Rows
) -> None:
    command = ["eval", "fid", "digits:heldout", "--ref", "digits:train", "--resolution", "16", "--device", "cpu"]
    with rows.count("no network without --download"):
        assert run_cli(command) == 3
        assert "--download" in capsys.readouterr().err

"""Two writers of one folder, codes of another tokenizer, secrets of the environment."""

import random
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from processes import command_line, exit_code, generator_command, spawn, tokenizer_command, wait_for
from rows import Rows
from stores import Making, MemoryImages, content

from rdpm_cli import checkpoint, files
from rdpm_cli.cli.app import run as run_cli
from rdpm_cli.codes import store
from rdpm_cli.errors import RunError
from rdpm_cli.tokenizer import model


def holder(folder: Path) -> None:
    """Hold a folder for writing."""
    with files.only_writer(folder):
        (folder / ".held").touch()
        time.sleep(1000)


@pytest.mark.parametrize("command", ["tokenize", "train-tokenizer", "train-gen"])
def test_a_second_writer_is_refused_and_names_the_first(
    command: str, tiny_tokenizer_file: Path, digits_codes: Path, tmp_path: Path, rows: Rows
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    first = spawn(holder, out)
    wait_for((out / ".held").exists, first)
    args = {
        "tokenize": ["tokenize", "digits", str(out), "--tokenizer", str(tiny_tokenizer_file), "--device", "cpu"],
        "train-tokenizer": tokenizer_command(out, "--device", "cpu"),
        "train-gen": generator_command(digits_codes, out),
    }[command]
    with rows.count("a second writer, refused with pid and host of the first"):
        module = [sys.executable, "-m", "rdpm_cli", *args]
        done = subprocess.run(module, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 1, done.stderr
        assert f"pid {first.pid} on {socket.gethostname()}" in done.stderr
        assert [path.name for path in out.iterdir() if not path.name.startswith(".")] == []
    first.kill()


@pytest.mark.parametrize("seed", range(5))
def test_two_writers_without_a_lock_leave_a_whole_store(
    seed: int, tiny_tokenizer_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: Rows
) -> None:
    """Two runs take turns in a random order. One may fail; the same command then finishes the store."""

    def making(name: str) -> Making:
        settings = {"views": 1, "latents": False, "shard_images": 10, "micro_batch": 4}
        return Making(tmp_path / name, MemoryImages(40), tiny_tokenizer_file, **settings)

    making("single").finish()
    no_lock = SimpleNamespace(acquire=lambda timeout: None, release=lambda: None)
    monkeypatch.setattr(files, "FileLock", lambda _: no_lock)
    draw, running = random.Random(seed), [making("codes").run(), making("codes").run()]
    with rows.count("two writers without a lock, a whole store"):
        while running:
            one = draw.choice(running)
            try:
                next(one)
            except (StopIteration, RunError):
                running.remove(one)
        making("codes").finish()
        store.verify(tmp_path / "codes")
        assert content(tmp_path / "codes") == content(tmp_path / "single")


def test_a_store_with_another_tokenizer_is_not_trained_on(
    digits_codes: Path, tiny_tokenizer_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: Rows
) -> None:
    root = Path(shutil.copytree(digits_codes, tmp_path / "codes"))
    loaded, _ = model.load(tiny_tokenizer_file)
    next(loaded.parameters()).data.add_(1e-3)
    (root / "tokenizer.pt").unlink()
    checkpoint.save(root / "tokenizer.pt", model.pack(loaded, class_names=[], provenance={}))
    with rows.count("codes of another tokenizer refused"):
        assert run_cli(["train-gen", str(root), "--recipe", "digits", "--out", str(tmp_path / "run")]) == 3
        assert str(root) in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


def test_no_file_of_a_run_holds_a_value_of_the_environment(tmp_path: Path, rows: Rows) -> None:
    secret = "hf_not-a-real-token-2718281828"
    args = tokenizer_command(tmp_path, "train.batch=16", "train.steps=1", "--device", "cpu")
    with rows.count("no value of the environment in any file of a run"):
        assert exit_code(spawn(command_line, args, {"SOME_TOKEN": secret})) == 0
        paths = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert tmp_path / "run.json" in paths
        assert not [path for path in paths if secret.encode() in path.read_bytes()]

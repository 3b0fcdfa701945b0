"""Two writers of one folder, codes of another tokenizer, secrets of the environment, and the network."""

import random
import resource
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import filelock
import offline
import pytest
from helpers import Making, MemoryImages, content
from processes import command_line, exit_code, generator_command, spawn, tokenizer_command, wait_for
from rows import Rows

from rdpm_cli import engine, files, modelfile
from rdpm_cli.cli.app import run as run_cli
from rdpm_cli.errors import RunError
from rdpm_cli.tokenizer import model

# ---- two writers ---------------------------------------------------------------------------------------------------


LATE = """
import sys
from rdpm_cli.cli.app import run
code = run(sys.argv[1:])
sys.exit(99 if "torch" in sys.modules else code)
"""


def holder(folder: Path) -> None:
    """Hold a folder as its writer."""
    with files.only_writer(folder):
        (folder / ".held").touch()
        time.sleep(1000)


@pytest.mark.parametrize("command", ["tokenize", "train-tokenizer", "train-gen"])
def test_a_second_writer_leaves_at_once_and_names_the_first(
    command: str, tiny_tokenizer_file: Path, digits_codes: Path, tmp_path: Path, rows: Rows
) -> None:
    """The whole command, from the start of its interpreter, which does not get as far as importing torch."""
    out = tmp_path / "out"
    out.mkdir()
    first = spawn(holder, out)
    wait_for((out / ".held").exists, first)
    args = {
        "tokenize": ["tokenize", "digits", str(out), "--tokenizer", str(tiny_tokenizer_file), "--device", "cpu"],
        "train-tokenizer": tokenizer_command(out, "--device", "cpu"),
        "train-gen": generator_command(digits_codes, out),
    }[command]
    with rows.count("a second writer, refused within 2 s with pid and host of the first"):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", LATE, *args], capture_output=True, text=True, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 1, done.stderr
        assert f"is being written by pid {first.pid} on {socket.gethostname()}" in done.stderr
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
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

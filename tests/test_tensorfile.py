"""A file of tensors comes back; anything else is Unreadable, whatever the unpickler stumbles over, and runs nothing."""

import os
import pickle
import random
import subprocess
import sys
from collections import Counter, OrderedDict
from pathlib import Path

import pytest
import torch
from helpers import assert_same
from injection import Disk
from processes import touch

from rdpm_cli import tensorfile
from rdpm_cli.cli.app import run
from rdpm_cli.errors import RunError


def test_tensors_come_back(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(3), "b": {"c": 1.5}}, tmp_path / "file.pt")
    found = tensorfile.read(tmp_path / "file.pt")
    assert torch.equal(found["a"], torch.arange(3))
    assert found["b"] == {"c": 1.5}


def test_whatever_is_no_file_of_tensors_is_unreadable(tmp_path: Path) -> None:
    draw, path = random.Random(0), tmp_path / "file.pt"
    contents = [b"", b"hello world, this is text", b"access denied", bytes(range(256))]
    contents += [bytes(draw.choice(range(32, 127)) for _ in range(60)) for _ in range(300)]
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(tensorfile.Unreadable):
            tensorfile.read(path)


def test_a_truncated_file_is_unreadable(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(1000)}, tmp_path / "whole.pt")
    content = (tmp_path / "whole.pt").read_bytes()
    for size in range(1, len(content), 97):
        (tmp_path / "part.pt").write_bytes(content[:size])
        with pytest.raises(tensorfile.Unreadable):
            tensorfile.read(tmp_path / "part.pt")


def test_what_is_said_of_code_in_a_file_is_no_advice_to_run_it(tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, ("true",)

    torch.save({"a": Runs()}, tmp_path / "a.pt")
    with pytest.raises(tensorfile.Unreadable) as caught:
        tensorfile.read(tmp_path / "a.pt")
    assert tensorfile.is_refused(caught.value)
    assert tensorfile.reason(caught.value) == "it names posix.system beside tensors, and no code of a file is run"
    (tmp_path / "b.pt").write_bytes(b"text")
    with pytest.raises(tensorfile.Unreadable) as caught:
        tensorfile.read(tmp_path / "b.pt")
    assert "weights_only" not in tensorfile.reason(caught.value)
    assert not tensorfile.is_refused(caught.value)


class Trap:
    """Its pickle would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return touch, (str(self.path),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_no_pickled_code_runs(tmp_path: Path) -> None:
    for name, write in {"torch.pt": torch.save, "plain.pt": lambda x, f: f.write_bytes(pickle.dumps(x))}.items():
        write({"a": Trap(tmp_path / "made")}, tmp_path / name)
        with pytest.raises(tensorfile.Unreadable):
            tensorfile.read(tmp_path / name)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_the_tensors_of_a_file_that_holds_more_are_copied_and_nothing_runs(zipped: bool, tmp_path: Path) -> None:
    weights = {"a": torch.randn(3, 4), "b": torch.arange(5), "c": torch.nn.Parameter(torch.ones(2).bfloat16())}
    more = {"trap": Trap(tmp_path / "made"), "path": tmp_path, "lr": 1e-3, "steps": [1, {2}], "counts": Counter("ab")}
    content = {"state_dict": OrderedDict(weights), "callbacks": {Trap: more}, **more}
    torch.save(content, tmp_path / "old.ckpt", _use_new_zipfile_serialization=zipped)
    module = [sys.executable, "-m", "rdpm_cli.tensorfile", str(tmp_path / "old.ckpt"), str(tmp_path / "copy.pt")]
    subprocess.run(module, check=True, timeout=120)
    found = tensorfile.read(tmp_path / "copy.pt")
    assert list(found) == ["state_dict"]
    assert_same(found["state_dict"], {name: value.detach() for name, value in weights.items()})
    assert not (tmp_path / "made").exists()


def test_a_copy_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": torch.zeros(10_000)}, tmp_path / "file.pt")
    (tmp_path / "out").mkdir()
    with monkeypatch.context() as patch:
        Disk(tmp_path / "out", 9_000, patch)
        with pytest.raises(RunError, match=r"disk full: .*out needs 0.04 MB more"):
            tensorfile.copy_tensors(tmp_path / "file.pt", tmp_path / "out" / "copy.pt")
    assert not list((tmp_path / "out").iterdir())
    tensorfile.copy_tensors(tmp_path / "file.pt", tmp_path / "out" / "copy.pt")
    tensorfile.check_whole(tmp_path / "out" / "copy.pt")


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [([], 2, "two paths"), (["text.pt", "c.pt"], 3, "cannot be read as weights"), (["no.pt", "c.pt"], 3, "not exist")],
)
def test_what_cannot_be_copied_is_one_clear_error(
    given: list[str], code: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "text.pt").write_text("hello world, this is no checkpoint")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tensorfile", *given])
    with pytest.raises(SystemExit) as left:
        tensorfile.main()
    lines = capsys.readouterr().err.splitlines()
    assert left.value.code == code
    assert lines[0].startswith("rdpm: error: ")
    assert said in lines[0]
    assert lines[-1].startswith("hint: ")
    assert [path.name for path in tmp_path.iterdir()] == ["text.pt"]


def test_no_file_of_tensors_is_unreadable_there_too(tmp_path: Path) -> None:
    (tmp_path / "file.pt").write_bytes(b"hello world, this is text")
    with pytest.raises(tensorfile.Unreadable):
        tensorfile.read_tensors_alone(tmp_path / "file.pt")


@pytest.mark.parametrize(
    "command",
    [
        "inspect {file}",
        "train-tokenizer digits --recipe digits --from-weights {file} --out {out}",
        "train-tokenizer digits --recipe digits --out {out} loss.perceptual=lpips loss.perceptual_weights={file}",
        "eval recon digits:heldout --tokenizer {file}",
        "eval fid digits:heldout --ref digits:train --resolution 16 --weights {file}",
        "sample --ckpt {file} --out {out}",
    ],
)
def test_text_given_as_weights_is_one_clear_error(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "text.pt", tmp_path / "out"
    file.write_text("hello world, this is no checkpoint")
    assert run(command.format(file=file, out=out).split()) == 3
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in lines if not line.startswith("looked")][:1] == ["rdpm"]
    assert str(file) in lines[0]
    assert not out.exists()

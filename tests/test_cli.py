"""The command line: help, exit codes, the two lines of every error, and a stdout that carries only the answer."""

import errno
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from generators import save_generator
from PIL import Image

from rdpm_cli import __version__, checkpoint
from rdpm_cli.cli import app
from rdpm_cli.cli.app import run
from rdpm_cli.device import one_thread
from rdpm_cli.engine import look
from rdpm_cli.runs import Result
from rdpm_cli.tokenizer import model

COMMANDS = [
    "train-tokenizer", "tokenize", "reconstruct", "train-gen", "sample", "tune-sampling", "eval fid", "eval sfid",
    "eval is", "eval pr", "eval kid", "eval all", "eval reference", "eval recon", "eval judge", "demo", "inspect",
    "verify", "doctor", "eval report",
]  # fmt: skip


@pytest.fixture(scope="module")
def generator_file(tiny_tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained generator of three classes: c, g and n."""
    return save_generator(tmp_path_factory.mktemp("generator") / "generator.pt", tiny_tokenizer_file, names="cgn")


@pytest.fixture(scope="module")
def other_tokenizer(tiny_tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same architecture with other weights."""
    tokenizer, _ = model.load(tiny_tokenizer_file)
    with torch.no_grad():
        for parameter in tokenizer.parameters():
            parameter.add_(0.1)
    path = tmp_path_factory.mktemp("other") / "tokenizer.pt"
    checkpoint.save(path, model.pack(tokenizer, class_names=[], provenance={}))
    return path


@pytest.fixture
def paths(
    tmp_path: Path,
    image_folder: Path,
    digits_codes: Path,
    tiny_tokenizer_file: Path,
    other_tokenizer: Path,
    generator_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, Path]:
    """The names in the commands below. The current folder is empty, and no weights or tokenizer are set."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in ("RDPM_TOKENIZER", "RDPM_WEIGHTS", "RDPM_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    (tmp_path / "empty").mkdir()
    broken = tmp_path / "broken" / "a"
    broken.mkdir(parents=True)
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(broken / "fine.png")
    (broken / "cut.png").write_bytes((broken / "fine.png").read_bytes()[:40])
    (tmp_path / "text.pt").write_text("not a checkpoint")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    return {
        "images": image_folder, "codes": digits_codes, "tokenizer": tiny_tokenizer_file, "generator": generator_file,
        "other": other_tokenizer, "missing": tmp_path / "missing", "empty": tmp_path / "empty",
        "broken": tmp_path / "broken", "text": tmp_path / "text.pt", "full": tmp_path / "full", "out": tmp_path / "out",
    }  # fmt: skip


def split(command: str, paths: dict[str, Path]) -> list[str]:
    return [word.format_map(paths) for word in command.split(" ")]


# ---- help ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_every_command_shows_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*command.split(), "--help"]) == 0
    shown = capsys.readouterr()
    assert f"Example: rdpm {command} " in shown.out
    assert not shown.err


def test_the_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(command.split()[0] in shown for command in COMMANDS)
    assert "Exit codes" in shown


@pytest.mark.parametrize("args", [[], ["eval"]], ids=str)
def test_no_arguments_show_the_help(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    run(args)
    shown = capsys.readouterr()
    assert "Usage:" in shown.out + shown.err
    assert "rdpm: error:" not in shown.err


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"rdpm {__version__}\n"


def test_the_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "rdpm_cli", "no-such"], check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("rdpm: error: ")
    assert not done.stdout


# ---- errors --------------------------------------------------------------------------------------------------------

# case: (command, exit code, token in the error, token in the hint)
FAILURES: dict[str, tuple[str, int, str, str]] = {
    "missing images of train-tokenizer":
        ("train-tokenizer {missing} --recipe digits --out {out}", 2, "missing", "folder"),
    "missing images of tokenize": ("tokenize {missing} {out} --tokenizer {tokenizer}", 2, "missing", "folder"),
    "missing images of reconstruct": ("reconstruct {missing} {out} --tokenizer {tokenizer}", 2, "missing", "folder"),
    "missing images of eval recon": ("eval recon {missing} --tokenizer {tokenizer}", 2, "missing", "folder"),
    "missing codes": ("train-gen {missing} --recipe digits --out {out}", 2, "missing", "rdpm tokenize"),
    "missing recipe or path": ("inspect no-such-thing", 2, "no-such-thing", "digits"),
    "empty folder of train-tokenizer": ("train-tokenizer {empty} --recipe digits --out {out}", 3, "empty", "folder"),
    "empty folder of tokenize": ("tokenize {empty} {out} --tokenizer {tokenizer}", 3, "empty", "folder"),
    "empty folder of train-gen": ("train-gen {empty} --recipe digits --out {out}", 3, "", "rdpm tokenize"),
    "empty folder of inspect": ("inspect {empty}", 3, "empty", "folder"),
    "unreadable image of tokenize": ("tokenize {broken} {out} --tokenizer {tokenizer}", 3, "a/cut.png", ""),
    "unreadable image of reconstruct": ("reconstruct {broken} {out} --tokenizer {tokenizer}", 3, "a/cut.png", ""),
    "images of train-gen": ("train-gen {images} --recipe digits --out {out}", 3, "", "rdpm tokenize"),
    "tokenizer for a generator": ("sample --ckpt {tokenizer} --out {out}", 3, "generator", "rdpm train-gen"),
    "generator for a tokenizer":
        ("tokenize {images} {out} --tokenizer {generator}", 3, "tokenizer", "rdpm train-tokenizer"),
    "tokenizer for a judge":
        ("eval fid {images} --ref {images} --extractor {tokenizer}", 3, "judge", "rdpm eval judge"),
    "text for a checkpoint": ("sample --ckpt {text} --out {out}", 3, "text.pt", "rdpm train-gen"),
    "absent checkpoint": ("sample --ckpt {missing} --out {out}", 3, "missing", "rdpm train-gen"),
    "store of another tokenizer": ("reconstruct {codes} {out} --tokenizer {other}", 3, "codes", "rdpm tokenize"),
    "absent tokenizer": ("tokenize {images} {out}", 3, "tokenizer", "rdpm train-tokenizer"),
    "absent tokenizer of eval": ("eval recon {images}", 3, "tokenizer", "rdpm train-tokenizer"),
    "absent tokenizer named": ("tokenize {images} {out} --tokenizer {missing}", 3, "missing", "train-tokenizer"),
    "unknown recipe key of train-tokenizer":
        ("train-tokenizer digits --recipe digits --out {out} train.stepz=3", 2, "'train.stepz'", "'train.steps'"),
    "unknown recipe key of train-gen":
        ("train-gen {codes} --recipe digits --out {out} network.widht=3", 2, "'network.widht'", "'network.width'"),
    "unknown recipe key of demo": ("demo --out {out} generator.train.stepz=3", 2, "stepz", "generator.train.steps"),
    "override without value": ("train-gen {codes} --recipe digits --out {out} train.steps", 2, "'train.steps'", "="),
    "value that does not fit": ("train-gen {codes} --recipe digits --out {out} train.steps=-3", 2, "train.steps", ""),
    "unknown recipe": ("train-gen {codes} --recipe digitz --out {out}", 2, "'digitz'", "'digits'"),
    "unknown command": ("tokenise {images} {out}", 2, "tokenise", "rdpm --help"),
    "unknown option": ("tokenize {images} {out} --no-such", 2, "--no-such", "rdpm tokenize --help"),
    "missing argument": ("tokenize {images}", 2, "OUT", "rdpm tokenize --help"),
    "missing option": ("sample", 2, "--ckpt", "rdpm sample --help"),
    "negative seed": ("sample --ckpt {generator} --seed -1", 2, "--seed", "rdpm sample --help"),
    "words for a number": ("sample --ckpt {generator} --per-class many", 2, "--per-class", "rdpm sample --help"),
    "unknown schedule": ("sample --ckpt {generator} --cfg-schedule cosinus", 2, "cfg_schedule", "cosinus"),
    "unknown preset": ("sample --ckpt {generator} --preset rawest", 2, "rawest", "cfg-linear"),
    "a step before the first": ("sample --ckpt {generator} --init {images}#1 --from-step 0", 2, "0", ""),
    "unknown device": ("sample --ckpt {generator} --out {out}/none --device mps:9", 2, "mps:9", "cpu"),
    "two spreads": ("eval fid {images} --ref {images} --ci --subset 9", 2, "--ci", ""),
    "an option of no family": ("sample --ckpt {generator} taus=2", 2, "taus", "tau"),
    "a word for an option": ("sample --ckpt {generator} tau", 2, "'tau'", "="),
    "no samples kept": ("sample --ckpt {generator} --no-png", 2, "--no-png", "--npz"),
    "an impossible shard": ("sample --ckpt {generator} --shard 3/2", 2, "3/2", "1/4"),
    "only a mask": ("sample --ckpt {generator} --mask {text}", 2, "--mask", "--init"),
    "only an image": ("sample --ckpt {generator} --init {text}", 2, "--init", "--mask"),
    "text for an image": ("sample --ckpt {generator} --init {text} --from-step 2", 2, "text.pt", "SOURCE#N"),
    "an item beyond": ("sample --ckpt {generator} --init {images}#36 --from-step 2", 2, "36", "SOURCE#N"),
    "a step beyond": ("sample --ckpt {generator} --init {images}#1 --from-step 5", 2, "5", "4"),
    "rejection without a judge": ("sample --ckpt {generator} --reject keep=0.5", 2, "--reject", "--judge"),
    "an odd rate": ("sample --ckpt {generator} --reject keep=0.4 --judge {text}", 2, "--reject", "--judge"),
    "text for a judge":
        ("sample --ckpt {generator} --reject keep=0.5 --judge {text}", 3, "text.pt", "rdpm eval judge"),
    "missing Inception weights": (
        "eval fid {images} --ref {images}", 3, "weights-inception-2015-12-05-6726825d.pth",
        "weights-inception-2015-12-05-6726825d.pth",
    ),
    "missing images before the weights": ("eval fid {missing}", 2, "missing", "--ckpt"),
    "two targets": ("eval fid {images} {codes}", 2, "TARGET", "--ckpt"),
    "classes of a target": ("eval fid {images} --classes 1", 2, "--classes", "--ckpt"),
    "an option of a target": ("eval fid {images} tau=2", 2, "tau=2", "--ckpt"),
    "unknown class name": ("sample --ckpt {generator} --out {out} --classes name:x", 2, "'x'", ""),
    "class out of range": ("sample --ckpt {generator} --out {out} --classes 0,3", 2, "3", "0..2"),
    "tau of zero": ("sample --ckpt {generator} --out {out} --tau 0", 2, "tau", ""),
    "skipping every step": ("sample --ckpt {generator} --out {out} --skip-steps 4", 2, "4", ""),
    "samples into a full folder": ("sample --ckpt {generator} --out {full}", 2, "full", "another"),
    "codes into a full folder": ("tokenize {images} {full} --tokenizer {tokenizer}", 2, "full", "folder"),
    "run into a full folder": ("train-gen {codes} --recipe digits --out {full}", 2, "full", "another"),
    "pictures into a file": ("reconstruct {images} {text} --tokenizer {tokenizer}", 2, "text.pt", "folder"),
    "unknown part of digits": ("inspect digits:test", 2, "'test'", "digits:heldout"),
    "several processes on one device": ("tokenize {images} {out} --gpus 2 --device cuda:1", 2, "cuda:1", "--device"),
}  # fmt: skip


@pytest.mark.parametrize("case", FAILURES)
def test_every_error_is_two_lines_and_an_exit_code(
    case: str, paths: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    command, code, error, hint = FAILURES[case]
    with one_thread():
        assert run(split(command, paths)) == code
    shown = capsys.readouterr()
    assert not shown.out
    lines = shown.err.splitlines()
    assert len(lines) == 2, shown.err
    assert lines[0].startswith("rdpm: error: ")
    assert error in lines[0]
    assert lines[1].startswith("hint: ")
    assert hint in lines[1]
    results = [path for path in paths["out"].rglob("*") if path.suffix in {".npy", ".png"}]
    assert not results


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_an_absent_gpu_is_a_usage_error(paths: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(split("sample --ckpt {generator} --out {out} --device cuda", paths)) == 2
    shown = capsys.readouterr()
    assert "--device cuda" in shown.err
    assert not shown.out


def test_a_store_whose_own_tokenizer_was_swapped_is_refused(
    paths: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shutil.copytree(paths["codes"], tmp_path / "codes")
    shutil.copy(paths["other"], tmp_path / "codes" / "tokenizer.pt")
    assert run(["train-gen", str(tmp_path / "codes"), "--recipe", "digits", "--out", str(paths["out"])]) == 3
    assert str(tmp_path / "codes") in capsys.readouterr().err


BUGS = [KeyError("k"), TypeError("t"), AssertionError("a"), RuntimeError("shapes differ"), OSError(errno.EIO, "I/O")]


@pytest.mark.parametrize("bug", BUGS, ids=repr)
def test_a_bug_keeps_its_traceback(
    bug: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(look, "inspect", raising(bug))
    with pytest.raises(type(bug)):
        run(["inspect", "digits"])
    assert "rdpm: error" not in capsys.readouterr().err


def raising(error: BaseException) -> Any:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "No space left on device", "/data/codes"), 1, "/data/codes"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "disk full"),
        (PermissionError(errno.EACCES, "Permission denied", "/data/codes"), 1, "/data/codes"),
        (MemoryError(), 1, "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"), 1, "CUDA out of memory."),
    ],
    ids=repr,
)
def test_failures_of_the_machine_are_two_lines(
    error: BaseException, code: int, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(look, "inspect", raising(error))
    assert run(["inspect", "digits"]) == code
    shown = capsys.readouterr()
    lines = shown.err.splitlines()
    assert [line.partition(": ")[0] for line in lines] == ["rdpm", "hint"]
    assert text in lines[0]
    assert not shown.out


def test_debugging_adds_the_traceback_to_the_two_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RDPM_DEBUG", "1")
    assert run(["inspect", "no-such-thing"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback")
    assert [line.partition(": ")[0] for line in lines[-2:]] == ["rdpm", "hint"]


# ---- the answer ----------------------------------------------------------------------------------------------------

ANSWERS = {
    "inspect digits": {"name", "parameters", "recipe", "digest"},
    "inspect {tokenizer}": {"parameters", "digest", "config"},
    "inspect {generator}": {"parameters", "digest", "tokenizer", "class_names"},
    "inspect {codes}": {"digest", "tokenizer", "views", "data"},
    "inspect {images}": {"images", "classes", "digest"},
    "tokenize {images} {out} --tokenizer {tokenizer} --views 2": {"store", "digest", "images", "views"},
    "reconstruct {images} {out} --tokenizer {tokenizer} --limit 5": {"folder", "grid", "mse", "psnr", "ssim"},
    "reconstruct {codes} {out} --limit 5": {"folder", "grid", "n"},
    "eval recon {images} --tokenizer {tokenizer} --limit 5 --seeds 2": {"mse", "psnr", "ssim", "spread_over_seeds"},
    "sample --ckpt {generator} --out {out} --classes 0,2 --per-class 2": {"folder", "samples", "checkpoint", "seed"},
}


@pytest.mark.parametrize("command", ANSWERS)
def test_stdout_carries_only_json(command: str, paths: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    with one_thread():
        assert run([*split(command, paths), "--json"]) == 0
    shown = capsys.readouterr()
    answer = json.loads(shown.out)
    assert ANSWERS[command] <= set(answer)
    assert "error" not in shown.err


@pytest.mark.parametrize("command", ["inspect {codes}", "eval recon {images} --tokenizer {tokenizer} --limit 5"])
def test_text_shows_what_json_holds(command: str, paths: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*split(command, paths), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert run(split(command, paths)) == 0
    shown = capsys.readouterr().out.splitlines()
    names = {line.split()[0] for line in shown if line.startswith("  ")}
    expected = {name for name, value in answer.items() if value not in (None, []) and not isinstance(value, dict)}
    assert expected <= names


def test_quiet_says_nothing_on_stderr(paths: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    command = split("eval recon {images} --tokenizer {tokenizer} --limit 5", paths)
    assert run(command) == 0
    assert "reconstruct" in capsys.readouterr().err  # progress
    assert run([*command, "--quiet"]) == 0
    shown = capsys.readouterr()
    assert not shown.err
    assert "psnr" in shown.out


def test_inspect_counts_the_parameters_of_a_paper_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", "imagenet256-d12", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["parameters"] == pytest.approx(133e6, rel=0.01)


@pytest.mark.parametrize("origin", ["option", "environment", "current folder"])
def test_the_tokenizer_is_looked_up(
    origin: str, paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """--tokenizer, else $RDPM_TOKENIZER, else ./tokenizer.pt: each hides the next."""
    expected = paths["tokenizer"]
    shutil.copy(expected if origin == "current folder" else paths["other"], "tokenizer.pt")
    if origin != "current folder":
        monkeypatch.setenv("RDPM_TOKENIZER", str(expected if origin == "environment" else paths["other"]))
    extra = ["--tokenizer", str(expected)] if origin == "option" else []
    assert run(["tokenize", str(paths["images"]), str(paths["out"]), "--json", *extra]) == 0
    assert json.loads(capsys.readouterr().out)["tokenizer"] == checkpoint.load(expected)["digest"]


# ---- several processes ---------------------------------------------------------------------------------------------


def test_gpus_hands_the_command_over_and_its_exit_code_back(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def launch(*args: Any) -> int:
        calls.append(args)
        return 75

    monkeypatch.setattr("rdpm_cli.distributed.launch", launch)
    assert run(["tokenize", "x", "out", "--gpus", "3", "--device", "cpu"]) == 75
    assert calls == [(3, "cpu", ["tokenize", "x", "out", "--gpus", "3", "--device", "cpu"])]
    monkeypatch.setenv("RDPM_LAUNCHER", "1")
    assert run(["tokenize", "x", "out", "--gpus", "3", "--device", "cpu"]) == 3, "a started process does the work"
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("command", "rank", "lines"),
    [("inspect no-such", "0", 2), ("inspect no-such", "1", 0), ("verify {text}", "0", 2), ("verify {text}", "1", 2)],
)
def test_usage_errors_of_several_processes_come_once(
    command: str, rank: str, lines: int, paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("RANK", rank)
    assert run(split(command, paths)) in (2, 3)
    assert len(capsys.readouterr().err.splitlines()) == lines


def test_only_the_first_process_prints_the_result(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        app.show(Result("title", {"rank": rank}), as_json=True)
    assert json.loads(capsys.readouterr().out) == {"rank": "0"}


# ---- the printed result --------------------------------------------------------------------------------------------

RESULT = Result("title", {"a": 0.123456, "b": {"c": [1, 2]}, "d": None, "e": [], "fid": None,
                          "not_computed": {"fid": "weights absent"}}, "rdpm next")  # fmt: skip


def test_a_result_is_aligned_lines(capsys: pytest.CaptureFixture[str]) -> None:
    app.show(RESULT, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "title"
    assert [line.split() for line in lines[1:3]] == [["a", "0.1235"], ["b.c", "1,", "2"]]
    assert lines[3].split()[0] == "fid"
    assert lines[3].endswith("weights absent")
    assert lines[4:] == ["next: rdpm next"]


def test_a_terminal_gets_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "100")
    app.show(Result("title", {"list": "[bold]x[/bold]"}), as_json=False)
    assert "list" in terminal.getvalue()
    assert "[bold]x[/bold]" in terminal.getvalue()

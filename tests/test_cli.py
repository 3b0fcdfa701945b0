"""The command line: help, exit codes, the two lines of every error, and a stdout that carries only the answer."""

import errno
import json
import os
import pwd
import shlex
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
from processes import torchrun

from rdpm_cli import __version__, checkpoint
from rdpm_cli.cli import app
from rdpm_cli.cli.app import run
from rdpm_cli.distributed import one_thread
from rdpm_cli.engine import look
from rdpm_cli.runs import Result
from rdpm_cli.tokenizer import model


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


@pytest.mark.parametrize("args", [[], ["eval"], ["--help"]], ids=str)
def test_the_help_is_no_error(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(args) == (0 if "--help" in args else 2)
    shown = capsys.readouterr()
    assert "Usage:" in shown.out + shown.err
    assert "rdpm: error:" not in shown.err


def test_the_module_is_the_command_and_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"rdpm {__version__}\n"
    done = subprocess.run([sys.executable, "-m", "rdpm_cli", "no-such"], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("rdpm: error: ")


# (command, exit code, token in the error)
FAILURES: list[tuple[str, int, str]] = [
    ("train-tokenizer {missing} --recipe digits --out {out}", 2, "missing"),
    ("tokenize {missing} {out} --tokenizer {tokenizer}", 2, "missing"),
    ("train-gen {missing} --recipe digits --out {out}", 2, "missing"),
    ("train-tokenizer {empty} --recipe digits --out {out}", 3, "empty"),
    ("train-gen {empty} --recipe digits --out {out}", 3, "empty"),
    ("tokenize {broken} {out} --tokenizer {tokenizer}", 3, "a/cut.png"),
    ("train-gen {images} --recipe digits --out {out}", 3, "images"),
    ("sample --ckpt {tokenizer} --out {out}", 3, "generator"),
    ("tokenize {images} {out} --tokenizer {generator}", 3, "tokenizer"),
    ("eval fid {images} --ref {images} --extractor {tokenizer}", 3, "judge"),
    ("sample --ckpt {text} --out {out}", 3, "text.pt"),
    ("reconstruct {codes} {out} --tokenizer {other}", 3, "codes"),
    ("tokenize {images} {out}", 3, "tokenizer"),
    ("tokenize {images} {out} --tokenizer {missing}", 3, "missing"),
    ("train-gen {codes} --recipe digits --out {out} network.widht=3", 2, "network.widht'"),
    ("demo --out {out} generator.train.stepz=3", 2, "stepz"),
    ("train-gen {codes} --recipe digitz --out {out}", 2, "'digitz'"),
    ("tokenise {images} {out}", 2, "tokenise"),
    ("tokenize {images} {out} --no-such", 2, "--no-such"),
    ("tokenize {images}", 2, "OUT"),
    ("sample", 2, "--ckpt"),
    ("sample --ckpt {generator} --seed -1", 2, "--seed"),
    ("sample --ckpt {generator} --cfg-schedule cosinus", 2, "cfg_schedule"),
    ("sample --ckpt {generator} --preset rawest", 2, "rawest"),
    ("sample --ckpt {generator} --out {out}/none --device mps:9", 2, "mps:9"),
    ("sample --ckpt {generator} taus=2", 2, "taus"),
    ("sample --ckpt {generator} tau", 2, "'tau'"),
    ("sample --ckpt {generator} --no-png", 2, "--no-png"),
    ("sample --ckpt {generator} --shard 3/2", 2, "3/2"),
    ("sample --ckpt {generator} --mask {text}", 2, "--mask"),
    ("sample --ckpt {generator} --init {text}", 2, "--init"),
    ("sample --ckpt {generator} --init {text} --from-step 2", 3, "text.pt"),
    ("sample --ckpt {generator} --init {images}#36 --from-step 2", 2, "36"),
    ("sample --ckpt {generator} --reject keep=0.5", 2, "--reject"),
    ("sample --ckpt {generator} --reject keep=0.4 --judge {generator}", 2, "--reject"),
    ("sample --ckpt {generator} --out {out} --classes name:x", 2, "name:x"),
    ("sample --ckpt {generator} --out {out} --classes 0,3", 2, "3"),
    ("sample --ckpt {generator} --out {out} --tau 0", 2, "tau"),
    ("sample --ckpt {generator} --out {out} --skip-steps 4", 2, "4"),
    ("sample --ckpt {generator} --out {full}", 2, "full"),
    ("tokenize {images} {full} --tokenizer {tokenizer}", 2, "full"),
    ("train-gen {codes} --recipe digits --out {full}", 2, "full"),
    ("eval fid {images} --ref {images}", 3, "weights-inception-2015-12-05-6726825d.pth"),
    ("eval fid {images} --ref {images} --ci --subset 9", 2, "--ci"),
    ("eval fid {images} {codes}", 2, "TARGET"),
    ("eval fid {images} --classes 1", 2, "--classes"),
    ("eval fid {images} tau=2", 2, "tau=2"),
    ("inspect digits:test", 2, "'test'"),
    ("tokenize {images} {out} --gpus 2 --device cuda:1", 2, "cuda:1"),
]


@pytest.mark.parametrize(("command", "code", "token"), FAILURES, ids=[row[0] for row in FAILURES])
def test_every_error_is_two_lines_and_an_exit_code(
    command: str, code: int, token: str, paths: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with one_thread():
        assert run(split(command, paths)) == code
    shown = capsys.readouterr()
    assert not shown.out
    lines = shown.err.splitlines()
    assert [line.partition(": ")[0] for line in lines] == ["rdpm", "hint"], shown.err
    assert token in lines[0]
    assert not [path for path in paths["out"].rglob("*") if path.suffix in {".npy", ".png"}]


def test_a_store_whose_own_tokenizer_was_swapped_is_refused(
    paths: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shutil.copytree(paths["codes"], tmp_path / "codes")
    shutil.copy(paths["other"], tmp_path / "codes" / "tokenizer.pt")
    assert run(["train-gen", str(tmp_path / "codes"), "--recipe", "digits", "--out", str(paths["out"])]) == 3
    assert str(tmp_path / "codes") in capsys.readouterr().err


@pytest.mark.parametrize("bug", [KeyError("k"), RuntimeError("shapes differ"), OSError(errno.EIO, "I/O")], ids=repr)
def test_a_bug_keeps_its_traceback(bug: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(look, "inspect", raising(bug))
    with pytest.raises(type(bug)):
        run(["inspect", "digits"])


def raising(error: BaseException) -> Any:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "No space left on device", "/data/codes"), 1, "/data/codes"),
        (OSError(errno.EFBIG, "File too large", "/data/codes"), 1, "/data/codes"),
        (OSError(errno.EROFS, "Read-only file system", "/data/codes"), 1, "/data/codes"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "/data/codes"), 2, "/data/codes"),
        (OSError(errno.EISDIR, "Is a directory", "/data/codes"), 2, "/data/codes"),
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
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[0] for line in lines] == ["rdpm", "hint"]
    assert text in lines[0]
    monkeypatch.setenv("RDPM_DEBUG", "1")
    assert run(["inspect", "digits"]) == code
    assert len(capsys.readouterr().err.splitlines()) > 2 or code == 130  # with the traceback


def test_text_shows_what_json_holds_and_quiet_says_nothing_on_stderr(
    paths: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    command = split("eval recon {images} --tokenizer {tokenizer} --limit 5", paths)
    assert run([*command, "--json"]) == 0
    shown = capsys.readouterr()
    answer = json.loads(shown.out)
    assert {"mse", "psnr", "ssim", "spread_over_seeds"} <= set(answer)
    assert "reconstruct" in shown.err  # progress
    assert run([*command, "--quiet"]) == 0
    shown = capsys.readouterr()
    names = {line.split()[0] for line in shown.out.splitlines() if line.startswith("  ")}
    assert {name for name, value in answer.items() if value not in (None, []) and not isinstance(value, dict)} <= names
    assert not shown.err


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
    for name, value in torchrun(2)[int(rank)].items():
        monkeypatch.setenv(name, value)
    assert run(split(command, paths)) in (2, 3)
    assert len(capsys.readouterr().err.splitlines()) == lines


def test_a_result_is_aligned_lines(capsys: pytest.CaptureFixture[str]) -> None:
    result = Result("title", {"a": 0.123456, "b": {"c": [1, 2]}, "d": None, "e": []}, "rdpm next")
    app.show(result, as_json=False)
    assert capsys.readouterr().out.splitlines() == ["title", "  a    0.1235", "  b.c  1, 2", "next: rdpm next"]


def test_only_the_first_process_prints_the_result(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for environment in torchrun(2):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert run(["inspect", "digits", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "digits"


@pytest.mark.parametrize(
    "command",
    [
        "sample --ckpt s3://b/x", "sample --ckpt {generator} --out gs://b/x", "tokenize {images} https://b/x",
        "train-gen hf://b/x", "verify s3://b/x", "eval report {full} -o s3://b/x", "train-gen {codes} --recipe s3://b/x",
        "demo speech --data s3://b/x",
        "train-tokenizer {images} --recipe digits loss.perceptual_weights=s3://b/x",
    ],
)  # fmt: skip
def test_urls_are_refused_where_a_path_of_this_machine_is_needed(
    command: str, paths: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(split(command, paths)) == 2
    assert "://b/x" in capsys.readouterr().err.splitlines()[0]
    assert os.listdir() == []


@pytest.mark.parametrize(
    "command", ["verify ~/x", "eval report ~/x", "inspect ~/x.pt", "train-gen ~/x --recipe digits"]
)
def test_a_tilde_is_the_home_folder_and_without_one_is_refused(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run(command.split()) in (2, 3)
    assert f"{tmp_path}/x" in capsys.readouterr().err.splitlines()[0]
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", raising(KeyError("uid not found")))
    assert run(command.split()) == 2
    assert "HOME" in capsys.readouterr().err.splitlines()[1]
    assert run(["inspect", "digits"]) == 0


def test_a_tilde_in_an_override_is_expanded_and_in_a_title_is_kept(
    paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    changes = ["loss.perceptual_weights=~/vgg.pth", "--print-config", "--json"]
    assert run(["train-tokenizer", "digits", "--recipe", "digits", *changes]) == 0
    assert json.loads(capsys.readouterr().out)["tokenizer"]["loss"]["perceptual_weights"] == "/home/me/vgg.pth"
    Path("fid.json").write_text('{"metric": "fid", "value": 1.5}')
    assert run(["eval", "report", "fid.json", "-o", "page.json", "--title", "~/x", "--quiet"]) == 0
    assert json.loads(Path("page.json").read_text())["title"] == "~/x"


@pytest.mark.parametrize("name", ["x" * 256, "é" * 128, "/".join(["x" * 200] * 21)], ids=["ascii", "accents", "path"])
@pytest.mark.parametrize(
    "command",
    [
        "sample --ckpt {generator} --out", "train-gen {codes} --recipe digits --out", "eval report {full} -o",
        "eval fid {images} --ref {images} --features", "tune-sampling {generator} --out", "tokenize {images}",
    ],
)  # fmt: skip
def test_names_that_are_too_long_are_refused(
    command: str, name: str, paths: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*split(command, paths), name]) == 2
    assert name[:40].split("/")[0] in capsys.readouterr().err
    assert os.listdir() == []


def test_the_next_command_can_be_pasted_whatever_the_path(
    paths: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "my #1 [a] 'quoted' $x"
    assert run(["reconstruct", str(paths["codes"]), str(out), "--limit", "2", "--quiet"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert shlex.split(last) == ["next:", "rdpm", "eval", "fid", str(out)]


LEFT_OVER = [
    {"RANK": "1"}, {"WORLD_SIZE": "2"}, {"LOCAL_RANK": "0"}, {"MASTER_ADDR": "host"}, {"MASTER_PORT": "1"},
    {"LOCAL_WORLD_SIZE": "8"}, {"RANK": "", "WORLD_SIZE": ""}, torchrun(2)[0] | {"RANK": "2"},
    torchrun(2)[0] | {"RANK": "one"}, torchrun(2)[1] | {"WORLD_SIZE": "9" * 5000},
    torchrun(2)[1] | {"LOCAL_RANK": "-1"},
]  # fmt: skip


@pytest.mark.parametrize("environment", LEFT_OVER, ids=lambda value: " ".join(value)[:40])
def test_left_over_variables_of_torchrun_are_refused_by_name(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert run(["inspect", "digits"]) == 2
    message, hint = capsys.readouterr().err.splitlines()
    assert any(name in message for name in environment)
    assert set(hint.partition(",")[0].split()) == {"hint:", "unset", *environment}
    assert run(["inspect", "--help"]) == 0


def test_a_deleted_working_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert run(["inspect", "digits"]) == 2
    assert "folder" in capsys.readouterr().err


def test_a_report_can_be_written_into_stdout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then nothing else is there, also where stdout is a file."""
    monkeypatch.chdir(tmp_path)
    Path("fid.json").write_text('{"metric": "fid", "value": 1.5}')
    with Path("page").open("ab") as page:
        command = [sys.executable, "-m", "rdpm_cli", "eval", "report", "fid.json", "-o", "/dev/stdout"]
        subprocess.run([*command, "--format", "json"], stdout=page, check=True, timeout=60)
    assert json.loads(Path("page").read_text())["scores"][0]["value"] == 1.5


STREAMS = r"""
import os, sys, types
from rdpm_cli import progress
from rdpm_cli.cli import app
app.open_streams()
app.tune_children()
result = types.SimpleNamespace(title="caf\u00e9", values={"path": "caf\udce9"}, text="", picture="", next="")
for as_json in (False, True):
    progress.as_json = as_json
    app.show(result, as_json)
    progress.warn("caf\u00e9 caf\udce9")
    progress.error("caf\u00e9", "caf\udce9", 2)
with open("first", "w") as file:
    print(file.fileno(), os.environ["OMP_WAIT_POLICY"], file=file)
"""


@pytest.mark.parametrize("closed", ["", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_every_name_can_be_printed_in_ascii_and_a_file_never_takes_the_place_of_a_stream(
    closed: str, tmp_path: Path
) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "OMP_WAIT_POLICY": "active"}
    done = subprocess.run(
        ["bash", "-c", f'"$0" -c "$1" {closed}', sys.executable, STREAMS],
        env=environment, capture_output=True, check=True, cwd=tmp_path, timeout=60,
    )  # fmt: skip
    number, policy = (tmp_path / "first").read_text().split()
    assert int(number) > 2
    assert policy == "active", "the user's choice"
    if not closed:
        title, path, *json_lines = done.stdout.decode("ascii").splitlines()
        assert (title, path.split()) == (r"caf\xe9", ["path", r"caf\udce9"])
        assert json.loads("".join(json_lines)) == {"path": "caf\udce9"}
        assert done.stderr.decode("ascii").count(r"caf\udce9") == 4


def test_waiting_threads_leave_the_core_to_others_unless_the_user_says_otherwise() -> None:
    names = ("OMP_WAIT_POLICY", "passive"), ("GOMP_SPINCOUNT", None), ("KMP_BLOCKTIME", None), ("a training", None)
    for name, expected in names:
        with pytest.MonkeyPatch.context() as patch:
            for variable in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "PYTHONSAFEPATH"):
                patch.delenv(variable, raising=False)
            if expected is None and name != "a training":
                patch.setenv(name, "0")
            app.tune_children(trains=name == "a training")
            assert os.environ.get("OMP_WAIT_POLICY") == expected
            for variable in ("OMP_WAIT_POLICY", "PYTHONSAFEPATH"):
                os.environ.pop(variable, None)

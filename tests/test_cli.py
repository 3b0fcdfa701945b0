"""The front door: help, exit codes, the two lines of every error, and a stdout that carries only the answer."""

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rdpm_cli import __version__, engine, modelfile
from rdpm_cli.cli.app import run
from rdpm_cli.config import NetworkConfig, RDPMConfig, RDPMSampling, TrainConfig
from rdpm_cli.errors import UsageError
from rdpm_cli.generator import model as generator_model
from rdpm_cli.threads import one_thread
from rdpm_cli.tokenizer import model as tokenizer_model

COMMANDS = [
    "train-tokenizer", "tokenize", "reconstruct", "train-gen", "sample", "tune-sampling", "eval fid", "eval sfid",
    "eval is", "eval pr", "eval kid", "eval all", "eval reference", "eval recon", "eval judge", "demo", "inspect",
    "verify", "doctor", "eval report",
]  # fmt: skip
CLASS_NAMES = ["cat", "goldfish", "goose"]


@pytest.fixture(scope="module")
def generator_file(tiny_tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained generator of three classes."""
    tokenizer, content = tokenizer_model.load(tiny_tokenizer_file)
    cfg = RDPMConfig(
        network=NetworkConfig(depth=1, width=16, heads=1), train=TrainConfig(steps=1), sampling=RDPMSampling(cfg=1.0)
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        generator = generator_model.build(cfg, tokenizer, len(CLASS_NAMES))
    path = tmp_path_factory.mktemp("generator") / "generator.pt"
    modelfile.save(path, generator_model.pack(generator, cfg, content, CLASS_NAMES, provenance={}))
    return path


@pytest.fixture(scope="module")
def other_tokenizer(tiny_tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same architecture with other weights."""
    tokenizer, _ = tokenizer_model.load(tiny_tokenizer_file)
    with torch.no_grad():
        for parameter in tokenizer.parameters():
            parameter.add_(0.1)
    path = tmp_path_factory.mktemp("other") / "tokenizer.pt"
    modelfile.save(path, tokenizer_model.pack(tokenizer, class_names=[], provenance={}))
    return path


@pytest.fixture
def places(
    tmp_path: Path,
    image_folder: Path,
    digits_codes: Path,
    tiny_tokenizer_file: Path,
    other_tokenizer: Path,
    generator_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, Path]:
    """Names that commands are written with; the current folder is empty, and no weights or tokenizer are set."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in ("RDPM_TOKENIZER", "RDPM_WEIGHTS", "RDPM_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    (tmp_path / "empty").mkdir()
    broken = tmp_path / "broken" / "a"
    broken.mkdir(parents=True)
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(broken / "fine.png")
    (broken / "torn.png").write_bytes((broken / "fine.png").read_bytes()[:40])
    (tmp_path / "text.pt").write_text("not a checkpoint")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    return {
        "images": image_folder, "codes": digits_codes, "tokenizer": tiny_tokenizer_file, "generator": generator_file,
        "other": other_tokenizer, "missing": tmp_path / "missing", "empty": tmp_path / "empty",
        "broken": tmp_path / "broken", "text": tmp_path / "text.pt", "full": tmp_path / "full", "out": tmp_path / "out",
    }  # fmt: skip


def split(command: str, places: dict[str, Path]) -> list[str]:
    return [part.format_map(places) for part in command.split(" ")]


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


def test_a_reader_that_has_gone_is_no_reason_to_complain() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "rdpm_cli", "--version"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.wait(timeout=30) == 0
    assert process.stderr.read() == b""
    process.stderr.close()


# ---- errors --------------------------------------------------------------------------------------------------------

#  what: (command, exit code, in the error, in the hint)
FAILURES: dict[str, tuple[str, int, str, str]] = {
    "missing images of train-tokenizer":
        ("train-tokenizer {missing} --recipe digits --out {out}", 2, "missing does not exist", "folder"),
    "missing images of tokenize": ("tokenize {missing} {out} --tokenizer {tokenizer}", 2, "does not exist", "folder"),
    "missing images of reconstruct":
        ("reconstruct {missing} {out} --tokenizer {tokenizer}", 2, "does not exist", "folder"),
    "missing images of eval recon": ("eval recon {missing} --tokenizer {tokenizer}", 2, "does not exist", "folder"),
    "missing codes": ("train-gen {missing} --recipe digits --out {out}", 2, "no code store", "rdpm tokenize"),
    "missing recipe or path": ("inspect no-such-thing", 2, "neither a path nor a recipe", "digits"),
    "empty folder of train-tokenizer":
        ("train-tokenizer {empty} --recipe digits --out {out}", 3, "empty holds no images", "folder"),
    "empty folder of tokenize": ("tokenize {empty} {out} --tokenizer {tokenizer}", 3, "holds no images", "folder"),
    "empty folder of train-gen": ("train-gen {empty} --recipe digits --out {out}", 3, "", "rdpm tokenize"),
    "empty folder of inspect": ("inspect {empty}", 3, "holds no images", "folder"),
    "unreadable image of tokenize":
        ("tokenize {broken} {out} --tokenizer {tokenizer}", 3, "a/torn.png cannot be read", "replace or remove"),
    "unreadable image of reconstruct":
        ("reconstruct {broken} {out} --tokenizer {tokenizer}", 3, "a/torn.png cannot be read", "replace or remove"),
    "images of train-gen": ("train-gen {images} --recipe digits --out {out}", 3, "", "rdpm tokenize"),
    "tokenizer for a generator":
        ("sample --ckpt {tokenizer} --out {out}", 3, "is a tokenizer, not a generator", "rdpm train-gen"),
    "generator for a tokenizer":
        ("tokenize {images} {out} --tokenizer {generator}", 3, "is a generator, not a tokenizer", "train-tokenizer"),
    "tokenizer for a judge":
        ("eval fid {images} --ref {images} --extractor {tokenizer}", 3, "is a tokenizer, not a judge", "eval judge"),
    "text for a checkpoint": ("sample --ckpt {text} --out {out}", 3, "text.pt", "rdpm train-gen"),
    "absent checkpoint": ("sample --ckpt {missing} --out {out}", 3, "does not exist", "rdpm train-gen"),
    "store by another tokenizer": ("reconstruct {codes} {out} --tokenizer {other}", 3, "was coded by", "rdpm tokenize"),
    "absent tokenizer": ("tokenize {images} {out}", 3, "no tokenizer", "rdpm train-tokenizer"),
    "absent tokenizer of eval": ("eval recon {images}", 3, "no tokenizer", "rdpm train-tokenizer"),
    "absent tokenizer named": ("tokenize {images} {out} --tokenizer {missing}", 3, "does not exist", "train-tokenizer"),
    "unknown recipe key of train-tokenizer":
        ("train-tokenizer digits --recipe digits --out {out} train.stepz=3", 2, "'train.stepz'", "'train.steps'"),
    "unknown recipe key of train-gen":
        ("train-gen {codes} --recipe digits --out {out} network.widht=3", 2, "'network.widht'", "'network.width'"),
    "unknown recipe key of demo": ("demo --out {out} generator.train.stepz=3", 2, "stepz", "generator.train.steps"),
    "override without value": ("train-gen {codes} --recipe digits --out {out} train.steps", 2, "not key=value", ""),
    "value that does not fit": ("train-gen {codes} --recipe digits --out {out} train.steps=-3", 2, "train.steps", ""),
    "unknown recipe": ("train-gen {codes} --recipe digitz --out {out}", 2, "'digitz'", "'digits'"),
    "unknown command": ("tokenise {images} {out}", 2, "tokenise", "rdpm --help"),
    "unknown option": ("tokenize {images} {out} --no-such", 2, "--no-such", "rdpm tokenize --help"),
    "missing argument": ("tokenize {images}", 2, "OUT", "rdpm tokenize --help"),
    "missing option": ("sample", 2, "--ckpt", "rdpm sample --help"),
    "negative seed": ("sample --ckpt {generator} --seed -1", 2, "--seed", "rdpm sample --help"),
    "words for a number": ("sample --ckpt {generator} --per-class many", 2, "--per-class", "rdpm sample --help"),
    "unknown schedule": ("sample --ckpt {generator} --cfg-schedule cosinus", 2, "cosinus", "rdpm sample --help"),
    "unknown preset": ("sample --ckpt {generator} --preset rawest", 2, "--preset rawest", "raw, cfg, cfg-linear"),
    "a step before the first": ("sample --ckpt {generator} --init {images}#1 --from-step 0", 2, "0 is not in 1..4", ""),
    "no such device": ("sample --ckpt {generator} --out {out}/none --device mps:9", 2, "--device mps:9", "cpu"),
    "two ways to a spread": ("eval fid {images} --ref {images} --ci --subset 9", 2, "--ci and --subset", "one of them"),
    "an option of no family": ("sample --ckpt {generator} taus=2", 2, "'taus'", "did you mean tau?"),
    "a word for an option": ("sample --ckpt {generator} tau", 2, "'tau' is not key=value", "precision=bf16"),
    "no samples kept": ("sample --ckpt {generator} --no-png", 2, "--no-png", "--npz"),
    "a shard that is none": ("sample --ckpt {generator} --shard 3/2", 2, "--shard 3/2", "1/4"),
    "a mask alone": ("sample --ckpt {generator} --mask {text}", 2, "--mask", "--init IMAGE"),
    "an image alone": ("sample --ckpt {generator} --init {text}", 2, "--init", "--mask MASK"),
    "an image that is none": ("sample --ckpt {generator} --init {text} --from-step 2", 2, "is no image", "SOURCE#N"),
    "an item beyond": ("sample --ckpt {generator} --init {images}#36 --from-step 2", 2, "items 0 to 35", "SOURCE#N"),
    "a step beyond": ("sample --ckpt {generator} --init {images}#1 --from-step 5", 2, "not in 1..4", "T = 4"),
    "rejection without a judge": ("sample --ckpt {generator} --reject keep=0.5", 2, "--reject", "--judge judge.pt"),
    "an odd rate": ("sample --ckpt {generator} --reject keep=0.4 --judge {text}", 2, "keep=0.4", "keep=0.5"),
    "a judge that is none": ("sample --ckpt {generator} --reject keep=0.5 --judge {text}", 3, "text.pt", "eval judge"),
    "no such classifier": (
        "sample --ckpt {generator} --reject keep=0.5 --judge resnet:x.pt", 2, "resnet", "resnet50:resnet50.pth"
    ),
    "missing Inception weights": (
        "eval fid {images} --ref {images}", 3, "weights-inception-2015-12-05-6726825d.pth",
        "weights-inception-2015-12-05-6726825d.pth",
    ),
    "missing images before the weights": ("eval fid {missing}", 2, "missing does not exist", "give --ckpt FILE"),
    "unknown class name":
        ("sample --ckpt {generator} --out {out} --classes name:goldfihs", 2, "'goldfihs'", "goldfish"),
    "class out of range": ("sample --ckpt {generator} --out {out} --classes 0,3", 2, "no class 3", "0..2"),
    "no class at all": ("sample --ckpt {generator} --out {out} --classes goldfish", 2, "'goldfish'", "name:goldfish"),
    "tau of zero": ("sample --ckpt {generator} --out {out} --tau 0", 2, "tau", ""),
    "skipping every step": ("sample --ckpt {generator} --out {out} --skip-steps 4", 2, "--skip-steps 4", "T = 4"),
    "samples into a full folder": ("sample --ckpt {generator} --out {full}", 2, "full is not empty", "another"),
    "codes into a full folder": ("tokenize {images} {full} --tokenizer {tokenizer}", 2, "full is not empty", "folder"),
    "run into a full folder": ("train-gen {codes} --recipe digits --out {full}", 2, "full is not empty", "another"),
    "pictures into a file": ("reconstruct {images} {text} --tokenizer {tokenizer}", 2, "text.pt is a file", "folder"),
    "unknown part of digits": ("inspect digits:test", 2, "'test'", "digits:heldout"),
}  # fmt: skip


@pytest.mark.parametrize("what", FAILURES)
def test_every_error_is_two_lines_and_an_exit_code(
    what: str, places: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    command, code, error, hint = FAILURES[what]
    with one_thread():
        assert run(split(command, places)) == code
    shown = capsys.readouterr()
    assert not shown.out
    lines = shown.err.splitlines()
    assert len(lines) == 2, shown.err
    assert lines[0].startswith("rdpm: error: ")
    assert error in lines[0]
    assert lines[1].startswith("hint: ")
    assert hint in lines[1]
    left = [
        path for path in places["out"].rglob("*") if path.suffix in {".npy", ".png"} or path.name == "manifest.json"
    ]
    assert not left


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_an_absent_gpu_is_a_usage_error(places: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(split("sample --ckpt {generator} --out {out} --device cuda", places)) == 2
    shown = capsys.readouterr()
    assert "no CUDA device" in shown.err
    assert not shown.out


def test_a_store_whose_own_tokenizer_was_swapped_is_refused(
    places: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shutil.copytree(places["codes"], tmp_path / "codes")
    shutil.copy(places["other"], tmp_path / "codes" / "tokenizer.pt")
    assert run(["train-gen", str(tmp_path / "codes"), "--recipe", "digits", "--out", str(places["out"])]) == 3
    assert "was coded by" in capsys.readouterr().err


@pytest.mark.parametrize("bug", [KeyError("k"), TypeError("t"), AssertionError("a"), AttributeError("b")], ids=repr)
def test_a_bug_keeps_its_traceback(
    bug: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engine, "inspect", raising(bug))
    with pytest.raises(type(bug)):
        run(["inspect", "digits"])
    assert "rdpm: error" not in capsys.readouterr().err


def raising(error: BaseException) -> Any:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize("bug", [RuntimeError("shapes differ"), OSError(errno.EIO, "I/O error")], ids=repr)
def test_an_unknown_failure_of_the_machine_keeps_its_traceback(
    bug: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engine, "inspect", raising(bug))
    assert run(["inspect", "digits"]) == 1
    shown = capsys.readouterr()
    assert "Traceback" in shown.err
    assert "rdpm: error" not in shown.err
    assert not shown.out


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "No space left on device", "/data/codes"), 1, "disk full: /data/codes"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "disk full"),
        (PermissionError(errno.EACCES, "Permission denied", "/data/codes"), 1, "not allowed: /data/codes"),
        (MemoryError(), 1, "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"), 1, "out of memory: CUDA out of memory."),
    ],
    ids=repr,
)
def test_failures_of_the_machine_are_two_lines(
    error: BaseException, code: int, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engine, "inspect", raising(error))
    assert run(["inspect", "digits"]) == code
    shown = capsys.readouterr()
    lines = shown.err.splitlines()
    assert [line.partition(": ")[0] for line in lines] == ["rdpm", "hint"]
    assert lines[0].startswith(f"rdpm: error: {text}")
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
def test_stdout_carries_only_json(command: str, places: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    with one_thread():
        assert run([*split(command, places), "--json"]) == 0
    shown = capsys.readouterr()
    answer = json.loads(shown.out)
    assert ANSWERS[command] <= set(answer)
    assert "error" not in shown.err


@pytest.mark.parametrize("command", ["inspect {codes}", "eval recon {images} --tokenizer {tokenizer} --limit 5"])
def test_text_shows_what_json_holds(command: str, places: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*split(command, places), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert run(split(command, places)) == 0
    shown = capsys.readouterr().out.splitlines()
    names = {line.split()[0] for line in shown if line.startswith("  ")}
    wanted = {name for name, value in answer.items() if value not in (None, []) and not isinstance(value, dict)}
    assert wanted <= names


def test_quiet_says_nothing_on_stderr(places: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    command = split("eval recon {images} --tokenizer {tokenizer} --limit 5", places)
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


@pytest.mark.parametrize("how", ["option", "environment", "current folder"])
def test_the_tokenizer_is_found(
    how: str, places: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """--tokenizer, else $RDPM_TOKENIZER, else ./tokenizer.pt: each hides the next."""
    chosen = places["tokenizer"]
    shutil.copy(chosen if how == "current folder" else places["other"], "tokenizer.pt")
    if how != "current folder":
        monkeypatch.setenv("RDPM_TOKENIZER", str(chosen if how == "environment" else places["other"]))
    extra = ["--tokenizer", str(chosen)] if how == "option" else []
    assert run(["tokenize", str(places["images"]), str(places["out"]), "--json", *extra]) == 0
    assert json.loads(capsys.readouterr().out)["tokenizer"] == modelfile.load(chosen)["digest"]


# ---- classes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "classes"),
    [
        ("1", [1]),
        ("0,2,1", [0, 2, 1]),
        ("0-2", [0, 1, 2]),
        ("1-1", [1]),
        ("all", [0, 1, 2]),
        ("name:goose", [2]),
        ("name:goose,0-1", [2, 0, 1]),
        ("2, 1 ,2,1-2", [2, 1]),  # each once, in the order of the first mention
        ("name:cat,all", [0, 1, 2]),
    ],
)
def test_classes_are_written_in_many_ways(text: str, classes: list[int]) -> None:
    assert engine.parse_classes(text, CLASS_NAMES) == classes


def test_digits_are_indices_and_names_are_named() -> None:
    names = ["7", "3", "5"]
    assert engine.parse_classes("2", names) == [2]
    assert engine.parse_classes("name:3", names) == [1]


@pytest.mark.parametrize(
    ("text", "classes"),
    [
        ("name:goldfish, Carassius auratus", [1]),
        ("0, name:goldfish, Carassius auratus, 2", [0, 1, 2]),
        ("name:goldfish,0", [2, 0]),
        ("name:tench,name:goldfish, Carassius auratus", [0, 1]),
    ],
)
def test_names_may_have_commas(text: str, classes: list[int]) -> None:
    assert engine.parse_classes(text, ["tench", "goldfish, Carassius auratus", "goldfish"]) == classes


def test_classes_may_stand_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text("2\nname:goldfish, Carassius auratus\n\n0-1\n")
    names = ["tench", "goldfish, Carassius auratus", "goldfish"]
    assert engine.parse_classes(f"@{tmp_path / 'few.txt'}", names) == [2, 1, 0]
    with pytest.raises(UsageError, match=r"@none\.txt"):
        engine.parse_classes("@none.txt", names)


@pytest.mark.parametrize(
    "text", ["", "1,", "cat", "2-1", "-1", "1-", "0-3", "3", "name:", "name:dog", "1.5", "a-b", "²"]
)
def test_what_is_no_class_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--classes") as refused:
        engine.parse_classes(text, CLASS_NAMES)
    assert refused.value.hint

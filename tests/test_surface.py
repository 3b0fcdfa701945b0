"""The whole command line from the outside: what every command shares, and that nobody changes it unawares."""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import rdpm_cli
from rdpm_cli import recipe_files
from rdpm_cli.cli import reference
from rdpm_cli.cli.app import run
from rdpm_cli.threads import one_thread

COMMANDS = reference.commands()

# ---- frozen --------------------------------------------------------------------------------------------------------


def test_the_surface_is_what_docs_cli_md_says() -> None:
    written = Path(rdpm_cli.__file__).parent.parent / "docs" / "cli.md"
    if not written.is_file():
        pytest.skip("the package is installed without its docs")
    assert written.read_text() == reference.page(), f"commands have changed; if that is meant: {reference.REGENERATE}"


TWO_MEANINGS = {"--out", "--keep"}  # docs/cli.md says which


def test_an_option_is_declared_once() -> None:
    """Defaults may differ, and whether a default is left to the command."""
    declared: dict[str, set[tuple[Any, ...]]] = defaultdict(set)
    for command in COMMANDS.values():
        for p in (p for p in command.params if p.param_type_name == "option"):
            ends = (getattr(p, "min", None), getattr(p, "max", None))
            declared[p.opts[0]].add(
                (*p.opts, *p.secondary_opts, p.metavar, p.help, str(p.type_descriptor.annotation), ends)
            )
    assert {name for name, ways in declared.items() if len(ways) > 1} == TWO_MEANINGS


@pytest.mark.parametrize("words", COMMANDS)
def test_every_command_has_help_for_everything_and_the_shared_options(words: str) -> None:
    params = COMMANDS[words].params
    assert [p.name for p in params if not p.help] == []
    assert {"--json", "--quiet"} <= {name for p in params for name in getattr(p, "opts", [])}


# ---- every command once --------------------------------------------------------------------------------------------


class Shown(NamedTuple):
    """What a command left on stdout and stderr, and its exit code."""

    code: int
    out: str
    err: str


TOKENIZER = (
    "autoencoder.width=8 autoencoder.channels=4 quantizer.codes=64 quantizer.steps=2 train.batch=16 train.steps=2"
)
GENERATOR = "network.depth=1 network.width=16 network.heads=1 train.batch=16 train.steps=2"
JUDGED = "--extractor runs/judge/judge.pt"
WALK = {
    "train-tokenizer": f"images --recipe digits --out runs/tok {TOKENIZER}",
    "tokenize": "images codes --tokenizer runs/tok/tokenizer.pt",
    "reconstruct": "codes recon --limit 4",
    "train-gen": f"codes --recipe digits --out runs/gen {GENERATOR}",
    "sample": "--ckpt runs/gen/generator.pt --per-class 4 --out samples --npz",
    "eval judge": "images runs/judge --resolution 16 width=8 features=4 train.batch=16 train.steps=2",
    "tune-sampling": f"runs/gen/generator.pt --samples 6 --budget 2 --ref images {JUDGED}",
    "eval fid": f"samples --ref images {JUDGED}",
    "eval sfid": "few --ref few --resolution 16 --weights inception.pth",
    "eval is": f"samples {JUDGED}",
    "eval pr": f"samples --ref images {JUDGED}",
    "eval kid": f"samples --ref images {JUDGED}",
    "eval all": f"samples --ref images {JUDGED}",
    "eval reference": f"images ref.npz --features 8 --resolution 16 {JUDGED}",
    "eval recon": "images --tokenizer runs/tok/tokenizer.pt --limit 4 --seeds 1",
    "eval report": "runs/gen samples -o report.html",
    "inspect": "runs/gen/generator.pt",
    "verify": "codes",
    "doctor": "",
    "demo": "--out demo",
}


def shown_by(words: str) -> Shown:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), one_thread():
        code = run([*words.split(), *WALK[words].split(), "--json"])
    return Shown(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def walk(
    image_folder: Path, random_inception: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Shown]]:
    """Every command with --json, in an order that each finds what it needs."""
    with contextlib.chdir(tmp_path_factory.mktemp("walk")):
        Path("images").symlink_to(image_folder)
        Path("inception.pth").symlink_to(random_inception)
        Path("few").mkdir()
        for name in ("00.png", "01.png", "03.png"):
            shutil.copy(image_folder / "a" / name, Path("few") / name)
        Path("demo").mkdir()  # finished: test_pipeline.py runs one
        finished = {"recipe": recipe_files.load_recipe("digits").digest(), "class_accuracy": 1.0}
        Path("demo/result.json").write_text(json.dumps(finished))
        yield {words: shown_by(words) for words in WALK}


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def test_the_walk_knows_every_command() -> None:
    assert set(WALK) == set(COMMANDS)


@pytest.mark.parametrize("words", WALK)
def test_json_is_all_of_stdout_and_holds_no_nan(words: str, walk: dict[str, Shown]) -> None:
    assert walk[words].code == 0, walk[words].err
    assert isinstance(json.loads(walk[words].out, parse_constant=refuse), dict)


@pytest.mark.parametrize("words", WALK)
def test_a_redirected_run_has_no_carriage_return_and_no_escape(words: str, walk: dict[str, Shown]) -> None:
    assert not re.search(r"[\r\x1b\x08]", walk[words].out + walk[words].err)


@pytest.mark.parametrize(
    ("command", "code", "kinds"),
    [
        ("train-gen " + WALK["train-gen"], 0, ["info"]),  # finished already
        ("tokenize images codes-again --tokenizer runs/tok/tokenizer.pt", 0, ["finished"]),
        ("verify nowhere", 2, ["error"]),
        ("verify --colour", 2, ["error"]),
        ("eval", 2, ["info"]),  # its help
    ],
)
def test_json_lines_are_all_of_stderr(command: str, code: int, kinds: list[str], walk: dict[str, Shown]) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err, one_thread():
        assert run(["--log-format", "json", *command.split()]) == code
    said = [json.loads(line, parse_constant=refuse) for line in err.getvalue().splitlines()]
    assert [line["kind"] for line in said] == kinds
    assert all(line["message"] and line["time"] > 0 for line in said)
    assert all(line["exit_code"] == code and line["hint"] for line in said if line["kind"] == "error")


def test_the_same_command_again_says_that_it_is_finished(walk: dict[str, Shown]) -> None:
    before = Path("runs/gen/generator.pt").stat().st_mtime_ns
    again = shown_by("train-gen")
    assert (again.code, again.out) == (0, walk["train-gen"].out)
    assert "runs/gen/generator.pt is finished already" in again.err
    assert Path("runs/gen/generator.pt").stat().st_mtime_ns == before


# ---- sample --dry-run ----------------------------------------------------------------------------------------------


def dry(*args: str) -> dict[str, Any]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert run(["sample", "--ckpt", "runs/gen/generator.pt", *args, "--dry-run", "--json"]) == 0
    answer: dict[str, Any] = json.loads(out.getvalue())
    return answer


def test_a_dry_run_of_sample_counts_what_is_missing_and_writes_nothing(walk: dict[str, Shown]) -> None:
    answer = dry("--per-class", "50", "--out", "more")
    assert (answer["samples"], answer["samples_missing"]) == (150, 150)
    assert answer["bytes_at_most"] >= 150 * 3 * answer["resolution"] ** 2
    assert not Path("more").exists()
    half = dry("--per-class", "50", "--out", "more", "--shard", "1/2")
    assert 0 < half["samples_of_this_part"] < 150
    before = {path: path.stat().st_mtime_ns for path in Path("samples").rglob("*")}
    there = dry("--per-class", "4", "--out", "samples", "--npz")
    assert (there["samples"], there["samples_missing"], there["bytes_at_most"]) == (12, 0, 0)
    assert {path: path.stat().st_mtime_ns for path in Path("samples").rglob("*")} == before


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [("--out images", 2, "images"), ("--out samples --seed 3", 2, "other pictures"), ("--classes 7", 2, "no class 7")],
)
def test_a_dry_run_of_sample_refuses_what_the_run_would(
    args: str, code: int, text: str, walk: dict[str, Shown], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["sample", "--ckpt", "runs/gen/generator.pt", *args.split(), "--dry-run"]) == code
    assert text in capsys.readouterr().err


def test_a_dry_run_of_sample_looks_at_the_disk(
    walk: dict[str, Shown], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("rdpm_cli.files.free_bytes", lambda folder: 1000)
    assert run(["sample", "--ckpt", "runs/gen/generator.pt", "--out", "more", "--dry-run"]) == 1
    assert "disk too small" in capsys.readouterr().err


# ---- --print-config ------------------------------------------------------------------------------------------------

TAKES_A_RECIPE = {
    "tokenizer": ["train-tokenizer", "no-images"], "generator": ["train-gen", "no-store"],
    "judge": ["eval", "judge", "no-images", "no-run"],
}  # fmt: skip
SHIPPED = [
    (name, section)
    for name in recipe_files.recipe_names()
    for section in TAKES_A_RECIPE
    if getattr(recipe_files.load_recipe(name), section) is not None
]


@pytest.mark.parametrize(("name", "section"), SHIPPED)
def test_a_printed_recipe_is_the_same_recipe(
    name: str, section: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, changes = tmp_path / "printed.yaml", ["train.lr=3e-7", "train.steps=11", "seed=5"]
    wanted = recipe_files.load_recipe(name, changes, section)
    assert run([*TAKES_A_RECIPE[section], "--recipe", name, *changes, "--print-config"]) == 0
    file.write_text(capsys.readouterr().out)
    found = recipe_files.load_recipe(str(file), (), section)
    assert found == wanted
    assert found.digest() == wanted.digest()
    assert run([*TAKES_A_RECIPE[section], "--recipe", str(file), "--print-config"]) == 0
    assert capsys.readouterr().out == file.read_text()


def test_a_recipe_printed_as_json_is_a_recipe_file_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train-gen", "no-store", "--recipe", "digits", "--print-config", "--json"]) == 0
    file = tmp_path / "printed.yaml"
    file.write_text(capsys.readouterr().out)
    assert recipe_files.load_recipe(str(file)).digest() == recipe_files.load_recipe("digits").digest()


def test_a_recipe_that_extends_a_printed_one_has_its_own_name(tmp_path: Path) -> None:
    (tmp_path / "printed.yaml").write_text(recipe_files.to_yaml(recipe_files.load_recipe("digits")))
    (tmp_path / "mine.yaml").write_text("extends: printed.yaml\nseed: 3\n")
    found = recipe_files.load_recipe(str(tmp_path / "mine.yaml"))
    assert (found.name, found.seed) == ("mine", 3)


# ---- the shell -----------------------------------------------------------------------------------------------------

PROGRAM = """
import atexit, sys
from rdpm_cli.cli import main
sys.argv[0] = "rdpm"
atexit.register(lambda: print(sorted({"torch", "torchvision", "sklearn"} & set(sys.modules)), file=sys.stderr))
main()
"""


def completed(line: str) -> tuple[list[str], str]:
    """What bash is offered for the last word of a line, and which heavy modules that took."""
    environment = {
        **os.environ, "_RDPM_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout.split(), done.stderr.strip()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("rdpm tok", ["tokenize"]),
        ("rdpm eval re", ["reference", "recon", "report"]),
        (
            "rdpm train-gen codes --recipe imagenet256-d1",
            [f"imagenet256-d1{n}" for n in ("2", "2-plus", "6", "6-plus")],
        ),
        ("rdpm train-gen codes --dry-run --gpu h2", ["h200"]),
        ("rdpm sample --per", ["--per-class"]),
    ],
)
def test_the_shell_completes_commands_options_and_recipes_without_torch(line: str, offered: list[str]) -> None:
    found, heavy = completed(line)
    assert sorted(found) == sorted(offered)
    assert heavy == "[]"


def test_completion_installs_itself(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "HOME": str(tmp_path),
        "SHELL": "/bin/bash",
        "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "rdpm_cli", "--install-completion", "bash"],
        env=environment, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "_RDPM_COMPLETE" in (tmp_path / ".bash_completions" / "rdpm.sh").read_text()


@pytest.mark.parametrize(
    "command",
    [
        "--help",
        "train-gen x --recipe digits --print-config",
        "train-gen x --recipe no-such --print-config",
        "eval --help",
    ],
)
def test_a_reader_that_goes_away_hears_nothing(command: str) -> None:
    """Nobody reads stdout, and nothing is said of that: exit 0, or the error's own code."""
    reading, writing = os.pipe()
    os.close(reading)
    code = f"import sys; sys.argv = ['rdpm', *{command.split()!r}]; from rdpm_cli.cli import main; main()"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    _, err = process.communicate(timeout=60)
    assert "Traceback" not in err
    assert "BrokenPipe" not in err
    assert process.returncode == (2 if "no-such" in command else 0)


@pytest.mark.parametrize(
    "command",
    ["tokenise a b", "tokenize a --no-such", "sample --per-class many", "train-gen x --recipe no-such --print-config"],
)
def test_errors_are_plain_whatever_the_terminal(command: str) -> None:
    environment = {**os.environ, "FORCE_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": "20"}
    done = subprocess.run(
        [sys.executable, "-m", "rdpm_cli", *command.split()],
        env=environment, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"rdpm: error: [^\n\x1b\r╭│]+\nhint: [^\n\x1b\r╭│]+\n", done.stderr)

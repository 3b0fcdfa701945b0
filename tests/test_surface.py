"""The whole command line from the outside: what every command shares, and that it does not change by accident."""

import contextlib
import importlib.util
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
from types import ModuleType
from typing import Any, NamedTuple

import pytest
from sounds import save_speech_generator, speech_config, speech_store, strings, write_speech
from tones import write_tones

import rdpm_cli
from rdpm_cli import recipes
from rdpm_cli.cli.app import run
from rdpm_cli.distributed import one_thread

DOCS = Path(rdpm_cli.__file__).parent.parent / "docs"


def _load_page() -> ModuleType:
    """docs/cli.py, which writes docs/cli.md. It is no part of the package."""
    spec = importlib.util.spec_from_file_location("docs_cli", DOCS / "cli.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PAGE = _load_page()
COMMANDS: dict[str, Any] = PAGE.commands()


def test_docs_cli_md_is_up_to_date_and_the_walk_has_every_command() -> None:
    assert set(WALK) == set(COMMANDS) - {"play"}  # which serves until Ctrl-C: see test_play.py
    assert (DOCS / "cli.md").read_text() == PAGE.page(), f"commands have changed; if intended: {PAGE.REGENERATE}"


TWO_MEANINGS = {"--out", "--keep", "--features", "--length"}  # what they are depends on the command


def test_an_option_is_declared_once() -> None:
    """The same name has the same type, range and help everywhere; only its default may differ."""
    declared: dict[str, set[tuple[Any, ...]]] = defaultdict(set)
    for command in COMMANDS.values():
        for p in (p for p in command.params if p.param_type_name == "option"):
            limits = (getattr(p, "min", None), getattr(p, "max", None))
            declared[p.opts[0]].add(
                (*p.opts, *p.secondary_opts, p.metavar, p.help, str(p.type_descriptor.annotation), limits)
            )
    assert {name for name, variants in declared.items() if len(variants) > 1} == TWO_MEANINGS


@pytest.mark.parametrize("words", COMMANDS)
def test_every_command_has_help_for_everything_an_example_and_the_shared_options(
    words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    params = COMMANDS[words].params
    assert [p.name for p in params if not p.help] == []
    assert {"--json", "--quiet"} <= {name for p in params for name in getattr(p, "opts", [])}
    assert run([*words.split(), "--help"]) == 0
    assert f"Example: rdpm {words} " in capsys.readouterr().out


class Shown(NamedTuple):
    """Exit code, stdout and stderr of a command."""

    code: int
    out: str
    err: str


TOKENIZER = (
    "autoencoder.width=8 autoencoder.channels=4 quantizer.codes=64 quantizer.steps=2 train.batch=16 train.steps=2"
)
GENERATOR = "network.depth=1 network.width=16 network.heads=1 train.batch=16 train.steps=2 train.ema=power"
JUDGED = "--extractor runs/judge/judge.pt"
WALK = {
    "train-tokenizer": f"images --recipe digits --out runs/tok {TOKENIZER}",
    "tokenize": "images codes --tokenizer runs/tok/tokenizer.pt",
    "reconstruct": "codes recon --limit 4",
    "train-gen": f"codes --recipe digits --out runs/gen {GENERATOR}",
    "sample": "--ckpt runs/gen/generator.pt --per-class 4 --out samples --npz",
    "eval judge": "images runs/judge --resolution 16 width=8 features=4 train.batch=16 train.steps=2",
    "ema": "runs/gen --length 0.07 --out runs/averaged.pt",
    "tune-sampling": f"runs/gen/generator.pt --samples 6 --budget 2 --ref images {JUDGED}",
    "eval fid": f"samples --ref images {JUDGED}",
    "eval sfid": "few --ref few --resolution 16 --weights inception.pth",
    "eval is": f"samples {JUDGED}",
    "eval pr": f"samples --ref images {JUDGED}",
    "eval dc": f"samples --ref images {JUDGED}",
    "eval kid": f"samples --ref images {JUDGED}",
    "eval mind": f"samples --ref images {JUDGED}",
    "eval cmmd": f"samples --ref images {JUDGED}",
    "eval fd-infinity": f"digits:heldout --ref images --resolution 16 {JUDGED}",
    "eval fdr": f"samples --ref images --heldout few {JUDGED}",
    "eval all": f"samples --ref images {JUDGED}",
    "eval memory": f"samples --ref images --heldout images --sheet pairs.png {JUDGED}",
    "eval reference": f"images ref.npz --features 8 --resolution 16 {JUDGED}",
    "eval recon": "images --tokenizer runs/tok/tokenizer.pt --limit 4 --seeds 1",
    "eval baselines": "images --heldout images --resolution 16 --per-class 4 --seeds 1 "
    f"--tokenizer runs/tok/tokenizer.pt --ref images {JUDGED}",
    "eval speech": "tones --judge tone-judge/judge.pt",
    "eval tts": "voices.pt sentences --judge tone-judge/judge.pt --out tts",
    "eval report": "runs/gen samples -o report.html",
    "inspect": "runs/gen/generator.pt",
    "verify": "codes",
    "export": "runs/gen/generator.pt exported samples",
    "import": "exported imported.pt",
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
    """Every command with --json, in an order in which each finds its inputs."""
    with contextlib.chdir(tmp_path_factory.mktemp("walk")):
        Path("images").symlink_to(image_folder)
        Path("inception.pth").symlink_to(random_inception)
        Path("few").mkdir()
        for name in ("00.png", "01.png", "03.png"):
            shutil.copy(image_folder / "a" / name, Path("few") / name)
        write_tones(Path("tones"), 4, 0)
        sizes = ["width=8", "embedding=4", "train.steps=2", "train.batch=16"]
        assert (
            run(["eval", "judge", "tones", "tone-judge", "--recipe", "speech8-sin", "--heldout", "tones", *sizes]) == 0
        )
        store = speech_store(Path("speech"), "sin", strings(8), latents=True)
        save_speech_generator(Path("voices.pt"), store.root, speech_config("rdpm"))
        write_speech(Path("sentences"), [[("low", 60), ("high", 60)]] * 2)
        Path("demo").mkdir()  # a finished one: test_pipeline.py runs a real one
        finished = {"recipe": recipes.load_recipe("digits").digest(), "class_accuracy": 1.0}
        Path("demo/result.json").write_text(json.dumps(finished))
        yield {words: shown_by(words) for words in WALK}


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


@pytest.mark.parametrize("words", WALK)
def test_json_is_all_of_stdout_and_a_redirected_run_has_no_escapes(words: str, walk: dict[str, Shown]) -> None:
    assert walk[words].code == 0, walk[words].err
    assert isinstance(json.loads(walk[words].out, parse_constant=refuse), dict)
    assert not re.search(r"[\r\x1b\x08]", walk[words].out + walk[words].err)


@pytest.mark.parametrize(
    ("command", "code", "kinds"),
    [
        ("train-gen " + WALK["train-gen"], 0, ["info"]),  # finished already
        ("tokenize images codes-again --tokenizer runs/tok/tokenizer.pt", 0, ["finished"]),
        ("verify nowhere", 2, ["error"]),
        ("eval", 2, ["info"]),  # its help
    ],
)
def test_json_lines_are_all_of_stderr(command: str, code: int, kinds: list[str], walk: dict[str, Shown]) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err, one_thread():
        assert run(["--log-format", "json", *command.split()]) == code
    lines = [json.loads(line, parse_constant=refuse) for line in err.getvalue().splitlines()]
    assert [line["kind"] for line in lines] == kinds


TAKES_A_RECIPE = {
    "tokenizer": ["train-tokenizer", "no-images"], "generator": ["train-gen", "no-store"],
    "judge": ["eval", "judge", "no-images", "no-run"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "section"), [("digits", "tokenizer"), ("digits", "judge"), ("resgen-digits", "generator")]
)
def test_a_printed_recipe_is_the_same_recipe(
    name: str, section: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, changes = tmp_path / "printed.yaml", ["train.lr=3e-7", "train.steps=11", "seed=5"]
    expected = recipes.load_recipe(name, changes, section)
    assert run([*TAKES_A_RECIPE[section], "--recipe", name, *changes, "--print-config"]) == 0
    file.write_text(capsys.readouterr().out)
    loaded = recipes.load_recipe(str(file), (), section)
    assert loaded == expected
    assert loaded.digest() == expected.digest()
    assert run([*TAKES_A_RECIPE[section], "--recipe", str(file), "--print-config", "--json"]) == 0
    file.write_text(capsys.readouterr().out)
    assert recipes.load_recipe(str(file), (), section) == expected


PROGRAM = """
import atexit, sys
from rdpm_cli.cli import main
sys.argv[0] = "rdpm"
atexit.register(lambda: print(sorted({"torch", "torchvision", "sklearn"} & set(sys.modules)), file=sys.stderr))
main()
"""


def completed(line: str) -> tuple[list[str], str]:
    """The completions that bash shows for the last word of a line, and the heavy modules that were imported."""
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
        ("rdpm tok", ["tokenize"]), ("rdpm eval re", ["reference", "recon", "report"]),
        ("rdpm sample --per", ["--per-class"]),
    ],
)  # fmt: skip
def test_the_shell_completes_commands_and_options_without_torch(line: str, offered: list[str]) -> None:
    words, heavy = completed(line)
    assert sorted(words) == sorted(offered)
    assert heavy == "[]"


@pytest.mark.parametrize("command", ["--help", "train-gen x --recipe digits --print-config", "inspect no-such"])
def test_a_reader_that_has_gone_is_no_error(command: str) -> None:
    """Exit code 0, or that of another error."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "rdpm_cli", *command.split()],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writing)
    assert ("Traceback" in done.stderr, "BrokenPipe" in done.stderr) == (False, False)
    assert done.returncode == (2 if "no-such" in command else 0)


@pytest.mark.parametrize("command", ["tokenise a b", "tokenize a --no-such", "inspect no-such"])
def test_errors_are_plain_whatever_the_terminal(command: str) -> None:
    environment = {**os.environ, "FORCE_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": "20"}
    done = subprocess.run(
        [sys.executable, "-m", "rdpm_cli", *command.split()],
        env=environment, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"rdpm: error: [^\n\x1b\r╭│]+\nhint: [^\n\x1b\r╭│]+\n", done.stderr)

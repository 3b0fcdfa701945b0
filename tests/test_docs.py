"""What README, CONTRIBUTING and docs/ show: every command is one of the real command line, and says who runs it."""

import contextlib
import io
import re
import shlex
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

import rdpm_cli
from rdpm_cli import recipes
from rdpm_cli.cli.app import app, run
from rdpm_cli.device import one_thread
from rdpm_cli.generator.registry import FAMILIES

ROOT = Path(rdpm_cli.__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHELLS = {"sh", "bash", "console"}
MARKS = {"run", "slow", "install", "ablation", "data", "gpu"}
SECTIONS = {"train-tokenizer": "tokenizer", "train-gen": "generator", "judge": "judge", "demo": ""}
PROGRAMS = {"pip", "uv", "python", "pytest", "ruff", "mypy", "export", "cd"}  # programs that a page may show
SAMPLING = {name for family in FAMILIES.values() for name in family.sampling.model_fields}

pytestmark = pytest.mark.skipif(not PAGES[0].is_file(), reason="the package is installed without its pages")


@dataclass(frozen=True)
class Block:
    """A fenced block. info: its language and marks."""

    page: str
    line: int
    info: tuple[str, ...]
    text: str

    @property
    def is_shell(self) -> bool:
        return bool(self.info) and self.info[0] in SHELLS

    @property
    def marks(self) -> set[str]:
        return set(self.info[1:])

    def commands(self) -> list[list[str]]:
        """Words of each simple command: comments gone, continued lines joined, cut at && and ;."""
        lines = self.text.replace("\\\n", " ").splitlines()
        if self.info[0] == "console":
            lines = [line[2:] for line in lines if line.startswith("$ ")]
        commands: list[list[str]] = []
        for line in lines:
            words = shlex.shlex(line, posix=True, punctuation_chars=True)
            words.whitespace_split = True
            commands.append([])
            for word in words:
                if word in {"&&", ";"}:
                    commands.append([])
                else:
                    commands[-1].append(word)
        return [words for words in commands if words]


def blocks() -> Iterator[Block]:
    for page in PAGES:
        if not page.is_file():
            continue
        name = page.relative_to(ROOT).as_posix()
        fences = re.finditer(r"^```([^\n]*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
        text = page.read_text()
        for match in fences:
            yield Block(name, text[: match.start()].count("\n") + 1, tuple(match[1].split()), match[2])


def rdpm_words(words: list[str]) -> list[str] | None:
    """The arguments of rdpm, however it is started; None for another program."""
    if words[:2] == ["uv", "run"]:
        words = words[2:]
    words = words[: words.index(">")] if ">" in words else words
    if words[0] == "rdpm":
        return words[1:]
    if words[0] == "torchrun" and "rdpm_cli" in words:
        return words[words.index("rdpm_cli") + 1 :]
    script = next((index for index, word in enumerate(words) if word.endswith("train.sbatch")), None)
    return None if script is None else words[script + 1 :]


def check(args: list[str]) -> None:
    """Raises where the real command line would: unknown command, option, value, recipe, key or sampling field."""
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        assert args, "no command"
        assert args[0] in command.commands, f"there is no command {args[0]}"
        command, args = command.commands[args[0]], args[1:]
    if "--help" in args:
        return
    params = command.make_context(command.name, list(args)).params
    if command.name in SECTIONS:
        recipe = params.get("recipe", "digits")
        recipes.load_recipe(recipe, params["overrides"] or [], SECTIONS[command.name])
    pairs = params.get("settings") or (params.get("arguments") if params.get("ckpt") else None) or []
    for pair in pairs:
        assert pair.partition("=")[0] in SAMPLING, f"{pair} is no sampling option"


SHELL_BLOCKS = [block for block in blocks() if block.is_shell]


@pytest.mark.parametrize("block", SHELL_BLOCKS, ids=lambda block: f"{block.page}:{block.line}")
def test_every_command_shown_is_one(block: Block) -> None:
    assert block.marks <= MARKS
    for words in block.commands():
        args = rdpm_words(words)
        if args is not None:
            check(args)
            assert block.marks, "a block of rdpm commands says who runs it: see CONTRIBUTING, Documentation is run"
            continue
        if words[0].startswith("recipes/ablations/"):
            assert (ROOT / words[0]).is_file()
            assert block.marks & {"ablation", "data", "gpu"}
            continue
        assert words[0] in PROGRAMS, f"{words[0]} is no program that the pages show"
        for word in words:
            if word.startswith(("tests/", "recipes/")):
                assert (ROOT / word).exists(), f"{word} does not exist"


@pytest.mark.parametrize(
    "wrong",
    [
        "no-such-command",
        "sample --ckpt x.pt --no-such-option",
        "sample --ckpt x.pt precisoin=bf16",
        "sample --ckpt x.pt --per-class none",
        "train-gen codes --recipe imagenet256-d99",
        "train-gen codes train.stepz=3",
        "train-tokenizer",
        "eval all --ckpt x.pt cfgg=1",
    ],
)
def test_a_wrong_command_is_found(wrong: str) -> None:
    with pytest.raises(Exception, match=r"."):
        check(wrong.split())


# ---- blocks that run -----------------------------------------------------------------------------------------------

SMALL = [
    "views=1", "tokenizer.quantizer.steps=3", "tokenizer.autoencoder.width=8", "tokenizer.train.steps=4",
    "tokenizer.train.batch=16", "generator.network.depth=1", "generator.network.width=32", "generator.train.steps=4",
    "judge.width=8", "judge.features=16", "judge.train.batch=16", "judge.train.steps=4",
]  # fmt: skip
FEWER = {  # what keeps a shown command small
    "train-tokenizer": ["train.steps=2", "train.batch=16", "train.eval_every=0", "autoencoder.width=8"],
    "train-gen": ["train.steps=2", "train.batch=16", "train.eval_every=0", "network.depth=1", "network.mixtures=4"],
    "sample": ["--per-class", "1"],
}


@pytest.fixture(scope="module")
def tour(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which `rdpm demo` has run, with a few steps of everything."""
    folder = tmp_path_factory.mktemp("tour")
    with contextlib.chdir(folder):
        assert answer(["demo", *SMALL])[0] == 0
        yield folder


def answer(args: list[str]) -> tuple[int, str]:
    """(exit code, stdout) of a command in this process."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), one_thread():
        return run(args), out.getvalue()


@pytest.fixture
def without_weights(no_weights: Path) -> None:
    """Nobody's weights are found, as on a machine that has none."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", sorted({b.page for b in SHELL_BLOCKS if "run" in b.marks}), ids=lambda page: page.replace("/", "-")
)
def test_what_a_page_shows_runs(page: str, tour: Path, without_weights: None) -> None:
    for block in (b for b in SHELL_BLOCKS if b.page == page and "run" in b.marks):
        codes = []
        for words in block.commands():
            args = rdpm_words(words)
            assert args is not None, f"{block.page}:{block.line} runs {words[0]}"
            code, text = answer([*args, *FEWER.get(args[0], [])])
            codes.append(code)
            if ">" in words:
                Path(words[words.index(">") + 1]).write_text(text)
        assert any(codes) == ("rdpm: error:" in block.text), f"{block.page}:{block.line}: exit codes {codes}"


@pytest.mark.parametrize(
    "block", [b for b in blocks() if b.info == ("python",)], ids=lambda block: f"{block.page}:{block.line}"
)
def test_what_python_a_page_shows_runs(
    block: Block, digits_codes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    Path("out/codes").symlink_to(digits_codes)
    exec(compile(block.text, f"{block.page}:{block.line}", "exec"), {})


@pytest.mark.slow
@pytest.mark.parametrize(
    "block", [b for b in SHELL_BLOCKS if "slow" in b.marks], ids=lambda block: f"{block.page}:{block.line}"
)
def test_what_takes_longer_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for words in block.commands():
        args = rdpm_words(words)
        assert args is not None
        assert answer(args)[0] == 0
    assert not list(tmp_path.iterdir())


# ---- the package ---------------------------------------------------------------------------------------------------


def test_the_version_stands_in_one_place() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in text
    assert rdpm_cli.__version__ in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.slow
def test_the_wheel_has_the_recipes_and_the_archive_what_the_tests_need(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="without hatchling here, building needs the network")
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (wheel,), (archive,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    assert rdpm_cli.__version__ in wheel.name
    shipped = {p.relative_to(ROOT / "recipes").as_posix() for p in (ROOT / "recipes").rglob("*") if p.is_file()}
    shipped = {name for name in shipped if "__pycache__" not in name}
    with zipfile.ZipFile(wheel) as opened:
        names = opened.namelist()
    assert {f"rdpm_cli/recipes/{name}" for name in shipped} <= set(names)
    assert not [name for name in names if not name.startswith(("rdpm_cli/", "rdpm-"))]
    with tarfile.open(archive) as packed:
        held = {name.partition("/")[2] for name in packed.getnames()}
    needed = {*(p.relative_to(ROOT).as_posix() for p in PAGES), *(f"recipes/{name}" for name in shipped)}
    needed |= {p.relative_to(ROOT).as_posix() for p in (ROOT / "tests").rglob("*.py")}
    assert needed <= held

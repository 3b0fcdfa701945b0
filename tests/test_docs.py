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
from generators import save_generator

import rdpm_cli
from rdpm_cli import recipes
from rdpm_cli.cli.app import app, run
from rdpm_cli.distributed import one_thread
from rdpm_cli.generator.registry import FAMILIES

ROOT = Path(rdpm_cli.__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
MARKS = {"run", "slow", "install", "ablation", "data", "gpu"}
SECTIONS = {"train-tokenizer": "tokenizer", "train-gen": "generator", "judge": "judge", "demo": ""}
PROGRAMS = {"pip", "uv", "python", "pytest", "ruff", "mypy", "export", "cd"}  # programs that a page may show
SAMPLING = {name for family in FAMILIES.values() for name in family.sampling.model_fields}

pytestmark = pytest.mark.skipif(not PAGES[0].is_file(), reason="the package is installed without its pages")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    place: str  # page and line
    language: str
    marks: frozenset[str]
    text: str

    def commands(self) -> list[list[str]]:
        """Words of each simple command: comments gone, continued lines joined, cut at && and ;."""
        lines = re.sub(r"(^|\s)#.*", "", self.text.replace("\\\n", " "), flags=re.MULTILINE).splitlines()
        if self.language == "console":
            lines = [line[2:] for line in lines if line.startswith("$ ")]
        return [words for line in lines for part in re.split("&&|;", line) if (words := shlex.split(part))]


def blocks(*languages: str) -> Iterator[Block]:
    for page in (page for page in PAGES if page.is_file()):
        text = page.read_text()
        for match in re.finditer(r"^```([^\n]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            place = f"{page.relative_to(ROOT).as_posix()}:{text[: match.start()].count(chr(10)) + 1}"
            language, *marks = match[1].split() or [""]
            if language in languages:
                yield Block(place, language, frozenset(marks), match[2])


SHELL_BLOCKS = list(blocks("sh", "bash", "console"))


def rdpm_words(words: list[str]) -> list[str] | None:
    """The arguments of rdpm, however it is started; None for another program."""
    words = words[2:] if words[:2] == ["uv", "run"] else words
    words = words[: words.index(">")] if ">" in words else words
    if words[0] == "rdpm":
        return words[1:]
    if words[0] == "torchrun" and "rdpm_cli" in words:
        return words[words.index("rdpm_cli") + 1 :]
    script = next((index for index, word in enumerate(words) if word.endswith(".sbatch")), None)
    return None if script is None else words[script + 1 :]


def check(args: list[str]) -> None:
    """Raises where the real command line would: unknown command, option, value, recipe, key or sampling field."""
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        command, args = command.commands[args[0]], args[1:]
    if "--help" in args:
        return
    params = command.make_context(command.name, list(args)).params
    if command.name in SECTIONS:
        recipes.load_recipe(
            params.get("recipe", "digits"),
            [word for word in params["overrides"] or [] if word != "speech"],
            SECTIONS[command.name],
        )
    pairs = params.get("settings") or (params.get("arguments") if params.get("ckpt") else None) or []
    assert {pair.partition("=")[0] for pair in pairs} <= SAMPLING


@pytest.mark.parametrize("block", SHELL_BLOCKS, ids=lambda block: block.place)
def test_every_command_shown_is_one(block: Block) -> None:
    assert block.marks <= MARKS
    for words in block.commands():
        if (args := rdpm_words(words)) is not None:
            check(args)
            assert block.marks, "a block of rdpm commands says who runs it: see CONTRIBUTING, Documentation is run"
        else:
            assert words[0] in PROGRAMS
            assert "recipes/ablations/run.py" not in words or block.marks & {"ablation", "data", "gpu"}
            assert all((ROOT / word).exists() for word in words if word.startswith(("tests/", "recipes/")))


def test_wrong_commands_are_found() -> None:
    for wrong in (
        "no-such-command",
        "train-tokenizer",
        "sample --ckpt x.pt precisoin=bf16",
        "train-gen x train.stepz=3",
    ):
        with pytest.raises(Exception, match=r"."):
            check(wrong.split())


FEWER = {  # what keeps a shown command small
    "demo": [
        "views=1", "tokenizer.quantizer.steps=3", "tokenizer.autoencoder.width=8", "tokenizer.train.steps=4",
        "tokenizer.train.batch=16", "generator.network.depth=1", "generator.network.width=32", "judge.width=8",
        "generator.train.steps=4", "judge.features=16", "judge.train.batch=16", "judge.train.steps=4",
    ],
    "train-tokenizer": ["train.steps=2", "train.batch=16", "train.eval_every=0", "autoencoder.width=8"],
    "train-gen": ["train.steps=2", "train.batch=16", "train.eval_every=0", "network.depth=1", "network.mixtures=4"],
    "sample": ["--per-class", "1"],
}  # fmt: skip


def answer(args: list[str]) -> tuple[int, str]:
    """(exit code, stdout) of a command in this process."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), one_thread():
        return run(args), out.getvalue()


@pytest.fixture(scope="module")
def tour(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A folder in which `rdpm demo` has run, with a few steps of everything."""
    with contextlib.chdir(tmp_path_factory.mktemp("tour")):
        assert answer(["demo", *FEWER["demo"]])[0] == 0
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("tour", "no_weights")
@pytest.mark.parametrize("page", sorted({b.place.split(":")[0] for b in SHELL_BLOCKS if b.marks & {"run", "slow"}}))
def test_what_a_page_shows_runs(page: str) -> None:
    for block in (b for b in SHELL_BLOCKS if b.place.startswith(f"{page}:") and b.marks & {"run", "slow"}):
        codes = []
        for words in block.commands():
            args = rdpm_words(words)
            assert args is not None
            code, text = answer([*args, *(FEWER.get(args[0], []) if "run" in block.marks else [])])
            codes.append(code)
            if ">" in words:
                Path(words[words.index(">") + 1]).write_text(text)
        assert any(codes) == ("rdpm: error:" in block.text), f"{block.place}: exit codes {codes}"


@pytest.mark.parametrize("page", sorted({block.place.split(":")[0] for block in blocks("python")}))
def test_what_python_a_page_shows_runs(
    page: str, digits_codes: Path, tiny_tokenizer_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks of a page one after another, as cells of a notebook."""
    monkeypatch.chdir(tmp_path)
    for folder in ("out", "demo"):
        Path(folder).mkdir()
        Path(folder, "codes").symlink_to(digits_codes)
    save_generator(Path("demo/generator.pt"), tiny_tokenizer_file, names="0123")
    cells: dict[str, Any] = {}
    for block in (block for block in blocks("python") if block.place.startswith(f"{page}:")):
        exec(compile(block.text, block.place, "exec"), cells)


@pytest.mark.slow
def test_the_wheel_has_the_recipes_and_the_archive_what_the_tests_need(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="without hatchling here, building needs the network")
    build = [sys.executable, "-m", "hatchling", "build", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, capture_output=True, check=True, timeout=120)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        packed = set(wheel.namelist())
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        archived = {name.partition("/")[2] for name in archive.getnames()}
    shipped = [path for path in (ROOT / "recipes").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {f"rdpm_cli/{path.relative_to(ROOT)}" for path in shipped} <= packed
    assert not [name for name in packed if not name.startswith(("rdpm_cli/", "rdpm-"))]
    needed = [*PAGES, *shipped, *(ROOT / "tests").rglob("*.py")]
    assert {path.relative_to(ROOT).as_posix() for path in needed} <= archived

"""The walls of the house: who imports whom, what costs no torch, what no module may write."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import rdpm_cli

PACKAGE = Path(rdpm_cli.__file__).parent
ROOMS = ["images", "tokenizer", "codes", "generator", "evaluation"]  # in the order the data walks
HELPERS = {p.stem for p in PACKAGE.glob("*.py")} - {"__init__", "__main__", "demo"} | {"config"}
LONGEST = 400  # lines of a module

ALLOWED: dict[str, set[str]] = {
    **{room: HELPERS | set(ROOMS[: place + 1]) for place, room in enumerate(ROOMS)},
    "training": HELPERS | {"training"},
    "engine": HELPERS | set(ROOMS) | {"engine", "training"},
    "demo": {"engine", "recipe_files", "errors", "files", "progress"},
    # the door also starts the demo, and sets up the process before anything is imported (threads)
    "cli": {"engine", "choices", "errors", "files", "progress", "team", "threads", "demo", "cli"},
    "__main__": {"cli"},
    "__init__": set(),
    **dict.fromkeys(HELPERS, HELPERS),
}

FORBIDDEN = {
    "an except that hides all": r"except\s*:",
    "an error that vanishes": r"except [^\n]*:\s*\n?\s*pass\b",
}


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def part_of(module: str) -> str:
    """rdpm_cli.tokenizer.model -> tokenizer; rdpm_cli -> ''."""
    return module.split(".")[1] if "." in module else ""


def imported_parts(path: Path) -> set[str]:
    """The rooms and helpers of the package that a file imports anywhere, inside functions too."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {part_of(alias.name) for alias in node.names if alias.name.split(".")[0] == "rdpm_cli"}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            if node.module == "rdpm_cli":
                found |= {alias.name for alias in node.names if not alias.name.startswith("__")}
            elif node.module and node.module.startswith("rdpm_cli."):
                found.add(part_of(node.module))
    return found


def home(path: Path) -> str:
    """The room or helper a file is."""
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def test_every_part_of_the_package_has_a_rule() -> None:
    assert {home(path) for path in sources()} == set(ALLOWED)


@pytest.mark.parametrize("part", sorted(ALLOWED))
def test_a_room_imports_only_rooms_before_it_and_plain_helpers(part: str) -> None:
    files = [path for path in sources() if home(path) == part]
    wrong = {str(path.relative_to(PACKAGE)): sorted(imported_parts(path) - ALLOWED[part]) for path in files}
    assert not {name: parts for name, parts in wrong.items() if parts}


def test_only_main_imports_the_command_line() -> None:
    importers = {home(path) for path in sources() if "cli" in imported_parts(path)}
    assert importers == {"cli", "__main__"}


def test_the_command_line_holds_no_maths() -> None:
    heavy = {"torch", "numpy", "PIL", "math"}
    for path in (p for p in sources() if home(p) == "cli"):
        nodes = list(ast.walk(tree(path)))
        names = {n.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for n in node.names}
        names |= {(node.module or "").split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}
        assert not names & heavy, path


@pytest.mark.parametrize("what", sorted(FORBIDDEN))
def test_no_module_writes(what: str) -> None:
    pattern = re.compile(FORBIDDEN[what])
    found = [f"{p.relative_to(PACKAGE)}: {m.group()}" for p in sources() for m in pattern.finditer(p.read_text())]
    assert not found


def test_modules_are_short() -> None:
    too_long = {str(p.relative_to(PACKAGE)): n for p in sources() if (n := len(p.read_text().splitlines())) > LONGEST}
    assert not too_long


# ---- what answers at once ------------------------------------------------------------------------------------------

COMMANDS = [
    "train-tokenizer", "tokenize", "reconstruct", "train-gen", "sample", "tune-sampling", "eval", "demo", "inspect",
    "verify", "doctor",
]  # fmt: skip
PROGRAM = """
import sys
from rdpm_cli.cli.app import run
code = run(sys.argv[1:])
heavy = sorted({"torch", "torchvision", "sklearn", "matplotlib"} & set(sys.modules))
print(f"exit {code}, imported {heavy}", file=sys.stderr)
"""


EXIT_CODES = {
    "--help": 0,
    "--version": 0,
    **{f"{command} --help": 0 for command in COMMANDS},
    **{f"eval {metric} --help": 0 for metric in ("fid", "sfid", "is", "pr", "kid", "all", "reference", "judge")},
    "eval recon --help": 0,
    "eval report --help": 0,
    "eval report no/such/run": 2,
    "no-such-command": 2,
    "sample --no-such-option": 2,
    "train-tokenizer digits --recipe digits train.stepz=3": 2,
    "train-gen codes --recipe digits train.stepz=3": 2,
    "train-tokenizer no/such/folder --recipe digits": 2,
    "train-tokenizer digits --recipe digits --from-weights no-such.pt": 3,
    "eval fid": 2,
    "eval judge no/such/folder out": 2,
    "verify no/such/store": 2,
    "sample --ckpt no/such.pt": 3,
    "sample --ckpt x.pt --device foo": 2,
    "tune-sampling no/such.pt": 3,
    "eval fid --ckpt no/such.pt": 3,
    "eval fid no/such/folder": 2,
    "train-gen no/such/store --print-config": 0,
    "eval judge no/such/folder out --print-config": 0,
}


@pytest.mark.parametrize("command", EXIT_CODES)
def test_the_cheap_answers_import_no_torch(command: str) -> None:
    args = [sys.executable, "-c", PROGRAM, *command.split()]
    done = subprocess.run(args, check=False, capture_output=True, text=True, timeout=60)
    assert done.stderr.splitlines()[-1] == f"exit {EXIT_CODES[command]}, imported []"


@pytest.mark.parametrize("command", ["--help", "--version"])
def test_help_imports_no_pydantic_either(command: str) -> None:
    """It would double the time that help takes. (Typer itself imports it for the help of a command.)"""
    program = PROGRAM.replace('"torch", ', '"torch", "pydantic", "numpy", ')
    done = subprocess.run([sys.executable, "-c", program, command], check=False, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].endswith("imported []")


def test_what_the_readme_shows_is_there_and_tracked() -> None:
    root = PACKAGE.parent
    if not (root / "README.md").is_file():
        pytest.skip("the package is installed without its README")
    shown = re.findall(r"\]\((?!https?:)([^)#]+)\)", (root / "README.md").read_text())
    assert "docs/demo/samples.png" in shown
    assert [name for name in shown if not (root / name).exists()] == []
    ignored = subprocess.run(["git", "check-ignore", *shown], cwd=root, capture_output=True, text=True, check=False)
    assert ignored.stdout == ""

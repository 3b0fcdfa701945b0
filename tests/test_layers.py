"""The rules of the house: who imports whom, where imports are, sizes, and what answers without torch."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import rdpm_cli

PACKAGE = Path(rdpm_cli.__file__).parent
ROOMS = ["data", "training", "tokenizer", "codes", "generator", "evaluation"]  # each may import those before it
HELPERS = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__", "recipes", "api"}
OPTIONAL = {"wandb", "flash_attn", "pyarrow", "timm", "ray"}  # packages that may be absent
OPTIONAL |= {"soundfile", "torchaudio", "jiwer", "pesq", "pystoi", "faster_whisper", "resemblyzer", "espeakng_loader"}
OPTIONAL |= {"safetensors", "huggingface_hub", "trackio", "mlflow", "gradio", "fsspec"}
SLOW = {"lpips", "torch_fidelity", "torchvision", "torchmetrics", "sklearn", "matplotlib"}  # to import
MODULE_LINES, FUNCTION_LINES = 500, 60
PARAMETERS = {"engine": 12}  # of a function in a room: engine functions take a command's options; default 10

ALLOWED: dict[str, set[str]] = {
    **{room: HELPERS | set(ROOMS[: index + 1]) for index, room in enumerate(ROOMS)},
    "api": HELPERS | set(ROOMS),
    "recipes": HELPERS | set(ROOMS),  # it joins the configs of the rooms
    "engine": HELPERS | set(ROOMS) | {"engine", "recipes"},
    "cli": {"engine", "errors", "files", "hub", "launcher", "progress", "schema", "distributed", "runs", "cli"},
    "__main__": {"cli"},
    "__init__": set(),
    **dict.fromkeys(HELPERS, HELPERS),
}

FORBIDDEN = {
    "an except that hides everything": r"except\s*:|except [^\n]*:\s*\n?\s*pass\b",
    "imports for type checkers only": r"\bTYPE_CHECKING\b",
    "click instead of Typer": r"^\s*(import|from) click\b",
}


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def room(path: Path) -> str:
    """The room or helper that a file belongs to."""
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def module_name(path: Path) -> str:
    name = ".".join(("rdpm_cli", *path.relative_to(PACKAGE).with_suffix("").parts))
    return name.removesuffix(".__init__")


def imports(node: ast.AST) -> Iterator[str]:
    """Full names of what is imported below a node: modules, and names in modules."""
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            yield from (f"{child.module}.{alias.name}" for alias in child.names)


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def test_a_room_imports_only_rooms_before_it_and_helpers() -> None:
    for path in sources():
        inside = {full.split(".")[1] for full in imports(tree(path)) if full.startswith("rdpm_cli.")}
        assert {part for part in inside if not part.startswith("__")} <= ALLOWED[room(path)], path


def test_imports_are_at_the_top() -> None:
    """Except for optional and slow packages, and in the command line, whose --help must not import torch."""
    for path in (path for path in sources() if room(path) != "cli"):
        inner = {full.split(".")[0] for function in functions(path) for full in imports(function)}
        assert inner <= OPTIONAL | SLOW, path


def test_modules_do_not_import_in_circles() -> None:
    modules = {module_name(path): path for path in sources()}
    graph = {}
    for name, path in modules.items():
        # `from a import b` imports the module a.b, or a name of the module a.
        targets = {full if full in modules else full.rpartition(".")[0] for full in imports(tree(path))}
        graph[name] = targets & set(modules) - {name, "rdpm_cli"}
    while leaves := {name for name, targets in graph.items() if not targets & set(graph)}:
        graph = {name: targets for name, targets in graph.items() if name not in leaves}
    assert graph == {}


def test_the_command_line_holds_no_maths() -> None:
    for path in (path for path in sources() if room(path) == "cli"):
        assert not {full.split(".")[0] for full in imports(tree(path))} & {"torch", "numpy", "PIL", "math"}, path


def test_one_module_loads_files_of_tensors() -> None:
    assert [module_name(path) for path in sources() if "torch.load(" in path.read_text()] == ["rdpm_cli.checkpoint"]


@pytest.mark.parametrize("rule", sorted(FORBIDDEN))
def test_no_module_contains(rule: str) -> None:
    pattern = re.compile(FORBIDDEN[rule], re.MULTILINE)
    hits = [f"{module_name(path)}: {m.group()}" for path in sources() for m in pattern.finditer(path.read_text())]
    assert not hits


def test_modules_and_functions_are_short() -> None:
    lines = {module_name(path): len(path.read_text().splitlines()) for path in sources()}
    assert {name: count for name, count in lines.items() if count > MODULE_LINES} == {}
    for path in (path for path in sources() if room(path) != "cli"):
        long = {f.name: n for f in functions(path) if (n := (f.end_lineno or 0) - f.lineno + 1) > FUNCTION_LINES}
        assert long == {}, path


def test_only_commands_have_many_parameters() -> None:
    for path in (path for path in sources() if room(path) != "cli"):
        counts = {f.name: len(f.args.posonlyargs + f.args.args + f.args.kwonlyargs) for f in functions(path)}
        most = PARAMETERS.get(room(path), 10) + 1  # 1: self
        assert {name: count for name, count in counts.items() if count > most} == {}, path


PROGRAM = """
import sys
from rdpm_cli.cli.app import run
code = run(sys.argv[1:])
heavy = sorted({"torch", "torchvision", "sklearn", "matplotlib"} & set(sys.modules))
print(f"exit {code}, imported {heavy}", file=sys.stderr)
"""
LIGHT = {
    "--help": 0, "--version": 0, "train-gen --help": 0, "eval fid --help": 0, "sample --no-such-option": 2,
    # Files that are no checkpoints: a text, an absent one, a folder.
    f"sample --ckpt {__file__}": 3, "tokenize x y --tokenizer no-such.pt": 3, "eval fid x --extractor /": 3,
    f"sample --ckpt {__file__} --judge x": 3, f"train-tokenizer x --from-weights {__file__}": 3,
    "inspect no-such.pt": 3, f"verify {__file__}": 3, "verify no-such.pt": 2,
}  # fmt: skip


def test_left_over_variables_of_torchrun_are_refused_before_torch_is_imported() -> None:
    args, environment = [sys.executable, "-c", PROGRAM, "inspect", "digits"], {**os.environ, "RANK": "1"}
    done = subprocess.run(args, check=False, capture_output=True, text=True, timeout=60, env=environment)
    assert done.stderr.splitlines()[-1] == "exit 2, imported []"


@pytest.mark.parametrize("command", LIGHT)
def test_help_and_errors_of_usage_and_of_files_import_no_torch(command: str) -> None:
    args = [sys.executable, "-c", PROGRAM, *command.split()]
    done = subprocess.run(args, check=False, capture_output=True, text=True, timeout=60)
    assert done.stderr.splitlines()[-1] == f"exit {LIGHT[command]}, imported []"

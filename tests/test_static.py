"""Forbidden calls: running code of a file or a shell, and loading that ignores misfits."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import rdpm_cli

PACKAGE = Path(rdpm_cli.__file__).parent
# Of flake8-bandit: exec, unsafe extraction, pickle, marshal, eval, unsafe YAML, shells.
RULES = "S102,S202,S301,S302,S307,S506,S602,S604,S605"
PATTERNS = {
    # InertPickle calls nothing that a file names but torch's functions for tensors.
    "code in a file of tensors": r"\btorch\.load\((?!.*(weights_only=True|pickle_module=InertPickle)\))",
    "a call that hides": r"from torch(\.serialization)? import load\b",
    "code in a file of arrays": r"\bnp\.load\((?!.*allow_pickle=False)|from numpy import load\b|\bnp\.fromfile",
    "code from a hub": r"\bhub\.load|load_state_dict_from_url|add_safe_globals|weights_only=(?!T)|allow_pickle=(?!F)",
    "weights that do not fit": r"load_state_dict\([^()]*(False|strict=(?!True))",
}


def bandit(*args: str, text: str = "") -> str:
    """What ruff reports of these files, or of a text on stdin."""
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", RULES, "--output-format", "concise"]
    return subprocess.run([*command, *args], input=text, capture_output=True, text=True, check=False).stdout


def violations(text: str) -> list[str]:
    return [name for name, pattern in PATTERNS.items() if re.search(pattern, text)]


def test_no_module_runs_code_it_reads_or_ignores_misfits() -> None:
    assert "All checks passed" in bandit(str(PACKAGE))
    found = {path.name: violations(path.read_text()) for path in PACKAGE.rglob("*.py")}
    assert {name: rules for name, rules in found.items() if rules} == {}


@pytest.mark.parametrize(
    "text",
    [
        "torch.load(f)", "torch.load(f, weights_only=False)", "np.load(f)", "from numpy import load\nload(f)",
        "torch.hub.load('a', 'b')", "np.load(f, allow_pickle=True)", "m.load_state_dict(s, strict=False)",
        "m.load_state_dict(s, False)", "import subprocess\nsubprocess.run(c, shell=True)", "import os\nos.system(c)",
        "exec(text)", "eval(text)", "import pickle\npickle.load(f)", "import yaml as y\ny.load(f)",
        "import tarfile\ntarfile.open(f).extractall(path)",
    ],
)  # fmt: skip
def test_forbidden_calls_are_found(text: str) -> None:
    assert violations(text) or "All checks passed" not in bandit("-", text=text)


@pytest.mark.parametrize(
    "text", ["torch.load(f, weights_only=True)", "network.eval()", "m.load_state_dict(s, assign=True)"]
)
def test_allowed_calls_are_not_reported(text: str) -> None:
    assert not violations(text)

"""What no module of the package may write: what runs the code of a file, of the net or of a shell, and loads that
forgive. By the syntax tree, so that neither spacing nor an import under another name hides it.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import rdpm_cli

PACKAGE = Path(rdpm_cli.__file__).parent

KEYWORDS = {"weights_only": True, "allow_pickle": False, "shell": False, "strict": True}  # the one value of each
NEEDED = {"torch.load": "weights_only", "numpy.load": "allow_pickle"}  # that stand in every call
CALLS = {
    "eval", "exec", "compile", "__import__",
    "builtins.eval", "builtins.exec", "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput",
    "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load", "marshal.loads", "shelve.open", "joblib.load",
    "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.unsafe_load_all",
    "torch.hub.load", "torch.hub.load_state_dict_from_url", "numpy.fromfile",
}  # fmt: skip


def names(tree: ast.Module) -> dict[str, str]:
    """What an imported name stands for: {'np': 'numpy', 'F': 'torch.nn.functional'}."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.asname or alias.name.split(".")[0]: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


def called(node: ast.Call, known: dict[str, str]) -> str:
    """The function by its full name, as far as the text says."""
    first, dot, rest = ast.unparse(node.func).partition(".")
    return known.get(first, first) + dot + rest


def wrongs(text: str) -> Iterator[str]:
    """What a module writes and may not."""
    tree = ast.parse(text)
    known = names(tree)
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = called(node, known)
        given = {k.arg: k.value for k in node.keywords if k.arg}
        if name in CALLS:
            yield f"{node.lineno}: {name}"
        if name in NEEDED and NEEDED[name] not in given:
            yield f"{node.lineno}: {name} without {NEEDED[name]}"
        if name.endswith(".load_state_dict") and len(node.args) > 1:
            yield f"{node.lineno}: load_state_dict with strict by place"
        for keyword, value in given.items():
            if keyword in KEYWORDS and not (isinstance(value, ast.Constant) and value.value is KEYWORDS[keyword]):
                yield f"{node.lineno}: {keyword}={ast.unparse(value)}"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_module_runs_what_it_reads_or_forgives_what_does_not_fit(path: Path) -> None:
    assert list(wrongs(path.read_text())) == []


@pytest.mark.parametrize(
    "text",
    [
        "torch.load(f)", "torch.load(f, weights_only=False)", "torch.load(f, weights_only=safe)",
        "import numpy as np\nnp.load(f)", "from numpy import load\nload(f)", "np.load(f, allow_pickle = True)",
        "import yaml as y\ny.load(f)", "from yaml import unsafe_load as load\nload(f)", "torch.hub.load('a', 'b')",
        "subprocess.run(c, shell=True)", "import os\nos.system(c)", "m.load_state_dict(s, strict=False)",
        "m.load_state_dict(s, False)", "eval(text)", "exec(text)", "import pickle\npickle.load(f)",
    ],
)  # fmt: skip
def test_what_is_forbidden_is_seen(text: str) -> None:
    assert list(wrongs(text))


@pytest.mark.parametrize(
    "text",
    [
        "torch.load(f, weights_only=True)", "import numpy as np\nnp.load(f, allow_pickle=False)", "network.eval()",
        "zip(a, b, strict=True)", "m.load_state_dict(s)", "re.compile(p)", "torch.compile(m)", "json.load(f)",
    ],
)  # fmt: skip
def test_what_is_allowed_is_not(text: str) -> None:
    assert not list(wrongs(text))

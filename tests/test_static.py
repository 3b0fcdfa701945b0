"""Forbidden calls: running code of a file, the network or a shell, and loading that ignores misfits.

The syntax tree is searched, so that neither spacing nor an import under another name hides a call.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import rdpm_cli

PACKAGE = Path(rdpm_cli.__file__).parent

KEYWORDS = {"weights_only": True, "allow_pickle": False, "shell": False, "strict": True}  # the only allowed values
NEEDED = {"torch.load": "weights_only", "torch.serialization.load": "weights_only", "numpy.load": "allow_pickle"}
FORBIDDEN = {  # to call, or to pass on under another name
    "eval", "exec", "compile", "__import__",
    "builtins.eval", "builtins.exec", "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput",
    "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load", "marshal.loads", "shelve.open", "joblib.load",
    "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.unsafe_load_all",
    "yaml.Loader", "yaml.FullLoader", "yaml.UnsafeLoader", "yaml.CLoader", "yaml.CFullLoader", "yaml.CUnsafeLoader",
    "dill.load", "dill.loads", "cloudpickle.load", "cloudpickle.loads",
    "torch.hub.load", "torch.hub.load_state_dict_from_url", "torch.serialization.add_safe_globals",
    "numpy.fromfile", "numpy.lib.format.read_array",
}  # fmt: skip


def names(tree: ast.Module) -> dict[str, str]:
    """The full names of imported ones: {'np': 'numpy', 'F': 'torch.nn.functional'}."""
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {alias.asname or alias.name.split(".")[0]: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            aliases |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return aliases


def full(node: ast.expr, known: dict[str, str]) -> str:
    """The full name of an expression, as far as the text shows it."""
    first, dot, rest = ast.unparse(node).partition(".")
    return known.get(first, first) + dot + rest


def violations(text: str) -> Iterator[str]:
    """The forbidden calls of a module, each with its line."""
    tree = ast.parse(text)
    known = names(tree)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    functions = {id(node.func) for node in calls}
    for named in (node for node in ast.walk(tree) if isinstance(node, ast.Attribute | ast.Name)):
        name, is_called = full(named, known), id(named) in functions
        if (name in FORBIDDEN and ("." in name or is_called)) or (name in NEEDED and not is_called):
            yield f"{named.lineno}: {name}"
    for node in calls:
        name = full(node.func, known)
        keywords = {k.arg: k.value for k in node.keywords if k.arg}
        if name in NEEDED and NEEDED[name] not in keywords:
            yield f"{node.lineno}: {name} without {NEEDED[name]}"
        if (name in NEEDED or name.startswith("subprocess.")) and len(keywords) < len(node.keywords):
            yield f"{node.lineno}: {name} with **keywords"
        if name.startswith("subprocess.") and len(node.args) > 1:
            yield f"{node.lineno}: {name} with positional options"
        if name.endswith(".extractall"):
            yield f"{node.lineno}: {name}"
        if name.endswith(".load_state_dict") and len(node.args) > 1:
            yield f"{node.lineno}: load_state_dict with positional strict"
        for keyword, value in keywords.items():
            if keyword in KEYWORDS and not (isinstance(value, ast.Constant) and value.value is KEYWORDS[keyword]):
                yield f"{node.lineno}: {keyword}={ast.unparse(value)}"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_module_runs_code_it_reads_or_ignores_misfits(path: Path) -> None:
    assert list(violations(path.read_text())) == []


@pytest.mark.parametrize(
    "text",
    [
        "torch.load(f)", "torch.load(f, weights_only=False)", "torch.load(f, weights_only=safe)",
        "import numpy as np\nnp.load(f)", "from numpy import load\nload(f)", "np.load(f, allow_pickle = True)",
        "import yaml as y\ny.load(f)", "from yaml import unsafe_load as load\nload(f)", "torch.hub.load('a', 'b')",
        "subprocess.run(c, shell=True)", "import os\nos.system(c)", "m.load_state_dict(s, strict=False)",
        "m.load_state_dict(s, False)", "eval(text)", "exec(text)", "import pickle\npickle.load(f)",
        "import yaml\nyaml.Loader(f)", "import yaml\nyaml.UnsafeLoader(f).get_single_data()",
        "from torch.serialization import load; load(f)", "g = torch.load; g(f)",
        "torch.load(f, weights_only=True, **more)", "subprocess.call(c, **{'shell': True})",
        "subprocess.Popen(c, -1, None, None, None, None, None, True, True)", "import dill\ndill.load(f)",
        "tarfile.open(f).extractall(path)", "numpy.lib.format.read_array(f, True)",
        "torch.serialization.add_safe_globals([C])",
    ],
)  # fmt: skip
def test_forbidden_calls_are_found(text: str) -> None:
    assert list(violations(text))


@pytest.mark.parametrize(
    "text",
    [
        "torch.load(f, weights_only=True)", "import numpy as np\nnp.load(f, allow_pickle=False)", "network.eval()",
        "zip(a, b, strict=True)", "m.load_state_dict(s)", "re.compile(p)", "torch.compile(m)", "json.load(f)",
    ],
)  # fmt: skip
def test_allowed_calls_are_not_reported(text: str) -> None:
    assert not list(violations(text))

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
NEEDED = {"torch.load": "weights_only", "torch.serialization.load": "weights_only", "numpy.load": "allow_pickle"}
FORBIDDEN = {  # called, or handed on under another name
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
    """What an imported name stands for: {'np': 'numpy', 'F': 'torch.nn.functional'}."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.asname or alias.name.split(".")[0]: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


def full(node: ast.expr, known: dict[str, str]) -> str:
    """What an expression names, as far as the text says."""
    first, dot, rest = ast.unparse(node).partition(".")
    return known.get(first, first) + dot + rest


def wrongs(text: str) -> Iterator[str]:
    """What a module writes and may not."""
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
        given = {k.arg: k.value for k in node.keywords if k.arg}
        if name in NEEDED and NEEDED[name] not in given:
            yield f"{node.lineno}: {name} without {NEEDED[name]}"
        if (name in NEEDED or name.startswith("subprocess.")) and len(given) < len(node.keywords):
            yield f"{node.lineno}: {name} with keywords that stand elsewhere"
        if name.startswith("subprocess.") and len(node.args) > 1:
            yield f"{node.lineno}: {name} with options by place"
        if name.endswith(".extractall"):
            yield f"{node.lineno}: {name}"
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
        "import yaml\nyaml.Loader(f)", "import yaml\nyaml.UnsafeLoader(f).get_single_data()",
        "from torch.serialization import load; load(f)", "g = torch.load; g(f)",
        "torch.load(f, weights_only=True, **more)", "subprocess.call(c, **{'shell': True})",
        "subprocess.Popen(c, -1, None, None, None, None, None, True, True)", "import dill\ndill.load(f)",
        "tarfile.open(f).extractall(path)", "numpy.lib.format.read_array(f, True)",
        "torch.serialization.add_safe_globals([C])",
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

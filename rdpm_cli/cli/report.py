"""Printing a result: text for people, JSON for scripts. stdout is the answer and nothing else."""

import json
import os
from typing import TYPE_CHECKING, Any

from rdpm_cli import progress, team

if TYPE_CHECKING:
    from rdpm_cli.engine import Result


def begin(quiet: bool) -> None:
    """Set how much is said on stderr. Under torchrun only the first process speaks."""
    progress.quiet = quiet or not _first_process()


def show(result: "Result", as_json: bool) -> None:
    """Print a result on stdout. Several processes print it once; those that `--gpus` started leave it to it."""
    if team.started() or not _first_process():
        return
    if as_json:
        print(json.dumps(result.values, indent=2, allow_nan=False))
        return
    if result.text:
        print(result.text, end="")
        return
    print(result.title)
    rows = list(_flat(result.values))
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        print(f"  {name:<{width}}  {value}".rstrip())
    if result.next:
        print(f"next: {result.next}")


def _first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Rows of the table. What is None is left out, unless `not_computed` has a reason for it."""
    rows: list[tuple[str, str]] = []
    reasons = values.get("not_computed", {})
    for name, value in values.items():
        if name in reasons:
            rows.append((prefix + name, f"not computed, {reasons[name]}"))
        elif name == "not_computed":
            continue
        elif isinstance(value, dict):
            rows += _flat(value, f"{prefix}{name}.")
        elif value is not None and value != []:
            rows.append((prefix + name, _text(value)))
    return rows


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        sentences = any(isinstance(v, str) and " " in v for v in value)
        return ("; " if sentences else ", ").join(_text(v) for v in value)
    return str(value)

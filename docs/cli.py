"""Write docs/cli.md from the commands themselves: `python docs/cli.py > docs/cli.md`."""

from collections.abc import Iterator
from typing import Any

import typer

from rdpm_cli.cli.app import app

REGENERATE = "python docs/cli.py > docs/cli.md"

HEAD = f"""# Command line

Every command, argument, option and default, written by `{REGENERATE}`. A test compares this page with the commands.

## What holds for every command

- **stdout is the answer**: a table, or with `--json` one JSON document without NaN. Progress, warnings and errors go to
  stderr; `--quiet` leaves warnings and errors.
- **Errors** are two lines: `rdpm: error: ...` and `hint: ...` with what to do next. `RDPM_DEBUG=1` adds the traceback;
  a bug always shows its own.
- **Exit codes**: 0 ok; 1 the run failed (disk full, out of memory, NaN, another process writes there); 2 usage or
  recipe; 3 data, checkpoint or weights; 75 stopped by SIGTERM or SIGUSR1 after saving, so run it again; 130 Ctrl-C,
  after saving too. A second signal ends a command at once.
- **The same command again resumes** and reports from where; a finished one returns at once (the trainings, `tokenize`,
  `sample`, `demo`, `tune-sampling`). A folder that was started with other settings is refused, with the differences.
- **Progress** is a bar on a terminal and a plain line every 10 s elsewhere. With `rdpm --log-format json COMMAND`
  each line of stderr is a JSON document: `time`, `kind` (`progress`, `finished`, `info`, `warning`, `error`),
  `message`, and depending on the kind `job`, `done`, `total`, `unit`, `rate`, `seconds`, `seconds_left`, `note`,
  `before` (done by an earlier call), or `hint`, `exit_code`, `trace`.
- **Recipes**: `KEY=VALUE` sets any field; a short key belongs to the command's section (`train.steps=100`). Unknown
  keys are refused with the nearest one. `--print-config` prints the resolved recipe, which `--recipe FILE.yaml` reads
  back. `--seed N` is `seed=N`.
- **Several GPUs**: `--gpus N`, or torchrun with `-m rdpm_cli` and the same arguments.
- **Completion**: `rdpm --install-completion` for bash, zsh, fish and PowerShell.

| variable | for |
|---|---|
| `RDPM_TOKENIZER` | the tokenizer if `--tokenizer` is left out |
| `RDPM_WEIGHTS` | folder of published weight files; torch hub's folder (`TORCH_HOME`) is searched after it |
| `RDPM_DEBUG` | `1`: errors keep their traceback |
"""


def page() -> str:
    """The whole of docs/cli.md."""
    return HEAD + "".join(f"\n{section}" for section in _sections(typer.main.get_command(app), "rdpm", {}))


def commands() -> dict[str, Any]:
    """Every command that does something, by the words that call it: {'eval fid': ...}."""
    leaves, groups = {}, [("", typer.main.get_command(app))]
    while groups:
        words, command = groups.pop(0)
        inner = getattr(command, "commands", None)
        if inner is None:
            leaves[words] = command
        else:
            groups += [(f"{words} {name}".strip(), child) for name, child in inner.items()]
    return leaves


def _sections(command: Any, words: str, tables: dict[str, str]) -> Iterator[str]:
    """The section of a command, then those of its subcommands. tables: those that are written -> of which command."""
    yield _section(command, words, tables)
    for name, inner in getattr(command, "commands", {}).items():
        yield from _sections(inner, f"{words} {name}", tables)


def _section(command: Any, words: str, tables: dict[str, str]) -> str:
    """Help, usage, and a row of the table for each argument and option, or the command that has the same table."""
    context = typer.Context(command, info_name=words)
    records = [(parameter.param_type_name, parameter.get_help_record(context)) for parameter in command.params]
    rows = [f"| `{_cell(left)}` | {_cell(right, '&lt;')} |" for _, (left, right) in records]
    positional = [left.split(" <")[0] for kind, (left, _) in records if kind == "argument"]
    usage = " ".join((words, "[OPTIONS]", *positional, *(["COMMAND ..."] if hasattr(command, "commands") else [])))
    text = "\n".join(line.strip() for line in (command.help or "").strip().splitlines())
    table = "\n".join(("| argument or option | meaning |", "|---|---|", *rows))
    if (first := tables.setdefault(table, words)) != words:
        table = f"Arguments and options as of [{first}](#{first.replace(' ', '-')})."
    return "\n\n".join((f"## {words}", text, f"```\n{usage}\n```", *([table] if rows else []))) + "\n"


def _cell(text: str, less: str = "<") -> str:
    """One line that a table may hold. less: how < is written."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", less)


if __name__ == "__main__":
    print(page(), end="")

"""docs/cli.md, made from the commands themselves: `python -m rdpm_cli.cli.reference > docs/cli.md`."""

from collections.abc import Iterator
from typing import Any

import typer

REGENERATE = "python -m rdpm_cli.cli.reference > docs/cli.md"

HEAD = f"""# Command line

Every command, argument, option and default. Written by `{REGENERATE}`; a test compares this page with the commands.

## What holds for every command

- **stdout is the answer**, a table or with `--json` one JSON document without NaN; progress, warnings and errors go to
  stderr. `--quiet` leaves warnings and errors.
- **Errors** are two lines, `rdpm: error: ...` and `hint: ...` with what to do next. `RDPM_DEBUG=1` puts the traceback
  above them; a bug always shows its own, since nobody can mend it without. No error is boxed, coloured or wrapped.
- **Exit codes**: 0 ok; 1 the run failed (disk full, out of memory, NaN, somebody else writes there); 2 usage or recipe;
  3 data, checkpoint or weights; 75 stopped by SIGTERM or SIGUSR1 after saving, so run it again; 130 Ctrl-C, after
  saving too. A second signal ends a command at once, by the signal (143 for SIGTERM). A reader of stdout that goes
  away, as in `| head -1`, is no error. A path that is not there is 2, a checkpoint that is not there 3.
- **The same command again resumes**, and says from where; a finished one returns at once (the trainings, `tokenize`,
  `sample`, `demo`; a `tune-sampling` that was stopped goes on). A folder that was begun with other settings is refused,
  with what differs. There is no `--fresh`: name another `--out`. `reconstruct` and `eval` are short, and are done anew.
- **Progress** is a bar on a terminal, elsewhere a plain line every 10 to 25 s, without carriage returns or colours.
  `rdpm --log-format json COMMAND` makes each line of stderr a JSON document: `time` (seconds since 1970), `kind`
  (`progress`, `finished`, `info`, `warning`, `error`), `message`, and by kind `job`, `done`, `total`, `unit`, `rate`,
  `seconds`, `seconds_left`, `note`, `before` (done by an earlier call), or `hint`, `exit_code`, `trace`.
- **Recipes**: `KEY=VALUE` sets any field, a short key in the section of the command (`train.steps=100`); an unknown key
  is refused with the nearest one, and so is a key written twice in a file. `--print-config` prints the resolved recipe
  and runs nothing; fed back as `--recipe FILE.yaml` it has the same digest and the same default folder. `yes`, `no`
  and `12:30` are words, not YAML 1.1's True, False and 750. `--seed N` is `seed=N`.
- **`--dry-run`** stands where work is long: `train-tokenizer`, `tokenize`, `train-gen`, `sample`, also on a machine
  without the GPUs. The training commands take images and stores that are not there to be ImageNet's, and say so.
  `eval` has none: what it needs (weights, reference, samples) is checked before the first image is read, and its length
  is on its progress line. Nor have `demo`, `eval judge` and `tune-sampling`, which take minutes.
- **Several GPUs**: `--gpus N`, or torchrun with `-m rdpm_cli` and the same arguments. One process speaks.
- **Completion**: `rdpm --install-completion` for bash, zsh, fish and PowerShell: commands, options, names of recipes,
  GPUs, presets, schedules and devices. Neither it nor `--help`, `--version`, `--print-config` or an error in the
  command line itself imports torch; what only a checkpoint or a GPU can refuse is found after the import.
- **An option means the same wherever it stands.** Two names serve for two kinds of value: `--out` is a folder or a file
  as its command says, and `--keep` is what a store keeps (`tokenize`) or how many checkpoints a run keeps.

| variable | for |
|---|---|
| `RDPM_TOKENIZER` | the tokenizer, where `--tokenizer` is not given |
| `RDPM_WEIGHTS` | folder of published weight files; after it torch hub's (`TORCH_HOME`) is looked at |
| `RDPM_CACHE` | activations of `eval`; default `~/.cache/rdpm` |
| `RDPM_DEBUG` | `1`: errors keep their traceback |
"""


def page() -> str:
    """The whole of docs/cli.md."""
    from rdpm_cli.cli.app import app

    return HEAD + "".join(f"\n{section}" for section in _sections(typer.main.get_command(app), "rdpm"))


def commands() -> dict[str, Any]:
    """Every command that does something, by the words that call it: {'eval fid': ...}."""
    from rdpm_cli.cli.app import app

    found = {}
    below = [("", typer.main.get_command(app))]
    while below:
        words, command = below.pop(0)
        inner = getattr(command, "commands", None)
        if inner is None:
            found[words] = command
        else:
            below += [(f"{words} {name}".strip(), child) for name, child in inner.items()]
    return found


def _sections(command: Any, words: str) -> Iterator[str]:
    """A command's section, then those of the commands in it."""
    yield _section(command, words)
    for name, inner in getattr(command, "commands", {}).items():
        yield from _sections(inner, f"{words} {name}")


def _section(command: Any, words: str) -> str:
    """Its help, its usage, and a row of the table for each argument and option."""
    context = typer.Context(command, info_name=words)
    records = [(p.param_type_name, p.get_help_record(context)) for p in command.params]
    rows = [f"| `{_cell(left)}` | {_cell(right, '&lt;')} |" for _, (left, right) in records]
    positional = [left.split(" <")[0] for kind, (left, _) in records if kind == "argument"]
    call = " ".join((words, "[OPTIONS]", *positional, *(["COMMAND ..."] if hasattr(command, "commands") else [])))
    text = "\n".join(line.strip() for line in (command.help or "").strip().splitlines())
    table = "\n".join(("| argument or option | what |", "|---|---|", *rows))
    return "\n\n".join((f"## {words}", text, f"```\n{call}\n```", *([table] if rows else []))) + "\n"


def _cell(text: str, less: str = "<") -> str:
    """One line that a table may hold. less: how < is written."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", less)


if __name__ == "__main__":
    print(page(), end="")

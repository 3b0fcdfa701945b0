"""The app, its one map from errors to exit codes, and `main`."""

import os
import sys
import traceback
import warnings
from typing import Annotated, Literal

import typer

from rdpm_cli import __version__, files, progress, team
from rdpm_cli.cli import options
from rdpm_cli.errors import EXIT_FAILED, EXIT_INTERRUPT, EXIT_USAGE, LostProcessError, RdpmError

HELP = """Image generation by recurrent token prediction (RDPM, arXiv 2412.18390).

images -> train-tokenizer -> tokenize -> train-gen -> sample -> eval. Start with `rdpm demo`.

Exit codes: 0 ok, 1 run failed, 2 usage or recipe, 3 data or checkpoint, 75 stopped by a signal after saving,
130 Ctrl-C.
"""

app = typer.Typer(
    name="rdpm", help=HELP, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False
)  # fmt: skip


def _version(asked: bool) -> None:
    if asked:
        print(f"rdpm {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="print it")] = False,
    log_format: Annotated[
        Literal["text", "json"], typer.Option("--log-format", help="of what goes to stderr; json: a document a line")
    ] = "text",
) -> None:
    """Options that stand before the subcommand."""
    progress.as_json = log_format == "json"


def fail(code: int, message: str = "", hint: str = "", trace: str = "", lost: bool = False) -> int:
    """Say what went wrong, as every error does: two lines, or a bug's traceback, or both. -> the exit code, `code`.

    In a process that `--gpus` started the launcher shows them. lost: only because another process has gone.
    """
    if team.leave(team.Failure(code, message, hint, trace, lost)):
        return code
    if code == EXIT_USAGE and os.environ.get("RANK", "0") != "0":  # under torchrun every process finds the same
        return code
    progress.error(message, hint, code, trace)
    return code


def main() -> None:
    """Run a command and leave with its exit code. A bug keeps its traceback."""
    from rdpm_cli.threads import tune_allocator

    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by `>&-`
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  # until the process ends
    warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
    tune_allocator()
    team.begin()
    code = run()
    try:
        sys.stdout.flush()  # what an error left there
    except BrokenPipeError:
        _stop_printing()
    sys.exit(code)


def _stop_printing() -> None:
    """Nobody reads stdout any more: let nothing more be said of it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run(args: list[str] | None = None) -> int:
    """Run a command. -> exit code."""
    debug = os.environ.get("RDPM_DEBUG") == "1"
    options.command_line = sys.argv[1:] if args is None else args
    try:
        code = app(args=args, prog_name="rdpm", standalone_mode=False)
        if code == EXIT_INTERRUPT:  # typer's answer to Ctrl-C
            raise KeyboardInterrupt
        sys.stdout.flush()
        return int(code or 0)
    except RdpmError as error:
        trace = error.trace or (traceback.format_exc() if debug else "")
        return fail(error.exit_code, error.message, error.hint, trace, isinstance(error, LostProcessError))
    except typer.TyperException as error:
        if error.format_message().startswith("Usage:"):  # a command group without a command: its help
            progress.say(error.format_message())
            return EXIT_USAGE
        context = getattr(error, "ctx", None)
        return fail(EXIT_USAGE, error.format_message(), f"see `{context.command_path if context else 'rdpm'} --help`")
    except (KeyboardInterrupt, typer.Abort):
        return fail(EXIT_INTERRUPT, "interrupted", "run the same command again; finished work is kept")
    except (BrokenPipeError, SystemExit):  # typer makes the second of the first, and of nothing else here
        _stop_printing()
        return 0
    except (OSError, MemoryError, RuntimeError) as error:
        known = _known(error)
        return fail(EXIT_FAILED, *(known or ("", "")), trace=traceback.format_exc() if debug or not known else "")
    except Exception:  # a bug
        if not team.started():
            raise
        return fail(EXIT_FAILED, trace=traceback.format_exc())


def _known(error: BaseException) -> tuple[str, str] | None:
    """Message and hint for failures of the machine; None for a bug."""
    if isinstance(error, OSError) and error.errno in files.FULL:
        return files.full(error)
    if isinstance(error, PermissionError):
        return f"not allowed: {error.filename or error}", "choose another folder, or mend its permissions"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"out of memory: {str(error).splitlines()[0] if str(error) else 'no detail'}", "use a smaller batch"
    return None


# each file adds its subcommand, in the order the data walks
from rdpm_cli.cli import demo, train_tokenizer, tokenize, reconstruct, train_gen, sample, tune_sampling  # noqa: E402, F401, I001
from rdpm_cli.cli import evaluate, inspect, verify, doctor  # noqa: E402, F401

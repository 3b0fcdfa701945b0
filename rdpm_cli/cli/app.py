"""The app, its one map from errors to exit codes, and `main`."""

import errno
import os
import sys
import traceback
from typing import Annotated

import typer

from rdpm_cli import __version__
from rdpm_cli.errors import EXIT_FAILED, EXIT_INTERRUPT, EXIT_USAGE, RdpmError

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
) -> None:
    """Options that stand before the subcommand."""


def fail(message: str, hint: str) -> None:
    """The two lines every error makes."""
    print(f"rdpm: error: {message}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)


def main() -> None:
    """Run a command and leave with its exit code. A bug keeps its traceback."""
    from rdpm_cli.threads import tune_allocator

    tune_allocator()
    sys.exit(run())


def run(args: list[str] | None = None) -> int:
    """Run a command. -> exit code."""
    debug = os.environ.get("RDPM_DEBUG") == "1"
    try:
        code = app(args=args, prog_name="rdpm", standalone_mode=False)
        if code == EXIT_INTERRUPT:  # typer's answer to Ctrl-C
            raise KeyboardInterrupt
        sys.stdout.flush()
        return int(code or 0)
    except RdpmError as error:
        if debug:
            traceback.print_exc()
        fail(error.message, error.hint)
        return error.exit_code
    except typer.TyperException as error:
        if error.format_message().startswith("Usage:"):  # a command group without a command: its help
            print(error.format_message(), file=sys.stderr)
            return EXIT_USAGE
        fail(error.format_message(), "see `rdpm --help`, or `rdpm COMMAND --help`")
        return EXIT_USAGE
    except (KeyboardInterrupt, typer.Abort):
        fail("interrupted", "run the same command again; finished work is kept")
        return EXIT_INTERRUPT
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, MemoryError, RuntimeError) as error:
        known = _known(error)
        if debug or not known:
            traceback.print_exc()
        if known:
            fail(*known)
        return EXIT_FAILED


def _known(error: BaseException) -> tuple[str, str] | None:
    """Message and hint for failures of the machine; None for a bug."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"disk full: {error.filename or error}", "free some space and run the same command again"
    if isinstance(error, PermissionError):
        return f"not allowed: {error.filename or error}", "choose another folder, or mend its permissions"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"out of memory: {str(error).splitlines()[0] if str(error) else 'no detail'}", "use a smaller batch"
    return None


# each file adds its subcommand, in the order the data walks
from rdpm_cli.cli import demo, train_tokenizer, tokenize, reconstruct, train_gen, sample, evaluate, inspect  # noqa: E402, F401, I001

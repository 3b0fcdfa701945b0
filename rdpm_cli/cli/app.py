"""The Typer app: options that commands share, the map from errors to exit codes, and how a result is printed."""

import ctypes
import inspect
import json as json_format
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rdpm_cli import __version__, files, progress
from rdpm_cli.errors import (
    EXIT_FAILED,
    EXIT_INTERRUPT,
    EXIT_STOPPED,
    EXIT_USAGE,
    LostProcessError,
    RdpmError,
    UsageError,
)

HELP = """Image generation by recurrent token prediction (RDPM, arXiv 2412.18390).

images -> train-tokenizer -> tokenize -> train-gen -> sample -> eval. Start with `rdpm demo`.

Exit codes: 0 ok, 1 run failed, 2 usage or recipe, 3 data or checkpoint, 75 stopped by a signal after saving,
130 Ctrl-C.
"""

app = typer.Typer(
    name="rdpm", help=HELP, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False
)  # fmt: skip
Function = Callable[..., "Result"]
command_line: list[str] = []  # of the command that runs, without the program; --gpus starts it again
LAUNCHER = "RDPM_LAUNCHER"  # environment variable of a process that --gpus has started


# ---- shared options: a name means the same in every command --------------------------------------------------------


def _recipe_names(incomplete: str) -> list[str]:
    """Shell completion."""
    from rdpm_cli.schema import recipe_names

    return [name for name in recipe_names() if name.startswith(incomplete)]


def _check_device(value: str) -> str:
    """Refuse a name that is no device on any machine, before torch is imported. Raises UsageError."""
    if re.fullmatch(r"auto|cpu|cuda(:\d+)?", value) is None:
        raise UsageError(f"unknown device '{value}'", "give auto, cpu, cuda or cuda:N")
    return value


IMAGES = "folder or .zip of class folders, flat folder, .tar shards ('train-{0000..0009}.tar'), parquet, or digits"
FROM_WEIGHTS = "start from VAR, taming or LlamaGen weights, or a tokenizer.pt"
PRINT_CONFIG = "print the resolved recipe, as a FILE for --recipe; write nothing"
REF = "images, or an .npz of statistics; default: recorded in the samples or checkpoint"
RESOLUTION = "crop size; default: of the samples or recipe, else the first image's short side"
TARGET = "checkpoint, run, store, samples, images, recipe"

_ckpt = typer.Option("--ckpt", metavar="FILE", help="generator checkpoint")
_seed = typer.Option(min=0, max=2**63 - 1, help="of everything that is drawn at random")
_overrides = typer.Argument(metavar="[KEY=VALUE]...", help="recipe overrides, e.g. train.steps=100")
_recipe = typer.Option(metavar="NAME|FILE", help="shipped recipe, or a YAML file", autocompletion=_recipe_names)
_target = typer.Argument(metavar="PATH|RECIPE", help=TARGET, autocompletion=_recipe_names)
_tokenizer = typer.Option(metavar="FILE", help="default: $RDPM_TOKENIZER, else tokenizer.pt in this folder")
_gpus = typer.Option("--gpus", metavar="N", min=1, help="processes, one a GPU of this node; default: only this one")

Ckpt = Annotated[Path, _ckpt]
CkptOrNone = Annotated[Path | None, _ckpt]
Classes = Annotated[str | None, typer.Option(help="1,2,3 or 0-9 or name:goldfish or @FILE of them or all, the default")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N", callback=_check_device)]
Download = Annotated[bool, typer.Option("--download", help="fetch Inception's weights if they are absent")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print what the run would take; write nothing")]
Extractor = Annotated[str | None, typer.Option(metavar="inception|FILE", help="a judge.pt instead of Inception")]
FromWeights = Annotated[Path | None, typer.Option(metavar="FILE", help=FROM_WEIGHTS)]
Gpu = Annotated[str | None, typer.Option(help="with --dry-run: h200 (default), h100, a100, l40s, rtx4090")]
Gpus = Annotated[int | None, _gpus]
Images = Annotated[str, typer.Argument(metavar="IMAGES", help=IMAGES)]
Json = Annotated[bool, typer.Option("--json", help="print the result as JSON")]
Keep = Annotated[int | None, typer.Option(metavar="N", min=2, help="checkpoints to keep, as train.keep=N")]
Limit = Annotated[int | None, typer.Option(min=1, help="only N images, evenly spaced")]
Overrides = Annotated[list[str] | None, _overrides]
PerClass = Annotated[int | None, typer.Option(min=1, help="samples a class; default 8")]
Preset = Annotated[str | None, typer.Option(help="raw, cfg, cfg-linear, gumbel: the paper's Table 3")]
PrintConfig = Annotated[bool, typer.Option("--print-config", help=PRINT_CONFIG)]
Quiet = Annotated[bool, typer.Option("--quiet", help="no progress, only warnings and errors")]
Recipe = Annotated[str, _recipe]
Ref = Annotated[str | None, typer.Option(help=REF)]
Resolution = Annotated[int | None, typer.Option(min=8, help=RESOLUTION)]
RunFolder = Annotated[Path | None, typer.Option(metavar="RUN", help="run folder; default runs/<recipe>-...")]
Seed = Annotated[int, _seed]
SeedOrNone = Annotated[int | None, _seed]
Target = Annotated[str, _target]
Tokenizer = Annotated[Path | None, _tokenizer]
Track = Annotated[Literal["wandb"] | None, typer.Option(help="also send the log to Weights & Biases")]
Utilisation = Annotated[float | None, typer.Option(help="with --dry-run: share of the GPU's bf16 peak; default 0.4")]
Weights = Annotated[Path | None, typer.Option(metavar="FILE", help="Inception weight file")]


def changes(overrides: Sequence[str] | None, seed: int | None, keep: int | None = None) -> list[str]:
    """The recipe overrides, followed by --seed and --keep."""
    options = {"seed": seed, "train.keep": keep}
    return [*(overrides or []), *(f"{name}={value}" for name, value in options.items() if value is not None)]


# ---- the beginning and the end of a command --------------------------------------------------------------------------


class Result(Protocol):
    """The answer of an engine function: rdpm_cli.runs.Result, which cannot be imported without torch."""

    title: str
    values: dict[str, Any]
    next: str
    text: str


def command(
    group: typer.Typer, example: str, name: str | None = None, several: bool = False
) -> Callable[[Function], Function]:
    """Add a function that returns a Result as a command with the options --json and --quiet.

    several: also with --gpus N, which runs the command in N processes.
    """

    def add(function: Function) -> Function:
        signature = inspect.signature(function, eval_str=True)
        options: dict[str, tuple[Any, Any]] = {"json": (Json, False), "quiet": (Quiet, False)}
        if several:
            options = {"gpus": (Gpus, None), **options}
        added = [
            inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            for key, (annotation, default) in options.items()
        ]

        def run_command(*, json: bool, quiet: bool, **values: Any) -> None:
            progress.quiet = quiet or not _is_first()
            only_planned = values.get("dry_run") or values.get("print_config")
            if (values.get("gpu") or values.get("utilisation")) and not values["dry_run"]:
                raise UsageError("--gpu and --utilisation describe the GPU of a --dry-run", "add --dry-run")
            if values.get("gpus") and not only_planned and LAUNCHER not in os.environ:
                from rdpm_cli.distributed import launch

                raise typer.Exit(launch(values["gpus"], values["device"], command_line))
            show(function(**{key: values[key] for key in signature.parameters}), json)

        run_command.__signature__ = signature.replace(  # type: ignore[attr-defined]  # Typer reads the options from it
            parameters=[*signature.parameters.values(), *added], return_annotation=None
        )
        text = f"{inspect.cleandoc(function.__doc__ or '')}\n\nExample: rdpm {example}"
        group.command(name or function.__name__.replace("_", "-"), help=text)(run_command)
        return function

    return add


def _is_first() -> bool:
    """Whether this is the only process, or the first that torchrun or --gpus started."""
    return os.environ.get("RANK", "0") == "0"


def show(result: Result, as_json: bool) -> None:
    """Print a result on stdout, in the first process only."""
    if not _is_first():
        return
    if as_json:
        print(json_format.dumps(result.values, indent=2, allow_nan=False))
        return
    if result.text:
        print(result.text, end="")
        return
    rows = _rows(result.values)
    print(result.title)
    if sys.stdout.isatty():
        table = Table.grid(padding=(0, 2))
        for name, value in rows:
            table.add_row("", Text(name, style="bold"), Text(value))
        Console().print(table)
    else:
        width = max((len(name) for name, _ in rows), default=0)
        for name, value in rows:
            print(f"  {name:<{width}}  {value}".rstrip())
    if result.next:
        print(f"next: {result.next}")


def _rows(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """(name, text) of every value. None is left out, unless `not_computed` has a reason for it."""
    rows: list[tuple[str, str]] = []
    reasons = values.get("not_computed", {})
    for name, value in values.items():
        if name in reasons:
            rows.append((prefix + name, f"not computed, {reasons[name]}"))
        elif name == "not_computed":
            continue
        elif isinstance(value, dict):
            rows += _rows(value, f"{prefix}{name}.")
        elif value is not None and value != []:
            rows.append((prefix + name, _text(value)))
    return rows


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        sentences = any(isinstance(entry, str) and " " in entry for entry in value)
        return ("; " if sentences else ", ").join(_text(entry) for entry in value)
    return str(value)


# ---- main ------------------------------------------------------------------------------------------------------------


def _print_version(requested: bool) -> None:
    if requested:
        print(f"rdpm {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print it")
    ] = False,
    log_format: Annotated[
        Literal["text", "json"], typer.Option("--log-format", help="of stderr; json: a document a line")
    ] = "text",
) -> None:
    """Options that come before the subcommand."""
    progress.as_json = log_format == "json"


def main() -> None:
    """Run a command and leave with its exit code. A bug keeps its traceback."""
    warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
    tune_allocator()
    if "RANK" in os.environ:
        from rdpm_cli.runs import join_launcher

        join_launcher()
    code = run()
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _discard_stdout()
    sys.exit(code)


def tune_allocator() -> bool:
    """Let glibc keep freed memory: returning it costs CPU training a factor of two in page faults.

    Call it before the first large allocation. -> False, without effect, where there is no glibc.
    """
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((mmap_max, 0), (trim_threshold, 1 << 30), (top_pad, 64 << 20))
    return all(mallopt(name, value) == 1 for name, value in settings)


def _discard_stdout() -> None:
    """The reader has gone, as in `| head -1`: drop what would still be written, also by Python as it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run(args: list[str] | None = None) -> int:
    """Run a command. -> exit code."""
    command_line[:] = sys.argv[1:] if args is None else args
    trace = os.environ.get("RDPM_DEBUG") == "1"
    try:
        code = app(args=args, prog_name="rdpm", standalone_mode=False)
        if code == EXIT_INTERRUPT:  # Typer's answer to Ctrl-C
            raise KeyboardInterrupt
        sys.stdout.flush()
        return int(code or 0)
    except RdpmError as error:
        if isinstance(error, LostProcessError) and LAUNCHER in os.environ:
            return error.exit_code  # the process that has gone is reported by itself or by the launcher
        return _fail(error.exit_code, error.message, error.hint, trace)
    except typer.TyperException as error:
        if error.format_message().startswith("Usage:"):  # a group without a subcommand: its help
            progress.say(error.format_message())
            return EXIT_USAGE
        context = getattr(error, "ctx", None)
        return _fail(EXIT_USAGE, error.format_message(), f"see `{context.command_path if context else 'rdpm'} --help`")
    except (KeyboardInterrupt, typer.Abort):
        return _fail(EXIT_INTERRUPT, "interrupted", "run the same command again; finished work is kept")
    except (BrokenPipeError, SystemExit):  # Typer turns the first into the second
        _discard_stdout()
        return 0
    except (OSError, MemoryError, RuntimeError) as error:
        if (known := _machine_failure(error)) is None:
            raise
        return _fail(EXIT_FAILED, *known, trace)


def _fail(code: int, message: str, hint: str, trace: bool = False) -> int:
    """Write an error. -> its exit code. Of several processes the first speaks where all have the same to say."""
    if _is_first() or code not in (EXIT_USAGE, EXIT_STOPPED, EXIT_INTERRUPT):
        progress.error(message, hint, code, traceback.format_exc() if trace else "")
    return code


def _machine_failure(error: BaseException) -> tuple[str, str] | None:
    """Message and hint for a failure of the machine; None for a bug."""
    if isinstance(error, OSError) and error.errno in files.FULL:
        return f"disk full: {error.filename or error.strerror} cannot be written", files.FREE
    if isinstance(error, PermissionError):
        return f"not allowed: {error.filename or error}", "choose another folder, or change its permissions"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, without importing it
        return f"out of memory: {str(error).splitlines()[0] if str(error) else 'no detail'}", "use a smaller batch"
    return None

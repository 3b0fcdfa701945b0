"""The Typer app: options that commands share, the map from errors to exit codes, and how a result is printed."""

import ctypes
import errno
import json as json_format
import os
import re
import sys
import traceback
from collections.abc import Callable
from inspect import Parameter, Signature, cleandoc, signature
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from rdpm_cli import __version__, errors, files, hub, launcher, progress

HELP = """Image generation by recurrent token prediction (RDPM, arXiv 2412.18390).

images -> train-tokenizer -> tokenize -> train-gen -> sample -> eval. Start with `rdpm demo`.

Exit codes: 0 ok, 1 run failed, 2 usage, 3 data or checkpoint, 75 stopped by a signal after saving, 130 Ctrl-C.
"""

app = typer.Typer(name="rdpm", help=HELP, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)
command_line: list[str] = []  # of the command that runs, without the program; --gpus starts it again
Result = Any  # rdpm_cli.runs.Result, which cannot be imported without torch

Images = Annotated[
    str, typer.Argument(metavar="IMAGES", help="folder, .zip, 'x-{00..99}.tar', parquet, a URL; digits, shapes")
]
Heldout = Annotated[str | None, typer.Option(metavar="IMAGES", help="images or recordings that are not trained on")]
Codes = Annotated[Path | None, typer.Option(metavar="CODES", help="code store made from the training images")]
CKPT = typer.Option("--ckpt", metavar="FILE", help="generator checkpoint")
Recipe = Annotated[str, typer.Option(metavar="NAME|FILE", help="shipped recipe, or a YAML file")]
RunFolder = Annotated[Path | None, typer.Option(metavar="RUN", help="run folder; default runs/<recipe>-...")]
SEED = typer.Option(min=0, max=2**63 - 1, help="of everything that is drawn at random")
Seed = Annotated[int, SEED]
PER_CLASS = typer.Option(min=1, help="samples a class")
Judge = Annotated[str | None, typer.Option(metavar="FILE", help="judge.pt of `rdpm eval judge`")]
DtypeCut = Annotated[
    Literal["round", "floor"], typer.Option(help="of drawn values to 8 bits; floor: as pipelines that do not round")
]
Seeds = Annotated[int, typer.Option(min=1, help="number of seeds to average over, from --seed on")]

# Options of several commands, sampling options and those of sound: type, default, declaration.
SHARED: dict[str, tuple[Any, Any, Any]] = {
    "asr": (
        str,
        None,
        typer.Option(metavar="whisper:FOLDER|hubert-ctc:FILE", help="instead of the judge, for WER"),
    ),
    "cfg": (float, None, typer.Option(min=0, help="guidance lambda; 0 = off")),
    "cfg_schedule": (str, None, typer.Option(help="over t: constant, linear, cosine, power, interval")),
    "classes": (str, "all", typer.Option(help="1,2,3 or 0-9 or name:goldfish or all")),
    "device": (str, "auto", typer.Option(help="auto, cpu, cuda, cuda:N")),
    "download": (bool, False, typer.Option("--download", help="fetch Inception's weights if they are absent")),
    "dry_run": (bool, False, typer.Option("--dry-run", help="print what the run would take; write nothing")),
    "engine": (
        Literal["local", "ray"],
        "local",
        typer.Option(help="ray: parts as tasks of the Ray cluster of RAY_ADDRESS, else of this machine"),
    ),
    "extractor": (
        str,
        None,
        typer.Option(metavar="inception|dinov2|clip|timm:NAME[:FILE]|FILE", help="network that scores, or a judge.pt"),
    ),
    "from_weights": (
        Path,
        None,
        typer.Option(metavar="FILE", help="begin with its weights: rdpm's, or a tokenizer's of VAR, taming, LlamaGen"),
    ),
    "guide": (
        str,
        None,
        typer.Option(metavar="CKPT|RUN@STEP", help="rdpm: a weaker generator in the null class's place"),
    ),
    "gpu": (
        Literal["h200", "h100", "a100", "l40s", "rtx4090"],
        None,
        typer.Option(help="for --dry-run; default h200"),
    ),
    "gpus": (int, None, typer.Option(metavar="N", min=1, help="processes, one a GPU of this node; default: one")),
    "json": (bool, False, typer.Option("--json", help="print the result as JSON")),
    "keep": (int, None, typer.Option(metavar="N", min=2, help="checkpoints to keep, as train.keep=N")),
    "limit": (int, None, typer.Option(min=1, help="only N items, evenly spaced")),
    "overrides": (list[str], [], typer.Argument(metavar="[KEY=VALUE]...", help="recipe overrides: train.steps=100")),
    "per_class": (int, 8, PER_CLASS),
    "preset": (str, None, typer.Option(help="raw, cfg, cfg-linear, gumbel: the paper's Table 3")),
    "print_config": (bool, False, typer.Option("--print-config", help="print the recipe, as a file for --recipe")),
    "quiet": (bool, False, typer.Option("--quiet", help="no progress, only warnings and errors")),
    "ref": (str, None, typer.Option(help="images, or an .npz of statistics; default: recorded in the target")),
    "follow_links": (bool, False, typer.Option("--follow-links", help="read class folders that are links")),
    "exif": (bool, False, typer.Option("--exif", help="turn images as their EXIF orientation says")),
    "unlabelled": (bool, False, typer.Option("--unlabelled", help="all images in one class, for no guidance")),
    "image_column": (str, None, typer.Option(metavar="NAME", help="of parquet; default: image, img, jpg, ...")),
    "label_column": (str, None, typer.Option(metavar="NAME", help="of parquet, metadata.csv; default: label, ...")),
    "resolution": (int, None, typer.Option(min=8, help="crop size; default: recorded, a judge's, or the images' side")),
    "seed": (int, None, SEED),
    "skip_steps": (int, None, typer.Option(min=0, help="first steps without a network pass")),
    "speaker": (
        str,
        None,
        typer.Option(metavar="resemblyzer|wavlm-tdnn:FILE", help="compares voices in the judge's place"),
    ),
    "steps": (int, None, typer.Option(min=1, help="resgen, maskgit: network passes; flow: of its solver")),
    "tau": (float, None, typer.Option(help="inverse temperature; 1 samples exactly, larger: greedier")),
    "tokenizer": (Path, None, typer.Option(metavar="FILE", help="default: $RDPM_TOKENIZER, else ./tokenizer.pt")),
    "top_k": (int, None, typer.Option(min=0, help="draw among the K likeliest codes; 0 = all")),
    "top_p": (float, None, typer.Option(help="draw among the fewest codes of this probability")),
    "track": (Literal["wandb", "trackio", "mlflow"], None, typer.Option(help="also send the log to this tracker")),
    "utilisation": (float, None, typer.Option(min=0.01, max=1, help="for --dry-run: share of bf16 peak; default 0.4")),
    "vocoder": (str, None, typer.Option(metavar="KIND:FILE", help="bigvgan:FILE or vocos:FILE; default: Griffin-Lim")),
    "weights": (Path, None, typer.Option(metavar="FILE", help="weight file of inception, dinov2 or clip")),
    "text": (str, None, typer.Option(help="of sound: what is to be said")),
    "prompt": (str, None, typer.Option(metavar="WAV", help="of sound: the voice that is to say it")),
    "prompt_text": (str, "", typer.Option(help="what is said in --prompt")),
    "lines": (Path, None, typer.Option("--list", metavar="JSONL", help="a text, prompt and prompt_text a line")),
    "seconds": (float, None, typer.Option(min=0.01, help="of sound: how long --text lasts")),
    "length": (
        Literal["predictor", "rate"],
        "predictor",
        typer.Option(help="of sound without --seconds; rate: the prompt's pace, with network.align=cross"),
    ),
    "duration_scale": (float, 1.0, typer.Option(min=0.1, max=10, help="of sound: factor of the durations")),
    "sentences": (bool, False, typer.Option("--sentences", help="of sound: draw each sentence alone, and join them")),
    "start": (float, None, typer.Option("--from", min=0, help="of sound: second of --init from which it is drawn")),
    "end": (float, None, typer.Option("--to", min=0, help="and second to which; --text is that of the whole")),
}


READING = "follow_links exif image_column label_column"  # of every command that takes IMAGES
TRAININGS = {"train-tokenizer", "train-gen", "judge", "demo"}
CHECKPOINTS = {  # options that name a file of tensors, and its kind in files.HINTS
    "ckpt": "rdpm-generator", "tokenizer": "rdpm-tokenizer", "extractor": "rdpm-judge", "judge": "rdpm-judge",
    "from_weights": "weights",
}  # fmt: skip
NAMED = re.compile("inception|dinov2|clip|timm:.*")  # extractors that are no file


def command(
    group: typer.Typer, example: str, shared: str = "", name: str = "", section: str = ""
) -> Callable[[Callable[..., Result]], None]:
    """Add a function as a command, with the options of SHARED that are named in `shared` as its `**shared`.

    --gpus among them runs it in several processes. section: of the recipe by which it trains."""

    def add(function: Callable[..., Result]) -> None:
        label = name or function.__name__.replace("_", "-")

        def run_command(json: bool, quiet: bool, **values: Any) -> None:
            if label != "doctor":  # which reports it
                launcher.check()
            files.check_working_folder()
            progress.quiet = quiet or not launcher.is_first()
            values = {key: _local(key, value) for key, value in values.items()}
            for key, kind in CHECKPOINTS.items():
                named = str(values.get(key) or "")
                for value in named.split(",") if key == "extractor" else [named]:  # of `eval fdr` several
                    if value and not NAMED.fullmatch(value) and not hub.is_exported(Path(value)):
                        files.check_tensors(Path(value), files.HINTS[kind])
            if reading := {name: values.pop(name) for name in (*READING.split(), "unlabelled") if name in values}:
                values["reading"] = {name: value for name, value in reading.items() if value}
            result = _answer(function, section, values)
            if launcher.is_first():
                show(result, json)
            if broken := result.values.get("broken"):  # of doctor
                raise errors.DataError(f"not ready: {', '.join(broken)}", result.values["fix"][broken[0]])

        declared = signature(function, eval_str=True).parameters.values()
        parameters = [parameter for parameter in declared if parameter.kind is not Parameter.VAR_KEYWORD]
        for key in (*shared.split(), "json", "quiet"):
            kind, default, option = SHARED[key]
            annotation = Annotated[kind if default is not None else kind | None, option]  # type: ignore[valid-type]
            parameters.append(Parameter(key, Parameter.KEYWORD_ONLY, default=default, annotation=annotation))
        run_command.__signature__ = Signature(parameters)  # type: ignore[attr-defined]  # for Typer
        text = f"{cleandoc(function.__doc__ or '')}\n\nExample: rdpm {example}"
        group.command(label, help=text)(run_command)

    return add


DATA = ("images", "heldout", "ref", "target", "arguments", "init", "mask")  # values that may be a URL of images
MODELS = ("ckpt", "tokenizer", "from_weights", "target", "path", "guide")  # values that may name a model of the hub
STORES = ("codes", "target")  # values that may be the URL of a code store
OPENED = ("title", "asr", "speaker", "vocoder")  # texts, and KIND:FILE, of which only the file is a path


def _local(key: str, value: Any) -> Any:
    """A value that may be a path as a path of this machine. Raises UsageError for one that cannot be."""
    if isinstance(value, list):
        return [_local(key, entry) for entry in value]
    if key in DATA and str(value).startswith("hf://datasets/"):
        return value
    if key in MODELS and str(value).startswith("hf:/"):
        return type(value)(hub.find(str(value)))
    if key == "store" and files.is_url(str(value)) and not str(value).startswith("http"):  # tokenize writes it
        return value
    if key in STORES and files.is_url(str(value)):
        from rdpm_cli.engine import mirror

        if key == "codes" or mirror.is_store(str(value)):
            return type(value)(mirror.fetched(str(value)))
    if isinstance(value, Path):
        path = Path(files.local_path(str(value)))
        files.check_name(path)
        return path
    if not isinstance(value, str) or key in OPENED or (key in DATA and files.is_url(value)):
        return value
    return files.local_path(value)


def _answer(function: Callable[..., Result], section: str, values: dict[str, Any]) -> Result:
    """The result of the function for these values, or of --print-config, --dry-run or --gpus in its place."""
    gpus, gpu, utilisation = (values.pop(name, None) for name in ("gpus", "gpu", "utilisation"))
    if (gpu or utilisation) and not values["dry_run"]:
        raise errors.UsageError("--gpu and --utilisation describe the GPU of a --dry-run", "add --dry-run")
    if gpus and launcher.is_started() and launcher.LAUNCHER not in os.environ:
        raise errors.UsageError("--gpus starts processes, and torchrun has started this one", "leave one of them out")
    if section:
        settings = {"seed": values.pop("seed"), "train.keep": values.pop("keep", None)}
        words = [f"{name}={value}" for name, value in settings.items() if value is not None]
        values["overrides"] = [*values["overrides"], *words]
        if values.pop("print_config"):
            from rdpm_cli.engine import look

            return look.resolve(values["recipe"], values["overrides"], section)
        if values.pop("dry_run", False):
            from rdpm_cli.engine import plan

            cost = plan.plan_tokenizer if section == "tokenizer" else plan.plan_generator
            source, hardware = values.get("images") or values["codes"], plan.Hardware.of(gpu, gpus, utilisation)
            inputs = {name: values[name] for name in ("from_weights", "heldout", "reading") if values.get(name)}
            return cost(source, values["out"], values["recipe"], values["overrides"], hardware, **inputs)
    if gpus and launcher.LAUNCHER not in os.environ:
        from rdpm_cli.distributed import launch

        raise typer.Exit(launch(gpus, values["device"], command_line))
    return function(**values)


def show(result: Result, as_json: bool) -> None:
    """Print a result on stdout. Without a title there is none: stdout has a file that was written into it."""
    if not result.title:
        return
    if as_json:
        print(json_format.dumps(result.values, indent=2, allow_nan=False))
    elif result.text:
        print(result.text, end="")
    else:
        rows = _rows(result.values)
        print(result.title)
        if sys.stdout.isatty():
            table = Table("", Column(no_wrap=True), Column(overflow="fold"), box=None, show_header=False)
            for name, text in rows.items():
                table.add_row("", Text(name, style="bold"), Text(text))
            Console().print(*filter(None, (table, result.picture)))
        else:
            width = max(map(len, rows), default=0)
            print(*(f"  {name:<{width}}  {text}" for name, text in rows.items()), sep="\n")
        if result.next:
            print(f"next: {result.next}")


def _rows(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """The text of every value by its dotted name."""
    rows: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            rows |= _rows(value, f"{prefix}{name}.")
        elif value is not None and value != []:
            entries = value if isinstance(value, list) else [value]
            texts = (f"{entry:.4g}" if isinstance(entry, float) else str(entry) for entry in entries)
            rows[prefix + name] = errors.some_of(texts, 24)
    return rows


def _version(requested: bool) -> None:
    if requested:
        print(f"rdpm {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="print it")] = False,
    log_format: Annotated[Literal["text", "json"], typer.Option(help="of stderr; json: a document a line")] = "text",
) -> None:
    """Options that come before the subcommand."""
    progress.as_json = log_format == "json"


def main() -> None:
    """Run a command and leave with its exit code. A bug keeps its traceback."""
    open_streams()
    tune_allocator()
    tune_children(trains=not TRAININGS.isdisjoint(sys.argv[1:]))
    if launcher.is_started():
        from rdpm_cli.runs import join_launcher

        join_launcher()
    sys.exit(run())


def open_streams() -> None:
    """Let the standard streams take every text, also where they are ASCII or a shell has closed them."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:  # the next file would get its number, and with it what libraries print
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w"))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def tune_allocator() -> None:
    """Let glibc keep freed memory, before the first large allocation: returning it costs training a factor of two."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        for name, value in ((-4, 0), (-1, 1 << 30), (-2, 64 << 20)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
            mallopt(name, value)


def tune_children(trains: bool = False) -> None:
    """Set variables that OpenMP reads when torch is imported, and that child processes inherit."""
    # Threads that spin while they wait keep each other from a core that another job uses. Trainings let them spin: on
    # a quiet machine they lose a quarter of their speed to threads that sleep between short operations (docs/speed.md).
    if not trains and not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & set(os.environ):
        os.environ["OMP_WAIT_POLICY"] = "passive"
    os.environ.setdefault("PYTHONSAFEPATH", "1")  # a user's queue.py or tokenize.py in the working folder is not ours


def run(args: list[str] | None = None) -> int:
    """Run a command. -> exit code."""
    command_line[:] = sys.argv[1:] if args is None else args
    try:
        code = app(args=args, prog_name="rdpm", standalone_mode=False)
        if code == errors.EXIT_INTERRUPT:  # Typer's answer to Ctrl-C
            return _fail(code, "interrupted", "run the same command again; finished work is kept")
        sys.stdout.flush()
        return int(code or 0)
    except errors.RdpmError as error:
        if isinstance(error, errors.LostProcessError) and launcher.LAUNCHER in os.environ:
            return error.exit_code  # the process that has gone is reported by itself or by the launcher
        return _fail(error.exit_code, error.message, error.hint)
    except typer.TyperException as error:
        if error.format_message().startswith("Usage:"):  # a group without a subcommand: its help
            progress.say(error.format_message())
            return errors.EXIT_USAGE
        command = getattr(getattr(error, "ctx", None), "command_path", "rdpm")
        return _fail(errors.EXIT_USAGE, error.format_message(), f"see `{command} --help`")
    except (BrokenPipeError, SystemExit):  # Typer turns the first into the second
        # The reader has gone, as in `| head -1`: Python too would write what is left as it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":  # torch's, not imported
            raise
        return _fail(errors.EXIT_FAILED, f"out of memory: {error}".splitlines()[0], "use a smaller (micro-)batch")
    except OSError as error:
        message = f"{error.strerror}: {str(error.filename or 'a file')[:200]} cannot be used"
        if error.errno in files.UNFIT:
            return _fail(errors.EXIT_USAGE, message, "give another path")
        if not isinstance(error, PermissionError) and error.errno not in (*files.FULL, errno.EROFS):
            raise
        return _fail(errors.EXIT_FAILED, message, "free some space, or choose another folder")


def _fail(code: int, message: str, hint: str) -> int:
    """Write an error. -> its exit code. Of several processes the first speaks where all have the same to say."""
    if launcher.is_first() or code not in (errors.EXIT_USAGE, errors.EXIT_STOPPED, errors.EXIT_INTERRUPT):
        trace = traceback.format_exc() if os.environ.get("RDPM_DEBUG") == "1" else ""
        progress.error(message, hint, code, trace)
    return code

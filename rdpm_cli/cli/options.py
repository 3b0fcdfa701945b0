"""Option types that every command shares, so that a name means the same everywhere."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rdpm_cli import team
from rdpm_cli.errors import UsageError

if TYPE_CHECKING:
    from rdpm_cli.engine import Hardware

Images = Annotated[
    str,
    typer.Argument(
        metavar="IMAGES",
        help="folder or .zip of class folders, flat folder, .tar shards ('train-{0000..0009}.tar'), parquet, or digits",
    ),
]


def recipe_names(incomplete: str) -> list[str]:
    """Completion: the shipped recipes."""
    from rdpm_cli import engine

    return [name for name in engine.recipe_names() if name.startswith(incomplete)]


def _gpu_names(incomplete: str) -> list[str]:
    from rdpm_cli import engine

    return [gpu.name for gpu in engine.GPUS if gpu.name.startswith(incomplete)]


PRESETS = ("raw", "cfg", "cfg-linear", "gumbel")
DEVICES = ("auto", "cpu", "cuda", "cuda:0")


def one_of(names: Sequence[str]) -> Callable[[str], list[str]]:
    """A completion of these names; others may be valid too."""
    return lambda incomplete: [name for name in names if name.startswith(incomplete)]


def _device(value: str) -> str:
    """Refuse what is no device anywhere, before torch is asked. Raises UsageError."""
    if re.fullmatch(r"auto|cpu|cuda(:\d+)?", value) is None:
        raise UsageError(f"--device {value} is none", "give auto, cpu, cuda or cuda:N")
    return value


Recipe = Annotated[
    str,
    typer.Option("--recipe", metavar="NAME|FILE", help="shipped recipe, or a YAML file", autocompletion=recipe_names),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="recipe overrides, e.g. train.steps=100")
]
DemoOverrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="recipe overrides, e.g. generator.train.steps=100")
]
RunFolder = Annotated[Path | None, typer.Option("--out", metavar="RUN", help="run folder; default runs/<recipe>-...")]
FromWeights = Annotated[
    Path | None,
    typer.Option(
        "--from-weights", metavar="FILE", help="begin from VAR, taming or LlamaGen weights, or a tokenizer.pt"
    ),
]
Tokenizer = Annotated[
    Path | None,
    typer.Option("--tokenizer", metavar="FILE", help="default: $RDPM_TOKENIZER, else tokenizer.pt in this folder"),
]
Gpus = Annotated[
    int | None,
    typer.Option("--gpus", metavar="N", min=1, help="processes, one a GPU of this node; default: this process alone"),
]
Track = Annotated[Literal["wandb"] | None, typer.Option("--track", help="also send the log to Weights & Biases")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="say what the command would do and take; write nothing")]
Gpu = Annotated[
    str | None,
    typer.Option(
        "--gpu", metavar="NAME", help="with --dry-run: h200 (default), h100, a100, ...", autocompletion=_gpu_names
    ),
]
Utilisation = Annotated[
    float | None, typer.Option("--utilisation", help="with --dry-run: share of the GPU's bf16 peak; default 0.4")
]
Keep = Annotated[int | None, typer.Option("--keep", metavar="N", min=2, help="checkpoints kept, as train.keep=N")]
PrintConfig = Annotated[
    bool,
    typer.Option("--print-config", help="print the resolved recipe, as a FILE for --recipe; run and write nothing"),
]
_SEED = typer.Option("--seed", min=0, max=2**63 - 1, help="of all that is drawn at random")
Seed = Annotated[int, _SEED]
SeedOrNone = Annotated[int | None, _SEED]
_CKPT = typer.Option("--ckpt", metavar="FILE", help="generator checkpoint")
Ckpt = Annotated[Path, _CKPT]
CkptOrNone = Annotated[Path | None, _CKPT]
Classes = Annotated[
    str | None, typer.Option("--classes", help="1,2,3 or 0-9 or name:goldfish or @FILE of them or all, the default")
]
PerClass = Annotated[int | None, typer.Option("--per-class", min=1, help="samples a class; default 8")]
Preset = Annotated[
    str | None,
    typer.Option("--preset", help="raw, cfg, cfg-linear, gumbel: the paper's Table 3", autocompletion=one_of(PRESETS)),
]
Ref = Annotated[
    str | None,
    typer.Option("--ref", help="images, or an .npz of statistics; default: recorded in the samples or checkpoint"),
]
Extractor = Annotated[
    Path | None, typer.Option("--extractor", metavar="FILE", help="a judge's checkpoint instead of Inception")
]
Weights = Annotated[Path | None, typer.Option("--weights", metavar="FILE", help="Inception weight file")]
Download = Annotated[bool, typer.Option("--download", help="fetch Inception's weights where they are absent")]
Cache = Annotated[bool, typer.Option("--cache/--no-cache", help="keep activations in $RDPM_CACHE, else ~/.cache/rdpm")]
Resolution = Annotated[
    int | None,
    typer.Option(
        "--resolution", min=8, help="crop size; default: of the samples or recipe, else the first image's short side"
    ),
]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="only N images, evenly spaced")]
Device = Annotated[
    str,
    typer.Option("--device", help="auto, cpu, cuda, cuda:N", callback=_device, autocompletion=one_of(DEVICES)),
]
Json = Annotated[bool, typer.Option("--json", help="print the result as JSON")]
Quiet = Annotated[bool, typer.Option("--quiet", help="no progress, only warnings and errors")]

command_line: list[str] = []  # of the command that runs, without the program


def several(gpus: int | None) -> team.Team | None:
    """The processes that --gpus asks for. Raises UsageError under torchrun."""
    return team.ask(gpus, command_line)


def hardware(dry_run: bool, gpu: str | None, gpus: int | None, utilisation: float | None) -> "Hardware | None":
    """What --dry-run plans for; None without it. Raises UsageError for options that then mean nothing."""
    if dry_run:
        from rdpm_cli import engine

        return engine.Hardware.of(gpu, gpus, utilisation)
    for option, value in {"--gpu": gpu, "--utilisation": utilisation}.items():
        if value is not None:
            raise UsageError(f"{option} belongs to --dry-run", "add --dry-run; --gpus N and --device say where to run")
    return None


def changes(overrides: Sequence[str] | None, seed: int | None, keep: int | None = None) -> list[str]:
    """The recipe overrides, with --seed and --keep as the last of them."""
    named = {"seed": seed, "train.keep": keep}
    return [*(overrides or []), *(f"{name}={value}" for name, value in named.items() if value is not None)]


def one_target(args: Sequence[str], ckpt: Path | None, drawing: dict[str, bool]) -> str:
    """The one TARGET among an eval's arguments; empty with --ckpt, whose arguments are all options of sampling.

    drawing: is an option given that only --ckpt has a use for? Raises UsageError.
    """
    if ckpt is not None:
        return ""
    if given := [name for name, is_given in drawing.items() if is_given]:
        raise UsageError(f"{given[0]} belongs to --ckpt", "give --ckpt FILE, or leave it out")
    if pairs := [word for word in args if "=" in word and not Path(word).exists()]:
        raise UsageError(f"{pairs[0]} belongs to --ckpt", "give --ckpt FILE, or leave it out")
    if len(args) != 1:
        found = "none is given" if not args else f"{len(args)} are given: {' '.join(args)}"
        raise UsageError(f"one TARGET is wanted, and {found}", "give samples, images or an .npz, or --ckpt FILE")
    return args[0]

"""What every command shares: the result, versions, run folders, the joined training loop."""

from __future__ import annotations

import contextlib
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rdpm_cli import __version__, config, files, progress
from rdpm_cli.errors import UsageError

if TYPE_CHECKING:
    import torch

    from rdpm_cli.signals import StopRequest
    from rdpm_cli.training.loop import Observer, Player


@dataclass
class Result:
    """The answer of a command. values: what `--json` prints; next: the command that follows from here."""

    title: str
    values: dict[str, Any] = field(default_factory=dict)
    next: str = ""


def versions() -> dict[str, str]:
    """What the numbers depend on."""
    import numpy
    import torch

    return {
        "rdpm": __version__,
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
        "python": platform.python_version(),
    }


@contextlib.contextmanager
def training_run(out: Path, settings: dict[str, Any], device: str) -> Iterator[tuple[torch.device, StopRequest]]:
    """Hold a run folder: one writer, one recipe. Raises UsageError when it was begun with other settings."""
    from rdpm_cli.signals import stop_on_signal
    from rdpm_cli.step import world
    from rdpm_cli.training.distributed import process_group

    with process_group(device) as chosen, contextlib.ExitStack() as stack:
        if world()[0] == 0:
            stack.enter_context(files.only_writer(out))
            note = out / "run.json"
            if note.exists():
                before = files.read_json(note)["settings"]
                if changed := files.differences(before, settings):
                    text = "; ".join(changed[:6])
                    raise UsageError(f"{out} was begun with other settings: {text}", "choose another --out")
            elif foreign := [p.name for p in out.iterdir() if not p.name.startswith(".")]:
                raise UsageError(f"{out} is not empty ({foreign[0]}, ...) and not a run", "choose another --out")
            files.write_json(note, {"settings": settings, "argv": sys.argv, "versions": versions()})
        yield chosen, stack.enter_context(stop_on_signal())


def train(
    players: Sequence[Player],
    batch_at: Any,
    cfg: config.TrainConfig,
    images: int,
    *,
    out: Path,
    seed: int,
    device: torch.device,
    stop: StopRequest,
    observers: Sequence[Observer] = (),
) -> torch.nn.Module:
    """Fit with progress. -> the network to keep: the EMA where there is one."""
    from rdpm_cli.engine import observers as watch
    from rdpm_cli.training import checkpoint
    from rdpm_cli.training.loop import Run, fit

    run = Run(out, seed, device, cfg.total_steps(images), cfg.warmup(images), stop)
    if there := checkpoint.found(out / "checkpoints"):
        progress.say(f"resuming step {there[-1][0]} of {run.steps} from {there[-1][1]}")
    with progress.Bar(f"train {players[0].name}", run.steps, "steps") as bar:
        fit(players, batch_at, cfg, run, [watch.progress(bar), *observers])
    return run.ema.model if run.ema else players[0].model


def first_process() -> bool:
    from rdpm_cli.step import world

    return world()[0] == 0


def last_metrics(folder: Path, names: Sequence[str]) -> dict[str, float]:
    from rdpm_cli.training.logging import read_metrics

    rows = [row for row in read_metrics(folder) if names[0] in row]
    return {name: rows[-1][name] for name in names if rows and name in rows[-1]}


def training_curves(path: Path, tokenizer_run: Path | None = None, generator_run: Path | None = None) -> None:
    """Draw the curves of one run or both: losses on a logarithmic axis, codebook and accuracy per t."""
    from rdpm_cli.engine import observers
    from rdpm_cli.images import writers

    panels = observers.tokenizer_curves(tokenizer_run) if tokenizer_run else {}
    panels |= observers.generator_curves(generator_run) if generator_run else {}
    writers.save_curves(path, panels, log_panels=[title for title in panels if "loss" in title])


def copy_file(source: Path, target: Path) -> None:
    """Copy a finished file, atomically."""
    with source.open("rb") as opened:
        files.write_atomic(target, lambda file: shutil.copyfileobj(opened, file))

"""A run folder that is trained in: its lock and run.json, the loop joined with the observers of every training."""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from rdpm_cli import checkpoint, files, hub, progress, runs
from rdpm_cli.distributed import barrier, is_first, process_group
from rdpm_cli.engine import watch
from rdpm_cli.recipes import Recipe
from rdpm_cli.runs import StopRequest, stop_on_signal
from rdpm_cli.training.config import TrainConfig, binding
from rdpm_cli.training.loop import CHECKPOINTS, Batches, Observer, Player, Run, fit
from rdpm_cli.training.trackers import check_tracker, open_tracker

WARM_START = "from_weights.json"  # of a run folder: which tensors its first process took from the file


class Imported(Protocol):
    """The outcome of a warm start of any network."""

    @property
    def file(self) -> str: ...
    def record(self) -> dict[str, Any]: ...
    def lines(self) -> Iterable[str]: ...


@dataclass
class Training:
    """A claimed run folder, with all that a training needs apart from players and batches."""

    out: Path
    seed: int
    device: torch.device
    stop: StopRequest
    settings: dict[str, Any]
    track: str | None = None

    def fit(
        self, players: Sequence[Player], batches: Batches, cfg: TrainConfig, images: int,
        observers: Sequence[Observer] = (), flops: int = 0, draw: Callable[[], None] | None = None,
    ) -> nn.Module:  # fmt: skip
        """Train from the newest state on. -> the first player's network, or its EMA. images: the unit of an epoch.

        flops: of a training step per image; 0: not logged. draw: draws the curves of the log so far."""
        run = Run(self.out, self.seed, self.device, cfg.total_steps(images), cfg.warmup(images), self.stop)
        if states := checkpoint.states(self.out / CHECKPOINTS):
            step, path = states[-1]
            progress.say(f"resuming step {step} of {run.steps} from {path}")

        def draw_when_due(run: Run, logs: dict[str, float] | None) -> None:
            if draw and watch.due(run, cfg) and not run.done:  # in the end the last lines of the log are drawn too
                draw()

        with (
            open_tracker(self.track if is_first() else None, self.out, self.settings) as run.tracker,
            progress.Bar(f"train {players[0].name}", run.steps, "steps") as bar,
        ):
            machine = [watch.machine(flops)] if flops else []  # first: the bar shows the utilisation it adds
            fit(players, batches, cfg, run, [*machine, watch.progress_bar(bar), *observers, draw_when_due])
        if draw and is_first():
            draw()
        return run.ema.model if run.ema else players[0].model


def train_once(
    final: Path, seed: int, settings: dict[str, Any], device: str, make: Callable[[Training], dict[str, Any]],
    track: str | None = None,
) -> None:  # fmt: skip
    """Write the model file `final` with the content of make(training), unless it is finished. settings: bind a run.

    A folder has one writer and one set of settings: raises RunError and UsageError otherwise."""
    check_tracker(track)
    out = final.parent
    with process_group(device, several=True) as rank_device, contextlib.ExitStack() as stack:
        if is_first():
            stack.enter_context(files.only_writer(out))
            finished = final.exists()
            runs.claim_run(out, settings, finished, partial(binding, finished=finished))
        barrier()
        if final.exists():
            if is_first():
                progress.say(f"{final} is finished already")
            return
        torch.manual_seed(seed)  # of the initial weights
        stop = stack.enter_context(stop_on_signal(interrupt=True))
        content = make(Training(out, seed, rank_device, stop, settings, track))
        if is_first():
            checkpoint.save(final, content)
        barrier()


def is_new(final: Path) -> bool:
    """Whether a run has neither its model file, `final`, nor a training state."""
    return not (final.exists() or checkpoint.states(final.parent / CHECKPOINTS))


def weights_setting(from_weights: Path | None) -> dict[str, Any]:
    """The setting by which the file of --from-weights binds a run; empty without one."""
    return {"from_weights": {"sha256": files.sha256_file(hub.weights_file(from_weights))}} if from_weights else {}


def warm_start_record(out: Path, setting: dict[str, Any], imported: Imported | None) -> dict[str, Any]:
    """The warm start's part of the provenance, in the process that writes it; read from the run folder.

    imported: printed, and kept there first; None: of a resumed run. setting: of `weights_setting`."""
    if not (setting and is_first()):
        return {}
    if imported is not None:
        for line in imported.lines():
            progress.say(line)
        files.write_json(out / WARM_START, {**setting["from_weights"], "file": imported.file, **imported.record()})
    return {"from_weights": files.read_json(out / WARM_START)}


def default_folder(recipe: Recipe, section: str) -> Path:
    """The run folder without --out. section: tokenizer, generator or judge."""
    return Path("runs") / f"{recipe.name}-{section}"


def recipe_settings(recipe: Recipe, section: str) -> dict[str, Any]:
    """The settings of a recipe's section that bind a run. Of a perceptual network the sha256 counts, not its path."""
    paths = {"loss": {"perceptual_weights"}} if section == "tokenizer" else None
    return {"seed": recipe.seed, section: getattr(recipe, section).model_dump(mode="json", exclude=paths)}

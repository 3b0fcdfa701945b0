"""What every command shares: the result, versions, run folders, the joined training loop."""

from __future__ import annotations

import contextlib
import platform
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rdpm_cli import __version__, config, files, progress
from rdpm_cli.errors import CheckpointError, Stopped, UsageError

if TYPE_CHECKING:
    import torch

    from rdpm_cli.signals import StopRequest
    from rdpm_cli.team import Team
    from rdpm_cli.training.loop import Batches, Observer, Player


ANOTHER = "choose another folder for the run"


@dataclass
class Result:
    """The answer of a command. values: what `--json` prints; next: the command that follows from here.

    text: printed in place of title, values and next where it is not empty.
    """

    title: str
    values: dict[str, Any] = field(default_factory=dict)
    next: str = ""
    text: str = ""


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


@dataclass
class Training:
    """A run folder that is being trained in: what every `train` needs beside players and batches."""

    out: Path
    seed: int
    device: torch.device
    stop: StopRequest
    settings: dict[str, Any]
    track: str | None = None  # of --track

    @property
    def begun(self) -> bool:
        """Is there a checkpoint to resume from?"""
        from rdpm_cli.training import checkpoint

        return bool(checkpoint.found(self.out / "checkpoints"))

    def fit(
        self,
        players: Sequence[Player],
        batches: Batches,
        cfg: config.TrainConfig,
        images: int,
        observers: Sequence[Observer] = (),
        flops: int = 0,
    ) -> torch.nn.Module:
        """Train with progress, from the newest checkpoint on. -> the first player's network, or its EMA.

        flops: operations of a step an image, for the log; 0 where nobody counted them.
        """
        from rdpm_cli.engine import monitoring
        from rdpm_cli.engine import observers as watch
        from rdpm_cli.training import checkpoint, tracking
        from rdpm_cli.training.loop import Run, fit

        run = Run(self.out, self.seed, self.device, cfg.total_steps(images), cfg.warmup(images), self.stop)
        if there := checkpoint.found(self.out / "checkpoints"):
            progress.say(f"resuming step {there[-1][0]} of {run.steps} from {there[-1][1]}")
        track = self.track if first_process() else None
        with (
            tracking.mirrors(track, self.out, self.settings) as run.mirrors,
            progress.Bar(f"train {players[0].name}", run.steps, "steps") as bar,
        ):
            machine = [monitoring.machine(flops)] if flops else []
            fit(players, batches, cfg, run, [*machine, monitoring.spikes(), watch.progress(bar), *observers])
        return run.ema.model if run.ema else players[0].model


def train_once(
    final: Path,
    seed: int,
    settings: dict[str, Any],
    device: str,
    make: Callable[[Training], dict[str, Any]],
    team: Team | None = None,
    track: str | None = None,
) -> None:
    """Make the model file `final` by `make(training)` in its folder, unless it is finished.

    team: its processes run this same function. track: as --track. One writer and one set of settings a folder: raises
    RunError and UsageError otherwise.
    """
    import torch

    from rdpm_cli import modelfile
    from rdpm_cli.signals import stop_on_signal
    from rdpm_cli.training.distributed import barrier, process_group

    if team and team.processes > 1:
        _train_by(team, final, settings)
        return
    with process_group(device, several=True) as chosen, contextlib.ExitStack() as stack:
        if first_process():
            stack.enter_context(files.only_writer(final.parent))
            _claim_run(final.parent, settings, final.exists())
        barrier()
        if final.exists():
            if first_process():
                progress.say(f"{final} is finished already")
            return
        torch.manual_seed(seed)
        stop = stack.enter_context(stop_on_signal(interrupt=True))
        content = make(Training(final.parent, seed, chosen, stop, settings, track))
        if first_process():
            modelfile.save(final, content)
        barrier()


def check_team(team: Team | None, device: str, batch: int) -> None:
    """Raises UsageError, early, for processes that this node, device or batch cannot have. batch: images a step."""
    if team:
        from rdpm_cli.training import distributed, launch

        launch.check(team, device)
        distributed.check_share(batch, team.processes)


def _train_by(team: Team, final: Path, settings: dict[str, Any]) -> None:
    """Let the team make the model file, after the checks that its processes would fail in."""
    from rdpm_cli.training.launch import launch

    _check_run(final.parent, settings, final.exists())
    if final.exists():
        progress.say(f"{final} is finished already")
        return
    try:
        launch(team)
    except Stopped:
        if not final.exists():  # the signal came after the last step
            raise


def _check_run(out: Path, settings: dict[str, Any], finished: bool) -> tuple[dict[str, Any], list[str]]:
    """What run.json says of a run that has begun, and what is allowed to differ and does.

    Raises UsageError for a folder that is no run, or one begun with other settings.
    """
    note = out / "run.json"
    if note.exists():
        before = files.read_json(note)
        begun = before.get("settings", {})
        if begun.get("command") != settings["command"]:
            raise UsageError(f"{out} is no run of {settings['command']}", ANOTHER)
        if changed := files.differences(config.binding(begun, finished), config.binding(settings, finished)):
            raise UsageError(f"{out} was begun with other settings: {'; '.join(changed[:6])}", ANOTHER)
        return before, files.differences(begun, settings)
    if foreign := [p.name for p in out.glob("*") if not p.name.startswith(".")]:
        raise UsageError(f"{out} is not empty ({foreign[0]}, ...) and not a run", ANOTHER)
    return {}, []


def need_generator(ckpt: Path) -> None:
    """Raise CheckpointError, before slow imports, where there is no file."""
    if not ckpt.is_file():
        inside = ckpt / "generator.pt"
        hint = f"give {inside}" if inside.is_file() else "make one with `rdpm train-gen CODES --recipe NAME`"
        raise CheckpointError(files.no_file(ckpt), hint)


def default_folder(recipe: config.Recipe, section: str) -> Path:
    """Where a run goes that no --out names."""
    return Path("runs") / f"{recipe.name}-{section}"


def chosen(recipe: config.Recipe, section: str) -> dict[str, Any]:
    """What a run is tied to of its recipe. Of weights of other networks the sha256 counts, not their place."""
    places = {"loss": {"perceptual_weights"}} if section == "tokenizer" else None
    return {"seed": recipe.seed, section: getattr(recipe, section).model_dump(mode="json", exclude=places)}


def check_plan(out: Path, command: str, name: str, recipe: dict[str, Any]) -> dict[str, Any]:
    """What --dry-run says of a run's folder. recipe: as in its settings. Raises UsageError as the run would.

    The data are not compared: they may be on another machine.
    """
    files.check_folder(out)
    finished = (out / name).exists()
    begun = files.read_json(out / "run.json").get("settings", {}) if (out / "run.json").is_file() else {}
    _check_run(out, {**begun, "command": command, "recipe": recipe}, finished)
    state = "finished: nothing would be done" if finished else "begun: it would be resumed" if begun else "new"
    return {"out": str(out), "out_is": state, "free_gb": files.free_bytes(out) / 1e9}


def _claim_run(out: Path, settings: dict[str, Any], finished: bool) -> None:
    """Begin or resume a run folder. Raises UsageError when it was begun with other settings."""
    before, changed = _check_run(out, settings, finished)
    import torch

    threads = torch.get_num_threads()  # fewer or more change the last bits of a sum
    now = {"argv": sys.argv, "processes": processes(), "threads": threads, "versions": versions()}
    began: dict[str, Any] = {"settings": settings, **now}
    if before:
        again = {**now, "changed": changed} if changed else now
        began = {**before, "resumed": [*before.get("resumed", []), again]}
        began["settings"] = before["settings"] if finished else settings
        if changed:
            progress.say(f"resuming with {'; '.join(changed)}")
    for left in [*out.glob(".*.tmp"), *out.glob("checkpoints/.*.tmp")]:  # of a killed process
        left.unlink()
    files.write_json(out / "run.json", began)


def first_process() -> bool:
    """Is this the only process, or the first of several?"""
    from rdpm_cli.step import world

    return world()[0] == 0


def processes() -> int:
    """How many processes share this run."""
    from rdpm_cli.step import world

    return world()[1]


def last_metrics(folder: Path, names: Sequence[str]) -> dict[str, float]:
    """The named values in the last line of a run's log that has the first of them."""
    from rdpm_cli.training.logging import read_metrics

    rows = [row for row in read_metrics(folder) if names[0] in row]
    return {name: rows[-1][name] for name in names if rows and name in rows[-1]}


def training_curves(path: Path, tokenizer_run: Path | None = None, generator_run: Path | None = None) -> None:
    """Draw the curves of one run or both: losses on a logarithmic axis, codebook and accuracy per t.

    No file where nothing was logged, as when every step was passed over.
    """
    from rdpm_cli.engine import observers
    from rdpm_cli.images import writers

    panels = observers.tokenizer_curves(tokenizer_run) if tokenizer_run else {}
    panels |= observers.generator_curves(generator_run) if generator_run else {}
    if panels:
        writers.save_curves(path, panels, log_panels=[title for title in panels if "loss" in title])


def copy_file(source: Path, target: Path) -> None:
    """Copy a finished file, atomically."""
    with source.open("rb") as opened:
        files.write_atomic(target, lambda file: shutil.copyfileobj(opened, file))

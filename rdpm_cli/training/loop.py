"""The one training loop. A task brings players (one, or two with a discriminator); the loop brings everything else.

Step s is a function of (seed, s) alone, so a resumed run repeats an uninterrupted one, at any number of processes.
"""

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from rdpm_cli import checkpoint, distributed, noise, progress
from rdpm_cli.distributed import TrainStep, is_first, world
from rdpm_cli.errors import RunError
from rdpm_cli.runs import StopRequest, serve_parent
from rdpm_cli.training.config import TrainConfig
from rdpm_cli.training.log import MetricsLog, Wandb
from rdpm_cli.training.optim import Ema, lr_at, make_optimizer

Loss = Callable[..., tuple[Tensor, dict[str, Tensor]]]
CHECKPOINTS = "checkpoints"  # folder of the training states, in the run folder


class Batches(Protocol):
    """The data of every step, each a pure function of (seed, step)."""

    def batch_at(self, step: int, rows: range) -> Any:
        """rows of the global batch of this step, with a method `to(device)`."""

    def describe(self, step: int, rows: range) -> str:
        """The names of those rows, for an error message."""


class Player(Protocol):
    """One network with its own loss and optimiser. start: the first step it trains in."""

    name: str
    start: int

    @property
    def model(self) -> nn.Module:
        """The trained network."""

    def networks(self) -> Sequence[nn.Module]:
        """The parts of it that `train.compile` compiles."""

    def loss(self, batch: Any, step: TrainStep) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss and scalar logs of a micro-batch; step: its rows."""

    def after_step(self, step: TrainStep) -> dict[str, Tensor]:
        """Work after the optimiser, such as a codebook's update; step: all rows of this process. -> logs."""


class Observer(Protocol):
    """Called after every step: evaluations, previews, progress."""

    def __call__(self, run: "Run", logs: dict[str, float] | None) -> dict[str, Any] | None:
        """run: after `run.step` steps. logs: the logged values, at logged steps, to read or to add to.

        -> more values for the log, in a line of their own.
        """


@dataclass
class Run:
    """A run in a folder. step: optimiser steps done."""

    folder: Path
    seed: int
    device: torch.device
    steps: int
    warmup: int
    stop: StopRequest
    step: int = 0
    skipped: int = 0  # steps skipped for a non-finite loss
    ema: Ema | None = None
    tracker: Wandb | None = None

    @property
    def done(self) -> bool:
        """Whether all steps are taken."""
        return self.step >= self.steps


def fit(
    players: Sequence[Player], batches: Batches, cfg: TrainConfig, run: Run, observers: Sequence[Observer] = ()
) -> None:
    """Train to run.steps, resuming from run.folder.

    Raises RunError on a non-finite loss, out of memory and a full disk, Stopped after a signal.
    """
    slices = micro_batches(distributed.rank_rows(cfg.batch), cfg.micro_batch)
    seats = [_prepare(player, cfg) for player in players]
    run.ema = Ema(players[0].model, cfg.ema) if cfg.ema else None
    _resume(seats, run)
    log = MetricsLog(run.folder, run.step, run.tracker) if is_first() else None
    started, first = time.monotonic(), run.step
    for data in _data(batches, cfg, run, slices):
        with _explain_out_of_memory(run, slices):
            logs = _step(seats, data, batches, cfg, run, slices)
        run.step += 1
        values = None
        if logs and (run.step % cfg.log_every == 0 or run.done):
            rate = (run.step - first) * cfg.batch / (time.monotonic() - started)
            lr = seats[0].optimizer.param_groups[0]["lr"]
            values = {**distributed.average_logs(logs), "lr": lr, "images_per_second": rate, "skipped": run.skipped}
        lines = [observer(run, values) for observer in observers]  # observers may add to `values`, so they come first
        for line in (values, *lines):
            if log and line:
                log.write(run.step, line)
        stopping = distributed.any_process(run.stop.requested, run.device)
        if run.step % cfg.save_every == 0 or run.done or stopping:
            _save(seats, run, cfg)
        if stopping and not run.done:
            run.stop.name = run.stop.name or "a signal to another process"
            run.stop.leave(f"step {run.step} of {run.steps} is saved in {run.folder / CHECKPOINTS}")
    if log:
        log.close()


# ---- data ----------------------------------------------------------------------------------------------------------


class _Steps(Dataset[Any]):
    """A step's micro-batches by step number, also for DataLoader's worker processes."""

    def __init__(self, batches: Batches, slices: list[range]) -> None:
        self.batches, self.slices = batches, slices

    def __getitem__(self, step: int) -> list[Any]:
        return [self.batches.batch_at(step, rows) for rows in self.slices]


def micro_batches(rows: range, size: int | None) -> list[range]:
    """A process's rows in micro-batches of at most `size` (a multiple of 16, so each is of whole blocks)."""
    size = size or len(rows)
    return [range(start, min(start + size, rows.stop)) for start in range(rows.start, rows.stop, size)]


def _data(batches: Batches, cfg: TrainConfig, run: Run, slices: list[range]) -> Iterator[list[Any]]:
    """The micro-batches of each remaining step."""
    data = _Steps(batches, slices)
    if cfg.workers == 0:
        return (data[step] for step in range(run.step, run.steps))
    loader = DataLoader(
        data,
        batch_size=None,
        sampler=range(run.step, run.steps),
        num_workers=cfg.workers,
        prefetch_factor=4,
        worker_init_fn=serve_parent,
    )
    return iter(loader)


# ---- one step ------------------------------------------------------------------------------------------------------


@dataclass
class _Seat:
    """A player with its optimiser, and its loss over all processes."""

    player: Player
    optimizer: torch.optim.Optimizer
    loss: "AveragedLoss"


def _prepare(player: Player, cfg: TrainConfig) -> _Seat:
    """The player in the memory layout and form of the recipe, with the first process's weights in every process."""
    if cfg.channels_last:
        player.model.to(memory_format=torch.channels_last)
    if cfg.compile:
        for network in player.networks():
            network.compile()
    return _Seat(player, make_optimizer(player.model, cfg), AveragedLoss(player.model, player.loss))


def _step(
    seats: Sequence[_Seat], data: list[Any], batches: Batches, cfg: TrainConfig, run: Run, slices: list[range]
) -> dict[str, Tensor]:
    """One optimiser step of every player that has started. -> logs; empty if the step was skipped.

    Nothing moves until the losses and gradients of all players are known to be finite: a bad batch changes nothing.
    """
    whole = TrainStep(run.seed, run.step, range(slices[0].start, slices[-1].stop), cfg.batch, run.device)
    steps = [TrainStep(run.seed, run.step, rows, cfg.batch, run.device) for rows in slices]
    torch.manual_seed(noise.seed_of("torch", run.seed, run.step, world()[0]))  # dropout and the like
    active = [seat for seat in seats if run.step >= seat.player.start]
    results = [_gradients(seat, data, steps, cfg, run) for seat in active]
    names = [seat.player.name for seat in active]
    bad = [n for n, (logs, _) in zip(names, results, strict=True) if not _finite(logs["loss"] + logs["grad_norm"])]
    if distributed.any_process(bool(bad), run.device):
        culprits = [name for name, (_, local) in zip(names, results, strict=True) if not _finite(local)]
        if run.skipped >= cfg.skip_bad:
            _save(seats, run, cfg)  # before the error: nothing since the last checkpoint is lost
        _skip(culprits, bad, batches, cfg, run, whole.rows)
        return {}
    logs = _update(active, [logs for logs, _ in results], whole)
    if run.ema:
        run.ema.update(seats[0].player.model)
    return logs


def _finite(value: Tensor) -> bool:
    return bool(torch.isfinite(value))


def _gradients(
    seat: _Seat, data: list[Any], steps: list[TrainStep], cfg: TrainConfig, run: Run
) -> tuple[dict[str, Tensor], Tensor]:
    """One player's losses over the micro-batches and their gradients, clipped. -> logs, and loss + local norm.

    The latter is of this process's rows alone, since a mean over processes spreads the NaN of one to all.
    """
    for group in seat.optimizer.param_groups:
        group["lr"] = lr_at(run.step, cfg, run.steps, run.warmup)
    seat.optimizer.zero_grad()
    loss, logs = torch.zeros((), device=run.device), dict[str, Tensor]()
    for batch, step in zip(data, steps, strict=True):
        share = len(step.rows) / sum(len(s.rows) for s in steps)  # the last micro-batch may be smaller
        with seat.loss.micro_batch(last=step is steps[-1]):
            with torch.autocast(run.device.type, torch.bfloat16, enabled=cfg.precision == "bf16"):
                partial, terms = seat.loss(batch.to(run.device), step)
            (share * partial).backward()
        loss = loss + share * partial.detach()
        logs = {name: logs.get(name, 0.0) + share * value for name, value in terms.items()}
    parameters = [p for p in seat.player.model.parameters() if p.requires_grad]
    norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.clip or math.inf)
    local_norm = norm if seat.loss.local_norm is None else seat.loss.local_norm
    return {"loss": loss, "grad_norm": norm, **logs}, loss + local_norm


def _skip(culprits: list[str], bad: list[str], batches: Batches, cfg: TrainConfig, run: Run, rows: range) -> None:
    """Report the batch that was not finite; raise RunError if more than cfg.skip_bad were.

    culprits: players whose loss or gradients this process's rows spoiled; bad: those spoiled by any process's rows.
    """

    def report(players: list[str]) -> str:
        reason = f"loss or gradient is not finite at step {run.step}, {batches.describe(run.step, rows)}"
        return distributed.first_message(f"{players[0]}: {reason}" if players else "")

    reason = report(culprits) or report(bad)
    if run.skipped >= cfg.skip_bad:
        raise RunError(
            f"{reason}; nothing was changed by this step, and step {run.step} is saved",
            "run the same command again with a lower train.lr, or with train.clip=1, or skip the batch with "
            f"train.skip_bad={cfg.skip_bad + 1}",
        )
    run.skipped += 1
    if is_first():
        progress.warn(f"skipped ({run.skipped} of {cfg.skip_bad}): {reason}")


def _update(seats: Sequence[_Seat], results: Sequence[dict[str, Tensor]], whole: TrainStep) -> dict[str, Tensor]:
    """Move every player. -> their logs; the names of all but the first carry the player's name."""
    logs: dict[str, Tensor] = {}
    for index, (seat, values) in enumerate(zip(seats, results, strict=True)):
        seat.optimizer.step()
        prefix = f"{seat.player.name}/" if index else ""
        logs |= {prefix + name: value for name, value in (values | seat.player.after_step(whole)).items()}
    return logs


@contextlib.contextmanager
def _explain_out_of_memory(run: Run, slices: list[range]) -> Iterator[None]:
    """Raise a RunError with the next smaller micro-batch. It is never changed here: that would be another training."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        rows = len(slices[0])
        reason = f"out of memory at step {run.step} with micro-batches of {rows} images: {str(error).splitlines()[0]}"
        if rows <= noise.BLOCK:
            raise RunError(reason, "train a smaller network, or share the batch with --gpus") from error
        smaller = max(1, rows // 2 // noise.BLOCK) * noise.BLOCK
        hint = f"give train.micro_batch={smaller} and another --out: the same batch in smaller portions"
        raise RunError(reason, hint) from error


# ---- several processes ---------------------------------------------------------------------------------------------


class _Forward(nn.Module):
    """A loss as a forward pass over the trained parameters of a model."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        # Only parameters: DDP would send a model's buffers along at every step.
        self.trained = nn.ParameterList([p for p in model.parameters() if p.requires_grad])
        self.loss = loss

    def forward(self, *args: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return self.loss(*args)


class AveragedLoss:
    """A loss whose backward pass leaves the mean over processes in the gradients of `model`.

    DistributedDataParallel averages a bucket as soon as it is complete, while the backward pass continues. It wraps the
    loss, not the network, so a loss may run the network several times, or only parts of it. With one process it is
    the loss itself.
    """

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        """Gives every process the first one's parameters and buffers. Every trained parameter must get a gradient."""
        self.call: Callable[..., Any] = loss
        self.ddp: DistributedDataParallel | None = None
        self.local_norm: Tensor | None = None  # of this process's gradients alone; None with one process
        if world()[1] > 1:
            # A 1×1 convolution's gradient may come with other strides of its sides of 1: copied, and harmless.
            warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
            for value in model.state_dict().values():
                dist.broadcast(value, 0)
            self.ddp = DistributedDataParallel(_Forward(model, loss), init_sync=False, gradient_as_bucket_view=True)
            self.ddp.register_comm_hook(None, self._average)
            self.call = self.ddp

    def __call__(self, *args: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its logs."""
        result: tuple[Tensor, dict[str, Tensor]] = self.call(*args)
        return result

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Around the forward and backward pass of one micro-batch: processes communicate only at the last of a step."""
        self.local_norm = None
        with self.ddp.no_sync() if self.ddp and not last else contextlib.nullcontext():
            yield

    def _average(self, state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
        """DDP's own averaging of a bucket, after the norm of this process's gradients is taken."""
        norm = bucket.buffer().norm()
        self.local_norm = norm if self.local_norm is None else torch.hypot(self.local_norm, norm)
        assert dist.group.WORLD is not None
        return allreduce_hook(dist.group.WORLD, bucket)


# ---- states --------------------------------------------------------------------------------------------------------


def _save(seats: Sequence[_Seat], run: Run, cfg: TrainConfig) -> None:
    """Write the state of this step. The step alone determines a resumed run's data: all randomness is (seed, step)."""
    if is_first():
        players = {
            seat.player.name: {"model": seat.player.model.state_dict(), "optimizer": seat.optimizer.state_dict()}
            for seat in seats
        }
        state = {
            "step": run.step,
            "skipped": run.skipped,
            "threads": torch.get_num_threads(),
            "players": players,
            "ema": {"model": run.ema.model.state_dict(), "updates": run.ema.updates} if run.ema else None,
        }
        checkpoint.save_state(run.folder / CHECKPOINTS, run.step, state, cfg.keep)
    distributed.barrier()


def _resume(seats: Sequence[_Seat], run: Run) -> None:
    state = checkpoint.load_newest_state(run.folder / CHECKPOINTS, run.device)
    if state is None:
        return
    for seat in seats:
        seat.player.model.load_state_dict(state["players"][seat.player.name]["model"])
        seat.optimizer.load_state_dict(state["players"][seat.player.name]["optimizer"])
    if run.ema and state["ema"]:
        run.ema.model.load_state_dict(state["ema"]["model"])
        run.ema.updates = state["ema"]["updates"]
    run.step, run.skipped = state["step"], state["skipped"]
    threads = torch.get_num_threads()
    if state["threads"] != threads:
        progress.say(f"{state['threads']} threads before, {threads} now: not bitwise the same run")

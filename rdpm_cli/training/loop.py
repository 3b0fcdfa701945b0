"""The one training loop. A task brings players (one, or two with a discriminator); the loop brings everything else.

Step s is a function of (seed, s) alone, so a resumed run repeats an uninterrupted one, at any number of processes."""

import contextlib
import functools
import math
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from rdpm_cli import checkpoint, distributed, noise, progress
from rdpm_cli.distributed import TrainStep, is_first, world
from rdpm_cli.errors import RunError
from rdpm_cli.runs import StopRequest
from rdpm_cli.training.config import TrainConfig
from rdpm_cli.training.ema import Ema
from rdpm_cli.training.log import MetricsLog
from rdpm_cli.training.trackers import Log
from rdpm_cli.workers import in_order

CHECKPOINTS = "checkpoints"  # folder of the training states, in the run folder
Data = list[tuple[range, Any]]  # of a step: the rows of each micro-batch, and the batch


class Batches(Protocol):
    """The data of every step, each a pure function of (seed, step). rows: of the global batch."""

    def batch_at(self, step: int, rows: range) -> Any: ...  # with a method `to(device)`
    def describe(self, step: int, rows: range) -> str: ...  # names of the images, for an error message


@dataclass
class DeviceBatch:
    """A batch whose fields are tensors, None or numbers."""

    def to(self, device: torch.device) -> Self:
        """The batch with its tensors on this device."""
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)


class Player(ABC):
    """One network, `model`, with its own optimiser, trained from step `start` on."""

    name: str
    model: Any
    start = 0
    metadata: dict[str, Any] | None = None  # kept in the states: what no tensor of the network shows

    def networks(self) -> Sequence[nn.Module]:
        """The parts that `train.compile` compiles."""
        return [self.model]

    @abstractmethod
    def loss(self, batch: Any, step: TrainStep) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss and logs of a micro-batch, with a gradient for every trained parameter."""

    def after_step(self, step: TrainStep) -> dict[str, Tensor]:
        """Work after the optimiser, such as a codebook's update. -> logs"""
        return {}


def lr_at(step: int, cfg: TrainConfig, steps: int, warmup: int) -> float:
    """Learning rate of a step: linear warm-up, then constant, or a cosine that ends at 0 after `steps`."""
    if step < warmup:
        return cfg.lr * (step + 1) / warmup
    if cfg.lr_decay == "constant":
        return cfg.lr
    return 0.5 * cfg.lr * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def make_optimizer(model: nn.Module, cfg: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Adam if weight_decay is 0), fused; no decay on embeddings, norms and biases."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    undecayed = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    # A codebook that is trained by gradients, `books`, is an embedding too.
    undecayed |= {id(p) for name, p in trained.items() if p.ndim < 2 or name.endswith("books")}
    decayed = [p for p in trained.values() if id(p) not in undecayed]
    plain = [p for p in trained.values() if id(p) in undecayed]
    groups = [{"params": decayed, "weight_decay": cfg.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=cfg.lr, betas=cfg.betas, fused=True)


@dataclass
class Run:
    """A run in a folder. step: optimiser steps done; skipped: those left out for a non-finite loss."""

    folder: Path
    seed: int
    device: torch.device
    steps: int
    warmup: int
    stop: StopRequest
    step: int = 0
    skipped: int = 0
    ema: Ema | None = None
    tracker: Log | None = None  # of `open_tracker`

    @property
    def done(self) -> bool:
        """Whether all steps are taken."""
        return self.step >= self.steps


# Called after every step, with the logged values at logged steps, to read or add to. -> more, for a line of their own.
Observer = Callable[[Run, dict[str, float] | None], dict[str, Any] | None]


def fit(
    players: Sequence[Player], batches: Batches, cfg: TrainConfig, run: Run, observers: Sequence[Observer] = ()
) -> None:
    """Train to run.steps, resuming from run.folder. Raises RunError (not finite, disk full) and Stopped (a signal)."""
    rows = distributed.rank_rows(cfg.batch)
    seats = [Seat(player, cfg) for player in players]
    run.ema = Ema(players[0].model, cfg.ema) if cfg.ema else None
    _resume(seats, run)
    log = MetricsLog(run.folder, run.step, run.tracker) if is_first() else None
    started, first = time.monotonic(), run.step
    work = functools.partial(_micro_batches, batches, cfg, rows)
    alone = world()[1] == 1  # several processes stop after the same step; one need not wait for the data of the next
    steps, stopped = range(run.step, run.steps), lambda: alone and bool(run.stop.name)
    prepared = in_order(work, steps, cfg.workers, "train.workers=0", stopped)
    with contextlib.closing(prepared):
        for data in prepared:
            logs = _step(seats, data, batches, run)
            run.step += 1
            if run.ema and is_first():
                run.ema.keep(run.folder, run.step, run.steps)
            values = None
            if logs and (run.step % cfg.log_every == 0 or run.done):
                rate = (run.step - first) * cfg.batch / (time.monotonic() - started)
                lr = seats[0].optimizer.param_groups[0]["lr"]
                means = distributed.average_logs(logs)
                values = {**means, "lr": lr, "images_per_second": rate, "skipped": run.skipped}
            _observe(observers, run, values, log)
            stopping = distributed.any_process(bool(run.stop.name), run.device)
            if stopping and not run.done:
                break
            if run.step % cfg.save_every == 0 or run.done:
                _save(seats, run)
    if not run.done:  # a signal came after a step, or while it waited for data
        _save(seats, run)
    if log:
        log.close()
    if not run.done:
        run.stop.name = run.stop.name or "a signal to another process"
        run.stop.leave(f"step {run.step} of {run.steps} is saved in {run.folder / CHECKPOINTS}")


def _observe(observers: Sequence[Observer], run: Run, values: dict[str, float] | None, log: MetricsLog | None) -> None:
    """Call the observers, and log the values of a step and what they return."""
    lines = [observer(run, values) for observer in observers]  # they may add to `values`, so they come first
    for line in (values, *lines):
        if log and line:
            log.write(run.step, line)


def _micro_batches(batches: Batches, cfg: TrainConfig, rows: range, step: int) -> Data:
    """This process's rows of the global batch of a step, and their data, in portions of at most cfg.micro_batch."""
    size = cfg.micro_batch or len(rows)  # a multiple of 16, so that each portion is of whole blocks
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    return [(part, batches.batch_at(step, part)) for part in parts]


class Seat:
    """A player with its optimiser. loss: the backward pass leaves the mean over processes in the gradients."""

    def __init__(self, player: Player, cfg: TrainConfig) -> None:
        """Gives every process the first one's parameters and buffers."""
        self.player, self.cfg, model = player, cfg, player.model
        if cfg.channels_last:
            model.to(memory_format=torch.channels_last)
        if cfg.compile:
            for network in player.networks():
                network.compile()
        self.optimizer = make_optimizer(model, cfg)
        self.loss, self.ddp = player.loss, None
        if world()[1] > 1:
            # A 1×1 convolution's gradient may come with other strides of its sides of 1: copied, and harmless.
            warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
            for value in model.state_dict().values():
                dist.broadcast(value, 0)
            # DDP wraps the loss, not the network, so a loss may run the network several times, or only parts of it. It
            # sees parameters only, since it would send buffers along at every step.
            forward = nn.Module()
            forward.trained = nn.ParameterList([p for p in model.parameters() if p.requires_grad])
            forward.forward = player.loss
            self.loss = self.ddp = DistributedDataParallel(forward, init_sync=False, gradient_as_bucket_view=True)
            self.ddp.register_comm_hook(None, allreduce_hook)  # divides by n; DDP multiplies with 1/n: other bits

    def gradients(self, data: Data, run: Run) -> dict[str, Tensor]:
        """Losses of the micro-batches and their gradients, clipped. -> logs."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr_at(run.step, self.cfg, run.steps, run.warmup)
        self.optimizer.zero_grad()
        loss, logs = torch.zeros((), device=run.device), dict[str, Tensor]()
        for rows, batch in data:
            step = TrainStep(run.seed, run.step, rows, self.cfg.batch, run.device)
            share = len(rows) / sum(len(part) for part, _ in data)  # the last micro-batch may be smaller
            # Processes communicate only at the last micro-batch of a step.
            with self.ddp.no_sync() if self.ddp and rows is not data[-1][0] else contextlib.nullcontext():
                with torch.autocast(run.device.type, torch.bfloat16, enabled=self.cfg.precision == "bf16"):
                    partial, terms = self.loss(batch.to(run.device), step)
                (share * partial).backward()
            loss = loss + share * partial.detach()
            logs = {name: logs.get(name, 0.0) + share * value for name, value in terms.items()}
        parameters = [p for p in self.player.model.parameters() if p.requires_grad]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.cfg.clip or math.inf)
        return {"loss": loss, "grad_norm": norm, **logs}


def _step(seats: Sequence[Seat], data: Data, batches: Batches, run: Run) -> dict[str, Tensor]:
    """One optimiser step of every player that has started. -> logs; empty if the step was skipped.

    Nothing moves until the losses and gradients of all players are known to be finite: a bad batch changes nothing."""
    cfg, rows = seats[0].cfg, range(data[0][0].start, data[-1][0].stop)
    torch.manual_seed(noise.seed_of("torch", run.seed, run.step, world()[0]))  # dropout and the like
    active = [seat for seat in seats if run.step >= seat.player.start]
    results = {seat.player.name: seat.gradients(data, run) for seat in active}
    bad = not all(torch.isfinite(logs["loss"] + logs["grad_norm"]) for logs in results.values())
    if distributed.any_process(bad, run.device):
        # The gradients are means over processes; the process that spoiled them may be seen by its own loss.
        values = [f"{name}: loss {r['loss']:.4g}, gradient {r['grad_norm']:.4g}" for name, r in results.items()]
        reason = f"loss or gradient is not finite at step {run.step}, {batches.describe(run.step, rows)}"
        reason += f" ({'; '.join(values)})"
        if run.skipped >= cfg.skip_bad:
            _save(seats, run)  # nothing since the last checkpoint is lost
            hint = f"lower train.lr, set train.clip=1, or skip the batch with train.skip_bad={cfg.skip_bad + 1}"
            raise RunError(f"{reason}; the state before this step is saved", hint)
        run.skipped += 1
        progress.warn(f"skipped ({run.skipped} of {cfg.skip_bad}): {reason}")
        return {}
    logs, whole = dict[str, Tensor](), TrainStep(run.seed, run.step, rows, cfg.batch, run.device)
    for seat in active:
        seat.optimizer.step()
        prefix = "" if seat is seats[0] else f"{seat.player.name}/"
        terms = results[seat.player.name] | seat.player.after_step(whole)
        logs |= {prefix + name: value for name, value in terms.items()}
    if run.ema:
        run.ema.update(seats[0].player.model)
    return logs


def _save(seats: Sequence[Seat], run: Run) -> None:
    """Write the state of this step. The step alone determines a resumed run's data: all randomness is (seed, step)."""
    if is_first():
        state: dict[str, Any] = {"step": run.step, "skipped": run.skipped, "threads": torch.get_num_threads()}
        state["players"] = {
            seat.player.name: {
                "model": seat.player.model.state_dict(), "optimizer": seat.optimizer.state_dict(),
                "metadata": seat.player.metadata,
            }
            for seat in seats
        }  # fmt: skip
        state["ema"] = run.ema.state_dict() if run.ema else None
        checkpoint.save_state(run.folder / CHECKPOINTS, run.step, state, seats[0].cfg.keep)
    distributed.barrier()


def _resume(seats: Sequence[Seat], run: Run) -> None:
    state = checkpoint.load_newest_state(run.folder / CHECKPOINTS, run.device)
    if state is None:
        return
    for seat in seats:
        seat.player.model.load_state_dict(state["players"][seat.player.name]["model"])
        seat.optimizer.load_state_dict(state["players"][seat.player.name]["optimizer"])
    if run.ema and state["ema"]:
        run.ema.load_state_dict(state["ema"])
    run.step, run.skipped = state["step"], state["skipped"]
    if state["threads"] != (threads := torch.get_num_threads()):
        progress.say(f"{state['threads']} threads before, {threads} now: not bitwise the same run")

"""The one training loop. A task brings players (one, or two with a discriminator); the loop brings everything else."""

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from rdpm_cli import noise, progress
from rdpm_cli.config import TrainConfig
from rdpm_cli.errors import RunError
from rdpm_cli.signals import StopRequest, serve_parent
from rdpm_cli.step import TrainStep, world
from rdpm_cli.training import checkpoint, distributed
from rdpm_cli.training.averaging import AveragedLoss
from rdpm_cli.training.ema import Ema
from rdpm_cli.training.logging import MetricsLog
from rdpm_cli.training.tracking import Mirror


class Batches(Protocol):
    """The data of every step, each a pure function of (seed, step)."""

    def batch_at(self, step: int, rows: range) -> Any:
        """rows of the global batch of this step, with a method `to(device)`."""

    def describe(self, step: int, rows: range) -> str:
        """What those rows are, for an error message."""


class Player(Protocol):
    """One network with its own loss and optimiser. start: the first step it trains in."""

    name: str
    start: int

    @property
    def model(self) -> nn.Module:
        """What is trained."""

    def networks(self) -> Sequence[nn.Module]:
        """The parts of it that `train.compile` compiles."""

    def loss(self, batch: Any, step: TrainStep) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss and scalar logs of a micro-batch; step: its rows."""

    def after_step(self, step: TrainStep) -> dict[str, Tensor]:
        """What follows the optimiser, such as a codebook's move; step: all rows of this process. -> logs."""


class Observer(Protocol):
    """Called after steps: evaluations, previews, progress."""

    def __call__(self, run: "Run", logs: dict[str, float] | None) -> dict[str, float] | None:
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
    skipped: int = 0  # steps passed over for a non-finite loss
    ema: Ema | None = None
    mirrors: Sequence[Mirror] = ()  # trackers that get what the log gets

    @property
    def done(self) -> bool:
        """Are all steps taken?"""
        return self.step >= self.steps


class _Steps(Dataset[Any]):
    """A step's micro-batches by step number, also for DataLoader's worker processes."""

    def __init__(self, batches: Batches, parts: list[range]) -> None:
        self.batches, self.parts = batches, parts

    def __getitem__(self, step: int) -> list[Any]:
        return [self.batches.batch_at(step, rows) for rows in self.parts]


def micro_rows(rows: range, micro_batch: int | None) -> list[range]:
    """A process's rows in parts of at most micro_batch (a multiple of 16, so parts are whole blocks)."""
    size = micro_batch or len(rows)
    return [range(start, min(start + size, rows.stop)) for start in range(rows.start, rows.stop, size)]


def lr_at(step: int, cfg: TrainConfig, steps: int, warmup: int) -> float:
    """Learning rate of a step: linear warm-up, then constant or a cosine that ends at 0."""
    if step < warmup:
        return cfg.lr * (step + 1) / warmup
    if cfg.lr_decay == "constant":
        return cfg.lr
    return 0.5 * cfg.lr * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def make_optimizer(model: nn.Module, cfg: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Adam where weight_decay is 0), fused; no decay on embeddings, norms and biases."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    embeddings |= {id(p) for name, p in model.named_parameters() if name.endswith("books")}  # codebooks
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim >= 2 and id(p) not in embeddings]
    plain = [p for p in trained if p.ndim < 2 or id(p) in embeddings]
    groups = [{"params": decayed, "weight_decay": cfg.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=cfg.lr, betas=cfg.betas, fused=True)


def fit(
    players: Sequence[Player], batches: Batches, cfg: TrainConfig, run: Run, observers: Sequence[Observer] = ()
) -> None:
    """Train to run.steps, resuming from run.folder.

    Raises RunError on a non-finite loss, out of memory and a full disk, Stopped after a signal.

    The step s is a function of (seed, s) alone, so a resumed run repeats what an uninterrupted one does.
    """
    rows = distributed.own_rows(cfg.batch)
    parts = micro_rows(rows, cfg.micro_batch)
    seats = [_prepare(player, cfg) for player in players]
    run.ema = Ema(players[0].model, cfg.ema) if cfg.ema else None
    _resume(seats, run)
    log = MetricsLog(run.folder, run.step, run.mirrors) if world()[0] == 0 else None
    started, first = time.monotonic(), run.step
    for data in _data(batches, cfg, run, parts):
        with _memory_is_told(run, parts):
            logs = _step(seats, data, batches, cfg, run, parts)
        run.step += 1
        values = None
        if logs and (run.step % cfg.log_every == 0 or run.done):
            rate = (run.step - first) * cfg.batch / (time.monotonic() - started)
            lr = seats[0].optimizer.param_groups[0]["lr"]
            values = {**distributed.average_logs(logs), "lr": lr, "images_per_second": rate, "skipped": run.skipped}
        more = [observer(run, values) for observer in observers]
        for line in (values, *more):
            if log and line:
                log.write(run.step, line)
        stopping = distributed.any_process(run.stop.asked, run.device)
        if run.step % cfg.save_every == 0 or run.done or stopping:
            _save(seats, run, cfg)
        if stopping and not run.done:
            run.stop.name = run.stop.name or "a signal to another process"
            run.stop.leave(f"step {run.step} of {run.steps} is saved in {run.folder / 'checkpoints'}")
    if log:
        log.close()


@dataclass
class _Seat:
    """A player, what moves it, and its loss over all processes."""

    player: Player
    optimizer: torch.optim.Optimizer
    loss: AveragedLoss


def _prepare(player: Player, cfg: TrainConfig) -> _Seat:
    """The first process's weights everywhere, in the layout and form that the recipe asks for."""
    if cfg.channels_last:
        player.model.to(memory_format=torch.channels_last)
    if cfg.compile:
        for network in player.networks():
            network.compile()
    return _Seat(player, make_optimizer(player.model, cfg), AveragedLoss(player.model, player.loss))


def _data(batches: Batches, cfg: TrainConfig, run: Run, parts: list[range]) -> Iterator[list[Any]]:
    """The micro-batches of each step that is left."""
    data = _Steps(batches, parts)
    if cfg.workers == 0:
        return (data[step] for step in range(run.step, run.steps))
    loader = DataLoader(
        data,
        batch_size=None,
        sampler=range(run.step, run.steps),
        num_workers=cfg.workers,
        prefetch_factor=4,
        worker_init_fn=serve_parent,  # launchers signal whole groups, and the step needs its batch
    )
    return iter(loader)


def _step(
    seats: Sequence[_Seat], data: list[Any], batches: Batches, cfg: TrainConfig, run: Run, parts: list[range]
) -> dict[str, Tensor]:
    """One optimiser step of every player that trains yet. -> logs; none after a step that was passed over.

    Nothing moves before every player's loss and gradients are found finite, so a bad batch leaves all as it was.
    """
    whole = TrainStep(run.seed, run.step, range(parts[0].start, parts[-1].stop), cfg.batch, run.device)
    steps = [TrainStep(run.seed, run.step, part, cfg.batch, run.device) for part in parts]
    torch.manual_seed(noise.seed_of("torch", run.seed, run.step, world()[0]))  # dropout and the like
    active = [seat for seat in seats if run.step >= seat.player.start]
    found = [_gradients(seat, data, steps, cfg, run) for seat in active]
    names = [seat.player.name for seat in active]
    bad = [name for name, (logs, _) in zip(names, found, strict=True) if not _finite(logs["loss"] + logs["grad_norm"])]
    if distributed.any_process(bool(bad), run.device):
        ours = [name for name, (_, own) in zip(names, found, strict=True) if not _finite(own)]
        if run.skipped >= cfg.skip_bad:
            _save(seats, run, cfg)
        _pass_over(ours, bad, batches, cfg, run, whole.rows)
        return {}
    logs = _update(active, [logs for logs, _ in found], whole)
    if run.ema:
        run.ema.update(seats[0].player.model)
    return logs


@contextlib.contextmanager
def _memory_is_told(run: Run, parts: list[range]) -> Iterator[None]:
    """A RunError where the device's memory is too small. The batch is never changed: that would be another training."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        rows = len(parts[0])
        what = f"out of memory at step {run.step} with micro-batches of {rows} images: {str(error).splitlines()[0]}"
        if rows <= noise.BLOCK:
            raise RunError(what, "train a smaller network, or share the batch by --gpus") from error
        less = max(1, rows // 2 // noise.BLOCK) * noise.BLOCK
        raise RunError(what, f"give train.micro_batch={less} and another --out: the same batch in parts") from error


def _finite(value: Tensor) -> bool:
    return bool(torch.isfinite(value))


def _gradients(
    seat: _Seat, data: list[Any], steps: list[TrainStep], cfg: TrainConfig, run: Run
) -> tuple[dict[str, Tensor], Tensor]:
    """One player's losses over the micro-batches and their gradients, clipped. -> logs; what tells a bad batch of ours.

    The latter is loss + gradient norm before any mean over processes, for a mean makes one's NaN everybody's.
    """
    for group in seat.optimizer.param_groups:
        group["lr"] = lr_at(run.step, cfg, run.steps, run.warmup)
    seat.optimizer.zero_grad()
    loss, logs = torch.zeros((), device=run.device), dict[str, Tensor]()
    for batch, step in zip(data, steps, strict=True):
        share = len(step.rows) / sum(len(s.rows) for s in steps)
        with seat.loss.part(last=step is steps[-1]):
            with torch.autocast(run.device.type, torch.bfloat16, enabled=cfg.precision == "bf16"):
                part, found = seat.loss(batch.to(run.device), step)
            (share * part).backward()
        loss = loss + share * part.detach()
        logs = {name: logs.get(name, 0.0) + share * value for name, value in found.items()}
    parameters = [p for p in seat.player.model.parameters() if p.requires_grad]
    norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.clip or math.inf)
    own_norm = norm if seat.loss.own_norm is None else seat.loss.own_norm
    return {"loss": loss, "grad_norm": norm, **logs}, loss + own_norm


def _pass_over(ours: list[str], bad: list[str], batches: Batches, cfg: TrainConfig, run: Run, rows: range) -> None:
    """Say which batch was not finite; raise RunError once more than cfg.skip_bad were.

    ours: the players that this process's rows made so; bad: those that are so here, by whoever's rows.
    """

    def about(players: list[str]) -> str:
        what = f"loss or gradient is not finite at step {run.step}, {batches.describe(run.step, rows)}"
        return distributed.first_message(f"{players[0]}: {what}" if players else "")

    what = about(ours) or about(bad)
    if run.skipped >= cfg.skip_bad:
        raise RunError(
            f"{what}; nothing was changed by this step, and step {run.step} is saved",
            "run the same command again with a lower train.lr, or with train.clip=1, or pass the batch over with "
            f"train.skip_bad={cfg.skip_bad + 1}",
        )
    run.skipped += 1
    progress.warn(f"passed over ({run.skipped} of {cfg.skip_bad}): {what}")


def _update(seats: Sequence[_Seat], found: Sequence[dict[str, Tensor]], whole: TrainStep) -> dict[str, Tensor]:
    """Move every player. -> their logs; the names of all but the first carry the player's."""
    logs: dict[str, Tensor] = {}
    for place, (seat, values) in enumerate(zip(seats, found, strict=True)):
        seat.optimizer.step()
        prefix = f"{seat.player.name}/" if place else ""
        logs |= {prefix + name: value for name, value in (values | seat.player.after_step(whole)).items()}
    return logs


def _save(seats: Sequence[_Seat], run: Run, cfg: TrainConfig) -> None:
    if world()[0] == 0:
        state = {
            "step": run.step,
            "skipped": run.skipped,
            "threads": torch.get_num_threads(),
            "players": {
                seat.player.name: {"model": seat.player.model.state_dict(), "optimizer": seat.optimizer.state_dict()}
                for seat in seats
            },
            "ema": {"model": run.ema.model.state_dict(), "updates": run.ema.updates} if run.ema else None,
        }
        checkpoint.save(run.folder / "checkpoints", run.step, state, cfg.keep)
    distributed.barrier()


def _resume(seats: Sequence[_Seat], run: Run) -> None:
    state = checkpoint.load_newest(run.folder / "checkpoints", run.device)
    if state is None:
        return
    for seat in seats:
        seat.player.model.load_state_dict(state["players"][seat.player.name]["model"])
        seat.optimizer.load_state_dict(state["players"][seat.player.name]["optimizer"])
    if run.ema and state["ema"]:
        run.ema.model.load_state_dict(state["ema"]["model"])
        run.ema.updates = state["ema"]["updates"]
    run.step, run.skipped = state["step"], state["skipped"]
    if state["threads"] != torch.get_num_threads():
        progress.say(f"{state['threads']} threads then, {torch.get_num_threads()} now: not bitwise the same run")

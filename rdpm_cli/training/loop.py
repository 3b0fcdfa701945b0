"""The one training loop. A task brings players (one, or two with a discriminator); the loop brings everything else."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from rdpm_cli import noise, progress
from rdpm_cli.config import TrainConfig
from rdpm_cli.errors import RunError
from rdpm_cli.signals import StopRequest
from rdpm_cli.step import TrainStep, world
from rdpm_cli.training import checkpoint, distributed
from rdpm_cli.training.ema import Ema
from rdpm_cli.training.logging import MetricsLog

BatchAt = Callable[[int, range], Any]


class Player(Protocol):
    """One network with its own loss and optimiser."""

    name: str

    @property
    def model(self) -> nn.Module:
        """What is trained."""

    def loss(self, batch: Any, step: TrainStep) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss and scalar logs of a micro-batch; step: its rows."""

    def after_step(self, step: TrainStep) -> dict[str, Tensor]:
        """What follows the optimiser, such as a codebook's move; step: all rows of this process. -> logs."""


class Observer(Protocol):
    """Called after steps: evaluations, previews, progress."""

    def __call__(self, run: "Run", logs: dict[str, float] | None) -> dict[str, float] | None:
        """run: after `run.step` steps. logs: the logged values, at logged steps. -> more values for the log."""


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
    ema: Ema | None = None

    @property
    def done(self) -> bool:
        """Are all steps taken?"""
        return self.step >= self.steps


class _Steps(Dataset[Any]):
    """A step's micro-batches by step number, also for DataLoader's worker processes."""

    def __init__(self, batch_at: BatchAt, parts: list[range]) -> None:
        self.batch_at, self.parts = batch_at, parts

    def __getitem__(self, step: int) -> list[Any]:
        return [self.batch_at(step, rows) for rows in self.parts]


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
    players: Sequence[Player], batch_at: BatchAt, cfg: TrainConfig, run: Run, observers: Sequence[Observer] = ()
) -> None:
    """Train to run.steps, resuming from run.folder. Raises RunError on a non-finite loss, Stopped after a signal.

    The step s is a function of (seed, s) alone, so a resumed run repeats what an uninterrupted one does.
    """
    rows = distributed.own_rows(cfg.batch)
    parts = micro_rows(rows, cfg.micro_batch)
    optimizers = [make_optimizer(player.model, cfg) for player in players]
    for player in players:
        distributed.broadcast_model(player.model)
    run.ema = Ema(players[0].model, cfg.ema) if cfg.ema else None
    _resume(players, optimizers, run)
    log = MetricsLog(run.folder, run.step) if world()[0] == 0 else None
    started, first = time.monotonic(), run.step
    for batches in _batches(batch_at, cfg, run, parts):
        steps = [TrainStep(run.seed, run.step, part, cfg.batch, run.device) for part in parts]
        whole = TrainStep(run.seed, run.step, rows, cfg.batch, run.device)
        torch.manual_seed(noise.seed_of("torch", run.seed, run.step, world()[0]))  # dropout and the like
        pairs = list(zip(players, optimizers, strict=True))
        found = [_gradients(player, optimizer, batches, steps, cfg, run) for player, optimizer in pairs]
        logs = _update(pairs, found, whole)
        if run.ema:
            run.ema.update(players[0].model)
        run.step += 1
        values = None
        if run.step % cfg.log_every == 0 or run.done:
            rate = (run.step - first) * cfg.batch / (time.monotonic() - started)
            lr = optimizers[0].param_groups[0]["lr"]
            values = {**distributed.average_logs(logs), "lr": lr, "images_per_second": rate}
        more = [observer(run, values) for observer in observers]
        if log and values:
            log.write(run.step, values)
        for extra in more:
            if log and extra:
                log.write(run.step, extra)
        stopping = distributed.any_process(run.stop.asked, run.device)
        if run.step % cfg.save_every == 0 or run.done or stopping:
            _save(players, optimizers, run, cfg)
        if stopping and not run.done:
            run.stop.name = run.stop.name or "a signal to another process"
            run.stop.leave(f"step {run.step} of {run.steps} is saved in {run.folder / 'checkpoints'}")
    if log:
        log.close()


def _batches(batch_at: BatchAt, cfg: TrainConfig, run: Run, parts: list[range]) -> Iterator[list[Any]]:
    """The micro-batches of each step that is left."""
    data = _Steps(batch_at, parts)
    if cfg.workers == 0:
        return (data[step] for step in range(run.step, run.steps))
    loader = DataLoader(
        data,
        batch_size=None,
        sampler=range(run.step, run.steps),
        num_workers=cfg.workers,
        prefetch_factor=4,
    )
    return iter(loader)


def _gradients(
    player: Player,
    optimizer: torch.optim.Optimizer,
    batches: list[Any],
    steps: list[TrainStep],
    cfg: TrainConfig,
    run: Run,
) -> dict[str, Tensor]:
    """One player's losses over the micro-batches, their gradients, and the check that both are finite. -> logs.

    Nothing moves before every player has passed, so a bad batch leaves all of them as they were.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr_at(run.step, cfg, run.steps, run.warmup)
    optimizer.zero_grad()
    loss, logs = torch.zeros((), device=run.device), dict[str, Tensor]()
    for batch, step in zip(batches, steps, strict=True):
        share = len(step.rows) / sum(len(s.rows) for s in steps)
        with torch.autocast(run.device.type, torch.bfloat16, enabled=cfg.precision == "bf16"):
            part, found = player.loss(batch.to(run.device), step)
        (share * part).backward()
        loss = loss + share * part.detach()
        logs = {name: logs.get(name, 0.0) + share * value for name, value in found.items()}
    parameters = [p for p in player.model.parameters() if p.requires_grad]
    distributed.average_gradients(parameters)
    norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.clip or math.inf)
    if distributed.any_process(not bool(torch.isfinite(loss + norm)), run.device):
        raise RunError(
            f"{player.name}: loss or gradient is not finite at step {run.step} (loss {float(loss):.4g}); "
            "nothing was changed by this step",
            f"lower train.lr, or look at the batch; the last good checkpoint is in {run.folder / 'checkpoints'}",
        )
    return {"loss": loss, "grad_norm": norm, **logs}


def _update(
    pairs: Sequence[tuple[Player, torch.optim.Optimizer]], found: Sequence[dict[str, Tensor]], whole: TrainStep
) -> dict[str, Tensor]:
    """Move every player. -> their logs; the names of all but the first carry the player's."""
    logs: dict[str, Tensor] = {}
    for place, ((player, optimizer), values) in enumerate(zip(pairs, found, strict=True)):
        optimizer.step()
        prefix = f"{player.name}/" if place else ""
        logs |= {prefix + name: value for name, value in (values | player.after_step(whole)).items()}
    return logs


def _save(players: Sequence[Player], optimizers: Sequence[torch.optim.Optimizer], run: Run, cfg: TrainConfig) -> None:
    if world()[0] == 0:
        state = {
            "step": run.step,
            "threads": torch.get_num_threads(),
            "players": {
                player.name: {"model": player.model.state_dict(), "optimizer": optimizer.state_dict()}
                for player, optimizer in zip(players, optimizers, strict=True)
            },
            "ema": {"model": run.ema.model.state_dict(), "updates": run.ema.updates} if run.ema else None,
        }
        checkpoint.save(run.folder / "checkpoints", run.step, state, cfg.keep)
    distributed.barrier()


def _resume(players: Sequence[Player], optimizers: Sequence[torch.optim.Optimizer], run: Run) -> None:
    state = checkpoint.load_newest(run.folder / "checkpoints", run.device)
    if state is None:
        return
    for player, optimizer in zip(players, optimizers, strict=True):
        player.model.load_state_dict(state["players"][player.name]["model"])
        optimizer.load_state_dict(state["players"][player.name]["optimizer"])
    if run.ema and state["ema"]:
        run.ema.model.load_state_dict(state["ema"]["model"])
        run.ema.updates = state["ema"]["updates"]
    run.step = state["step"]
    if state["threads"] != torch.get_num_threads():
        progress.say(f"{state['threads']} threads then, {torch.get_num_threads()} now: not bitwise the same run")

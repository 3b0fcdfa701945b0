"""The one training loop: what a step is, what a resumed run repeats, what several processes share."""

import functools
import math
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
import torch.nn.functional as F
from helpers import CPU, assert_same, distance, leaves, metrics, newest_state
from processes import command_line, exit_code, spawn, tokenizer_command, wait_for
from torch import Tensor, nn

from rdpm_cli import checkpoint, noise
from rdpm_cli.codes.store import CodeStore
from rdpm_cli.data.open import open_source
from rdpm_cli.device import one_thread
from rdpm_cli.distributed import TrainStep
from rdpm_cli.errors import CheckpointError, RunError, Stopped
from rdpm_cli.generator import registry
from rdpm_cli.generator.batches import GeneratorTask
from rdpm_cli.generator.config import NetworkConfig, ObjectiveConfig, RDPMConfig
from rdpm_cli.runs import StopRequest, stop_on_signal
from rdpm_cli.tokenizer import model as tokenizer_model
from rdpm_cli.tokenizer.config import AutoencoderConfig, QuantizerConfig, ScheduleConfig, TokenizerConfig
from rdpm_cli.tokenizer.quantizer import Quantizer
from rdpm_cli.tokenizer.training import ImageBatches, TokenizerTask
from rdpm_cli.training.config import FREE_ON_RESUME, TrainConfig
from rdpm_cli.training.log import read_metrics
from rdpm_cli.training.loop import Batches, Player, Run, fit
from rdpm_cli.training.optim import Ema, lr_at, make_optimizer


@pytest.fixture(autouse=True)
def fixed_seed() -> Iterator[None]:
    with torch.random.fork_rng(), one_thread():  # networks this small lose time to threads
        torch.manual_seed(0)
        yield


# ---- the tasks -----------------------------------------------------------------------------------------------------


class Toy:
    """Fit the sum of three numbers, with noise from the step and a buffer that counts."""

    name = "toy"
    start = 0

    def __init__(self) -> None:
        self.model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
        self.model.register_buffer("seen", torch.zeros(()))
        self.batches: list[Tensor] = []

    def networks(self) -> list[nn.Module]:
        return [self.model]

    def loss(self, batch: Tensor, step: TrainStep) -> tuple[Tensor, dict[str, Tensor]]:
        self.batches.append(batch)
        predicted = self.model(batch + 0.1 * step.normal(3))
        return F.mse_loss(predicted[:, 0], batch.sum(1)), {"mean": predicted.detach().mean()}

    def after_step(self, step: TrainStep) -> dict[str, Tensor]:
        self.model.get_buffer("seen").add_(1)
        return {"drawn": step.pick(1, 1000).float().mean()}


class ToyBatches:
    def batch_at(self, step: int, rows: range) -> Tensor:
        return torch.from_numpy(noise.block_uniform(7, step, rows, 3))

    def describe(self, step: int, rows: range) -> str:
        return f"rows {rows.start} to {rows.stop - 1}"


def train_config(**options: Any) -> TrainConfig:
    fields = {"batch": 16, "steps": 10, "lr": 1e-2, "log_every": 1, "save_every": 1000, "ema": 0.9, **options}
    return TrainConfig(**fields)


@dataclass
class Job:
    """Players with their batches."""

    players: list[Player]
    batches: Batches
    cfg: TrainConfig


class MakeJob(Protocol):
    def __call__(self, **train: Any) -> Job: ...


def toy_job(**train: Any) -> Job:
    return Job([Toy()], ToyBatches(), train_config(**train))


def tokenizer_job(**train: Any) -> Job:
    cfg = TokenizerConfig(
        autoencoder=AutoencoderConfig(
            resolution=16, width=8, multipliers=(1, 1, 2), res_blocks=1, attention=False, groups=4, channels=4
        ),
        schedule=ScheduleConfig(kind="sin"),
        quantizer=QuantizerConfig(codes=64, steps=3, decay=0.5),  # a short memory, so that codes restart soon
        train=train_config(lr=1e-3, **train),
    )
    task = TokenizerTask(tokenizer_model.Tokenizer(cfg).train(), cfg)
    return Job([task], ImageBatches(open_source("digits"), cfg, 0), cfg.train)


def generator_job(root: Path, **train: Any) -> Job:
    store = CodeStore(root)
    tokenizer, _ = tokenizer_model.load(root / "tokenizer.pt")
    cfg = RDPMConfig(
        network=NetworkConfig(depth=1, width=32, heads=2, class_latents=True, head="geometric"),
        objective=ObjectiveConfig(noise="fresh", steps_per_image=2, t_weights="alpha", perturb=0.3),
        train=train_config(**train),
    )
    generator = registry.build(cfg, tokenizer, 3)
    generator.network.train()
    return Job([GeneratorTask(generator)], registry.batches(cfg, store, tokenizer, 0), cfg.train)


@pytest.fixture(params=["toy", "tokenizer", "generator"])
def make_job(request: pytest.FixtureRequest) -> MakeJob:
    if request.param == "generator":
        return functools.partial(generator_job, request.getfixturevalue("digits_codes"))
    makers: dict[str, MakeJob] = {"toy": toy_job, "tokenizer": tokenizer_job}
    return makers[request.param]


def start(job: Job, folder: Path, *, stop_at: int = 0) -> Run:
    """Fit the job in a folder, asking it to stop after `stop_at` steps."""
    run = Run(folder, 0, CPU, job.cfg.total_steps(1000), job.cfg.warmup(1000), StopRequest())

    def stopper(run: Run, logs: dict[str, float] | None) -> None:
        if run.step == stop_at:
            run.stop.name = "SIGTERM"

    folder.mkdir(exist_ok=True)
    fit(job.players, job.batches, job.cfg, run, [stopper])
    return run


# ---- learning rate, decay, average ---------------------------------------------------------------------------------


def test_the_learning_rate_warms_up_linearly_and_stays() -> None:
    cfg = train_config(lr=0.8)
    assert [lr_at(step, cfg, 10, 4) for step in range(10)] == pytest.approx([0.2, 0.4, 0.6, *[0.8] * 7])


def test_the_cosine_starts_after_warm_up_and_ends_at_zero() -> None:
    cfg = train_config(lr=0.8, lr_decay="cosine")
    rates = [lr_at(step, cfg, 24, 4) for step in range(25)]
    assert rates[3] == rates[4] == pytest.approx(0.8)
    assert rates[14] == pytest.approx(0.4)
    assert rates[24] == pytest.approx(0.0)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[9] == pytest.approx(0.4 * (1 + math.cos(math.pi / 4)))


def test_the_loop_uses_that_learning_rate(tmp_path: Path) -> None:
    job = toy_job(lr_decay="cosine", warmup_steps=3)
    start(job, tmp_path)
    assert [row["lr"] for row in metrics(tmp_path)] == [lr_at(step, job.cfg, 10, 3) for step in range(10)]


def test_lengths_in_epochs_count_images() -> None:
    cfg = TrainConfig(batch=128, epochs=10, warmup_epochs=0.5)
    assert cfg.total_steps(1280) == 100
    assert cfg.warmup(1280) == 5


class EveryKind(nn.Module):
    """One layer of every kind that has parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv, self.table = nn.Linear(4, 4), nn.Conv2d(2, 2, 3), nn.Embedding(4, 4)
        self.layer_norm, self.group_norm, self.rms_norm = nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.RMSNorm(4)
        self.scale = nn.Parameter(torch.ones(4))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def decayed_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters that shrink under zero gradients."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    make_optimizer(model, train_config(weight_decay=0.5, lr=0.1)).step()
    for name, parameter in model.named_parameters():
        shrunk = not torch.equal(parameter, before[name])
        torch.testing.assert_close(parameter.detach(), before[name] * (0.95 if shrunk else 1.0))
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def test_embeddings_norms_and_biases_do_not_decay() -> None:
    assert decayed_parameters(EveryKind()) == {"linear.weight", "conv.weight"}


def test_of_a_generator_only_linear_weights_decay(digits_codes: Path) -> None:
    network = generator_job(digits_codes).players[0].model
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    linears = {f"{name}.weight" for name, m in network.named_modules() if isinstance(m, nn.Linear)}
    assert decayed_parameters(network) == linears


def test_a_learnt_codebook_does_not_decay() -> None:
    """It is an embedding: the code vectors are targets, not a map."""
    quantizer = Quantizer(QuantizerConfig(codes=8, steps=2, codebook="gradient"), ScheduleConfig(), 4, (2, 2))
    assert "books" not in decayed_parameters(quantizer)


def test_the_average_follows_its_formula() -> None:
    model = nn.Linear(2, 1)
    model.register_buffer("count", torch.zeros(()))
    ema, expected = Ema(model, 0.3), model.weight.detach().clone()
    for n in range(6):
        with torch.no_grad():
            model.weight.normal_()
            model.get_buffer("count").add_(1)
        ema.update(model)
        decay = min(0.3, (1 + n) / (10 + n))  # warm-up: it forgets the start
        expected = decay * expected + (1 - decay) * model.weight.detach()
        torch.testing.assert_close(ema.model.get_parameter("weight"), expected)
        assert float(ema.model.get_buffer("count")) == n + 1  # buffers are copied
    assert not any(p.requires_grad for p in ema.model.parameters())


def test_the_loop_averages_after_every_step(tmp_path: Path) -> None:
    job = toy_job(steps=1, ema=0.9)
    first = job.players[0].model.state_dict()["0.weight"].clone()
    run = start(job, tmp_path)
    assert run.ema is not None
    torch.testing.assert_close(
        run.ema.model.get_parameter("0.weight"),
        0.1 * first + 0.9 * job.players[0].model.get_parameter("0.weight").detach(),
    )
    assert start(toy_job(ema=0.0, steps=1), tmp_path / "none").ema is None


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def test_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    start(toy_job(save_every=2, keep=3), tmp_path)
    assert [step for step, _ in checkpoint.states(tmp_path / "checkpoints")] == [6, 8, 10]


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_serves(tmp_path: Path) -> None:
    torch.manual_seed(0)
    start(toy_job(), tmp_path / "whole")
    torch.manual_seed(0)
    start(toy_job(save_every=4), tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "step-000000010.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="step-000000010") as refused:
        start(toy_job(), tmp_path / "run")
    assert refused.value.exit_code == 3
    assert "delete" in refused.value.hint
    newest.unlink()
    start(toy_job(), tmp_path / "run")
    assert_same(newest_state(tmp_path / "run"), newest_state(tmp_path / "whole"))


# ---- resume --------------------------------------------------------------------------------------------------------


def test_a_stopped_and_resumed_run_is_the_uninterrupted_one(make_job: MakeJob, tmp_path: Path) -> None:
    torch.manual_seed(0)
    start(make_job(), tmp_path / "whole")
    torch.manual_seed(0)
    with pytest.raises(Stopped) as stopped:
        start(make_job(), tmp_path / "parts", stop_at=5)
    assert stopped.value.exit_code == 75
    assert "step 5 of 10" in stopped.value.message
    torch.manual_seed(99)  # whatever the new process draws, the checkpoint holds
    run = start(make_job(), tmp_path / "parts")
    assert run.step == 10
    assert_same(newest_state(tmp_path / "parts"), newest_state(tmp_path / "whole"))
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    assert [row["step"] for row in metrics(tmp_path / "parts")] == list(range(1, 11))


def test_a_crash_repeats_the_steps_since_the_last_checkpoint(tmp_path: Path) -> None:
    class Crashing(ToyBatches):
        def batch_at(self, step: int, rows: range) -> Tensor:
            if step == 7:
                raise RuntimeError("the machine went away")
            return super().batch_at(step, rows)

    torch.manual_seed(0)
    start(toy_job(save_every=4), tmp_path / "whole")
    torch.manual_seed(0)
    job = toy_job(save_every=4)
    with pytest.raises(RuntimeError, match="went away"):
        start(Job(job.players, Crashing(), job.cfg), tmp_path / "parts")
    assert [row["step"] for row in metrics(tmp_path / "parts")] == list(range(1, 8))
    assert newest_state(tmp_path / "parts")["step"] == 4
    start(toy_job(save_every=4), tmp_path / "parts")
    assert_same(newest_state(tmp_path / "parts"), newest_state(tmp_path / "whole"))
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")  # steps 5 to 7 appear once


OTHERWISE = {"keep": 5, "log_every": 4, "eval_every": 2, "save_every": 3, "workers": 1, "skip_bad": 2}


@pytest.mark.parametrize("name", sorted(FREE_ON_RESUME))
def test_a_run_resumed_with_another_free_value_is_the_run_started_with_it(
    make_job: MakeJob, name: str, tmp_path: Path
) -> None:
    changed = {name: OTHERWISE[name]}
    torch.manual_seed(0)
    start(make_job(**changed), tmp_path / "whole")
    torch.manual_seed(0)
    with pytest.raises(Stopped):
        start(make_job(), tmp_path / "parts", stop_at=5)
    start(make_job(**changed), tmp_path / "parts")
    assert_same(newest_state(tmp_path / "parts"), newest_state(tmp_path / "whole"))


def test_a_finished_run_takes_no_further_step(tmp_path: Path) -> None:
    start(toy_job(), tmp_path)
    before, logged = newest_state(tmp_path), metrics(tmp_path)
    job = toy_job()
    start(job, tmp_path)
    assert isinstance(job.players[0], Toy)
    assert not job.players[0].batches
    assert_same(newest_state(tmp_path), before)
    assert metrics(tmp_path) == logged


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_change_nothing(make_job: MakeJob, tmp_path: Path, workers: int) -> None:
    for count in (0, workers):
        torch.manual_seed(0)
        start(make_job(steps=4, workers=count), tmp_path / str(count))
    assert_same(newest_state(tmp_path / str(workers)), newest_state(tmp_path / "0"))


def test_worker_processes_give_the_same_batches(tmp_path: Path) -> None:
    seen = []
    for workers in (0, 2):
        job = toy_job(workers=workers)
        start(job, tmp_path / str(workers))
        assert isinstance(job.players[0], Toy)
        seen.append(torch.stack(job.players[0].batches))
    assert torch.equal(*seen)
    assert torch.equal(seen[0][3], ToyBatches().batch_at(3, range(16)))


def test_accumulated_gradients_are_those_of_the_whole_batch(make_job: MakeJob, tmp_path: Path) -> None:
    for name, micro in (("whole", None), ("parts", 16)):
        torch.manual_seed(0)
        start(make_job(steps=3, batch=48, micro_batch=micro), tmp_path / name)
    parts, whole = (leaves(newest_state(tmp_path / name)["players"]) for name in ("parts", "whole"))
    for name, value in parts.items():
        if isinstance(value, Tensor) and "exp_avg" not in name:
            assert distance(value, whole[name]) < 0.01, name
    for row, other in zip(metrics(tmp_path / "parts"), metrics(tmp_path / "whole"), strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-3)


def test_training_learns(tmp_path: Path) -> None:
    start(toy_job(steps=60, lr=3e-2), tmp_path)
    losses = [row["loss"] for row in metrics(tmp_path)]
    assert losses[-1] < 0.2 * losses[0]


# ---- what stops a run ----------------------------------------------------------------------------------------------


class Breaking(Toy):
    """Its loss or its gradient stops being finite at the fourth step."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self.part = part
        self.before: dict[str, Tensor] = {}

    def loss(self, batch: Tensor, step: TrainStep) -> tuple[Tensor, dict[str, Tensor]]:
        loss, logs = super().loss(batch, step)
        if step.step == 3:
            self.before = {name: value.clone() for name, value in self.model.state_dict().items()}
            weight = self.model.get_parameter("0.weight")
            loss = loss * math.nan if self.part == "loss" else loss + (weight - weight.detach()).sum().abs().sqrt()
        return loss, logs


@pytest.mark.parametrize("part", ["loss", "gradient"])
def test_a_non_finite_step_stops_the_run_before_anything_changes(tmp_path: Path, part: str) -> None:
    player = Breaking(part)
    with pytest.raises(RunError, match="not finite at step 3") as failed:
        start(Job([player], ToyBatches(), train_config(save_every=2)), tmp_path)
    assert failed.value.exit_code == 1
    assert_same(dict(player.model.state_dict()), player.before)
    assert float(player.before["seen"]) == 3  # nothing followed the step either
    assert newest_state(tmp_path)["step"] == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_becomes_a_request_and_the_handlers_come_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_on_signal() as request:
        assert not request.requested
        request.leave("no signal has come")
        os.kill(os.getpid(), number)
        assert request.name == number.name
        with pytest.raises(Stopped, match=f"{number.name}; all is saved") as stopped:
            request.leave("all is saved")
    assert stopped.value.exit_code == 75
    assert "same command" in stopped.value.hint
    assert signal.getsignal(number) == before


# ---- the real command ---------------------------------------------------------------------------------------------


def leader(args: list[str]) -> None:
    """Be `rdpm ARGS` in a process group of its own."""
    os.setpgid(0, 0)
    command_line(args, {})


def test_a_signal_to_a_whole_group_leaves_the_data_workers_at_work(tmp_path: Path) -> None:
    """torchrun, `--gpus` and Slurm signal every process of a group: the step under way still needs its batch."""
    process = spawn(leader, tokenizer_command(tmp_path, "train.batch=16", "train.steps=2000", "train.workers=2"))
    wait_for(lambda: read_metrics(tmp_path), process)
    assert process.pid is not None
    os.killpg(process.pid, signal.SIGTERM)
    assert exit_code(process) == 75
    assert newest_state(tmp_path)["step"] == metrics(tmp_path)[-1]["step"]

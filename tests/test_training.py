"""The one training loop: what a step is, what a resumed run repeats, what several processes share."""

import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from helpers import CPU, assert_same, digits, distance, leaves, metrics, newest_state, tiny_config, tiny_players
from torch import Tensor, nn

from rdpm_cli import noise
from rdpm_cli.codes.store import CodeStore
from rdpm_cli.distributed import TrainStep
from rdpm_cli.errors import Stopped
from rdpm_cli.generator import registry
from rdpm_cli.generator.config import NetworkConfig, RDPMConfig, RDPMObjective
from rdpm_cli.generator.contract import GeneratorTask
from rdpm_cli.runs import StopRequest
from rdpm_cli.tokenizer import model as tokenizer_model
from rdpm_cli.tokenizer.config import QuantizerConfig, ScheduleConfig
from rdpm_cli.tokenizer.quantizer import Quantizer
from rdpm_cli.training.config import FREE_ON_RESUME, TrainConfig
from rdpm_cli.training.ema import Ema
from rdpm_cli.training.loop import Batches, Player, Run, fit, lr_at, make_optimizer


@pytest.fixture(autouse=True)
def fixed_seed() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


class Toy(Player):
    """Fit the sum of three numbers, with noise from the step and a buffer that counts."""

    name = "toy"

    def __init__(self) -> None:
        self.model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
        self.model.register_buffer("seen", torch.zeros(()))
        self.batches: list[Tensor] = []

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


class Job(NamedTuple):
    players: list[Player]
    batches: Batches
    cfg: TrainConfig


MakeJob = Callable[..., Job]  # the options of `train` -> players with their batches


def toy_job(**train: Any) -> Job:
    return Job([Toy()], ToyBatches(), train_config(**train))


def tokenizer_job(**train: Any) -> Job:
    fields = train_config(lr=1e-3, **train).model_dump()
    cfg = tiny_config(train=fields, quantizer={"steps": 3}, loss={"adversarial": "none"})
    return Job(list(tiny_players(cfg)), digits(cfg), cfg.train)


def generator_job(root: Path, **train: Any) -> Job:
    store = CodeStore(root)
    tokenizer, _ = tokenizer_model.load(root / "tokenizer.pt")
    cfg = RDPMConfig(
        network=NetworkConfig(depth=1, width=32, heads=2, class_latents=True, head="geometric"),
        objective=RDPMObjective(noise="fresh", steps_per_image=2, t_weights="alpha", perturb=0.3),
        train=train_config(**train),
    )
    generator = registry.build(cfg, tokenizer, 3)
    generator.network.train()
    batches = registry.FAMILIES["rdpm"].batches(store, cfg, tokenizer.quantizer, 0)
    return Job([GeneratorTask(generator)], batches, cfg.train)


@pytest.fixture(params=["toy", "tokenizer", "generator"])
def make_job(request: pytest.FixtureRequest) -> MakeJob:
    if request.param == "generator":
        return functools.partial(generator_job, request.getfixturevalue("digits_codes"))
    return toy_job if request.param == "toy" else tokenizer_job


def start(job: Job, folder: Path, *, stop_at: int = 0) -> Run:
    """Fit the job in a folder, asking it to stop after `stop_at` steps."""
    run = Run(folder, 0, CPU, job.cfg.total_steps(1000), job.cfg.warmup(1000), StopRequest())

    def stopper(run: Run, logs: dict[str, float] | None) -> None:
        if run.step == stop_at:
            run.stop.name = "SIGTERM"

    folder.mkdir(exist_ok=True)
    fit(job.players, job.batches, job.cfg, run, [stopper])
    return run


def start_fresh(make: MakeJob, folder: Path, *, stop_at: int = 0, **train: Any) -> Run:
    """The same with weights from one seed."""
    torch.manual_seed(0)
    return start(make(**train), folder, stop_at=stop_at)


# ---- learning rate, decay, average ---------------------------------------------------------------------------------


def test_the_learning_rate_warms_up_linearly_and_stays_or_falls_to_zero(tmp_path: Path) -> None:
    cfg = train_config(lr=0.8)
    assert [lr_at(step, cfg, 10, 4) for step in range(10)] == pytest.approx([0.2, 0.4, 0.6, *[0.8] * 7])
    cfg = train_config(lr=0.8, lr_decay="cosine")
    rates = [lr_at(step, cfg, 24, 4) for step in range(25)]
    assert rates[3] == rates[4]
    assert rates[4:] == pytest.approx([0.4 * (1 + math.cos(math.pi * n / 20)) for n in range(21)])
    job = toy_job(lr_decay="cosine", warmup_steps=3)
    start(job, tmp_path)
    assert [row["lr"] for row in metrics(tmp_path)] == [lr_at(step, job.cfg, 10, 3) for step in range(10)]
    cfg = TrainConfig(batch=128, epochs=10, warmup_epochs=0.5)
    assert (cfg.total_steps(1280), cfg.warmup(1280)) == (100, 5)


class EveryKind(nn.Module):
    """One layer of every kind that has parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv, self.table = nn.Linear(4, 4), nn.Conv2d(2, 2, 3), nn.Embedding(4, 4)
        self.layer_norm, self.group_norm, self.rms_norm = nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.RMSNorm(4)
        self.scale = nn.Parameter(torch.ones(4))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        # The code vectors are targets, not a map.
        self.codes = Quantizer(QuantizerConfig(codes=8, steps=2, codebook="gradient"), ScheduleConfig(), 4, (2, 2))


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


def test_embeddings_norms_and_biases_do_not_decay(digits_codes: Path) -> None:
    assert decayed_parameters(EveryKind()) == {"linear.weight", "conv.weight", "codes.phi.weight"}
    network = generator_job(digits_codes).players[0].model
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    linears = {f"{name}.weight" for name, m in network.named_modules() if isinstance(m, nn.Linear)}
    assert decayed_parameters(network) == linears


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


# ---- resume --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ema", [0.9, "power"])
def test_a_stopped_and_resumed_run_is_the_uninterrupted_one(
    make_job: MakeJob, ema: float | str, tmp_path: Path
) -> None:
    start_fresh(make_job, tmp_path / "whole", ema=ema)
    with pytest.raises(Stopped, match="step 5 of 10") as stopped:
        start_fresh(make_job, tmp_path / "parts", stop_at=5, ema=ema)
    assert stopped.value.exit_code == 75
    snapshots = [f"ema/step-{step:09d}.pt" for step in range(1, 11)] if ema == "power" else []
    for name in snapshots[5:]:  # of a process that was killed after its last checkpoint
        (tmp_path / "parts" / name).write_bytes(b"stale")
    torch.manual_seed(99)  # whatever the new process draws, the checkpoint holds
    assert start(make_job(ema=ema), tmp_path / "parts").step == 10
    for folder in ("whole", "parts"):
        assert [str(p.relative_to(tmp_path / folder)) for p in sorted(tmp_path.glob(f"{folder}/ema/*.pt"))] == snapshots
    for name in snapshots:
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert_same(newest_state(tmp_path / "parts"), newest_state(tmp_path / "whole"))
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    assert [row["step"] for row in metrics(tmp_path / "parts")] == list(range(1, 11))


OTHERWISE = {"keep": 5, "log_every": 4, "eval_every": 2, "save_every": 3, "workers": 1, "skip_bad": 2}


@pytest.mark.parametrize("name", sorted(FREE_ON_RESUME))
def test_a_run_resumed_with_another_free_value_is_the_run_started_with_it(
    make_job: MakeJob, name: str, tmp_path: Path
) -> None:
    changed = {name: OTHERWISE[name]}
    start_fresh(make_job, tmp_path / "whole", **changed)
    with pytest.raises(Stopped):
        start_fresh(make_job, tmp_path / "parts", stop_at=5)
    start(make_job(**changed), tmp_path / "parts")
    assert_same(newest_state(tmp_path / "parts"), newest_state(tmp_path / "whole"))


def test_batches_come_in_the_order_of_steps(tmp_path: Path) -> None:
    player = Toy()
    start(Job([player], ToyBatches(), train_config(workers=2)), tmp_path)
    assert len(player.batches) == 10
    assert all(torch.equal(batch, ToyBatches().batch_at(step, range(16))) for step, batch in enumerate(player.batches))


def test_accumulated_gradients_are_those_of_the_whole_batch(make_job: MakeJob, tmp_path: Path) -> None:
    for name, micro in (("whole", None), ("parts", 16)):
        start_fresh(make_job, tmp_path / name, steps=3, batch=48, micro_batch=micro)
    parts, whole = (leaves(newest_state(tmp_path / name)["players"]) for name in ("parts", "whole"))
    for name, value in parts.items():
        if isinstance(value, Tensor) and "exp_avg" not in name:
            assert distance(value, whole[name]) < 0.01, name
    for row, other in zip(metrics(tmp_path / "parts"), metrics(tmp_path / "whole"), strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-3)

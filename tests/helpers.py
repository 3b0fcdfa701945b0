"""Helpers that several test files share: comparisons of two runs, and a tiny tokenizer to train."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rdpm_cli import checkpoint
from rdpm_cli.data.open import open_source
from rdpm_cli.runs import StopRequest
from rdpm_cli.tokenizer.config import TokenizerConfig
from rdpm_cli.tokenizer.model import Tokenizer
from rdpm_cli.tokenizer.training import ItemBatches, Players, players_of
from rdpm_cli.training.log import read_metrics
from rdpm_cli.training.loop import CHECKPOINTS, Batches, Run, fit

CPU = torch.device("cpu")
MACHINE = {"images_per_second", "flops_per_second", "utilisation", "memory_gib"}  # they depend on clock and machine


def newest_state(folder: Path) -> dict[str, Any]:
    state = checkpoint.load_newest_state(folder / CHECKPOINTS, CPU)
    assert state is not None
    return state


def leaves(value: Any, name: str = "") -> dict[str, Any]:
    """Every leaf of nested dicts and lists, by its path."""
    if isinstance(value, list | tuple):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {name: value}
    return {k: v for key, inner in value.items() for k, v in leaves(inner, f"{name}/{key}").items()}


def assert_same(value: Any, expected: Any) -> None:
    """Bitwise equal, leaf by leaf."""
    a, b = leaves(value), leaves(expected)
    assert a.keys() == b.keys()
    for name, leaf in a.items():
        assert torch.equal(leaf, b[name]) if isinstance(leaf, Tensor) else leaf == b[name], name


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The log without the values of the machine."""
    return [{k: v for k, v in row.items() if k not in MACHINE} for row in read_metrics(folder)]


def distance(value: Tensor, expected: Tensor) -> float:
    """Relative distance of two tensors; sums in another order may flip a near-tie of a code now and then."""
    return float((value.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-6))


TINY: dict[str, Any] = {  # a tokenizer with a critic, so small that a step takes milliseconds
    "autoencoder": {
        "resolution": 16, "width": 8, "multipliers": [1, 1, 2], "res_blocks": 1, "attention": False, "groups": 4,
        "channels": 4,
    },
    "schedule": {"kind": "sin"},
    "quantizer": {"codes": 32, "steps": 2, "decay": 0.5},
    "loss": {"adversarial": "hinge"},
    "discriminator": {"width": 8, "layers": 2},
    "train": {"batch": 16, "steps": 4, "lr": 1e-3, "ema": 0.9, "log_every": 1},
}  # fmt: skip


def tiny_config(**sections: dict[str, Any]) -> TokenizerConfig:
    """TINY with some fields of its sections changed."""
    return TokenizerConfig.model_validate({**TINY, **{name: TINY[name] | fields for name, fields in sections.items()}})


def tiny_players(cfg: TokenizerConfig, seed: int = 0) -> Players:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return players_of(Tokenizer(cfg, cfg.loss.weight).train(), cfg)


def digits(cfg: TokenizerConfig) -> ItemBatches:
    return ItemBatches(open_source("digits"), cfg, 0)


def train(players: Players, cfg: TokenizerConfig, folder: Path, batches: Batches | None = None) -> Run:
    """Fit the players on the digits in a folder."""
    folder.mkdir(exist_ok=True)
    run = Run(folder, 0, CPU, cfg.train.total_steps(1000), cfg.train.warmup(1000), StopRequest())
    fit(players, batches or digits(cfg), cfg.train, run)
    return run

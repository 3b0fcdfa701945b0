"""Tiny generators that several test files share.

Legend: T steps, C code width, S positions of the grid, K codes."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rdpm_cli import checkpoint
from rdpm_cli.generator import registry
from rdpm_cli.generator.config import NetworkConfig, RDPMConfig, RDPMSampling
from rdpm_cli.generator.contract import Generator, Known, SampleOptions
from rdpm_cli.generator.rdpm import RDPM
from rdpm_cli.tokenizer import model
from rdpm_cli.tokenizer.config import QuantizerConfig, ScheduleConfig
from rdpm_cli.tokenizer.quantizer import Quantizer
from rdpm_cli.training.config import TrainConfig

GRID, CHANNELS, CODES, STEPS, CLASSES = 4, 4, 64, 4, 3  # of the shared tiny tokenizer and its images


@pytest.fixture(autouse=True)
def fixed_seed() -> Iterator[None]:
    """For every test of a file that imports it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def sampling_options(seed: int = 0, **sampling: Any) -> SampleOptions:
    """RDPM's options by field."""
    return SampleOptions(RDPMSampling(**sampling), seed)


def network_config(**options: Any) -> NetworkConfig:
    return NetworkConfig(**{"depth": 2, "width": 32, "heads": 2, **options})


def wake(network: nn.Module, std: float = 0.2) -> None:
    """Give zero-initialised weights random values, so that every part of an untrained network has an effect."""
    random = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        if not parameter.detach().any():
            with torch.no_grad():
                parameter.copy_(std * torch.randn(parameter.shape, generator=random))


def make_generator(quantizer: Quantizer | None = None, *, awake: bool = True, std: float = 0.2, **network: Any) -> RDPM:
    """A tiny generator over a quantiser; default: a fresh one with noise."""
    generator = RDPM(network_config(**network), quantizer or make_quantizer(), CLASSES)
    if awake:
        wake(generator.network, std)
    generator.network.eval().requires_grad_(False)
    return generator


def make_quantizer(kind: str = "sin", grid: tuple[int, ...] = (GRID, GRID), **options: Any) -> Quantizer:
    cfg = QuantizerConfig(**{"codes": CODES, "steps": STEPS, **options})
    return Quantizer(cfg, ScheduleConfig.model_validate({"kind": kind}), CHANNELS, grid).eval().requires_grad_(False)


def sample(
    generator: Generator, labels: Any, indices: Any, options: SampleOptions, known: Known | None = None
) -> Tensor:
    """Codes of labels and noise indices."""
    return generator.sample({"labels": torch.as_tensor(labels)}, torch.as_tensor(indices), options, known)


class Calls:
    """The inputs of every forward pass of a network."""

    def __init__(self, network: nn.Module) -> None:
        self.inputs: list[tuple[Any, ...]] = []
        network.register_forward_pre_hook(lambda _, args: self.inputs.append(args))

    @property
    def rows(self) -> list[int]:
        return [len(args[0]) for args in self.inputs]


def save_generator(
    path: Path, tokenizer: Path, *, names: Iterable[str] = "abc", std: float = 0.5, label_drop: float | None = None,
    **sampling: Any,
) -> Path:  # fmt: skip
    """The file of an untrained generator over a tokenizer's file. label_drop: that its provenance records."""
    loaded, content = model.load(tokenizer)
    network = network_config(head="geometric", class_latents=True)
    options = RDPMSampling(**{"micro_batch": 2, **sampling})
    cfg = RDPMConfig(network=network, train=TrainConfig(steps=1), sampling=options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        generator = registry.build(cfg, loaded, len(list(names)))
    wake(generator.network, std)
    recipe = {"generator": {"objective": {"label_drop": label_drop}}}
    provenance = {} if label_drop is None else {"recipe": recipe}
    checkpoint.save(path, registry.pack(generator, cfg, content, list(names), provenance=provenance))
    return path

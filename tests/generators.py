"""Tiny generators that several test files share.

Legend: T steps, C code width, H W grid, K codes.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rdpm_cli import modelfile
from rdpm_cli.config import (
    NetworkConfig,
    QuantizerConfig,
    RDPMArchitecture,
    RDPMConfig,
    RDPMSampling,
    ScheduleConfig,
    TrainConfig,
)
from rdpm_cli.generator import model
from rdpm_cli.generator.rdpm import RDPM
from rdpm_cli.tokenizer import model as tokenizer_file
from rdpm_cli.tokenizer.quantizer import Quantizer

GRID, CHANNELS, CODES, STEPS, CLASSES = 4, 4, 64, 4, 3  # of the shared tiny tokenizer and its images


def network_config(**options: Any) -> NetworkConfig:
    return NetworkConfig(**{"depth": 2, "width": 32, "heads": 2, **options})


def wake(network: nn.Module, std: float = 0.2) -> None:
    """Give zero-initialised weights values, so that an untrained network has something to say."""
    random = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        if not parameter.detach().any():
            with torch.no_grad():
                parameter.copy_(std * torch.randn(parameter.shape, generator=random))


def make_generator(quantizer: Quantizer | None = None, *, awake: bool = True, std: float = 0.2, **network: Any) -> RDPM:
    """A tiny generator over the given (or a fresh, noisy) quantiser."""
    made = RDPM(
        RDPMArchitecture(network=network_config(**network)), quantizer or make_quantizer(), (GRID, GRID), CLASSES
    )
    if awake:
        wake(made.network, std)
    made.network.eval().requires_grad_(False)
    return made


def make_quantizer(kind: str = "sin", **options: Any) -> Quantizer:
    cfg = QuantizerConfig(**{"codes": CODES, "steps": STEPS, **options})
    return Quantizer(cfg, ScheduleConfig.model_validate({"kind": kind}), CHANNELS).eval().requires_grad_(False)


class Calls:
    """What a network was asked: the inputs of every forward pass."""

    def __init__(self, network: nn.Module) -> None:
        self.inputs: list[tuple[Tensor, ...]] = []
        network.register_forward_pre_hook(lambda _, args: self.inputs.append(args))

    @property
    def rows(self) -> list[int]:
        return [len(args[0]) for args in self.inputs]


def save_generator(path: Path, tokenizer: Path, *, names: str = "abc", std: float = 0.5, **sampling: Any) -> Path:
    """A generator's file over a tokenizer's: untrained, but with something to say."""
    loaded, content = tokenizer_file.load(tokenizer)
    network = network_config(head="geometric", class_latents=True)
    chosen = RDPMSampling(**{"micro_batch": 2, **sampling})
    cfg = RDPMConfig(network=network, train=TrainConfig(steps=1), sampling=chosen)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        generator = model.build(cfg, loaded, len(names))
    wake(generator.network, std)
    modelfile.save(path, model.pack(generator, cfg, content, list(names), provenance={}))
    return path

"""Training a generator on cached codes, as the training loop sees it."""

from typing import Any

import torch
from torch import Tensor, nn

from rdpm_cli.generator.contract import Generator, GeneratorBatches, Tally
from rdpm_cli.step import TrainStep


class GeneratorTask:
    """One player: the family's network."""

    name = "generator"
    start = 0

    def __init__(self, generator: Generator) -> None:
        self.generator = generator

    @property
    def model(self) -> nn.Module:
        """What is trained."""
        return self.generator.network

    def networks(self) -> list[nn.Module]:
        """The whole, but for its heads, which are a layer each."""
        return [self.generator.network]

    def loss(self, batch: Any, step: TrainStep) -> tuple[Tensor, dict[str, Tensor]]:
        """The family's loss."""
        return self.generator.loss(batch, step)

    def after_step(self, step: TrainStep) -> dict[str, Tensor]:
        """Nothing follows a step."""
        return {}


def held_out(generator: Generator, batches: GeneratorBatches, device: torch.device) -> dict[str, list[float | None]]:
    """The family's measurements on held-out codes under held-out draws, next to the model-free baseline."""
    total: dict[str, Tally] = {}
    for batch in batches.held_out_batches():
        for name, part in generator.held_out(batch.to(device)).items():
            total[name] = total[name] + part if name in total else part
    return {name: tally.means() for name, tally in total.items()}

"""The whole contract between a generator family and everything else."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from rdpm_cli.config import SamplingConfig
from rdpm_cli.step import TrainStep


@dataclass
class CodeBatch:
    """A training batch of one process. B images, S values of t an image."""

    codes_BTHW: Tensor  # int64
    labels_B: Tensor  # int64; the null class where the label was dropped
    t_BS: Tensor  # int64, 1..T
    eps_BSCHW: Tensor | None  # the noise of those steps; None: drawn fresh on the device
    z_BCHW: Tensor | None  # stored latents, fp32; None: z'_T of the codes stands for them
    spread_B: Tensor | None  # a·U of the perturbation of z'_{t-1}, one an image

    def to(self, device: torch.device) -> "CodeBatch":
        """The same batch on a device."""
        moved: dict[str, Any] = {k: None if v is None else v.to(device) for k, v in vars(self).items()}
        return CodeBatch(**moved)


@dataclass(frozen=True)
class SampleOptions:
    """What, with checkpoint, label and index, fixes a sample."""

    sampling: SamplingConfig  # the family's own
    seed: int = 0


@dataclass
class Known:
    """Codes that are given: in-painting, and ResGen's caps."""

    codes_BTHW: Tensor  # int64
    keep_BTHW: Tensor  # bool, True where the code is kept


class Generator(Protocol):
    """One family. `network` holds the trainable parameters of the generator alone; its `trunk` is the Transformer."""

    network: nn.Module
    classes: int

    def loss(self, batch: CodeBatch, step: TrainStep) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss and logs."""

    def check(self, options: SampleOptions) -> None:
        """Raise UsageError for options that this family or its tokenizer cannot use."""

    def sample(self, labels_B: Tensor, indices_B: Tensor, options: SampleOptions, known: Known | None = None) -> Tensor:
        """codes (B, T, h, w) int64. Row i depends on (options, labels_B[i], indices_B[i]) alone."""

    def accuracy(self, codes_BTHW: Tensor, labels_B: Tensor, eps_BTCHW: Tensor) -> dict[str, Tensor]:
        """Held-out measurements a step t, each (T,): what the family can be judged by."""


@runtime_checkable
class Trajectories(Protocol):
    """A family that tells how its samples come about."""

    def trajectory(
        self, labels_B: Tensor, indices_B: Tensor, options: SampleOptions, known: Known | None = None
    ) -> dict[str, Tensor]:
        """Numbers of the samples that `sample` draws, by name, (B, T) each; NaN where a step has none."""

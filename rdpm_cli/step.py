"""One training step: its place in the global batch, its randomness, and sums over processes. A plain helper.

All randomness of step s is drawn for the global batch in blocks of 16 rows, each from (seed, s, block); a process
takes whole blocks. So the data of a step depends neither on the number of processes nor on what ran before.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rdpm_cli import noise


def world() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) without torch.distributed."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(value: Any) -> list[Any] | None:
    """The values of all processes by rank, in the first one; None in the others."""
    rank, size = world()
    if size == 1:
        return [value]
    found: list[Any] | None = [None] * size if rank == 0 else None
    dist.gather_object(value, found)
    return found


class TrainStep:
    """The step a task sees. rows: this process's rows of the global batch of `batch` images."""

    def __init__(self, seed: int, step: int, rows: range, batch: int, device: torch.device) -> None:
        self.seed, self.step, self.rows, self.batch, self.device = seed, step, rows, batch, device
        self._blocks: list[tuple[int, torch.Generator]] = []
        self._shared: torch.Generator | None = None

    def _generators(self) -> list[tuple[int, torch.Generator]]:
        """(rows of the block, its generator on the device), in row order."""
        if not self._blocks:
            for start in range(self.rows.start, self.rows.stop, noise.BLOCK):
                generator = torch.Generator(self.device)
                generator.manual_seed(noise.seed_of("device", self.seed, self.step, start // noise.BLOCK))
                self._blocks.append((min(noise.BLOCK, self.rows.stop - start), generator))
        return self._blocks

    def normal(self, *shape: int) -> Tensor:
        """Standard normal values on the device, (rows, *shape), fp32."""
        parts = [torch.randn(n, *shape, generator=g, device=self.device) for n, g in self._generators()]
        return torch.cat(parts)

    def pick(self, count: int, below: int) -> Tensor:
        """`count` random indices below `below`, int64 on the CPU, the same in every process."""
        if self._shared is None:
            self._shared = torch.Generator()
            self._shared.manual_seed(noise.seed_of("shared", self.seed, self.step, 0))
        return torch.randint(below, (count,), generator=self._shared)

    def sum_(self, value: Tensor) -> Tensor:
        """Sum over processes, in place."""
        if dist.is_initialized():
            dist.all_reduce(value)
        return value

"""Gradients that are the mean over processes: PyTorch's DistributedDataParallel around a player's loss."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from rdpm_cli.step import world

Loss = Callable[..., tuple[Tensor, dict[str, Tensor]]]


class _Forward(nn.Module):
    """A loss as a forward pass over the trained parameters of a model. It has no buffers: DDP would send them along."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.trained = nn.ParameterList([p for p in model.parameters() if p.requires_grad])
        self.loss = loss

    def forward(self, *args: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return self.loss(*args)


class AveragedLoss:
    """A loss whose backward pass leaves the mean over processes in the gradients of `model`.

    DDP averages a bucket as soon as it is complete, while the backward pass goes on. It wraps the loss, not the
    network, so a loss may run the network several times, or parts of it. With one process it is the loss itself.
    """

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        """Gives every process the first one's parameters and buffers. Every trained parameter must get a gradient."""
        self.call: Callable[..., Any] = loss
        self.ddp: DistributedDataParallel | None = None
        self.own_norm: Tensor | None = None  # of this process's gradients alone; None with one process
        if world()[1] > 1:
            # a 1×1 convolution's gradient may come with other strides of its sides of 1: copied, and nothing to mend
            warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
            for value in model.state_dict().values():
                dist.broadcast(value, 0)
            self.ddp = DistributedDataParallel(_Forward(model, loss), init_sync=False, gradient_as_bucket_view=True)
            self.ddp.register_comm_hook(None, self._average)
            self.call = self.ddp

    def __call__(self, *args: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its logs."""
        found: tuple[Tensor, dict[str, Tensor]] = self.call(*args)
        return found

    @contextlib.contextmanager
    def part(self, last: bool) -> Iterator[None]:
        """Around forward and backward pass of one micro-batch of a step: processes talk at the last alone."""
        self.own_norm = None
        with self.ddp.no_sync() if self.ddp and not last else contextlib.nullcontext():
            yield

    def _average(self, state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
        """DDP's own averaging of a bucket, after a look at what is this process's alone."""
        norm = bucket.buffer().norm()
        self.own_norm = norm if self.own_norm is None else torch.hypot(self.own_norm, norm)
        assert dist.group.WORLD is not None
        return allreduce_hook(dist.group.WORLD, bucket)

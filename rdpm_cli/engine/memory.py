"""Memory of a training step, measured without a GPU: the step runs on tensors that have shapes and no content."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rdpm_cli.config import TrainConfig
from rdpm_cli.step import TrainStep
from rdpm_cli.training.loop import Player

CPU = torch.device("cpu")
ADAM = 2  # moments a parameter

Make = Callable[[int], tuple[list[Player], Any]]  # rows -> the players, and a micro-batch of theirs


def shapes_alone() -> FakeTensorMode:
    """Inside, tensors are made without content: networks of any size cost nothing."""
    return FakeTensorMode(allow_non_fake_inputs=True)


class Live(TorchDispatchMode):
    """Bytes of the tensors that operations make, while they live. peak: the most at once."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for made in tree_leaves(out):
            if isinstance(made, Tensor):
                self._meet(made.untyped_storage())
        return out

    def _meet(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:  # else a view
            self._known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._part, key, size)

    def _part(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def activations(make: Make, cfg: TrainConfig, rows: int, step: int = 0) -> int:
    """Peak bytes, beside weights and gradients, of a micro-batch of `rows` forward and backward through every player.

    What autograd keeps, what operations need in passing, and the bf16 copies of weights that autocast keeps. Types
    are CUDA's under autocast: products in bf16, norms and losses in fp32; attention keeps no N × N matrix. Eager;
    kernels' own workspaces are not seen.
    """
    with shapes_alone():
        players, batch = make(rows)
        for player in players:
            _as_on_cuda(player.model)
            for parameter in player.model.parameters():
                parameter.grad = torch.empty_like(parameter)
        place = TrainStep(0, step, range(rows), rows, CPU)
        with Live() as live:
            for player in players:
                with torch.autocast("cpu", torch.bfloat16, enabled=cfg.precision == "bf16"):
                    loss, _ = player.loss(batch, place)
                loss.backward()
        return live.peak


def _as_on_cuda(model: nn.Module) -> None:
    """GroupNorm in fp32 inside autocast, as CUDA's has it; the CPU's follows its input."""
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of so many tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


def fixed(players: Iterable[Player], cfg: TrainConfig) -> dict[str, int]:
    """Bytes that no batch changes: weights and buffers, gradients, Adam's moments, the average of the first player."""
    models = [player.model for player in players]
    learnt = tensor_bytes(p for model in models for p in model.parameters() if p.requires_grad)
    held = [tensor_bytes([*model.parameters(), *model.buffers()]) for model in models]
    return {"weights": sum(held), "gradients": learnt, "adam": ADAM * learnt, "ema": held[0] if cfg.ema else 0}

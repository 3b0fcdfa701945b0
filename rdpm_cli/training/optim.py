"""The optimiser, its learning rate, and the moving average of the weights."""

import copy
import math

import torch
from torch import nn

from rdpm_cli.training.config import TrainConfig


def lr_at(step: int, cfg: TrainConfig, steps: int, warmup: int) -> float:
    """Learning rate of a step: linear warm-up, then constant, or a cosine that ends at 0 after `steps`."""
    if step < warmup:
        return cfg.lr * (step + 1) / warmup
    if cfg.lr_decay == "constant":
        return cfg.lr
    return 0.5 * cfg.lr * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def make_optimizer(model: nn.Module, cfg: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Adam if weight_decay is 0), fused; no decay on embeddings, norms and biases."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    embeddings |= {
        id(p) for name, p in model.named_parameters() if name.endswith("books")
    }  # gradient-trained codebooks
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim >= 2 and id(p) not in embeddings]
    plain = [p for p in trained if p.ndim < 2 or id(p) in embeddings]
    groups = [{"params": decayed, "weight_decay": cfg.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=cfg.lr, betas=cfg.betas, fused=True)


class Ema:
    """Exponential moving average of a model's parameters, with its buffers as they are."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the parameters towards the model's; copy its buffers."""
        # Early decays are smaller, so that the average forgets the random start.
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        averages = [p.detach() for p in self.model.parameters()]
        torch._foreach_lerp_(averages, [p.detach() for p in model.parameters()], 1 - decay)
        for average, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            average.copy_(buffer)

"""Conditions: columns of the store -> labels -> what the transformer takes. A class is the only kind today.

Legend: B rows, S positions, M tokens, D width. The null class, of unconditional rows, is number `classes`.
"""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rdpm_cli.codes.store import CodeStore
from rdpm_cli.generator.contract import Condition
from rdpm_cli.generator.transformer import Transformer, trunk_of


def store_columns(
    store: CodeStore, rows: NDArray[np.int64], uniform_B: NDArray[np.float32] | None = None, drop: float = 0.0
) -> dict[str, Tensor]:
    """The condition columns of rows of a store, (B,) int64 each; the null class where uniform_B < drop."""
    labels = store.columns["labels"][rows].astype(np.int64)
    if uniform_B is not None:
        labels = np.where(uniform_B < drop, len(store.manifest.class_names), labels)
    return {"labels": torch.from_numpy(labels)}


def class_condition(trunk: Transformer, labels_B: Tensor) -> Condition:
    """The condition of labels 0..classes. The tables are the trunk's, where a seed's initialisation expects them."""
    B, tokens, latents = len(labels_B), None, None
    if trunk.class_tokens is not None:
        tokens = trunk.class_tokens(labels_B).view(B, -1, trunk.cfg.hidden)
    if trunk.class_latents is not None and trunk.class_latents_in is not None:
        latents = trunk.class_latents_in(trunk.class_latents(labels_B).view(B, trunk.length, -1))
    return Condition(trunk.class_embedding(labels_B), tokens, latents_BSD=latents)


class ClassConditional:
    """The part of a family that is conditional on classes."""

    network: nn.Module
    classes: int

    def condition(self, columns: Mapping[str, Tensor]) -> Condition:
        """The condition of the classes in the column `labels`, (B,)."""
        return class_condition(trunk_of(self.network), columns["labels"])

    def null_condition(self, count: int) -> Condition:
        """The condition of the null class, for guidance."""
        trunk = trunk_of(self.network)
        device = trunk.class_embedding.weight.device
        return class_condition(trunk, torch.full((count,), self.classes, device=device))

"""From a store's condition columns to a Condition. Today's one kind is the class label.

The tables are the trunk's own, so that their initialisation keeps its place in the order of random draws.
"""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rdpm_cli.generator.contract import Condition
from rdpm_cli.generator.transformer import Transformer


def class_condition(trunk: Transformer, columns: Mapping[str, Tensor]) -> Condition:
    """Class labels (B,) int64 in 0..classes, where `classes` is the null class, as a Condition of B rows."""
    labels_B = columns["labels"]
    B, latents_BSD, tokens_BMD = len(labels_B), None, None
    if trunk.class_latents is not None and trunk.class_latents_in is not None:
        latents_BSD = trunk.class_latents_in(trunk.class_latents(labels_B).view(B, trunk.length, -1))
    if trunk.class_tokens is not None:
        tokens_BMD = trunk.class_tokens(labels_B).view(B, -1, trunk.cfg.hidden)
    return Condition(trunk.class_embedding(labels_B), tokens_BMD, None, latents_BSD)


def null_condition(trunk: Transformer, classes: int, count: int) -> Condition:
    """The condition of `count` rows without a class, for guidance."""
    device = trunk.class_embedding.weight.device
    return class_condition(trunk, {"labels": torch.full((count,), classes, device=device)})


def drop_labels(
    labels_B: NDArray[np.int64], uniform_B: NDArray[np.float32], probability: float, classes: int
) -> NDArray[np.int64]:
    """The labels, with the null class where the row's uniform number is below the probability."""
    return np.where(uniform_B < probability, classes, labels_B)

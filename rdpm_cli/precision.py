"""Full precision inside autocast. A plain helper."""

import contextlib

import torch
from torch import Tensor


def full(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """No autocast on the device of x; tensors without content (meta) know none."""
    return contextlib.nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False)

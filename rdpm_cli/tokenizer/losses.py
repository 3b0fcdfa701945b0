"""The tokenizer's loss (arXiv 2412.18390 Eq. 3-5): L = L_recon + 0.25 L_quant + L_lpips + 0.75 w L_gan.

The last two terms are not there yet; they enter `TokenizerLoss` as further named terms.
"""

import torch.nn.functional as F
from torch import Tensor

from rdpm_cli.config import TokenizerLossConfig


def reconstruction(x: Tensor, recon: Tensor) -> Tensor:
    """L_recon: mean squared error on [-1, 1]."""
    return F.mse_loss(recon.float(), x.float())


class TokenizerLoss:
    """Named terms and their factors."""

    def __init__(self, cfg: TokenizerLossConfig) -> None:
        self.factors = {"recon": 1.0, "quant": cfg.quant}

    def __call__(self, x: Tensor, recon: Tensor, quant: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """-> total and the unweighted terms by name (scalars, detached)."""
        terms = {"recon": reconstruction(x, recon), "quant": quant}
        total = x.new_zeros(())
        for name, value in terms.items():
            total = total + self.factors[name] * value
        return total, {name: value.detach() for name, value in terms.items()}

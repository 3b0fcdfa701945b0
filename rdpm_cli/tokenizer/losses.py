"""The tokenizer's loss (arXiv 2412.18390 Eq. 3-5): L = L_recon + 0.25 L_quant + L_lpips + 0.75 w L_gan.

The last term is not there yet; it enters `TokenizerLoss` as a further named term.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from rdpm_cli.config import TokenizerLossConfig


def reconstruction(x: Tensor, recon: Tensor) -> Tensor:
    """L_recon: mean squared error on [-1, 1]."""
    return F.mse_loss(recon.float(), x.float())


class TokenizerLoss:
    """Named terms and their factors."""

    def __init__(self, cfg: TokenizerLossConfig, perceptual: nn.Module | None = None) -> None:
        """perceptual: (x, x') -> distances (B,), where cfg asks for it; it is frozen and part of no checkpoint."""
        assert (perceptual is not None) == (cfg.perceptual != "none"), "the recipe decides whether there is the term"
        self.factors = {"recon": 1.0, "quant": cfg.quant, "lpips": cfg.perceptual_factor}
        self.perceptual = perceptual

    def __call__(self, x: Tensor, recon: Tensor, quant: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """-> total and the unweighted terms by name (scalars, detached)."""
        terms = {"recon": reconstruction(x, recon), "quant": quant}
        if self.perceptual is not None:
            terms["lpips"] = self.perceptual(x, recon).mean()
        total = x.new_zeros(())
        for name, value in terms.items():
            total = total + self.factors[name] * value
        return total, {name: value.detach() for name, value in terms.items()}

"""The tokenizer's loss (arXiv 2412.18390 Eq. 3-5): L = L_recon + 0.25 L_quant + L_lpips + 0.75 w L_gan.

The adversarial part is VQGAN's (arXiv 2012.09841 §3.1): hinge losses, and w balances the gradients of the last layer.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdpm_cli.config import TokenizerLossConfig
from rdpm_cli.step import TrainStep

LARGEST_WEIGHT = 1e4
TINY_NORM = 1e-4  # added to the denominator of w, as VQGAN does


def reconstruction(x: Tensor, recon: Tensor) -> Tensor:
    """L_recon: mean squared error on [-1, 1]."""
    return F.mse_loss(recon.float(), x.float())


def generator_hinge(fake_logits: Tensor) -> Tensor:
    """L_gan for the tokenizer: -mean D(x')."""
    return -fake_logits.float().mean()


def discriminator_hinge(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """0.5 (mean max(0, 1 - D(x)) + mean max(0, 1 + D(x')))."""
    return 0.5 * (F.relu(1 - real_logits.float()).mean() + F.relu(1 + fake_logits.float()).mean())


def adaptive_weight(recon_gradient: Tensor, gan_gradient: Tensor) -> Tensor:
    """w = |grad L_rec| / (|grad L_gan| + 1e-4) at the decoder's last layer, clamped to [0, 1e4]. Scalar."""
    return (recon_gradient.norm() / (gan_gradient.norm() + TINY_NORM)).clamp(0, LARGEST_WEIGHT)


class AdaptiveWeight:
    """w of the global batch, from each micro-batch's last-layer gradients.

    Gradients that accumulate are known only once the last micro-batch has passed. w is then that of the step before
    (0 in the first), on any number of processes; `value` keeps it between steps and belongs to the run's state.
    """

    def __init__(self, value: Tensor, accumulates: bool) -> None:
        self.value, self.accumulates = value, accumulates
        self.reset()

    def reset(self) -> None:
        """Forget a step's gradients: before the next one, and after one that was passed over."""
        self.sum: Tensor | float = 0.0

    def __call__(self, pair: Tensor, step: TrainStep) -> Tensor:
        """pair: gradients of L_rec and L_gan, both means over the micro-batch `step`. -> w, scalar."""
        # a process whose gradient is not finite fails by its own loss, and does not spoil the others' weight
        share = pair.nan_to_num(0.0, 0.0, 0.0) * (len(step.rows) / step.batch)
        if not self.accumulates:
            return adaptive_weight(*step.sum_(share))
        self.sum = self.sum + share
        return self.value.clone()

    def after_step(self, step: TrainStep) -> None:
        """Where gradients accumulate: w for the next step, from all micro-batches of all processes."""
        if isinstance(self.sum, Tensor):
            self.value.copy_(adaptive_weight(*step.sum_(self.sum)))


@dataclass
class Adversary:
    """What the adversarial term needs of one micro-batch."""

    logits: Tensor  # D(x'), D frozen
    last_layer: Tensor  # weight of the last convolution of the decoder
    ramp: float  # 0..1, the warm-up of the term
    step: TrainStep
    weight: AdaptiveWeight


class TokenizerLoss:
    """Named terms and their factors."""

    def __init__(self, cfg: TokenizerLossConfig, perceptual: nn.Module | None = None) -> None:
        """perceptual: (x, x') -> distances (B,), where cfg asks for it; it is frozen and part of no checkpoint."""
        assert (perceptual is not None) == (cfg.perceptual != "none"), "the recipe decides whether there is the term"
        self.cfg, self.perceptual = cfg, perceptual

    def __call__(
        self, x: Tensor, recon: Tensor, quant: Tensor, adversary: Adversary | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """-> total and the unweighted terms by name (scalars, detached). recon: fp32, in the graph of the decoder."""
        perceived = reconstruction(x, recon)
        logs = {"recon": perceived.detach(), "quant": quant.detach()}
        if self.perceptual is not None:
            lpips = self.perceptual(x, recon).mean()
            perceived, logs["lpips"] = perceived + self.cfg.perceptual_factor * lpips, lpips.detach()
        if adversary is not None:
            perceived, more = self._with_adversary(perceived, recon, adversary)
            logs |= more
        return perceived + self.cfg.quant * quant, logs

    def _with_adversary(
        self, perceived: Tensor, recon: Tensor, adversary: Adversary
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """perceived + 0.75 w L_gan, ramped.

        The gradients of both terms at the image serve w and the training pass, so the networks behind the two terms
        are walked back once.
        """
        gan = generator_hinge(adversary.logits)
        at_image = [torch.autograd.grad(term, recon)[0] for term in (perceived, gan)]
        weight = torch.ones_like(gan)
        if self.cfg.adaptive:
            last = adversary.last_layer
            pair = [torch.autograd.grad(recon, last, g, retain_graph=True)[0].float() for g in at_image]
            weight = adversary.weight(torch.stack(pair), adversary.step)
        factor = adversary.ramp * self.cfg.adversarial_factor * weight
        value = (perceived + factor * gan).detach()
        logs = {"gan": gan.detach(), "gan_weight": weight}
        return _with_gradient(value, recon, at_image[0] + factor * at_image[1]), logs


def _with_gradient(value: Tensor, at: Tensor, gradient: Tensor) -> Tensor:
    """The scalar `value`, whose gradient with respect to `at` is `gradient`."""
    carrier = (at * gradient).sum()
    return value + (carrier - carrier.detach())

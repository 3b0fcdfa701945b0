"""Training a tokenizer, as the training loop sees it: batches, the two players' losses, what follows a step."""

import numpy as np
import torch
from torch import Tensor, nn

from rdpm_cli import noise
from rdpm_cli.config import TokenizerConfig
from rdpm_cli.errors import some_of
from rdpm_cli.images.sources import ImageSource
from rdpm_cli.images.tensors import to_model
from rdpm_cli.step import TrainStep
from rdpm_cli.tokenizer.codebook import health
from rdpm_cli.tokenizer.discriminator import PatchDiscriminator
from rdpm_cli.tokenizer.losses import AdaptiveWeight, Adversary, TokenizerLoss, discriminator_hinge
from rdpm_cli.tokenizer.model import Tokenizer
from rdpm_cli.tokenizer.quantizer import Usage


class ImageBatches:
    """batch_at(step, rows): the images of a training step, flipped by (seed, step, block)."""

    def __init__(self, source: ImageSource, cfg: TokenizerConfig, seed: int) -> None:
        self.source, self.cfg, self.seed = source, cfg, seed
        self.size = cfg.autoencoder.resolution

    def batch_at(self, step: int, rows: range) -> Tensor:
        """uint8 (rows, 3, H, W): rows of the global batch of this step."""
        indices = self._indices(step, rows)
        flips = noise.block_uniform(self.seed, step, rows, 1)[:, 0] < (0.5 if self.cfg.flip else 0.0)
        images = [self.source.pixels(int(i), self.size) for i in indices]
        chosen = [x[:, ::-1] if flip else x for x, flip in zip(images, flips, strict=True)]
        return torch.from_numpy(np.stack(chosen)).permute(0, 3, 1, 2).contiguous()

    def _indices(self, step: int, rows: range) -> noise.Ints:
        return noise.epoch_rows(self.seed, step, self.cfg.train.batch, len(self.source))[rows.start : rows.stop]

    def describe(self, step: int, rows: range) -> str:
        """The names of those images."""
        return f"images {some_of(self.source.names[i] for i in self._indices(step, rows))}"


class TokenizerTask:
    """Eq. 3-5 for one player: encoder, decoder, bias convolution (and a gradient-trained codebook)."""

    name = "tokenizer"
    start = 0

    def __init__(
        self,
        tokenizer: Tokenizer,
        cfg: TokenizerConfig,
        perceptual: nn.Module | None = None,
        critic: PatchDiscriminator | None = None,
    ) -> None:
        """perceptual: LPIPS, where the loss has it. critic: the discriminator that `DiscriminatorTask` trains."""
        self.model, self.cfg, self.critic = tokenizer, cfg, critic
        self.loss_terms = TokenizerLoss(cfg.loss, perceptual)
        self.gan_weight = AdaptiveWeight(critic.gan_weight, cfg.train.accumulates) if critic else None
        self.step = -1
        self.usage: Usage | None = None
        self.made: list[tuple[Tensor, Tensor]] = []  # (x, x') of this step's micro-batches, for the critic

    def networks(self) -> list[nn.Module]:
        """Encoder and decoder; the quantiser's loop stays eager, and so does the decoder's last layer.

        The adaptive weight walks back through that layer alone, more than once: a compiled backward pass is a whole
        that allows neither.
        """
        return [self.model.encoder, self.model.decoder.mid, *self.model.decoder.up]

    def loss(self, batch: Tensor, step: TrainStep) -> tuple[Tensor, dict[str, Tensor]]:
        """batch uint8 (B,3,H,W) -> loss and logs."""
        if step.step != self.step:  # also after a step that was passed over
            self.step, self.usage, self.made = step.step, None, []
            if self.gan_weight:
                self.gan_weight.reset()
        x = to_model(batch)
        if self.cfg.train.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        eps = step.normal(self.model.cfg.quantizer.steps, *self.model.latent_shape)
        recon, chain = self.model(x, eps)
        recon = recon.float()
        adversary = self._adversary(x, recon, step)
        total, terms = self.loss_terms(x, recon, chain.loss, adversary)
        assert chain.usage, "the tokenizer is in training mode"
        assert chain.spread is not None
        self.usage = self.usage.merged(chain.usage) if self.usage else chain.usage
        latent = {f"latent_error/t{t:02d}": e for t, e in enumerate(chain.error_T, 1)}
        return total, {**terms, "latent_spread": chain.spread, **latent}

    def _adversary(self, x: Tensor, recon: Tensor, step: TrainStep) -> Adversary | None:
        """The critic's view of x', once it trains; its own parameters get no gradient from here."""
        cfg = self.cfg.discriminator
        if self.critic is None or self.gan_weight is None or step.step < cfg.start:
            return None
        self.made.append((x, recon.detach()))
        parameters = list(self.critic.parameters())
        for parameter in parameters:
            parameter.requires_grad_(False)
        logits = self.critic(recon)
        for parameter in parameters:
            parameter.requires_grad_(True)
        ramp = min(1.0, (step.step - cfg.start) / cfg.warmup_steps) if cfg.warmup_steps else 1.0
        last = self.model.decoder.conv_out.weight
        return Adversary(logits, last, ramp, step, self.gan_weight)

    def after_step(self, step: TrainStep) -> dict[str, Tensor]:
        """Move the codebook and report its health per t."""
        assert self.usage is not None, "after_step follows loss"
        if self.gan_weight:
            self.gan_weight.after_step(step)
        restarted = self.model.quantizer.follow(self.usage, step)
        found = health(self.usage.used_TK, shared=self.cfg.quantizer.codebooks == "shared")
        return {"restarted": torch.tensor(float(restarted), device=step.device), **found}


class DiscriminatorTask:
    """The other player: tells images from the reconstructions that `TokenizerTask` made in the same step."""

    name = "discriminator"

    def __init__(self, critic: PatchDiscriminator, rival: TokenizerTask) -> None:
        self.model, self.rival = critic, rival
        self.start = rival.cfg.discriminator.start

    def networks(self) -> list[nn.Module]:
        """The whole."""
        return [self.model]

    def loss(self, batch: Tensor, step: TrainStep) -> tuple[Tensor, dict[str, Tensor]]:
        """Hinge loss on one micro-batch of x and x', both (B,3,H,W)."""
        x, recon = self.rival.made.pop(0)
        real, fake = self.model(x), self.model(recon)
        logs = {"logits_real": real.detach().float().mean(), "logits_fake": fake.detach().float().mean()}
        return discriminator_hinge(real, fake), logs

    def after_step(self, step: TrainStep) -> dict[str, Tensor]:
        """Nothing follows a step."""
        return {}


Players = list[TokenizerTask | DiscriminatorTask]


def players_of(
    tokenizer: Tokenizer, cfg: TokenizerConfig, device: torch.device, perceptual: nn.Module | None = None
) -> Players:
    """The tokenizer, and its discriminator where the loss has an adversarial term."""
    if cfg.loss.adversarial == "none":
        return [TokenizerTask(tokenizer, cfg, perceptual)]
    critic = PatchDiscriminator(cfg.discriminator).to(device)
    task = TokenizerTask(tokenizer, cfg, perceptual, critic)
    return [task, DiscriminatorTask(critic, task)]

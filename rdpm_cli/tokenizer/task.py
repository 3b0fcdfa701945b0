"""Training a tokenizer, as the training loop sees it: batches, one player's loss, what follows a step."""

import numpy as np
import torch
from torch import Tensor, nn

from rdpm_cli import noise
from rdpm_cli.config import TokenizerConfig
from rdpm_cli.images.sources import ImageSource
from rdpm_cli.images.tensors import to_model
from rdpm_cli.step import TrainStep
from rdpm_cli.tokenizer.losses import TokenizerLoss
from rdpm_cli.tokenizer.model import Tokenizer
from rdpm_cli.tokenizer.quantizer import Usage


class ImageBatches:
    """batch_at(step, rows): the images of a training step, flipped by (seed, step, block)."""

    def __init__(self, source: ImageSource, cfg: TokenizerConfig, seed: int) -> None:
        self.source, self.cfg, self.seed = source, cfg, seed
        self.size = cfg.autoencoder.resolution

    def batch_at(self, step: int, rows: range) -> Tensor:
        """uint8 (rows, 3, H, W): rows of the global batch of this step."""
        indices = noise.epoch_rows(self.seed, step, self.cfg.train.batch, len(self.source))[rows.start : rows.stop]
        flips = noise.block_uniform(self.seed, step, rows, 1)[:, 0] < (0.5 if self.cfg.flip else 0.0)
        images = [self.source.pixels(int(i), self.size) for i in indices]
        chosen = [x[:, ::-1] if flip else x for x, flip in zip(images, flips, strict=True)]
        return torch.from_numpy(np.stack(chosen)).permute(0, 3, 1, 2).contiguous()


class TokenizerTask:
    """Eq. 3-5 for one player: encoder, decoder, bias convolution (and a gradient-trained codebook)."""

    name = "tokenizer"

    def __init__(self, tokenizer: Tokenizer, cfg: TokenizerConfig, perceptual: nn.Module | None = None) -> None:
        self.model, self.cfg = tokenizer, cfg
        self.loss_terms = TokenizerLoss(cfg.loss, perceptual)
        self.usage: Usage | None = None

    def loss(self, batch: Tensor, step: TrainStep) -> tuple[Tensor, dict[str, Tensor]]:
        """batch uint8 (B,3,H,W) -> loss and logs."""
        x = to_model(batch)
        eps = step.normal(self.model.cfg.quantizer.steps, *self.model.latent_shape)
        recon, chain = self.model(x, eps)
        total, terms = self.loss_terms(x, recon, chain.loss)
        assert chain.usage is not None, "the tokenizer is in training mode"
        self.usage = self.usage.merged(chain.usage) if self.usage else chain.usage
        latent = {f"latent_error/t{t:02d}": e for t, e in enumerate(chain.error_T, 1)}
        return total, {**terms, **latent}

    def after_step(self, step: TrainStep) -> dict[str, Tensor]:
        """Move the codebook and report its health per t."""
        assert self.usage is not None, "after_step follows loss"
        usage, self.usage = self.usage, None
        restarted = self.model.quantizer.follow(usage, step)
        return {"restarted": torch.tensor(float(restarted), device=step.device), **codebook_health(usage.used_TK)}


def codebook_health(used_TK: Tensor) -> dict[str, Tensor]:
    """Share of codes used, perplexity and dead codes, per t, from counts."""
    share_TK = used_TK / used_TK.sum(1, keepdim=True).clamp_min(1)
    perplexity_T = torch.exp(-(share_TK * share_TK.clamp_min(1e-12).log()).sum(1))
    used_T = (used_TK > 0).float().sum(1)
    logs: dict[str, Tensor] = {}
    for t, (used, perplexity) in enumerate(zip(used_T, perplexity_T, strict=True), 1):
        logs[f"usage/t{t:02d}"] = used / used_TK.shape[1]
        logs[f"perplexity/t{t:02d}"] = perplexity
        logs[f"dead/t{t:02d}"] = used_TK.shape[1] - used
    return logs

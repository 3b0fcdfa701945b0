"""Training a tokenizer, as the training loop sees it: batches, the two players, and the codebook's start and health.

Legend: B batch, T steps, C code width, S positions of the flattened grid, K codebook entries, M codebooks (1 or T),
N vectors.
"""

from collections.abc import Callable

import numpy as np
import torch
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor, nn

from rdpm_cli import noise
from rdpm_cli.data.pixels import to_model
from rdpm_cli.data.source import Source
from rdpm_cli.distributed import TrainStep
from rdpm_cli.errors import some_of
from rdpm_cli.tokenizer.config import TokenizerConfig
from rdpm_cli.tokenizer.losses import AdaptiveWeight, Adversary, TokenizerLoss, discriminator_hinge
from rdpm_cli.tokenizer.model import Tokenizer
from rdpm_cli.tokenizer.networks import PatchDiscriminator
from rdpm_cli.tokenizer.quantizer import Chain, Usage

VECTORS_PER_CODE = 64  # that k-means sees at most
KMEANS_PASSES = 10  # over them


class ImageBatches:
    """batch_at(step, rows): the images of a training step, flipped by (seed, step, block)."""

    def __init__(self, source: Source, cfg: TokenizerConfig, seed: int) -> None:
        self.source, self.cfg, self.seed = source, cfg, seed
        self.size = cfg.autoencoder.resolution

    def batch_at(self, step: int, rows: range) -> Tensor:
        """uint8 (rows, 3, H, W): rows of the global batch of this step."""
        indices = self._indices(step, rows)
        # drawn even without flips, so that `flip` changes no other draw of the block
        flips = noise.block_uniform(self.seed, step, rows, 1)[:, 0] < (0.5 if self.cfg.flip else 0.0)
        images = [self.source.pixels(int(i), self.size) for i in indices]
        flipped = [x[:, ::-1] if flip else x for x, flip in zip(images, flips, strict=True)]
        return torch.from_numpy(np.stack(flipped)).permute(0, 3, 1, 2).contiguous()

    def _indices(self, step: int, rows: range) -> noise.Ints:
        return noise.epoch_rows(self.seed, step, self.cfg.train.batch, len(self.source))[rows.start : rows.stop]

    def describe(self, step: int, rows: range) -> str:
        """The names of those images, for an error about them."""
        return f"images {some_of(self.source.names[i] for i in self._indices(step, rows))}"


# ---- the players ---------------------------------------------------------------------------------------------------


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
        self.pairs: list[tuple[Tensor, Tensor]] = []  # (x, x') of this step's micro-batches, for the critic

    def networks(self) -> list[nn.Module]:
        """The parts that `compile` compiles: encoder and decoder, without the decoder's last layer and the quantiser.

        The adaptive weight takes gradients through that layer more than once, and a compiled backward pass can
        neither be entered halfway nor run twice.
        """
        return [self.model.encoder, self.model.decoder.mid, *self.model.decoder.up]

    def loss(self, batch: Tensor, step: TrainStep) -> tuple[Tensor, dict[str, Tensor]]:
        """batch uint8 (B,3,H,W) -> loss and logs."""
        if step.step != self.step:  # the first micro-batch of a step, also after a step that was passed over
            self.step, self.usage, self.pairs = step.step, None, []
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
        """The critic's logits of x', once it trains; its own parameters get no gradient from here."""
        cfg = self.cfg.discriminator
        if self.critic is None or self.gan_weight is None or step.step < cfg.start:
            return None
        self.pairs.append((x, recon.detach()))
        parameters = list(self.critic.parameters())
        for parameter in parameters:
            parameter.requires_grad_(False)
        logits = self.critic(recon)
        for parameter in parameters:
            parameter.requires_grad_(True)  # it trains in this same step
        ramp = min(1.0, (step.step - cfg.start) / cfg.warmup_steps) if cfg.warmup_steps else 1.0
        return Adversary(logits, self.model.decoder.conv_out.weight, ramp, step, self.gan_weight)

    def after_step(self, step: TrainStep) -> dict[str, Tensor]:
        """Move the codebook and report its health per t."""
        assert self.usage is not None, "after_step follows loss"
        if self.gan_weight:
            self.gan_weight.after_step(step)
        restarted = self.model.quantizer.follow(self.usage, step)
        logs = health(self.usage.used_TK, shared=self.cfg.quantizer.codebooks == "shared")
        return {"restarted": torch.tensor(float(restarted), device=step.device), **logs}


class DiscriminatorTask:
    """The second player: tells images from the reconstructions that `TokenizerTask` made in the same step."""

    name = "discriminator"

    def __init__(self, critic: PatchDiscriminator, rival: TokenizerTask) -> None:
        self.model, self.rival = critic, rival
        self.start = rival.cfg.discriminator.start

    def networks(self) -> list[nn.Module]:
        """The whole discriminator."""
        return [self.model]

    def loss(self, batch: Tensor, step: TrainStep) -> tuple[Tensor, dict[str, Tensor]]:
        """Hinge loss on the next micro-batch's x and x', both (B,3,H,W); `batch` itself is not needed."""
        x, recon = self.rival.pairs.pop(0)
        real, fake = self.model(x), self.model(recon)
        logs = {"logits_real": real.detach().float().mean(), "logits_fake": fake.detach().float().mean()}
        return discriminator_hinge(real, fake), logs

    def after_step(self, step: TrainStep) -> dict[str, Tensor]:
        """Nothing follows a step of the discriminator."""
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


# ---- the codebook --------------------------------------------------------------------------------------------------


@torch.no_grad()
def initialise_codebook(
    tokenizer: Tokenizer, pixels_BCHW: Tensor, seed: int, between: Callable[[], None] = lambda: None
) -> None:
    """Set the codes to vectors v_t of these images: K random ones (`init: data`) or K centres (`kmeans`).

    With a book a step, each gets its own step's vectors. `init: normal` changes nothing. The same images and seed give
    the same books in every process. between: called between pieces of the work, to stop on a signal.
    """
    quantizer, cfg = tokenizer.quantizer, tokenizer.cfg.quantizer
    if cfg.init == "normal":
        return
    vectors_TNC = _vectors(tokenizer, pixels_BCHW, seed).flatten(1, 2).cpu()
    books = []
    for book in range(len(quantizer.books)):
        pool_NC = vectors_TNC[book] if len(quantizer.books) > 1 else vectors_TNC.flatten(0, 1)
        order = torch.randperm(len(pool_NC), generator=torch.Generator().manual_seed(seed + book))
        few_NC = pool_NC[order[: VECTORS_PER_CODE * cfg.codes]]
        books.append(few_NC[: cfg.codes] if cfg.init == "data" else _centres(few_NC, cfg.codes, seed, between))
    quantizer.set_books(torch.stack(books))


def _vectors(tokenizer: Tokenizer, pixels_BCHW: Tensor, seed: int) -> Tensor:
    """v_t (T, B, S, C) of the chain over the codebook as it is."""
    device, count = tokenizer.quantizer.books.device, len(pixels_BCHW)
    blocks = []
    for start in range(0, count, noise.BLOCK):  # a block at a time: its noise has a stream of its own
        step = TrainStep(seed, 0, range(start, min(start + noise.BLOCK, count)), count, device)
        eps = step.normal(tokenizer.quantizer.steps, *tokenizer.latent_shape)
        z = tokenizer.latents(to_model(pixels_BCHW[start : start + noise.BLOCK].to(device)))
        chain: Chain = tokenizer.quantizer(z, eps)
        assert chain.usage is not None, "the tokenizer is in training mode"
        blocks.append(chain.usage.vectors_TBSC)
    return torch.cat(blocks, 1)


def _centres(vectors_NC: Tensor, count: int, seed: int, between: Callable[[], None]) -> Tensor:
    """Centres of mini-batch k-means, (count, C)."""
    kmeans = MiniBatchKMeans(count, n_init=1, random_state=seed)
    # sklearn refuses a first batch with fewer vectors than centres, so a short last piece is left out
    pieces = [piece.numpy() for piece in vectors_NC.split(max(1024, 2 * count)) if len(piece) >= count]
    for _ in range(KMEANS_PASSES):
        for piece in pieces:
            kmeans.partial_fit(piece)
            between()
    return torch.from_numpy(kmeans.cluster_centers_).float()


def health(used_TK: Tensor, shared: bool) -> dict[str, Tensor]:
    """Share of codes used, perplexity and dead codes, per t, from counts; and the share used of the book as a whole.

    With a book a step, `usage/book` is that of the worst one.
    """
    share_TK = used_TK / used_TK.sum(1, keepdim=True).clamp_min(1)
    perplexity_T = torch.exp(-(share_TK * share_TK.clamp_min(1e-12).log()).sum(1))
    used_T = (used_TK > 0).float().sum(1)
    # the last steps use few codes of a shared book by nature; only a code that no step uses is wasted
    whole = (used_TK.sum(0) > 0).float().mean() if shared else used_T.min() / used_TK.shape[1]
    logs = {"usage/book": whole}
    for t, (used, perplexity) in enumerate(zip(used_T, perplexity_T, strict=True), 1):
        logs[f"usage/t{t:02d}"] = used / used_TK.shape[1]
        logs[f"perplexity/t{t:02d}"] = perplexity
        logs[f"dead/t{t:02d}"] = used_TK.shape[1] - used
    return logs

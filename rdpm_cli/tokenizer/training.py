"""Training a tokenizer, as the training loop sees it: batches, the two players, and the codebook's start and health."""

import torch
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor, nn

from rdpm_cli import noise
from rdpm_cli.data.source import ItemSource
from rdpm_cli.distributed import TrainStep
from rdpm_cli.errors import some_of
from rdpm_cli.tokenizer.config import MelConfig, TokenizerConfig
from rdpm_cli.tokenizer.inputs import inputs_of
from rdpm_cli.tokenizer.losses import DISCRIMINATOR, GENERATOR, Judgement, adaptive_weight, feature_distance, mean_of
from rdpm_cli.tokenizer.mel_critics import MelCritics
from rdpm_cli.tokenizer.mel_networks import MelEncoder, Scale
from rdpm_cli.tokenizer.model import Tokenizer
from rdpm_cli.tokenizer.networks import PatchDiscriminator
from rdpm_cli.training.loop import Player

Critic = PatchDiscriminator | MelCritics


class ItemBatches:
    """batch_at(step, rows): the items of a training step, images flipped and sounds cut by (seed, step, block)."""

    def __init__(self, source: ItemSource, cfg: TokenizerConfig, seed: int) -> None:
        self.source, self.cfg, self.seed, self.inputs = source, cfg, seed, inputs_of(cfg.autoencoder)

    def batch_at(self, step: int, rows: range) -> Tensor:
        """Rows of the global batch of this step: uint8 (rows, 3, H, W), or fp32 (rows, M, F)."""
        uniform_B = noise.block_uniform(self.seed, step, rows, 1)[:, 0]
        return self.inputs.windows(self.source, self._indices(step, rows), uniform_B, self.cfg.flip)

    def _indices(self, step: int, rows: range) -> list[int]:
        indices: list[int] = noise.epoch_rows(self.seed, step, self.cfg.train.batch, len(self.source), rows).tolist()
        return indices

    def describe(self, step: int, rows: range) -> str:
        """The names of those items, for an error about them."""
        return f"items {some_of(self.source.names[i] for i in self._indices(step, rows))}"


class TokenizerTask(Player):
    """Eq. 3-5 for one player: encoder, decoder, bias convolution (and a gradient-trained codebook)."""

    name = "tokenizer"

    def __init__(
        self, tokenizer: Tokenizer, cfg: TokenizerConfig, perceptual: nn.Module | None = None,
        critic: Critic | None = None,
    ) -> None:  # fmt: skip
        """perceptual: (x, x') -> LPIPS (B,), where the loss has it. critic: the one that `DiscriminatorTask` trains."""
        self.model, self.cfg, self.perceptual, self.critic = tokenizer, cfg, perceptual, critic
        self.step = -1
        self.passes: list[tuple[Tensor, Tensor]] = []  # codes and vectors of this step's micro-batches
        # (x, x', place of the critics' windows in sound) of this step's micro-batches, for the critic
        self.pairs: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self.gradients: Tensor | None = None  # sum of this step's last-layer gradients of L_rec and L_gan

    def networks(self) -> list[nn.Module]:
        """The parts that `compile` compiles: encoder and decoder, without the decoder's last layer."""
        # the adaptive weight takes gradients through that layer twice, and a compiled backward pass runs only once
        if isinstance(self.model.cfg.autoencoder, MelConfig):
            return [self.model.encoder, self.model.decoder.up]
        return [self.model.encoder, self.model.decoder.mid, *self.model.decoder.up]

    def loss(self, batch: Tensor, step: TrainStep) -> tuple[Tensor, dict[str, Tensor]]:
        """batch: of `ItemBatches` -> L_recon + 0.25 L_quant + L_lpips + 0.75 w L_gan, and the terms as logs."""
        cfg = self.cfg.loss
        if step.step != self.step:  # the first micro-batch of a step, also after a step that was skipped
            self.step, self.passes, self.pairs, self.gradients = step.step, [], [], None
        x = self.model.inputs.to_model(batch)
        if self.cfg.train.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        recon, chain = self.model(x, *self._draws(x, step))
        recon = recon.float()
        perceived = self.model.inputs.distance(x, recon)
        gammas = sum(self.model.quantizer.gammas) if cfg.quant_reduce == "mean" else 1.0
        quant = chain.loss / gammas
        logs = {"recon": perceived.detach(), "quant": quant.detach(), "latent_spread": chain.spread}
        if self.perceptual is not None:
            lpips = self.perceptual(x, recon).mean()
            perceived, logs["lpips"] = perceived + cfg.perceptual_factor * lpips, lpips.detach()
        if self.critic is not None and step.step >= self.cfg.discriminator.start:
            place_BW = None
            if isinstance(self.critic, MelCritics):
                place_BW = torch.special.ndtr(step.normal(len(self.critic.windows)))
            self.pairs.append((x, recon.detach(), place_BW))
            perceived = self._add_adversary(perceived, recon, self.critic, step, logs)
        self.passes.append((chain.codes_BTS, chain.vectors_TBSC))
        logs |= {f"latent_error/t{t:02d}": error for t, error in enumerate(chain.error_T, 1)}
        return perceived + cfg.quant * quant, logs

    def _draws(self, x: Tensor, step: TrainStep) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The noise eps of all steps, what is added to z, and the number of steps that each item is decoded from."""
        auto, quantizer, shape = self.model.cfg.autoencoder, self.model.cfg.quantizer, self.model.latent_shape_of(x)
        eps_BTCS, shake_BCS, terms_B = step.normal(quantizer.steps, *shape), None, None
        if isinstance(auto, MelConfig) and auto.noise:
            shake_BCS = auto.noise * step.normal(*shape)
        if quantizer.dropout:
            uniform_B2 = torch.special.ndtr(step.normal(2))
            prefix_B = 1 + (uniform_B2[:, 1] * quantizer.steps).long()
            terms_B = torch.where(uniform_B2[:, 0] < quantizer.dropout, prefix_B, quantizer.steps)
        return eps_BTCS, shake_BCS, terms_B

    def _add_adversary(
        self, perceived: Tensor, recon: Tensor, critic: Critic, step: TrainStep, logs: dict[str, Tensor]
    ) -> Tensor:
        """perceived + 0.75 w L_gan, ramped; the critic's own parameters get no gradient from here."""
        cfg, last, (x, _, place_BW) = self.cfg, self.model.decoder.conv_out.weight, self.pairs[-1]
        critic.requires_grad_(False)
        fake = judge(critic, recon, place_BW)
        gan = mean_of([GENERATOR[cfg.loss.adversarial](maps[-1]) for maps in fake])
        if cfg.loss.feature_matching:
            with torch.no_grad():
                real = judge(critic, x, place_BW)
            distance = feature_distance(real, fake)
            logs["feature_distance"] = distance.detach()
            gan = gan + cfg.loss.feature_matching * distance
        critic.requires_grad_(True)  # it trains in this same step
        # The gradients of both terms at the image serve w and the training pass, so that the discriminator and LPIPS
        # are differentiated once a step. VQGAN differentiates them twice.
        at_image = [torch.autograd.grad(term, recon)[0] for term in (perceived, gan)]
        weight = torch.ones_like(gan)
        if cfg.loss.adaptive:
            pair = torch.stack([torch.autograd.grad(recon, last, g, retain_graph=True)[0].float() for g in at_image])
            # A process whose gradient is not finite fails by its own loss; it must not spoil the weight of the others.
            share = pair.nan_to_num(0.0, 0.0, 0.0) * (len(step.rows) / step.batch)
            if cfg.train.accumulates:  # complete only after the last micro-batch: w is that of the previous step
                self.gradients = share if self.gradients is None else self.gradients + share
                weight = critic.gan_weight.clone()
            else:
                weight = adaptive_weight(*step.sum_(share))
        warmup = cfg.discriminator.warmup_steps
        ramp = min(1.0, (step.step - cfg.discriminator.start) / warmup) if warmup else 1.0
        factor = ramp * cfg.loss.adversarial_factor * weight
        logs |= {"gan": gan.detach(), "gan_weight": weight}
        carrier = (recon * (at_image[0] + factor * at_image[1])).sum()  # has the gradient of the sum at the image
        return (perceived + factor * gan).detach() + (carrier - carrier.detach())

    def after_step(self, step: TrainStep) -> dict[str, Tensor]:
        """Move the codebook and report its health per t; where gradients accumulate, w for the next step."""
        if self.gradients is not None and self.critic is not None:
            self.critic.gan_weight.copy_(adaptive_weight(*step.sum_(self.gradients)))
        restarted, used_TK = self.model.quantizer.follow(self.passes, step)
        logs = health(used_TK, shared=self.cfg.quantizer.codebooks == "shared")
        return {"restarted": torch.tensor(float(restarted), device=step.device), **logs}


def judge(critic: Critic, x: Tensor, place_BW: Tensor | None) -> Judgement:
    """Feature maps and logits of every critic; of images the logits only. place: of the windows in sound."""
    return [[critic(x)]] if place_BW is None else critic(x, place_BW)


class DiscriminatorTask(Player):
    """The second player: tells items from the reconstructions that `TokenizerTask` made in the same step."""

    name = "discriminator"

    def __init__(self, critic: Critic, rival: TokenizerTask) -> None:
        self.model, self.rival, self.start = critic, rival, rival.cfg.discriminator.start

    def loss(self, batch: Tensor, step: TrainStep) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean over critics of their loss on the next micro-batch's x and x'; `batch` itself is not needed."""
        x, recon, place_BW = self.rival.pairs.pop(0)
        real, fake = ([maps[-1] for maps in judge(self.model, side, place_BW)] for side in (x, recon))
        loss = mean_of(list(map(DISCRIMINATOR[self.rival.cfg.loss.adversarial], real, fake)))
        means = (mean_of([logits.detach().float().mean() for logits in side]) for side in (real, fake))
        return loss, dict(zip(("logits_real", "logits_fake"), means, strict=True))


Players = list[TokenizerTask | DiscriminatorTask]


def players_of(tokenizer: Tokenizer, cfg: TokenizerConfig, perceptual: nn.Module | None = None) -> Players:
    """The tokenizer, and its discriminator where the loss has an adversarial term."""
    critic: Critic | None = None
    if cfg.loss.adversarial != "none":
        if isinstance(cfg.autoencoder, MelConfig):
            assert isinstance(tokenizer.encoder, MelEncoder)
            critic = MelCritics(cfg.discriminator, cfg.autoencoder, tokenizer.encoder.scale)
        else:
            critic = PatchDiscriminator(cfg.discriminator)
    task = TokenizerTask(tokenizer, cfg, perceptual, critic)
    return [task, DiscriminatorTask(critic, task)] if critic else [task]


@torch.no_grad()
def initialise(tokenizer: Tokenizer, items: Tensor, seed: int) -> None:
    """Measure the scale of log-mel values, and set the codes to vectors v_t of these items, alike in all processes.

    items: of a training batch. The codes are random vectors, or centres of k-means."""
    quantizer, cfg = tokenizer.quantizer, tokenizer.cfg.quantizer
    for module in tokenizer.modules():
        if isinstance(module, Scale):
            module.measure(items)
    if cfg.init == "normal":
        return
    device, count, blocks = quantizer.books.device, len(items), list[Tensor]()
    for start in range(0, count, noise.BLOCK):
        step = TrainStep(seed, 0, range(start, min(start + noise.BLOCK, count)), count, device)
        z = tokenizer.latents(tokenizer.inputs.to_model(items[start : start + noise.BLOCK].to(device)))
        blocks.append(quantizer(z, step.normal(cfg.steps, *z.shape[1:])).vectors_TBSC)
    vectors_TNC = torch.cat(blocks, 1).flatten(1, 2).cpu()
    books = []
    for book in range(len(quantizer.books)):
        pool_NC = vectors_TNC[book] if len(quantizer.books) > 1 else vectors_TNC.flatten(0, 1)
        order = torch.randperm(len(pool_NC), generator=torch.Generator().manual_seed(seed + book))
        few_NC = pool_NC[order[: 64 * cfg.codes]]  # more would not move the centres
        codes_KC = few_NC[: cfg.codes]
        if cfg.init == "kmeans":
            kmeans = MiniBatchKMeans(cfg.codes, n_init=1, random_state=seed)
            # sklearn refuses a first batch with fewer vectors than centres, so a short last piece is left out
            pieces = [piece for piece in few_NC.split(max(1024, 2 * cfg.codes)) if len(piece) >= cfg.codes]
            for piece in 10 * pieces:
                kmeans.partial_fit(piece.numpy())
            codes_KC = torch.from_numpy(kmeans.cluster_centers_).float()
        books.append(codes_KC)
    quantizer.set_books(torch.stack(books))


def health(used_TK: Tensor, shared: bool) -> dict[str, Tensor]:
    """Share of codes used, perplexity and dead codes per t; and the share used of the whole book, or of the worst."""
    K = used_TK.shape[1]
    share_TK = used_TK / used_TK.sum(1, keepdim=True).clamp_min(1)
    perplexity_T = torch.exp(-(share_TK * share_TK.clamp_min(1e-12).log()).sum(1))
    used_T = (used_TK > 0).float().sum(1)
    # the last steps use few codes of a shared book by nature; only a code that no step uses is wasted
    whole = (used_TK.sum(0) > 0).float().mean() if shared else used_T.min() / K
    columns = {"usage": used_T / K, "perplexity": perplexity_T, "dead": K - used_T}
    logs = {f"{name}/t{t:02d}": value for name, column in columns.items() for t, value in enumerate(column, 1)}
    return {"usage/book": whole, **logs}

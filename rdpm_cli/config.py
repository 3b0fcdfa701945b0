"""The recipe's schema: one frozen class a component. `recipe_files.py` reads the files. Torch-free.

The field is the single source of an option: recipe key, override, help, manifest entry and error all derive from it.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

from rdpm_cli import files

Share = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Frozen, keyword-only, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class AutoencoderConfig(Section):
    """The VQGAN encoder and decoder."""

    resolution: int = Field(256, gt=0, description="height and width of the images, pixels")
    width: int = Field(128, gt=0, description="channels at full resolution (VQGAN 128, VAR 160)")
    multipliers: tuple[PositiveInt, ...] = Field(
        (1, 1, 2, 2, 4), min_length=1, description="channels of each level over width; f = 2^(n-1)"
    )
    res_blocks: int = Field(2, ge=1, description="residual blocks a level; the decoder has one more, as VQGAN")
    attention: bool = Field(True, description="self-attention at the lowest resolution")
    groups: int = Field(32, gt=0, description="groups of every GroupNorm")
    channels: int = Field(32, gt=0, description="C, channels of the latent z")
    features: int | None = Field(None, gt=0, description="channels outside quant_conv and post_quant_conv; default C")
    quant_kernel: Literal[1, 3] = Field(3, description="kernel of quant_conv and post_quant_conv (VAR 3, VQGAN 1)")
    latent_norm: Literal["layernorm", "none"] = Field("layernorm", description="z = LN(E(x)) over channels, no affine")

    @property
    def factor(self) -> int:
        """f, image pixels per latent position and side."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the latent."""
        return self.resolution // self.factor, self.resolution // self.factor

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.resolution % self.factor:
            raise ValueError(f"resolution {self.resolution} is not a multiple of f = {self.factor}")
        if odd := [m for m in self.multipliers if (m * self.width) % self.groups]:
            raise ValueError(f"width × {odd[0]} is not a multiple of groups = {self.groups}")
        return self


class ScheduleConfig(Section):
    """The noise schedule alpha_t."""

    kind: Literal["pow", "linear", "sin", "rvq"] = Field("pow", description="alpha_t; rvq is alpha = 1, no noise")
    base: float = Field(0.75, gt=0, le=1, description="the paper's varphi in alpha_t = base^(T-t), for pow")


class QuantizerConfig(Section):
    """The T-step residual quantiser."""

    codes: int = Field(4096, ge=2, le=65536, description="K, codebook entries")
    steps: int = Field(10, ge=1, description="T, diffusion steps = tokens a position")
    bias: Literal["none", "add", "blend"] = Field("blend", description="q; q + conv(q); 0.5 q + 0.5 conv(q)")
    codebook: Literal["ema", "gradient"] = Field("ema", description="how the codebook learns")
    codebooks: Literal["shared", "per_step"] = Field("shared", description="one book for all t, or one a t")
    init: Literal["normal", "data", "kmeans"] = Field("normal", description="N(0,1); vectors of a batch; their centres")
    decay: float = Field(0.99, ge=0, lt=1, description="of the codebook's EMA")
    restart_below: float = Field(
        0.03, ge=0, lt=1, description="a code used less than this × the mean restarts; 0 = off"
    )


class TokenizerLossConfig(Section):
    """Factors of the tokenizer's loss."""

    quant: float = Field(0.25, ge=0, description="factor of L_quant, Eq. 4")
    weight: bool = Field(True, description="gamma_t = alpha_t in L_quant; false: 1")
    perceptual: Literal["lpips", "none"] = Field("none", description="L_lpips: LPIPS with VGG16, or no such term")
    perceptual_factor: float = Field(1.0, ge=0, description="factor of L_lpips")
    perceptual_weights: str | None = Field(None, description="VGG16 weight file; default: looked up, never fetched")
    adversarial: Literal["hinge", "none"] = Field("none", description="L_gan against a PatchGAN discriminator")
    adversarial_factor: float = Field(0.75, ge=0, description="factor of w L_gan")
    adaptive: bool = Field(True, description="w from last-layer gradients, as VQGAN; false: 1")


class DiscriminatorConfig(Section):
    """The PatchGAN discriminator, where loss.adversarial is on."""

    width: int = Field(64, gt=0, multiple_of=8, description="channels of the first layer")
    layers: int = Field(3, ge=1, description="strided layers: 2 see patches of 34, 3 of 70 pixels")
    start: int = Field(0, ge=0, description="step from which the discriminator trains")
    warmup_steps: int = Field(0, ge=0, description="further steps before the tokenizer feels it fully: a linear ramp")


class TrainConfig(Section):
    """What the one training loop needs, the same for every task."""

    batch: int = Field(128, gt=0, description="images a step, over all processes")
    micro_batch: int | None = Field(None, gt=0, multiple_of=16, description="images at once; gradients accumulate")
    steps: int | None = Field(None, gt=0, description="optimiser steps; or give epochs")
    epochs: float | None = Field(None, gt=0, description="passes over the images; or give steps")
    lr: float = Field(4e-5, gt=0, description="learning rate after warm-up")
    lr_decay: Literal["constant", "cosine"] = Field("constant", description="after warm-up; cosine ends at 0")
    warmup_steps: int = Field(0, ge=0, description="linear warm-up, in steps")
    warmup_epochs: float = Field(0.0, ge=0, description="linear warm-up, in epochs (added to warmup_steps)")
    betas: tuple[Share, Share] = Field((0.9, 0.95), description="of AdamW")
    weight_decay: float = Field(0.0, ge=0, description="not on embeddings, norms and biases")
    clip: float = Field(0.0, ge=0, description="largest gradient norm; 0 = off")
    ema: float = Field(0.0, ge=0, lt=1, description="decay of the weights' average; 0 = off")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="autocast of the network; quantiser and losses fp32")
    channels_last: bool = Field(False, description="memory layout of convolutions, faster on GPUs")
    compile: bool = Field(False, description="torch.compile the networks")
    skip_bad: int = Field(0, ge=0, description="steps with a non-finite loss passed over before the run fails")
    workers: int = Field(0, ge=0, description="processes that prepare batches")
    log_every: int = Field(50, gt=0, description="steps between lines in metrics.jsonl")
    eval_every: int = Field(0, ge=0, description="steps between held-out evaluations and previews; 0 = at the end only")
    save_every: int = Field(1000, gt=0, description="steps between checkpoints")
    keep: int = Field(3, ge=2, description="checkpoints kept")

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs")
        return self

    @property
    def accumulates(self) -> bool:
        """Do a step's gradients come from several micro-batches?"""
        return self.micro_batch is not None and self.micro_batch < self.batch

    def total_steps(self, images: int) -> int:
        """Optimiser steps for a data set of so many images."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(1, round(self.epochs * images / self.batch))

    def warmup(self, images: int) -> int:
        """Warm-up steps for a data set of so many images."""
        return self.warmup_steps + round(self.warmup_epochs * images / self.batch)


# What a run may change when it resumes: no step depends on these, so that a run resumed with other values is the one
# begun with them. Not micro_batch, compile and channels_last: they change the order of floating-point sums.
FREE_ON_RESUME = {
    "keep": "which checkpoints stay on the disk",
    "log_every": "which steps are logged",
    "eval_every": "which steps are looked at; evaluations draw from streams of their own",
    "save_every": "which steps are saved",
    "workers": "who prepares the batch of a step, which is a function of (seed, step)",
    "skip_bad": "what follows a step that changed nothing: the run ends, or passes it over",
}
LOOKS = {"codebook_alarm", "proxy"}  # nor on these, which only look: outside `train`
# These do change what is trained; but an unfinished run that diverges must be able to go on. run.json notes the change.
CHANGEABLE_ON_RESUME = {"lr", "clip"}


def binding(settings: dict[str, Any], finished: bool = False) -> dict[str, Any]:
    """A run's settings without what may change on resume: the fields above, of every `train` section; LOOKS."""
    kept, changeable = {}, set() if finished else CHANGEABLE_ON_RESUME
    for name, value in settings.items():
        inner = binding(value, finished) if isinstance(value, dict) else value
        loose = {*FREE_ON_RESUME, *changeable} if name == "train" else LOOKS
        kept[name] = {k: v for k, v in inner.items() if k not in loose} if isinstance(inner, dict) else inner
    return kept


class TokenizerArchitecture(Section):
    """What rebuilds a tokenizer; travels in its checkpoint."""

    autoencoder: AutoencoderConfig = AutoencoderConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    quantizer: QuantizerConfig = QuantizerConfig()


class TokenizerConfig(TokenizerArchitecture):
    """A tokenizer and its training."""

    loss: TokenizerLossConfig = TokenizerLossConfig()
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    flip: bool = Field(True, description="mirror training images at random")
    codebook_alarm: float = Field(
        0.5, ge=0, le=1, description="warn while the codebook's usage over an even one's is lower; 0 = off"
    )
    train: TrainConfig

    @model_validator(mode="after")
    def _patches(self) -> Self:
        size, layers = self.autoencoder.resolution, self.discriminator.layers
        if self.loss.adversarial != "none" and size >> layers < 3:
            raise ValueError(f"discriminator.layers = {layers} leaves no patch of a {size}×{size} image; lower it")
        return self

    @model_validator(mode="after")
    def _codes_can_start(self) -> Self:
        q, (h, w) = self.quantizer, self.autoencoder.grid
        vectors = self.train.batch * h * w * (1 if q.codebooks == "per_step" else q.steps)
        if q.init != "normal" and vectors < q.codes:
            few = f"quantizer.init = {q.init}: {vectors} vectors in a batch for {q.codes} codes"
            raise ValueError(f"{few}; raise train.batch, or give quantizer.init=normal")
        return self


class NetworkConfig(Section):
    """The transformer, shared by the families."""

    depth: int = Field(16, gt=0, description="transformer blocks")
    width: int | None = Field(None, gt=0, description="D; default 64 × depth (Table 1)")
    heads: int | None = Field(None, gt=0, description="attention heads; default depth")
    positions: Literal["rope", "learned", "both"] = Field("rope", description="2-D RoPE, a learned table, or both")
    class_latents: bool = Field(False, description="a learned C-vector a class and position, added to the input")
    class_tokens: int = Field(0, ge=0, description="in-context tokens a class, dropped before the head")
    head: Literal["linear", "geometric"] = Field("linear", description="geometric also predicts z and scores by it")
    qk_norm: bool = Field(False, description="RMSNorm of queries and keys, a head at a time")

    @property
    def hidden(self) -> int:
        """D, the width of the residual stream."""
        return self.width or 64 * self.depth

    @property
    def head_count(self) -> int:
        """Attention heads."""
        return self.heads or self.depth

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.hidden % self.head_count or (self.hidden // self.head_count) % 4:
            raise ValueError(f"width / heads must be a multiple of 4, not {self.hidden} / {self.head_count}")
        return self


class GeneratorArchitecture(Section):
    """What rebuilds a generator, beside its tokenizer; travels in its checkpoint."""

    family: Literal["rdpm"] = Field("rdpm", description="generator family")
    network: NetworkConfig = NetworkConfig()


class ObjectiveConfig(Section):
    """How a training batch is drawn from the code store."""

    noise: Literal["cached", "fresh", "fresh-from-codes"] = Field(
        "cached", description="the store's draws; new ones on its latents z; new ones on z'_T of its codes"
    )
    steps_per_image: int = Field(1, ge=1, description="values of t an image and step; loss rows = batch × this")
    t_weights: Literal["uniform", "alpha"] = Field("uniform", description="t drawn uniformly, or ~ alpha_t + 0.2")
    perturb: float = Field(0.0, ge=0, description="a in z' + a·U·N(0,1), one U an image, targets unchanged")
    label_drop: float = Field(0.1, ge=0, le=1, description="probability of the null class")


class SamplingConfig(Section):
    """Defaults of `rdpm sample`, recorded in the checkpoint."""

    cfg: float = Field(0.0, ge=0, description="lambda of guidance; 0 = off")
    cfg_schedule: Literal["constant", "linear"] = Field("linear", description="linear: 0 at t = 1, lambda at t = T")
    tau: float = Field(1.0, gt=0, description="inverse temperature: 1 samples exactly, larger is greedier")
    skip_steps: int = Field(0, ge=0, description="first steps taken from the model-free guess, no network call")
    micro_batch: int = Field(8, gt=0, description="images a forward pass; part of what fixes a sample on the CPU")


class ProxyConfig(Section):
    """A score of a few samples while a generator trains: for comparing steps of one run, not for reporting."""

    samples: int = Field(0, ge=0, description="class-balanced, drawn from fixed seeds every train.eval_every; 0 = off")
    extractor: str | None = Field(None, description="a judge's file, for its features; default: Inception")
    weights: str | None = Field(None, description="Inception's weight file; default: looked up, never fetched")

    @model_validator(mode="after")
    def _enough(self) -> Self:
        if self.samples == 1:
            raise ValueError("proxy.samples = 1: a covariance needs at least 2")
        return self


class GeneratorConfig(GeneratorArchitecture):
    """A generator, its training and its sampling defaults."""

    attention: Literal["sdpa", "flash"] = Field("sdpa", description="in training; flash: the flash-attn package")
    recompute: bool = Field(False, description="activation checkpointing: each block's again in the backward pass")
    objective: ObjectiveConfig = ObjectiveConfig()
    train: TrainConfig
    sampling: SamplingConfig = SamplingConfig()
    proxy: ProxyConfig = ProxyConfig()


class JudgeConfig(Section):
    """A small classifier of real images, an honest extractor where Inception says little."""

    width: int = Field(32, gt=0, multiple_of=8, description="channels of the first layer")
    blocks: int = Field(0, ge=0, description="residual blocks after each halving; 1 or 2 for photographs")
    features: int = Field(64, gt=0, description="width of the penultimate layer")
    flip: bool = Field(False, description="mirror training images at random; not for digits and letters")
    train: TrainConfig


class Recipe(Section):
    """The whole way. A recipe may hold only the parts its commands need."""

    name: str = Field("", description="filled in with the file's name")
    seed: int = Field(0, ge=0, lt=2**63, description="of training and of the store's noise")
    classes: int = Field(1000, gt=0, description="for `rdpm inspect` alone; training counts the store's own")
    views: int = Field(1, ge=1, description="noise draws an image that the demo keeps in its store")
    tokenizer: TokenizerConfig | None = Field(None, description="for train-tokenizer")
    generator: GeneratorConfig | None = Field(None, description="for train-gen")
    judge: JudgeConfig | None = Field(None, description="for eval judge and the demo")

    def digest(self) -> str:
        """sha256 of the resolved recipe."""
        return files.digest(self.model_dump(mode="json"))

"""The tokenizer's section of a recipe: autoencoder, noise schedule, quantiser, losses. Imports no torch."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveInt, field_validator, model_validator

from rdpm_cli.errors import UsageError
from rdpm_cli.schema import FileName, Section, added
from rdpm_cli.training.config import TrainConfig

FEWEST_BANDS = 64  # of the log-mel presets


class AutoencoderConfig(Section):
    """The VQGAN encoder and decoder."""

    resolution: int = Field(256, gt=0, description="height and width of the images, pixels")
    width: int = Field(128, gt=0, description="channels at full resolution (VQGAN 128, VAR 160)")
    multipliers: tuple[PositiveInt, ...] = Field(
        (1, 1, 2, 2, 4), min_length=1, description="each level's channels / width"
    )
    res_blocks: int = Field(2, ge=1, description="residual blocks a level; the decoder has one more, as VQGAN")
    attention: bool = Field(True, description="self-attention at the lowest resolution")
    groups: int = Field(32, gt=0, description="groups of every GroupNorm")
    channels: int = Field(32, gt=0, description="C, channels of the latent z")
    features: int | None = Field(None, gt=0, description="channels outside quant_conv and post_quant_conv; default C")
    quant_kernel: Literal[1, 3] = Field(3, description="kernel of quant_conv and post_quant_conv (VAR 3, VQGAN 1)")
    latent_norm: Literal["layernorm", "affine", "none"] = Field(
        "layernorm", description="z = LN(E(x)) over channels, of the noise's scale; with a learnt affine; z = E(x)"
    )

    @property
    def grid(self) -> tuple[int, ...]:
        """Positions of the latent on each axis: (h, w) = (H/f, W/f), f = 2^(levels-1)."""
        return (self.resolution >> len(self.multipliers) - 1,) * 2

    @property
    def positions(self) -> int:
        """Positions of the latent of a training item."""
        return math.prod(self.grid)

    @model_validator(mode="after")
    def _sizes_divide(self) -> Self:
        factor = 2 ** (len(self.multipliers) - 1)
        if self.resolution % factor:
            raise ValueError(f"resolution {self.resolution} is not a multiple of f = {factor}")
        if any(m * self.width % self.groups for m in self.multipliers):
            raise ValueError(f"width × multipliers are not multiples of groups = {self.groups}")
        return self


class MelConfig(Section):
    """An encoder and decoder of log-mel spectrograms, convolutional in time. Items have any length."""

    kind: Literal["mel1d"]
    features: Literal["speech8", "speech16", "melvae22", "rvqvae44"] = Field(description="the log-mel preset")
    frames: int = Field(128, gt=0, description="length of a training window, frames")
    width: int = Field(128, gt=0, description="channels at the rate of frames")
    multipliers: tuple[PositiveInt, ...] = Field((1, 1, 1), min_length=1, description="each level's channels / width")
    res_blocks: int = Field(2, ge=1, description="residual blocks a level, dilated 1, 2, 1, 2, ...")
    final_blocks: int = Field(2, ge=0, description="ConvNeXt blocks at the end of the decoder")
    channels: int = Field(32, gt=0, description="C, channels of the latent z")
    latent_norm: Literal["layernorm", "affine", "none"] = Field(
        "layernorm", description="z = LN(E(x)) over channels, of the noise's scale; with a learnt affine; z = E(x)"
    )
    noise: float = Field(0.0, ge=0, description="standard deviation of noise on z in training")

    @property
    def stride(self) -> int:
        """Frames a latent, 2^(levels-1)."""
        return 1 << len(self.multipliers) - 1

    @property
    def grid(self) -> tuple[int, ...]:
        """(-1,): one axis, as long as the item."""
        return (-1,)

    @property
    def positions(self) -> int:
        """Positions of the latent of a training window."""
        return self.frames // self.stride

    @property
    def resolution(self) -> int:
        """Sound has none: commands of images ask for it."""
        raise UsageError(
            "this tokenizer is of sound, which the command cannot use", "see docs/sound.md for those of sound"
        )

    @model_validator(mode="after")
    def _whole_latents(self) -> Self:
        if self.frames % self.stride:
            raise ValueError(f"frames {self.frames} is not a multiple of the {self.stride} frames a latent")
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
    restart_below: float = Field(0.03, ge=0, lt=1, description="restart codes used less than this × the mean; 0 = off")
    dropout: float = added(0.0, "share of training items decoded from their first steps only, a number drawn for each")


class TokenizerLossConfig(Section):
    """Factors of the tokenizer's loss."""

    quant: float = Field(0.25, ge=0, description="factor of L_quant, Eq. 4")
    weight: bool = Field(True, description="gamma_t = alpha_t in L_quant; false: 1")
    quant_reduce: Literal["sum", "mean"] = added("sum", "L_quant over t: the sum, or the sum / sum of gamma_t")
    perceptual: Literal["lpips", "none"] = Field("none", description="L_lpips: LPIPS with VGG16, or no such term")
    perceptual_factor: float = Field(1.0, ge=0, description="factor of L_lpips")
    perceptual_weights: FileName | None = Field(None, description="VGG16 weight file; default: searched, never fetched")
    adversarial: Literal["hinge", "least_squares", "none"] = Field(
        "none", description="L_gan against a discriminator: VQGAN's, LSGAN's, or no such term"
    )
    adversarial_factor: float = Field(0.75, ge=0, description="factor of w L_gan")
    adaptive: bool = Field(True, description="w from last-layer gradients, as VQGAN; false: 1")
    feature_matching: Annotated[float, Field(ge=0)] = added(0.0, "of sound: factor of feature matching, inside L_gan")


class DiscriminatorConfig(Section):
    """The PatchGAN discriminator, where loss.adversarial is on; of sound one for each window and resolution."""

    width: int = Field(64, gt=0, multiple_of=8, description="channels of the first layer")
    layers: int = Field(3, ge=1, description="strided layers: 2 see patches of 34, 3 of 70 pixels")
    start: int = Field(0, ge=0, description="step from which the discriminator trains")
    warmup_steps: int = Field(0, ge=0, description="further steps before the tokenizer feels it fully: a linear ramp")
    windows: tuple[PositiveInt, ...] = added((32, 64, 128), "of sound: frames of random windows, judged as a whole")
    resolutions: tuple[PositiveInt, ...] = added((1, 2, 4), "of sound: frames and bands averaged, judged in patches")

    @model_validator(mode="after")
    def _some_critic(self) -> Self:
        if not self.windows + self.resolutions:
            raise ValueError("windows and resolutions are both empty; give one of them a value")
        return self


class TokenizerArchitecture(Section):
    """All that rebuilds a tokenizer; its checkpoint carries it."""

    autoencoder: AutoencoderConfig | MelConfig = AutoencoderConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    quantizer: QuantizerConfig = QuantizerConfig()

    @field_validator("autoencoder", mode="before")
    @classmethod
    def _of_its_kind(cls, value: Any) -> Any:
        """A plain section as the config of the kind that it names; without one it is of images."""
        if not isinstance(value, Mapping):
            return value
        return (MelConfig if "kind" in value else AutoencoderConfig).model_validate(value)


class TokenizerConfig(TokenizerArchitecture):
    """A tokenizer and its training."""

    loss: TokenizerLossConfig = TokenizerLossConfig()
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    flip: bool = Field(True, description="mirror training images at random")
    codebook_alarm: float = Field(0.5, ge=0, le=1, description="warn while usage over an even book's is lower; 0 = off")
    train: TrainConfig

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        q, auto, critic = self.quantizer, self.autoencoder, self.discriminator
        if isinstance(auto, MelConfig):
            if q.bias != "none":  # beyond the end of an item its convolution would see padding
                raise ValueError(f"quantizer.bias={q.bias} needs a fixed grid; give none for sound")
            if self.loss.perceptual != "none":
                raise ValueError("loss.perceptual is for images; leave it at none")
            if self.loss.adversarial != "none" and max(critic.windows, default=0) > auto.frames:
                raise ValueError(f"discriminator.windows {critic.windows}: items have {auto.frames} frames")
            coarsest = max(critic.resolutions, default=1)
            side = min(*critic.windows, auto.frames // coarsest, FEWEST_BANDS // coarsest)
            name = f"spectrogram of {side} frames or bands"
        else:
            if self.loss.feature_matching:
                raise ValueError("loss.feature_matching is for sound; leave it at 0")
            side, name = auto.resolution, f"{auto.resolution}×{auto.resolution} image"
        if self.loss.adversarial != "none" and side >> critic.layers < 3:
            raise ValueError(f"discriminator.layers = {critic.layers} leaves no patch of a {name}; lower it")
        vectors = self.train.batch * auto.positions * (1 if q.codebooks == "per_step" else q.steps)
        if q.init != "normal" and vectors < q.codes:
            raise ValueError(f"quantizer.init = {q.init}: {vectors} vectors for {q.codes} codes; raise train.batch")
        return self

"""Vocoders, which make waves of log-mel spectrograms: Griffin-Lim, and BigVGAN and Vocos from their authors' files.

BigVGAN (arXiv 2206.04658, and version 2) and Vocos (arXiv 2306.00814) have the published names of parameters.
Legend: F frames, M mel bands, D channels, n samples. A network takes one sound, (1, M, F), and gives (n,)."""

import itertools
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field, PositiveInt, model_validator
from torch import Tensor, nn

from rdpm_cli import checkpoint, files
from rdpm_cli.data.mel import Features, Mel, Wave, griffin_lim
from rdpm_cli.distributed import one_thread
from rdpm_cli.errors import CheckpointError, RecipeError, UsageError
from rdpm_cli.schema import Section, parse_yaml, validate

TAPS = 12  # of BigVGAN's low-pass filters, which resample by 2
LOUDEST = 100.0  # Vocos' largest magnitude


class Vocoder(NamedTuple):
    """wave: log-mel (F, M) -> (F · hop,). identity: for records, the name, and of a network the sha256 of its file."""

    wave: Callable[[Mel], Wave]
    identity: dict[str, str]

    @property
    def made_from(self) -> dict[str, str]:
        """The digest that binds a folder of sounds to a network; folders by Griffin-Lim name none."""
        return {"vocoder": self.identity["sha256"]} if "sha256" in self.identity else {}


class Published(Section):
    """The config next to a weight file: the spectrogram that the network takes. Keys of training are passed over."""

    model_config = ConfigDict(extra="ignore")

    rate: PositiveInt
    n_fft: PositiveInt
    window: PositiveInt
    hop: PositiveInt
    bands: PositiveInt
    fmin: float
    fmax: float | None
    scale: str = "slaney"
    norm: str | None = "slaney"
    floor: float

    @model_validator(mode="after")
    def _whole_spectrum(self) -> Self:
        return self if self.fmax else self.model_copy(update={"fmax": self.rate / 2})


class BigVGANConfig(Published):
    """config.json. The mel is librosa's, clamped to 1e-5."""

    rate: PositiveInt = Field(alias="sampling_rate")
    window: PositiveInt = Field(alias="win_size")
    hop: PositiveInt = Field(alias="hop_size")
    bands: PositiveInt = Field(alias="num_mels")
    floor: float = 1e-5
    resblock: Literal["1"]
    upsample_rates: tuple[PositiveInt, ...]
    upsample_kernel_sizes: tuple[PositiveInt, ...]
    upsample_initial_channel: PositiveInt
    resblock_kernel_sizes: tuple[PositiveInt, ...]
    resblock_dilation_sizes: tuple[tuple[PositiveInt, ...], ...]
    activation: Literal["snake", "snakebeta"]
    snake_logscale: bool
    use_tanh_at_final: bool = True  # false in version 2, which clamps
    use_bias_at_final: bool = True


class VocosConfig(Published):
    """config.yaml: classes and their arguments. The mel is torchaudio's with its defaults, clamped to 1e-7."""

    rate: PositiveInt = Field(alias="sample_rate")
    hop: PositiveInt = Field(alias="hop_length")
    bands: PositiveInt = Field(alias="n_mels")
    fmin: float = Field(0.0, alias="f_min")
    fmax: float | None = Field(None, alias="f_max")
    scale: str = Field("htk", alias="mel_scale")
    norm: str | None = None
    floor: float = 1e-7
    classes: tuple[
        Literal["vocos.models.VocosBackbone"],
        Literal["vocos.heads.ISTFTHead"],
        Literal["vocos.feature_extractors.MelSpectrogramFeatures"],
    ]
    dim: PositiveInt
    intermediate_dim: PositiveInt
    num_layers: PositiveInt

    @model_validator(mode="before")
    @classmethod
    def _flat(cls, raw: Any) -> dict[str, Any]:
        """All arguments together, of the spectrogram last: its own are those to compare."""
        try:
            parts = [raw[name] for name in ("backbone", "head", "feature_extractor")]
            arguments = {key: value for part in parts for key, value in part["init_args"].items()}
            classes = [part["class_path"] for part in parts]
            return {**arguments, "window": arguments["n_fft"], "classes": classes}
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"no class_path or init_args of backbone, head or feature_extractor: {error}") from error


def holder(name: str, *shape: int) -> nn.Module:
    """A module with one buffer, which the weight file fills."""
    module = nn.Module()
    module.register_buffer(name, torch.zeros(shape))
    return module


class Snake(nn.Module):
    """x + sin²(alpha x) / beta, beta = alpha for `snake`. Both have a value, or its logarithm, for each channel."""

    def __init__(self, cfg: BigVGANConfig, channels: int) -> None:
        super().__init__()
        self.log, self.alpha = cfg.snake_logscale, nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels)) if cfg.activation == "snakebeta" else None

    def forward(self, x_BDn: Tensor) -> Tensor:
        pair = self.alpha[:, None], (self.alpha if self.beta is None else self.beta)[:, None]
        alpha_D1, beta_D1 = (value.exp() for value in pair) if self.log else pair
        return x_BDn + (alpha_D1 * x_BDn).sin().square() / (beta_D1 + 1e-9)


class Activation(nn.Module):
    """Snake at twice the rate, so that its harmonics do not alias: BigVGAN §3.2."""

    def __init__(self, cfg: BigVGANConfig, channels: int) -> None:
        super().__init__()
        self.act, self.upsample = Snake(cfg, channels), holder("filter", 1, 1, TAPS)
        self.downsample = nn.ModuleDict({"lowpass": holder("filter", 1, 1, TAPS)})

    def forward(self, x_BDn: Tensor) -> Tensor:
        D, half = x_BDn.shape[1], TAPS // 2
        up, down = (self.get_buffer(f"{name}.filter").expand(D, 1, TAPS) for name in ("upsample", "downsample.lowpass"))
        x = F.pad(x_BDn, (half - 1, half - 1), mode="replicate")
        x = 2 * F.conv_transpose1d(x, up, stride=2, groups=D)[..., 3 * half - 3 : 3 - 3 * half]
        return F.conv1d(F.pad(self.act(x), (half - 1, half), mode="replicate"), down, stride=2, groups=D)


class AMPBlock(nn.Module):
    """x + conv(act(conv(act(x)))) for every dilation, which the first convolution has."""

    def __init__(self, cfg: BigVGANConfig, channels: int, kernel: int, dilations: tuple[int, ...]) -> None:
        super().__init__()
        conv = partial(nn.Conv1d, channels, channels, kernel, padding="same")
        self.convs1 = nn.ModuleList(conv(dilation=dilation) for dilation in dilations)
        self.convs2 = nn.ModuleList(conv() for _ in dilations)
        self.activations = nn.ModuleList(Activation(cfg, channels) for _ in range(2 * len(dilations)))

    def forward(self, x_BDn: Tensor) -> Tensor:
        acts = list(self.activations)
        for conv1, conv2, act1, act2 in zip(self.convs1, self.convs2, acts[::2], acts[1::2], strict=True):
            x_BDn = x_BDn + conv2(act2(conv1(act1(x_BDn))))
        return x_BDn


class BigVGAN(nn.Module):
    """Transposed convolutions up to the rate of samples, each followed by the mean of residual blocks."""

    def __init__(self, cfg: BigVGANConfig) -> None:
        super().__init__()
        self.tanh = cfg.use_tanh_at_final
        self.late = cfg.hop // 2  # samples before the centre of the first frame
        rates, kernels = cfg.upsample_rates, cfg.upsample_kernel_sizes
        widths = [cfg.upsample_initial_channel >> level for level in range(len(rates) + 1)]
        self.conv_pre = nn.Conv1d(cfg.bands, widths[0], 7, padding=3)
        self.ups, self.resblocks = nn.ModuleList(), nn.ModuleList()
        for (inputs, outputs), rate, kernel in zip(itertools.pairwise(widths), rates, kernels, strict=True):
            up = nn.ConvTranspose1d(inputs, outputs, kernel, rate, padding=(kernel - rate) // 2)
            self.ups.append(nn.Sequential(up))
            blocks = zip(cfg.resblock_kernel_sizes, cfg.resblock_dilation_sizes, strict=True)
            self.resblocks.extend(AMPBlock(cfg, outputs, *block) for block in blocks)
        self.activation_post = Activation(cfg, widths[-1])
        self.conv_post = nn.Conv1d(widths[-1], 1, 7, padding=3, bias=cfg.use_bias_at_final)

    def forward(self, mel_1MF: Tensor) -> Tensor:
        x, count = self.conv_pre(mel_1MF), len(self.resblocks) // len(self.ups)
        for level, up in enumerate(self.ups):
            x = up(x)
            x = torch.stack([block(x) for block in self.resblocks[level * count : (level + 1) * count]]).mean(0)
        x = self.conv_post(self.activation_post(x)).flatten()
        return x.tanh() if self.tanh else x.clamp(-1, 1)


class VocosBlock(nn.Module):
    """x + gamma W2 gelu(W1 norm(depthwise convolution of 7 frames)): ConvNeXt."""

    def __init__(self, cfg: VocosConfig) -> None:
        super().__init__()
        self.dwconv = nn.Conv1d(cfg.dim, cfg.dim, 7, padding=3, groups=cfg.dim)
        self.norm, self.gamma = nn.LayerNorm(cfg.dim, eps=1e-6), nn.Parameter(torch.zeros(cfg.dim))
        self.pwconv1, self.pwconv2 = nn.Linear(cfg.dim, cfg.intermediate_dim), nn.Linear(cfg.intermediate_dim, cfg.dim)

    def forward(self, x_BDF: Tensor) -> Tensor:
        y_BFD = self.norm(self.dwconv(x_BDF).mT)
        return x_BDF + (self.gamma * self.pwconv2(F.gelu(self.pwconv1(y_BFD)))).mT


class Vocos(nn.Module):
    """ConvNeXt blocks at the rate of frames, whose output is the spectrum of each: log magnitudes and phases."""

    late = 0

    def __init__(self, cfg: VocosConfig) -> None:
        super().__init__()
        self.hop, self.n_fft = cfg.hop, cfg.n_fft
        self.backbone = nn.ModuleDict({
            "embed": nn.Conv1d(cfg.bands, cfg.dim, 7, padding=3), "norm": nn.LayerNorm(cfg.dim, eps=1e-6),
            "convnext": nn.Sequential(*(VocosBlock(cfg) for _ in range(cfg.num_layers))),
            "final_layer_norm": nn.LayerNorm(cfg.dim, eps=1e-6),
        })  # fmt: skip
        self.head = nn.ModuleDict({"out": nn.Linear(cfg.dim, cfg.n_fft + 2), "istft": holder("window", cfg.n_fft)})

    def forward(self, mel_1MF: Tensor) -> Tensor:
        body = self.backbone
        x_BDF = body["convnext"](body["norm"](body["embed"](mel_1MF).mT).mT)
        logarithm, phase = self.head["out"](body["final_layer_norm"](x_BDF.mT)).mT.chunk(2, 1)
        spectrum, window = torch.polar(logarithm.exp().clamp_max(LOUDEST), phase), self.get_buffer("head.istft.window")
        # From the centre of the first frame on, also where the file's padding is `same`: (n_fft - hop) / 2 earlier.
        return torch.istft(spectrum, self.n_fft, self.hop, window=window, center=True)[0]


@torch.no_grad()
def neural_wave(network: BigVGAN | Vocos, hop: int, mel: Mel) -> Wave:
    """The wave (F · hop,) of a spectrogram (F, M), by a network."""
    # One frame more, as in griffin_lim: the wave ends a hop after the centre of the last frame.
    more_MF = torch.from_numpy(np.pad(mel, ((0, 1), (0, 0)), mode="edge").T)
    with one_thread():
        wave = network(more_MF[None].to(next(network.parameters()).device)).cpu().numpy()
    return wave[network.late : network.late + len(mel) * hop]


Networks = tuple[str, type[Published], Callable[[Any], BigVGAN | Vocos]]  # with the name of the config's file
NETWORKS: dict[str, Networks] = {
    "bigvgan": ("config.json", BigVGANConfig, BigVGAN), "vocos": ("config.yaml", VocosConfig, Vocos),
}  # fmt: skip
MARKS = ("conv_pre.bias", "backbone.embed.bias")  # names that only their weight files have


def open_vocoder(spec: str | None, features: Features, device: torch.device) -> Vocoder:
    """bigvgan:FILE or vocos:FILE, a generator's weight file with its config next to it; None: Griffin-Lim.

    Raises UsageError, and CheckpointError for files that are absent, of another layout or of other features."""
    if spec is None:
        return Vocoder(partial(griffin_lim, features=features), {"name": "griffin-lim"})
    name, _, file = spec.partition(":")
    if name not in NETWORKS or not file:
        raise UsageError(f"unknown vocoder '{spec}'", "give bigvgan:FILE or vocos:FILE, or leave --vocoder out")
    (config_file, section, make), path = NETWORKS[name], Path(files.local_path(file))
    hint = f"give the weight file that its authors publish, with its {config_file} next to it"
    try:
        text = (path.parent / config_file).read_text("utf-8")
        cfg = validate(section, parse_yaml(text, config_file), str(path.parent / config_file))
    except (OSError, UnicodeDecodeError, RecipeError) as error:
        raise CheckpointError(f"the config of {path} cannot be used: {error}", hint) from error
    _check_mel(path, cfg, features)
    content = checkpoint.read_tensors(path, hint=hint)
    content = content.get("generator", content) if isinstance(content, dict) else content  # of BigVGAN
    try:
        with torch.device("meta"):
            network = make(cfg)
        network.load_state_dict(_folded(checkpoint.named_tensors(content, MARKS)), assign=True)
    except (KeyError, ValueError, RuntimeError) as error:
        raise checkpoint.misfit(path, name, hint, error) from error
    network.eval().requires_grad_(False).to(device)
    return Vocoder(partial(neural_wave, network, features.hop), {"name": name, "sha256": files.sha256_file(path)})


def _check_mel(path: Path, file: Published, features: Features) -> None:
    """Raise CheckpointError where a vocoder takes another spectrogram than the tokenizer's."""
    here = {**features.model_dump(), "fmin": 0.0, "fmax": features.rate / 2, "scale": "slaney", "norm": "slaney"}
    for name, value in here.items():
        of_file = getattr(file, name)
        # a higher floor than the file's is within what its network was trained on
        if value < of_file if name == "floor" else value != of_file:
            message = f"{path} takes another spectrogram: {name} is {of_file} in its config, {value} in the tokenizer"
            raise CheckpointError(message, "give a vocoder of the tokenizer's spectrogram, or leave --vocoder out")


def _folded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by their names: weight normalisation (arXiv 1602.07868) folded, w = g v / |v| for each first index.

    Without the spectrogram in Vocos' files, which log_mel computes."""
    state = {name: value.float() for name, value in tensors.items() if not name.startswith("feature_extractor.")}
    for stem in [name.removesuffix("_g") for name in state if name.endswith(".weight_g")]:
        g, v = state.pop(f"{stem}_g"), state.pop(f"{stem}_v")
        state[stem] = g * v / v.norm(dim=(1, 2), keepdim=True)
    return state

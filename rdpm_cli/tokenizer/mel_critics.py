"""Critics of log-mel spectrograms, for a tokenizer that has no waves to show: CLaM-TTS's kinds (arXiv 2404.02781).

Some judge random windows of several lengths as a whole (HiFiSinger, arXiv 2009.01776), others the patches of all
frames at several resolutions, as multi-resolution discriminators of linear spectrograms (UnivNet, arXiv 2106.07889).
Shapes: x (B,M,F) log-mel in nats; L frames of a window, W windows."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdpm_cli.data.mel import PRESETS
from rdpm_cli.tokenizer.config import DiscriminatorConfig, MelConfig
from rdpm_cli.tokenizer.losses import Judgement
from rdpm_cli.tokenizer.mel_networks import Scale
from rdpm_cli.tokenizer.networks import PatchDiscriminator


def window(x_BMF: Tensor, place_B: Tensor, frames: int) -> Tensor:
    """The L frames of each spectrogram that begin at this share of those where one can: (B, M, L). place: in [0, 1]."""
    starts = x_BMF.shape[2] - frames + 1
    first_B = (place_B * starts).long().clamp_max(starts - 1)
    index_BL = first_B[:, None] + torch.arange(frames, device=x_BMF.device)
    return x_BMF.gather(2, index_BL[:, None].expand(-1, x_BMF.shape[1], -1))


class MelCritics(nn.Module):
    """A PatchGAN discriminator for each window and each resolution, on the tokenizer's scale of values."""

    def __init__(self, cfg: DiscriminatorConfig, auto: MelConfig, scale: Scale) -> None:
        super().__init__()
        bands = PRESETS[auto.features].bands
        self.windows, self.resolutions, self.scale = cfg.windows, cfg.resolutions, scale
        self.of_windows = nn.ModuleList(PatchDiscriminator(cfg, 1, (bands, frames)) for frames in cfg.windows)
        self.of_resolutions = nn.ModuleList(PatchDiscriminator(cfg, 1) for _ in cfg.resolutions)
        self.gan_weight = nn.Buffer(torch.zeros(()))  # as PatchDiscriminator's

    def forward(self, x_BMF: Tensor, place_BW: Tensor) -> Judgement:
        """Feature maps and logits of every critic. place: of the windows, in [0, 1]."""
        x_B1MF = self.scale(x_BMF)[:, None]
        views = [window(x_B1MF[:, 0], place_B, n)[:, None] for place_B, n in zip(place_BW.T, self.windows, strict=True)]
        views += [F.avg_pool2d(x_B1MF, n) for n in self.resolutions]
        critics = [*self.of_windows, *self.of_resolutions]
        return [critic.features(view) for critic, view in zip(critics, views, strict=True)]

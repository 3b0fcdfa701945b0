"""What samples of sound are asked to be: a text, and a prompt, whose latents are known.

A text's place in the sound comes from the durations of its units, or cross-attention finds it (`align`).
Legend: B rows, N units of a text, U units in all (number U: no text), S positions, C code width, D hidden width."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdpm_cli.generator.contract import Columns, Condition

PLACES = 4  # numbers that say where in its unit a position is
LONGEST = 8192  # positions of an item of any length: 5 minutes at 25 a second


class Places(NamedTuple):
    """Of each position: the unit that it belongs to, and where in the unit it is."""

    unit_BS: Tensor  # int64, 0 behind the end of a row
    exists_BS: Tensor  # bool
    known_BS: Tensor  # bool, of the prompt
    place_BS4: Tensor  # its share of the unit, log of the unit's length, log distances to both ends


def places(durations_BN: Tensor, known_B: Tensor, length: int) -> Places:
    """By the lengths of the units in latents, 0 behind the end of a text, and the number of units of the prompt.

    length: S."""
    ends_BN = durations_BN.cumsum(1)
    position_BS = torch.arange(length, device=durations_BN.device).repeat(len(durations_BN), 1)
    unit_BS = torch.searchsorted(ends_BN, position_BS, right=True)
    exists_BS = position_BS < ends_BN[:, -1:]
    unit_BS = unit_BS.masked_fill(~exists_BS, 0)
    length_BS, end_BS = durations_BN.gather(1, unit_BS).clamp_min(1), ends_BN.gather(1, unit_BS)
    after_BS = (end_BS - position_BS - 1).clamp_min(0)
    before_BS = (length_BS - 1 - after_BS).clamp_min(0)
    share_BS = (before_BS + 0.5) / length_BS
    place_BS4 = torch.stack([share_BS, length_BS.log(), before_BS.float().log1p(), after_BS.float().log1p()], -1)
    return Places(unit_BS, exists_BS, (unit_BS < known_B[:, None]) & exists_BS, place_BS4)


class SpeechCondition(nn.Module):
    """Columns of a store -> Condition. A position gets the embedding of its unit, and in the prompt its own latent.

    columns: `text` (B, N) of 0..U, -1 behind the end; `durations` (B, N) in latents; `known` (B,), the number of units
    of the prompt; `latents` (B, C, S), of which only the prompt's count."""

    def __init__(self, width: int, channels: int, units: int) -> None:
        super().__init__()
        self.null = units
        self.units = nn.Embedding(units + 1, width)
        self.place = nn.Linear(PLACES, width)
        self.convolutions = nn.ModuleList(nn.Conv1d(width, width, 5, padding=2) for _ in range(2))
        self.latent = nn.Linear(channels, width)
        self.voice = nn.Linear(channels, width)
        self.duration = DurationPredictor(width, channels, units)

    def forward(self, columns: Columns) -> Condition:
        text_BN, length = columns["text"].clamp_min(0), columns["latents"].shape[2]
        at = places(columns["durations"], columns["known"], length)
        unit_BS = text_BN.gather(1, at.unit_BS)
        named_BS1 = ((unit_BS != self.null) & at.exists_BS).unsqueeze(-1)
        exists_BS1, known_BS1 = at.exists_BS.unsqueeze(-1), at.known_BS.unsqueeze(-1)
        x_BSD = self.units(unit_BS) + self.place(at.place_BS4) * named_BS1
        for convolution in self.convolutions:  # a row does not see how far it is padded
            x_BSD = x_BSD + F.silu(convolution((x_BSD * exists_BS1).mT).mT)
        z_BSC = columns["latents"].mT * known_BS1
        x_BSD = x_BSD + self.latent(z_BSC) * known_BS1
        voice_BD = self.voice(mean_latent(z_BSC, known_BS1))
        return Condition(voice_BD, latents_BSD=x_BSD, exists_BS=at.exists_BS, known_BS=at.known_BS)

    @property
    def predictor(self) -> "DurationPredictor":
        return self.duration


def mean_latent(z_BSC: Tensor, known_BS1: Tensor) -> Tensor:
    """The mean latent of the prompt, (B, C); 0 without one."""
    return (z_BSC * known_BS1).sum(1) / known_BS1.sum(1).clamp_min(1)


class DurationPredictor(nn.Module):
    """Logarithms of the durations of units, in latents, by the unit, the mean latent and the pace of the prompt."""

    name, factor = "duration_error", 1.0  # of its loss in the log, and in the sum of losses

    def __init__(self, width: int, channels: int, units: int) -> None:
        super().__init__()
        self.units = nn.Embedding(units + 1, width)
        self.voice = nn.Linear(channels + 1, width)
        self.layers = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, columns: Columns) -> Tensor:
        """(B, N), of all units; those of the prompt are to be ignored. columns: as `SpeechCondition`."""
        text_BN, durations_BN, known_B = columns["text"], columns["durations"], columns["known"]
        number_N = torch.arange(text_BN.shape[1], device=text_BN.device)
        prompt_BN = number_N < known_B[:, None]
        log_BN = durations_BN.clamp_min(1).log()
        pace_B1 = (log_BN * prompt_BN).sum(1, keepdim=True) / prompt_BN.sum(1, keepdim=True).clamp_min(1)
        z_BSC = columns["latents"].mT
        voice_BC = mean_latent(z_BSC, places(durations_BN, known_B, z_BSC.shape[1]).known_BS.unsqueeze(-1))
        x_BD = self.voice(torch.cat([voice_BC, pace_B1], 1))
        return self.layers(self.units(text_BN.clamp_min(0)) + x_BD.unsqueeze(1)).squeeze(-1)

    def loss(self, columns: Columns) -> Tensor:
        """Squared error of the logarithm, a mean over the units behind the prompt of each row."""
        number_N = torch.arange(columns["text"].shape[1], device=columns["text"].device)
        wanted_BN = (number_N >= columns["known"][:, None]) & (columns["durations"] > 0)
        error_BN = (self(columns) - columns["durations"].clamp_min(1).log()).square()
        return ((error_BN * wanted_BN).sum(1) / wanted_BN.sum(1).clamp_min(1)).mean()


def sinusoids(place: Tensor, width: int) -> Tensor:
    """Cosines and sines of places, with periods of 2 pi to 20,000 pi: (..., width)."""
    speeds = torch.exp(-math.log(10000.0) * torch.arange(width // 2, device=place.device) / (width // 2))
    angles = place.float().unsqueeze(-1) * speeds
    return torch.cat([angles.cos(), angles.sin()], -1)


class TextCondition(nn.Module):
    """Columns of a store -> Condition. A text encoder makes tokens for cross-attention; the text's mean goes to AdaLN.

    columns: `text` (B, N) of 0..U, -1 behind the end, of the prompt and of what is to be said; `lengths` (B,), of the
    sound in latents; `known` (B, S) bool, the positions of the prompt; `latents` (B, C, S), of which these count."""

    def __init__(self, width: int, heads: int, depth: int, channels: int, units: int) -> None:
        super().__init__()
        self.width = width
        self.units = nn.Embedding(units + 1, width)
        self.encoder = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.pooled = nn.Linear(width, width)
        self.latent = nn.Linear(channels, width)
        self.voice = nn.Linear(channels, width)
        self.predictor = LengthPredictor(width, channels, units)

    def forward(self, columns: Columns) -> Condition:
        text_BN, known_BS1 = columns["text"], columns["known"].unsqueeze(-1)
        said_BN = text_BN >= 0
        place_N = torch.arange(text_BN.shape[1], device=text_BN.device)
        x_BND = self.units(text_BN.clamp_min(0)) + sinusoids(place_N, self.width)
        for layer in self.encoder:
            x_BND = layer(x_BND, src_key_padding_mask=~said_BN)
        x_BND = self.norm(x_BND)
        z_BSC = columns["latents"].mT * known_BS1
        vector_BD = self.pooled(mean_latent(x_BND, said_BN.unsqueeze(-1))) + self.voice(mean_latent(z_BSC, known_BS1))
        exists_BS = torch.arange(z_BSC.shape[1], device=z_BSC.device) < columns["lengths"][:, None]
        known_BSD = self.latent(z_BSC) * known_BS1
        return Condition(vector_BD, x_BND, said_BN, known_BSD, exists_BS, columns["known"])


class LengthPredictor(nn.Module):
    """A distribution of the length of an item, in latents, by its text and the prompt: log-logistic, of m and s.

    m starts at the log of the sum of a duration a unit."""

    name, factor = "length_ce", 0.1  # or its gradient would take most of the norm that train.clip leaves

    def __init__(self, width: int, channels: int, units: int) -> None:
        super().__init__()
        self.duration = nn.Embedding(units + 1, 1)  # of each unit, through a softplus
        self.voice = nn.Linear(channels + 2, width)
        self.layers = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2))

    def forward(self, columns: Columns) -> tuple[Tensor, Tensor]:
        """m and log s, (B,) each. columns: as `TextCondition`, without `lengths`."""
        text_BN, known_BS1 = columns["text"], columns["known"].unsqueeze(-1)
        duration_BN = F.softplus(self.duration(text_BN.clamp_min(0)).squeeze(-1)) * (text_BN >= 0)
        sum_B, known_B = duration_BN.sum(1).log(), known_BS1.sum((1, 2)).float().log1p()
        voice_BC = mean_latent(columns["latents"].mT * known_BS1, known_BS1)
        more_B2 = self.layers(self.voice(torch.cat([voice_BC, sum_B.unsqueeze(1), known_B.unsqueeze(1)], 1)))
        return sum_B + more_B2[:, 0], more_B2[:, 1]

    def loss(self, columns: Columns) -> Tensor:
        """Cross-entropy over whole lengths, as in arXiv 2406.11427: the mean over rows, 0 for those without text."""
        (m_B, log_s_B), length_B = self(columns), columns["lengths"]
        # F(S + 1/2) - F(S - 1/2) with F(x) = sigmoid((log x - m) / s), as sigmoid(a) sigmoid(-b) (1 - exp(b - a))
        b_B, a_B = (((length_B + half).log() - m_B) * (-log_s_B).exp() for half in (-0.5, 0.5))
        ce_B = F.softplus(-a_B) + F.softplus(b_B) - (-(b_B - a_B).expm1()).log()
        return (ce_B * (columns["text"][:, 0] < self.duration.num_embeddings - 1)).mean()

    def median(self, columns: Columns) -> Tensor:
        """(B,), a real number."""
        return self(columns)[0].exp()

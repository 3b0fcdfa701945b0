"""ResGen's head: a mixture of Gaussians in low-rank form, its losses, its draws.

Legend: B images, L positions, K components, H width of a code, r rank, D width of the transformer; in units of rho_k
w = z / rho_k, sp = sigma_psi / rho_k. No (B, L, K, H) tensor exists: at ImageNet's size one would hold 4 GiB."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rdpm_cli.distributed import full_precision
from rdpm_cli.generator.drawing import guide
from rdpm_cli.generator.transformer import zero_linear


@dataclass
class Mixture:
    """A mixture a position: pi = softmax(logits), mu_c = b + C_c + U Q_c, one scale s for all components."""

    logits_BLK: Tensor
    low_BLKr: Tensor  # Q
    shift_BLH: Tensor  # b
    scale_BL: Tensor  # s
    means_KH: Tensor  # C
    basis_Hr: Tensor  # U

    def guided(self, lambda_t: float, means: bool) -> "Mixture":
        """The first half of the rows, with its logits, and if `means` Q and b, guided away from the second half's."""
        # N(mu_c)^w N(mu_u)^(1-w) of equal variance is a Gaussian at exactly this mean, w = 1 + lambda.
        lambda_means = lambda_t if means else 0.0
        logits, shift = guide(self.logits_BLK, lambda_t), guide(self.shift_BLH, lambda_means)
        scale, low = self.scale_BL.chunk(2)[0], guide(self.low_BLKr, lambda_means)
        return Mixture(logits, low, shift, scale, self.means_KH, self.basis_Hr)


class MixtureHead(nn.Module):
    """Hidden states -> a mixture a position. What depends on the position starts at zero."""

    def __init__(self, width: int, channels: int, components: int, rank: int) -> None:
        super().__init__()
        self.sizes, self.rank = [components, components * rank, channels, 1], rank
        self.out = zero_linear(width, sum(self.sizes))
        self.means = nn.Parameter(0.5 * torch.randn(components, channels))
        self.basis = nn.Parameter(nn.init.orthogonal_(torch.empty(channels, rank)))

    def forward(self, hidden_BLD: Tensor, floor_BL: Tensor) -> Mixture:
        """floor: sp / 2, which no scale falls below."""
        with full_precision(hidden_BLD):
            logits, low, shift, log_scale = self.out(hidden_BLD.float()).split(self.sizes, -1)
            scale = torch.maximum(log_scale.squeeze(-1).clamp(-6.0, 3.0).exp(), floor_BL)
            return Mixture(logits, low.unflatten(-1, (-1, self.rank)), shift, scale, self.means, self.basis)


def squared_distances(mix: Mixture, w_BLH: Tensor) -> Tensor:
    """d2_c = |w - mu_c|², (B, L, K): v = w - b, G = U^T U,
    |v|² - 2 v.C_c + |C_c|² - 2 Q_c.(U^T v) + 2 Q_c.(U^T C_c) + Q_c^T G Q_c."""
    v, C, U, Q = w_BLH - mix.shift_BLH, mix.means_KH, mix.basis_Hr, mix.low_BLKr
    near = v.pow(2).sum(-1, keepdim=True) - 2 * v @ C.T + C.pow(2).sum(-1)
    cross = Q @ (U.T @ U) + 2 * (C @ U)  # (B, L, K, r): Q_c^T G + 2 U^T C_c
    low = (Q * cross).sum(-1) - 2 * (Q @ (v @ U).unsqueeze(-1)).squeeze(-1)
    return (near + low).clamp_min(0)


def divergences(mix: Mixture, w_BLH: Tensor, sp_BL: Tensor) -> Tensor:
    """KL_c = KL(N(w, sp² I) || N(mu_c, s² I)) = H (log(s / sp) - 1/2 + sp² / 2s²) + d2_c / 2s², (B, L, K)."""
    variance = mix.scale_BL.pow(2)
    # sp² / 2s² keeps s from falling to 0, as a density of vectors that are discrete would have it.
    shared = w_BLH.shape[-1] * ((mix.scale_BL / sp_BL).log() - 0.5 + sp_BL.pow(2) / (2 * variance))
    return shared.unsqueeze(-1) + squared_distances(mix, w_BLH) / (2 * variance).unsqueeze(-1)


def exact_nll(log_pi: Tensor, kl: Tensor) -> Tensor:
    """NLL = -logsumexp_c(log pi_c - KL_c), a bound of KL(q || mixture): (B, L)."""
    return -(log_pi - kl).logsumexp(-1)


def split_loss(log_pi: Tensor, kl: Tensor, detach: bool) -> Tensor:
    """CE + REG: -sum_c resp_c log pi_c - logsumexp_c(-KL_c), resp = softmax_c(-KL_c). At least NLL: (B, L)."""
    resp = (-kl.detach() if detach else -kl).softmax(-1)  # detach: no gradient of CE through resp
    return -(resp * log_pi).sum(-1) - (-kl).logsumexp(-1)


def clam_loss(log_pi: Tensor, kl: Tensor) -> Tensor:
    """sum_c resp_c (KL_c - log pi_c), CLaM-TTS's bound: CE + REG + entropy(resp). (B, L)."""
    return ((-kl).softmax(-1) * (kl - log_pi)).sum(-1)


def gaussian_nll(w_BLH: Tensor, sp_BL: Tensor) -> Tensor:
    """The model-free baseline, KL(N(w, sp² I) || N(0, (1 + sp²) I)): what is known from rho_k alone. (B, L)."""
    variance = 1 + sp_BL.pow(2)
    constant = 0.5 * ((variance / sp_BL.pow(2)).log() - 1 + sp_BL.pow(2) / variance)
    return w_BLH.shape[-1] * constant + w_BLH.pow(2).sum(-1) / (2 * variance)


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Probabilities of the smallest set that holds top_p of them, at least one; the others 0. Not normalised."""
    probabilities = logits.softmax(-1)
    if top_p == 1:
        return probabilities
    falling, order = probabilities.sort(stable=True, dim=-1, descending=True)
    inside = falling.cumsum(-1) - falling < top_p
    inside[..., 0] = True
    return probabilities * torch.zeros_like(inside).scatter(-1, order, inside)


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The component that a uniform number in [0, 1) falls on. probabilities: (..., K), not normalised. (...) int64."""
    heights = probabilities.double().cumsum(-1)
    point = uniform.double().unsqueeze(-1) * heights[..., -1:]
    return torch.searchsorted(heights, point, right=True).squeeze(-1).clamp_max(probabilities.shape[-1] - 1)


def vector_of(mix: Mixture, component_BL: Tensor, eps_BLH: Tensor, z_temp: float) -> Tensor:
    """w = b + C_c + U Q_c + z_temp s eps, (B, L, H)."""
    low_BLr = mix.low_BLKr.take_along_dim(component_BL[..., None, None], 2).squeeze(2)
    mean_BLH = mix.shift_BLH + mix.means_KH[component_BL] + low_BLr @ mix.basis_Hr.T
    return mean_BLH + z_temp * mix.scale_BL.unsqueeze(-1) * eps_BLH


def log_density(mix: Mixture, w_BLH: Tensor) -> Tensor:
    """log of the mixture's density at w, without the constant -H/2 log 2 pi: (B, L)."""
    inside = mix.logits_BLK.log_softmax(-1) - squared_distances(mix, w_BLH) / (2 * mix.scale_BL.pow(2)).unsqueeze(-1)
    return inside.logsumexp(-1) - w_BLH.shape[-1] * mix.scale_BL.log()

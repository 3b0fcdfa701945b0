"""What codes can be predicted without a network: z by its class mean, and by ridge regression on z'_{t-1} and class.

Legend: N rows, S positions, C channels, G groups of F features, K classes, T steps."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rdpm_cli import noise
from rdpm_cli.codes.store import CodeStore, evenly_spaced
from rdpm_cli.tokenizer.quantizer import Quantizer

FITTED_ROWS, READ_AT_ONCE = 20_000, 256  # training rows that are fitted, evenly spaced
FEATURES = 2048  # up to so many, C · S, all positions predict each position; beyond, each one only itself
# Of the features' mean variance. It only makes the equations solvable where some codes never occur: a direction with
# more than a millionth of that variance is hardly shrunk.
RIDGE = 1e-6


class Linear(NamedTuple):
    """z of (z'_{t-1}, class) at one t, on the CPU in fp32."""

    slopes_GFF: Tensor
    offsets_KGF: Tensor  # of the classes

    def predict(self, previous_BCS: Tensor, labels_B: Tensor) -> Tensor:
        """z, (B, C, S), on the device of `previous`."""
        x_GBF = grouped(previous_BCS, len(self.slopes_GFF))
        offsets_GBF = self.offsets_KGF[labels_B.cpu()].transpose(0, 1).to(x_GBF.device)
        z_BGF = (x_GBF @ self.slopes_GFF.to(x_GBF.device) + offsets_GBF).transpose(0, 1)
        B, C, S = previous_BCS.shape
        return z_BGF.reshape(B, C, S) if len(self.slopes_GFF) == 1 else z_BGF.transpose(1, 2)


def grouped(x_BCS: Tensor, groups: int) -> Tensor:
    """(G, B, F): all values of a row in one group, or each position in its own."""
    return x_BCS.flatten(1).unsqueeze(0) if groups == 1 else x_BCS.permute(2, 0, 1)


@torch.no_grad()
def fit(store: CodeStore, rows: noise.Ints, quantizer: Quantizer) -> list[Linear]:
    """Ridge regressions at t = 1..T on some of these rows. At t = 1, where z'_0 = 0, it is the class mean of z.

    z is the stored latent where there is one, else z'_T. The class enters as its one-hot, without a penalty: classes'
    means are subtracted. Beyond FEATURES values a position is predicted by the vector at the same position alone."""
    rows = evenly_spaced(rows, FITTED_ROWS)
    parts = np.array_split(rows, -(-len(rows) // READ_AT_ONCE))
    labels = [torch.from_numpy(store.columns["labels"][part].astype(np.int64)) for part in parts]
    codes = [torch.from_numpy(store.codes(part).astype(np.int32)) for part in parts]
    C, S = quantizer.books.shape[-1], codes[0].shape[-1]
    groups, classes = 1 if C * S <= FEATURES else S, len(store.manifest.class_names)

    def prefix(codes_BTS: Tensor, terms: int) -> Tensor:
        on_device = codes_BTS.to(quantizer.books.device)
        z = quantizer.prefix(on_device, torch.full((len(on_device),), terms, device=on_device.device))
        return grouped(z, groups).cpu().double()

    def latents(part: noise.Ints, codes_BTS: Tensor) -> Tensor:
        if not store.manifest.latents:
            return prefix(codes_BTS, quantizer.steps)
        return grouped(torch.from_numpy(store.latents(part).astype(np.float64)), groups)

    z_of_parts = [latents(part, codes_BTS).float() for part, codes_BTS in zip(parts, codes, strict=True)]
    fits = []
    for t in range(1, quantizer.steps + 1):
        moments = Moments(groups, C * S // groups, classes)
        for z_GBF, codes_BTS, labels_B in zip(z_of_parts, codes, labels, strict=True):
            moments.add(prefix(codes_BTS, t - 1), z_GBF.double(), labels_B)
        fits.append(moments.solve())
    return fits


@torch.no_grad()
def sample(fits: Sequence[Linear], quantizer: Quantizer, labels_B: Tensor, eps_BTCS: Tensor) -> Tensor:
    """Codes of the regressions as a generator: C_t = Q(alpha_t (z - z'_{t-1}) + beta_t eps_t), z predicted at each t.

    (B, T, S) int64."""
    previous_BCS, codes = torch.zeros_like(eps_BTCS[:, 0]), []
    for t, linear in enumerate(fits, 1):
        z_BCS = linear.predict(previous_BCS, labels_B)
        codes_BS = quantizer.guess(previous_BCS - z_BCS, eps_BTCS[:, t - 1], t)
        previous_BCS = previous_BCS + quantizer.bias(quantizer.look_up(codes_BS, t))
        codes.append(codes_BS)
    return torch.stack(codes, 1)


class Moments:
    """Sums in float64 over rows of x and z, of the normal equations."""

    def __init__(self, groups: int, features: int, classes: int) -> None:
        self.xx_GFF = torch.zeros(groups, features, features, dtype=torch.float64)
        self.xz_GFF = torch.zeros_like(self.xx_GFF)
        self.x_KGF = torch.zeros(classes, groups, features, dtype=torch.float64)
        self.z_KGF = torch.zeros_like(self.x_KGF)
        self.count_K = torch.zeros(classes, dtype=torch.float64)

    def add(self, x_GBF: Tensor, z_GBF: Tensor, labels_B: Tensor) -> None:
        self.xx_GFF += x_GBF.mT @ x_GBF
        self.xz_GFF += x_GBF.mT @ z_GBF
        self.x_KGF.index_add_(0, labels_B, x_GBF.transpose(0, 1))
        self.z_KGF.index_add_(0, labels_B, z_GBF.transpose(0, 1))
        self.count_K += labels_B.bincount(minlength=len(self.count_K))

    def solve(self) -> Linear:
        """The regression; a class without rows has the mean of all."""
        count_K11, seen_K11 = self.count_K.view(-1, 1, 1), self.count_K.view(-1, 1, 1) > 0
        means = [
            torch.where(seen_K11, total / count_K11.clamp_min(1), total.sum(0) / self.count_K.sum())
            for total in (self.x_KGF, self.z_KGF)
        ]
        weighted_GFK = (means[0] * count_K11).permute(1, 2, 0)
        inside_GFF = self.xx_GFF - weighted_GFK @ means[0].transpose(0, 1)
        across_GFF = self.xz_GFF - weighted_GFK @ means[1].transpose(0, 1)
        diagonal_GF = inside_GFF.diagonal(dim1=1, dim2=2)
        diagonal_GF += RIDGE * diagonal_GF.mean(1, keepdim=True) + 1e-12  # at t = 1 all else is 0
        slopes_GFF = torch.linalg.solve(inside_GFF, across_GFF)
        offsets_KGF = means[1] - torch.einsum("kgf,gfe->kge", means[0], slopes_GFF)
        return Linear(slopes_GFF.float(), offsets_KGF.float())

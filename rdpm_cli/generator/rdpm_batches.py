"""RDPM's batches: stored codes, values of t, and the noise that the tokenizer saw.

Legend: B images, S values of t an image, T steps, C code width, H W grid.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rdpm_cli import noise
from rdpm_cli.codes.store import CodeStore
from rdpm_cli.config import RDPMConfig
from rdpm_cli.errors import DataError
from rdpm_cli.generator.batches import StoreBatches
from rdpm_cli.tokenizer.quantizer import Quantizer


@dataclass
class CodeBatch:
    """A batch of one process."""

    codes_BTHW: Tensor  # int64
    labels_B: Tensor  # int64; the null class where the label was dropped
    t_BS: Tensor  # int64, 1..T
    eps_BSCHW: Tensor | None  # the noise of those steps; None: drawn fresh on the device
    z_BCHW: Tensor | None  # stored latents, fp32; None: z'_T of the codes stands for them
    spread_B: Tensor | None  # a·U of the perturbation of z'_{t-1}, one an image

    def to(self, device: torch.device) -> "CodeBatch":
        """The same batch on a device."""
        moved: dict[str, Any] = {k: None if v is None else v.to(device) for k, v in vars(self).items()}
        return CodeBatch(**moved)


def blank(cfg: RDPMConfig, quantizer: Quantizer, grid: tuple[int, int], rows: int) -> CodeBatch:
    """A micro-batch of the right shapes, for measuring what a step takes."""
    C, S = quantizer.books.shape[-1], cfg.objective.steps_per_image
    return CodeBatch(
        codes_BTHW=torch.zeros(rows, quantizer.steps, *grid, dtype=torch.int64),
        labels_B=torch.zeros(rows, dtype=torch.int64),
        t_BS=torch.ones(rows, S, dtype=torch.int64),
        eps_BSCHW=torch.zeros(rows, S, C, *grid),  # also where noise is fresh: drawing it leaves nothing behind
        z_BCHW=None,
        spread_B=torch.zeros(rows) if cfg.objective.perturb else None,
    )


class CodeBatches(StoreBatches):
    """batch_at(step, rows): codes, labels and t of a training step, a pure function of (seed, step)."""

    def __init__(self, store: CodeStore, cfg: RDPMConfig, quantizer: Quantizer, seed: int) -> None:
        """quantizer: for its schedule. Raises DataError where fresh noise needs latents that the store lacks."""
        if cfg.objective.noise == "fresh" and not store.manifest.latents:
            raise DataError(
                f"{store.root} keeps no latents, so fresh noise cannot be drawn",
                f"run `rdpm tokenize {store.manifest.data.source} NEW_FOLDER --keep latents`, or train with "
                "objective.noise=fresh-from-codes (new noise on what the codes decode to) or objective.noise=cached",
            )
        super().__init__(store, cfg.train.batch, seed)
        self.cfg = cfg
        self.latents = store.manifest.latents and cfg.objective.noise != "fresh-from-codes"
        alphas = np.array(quantizer.alphas)
        weights = alphas + 0.2 if cfg.objective.t_weights == "alpha" else np.ones(len(alphas))
        self.cumulative = np.cumsum(weights / weights.sum())

    def batch_at(self, step: int, rows: range) -> CodeBatch:
        """rows: this process's rows of the global batch."""
        objective, m = self.cfg.objective, self.store.manifest
        own = self.own(step, rows)
        drawn = noise.block_uniform(self.seed, step, rows, 3)
        t_BS = self.draw_t(drawn[:, 0])
        eps = None
        if objective.noise == "cached":
            S, shape = t_BS.shape[1], (m.channels, *m.grid)
            index, view = self.store.index[own].repeat(S), self.store.view(own).repeat(S)
            flat = noise.normal_rows("encode", m.seed, index.tolist(), view.tolist(), t_BS.flatten().tolist(), shape)
            eps = torch.from_numpy(flat.reshape(len(own), S, *shape))
        return CodeBatch(
            codes_BTHW=torch.from_numpy(self.codes(own)),
            labels_B=torch.from_numpy(self.labels_or_null(own, drawn[:, 1], objective.label_drop)),
            t_BS=torch.from_numpy(t_BS),
            eps_BSCHW=eps,
            z_BCHW=torch.from_numpy(self.store.latents(own).astype(np.float32)) if self.latents else None,
            spread_B=torch.from_numpy(objective.perturb * drawn[:, 2]) if objective.perturb else None,
        )

    def draw_t(self, uniform_B: NDArray[np.float32]) -> NDArray[np.int64]:
        """S values of t an image, one from each S-th of the distribution: their mixture follows the weights."""
        S = self.cfg.objective.steps_per_image
        points = (uniform_B.astype(np.float64)[:, None] + np.arange(S)) / S
        return np.searchsorted(self.cumulative, np.minimum(points, 1 - 1e-9), side="right").astype(np.int64) + 1

    def held_out_batches(self) -> Iterator[CodeBatch]:
        """Codes, labels and all T noises of held-out rows: images and noise that training never saw."""
        m = self.store.manifest
        for own in self.held_out_rows():
            index, view = self.store.index[own].tolist(), self.store.view(own).tolist()
            eps = noise.normal_steps("encode", m.seed, index, view, m.steps, (m.channels, *m.grid))
            yield CodeBatch(
                codes_BTHW=torch.from_numpy(self.codes(own)),
                labels_B=torch.from_numpy(self.labels(own)),
                t_BS=torch.arange(1, m.steps + 1).expand(len(own), -1),
                eps_BSCHW=torch.from_numpy(eps),
                z_BCHW=None,
                spread_B=None,
            )

"""Training a generator on cached codes, as the training loop sees it."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rdpm_cli import noise
from rdpm_cli.codes.store import CodeStore
from rdpm_cli.config import GeneratorConfig
from rdpm_cli.errors import DataError, some_of
from rdpm_cli.generator.contract import CodeBatch, Generator
from rdpm_cli.step import TrainStep

EVALUATED_ROWS = 256  # held-out rows measured at most


class CodeBatches:
    """batch_at(step, rows): codes, labels and t of a training step, a pure function of (seed, step)."""

    def __init__(self, store: CodeStore, cfg: GeneratorConfig, alphas: list[float], seed: int) -> None:
        if cfg.objective.noise == "fresh" and not store.manifest.latents:
            raise DataError(
                f"{store.root} keeps no latents, so fresh noise cannot be drawn",
                f"run `rdpm tokenize {store.manifest.data.source} NEW_FOLDER --keep latents`, or train with "
                "objective.noise=fresh-from-codes (new noise on what the codes decode to) or objective.noise=cached",
            )
        self.store, self.cfg, self.seed = store, cfg, seed
        self.rows, self.held_out = store.split()
        self.latents = store.manifest.latents and cfg.objective.noise != "fresh-from-codes"
        weights = np.array(alphas) + 0.2 if cfg.objective.t_weights == "alpha" else np.ones(len(alphas))
        self.cumulative = np.cumsum(weights / weights.sum())

    @property
    def images(self) -> int:
        """Training images, the unit of an epoch."""
        return len(self.rows) // self.store.manifest.views

    def batch_at(self, step: int, rows: range) -> CodeBatch:
        """rows: this process's rows of the global batch."""
        objective, m = self.cfg.objective, self.store.manifest
        own = self._own(step, rows)
        drawn = noise.block_uniform(self.seed, step, rows, 3)
        t_BS = self.draw_t(drawn[:, 0])
        labels = np.where(drawn[:, 1] < objective.label_drop, len(m.class_names), self.store.labels[own])
        eps = None
        if objective.noise == "cached":
            S, shape = t_BS.shape[1], (m.channels, *m.grid)
            index, view = self.store.index[own].repeat(S), self.store.view(own).repeat(S)
            flat = noise.normal_rows("encode", m.seed, index.tolist(), view.tolist(), t_BS.flatten().tolist(), shape)
            eps = torch.from_numpy(flat.reshape(len(own), S, *shape))
        return CodeBatch(
            codes_BTHW=torch.from_numpy(self.store.codes(own).astype(np.int64)),
            labels_B=torch.from_numpy(labels.astype(np.int64)),
            t_BS=torch.from_numpy(t_BS),
            eps_BSCHW=eps,
            z_BCHW=torch.from_numpy(self.store.latents(own).astype(np.float32)) if self.latents else None,
            spread_B=torch.from_numpy(objective.perturb * drawn[:, 2]) if objective.perturb else None,
        )

    def _own(self, step: int, rows: range) -> NDArray[np.int64]:
        """Rows of the store."""
        return self.rows[
            noise.epoch_rows(self.seed, step, self.cfg.train.batch, len(self.rows))[rows.start : rows.stop]
        ]

    def describe(self, step: int, rows: range) -> str:
        """The source indices and views of those rows."""
        own = self._own(step, rows)
        pairs = zip(self.store.index[own].tolist(), self.store.view(own).tolist(), strict=True)
        return f"images:views {some_of(f'{index}:{view}' for index, view in pairs)}"

    def draw_t(self, uniform_B: NDArray[np.float32]) -> NDArray[np.int64]:
        """S values of t an image, one from each S-th of the distribution: their mixture follows the weights."""
        S = self.cfg.objective.steps_per_image
        points = (uniform_B.astype(np.float64)[:, None] + np.arange(S)) / S
        return np.searchsorted(self.cumulative, np.minimum(points, 1 - 1e-9), side="right").astype(np.int64) + 1

    def held_out_batches(self, size: int = 32) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """codes, labels and all T noises of held-out rows: images and noise that training never saw."""
        m = self.store.manifest
        chosen = self.held_out[:: max(1, len(self.held_out) // EVALUATED_ROWS)][:EVALUATED_ROWS]
        for start in range(0, len(chosen), size):
            own = chosen[start : start + size]
            index, view = self.store.index[own].tolist(), self.store.view(own).tolist()
            eps = noise.normal_steps("encode", m.seed, index, view, m.steps, (m.channels, *m.grid))
            codes = torch.from_numpy(self.store.codes(own).astype(np.int64))
            yield codes, torch.from_numpy(self.store.labels[own].astype(np.int64)), torch.from_numpy(eps)


class GeneratorTask:
    """One player: the family's network."""

    name = "generator"
    start = 0

    def __init__(self, generator: Generator) -> None:
        self.generator = generator

    @property
    def model(self) -> nn.Module:
        """What is trained."""
        return self.generator.network

    def networks(self) -> list[nn.Module]:
        """The whole, but for its heads, which are a layer each."""
        return [self.generator.network]

    def loss(self, batch: CodeBatch, step: TrainStep) -> tuple[Tensor, dict[str, Tensor]]:
        """The family's loss."""
        return self.generator.loss(batch, step)

    def after_step(self, step: TrainStep) -> dict[str, Tensor]:
        """Nothing follows a step."""
        return {}


def held_out_accuracy(generator: Generator, batches: CodeBatches, device: torch.device) -> dict[str, list[float]]:
    """The family's per-t measurements on held-out codes under held-out noise, next to the model-free baseline."""
    total: dict[str, Tensor] = {}
    seen = 0
    for codes, labels, eps in batches.held_out_batches():
        found = generator.accuracy(codes.to(device), labels.to(device), eps.to(device))
        seen += len(labels)
        for name, value in found.items():
            total[name] = total.get(name, torch.zeros_like(value)) + value * len(labels)
    return {name: (value / seen).tolist() for name, value in total.items()}

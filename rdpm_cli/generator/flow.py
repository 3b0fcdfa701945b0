"""Flow matching on the stored latents, the continuous baseline: velocity prediction (SiT, arXiv 2401.08740).

x_t = (1 - t) z + t eps, v = eps - z, t from 0 at the latents to 1 at the noise. Samples pass through the quantiser, so
that every family ends at codes, and at the decoder that was trained on them.

Legend: B images, C width of a code, S positions, W width of the transformer, T steps of the tokenizer."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdpm_cli import noise
from rdpm_cli.codes.store import CodeStore, evenly_spaced
from rdpm_cli.distributed import TrainStep
from rdpm_cli.errors import DataError, UsageError
from rdpm_cli.generator.config import FlowConfig, TransformerConfig
from rdpm_cli.generator.contract import Batch, Columns, Condition, Generator, GeneratorBatches, Known, SampleOptions
from rdpm_cli.generator.drawing import guide, to_device
from rdpm_cli.generator.tokens import refuse_sound
from rdpm_cli.generator.transformer import Transformer, zero_linear
from rdpm_cli.tokenizer.quantizer import Quantizer

TIMES = 10  # at which held-out latents are measured: .05, .15, ..., .95
MEASURED_ROWS = 2048  # training rows whose scale is measured, evenly spaced


@dataclass
class LatentBatch(Batch):
    """Latents, and the times at which their velocity is to be predicted."""

    z_BCS: Tensor  # fp32
    t_B: Tensor
    eps_BCS: Tensor | None = None  # None: drawn on the device


class LatentBatches(GeneratorBatches):
    """Latents, labels and times of a training step."""

    def __init__(self, store: CodeStore, cfg: FlowConfig, quantizer: Quantizer, seed: int) -> None:
        if not store.manifest.latents:
            reason = f"{store.root} keeps no latents, which the family flow learns"
            raise DataError(reason, f"run `{store.keeping_latents}`")
        super().__init__(store, cfg, quantizer, seed)

    @staticmethod
    def blank(cfg: FlowConfig, quantizer: Quantizer, rows: int, spoken: tuple[int, int] | None = None) -> LatentBatch:
        C, S = quantizer.books.shape[-1], math.prod(quantizer.grid)
        columns = GeneratorBatches.blank_columns(cfg, C, rows, spoken)
        codes = torch.zeros(rows, quantizer.steps, S).long()
        return LatentBatch(codes, columns, torch.zeros(rows, C, S), torch.zeros(rows))

    def batch_at(self, step: int, rows: range) -> LatentBatch:
        store_rows, uniform_B2 = self.rows_at(step, rows), noise.block_uniform(self.seed, step, rows, 2)
        codes, columns = self.read(store_rows, uniform_B2[:, 1])
        return LatentBatch(codes, columns, self._latents(store_rows), torch.from_numpy(uniform_B2[:, 0].copy()))

    def _latents(self, store_rows: noise.Ints) -> Tensor:
        return torch.from_numpy(self.store.latents(store_rows).astype(np.float32))

    def held_out_batches(self) -> Iterator[LatentBatch]:
        """Held-out rows at TIMES evenly spaced times, under noise that is always the same."""
        for store_rows in self.held_out_rows():
            (codes, columns), z_BCS = self.read(store_rows), self._latents(store_rows)
            for number in range(TIMES):
                addresses = *self.addresses(store_rows), [number] * len(store_rows)
                eps = torch.from_numpy(noise.normal_rows("flow", 0, *addresses, z_BCS.shape[1:]))
                yield LatentBatch(codes, columns, z_BCS, torch.full((len(codes),), (number + 0.5) / TIMES), eps)


class FlowNetwork(nn.Module):
    """v(x_t, t, y): Linear(C -> W), transformer, Linear(W -> C), which starts at zero."""

    def __init__(self, cfg: TransformerConfig, quantizer: Quantizer, classes: int) -> None:
        super().__init__()
        channels = quantizer.books.shape[-1]
        self.input = nn.Linear(channels, cfg.hidden)
        self.trunk = Transformer(cfg, quantizer.grid, channels, classes)
        self.head = zero_linear(cfg.hidden, channels)
        self.scale = nn.Buffer(torch.ones(()))  # RMS of the latents, by which they are divided

    def forward(self, x_BCS: Tensor, t_B: Tensor, condition: Condition) -> Tensor:
        """The velocity, (B, C, S) fp32."""
        hidden = self.trunk(self.input(x_BCS.mT).float(), 1000.0 * t_B, condition)
        return self.head(hidden).float().mT


class Flow(Generator):
    """The family: squared error of the velocity, sampling by a solver of the ordinary differential equation."""

    network: FlowNetwork

    def __init__(self, cfg: TransformerConfig, quantizer: Quantizer, classes: int) -> None:
        self.quantizer, self.classes = quantizer, classes
        self.network = FlowNetwork(cfg, quantizer, classes)

    check_codes = staticmethod(refuse_sound)

    def begin(self, cfg: FlowConfig, store: CodeStore) -> dict[str, Any]:
        rows = evenly_spaced(store.split()[0], MEASURED_ROWS)
        scale = float(np.sqrt(np.square(store.latents(rows).astype(np.float64)).mean()))
        self.network.scale.fill_(scale)
        return {"latent_scale": scale}

    def _errors(self, batch: LatentBatch, eps_BCS: Tensor) -> Tensor:
        """Squared error of the velocity, (B, C, S)."""
        t_B11, z_BCS = batch.t_B.view(-1, 1, 1), batch.z_BCS / self.network.scale
        x_BCS = (1 - t_B11) * z_BCS + t_B11 * eps_BCS
        velocity = self.network(x_BCS, batch.t_B, self.condition(batch.columns))
        return F.mse_loss(velocity, eps_BCS - z_BCS, reduction="none")

    def loss(self, batch: LatentBatch, step: TrainStep) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error of the velocity."""
        mse = self._errors(batch, step.normal(*batch.z_BCS.shape[1:])).mean()
        return mse, {"mse": mse.detach()}

    @torch.no_grad()
    def held_out(self, batch: LatentBatch, baselines: None = None) -> dict[str, Tensor]:
        """By time: mean squared error of the velocity, and `baseline`, that of the best multiple of x_t, z white."""
        assert batch.eps_BCS is not None
        number_B = (batch.t_B * TIMES).long()
        mse_B, t_B = self._errors(batch, batch.eps_BCS).mean((1, 2)), batch.t_B
        # z and eps of variance 1 and independent: E[v | x] = (2t - 1) / ((1 - t)² + t²) x
        linear_B = 2 - (2 * t_B - 1).square() / ((1 - t_B).square() + t_B.square())
        count = number_B.bincount(minlength=TIMES)
        return {
            name: torch.stack([values.new_zeros(TIMES).index_add_(0, number_B, values), count])
            for name, values in (("mse", mse_B), ("baseline", linear_B))
        }

    def check(self, options: SampleOptions) -> None:
        """All options of the family serve any checkpoint of it."""

    def check_known(self, keep_BTS: Tensor) -> None:
        if bool((keep_BTS != keep_BTS[:, :1]).any()):
            reason = "the family flow draws the latents of a position at once and cannot keep some of its codes"
            raise UsageError(reason, "give --mask without --from-step")

    def passes(self, options: SampleOptions, first: int = 1) -> int:
        s = options.sampling
        return s.steps * (1 + (s.solver == "heun")) * (2 if s.cfg else 1)

    @torch.no_grad()
    def sample(self, columns: Columns, indices_B: Tensor, options: SampleOptions, known: Known | None = None) -> Tensor:
        """From noise at t = 1 to latents at t = 0 along the guided velocity, then their codes. codes_BTS.

        Known positions follow the line from their noise to the known latents."""
        condition, s, indices = self.condition(columns), options.sampling, indices_B.tolist()
        quantizer, B, device = self.quantizer, len(indices), condition.vector_BD.device
        shape, zeros = (quantizer.books.shape[-1], math.prod(quantizer.grid)), [0] * B
        eps = to_device(noise.normal_rows("sample", options.seed, indices, zeros, zeros, shape), device)
        keep_B1S, z_known = torch.zeros(B, 1, shape[1], dtype=torch.bool, device=device), torch.zeros_like(eps)
        if known is not None:
            self.check_known(known.keep_BTS)
            keep_B1S, z_known = known.keep_BTS[:, :1], quantizer.decode(known.codes_BTS) / self.network.scale
        both = condition.joined(self.null_condition(columns)) if s.cfg else condition

        def velocity(x_BCS: Tensor, t: float) -> Tensor:
            inputs = x_BCS.repeat(2, 1, 1) if s.cfg else x_BCS
            v = self.network(inputs, torch.full((len(inputs),), t, device=device), both)
            return torch.where(keep_B1S, eps - z_known, guide(v, s.cfg) if s.cfg else v)

        x_BCS = eps
        for number in range(s.steps):
            t, following = 1 - number / s.steps, 1 - (number + 1) / s.steps
            v = velocity(x_BCS, t)
            ahead = x_BCS + (following - t) * v
            if s.solver == "heun":
                ahead = x_BCS + (following - t) * 0.5 * (v + velocity(ahead, following))
            x_BCS = ahead
        noise_BTCS = noise.normal_steps("sample", options.seed, indices, zeros, quantizer.steps, shape)
        codes = quantizer.encode(x_BCS * self.network.scale, to_device(noise_BTCS, device))
        return codes if known is None else torch.where(known.keep_BTS, known.codes_BTS, codes)

"""RDPM: recurrent token prediction (arXiv 2412.18390 §3.2, Alg. 2), and the options beyond the paper (DESIGN §2).

Legend: B images, R rows (images × values of t; in a batch, values of t an image), T steps, C code width,
S positions of the flattened grid (L where they are tokens), K codes, D width.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from numpy.typing import NDArray
from torch import Tensor, nn

from rdpm_cli import noise
from rdpm_cli.codes.store import CodeStore
from rdpm_cli.device import full_precision, one_thread
from rdpm_cli.distributed import TrainStep
from rdpm_cli.errors import DataError, UsageError
from rdpm_cli.generator import drawing
from rdpm_cli.generator.batches import StoreBatches
from rdpm_cli.generator.conditions import class_condition, null_condition
from rdpm_cli.generator.config import GeneratorConfig, NetworkConfig, RDPMArchitecture, RDPMConfig, RDPMSampling
from rdpm_cli.generator.contract import Condition, Known, SampleOptions, Tally
from rdpm_cli.generator.transformer import Transformer
from rdpm_cli.tokenizer.config import TokenizerArchitecture
from rdpm_cli.tokenizer.quantizer import Quantizer, beta

LOGIT_SCALE = 0.5  # s_t at the start
LOGITS_AT_ONCE = 1 << 26  # fp32 values held at once in training: 256 MiB; d16's 128 images have twice as many
# The learnt number under the softplus is multiplied by this: s_t must reach about 1 / (2 var(mu)), which is 5 to 50,
# and Adam moves a number by about its learning rate a step. Without it s_t was still rising when training ended.
SCALE_GAIN = 20.0


def tokens(x_BCS: Tensor) -> Tensor:
    """(B, C, S) -> (B, S, C)."""
    return x_BCS.transpose(1, 2)


@dataclass
class CodeBatch:
    """A batch of one process."""

    codes_BTS: Tensor  # int64
    labels_B: Tensor  # int64; the null class where the label was dropped
    t_BR: Tensor  # int64, 1..T
    eps_BRCS: Tensor | None  # the noise of those steps; None: drawn fresh on the device
    z_BCS: Tensor | None  # stored latents, fp32; None: z'_T of the codes is used instead
    spread_B: Tensor | None  # a·U of the perturbation of z'_{t-1}, one an image

    def to(self, device: torch.device) -> "CodeBatch":
        """The same batch on a device."""
        moved: dict[str, Any] = {k: None if v is None else v.to(device) for k, v in vars(self).items()}
        return CodeBatch(**moved)


def blank(cfg: RDPMConfig, quantizer: Quantizer, rows: int) -> CodeBatch:
    """A micro-batch of the right shapes, for measuring what a step takes."""
    C, S, R = quantizer.books.shape[-1], math.prod(quantizer.grid), cfg.objective.steps_per_image
    return CodeBatch(
        codes_BTS=torch.zeros(rows, quantizer.steps, S, dtype=torch.int64),
        labels_B=torch.zeros(rows, dtype=torch.int64),
        t_BR=torch.ones(rows, R, dtype=torch.int64),
        eps_BRCS=torch.zeros(rows, R, C, S),  # also where noise is fresh: drawing it leaves nothing behind
        z_BCS=None,
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
        store_rows = self.rows_at(step, rows)
        drawn = noise.block_uniform(self.seed, step, rows, 3)
        t_BR = self.draw_t(drawn[:, 0])
        eps = None
        if objective.noise == "cached":
            R, shape = t_BR.shape[1], (m.channels, math.prod(m.grid))
            index, view = self.store.index[store_rows].repeat(R), self.store.view(store_rows).repeat(R)
            flat = noise.normal_rows("encode", m.seed, index.tolist(), view.tolist(), t_BR.flatten().tolist(), shape)
            eps = torch.from_numpy(flat.reshape(len(store_rows), R, *shape))
        return CodeBatch(
            codes_BTS=torch.from_numpy(self.codes(store_rows)),
            labels_B=torch.from_numpy(self.labels_or_null(store_rows, drawn[:, 1], objective.label_drop)),
            t_BR=torch.from_numpy(t_BR),
            eps_BRCS=eps,
            z_BCS=torch.from_numpy(self.store.latents(store_rows).astype(np.float32)) if self.latents else None,
            spread_B=torch.from_numpy(objective.perturb * drawn[:, 2]) if objective.perturb else None,
        )

    def draw_t(self, uniform_B: NDArray[np.float32]) -> NDArray[np.int64]:
        """R values of t an image, one from each R-th of the distribution, so that their mixture follows the weights."""
        R = self.cfg.objective.steps_per_image
        points = (uniform_B.astype(np.float64)[:, None] + np.arange(R)) / R
        return np.searchsorted(self.cumulative, np.minimum(points, 1 - 1e-9), side="right").astype(np.int64) + 1

    def held_out_batches(self) -> Iterator[CodeBatch]:
        """Codes, labels and all T noises of held-out rows: images and noise that training never saw."""
        m = self.store.manifest
        for store_rows in self.held_out_rows():
            index, view = self.store.index[store_rows].tolist(), self.store.view(store_rows).tolist()
            eps = noise.normal_steps("encode", m.seed, index, view, m.steps, (m.channels, math.prod(m.grid)))
            yield CodeBatch(
                codes_BTS=torch.from_numpy(self.codes(store_rows)),
                labels_B=torch.from_numpy(self.labels(store_rows)),
                t_BR=torch.arange(1, m.steps + 1).expand(len(store_rows), -1),
                eps_BRCS=torch.from_numpy(eps),
                z_BCS=None,
                spread_B=None,
            )


def rdpm_sampling(options: SampleOptions) -> RDPMSampling:
    """The options' sampling section, which is RDPM's here."""
    assert isinstance(options.sampling, RDPMSampling)
    return options.sampling


class RDPMNetwork(nn.Module):
    """f(eps_t, y, t, z'_{t-1}): Linear(2C -> D), transformer; then the heads, which start at zero."""

    def __init__(
        self, cfg: NetworkConfig, grid: tuple[int, ...], channels: int, codes: int, steps: int, classes: int
    ) -> None:
        super().__init__()
        self.input = nn.Linear(2 * channels, cfg.hidden)
        self.trunk = Transformer(cfg, grid, channels, classes)
        self.head = nn.Linear(cfg.hidden, codes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.latent_head: nn.Linear | None = None
        if cfg.head == "geometric":
            self.latent_head = nn.Linear(cfg.hidden, channels)
            nn.init.zeros_(self.latent_head.weight)
            nn.init.zeros_(self.latent_head.bias)
            self.raw_scale = nn.Parameter(torch.full((steps,), LOGIT_SCALE).expm1().log() / SCALE_GAIN)

    def forward(self, eps_RCS: Tensor, previous_RCS: Tensor, t_R: Tensor, condition: Condition) -> Tensor:
        """The last hidden state, (R, L, D)."""
        # The residual stream stays fp32 under autocast.
        x = self.input(tokens(torch.cat([eps_RCS, previous_RCS], 1))).float()
        hidden: Tensor = self.trunk(x, t_R, condition)
        return hidden

    def heads(self, hidden_RLD: Tensor) -> tuple[Tensor, Tensor | None]:
        """-> logits of the linear head (R, L, K), zhat (R, L, C) or None."""
        return self.head(hidden_RLD), self.latent_head(hidden_RLD) if self.latent_head is not None else None


class RDPM:
    """The family: loss over stored codes, sampling over T recurrent steps."""

    def __init__(self, cfg: RDPMArchitecture, quantizer: Quantizer, classes: int) -> None:
        """quantizer: the frozen tokenizer's; it holds codebook, bias convolution and schedule."""
        quant = quantizer.cfg
        channels = quantizer.books.shape[-1]
        self.cfg, self.quantizer, self.classes = cfg, quantizer, classes
        self.network: nn.Module = RDPMNetwork(cfg.network, quantizer.grid, channels, quant.codes, quant.steps, classes)
        self._schedules: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @staticmethod
    def check_codes(tokenizer: TokenizerArchitecture, where: str) -> None:
        """Raise UsageError where this tokenizer's codes are of plain residual quantisation."""
        if tokenizer.schedule.kind == "rvq":
            raise UsageError(
                f"{where} holds codes of plain residual quantisation (rvq); RDPM predicts those of noisy steps",
                "train ResGen on it, e.g. --recipe resgen-digits, or make codes by a noisy tokenizer, e.g. of digits",
            )

    @property
    def trunk(self) -> Transformer:
        """The network's transformer."""
        assert isinstance(self.network, RDPMNetwork)
        return self.network.trunk

    def condition(self, columns: Mapping[str, Tensor]) -> Condition:
        """The store's columns as a Condition."""
        return class_condition(self.trunk, columns)

    # ---- one prediction --------------------------------------------------------------------------------------

    def predict(
        self, eps_RCS: Tensor, previous_RCS: Tensor, t_R: Tensor, condition: Condition
    ) -> tuple[Tensor, Tensor | None]:
        """logits over C_t (R, L, K), and zhat (R, L, C) fp32 with the geometric head."""
        return self.scores(self.network(eps_RCS, previous_RCS, t_R, condition), eps_RCS, previous_RCS, t_R)

    def scores(
        self, hidden_RLD: Tensor, eps_RCS: Tensor, previous_RCS: Tensor, t_R: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The same from the network's last hidden state."""
        assert isinstance(self.network, RDPMNetwork)
        logits, zhat = self.network.heads(hidden_RLD)
        if zhat is None:
            return logits, None
        with full_precision(zhat):
            zhat = zhat.float()
            return logits.float() + self.geometric_logits(zhat, eps_RCS, previous_RCS, t_R), zhat

    def geometric_logits(self, zhat_RLC: Tensor, eps_RCS: Tensor, previous_RCS: Tensor, t_R: Tensor) -> Tensor:
        """s_t (2 <mu, e_k> - |e_k|²), mu = alpha_t (zhat - z'_{t-1}) + beta_t eps_t: (R, L, K). Affine in zhat.

        C_t is the code nearest to alpha_t (z - z'_{t-1}) + beta_t eps_t, where only z is unknown.
        """
        alpha_T, beta_T = self._schedule(t_R.device)
        alpha_R11, beta_R11 = alpha_T[t_R - 1].view(-1, 1, 1), beta_T[t_R - 1].view(-1, 1, 1)
        mu = alpha_R11 * (zhat_RLC - tokens(previous_RCS)) + beta_R11 * tokens(eps_RCS)
        books = self.quantizer.books
        book = books[0] if len(books) == 1 else books[t_R - 1]  # (K, C) or (R, K, C)
        scale_R11 = F.softplus(SCALE_GAIN * self.network.get_parameter("raw_scale"))[t_R - 1].view(-1, 1, 1)
        return scale_R11 * (2 * mu @ book.transpose(-1, -2) - book.pow(2).sum(-1).unsqueeze(-2))

    def _schedule(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """alpha_t and beta_t, (T,) each, on the device: copied there once, since a copy makes a GPU wait."""
        if device not in self._schedules:
            alphas = self.quantizer.alphas
            self._schedules[device] = (
                torch.tensor(alphas, device=device),
                torch.tensor([beta(a) for a in alphas], device=device),
            )
        return self._schedules[device]

    # ---- training --------------------------------------------------------------------------------------------

    def begin(self, cfg: GeneratorConfig, store: CodeStore) -> dict[str, Any]:
        """Nothing is measured."""
        return {}

    def loss(self, batch: CodeBatch, step: TrainStep) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of C_t (Eq. 7) at R values of t an image, plus MSE(zhat, z) with the geometric head."""
        with torch.no_grad():
            codes, eps_BRCS = self._noisy_codes(batch, step)
            R = batch.t_BR.shape[1]
            t_R, labels_R = batch.t_BR.flatten(), batch.labels_B.repeat_interleave(R)
            rows = codes.repeat_interleave(R, 0)
            previous = self.quantizer.prefix(rows, t_R - 1)
            if batch.spread_B is not None:
                shake = step.normal(*previous.shape[1:]) * batch.spread_B.view(-1, 1, 1)
                previous = previous + shake.repeat_interleave(R, 0)
            target_RL = rows[torch.arange(len(rows), device=rows.device), t_R - 1]
            geometric = self.cfg.network.head == "geometric"
            goal_RLC = tokens(self._latents(batch)).repeat_interleave(R, 0) if geometric else None
        eps = eps_BRCS.flatten(0, 1)
        hidden = self.network(eps, previous, t_R, self.condition({"labels": labels_R}))
        ce, latent, right = self._losses(hidden, eps, previous, t_R, target_RL, goal_RLC)
        logs = {"ce": ce.detach(), "accuracy": right}
        return (ce, logs) if latent is None else (ce + latent, {**logs, "latent_mse": latent.detach()})

    def _losses(
        self, hidden: Tensor, eps: Tensor, previous: Tensor, t_R: Tensor, target_RL: Tensor, goal_RLC: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """-> cross-entropy, MSE(zhat, z) with the geometric head, share of codes that are right.

        Logits are many: over LOGITS_AT_ONCE, the heads run in parts of the rows, and again in the backward pass.
        """
        count, L = target_RL.shape
        size = max(1, LOGITS_AT_ONCE // (L * self.quantizer.cfg.codes))
        if size >= count:
            return self._part(hidden, eps, previous, t_R, target_RL, goal_RLC)
        ce, latent, right = hidden.new_zeros(()), hidden.new_zeros(()), hidden.new_zeros(())
        for start in range(0, count, size):
            part = slice(start, min(start + size, count))
            goal = None if goal_RLC is None else goal_RLC[part]
            inputs = (hidden[part], eps[part], previous[part], t_R[part], target_RL[part], goal)
            losses = torch.utils.checkpoint.checkpoint(self._part, *inputs, use_reentrant=False)
            share = (part.stop - part.start) / count
            ce, right = ce + share * losses[0], right + share * losses[2]
            latent = latent if losses[1] is None else latent + share * losses[1]
        return ce, None if goal_RLC is None else latent, right

    def _part(
        self, hidden: Tensor, eps: Tensor, previous: Tensor, t_R: Tensor, target_RL: Tensor, goal_RLC: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Means over some rows."""
        logits, zhat = self.scores(hidden, eps, previous, t_R)
        ce = F.cross_entropy(logits.flatten(0, 1), target_RL.flatten())
        right = (logits.detach().argmax(-1) == target_RL).float().mean()
        return ce, None if zhat is None or goal_RLC is None else F.mse_loss(zhat, goal_RLC), right

    @torch.no_grad()
    def _latents(self, batch: CodeBatch) -> Tensor:
        """z of the batch's images, or z'_T of their stored codes: what new noise is drawn on, and zhat's target."""
        return batch.z_BCS if batch.z_BCS is not None else self.quantizer.decode(batch.codes_BTS)

    def _noisy_codes(self, batch: CodeBatch, step: TrainStep) -> tuple[Tensor, Tensor]:
        """codes (B, T, S) and the noise of the batch's steps (B, R, C, S): cached, or Q(z, eps) of a new eps."""
        if batch.eps_BRCS is not None:
            return batch.codes_BTS, batch.eps_BRCS
        z = self._latents(batch)
        eps = step.normal(self.quantizer.steps, *z.shape[1:])
        selected = eps[torch.arange(len(eps), device=eps.device).unsqueeze(1), batch.t_BR - 1]
        return self.quantizer.encode(z, eps), selected

    # ---- held-out measurement --------------------------------------------------------------------------------

    @torch.no_grad()
    def held_out(self, batch: CodeBatch) -> dict[str, Tally]:
        """Per t, each (T,): cross-entropy, accuracy, the model-free guess's accuracy, mean norm of z'_t.

        batch: with the noise of all T steps.
        """
        values: dict[str, list[Tensor]] = {"ce": [], "accuracy": [], "baseline": [], "norm": []}
        assert batch.eps_BRCS is not None
        codes, rows = batch.codes_BTS, torch.ones_like(batch.labels_B)
        condition = self.condition({"labels": batch.labels_B})
        for t in range(1, self.quantizer.steps + 1):
            previous, eps = self.quantizer.prefix(codes, rows * (t - 1)), batch.eps_BRCS[:, t - 1]
            logits = self.predict(eps, previous, rows * t, condition)[0].float()
            target_BL = codes[:, t - 1]
            values["ce"].append(F.cross_entropy(logits.flatten(0, 1), target_BL.flatten()))
            values["accuracy"].append((logits.argmax(-1) == target_BL).float().mean())
            values["baseline"].append((self.quantizer.guess(previous, eps, t) == target_BL).float().mean())
            values["norm"].append(self.quantizer.prefix(codes, rows * t).norm(dim=1).mean())
        images = torch.full((self.quantizer.steps,), len(codes), device=codes.device)
        return {name: Tally(torch.stack(per_t) * len(codes), images) for name, per_t in values.items()}

    # ---- sampling --------------------------------------------------------------------------------------------

    def check(self, options: SampleOptions) -> None:
        """Raise UsageError for options this tokenizer cannot use."""
        T, sampling = self.quantizer.steps, rdpm_sampling(options)
        if sampling.skip_steps >= T:
            raise UsageError(f"--skip-steps {sampling.skip_steps} is not in 0..{T - 1}", f"this checkpoint has T = {T}")
        if sampling.skip_steps and self.quantizer.alphas[0] == 1.0 and T > 1:
            raise UsageError("--skip-steps needs a noisy schedule; this tokenizer's is rvq", "leave it out")
        if sampling.cfg_schedule == "interval" and max(sampling.cfg_first, sampling.cfg_last or 1) > T:
            steps = f"{sampling.cfg_first} to {sampling.cfg_last or T}"
            raise UsageError(f"--cfg-first, --cfg-last: steps {steps} of {T}", f"this checkpoint has T = {T}")

    def passes(self, options: SampleOptions, first: int = 1) -> int:
        """Rows through the network for one sample; none at a step whose codes are all given."""
        sampling = rdpm_sampling(options)
        drawn = range(max(sampling.skip_steps + 1, first), self.quantizer.steps + 1)
        return sum(1 + (self._lambda(t, sampling) > 0) for t in drawn)

    @torch.no_grad()
    def sample(
        self, condition: Condition, indices_B: Tensor, options: SampleOptions, known: Known | None = None
    ) -> Tensor:
        """Alg. 2: z'_t = z'_{t-1} + bias(e_{C_t}), C_t drawn from tau · logits, noise addressed by index."""
        self.check(options)
        sampling, indices, device = rdpm_sampling(options), indices_B.tolist(), condition.vector_BD.device
        B, T = len(indices), self.quantizer.steps
        all_known = [False] * T if known is None else known.keep_BTS.all(-1).all(0).tolist()
        both = condition.joined(null_condition(self.trunk, self.classes, B)) if sampling.cfg else condition
        shape = (self.quantizer.books.shape[-1], math.prod(self.quantizer.grid))
        previous = torch.zeros(B, *shape, device=device)
        codes = []
        for t in range(1, T + 1):  # nothing in this loop waits for a GPU
            eps = drawing.to_device(noise.normal_rows("sample", options.seed, indices, [0] * B, [t] * B, shape), device)
            if known is not None and all_known[t - 1]:
                codes_t = known.codes_BTS[:, t - 1]
            elif t <= sampling.skip_steps:
                codes_t = self.quantizer.guess(previous, eps, t)
            else:
                logits_BLK = self._logits(eps, previous, t, condition, both, sampling)
                codes_t = drawing.draw(logits_BLK, sampling, indices, t, options.seed)
            if known is not None:
                codes_t = torch.where(known.keep_BTS[:, t - 1], known.codes_BTS[:, t - 1], codes_t)
            with one_thread():  # the bias convolution's sums move with the thread count
                previous = previous + self.quantizer.bias(self.quantizer.look_up(codes_t, t))
            codes.append(codes_t)
        return torch.stack(codes, 1)

    def _logits(
        self, eps: Tensor, previous: Tensor, t: int, condition: Condition, both: Condition, sampling: RDPMSampling
    ) -> Tensor:
        """tau_t · guided logits after top-k and top-p, (B, L, K) fp32.

        One pass of 2B rows with guidance (`both`: with and without the condition), of B rows where lambda_t = 0.
        """
        lambda_t, T = self._lambda(t, sampling), self.quantizer.steps
        if lambda_t:
            cond, uncond = self._scores_at(eps.repeat(2, 1, 1), previous.repeat(2, 1, 1), t, both).chunk(2)
            logits_BLK = drawing.guide(cond, uncond, lambda_t)
        else:
            logits_BLK = self._scores_at(eps, previous, t, condition)
        logits_BLK = logits_BLK * drawing.tau_at(t, T, sampling.tau, sampling.tau_end)
        return drawing.narrow(logits_BLK, sampling.top_k, sampling.top_p)

    def _scores_at(self, eps_RCS: Tensor, previous_RCS: Tensor, t: int, condition: Condition) -> Tensor:
        """logits (R, L, K) fp32 of one t for all rows."""
        t_R = drawing.to_device([t] * len(eps_RCS), eps_RCS.device)
        return self.predict(eps_RCS, previous_RCS, t_R, condition)[0].float()

    def _lambda(self, t: int, sampling: RDPMSampling) -> float:
        return drawing.guidance_at(
            t, self.quantizer.steps, sampling.cfg, sampling.cfg_schedule,
            power=sampling.cfg_power, first=sampling.cfg_first, last=sampling.cfg_last,
        )  # fmt: skip

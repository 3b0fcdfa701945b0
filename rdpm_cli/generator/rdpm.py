"""RDPM: recurrent token prediction (arXiv 2412.18390 §3.2, Alg. 2), and the options beyond the paper.

Legend: B images, J values of t an image, R = B·J rows, T steps, C code width, S positions of the flattened grid,
K codes, D width of the transformer.
"""

import math
from collections.abc import Iterator
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
from rdpm_cli.generator.batches import Batch, StoreBatches
from rdpm_cli.generator.conditions import ClassConditional
from rdpm_cli.generator.config import NetworkConfig, RDPMArchitecture, RDPMConfig, RDPMSampling
from rdpm_cli.generator.contract import Condition, Known, SampleOptions, Tally
from rdpm_cli.generator.transformer import Transformer
from rdpm_cli.tokenizer.config import TokenizerArchitecture
from rdpm_cli.tokenizer.quantizer import Quantizer, beta

LOGIT_SCALE = 0.5  # s_t at the start
# The learnt number under the softplus is multiplied by this: s_t must reach about 1 / (2 var(mu)), which is 5 to 50,
# and Adam moves a number by about its learning rate a step. Without it s_t was still rising when training ended.
SCALE_GAIN = 20.0
LOGITS_AT_ONCE = 1 << 26  # fp32 values held at once in training: 256 MiB; d16's 128 images have twice as many


# ---- batches -------------------------------------------------------------------------------------------------------


@dataclass
class CodeBatch(Batch):
    """Codes, and the steps t at which they are to be predicted."""

    t_BJ: Tensor  # int64, 1..T
    eps_BJCS: Tensor | None  # the noise of those steps; None: drawn fresh on the device
    z_BCS: Tensor | None = None  # stored latents, fp32; None: z'_T of the codes serves instead
    spread_B: Tensor | None = None  # a·U of the perturbation of z'_{t-1}, one an image


class CodeBatches(StoreBatches):
    """Codes, labels and values of t of a training step, a pure function of (seed, step)."""

    def __init__(self, store: CodeStore, cfg: RDPMConfig, quantizer: Quantizer, seed: int) -> None:
        """quantizer: for its schedule. Raises DataError if fresh noise needs latents that the store lacks."""
        if cfg.objective.noise == "fresh" and not store.manifest.latents:
            raise DataError(
                f"{store.root} keeps no latents, so fresh noise cannot be drawn",
                f"run `rdpm tokenize {store.manifest.data.source} NEW_FOLDER --keep latents`, or train with "
                "objective.noise=fresh-from-codes (new noise on what the codes decode to) or objective.noise=cached",
            )
        super().__init__(store, cfg.train.batch, seed)
        self.objective = cfg.objective
        self.latents = store.manifest.latents and cfg.objective.noise != "fresh-from-codes"
        alphas = np.array(quantizer.alphas)
        weights = alphas + 0.2 if cfg.objective.t_weights == "alpha" else np.ones(len(alphas))
        self.cumulative = np.cumsum(weights / weights.sum())

    @staticmethod
    def blank(cfg: RDPMConfig, quantizer: Quantizer, rows: int) -> CodeBatch:
        """A batch without content, for measuring what a step costs."""
        C, S, J = quantizer.books.shape[-1], math.prod(quantizer.grid), cfg.objective.steps_per_image
        return CodeBatch(
            codes_BTS=torch.zeros(rows, quantizer.steps, S, dtype=torch.int64),
            columns={"labels": torch.zeros(rows, dtype=torch.int64)},
            t_BJ=torch.ones(rows, J, dtype=torch.int64),
            eps_BJCS=torch.zeros(rows, J, C, S),  # also for fresh noise, whose drawing leaves nothing in memory
            spread_B=torch.zeros(rows) if cfg.objective.perturb else None,
        )

    def batch_at(self, step: int, rows: range) -> CodeBatch:
        """These rows of the step's global batch."""
        objective, store_rows = self.objective, self.rows_at(step, rows)
        uniform_B3 = noise.block_uniform(self.seed, step, rows, 3)
        t_BJ = self.draw_t(uniform_B3[:, 0])
        return CodeBatch(
            codes_BTS=self.codes(store_rows),
            columns=self.columns(store_rows, uniform_B3[:, 1], objective.label_drop),
            t_BJ=torch.from_numpy(t_BJ),
            eps_BJCS=self._stored_noise(store_rows, t_BJ) if objective.noise == "cached" else None,
            z_BCS=torch.from_numpy(self.store.latents(store_rows).astype(np.float32)) if self.latents else None,
            spread_B=torch.from_numpy(objective.perturb * uniform_B3[:, 2]) if objective.perturb else None,
        )

    def draw_t(self, uniform_B: NDArray[np.float32]) -> NDArray[np.int64]:
        """J values of t an image, one from each J-th of the distribution: their mixture follows the weights."""
        J = self.objective.steps_per_image
        points = (uniform_B.astype(np.float64)[:, None] + np.arange(J)) / J
        return np.searchsorted(self.cumulative, np.minimum(points, 1 - 1e-9), side="right").astype(np.int64) + 1

    def _stored_noise(self, store_rows: NDArray[np.int64], t_BJ: NDArray[np.int64]) -> Tensor:
        """The noise under which the tokenizer made these rows' codes at these steps, (B, J, C, S)."""
        m, (B, J) = self.store.manifest, t_BJ.shape
        indices, views = self.addresses(store_rows.repeat(J))
        shape = (m.channels, math.prod(m.grid))
        eps = noise.normal_rows("encode", m.seed, indices, views, t_BJ.flatten().tolist(), shape)
        return torch.from_numpy(eps.reshape(B, J, *shape))

    def held_out_batches(self) -> Iterator[CodeBatch]:
        """Held-out rows with the noise of all T steps: images and noise that training never saw."""
        for store_rows in self.held_out_rows():
            t_BT = np.tile(np.arange(1, self.store.manifest.steps + 1), (len(store_rows), 1))
            eps = self._stored_noise(store_rows, t_BT)
            yield CodeBatch(self.codes(store_rows), self.columns(store_rows), torch.from_numpy(t_BT), eps)


# ---- the network ---------------------------------------------------------------------------------------------------


class RDPMNetwork(nn.Module):
    """f(eps_t, y, t, z'_{t-1}): Linear(2C -> D), transformer; then the heads, which start at zero."""

    def __init__(self, cfg: NetworkConfig, quantizer: Quantizer, classes: int) -> None:
        super().__init__()
        channels, codes = quantizer.books.shape[-1], quantizer.cfg.codes
        self.input = nn.Linear(2 * channels, cfg.hidden)
        self.trunk = Transformer(cfg, quantizer.grid, channels, classes)
        self.head = nn.Linear(cfg.hidden, codes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.latent_head: nn.Linear | None = None
        if cfg.head == "geometric":
            self.latent_head = nn.Linear(cfg.hidden, channels)
            nn.init.zeros_(self.latent_head.weight)
            nn.init.zeros_(self.latent_head.bias)
            self.raw_scale = nn.Parameter(torch.full((quantizer.steps,), LOGIT_SCALE).expm1().log() / SCALE_GAIN)

    def forward(self, eps_RCS: Tensor, previous_RCS: Tensor, t_R: Tensor, condition: Condition) -> Tensor:
        """The hidden state that the heads see, (R, S, D)."""
        # The residual stream stays fp32 under autocast.
        x_RSD = self.input(torch.cat([eps_RCS, previous_RCS], 1).transpose(1, 2)).float()
        hidden_RSD: Tensor = self.trunk(x_RSD, t_R, condition)
        return hidden_RSD


class RDPM(ClassConditional):
    """The family: loss over stored codes, sampling over T recurrent steps."""

    def __init__(self, cfg: RDPMArchitecture, quantizer: Quantizer, classes: int) -> None:
        """quantizer: the frozen tokenizer's; it holds codebook, bias convolution and schedule."""
        self.cfg, self.quantizer, self.classes = cfg, quantizer, classes
        self.network: nn.Module = RDPMNetwork(cfg.network, quantizer, classes)
        self._schedules: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @staticmethod
    def check_codes(tokenizer: TokenizerArchitecture, origin: str) -> None:
        """Raise UsageError for codes of plain residual quantisation."""
        if tokenizer.schedule.kind == "rvq":
            raise UsageError(
                f"{origin} holds codes of plain residual quantisation (rvq), but RDPM predicts those of noisy steps",
                "train ResGen on it, e.g. --recipe resgen-digits; or make codes by a noisy tokenizer, e.g. "
                "--recipe digits",
            )

    # ---- one prediction --------------------------------------------------------------------------------------------

    def predict(
        self, eps_RCS: Tensor, previous_RCS: Tensor, t_R: Tensor, condition: Condition
    ) -> tuple[Tensor, Tensor | None]:
        """Logits over C_t (R, S, K), and zhat (R, S, C) fp32 with the geometric head."""
        return self.scores(self.network(eps_RCS, previous_RCS, t_R, condition), eps_RCS, previous_RCS, t_R)

    def scores(
        self, hidden_RSD: Tensor, eps_RCS: Tensor, previous_RCS: Tensor, t_R: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The same from the network's hidden state."""
        assert isinstance(self.network, RDPMNetwork)
        logits = self.network.head(hidden_RSD)
        if self.network.latent_head is None:
            return logits, None
        zhat = self.network.latent_head(hidden_RSD)
        with full_precision(zhat):
            zhat = zhat.float()
            return logits.float() + self.geometric_logits(zhat, eps_RCS, previous_RCS, t_R), zhat

    def geometric_logits(self, zhat_RSC: Tensor, eps_RCS: Tensor, previous_RCS: Tensor, t_R: Tensor) -> Tensor:
        """s_t (2 <mu, e_k> - |e_k|²), mu = alpha_t (zhat - z'_{t-1}) + beta_t eps_t: (R, S, K). Affine in zhat.

        C_t is the code nearest to alpha_t (z - z'_{t-1}) + beta_t eps_t, in which only z is unknown.
        """
        alpha_T, beta_T = self._schedule(t_R.device)
        alpha_R11, beta_R11 = alpha_T[t_R - 1].view(-1, 1, 1), beta_T[t_R - 1].view(-1, 1, 1)
        mu_RSC = alpha_R11 * (zhat_RSC - previous_RCS.transpose(1, 2)) + beta_R11 * eps_RCS.transpose(1, 2)
        books = self.quantizer.books
        book = books[0] if len(books) == 1 else books[t_R - 1]  # (K, C) or (R, K, C)
        scale_R11 = F.softplus(SCALE_GAIN * self.network.get_parameter("raw_scale"))[t_R - 1].view(-1, 1, 1)
        return scale_R11 * (2 * mu_RSC @ book.transpose(-1, -2) - book.pow(2).sum(-1).unsqueeze(-2))

    def _schedule(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """alpha_t and beta_t, (T,) each, on the device."""
        if device not in self._schedules:  # copied there only once, since a copy makes a GPU wait
            alphas = self.quantizer.alphas
            betas = [beta(alpha) for alpha in alphas]
            self._schedules[device] = torch.tensor(alphas, device=device), torch.tensor(betas, device=device)
        return self._schedules[device]

    # ---- training --------------------------------------------------------------------------------------------------

    def begin(self, cfg: RDPMConfig, store: CodeStore) -> dict[str, Any]:
        """Nothing is measured."""
        return {}

    def loss(self, batch: CodeBatch, step: TrainStep) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of C_t (Eq. 7) at J values of t an image, plus MSE(zhat, z) with the geometric head."""
        with torch.no_grad():
            codes_BTS, eps_BJCS = self._noisy_codes(batch, step)
            J, t_R = batch.t_BJ.shape[1], batch.t_BJ.flatten()
            codes_RTS = codes_BTS.repeat_interleave(J, 0)
            previous = self.quantizer.prefix(codes_RTS, t_R - 1)
            if batch.spread_B is not None:
                shake_BCS = step.normal(*previous.shape[1:]) * batch.spread_B.view(-1, 1, 1)
                previous = previous + shake_BCS.repeat_interleave(J, 0)
            target_RS = codes_RTS[torch.arange(len(t_R), device=t_R.device), t_R - 1]
            geometric = self.cfg.network.head == "geometric"
            goals = [self._latents(batch).transpose(1, 2).repeat_interleave(J, 0)] if geometric else []
        eps = eps_BJCS.flatten(0, 1)
        columns = {name: column.repeat_interleave(J) for name, column in batch.columns.items()}
        hidden = self.network(eps, previous, t_R, self.condition(columns))
        ce, accuracy, *mse = self._losses(hidden, eps, previous, t_R, target_RS, *goals).unbind()
        logs = {"ce": ce.detach(), "accuracy": accuracy.detach()}
        return (ce + mse[0], {**logs, "latent_mse": mse[0].detach()}) if mse else (ce, logs)

    def _losses(self, *inputs: Tensor) -> Tensor:
        """`_row_losses` of all rows. Beyond LOGITS_AT_ONCE logits the heads run on some of the rows at a time."""
        hidden_RSD = inputs[0]
        count, S, _ = hidden_RSD.shape
        size = max(1, LOGITS_AT_ONCE // (S * self.quantizer.cfg.codes))
        if size >= count:
            return self._row_losses(*inputs)
        total = hidden_RSD.new_zeros(())
        for rows in zip(*(x.split(size) for x in inputs), strict=True):
            # The backward pass computes these logits again, so that they never exist all at once.
            losses: Tensor = torch.utils.checkpoint.checkpoint(self._row_losses, *rows, use_reentrant=False)
            total = total + len(rows[0]) / count * losses
        return total

    def _row_losses(
        self, hidden: Tensor, eps: Tensor, previous: Tensor, t_R: Tensor, target_RS: Tensor, *goal_RSC: Tensor
    ) -> Tensor:
        """Means over some rows: cross-entropy, accuracy and, with the geometric head, MSE(zhat, z); (2,) or (3,)."""
        logits, zhat = self.scores(hidden, eps, previous, t_R)
        ce = F.cross_entropy(logits.flatten(0, 1), target_RS.flatten())
        accuracy = (logits.detach().argmax(-1) == target_RS).float().mean()
        mse = [] if zhat is None else [F.mse_loss(zhat, goal_RSC[0])]
        return torch.stack([ce, accuracy, *mse])

    def _latents(self, batch: CodeBatch) -> Tensor:
        """z of the batch's images, or z'_T of their stored codes: fresh noise is drawn on it, and zhat aims at it."""
        return batch.z_BCS if batch.z_BCS is not None else self.quantizer.decode(batch.codes_BTS)

    def _noisy_codes(self, batch: CodeBatch, step: TrainStep) -> tuple[Tensor, Tensor]:
        """codes (B, T, S) and the noise of the batch's steps (B, J, C, S): stored, or Q(z, eps) of a new eps."""
        if batch.eps_BJCS is not None:
            return batch.codes_BTS, batch.eps_BJCS
        z = self._latents(batch)
        eps_BTCS = step.normal(self.quantizer.steps, *z.shape[1:])
        rows_B1 = torch.arange(len(z), device=z.device).unsqueeze(1)
        return self.quantizer.encode(z, eps_BTCS), eps_BTCS[rows_B1, batch.t_BJ - 1]

    @torch.no_grad()
    def held_out(self, batch: CodeBatch) -> dict[str, Tally]:
        """Per t, each (T,): cross-entropy, accuracy, the model-free guess's accuracy, mean norm of z'_t.

        batch: with the noise of all T steps.
        """
        assert batch.eps_BJCS is not None
        values: dict[str, list[Tensor]] = {"ce": [], "accuracy": [], "baseline": [], "norm": []}
        codes, T = batch.codes_BTS, self.quantizer.steps
        ones_B, condition = torch.ones_like(batch.t_BJ[:, 0]), self.condition(batch.columns)
        for t in range(1, T + 1):
            previous, eps = self.quantizer.prefix(codes, ones_B * (t - 1)), batch.eps_BJCS[:, t - 1]
            target_BS = codes[:, t - 1]
            logits = self.predict(eps, previous, ones_B * t, condition)[0].float()
            values["ce"].append(F.cross_entropy(logits.flatten(0, 1), target_BS.flatten()))
            values["accuracy"].append((logits.argmax(-1) == target_BS).float().mean())
            values["baseline"].append((self.quantizer.guess(previous, eps, t) == target_BS).float().mean())
            values["norm"].append(self.quantizer.prefix(codes, ones_B * t).norm(dim=1).mean())
        images_T = torch.full((T,), len(codes), device=codes.device)
        return {name: Tally(torch.stack(means) * len(codes), images_T) for name, means in values.items()}

    # ---- sampling --------------------------------------------------------------------------------------------------

    def check(self, options: SampleOptions) -> None:
        """Raise UsageError for options this tokenizer cannot use."""
        T, sampling = self.quantizer.steps, _sampling(options)
        hint = f"this checkpoint has T = {T}"
        if sampling.skip_steps >= T:
            raise UsageError(f"--skip-steps {sampling.skip_steps} is not in 0..{T - 1}", hint)
        if sampling.skip_steps and self.quantizer.alphas[0] == 1.0 and T > 1:
            raise UsageError("--skip-steps needs a noisy schedule; this tokenizer's is rvq", "leave it out")
        if sampling.cfg_schedule == "interval" and max(sampling.cfg_first, sampling.cfg_last or 1) > T:
            steps = f"{sampling.cfg_first} to {sampling.cfg_last or T}"
            raise UsageError(f"cfg_first, cfg_last: steps {steps} of {T}", hint)

    def passes(self, options: SampleOptions, first: int = 1) -> int:
        """Rows through the network for one sample; none at a step whose codes are all known."""
        sampling = _sampling(options)
        drawn = range(max(sampling.skip_steps + 1, first), self.quantizer.steps + 1)
        return sum(1 + (self._lambda(t, sampling) > 0) for t in drawn)

    @torch.no_grad()
    def sample(
        self, condition: Condition, indices_B: Tensor, options: SampleOptions, known: Known | None = None
    ) -> Tensor:
        """Alg. 2: z'_t = z'_{t-1} + bias(e_{C_t}), C_t drawn from tau · logits, noise addressed by index. codes_BTS."""
        self.check(options)
        sampling, indices, device = _sampling(options), indices_B.tolist(), condition.vector_BD.device
        B, T = len(indices), self.quantizer.steps
        is_known = [False] * T if known is None else known.keep_BTS.all(-1).all(0).tolist()
        both = condition.joined(self.null_condition(B)) if sampling.cfg else condition
        shape = (self.quantizer.books.shape[-1], math.prod(self.quantizer.grid))
        previous = torch.zeros(B, *shape, device=device)
        codes = []
        for t in range(1, T + 1):  # nothing in this loop waits for a GPU
            eps = drawing.to_device(noise.normal_rows("sample", options.seed, indices, [0] * B, [t] * B, shape), device)
            if known is not None and is_known[t - 1]:
                codes_BS = known.codes_BTS[:, t - 1]
            elif t <= sampling.skip_steps:
                codes_BS = self.quantizer.guess(previous, eps, t)
            else:
                logits_BSK = self._guided_logits(eps, previous, t, condition, both, sampling)
                codes_BS = drawing.draw(logits_BSK, sampling, indices, t, options.seed)
            if known is not None:
                codes_BS = torch.where(known.keep_BTS[:, t - 1], known.codes_BTS[:, t - 1], codes_BS)
            with one_thread():  # the sums of the bias convolution depend on the number of threads
                previous = previous + self.quantizer.bias(self.quantizer.look_up(codes_BS, t))
            codes.append(codes_BS)
        return torch.stack(codes, 1)

    def _guided_logits(
        self, eps: Tensor, previous: Tensor, t: int, condition: Condition, both: Condition, sampling: RDPMSampling
    ) -> Tensor:
        """tau_t · guided logits after top-k and top-p, (B, S, K) fp32.

        One pass of 2B rows with guidance (`both`: the condition and the null one), of B rows where lambda_t = 0.
        """
        lambda_t, T = self._lambda(t, sampling), self.quantizer.steps
        if lambda_t:
            cond, uncond = self._logits_at(eps.repeat(2, 1, 1), previous.repeat(2, 1, 1), t, both).chunk(2)
            logits_BSK = drawing.guide(cond, uncond, lambda_t)
        else:
            logits_BSK = self._logits_at(eps, previous, t, condition)
        logits_BSK = logits_BSK * drawing.tau_at(t, T, sampling.tau, sampling.tau_end)
        return drawing.narrow(logits_BSK, sampling.top_k, sampling.top_p)

    def _logits_at(self, eps_RCS: Tensor, previous_RCS: Tensor, t: int, condition: Condition) -> Tensor:
        """Logits (R, S, K) fp32 of rows of one t."""
        t_R = torch.full((len(eps_RCS),), t, device=eps_RCS.device)
        return self.predict(eps_RCS, previous_RCS, t_R, condition)[0].float()

    def _lambda(self, t: int, sampling: RDPMSampling) -> float:
        return drawing.guidance_at(
            t, self.quantizer.steps, sampling.cfg, sampling.cfg_schedule,
            power=sampling.cfg_power, first=sampling.cfg_first, last=sampling.cfg_last,
        )  # fmt: skip


def _sampling(options: SampleOptions) -> RDPMSampling:
    assert isinstance(options.sampling, RDPMSampling)
    return options.sampling

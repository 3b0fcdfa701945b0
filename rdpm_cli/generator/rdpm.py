"""RDPM: recurrent token prediction (arXiv 2412.18390 §3.2, Alg. 2), and the options beyond the paper.

Legend: B images, J values of t an image, R rows = B·J, T steps, C code width, S positions, K codes, D hidden width."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from rdpm_cli import noise
from rdpm_cli.codes.store import CodeStore
from rdpm_cli.distributed import TrainStep, full_precision, one_thread
from rdpm_cli.errors import DataError, UsageError
from rdpm_cli.generator.baselines import Linear, fit
from rdpm_cli.generator.config import NetworkConfig, RDPMConfig, RDPMSampling
from rdpm_cli.generator.contract import Batch, Columns, Condition, Generator, GeneratorBatches, Known, SampleOptions
from rdpm_cli.generator.drawing import draw, guidance_at, guide, narrow, tau_at, to_device
from rdpm_cli.generator.transformer import Transformer, zero_linear
from rdpm_cli.tokenizer.config import TokenizerArchitecture
from rdpm_cli.tokenizer.quantizer import Quantizer, beta

# The learnt number under the softplus is multiplied by this: s_t must reach about 1 / (2 var(mu)), which is 5 to 50,
# and Adam moves a number by about its learning rate a step. Without it s_t was still rising when training ended.
SCALE_GAIN = 20.0
LOGITS_AT_ONCE = 1 << 26  # fp32 values held at once in training: 256 MiB; d16's 128 images have twice as many


@dataclass
class CodeBatch(Batch):
    """Codes, and the steps t at which they are to be predicted."""

    t_BJ: Tensor  # int64, 1..T
    eps_BJCS: Tensor | None  # the noise of those steps; None: drawn fresh on the device
    z_BCS: Tensor | None = None  # stored latents, fp32; None: z'_T of the codes serves instead
    spread_B: Tensor | None = None  # a·U of the perturbation of z'_{t-1}, one an image
    positions: float = 0.0  # mean over the global batch of the positions that are to be predicted, of sound
    longest: int | None = None  # S of its longest item, of sound: fresh noise is drawn for so many positions
    lambda_BJ: Tensor | None = None  # the guidance that the network is to learn, 0 without a condition

    def normal(self, step: TrainStep, *shape: int) -> Tensor:
        """Standard normal values (B, *shape). The last axis is S; a row's values do not depend on its padding."""
        return step.normal(*shape[:-1], self.longest or shape[-1])[..., : shape[-1]]


class CodeBatches(GeneratorBatches):
    """Codes, labels and values of t of a training step."""

    def __init__(self, store: CodeStore, cfg: RDPMConfig, quantizer: Quantizer, seed: int) -> None:
        if (cfg.objective.noise == "fresh" or store.manifest.speech) and not store.manifest.latents:
            others = "objective.noise=fresh-from-codes or objective.noise=cached"
            hint = f"run `{store.keeping_latents}`, or train with {others}"
            raise DataError(f"{store.root} keeps no latents, so fresh noise cannot be drawn", hint)
        super().__init__(store, cfg, quantizer, seed)
        self.quantizer, self.guidance = quantizer, cfg.network.guidance
        alphas = np.array(quantizer.alphas)
        weights = alphas + 0.2 if cfg.objective.t_weights == "alpha" else np.ones(len(alphas))
        self.cumulative = np.cumsum(weights / weights.sum())

    @staticmethod
    def blank(cfg: RDPMConfig, quantizer: Quantizer, rows: int, spoken: tuple[int, int] | None = None) -> CodeBatch:
        C, S, J = quantizer.books.shape[-1], math.prod(quantizer.grid), cfg.objective.steps_per_image
        S = spoken[0] if spoken else S
        codes, columns = (
            torch.zeros(rows, quantizer.steps, S).long(),
            GeneratorBatches.blank_columns(cfg, C, rows, spoken),
        )
        eps = torch.zeros(rows, J, C, S)  # also for fresh noise, whose drawing leaves nothing in memory
        spread = torch.zeros(rows) if cfg.objective.perturb else None
        z = torch.zeros(rows, C, S) if spoken else None
        lambda_BJ = torch.zeros(rows, J) if cfg.network.guidance else None
        return CodeBatch(codes, columns, torch.ones(rows, J).long(), eps, z, spread, float(S), S, lambda_BJ)

    def batch_at(self, step: int, rows: range) -> CodeBatch:
        objective, store_rows = self.objective, self.rows_at(step, rows)
        uniform_B3 = noise.block_uniform(self.seed, step, rows, 3)
        t_BJ = self.draw_t(uniform_B3[:, 0])
        eps = self._stored_noise(store_rows, t_BJ) if objective.noise == "cached" else None
        has_z = self.store.manifest.latents and objective.noise != "fresh-from-codes"
        z = torch.from_numpy(self.store.latents(store_rows).astype(np.float32)) if has_z else None
        spread = torch.from_numpy(objective.perturb * uniform_B3[:, 2]) if objective.perturb else None
        codes, columns = self.read(store_rows, uniform_B3[:, 1], self.prompt_numbers(step, rows))
        lambda_BJ = None
        if self.guidance:
            share_BJ = noise.block_uniform(self.seed, step, rows, t_BJ.shape[1], "guidance")
            asked_B1 = uniform_B3[:, 1:2] >= objective.label_drop
            lambda_BJ = torch.from_numpy((self.guidance * share_BJ * asked_B1).astype(np.float32))
        return CodeBatch(codes, columns, torch.from_numpy(t_BJ), eps, z, spread, *self.extent(step), lambda_BJ)

    def draw_t(self, uniform_B: noise.Floats) -> noise.Ints:
        """J values of t an image, one from each J-th of the distribution: their mixture follows the weights."""
        J = self.objective.steps_per_image
        points = (uniform_B.astype(np.float64)[:, None] + np.arange(J)) / J
        return np.searchsorted(self.cumulative, np.minimum(points, 1 - 1e-9), side="right").astype(np.int64) + 1

    def _stored_noise(self, store_rows: noise.Ints, t_BJ: noise.Ints) -> Tensor:
        """The noise under which the tokenizer made these rows' codes at these steps, (B, J, C, S)."""
        addresses = *self.addresses(store_rows.repeat(t_BJ.shape[1])), t_BJ.flatten().tolist()
        eps = self.quantizer.noise(self.purpose, self.store.manifest.seed, *addresses, self.store.longest(store_rows))
        return eps.unflatten(0, t_BJ.shape)

    def held_out_batches(self) -> Iterator[CodeBatch]:
        for store_rows in self.held_out_rows():
            t_BT = np.tile(np.arange(1, self.store.manifest.steps + 1), (len(store_rows), 1))
            yield CodeBatch(*self.read(store_rows), torch.from_numpy(t_BT), self._stored_noise(store_rows, t_BT))


class RDPMNetwork(nn.Module):
    """f(eps_t, y, t, z'_{t-1}): Linear(2C -> D), transformer; then the heads, which start at zero."""

    def __init__(self, cfg: NetworkConfig, quantizer: Quantizer, classes: int) -> None:
        super().__init__()
        channels, alphas = quantizer.books.shape[-1], quantizer.alphas
        self.eps_input = cfg.eps_input
        self.input = nn.Linear((2 if cfg.eps_input else 1) * channels, cfg.hidden)
        self.trunk = Transformer(cfg, quantizer.grid, channels, classes)
        self.head = zero_linear(cfg.hidden, quantizer.cfg.codes)
        self.latent_head = zero_linear(cfg.hidden, channels) if cfg.head == "geometric" else None
        if cfg.head == "geometric":  # s_t starts at 0.5
            self.raw_scale = nn.Parameter(torch.full((quantizer.steps,), 0.5).expm1().log() / SCALE_GAIN)
        self.guidance, D = cfg.guidance, cfg.hidden
        self.guidance_in = nn.Sequential(nn.Linear(1, D), nn.SiLU(), zero_linear(D, D)) if cfg.guidance else None
        self.alpha_T = nn.Buffer(torch.tensor(alphas), persistent=False)
        self.beta_T = nn.Buffer(torch.tensor([beta(alpha) for alpha in alphas]), persistent=False)

    def forward(
        self, eps_RCS: Tensor, previous_RCS: Tensor, t_R: Tensor, condition: Condition, lambda_R: Tensor | None = None
    ) -> Tensor:
        """The hidden state that the heads see, (R, S, D). lambda: of a network with guidance; None: 0."""
        if self.guidance_in is not None:
            share_R = torch.zeros_like(t_R, dtype=torch.float) if lambda_R is None else lambda_R / self.guidance
            vector_RD = condition.vector_BD + self.guidance_in(share_R.unsqueeze(1))
            condition = condition._replace(vector_BD=vector_RD)
        # The residual stream stays fp32 under autocast.
        x_RCS = torch.cat([eps_RCS, previous_RCS], 1) if self.eps_input else previous_RCS
        x_RSD = self.input(x_RCS.transpose(1, 2)).float()
        return self.trunk(x_RSD, t_R, condition)


class RDPM(Generator):
    """The family: loss over stored codes, sampling over T recurrent steps."""

    network: RDPMNetwork
    replays = True

    def __init__(self, cfg: NetworkConfig, quantizer: Quantizer, classes: int) -> None:
        self.quantizer, self.classes = quantizer, classes
        self.network = RDPMNetwork(cfg, quantizer, classes)

    @staticmethod
    def check_codes(tokenizer: TokenizerArchitecture, origin: str) -> None:
        """All codes can be learnt. Those of schedule rvq do not depend on the noise: see network.eps_input."""

    def predict(
        self, eps: Tensor, previous: Tensor, t_R: Tensor, condition: Condition, lambda_R: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Logits over C_t (R, S, K), and zhat (R, S, C) fp32 with the geometric head."""
        return self.scores(self.network(eps, previous, t_R, condition, lambda_R=lambda_R), eps, previous, t_R)

    def scores(self, hidden: Tensor, eps: Tensor, previous: Tensor, t_R: Tensor) -> tuple[Tensor, Tensor | None]:
        """The same from the network's hidden state."""
        logits = self.network.head(hidden)
        if self.network.latent_head is None:
            return logits, None
        zhat = self.network.latent_head(hidden)
        with full_precision(zhat):
            zhat = zhat.float()
            return logits.float() + self.geometric_logits(zhat, eps, previous, t_R), zhat

    def geometric_logits(self, zhat_RSC: Tensor, eps_RCS: Tensor, previous_RCS: Tensor, t_R: Tensor) -> Tensor:
        """s_t (2 <mu, e_k> - |e_k|²), mu = alpha_t (zhat - z'_{t-1}) + beta_t eps_t: (R, S, K). Affine in zhat."""
        # C_t is the code nearest to alpha_t (z - z'_{t-1}) + beta_t eps_t, in which only z is unknown.
        network, books = self.network, self.quantizer.books
        scale_T = F.softplus(SCALE_GAIN * network.raw_scale)
        scale, alpha, beta = (x[t_R - 1].view(-1, 1, 1) for x in (scale_T, network.alpha_T, network.beta_T))
        mu_RSC = alpha * (zhat_RSC - previous_RCS.transpose(1, 2)) + beta * eps_RCS.transpose(1, 2)
        book = books[0] if len(books) == 1 else books[t_R - 1]  # (K, C) or (R, K, C)
        return scale * (2 * mu_RSC @ book.transpose(-1, -2) - book.pow(2).sum(-1).unsqueeze(-2))

    def loss(self, batch: CodeBatch, step: TrainStep) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of C_t (Eq. 7) at J values of t an image, plus MSE(zhat, z) with the geometric head."""
        quantizer, J, t_R = self.quantizer, batch.t_BJ.shape[1], batch.t_BJ.flatten()
        with torch.no_grad():
            codes_BTS, eps_BJCS, z = batch.codes_BTS, batch.eps_BJCS, batch.z_BCS
            if z is None and (eps_BJCS is None or self.network.latent_head is not None):
                z = quantizer.decode(codes_BTS)  # z'_T serves instead: fresh noise is drawn on it, and zhat aims at it
            goal_RSC = None if z is None else z.transpose(1, 2).repeat_interleave(J, 0)
            if eps_BJCS is None:
                assert z is not None
                eps_BTCS = batch.normal(step, quantizer.steps, *z.shape[1:])
                rows_B1 = torch.arange(len(z), device=z.device).unsqueeze(1)
                codes_BTS, eps_BJCS = quantizer.encode(z, eps_BTCS), eps_BTCS[rows_B1, batch.t_BJ - 1]
            codes_RTS, eps_RCS = codes_BTS.repeat_interleave(J, 0), eps_BJCS.flatten(0, 1)
            previous = quantizer.prefix(codes_RTS, t_R - 1)
            if batch.spread_B is not None:
                shake_BCS = batch.normal(step, *previous.shape[1:]) * batch.spread_B.view(-1, 1, 1)
                previous = previous + shake_BCS.repeat_interleave(J, 0)
            target_RS = codes_RTS[torch.arange(len(t_R), device=t_R.device), t_R - 1]
        columns = {name: column.repeat_interleave(J, 0) for name, column in batch.columns.items()}
        condition, weight_RS = self.condition(columns), None
        if condition.exists_BS is not None and condition.known_BS is not None:
            # Each position counts alike, so that a loss does not depend on how the global batch is shared.
            open_RS = condition.exists_BS & ~condition.known_BS
            weight_RS = open_RS * (open_RS.shape[1] / batch.positions)
        lambda_R, null = None, None
        if batch.lambda_BJ is not None:
            lambda_R = batch.lambda_BJ.flatten()
            with torch.no_grad():
                null = self.network(eps_RCS, previous, t_R, self.null_condition(columns))
        hidden = self.network(eps_RCS, previous, t_R, condition, lambda_R)
        terms = self._losses(hidden, eps_RCS, previous, t_R, target_RS, goal_RSC, weight_RS, null, lambda_R)
        names = ("ce", "accuracy", "latent_mse")[: len(terms)]  # the last of the geometric head only
        logs = dict(zip(names, terms.detach(), strict=True))
        return terms[0] + terms[2] if len(terms) == 3 else terms[0], logs

    def _losses(self, *inputs: Any) -> Tensor:
        """`_row_losses` of all rows. Beyond LOGITS_AT_ONCE logits the heads run on some of the rows at a time."""
        count, S, _ = inputs[0].shape
        size = max(1, LOGITS_AT_ONCE // (S * self.quantizer.cfg.codes))
        if size >= count:
            return self._row_losses(*inputs)
        total = inputs[0].new_zeros(())
        pieces = -(-count // size)
        for rows in zip(*([None] * pieces if x is None else x.split(size) for x in inputs), strict=True):
            # The backward pass computes these logits again, so that they never exist all at once.
            losses = torch.utils.checkpoint.checkpoint(self._row_losses, *rows, use_reentrant=False)
            total = total + len(rows[0]) / count * losses
        return total

    def _row_losses(
        self, hidden: Tensor, eps: Tensor, previous: Tensor, t_R: Tensor, target_RS: Tensor, goal_RSC: Tensor | None,
        weight_RS: Tensor | None, null: Tensor | None, lambda_R: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Means over some rows: cross-entropy, accuracy and, with the geometric head, MSE(zhat, z); (2,) or (3,).

        weight: of each position; None: all count alike. null: the hidden state without a condition."""
        logits, zhat = self.scores(hidden, eps, previous, t_R)
        if null is not None and lambda_R is not None:
            # The network gives guided logits, (1 + lambda) cond - lambda null, in one pass. What learns the codes is
            # cond, their mean with null, which has no gradient here: guidance-free training, arXiv 2501.15420.
            with torch.no_grad():
                null_logits, null_zhat = self.scores(null, eps, previous, t_R)
            share = (lambda_R / (1 + lambda_R)).view(-1, 1, 1)
            logits = torch.lerp(logits.float(), null_logits.float(), share)
            zhat = None if zhat is None or null_zhat is None else torch.lerp(zhat, null_zhat, share)
        right_RS = (logits.detach().argmax(-1) == target_RS).float()
        if weight_RS is None:
            ce = F.cross_entropy(logits.flatten(0, 1), target_RS.flatten())
            error = None if zhat is None or goal_RSC is None else F.mse_loss(zhat, goal_RSC)
        else:
            ce_N = F.cross_entropy(logits.flatten(0, 1), target_RS.flatten(), reduction="none")
            ce, right_RS = (ce_N.view_as(weight_RS) * weight_RS).mean(), right_RS * weight_RS
            error = (
                None if zhat is None or goal_RSC is None else ((zhat - goal_RSC).square().mean(-1) * weight_RS).mean()
            )
        return torch.stack([ce, right_RS.mean(), *([] if error is None else [error])])

    def fit_baselines(self, store: CodeStore, rows: noise.Ints) -> list[Linear] | None:
        return None if store.manifest.speech else fit(store, rows, self.quantizer)

    @torch.no_grad()
    def held_out(self, batch: CodeBatch, baselines: list[Linear] | None = None) -> dict[str, Tensor]:
        """Per t: cross-entropy, accuracy, the model-free guess's accuracy, mean norm of z'_t; class_mean and linear.

        These two are the guess's accuracy with z as the baselines predict it, where the guess has 0."""
        assert batch.eps_BJCS is not None
        quantizer, codes, means = self.quantizer, batch.codes_BTS, []
        ones_B, condition = torch.ones_like(batch.t_BJ[:, 0]), self.condition(batch.columns)
        exists, known = condition.exists_BS, condition.known_BS
        weight_BS = (
            torch.ones_like(codes[:, 0], dtype=torch.bool) if exists is None or known is None else exists & ~known
        )
        count = int(weight_BS.sum())

        def mean(x_BS: Tensor) -> Tensor:
            return x_BS.float().mean() if count == x_BS.numel() else (x_BS * weight_BS).sum() / count

        for t in range(1, quantizer.steps + 1):
            previous, eps = quantizer.prefix(codes, ones_B * (t - 1)), batch.eps_BJCS[:, t - 1]
            target_BS = codes[:, t - 1]
            logits = self.predict(eps, previous, ones_B * t, condition)[0].float()
            ce = mean(F.cross_entropy(logits.flatten(0, 1), target_BS.flatten(), reduction="none").view_as(target_BS))
            guesses = [logits.argmax(-1), quantizer.guess(previous, eps, t)]
            for latents in (baselines[0], baselines[t - 1]) if baselines else ():  # the first one is the class mean
                z = latents.predict(previous, batch.columns["labels"])
                guesses.append(quantizer.guess(previous - z, eps, t))
            norm = mean(quantizer.prefix(codes, ones_B * t).norm(dim=1))
            means.append(torch.stack([ce, norm, *(mean(guess == target_BS) for guess in guesses)]))
        share = len(codes) if exists is None else count  # of sound each position counts alike
        sums_MT = torch.stack(means, 1) * share
        pairs = torch.stack([sums_MT, torch.full_like(sums_MT, share)], 1)
        names = ["ce", "norm", "accuracy", "baseline", *(["class_mean", "linear"] if baselines else [])]
        return dict(zip(names, pairs, strict=True))

    def check(self, options: SampleOptions) -> None:
        T, skip, first = self.quantizer.steps, options.sampling.skip_steps, options.sampling.cfg_first
        if skip >= T or (skip and self.quantizer.alphas[0] == 1.0):
            raise UsageError(f"--skip-steps {skip}: this checkpoint has T = {T} steps", "0 only under schedule rvq")
        most = self.network.guidance
        if most and options.sampling.cfg > most and not options.guide:
            message = f"cfg={options.sampling.cfg:g}: this checkpoint has learnt guidance up to {most:g}"
            raise UsageError(message, "give a smaller cfg")
        if first > T:  # no step would be guided
            raise UsageError(f"cfg_first={first}: this checkpoint has T = {T} steps", "cfg=0 turns guidance off")

    def passes(self, options: SampleOptions, first: int = 1) -> int:
        drawn = range(max(options.sampling.skip_steps + 1, first), self.quantizer.steps + 1)
        in_one = self.network.guidance and not options.guide
        return sum(1 + (self._lambda(t, options.sampling) > 0 and not in_one) for t in drawn)

    def _lambda(self, t: int, s: RDPMSampling) -> float:
        return guidance_at(t, self.quantizer.steps, s.cfg, s.cfg_schedule, s.cfg_power, s.cfg_first, s.cfg_last)

    def _guided(
        self, columns: Columns, condition: Condition, options: SampleOptions
    ) -> Callable[[Tensor, Tensor, int, float], Tensor]:
        """(eps, z'_{t-1}, t, lambda) -> guided logits: by a guide, by lambda as an input, or by the null class."""
        learnt, weak, weak_condition, both = self.network.guidance, None, None, None
        if options.guide:
            weak = options.guide.generator
            weak.network.to(condition.vector_BD.device)
            weak_condition = weak.condition(columns)
        elif options.sampling.cfg and not learnt:
            both = condition.joined(self.null_condition(columns))

        def logits(eps: Tensor, previous: Tensor, t: int, lambda_t: float) -> Tensor:
            t_B = torch.full((len(eps),), t, device=eps.device)
            if lambda_t and both is not None:  # one pass of 2B rows
                twice = eps.repeat(2, 1, 1), previous.repeat(2, 1, 1), t_B.repeat(2)
                return guide(self.predict(*twice, both)[0].float(), lambda_t)
            if lambda_t and isinstance(weak, RDPM) and weak_condition:
                pairs = ((self, condition), (weak, weak_condition))
                return guide(torch.cat([x.predict(eps, previous, t_B, y)[0].float() for x, y in pairs]), lambda_t)
            lambda_B = torch.full_like(t_B, lambda_t, dtype=torch.float) if learnt else None
            return self.predict(eps, previous, t_B, condition, lambda_B)[0].float()

        return logits

    @torch.no_grad()
    def sample(self, columns: Columns, indices_B: Tensor, options: SampleOptions, known: Known | None = None) -> Tensor:
        """Alg. 2: z'_t = z'_{t-1} + bias(e_{C_t}), C_t drawn from tau · logits, noise addressed by index. codes_BTS."""
        self.check(options)
        condition, sampling, indices = self.condition(columns), options.sampling, indices_B.tolist()
        quantizer, B, device = self.quantizer, len(indices), condition.vector_BD.device
        purpose, view = options.noise
        is_known = [] if known is None else known.keep_BTS.all(-1).all(0).tolist()
        logits_at = self._guided(columns, condition, options)
        length = None if condition.exists_BS is None else condition.exists_BS.shape[1]
        shape = (quantizer.books.shape[-1], length or math.prod(quantizer.grid))
        previous, codes = torch.zeros(B, *shape, device=device), []
        for t in range(1, quantizer.steps + 1):  # nothing in this loop waits for a GPU
            eps = to_device(quantizer.noise(purpose, options.seed, indices, [view] * B, [t] * B, length), device)
            if known is not None and is_known[t - 1]:
                codes_BS = known.codes_BTS[:, t - 1]
            elif t <= sampling.skip_steps:
                codes_BS = quantizer.guess(previous, eps, t)
            else:
                logits = logits_at(eps, previous, t, self._lambda(t, sampling))
                logits = logits * tau_at(t, quantizer.steps, sampling.tau, sampling.tau_end)
                codes_BS = draw(narrow(logits, sampling.top_k, sampling.top_p), sampling.draw, indices, t, options.seed)
            if known is not None:
                codes_BS = torch.where(known.keep_BTS[:, t - 1], known.codes_BTS[:, t - 1], codes_BS)
            with one_thread():  # the sums of the bias convolution depend on the number of threads
                previous = previous + quantizer.bias(quantizer.look_up(codes_BS, t))
            codes.append(codes_BS)
        return torch.stack(codes, 1)

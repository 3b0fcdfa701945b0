"""RDPM: recurrent token prediction (arXiv 2412.18390 §3.2, Alg. 2), and the options beyond the paper (DESIGN §2).

Legend: B images, R rows (images × values of t), T steps, C code width, H W grid, L = H·W, K codes, D width.
"""

from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from rdpm_cli import noise, precision
from rdpm_cli.codes.store import CodeStore
from rdpm_cli.config import GeneratorConfig, NetworkConfig, RDPMArchitecture, RDPMSampling
from rdpm_cli.errors import UsageError
from rdpm_cli.generator import strategies
from rdpm_cli.generator.contract import Known, SampleOptions, Tally
from rdpm_cli.generator.guidance import guidance_at, guide, tau_at
from rdpm_cli.generator.rdpm_batches import CodeBatch
from rdpm_cli.generator.transformer import Condition, Transformer
from rdpm_cli.step import TrainStep
from rdpm_cli.threads import one_thread
from rdpm_cli.tokenizer.quantizer import Quantizer
from rdpm_cli.tokenizer.schedule import beta

LOGIT_SCALE = 0.5  # s_t at the start
LOGITS_AT_ONCE = 1 << 26  # fp32 values held at once in training: 256 MiB; d16's 128 images have twice as many
SCALE_GAIN = 20.0  # of the learnt number under the softplus: s_t must reach about 1 / (2 var(mu)), 5 to 50, and Adam
# moves a number by about its learning rate a step; without the gain s_t was still climbing when training ended


def tokens(x_BCHW: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, L, C)."""
    return x_BCHW.flatten(2).transpose(1, 2)


def rdpm_sampling(options: SampleOptions) -> RDPMSampling:
    """The options' sampling section, which is RDPM's here."""
    assert isinstance(options.sampling, RDPMSampling)
    return options.sampling


class RDPMNetwork(nn.Module):
    """f(eps_t, y, t, z'_{t-1}): Linear(2C -> D), transformer; then the heads, which start at zero."""

    def __init__(
        self, cfg: NetworkConfig, grid: tuple[int, int], channels: int, codes: int, steps: int, classes: int
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

    def forward(
        self,
        eps_RCHW: Tensor,
        previous_RCHW: Tensor,
        t_R: Tensor,
        labels_R: Tensor,
        condition: Condition | None = None,
    ) -> Tensor:
        """What the heads see, (R, L, D). condition: of these t and labels, where it is known."""
        x = self.input(tokens(torch.cat([eps_RCHW, previous_RCHW], 1))).float()  # the residual stream stays fp32
        hidden: Tensor = self.trunk(x, t_R, labels_R, condition)
        return hidden

    def heads(self, hidden_RLD: Tensor) -> tuple[Tensor, Tensor | None]:
        """-> logits of the linear head (R, L, K), zhat (R, L, C) or None."""
        return self.head(hidden_RLD), self.latent_head(hidden_RLD) if self.latent_head is not None else None


class RDPM:
    """The family: loss over stored codes, sampling over T recurrent steps."""

    def __init__(self, cfg: RDPMArchitecture, quantizer: Quantizer, grid: tuple[int, int], classes: int) -> None:
        """quantizer: the frozen tokenizer's; it holds codebook, bias convolution and schedule."""
        quant = quantizer.cfg
        channels = quantizer.books.shape[-1]
        self.cfg, self.quantizer, self.grid, self.classes = cfg, quantizer, grid, classes
        self.network: nn.Module = RDPMNetwork(cfg.network, grid, channels, quant.codes, quant.steps, classes)
        self._schedules: dict[torch.device, tuple[Tensor, Tensor]] = {}

    # ---- one prediction --------------------------------------------------------------------------------------

    def predict(
        self, eps_RCHW: Tensor, previous_RCHW: Tensor, t_R: Tensor, labels_R: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """logits over C_t (R, L, K), and zhat (R, L, C) fp32 with the geometric head."""
        return self.scores(self.network(eps_RCHW, previous_RCHW, t_R, labels_R), eps_RCHW, previous_RCHW, t_R)

    def scores(
        self, hidden_RLD: Tensor, eps_RCHW: Tensor, previous_RCHW: Tensor, t_R: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The same from the network's last hidden state."""
        assert isinstance(self.network, RDPMNetwork)
        logits, zhat = self.network.heads(hidden_RLD)
        if zhat is None:
            return logits, None
        with precision.full(zhat):
            zhat = zhat.float()
            return logits.float() + self.geometric_logits(zhat, eps_RCHW, previous_RCHW, t_R), zhat

    def geometric_logits(self, zhat_RLC: Tensor, eps_RCHW: Tensor, previous_RCHW: Tensor, t_R: Tensor) -> Tensor:
        """s_t (2 <mu, e_k> - |e_k|²), mu = alpha_t (zhat - z'_{t-1}) + beta_t eps_t: (R, L, K). Affine in zhat.

        C_t is the code nearest to alpha_t (z - z'_{t-1}) + beta_t eps_t, where only z is unknown.
        """
        alpha_T, beta_T = self._schedule(t_R.device)
        alpha_R11, beta_R11 = alpha_T[t_R - 1].view(-1, 1, 1), beta_T[t_R - 1].view(-1, 1, 1)
        mu = alpha_R11 * (zhat_RLC - tokens(previous_RCHW)) + beta_R11 * tokens(eps_RCHW)
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
        """Cross-entropy of C_t (Eq. 7) at S values of t an image, plus MSE(zhat, z) with the geometric head."""
        with torch.no_grad():
            codes, eps_BSCHW = self._noisy_codes(batch, step)
            S = batch.t_BS.shape[1]
            t_R, labels_R = batch.t_BS.flatten(), batch.labels_B.repeat_interleave(S)
            rows = codes.repeat_interleave(S, 0)
            previous = self.quantizer.prefix(rows, t_R - 1)
            if batch.spread_B is not None:
                shake = step.normal(*previous.shape[1:]) * batch.spread_B.view(-1, 1, 1, 1)
                previous = previous + shake.repeat_interleave(S, 0)
            target_RL = rows[torch.arange(len(rows), device=rows.device), t_R - 1].flatten(1)
            geometric = self.cfg.network.head == "geometric"
            goal_RLC = tokens(self._latents(batch)).repeat_interleave(S, 0) if geometric else None
        eps = eps_BSCHW.flatten(0, 1)
        hidden = self.network(eps, previous, t_R, labels_R)
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
            own = slice(start, min(start + size, count))
            goal = None if goal_RLC is None else goal_RLC[own]
            given = (hidden[own], eps[own], previous[own], t_R[own], target_RL[own], goal)
            found = torch.utils.checkpoint.checkpoint(self._part, *given, use_reentrant=False)
            share = (own.stop - own.start) / count
            ce, right = ce + share * found[0], right + share * found[2]
            latent = latent if found[1] is None else latent + share * found[1]
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
        return batch.z_BCHW if batch.z_BCHW is not None else self.quantizer.decode(batch.codes_BTHW)

    def _noisy_codes(self, batch: CodeBatch, step: TrainStep) -> tuple[Tensor, Tensor]:
        """codes (B, T, H, W) and the noise of the batch's steps (B, S, C, H, W): cached, or Q(z, eps) of a new eps."""
        if batch.eps_BSCHW is not None:
            return batch.codes_BTHW, batch.eps_BSCHW
        z = self._latents(batch)
        eps = step.normal(self.quantizer.steps, *z.shape[1:])
        chosen = eps[torch.arange(len(eps), device=eps.device).unsqueeze(1), batch.t_BS - 1]
        return self.quantizer.encode(z, eps), chosen

    # ---- held-out measurement --------------------------------------------------------------------------------

    @torch.no_grad()
    def held_out(self, batch: CodeBatch) -> dict[str, Tally]:
        """Per t, each (T,): cross-entropy, accuracy, the model-free guess's accuracy, mean norm of z'_t.

        batch: with the noise of all T steps.
        """
        found: dict[str, list[Tensor]] = {"ce": [], "accuracy": [], "baseline": [], "norm": []}
        assert batch.eps_BSCHW is not None
        codes, rows = batch.codes_BTHW, torch.ones_like(batch.labels_B)
        for t in range(1, self.quantizer.steps + 1):
            previous, eps = self.quantizer.prefix(codes, rows * (t - 1)), batch.eps_BSCHW[:, t - 1]
            logits = self.predict(eps, previous, rows * t, batch.labels_B)[0].float()
            target_BL = codes[:, t - 1].flatten(1)
            found["ce"].append(F.cross_entropy(logits.flatten(0, 1), target_BL.flatten()))
            found["accuracy"].append((logits.argmax(-1) == target_BL).float().mean())
            found["baseline"].append((self.quantizer.guess(previous, eps, t).flatten(1) == target_BL).float().mean())
            found["norm"].append(self.quantizer.prefix(codes, rows * t).norm(dim=1).mean())
        images = torch.full((self.quantizer.steps,), len(codes), device=codes.device)
        return {name: Tally(torch.stack(values) * len(codes), images) for name, values in found.items()}

    # ---- sampling --------------------------------------------------------------------------------------------

    def check(self, options: SampleOptions) -> None:
        """Raise UsageError for options this tokenizer cannot use."""
        T, how = self.quantizer.steps, rdpm_sampling(options)
        if how.skip_steps >= T:
            raise UsageError(f"--skip-steps {how.skip_steps} is not in 0..{T - 1}", f"this checkpoint has T = {T}")
        if how.skip_steps and self.quantizer.alphas[0] == 1.0 and T > 1:
            raise UsageError("--skip-steps needs a noisy schedule; this tokenizer's is rvq", "leave it out")
        if how.cfg_schedule == "interval" and max(how.cfg_first, how.cfg_last or 1) > T:
            steps = f"{how.cfg_first} to {how.cfg_last or T}"
            raise UsageError(f"--cfg-first, --cfg-last: steps {steps} of {T}", f"this checkpoint has T = {T}")

    def passes(self, options: SampleOptions, first: int = 1) -> int:
        """Rows through the network for one sample; none at a step whose codes are all given."""
        how = rdpm_sampling(options)
        drawn = range(max(how.skip_steps + 1, first), self.quantizer.steps + 1)
        return sum(1 + (self._lambda(t, how) > 0) for t in drawn)

    def sample(self, labels_B: Tensor, indices_B: Tensor, options: SampleOptions, known: Known | None = None) -> Tensor:
        """Alg. 2: z'_t = z'_{t-1} + bias(e_{C_t}), C_t drawn from tau · logits, noise addressed by index."""
        return self._run(labels_B, indices_B, options, known)

    def trajectory(
        self, labels_B: Tensor, indices_B: Tensor, options: SampleOptions, known: Known | None = None
    ) -> dict[str, Tensor]:
        """How samples come about, (B, T) each: norm of z'_t, entropy (nats) and largest probability of what C_t is
        drawn from, means over positions; NaN at steps without a network call."""
        found: dict[str, list[Tensor]] = {"norm": [], "entropy": [], "confidence": []}
        self._run(labels_B, indices_B, options, known, found)
        return {name: torch.stack(values, 1) for name, values in found.items()}

    @torch.no_grad()
    def _run(
        self,
        labels_B: Tensor,
        indices_B: Tensor,
        options: SampleOptions,
        known: Known | None,
        watched: dict[str, list[Tensor]] | None = None,
    ) -> Tensor:
        self.check(options)
        how = rdpm_sampling(options)
        device, indices, labels = labels_B.device, indices_B.tolist(), labels_B.tolist()
        given = [False] * self.quantizer.steps if known is None else known.keep_BTHW.all(-1).all(-1).all(0).tolist()
        shape = (self.quantizer.books.shape[-1], *self.grid)
        previous = torch.zeros(len(indices), *shape, device=device)
        codes = []
        for t in range(1, self.quantizer.steps + 1):  # from here on nothing waits for the device
            none, ts = [0] * len(indices), [t] * len(indices)
            drawn = noise.normal_rows("sample", options.seed, indices, none, ts, shape)
            eps = strategies.to_device(drawn, device)
            logits_BLK = None
            if known is not None and given[t - 1]:
                codes_t = known.codes_BTHW[:, t - 1]
            elif t <= how.skip_steps:
                codes_t = self.quantizer.guess(previous, eps, t)
            else:
                logits_BLK = self._offered(eps, previous, t, labels, how)
                codes_t = strategies.draw(logits_BLK, how, indices, t, options.seed).view(-1, *self.grid)
            if known is not None:
                codes_t = torch.where(known.keep_BTHW[:, t - 1], known.codes_BTHW[:, t - 1], codes_t)
            with one_thread():  # a convolution, which moves with the thread count
                previous = previous + self.quantizer.bias(self.quantizer.look_up(codes_t, t))
            codes.append(codes_t)
            if watched is not None:
                _watch(watched, previous, logits_BLK)
        return torch.stack(codes, 1)

    def _offered(self, eps: Tensor, previous: Tensor, t: int, labels: list[int], how: RDPMSampling) -> Tensor:
        """What C_t is drawn from: tau_t · guided logits, narrowed, (B, L, K) fp32."""
        T = self.quantizer.steps
        logits_BLK = self._guided(eps, previous, t, labels, how) * tau_at(t, T, how.tau, how.tau_end)
        return strategies.narrow(logits_BLK, how.top_k, how.top_p)

    def _guided(self, eps: Tensor, previous: Tensor, t: int, labels: list[int], how: RDPMSampling) -> Tensor:
        """logits (B, L, K) fp32; one pass of 2B rows with guidance, of B rows where lambda_t = 0."""
        lambda_t = self._lambda(t, how)
        if lambda_t == 0:
            return self._logits(eps, previous, t, labels)
        both = labels + [self.classes] * len(labels)
        cond, uncond = self._logits(eps.repeat(2, 1, 1, 1), previous.repeat(2, 1, 1, 1), t, both).chunk(2)
        return guide(cond, uncond, lambda_t)

    def _lambda(self, t: int, how: RDPMSampling) -> float:
        return guidance_at(
            t, self.quantizer.steps, how.cfg, how.cfg_schedule,
            power=how.cfg_power, first=how.cfg_first, last=how.cfg_last,
        )  # fmt: skip

    def _logits(self, eps_RCHW: Tensor, previous_RCHW: Tensor, t: int, labels: list[int]) -> Tensor:
        """logits (R, L, K) fp32 of one t; what t and class contribute comes from the trunk's memory."""
        assert isinstance(self.network, RDPMNetwork)
        condition = self.network.trunk.condition(t, labels)
        t_R, labels_R = (strategies.to_device(values, eps_RCHW.device) for values in ([t] * len(labels), labels))
        hidden = self.network(eps_RCHW, previous_RCHW, t_R, labels_R, condition=condition)
        return self.scores(hidden, eps_RCHW, previous_RCHW, t_R)[0].float()


def _watch(watched: dict[str, list[Tensor]], z_BCHW: Tensor, logits_BLK: Tensor | None) -> None:
    """Note a step's norm of z'_t, entropy and confidence, (B,) each."""
    norm = z_BCHW.norm(dim=1).flatten(1).mean(1)
    nothing = torch.full_like(norm, torch.nan)
    entropy, confidence = (nothing, nothing) if logits_BLK is None else strategies.look(logits_BLK)
    for name, value in (("norm", norm), ("entropy", entropy), ("confidence", confidence)):
        watched[name].append(value)

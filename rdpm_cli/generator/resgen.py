"""ResGen: masked prediction of the sum of the masked depths' embeddings (arXiv 2412.10208).

Legend: B images, L positions, D depths (the tokenizer's T), V codes a book, H width of a code, K components. A slot is
one (position, depth), N of them an image. A mask is True where a token is masked: `coarse-to-fine` masks the finest
depths first, `random` any. At the seams codes are (B, T, S), T = D, S = L."""

import math
from collections import OrderedDict
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdpm_cli import noise
from rdpm_cli.codes.store import CodeStore, evenly_spaced
from rdpm_cli.distributed import TrainStep, full_precision
from rdpm_cli.errors import DataError, UsageError
from rdpm_cli.generator import mixture
from rdpm_cli.generator.config import ResGenConfig, ResGenNetwork, ResGenObjective
from rdpm_cli.generator.contract import Condition, SampleOptions
from rdpm_cli.generator.drawing import guide
from rdpm_cli.generator.masking import Inputs, MaskBatch, MaskedGenerator
from rdpm_cli.generator.transformer import Transformer, zero_linear
from rdpm_cli.tokenizer.config import TokenizerArchitecture
from rdpm_cli.tokenizer.quantizer import Quantizer, Search

MEASURED_ROWS, MEASURED_AT_ONCE = 8192, 256  # training rows whose scales are measured, evenly spaced


@torch.no_grad()
def measure(store: CodeStore, quantizer: Quantizer, objective: ResGenObjective) -> tuple[Tensor, float, str]:
    """rho (D + 1,), sigma_psi and its source of the training rows, RMS a dimension. Raises DataError if a rho is 0.

    rho_k: of the sum of the finest, or any, k depths' embeddings. sigma_psi: the recipe's; of z - z'_T; or rho_1 / 2.
    """
    rows = evenly_spaced(store.split()[0], MEASURED_ROWS)
    device, D, error, count = quantizer.books.device, quantizer.steps, 0.0, 0
    moments_DD = torch.zeros(D, D, dtype=torch.float64, device=device)  # of e_j e_l over positions and dimensions
    for start in range(0, len(rows), MEASURED_AT_ONCE):
        part = rows[start : start + MEASURED_AT_ONCE]
        codes = torch.from_numpy(store.codes(part).astype(np.int64)).to(device)
        exists_BS = torch.from_numpy(store.exists(part)).to(device)
        books = (quantizer.look_up(codes[:, t - 1], t) for t in range(1, D + 1))
        e_DN = torch.stack([e_BCS.mT[exists_BS].flatten() for e_BCS in books]).double()
        moments_DD += e_DN @ e_DN.T
        count += e_DN.shape[1]
        if store.manifest.latents:
            z_BCS = torch.from_numpy(store.latents(part).astype(np.float32)).to(device)
            z_N = z_BCS.mT[exists_BS].flatten().double()
            error += float((z_N - e_DN.sum(0)).pow(2).sum())
    moments_DD /= count
    diagonal, total, squares = float(moments_DD.trace()), float(moments_DD.sum()), [1.0]
    for k in range(1, D + 1):
        if objective.order == "coarse-to-fine":
            squares.append(float(moments_DD[D - k :, D - k :].sum()))
        else:
            pairs = k * (k - 1) / (D * (D - 1)) if D > 1 else 0.0  # the share of pairs of depths among the k
            squares.append(diagonal * k / D + (total - diagonal) * pairs)
    rho = torch.tensor(squares).sqrt().float()
    if not bool((rho > 0).all()):
        hint = "train the tokenizer longer, or with fewer quantizer.steps, and tokenize again"
        raise DataError(f"{store.root}: the finest codes all stand for 0, so there is nothing to learn there", hint)
    if objective.sigma_psi is not None:
        return rho, objective.sigma_psi, "recipe"
    return (rho, math.sqrt(error / count), "latents") if error else (rho, 0.5 * float(rho[1]), "rho")


class MaskedNetwork(nn.Module):
    """Linear(H -> width) of the visible sum, transformer; the head; and the scales of the codes."""

    def __init__(self, cfg: ResGenNetwork, quantizer: Quantizer, classes: int) -> None:
        super().__init__()
        channels, depths = quantizer.books.shape[-1], quantizer.steps
        self.ratio_cond = cfg.ratio_cond
        self.input = nn.Linear(channels, cfg.hidden)
        self.trunk = Transformer(cfg, quantizer.grid, channels, classes)
        self.counts = nn.Embedding(depths + 1, cfg.hidden) if cfg.count_embed else None
        if self.counts is not None:
            nn.init.normal_(self.counts.weight, std=0.02)
        self.head: nn.Module  # direct: logits of every depth's token, (B, L, D·V)
        if cfg.target == "cumulative":
            self.head = mixture.MixtureHead(cfg.hidden, channels, cfg.mixtures, cfg.rank)
        else:
            self.head = nn.Sequential(OrderedDict(out=zero_linear(cfg.hidden, depths * quantizer.cfg.codes)))
        self.rho, self.sigma_psi = nn.Buffer(torch.ones(depths + 1)), nn.Buffer(torch.ones(()))
        self.coarse_first = nn.Buffer(torch.ones((), dtype=torch.bool))

    def forward(self, visible_BLH: Tensor, masked_BLD: Tensor, condition: Condition) -> Tensor:
        """The hidden state that the head sees, (B, L, width). visible: the sum of the visible embeddings."""
        x = self.input(visible_BLH / self.rho[-1]).float()  # the residual stream stays fp32 under autocast
        if self.counts is not None:
            x = x + self.counts((~masked_BLD).sum(-1))
        # The masked share, not counting padding, is embedded as a step of a thousand.
        ratio_B = 1000.0 * masked_BLD.flatten(1).float().mean(1)
        if condition.exists_BS is not None:
            ratio_B = ratio_B / condition.exists_BS.float().mean(1)
        return self.trunk(x, ratio_B if self.ratio_cond else torch.zeros_like(ratio_B), condition)


class ResGen(MaskedGenerator):
    """The family: loss on masked codes, sampling in as many passes as asked for, whatever the depth."""

    network: MaskedNetwork

    @property
    def coarse_first(self) -> bool:
        return bool(self.network.coarse_first)

    def __init__(self, cfg: ResGenNetwork, quantizer: Quantizer, classes: int) -> None:
        self.quantizer, self.classes, self.objective = quantizer, classes, ResGenObjective()
        self.direct = cfg.target == "direct"
        self.network = MaskedNetwork(cfg, quantizer, classes)

    @staticmethod
    def check_codes(tokenizer: TokenizerArchitecture, origin: str) -> None:
        kind, bias = tokenizer.schedule.kind, tokenizer.quantizer.bias
        if kind != "rvq" or bias != "none":  # codes that fit noise, or a biased sum, cannot be requantised
            hint = "tokenize by such a tokenizer, e.g. of --recipe resgen-digits; or train RDPM, e.g. --recipe digits"
            reason = f"holds codes of schedule {kind} with bias {bias}, but ResGen needs schedule rvq and bias none"
            raise UsageError(f"{origin} {reason}", hint)

    @torch.no_grad()
    def sums(self, codes_BTS: Tensor, masked_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """u and z: sums of the visible and of the masked tokens' embeddings, (B, L, H) each; of none, exactly 0."""
        depths = [self.quantizer.look_up(codes_BTS[:, t - 1], t) for t in range(1, self.quantizer.steps + 1)]
        embedded_BLDH, masked = torch.stack(depths, 1).permute(0, 3, 1, 2), masked_BLD.unsqueeze(-1)
        return embedded_BLDH.masked_fill(masked, 0).sum(2), embedded_BLDH.masked_fill(~masked, 0).sum(2)

    def units(self, masked_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """rho_k and sigma_psi / rho_k of each position's number k of masked depths, (B, L) each."""
        rho_BL = self.network.rho[masked_BLD.sum(-1)]
        return rho_BL, self.network.sigma_psi / rho_BL

    def predict(self, visible_BLH: Tensor, masked_BLD: Tensor, condition: Condition) -> mixture.Mixture:
        """The distribution of z / rho_k at each position."""
        return self.network.head(self.network(visible_BLH, masked_BLD, condition), self.units(masked_BLD)[1] / 2)

    def predict_tokens(self, visible_BLH: Tensor, masked_BLD: Tensor, condition: Condition) -> Tensor:
        """Logits of every slot's token, (B, L, D, V), with `target: direct`."""
        logits = self.network.head(self.network(visible_BLH, masked_BLD, condition))
        return logits.float().unflatten(-1, (self.quantizer.steps, -1))

    def begin(self, cfg: ResGenConfig, store: CodeStore) -> dict[str, Any]:
        rho, sigma_psi, source = measure(store, self.quantizer, cfg.objective)
        self.network.rho.copy_(rho)
        self.network.sigma_psi.fill_(sigma_psi)
        self.network.coarse_first.fill_(cfg.objective.order == "coarse-to-fine")
        return {"sigma_psi": {"value": sigma_psi, "source": source}, "rho": rho.tolist()}

    def loss(self, batch: MaskBatch, step: TrainStep) -> tuple[Tensor, dict[str, Tensor]]:
        """L_mask in nats: a mean over positions with a masked slot, and dimensions; direct: over slots."""
        if self.direct:
            ce_BLD, right_BLD = self._token_losses(batch)
            count = len(batch.masked_BLD) * batch.slots
            ce = (ce_BLD * batch.masked_BLD).sum() / count
            return ce, {"nll": ce.detach(), "accuracy": (right_BLD & batch.masked_BLD).sum() / count}
        log_pi, kl, w, _ = self._divergences(batch)
        with full_precision(w):
            kind, open_BL = self.objective.mog_loss, batch.masked_BLD.any(-1)
            nll_BL = bound_BL = mixture.exact_nll(log_pi, kl)
            if kind == "clam":
                bound_BL = mixture.clam_loss(log_pi, kl)
            elif kind == "split":
                bound_BL = mixture.split_loss(log_pi, kl, self.objective.detach_resp)
            count = len(batch.masked_BLD) * batch.positions * w.shape[-1]
            nll, loss = ((x * open_BL).sum() / count for x in (nll_BL, bound_BL))
            # The effective number of components is 1 / sum of squared mean pi.
            mean_K = (log_pi.detach().exp() * open_BL.unsqueeze(-1)).sum((0, 1)) / open_BL.sum().clamp_min(1)
            return loss, {"nll": nll.detach(), "components": 1 / mean_K.pow(2).sum()}

    def _divergences(self, batch: MaskBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """log pi_c and KL_c (B, L, K), w = z / rho_k (B, L, H) and sp = sigma_psi / rho_k (B, L)."""
        visible, z = self.sums(batch.codes_BTS, batch.masked_BLD)
        mix = self.predict(visible, batch.masked_BLD, self.condition(batch.columns))
        with full_precision(visible):
            rho, sp = self.units(batch.masked_BLD)
            w = z / rho.unsqueeze(-1)
            return mix.logits_BLK.log_softmax(-1), mixture.divergences(mix, w, sp), w, sp

    def _token_losses(self, batch: MaskBatch) -> tuple[Tensor, Tensor]:
        """Cross-entropy of every slot's token, and whether the likeliest is right: (B, L, D) each."""
        visible, _ = self.sums(batch.codes_BTS, batch.masked_BLD)
        logits = self.predict_tokens(visible, batch.masked_BLD, self.condition(batch.columns))
        target_BLD = batch.codes_BTS.transpose(1, 2)
        ce = F.cross_entropy(logits.flatten(0, 2), target_BLD.flatten(), reduction="none")
        return ce.view(target_BLD.shape), logits.argmax(-1) == target_BLD

    @torch.no_grad()
    def held_out(self, batch: MaskBatch, baselines: None = None) -> dict[str, Tensor]:
        """By the number k = 1..D of masked depths: exact NLL and the baseline's, nats a dimension; direct: a token."""
        k_BL, D = batch.masked_BLD.sum(-1), self.quantizer.steps
        if self.direct:
            ce_BLD, _ = self._token_losses(batch)
            nll = (ce_BLD * batch.masked_BLD).sum(-1) / k_BL.clamp_min(1)
            baseline = torch.full_like(nll, self.quantizer.cfg.codes).log()
        else:
            log_pi, kl, w, sp = self._divergences(batch)
            nll, baseline = (x / w.shape[-1] for x in (mixture.exact_nll(log_pi, kl), mixture.gaussian_nll(w, sp)))
        k, measured = k_BL.flatten(), {}
        for name, values_BL in (("nll", nll), ("baseline", baseline)):
            total = nll.new_zeros(D + 1).index_add_(0, k, values_BL.flatten())
            measured[name] = torch.stack([total, k.bincount(minlength=D + 1)])[:, 1:]  # k = 0 has nothing to predict
        return measured

    def draw_tokens(
        self, t: int, lambda_t: float, inputs: Inputs, options: SampleOptions, indices: list[int]
    ) -> tuple[Tensor, Tensor]:
        """Tokens of all masked slots (B, L, D), and how sure each position is of its own (B, L, 1)."""
        (codes, masked, condition), s, zeros, mix = inputs, options.sampling, [0] * len(indices), None
        network_inputs = self.sums(codes.transpose(1, 2), masked)[0], masked, condition
        masked = masked[: len(indices)]
        if self.direct:
            logits = self.predict_tokens(*network_inputs)
            logits = (guide(logits, lambda_t) if lambda_t else logits) / max(s.z_temp, 1e-4)
        else:
            mix = self.predict(*network_inputs)
            mix = mix.guided(lambda_t, means=s.cfg_mode == "both") if lambda_t else mix
            logits = mix.logits_BLK
        uniform = noise.uniform_rows("component", options.seed, indices, zeros, t, logits.shape[1:-1])
        choice = mixture.draw(mixture.nucleus(logits, s.top_p), torch.from_numpy(uniform).to(masked.device))
        log_p = logits.log_softmax(-1).gather(-1, choice.unsqueeze(-1)).squeeze(-1)
        if mix is None:
            tokens, log_p = choice, (log_p * masked).sum(-1) / masked.sum(-1).clamp_min(1)
            density = log_p
        else:
            eps = noise.normal_rows("sample", options.seed, indices, zeros, [t] * len(zeros), mix.shift_BLH.shape[1:])
            w = mixture.vector_of(mix, choice, torch.from_numpy(eps).to(masked.device), s.z_temp)
            tokens = requantise(self.quantizer, w * self.units(masked)[0].unsqueeze(-1), masked)
            density = mixture.log_density(mix, w)
        if s.conf != "logp":
            return tokens, (log_p if s.conf == "comp" else torch.zeros_like(log_p)).unsqueeze(-1)
        # z-scores over an image's open positions, since densities of different k have different scales.
        open_BL = masked.any(-1)
        count = open_BL.sum(1, keepdim=True).clamp_min(1)
        mean = (density * open_BL).sum(1, keepdim=True) / count
        spread = (((density - mean) * open_BL).pow(2).sum(1, keepdim=True) / count).sqrt()
        return tokens, ((density - mean) / spread.clamp_min(1e-6)).unsqueeze(-1)


def requantise(quantizer: Quantizer, z_BLH: Tensor, masked_BLD: Tensor) -> Tensor:
    """Tokens of the masked depths, coarsest first, by residual quantisation of their sum z; else 0. (B, L, D) int64."""
    codes, residual = torch.zeros_like(masked_BLD, dtype=torch.int64), z_BLH.clone()
    for depth in range(quantizer.steps):
        rows, book = masked_BLD[..., depth], quantizer.book(depth + 1)
        if bool(rows.any()):
            nearest = Search(book).nearest(residual[rows])
            residual[rows] -= book[nearest]
            codes[..., depth][rows] = nearest
    return codes

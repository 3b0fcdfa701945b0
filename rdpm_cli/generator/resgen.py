"""ResGen: masked prediction of the sum of the masked depths' embeddings (arXiv 2412.10208).

The method, with what public material leaves open, is the project's specification; its sections are named here.
Legend: B images, L positions, D depths (the tokenizer's T), V codes a book, H width of a code, K components, S steps.
A slot is one (position, depth).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdpm_cli import precision, progress
from rdpm_cli.codes.store import CodeStore
from rdpm_cli.config import GeneratorConfig, ResGenArchitecture, ResGenConfig, ResGenNetwork, ResGenObjective
from rdpm_cli.errors import UsageError
from rdpm_cli.generator import mixture, resgen_sampling
from rdpm_cli.generator.contract import Known, SampleOptions, Tally
from rdpm_cli.generator.mixture import Mixture, MixtureHead
from rdpm_cli.generator.resgen_batches import MaskBatch
from rdpm_cli.generator.resgen_sampling import sampling_of
from rdpm_cli.generator.scales import measure
from rdpm_cli.generator.transformer import Transformer
from rdpm_cli.step import TrainStep
from rdpm_cli.tokenizer.quantizer import Quantizer

RATIO = 1000.0  # the masked share is embedded as a step of a thousand


class TokenHead(nn.Module):
    """Hidden states -> logits of every depth's token, (B, L, D, V): the baseline `target: direct`. Starts at zero."""

    def __init__(self, width: int, depths: int, codes: int) -> None:
        super().__init__()
        self.depths = depths
        self.out = nn.Linear(width, depths * codes)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, hidden_BLD: Tensor) -> Tensor:
        logits: Tensor = self.out(hidden_BLD)
        return logits.float().unflatten(-1, (self.depths, -1))


class MaskedNetwork(nn.Module):
    """Linear(H -> width) of the visible sum, transformer; the head; and what was measured of the codes (§4)."""

    rho: Tensor
    sigma_psi: Tensor
    coarse_first: Tensor

    def __init__(
        self, cfg: ResGenNetwork, grid: tuple[int, int], channels: int, codes: int, depths: int, classes: int
    ) -> None:
        super().__init__()
        self.ratio_cond = cfg.ratio_cond
        self.input = nn.Linear(channels, cfg.hidden)
        self.trunk = Transformer(cfg, grid, channels, classes)
        self.counts = nn.Embedding(depths + 1, cfg.hidden) if cfg.count_embed else None
        if self.counts is not None:
            nn.init.normal_(self.counts.weight, std=0.02)
        self.head: MixtureHead | TokenHead = (
            MixtureHead(cfg.hidden, channels, cfg.mixtures, cfg.rank)
            if cfg.target == "cumulative"
            else TokenHead(cfg.hidden, depths, codes)
        )
        self.register_buffer("rho", torch.ones(depths + 1))
        self.register_buffer("sigma_psi", torch.ones(()))
        self.register_buffer("coarse_first", torch.ones((), dtype=torch.bool))

    def forward(self, visible_BLH: Tensor, masked_BLD: Tensor, labels_B: Tensor) -> Tensor:
        """What the head sees, (B, L, width). visible: the sum of the visible embeddings, 0 where all are masked."""
        x = self.input(visible_BLH / self.rho[-1]).float()  # the residual stream stays fp32
        if self.counts is not None:
            x = x + self.counts((~masked_BLD).sum(-1))
        share_B = masked_BLD.flatten(1).float().mean(1)
        hidden: Tensor = self.trunk(x, RATIO * share_B if self.ratio_cond else torch.zeros_like(share_B), labels_B)
        return hidden


class ResGen:
    """The family: loss on masked codes, sampling over S steps whatever the depth."""

    def __init__(self, cfg: ResGenArchitecture, quantizer: Quantizer, grid: tuple[int, int], classes: int) -> None:
        """quantizer: the frozen tokenizer's, of plain residual quantisation."""
        quant = quantizer.cfg
        self.cfg, self.quantizer, self.grid, self.classes = cfg, quantizer, grid, classes
        self.objective = cfg.objective if isinstance(cfg, ResGenConfig) else ResGenObjective()
        channels = quantizer.books.shape[-1]
        self.network: nn.Module = MaskedNetwork(cfg.network, grid, channels, quant.codes, quant.steps, classes)

    # ---- codes as slots --------------------------------------------------------------------------------------

    def embed(self, codes_BTHW: Tensor) -> Tensor:
        """Each token's embedding, (B, L, D, H)."""
        looked_up = [self.quantizer.look_up(codes_BTHW[:, t - 1], t) for t in range(1, self.quantizer.steps + 1)]
        return torch.stack(looked_up, 1).flatten(3).permute(0, 3, 1, 2)

    @staticmethod
    def masked_sums(embedded_BLDH: Tensor, masked_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """u and z: the sums over visible and over masked depths, (B, L, H) each; of no depth, exactly 0."""
        hidden = masked_BLD.unsqueeze(-1)
        return embedded_BLDH.masked_fill(hidden, 0).sum(2), embedded_BLDH.masked_fill(~hidden, 0).sum(2)

    # ---- one prediction --------------------------------------------------------------------------------------

    def _parts(self) -> MaskedNetwork:
        assert isinstance(self.network, MaskedNetwork)
        return self.network

    def units(self, masked_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """rho_k and sigma_psi / rho_k of each position's number k of masked depths, (B, L) each."""
        network = self._parts()
        rho_BL = network.rho[masked_BLD.sum(-1)]
        return rho_BL, network.sigma_psi / rho_BL

    def predict(self, visible_BLH: Tensor, masked_BLD: Tensor, labels_B: Tensor) -> Mixture:
        """The distribution of z / rho_k at each position."""
        head = self._parts().head
        assert isinstance(head, MixtureHead)
        mix: Mixture = head(self.network(visible_BLH, masked_BLD, labels_B), self.units(masked_BLD)[1] / 2)
        return mix

    def predict_tokens(self, visible_BLH: Tensor, masked_BLD: Tensor, labels_B: Tensor) -> Tensor:
        """Logits of every slot's token, (B, L, D, V), where target is direct."""
        logits: Tensor = self._parts().head(self.network(visible_BLH, masked_BLD, labels_B))
        return logits

    # ---- training --------------------------------------------------------------------------------------------

    def begin(self, cfg: GeneratorConfig, store: CodeStore) -> dict[str, Any]:
        """Measure rho and sigma_psi of the training rows; the network keeps them (§2, §5)."""
        assert isinstance(cfg, ResGenConfig)
        self.objective, network = cfg.objective, self._parts()
        coarse_first = cfg.objective.order == "coarse-to-fine"
        found = measure(store, self.quantizer, store.split()[0], coarse_first, cfg.objective.sigma_psi)
        network.rho.copy_(found.rho_D1)
        network.sigma_psi.fill_(found.sigma_psi)
        network.coarse_first.fill_(coarse_first)
        why = {
            "latents": "measured on the store's latents",
            "recipe": "given by the recipe",
            "rho": "half of rho_1, for the store keeps no latents (`rdpm tokenize --keep latents` would)",
        }[found.source]
        progress.say(
            f"sigma_psi {found.sigma_psi:.4g}, {why}; rho_1 {found.rho_D1[1]:.4g}, rho_D {found.rho_D1[-1]:.4g}"
        )
        return {"sigma_psi": {"value": found.sigma_psi, "source": found.source}, "rho": found.rho_D1.tolist()}

    def loss(self, batch: MaskBatch, step: TrainStep) -> tuple[Tensor, dict[str, Tensor]]:
        """L_mask of §6: a mean over positions with something masked and dimensions, nats; direct: over slots.

        Divided by the global batch's number of them, so that it does not depend on how a batch is shared.
        """
        with torch.no_grad():
            visible, z = self.masked_sums(self.embed(batch.codes_BTHW), batch.masked_BLD)
        rows = len(batch.labels_B)
        if self.cfg.network.target == "direct":
            ce_BLD, right_BLD = self._token_losses(visible, batch)
            count = rows * batch.slots
            ce = (ce_BLD * batch.masked_BLD).sum() / count
            return ce, {"nll": ce.detach(), "accuracy": (right_BLD & batch.masked_BLD).sum() / count}
        mix = self.predict(visible, batch.masked_BLD, batch.labels_B)
        with precision.full(visible):
            rho, sp = self.units(batch.masked_BLD)
            kl = mixture.divergences(mix, z / rho.unsqueeze(-1), sp)
            log_pi, open_BL = mix.logits_BLK.log_softmax(-1), batch.masked_BLD.any(-1)
            count = rows * batch.positions * z.shape[-1]
            nll = (mixture.exact_nll(log_pi, kl) * open_BL).sum() / count
            loss = nll if self.objective.mog_loss == "nll" else (self._bound(log_pi, kl) * open_BL).sum() / count
            return loss, {"nll": nll.detach(), "components": _effective(log_pi.detach().exp(), open_BL)}

    def _bound(self, log_pi: Tensor, kl: Tensor) -> Tensor:
        if self.objective.mog_loss == "clam":
            return mixture.clam_loss(log_pi, kl)
        return mixture.split_loss(log_pi, kl, self.objective.detach_resp)

    def _token_losses(self, visible_BLH: Tensor, batch: MaskBatch) -> tuple[Tensor, Tensor]:
        """Cross-entropy of every slot's token, and whether the likeliest is right: (B, L, D) each."""
        logits = self.predict_tokens(visible_BLH, batch.masked_BLD, batch.labels_B)
        target_BLD = resgen_sampling.to_slots(batch.codes_BTHW)
        ce = F.cross_entropy(logits.flatten(0, 2), target_BLD.flatten(), reduction="none")
        return ce.view_as(target_BLD), logits.argmax(-1) == target_BLD

    # ---- held-out measurement --------------------------------------------------------------------------------

    @torch.no_grad()
    def held_out(self, batch: MaskBatch) -> dict[str, Tally]:
        """By the number k = 1..D of masked depths: exact NLL and the baseline's, nats a dimension.

        direct: cross-entropy and a uniform guess's, nats a token.
        """
        visible, z = self.masked_sums(self.embed(batch.codes_BTHW), batch.masked_BLD)
        k_BL = batch.masked_BLD.sum(-1)
        if self.cfg.network.target == "direct":
            ce_BLD, _ = self._token_losses(visible, batch)
            nll = (ce_BLD * batch.masked_BLD).sum(-1) / k_BL.clamp_min(1)
            baseline = torch.full_like(nll, self.quantizer.cfg.codes).log()
        else:
            rho, sp = self.units(batch.masked_BLD)
            w, H = z / rho.unsqueeze(-1), z.shape[-1]
            mix = self.predict(visible, batch.masked_BLD, batch.labels_B)
            nll = mixture.exact_nll(mix.logits_BLK.log_softmax(-1), mixture.divergences(mix, w, sp)) / H
            baseline = mixture.gaussian_nll(w, sp) / H
        return {"nll": self._by_k(nll, k_BL), "baseline": self._by_k(baseline, k_BL)}

    def _by_k(self, values_BL: Tensor, k_BL: Tensor) -> Tally:
        k, D = k_BL.flatten(), self.quantizer.steps
        total = values_BL.new_zeros(D + 1).index_add_(0, k, values_BL.flatten())
        return Tally(total[1:], k.bincount(minlength=D + 1)[1:])

    # ---- sampling --------------------------------------------------------------------------------------------

    def check(self, options: SampleOptions) -> None:
        """Raise UsageError for more steps than there are tokens."""
        slots, steps = self.grid[0] * self.grid[1] * self.quantizer.steps, sampling_of(options).steps
        if steps > slots:
            raise UsageError(
                f"--steps {steps} is more than the {slots} tokens of an image",
                "each step reveals at least one token; give fewer",
            )

    def passes(self, options: SampleOptions, first: int = 1) -> int:
        """Rows through the network for one sample, whatever the depth, and how much of it is given."""
        how = sampling_of(options)
        return sum(1 + (resgen_sampling.lambda_at(t, how) > 0) for t in range(1, how.steps + 1))

    @torch.no_grad()
    def sample(self, labels_B: Tensor, indices_B: Tensor, options: SampleOptions, known: Known | None = None) -> Tensor:
        """§7: predict all masked sums, requantise them, reveal the most confident; S forward passes."""
        self.check(options)
        return resgen_sampling.sample(self, labels_B, [int(i) for i in indices_B], options, known)


def _effective(pi_BLK: Tensor, open_BL: Tensor) -> Tensor:
    """Effective number of components, 1 / sum of squared mean pi over positions with something masked."""
    mean_K = (pi_BLK * open_BL.unsqueeze(-1)).sum((0, 1)) / open_BL.sum().clamp_min(1)
    return 1 / mean_K.pow(2).sum()

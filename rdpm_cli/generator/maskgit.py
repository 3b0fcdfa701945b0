"""MaskGIT: masked prediction of tokens (arXiv 2202.04200), over one sequence of all positions and depths.

Legend: as in `tokens` and `masking`. Any slots may be masked: the tokens of a position are revealed in any order."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rdpm_cli import noise
from rdpm_cli.codes.store import CodeStore
from rdpm_cli.distributed import TrainStep
from rdpm_cli.generator import mixture
from rdpm_cli.generator.config import MaskGITObjective, TransformerConfig
from rdpm_cli.generator.contract import Condition, SampleOptions
from rdpm_cli.generator.drawing import guide
from rdpm_cli.generator.masking import Inputs, MaskBatch, MaskBatches, MaskedGenerator
from rdpm_cli.generator.tokens import TokenNetwork, log_frequencies, refuse_sound, token_grid, unigram
from rdpm_cli.generator.transformer import Transformer
from rdpm_cli.tokenizer.quantizer import Quantizer

SHARES = 10  # of masked slots at which held-out codes are measured: 5%, 15%, ..., 95%


class MaskGITBatches(MaskBatches):
    """Codes, labels and masks of a training step."""

    def held_out_counts(self, slots: int) -> list[int]:
        """Evenly spaced, whatever the schedule: the mean over them estimates the bound of `MaskGIT.held_out`."""
        return [max(1, math.floor((number + 0.5) / SHARES * slots + 0.5)) for number in range(SHARES)]


class MaskGITNetwork(TokenNetwork):
    """The transformer over all slots, each a token or none."""

    def __init__(self, cfg: TransformerConfig, quantizer: Quantizer, classes: int) -> None:
        super().__init__(cfg, quantizer)
        self.trunk = Transformer(cfg, token_grid(quantizer), quantizer.books.shape[-1], classes)

    def forward(self, codes_BLD: Tensor, masked_BLD: Tensor, condition: Condition) -> Tensor:
        """The hidden state that the heads see, (B, N, W)."""
        numbers_BLD = torch.where(masked_BLD, self.no_token, self.numbers(codes_BLD))
        return self.run(self.embedding(numbers_BLD.flatten(1)), condition)


class MaskGIT(MaskedGenerator):
    """The family: cross-entropy of masked tokens, sampling that reveals the likeliest draws first."""

    network: MaskGITNetwork

    def __init__(self, cfg: TransformerConfig, quantizer: Quantizer, classes: int) -> None:
        self.quantizer, self.classes, self.objective = quantizer, classes, MaskGITObjective()
        self.network = MaskGITNetwork(cfg, quantizer, classes)

    check_codes = staticmethod(refuse_sound)

    def predict(self, codes_BLD: Tensor, masked_BLD: Tensor, condition: Condition) -> Tensor:
        """Logits of every slot's token, (B, L, D, V) fp32."""
        return self.network.logits(self.network(codes_BLD, masked_BLD, condition))

    def loss(self, batch: MaskBatch, step: TrainStep) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of masked tokens, a mean over slots."""
        codes_BLD = batch.codes_BTS.transpose(1, 2)
        log_p = self.predict(codes_BLD, batch.masked_BLD, self.condition(batch.columns)).log_softmax(-1)
        count, smoothing = len(codes_BLD) * batch.slots, self.objective.label_smoothing
        ce_BLD = -log_p.gather(-1, codes_BLD.unsqueeze(-1)).squeeze(-1)
        right_BLD = log_p.argmax(-1) == codes_BLD
        ce, even, right = ((x * batch.masked_BLD).sum() / count for x in (ce_BLD, -log_p.mean(-1), right_BLD))
        return (1 - smoothing) * ce + smoothing * even, {"ce": ce.detach(), "accuracy": right}

    def fit_baselines(self, store: CodeStore, rows: noise.Ints) -> Tensor:
        return log_frequencies(store, rows, self.quantizer.cfg.codes)

    @torch.no_grad()
    def held_out(self, batch: MaskBatch, baselines: Tensor | None = None) -> dict[str, Tensor]:
        """Nats a token by the masked share, (2, SHARES); `unigram`, of the codes' frequencies.

        With n of N slots masked, n uniform in 1..N and any n alike, the expected cross-entropy of a masked token times
        N bounds -log p of the codes (arXiv 2110.02037, eq. 4): the mean over shares estimates the bound a token."""
        masked, codes_BLD = batch.masked_BLD, batch.codes_BTS.transpose(1, 2)
        logits = self.predict(codes_BLD, masked, self.condition(batch.columns))
        ce_BLD = F.cross_entropy(logits.flatten(0, 2), codes_BLD.flatten(), reduction="none").view_as(codes_BLD)
        measures = {"bound": ce_BLD}
        if baselines is not None:
            measures["unigram"] = unigram(baselines, codes_BLD)
        sums = {}
        for name, values in measures.items():
            mean_B = (values * masked).flatten(1).sum(1) / masked.flatten(1).sum(1)
            sums[name] = mean_B.new_zeros(2, SHARES)
            sums[name][:, batch.number] = torch.stack([mean_B.sum(), mean_B.new_tensor(len(mean_B))])
        return sums

    def draw_tokens(
        self, t: int, lambda_t: float, inputs: Inputs, options: SampleOptions, indices: list[int]
    ) -> tuple[Tensor, Tensor]:
        """Tokens (B, L, D), and their log-probabilities."""
        logits = self.predict(*inputs)
        log_p = ((guide(logits, lambda_t) if lambda_t else logits) * options.sampling.tau).log_softmax(-1)
        uniform = noise.uniform_rows("component", options.seed, indices, [0] * len(indices), t, log_p.shape[1:-1])
        tokens = mixture.draw(log_p.exp(), torch.from_numpy(uniform).to(log_p.device))
        return tokens, log_p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)

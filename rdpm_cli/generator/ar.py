"""Autoregression: each token from those before it, position by position in raster order and coarse to fine inside.

One sequence of all tokens, as LlamaGen's (arXiv 2406.06525); or, with `depth_layers`, a sequence of positions and a
small transformer over the depths of each, as the RQ-Transformer's (arXiv 2203.01941).

Legend: as in `tokens`."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from rdpm_cli import noise
from rdpm_cli.codes.store import CodeStore
from rdpm_cli.distributed import TrainStep
from rdpm_cli.errors import UsageError
from rdpm_cli.generator.config import ARNetworkConfig
from rdpm_cli.generator.contract import Batch, Columns, Condition, Generator, Known, SampleOptions
from rdpm_cli.generator.drawing import draw, guide, narrow
from rdpm_cli.generator.tokens import TokenNetwork, log_frequencies, refuse_sound, token_grid, unigram
from rdpm_cli.generator.transformer import Cache, Transformer
from rdpm_cli.tokenizer.quantizer import Quantizer


@dataclass
class Decoding:
    """What sampling keeps of the tokens so far."""

    caches: list[Cache]  # of the transformer over slots, or over positions
    depth_caches: list[Cache] = field(default_factory=list)  # of that over the depths of the present position
    hidden_B1W: Tensor | None = None  # what the positions so far say of the present one


class ARNetwork(TokenNetwork):
    """Logits of all tokens at once, for training, and of one after the other, for sampling."""

    passes: int  # of a sample, without guidance

    def start(self) -> Decoding:
        return Decoding(caches_of(self.trunk))

    @abstractmethod
    def next_logits(self, codes_BLD: Tensor, slot: int, condition: Condition, decoding: Decoding) -> Tensor:
        """Logits of the token at `slot`, (B, V) fp32, once those of every slot before it have been asked for."""


def caches_of(trunk: Transformer) -> list[Cache]:
    return [Cache(trunk.length + trunk.cfg.class_tokens) for _ in trunk.blocks]


class FlatNetwork(ARNetwork):
    """One causal sequence of all tokens."""

    def __init__(self, cfg: ARNetworkConfig, quantizer: Quantizer, classes: int) -> None:
        super().__init__(cfg, quantizer)
        self.trunk = Transformer(cfg, token_grid(quantizer), quantizer.books.shape[-1], classes, causal=True)
        self.passes = self.trunk.length

    def forward(self, codes_BLD: Tensor, condition: Condition) -> Tensor:
        """The hidden state that the heads see, (B, N, W): each slot's of the tokens before it."""
        before_BN = F.pad(self.numbers(codes_BLD).flatten(1)[:, :-1], (1, 0), value=self.no_token)
        return self.run(self.embedding(before_BN), condition)

    def next_logits(self, codes_BLD: Tensor, slot: int, condition: Condition, decoding: Decoding) -> Tensor:
        numbers_BN = self.numbers(codes_BLD).flatten(1)
        last_B1 = numbers_BN[:, slot - 1 : slot] if slot else torch.full_like(numbers_BN[:, :1], self.no_token)
        hidden_B1W = self.run(self.embedding(last_B1), condition, decoding.caches)
        return self.heads[slot % self.depths](hidden_B1W[:, 0]).float()


class DepthNetwork(ARNetwork):
    """A causal sequence of positions, each the sum of its tokens' embeddings, and one of the depths of each.

    A depth's input is the sum of the coarser tokens' embeddings and of the position's state; in the RQ-Transformer this
    is at the first depth alone."""

    def __init__(self, cfg: ARNetworkConfig, quantizer: Quantizer, classes: int) -> None:
        super().__init__(cfg, quantizer)
        plain = {"depth": cfg.depth_layers, "positions": "learned", "class_latents": False, "class_tokens": 0}
        small = cfg.model_copy(update={**plain, "width": cfg.hidden, "heads": cfg.heads or cfg.depth})
        channels = quantizer.books.shape[-1]
        self.trunk = Transformer(cfg, quantizer.grid, channels, classes, causal=True)
        self.over_depths = Transformer(small, (self.depths,), channels, 0, causal=True)
        self.passes = self.trunk.length * (1 + self.depths)

    def forward(self, codes_BLD: Tensor, condition: Condition) -> Tensor:
        """The hidden state that the heads see, (B, N, W): each slot's of the tokens before it."""
        B, L, _ = codes_BLD.shape
        embedded_BLDW = self.embedding(self.numbers(codes_BLD))
        before_BLW = torch.cat([self._first(B), embedded_BLDW.sum(2)[:, :-1]], 1)
        hidden_BLW = self.run(before_BLW, condition)
        coarser_BLDW = embedded_BLDW.cumsum(2) - embedded_BLDW
        x_RDW = (hidden_BLW.unsqueeze(2) + coarser_BLDW).flatten(0, 1)
        out_RDW = self._run_depths(x_RDW, condition.vector_BD.repeat_interleave(L, 0))
        return out_RDW.unflatten(0, (B, L)).flatten(1, 2)

    def _first(self, rows: int) -> Tensor:
        """What stands before the first position, (B, 1, W)."""
        return self.embedding.weight[self.no_token].expand(rows, 1, -1)

    def _run_depths(self, x_RDW: Tensor, vector_RW: Tensor, caches: Sequence[Cache] | None = None) -> Tensor:
        return self.over_depths(x_RDW, x_RDW.new_zeros(len(x_RDW)), Condition(vector_RW), caches)

    def next_logits(self, codes_BLD: Tensor, slot: int, condition: Condition, decoding: Decoding) -> Tensor:
        position, depth = divmod(slot, self.depths)
        embedded_BLDW = self.embedding(self.numbers(codes_BLD[:, max(0, position - 1) : position + 1]))
        if depth == 0:
            before_B1W = embedded_BLDW[:, :1].sum(2) if position else self._first(len(codes_BLD))
            decoding.hidden_B1W = self.run(before_B1W, condition, decoding.caches)
            decoding.depth_caches = caches_of(self.over_depths)
        assert decoding.hidden_B1W is not None
        x_B1W = decoding.hidden_B1W + embedded_BLDW[:, -1:, :depth].sum(2)
        return self.heads[depth](self._run_depths(x_B1W, condition.vector_BD, decoding.depth_caches)[:, 0]).float()


class AR(Generator):
    """The family: cross-entropy of each token, sampling in as many passes as an image has tokens."""

    network: ARNetwork

    def __init__(self, cfg: ARNetworkConfig, quantizer: Quantizer, classes: int) -> None:
        self.quantizer, self.classes = quantizer, classes
        self.network = (DepthNetwork if cfg.depth_layers else FlatNetwork)(cfg, quantizer, classes)

    check_codes = staticmethod(refuse_sound)

    def predict(self, codes_BLD: Tensor, condition: Condition) -> Tensor:
        """Logits of every slot's token, (B, L, D, V) fp32."""
        return self.network.logits(self.network(codes_BLD, condition))

    def _cross_entropy(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """-log p of every token given those before it, and whether the likeliest is right: (B, L, D) each."""
        codes_BLD = batch.codes_BTS.transpose(1, 2)
        logits = self.predict(codes_BLD, self.condition(batch.columns))
        ce = F.cross_entropy(logits.flatten(0, 2), codes_BLD.flatten(), reduction="none")
        return ce.view_as(codes_BLD), logits.argmax(-1) == codes_BLD

    def loss(self, batch: Batch, step: TrainStep) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy, a mean over tokens."""
        ce_BLD, right_BLD = self._cross_entropy(batch)
        return ce_BLD.mean(), {"ce": ce_BLD.mean().detach(), "accuracy": right_BLD.float().mean()}

    def fit_baselines(self, store: CodeStore, rows: noise.Ints) -> Tensor:
        return log_frequencies(store, rows, self.quantizer.cfg.codes)

    @torch.no_grad()
    def held_out(self, batch: Batch, baselines: Tensor | None = None) -> dict[str, Tensor]:
        """By depth: `nats` a token, exact, and `unigram`, those of the codes' frequencies."""
        ce_BLD, _ = self._cross_entropy(batch)
        measures = {"nats": ce_BLD}
        if baselines is not None:
            measures["unigram"] = unigram(baselines, batch.codes_BTS.transpose(1, 2))
        count = ce_BLD[..., 0].numel()
        return {name: torch.stack([x.sum((0, 1)), x.new_full((x.shape[-1],), count)]) for name, x in measures.items()}

    def check(self, options: SampleOptions) -> None:
        if options.sampling.compile != "off":
            raise UsageError("compile: passes of the family ar all differ in length", "leave it out")

    def check_known(self, keep_BTS: Tensor) -> None:
        keep_BN = keep_BTS.mT.flatten(1)
        if bool((keep_BN[:, 1:] & ~keep_BN[:, :-1]).any()):
            reason = "the family ar sees only what is before, and some codes to be kept follow codes to be drawn"
            raise UsageError(reason, "give a --mask that is white from some row on, without --from-step")

    def passes(self, options: SampleOptions, first: int = 1) -> int:
        return self.network.passes * (2 if options.sampling.cfg else 1)

    @torch.no_grad()
    def sample(self, columns: Columns, indices_B: Tensor, options: SampleOptions, known: Known | None = None) -> Tensor:
        """Each token drawn from tau · logits of those before it, noise addressed by index and slot. codes_BTS."""
        self.check(options)
        condition, s, indices = self.condition(columns), options.sampling, indices_B.tolist()
        (L, D), device = (math.prod(self.quantizer.grid), self.network.depths), condition.vector_BD.device
        codes_BLD, kept_BN = torch.zeros(len(indices), L, D, dtype=torch.int64, device=device), None
        if known is not None:
            codes_BLD, kept_BN = known.codes_BTS.mT.clone(), known.keep_BTS.mT.flatten(1)
            self.check_known(known.keep_BTS)
        if s.cfg:
            condition = condition.joined(self.null_condition(columns))
        decoding = self.network.start()
        for slot in range(L * D):
            doubled_BLD = codes_BLD.repeat(2, 1, 1) if s.cfg else codes_BLD
            logits_BV = self.network.next_logits(doubled_BLD, slot, condition, decoding)
            if kept_BN is not None and bool(kept_BN[:, slot].all()):
                continue
            logits_BV = (guide(logits_BV, s.cfg) if s.cfg else logits_BV) * s.tau
            logits_B1V = narrow(logits_BV.unsqueeze(1), s.top_k, s.top_p)
            drawn_B = draw(logits_B1V, s.draw, indices, slot + 1, options.seed)[:, 0]
            position, depth = divmod(slot, D)
            if kept_BN is not None:
                drawn_B = torch.where(kept_BN[:, slot], codes_BLD[:, position, depth], drawn_B)
            codes_BLD[:, position, depth] = drawn_B
        return codes_BLD.mT

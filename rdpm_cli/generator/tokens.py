"""What the families of plain tokens share: one sequence of all tokens, its network, its batches, its baseline.

Legend: B images, L positions, D depths (the tokenizer's T), V codes a book, N = L·D slots, position by position and
coarse to fine inside, W width of the transformer. At the seams codes are (B, T, S), T = D, S = L."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rdpm_cli import noise
from rdpm_cli.codes.store import CodeStore
from rdpm_cli.errors import UsageError
from rdpm_cli.generator.config import TransformerConfig
from rdpm_cli.generator.contract import Batch, Condition, GeneratorBatches
from rdpm_cli.generator.transformer import Cache, Transformer, zero_linear
from rdpm_cli.tokenizer.config import AutoencoderConfig, TokenizerArchitecture
from rdpm_cli.tokenizer.quantizer import Quantizer

READ_AT_ONCE = 4096  # rows whose codes are counted


def refuse_sound(tokenizer: TokenizerArchitecture, origin: str) -> None:
    """`Generator.check_codes` of families that draw images only."""
    if not isinstance(tokenizer.autoencoder, AutoencoderConfig):
        hint = "train rdpm or resgen, e.g. --recipe speech8-sin"
        raise UsageError(f"{origin} holds codes of sound, and this family draws images only", hint)


class TokenNetwork(nn.Module):
    """The tables of a network of tokens: their embeddings, and a head a depth, which starts at zero."""

    trunk: Transformer

    def __init__(self, cfg: TransformerConfig, quantizer: Quantizer) -> None:
        super().__init__()
        self.depths, self.codes = quantizer.steps, quantizer.cfg.codes
        self.embedding = nn.Embedding(self.depths * self.codes + 1, cfg.hidden)  # the last one is no token
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.heads = nn.ModuleList(zero_linear(cfg.hidden, self.codes) for _ in range(self.depths))

    @property
    def no_token(self) -> int:
        """The number in the place of a token that is not known."""
        return self.depths * self.codes

    def numbers(self, codes_BLD: Tensor) -> Tensor:
        """Rows of the table of embeddings, (B, L, D): each depth has codes of its own."""
        return codes_BLD + self.codes * torch.arange(self.depths, device=codes_BLD.device)

    def run(self, x_BNW: Tensor, condition: Condition, caches: Sequence[Cache] | None = None) -> Tensor:
        """The trunk without a time, (B, N, W). The residual stream stays fp32 under autocast."""
        return self.trunk(x_BNW.float(), x_BNW.new_zeros(len(x_BNW)), condition, caches)

    def logits(self, hidden_BNW: Tensor) -> Tensor:
        """(B, L, D, V) fp32, of all slots."""
        hidden_BLDW = hidden_BNW.unflatten(1, (-1, self.depths))
        return torch.stack([head(x) for head, x in zip(self.heads, hidden_BLDW.unbind(2), strict=True)], 2).float()


def token_grid(quantizer: Quantizer) -> tuple[int, ...]:
    """The axes of one sequence of all tokens."""
    return quantizer.grid if quantizer.steps == 1 else (*quantizer.grid, quantizer.steps)


class TokenBatches(GeneratorBatches):
    """Codes and labels of a training step."""

    @staticmethod
    def blank(cfg: Any, quantizer: Quantizer, rows: int, spoken: tuple[int, int] | None = None) -> Batch:
        columns = GeneratorBatches.blank_columns(cfg, quantizer.books.shape[-1], rows, spoken)
        return Batch(torch.zeros(rows, quantizer.steps, math.prod(quantizer.grid)).long(), columns)

    def batch_at(self, step: int, rows: range) -> Batch:
        uniform_B1 = noise.block_uniform(self.seed, step, rows, 1)
        return Batch(*self.read(self.rows_at(step, rows), uniform_B1[:, 0]))

    def held_out_batches(self) -> Iterator[Batch]:
        for store_rows in self.held_out_rows():
            yield Batch(*self.read(store_rows))


def log_frequencies(store: CodeStore, rows: noise.Ints, codes: int) -> Tensor:
    """log p of each code of each depth by its share of these rows of a store, each counted once more: (D, V)."""
    count_DV = np.ones((store.manifest.steps, codes))
    for start in range(0, len(rows), READ_AT_ONCE):
        codes_BTS = store.codes(rows[start : start + READ_AT_ONCE])
        for depth, count_V in enumerate(count_DV):
            count_V += np.bincount(codes_BTS[:, depth].ravel(), minlength=codes)
    return torch.from_numpy(np.log(count_DV / count_DV.sum(1, keepdims=True))).float()


def unigram(log_p_DV: Tensor, codes_BLD: Tensor) -> Tensor:
    """-log p of each token by `log_frequencies`, (B, L, D)."""
    log_p_DV = log_p_DV.to(codes_BLD.device)
    return -torch.stack([log_p_V[codes_BLD[..., depth]] for depth, log_p_V in enumerate(log_p_DV)], -1)

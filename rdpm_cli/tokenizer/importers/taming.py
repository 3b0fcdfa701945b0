"""taming-transformers' VQGAN f16: our names but for the separate q, k and v (TAM:taming/models/vqgan.py)."""

from collections.abc import Collection

from rdpm_cli.tokenizer.importers.layout import BODY, BOOKS, CODEBOOK, Plan, left_of, sources_of

NAME = "taming-transformers"
MARK = "encoder.mid.attn_1.q.weight"
LEFT = {
    "loss.": "its perceptual loss and discriminator",
    "quantize.embed.": "a Gumbel codebook: chosen by logits, not by distance",
    "quantize.proj.": "the logits of a Gumbel codebook",
}


def plan(names: Collection[str]) -> Plan:
    """There is no bias convolution in it."""
    renamed = {name: name for name in names if name.startswith(BODY)}
    if CODEBOOK in names:
        renamed[CODEBOOK] = BOOKS
    return Plan(sources_of(renamed), left_of(names, renamed, LEFT), bias="none")

"""VAR's `vae_ch160v4096z32.pth`: a bare state dict whose autoencoder has our names (VAR:models/vqvae.py, quant.py)."""

import re
from collections.abc import Collection

from rdpm_cli.tokenizer.importers.layout import BODY, BOOKS, CODEBOOK, Plan, left_of, sources_of

NAME = "VAR"
MARK = "encoder.mid.attn_1.qkv.weight"
LEFT = {
    "quantize.quant_resi": "the bias is one convolution here, from the last of theirs",
    "quantize.ema_vocab_hit_SV": "a count of its training",
}

_PHI = re.compile(r"quantize\.quant_resi\.qresi_ls\.(\d+)\.(weight|bias)")


def plan(names: Collection[str]) -> Plan:
    """Their phi_i(q) = 0.5 q + 0.5 conv_i(q), one for some scales each; ours is the one of the finest scales."""
    renamed = {name: name for name in names if name.startswith(BODY)}
    if CODEBOOK in names:
        renamed[CODEBOOK] = BOOKS
    found = [match for name in names if (match := _PHI.fullmatch(name))]
    last = max((int(match[1]) for match in found), default=0)
    renamed |= {match[0]: f"quantizer.phi.{match[2]}" for match in found if int(match[1]) == last}
    return Plan(sources_of(renamed), left_of(names, renamed, LEFT), bias="blend")

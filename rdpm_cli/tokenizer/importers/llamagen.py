"""LlamaGen's `vq_ds16_c2i.pt`: `conv_blocks` in the order they run (LLG:tokenizer/tokenizer_image/vq_model.py)."""

import re
from collections.abc import Collection

from rdpm_cli.tokenizer.importers.layout import BODY, BOOKS, CODEBOOK, Plan, left_of, sources_of

NAME = "LlamaGen"
MARK = "encoder.conv_blocks.0.res.0.conv1.weight"
LEFT = {"quantize.codebook_used": "a log of its training"}
MIDDLE = ("block_1", "attn_1", "block_2")

_BLOCK = re.compile(r"(encoder|decoder)\.conv_blocks\.(\d+)\.(.*)")
_MIDDLE = re.compile(r"(encoder|decoder)\.mid\.([012])\.(.*)")


def plan(names: Collection[str]) -> Plan:
    """Codes and latents are L2-normalised at use; there is no bias convolution."""
    found = [match for name in names if (match := _BLOCK.fullmatch(name))]
    last = max((int(match[2]) for match in found if match[1] == "decoder"), default=0)
    renamed = {name: _ours(name, last) for name in names if name.startswith(BODY)}
    if CODEBOOK in names:
        renamed[CODEBOOK] = BOOKS
    return Plan(sources_of(renamed), left_of(names, renamed, LEFT), bias="none", latents="l2")


def _ours(name: str, last: int) -> str:
    """Our name. last: the decoder's last block, at full resolution, which is our `up.0`."""
    if match := _MIDDLE.fullmatch(name):
        return f"{match[1]}.mid.{MIDDLE[int(match[2])]}.{match[3]}"
    match = _BLOCK.fullmatch(name)
    if match is None:
        return name
    place, rest = int(match[2]), match[3]
    level = f"encoder.down.{place}" if match[1] == "encoder" else f"decoder.up.{last - place}"
    return f"{level}.block.{rest.removeprefix('res.')}" if rest.startswith("res.") else f"{level}.{rest}"

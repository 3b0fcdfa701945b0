"""What a layout says of a file: which public tensors make which of ours, and why the others are left. Names alone."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

BODY = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")  # what every public tokenizer has, under these names
CODEBOOK, BOOKS = "quantize.embedding.weight", "quantizer.books"  # theirs and ours
NO_USE = "nothing here corresponds to it"

_ATTENTION_PART = re.compile(r"(.*attn.*)\.([qkv])\.(weight|bias)")


@dataclass(frozen=True)
class Plan:
    """How a file becomes ours. sources: our name -> the public tensors it joins on the first axis."""

    sources: dict[str, list[str]]
    left: dict[str, str]  # public name -> why it is left
    bias: Literal["none", "add", "blend"] = "blend"  # what the file's bias convolution means
    latents: Literal["none", "layernorm", "l2"] = "none"  # what happens to the file's latents before the codebook
    groups: int = 32  # of its GroupNorms, which no shape shows


class Layout(Protocol):
    """A module of this package. MARK: a name that this layout alone has."""

    NAME: str
    MARK: str

    def plan(self, names: Collection[str]) -> Plan:
        """What becomes of these names."""


def sources_of(renamed: Mapping[str, str]) -> dict[str, list[str]]:
    """Plan.sources of {public name: our name}; separate q, k and v join, in this order, to our fused qkv."""
    parts: dict[str, dict[str, str]] = {}
    for public, ours in renamed.items():
        found = _ATTENTION_PART.fullmatch(ours)
        name, part = (f"{found[1]}.qkv.{found[3]}", found[2]) if found else (ours, "-")
        parts.setdefault(name, {})[part] = public
    return {name: [of[part] for part in sorted(of, key="-qkv".index)] for name, of in parts.items()}


def left_of(names: Collection[str], renamed: Mapping[str, str], reasons: Mapping[str, str]) -> dict[str, str]:
    """Plan.left: every name that is not renamed, with the reason of the prefix it has."""
    return {
        name: next((why for prefix, why in reasons.items() if name.startswith(prefix)), NO_USE)
        for name in names
        if name not in renamed
    }

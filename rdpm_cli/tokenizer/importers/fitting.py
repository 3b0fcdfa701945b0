"""Public values put into the shapes of a tokenizer: what fits, what does not, and the recipe in which all would.

Legend: S books (1 or T), K codebook entries, C code width.
"""

import shlex
from collections.abc import Mapping
from itertools import count, takewhile
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdpm_cli import files
from rdpm_cli.config import QuantizerConfig, TokenizerArchitecture
from rdpm_cli.tokenizer.importers.layout import BOOKS, Plan

COUNTS, SUMS = "quantizer.ema_counts", "quantizer.ema_sums"
PHI, PHI_BIAS = "quantizer.phi.weight", "quantizer.phi.bias"
SHARE = {"add": 1.0, "blend": 0.5}  # s in bias(q) = s (q + conv(q))
LATENTS = {"none": "left as they are", "layernorm": "layer-normed", "l2": "L2-normalised"}


def take_codebook(values: dict[str, Tensor], plan: Plan, state: Mapping[str, Tensor]) -> None:
    """The codes of a file as books_SKC, with an EMA in which one vector sits on every code, so that the first step
    moves the codes by what it finds instead of forgetting them. Books that learn by gradient have no EMA.

    One book becomes the book of every step. Codes that are L2-normalised at use are stored so.
    """
    if BOOKS not in values or values[BOOKS].ndim not in (2, 3):
        return
    books = values[BOOKS] if values[BOOKS].ndim == 3 else values[BOOKS].unsqueeze(0)  # (S, K, C)
    copies = len(state[BOOKS]) if len(books) == 1 else 1
    books = F.normalize(books, dim=-1) if plan.latents == "l2" else books
    values[BOOKS] = books.repeat(copies, 1, 1)
    if COUNTS not in state:
        return
    known = COUNTS in values and SUMS in values
    values[COUNTS] = values[COUNTS].repeat(copies, 1) if known else torch.ones(values[BOOKS].shape[:2])
    values[SUMS] = values[SUMS].repeat(copies, 1, 1) if known else values[BOOKS]


def same_bias(filled: dict[str, Tensor], plan: Plan, cfg: QuantizerConfig) -> bool:
    """Rewrite phi so that bias(q) stays what it was in the file. -> was there anything to rewrite?

    s (q + conv(q)) = s' (q + conv'(q)) holds for conv' = (s/s') (1 + conv) - 1.
    """
    if PHI not in filled or "none" in (plan.bias, cfg.bias) or plan.bias == cfg.bias:
        return False
    ratio = SHARE[plan.bias] / SHARE[cfg.bias]
    one = nn.init.dirac_(torch.empty_like(filled[PHI]))
    filled[PHI] = ratio * (one + filled[PHI]) - one
    if PHI_BIAS in filled:
        filled[PHI_BIAS] = ratio * filled[PHI_BIAS]
    return True


def fit(values: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """-> (what fits, {our name: why it does not}). A layer goes as a whole: a bias alone would be noise."""
    misfits = {
        name: f"{tuple(value.shape)} there, {tuple(state[name].shape)} here"
        for name, value in values.items()
        if name in state and value.shape != state[name].shape
    }
    spoiled = {_layer(name): name for name in misfits}
    filled, refused = dict[str, Tensor](), dict[str, str]()
    for name, value in values.items():
        if name not in state:
            refused[name] = "there is no such layer here"
        elif _layer(name) in spoiled:
            refused[name] = misfits.get(name, f"goes with {spoiled[_layer(name)]}")
        else:
            filled[name] = value
    return filled, refused


def _layer(name: str) -> str:
    return name.rpartition(".")[0]


def notes(plan: Plan, cfg: TokenizerArchitecture) -> list[str]:
    """What no shape shows and the user should know."""
    found, auto = [], cfg.autoencoder
    if plan.groups != auto.groups:
        found.append(f"GroupNorm has {plan.groups} groups there, {auto.groups} here: the layers compute something else")
    if plan.latents != auto.latent_norm:
        found.append(
            f"latents are {LATENTS[plan.latents]} there, {LATENTS[auto.latent_norm]} here: "
            "the decoder and the codes meet another scale at first"
        )
    if plan.latents == "l2":
        found.append("codes are L2-normalised at use there: taken normalised")
    return found


def overrides(values: Mapping[str, Tensor], plan: Plan, cfg: TokenizerArchitecture) -> list[str]:
    """The recipe overrides with which every layer of the file would fit; none where the file shows no sizes."""
    kernels = [
        v for name, v in values.items() if name.endswith(("conv_in.weight", "conv2.weight", "quant_conv.weight"))
    ]
    whole = {"encoder.conv_in.weight", "quant_conv.weight"} <= values.keys()
    if not whole or any(kernel.ndim != 4 or 0 in kernel.shape for kernel in kernels):
        return []
    wanted, auto = _sizes(values, plan), cfg.autoencoder
    inner, outer = wanted["autoencoder.channels"], wanted.pop("autoencoder.features")
    if outer != (auto.features or inner):
        wanted["autoencoder.features"] = None if outer == inner else outer
    here = {f"autoencoder.{key}": value for key, value in auto.model_dump(mode="json").items()}
    here |= {f"quantizer.{key}": value for key, value in cfg.quantizer.model_dump(mode="json").items()}
    return [shlex.quote(f"{key}={files.canonical_json(value)}") for key, value in wanted.items() if here[key] != value]


def _sizes(values: Mapping[str, Tensor], plan: Plan) -> dict[str, Any]:
    """The sizes of a file, by recipe key."""
    width = len(values["encoder.conv_in.weight"])
    inner, outer, _, kernel = values["quant_conv.weight"].shape
    found: dict[str, Any] = {
        "autoencoder.width": width,
        "autoencoder.multipliers": [len(v) // width for v in _numbered(values, "encoder.down.{}.block.0.conv2.weight")],
        "autoencoder.res_blocks": len(_numbered(values, "encoder.down.0.block.{}.conv2.weight")),
        "autoencoder.attention": "encoder.mid.attn_1.qkv.weight" in values,
        "autoencoder.groups": plan.groups,
        "autoencoder.channels": inner,
        "autoencoder.features": outer,
        "autoencoder.quant_kernel": kernel,
    }
    if (books := values.get(BOOKS)) is not None and books.ndim in (2, 3):
        found["quantizer.codes"] = books.shape[-2]
        if books.ndim == 3 and len(books) > 1:
            found |= {"quantizer.codebooks": "per_step", "quantizer.steps": len(books)}
    return found


def _numbered(values: Mapping[str, Tensor], pattern: str) -> list[Tensor]:
    """values[pattern 0], values[pattern 1], ... as far as there are any."""
    return [values[name] for name in takewhile(values.__contains__, map(pattern.format, count()))]

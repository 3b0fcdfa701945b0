"""Warm starts: fill a tokenizer from VAR's, taming-transformers' or LlamaGen's weights, or from rdpm's own file.

Every tensor of the file is either taken or listed with the reason why not. A layout maps public names to the names
of `Tokenizer`; shapes then decide what fits. Legend: M codebooks (1 or T), K codebook entries, C code width.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdpm_cli import checkpoint
from rdpm_cli.errors import CheckpointError
from rdpm_cli.tokenizer.config import QuantizerConfig, TokenizerArchitecture
from rdpm_cli.tokenizer.model import KIND, Tokenizer

KNOWN = (
    "known are VAR (vae_ch160v4096z32.pth), taming-transformers (VQGAN f16, last.ckpt), LlamaGen (vq_ds16_c2i.pt), "
    "and rdpm's own tokenizer.pt; of a file with more than tensors in it, save the state_dict alone"
)
WRAPPERS = ("ema", "model", "state_dict")  # keys under which public files keep their weights, the best first
BODY = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")  # every public tokenizer has these names
CODEBOOK = "quantize.embedding.weight"
BOOKS, COUNTS, SUMS = "quantizer.books", "quantizer.ema_counts", "quantizer.ema_sums"
PHI, PHI_BIAS = "quantizer.phi.weight", "quantizer.phi.bias"
SHARE = {"add": 1.0, "blend": 0.5}  # s in bias(q) = s (q + conv(q))
LATENTS = {"none": "left as they are", "layernorm": "layer-normed", "l2": "L2-normalised"}


@dataclass(frozen=True)
class Imported:
    """The outcome of a warm start. taken, skipped: names as in the file; fresh: names here that keep initial values."""

    file: str
    layout: str
    taken: list[str]
    skipped: dict[str, str]  # name -> reason
    fresh: list[str]
    notes: list[str]

    def record(self) -> dict[str, Any]:
        """For the tokenizer's provenance."""
        skipped = [f"{name}: {reason}" for name, reason in self.skipped.items()]
        counts = {"layout": self.layout, "taken": len(self.taken), "left": skipped}
        return {**counts, "fresh": self.fresh, "notes": self.notes}

    def lines(self) -> Iterator[str]:
        """A summary for the terminal."""
        yield f"warm start from {self.file} ({self.layout}): {len(self.taken)} tensors taken, {len(self.skipped)} left"
        for prefix, names in _by_prefix(self.skipped).items():
            yield f"  left {prefix} ({len(names)}): {names[0]}: {self.skipped[names[0]]}"
        if self.fresh:
            fresh = (f"{prefix} ({len(names)})" for prefix, names in _by_prefix(self.fresh).items())
            yield f"  not in the file, initialised: {', '.join(fresh)}"
        yield from (f"  note: {note}" for note in self.notes)


def _by_prefix(names: Iterable[str]) -> dict[str, list[str]]:
    """Names by the part they belong to: `encoder`, `loss`, `quantize.quant_resi`."""
    groups: dict[str, list[str]] = {}
    for name in names:
        first, second = [*name.split("."), ""][:2]
        groups.setdefault(f"{first}.{second}" if first in {"quantize", "quantizer"} else first, []).append(name)
    return groups


# ---- layouts -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """How a kind of file names its tensors, and what no shape shows of it."""

    name: str
    mark: str  # a name that only this layout has
    rename: Callable[[Collection[str]], dict[str, str]]  # public name -> name in Tokenizer, but for separate q, k, v
    reasons: Mapping[str, str] = field(default_factory=dict)  # prefix of a name -> why such tensors are left
    bias: str = "none"  # the quantizer.bias that its convolution stands for
    latents: str = "none"  # the normalisation of its latents, a key of LATENTS
    groups: int = 32  # of its GroupNorms
    overrides: str = ""  # of the recipe, with which every layer of the published file fits

    def reason(self, name: str) -> str:
        """Why a tensor that is not renamed is left."""
        reasons = (reason for prefix, reason in self.reasons.items() if name.startswith(prefix))
        return next(reasons, "nothing here corresponds to it")


def _body(names: Collection[str]) -> dict[str, str]:
    """The names that all public tokenizers share."""
    body = {name: name for name in names if name.startswith(BODY)}
    return body | ({CODEBOOK: BOOKS} if CODEBOOK in names else {})


def _var(names: Collection[str]) -> dict[str, str]:
    """VAR has a convolution phi_i for some scales each; the one here is that of the finest scales."""
    convolutions = [m for n in names if (m := re.fullmatch(r"quantize\.quant_resi\.qresi_ls\.(\d+)\.(\w+)", n))]
    last = max((int(match[1]) for match in convolutions), default=0)
    return _body(names) | {m[0]: f"quantizer.phi.{m[2]}" for m in convolutions if int(m[1]) == last}


def _llamagen(names: Collection[str]) -> dict[str, str]:
    """LlamaGen numbers `conv_blocks` in the order they run: the decoder's last one is `up.0` here."""
    block, middle = r"(encoder|decoder)\.conv_blocks\.(\d+)\.(?:res\.)?(.*)", r"(.*\.mid)\.([012])\.(.*)"
    last = max((int(m[2]) for n in names if (m := re.fullmatch(block, n)) and m[1] == "decoder"), default=0)

    def rename(name: str) -> str:
        if m := re.fullmatch(middle, name):
            return f"{m[1]}.{('block_1', 'attn_1', 'block_2')[int(m[2])]}.{m[3]}"
        if not (m := re.fullmatch(block, name)):
            return name
        level = f"encoder.down.{m[2]}" if m[1] == "encoder" else f"decoder.up.{last - int(m[2])}"
        return f"{level}.{'block.' if '.res.' in name else ''}{m[3]}"

    return {public: rename(name) for public, name in _body(names).items()}


VQGAN = (  # the overrides that the published networks share
    "'autoencoder.multipliers=[1,1,2,2,4]' autoencoder.res_blocks=2 autoencoder.attention=true autoencoder.groups=32"
)
LAYOUTS = (
    Layout(
        "VAR", "encoder.mid.attn_1.qkv.weight", _var,
        {
            "quantize.quant_resi": "the bias is one convolution here, taken from the file's last",
            "quantize.ema_vocab_hit_SV": "a count of its training",
        },
        bias="blend",
        overrides=f"{VQGAN} autoencoder.width=160 autoencoder.channels=32 autoencoder.quant_kernel=3 "
        "quantizer.codes=4096",
    ),
    Layout(
        "taming-transformers", "encoder.mid.attn_1.q.weight", _body,
        {
            "loss.": "its perceptual loss and discriminator",
            "quantize.embed.": "a Gumbel codebook: its codes are drawn by logits, not by distance",
            "quantize.proj.": "the logits of a Gumbel codebook",
        },
        overrides=f"{VQGAN} autoencoder.width=128 autoencoder.channels=256 autoencoder.quant_kernel=1 "
        "quantizer.codes=16384",
    ),
    Layout(
        "LlamaGen", "encoder.conv_blocks.0.res.0.conv1.weight", _llamagen,
        {"quantize.codebook_used": "a log of its training"},
        latents="l2",
        overrides=f"{VQGAN} autoencoder.width=128 autoencoder.channels=8 autoencoder.features=256 "
        "autoencoder.quant_kernel=1 quantizer.codes=16384",
    ),
)  # fmt: skip


def _read(path: Path) -> tuple[Layout, dict[str, Tensor]]:
    """The layout of a file and its tensors by public name. Raises CheckpointError."""
    content = checkpoint.read_tensors(path, hint=KNOWN)
    if isinstance(content, dict) and str(content.get("format")) in checkpoint.FORMATS:
        checkpoint.check(content, str(path), KIND)
        cfg = checkpoint.config_of(TokenizerArchitecture, content["config"], str(path))
        auto, bias = cfg.autoencoder, cfg.quantizer.bias
        layout = Layout("rdpm", "", lambda names: {n: n for n in names}, {}, bias, auto.latent_norm, auto.groups)
        return layout, content["weights"]
    outer = content if isinstance(content, dict) else {}
    for inner in (*(outer.get(key) for key in WRAPPERS), outer):
        if isinstance(inner, dict):
            tensors = {name: value for name, value in inner.items() if isinstance(value, Tensor)}
            if matching := [layout for layout in LAYOUTS if layout.mark in tensors]:
                return matching[0], tensors
    raise CheckpointError(f"{path} does not hold weights of a known tokenizer", KNOWN)


# ---- the import ----------------------------------------------------------------------------------------------------


def load_weights(tokenizer: Tokenizer, path: Path) -> Imported:
    """Fill a tokenizer with every layer of the file that fits it.

    Raises CheckpointError for a file that cannot be read, has no known layout, or no encoder layer that fits.
    """
    layout, tensors = _read(path)
    cfg, state = tokenizer.cfg, tokenizer.state_dict()
    renamed = layout.rename(tensors)
    sources = _sources(renamed)
    values = {name: _join(path, tensors, publics) for name, publics in sources.items()}
    _take_codebook(values, layout, state)
    filled, refused = _fit(values, state)
    if not any(name.startswith("encoder.") for name in filled):
        misfit = next((f": {name} is {why}" for name, why in refused.items() if name.startswith("encoder.")), "")
        hint = (
            f"its published file fits with {layout.overrides}" if layout.overrides else "use the recipe of its config"
        )
        raise CheckpointError(f"no encoder layer of {path} ({layout.name}) fits this recipe{misfit}", hint)
    notes = _notes(layout, cfg)
    if _same_bias(filled, layout, cfg.quantizer):
        notes.append(f"quantizer.phi is rewritten: bias(q) under {cfg.quantizer.bias} stays the file's")
    tokenizer.load_state_dict({**state, **filled})
    skipped = {name: layout.reason(name) for name in tensors if name not in renamed}
    skipped |= {public: reason for name, reason in refused.items() for public in sources.get(name, [])}
    taken = [public for name in filled for public in sources.get(name, [])]
    fresh = [name for name in state if name not in filled]
    return Imported(path.name, layout.name, taken, skipped, fresh, notes)


def _sources(renamed: Mapping[str, str]) -> dict[str, list[str]]:
    """Name in Tokenizer -> the public tensors that it joins on the first axis: q, k and v, in this order, to qkv."""
    pieces: dict[str, dict[str, str]] = {}
    for public, name in renamed.items():
        piece = ""
        if match := re.fullmatch(r"(.*attn.*)\.([qkv])\.(weight|bias)", name):
            name, piece = f"{match[1]}.qkv.{match[3]}", match[2]
        pieces.setdefault(name, {})[piece] = public
    return {name: [publics[piece] for piece in sorted(publics, key="qkv".index)] for name, publics in pieces.items()}


def _join(path: Path, tensors: Mapping[str, Tensor], names: list[str]) -> Tensor:
    """The named tensors as one, fp32. Raises CheckpointError for values that are not finite."""
    if broken := [name for name in names if not tensors[name].isfinite().all()]:
        raise CheckpointError(f"{path}: {broken[0]} holds values that are not finite", "get the file again")
    pieces = [tensors[name].float() for name in names]
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


def _take_codebook(values: dict[str, Tensor], layout: Layout, state: Mapping[str, Tensor]) -> None:
    """Bring the file's codes to books_MKC; one book becomes the book of every step."""
    if BOOKS not in values:
        return
    books = values[BOOKS] if values[BOOKS].ndim == 3 else values[BOOKS].unsqueeze(0)
    copies = len(state[BOOKS]) if len(books) == 1 else 1
    books = F.normalize(books, dim=-1) if layout.latents == "l2" else books  # as the file's own model uses them
    values[BOOKS] = books.repeat(copies, 1, 1)
    if COUNTS not in state:  # a book that learns by gradient has no EMA
        return
    # Without an EMA in the file, one vector counts for each code, so that the first step moves the codes and does not
    # replace them.
    has_ema = COUNTS in values and SUMS in values
    values[COUNTS] = values[COUNTS].repeat(copies, 1) if has_ema else torch.ones(values[BOOKS].shape[:2])
    values[SUMS] = values[SUMS].repeat(copies, 1, 1) if has_ema else values[BOOKS]


def _same_bias(filled: dict[str, Tensor], layout: Layout, cfg: QuantizerConfig) -> bool:
    """Rewrite phi so that bias(q) stays what it was in the file. -> whether there was anything to rewrite.

    s (q + conv(q)) = s' (q + conv'(q)) holds for conv' = (s/s') (1 + conv) - 1.
    """
    if PHI not in filled or "none" in (layout.bias, cfg.bias) or layout.bias == cfg.bias:
        return False
    ratio = SHARE[layout.bias] / SHARE[cfg.bias]
    one = nn.init.dirac_(torch.empty_like(filled[PHI]))  # the convolution that is the identity
    filled[PHI] = ratio * (one + filled[PHI]) - one
    if PHI_BIAS in filled:
        filled[PHI_BIAS] = ratio * filled[PHI_BIAS]
    return True


def _fit(values: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """-> (the tensors that fit, {name: why it does not}). A layer fits as a whole: a bias alone would be noise."""
    misfits = {
        name: f"{tuple(value.shape)} in the file, {tuple(state[name].shape)} here"
        for name, value in values.items()
        if name in state and value.shape != state[name].shape
    }
    misfit_of_layer = {name.rpartition(".")[0]: name for name in misfits}
    filled, refused = dict[str, Tensor](), dict[str, str]()
    for name, value in values.items():
        layer = name.rpartition(".")[0]
        if name not in state:
            refused[name] = "this recipe has no such layer"
        elif layer in misfit_of_layer:
            refused[name] = misfits.get(name, f"goes with {misfit_of_layer[layer]}")
        else:
            filled[name] = value
    return filled, refused


def _notes(layout: Layout, cfg: TokenizerArchitecture) -> list[str]:
    """Differences that no shape shows."""
    notes, auto = [], cfg.autoencoder
    if layout.groups != auto.groups:
        notes.append(f"GroupNorm: {layout.groups} groups in the file, {auto.groups} here; the layers give other values")
    if layout.latents != auto.latent_norm:
        scales = f"{LATENTS[layout.latents]} in the file's model, {LATENTS[auto.latent_norm]} here"
        notes.append(f"latents are {scales}; decoder and codes first see another scale")
    return notes

"""Warm starts: fill a tokenizer from VAR's, taming-transformers' or LlamaGen's weights, or from rdpm's own file.

Names are mapped to those of `Tokenizer`, and shapes decide what fits. Legend: M codebooks, K entries, C code width."""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdpm_cli import checkpoint, files
from rdpm_cli.errors import CheckpointError
from rdpm_cli.tokenizer.config import AutoencoderConfig, MelConfig, TokenizerArchitecture, TokenizerConfig
from rdpm_cli.tokenizer.model import KIND, Tokenizer

KNOWN = files.HINTS["weights"]
BODY = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")  # every public tokenizer has these names
BOOKS, COUNTS, SUMS = "quantizer.books", "quantizer.ema_counts", "quantizer.ema_sums"
PHI, PHI_BIAS = "quantizer.phi.weight", "quantizer.phi.bias"
# VAR's convolutions after the codebook: `qresi` for all scales, `qresi_ls.N` for some each, or `N`, one for each scale
RESIDUAL, COARSER = "quantize.quant_resi.", "of coarser scales; bias(q) is the finest scale's convolution"
SHARE = {"add": 1.0, "blend": 0.5}  # s in bias(q) = s (q + conv(q))


class Imported(NamedTuple):
    """The outcome of a warm start."""

    file: str
    layout: str
    taken: list[str]  # names as in the file, without the segments of wrappers
    skipped: dict[str, str]  # every other name of the file, and the reason
    fresh: list[str]  # names here that keep initial values
    notes: list[str]

    def record(self) -> dict[str, Any]:
        """For the tokenizer's provenance."""
        skipped = [f"{name}: {reason}" for name, reason in self.skipped.items()]
        counts = {"layout": self.layout, "taken": len(self.taken), "left": skipped}
        return {**counts, "fresh": self.fresh, "notes": self.notes}

    def summary(self) -> str:
        counts = f"{len(self.taken)} tensors taken, {len(self.skipped)} left, {len(self.fresh)} initialised here"
        return f"{self.file} ({self.layout}): {counts}"

    def lines(self) -> Iterator[str]:
        """A summary for the terminal; the record has every name."""
        yield f"warm start from {self.summary()}"
        yield from (f"  note: {note}" for note in self.notes)


class Layout(NamedTuple):
    """A kind of file, and what no shape shows of it."""

    name: str
    mark: str  # a name that only this layout has
    bias: str = "none"  # the quantizer.bias that its convolution stands for
    latents: str = "none"  # the normalisation of its latents: none, layernorm or l2
    groups: int = 32  # of its GroupNorms


LAYOUTS = (
    Layout("VAR", "encoder.mid.attn_1.qkv.weight", bias="blend"),
    Layout("taming-transformers", "encoder.mid.attn_1.q.weight"),
    Layout("LlamaGen", "encoder.conv_blocks.0.res.0.conv1.weight", latents="l2"),
)


def warm_start(cfg: TokenizerConfig, seed: int, path: Path) -> tuple[Tokenizer, Imported]:
    """A new tokenizer that begins with the weights of a file. What the file does not fill is a function of the seed."""
    torch.manual_seed(seed)
    tokenizer = Tokenizer(cfg, cfg.loss.weight)
    return tokenizer, load_weights(tokenizer, path)


def load_weights(tokenizer: Tokenizer, path: Path) -> Imported:
    """Fill a tokenizer with every layer of the file that fits. Raises CheckpointError if none of the encoder does."""
    layout, tensors = _read(path)
    state, bias, auto = tokenizer.state_dict(), tokenizer.cfg.quantizer.bias, tokenizer.cfg.autoencoder
    sources = {name: [name] for name in tensors} if layout.name == "rdpm" else _sources(tensors)
    values = {name: torch.cat([tensors[public].float() for public in publics]) for name, publics in sources.items()}
    if BOOKS in values:
        _take_codebook(values, layout, state)
    filled, refused = fit(values, state)
    if not any(name.startswith("encoder.") for name in filled):
        reason = next((f": {why}" for name, why in refused.items() if name.startswith("encoder.")), "")
        hint = "give the recipe the file's sizes; docs/tokenizer.md has those of the published files"
        raise CheckpointError(f"no encoder layer of {path} ({layout.name}) fits this recipe{reason}", hint)
    notes = []  # on differences that no shape shows
    if layout.groups != (groups := groups_of(auto)):
        notes.append(f"GroupNorm: {layout.groups} groups in the file, {groups} here; the layers give other values")
    if layout.latents != auto.latent_norm:
        notes.append(f"normalisation of the latents: {layout.latents} in the file's model, {auto.latent_norm} here")
    if PHI in filled and "none" not in (layout.bias, bias) and layout.bias != bias:
        # s (q + conv(q)) = s' (q + conv'(q)) holds for conv' = (s/s') (1 + conv) - 1
        ratio, identity = SHARE[layout.bias] / SHARE[bias], nn.init.dirac_(torch.empty_like(filled[PHI]))
        filled[PHI] = ratio * (identity + filled[PHI]) - identity
        if PHI_BIAS in filled:
            filled[PHI_BIAS] = ratio * filled[PHI_BIAS]
        notes.append(f"quantizer.phi is rewritten: bias(q) under {bias} stays the file's")
    if PHI in refused:
        notes.append(f"bias(q): the file's convolution is left out: {refused[PHI]}")
    tokenizer.load_state_dict({**state, **filled})
    taken = [public for name in filled for public in sources.get(name, [])]
    mapped = {public for publics in sources.values() for public in publics}
    skipped = {
        name: COARSER if name.startswith(RESIDUAL) else "nothing here corresponds to it"
        for name in tensors
        if name not in mapped
    }
    skipped |= {public: reason for name, reason in refused.items() for public in sources.get(name, [])}
    return Imported(path.name, layout.name, taken, skipped, [name for name in state if name not in filled], notes)


def groups_of(cfg: AutoencoderConfig | MelConfig) -> int:
    """Groups of the GroupNorms of a network; 0 if it has none."""
    return cfg.groups if isinstance(cfg, AutoencoderConfig) else 0


def _read(path: Path) -> tuple[Layout, dict[str, Tensor]]:
    """The layout of a file and its tensors by public name. Raises CheckpointError."""
    content = checkpoint.read_tensors(path, hint=KNOWN, foreign=True)
    if isinstance(content, dict) and str(content.get("format")) in checkpoint.FORMATS:
        checkpoint.check(content, str(path), KIND)
        cfg = checkpoint.config_of(TokenizerArchitecture, content["config"], str(path))
        auto = cfg.autoencoder
        return Layout("rdpm", "", cfg.quantizer.bias, auto.latent_norm, groups_of(auto)), content["weights"]
    tensors = checkpoint.named_tensors(content, [layout.mark for layout in LAYOUTS])
    for layout in LAYOUTS:
        if layout.mark in tensors:
            return layout, tensors
    raise CheckpointError(f"{path} does not hold weights of a known tokenizer", KNOWN)


def _sources(names: Iterable[str]) -> dict[str, list[str]]:
    """Name in Tokenizer -> the public tensors that it joins on the first axis: q, k and v, in this order, to qkv."""
    pattern = r"(?:decoder\.conv_blocks|quantize\.quant_resi(?:\.qresi_ls)?)\.(\d+)\."
    numbered = [re.match(pattern, name) for name in names]
    last = max((int(match[1]) for match in numbered if match), default=0)
    middle = {"0": "block_1", "1": "attn_1", "2": "block_2"}
    sources: dict[str, list[str]] = {}
    for public in names:
        if public == "quantize.embedding.weight":
            name = BOOKS
        elif match := re.fullmatch(rf"{re.escape(RESIDUAL)}(?:qresi|(?:qresi_ls\.)?{last})\.(\w+)", public):
            name = f"quantizer.phi.{match[1]}"
        elif public.startswith(BODY):
            # LlamaGen numbers its blocks in the order they run: the decoder's last one is `up.0` here
            name = re.sub(r"decoder\.conv_blocks\.(\d+)", lambda match: f"decoder.up.{last - int(match[1])}", public)
            name = name.replace("encoder.conv_blocks.", "encoder.down.").replace(".res.", ".block.")
            name = re.sub(r"\.mid\.([012])\.", lambda match: f".mid.{middle[match[1]]}.", name)
            name = re.sub(r"(attn.*)\.[qkv]\.", r"\1.qkv.", name)
        else:
            continue
        sources.setdefault(name, []).append(public)
    return {
        name: sorted(publics, key=lambda public: "qkv".find(public.split(".")[-2])) for name, publics in sources.items()
    }


def _take_codebook(values: dict[str, Tensor], layout: Layout, state: Mapping[str, Tensor]) -> None:
    """Bring the file's codes to books_MKC; one book becomes the book of every step."""
    books_MKC = values[BOOKS].view(-1, *values[BOOKS].shape[-2:])
    if layout.latents == "l2":  # as the file's own model uses them
        books_MKC = F.normalize(books_MKC, dim=-1)
    values[BOOKS] = books_MKC
    if COUNTS in state:
        # Without an EMA in the file, one vector counts for each code, so that the first step moves the codes and does
        # not replace them.
        values.setdefault(COUNTS, torch.ones(books_MKC.shape[:2]))
        values.setdefault(SUMS, books_MKC)
    if len(books_MKC) == 1:
        values |= {
            name: torch.cat([values[name]] * len(state[BOOKS])) for name in (BOOKS, COUNTS, SUMS) if name in values
        }


def fit(values: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """-> (the tensors that fit, {name: why it does not}). A layer fits as a whole: a bias alone would be noise."""
    refused = {name: "this recipe has no such layer" for name in values if name not in state}
    shapes = {name: (tuple(values[name].shape), tuple(state[name].shape)) for name in values if name in state}
    misfits = {  # by layer; its first tensor, the weight, has the last word
        name.rpartition(".")[0]: f"{name} is {file} in the file, {here} here"
        for name, (file, here) in reversed(shapes.items())
        if file != here
    }
    refused |= {name: misfits[layer] for name in shapes if (layer := name.rpartition(".")[0]) in misfits}
    return {name: value for name, value in values.items() if name not in refused}, refused

"""Warm starts: public weights reproduce their own outputs here, what is left is said, nothing in a file is run.

The public side of every comparison is written from the layouts alone: random state dicts under the public names, and a
forward pass by torch.nn.functional over those names.
"""

import argparse
import itertools
import json
import os
import pickle
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rdpm_cli import files, modelfile, recipe_files
from rdpm_cli.cli.app import run
from rdpm_cli.config import TokenizerArchitecture
from rdpm_cli.engine import warming
from rdpm_cli.errors import CheckpointError
from rdpm_cli.images.tensors import to_model
from rdpm_cli.step import TrainStep
from rdpm_cli.tokenizer import model
from rdpm_cli.tokenizer.importers import load_weights, reading
from rdpm_cli.training import checkpoint

Weights = dict[str, Tensor]

WIDTH, MULTIPLIERS, RES_BLOCKS, CODES = 32, (1, 2), 2, 16  # GroupNorm has 32 groups in every public layout
SIDE, GRID = 8, 4
SIZES: dict[str, dict[str, Any]] = {  # C, channels between encoder and quant_conv, kernel of quant_conv
    "VAR": {"channels": 4, "features": None, "quant_kernel": 3},
    "taming-transformers": {"channels": 8, "features": None, "quant_kernel": 1},
    "LlamaGen": {"channels": 4, "features": 6, "quant_kernel": 1},
}
LAYOUTS = sorted(SIZES)


# ---- the public side: state dicts ----------------------------------------------------------------------------------


class Maker:
    """Random layers under given names."""

    def __init__(self, seed: int = 0) -> None:
        self.weights: Weights = {}
        self.random = torch.Generator().manual_seed(seed)

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random)

    def conv(self, name: str, inputs: int, outputs: int, kernel: int) -> None:
        self.weights[f"{name}.weight"] = self.draw(outputs, inputs, kernel, kernel) / (inputs * kernel**2) ** 0.5
        self.weights[f"{name}.bias"] = 0.1 * self.draw(outputs)

    def norm(self, name: str, channels: int) -> None:
        self.weights[f"{name}.weight"] = 1 + 0.1 * self.draw(channels)
        self.weights[f"{name}.bias"] = 0.1 * self.draw(channels)

    def res(self, name: str, inputs: int, outputs: int) -> None:
        self.norm(f"{name}.norm1", inputs)
        self.conv(f"{name}.conv1", inputs, outputs, 3)
        self.norm(f"{name}.norm2", outputs)
        self.conv(f"{name}.conv2", outputs, outputs, 3)
        if inputs != outputs:
            self.conv(f"{name}.nin_shortcut", inputs, outputs, 1)

    def attn(self, name: str, channels: int, fused: bool) -> None:
        self.norm(f"{name}.norm", channels)
        for part in ["qkv"] if fused else "qkv":
            self.conv(f"{name}.{part}", channels, 3 * channels if fused else channels, 1)
        self.conv(f"{name}.proj_out", channels, channels, 1)

    def ends(self, features: int, channels: int, kernel: int) -> None:
        """What all three call alike."""
        top = WIDTH * MULTIPLIERS[-1]
        self.conv("encoder.conv_in", 3, WIDTH, 3)
        self.norm("encoder.norm_out", top)
        self.conv("encoder.conv_out", top, features, 3)
        self.conv("decoder.conv_in", features, top, 3)
        self.norm("decoder.norm_out", WIDTH * MULTIPLIERS[0])
        self.conv("decoder.conv_out", WIDTH * MULTIPLIERS[0], 3, 3)
        self.conv("quant_conv", features, channels, kernel)
        self.conv("post_quant_conv", channels, features, kernel)
        self.weights["quantize.embedding.weight"] = self.draw(CODES, channels)


def stages() -> list[tuple[int, int, int]]:
    """(level, channels in, channels out) of the encoder, from high to low resolution."""
    widths = [WIDTH * m for m in (1, *MULTIPLIERS)]
    return [(i, a, b) for i, (a, b) in enumerate(itertools.pairwise(widths))]


def vqgan(fused: bool, features: int, channels: int, kernel: int) -> Maker:
    """VAR (fused) and taming-transformers: down, mid, up; up[i] counts from high resolution."""
    make, last = Maker(), len(MULTIPLIERS) - 1
    make.ends(features, channels, kernel)
    for level, inputs, outputs in stages():
        for j in range(RES_BLOCKS):
            make.res(f"encoder.down.{level}.block.{j}", outputs if j else inputs, outputs)
            if level == last:
                make.attn(f"encoder.down.{level}.attn.{j}", outputs, fused)
        if level < last:
            make.conv(f"encoder.down.{level}.downsample.conv", outputs, outputs, 3)
    previous = top = WIDTH * MULTIPLIERS[-1]
    for level in range(last, -1, -1):
        width = WIDTH * MULTIPLIERS[level]
        for j in range(RES_BLOCKS + 1):
            make.res(f"decoder.up.{level}.block.{j}", width if j else previous, width)
            if level == last:
                make.attn(f"decoder.up.{level}.attn.{j}", width, fused)
        if level:
            make.conv(f"decoder.up.{level}.upsample.conv", width, width, 3)
        previous = width
    for side in ("encoder", "decoder"):
        make.res(f"{side}.mid.block_1", top, top)
        make.attn(f"{side}.mid.attn_1", top, fused)
        make.res(f"{side}.mid.block_2", top, top)
    return make


def var_weights() -> Weights:
    make = vqgan(True, 4, 4, 3)
    for i in range(4):
        make.conv(f"quantize.quant_resi.qresi_ls.{i}", 4, 4, 3)
    make.weights["quantize.ema_vocab_hit_SV"] = torch.ones(10, CODES)
    return make.weights


def taming_weights() -> Weights:
    make = vqgan(False, 8, 8, 1)
    make.conv("loss.discriminator.main.0", 3, 8, 4)
    make.conv("loss.perceptual_loss.lin0.model.1", 8, 1, 1)
    return make.weights


def llamagen_weights() -> Weights:
    """conv_blocks in the order they run: the decoder's first is the lowest resolution."""
    make, last = Maker(), len(MULTIPLIERS) - 1
    make.ends(6, 4, 1)
    for level, inputs, outputs in stages():
        for j in range(RES_BLOCKS):
            make.res(f"encoder.conv_blocks.{level}.res.{j}", outputs if j else inputs, outputs)
            if level == last:
                make.attn(f"encoder.conv_blocks.{level}.attn.{j}", outputs, False)
        if level < last:
            make.conv(f"encoder.conv_blocks.{level}.downsample.conv", outputs, outputs, 3)
    previous = top = WIDTH * MULTIPLIERS[-1]
    for i, multiplier in enumerate(reversed(MULTIPLIERS)):
        width = WIDTH * multiplier
        for j in range(RES_BLOCKS + 1):
            make.res(f"decoder.conv_blocks.{i}.res.{j}", width if j else previous, width)
            if i == 0:
                make.attn(f"decoder.conv_blocks.{i}.attn.{j}", width, False)
        if i < last:
            make.conv(f"decoder.conv_blocks.{i}.upsample.conv", width, width, 3)
        previous = width
    for side in ("encoder", "decoder"):
        make.res(f"{side}.mid.0", top, top)
        make.attn(f"{side}.mid.1", top, False)
        make.res(f"{side}.mid.2", top, top)
    make.weights["quantize.codebook_used"] = torch.zeros(64)
    return make.weights


MAKE: dict[str, Callable[[], Weights]] = {
    "VAR": var_weights,
    "taming-transformers": taming_weights,
    "LlamaGen": llamagen_weights,
}


def wrapped(layout: str, weights: Weights) -> dict[str, Any]:
    """As the layout's own files hold them."""
    if layout == "taming-transformers":
        return {"state_dict": weights, "epoch": 3, "global_step": 7, "pytorch-lightning_version": "1.0.8"}
    return {"model": weights} if layout == "LlamaGen" else weights


# ---- the public side: forward passes -------------------------------------------------------------------------------


class Forward:
    """The public networks, by torch.nn.functional over the public names."""

    def __init__(self, weights: Weights) -> None:
        self.w = weights

    def conv(self, name: str, x: Tensor, stride: int = 1, padding: int | None = None) -> Tensor:
        weight = self.w[f"{name}.weight"]
        padding = weight.shape[-1] // 2 if padding is None else padding
        return F.conv2d(x, weight, self.w[f"{name}.bias"], stride=stride, padding=padding)

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.group_norm(x, 32, self.w[f"{name}.weight"], self.w[f"{name}.bias"], eps=1e-6)

    def act(self, name: str, x: Tensor) -> Tensor:
        y = self.norm(name, x)
        return y * torch.sigmoid(y)

    def res(self, name: str, x: Tensor) -> Tensor:
        y = self.conv(f"{name}.conv1", self.act(f"{name}.norm1", x))
        y = self.conv(f"{name}.conv2", self.act(f"{name}.norm2", y))
        return y + (self.conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in self.w else x)

    def attn(self, name: str, x: Tensor) -> Tensor:
        y, (b, c, h, w) = self.norm(f"{name}.norm", x), x.shape
        if f"{name}.qkv.weight" in self.w:
            q, k, v = self.conv(f"{name}.qkv", y).chunk(3, dim=1)
        else:
            q, k, v = (self.conv(f"{name}.{part}", y) for part in "qkv")
        scores = torch.einsum("bci,bcj->bij", q.reshape(b, c, h * w), k.reshape(b, c, h * w)) / c**0.5
        mixed = torch.einsum("bij,bcj->bci", scores.softmax(-1), v.reshape(b, c, h * w)).reshape(b, c, h, w)
        return x + self.conv(f"{name}.proj_out", mixed)

    def level(self, name: str, block: str, x: Tensor) -> Tensor:
        """Blocks, each with its attention if it has one, then the resize if there is one."""
        for j in itertools.count():
            if f"{name}.{block}.{j}.norm1.weight" not in self.w:
                break
            x = self.res(f"{name}.{block}.{j}", x)
            if f"{name}.attn.{j}.norm.weight" in self.w:
                x = self.attn(f"{name}.attn.{j}", x)
        if f"{name}.downsample.conv.weight" in self.w:
            x = self.conv(f"{name}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2, padding=0)
        if f"{name}.upsample.conv.weight" in self.w:
            x = self.conv(f"{name}.upsample.conv", x.repeat_interleave(2, 2).repeat_interleave(2, 3))
        return x

    def middle(self, names: list[str], x: Tensor) -> Tensor:
        return self.res(names[2], self.attn(names[1], self.res(names[0], x)))

    def encode(self, layout: str, x: Tensor) -> Tensor:
        """What quant_conv gives."""
        llama = layout == "LlamaGen"
        y = self.conv("encoder.conv_in", x)
        for i in range(len(MULTIPLIERS)):
            y = self.level(f"encoder.{'conv_blocks' if llama else 'down'}.{i}", "res" if llama else "block", y)
        y = self.middle([f"encoder.mid.{part}" for part in ("012" if llama else ("block_1", "attn_1", "block_2"))], y)
        return self.conv("quant_conv", self.conv("encoder.conv_out", self.act("encoder.norm_out", y)))

    def decode(self, layout: str, z: Tensor) -> Tensor:
        llama = layout == "LlamaGen"
        y = self.conv("decoder.conv_in", self.conv("post_quant_conv", z))
        y = self.middle([f"decoder.mid.{part}" for part in ("012" if llama else ("block_1", "attn_1", "block_2"))], y)
        for i in range(len(MULTIPLIERS)):
            place = f"conv_blocks.{i}" if llama else f"up.{len(MULTIPLIERS) - 1 - i}"
            y = self.level(f"decoder.{place}", "res" if llama else "block", y)
        return self.conv("decoder.conv_out", self.act("decoder.norm_out", y))


# ---- our side ------------------------------------------------------------------------------------------------------


def ours(layout: str, quantizer: dict[str, Any] | None = None, **autoencoder: Any) -> model.Tokenizer:
    """A new tokenizer into which a file of this layout fits whole, but for what is changed."""
    sizes = {"resolution": SIDE, "width": WIDTH, "multipliers": MULTIPLIERS, "res_blocks": RES_BLOCKS, "groups": 32}
    raw = {
        "autoencoder": {**sizes, **SIZES[layout], **autoencoder},
        "quantizer": {"codes": CODES, "steps": 3, **(quantizer or {})},
    }
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return model.Tokenizer(TokenizerArchitecture.model_validate(raw))


def save(folder: Path, layout: str, weights: Weights) -> Path:
    path = folder / "public.pt"
    torch.save(wrapped(layout, weights), path)
    return path


def public(folder: Path, layout: str) -> Path:
    return save(folder, layout, MAKE[layout]())


def images() -> Tensor:
    return to_model(torch.randint(256, (2, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(3)))


# ---- the networks compute what they computed -----------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_encoder_and_decoder_compute_what_they_computed_there(layout: str, tmp_path: Path) -> None:
    source, tokenizer = Forward(MAKE[layout]()), ours(layout)
    z = torch.randn(2, SIZES[layout]["channels"], GRID, GRID, generator=torch.Generator().manual_seed(4))
    assert not torch.allclose(tokenizer.decode_latents(z), source.decode(layout, z), atol=1e-2)
    found = load_weights(tokenizer, public(tmp_path, layout))
    assert found.layout == layout
    latent = tokenizer.quant_conv(tokenizer.encoder(images()))
    torch.testing.assert_close(latent, source.encode(layout, images()), atol=1e-5, rtol=0)
    torch.testing.assert_close(tokenizer.decode_latents(z), source.decode(layout, z), atol=1e-5, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_tensor_of_a_file_is_taken_or_left(layout: str, tmp_path: Path) -> None:
    weights = MAKE[layout]()
    found = load_weights(ours(layout), save(tmp_path, layout, weights))
    assert sorted([*found.taken, *found.left]) == sorted(weights)
    extra = {
        "VAR": [f"quantize.quant_resi.qresi_ls.{i}.{part}" for i in range(3) for part in ("weight", "bias")]
        + ["quantize.ema_vocab_hit_SV"],
        "taming-transformers": [name for name in weights if name.startswith("loss.")],
        "LlamaGen": ["quantize.codebook_used"],
    }
    assert sorted(found.left) == sorted(extra[layout])
    assert found.fresh == ([] if layout == "VAR" else ["quantizer.phi.weight", "quantizer.phi.bias"])
    assert found.overrides == []


def test_the_best_weights_of_a_file_are_taken(tmp_path: Path) -> None:
    best = llamagen_weights()
    torch.save({"model": {k: v + 1 for k, v in best.items()}, "ema": best, "steps": 5}, tmp_path / "own.pt")
    tokenizer = ours("LlamaGen")
    load_weights(tokenizer, tmp_path / "own.pt")
    assert torch.equal(tokenizer.encoder.conv_in.weight, best["encoder.conv_in.weight"])


def test_half_precision_becomes_fp32(tmp_path: Path) -> None:
    weights = {name: value.half() for name, value in var_weights().items()}
    tokenizer = ours("VAR")
    load_weights(tokenizer, save(tmp_path, "VAR", weights))
    assert {value.dtype for value in tokenizer.state_dict().values()} == {torch.float32}
    assert torch.equal(tokenizer.decoder.conv_in.weight, weights["decoder.conv_in.weight"].float())


# ---- the codebook and the bias -------------------------------------------------------------------------------------


@pytest.mark.parametrize("codebooks", ["shared", "per_step"])
@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_every_book_is_the_files(codebook: str, codebooks: str, tmp_path: Path) -> None:
    tokenizer = ours("VAR", {"codebook": codebook, "codebooks": codebooks})
    load_weights(tokenizer, public(tmp_path, "VAR"))
    book = var_weights()["quantize.embedding.weight"]
    assert len(tokenizer.quantizer.books) == (3 if codebooks == "per_step" else 1)
    assert all(torch.equal(found, book) for found in tokenizer.quantizer.books)
    if codebook == "ema":
        assert torch.equal(tokenizer.quantizer.ema_sums, tokenizer.quantizer.books)
        assert torch.equal(tokenizer.quantizer.ema_counts, torch.ones(tokenizer.quantizer.books.shape[:2]))


def test_the_first_ema_step_keeps_the_codebook(tmp_path: Path) -> None:
    tokenizer = ours("VAR", latent_norm="none").train()
    load_weights(tokenizer, public(tmp_path, "VAR"))
    quantizer, before = tokenizer.quantizer, var_weights()["quantize.embedding.weight"]
    step = TrainStep(0, 0, range(16), 16, torch.device("cpu"))
    with torch.no_grad():
        chain = quantizer(torch.zeros(16, 4, GRID, GRID), step.normal(3, 4, GRID, GRID))
    assert chain.usage is not None
    used = chain.usage.counts_SK[0] > 0
    mean = (chain.usage.sums_SKC[0] / chain.usage.counts_SK[0].clamp_min(1e-9).unsqueeze(-1))[used]
    assert quantizer.follow(chain.usage, step) == 0
    torch.testing.assert_close(quantizer.books[0][~used], before[~used])
    share = 0.01 * chain.usage.counts_SK[0][used].unsqueeze(-1)
    torch.testing.assert_close(quantizer.books[0][used], (0.99 * before[used] + share * mean) / (0.99 + share))


def test_llamagen_codes_are_normalised_as_its_decoder_sees_them(tmp_path: Path) -> None:
    tokenizer = ours("LlamaGen")
    found = load_weights(tokenizer, public(tmp_path, "LlamaGen"))
    torch.testing.assert_close(tokenizer.quantizer.books.norm(dim=-1), torch.ones(1, CODES))
    expected = F.normalize(llamagen_weights()["quantize.embedding.weight"], dim=-1)
    torch.testing.assert_close(tokenizer.quantizer.books[0], expected)
    assert any("L2-normalised" in note for note in found.notes)


@pytest.mark.parametrize("bias", ["blend", "add"])
@torch.no_grad()
def test_the_bias_is_the_last_of_vars(bias: str, tmp_path: Path) -> None:
    tokenizer, weights = ours("VAR", {"bias": bias}), var_weights()
    found = load_weights(tokenizer, public(tmp_path, "VAR"))
    q = torch.randn(2, 4, GRID, GRID, generator=torch.Generator().manual_seed(5))
    last = "quantize.quant_resi.qresi_ls.3"
    expected = 0.5 * q + 0.5 * F.conv2d(q, weights[f"{last}.weight"], weights[f"{last}.bias"], padding=1)
    torch.testing.assert_close(tokenizer.quantizer.bias(q), expected, atol=1e-6, rtol=0)
    assert any("rewritten" in note for note in found.notes) == (bias == "add")


def test_without_a_bias_all_four_are_left(tmp_path: Path) -> None:
    found = load_weights(ours("VAR", {"bias": "none"}), public(tmp_path, "VAR"))
    assert sum(name.startswith("quantize.quant_resi") for name in found.left) == 8
    assert any("bias is none" in note for note in found.notes)


# ---- what does not fit ---------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_left_with_both_shapes(tmp_path: Path) -> None:
    tokenizer = ours("VAR", {"codes": 24}, channels=5)
    fresh = {name: value.clone() for name, value in tokenizer.state_dict().items()}
    found = load_weights(tokenizer, public(tmp_path, "VAR"))
    assert found.left["quant_conv.weight"] == "(4, 4, 3, 3) there, (5, 5, 3, 3) here"
    assert found.left["quantize.embedding.weight"] == "(1, 16, 4) there, (1, 24, 5) here"
    whole = {"quant_conv", "post_quant_conv", "encoder.conv_out", "quantizer.phi", "decoder.conv_in"}
    left = {"quantizer.books", "quantizer.ema_counts", "quantizer.ema_sums"}
    assert set(found.fresh) == left | {f"{name}.{part}" for name in whole for part in ("weight", "bias")}
    assert all(torch.equal(tokenizer.state_dict()[name], fresh[name]) for name in found.fresh)
    assert found.overrides == ["autoencoder.channels=4", "quantizer.codes=16"]


def test_a_bias_does_not_come_without_its_kernel(tmp_path: Path) -> None:
    found = load_weights(ours("VAR", quant_kernel=1), public(tmp_path, "VAR"))
    assert found.left["quant_conv.bias"] == "goes with quant_conv.weight"
    assert "quant_conv.bias" in found.fresh


def test_layers_that_are_not_here_are_left(tmp_path: Path) -> None:
    found = load_weights(ours("VAR", attention=False), public(tmp_path, "VAR"))
    assert found.left["encoder.mid.attn_1.qkv.weight"] == "there is no such layer here"
    assert found.overrides == ["autoencoder.attention=true"]


def test_other_groups_are_noted(tmp_path: Path) -> None:
    found = load_weights(ours("VAR", groups=8), public(tmp_path, "VAR"))
    assert any("32 groups there, 8 here" in note for note in found.notes)
    assert found.overrides == ["autoencoder.groups=32"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_recipe_that_takes_nothing_is_told_one_that_takes_all(layout: str, tmp_path: Path) -> None:
    path, base = public(tmp_path, layout), ["autoencoder.resolution=16"]
    recipe = recipe_files.load_recipe("digits", base, "tokenizer")
    assert recipe.tokenizer is not None
    before = model.Tokenizer(recipe.tokenizer)
    weights = {name: value.clone() for name, value in before.state_dict().items()}
    with pytest.raises(CheckpointError, match="nothing of the encoder") as caught:
        load_weights(before, path)
    assert all(torch.equal(value, weights[name]) for name, value in before.state_dict().items())
    assert "(32, 3, 3, 3) there, (24, 3, 3, 3) here" in caught.value.message
    told = shlex.split(caught.value.hint.partition(": ")[2])
    recipe = recipe_files.load_recipe("digits", [*base, *told], "tokenizer")
    assert recipe.tokenizer is not None
    found = load_weights(model.Tokenizer(recipe.tokenizer), path)
    assert found.overrides == []
    assert len(found.left) == {"VAR": 7, "taming-transformers": 4, "LlamaGen": 1}[layout]


# ---- our own files -------------------------------------------------------------------------------------------------


def own_file(folder: Path, tokenizer: model.Tokenizer) -> Path:
    modelfile.save(folder / "tokenizer.pt", model.pack(tokenizer, class_names=[], provenance={}))
    return folder / "tokenizer.pt"


def trained(layout: str = "VAR", **quantizer: Any) -> model.Tokenizer:
    """One whose every weight differs from a new one's."""
    tokenizer = ours(layout, quantizer)
    for value in tokenizer.state_dict().values():
        value.add_(0.5)
    return tokenizer


def test_our_own_tokenizer_comes_whole(tmp_path: Path) -> None:
    source, tokenizer = trained(), ours("VAR")
    found = load_weights(tokenizer, own_file(tmp_path, source))
    assert (found.layout, found.left, found.fresh, found.notes, found.overrides) == ("rdpm", {}, [], [], [])
    assert all(torch.equal(value, tokenizer.state_dict()[name]) for name, value in source.state_dict().items())


@pytest.mark.parametrize("before", ["blend", "add"])
@pytest.mark.parametrize("after", ["blend", "add"])
@torch.no_grad()
def test_our_own_bias_stays_what_it_was(before: str, after: str, tmp_path: Path) -> None:
    source, tokenizer = trained(bias=before), ours("VAR", {"bias": after})
    load_weights(tokenizer, own_file(tmp_path, source))
    q = torch.randn(2, 4, GRID, GRID, generator=torch.Generator().manual_seed(6))
    torch.testing.assert_close(tokenizer.quantizer.bias(q), source.quantizer.bias(q))


def test_our_own_book_changes_its_way_of_learning(tmp_path: Path) -> None:
    source = trained(codebook="gradient")
    tokenizer = ours("VAR", {"codebooks": "per_step"})
    load_weights(tokenizer, own_file(tmp_path, source))
    assert torch.equal(tokenizer.quantizer.ema_sums, source.quantizer.books.detach().repeat(3, 1, 1))
    tokenizer = ours("VAR", {"codebook": "gradient"})
    found = load_weights(tokenizer, own_file(tmp_path, trained()))
    assert sorted(found.left) == ["quantizer.ema_counts", "quantizer.ema_sums"]
    assert torch.equal(tokenizer.quantizer.books, trained().quantizer.books)


def test_books_of_their_own_steps_do_not_become_one(tmp_path: Path) -> None:
    found = load_weights(ours("VAR"), own_file(tmp_path, trained(codebooks="per_step")))
    assert "(3, 16, 4) there, (1, 16, 4) here" in found.left["quantizer.books"]
    assert found.overrides == ["'quantizer.codebooks=\"per_step\"'"]


# ---- files that are refused ----------------------------------------------------------------------------------------


def spoiled(folder: Path, kind: str) -> Path:
    path, weights = folder / "bad.pt", taming_weights()
    if kind == "absent":
        return path
    if kind == "folder":
        path.mkdir()
    elif kind == "text":
        path.write_text("<!DOCTYPE html><html>404</html>")
    elif kind == "empty":
        path.touch()
    elif kind == "truncated":
        torch.save(weights, path)
        path.write_bytes(path.read_bytes()[:5000])
    elif kind == "unknown layout":
        torch.save({"state_dict": {"layers.0.weight": torch.zeros(3)}}, path)
    elif kind == "a list":
        torch.save([torch.zeros(3)], path)
    elif kind == "odd keys":
        torch.save({1: torch.zeros(3), "format": ["x"], "model": 3}, path)
    elif kind == "not finite":
        weights["decoder.conv_in.weight"][0, 0, 0, 0] = float("nan")
        torch.save({"state_dict": weights}, path)
    elif kind == "ragged":
        weights["encoder.mid.attn_1.q.weight"] = torch.zeros(3, 5, 1, 1)
        torch.save({"state_dict": weights}, path)
    elif kind == "flat":
        torch.save({"state_dict": {name: torch.zeros(()) for name in weights}}, path)
    elif kind == "ends missing":
        torch.save({"encoder.mid.attn_1.q.weight": torch.zeros(3)}, path)
    elif kind == "another of ours":
        modelfile.save(path, {**model.pack(ours("VAR"), class_names=[], provenance={}), "format": "rdpm-judge"})
    return path


REFUSALS = {
    "absent": "does not exist",
    "folder": "is a folder",
    "text": "cannot be read as weights",
    "empty": "cannot be read as weights",
    "truncated": "cannot be read as weights",
    "unknown layout": "no known tokenizer",
    "a list": "no known tokenizer",
    "odd keys": "no known tokenizer",
    "not finite": r"decoder\.conv_in\.weight holds values that are not finite",
    "ragged": r"encoder\.mid\.attn_1\.q\.weight.* do not fit together",
    "flat": "do not fit together",
    "ends missing": "nothing of the encoder",
    "another of ours": "is a judge, not a tokenizer",
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_a_file_of_no_use_is_one_clear_error(kind: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=REFUSALS[kind]) as caught:
        load_weights(ours("taming-transformers"), spoiled(tmp_path, kind))
    assert caught.value.exit_code == 3
    assert caught.value.hint
    if "no known" in REFUSALS[kind]:
        assert all(name in caught.value.hint for name in ("VAR", "taming", "LlamaGen"))


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("where", ["top", "inside", "plain pickle"])
def test_a_file_that_would_run_code_does_not(where: str, new_format: bool, tmp_path: Path) -> None:
    marker, path = tmp_path / "ran", tmp_path / "evil.pt"
    trap = Trap(marker)
    if where == "plain pickle":
        path.write_bytes(pickle.dumps(trap, protocol=2))
    else:
        content = trap if where == "top" else {"state_dict": taming_weights(), "callbacks": trap}
        torch.save(content, path, _use_new_zipfile_serialization=new_format)
    with pytest.raises(CheckpointError, match=r"is refused: it names posix\.mkdir"):
        load_weights(ours("taming-transformers"), path)
    assert not marker.exists()


def test_the_command_in_the_hint_copies_the_tensors_alone(tmp_path: Path) -> None:
    layout = "LlamaGen"
    weights, path = MAKE[layout](), tmp_path / "it's old.ckpt"
    more = {"args": argparse.Namespace(lr=1), "optimizer": {"state": {0: {"step": 3}}}}
    torch.save({**wrapped(layout, weights), **more}, path)
    with pytest.raises(CheckpointError, match=r"more than tensors \(argparse\.Namespace\)") as caught:
        load_weights(ours(layout), path)
    command = shlex.split(caught.value.hint.partition(": ")[2])
    assert command[0] == "python"
    subprocess.run([sys.executable, *command[1:]], check=True, timeout=120)
    copy = tmp_path / "it's old-tensors.pt"
    assert command[-1] == str(copy)
    found = load_weights(ours(layout), copy)
    assert sorted([*found.taken, *found.left]) == sorted(weights)


# ---- the command line ----------------------------------------------------------------------------------------------

TINY = [
    "--recipe", "digits", "--device", "cpu", "train.batch=16", "train.steps=4", "train.save_every=2", "train.lr=1e-6",
    "autoencoder.groups=32", "autoencoder.width=32", "autoencoder.attention=true", "autoencoder.multipliers=[1,2]",
    "autoencoder.res_blocks=2", "autoencoder.channels=4", "quantizer.codes=16", "quantizer.steps=3",
]  # fmt: skip


def train(out: Path, *more: object) -> int:
    return run(["train-tokenizer", "digits", "--out", str(out), *TINY, *map(str, more)])


def test_a_run_begins_with_the_weights_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = public(tmp_path, "VAR"), tmp_path / "run"
    assert train(out, "--from-weights", path, "--json") == 0
    said = capsys.readouterr()
    json.loads(said.out)
    assert f"warm start from public.pt (VAR): {len(var_weights()) - 7} tensors taken, 7 left" in said.err
    assert "left quantize.quant_resi (6): the bias is one convolution here" in said.err
    tokenizer, content = model.load(out / "tokenizer.pt")
    expected = var_weights()["encoder.mid.attn_1.qkv.weight"]
    torch.testing.assert_close(tokenizer.state_dict()["encoder.mid.attn_1.qkv.weight"], expected, atol=1e-4, rtol=0)
    found = content["provenance"]["from_weights"]
    sha256 = files.sha256_file(path)
    assert (found["file"], found["sha256"], found["layout"]) == ("public.pt", sha256, "VAR")
    assert (found["taken"], len(found["left"])) == (len(var_weights()) - 7, 7)
    settings = files.read_json(out / "run.json")["settings"]
    assert settings["from_weights"] == {"sha256": sha256}


def test_a_resumed_run_goes_on_from_its_own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, out = public(tmp_path, "VAR"), tmp_path / "run"
    assert train(out, "--from-weights", path) == 0
    whole = (out / "tokenizer.pt").read_bytes()
    (out / "tokenizer.pt").unlink()
    checkpoint.found(out / "checkpoints")[-1][1].unlink()
    assert [step for step, _ in checkpoint.found(out / "checkpoints")] == [2]
    monkeypatch.setattr(reading, "read", lambda path: pytest.fail("read again"))
    assert train(out, "--from-weights", path) == 0
    assert (out / "tokenizer.pt").read_bytes() == whole
    assert train(out, "--from-weights", path) == 0  # finished


def test_a_run_is_resumed_with_the_same_weights_wherever_they_lie(tmp_path: Path) -> None:
    path, out = public(tmp_path, "VAR"), tmp_path / "run"
    assert train(out, "--from-weights", path, "train.steps=1") == 0
    assert train(out, "--from-weights", path.rename(tmp_path / "moved.pt"), "train.steps=1") == 0


@pytest.mark.parametrize("change", ["other content", "none"])
def test_a_run_is_not_resumed_with_other_weights(
    change: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = public(tmp_path, "VAR"), tmp_path / "run"
    assert train(out, "--from-weights", path, "train.steps=1") == 0
    again = ["--from-weights", path, "train.steps=1"]
    if change == "other content":
        save(tmp_path, "VAR", {name: 2 * value for name, value in var_weights().items()})
    else:
        del again[:2]
    assert train(out, *again) == 2
    assert "from_weights" in capsys.readouterr().err


def test_a_cold_run_is_not_resumed_warm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path / "run", "train.steps=1") == 0
    assert train(tmp_path / "run", "train.steps=1", "--from-weights", public(tmp_path, "VAR")) == 2
    assert "from_weights" in capsys.readouterr().err


def test_a_file_of_no_use_claims_no_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, path = tmp_path / "run", public(tmp_path, "VAR")
    for file, change in [(path, "autoencoder.width=64"), (tmp_path / "absent.pt", ""), (spoiled(tmp_path, "text"), "")]:
        assert train(out, "--from-weights", file, *[change] if change else []) == 3
        error = capsys.readouterr().err
        assert error.count("error:") == 1
        assert str(file) in error
        assert not out.exists()
    assert train(out, "--from-weights", path, "train.steps=1") == 0


def test_what_the_file_does_not_fill_is_what_a_cold_run_begins_with(tmp_path: Path) -> None:
    recipe = recipe_files.load_recipe("digits", [*[o for o in TINY if "=" in o], "autoencoder.channels=5"], "tokenizer")
    assert recipe.tokenizer is not None
    torch.manual_seed(recipe.seed)
    cold = model.Tokenizer(recipe.tokenizer).state_dict()
    torch.manual_seed(99)
    warm = warming.prepare(recipe.tokenizer, recipe.seed, tmp_path / "run", public(tmp_path, "VAR"))
    assert warm is not None
    state = warm.tokenizer.state_dict()
    assert warm.imported.fresh
    assert all(torch.equal(state[name], cold[name]) for name in warm.imported.fresh)
    assert not torch.equal(state["encoder.conv_in.weight"], cold["encoder.conv_in.weight"])

"""Warm starts: public weights reproduce their own outputs here, every tensor is accounted for, no code in a file runs.

The public side of every comparison is written from the layouts: random state dicts under the public names, and a
forward pass by torch.nn.functional over those names.
"""

import argparse
import itertools
import json
import os
import pickle
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rdpm_cli import checkpoint, files
from rdpm_cli.cli.app import run
from rdpm_cli.data.pixels import to_model
from rdpm_cli.distributed import TrainStep
from rdpm_cli.engine import tokenizer as engine
from rdpm_cli.errors import CheckpointError
from rdpm_cli.recipes import load_recipe
from rdpm_cli.tokenizer import model
from rdpm_cli.tokenizer.config import TokenizerArchitecture, TokenizerConfig
from rdpm_cli.tokenizer.importers import load_weights

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
    """Random layers under public names."""

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
        for piece in ["qkv"] if fused else "qkv":
            self.conv(f"{name}.{piece}", channels, 3 * channels if fused else channels, 1)
        self.conv(f"{name}.proj_out", channels, channels, 1)

    def ends(self, features: int, channels: int, kernel: int) -> None:
        """The layers that all three name alike."""
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
    """As the published files of the layout hold them."""
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
            q, k, v = (self.conv(f"{name}.{piece}", y) for piece in "qkv")
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

    def middle(self, side: str, llama: bool, x: Tensor) -> Tensor:
        first, second, third = "012" if llama else ("block_1", "attn_1", "block_2")
        x = self.attn(f"{side}.mid.{second}", self.res(f"{side}.mid.{first}", x))
        return self.res(f"{side}.mid.{third}", x)

    def encode(self, layout: str, x: Tensor) -> Tensor:
        """The output of quant_conv."""
        llama = layout == "LlamaGen"
        y = self.conv("encoder.conv_in", x)
        for i in range(len(MULTIPLIERS)):
            y = self.level(f"encoder.{'conv_blocks' if llama else 'down'}.{i}", "res" if llama else "block", y)
        y = self.middle("encoder", llama, y)
        return self.conv("quant_conv", self.conv("encoder.conv_out", self.act("encoder.norm_out", y)))

    def decode(self, layout: str, z: Tensor) -> Tensor:
        llama = layout == "LlamaGen"
        y = self.conv("decoder.conv_in", self.conv("post_quant_conv", z))
        y = self.middle("decoder", llama, y)
        for i in range(len(MULTIPLIERS)):
            level = f"conv_blocks.{i}" if llama else f"up.{len(MULTIPLIERS) - 1 - i}"
            y = self.level(f"decoder.{level}", "res" if llama else "block", y)
        return self.conv("decoder.conv_out", self.act("decoder.norm_out", y))


# ---- this side -----------------------------------------------------------------------------------------------------


def new(layout: str, quantizer: dict[str, Any] | None = None, **autoencoder: Any) -> model.Tokenizer:
    """A new tokenizer into which a file of this layout fits whole, but for the changes."""
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


def normal(*shape: int, seed: int = 4) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- the networks compute what they computed -----------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_encoder_and_decoder_compute_what_the_files_model_computes(layout: str, tmp_path: Path) -> None:
    source, tokenizer = Forward(MAKE[layout]()), new(layout)
    z = normal(2, SIZES[layout]["channels"], GRID, GRID)
    assert not torch.allclose(tokenizer.decode_latents(z.flatten(2)), source.decode(layout, z), atol=1e-2)
    imported = load_weights(tokenizer, public(tmp_path, layout))
    assert imported.layout == layout
    latent = tokenizer.quant_conv(tokenizer.encoder(images()))
    torch.testing.assert_close(latent, source.encode(layout, images()), atol=1e-5, rtol=0)
    torch.testing.assert_close(tokenizer.decode_latents(z.flatten(2)), source.decode(layout, z), atol=1e-5, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_tensor_of_a_file_is_taken_or_left_with_a_reason(layout: str, tmp_path: Path) -> None:
    weights = MAKE[layout]()
    imported = load_weights(new(layout), save(tmp_path, layout, weights))
    assert sorted([*imported.taken, *imported.skipped]) == sorted(weights)
    assert all(imported.skipped.values())
    expected = {
        "VAR": [f"quantize.quant_resi.qresi_ls.{i}.{kind}" for i in range(3) for kind in ("weight", "bias")]
        + ["quantize.ema_vocab_hit_SV"],
        "taming-transformers": [name for name in weights if name.startswith("loss.")],
        "LlamaGen": ["quantize.codebook_used"],
    }
    assert sorted(imported.skipped) == sorted(expected[layout])
    assert imported.fresh == ([] if layout == "VAR" else ["quantizer.phi.weight", "quantizer.phi.bias"])
    record = imported.record()
    assert (record["layout"], record["taken"], len(record["left"])) == (
        layout, len(imported.taken), len(imported.skipped),
    )  # fmt: skip


def test_half_precision_becomes_fp32(tmp_path: Path) -> None:
    weights = {name: value.half() for name, value in var_weights().items()}
    tokenizer = new("VAR")
    load_weights(tokenizer, save(tmp_path, "VAR", weights))
    assert {value.dtype for value in tokenizer.state_dict().values()} == {torch.float32}
    assert torch.equal(tokenizer.decoder.conv_in.weight, weights["decoder.conv_in.weight"].float())


# ---- the codebook and the bias -------------------------------------------------------------------------------------


@pytest.mark.parametrize("codebooks", ["shared", "per_step"])
@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_every_book_is_the_files(codebook: str, codebooks: str, tmp_path: Path) -> None:
    tokenizer = new("VAR", {"codebook": codebook, "codebooks": codebooks})
    load_weights(tokenizer, public(tmp_path, "VAR"))
    quantizer, book = tokenizer.quantizer, var_weights()["quantize.embedding.weight"]
    assert len(quantizer.books) == (3 if codebooks == "per_step" else 1)
    assert all(torch.equal(copy, book) for copy in quantizer.books)
    if codebook == "ema":
        assert torch.equal(quantizer.ema_sums, quantizer.books)
        assert torch.equal(quantizer.ema_counts, torch.ones(quantizer.books.shape[:2]))


def test_the_first_ema_step_moves_the_codebook_and_does_not_replace_it(tmp_path: Path) -> None:
    tokenizer = new("VAR", latent_norm="none").train()
    load_weights(tokenizer, public(tmp_path, "VAR"))
    quantizer, book = tokenizer.quantizer, var_weights()["quantize.embedding.weight"]
    step = TrainStep(0, 0, range(16), 16, torch.device("cpu"))
    with torch.no_grad():
        usage = quantizer(torch.zeros(16, 4, GRID * GRID), step.normal(3, 4, GRID * GRID)).usage
    assert usage is not None
    used = usage.counts_MK[0] > 0
    mean = (usage.sums_MKC[0] / usage.counts_MK[0].clamp_min(1e-9).unsqueeze(-1))[used]
    assert quantizer.follow(usage, step) == 0
    torch.testing.assert_close(quantizer.books[0][~used], book[~used])
    share = 0.01 * usage.counts_MK[0][used].unsqueeze(-1)
    torch.testing.assert_close(quantizer.books[0][used], (0.99 * book[used] + share * mean) / (0.99 + share))


def test_llamagen_codes_are_normalised_as_its_decoder_sees_them(tmp_path: Path) -> None:
    tokenizer = new("LlamaGen")
    imported = load_weights(tokenizer, public(tmp_path, "LlamaGen"))
    expected = F.normalize(llamagen_weights()["quantize.embedding.weight"], dim=-1)
    torch.testing.assert_close(tokenizer.quantizer.books[0], expected)
    assert any("L2-normalised" in note for note in imported.notes)


@pytest.mark.parametrize("bias", ["blend", "add"])
@torch.no_grad()
def test_the_bias_is_the_last_of_vars(bias: str, tmp_path: Path) -> None:
    tokenizer, weights = new("VAR", {"bias": bias}), var_weights()
    imported = load_weights(tokenizer, public(tmp_path, "VAR"))
    q, last = normal(2, 4, GRID, GRID), "quantize.quant_resi.qresi_ls.3"
    expected = 0.5 * q + 0.5 * F.conv2d(q, weights[f"{last}.weight"], weights[f"{last}.bias"], padding=1)
    torch.testing.assert_close(tokenizer.quantizer.bias(q.flatten(2)), expected.flatten(2), atol=1e-6, rtol=0)
    assert any("quantizer.phi" in note for note in imported.notes) == (bias == "add")


def test_without_a_bias_all_four_are_left(tmp_path: Path) -> None:
    imported = load_weights(new("VAR", {"bias": "none"}), public(tmp_path, "VAR"))
    assert sum(name.startswith("quantize.quant_resi") for name in imported.skipped) == 8


# ---- layers that do not fit ----------------------------------------------------------------------------------------


def test_a_layer_that_does_not_fit_is_left_with_both_shapes(tmp_path: Path) -> None:
    tokenizer = new("VAR", {"codes": 24}, channels=5)
    initial = {name: value.clone() for name, value in tokenizer.state_dict().items()}
    imported = load_weights(tokenizer, public(tmp_path, "VAR"))
    for name, shapes in [
        ("quant_conv.weight", ["(4, 4, 3, 3)", "(5, 5, 3, 3)"]),
        ("quantize.embedding.weight", ["(1, 16, 4)", "(1, 24, 5)"]),
    ]:
        assert all(shape in imported.skipped[name] for shape in shapes)
    layers = {"quant_conv", "post_quant_conv", "encoder.conv_out", "quantizer.phi", "decoder.conv_in"}
    books = {"quantizer.books", "quantizer.ema_counts", "quantizer.ema_sums"}
    assert set(imported.fresh) == books | {f"{name}.{kind}" for name in layers for kind in ("weight", "bias")}
    assert all(torch.equal(tokenizer.state_dict()[name], initial[name]) for name in imported.fresh)


@pytest.mark.parametrize(
    ("changes", "name", "reason"),
    [
        ({"quant_kernel": 1}, "quant_conv.bias", "quant_conv.weight"),
        ({"attention": False}, "encoder.mid.attn_1.qkv.weight", ""),
    ],
)
def test_a_layer_is_left_as_a_whole(changes: dict[str, Any], name: str, reason: str, tmp_path: Path) -> None:
    assert reason in load_weights(new("VAR", **changes), public(tmp_path, "VAR")).skipped[name]


def test_a_difference_that_no_shape_shows_is_noted(tmp_path: Path) -> None:
    imported = load_weights(new("VAR", groups=8), public(tmp_path, "VAR"))
    assert any("32 groups" in note for note in imported.notes)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_error_names_the_overrides_of_the_published_file(layout: str, tmp_path: Path) -> None:
    """The sizes that the three projects publish: width, codes, C, and the shape of quant_conv."""
    tokenizer = model.Tokenizer(config(["autoencoder.resolution=16"]))
    initial = {name: value.clone() for name, value in tokenizer.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_weights(tokenizer, public(tmp_path, layout))
    assert all(torch.equal(value, initial[name]) for name, value in tokenizer.state_dict().items())
    assert "(32, 3, 3, 3)" in caught.value.message
    overrides = [word for word in shlex.split(caught.value.hint) if "=" in word]
    with torch.device("meta"):
        state = model.Tokenizer(config(["autoencoder.resolution=256", *overrides])).state_dict()
    shapes = [tuple(state[name].shape) for name in ("encoder.conv_in.weight", "quant_conv.weight", "quantizer.books")]
    assert (
        shapes
        == {
            "VAR": [(160, 3, 3, 3), (32, 32, 3, 3), (1, 4096, 32)],
            "taming-transformers": [(128, 3, 3, 3), (256, 256, 1, 1), (1, 16384, 256)],
            "LlamaGen": [(128, 3, 3, 3), (8, 256, 1, 1), (1, 16384, 8)],
        }[layout]
    )
    assert len([name for name in state if "decoder.up.4.attn" in name]) == 3 * 6  # at the lowest resolution
    assert tuple(state["decoder.up.4.block.0.conv1.weight"].shape[:2]) == (4 * shapes[0][0],) * 2


def config(overrides: list[str]) -> TokenizerConfig:
    cfg = load_recipe("digits", overrides, "tokenizer").tokenizer
    assert cfg is not None
    return cfg


# ---- rdpm's own files ----------------------------------------------------------------------------------------------


def own_file(folder: Path, tokenizer: model.Tokenizer) -> Path:
    checkpoint.save(folder / "tokenizer.pt", model.pack(tokenizer, class_names=[], provenance={}))
    return folder / "tokenizer.pt"


def trained(**quantizer: Any) -> model.Tokenizer:
    """A tokenizer with weights that all differ from a new one's."""
    tokenizer = new("VAR", quantizer)
    for value in tokenizer.state_dict().values():
        value.add_(0.5)
    return tokenizer


def test_an_own_tokenizer_comes_whole(tmp_path: Path) -> None:
    source, tokenizer = trained(), new("VAR")
    imported = load_weights(tokenizer, own_file(tmp_path, source))
    assert imported.layout == "rdpm"
    assert (imported.skipped, imported.fresh, imported.notes) == ({}, [], [])
    assert all(torch.equal(value, tokenizer.state_dict()[name]) for name, value in source.state_dict().items())


@pytest.mark.parametrize("source_bias", ["blend", "add"])
@pytest.mark.parametrize("target_bias", ["blend", "add"])
@torch.no_grad()
def test_an_own_bias_stays_the_same_function(source_bias: str, target_bias: str, tmp_path: Path) -> None:
    source, tokenizer = trained(bias=source_bias), new("VAR", {"bias": target_bias})
    load_weights(tokenizer, own_file(tmp_path, source))
    q = normal(2, 4, GRID * GRID)
    torch.testing.assert_close(tokenizer.quantizer.bias(q), source.quantizer.bias(q))


def test_an_own_book_may_change_its_way_of_learning(tmp_path: Path) -> None:
    source, tokenizer = trained(codebook="gradient"), new("VAR", {"codebooks": "per_step"})
    load_weights(tokenizer, own_file(tmp_path, source))
    assert torch.equal(tokenizer.quantizer.ema_sums, source.quantizer.books.detach().repeat(3, 1, 1))
    tokenizer = new("VAR", {"codebook": "gradient"})
    imported = load_weights(tokenizer, own_file(tmp_path, trained()))
    assert sorted(imported.skipped) == ["quantizer.ema_counts", "quantizer.ema_sums"]
    assert torch.equal(tokenizer.quantizer.books, trained().quantizer.books)


def test_a_book_a_step_does_not_become_a_shared_one(tmp_path: Path) -> None:
    imported = load_weights(new("VAR"), own_file(tmp_path, trained(codebooks="per_step")))
    assert "(3, 16, 4)" in imported.skipped["quantizer.books"]


# ---- files that are refused ----------------------------------------------------------------------------------------


def spoiled(folder: Path, kind: str) -> Path:
    path, weights = folder / "bad.pt", taming_weights()
    if kind == "folder":
        path.mkdir()
    elif kind == "text":
        path.write_text("<!DOCTYPE html><html>404</html>")
    elif kind == "truncated":
        torch.save(weights, path)
        path.write_bytes(path.read_bytes()[:5000])
    elif kind == "unknown layout":
        torch.save({"state_dict": {"layers.0.weight": torch.zeros(3)}}, path)
    elif kind == "odd keys":
        torch.save({1: torch.zeros(3), "format": ["x"], "model": 3}, path)
    elif kind == "not finite":
        weights["decoder.conv_in.weight"][0, 0, 0, 0] = float("nan")
        torch.save({"state_dict": weights}, path)
    elif kind == "few layers":
        torch.save({"encoder.mid.attn_1.q.weight": torch.zeros(3)}, path)
    elif kind == "a judge":
        checkpoint.save(path, {**model.pack(new("VAR"), class_names=[], provenance={}), "format": "rdpm-judge"})
    elif kind == "more than tensors":
        torch.save({"state_dict": weights, "args": argparse.Namespace(lr=1)}, path)
    return path


TOKENS = {
    "absent": "bad.pt", "folder": "bad.pt", "text": "bad.pt", "truncated": "bad.pt", "unknown layout": "bad.pt",
    "odd keys": "bad.pt", "not finite": "decoder.conv_in.weight", "few layers": "taming-transformers",
    "a judge": "judge", "more than tensors": "argparse.Namespace",
}  # fmt: skip


@pytest.mark.parametrize("kind", TOKENS)
def test_a_file_of_no_use_is_one_clear_error(kind: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_weights(new("taming-transformers"), spoiled(tmp_path, kind))
    assert TOKENS[kind] in caught.value.message
    assert caught.value.exit_code == 3
    assert caught.value.hint
    if kind == "unknown layout":
        assert all(name in caught.value.hint for name in ("VAR", "taming", "LlamaGen"))


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("position", ["top", "inside", "plain pickle"])
def test_code_in_a_file_never_runs(position: str, new_format: bool, tmp_path: Path) -> None:
    marker, path = tmp_path / "ran", tmp_path / "evil.pt"
    trap = Trap(marker)
    if position == "plain pickle":
        path.write_bytes(pickle.dumps(trap, protocol=2))
    else:
        content = trap if position == "top" else {"state_dict": taming_weights(), "callbacks": trap}
        torch.save(content, path, _use_new_zipfile_serialization=new_format)
    with pytest.raises(CheckpointError, match=r"posix\.mkdir"):
        load_weights(new("taming-transformers"), path)
    assert not marker.exists()


# ---- the command line ----------------------------------------------------------------------------------------------

TINY = [
    "--recipe", "digits", "--device", "cpu", "train.batch=16", "train.steps=4", "train.save_every=2", "train.lr=1e-6",
    "autoencoder.groups=32", "autoencoder.width=32", "autoencoder.attention=true", "autoencoder.multipliers=[1,2]",
    "autoencoder.res_blocks=2", "autoencoder.channels=4", "quantizer.codes=16", "quantizer.steps=3",
]  # fmt: skip


def train(out: Path, *arguments: object) -> int:
    return run(["train-tokenizer", "digits", "--out", str(out), *TINY, *map(str, arguments)])


def test_a_run_starts_with_the_weights_and_records_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out, taken = public(tmp_path, "VAR"), tmp_path / "run", len(var_weights()) - 7
    assert train(out, "--from-weights", path, "--json") == 0
    shown = capsys.readouterr()
    json.loads(shown.out)
    assert all(token in shown.err for token in ("public.pt", "VAR", str(taken), "quantize.quant_resi (6)"))
    tokenizer, content = model.load(out / "tokenizer.pt")
    expected = var_weights()["encoder.mid.attn_1.qkv.weight"]
    torch.testing.assert_close(tokenizer.state_dict()["encoder.mid.attn_1.qkv.weight"], expected, atol=1e-4, rtol=0)
    record, sha256 = content["provenance"]["from_weights"], files.sha256_file(path)
    assert (record["file"], record["sha256"], record["layout"]) == ("public.pt", sha256, "VAR")
    assert (record["taken"], len(record["left"])) == (taken, 7)
    assert files.read_json(out / "run.json")["settings"]["from_weights"] == {"sha256": sha256}


def test_a_resumed_run_continues_from_its_own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, out = public(tmp_path, "VAR"), tmp_path / "run"
    assert train(out, "--from-weights", path) == 0
    whole = (out / "tokenizer.pt").read_bytes()
    (out / "tokenizer.pt").unlink()
    checkpoint.states(out / "checkpoints")[-1][1].unlink()
    assert [step for step, _ in checkpoint.states(out / "checkpoints")] == [2]
    monkeypatch.setattr(engine, "load_weights", lambda *_: pytest.fail("imported a second time"))
    moved = path.rename(tmp_path / "moved.pt")  # the sha256 of the file counts, not its path
    assert train(out, "--from-weights", moved) == 0
    assert (out / "tokenizer.pt").read_bytes() == whole
    assert train(out, "--from-weights", moved) == 0  # finished


@pytest.mark.parametrize("change", ["content", "warm to cold", "cold to warm"])
def test_a_run_is_not_resumed_with_different_weights(
    change: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = public(tmp_path, "VAR"), tmp_path / "run"
    warm: list[object] = ["--from-weights", path]
    assert train(out, *(warm if change != "cold to warm" else []), "train.steps=1") == 0
    if change == "content":
        save(tmp_path, "VAR", {name: 2 * value for name, value in var_weights().items()})
    assert train(out, *(warm if change != "warm to cold" else []), "train.steps=1") == 2
    assert "from_weights" in capsys.readouterr().err


def test_a_file_of_no_use_claims_no_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, path = tmp_path / "run", public(tmp_path, "VAR")
    for file, change in [(path, "autoencoder.width=64"), (tmp_path / "absent.pt", ""), (spoiled(tmp_path, "text"), "")]:
        assert train(out, "--from-weights", file, *[change] if change else []) == 3
        error = capsys.readouterr().err
        assert error.count("error:") == 1
        assert str(file) in error
        assert not out.exists()


def test_layers_that_the_file_does_not_fill_are_those_of_a_cold_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The initial values of a warm run depend on the seed and not on the file."""
    starts: list[tuple[dict[str, Tensor], list[str]]] = []

    def recorded(tokenizer: model.Tokenizer, path: Path) -> Any:
        imported = load_weights(tokenizer, path)
        starts.append(({name: v.clone() for name, v in tokenizer.state_dict().items()}, imported.fresh))
        return imported

    monkeypatch.setattr(engine, "load_weights", recorded)
    overrides = [*[option for option in TINY if "=" in option], "autoencoder.channels=5"]
    torch.manual_seed(99)
    arguments = ["--from-weights", public(tmp_path, "VAR"), "autoencoder.channels=5", "train.steps=1"]
    assert train(tmp_path / "run", *arguments) == 0
    torch.manual_seed(0)
    cold = model.Tokenizer(config(overrides)).state_dict()
    ((state, fresh),) = starts
    assert fresh
    assert all(torch.equal(state[name], cold[name]) for name in fresh)
    assert not torch.equal(state["encoder.conv_in.weight"], cold["encoder.conv_in.weight"])

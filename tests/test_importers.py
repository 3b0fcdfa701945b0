"""Warm starts: public weights reproduce their own outputs here, every tensor is accounted for, no code in a file runs.

The public side of every comparison is written from the layouts: random state dicts under the public names, and a
forward pass by torch.nn.functional over those names."""

import argparse
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same
from torch import Tensor

from rdpm_cli import checkpoint, files
from rdpm_cli.cli.app import run
from rdpm_cli.data.pixels import to_model
from rdpm_cli.distributed import TrainStep
from rdpm_cli.engine import tokenizer as engine
from rdpm_cli.errors import CheckpointError
from rdpm_cli.tokenizer import model
from rdpm_cli.tokenizer.config import TokenizerArchitecture
from rdpm_cli.tokenizer.importers import load_weights

Weights = dict[str, Tensor]

LOW, TOP, RES_BLOCKS, CODES = 32, 64, 2, 16  # GroupNorm has 32 groups in every public layout
SIDE, GRID = 8, 4
SIZES: dict[str, dict[str, Any]] = {  # C, channels between encoder and quant_conv, kernel of quant_conv
    "VAR": {"channels": 4, "features": None, "quant_kernel": 3},
    "taming-transformers": {"channels": 8, "features": None, "quant_kernel": 1},
    "LlamaGen": {"channels": 4, "features": 6, "quant_kernel": 1},
}
LAYOUTS = sorted(SIZES)


def normal(*shape: int, seed: int = 4) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Public:
    """The public network of a layout, by torch.nn.functional; a pass draws the weights that it lacks."""

    def __init__(self, layout: str) -> None:
        self.layout, self.llama, self.w, sizes = layout, layout == "LlamaGen", Weights(), SIZES[layout]
        self.random = torch.Generator().manual_seed(0)
        self.channels, self.features = sizes["channels"], sizes["features"] or sizes["channels"]
        self.encode(torch.zeros(1, 3, SIDE, SIDE))
        self.decode(torch.zeros(1, self.channels, GRID, GRID))
        self.draw("quantize.embedding.weight", CODES, self.channels)
        if layout == "VAR":
            for i in range(4):
                self.conv(f"quantize.quant_resi.qresi_ls.{i}", torch.zeros(1, 4, 1, 1), 4)
        other = {"VAR": "quantize.ema_vocab_hit_SV", "LlamaGen": "quantize.codebook_used"}
        self.draw(other.get(layout, "loss.discriminator.main.0.weight"), 64)

    def draw(self, name: str, *shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        if name not in self.w:
            self.w[name] = mean + scale * torch.randn(shape, generator=self.random)
        return self.w[name]

    def conv(self, name: str, x: Tensor, outputs: int, kernel: int = 3, stride: int = 1, padding: int = -1) -> Tensor:
        shape = (outputs, x.shape[1], kernel, kernel)
        weight = self.draw(f"{name}.weight", *shape, scale=(x.shape[1] * kernel**2) ** -0.5)
        bias = self.draw(f"{name}.bias", outputs, scale=0.1)
        return F.conv2d(x, weight, bias, stride, kernel // 2 if padding < 0 else padding)

    def norm(self, name: str, x: Tensor) -> Tensor:
        weight = self.draw(f"{name}.weight", x.shape[1], scale=0.1, mean=1.0)
        return F.group_norm(x, 32, weight, self.draw(f"{name}.bias", x.shape[1], scale=0.1), eps=1e-6)

    def act(self, name: str, x: Tensor) -> Tensor:
        y = self.norm(name, x)
        return y * torch.sigmoid(y)

    def res(self, name: str, x: Tensor, outputs: int) -> Tensor:
        y = self.conv(f"{name}.conv1", self.act(f"{name}.norm1", x), outputs)
        y = self.conv(f"{name}.conv2", self.act(f"{name}.norm2", y), outputs)
        return y + (x if x.shape[1] == outputs else self.conv(f"{name}.nin_shortcut", x, outputs, 1))

    def attn(self, name: str, x: Tensor) -> Tensor:
        y, (b, c, h, w) = self.norm(f"{name}.norm", x), x.shape
        if self.layout == "VAR":
            q, k, v = self.conv(f"{name}.qkv", y, 3 * c, 1).chunk(3, dim=1)
        else:
            q, k, v = (self.conv(f"{name}.{piece}", y, c, 1) for piece in "qkv")
        scores = torch.einsum("bci,bcj->bij", q.reshape(b, c, h * w), k.reshape(b, c, h * w)) / c**0.5
        mixed = torch.einsum("bij,bcj->bci", scores.softmax(-1), v.reshape(b, c, h * w)).reshape(b, c, h, w)
        return x + self.conv(f"{name}.proj_out", mixed, c, 1)

    def level(self, side: str, run: int, x: Tensor, width: int, blocks: int) -> Tensor:
        """LlamaGen numbers levels in the order they run; the others' decoder counts from high resolution."""
        name = f"encoder.down.{run}" if side == "encoder" else f"decoder.up.{1 - run}"
        name = f"{side}.conv_blocks.{run}" if self.llama else name
        for j in range(blocks):
            x = self.res(f"{name}.{'res' if self.llama else 'block'}.{j}", x, width)
            x = self.attn(f"{name}.attn.{j}", x) if width == TOP else x
        if run == 0 and side == "encoder":
            return self.conv(f"{name}.downsample.conv", F.pad(x, (0, 1, 0, 1)), width, stride=2, padding=0)
        up = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        return self.conv(f"{name}.upsample.conv", up, width) if run == 0 else x

    def middle(self, side: str, x: Tensor) -> Tensor:
        first, attn, last = ("0", "1", "2") if self.llama else ("block_1", "attn_1", "block_2")
        x = self.attn(f"{side}.mid.{attn}", self.res(f"{side}.mid.{first}", x, TOP))
        return self.res(f"{side}.mid.{last}", x, TOP)

    def encode(self, x: Tensor) -> Tensor:
        """The output of quant_conv."""
        y = self.level("encoder", 0, self.conv("encoder.conv_in", x, LOW), LOW, RES_BLOCKS)
        y = self.middle("encoder", self.level("encoder", 1, y, TOP, RES_BLOCKS))
        y = self.conv("encoder.conv_out", self.act("encoder.norm_out", y), self.features)
        return self.conv("quant_conv", y, self.channels, SIZES[self.layout]["quant_kernel"])

    def decode(self, z: Tensor) -> Tensor:
        y = self.conv("post_quant_conv", z, self.features, SIZES[self.layout]["quant_kernel"])
        y = self.middle("decoder", self.conv("decoder.conv_in", y, TOP))
        y = self.level("decoder", 0, y, TOP, RES_BLOCKS + 1)
        y = self.level("decoder", 1, y, LOW, RES_BLOCKS + 1)
        return self.conv("decoder.conv_out", self.act("decoder.norm_out", y), 3)


def new(layout: str, quantizer: dict[str, Any] | None = None, **autoencoder: Any) -> model.Tokenizer:
    """A new tokenizer into which a file of this layout fits whole, but for the changes."""
    sizes = {"resolution": SIDE, "width": 32, "multipliers": (1, 2), "res_blocks": RES_BLOCKS, "groups": 32}
    raw = {
        "autoencoder": {**sizes, **SIZES[layout], **autoencoder},
        "quantizer": {"codes": CODES, "steps": 3, **(quantizer or {})},
    }
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return model.Tokenizer(TokenizerArchitecture.model_validate(raw))


def save(folder: Path, layout: str, weights: Weights) -> Path:
    """As the published files of the layout hold them."""
    wrapped = {
        "VAR": weights,
        "LlamaGen": {"model": weights},
        "taming-transformers": {"state_dict": weights, "epoch": 3},
    }
    torch.save(wrapped[layout], folder / "public.pt")
    return folder / "public.pt"


def public(folder: Path, layout: str) -> Path:
    return save(folder, layout, Public(layout).w)


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_encoder_and_decoder_compute_what_the_files_model_computes(layout: str, tmp_path: Path) -> None:
    source, tokenizer, z = Public(layout), new(layout), normal(2, SIZES[layout]["channels"], GRID, GRID)
    images = to_model(torch.randint(256, (2, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(3)))
    assert not torch.allclose(tokenizer.decode_latents(z.flatten(2)), source.decode(z), atol=1e-2)
    assert load_weights(tokenizer, public(tmp_path, layout)).layout == layout
    latent = tokenizer.quant_conv(tokenizer.encoder(images))
    torch.testing.assert_close(latent, source.encode(images), atol=1e-5, rtol=0)
    torch.testing.assert_close(tokenizer.decode_latents(z.flatten(2)), source.decode(z), atol=1e-5, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_tensor_of_a_file_is_taken_or_left_with_a_reason(layout: str, tmp_path: Path) -> None:
    weights, tokenizer = {name: value.half() for name, value in Public(layout).w.items()}, new(layout)
    imported = load_weights(tokenizer, save(tmp_path, layout, weights))
    assert {value.dtype for value in tokenizer.state_dict().values()} == {torch.float32}
    assert sorted([*imported.taken, *imported.skipped]) == sorted(weights)
    assert all(imported.skipped.values())
    others = [f"quantize.quant_resi.qresi_ls.{i}.{kind}" for i in range(3) for kind in ("weight", "bias")]
    expected = {
        "VAR": [*others, "quantize.ema_vocab_hit_SV"],
        "taming-transformers": ["loss.discriminator.main.0.weight"],
        "LlamaGen": ["quantize.codebook_used"],
    }
    assert sorted(imported.skipped) == sorted(expected[layout])
    assert imported.fresh == ([] if layout == "VAR" else ["quantizer.phi.weight", "quantizer.phi.bias"])


@pytest.mark.parametrize("codebooks", ["shared", "per_step"])
@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_every_book_is_the_files(codebook: str, codebooks: str, tmp_path: Path) -> None:
    quantizer = (tokenizer := new("VAR", {"codebook": codebook, "codebooks": codebooks})).quantizer
    load_weights(tokenizer, public(tmp_path, "VAR"))
    assert len(quantizer.books) == (3 if codebooks == "per_step" else 1)
    assert all(torch.equal(book, Public("VAR").w["quantize.embedding.weight"]) for book in quantizer.books)
    if codebook == "ema":
        assert torch.equal(quantizer.ema_sums, quantizer.books)
        assert torch.equal(quantizer.ema_counts, torch.ones(quantizer.books.shape[:2]))


def test_the_first_ema_step_moves_the_codebook_and_does_not_replace_it(tmp_path: Path) -> None:
    tokenizer = new("VAR").train()
    load_weights(tokenizer, public(tmp_path, "VAR"))
    quantizer, step = tokenizer.quantizer, TrainStep(0, 0, range(16), 16, torch.device("cpu"))
    book = quantizer.books[0].clone()
    with torch.no_grad():
        chain = quantizer(torch.zeros(16, 4, GRID * GRID), step.normal(3, 4, GRID * GRID))
    assert quantizer.follow([(chain.codes_BTS, chain.vectors_TBSC)], step)[0] == 0
    unused = chain.codes_BTS.flatten().bincount(minlength=CODES) == 0
    torch.testing.assert_close(quantizer.books[0][unused], book[unused])
    assert 0 < (quantizer.books[0] - book)[~unused].norm() < 0.9 * book[~unused].norm()


def test_llamagen_codes_are_normalised_as_its_decoder_sees_them(tmp_path: Path) -> None:
    imported = load_weights(tokenizer := new("LlamaGen"), public(tmp_path, "LlamaGen"))
    expected = F.normalize(Public("LlamaGen").w["quantize.embedding.weight"], dim=-1)
    torch.testing.assert_close(tokenizer.quantizer.books[0], expected)
    assert any("l2" in note for note in imported.notes)


@pytest.mark.parametrize("bias", ["blend", "add"])
@torch.no_grad()
def test_the_bias_is_the_last_of_vars(bias: str, tmp_path: Path) -> None:
    tokenizer, weights = new("VAR", {"bias": bias}), Public("VAR").w
    imported = load_weights(tokenizer, public(tmp_path, "VAR"))
    q, last = normal(2, 4, GRID, GRID), "quantize.quant_resi.qresi_ls.3"
    expected = 0.5 * q + 0.5 * F.conv2d(q, weights[f"{last}.weight"], weights[f"{last}.bias"], padding=1)
    torch.testing.assert_close(tokenizer.quantizer.bias(q.flatten(2)), expected.flatten(2), atol=1e-6, rtol=0)
    assert any("quantizer.phi" in note for note in imported.notes) == (bias == "add")


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


def test_what_this_recipe_lacks_or_has_differently_is_named(tmp_path: Path) -> None:
    path = public(tmp_path, "VAR")
    assert "quant_conv.weight" in load_weights(new("VAR", quant_kernel=1), path).skipped["quant_conv.bias"]
    assert "encoder.mid.attn_1.qkv.weight" in load_weights(new("VAR", attention=False), path).skipped
    imported = load_weights(new("VAR", {"bias": "none"}, groups=8), path)
    assert sum(name.startswith("quantize.quant_resi") for name in imported.skipped) == 8
    assert any("32 groups" in note for note in imported.notes)  # no shape shows it


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_of_which_no_encoder_layer_fits_is_refused(layout: str, tmp_path: Path) -> None:
    tokenizer = new(layout, width=96)
    initial = {name: value.clone() for name, value in tokenizer.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"\(32, 3, 3, 3\) in the file, \(96, 3, 3, 3\) here"):
        load_weights(tokenizer, public(tmp_path, layout))
    assert all(torch.equal(value, initial[name]) for name, value in tokenizer.state_dict().items())


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
    assert (imported.layout, imported.skipped, imported.fresh, imported.notes) == ("rdpm", {}, [], [])
    assert all(torch.equal(value, tokenizer.state_dict()[name]) for name, value in source.state_dict().items())


@pytest.mark.parametrize(("source_bias", "target_bias"), [("blend", "add"), ("add", "blend"), ("add", "add")])
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
    imported = load_weights(new("VAR"), own_file(tmp_path, trained(codebooks="per_step")))
    assert "(3, 16, 4)" in imported.skipped["quantizer.books"]  # a book a step does not become a shared one


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.marker),)


CONTENT: dict[str, Callable[[Path], object]] = {
    "unknown layout": lambda _: {"state_dict": {"layers.0.weight": torch.zeros(3)}},
    "odd keys": lambda _: {1: torch.zeros(3), "format": ["x"], "model": 3},
    "few layers": lambda _: {"encoder.mid.attn_1.q.weight": torch.zeros(3)},
    "a judge": lambda _: {**model.pack(new("VAR"), class_names=[], provenance={}), "format": "rdpm-judge"},
    "code": lambda folder: Trap(folder / "ran"),
    "code for tensors": lambda folder: {"state_dict": dict.fromkeys(Public("VAR").w, Trap(folder / "ran"))},
}


@pytest.mark.parametrize("kind", [*CONTENT, "absent", "folder", "text", "truncated", "pickle"])
def test_a_file_of_no_use_is_one_clear_error_and_its_code_never_runs(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.pt"
    if kind in CONTENT:
        torch.save(CONTENT[kind](tmp_path), path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "text":
        path.write_text("<!DOCTYPE html><html>404</html>")
    elif kind == "truncated":
        path.write_bytes(public(tmp_path, "VAR").read_bytes()[:5000])
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Trap(tmp_path / "ran"), protocol=2))
    with pytest.raises(CheckpointError, match=r"bad\.pt") as caught:
        load_weights(new("taming-transformers"), path)
    assert caught.value.exit_code == 3
    assert not (tmp_path / "ran").exists()
    if kind == "unknown layout":
        assert all(name in caught.value.hint for name in ("VAR", "taming", "LlamaGen"))


@pytest.mark.parametrize("zipped", [True, False])
def test_objects_next_to_the_weights_are_passed_over_and_their_code_never_runs(zipped: bool, tmp_path: Path) -> None:
    weights = Public("taming-transformers").w
    content = {  # as Lightning writes it
        "epoch": 3, "state_dict": weights, "callbacks": {argparse.ArgumentParser: {"best_model_score": torch.ones(())}},
        "hyper_parameters": argparse.Namespace(lr=1), "lr_schedulers": [Trap(tmp_path / "ran")],
    }  # fmt: skip
    torch.save(content, tmp_path / "last.ckpt", _use_new_zipfile_serialization=zipped)
    imported = load_weights(tokenizer := new("taming-transformers"), tmp_path / "last.ckpt")
    assert sorted([*imported.taken, *imported.skipped]) == sorted(weights)
    assert torch.equal(tokenizer.state_dict()["encoder.conv_in.weight"], weights["encoder.conv_in.weight"])
    assert not (tmp_path / "ran").exists()


WRAPPED: dict[str, Callable[[str], str]] = {
    "DistributedDataParallel": lambda name: f"module.{name}",
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "both": lambda name: f"_orig_mod.module.{name}",
    "both in the other order": lambda name: f"module._orig_mod.{name}",
    "a compiled encoder": lambda name: name.replace("encoder.", "encoder._orig_mod."),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_with_the_segments_of_wrappers_are_those_without(layout: str, wrapper: str, tmp_path: Path) -> None:
    plain, wrapped = new(layout), new(layout)
    expected = load_weights(plain, public(tmp_path, layout))
    renamed = {WRAPPED[wrapper](name): value for name, value in Public(layout).w.items()}
    assert load_weights(wrapped, save(tmp_path, layout, renamed)) == expected
    assert_same(wrapped.state_dict(), plain.state_dict())


def with_residuals(count: int) -> Weights:
    """VAR's weights with share_quant_resi 0, as `count` convolutions, or 1."""
    others = {name: value for name, value in Public("VAR").w.items() if "qresi_ls" not in name}
    names = [str(i) for i in range(count)] or ["qresi"]
    return others | {
        f"quantize.quant_resi.{name}.{kind}": normal(*shape, seed=number)
        for number, name in enumerate(names)
        for kind, shape in (("weight", (4, 4, 3, 3)), ("bias", (4,)))
    }


@pytest.mark.parametrize(("count", "finest"), [(11, "10"), (0, "qresi")])
@torch.no_grad()
def test_the_bias_of_every_way_of_sharing_is_the_finest_scales(count: int, finest: str, tmp_path: Path) -> None:
    weights, q = with_residuals(count), normal(2, 4, GRID, GRID)
    path, name = save(tmp_path, "VAR", weights), f"quantize.quant_resi.{finest}"
    expected = 0.5 * q + 0.5 * F.conv2d(q, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=1)
    for bias in ("blend", "add"):
        imported = load_weights(tokenizer := new("VAR", {"bias": bias}), path)
        torch.testing.assert_close(tokenizer.quantizer.bias(q.flatten(2)), expected.flatten(2), atol=1e-5, rtol=0)
        assert (f"{name}.weight" in imported.taken, imported.fresh) == (True, [])


@pytest.mark.parametrize("changes", [{"bias": "none"}, {"bias": "blend", "channels": 5}])
def test_a_bias_that_is_not_taken_is_said_with_the_reason(changes: dict[str, Any], tmp_path: Path) -> None:
    channels = {"channels": changes["channels"]} if "channels" in changes else {}
    tokenizer = new("VAR", {"bias": changes["bias"]}, **channels)
    imported = load_weights(tokenizer, save(tmp_path, "VAR", with_residuals(0)))
    reason = imported.skipped["quantize.quant_resi.qresi.weight"]
    assert any("bias(q)" in note and reason in note for note in imported.notes)


TINY = [
    "--recipe", "digits", "--device", "cpu", "train.batch=16", "train.steps=4", "train.save_every=2", "train.lr=1e-6",
    "autoencoder.groups=32", "autoencoder.width=32", "autoencoder.attention=true", "autoencoder.multipliers=[1,2]",
    "autoencoder.res_blocks=2", "autoencoder.channels=4", "quantizer.codes=16", "quantizer.steps=3",
]  # fmt: skip


def train(out: Path, *arguments: object) -> int:
    return run(["train-tokenizer", "digits", "--out", str(out), *TINY, *map(str, arguments)])


def test_a_run_starts_with_the_weights_and_records_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out, weights = public(tmp_path, "VAR"), tmp_path / "run", Public("VAR").w
    assert train(out, "--from-weights", path, "--json") == 0
    shown = capsys.readouterr()
    json.loads(shown.out)
    assert all(token in shown.err for token in ("public.pt", "VAR", str(len(weights) - 7)))
    tokenizer, content = model.load(out / "tokenizer.pt")
    name = "encoder.mid.attn_1.qkv.weight"
    torch.testing.assert_close(tokenizer.state_dict()[name], weights[name], atol=1e-4, rtol=0)
    record, sha256 = content["provenance"]["from_weights"], files.sha256_file(path)
    assert (record["file"], record["sha256"], record["layout"]) == ("public.pt", sha256, "VAR")
    assert (record["taken"], len(record["left"])) == (len(weights) - 7, 7)
    assert files.read_json(out / "run.json")["settings"]["from_weights"] == {"sha256": sha256}


def test_a_resumed_run_continues_from_its_own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, out = public(tmp_path, "VAR"), tmp_path / "run"
    assert train(out, "--from-weights", path) == 0
    whole = (out / "tokenizer.pt").read_bytes()
    (out / "tokenizer.pt").unlink()
    checkpoint.states(out / "checkpoints")[-1][1].unlink()
    assert [step for step, _ in checkpoint.states(out / "checkpoints")] == [2]
    monkeypatch.setattr(engine, "warm_start", lambda *_: pytest.fail("imported a second time"))
    moved = path.rename(tmp_path / "moved.pt")  # the sha256 of the file counts, not its path
    assert train(out, "--from-weights", moved) == 0
    assert (out / "tokenizer.pt").read_bytes() == whole


@pytest.mark.parametrize("change", ["content", "warm to cold", "cold to warm"])
def test_a_run_is_not_resumed_with_different_weights(
    change: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = public(tmp_path, "VAR"), tmp_path / "run"
    warm: list[object] = ["--from-weights", path]
    assert train(out, *(warm if change != "cold to warm" else []), "train.steps=1") == 0
    if change == "content":
        save(tmp_path, "VAR", {name: 2 * value for name, value in Public("VAR").w.items()})
    assert train(out, *(warm if change != "warm to cold" else []), "train.steps=1") == 2
    assert "from_weights" in capsys.readouterr().err


def test_a_file_of_no_use_claims_no_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, path = tmp_path / "run", public(tmp_path, "VAR")
    for file, change in [(path, "autoencoder.width=64"), (tmp_path / "absent.pt", "train.steps=1")]:
        assert train(out, "--from-weights", file, change) == 3
        assert str(file) in capsys.readouterr().err
        assert not out.exists()


def test_layers_that_the_file_does_not_fill_depend_on_the_runs_seed(tmp_path: Path) -> None:
    path, weights = public(tmp_path, "VAR"), []
    for state in (99, 7):
        torch.manual_seed(state)  # of the process; the run has its own
        assert train(tmp_path / str(state), "--from-weights", path, "autoencoder.channels=5", "train.steps=1") == 0
        weights.append(model.load(tmp_path / str(state) / "tokenizer.pt")[0].state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())

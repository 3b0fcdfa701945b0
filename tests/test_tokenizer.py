"""The tokenizer as a whole: latents, codes, and its file."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rdpm_cli import checkpoint, noise
from rdpm_cli.data.pixels import to_model
from rdpm_cli.recipes import load_recipe
from rdpm_cli.tokenizer import model
from rdpm_cli.tokenizer.config import TokenizerArchitecture, TokenizerConfig

T, K = 3, 32
ARCHITECTURE: dict[str, Any] = {
    "autoencoder": {
        "resolution": 16, "width": 8, "multipliers": [1, 1, 2], "res_blocks": 1, "groups": 4, "channels": 4,
    },
    "schedule": {"kind": "sin"},
    "quantizer": {"codes": K, "steps": T},
}  # fmt: skip


def make(**autoencoder: Any) -> model.Tokenizer:
    raw = {**ARCHITECTURE, "autoencoder": {**ARCHITECTURE["autoencoder"], **autoencoder}}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model.Tokenizer(TokenizerArchitecture.model_validate(raw)).eval()


def images(count: int = 4) -> Tensor:
    """(count, 3, 16, 16) in [-1, 1]."""
    return to_model(torch.randint(256, (count, 3, 16, 16), generator=torch.Generator().manual_seed(0)))


def eps_of(tokenizer: model.Tokenizer, seed: int = 0, view: int = 0) -> Tensor:
    return tokenizer.noise("encode", seed, range(4), [view] * 4)


@pytest.mark.parametrize(
    ("autoencoder", "shape"),
    [({}, (4, 16)), ({"channels": 6, "multipliers": [1, 2]}, (6, 64)), ({"resolution": 32}, (4, 64))],
)
def test_latents_noise_and_codes_have_the_flattened_shape(autoencoder: dict[str, Any], shape: tuple[int, int]) -> None:
    tokenizer = make(**autoencoder)
    side = tokenizer.cfg.autoencoder.resolution
    x, eps = torch.zeros(2, 3, side, side), tokenizer.noise("encode", 0, [0, 1], [0, 0])
    assert (tokenizer.latent_shape, math.prod(tokenizer.grid)) == (shape, shape[1])
    assert (tokenizer.latents(x).shape, eps.shape) == ((2, *shape), (2, T, *shape))
    codes = tokenizer.encode(x, eps)
    assert codes.shape == (2, T, shape[1])
    assert tokenizer.decode(codes).shape == x.shape


def test_positions_are_flattened_row_by_row() -> None:
    tokenizer, x = make(), images(1)
    features = tokenizer.quant_conv(tokenizer.encoder(x))[0, :, 1, 2]
    normed = (features - features.mean()) / features.std(correction=0)
    torch.testing.assert_close(tokenizer.latents(x)[0, :, 4 + 2], normed, rtol=0, atol=2e-3)  # fp16 values


def test_features_widen_what_lies_around_the_latent_and_nothing_else() -> None:
    plain, same, wide = make(), make(features=4), make(features=10)
    assert all(torch.equal(value, same.state_dict()[name]) for name, value in plain.state_dict().items())
    changed = {n for n, v in wide.state_dict().items() if v.shape != plain.state_dict()[n].shape}
    assert changed == {
        "encoder.conv_out.weight", "encoder.conv_out.bias", "quant_conv.weight", "decoder.conv_in.weight",
        "post_quant_conv.weight", "post_quant_conv.bias",
    }  # fmt: skip
    assert wide.decode_latents(wide.latents(images())).shape == images().shape


def test_latents_are_layer_normed_fp16_values_in_fp32() -> None:
    normed, plain = make(), make(latent_norm="none")
    z = normed.latents(images())
    assert z.dtype == torch.float32
    assert torch.equal(z, z.half().float())
    torch.testing.assert_close(z.mean(1), torch.zeros(4, 16), rtol=0, atol=1e-3)
    torch.testing.assert_close(z.var(1, correction=0), torch.ones(4, 16), rtol=0, atol=1e-2)
    plain.load_state_dict(normed.state_dict())
    assert (plain.latents(images()).var(1, correction=0) - 1).abs().max() > 0.1


def test_affine_latents_are_the_normed_ones_scaled_and_shifted_by_what_is_learnt() -> None:
    normed, affine = make(), make(latent_norm="affine")
    affine.load_state_dict(normed.state_dict(), strict=False)
    assert torch.equal(affine.latents(images()), normed.latents(images()))
    assert affine.norm is not None
    with torch.no_grad():
        affine.norm.weight.fill_(2.0)
        affine.norm.bias.fill_(1.0)
    torch.testing.assert_close(affine.latents(images()), 2 * normed.latents(images()) + 1, rtol=2e-3, atol=2e-3)


def test_codes_are_a_function_of_the_stored_latents_and_their_noise() -> None:
    """The fp16 latents, seed and view in a store give back the codes in it."""
    tokenizer, x = make(), images()
    stored, codes = tokenizer.latents(x).detach().half(), tokenizer.encode(x, eps_of(tokenizer, 7, 1))
    assert torch.equal(codes, tokenizer.quantizer.encode(stored.float(), eps_of(tokenizer, 7, 1)))
    assert 0 <= int(codes.min()) <= int(codes.max()) < K
    for seed, view in ((8, 1), (7, 0)):
        assert not torch.equal(codes, tokenizer.encode(x, eps_of(tokenizer, seed, view)))


def test_noise_is_the_addressed_stream() -> None:
    """The flattened shape draws the same stream as (C, h, w), in which stores of earlier versions were encoded."""
    tokenizer = make()
    eps = tokenizer.noise("encode", 3, [8, 2], [0, 1])
    for shape in (tokenizer.latent_shape, (4, *tokenizer.grid)):
        assert eps[1, 2].flatten().tolist() == noise.normal("encode", 3, 2, 1, 3, shape).flatten().tolist()


def test_decoding_codes_equals_the_forward_pass() -> None:
    tokenizer, x = make(), images()
    with torch.no_grad():
        recon, chain = tokenizer(x, eps_of(tokenizer))
    torch.testing.assert_close(tokenizer.decode(chain.codes_BTS), recon, rtol=0, atol=1e-4)


def test_imagenet_architecture_has_a_grid_of_16() -> None:
    """The paper's: 256×256, f = 16, C = 32, K = 4096, T = 10. On the meta device: shapes without values."""
    cfg = load_recipe("imagenet256-tokenizer", section="tokenizer").tokenizer
    assert cfg is not None
    with torch.device("meta"):
        tokenizer = model.Tokenizer(cfg)
        z = tokenizer.latents(torch.empty(1, 3, 256, 256))
        assert z.shape == (1, *tokenizer.latent_shape) == (1, 32, 256)
        assert tokenizer.decode_latents(z).shape == (1, 3, 256, 256)
    assert tokenizer.quantizer.books.shape == (1, 4096, 32)
    assert tokenizer.quantizer.steps == 10


def test_parameters_of_each_part_add_up() -> None:
    tokenizer = make()
    table = model.parameter_table(tokenizer)
    assert table.pop("codebook") == K * 4  # trained by its average, not by gradients
    assert sum(table.values()) == model.parameters(tokenizer)
    assert table["quantizer"] == 4 * 4 * 9 + 4


def test_file_gives_back_the_same_tokenizer(tmp_path: Path) -> None:
    tokenizer, path = make(), tmp_path / "tokenizer.pt"
    content = model.pack(tokenizer, class_names=["a", "b"], provenance={"recipe": "test"})
    checkpoint.save(path, content)
    loaded, read = model.load(path)
    assert read["digest"] == content["digest"]
    assert (read["class_names"], read["provenance"]) == (["a", "b"], {"recipe": "test"})
    assert loaded.cfg == tokenizer.cfg
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert model.pack(loaded)["digest"] == content["digest"]
    assert torch.equal(loaded.encode(images(), eps_of(tokenizer)), tokenizer.encode(images(), eps_of(tokenizer)))


def test_a_file_of_an_earlier_version_loads(tmp_path: Path) -> None:
    """Its config lacks the field `features`, its weights are those of today."""
    content = model.pack(make(), class_names=[], provenance={})
    del content["config"]["autoencoder"]["features"]
    content["digest"] = checkpoint.model_digest(content["weights"], content["config"])
    checkpoint.save(tmp_path / "old.pt", content)
    loaded, _ = model.load(tmp_path / "old.pt")
    assert torch.equal(loaded.latents(images()), make().latents(images()))


def test_the_names_of_the_weights_are_those_of_earlier_files() -> None:
    names = make().state_dict().keys()
    parts = {"encoder", "decoder", "quant_conv", "post_quant_conv", "quantizer"}
    assert {name.partition(".")[0] for name in names} == parts
    quantizer = ["books", "ema_counts", "ema_sums", "phi.weight", "phi.bias"]
    assert [name for name in names if name.startswith("quantizer.")] == [f"quantizer.{name}" for name in quantizer]


def test_config_of_the_file_holds_only_the_architecture() -> None:
    cfg = TokenizerConfig.model_validate({**ARCHITECTURE, "train": {"steps": 1}})
    assert set(model.pack(model.Tokenizer(cfg))["config"]) == {"autoencoder", "schedule", "quantizer"}

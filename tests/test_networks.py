"""Encoder and decoder: their shapes and norms. The discriminator: the patch that a logit sees.

That encoder and decoder compute VQGAN's function is tested in test_importers, against a forward pass of its own."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from rdpm_cli.tokenizer.config import AutoencoderConfig, DiscriminatorConfig, TokenizerConfig
from rdpm_cli.tokenizer.networks import Decoder, Encoder, PatchDiscriminator

SMALL: dict[str, Any] = {"resolution": 16, "width": 8, "multipliers": [1, 1, 2], "res_blocks": 1, "groups": 4}


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def critic(layers: int) -> PatchDiscriminator:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return PatchDiscriminator(DiscriminatorConfig(width=8, layers=layers))


@pytest.mark.parametrize(
    ("changes", "features", "side"),
    [({}, 32, 4), ({"channels": 6, "multipliers": [1, 2]}, 6, 8), ({"features": 10, "resolution": 32}, 10, 8)],
)
def test_encoder_and_decoder_have_the_sizes_of_their_config(changes: dict[str, Any], features: int, side: int) -> None:
    cfg = AutoencoderConfig.model_validate({**SMALL, **changes})
    x = normal(2, 3, cfg.resolution, cfg.resolution)
    y = Encoder(cfg)(x)
    assert y.shape == (2, features, side, side)
    assert cfg.grid == (side, side)
    assert Decoder(cfg)(y).shape == x.shape


@pytest.mark.parametrize("changes", [{"resolution": 18}, {"groups": 3}, {"multipliers": []}, {"width": 6}])
def test_sizes_that_do_not_divide_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        AutoencoderConfig.model_validate({**SMALL, **changes})


@pytest.mark.parametrize(("layers", "side", "grid"), [(2, 16, 2), (2, 64, 14), (3, 32, 2), (3, 128, 14)])
def test_the_logits_are_a_grid_of_patches(layers: int, side: int, grid: int) -> None:
    """Two convolutions of stride 1 and kernel 4 each take one off the side / 2^layers that the strided ones leave."""
    assert critic(layers)(normal(2, 3, side, side)).shape == (2, 1, grid, grid)


@pytest.mark.parametrize("size", [16, 8])
def test_a_recipe_whose_images_hold_no_patch_is_refused(size: int) -> None:
    raw = {"autoencoder": {**SMALL, "resolution": size}, "discriminator": {"layers": 3}, "train": {"steps": 1}}
    with pytest.raises(ValidationError, match=r"discriminator\.layers"):
        TokenizerConfig.model_validate({**raw, "loss": {"adversarial": "hinge"}})
    TokenizerConfig.model_validate({**raw, "loss": {"adversarial": "none"}})


@pytest.mark.parametrize(("layers", "pixels"), [(2, 34), (3, 70)])
def test_a_logit_sees_a_patch(layers: int, pixels: int) -> None:
    """Measured by the gradient of one logit amid the grid, without the norms, which see the whole image."""
    network = critic(layers)
    for index, layer in enumerate(network.layers):
        if isinstance(layer, torch.nn.GroupNorm):
            network.layers[index] = torch.nn.Identity()
    x = normal(1, 3, 160, 160).requires_grad_()
    logits = network(x)
    middle = logits.shape[-1] // 2
    logits[0, 0, middle, middle].backward()
    assert x.grad is not None
    for axes in ((0, 1, 3), (0, 1, 2)):
        extent = x.grad.abs().sum(axes).nonzero().flatten()
        assert int(extent[-1] - extent[0]) + 1 == pixels


def test_the_logits_of_an_image_do_not_depend_on_the_batch() -> None:
    network, x = critic(2), normal(5, 3, 32, 32)
    single = torch.cat([network(image) for image in x.split(1)])
    torch.testing.assert_close(network(x), single, rtol=1e-5, atol=1e-6)
    mixed = torch.cat([x[:1], 100 * normal(4, 3, 32, 32)])
    torch.testing.assert_close(network(mixed)[:1], single[:1], rtol=1e-5, atol=1e-6)

"""The tokenizer as a whole: latents, codes, its file, and one training step of it."""

import math
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from rdpm_cli import modelfile, noise
from rdpm_cli.config import TokenizerArchitecture, TokenizerConfig
from rdpm_cli.errors import CheckpointError
from rdpm_cli.images.sources import ImageSource
from rdpm_cli.images.tensors import to_model
from rdpm_cli.recipe_files import load_recipe
from rdpm_cli.step import TrainStep
from rdpm_cli.threads import one_thread
from rdpm_cli.tokenizer import model
from rdpm_cli.tokenizer.autoencoder import round_to_half
from rdpm_cli.tokenizer.codebook import health
from rdpm_cli.tokenizer.losses import TokenizerLoss
from rdpm_cli.tokenizer.task import ImageBatches, TokenizerTask

T, K = 3, 32
ARCHITECTURE: dict[str, Any] = {
    "autoencoder": {
        "resolution": 16, "width": 8, "multipliers": [1, 1, 2], "res_blocks": 1, "groups": 4, "channels": 4,
    },
    "schedule": {"kind": "sin"},
    "quantizer": {"codes": K, "steps": T},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors this small wait longer for a second thread than they compute."""
    with one_thread():
        yield


def config(**more: Any) -> TokenizerConfig:
    return TokenizerConfig.model_validate({**ARCHITECTURE, "train": {"batch": 32, "steps": 1}, **more})


def make(**autoencoder: Any) -> model.Tokenizer:
    raw = {**ARCHITECTURE, "autoencoder": {**ARCHITECTURE["autoencoder"], **autoencoder}}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model.Tokenizer(TokenizerArchitecture.model_validate(raw)).eval()


def images(count: int = 4) -> Tensor:
    """(count, 3, 16, 16) in [-1, 1]."""
    return to_model(torch.randint(256, (count, 3, 16, 16), generator=torch.Generator().manual_seed(0)))


# ---- latents and codes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("autoencoder", "shape"),
    [({}, (4, 4, 4)), ({"channels": 6, "multipliers": [1, 2]}, (6, 8, 8)), ({"resolution": 32}, (4, 8, 8))],
)
def test_latent_shape_is_what_latents_have(autoencoder: dict[str, Any], shape: tuple[int, int, int]) -> None:
    tokenizer = make(**autoencoder)
    assert tokenizer.latent_shape == shape
    side = tokenizer.cfg.autoencoder.resolution
    x, eps = torch.zeros(2, 3, side, side), tokenizer.noise("encode", 0, [0, 1], [0, 0])
    assert tokenizer.latents(x).shape == (2, *shape)
    assert eps.shape == (2, T, *shape)
    codes = tokenizer.encode(x, eps)
    assert codes.shape == (2, T, *shape[1:])
    assert tokenizer.decode(codes).shape == x.shape


def test_features_widen_what_lies_around_the_latent_and_nothing_else() -> None:
    plain, same, wide = make(), make(features=4), make(features=10)
    assert all(torch.equal(value, same.state_dict()[name]) for name, value in plain.state_dict().items())
    assert plain.state_dict().keys() == same.state_dict().keys()
    shapes = {name: tuple(value.shape) for name, value in plain.state_dict().items()}
    changed = {n: tuple(v.shape) for n, v in wide.state_dict().items() if tuple(v.shape) != shapes[n]}
    assert changed == {
        "encoder.conv_out.weight": (10, 16, 3, 3), "encoder.conv_out.bias": (10,),
        "quant_conv.weight": (4, 10, 3, 3), "decoder.conv_in.weight": (16, 10, 3, 3),
        "post_quant_conv.weight": (10, 4, 3, 3), "post_quant_conv.bias": (10,),
    }  # fmt: skip
    assert wide.latent_shape == plain.latent_shape
    assert wide.decode_latents(wide.latents(images())).shape == images().shape


def test_file_from_before_the_features_loads(tmp_path: Path) -> None:
    content = model.pack(make(), class_names=[], provenance={})
    del content["config"]["autoencoder"]["features"]
    content["digest"] = modelfile.model_digest(content["weights"], content["config"])
    modelfile.save(tmp_path / "old.pt", content)
    loaded, _ = model.load(tmp_path / "old.pt")
    assert torch.equal(loaded.latents(images()), make().latents(images()))


def test_latents_are_layer_normed_over_channels() -> None:
    z = make().latents(images())
    torch.testing.assert_close(z.mean(1), torch.zeros(4, 4, 4), rtol=0, atol=1e-3)
    torch.testing.assert_close(z.var(1, correction=0), torch.ones(4, 4, 4), rtol=0, atol=1e-2)


def test_latent_norm_none_leaves_the_scale_alone() -> None:
    normed, plain = make(), make(latent_norm="none")
    plain.load_state_dict(normed.state_dict())
    assert (plain.latents(images()).var(1, correction=0) - 1).abs().max() > 0.1


def test_latents_are_fp16_values_in_fp32() -> None:
    z = make().latents(images())
    assert z.dtype == torch.float32
    assert torch.equal(z, z.half().float())


def test_rounding_to_fp16_passes_the_gradient_through() -> None:
    z = torch.tensor([1.0001, -3e-8, 2.7], requires_grad=True)
    rounded = round_to_half(z)
    assert torch.equal(rounded, z.detach().half().float())
    rounded.backward(torch.tensor([1.0, 2.0, 3.0]))
    assert z.grad is not None
    assert z.grad.tolist() == [1.0, 2.0, 3.0]


def test_codes_are_a_function_of_the_stored_latents() -> None:
    """What a store keeps (fp16 latents, seed, view) gives back the codes that it keeps."""
    tokenizer, x = make(), images()
    stored = tokenizer.latents(x).detach().half()
    codes = tokenizer.encode(x, tokenizer.noise("encode", 7, range(4), [1] * 4))
    again = tokenizer.quantizer.encode(stored.float(), tokenizer.noise("encode", 7, range(4), [1] * 4))
    assert torch.equal(codes, again)


def test_encode_is_deterministic_and_depends_on_the_noise() -> None:
    tokenizer, x = make(), images()
    first, again = (tokenizer.encode(x, tokenizer.noise("encode", 0, range(4), [0] * 4)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, tokenizer.encode(x, tokenizer.noise("encode", 1, range(4), [0] * 4)))
    assert not torch.equal(first, tokenizer.encode(x, tokenizer.noise("encode", 0, range(4), [1] * 4)))
    assert int(first.min()) >= 0
    assert int(first.max()) < K


def test_noise_is_the_addressed_stream() -> None:
    tokenizer = make()
    eps = tokenizer.noise("encode", 3, [8, 2], [0, 1])
    assert eps[1, 2].numpy().tolist() == noise.normal("encode", 3, 2, 1, 3, tokenizer.latent_shape).tolist()


def test_decoding_codes_equals_the_forward_pass() -> None:
    tokenizer, x = make(), images()
    eps = tokenizer.noise("encode", 0, range(4), [0] * 4)
    with torch.no_grad():
        recon, chain = tokenizer(x, eps)
    torch.testing.assert_close(tokenizer.decode(chain.codes_BTHW), recon, rtol=0, atol=1e-4)


def test_imagenet_architecture_has_a_grid_of_16() -> None:
    """The paper's: 256×256, f = 16, C = 32, K = 4096, T = 10. On the meta device: shapes without numbers."""
    cfg = load_recipe("imagenet256-tokenizer", section="tokenizer").tokenizer
    assert cfg is not None
    assert cfg.autoencoder.factor == 16
    with torch.device("meta"):
        tokenizer = model.Tokenizer(cfg)
        z = tokenizer.latents(torch.empty(1, 3, 256, 256))
        assert z.shape == (1, *tokenizer.latent_shape) == (1, 32, 16, 16)
        assert tokenizer.decode_latents(z).shape == (1, 3, 256, 256)
    assert tokenizer.quantizer.books.shape == (1, 4096, 32)
    assert tokenizer.quantizer.steps == 10


# ---- its file ----------------------------------------------------------------------------------------------------


def test_file_gives_back_the_same_tokenizer(tmp_path: Path) -> None:
    tokenizer, path = make(), tmp_path / "tokenizer.pt"
    content = model.pack(tokenizer, class_names=["a", "b"], provenance={"recipe": "test"})
    modelfile.save(path, content)
    loaded, read = model.load(path)
    assert read["digest"] == content["digest"]
    assert read["class_names"] == ["a", "b"]
    assert read["provenance"] == {"recipe": "test"}
    assert loaded.cfg == tokenizer.cfg
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert model.pack(loaded)["digest"] == content["digest"]
    eps = tokenizer.noise("encode", 0, range(4), [0] * 4)
    assert torch.equal(loaded.encode(images(), eps), tokenizer.encode(images(), eps))


def test_file_is_read_with_weights_only(tiny_tokenizer_file: Path) -> None:
    content = torch.load(tiny_tokenizer_file, weights_only=True)
    assert content["format"] == model.KIND
    assert content["config"]["autoencoder"]["resolution"] == 16


def test_same_content_gives_the_same_bytes_under_every_name(tmp_path: Path) -> None:
    content = model.pack(make(), class_names=[], provenance={})
    modelfile.save(tmp_path / "one.pt", content)
    modelfile.save(tmp_path / "folder" / "another-name.pt", content)
    assert (tmp_path / "one.pt").read_bytes() == (tmp_path / "folder" / "another-name.pt").read_bytes()


def test_digest_covers_weights_and_config_but_not_provenance() -> None:
    plain = model.pack(make(), class_names=[], provenance={})
    assert model.pack(make(), class_names=["x"], provenance={"data": "other"})["digest"] == plain["digest"]
    moved = make()
    with torch.no_grad():
        next(moved.parameters()).view(-1)[0] += 1e-3
    other = make()
    other.cfg = other.cfg.model_copy(update={"schedule": other.cfg.schedule.model_copy(update={"kind": "pow"})})
    digests = {plain["digest"], model.pack(moved)["digest"], model.pack(other)["digest"]}
    assert len(digests) == 3


@pytest.mark.parametrize(
    "changed",
    [
        {"b": torch.zeros(2, 3)},
        {"a": torch.zeros(3, 2)},
        {"a": torch.zeros(2, 3, dtype=torch.int32)},
        {"a": torch.ones(2, 3)},
        {"a": torch.zeros(2, 3), "b": torch.zeros(0)},
    ],
    ids=["name", "shape", "dtype", "value", "one-more"],
)
def test_digest_covers_name_shape_type_and_value_of_a_weight(changed: dict[str, Tensor]) -> None:
    digest = modelfile.model_digest({"a": torch.zeros(2, 3)}, {})
    assert modelfile.model_digest(changed, {}) != digest


def test_digest_does_not_depend_on_the_order_of_the_weights() -> None:
    a, b = torch.zeros(2), torch.ones(3)
    assert modelfile.model_digest({"a": a, "b": b}, {}) == modelfile.model_digest({"b": b, "a": a}, {})


def test_config_of_the_file_holds_the_architecture_alone() -> None:
    with_training = model.pack(model.Tokenizer(config()))
    assert set(with_training["config"]) == {"autoencoder", "schedule", "quantizer"}


def flip_a_weight(content: dict[str, Any]) -> None:
    content["weights"]["encoder.conv_in.weight"].view(-1)[0] += 1


def change_the_config(content: dict[str, Any]) -> None:
    content["config"]["schedule"]["kind"] = "rvq"


def call_it_a_generator(content: dict[str, Any]) -> None:
    content["format"] = "rdpm-generator"


def call_it_something_else(content: dict[str, Any]) -> None:
    content["format"] = "vqgan"


def make_it_newer(content: dict[str, Any]) -> None:
    content["version"] = modelfile.VERSION + 1


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (flip_a_weight, "damaged"),
        (change_the_config, "damaged"),
        (call_it_a_generator, "is a generator, not a tokenizer"),
        (call_it_something_else, "not an rdpm checkpoint"),
        (make_it_newer, "format version"),
    ],
)
def test_spoiled_file_is_refused(
    tiny_tokenizer_file: Path, tmp_path: Path, spoil: Callable[[dict[str, Any]], None], message: str
) -> None:
    content = torch.load(tiny_tokenizer_file, weights_only=True)
    spoil(content)
    path = tmp_path / "spoiled.pt"
    modelfile.save(path, content)
    with pytest.raises(CheckpointError, match=message) as caught:
        model.load(path)
    assert str(path) in caught.value.message
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    "content", [b"", b"not a checkpoint", pickle.dumps(Path("x"), protocol=2)], ids=["empty", "text", "pickled-object"]
)
def test_file_that_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        model.load(path)


def test_truncated_file_is_refused(tiny_tokenizer_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "half.pt"
    path.write_bytes(tiny_tokenizer_file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="cannot be read"):
        model.load(path)


def test_absent_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist") as caught:
        model.load(tmp_path / "tokenizer.pt")
    assert "rdpm train-tokenizer" in caught.value.hint


def test_weights_that_do_not_fit_their_config_are_refused(tmp_path: Path) -> None:
    content = model.pack(make())
    del content["weights"]["encoder.conv_in.bias"]
    content["digest"] = modelfile.model_digest(content["weights"], content["config"])
    with pytest.raises(CheckpointError, match="does not fit its own config"):
        model.unpack(content, "here")


# ---- training ----------------------------------------------------------------------------------------------------


class Ramps(ImageSource):
    """Image i: red rises from left to right, green is i, blue falls downwards; no image is its own mirror image."""

    def __init__(self, count: int) -> None:
        self.spec, self.labels, self.class_names = "ramps", None, []
        self.names = [f"{i}.png" for i in range(count)]

    def open(self, index: int) -> Image.Image:
        pixels = np.zeros((16, 16, 3), dtype=np.uint8)
        pixels[..., 0] = np.arange(16) * 16
        pixels[..., 1] = index
        pixels[..., 2] = np.arange(16)[::-1, None]
        return Image.fromarray(pixels)


def is_flipped(batch: Tensor) -> Tensor:
    """(B,) bool: does red fall from left to right?"""
    return batch[:, 0, 0, 0] > batch[:, 0, 0, -1]


def test_batches_are_a_function_of_seed_and_step() -> None:
    rows, cfg = range(32), config()
    batches = ImageBatches(Ramps(100), cfg, seed=0)
    straight = [batches.batch_at(step, rows) for step in range(5)]
    resumed = ImageBatches(Ramps(100), cfg, seed=0)
    for step in (3, 1):
        assert torch.equal(resumed.batch_at(step, rows), straight[step])
    assert not torch.equal(straight[0], straight[1])
    assert not torch.equal(ImageBatches(Ramps(100), cfg, seed=1).batch_at(0, rows), straight[0])


@pytest.mark.parametrize("rows", [range(0, 16), range(16, 32)])
def test_a_process_sees_its_slice_of_the_global_batch(rows: range) -> None:
    batches = ImageBatches(Ramps(100), config(), seed=0)
    for step in range(4):  # step 3 spans two epochs
        whole = batches.batch_at(step, range(32))
        assert torch.equal(batches.batch_at(step, rows), whole[rows.start : rows.stop])


def test_batches_hold_the_images_of_the_source_once_an_epoch() -> None:
    source = Ramps(64)
    batches = ImageBatches(source, config(flip=False), seed=0)
    seen = torch.cat([batches.batch_at(step, range(32)) for step in range(2)])
    assert seen.shape == (64, 3, 16, 16)
    assert seen.dtype == torch.uint8
    indices = seen[:, 1, 0, 0].tolist()
    assert sorted(indices) == list(range(64))
    for image, index in zip(seen, indices, strict=True):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), source.pixels(index, 16))


def test_flip_mirrors_about_half_of_the_images() -> None:
    batches, plain = (ImageBatches(Ramps(100), config(flip=flip), seed=0) for flip in (True, False))
    flipped = 0
    for step in range(10):
        mirrored, straight = batches.batch_at(step, range(32)), plain.batch_at(step, range(32))
        turned = is_flipped(mirrored)
        assert torch.equal(torch.where(turned.view(-1, 1, 1, 1), mirrored.flip(3), mirrored), straight)
        assert not is_flipped(straight).any()
        flipped += int(turned.sum())
    assert 120 < flipped < 200  # of 320


def task(weight: bool = True) -> TokenizerTask:
    cfg = config(loss={"weight": weight})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TokenizerTask(model.Tokenizer(cfg, cfg.loss.weight).train(), cfg)


def step_of(rows: range, step: int = 0) -> TrainStep:
    return TrainStep(0, step, rows, 32, torch.device("cpu"))


def batch() -> Tensor:
    return ImageBatches(Ramps(100), config(), seed=0).batch_at(0, range(32))


def test_loss_is_the_weighted_sum_of_its_logged_terms_and_reaches_every_weight() -> None:
    player = task()
    loss, logs = player.loss(batch(), step_of(range(32)))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(logs["recon"]) + 0.25 * float(logs["quant"]), rel=1e-5)
    assert [name for name in logs if name.startswith("latent_error/")] == [f"latent_error/t{t:02d}" for t in (1, 2, 3)]
    for name, parameter in player.model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_loss_terms_have_the_factors_of_the_recipe() -> None:
    x, recon = images(2), images(4)[2:]
    loss_terms = TokenizerLoss(config(loss={"quant": 0.5}).loss)
    total, terms = loss_terms(x, recon, torch.tensor(3.0))
    squared = float((x - recon).pow(2).mean())
    assert float(terms["recon"]) == pytest.approx(squared, rel=1e-5)
    assert float(total) == pytest.approx(squared + 1.5, rel=1e-5)


def test_loss_is_a_function_of_seed_and_step() -> None:
    losses = [task().loss(batch(), step_of(range(32), step))[0].item() for step in (0, 0, 1)]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_after_step_moves_the_codebook_and_logs_its_health_per_step() -> None:
    player = task()
    before = player.model.quantizer.books.clone()
    player.loss(batch(), step_of(range(32)))
    logs = player.after_step(step_of(range(32)))
    assert not torch.equal(player.model.quantizer.books, before)
    assert float(logs["restarted"]) >= 0
    for t in range(1, T + 1):
        usage, perplexity, dead = (float(logs[f"{name}/t{t:02d}"]) for name in ("usage", "perplexity", "dead"))
        assert 0 < usage <= 1
        assert 1 <= perplexity <= K * usage + 1e-3
        assert dead == pytest.approx(K * (1 - usage))


def test_micro_batches_move_the_codebook_as_the_whole_batch_does() -> None:
    whole, parts, pixels = task(), task(), batch()
    whole.loss(pixels, step_of(range(32)))
    for rows in (range(0, 16), range(16, 32)):
        parts.loss(pixels[rows.start : rows.stop], step_of(rows))
    logs = [player.after_step(step_of(range(32))) for player in (whole, parts)]
    torch.testing.assert_close(whole.model.quantizer.books, parts.model.quantizer.books, rtol=1e-4, atol=1e-4)
    assert logs[0]["usage/t01"] == logs[1]["usage/t01"]


def test_every_step_counts_its_own_vectors_alone() -> None:
    player, positions = task(), 32 * 4 * 4
    for step in range(2):
        player.loss(batch(), step_of(range(32), step))
        assert player.usage is not None
        assert player.usage.used_TK.sum(1).tolist() == [positions] * T
        player.after_step(step_of(range(32), step))


def test_codebook_health_of_counts_worked_out_by_hand() -> None:
    counts = torch.tensor([[2.0, 2.0, 0.0, 0.0], [4.0, 0.0, 0.0, 0.0], [1.0, 1.0, 2.0, 0.0]])
    logs = health(counts, shared=True)
    assert float(health(counts, shared=False)["usage/book"]) == 0.25
    expected = {
        "usage/book": 0.75,
        "usage/t01": 0.5, "perplexity/t01": 2.0, "dead/t01": 2.0,
        "usage/t02": 0.25, "perplexity/t02": 1.0, "dead/t02": 3.0,
        "usage/t03": 0.75, "perplexity/t03": math.sqrt(8), "dead/t03": 1.0,
    }  # fmt: skip
    assert {name: float(value) for name, value in logs.items()} == pytest.approx(expected, rel=1e-5)

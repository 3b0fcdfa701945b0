"""The transformer and its conditions: sizes, options, positions on 1 to 3 axes, masked tokens, attention kernels.

Legend: R rows, M tokens, S positions, C code width, E width of a head.
"""

import math
import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from generators import CHANNELS, CLASSES, CODES, STEPS, Calls, make_generator, make_quantizer
from helpers import CPU
from torch import Tensor, nn

from rdpm_cli.device import one_thread
from rdpm_cli.distributed import TrainStep
from rdpm_cli.errors import UsageError
from rdpm_cli.generator import registry, transformer
from rdpm_cli.generator.conditions import store_columns
from rdpm_cli.generator.config import NetworkConfig, RDPMConfig
from rdpm_cli.generator.contract import Condition
from rdpm_cli.generator.rdpm import RDPM, CodeBatch, RDPMNetwork
from rdpm_cli.generator.transformer import rope_table, rotate, trunk_of
from rdpm_cli.tokenizer.config import QuantizerConfig, ScheduleConfig
from rdpm_cli.tokenizer.quantizer import Quantizer

GRIDS = [(7,), (4, 4), (2, 3, 4)]
Rows = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(autouse=True)
def fixed_seed() -> Iterator[None]:
    with torch.random.fork_rng(), one_thread():  # networks this small lose time to threads
        torch.manual_seed(0)
        yield


def make_rows(count: int = 6, positions: int = 16) -> Rows:
    """eps, z'_{t-1}, t, labels of some rows."""
    eps, previous = torch.randn(2, count, CHANNELS, positions)
    return eps, previous, torch.arange(count) % STEPS + 1, torch.arange(count) % (CLASSES + 1)


def logits_of(generator: RDPM, rows: Rows) -> Tensor:
    eps, previous, t, labels = rows
    return generator.predict(eps, previous, t, generator.condition({"labels": labels}))[0]


# ---- sizes and options ---------------------------------------------------------------------------------------------


def imagenet_parameters(**options: Any) -> int:
    with torch.device("meta"):
        quantizer = Quantizer(QuantizerConfig(codes=4096, steps=10), ScheduleConfig(), 32, (16, 16))
        network = RDPMNetwork(NetworkConfig(**options), quantizer, 1000)
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(("depth", "millions"), [(12, 133), (16, 310), (20, 602)])
def test_parameter_counts_are_those_of_table_1(depth: int, millions: int) -> None:
    assert imagenet_parameters(depth=depth) / 1e6 == pytest.approx(millions, rel=0.01)


def test_class_latents_cost_8_million_parameters_at_imagenet_size() -> None:
    added = imagenet_parameters(depth=12, class_latents=True) - imagenet_parameters(depth=12)
    assert added == 1001 * 256 * 32 + 32 * 768


@pytest.mark.parametrize(
    ("options", "parameter"),
    [
        ({"positions": "learned"}, "positions.weight"),
        ({"positions": "both"}, "positions.weight"),
        ({"class_latents": True}, "class_latents.weight"),
        ({"class_tokens": 3}, "class_tokens.weight"),
        ({"head": "geometric"}, "latent_head.weight"),
        ({"head": "geometric"}, "raw_scale"),
        ({"qk_norm": True}, "blocks.0.attn.q_norm.weight"),
        ({"qk_norm": True}, "blocks.1.attn.k_norm.weight"),
    ],
    ids=str,
)
def test_an_option_adds_parameters_that_change_the_prediction(options: dict[str, Any], parameter: str) -> None:
    generator, rows = make_generator(**options), make_rows()
    plain = {name for name, _ in make_generator().network.named_parameters()}
    (added,) = [p for name, p in generator.network.named_parameters() if name.endswith(parameter)]
    assert not any(name.endswith(parameter) for name in plain)
    first = logits_of(generator, rows)
    added.copy_(added + torch.randn(added.shape))
    second = logits_of(generator, rows)
    assert first.shape == second.shape == (6, 16, CODES)
    assert not torch.allclose(first, second, atol=1e-3)


@pytest.mark.parametrize("option", [{"depth": 3}, {"width": 64}, {"heads": 4}], ids=str)
def test_the_size_changes_the_network(option: dict[str, Any]) -> None:
    small, large = make_generator(), make_generator(**option)
    if option == {"heads": 4}:  # the same parameters, used in another way
        large.network.load_state_dict(small.network.state_dict())
        rows = make_rows()
        assert not torch.allclose(logits_of(small, rows), logits_of(large, rows), atol=1e-4)
    else:
        sizes = [sum(p.numel() for p in generator.network.parameters()) for generator in (small, large)]
        assert sizes[0] < sizes[1]


@pytest.mark.parametrize("index", range(4), ids=["eps", "previous", "t", "label"])
def test_the_prediction_depends_on_every_input(index: int) -> None:
    generator, rows = make_generator(), make_rows(1)
    changed = tuple(x + 1 if i == index else x for i, x in enumerate(rows))
    assert not torch.allclose(logits_of(generator, rows), logits_of(generator, changed), atol=1e-3)  # type: ignore[arg-type]


# ---- positions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(
    ("positions", "knows_places"), [("rope", True), ("learned", True), ("both", True), (None, False)]
)
def test_positions_are_known_through_rope_and_table_only(
    grid: tuple[int, ...], positions: str | None, knows_places: bool
) -> None:
    """Moving the tokens moves the logits along with them, unless the network knows places."""
    generator = make_generator(positions=positions or "learned", std=0.5, grid=grid)
    if positions is None:
        generator.network.get_parameter("trunk.positions.weight").zero_()
    S = math.prod(grid)
    eps, previous, t, labels = make_rows(positions=S)
    order = torch.randperm(S)
    straight = logits_of(generator, (eps, previous, t, labels))[:, order]
    moved = logits_of(generator, (eps[..., order], previous[..., order], t, labels))
    assert torch.allclose(straight, moved, atol=1e-4) != knows_places


def turned(x_SE: Tensor, grid: tuple[int, ...]) -> Tensor:
    angles = rope_table(grid, x_SE.shape[1])
    return rotate(x_SE, angles.cos(), angles.sin())


def test_on_two_axes_half_of_the_pairs_turn_with_each() -> None:
    """The angles of DESIGN §2, written out: checkpoints depend on them."""
    angles = rope_table((3, 5), 16)
    for y, x in np.ndindex(3, 5):
        speeds = [10000.0 ** (-i / 4) for i in range(4)]
        expected = torch.tensor([y * s for s in speeds] + [x * s for s in speeds])
        torch.testing.assert_close(angles[5 * y + x], expected)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_attention_scores_depend_on_relative_places_only(grid: tuple[int, ...]) -> None:
    S, (q, k) = math.prod(grid), torch.randn(2, 24)
    rotated = turned(q.expand(S, 24), grid)
    torch.testing.assert_close(rotated.norm(dim=1), q.norm().expand(S))
    scores = (rotated @ turned(k.expand(S, 24), grid).T).tolist()
    places = list(np.ndindex(*grid))
    by_offset: dict[tuple[int, ...], list[float]] = {}
    for i, first in enumerate(places):
        for j, second in enumerate(places):
            offset = tuple(b - a for a, b in zip(first, second, strict=True))
            by_offset.setdefault(offset, []).append(scores[i][j])
    assert all(max(values) - min(values) < 1e-4 for values in by_offset.values())
    assert len({round(values[0], 4) for values in by_offset.values()}) == len(by_offset)  # every offset has its own


def test_pairs_that_the_axes_cannot_share_do_not_turn() -> None:
    angles = rope_table((2, 3, 4), 16)  # 8 pairs: 2 an axis
    assert angles.shape == (24, 8)
    assert angles[-1, :6].all()
    assert not angles[:, 6:].any()


# ---- conditions ----------------------------------------------------------------------------------------------------


def test_the_null_class_is_number_classes() -> None:
    generator = make_generator(class_latents=True, class_tokens=2)
    null, by_label = generator.null_condition(2), generator.condition({"labels": torch.full((2,), CLASSES)})
    for part, expected in zip(null, by_label, strict=True):
        assert (part is None) == (expected is None)
        assert part is None or torch.equal(part, expected)  # type: ignore[arg-type]
    assert {m.num_embeddings for m in generator.network.modules() if isinstance(m, nn.Embedding)} == {CLASSES + 1}
    with pytest.raises(IndexError):
        generator.condition({"labels": torch.full((2,), CLASSES + 1)})


def test_joined_conditions_are_the_rows_of_both() -> None:
    generator = make_generator(class_latents=True, class_tokens=2)
    first, second = (generator.condition({"labels": torch.tensor(labels)}) for labels in ([0, 1], [2]))
    both = generator.condition({"labels": torch.tensor([0, 1, 2])})
    for joined, expected in zip(first.joined(second), both, strict=True):
        assert (joined is None) == (expected is None)
        assert joined is None or expected is None or torch.equal(joined, expected)


def test_labels_are_dropped_where_the_uniform_number_is_below_the_rate() -> None:
    store: Any = types.SimpleNamespace(
        columns={"labels": np.array([2, 0, 1, 1], np.int32)},
        manifest=types.SimpleNamespace(class_names=("a", "b", "c")),
    )
    rows, uniform = np.array([3, 0, 1]), np.array([0.29, 0.3, 0.9], np.float32)
    assert store_columns(store, rows)["labels"].tolist() == [1, 2, 0]
    assert store_columns(store, rows, uniform, 0.3)["labels"].tolist() == [3, 2, 0]
    assert store_columns(store, rows, uniform, 1.0)["labels"].tolist() == [3, 3, 3]


def outputs(generator: RDPM, condition: Condition) -> Tensor:
    trunk = trunk_of(generator.network)
    x = torch.randn(2, trunk.length, trunk.cfg.hidden, generator=torch.Generator().manual_seed(3))
    hidden: Tensor = trunk(x, torch.tensor([1, 2]), condition)
    return hidden


@pytest.mark.parametrize("tokens", [1, 5])
def test_masked_tokens_are_as_if_they_were_not_there(tokens: int) -> None:
    """A condition may have any number of tokens, and rows of a batch different ones."""
    generator = make_generator(positions="both", std=0.5)
    vector, width = generator.condition({"labels": torch.tensor([0, 2])}).vector_BD, 32
    present, absent = torch.randn(2, tokens, width), 100 * torch.randn(2, 3, width)
    mask = (torch.arange(tokens + 3) < tokens).expand(2, -1)
    padded = Condition(vector, torch.cat([present, absent], 1), mask)
    torch.testing.assert_close(outputs(generator, padded), outputs(generator, Condition(vector, present)))
    everything = padded._replace(mask_BM=torch.ones_like(mask))
    torch.testing.assert_close(outputs(generator, everything), outputs(generator, padded._replace(mask_BM=None)))
    assert not torch.allclose(outputs(generator, everything), outputs(generator, padded), atol=1e-3)
    nothing = Condition(vector, present, torch.zeros(2, tokens, dtype=torch.bool))
    torch.testing.assert_close(outputs(generator, nothing), outputs(generator, Condition(vector)))


# ---- forms of the same network in training -------------------------------------------------------------------------


def test_normed_queries_and_keys_bound_the_scores() -> None:
    """With the weights at 1, |q| = |k| = sqrt(E), however large the projections are."""
    inputs: list[Tensor] = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        inputs.extend((q, k))
        return transformer.sdpa(q, k, v, mask)

    attention, angles = transformer.Attention(32, 2, qk_norm=True), rope_table((4, 4), 16)
    attention.kernel = kernel
    nn.init.normal_(attention.qkv.weight, std=30.0)
    attention(torch.randn(2, 16, 32), (angles.cos(), angles.sin()), None)
    for value in inputs:
        torch.testing.assert_close(value.norm(dim=-1), torch.full((2, 2, 16), 4.0))


def gradients(generator: RDPM) -> dict[str, Tensor]:
    """Of one batch of random codes."""
    generator.network.requires_grad_(True).zero_grad()
    loss, _ = generator.loss(random_batch(), TrainStep(0, 0, range(8), 8, CPU))
    loss.backward()
    return {name: p.grad for name, p in generator.network.named_parameters() if p.grad is not None}


def random_batch() -> CodeBatch:
    random = torch.Generator().manual_seed(1)
    codes, eps = torch.randint(CODES, (8, STEPS, 16), generator=random), torch.randn(8, 2, 4, 16, generator=random)
    return CodeBatch(codes, {"labels": torch.arange(8) % CLASSES}, torch.tensor([[1, 2], [2, 3]] * 4), eps)


def assert_close(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert gradients.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(gradients[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_recomputed_blocks_give_the_same_gradients() -> None:
    quantizer = make_quantizer()
    generator = make_generator(quantizer, class_tokens=2)
    expected = gradients(generator)
    registry.prepare(generator, RDPMConfig.model_validate({"train": {"steps": 1}, "recompute": True}))
    calls = Calls(trunk_of(generator.network).blocks[0])
    assert_close(gradients(generator), expected)
    assert len(calls.inputs) == 2
    with torch.no_grad():
        generator.loss(random_batch(), TrainStep(0, 0, range(8), 8, CPU))
    assert len(calls.inputs) == 3


def install_flash(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """flash_attn_func by its documented layout, (B, N, A, E). -> the shapes of the queries."""
    shapes: list[torch.Size] = []

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shapes.append(q.shape)
        scores = torch.einsum("bnae,bmae->banm", q, k) / q.shape[-1] ** 0.5
        return torch.einsum("banm,bmae->bnae", scores.softmax(-1), v)

    module: Any = types.ModuleType("flash_attn")
    module.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return shapes


def test_flash_attention_is_the_same_attention_but_has_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    generator, shapes = make_generator(), install_flash(monkeypatch)
    expected, kernel = gradients(generator), transformer.flash()
    registry.prepare(generator, RDPMConfig.model_validate({"train": {"steps": 1}}), kernel)
    assert_close(gradients(generator), expected)
    assert shapes == [torch.Size([16, 16, 2, 16])] * 2
    q = torch.randn(2, 2, 5, 4)
    with pytest.raises(UsageError, match="attention"):
        kernel(q, q, q, torch.ones(2, 1, 1, 5, dtype=torch.bool))


def test_flash_attention_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def find(device: str, precision: str) -> transformer.Kernel:
        cfg = {"train": {"steps": 1, "precision": precision}, "attention": "flash"}
        return registry.find_kernel(RDPMConfig.model_validate(cfg), device)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(UsageError) as absent:
        find("cuda", "bf16")
    assert "rdpm[flash]" in absent.value.hint
    install_flash(monkeypatch)
    assert find("cuda", "bf16") is not transformer.sdpa
    for device, precision in [("cpu", "bf16"), ("cuda", "fp32")]:
        with pytest.raises(UsageError, match="bf16"):
            find(device, precision)


def test_a_seed_makes_the_weights_that_it_always_made() -> None:
    """The initialisation draws module by module, in their order: sums of the weights of version 0.2."""
    torch.manual_seed(0)
    network = make_generator(
        make_quantizer(), awake=False, class_latents=True, class_tokens=2, head="geometric"
    ).network
    sums = {
        "input.weight": -1.3717,
        "trunk.class_embedding.weight": -0.0948,
        "trunk.class_tokens.weight": -0.1727,
        "trunk.blocks.1.mlp.w3.weight": 7.1612,
    }
    assert {name: float(network.get_parameter(name).double().sum()) for name in sums} == pytest.approx(sums, abs=1e-3)

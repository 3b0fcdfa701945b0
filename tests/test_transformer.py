"""The transformer and its conditions: sizes, options, positions on 1 to 3 axes, masked tokens, attention kernels.

Legend: R rows, M tokens, S positions, C code width, E width of a head."""

import math
import sys
import types
from typing import Any

import generators
import numpy as np
import pytest
import torch
from generators import Calls, fixed_seed, make_generator, make_quantizer  # noqa: F401
from helpers import CPU
from torch import Tensor

from rdpm_cli.distributed import TrainStep
from rdpm_cli.errors import UsageError
from rdpm_cli.generator import registry
from rdpm_cli.generator.config import NetworkConfig, RDPMConfig
from rdpm_cli.generator.contract import Condition
from rdpm_cli.generator.rdpm import RDPM, CodeBatch, RDPMNetwork
from rdpm_cli.generator.transformer import rope_table, rotate
from rdpm_cli.tokenizer import model as tokenizer_model
from rdpm_cli.tokenizer.config import QuantizerConfig, ScheduleConfig
from rdpm_cli.tokenizer.quantizer import Quantizer

CHANNELS, CLASSES, CODES, STEPS = generators.CHANNELS, generators.CLASSES, generators.CODES, generators.STEPS
GRIDS = [(7,), (4, 4), (2, 3, 4)]


def make_rows(count: int = 6, positions: int = 16) -> list[Tensor]:
    """eps, z'_{t-1}, t, labels of some rows."""
    eps, previous = torch.randn(2, count, CHANNELS, positions)
    return [eps, previous, torch.arange(count) % STEPS + 1, torch.arange(count) % (CLASSES + 1)]


def logits_of(generator: RDPM, rows: list[Tensor]) -> Tensor:
    eps, previous, t, labels = rows
    return generator.predict(eps, previous, t, generator.condition({"labels": labels}))[0]


def imagenet_parameters(**options: Any) -> int:
    with torch.device("meta"):
        quantizer = Quantizer(QuantizerConfig(codes=4096, steps=10), ScheduleConfig(), 32, (16, 16))
        network = RDPMNetwork(NetworkConfig(**options), quantizer, 1000)
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(("depth", "millions"), [(12, 133), (16, 310), (20, 602)])
def test_parameter_counts_are_those_of_table_1(depth: int, millions: int) -> None:
    paper = imagenet_parameters(depth=depth)
    assert paper / 1e6 == pytest.approx(millions, rel=0.01)
    assert imagenet_parameters(depth=depth, class_latents=True) - paper == 1001 * 256 * 32 + 32 * 64 * depth


@pytest.mark.parametrize(("depth", "millions"), [(12, 133.4), (16, 310.8), (20, 601.8)])
def test_the_exact_width_of_the_mlp_gives_these_parameters(depth: int, millions: float) -> None:
    assert imagenet_parameters(depth=depth, mlp="exact") / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize(
    ("options", "parameter"),
    [
        ({"positions": "learned"}, "positions.weight"), ({"positions": "both"}, "positions.weight"),
        ({"class_latents": True}, "class_latents.weight"), ({"class_tokens": 3}, "class_tokens.weight"),
        ({"head": "geometric"}, "latent_head.weight"), ({"head": "geometric"}, "raw_scale"),
        ({"qk_norm": True}, "blocks.0.attn.q_norm.weight"), ({"qk_norm": True}, "blocks.1.attn.k_norm.weight"),
        ({"depth": 3}, "blocks.2.mlp.w3.weight"),
    ],
    ids=str,
)  # fmt: skip
def test_an_option_adds_parameters_that_change_the_prediction(options: dict[str, Any], parameter: str) -> None:
    generator, rows = make_generator(**options), make_rows()
    (added,) = [p for name, p in generator.network.named_parameters() if name.endswith(parameter)]
    assert not any(name.endswith(parameter) for name, _ in make_generator().network.named_parameters())
    first = logits_of(generator, rows)
    added.copy_(added + torch.randn(added.shape))
    second = logits_of(generator, rows)
    assert first.shape == second.shape == (6, 16, CODES)
    assert not torch.allclose(first, second, atol=1e-3)


def test_width_changes_the_parameters_and_heads_their_use() -> None:
    generator, rows = make_generator(), make_rows()
    assert tokenizer_model.parameters(make_generator(width=64).network) > tokenizer_model.parameters(generator.network)
    heads = make_generator(heads=4)
    heads.network.load_state_dict(generator.network.state_dict())
    assert not torch.allclose(logits_of(generator, rows), logits_of(heads, rows), atol=1e-4)


@pytest.mark.parametrize("index", range(4), ids=["eps", "previous", "t", "label"])
def test_the_prediction_depends_on_every_input(index: int) -> None:
    generator, rows = make_generator(), make_rows(1)
    changed = [x + 1 if i == index else x for i, x in enumerate(rows)]
    assert not torch.allclose(logits_of(generator, rows), logits_of(generator, changed), atol=1e-3)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("positions", ["rope", "learned", "both", None])
def test_positions_are_known_through_rope_and_table_only(grid: tuple[int, ...], positions: str | None) -> None:
    """Moving the tokens moves the logits along with them, unless the network knows places."""
    generator = make_generator(make_quantizer(grid=grid), positions=positions or "learned", std=0.5)
    if positions is None:
        generator.network.get_parameter("trunk.positions.weight").zero_()
    eps, previous, *rest = make_rows(positions=math.prod(grid))
    order = torch.randperm(math.prod(grid))
    straight = logits_of(generator, [eps, previous, *rest])[:, order]
    moved = logits_of(generator, [eps[..., order], previous[..., order], *rest])
    assert torch.allclose(straight, moved, atol=1e-4) == (positions is None)


def test_on_two_axes_half_of_the_pairs_turn_with_each_and_what_three_cannot_share_does_not() -> None:
    """The angles of DESIGN §2, written out: checkpoints depend on them."""
    angles, speeds = rope_table((3, 5), 16), [10000.0 ** (-i / 4) for i in range(4)]
    for y, x in np.ndindex(3, 5):
        torch.testing.assert_close(angles[5 * y + x], torch.tensor([y * s for s in speeds] + [x * s for s in speeds]))
    x_SE = torch.randn(15, 16)
    turned = torch.complex(*x_SE.chunk(2, 1)) * torch.polar(torch.ones(15, 8), angles)
    torch.testing.assert_close(rotate(x_SE, angles.cos(), angles.sin()), torch.cat([turned.real, turned.imag], 1))
    angles = rope_table((2, 3, 4), 16)  # 8 pairs: 2 an axis
    assert angles.shape == (24, 8)
    assert angles[-1, :6].all()
    assert not angles[:, 6:].any()


def test_the_null_class_is_number_classes_and_conditions_join_row_by_row() -> None:
    generator = make_generator(class_latents=True, class_tokens=2)
    condition = generator.condition({"labels": torch.tensor([0, 1, CLASSES])})
    null = generator.null_condition({"labels": torch.tensor([0])})
    joined = generator.condition({"labels": torch.tensor([0, 1])}).joined(null)
    for part, expected in zip(joined, condition, strict=True):
        assert (part is None) == (expected is None)
        assert part is None or expected is None or torch.equal(part, expected)
    with pytest.raises(IndexError):
        generator.condition({"labels": torch.full((2,), CLASSES + 1)})


@pytest.mark.parametrize("tokens", [1, 5])
def test_masked_tokens_are_as_if_they_were_not_there(tokens: int) -> None:
    """A condition may have any number of tokens, and rows of a batch different ones."""
    generator, x = make_generator(positions="both", std=0.5), torch.randn(2, 16, 32)
    vector = generator.condition({"labels": torch.tensor([0, 2])}).vector_BD
    present, absent = torch.randn(2, tokens, 32), 100 * torch.randn(2, 3, 32)
    both, mask = torch.cat([present, absent], 1), (torch.arange(tokens + 3) < tokens).expand(2, -1)

    def output(*parts: Tensor) -> Tensor:
        return generator.network.trunk(x, torch.tensor([1, 2]), Condition(vector, *parts))

    torch.testing.assert_close(output(both, mask), output(present))
    torch.testing.assert_close(output(both, torch.ones_like(mask)), output(both))
    assert not torch.allclose(output(both), output(both, mask), atol=1e-3)
    torch.testing.assert_close(output(present, torch.zeros(2, tokens, dtype=torch.bool)), output())


def loss_of(generator: RDPM) -> Tensor:
    """Of one batch of random codes."""
    random = torch.Generator().manual_seed(1)
    codes, eps = torch.randint(CODES, (8, STEPS, 16), generator=random), torch.randn(8, 2, 4, 16, generator=random)
    batch = CodeBatch(codes, {"labels": torch.arange(8) % CLASSES}, torch.tensor([[1, 2], [2, 3]] * 4), eps)
    return generator.loss(batch, TrainStep(0, 0, range(8), 8, CPU))[0]


def gradients(generator: RDPM) -> list[Tensor]:
    generator.network.requires_grad_(True).zero_grad()
    return list(torch.autograd.grad(loss_of(generator), list(generator.network.parameters())))


def config(**options: Any) -> RDPMConfig:
    return RDPMConfig.model_validate({"train": {"steps": 1, "precision": options.pop("precision", "fp32")}, **options})


def test_recomputed_blocks_give_the_same_gradients() -> None:
    generator = make_generator(class_tokens=2)
    expected = gradients(generator)
    registry.prepare(generator, config(recompute=True))
    calls = Calls(generator.network.trunk.blocks[0])
    torch.testing.assert_close(gradients(generator), expected, rtol=1e-4, atol=1e-6)
    assert len(calls.inputs) == 2
    with torch.no_grad():
        loss_of(generator)
    assert len(calls.inputs) == 3


def install_flash(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """flash_attn_func by its documented layout, (B, N, A, E). -> the shapes of the queries."""
    shapes: list[torch.Size] = []

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        shapes.append(q.shape)
        scores = torch.einsum("bnae,bmae->banm", q, k) / q.shape[-1] ** 0.5
        return torch.einsum("banm,bmae->bnae", scores.softmax(-1), v)

    module: Any = types.ModuleType("flash_attn")
    module.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return shapes


def test_flash_attention_is_the_same_attention_but_has_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    generator, shapes = make_generator(), install_flash(monkeypatch)
    expected, kernel = gradients(generator), registry.find_kernel(config(attention="flash", precision="bf16"), "cuda")
    registry.prepare(generator, config(), kernel)
    torch.testing.assert_close(gradients(generator), expected, rtol=1e-4, atol=1e-6)
    assert shapes == [torch.Size([16, 16, 2, 16])] * 2
    q = torch.randn(2, 2, 5, 4)
    with pytest.raises(UsageError, match="attention"):
        kernel(q, q, q, torch.ones(2, 1, 1, 5, dtype=torch.bool), False)


@pytest.mark.parametrize(("device", "precision"), [("cpu", "bf16"), ("cuda", "fp32"), ("cuda", "bf16")])
def test_flash_attention_is_refused_where_it_cannot_run(
    device: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_flash(monkeypatch)
    if (device, precision) == ("cuda", "bf16"):
        monkeypatch.setitem(sys.modules, "flash_attn", None)  # not installed
    with pytest.raises(UsageError, match="attention=flash"):
        registry.find_kernel(config(attention="flash", precision=precision), device)


def test_a_seed_makes_the_weights_that_it_always_made() -> None:
    """The initialisation draws module by module, in their order: sums of the weights of version 0.2."""
    network = make_generator(awake=False, class_latents=True, class_tokens=2, head="geometric").network
    sums = {
        "input.weight": -1.3717,
        "trunk.class_embedding.weight": -0.0948,
        "trunk.class_tokens.weight": -0.1727,
        "trunk.blocks.1.mlp.w3.weight": 7.1612,
    }
    assert {name: float(network.get_parameter(name).double().sum()) for name in sums} == pytest.approx(sums, abs=1e-3)

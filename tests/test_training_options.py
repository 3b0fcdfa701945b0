"""What makes a generator's step cheaper and must not change it: kernels, recomputation, rows in parts."""

import sys
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import CPU
from torch import Tensor

from rdpm_cli.config import NetworkConfig, QuantizerConfig, RDPMArchitecture, RDPMConfig, ScheduleConfig
from rdpm_cli.errors import UsageError
from rdpm_cli.generator import model, rdpm, transformer
from rdpm_cli.generator.rdpm import RDPM
from rdpm_cli.generator.rdpm_batches import CodeBatch
from rdpm_cli.step import TrainStep
from rdpm_cli.tokenizer.quantizer import Quantizer

T, C, K, GRID, CLASSES, IMAGES = 3, 4, 32, 4, 5, 8
NETWORK = {"depth": 2, "width": 32, "heads": 2}


def make(**network: Any) -> RDPM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        quantizer = Quantizer(QuantizerConfig(codes=K, steps=T), ScheduleConfig(kind="sin"), C).eval()
        cfg = RDPMArchitecture(network=NetworkConfig(**NETWORK, **network))
        made = RDPM(cfg, quantizer.requires_grad_(False), (GRID, GRID), CLASSES)
        for parameter in made.network.parameters():  # zero-initialised ones get something to say
            if not parameter.detach().any():
                torch.nn.init.normal_(parameter, std=0.2)
    return made


def batch() -> CodeBatch:
    draw = torch.Generator().manual_seed(1)
    return CodeBatch(
        codes_BTHW=torch.randint(K, (IMAGES, T, GRID, GRID), generator=draw),
        labels_B=torch.arange(IMAGES) % CLASSES,
        t_BS=torch.tensor([[1, 2], [2, 3]] * (IMAGES // 2)),
        eps_BSCHW=torch.randn(IMAGES, 2, C, GRID, GRID, generator=draw),
        z_BCHW=torch.randn(IMAGES, C, GRID, GRID, generator=draw),
        spread_B=None,
    )


def gradients(generator: RDPM) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(loss and logs, gradients) of one batch."""
    generator.network.zero_grad()
    loss, logs = generator.loss(batch(), TrainStep(0, 0, range(IMAGES), IMAGES, CPU))
    loss.backward()
    found = {name: p.grad for name, p in generator.network.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **logs}, found


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("head", ["linear", "geometric"])
@pytest.mark.parametrize("rows", [1, 3, 15])
def test_losses_in_parts_of_the_rows_are_those_of_the_whole(
    rows: int, head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = gradients(make(head=head))
    monkeypatch.setattr(rdpm, "LOGITS_AT_ONCE", rows * GRID * GRID * K)
    seen: list[int] = []
    part = RDPM._part

    def watched(self: RDPM, *rows: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        seen.append(len(rows[0]))
        return part(self, *rows)

    monkeypatch.setattr(RDPM, "_part", watched)
    found = gradients(make(head=head))
    assert max(seen) == rows
    assert sum(seen) == 2 * 2 * IMAGES  # forward, and again in the backward pass
    for one, other in zip(found, wanted, strict=True):
        assert_close(one, other)


def test_recomputed_blocks_give_the_same_gradients() -> None:
    wanted = gradients(make(class_tokens=2))
    generator, calls = make(class_tokens=2), [0]
    cfg = RDPMConfig.model_validate({"train": {"steps": 1}, "recompute": True})
    model.prepare(generator, cfg, transformer.sdpa)
    trunk = generator.network.get_submodule("trunk")
    assert isinstance(trunk, transformer.Transformer)
    trunk.blocks[0].register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    for one, other in zip(gradients(generator), wanted, strict=True):
        assert_close(one, other)
    assert calls == [2]
    with torch.no_grad():
        generator.loss(batch(), TrainStep(0, 0, range(IMAGES), IMAGES, CPU))
    assert calls == [3]


def test_normed_queries_and_keys_bound_the_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the weights at 1, |q| = |k| = sqrt(E), however large the projections are."""
    seen: list[Tensor] = []

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.extend((q, k))
        return F.scaled_dot_product_attention(q, k, v)

    attention = transformer.Attention(32, 2, qk_norm=True)
    attention.kernel = kernel
    torch.nn.init.normal_(attention.qkv.weight, std=30.0)
    angles = transformer.rope_table((GRID, GRID), 16, 0)
    attention(torch.randn(2, GRID * GRID, 32), angles.cos(), angles.sin())
    for value in seen:
        torch.testing.assert_close(value.norm(dim=-1), torch.full((2, 2, GRID * GRID), 4.0))


def stub(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """flash_attn_func by its documented layout, (B, N, A, E)."""
    shapes: list[torch.Size] = []

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shapes.append(q.shape)
        scores = torch.einsum("bnae,bmae->banm", q, k) / q.shape[-1] ** 0.5
        return torch.einsum("banm,bmae->bnae", scores.softmax(-1), v)

    module = types.ModuleType("flash_attn")
    setattr(module, "flash_attn_func", flash_attn_func)  # noqa: B010
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return shapes


def test_flash_attention_is_the_same_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = gradients(make())
    shapes, generator = stub(monkeypatch), make()
    model.prepare(generator, RDPMConfig.model_validate({"train": {"steps": 1}}), transformer.flash())
    for one, other in zip(gradients(generator), wanted, strict=True):
        assert_close(one, other)
    assert shapes == [torch.Size([2 * IMAGES, GRID * GRID, 2, 16])] * 2


def test_flash_attention_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def find(device: str, precision: str) -> transformer.Kernel:
        cfg = {"train": {"steps": 1, "precision": precision}, "attention": "flash"}
        return model.find_kernel(RDPMConfig.model_validate(cfg), device)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(UsageError, match="not installed") as absent:
        find("cuda", "bf16")
    assert "rdpm[flash]" in absent.value.hint
    stub(monkeypatch)
    assert find("cuda", "bf16") is not transformer.sdpa
    for device, precision in [("cpu", "bf16"), ("cuda", "fp32")]:
        with pytest.raises(UsageError, match="bf16 on a CUDA device"):
            find(device, precision)

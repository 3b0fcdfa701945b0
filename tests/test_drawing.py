"""From logits to codes: guidance and temperature over t, which codes may be drawn, the draws. L positions, K codes."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rdpm_cli.errors import RecipeError
from rdpm_cli.generator import drawing
from rdpm_cli.generator.config import RDPMSampling
from rdpm_cli.generator.drawing import guidance_at, guide, tau_at
from rdpm_cli.schema import validate


@pytest.mark.parametrize(
    ("schedule", "options", "expected"),
    [
        ("constant", {}, [3.0, 3.0, 3.0, 3.0, 3.0]),
        ("linear", {}, [0.0, 0.75, 1.5, 2.25, 3.0]),  # lambda (t - 1) / (T - 1)
        ("cosine", {}, [3 * (1 - math.cos(math.pi * t / 4)) / 2 for t in range(5)]),
        ("power", {"power": 2.0}, [3 * (t / 4) ** 2 for t in range(5)]),
        ("power", {"power": 1.0}, [0.0, 0.75, 1.5, 2.25, 3.0]),
        ("interval", {}, [3.0, 3.0, 3.0, 3.0, 3.0]),
        ("interval", {"first": 2, "last": 3}, [0.0, 3.0, 3.0, 0.0, 0.0]),
        ("interval", {"first": 4}, [0.0, 0.0, 0.0, 3.0, 3.0]),
    ],
)
def test_guidance_follows_its_schedule(schedule: str, options: dict[str, Any], expected: list[float]) -> None:
    assert [guidance_at(t, 5, 3.0, schedule, **options) for t in range(1, 6)] == pytest.approx(expected)
    assert guidance_at(1, 1, 3.0, schedule) == 3.0  # one step has the whole guidance


def test_tau_goes_from_its_value_to_its_end() -> None:
    assert [tau_at(t, 5, 1.0, 3.0) for t in range(1, 6)] == pytest.approx([1.0, 1.5, 2.0, 2.5, 3.0])
    assert {tau_at(t, 5, 1.3, None) for t in range(1, 6)} == {1.3}


def test_guidance_is_an_extrapolation() -> None:
    cond, uncond = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(guide(cond, uncond, 1.5), 2.5 * cond - 1.5 * uncond)
    assert torch.equal(guide(cond, uncond, 0.0), cond)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"tau_schedule": "linear"}, "tau_end"),
        ({"tau_end": 2.0}, "tau_schedule"),
        ({"cfg_first": 3, "cfg_last": 2}, "3 to 2"),
        ({"top_p": 0.0}, "top_p"),
        ({"cfg_schedule": "cosinus"}, "cfg_schedule"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], key: str) -> None:
    with pytest.raises(RecipeError, match=key):
        validate(RDPMSampling, options, "sampling options")


def test_presets_are_the_rows_of_table_3() -> None:
    options = [RDPMSampling(**{"cfg": 1.5, "tau": 2.0, **preset}) for preset in RDPMSampling.presets.values()]
    assert list(RDPMSampling.presets) == ["raw", "cfg", "cfg-linear", "gumbel"]
    assert [(preset.cfg, preset.cfg_schedule, preset.draw) for preset in options] == [
        (0.0, "linear", "argmax"),
        (1.5, "constant", "argmax"),
        (1.5, "linear", "argmax"),
        (1.5, "linear", "gumbel"),
    ]


def test_a_gpu_has_a_micro_batch_of_its_own() -> None:
    options = RDPMSampling(micro_batch=2, gpu_micro_batch=128)
    assert (options.images_at_once("cpu"), options.images_at_once("cuda")) == (2, 128)


# ---- which codes may be drawn --------------------------------------------------------------------------------------


def test_top_k_keeps_the_largest() -> None:
    logits = torch.tensor([[[0.0, 3.0, 1.0, 2.0, -1.0]]])
    assert drawing.narrow(logits, 2, 1.0).isfinite().tolist() == [[[False, True, False, True, False]]]
    assert torch.equal(drawing.narrow(logits, 0, 1.0), logits)
    assert torch.equal(drawing.narrow(logits, 9, 1.0), logits)
    assert drawing.narrow(torch.zeros(1, 1, 5), 2, 1.0).isfinite().all()  # all equal the smallest that is kept


@pytest.mark.parametrize(
    ("p", "kept"), [(1e-6, [1]), (0.49, [1]), (0.5, [1]), (0.51, [1, 3]), (0.81, [1, 2, 3]), (1.0, [0, 1, 2, 3])]
)
def test_top_p_keeps_the_fewest_of_enough_probability(p: float, kept: list[int]) -> None:
    logits = torch.tensor([0.05, 0.5, 0.15, 0.3]).log().view(1, 1, 4)
    assert drawing.narrow(logits, 0, p).isfinite().flatten().nonzero().flatten().tolist() == kept


# ---- the draw ------------------------------------------------------------------------------------------------------


def shares(logits_K: Tensor, sampling: RDPMSampling, count: int = 4000) -> Tensor:
    """How often each code is drawn, (K,)."""
    codes = drawing.draw(logits_K.expand(16, count // 16, -1), sampling, range(16), 1, 0)
    return torch.bincount(codes.flatten(), minlength=len(logits_K)) / count


@pytest.mark.parametrize("kind", ["gumbel", "inverse"])
def test_a_draw_follows_the_softmax(kind: str) -> None:
    logits = torch.tensor([0.0, 1.0, -torch.inf, 0.5])
    drawn = shares(logits, RDPMSampling.model_validate({"draw": kind}))
    np.testing.assert_allclose(drawn, logits.softmax(0), atol=0.03)  # 4 standard errors
    assert drawn[2] == 0


@pytest.mark.parametrize("kind", ["gumbel", "inverse"])
def test_a_row_is_drawn_by_its_own_index(kind: str) -> None:
    logits = torch.randn(3, 16, 64, generator=torch.Generator().manual_seed(0))
    sampling = RDPMSampling.model_validate({"draw": kind})
    codes = drawing.draw(logits, sampling, [5, 9, 2], 3, 1)
    assert torch.equal(drawing.draw(logits[[2, 0]], sampling, [2, 5], 3, 1), codes[[2, 0]])
    assert not torch.equal(drawing.draw(logits, sampling, [5, 9, 2], 4, 1), codes)
    assert not torch.equal(drawing.draw(logits, sampling, [5, 9, 2], 3, 2), codes)


def test_argmax_is_the_likeliest_code() -> None:
    logits = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(drawing.draw(logits, RDPMSampling(draw="argmax"), [0, 1], 1, 0), logits.argmax(-1))

"""From logits to codes: guidance and temperature over t, which codes may be drawn, the draws. S positions, K codes."""

import math
from typing import Any

import numpy as np
import pytest
import torch

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
    both = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(guide(both, 1.5), 2.5 * both[:2] - 1.5 * both[2:])
    assert torch.equal(guide(both, 0.0), both[:2])


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"tau_schedule": "linear"}, "tau_end"),
        ({"tau_end": 2.0}, "tau_schedule"),
        ({"cfg_first": 3, "cfg_last": 2}, "3 to 2"),
        ({"cfg_schedule": "cosinus"}, "cfg_schedule"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], key: str) -> None:
    with pytest.raises(RecipeError, match=key):
        validate(RDPMSampling, options, "sampling options")


def test_presets_are_the_rows_of_table_3() -> None:
    rows = {"raw": (0.0, "linear", "argmax"), "cfg": (1.5, "constant", "argmax")}
    rows |= {"cfg-linear": (1.5, "linear", "argmax"), "gumbel": (1.5, "linear", "gumbel")}
    options = {name: RDPMSampling(**{"cfg": 1.5, **preset}) for name, preset in RDPMSampling.presets.items()}
    assert {name: (o.cfg, o.cfg_schedule, o.draw) for name, o in options.items()} == rows


def test_top_k_keeps_the_largest() -> None:
    logits = torch.tensor([[[0.0, 3.0, 1.0, 2.0, -1.0]]])
    assert drawing.narrow(logits, 2, 1.0).isfinite().tolist() == [[[False, True, False, True, False]]]
    assert torch.equal(drawing.narrow(logits, 0, 1.0), logits)
    assert torch.equal(drawing.narrow(logits, 9, 1.0), logits)
    assert drawing.narrow(torch.zeros(1, 1, 5), 2, 1.0).isfinite().all()  # all equal the smallest that is kept


@pytest.mark.parametrize(("p", "kept"), [(1e-6, [1]), (0.5, [1]), (0.51, [1, 3]), (0.81, [1, 2, 3]), (1, [0, 1, 2, 3])])
def test_top_p_keeps_the_fewest_of_enough_probability(p: float, kept: list[int]) -> None:
    logits = torch.tensor([0.05, 0.5, 0.15, 0.3]).log().view(1, 1, 4)
    assert drawing.narrow(logits, 0, p).isfinite().flatten().nonzero().flatten().tolist() == kept


@pytest.mark.parametrize("kind", ["gumbel", "inverse"])
def test_a_draw_follows_the_softmax_by_the_index_of_its_row(kind: str) -> None:
    row = torch.tensor([0.0, 1.0, -torch.inf, 0.5])
    codes = drawing.draw(row.expand(16, 250, -1), kind, range(16), 1, 0)
    shares = torch.bincount(codes.flatten(), minlength=4) / 4000
    np.testing.assert_allclose(shares, row.softmax(0), atol=0.03)  # 4 standard errors
    assert shares[2] == 0
    logits = torch.randn(3, 16, 64, generator=torch.Generator().manual_seed(0))
    codes = drawing.draw(logits, kind, [5, 9, 2], 3, 1)
    assert torch.equal(drawing.draw(logits[[2, 0]], kind, [2, 5], 3, 1), codes[[2, 0]])
    assert not torch.equal(drawing.draw(logits, kind, [5, 9, 2], 4, 1), codes)
    assert not torch.equal(drawing.draw(logits, kind, [5, 9, 2], 3, 2), codes)
    assert torch.equal(drawing.draw(logits, "argmax", [0, 1, 2], 1, 0), logits.argmax(-1))

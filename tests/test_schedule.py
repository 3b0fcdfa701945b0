"""Noise schedules: alpha_T = 1, alpha² + beta² = 1, and each formula against numbers worked out by hand."""

import math

import pytest

from rdpm_cli.config import ScheduleConfig
from rdpm_cli.tokenizer.schedule import alphas, beta

SCHEDULES = [
    ScheduleConfig(kind="pow"),
    ScheduleConfig(kind="pow", base=0.5),
    ScheduleConfig(kind="pow", base=1.0),
    ScheduleConfig(kind="linear"),
    ScheduleConfig(kind="sin"),
    ScheduleConfig(kind="rvq"),
]


def name(schedule: ScheduleConfig) -> str:
    return f"{schedule.kind}-{schedule.base}"


@pytest.mark.parametrize("steps", [1, 2, 7, 10, 64])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
def test_schedule_rises_to_exactly_one(schedule: ScheduleConfig, steps: int) -> None:
    found = alphas(schedule, steps)
    assert len(found) == steps
    assert found[-1] == 1.0
    assert found == sorted(found)
    assert all(0 < a <= 1 for a in found)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
def test_squares_of_alpha_and_beta_sum_to_one(schedule: ScheduleConfig) -> None:
    for alpha in alphas(schedule, 10):
        assert alpha**2 + beta(alpha) ** 2 == pytest.approx(1, abs=1e-12)
    assert beta(alphas(schedule, 10)[-1]) == 0.0


@pytest.mark.parametrize(
    ("kind", "base", "expected"),
    [
        ("pow", 0.75, [0.421875, 0.5625, 0.75, 1.0]),
        ("pow", 0.5, [0.125, 0.25, 0.5, 1.0]),
        ("pow", 0.9, [0.729, 0.81, 0.9, 1.0]),
        ("pow", 1.0, [1.0, 1.0, 1.0, 1.0]),
        ("linear", 0.75, [0.25, 0.5, 0.75, 1.0]),
        ("sin", 0.75, [0.3826834323650898, math.sqrt(0.5), 0.9238795325112867, 1.0]),
        ("rvq", 0.75, [1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_formula_of_each_schedule(kind: str, base: float, expected: list[float]) -> None:
    schedule = ScheduleConfig.model_validate({"kind": kind, "base": base})
    assert alphas(schedule, 4) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", ["linear", "sin", "rvq"])
def test_base_belongs_to_pow_alone(kind: str) -> None:
    plain, based = (ScheduleConfig.model_validate({"kind": kind, "base": base}) for base in (0.75, 0.5))
    assert alphas(plain, 10) == alphas(based, 10)


def test_beta_of_known_values() -> None:
    assert [beta(0.6), beta(0.0), beta(1.0)] == pytest.approx([0.8, 1.0, 0.0], abs=1e-12)

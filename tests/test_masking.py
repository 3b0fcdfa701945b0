"""ResGen's masks: counts, closure under depth, the hypergeometric law, schedules of training and sampling."""

import itertools
from typing import get_args

import pytest
import torch
from torch import Tensor

from rdpm_cli.generator.config import MaskSchedule
from rdpm_cli.generator.masking import finest, first_slots, gamma, mask_tokens, masked_count, reveal, sampling_counts

SCHEDULES: tuple[MaskSchedule, ...] = get_args(MaskSchedule)
L, D = 6, 4


def keys(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, L, D, generator=torch.Generator().manual_seed(seed))


def closed(masked_BLD: Tensor) -> bool:
    """No masked depth has a visible finer one."""
    return not bool((masked_BLD[..., :-1] & ~masked_BLD[..., 1:]).any())


@pytest.mark.parametrize("coarse_first", [True, False])
@pytest.mark.parametrize("count", [1, 2, 11, 23, 24])
def test_a_training_mask_has_the_requested_number_of_slots(count: int, coarse_first: bool) -> None:
    masked = mask_tokens(keys(200), torch.full((200,), count), coarse_first)
    assert masked.flatten(1).sum(1).tolist() == [count] * 200
    assert not coarse_first or closed(masked)
    assert coarse_first or count in (23, 24) or not closed(masked)


def hypergeometric(n: int) -> tuple[float, float]:
    """Mean and variance of k_i for n of L·D slots."""
    return n / L, n * (1 / L) * (1 - 1 / L) * (L * D - n) / (L * D - 1)


@pytest.mark.parametrize("n", [3, 10, 20])
def test_depths_a_position_follow_the_hypergeometric_law(n: int) -> None:
    k = mask_tokens(keys(20_000), torch.full((20_000,), n), True).sum(-1).double()
    mean, variance = hypergeometric(n)
    torch.testing.assert_close(k.mean(0), torch.full((L,), mean).double(), rtol=0, atol=0.04)
    torch.testing.assert_close(k.var(0), torch.full((L,), variance).double(), rtol=0.06, atol=0)


def test_one_draw_and_two_chained_draws_have_one_law() -> None:
    count = 20_000
    first = first_slots(keys(count), torch.ones(count, L, D, dtype=torch.bool), torch.full((count,), 15))
    chained = reveal(finest(first.sum(-1), D), keys(count, 1), torch.full((count,), 5), True).sum(-1).double()
    mean, variance = hypergeometric(10)
    torch.testing.assert_close(chained.mean(0), torch.full((L,), mean).double(), rtol=0, atol=0.04)
    torch.testing.assert_close(chained.var(0), torch.full((L,), variance).double(), rtol=0.06, atol=0)


def test_random_order_masks_every_slot_alike() -> None:
    shares = mask_tokens(keys(8000), torch.full((8000,), 12), False).float().mean(0)
    torch.testing.assert_close(shares, torch.full((L, D), 0.5), rtol=0, atol=0.025)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_falls_from_one_to_zero(schedule: MaskSchedule) -> None:
    values = [gamma(schedule, r / 100, 512) for r in range(101)]
    assert values[0] == pytest.approx(1, abs=2e-3)
    assert values[-1] == pytest.approx(0, abs=1e-12)
    assert all(a > b for a, b in itertools.pairwise(values))
    means = {"square": 0.667, "cosine": 0.637, "circle": 0.785, "exp": 0.838, "linear": 0.5}
    assert sum(values) / 101 == pytest.approx(means[schedule], abs=0.01)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_training_example_masks_at_least_one_slot_and_at_most_all(schedule: MaskSchedule) -> None:
    counts = [masked_count(schedule, r, L * D) for r in (0.0, 0.3, 0.9, 0.999999)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] >= L * D - 1
    assert counts[-1] >= 1


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_sampling_reveals_something_each_step_and_everything_in_the_end(schedule: MaskSchedule) -> None:
    for slots in (1, 2, 17, 24):
        for steps in range(1, slots + 1):
            counts = sampling_counts(schedule, steps, slots)
            assert len(counts) == steps + 1
            assert (counts[0], counts[-1]) == (slots, 0)
            assert all(a > b for a, b in itertools.pairwise(counts))


def test_revealing_keeps_masks_closed_and_takes_the_best_slots() -> None:
    masked = finest(torch.tensor([[4, 2, 0, 1, 4, 3]]), D)
    scores = torch.zeros(1, L, D)
    scores[0, 1, 2] = scores[0, 4, 3] = 5.0
    scores[0, 2] = 9.0  # visible already: no slot of it counts
    after = reveal(masked, scores, torch.tensor([2]), True)
    assert after.sum(-1).tolist() == [[4, 1, 0, 1, 3, 3]]
    assert closed(after)
    loose = reveal(masked, scores, torch.tensor([2]), False)
    assert not loose[0, 1, 2]
    assert not loose[0, 4, 3]
    assert int(loose.sum()) == int(masked.sum()) - 2


def test_images_of_a_batch_reveal_their_own_number() -> None:
    masked = torch.ones(3, L, D, dtype=torch.bool)
    after = reveal(masked, keys(3), torch.tensor([0, 7, 24]), True)
    assert after.flatten(1).sum(1).tolist() == [24, 17, 0]


def test_very_noisy_confidence_reveals_by_lot() -> None:
    """tau -> infinity: a position reveals k_i (n_{t-1} - n_t) / n_{t-1} on average, whatever the confidence."""
    k = torch.tensor([4, 2, 1, 3, 4, 1])
    masked = finest(k.expand(20_000, L), D)
    gumbel = -torch.log(-torch.log(keys(20_000).clamp_min(1e-9)))
    scores = torch.arange(L).view(1, L, 1) + 1e6 * gumbel
    revealed = (masked & ~reveal(masked, scores, torch.full((20_000,), 5), True)).sum(-1).float().mean(0)
    torch.testing.assert_close(revealed, k * 5 / 15, rtol=0, atol=0.03)

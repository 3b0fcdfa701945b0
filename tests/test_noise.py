"""The noise stream: every value is a pure function of its address, and training data one of (seed, step)."""

import itertools
import math

import numpy as np
import pytest

from rdpm_cli import noise

SHAPE = (2, 3, 3)
ADDRESS = {"seed": 3, "index": 5, "view": 1, "t": 2}
# fingerprint(0) under numpy 2, with which every existing store was coded
PINNED = [-0.6294287443161011, -1.827065110206604, -0.816340446472168, 1.0874322652816772]


def test_normal_is_a_pure_function_of_its_address() -> None:
    first = noise.normal("encode", **ADDRESS, shape=SHAPE)
    noise.normal("sample", 9, 9, 9, 9, (100,))  # draws in between have no effect
    again = noise.normal("encode", **ADDRESS, shape=SHAPE)
    np.testing.assert_array_equal(first, again)
    assert first.dtype == np.float32
    assert first.shape == SHAPE


@pytest.mark.parametrize("coordinate", ADDRESS)
def test_each_coordinate_of_the_address_matters(coordinate: str) -> None:
    values = noise.normal("encode", **ADDRESS, shape=SHAPE)
    others = noise.normal("encode", **{**ADDRESS, coordinate: ADDRESS[coordinate] + 1}, shape=SHAPE)
    assert not (values == others).any()


def test_normal_is_standard_normal() -> None:
    values = noise.normal("encode", 0, 0, 0, 1, (100_000,)).astype(np.float64)
    assert abs(values.mean()) < 0.02
    assert abs(values.std() - 1) < 0.02
    assert abs((values < -1).mean() - 0.5 * math.erfc(math.sqrt(0.5))) < 0.01


@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_purposes_share_no_value(seed: int) -> None:
    """Raw 64-bit words, because two of a few thousand fp32 numbers are equal by chance."""
    words = [noise.stream(p, seed, 7).bit_generator.random_raw(512) for p in noise.PURPOSES]
    assert len(np.unique(np.concatenate(words))) == 512 * len(noise.PURPOSES)


def test_neighbouring_addresses_share_no_value() -> None:
    """A long draw does not run into the stream of the next step, view or image."""
    addresses = itertools.product((0, 1), repeat=3)
    words = [noise.stream("encode", 0, *address).bit_generator.random_raw(4096) for address in addresses]
    assert len(np.unique(np.concatenate(words))) == 8 * 4096


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1, 0, 2], [2], [1, 1]])
def test_rows_depend_neither_on_batch_nor_on_order(order: list[int]) -> None:
    indices, views, ts = [10, 11, 10, 4], [0, 0, 1, 3], [1, 2, 3, 1]
    whole = noise.normal_rows("sample", 0, indices, views, ts, SHAPE)
    subset = noise.normal_rows(
        "sample", 0, [indices[i] for i in order], [views[i] for i in order], [ts[i] for i in order], SHAPE
    )
    np.testing.assert_array_equal(subset, whole[order])


def test_rows_and_steps_read_the_same_addresses() -> None:
    indices, views, steps = [4, 9], [0, 2], 3
    all_steps = noise.normal_steps("encode", 1, indices, views, steps, SHAPE)
    assert all_steps.shape == (2, steps, *SHAPE)
    for t in range(1, steps + 1):
        rows = noise.normal_rows("encode", 1, indices, views, [t, t], SHAPE)
        np.testing.assert_array_equal(all_steps[:, t - 1], rows)
        np.testing.assert_array_equal(rows[1], noise.normal("encode", 1, 9, 2, t, SHAPE))


def test_fingerprint_is_the_start_of_the_encode_stream_and_never_changes() -> None:
    values = noise.fingerprint(0)
    assert len(values) == 16
    assert values == noise.normal("encode", 0, 0, 0, 1, (16,)).tolist()
    assert values != noise.fingerprint(1)
    assert values[: len(PINNED)] == pytest.approx(PINNED, abs=1e-5)


def test_gumbel_is_standard_gumbel() -> None:
    values = noise.gumbel(0, 0, 1, (200_000,)).astype(np.float64)
    assert abs(values.mean() - 0.5772) < 0.02
    assert abs(values.var() - math.pi**2 / 6) < 0.05
    for other in (noise.gumbel(1, 0, 1, (9,)), noise.gumbel(0, 1, 1, (9,)), noise.gumbel(0, 0, 2, (9,))):
        assert not (values[:9] == other).any()
    for x in (-1.0, 0.0, 1.0, 3.0):
        assert abs((values < x).mean() - math.exp(-math.exp(-x))) < 0.01, f"P(G < {x})"


@pytest.mark.parametrize(("count", "batch"), [(48, 16), (50, 16), (10, 16), (7, 3)])
def test_every_row_comes_once_an_epoch(count: int, batch: int) -> None:
    epochs = 3
    steps = -(-epochs * count // batch)
    rows = np.concatenate([noise.epoch_rows(0, step, batch, count) for step in range(steps)])
    for epoch in range(epochs):
        np.testing.assert_array_equal(np.sort(rows[epoch * count : (epoch + 1) * count]), np.arange(count))


def test_epochs_and_seeds_have_different_orders() -> None:
    orders = [noise.epoch_rows(seed, epoch, 64, 64).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert all(order != sorted(order) for order in orders)


def test_the_global_batch_does_not_depend_on_what_ran_before() -> None:
    straight = [noise.epoch_rows(5, step, 16, 50) for step in range(12)]
    noise._permutation.cache_clear()  # a new process that resumes at step 7
    for step in (7, 2, 11, 0):
        np.testing.assert_array_equal(noise.epoch_rows(5, step, 16, 50), straight[step])


@pytest.mark.parametrize("rows", [range(0, 16), range(16, 48), range(48, 64), range(64, 72), range(0, 72)])
def test_a_process_draws_its_slice_of_the_global_batch(rows: range) -> None:
    whole = noise.block_uniform(2, 9, range(72), 3)
    np.testing.assert_array_equal(noise.block_uniform(2, 9, rows, 3), whole[rows.start : rows.stop])


def test_block_uniform_differs_by_block_step_and_seed() -> None:
    draws = [noise.block_uniform(seed, step, range(64), 2) for seed, step in ((0, 0), (0, 1), (1, 0))]
    assert all(((draw >= 0) & (draw < 1)).all() and 0.3 < draw.mean() < 0.7 for draw in draws)
    assert len(np.unique(np.concatenate(draws).reshape(12, -1), axis=0)) == 12


def test_seeds_of_devices_differ_by_purpose_step_and_block() -> None:
    addresses = itertools.product(("device", "shared"), (0, 1), range(8), range(4))
    seeds = {noise.seed_of(*address) for address in addresses}
    assert len(seeds) == 2 * 2 * 8 * 4
    assert all(0 <= seed < 2**63 for seed in seeds)

"""The schedule: levels without gap or overlap, rows that fit, buckets that hold."""

from __future__ import annotations

import itertools

import pytest

from kdjax.rollouts.levels import (
    bucket,
    levels,
    prefill_rows,
    rounded_up,
    rows_decoded,
    rows_within,
)


@pytest.mark.parametrize("limit", [1, 7, 16, 63, 64, 65, 100, 512, 1000, 4096, 32_768])
def test_levels_cover_every_length_once(limit):
    """From 0 to the limit, each level at most as long as what came before (but for the first)."""
    made = levels(limit)
    assert made[0].first == 0
    assert made[-1].last == limit
    assert all(a.last == b.first for a, b in itertools.pairwise(made))
    for level in made:
        span = level.last - level.first
        assert 1 <= level.steps <= span
        assert (level.rounds - 1) * level.steps < span <= level.rounds * level.steps
        assert level.slots(10) == 10 + level.first + level.rounds * level.steps
    assert len(made) <= 8


def test_rows_and_budgets():
    """Powers of two a device; the cache never over its budget but for one row a device."""
    for devices in (1, 2, 8):
        for count in (1, 2, 3, 17, 64, 100):
            size = rounded_up(count, devices)
            assert size % devices == 0
            assert count <= size < max(2 * count, devices + 1) + devices
        for budget in (1.0, 999.0, 12_345.0):
            most = rows_within(budget, 100.0, 64, devices)
            assert most % devices == 0
            assert most == devices or (100.0 * most / devices <= budget and most <= 64)


def test_few_rows_are_padding():
    """A draw's rows are decoded as at most a quarter more (20 as 20, 48 as 48), and no later batch
    of it is larger; those of a batch are never more than a power of two."""
    for devices in (1, 8):
        for whole in range(1, 600):
            size = rows_decoded(whole, whole, devices)
            assert size % devices == 0
            assert whole <= size <= max(1.25 * whole, whole + devices)
            for count in {1, whole // 3 + 1, whole}:
                assert count <= rows_decoded(count, whole, devices) <= size
                assert rows_decoded(count, whole, devices) <= rounded_up(count, devices)
    assert [rows_decoded(n, n) for n in (20, 48, 64, 440)] == [20, 48, 64, 448]


def test_buckets_hold():
    """The narrowest of three widths; more than the widest is the caller's mistake."""
    assert [bucket(n, 64) for n in (1, 16, 17, 32, 33, 64)] == [16, 16, 32, 32, 64, 64]
    assert [prefill_rows(n) for n in (1, 64, 4096, 8192, 9000)] == [8192, 128, 2, 1, 1]
    assert [prefill_rows(320, tokens) for tokens in (1.0, 1456.4, 1e9)] == [1, 4, 16]
    with pytest.raises(StopIteration):
        bucket(65, 64)

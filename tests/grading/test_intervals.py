"""Intervals and errors against synthetic results whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from kdjax.grading import intervals
from kdjax.grading.intervals import interval, over_problems_and_seeds, seed_variance

TRUTH = 0.05


def drawn(rng, seeds: int, problems: int, *, problem: float, seed: float, noise: float):
    """Values [seeds, problems] of random problems, random seeds, and noise; TRUTH in the mean."""
    return (
        TRUTH
        + problem * rng.normal(size=problems)
        + seed * rng.normal(size=(seeds, 1))
        + noise * rng.normal(size=(seeds, problems))
    )


REGIMES = [
    (1, dict(problem=0.2, seed=0.0, noise=0.2)),
    (3, dict(problem=0.2, seed=0.0, noise=0.2)),
    (3, dict(problem=0.2, seed=0.03, noise=0.2)),
    (3, dict(problem=0.2, seed=0.1, noise=0.2)),
    (3, dict(problem=0.0, seed=0.0, noise=0.3)),
    (5, dict(problem=0.1, seed=0.02, noise=0.3)),
]


@pytest.mark.parametrize(("seeds", "spread"), REGIMES)
def test_coverage(seeds, spread, monkeypatch):
    """The truth lies in the 95 % interval in 92 to 98.5 % of 500 studies, whatever dominates."""
    monkeypatch.setattr(intervals, "DRAWS", 1000)
    rng = np.random.default_rng(7)
    found = [interval(drawn(rng, seeds, 80, **spread), seed=n) for n in range(500)]
    covered = np.mean([low <= TRUTH <= high for _, low, high in found])
    assert 0.92 <= covered <= 0.985


@pytest.mark.parametrize(("seeds", "spread"), REGIMES[1:4])
def test_standard_error(seeds, spread):
    """Its mean square over 2,000 studies is the variance of their means; never less by 10 %."""
    rng = np.random.default_rng(3)
    found = [over_problems_and_seeds(drawn(rng, seeds, 40, **spread)) for _ in range(2000)]
    error = np.sqrt(np.mean([x.standard_error**2 for x in found]))
    true = np.std([x.mean for x in found])
    assert 0.95 * true <= error <= 1.15 * true


def test_pairing_narrows():
    """Two cells on the same problems: the difference is far surer than the cells are."""
    rng = np.random.default_rng(0)
    difficulty = rng.uniform(size=100)
    first, second = (
        np.clip(difficulty + gain + 0.05 * rng.normal(size=(3, 100)), 0, 1) for gain in (0, 0.05)
    )
    width = np.subtract(*interval(second - first)[:0:-1])
    unpaired = np.hypot(*(np.subtract(*interval(x)[:0:-1]) for x in (first, second)))
    assert width < 0.3 * unpaired


def test_one_seed_is_the_error_over_problems():
    """As Avg@k has always been reported."""
    values = np.array([[0.0, 0.5, 1.0, 0.25]])
    error = values.std(ddof=1) / 2
    assert over_problems_and_seeds(values) == pytest.approx((values.mean(), error))
    low, high = interval(np.tile(values, 25))[1:]
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 10, rel=0.05)


def test_seeds_that_differ_widen_it():
    """Three seeds one apart: their t has two degrees of freedom, and its 97.5 % lies at 4.30."""
    values = np.repeat([[0.0], [1.0], [2.0]], 50, axis=1)
    assert seed_variance(values) == pytest.approx(1.0)
    estimate, low, high = interval(values)
    assert estimate == pytest.approx(1.0)
    assert (high - low) / 2 == pytest.approx(4.30 / np.sqrt(3), rel=0.05)


def test_deterministic():
    """The same values have the same interval, always."""
    values = np.random.default_rng(1).normal(size=(3, 30))
    assert interval(values) == interval(values.copy())
    assert interval(values, seed=1) != interval(values, seed=2)


def test_how_many_are_held_does_not_matter(monkeypatch):
    """Memory decides nothing: the same draws, one at a time or all at once."""
    values = np.random.default_rng(1).normal(size=(2, 30))
    whole = interval(values)
    monkeypatch.setattr(intervals, "HELD", 77)
    assert interval(values) == whole

"""Intervals, p-values and their correction: against formulas by hand, and laws between them.
What they cover is simulated in test_coverage.py."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from kdjax.grading.intervals import (
    half_width,
    holm,
    interval,
    least_difference,
    over_problems_and_seeds,
    p_value,
    spread,
)

SHARES, DIFFERENCES = (0.0, 1.0), (-1.0, 1.0)


def drawn(rng, seeds: int, problems: int, *, problem: float, seed: float, noise: float):
    """Values [seeds, problems] of random problems, random seeds, and noise."""
    return (
        problem * rng.normal(size=problems)
        + seed * rng.normal(size=(seeds, 1))
        + noise * rng.normal(size=(seeds, problems))
    )


@pytest.mark.parametrize(
    "spread_of",
    [
        dict(problem=0.2, seed=0.0, noise=0.2),
        dict(problem=0.2, seed=0.03, noise=0.2),
        dict(problem=0.2, seed=0.1, noise=0.2),
    ],
)
def test_standard_error(spread_of):
    """Its mean square over 2,000 studies is the variance of their means; never less by 5 %."""
    rng = np.random.default_rng(3)
    found = [over_problems_and_seeds(drawn(rng, 3, 40, **spread_of)) for _ in range(2000)]
    error = np.sqrt(np.mean([x.standard_error**2 for x in found]))
    true = np.std([x.mean for x in found])
    assert 0.95 * true <= error <= 1.1 * true


def test_parts_by_hand():
    """Two seeds, two problems: means of problems .2 and .6, of seeds .3 and .5, .1 left in each."""
    found = spread(np.array([[0.2, 0.4], [0.2, 0.8]]))
    assert found.mean == pytest.approx(0.4)
    parts = (found.of_problems, found.of_seeds, found.residual)
    assert parts == pytest.approx((0.08 / 2, 0.02 / 2, 4 * 0.01 / 4))
    t = stats.t.ppf(0.975, 1)
    assert half_width(found, 0.05) == pytest.approx(t * math.sqrt(0.03 + 0.01))


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


def test_one_seed_is_a_t_interval_over_problems():
    """As Avg@k has always been reported, with Student's t of problems - 1 degrees of freedom."""
    values = np.array([[0.0, 0.5, 1.0, 0.25]])
    error = values.std(ddof=1) / 2
    assert over_problems_and_seeds(values) == pytest.approx((values.mean(), error))
    expected = stats.t.interval(0.95, 3, values.mean(), error)
    assert interval(values)[1:] == pytest.approx(expected)


def test_seeds_that_differ_decide_it():
    """Three seeds that problems don't differ by: the plain t interval over the seeds' means."""
    values = np.repeat([[0.0], [1.0], [2.0]], 50, axis=1)
    expected = stats.t.interval(0.95, 2, 1.0, 1 / math.sqrt(3))
    assert interval(values)[1:] == pytest.approx(expected)
    assert p_value(values) == pytest.approx(stats.ttest_1samp([0.0, 1.0, 2.0], 0).pvalue)


def test_never_narrower_than_over_problems():
    """Seeds whose means are equal by chance: what problems alone leave open is left open."""
    values = np.array([[0.1, 0.4, 0.9, 0.2], [0.3, 0.2, 0.9, 0.2]])
    assert spread(values).of_seeds == pytest.approx(0)
    assert interval(values)[1:] == pytest.approx(interval(values.mean(0, keepdims=True))[1:])


@pytest.mark.parametrize("seeds", [1, 3])
def test_one_problem_says_nothing(seeds):
    """One problem has no spread: no interval, no p-value, no smallest difference, no error."""
    values = np.array([[0.125], [0.25], [-0.1]])[:seeds]
    estimate, *ends = interval(values, DIFFERENCES)
    assert estimate == values.mean()
    unknown = [*ends, p_value(values), least_difference(values)]
    assert np.isnan([*unknown, over_problems_and_seeds(values).standard_error]).all()


def test_one_sample_a_problem_is_wilsons_interval():
    """Right or wrong once a problem: Wilson's score interval by its textbook formula, of problems
    - 1 draws and Student's t, against scipy's with the quantile of the normal."""
    right, problems = 27, 30
    values = np.r_[np.ones(right), np.zeros(problems - right)][None]
    _, low, high = interval(values, SHARES)
    t, n = stats.t.ppf(0.975, problems - 1), problems - 1
    share = right / problems
    middle = (share + t**2 / (2 * n)) / (1 + t**2 / n)
    half = t / (1 + t**2 / n) * math.sqrt(share * (1 - share) / n + t**2 / (4 * n**2))
    assert (low, high) == pytest.approx((middle - half, middle + half))
    normal = stats.binomtest(right, problems).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((normal.low, normal.high), abs=0.02)


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("seeds", [1, 3])
def test_all_right_or_all_wrong_has_a_width(share, seeds):
    """30 of 30: Wilson's limit of none in 30, on the side where there is room."""
    _, low, high = interval(np.full((seeds, 30), share), SHARES)
    unseen = stats.t.ppf(0.975, 29) ** 2
    unseen /= 30 + unseen
    assert (low, high) == pytest.approx((1 - unseen, 1) if share else (0, unseen))


def test_no_difference_anywhere_is_not_sure_to_be_none():
    """100 problems that two cells answer alike: the difference may be 3.8 points; without bounds
    nothing is known."""
    _, low, high = interval(np.zeros((1, 100)), DIFFERENCES)
    assert (low, high) == pytest.approx((-0.0379, 0.0379), abs=1e-4)
    assert p_value(np.zeros((1, 100)), 0.0, DIFFERENCES) == 1.0
    assert np.isnan(interval(np.zeros((1, 100)))[1:]).all()
    assert math.isnan(p_value(np.zeros((1, 100))))


def test_bounds_hold_whatever_is_drawn():
    """No end of an interval of shares or of differences lies beyond what can be, in 500 studies of
    few seeds and problems; the estimate lies between the ends."""
    rng = np.random.default_rng(5)
    for _ in range(500):
        seeds, problems = rng.integers(1, 4), rng.integers(2, 12)
        chance = np.clip(rng.beta(0.3, 0.3, problems) + rng.normal(0, 0.3, (seeds, 1)), 0, 1)
        first, second = (rng.binomial(4, chance) / 4 for _ in range(2))
        for values, bounds in ((first, SHARES), (first - second, DIFFERENCES)):
            estimate, low, high = interval(values, bounds)
            assert bounds[0] <= low <= estimate + 1e-12
            assert estimate - 1e-12 <= high <= bounds[1]


@pytest.mark.parametrize("bounds", [None, DIFFERENCES])
@pytest.mark.parametrize("seeds", [1, 3])
def test_the_p_value_is_where_the_interval_ends(bounds, seeds):
    """The interval holds what is not rejected: at either end p is 5 %; inside it is more."""
    values = np.random.default_rng(0).uniform(-0.3, 0.9, (seeds, 12))
    estimate, low, high = interval(values, bounds)
    for end in (low, high):
        assert p_value(values, end, bounds) == pytest.approx(0.05)
    assert p_value(values, (low + estimate) / 2, bounds) > 0.05
    assert p_value(values, estimate, bounds) == pytest.approx(1)
    same = np.full((seeds, 12), 0.5)
    _, low, high = interval(same, DIFFERENCES)
    assert p_value(same, low, DIFFERENCES) == pytest.approx(0.05)
    assert p_value(same, high, DIFFERENCES) == pytest.approx(0.05)


def test_a_mean_beyond_its_bounds_has_none():
    """An engine that returns more tokens than it was asked for: the plain interval."""
    values = np.array([[7.0, 9.0, 11.0]])
    assert interval(values, (0, 8)) == interval(values)
    assert p_value(values, 5.0, (0, 8)) == p_value(values, 5.0)


def test_what_can_not_be_is_rejected():
    """A loss of more than all is no hypothesis."""
    assert p_value(np.array([[0.1, 0.2, 0.0]]), -1.5, DIFFERENCES) == 0.0


def test_holm_by_hand():
    """The smallest p times their number, the next times one less, and never falling; what is not
    known counts as one more claim."""
    assert holm([0.04, 0.001, 0.03]) == pytest.approx([0.06, 0.003, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.02, math.nan])[0] == pytest.approx(0.04)
    assert math.isnan(holm([0.02, math.nan])[1])
    assert holm([]) == []


def test_the_least_difference_has_the_power_that_it_says():
    """Of 100 normal differences around it, 80 % of studies reject none, at either level."""
    rng = np.random.default_rng(2)
    for level in (0.05, 0.01):
        least = least_difference(np.tile([1.0, -1.0], 50)[None], level) / math.sqrt(100 / 99)
        p_values = [p_value(rng.normal(least, 1.0, (1, 100))) for _ in range(1000)]
        assert 0.76 <= np.mean(np.array(p_values) < level) <= 0.84

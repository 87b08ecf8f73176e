"""Means over problems and seeds: standard errors, 95 % intervals, p-values. No JAX.

x[s, p] is a number of problem p after training with seed s (a share of its samples, tokens, nats),
or the difference of two cells at the same problem and seed. Problems and seeds are both samples of
many, so the mean has three parts of variance (two-way analysis of variance, both ways random):

- A = variance of the problems' means over seeds / problems: problems, and samples;
- B = variance of the seeds' means over problems / seeds: seeds, and samples;
- R = mean square of what is left / (seeds x problems): samples. It is in A and in B.

An interval's half width h is the larger of t_P sqrt(A) and sqrt(t_P^2 max(A - R, 0) + t_S^2 B):
each part has its own quantile of Student's t, of problems - 1 and seeds - 1 degrees of freedom.
Sums of squares of such parts cover at least what is asked where the parts are independent (Banerjee
1961, Sankhya A 23; Howe 1974, JASA 69:789). R is taken out once, of the problems' part: out of the
seeds', where few degrees of freedom make the estimate uncertain, it makes intervals too narrow.
tests/grading/test_coverage.py simulates what is covered of Bernoulli counts (docs/study.md).

- One seed: B is not known, h = t_P sqrt(A), and the interval is over problems alone: of this
  student, not of its training.
- One problem: nothing is known; the ends are NaN.
- Between bounds (shares, lengths): Wilson's interval with the effective number of draws that h
  stands for, and so never beyond them (Franco, Little, Louis, Slud 2019, JSSAM 7:334).
- All problems and seeds alike: others may lie at a bound. As P problems don't, they may be a share
  t_P^2 / (P + t_P^2) of all (Wilson's upper limit): the interval reaches so far to each bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import stdtr, stdtrit

LEVEL = 0.05
"""How often an interval misses, and a true null hypothesis is rejected."""

POWER = 0.8
"""How often the smallest difference that could have been seen is seen."""

Bounds = tuple[float, float] | None
"""Between what a mean can lie; None where that is not known."""


class Estimate(NamedTuple):
    """A mean and its standard error."""

    mean: float
    standard_error: float


class Interval(NamedTuple):
    """A mean and the ends of its 95 % interval, NaN where they are not known."""

    estimate: float
    low: float
    high: float


class Spread(NamedTuple):
    """The mean of values [seeds, problems] and the parts A, B and R of its variance."""

    mean: float
    seeds: int
    problems: int
    of_problems: float
    of_seeds: float
    residual: float


def over_problems(values: Sequence[float] | np.ndarray) -> Estimate:
    """Mean and clustered standard error of one value a problem; NaN error for a single one.

    Samples of one problem are not independent, so the problem is the unit: treating samples as
    independent covers 29 to 39 % instead of 95 % on sets of AIME's size.

    >>> over_problems([0.0, 1.0])
    Estimate(mean=0.5, standard_error=0.5)
    """
    values = np.asarray(values, np.float64)
    if values.size == 0:
        raise ValueError("over_problems: no problems; give at least one")
    return over_problems_and_seeds(values[None])


def over_problems_and_seeds(values_sp: np.ndarray) -> Estimate:
    """Mean of values [seeds, problems] and its standard error, sqrt(max(A, max(A - R, 0) + B)).

    One seed: the error is over problems alone. One problem: it is NaN.

    >>> over_problems_and_seeds(np.array([[0.0, 1.0]]))
    Estimate(mean=0.5, standard_error=0.5)
    """
    found = spread(values_sp)
    return Estimate(found.mean, _width(found, lambda degrees: 1.0))


def spread(values_sp: np.ndarray) -> Spread:
    """The parts of the variance of a mean over [seeds, problems]; 0 for what one seed can't show,
    NaN for what one problem can't."""
    values_sp = np.asarray(values_sp, np.float64)
    seeds, problems = values_sp.shape
    mean = float(values_sp.mean())
    if problems == 1:
        return Spread(mean, seeds, problems, math.nan, math.nan, math.nan)
    of_problems = float(values_sp.mean(axis=0).var(ddof=1)) / problems
    if seeds == 1:
        return Spread(mean, seeds, problems, of_problems, 0.0, 0.0)
    of_seeds, means_p = values_sp.mean(axis=1), values_sp.mean(axis=0)
    left = values_sp - of_seeds[:, None] - means_p + mean
    residual = float((left**2).sum()) / ((seeds - 1) * (problems - 1) * seeds * problems)
    return Spread(mean, seeds, problems, of_problems, float(of_seeds.var(ddof=1)) / seeds, residual)


def interval(values_sp: np.ndarray, bounds: Bounds = None) -> Interval:
    """95 % interval of the mean of values [seeds, problems], as the module says.

    For the difference of two cells give the differences: they are then paired by problem and seed.

    Args:
        values_sp: [seeds, problems].
        bounds: of the values, such as (0, 1) of shares and (-1, 1) of their differences; a mean
            that lies beyond them has none.

    >>> low, high = interval(np.ones((1, 30)), (0, 1))[1:]
    >>> round(low, 3), high  # 30 of 30: as Wilson's interval, with Student's t
    (0.878, 1.0)
    """
    found = spread(values_sp)
    if found.problems == 1:
        return Interval(found.mean, math.nan, math.nan)
    width = half_width(found, LEVEL)
    if _is_nothing(width, found.mean):
        unseen = math.nan if bounds is None else _unseen(found.problems, LEVEL)
        low, high = bounds or (math.nan, math.nan)
        mean = found.mean
        return Interval(mean, mean - unseen * (mean - low), mean + unseen * (high - mean))
    if bounds is None or _room(found.mean, bounds) <= 0:
        return Interval(found.mean, found.mean - width, found.mean + width)
    return Interval(found.mean, *_wilson(found.mean, width, bounds))


def half_width(found: Spread, level: float) -> float:
    """h of the module's text for an interval that misses in `level` of all cases; NaN for one
    problem."""
    return _width(found, lambda degrees: _quantile(degrees, level))


def p_value(values_sp: np.ndarray, null: float = 0.0, bounds: Bounds = None) -> float:
    """The level whose interval ends at `null`: two-sided, of the mean being that. NaN for one
    problem.

    Args:
        values_sp, bounds: as in `interval`.
        null: the mean that is doubted.

    >>> values = np.array([[0.1, 0.3, 0.2, 0.2]])
    >>> round(p_value(values, interval(values).low), 6)
    0.05
    """
    found = spread(values_sp)
    if found.problems == 1:
        return math.nan
    distance, mean = abs(found.mean - null), found.mean
    if bounds is not None and not bounds[0] < null < bounds[1]:
        return 0.0 if distance else 1.0
    if _is_nothing(half_width(found, LEVEL), mean):
        if bounds is None or not distance:
            return math.nan if bounds is None else 1.0
        unseen = distance / abs(mean - (bounds[0] if mean > null else bounds[1]))
        return _tail(found.problems - 1, math.sqrt(found.problems * unseen / (1 - unseen)))
    if bounds is not None and _room(mean, bounds) > 0:  # Wilson's variance is that at the null
        distance *= math.sqrt(_room(mean, bounds) / _room(null, bounds))
    return _solve(lambda level: half_width(found, level), distance)


def least_difference(values_sp: np.ndarray, level: float = LEVEL) -> float:
    """The smallest mean that values of this spread show to be other than 0, at this level, in 80 %
    of all cases: h(level) + h(0.4), as t quantiles of both errors add up (Bloom 1995, Evaluation
    Review 19:547). NaN where nothing is known of the spread.

    >>> round(least_difference(np.array([[0.1, -0.1] * 50])), 4)  # (1.98 + 0.85) 0.01
    0.0284
    """
    found = spread(values_sp)
    width = half_width(found, level)
    if _is_nothing(width, found.mean):
        return math.nan
    return width + half_width(found, 2 * (1 - POWER))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of a family, corrected for their number: to reject those under `level` rejects any
    true hypothesis of the family in at most `level` of all cases, whatever their dependence (Holm
    1979, Scandinavian Journal of Statistics 6:65). NaN counts as 1 and stays NaN.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    known = [1.0 if math.isnan(p) else p for p in p_values]
    corrected, largest = list(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(known)), key=known.__getitem__)):
        largest = max(largest, min(1.0, (len(known) - rank) * known[place]))
        if not math.isnan(p_values[place]):
            corrected[place] = largest
    return corrected


def _width(found: Spread, quantile: Callable[[int], float]) -> float:
    """The larger of q_P sqrt(A) and sqrt(q_P^2 max(A - R, 0) + q_S^2 B)."""
    if found.problems == 1:
        return math.nan
    squared = quantile(found.problems - 1) ** 2
    whole = squared * found.of_problems
    if found.seeds == 1:
        return math.sqrt(whole)
    rest = squared * max(found.of_problems - found.residual, 0.0)
    return math.sqrt(max(whole, rest + quantile(found.seeds - 1) ** 2 * found.of_seeds))


def _quantile(degrees: int, level: float) -> float:
    return -float(stdtrit(degrees, level / 2))


def _tail(degrees: int, quantile: float) -> float:
    """The level that belongs to a quantile of Student's t, two-sided."""
    return 2 * float(stdtr(degrees, -quantile))


def _is_nothing(width: float, mean: float) -> bool:
    """Whether a width is of rounding alone."""
    return width <= 1e-9 * max(1.0, abs(mean))


def _unseen(problems: int, level: float) -> float:
    """Up to which share of all problems may be unlike all of so many."""
    squared = _quantile(problems - 1, level) ** 2
    return squared / (problems + squared)


def _wilson(mean: float, width: float, bounds: tuple[float, float]) -> tuple[float, float]:
    """The means m with (mean - m)^2 <= (m - low) (high - m) / draws, where width^2 = (mean - low)
    (high - mean) / draws."""
    low, high = bounds
    per_draw = width**2 / _room(mean, bounds)
    middle = (mean + per_draw * (low + high) / 2) / (1 + per_draw)
    half = math.sqrt(width**2 + (per_draw * (high - low) / 2) ** 2) / (1 + per_draw)
    return max(low, middle - half), min(high, middle + half)


def _room(mean: float, bounds: tuple[float, float]) -> float:
    return (mean - bounds[0]) * (bounds[1] - mean)


def _solve(width: Callable[[float], float], wanted: float) -> float:
    """The level in 1e-15 .. 1 at which a width that falls with it is as wanted, by bisection."""
    low, high = math.log(1e-15), 0.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if width(math.exp(middle)) > wanted else (low, middle)
    return math.exp(high)

"""Means over seeds and problems with standard errors and 95 % intervals. NumPy alone, no JAX."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """A mean over problems and its standard error (their deviation / sqrt(problems))."""

    mean: float
    standard_error: float


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
    error = values.std(ddof=1) / np.sqrt(values.size) if values.size > 1 else np.nan
    return Estimate(float(values.mean()), float(error))


DRAWS = 10_000
HELD = 2**22
"""Problems drawn at a time, over all draws: their memory, which nothing depends on."""


class Interval(NamedTuple):
    """A mean and the ends of its 95 % interval."""

    estimate: float
    low: float
    high: float


def over_problems_and_seeds(values_sp: np.ndarray) -> Estimate:
    """Mean of values [seeds, problems] and its standard error: both are samples of many.

    The variance is that of a problem's mean over seeds / problems, and of the effect of a seed /
    seeds (`seed_variance`). One seed: the error is over problems alone.

    >>> over_problems_and_seeds(np.array([[0.0, 1.0]]))
    Estimate(mean=0.5, standard_error=0.5)
    """
    seeds, problems = values_sp.shape
    if problems == 1:
        return Estimate(float(values_sp.mean()), float("nan"))
    of_problems = values_sp.mean(axis=0).var(ddof=1) / problems
    error = np.sqrt(of_problems + seed_variance(values_sp) / seeds)
    return Estimate(float(values_sp.mean()), float(error))


def interval(values_sp: np.ndarray, seed: int = 0) -> Interval:
    """95 % percentile interval of the mean of values [seeds, problems]; deterministic.

    Problems are drawn with replacement, together with all their seeds. To each draw the effect of
    the seeds is added: their own variance / seeds, times Student's t with seeds - 1 degrees of
    freedom. Resampling three seeds in place of that covers 82 % where seeds differ most. For the
    difference of two cells give the differences: they are then paired by problem and seed.

    >>> interval(np.ones((3, 10)))
    Interval(estimate=1.0, low=1.0, high=1.0)
    """
    seeds, problems = values_sp.shape
    generator, means_p = np.random.default_rng(seed), values_sp.mean(axis=0)
    at_once = max(1, HELD // problems)
    drawn = np.concatenate(
        [
            means_p[generator.integers(0, problems, (min(at_once, DRAWS - n), problems))].mean(1)
            for n in range(0, DRAWS, at_once)
        ]
    )
    if seeds > 1:
        error = np.sqrt(seed_variance(values_sp) / seeds)
        drawn = drawn + error * generator.standard_t(seeds - 1, DRAWS)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Interval(float(values_sp.mean()), float(low), float(high))


def seed_variance(values_sp: np.ndarray) -> float:
    """Variance of the effect of a seed on the mean, without what the noise of responses makes of
    it: (mean square between seeds - residual mean square) / problems, or 0 (two-way analysis of
    variance, both ways random)."""
    seeds, problems = values_sp.shape
    if seeds == 1 or problems == 1:
        return 0.0
    of_seeds, of_problems = values_sp.mean(axis=1), values_sp.mean(axis=0)
    left = values_sp - of_seeds[:, None] - of_problems[None, :] + values_sp.mean()
    residual = (left**2).sum() / ((seeds - 1) * (problems - 1))
    return max(0.0, float(of_seeds.var(ddof=1) - residual / problems))

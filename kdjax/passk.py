"""Avg@k and Pass@k with standard errors over problems. Counts in, numbers out; no JAX."""

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


def avg_at_k(correct: Sequence[int], samples: int) -> Estimate:
    """Avg@k: the mean over problems of correct / samples, with samples = k draws a problem.

    >>> avg_at_k([0, 4], samples=4).mean
    0.5
    """
    return over_problems(_counts(correct, samples) / samples)


def pass_at_k(correct: Sequence[int], samples: int, k: int) -> Estimate:
    """Unbiased Pass@k: the mean over problems of 1 - C(n - c, k) / C(n, k), from n >= k samples.

    n samples, c correct ones (arXiv 2107.03374). With n = k it is "any correct": legal, high
    variance. Errors: k outside 1..n.

    >>> pass_at_k([1], samples=2, k=1).mean
    0.5
    """
    return over_problems(pass_by_problem(correct, samples, k))


def pass_by_problem(correct: Sequence[int], samples: int, k: int) -> np.ndarray:
    """Pass@k of each problem, as `pass_at_k` averages it.

    >>> pass_by_problem([0, 1], samples=2, k=1)
    array([0. , 0.5])
    """
    if not 1 <= k <= samples:
        raise ValueError(
            f"pass_at_k: k must be in 1..{samples} (the samples drawn a problem), got {k}"
        )
    wrong = samples - _counts(correct, samples)
    draws = np.arange(k)
    return 1 - np.prod(np.maximum(wrong[:, None] - draws, 0) / (samples - draws), axis=1)


def _counts(correct: Sequence[int], samples: int) -> np.ndarray:
    counts = np.asarray(correct)
    if counts.ndim != 1 or (counts < 0).any() or (counts > samples).any():
        raise ValueError(
            f"correct counts must be one number in 0..{samples} a problem, got {correct!r}"
        )
    return counts

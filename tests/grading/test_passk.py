"""Avg@k and Pass@k: against enumeration of every draw, and standard errors against simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from kdjax.grading.intervals import over_problems
from kdjax.grading.passk import avg_at_k, pass_at_k


def by_enumeration(correct: int, samples: int, k: int) -> float:
    """The share of all k-subsets of the samples that hold a correct one."""
    answers = [True] * correct + [False] * (samples - correct)
    return float(np.mean([any(subset) for subset in itertools.combinations(answers, k)]))


@pytest.mark.parametrize("samples", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_subsets(samples):
    """Unbiased Pass@k = the mean over all k-subsets of the n samples, for every c and k."""
    for k in range(1, samples + 1):
        counts = range(samples + 1)
        for correct in counts:
            expected = by_enumeration(correct, samples, k)
            assert pass_at_k([correct], samples, k).mean == pytest.approx(expected, abs=1e-12)
        whole = np.mean([by_enumeration(c, samples, k) for c in counts])
        assert pass_at_k(counts, samples, k).mean == pytest.approx(whole, abs=1e-12)


def test_pass_at_k_is_unbiased():
    """Over n draws of a problem solved with chance s its expectation is 1 - (1 - s)^k."""
    samples, chance = 6, 0.3
    for k in (1, 2, 4, 6):
        expectation = sum(
            math.comb(samples, c)
            * chance**c
            * (1 - chance) ** (samples - c)
            * pass_at_k([c], samples, k).mean
            for c in range(samples + 1)
        )
        assert expectation == pytest.approx(1 - (1 - chance) ** k, abs=1e-12)


def test_pass_at_one_is_the_average():
    """Pass@1 = Avg@k, standard error included."""
    correct = [0, 3, 8, 5, 1]
    assert pass_at_k(correct, 8, 1) == pytest.approx(avg_at_k(correct, 8), abs=1e-12)
    assert avg_at_k(correct, 8).mean == pytest.approx(np.mean(correct) / 8)


def test_pass_at_all_samples_is_any_correct():
    """With k = n it is the share of problems with at least one correct sample."""
    assert pass_at_k([0, 1, 8, 0], 8, 8).mean == 0.5


def test_pass_at_k_rises_with_k():
    """More draws never hurt, and a problem solved at times gains strictly."""
    means = [pass_at_k([2, 1, 0], 16, k).mean for k in range(1, 17)]
    assert all(a < b for a, b in itertools.pairwise(means[:15]))


def test_large_counts_do_not_overflow():
    """At n = 10,000 the quotient of binomials is still exact to rounding."""
    exact = 1 - math.comb(9_900, 100) / math.comb(10_000, 100)
    assert pass_at_k([100], 10_000, 100).mean == pytest.approx(exact, rel=1e-10)


def test_standard_error_by_simulation():
    """The reported error is the spread of the mean over many draws of problems and samples."""
    rng = np.random.default_rng(0)
    problems, samples, k = 40, 8, 4
    chances = rng.beta(0.5, 0.5, size=(1_500, problems))
    correct = rng.binomial(samples, chances)
    runs = [pass_at_k(row, samples, k) for row in correct]
    spread = np.std([run.mean for run in runs], ddof=1)
    reported = np.sqrt(np.mean([run.standard_error**2 for run in runs]))
    assert reported == pytest.approx(spread, rel=0.08)


def test_errors_are_over_problems():
    """Sample deviation over problems / sqrt(problems); a single problem has none (NaN)."""
    estimate = over_problems([0.25, 0.5, 1.0])
    assert estimate.standard_error == pytest.approx(np.std([0.25, 0.5, 1.0], ddof=1) / 3**0.5)
    assert math.isnan(over_problems([0.7]).standard_error)
    assert over_problems([0.7]).mean == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: over_problems([]), "no problems"),
        (lambda: pass_at_k([1], 4, 0), r"k must be in 1..4 .*, got 0"),
        (lambda: pass_at_k([1], 4, 5), r"k must be in 1..4 .*, got 5"),
        (lambda: pass_at_k([5], 4, 1), r"in 0..4 a problem, got \[5\]"),
        (lambda: pass_at_k([-1], 4, 1), r"in 0..4 a problem, got \[-1\]"),
        (lambda: avg_at_k([[1]], 4), r"one number in 0..4 a problem"),
        (lambda: avg_at_k([], 4), "no problems"),
    ],
)
def test_errors(call, says):
    """Counts and k out of range are errors that say the range, never a number."""
    with pytest.raises(ValueError, match=says):
        call()

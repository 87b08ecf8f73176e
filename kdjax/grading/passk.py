"""Avg@k and Pass@k with standard errors over problems. Counts in, numbers out; no JAX."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from kdjax.grading.equivalence import is_equivalent
from kdjax.grading.intervals import Estimate, over_problems


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


def majority_by_problem(
    answers: Sequence[Sequence[str | None]], correct: Sequence[Sequence[bool]], k: int
) -> np.ndarray:
    """Majority@k of each problem, from the n >= k answers drawn to it and whether each is right.

    The samples are cut, in the order drawn, into n // k runs of k; what is left over is not used.
    In each the answers vote by the class that they are equivalent to, None does not vote, and a tie
    goes to the answer drawn first. The value is the share of runs whose winner is right; without a
    vote it is wrong. As samples are drawn independently this is an unbiased estimate of what k
    draws give. Errors: k outside 1..n.

    >>> majority_by_problem([["7", "8", "07", None]], [[True, False, True, False]], k=4)
    array([1.])
    """
    samples = len(answers[0])
    if not 1 <= k <= samples:
        raise ValueError(
            f"majority_by_problem: k must be in 1..{samples} (the samples drawn a problem), got {k}"
        )
    starts = range(0, samples - k + 1, k)
    return np.array(
        [
            np.mean([_winner_is_right(votes[at : at + k], right[at : at + k]) for at in starts])
            for votes, right in zip(map(classes, answers), correct, strict=True)
        ]
    )


def classes(answers: Sequence[str | None]) -> list[int | None]:
    """Of each answer, the place of the first one that it is equivalent to; None for no answer.

    >>> classes(["7", "1/2", None, "0.5"])
    [0, 1, None, 1]
    """
    first: list[int] = []
    found: list[int | None] = []
    for place, answer in enumerate(answers):
        own = None
        if answer is not None:
            own = next((f for f in first if is_equivalent(answer, answers[f] or "")), place)
            if own == place:
                first.append(place)
        found.append(own)
    return found


def _winner_is_right(votes: Sequence[int | None], right: Sequence[bool]) -> bool:
    counts = Counter(vote for vote in votes if vote is not None)
    if not counts:
        return False
    winner = counts.most_common(1)[0][0]  # of equal counts the first that was met
    return bool(right[votes.index(winner)])

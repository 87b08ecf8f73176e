"""Majority@k: how often the most frequent of k answers is right. Answers in, numbers out; no
JAX."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from kdjax.equivalence import is_equivalent


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

"""Majority@k: against every order of the draws, and by hand."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from kdjax.grading.passk import classes, majority_by_problem


def by_hand(answers: tuple[str | None, ...], gold: str) -> bool:
    """Whether the most frequent answer is the gold one, the first drawn of equally frequent."""
    voting = [a for a in answers if a is not None]
    most = max(Counter(voting).values(), default=0)
    return next((a for a in voting if voting.count(a) == most), None) == gold


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_its_mean_over_orders_is_that_over_ordered_subsets(k):
    """Unbiased: over all orders in which five answers can come, its mean is the share of all
    ordered draws of k of them whose majority is right."""
    answers = ("7", "8", "7", None, "9")
    orders = [*itertools.permutations(answers)]
    found = majority_by_problem(orders, [[a == "7" for a in order] for order in orders], k)
    subsets = [*itertools.permutations(answers, k)]
    expected = np.mean([by_hand(subset, "7") for subset in subsets])
    assert found.mean() == pytest.approx(expected, abs=1e-12)
    assert 0 < expected < 1 or k == 5


def test_of_one_sample_it_is_the_average():
    """A majority of one is that answer."""
    right = [[True, False, False, True], [False] * 4]
    found = majority_by_problem([["1", "2", "3", "1"]] * 2, right, 1)
    np.testing.assert_array_equal(found, [0.5, 0.0])


@pytest.mark.parametrize(
    ("answers", "right", "k", "expected"),
    [
        (["8", "7", "07", None], [False, True, True, False], 4, 1.0),  # spelled otherwise, one vote
        (["8", "7", "8", "7"], [False, True, False, True], 4, 0.0),  # a tie: the first drawn
        (["7", "8", "8", "7"], [True, False, False, True], 4, 1.0),
        ([None, None, "7"], [False, False, True], 3, 1.0),  # no answer is no vote
        ([None, None], [False, False], 2, 0.0),  # no vote at all
        (["7", "8", "8", "7", "7"], [True, False, False, True, True], 2, 0.5),  # two runs, one left
    ],
)
def test_by_hand(answers, right, k, expected):
    """Classes, ties, missing answers and what is left over."""
    assert majority_by_problem([answers], [right], k).tolist() == [expected]


def test_classes_are_of_equal_answers():
    """The place of the first equivalent answer; text stands for itself."""
    assert classes(["x", None, r"\frac12", "x", "0.5", "y"]) == [0, None, 2, 0, 2, 5]


@pytest.mark.parametrize("k", [0, 3])
def test_k_must_be_drawn(k):
    """As of Pass@k."""
    with pytest.raises(ValueError, match=r"k must be in 1..2 .*, got"):
        majority_by_problem([["1", "2"]], [[True, False]], k)

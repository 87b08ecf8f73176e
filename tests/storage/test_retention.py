"""Which checkpoints stay: by brute force over a run, and ties and missing tests by hand."""

from __future__ import annotations

import random

import pytest

from kdjax.storage.retention import best_step, kept


def test_a_step_stays_for_a_reason():
    """After every save: the last ones, the multiples and the best there ever was, and no other."""
    rng = random.Random(0)
    for _ in range(200):
        last, every = rng.randint(1, 4), rng.choice([0, 2, 4, 6])
        present, tests = set(), {}
        for step in range(2, 40, 2):
            present.add(step)
            tests[step] = {"test_avg": rng.choice([0.1, 0.2, 0.3])} if rng.random() < 0.6 else {}
            present = kept(present, tests, last=last, every_steps=every, best="highest test_avg")
            newest = set(range(2, step + 1, 2)[-last:])
            multiples = {s for s in range(2, step + 1, 2) if every and s % every == 0}
            values = [(-v["test_avg"], s) for s, v in tests.items() if v]
            assert present == newest | multiples | ({min(values)[1]} if values else set())


@pytest.mark.parametrize(
    ("best", "wanted"),
    [
        ("highest test_avg", (4, 0.5)),
        ("lowest test_entropy", (2, 0.1)),
        ("highest test_entropy", (6, 0.3)),
        ("lowest test_truncated", None),
    ],
)
def test_the_best_has_a_direction(best, wanted):
    """Of equals the first; what is not finite, or was not measured, is no candidate."""
    tests = {
        2: {"test_avg": 0.2, "test_entropy": 0.1},
        4: {"test_avg": 0.5, "test_entropy": float("nan")},
        6: {"test_avg": 0.5, "test_entropy": 0.3},
        8: {},
    }
    assert best_step(tests, best) == wanted

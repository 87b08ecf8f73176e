"""Worked examples: what is skipped is named by its step, and each warning comes once, when due."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kdjax.report.results import WARNINGS
from kdjax.train.records import LEAST_RECORDS, Update, skipped_lines, warnings

NAN, INF = math.nan, math.inf


def test_skipped_updates_are_named():
    """Every update that the guard skipped has its line, with step and quantity; the others none,
    whatever their numbers are: the guard alone decides."""
    updates = [
        (3, INF, 1.0, 3), (4, 0.5, np.float32(NAN), np.float32(4)), (5, 0.5, 1.0, 0),
        (6, NAN, INF, 1), (7, NAN, 1.0, 0), (8, 0.5, 3e38, 1),
    ]  # fmt: skip
    assert skipped_lines([Update(*update) for update in updates]) == [
        "step 3: loss is inf, its update was skipped",
        "step 4: gradient_norm is nan, its update was skipped",
        "step 6: loss is nan and gradient_norm is inf, its update was skipped",
        "step 8: loss is 0.5 and gradient_norm is 3e+38, its update was skipped",
    ]


def record(step: int, **changes) -> dict:
    """A record that gives no reason to warn."""
    plain = {"step": step, "student_entropy": 1.0, "truncated": 0.5, "gradient_norm": 1.0}
    return plain | changes


@pytest.mark.parametrize(
    ("changes", "name", "knob"),
    [
        ({"student_entropy": 0.09}, "entropy collapse", "curriculum.lengths"),
        ({"student_entropy": 0.11}, None, None),
        ({"truncated": 1.0}, "all responses truncated", "curriculum.lengths"),
        ({"truncated": 0.99}, None, None),
        ({"gradient_norm": 10.5}, "gradient-norm spike", "optimizer.clip_norm"),
        ({"gradient_norm": 9.5}, None, None),
    ],
)
def test_warnings_come_when_due_and_once(changes, name, knob):
    """On either side of its limit; with its step, the knob, and never again."""
    earlier = [record(n) for n in range(LEAST_RECORDS)]
    new = record(LEAST_RECORDS, **changes)
    lines = warnings(earlier, new)
    if name is None:
        assert lines == []
        return
    (line,) = lines
    assert line.startswith(f"step {LEAST_RECORDS}: {name}: ")
    assert knob in line
    assert "\n" not in line
    said = [*earlier, new | {WARNINGS: ["another", line]}]
    assert warnings(said, record(LEAST_RECORDS + 1, **changes)) == []


def test_what_was_not_measured_is_no_reason():
    """The first records, and those that miss a number because it was not finite, warn of
    nothing; the first entropy is the first that there is."""
    assert warnings([], record(0, gradient_norm=100.0)) == []
    assert warnings([record(0)] * (LEAST_RECORDS - 1), record(1, gradient_norm=100.0)) == []
    assert warnings([{"step": 0}] * LEAST_RECORDS, {"step": 1}) == []
    (line,) = warnings([{"step": 0}, record(1)], record(2, student_entropy=0.01))
    assert "of its first 1;" in line


def test_several_at_once():
    """Each thing has its own line."""
    earlier = [record(n) for n in range(LEAST_RECORDS)]
    bad = record(LEAST_RECORDS, student_entropy=0.0, truncated=1.0, gradient_norm=99.0)
    assert len(warnings(earlier, bad)) == 3

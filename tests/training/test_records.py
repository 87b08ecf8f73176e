"""Worked examples: what is skipped is named by its step, and each warning comes once, when due."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kdjax.report.results import WARNINGS
from kdjax.training.records import LEAST_RECORDS, Update, skipped_lines, warnings

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


def rewarded_records(rewards, signals) -> list[dict]:
    pairs = enumerate(zip(rewards, signals, strict=True))
    return [record(n, reward=r, reward_signal=s) for n, (r, s) in pairs]


def said_in_all(records: list[dict]) -> list[str]:
    """The lines of a run with these records, as its notes say them."""
    lines: list[str] = []
    for n, new in enumerate(records):
        found = warnings(records[:n], new)
        lines += found
        records[n] = new | {WARNINGS: found}
    return lines


def test_a_reward_that_collapses_is_said_once():
    """The rewards that configs/methods/grpo.py had at a rate of 1e-3, six problems a step: said
    when the mean of four falls under a quarter of the first, with the groups that are left."""
    rewards = [0.4375, 0.083, 0.146, 0.083, 0.188, 0.0625, 0.02, 0.1, 0.1, 0.02, 0.02, 0.0, 0.0]
    signals = [0.83, 0.33, 0.5, 0.17, 0.33, 0.17, 0.17, 0.17, 0.17, 0.17, 0.17, 0.0, 0.0]
    (line,) = said_in_all(rewarded_records(rewards, signals))
    assert line.startswith("step 6: reward collapse: 0.0884, the mean of the last 4 records")
    assert "of the first 0.438, and 21% of the groups still have signal" in line
    assert "optimizer.learning_rate" in line


@pytest.mark.parametrize(
    "rewards",
    [
        [0.4, 0.1, 0.3, 0.1, 0.2, 0.1, 0.3],  # noise of few problems
        [0.0, 0.0, 0.1, 0.0, 0.0, 0.1, 0.0],  # nothing to fall from
        [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -7.0],  # rewards that are penalties have no share
        [0.4, 0.0, 0.0],  # too few to say
    ],
)
def test_rewards_that_have_not_collapsed(rewards):
    """Nothing is said."""
    assert said_in_all(rewarded_records(rewards, [0.5] * len(rewards))) == []


def test_steps_between_that_earn_nothing_do_not_count():
    """Records of another method's steps have no reward: the collapse is that of the rewarded."""
    records = rewarded_records([0.4, 0.0, 0.0, 0.0, 0.0], [0.5] * 5)
    mixed = [one for pair in zip(records, map(record, range(50, 55)), strict=True) for one in pair]
    (line,) = said_in_all(mixed)
    assert line.startswith("step 4: reward collapse: ")


def test_groups_without_signal_are_said_once():
    """Four records in a row: not three, and not where one group in them had it."""
    start = "step 4: groups without signal: in the last 4 records"
    (line,) = said_in_all(rewarded_records([0.0] * 8, [0.1, *[0.0] * 7]))
    assert line.startswith(start)
    assert said_in_all(rewarded_records([0.0] * 7, [0.0, 0.0, 0.0, 0.1, 0.0, 0.0, 0.0])) == []

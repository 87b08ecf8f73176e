"""Retention of checkpoints: the last ones stay, those every so many steps, the best by a test."""

from __future__ import annotations

import math
from collections.abc import Iterable

Tests = dict[int, dict[str, float]]
"""Step -> what a test after it measured, by name."""


def best_step(tests: Tests, best: str) -> tuple[int, float] | None:
    """(step, value) of the "highest NAME" or "lowest NAME" that was measured, the first of equals;
    None where nothing finite was.

    >>> best_step({2: {"test_avg": 0.1}, 4: {"test_avg": 0.3}, 6: {}}, "highest test_avg")
    (4, 0.3)
    """
    direction, name = best.split()
    sign = {"highest": 1, "lowest": -1}[direction]
    values = {step: found[name] for step, found in tests.items() if name in found}
    finite = {step: value for step, value in values.items() if math.isfinite(value)}
    if not finite:
        return None
    step = max(sorted(finite), key=lambda step: sign * finite[step])
    return step, finite[step]


def kept(
    steps: Iterable[int], tests: Tests, *, last: int, every_steps: int, best: str | None
) -> set[int]:
    """The steps that stay: the `last` of them, the multiples of every_steps (0: none for that), and
    the best one.

    >>> sorted(kept(range(1, 9), {}, last=2, every_steps=3, best=None))
    [3, 6, 7, 8]
    """
    present = sorted(steps)
    stay = set(present[-last:])
    if every_steps:
        stay |= {step for step in present if step % every_steps == 0}
    found = best_step({step: tests.get(step, {}) for step in present}, best) if best else None
    return stay if found is None else stay | {found[0]}

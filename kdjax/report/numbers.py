"""How numbers of a report are written: shares in percent and their differences in points, entropies
in nats, lengths in tokens."""

from __future__ import annotations

import math
from typing import get_args

from kdjax.config.claims import Metric
from kdjax.grading.intervals import Estimate, Interval

METRICS: tuple[Metric, ...] = get_args(Metric)
UNITS = {"length": (1.0, 1, "tokens"), "entropy": (1.0, 3, "nats")}
SHARE = (100.0, 1, "points")
"""How a metric is written: factor, digits, unit of a difference. What is not listed is a share."""


def shown(metric: Metric, found: Estimate, sign: str = "") -> str:
    """A mean and its standard error, where it is known.

    >>> shown("avg", Estimate(0.5, 0.01)), shown("entropy", Estimate(0.5, math.nan))
    ('50.0 ± 1.0', '0.500')
    """
    factor, digits, _ = UNITS.get(metric, SHARE)
    error = factor * found.standard_error
    text = f"{factor * found.mean:{sign}.{digits}f}"
    return text if math.isnan(error) else f"{text} ± {error:.{digits}f}"


def between(metric: Metric, *numbers: float) -> str:
    """A difference and its interval, where it is known."""
    factor, digits, _ = UNITS.get(metric, SHARE)
    middle, low, high = (f"{factor * x:+.{digits}f}" for x in numbers)
    return middle if math.isnan(numbers[1]) else f"{middle} ({low} to {high})"


def ranged(metric: Metric, found: Interval) -> str:
    """A mean and its interval, where it is known.

    >>> ranged("avg", Interval(0.5, 0.25, 0.75))
    '50.0 (25.0 to 75.0)'
    """
    factor, digits, _ = UNITS.get(metric, SHARE)
    middle, low, high = (f"{factor * x:.{digits}f}" for x in found)
    return middle if math.isnan(found.low) else f"{middle} ({low} to {high})"


def optional(value: float | None, form: str) -> str:
    """The formatted value, or a dash where there is none."""
    return "-" if value is None else form.format(value)

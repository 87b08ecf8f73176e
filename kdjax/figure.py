"""A figure as data, and the table of its numbers; `kdjax.svg` draws it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

MOST_POINTS = 200
"""Longer series are thinned to so many points, in the drawing and in the table."""

Range = tuple[float, float]


class Series(NamedTuple):
    """Points (x, y) in the order of x; the ranges, where known, hold each point's lowest and
    highest value.

    kind: a line; steps, each value until the next; a curve, a line with markers and a band; points,
    markers with error bars, joined; scatter, not joined.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    kind: Literal["line", "steps", "curve", "points", "scatter"]
    y_range: Sequence[Range] | None = None
    x_range: Sequence[Range] | None = None


class Figure(NamedTuple):
    """What a plot shows; labels carry the units. Several series may have one name, and then one
    style.

    x_ticks: where the x axis is marked, on a scale of doublings.
    """

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    x_ticks: Sequence[float] | None = None


def table_of(figure: Figure) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the numbers that a figure shows, in its units.

    Curves over the same x: a column a series. Otherwise a line a point. Ranges stand in brackets.
    """
    shown = [series for series in figure.series if len(series.x)]
    grid = sorted({x for s in shown for x in s.x})
    if all(s.kind in ("curve", "steps") for s in shown) and len(grid) <= 2 * max(
        len(s.x) for s in shown
    ):
        held = [dict(zip(s.x, _cells(s.y, s.y_range), strict=True)) for s in shown]
        lines = [[number(x), *(column.get(x, "") for column in held)] for x in grid]
        return [figure.x_label, *(s.name for s in shown)], lines
    lines = [
        [s.name, x, y]
        for s in shown
        for x, y in zip(_cells(s.x, s.x_range), _cells(s.y, s.y_range), strict=True)
    ]
    return ["run", figure.x_label, figure.y_label], lines


def number(value: float) -> str:
    """Four significant digits.

    >>> number(12.0), number(0.123456), number(123456.0)
    ('12', '0.1235', '123456')
    """
    return f"{value:.0f}" if abs(value) >= 1e3 and abs(value) < 1e7 else f"{value:.4g}"


def _cells(values: Sequence[float], ranges: Sequence[Range] | None) -> list[str]:
    if ranges is None:
        return [number(value) for value in values]
    return [
        f"{number(value)} ({number(low)} to {number(high)})" if low < high else number(value)
        for value, (low, high) in zip(values, ranges, strict=True)
    ]

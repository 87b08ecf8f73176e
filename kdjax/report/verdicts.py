"""Verdicts on the claims of a study, and how they are written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kdjax.config.claims import Claim
from kdjax.errors import ConfigError
from kdjax.grading.intervals import LEVEL, Bounds, holm, interval, least_difference, p_value
from kdjax.report.numbers import SHARE, UNITS, between
from kdjax.report.results import (
    Cell,
    Outcome,
    Verdict,
    at_equal_flops,
    bounds_of,
    differing,
    named,
    of_difference,
    shared_k,
    values_of,
)
from kdjax.runtime.console import Table


def judge(claims: Sequence[Claim], cells: Sequence[Cell]) -> list[Verdict]:
    """The verdicts on all claims of a study, about cells that stand in the order of their seeds.

    supported: more - less is above -margin, and its p-value, corrected for the number of claims
    (Holm), is under 5 %; contradicted: the same below -margin; otherwise undecided, as always where
    there is one problem. Of all claims that are not so, one or more is called supported or
    contradicted in at most 5 % of studies. Errors: ConfigError where the cells of a claim were
    evaluated differently.
    """
    read = [_read(claim, cells) for claim in claims]
    p_values = holm(
        [p_value(r.values, -claim.margin, r.bounds) for claim, r in zip(claims, read, strict=True)]
    )
    return [
        Verdict(
            claim,
            *interval(r.values, r.bounds),
            outcome=_outcome(float(r.values.mean()) + claim.margin, p),
            metric=r.metric,
            p=p,
            least=least_difference(r.values, LEVEL / len(claims)),
            seeds=r.values.shape[0],
            problems=r.values.shape[1],
        )
        for claim, r, p in zip(claims, read, p_values, strict=True)
    ]


class _Read(NamedTuple):
    """more - less of a claim [seeds, problems], their bounds, and what it is called."""

    values: np.ndarray
    bounds: Bounds
    metric: str


def _read(claim: Claim, cells: Sequence[Cell]) -> _Read:
    by_name = {cell.name: cell for cell in cells}
    chosen = [by_name[name] for name in (*claim.more, *claim.less)]
    for cell in chosen:
        _check_comparable(claim, chosen[0], cell)
    report, k = chosen[0].runs[0].report, shared_k(chosen)
    values = (
        [values_of(cell, claim.metric, k) for cell in chosen]
        if claim.reading == "steps"
        else at_equal_flops(chosen, by_name["start"].runs[0])
    )
    more, less = values[: len(claim.more)], values[len(claim.more) :]
    return _Read(
        np.mean(more, axis=0) - np.mean(less, axis=0),
        of_difference(bounds_of(claim.metric, report)),
        named(claim.metric, report, k),
    )


def _outcome(above: float, p: float) -> Outcome:
    if not p < LEVEL:
        return "undecided"
    return "supported" if above > 0 else "contradicted"


def _check_comparable(claim: Claim, first: Cell, other: Cell) -> None:
    of_runs = (differing(first.runs[0].report, run.report) for run in other.runs)
    changed = list(dict.fromkeys(name for names in of_runs for name in names))
    if changed:
        raise ConfigError(
            f"claim {claim.name}: cells {first.name} and {other.name} were evaluated with another"
            f" {' and '.join(changed)}; give them one evaluation"
        )


def verdict_table(verdicts: Sequence[Verdict]) -> Table:
    """What the numbers say of each claim."""
    lines = []
    for found in verdicts:
        claim = found.claim
        unit = UNITS.get(claim.metric, SHARE)[2]
        difference = f"{between(claim.metric, found.estimate, found.low, found.high)} {unit}"
        sides = " - ".join(", ".join(side) for side in (claim.more, claim.less))
        lines.append(
            [claim.statement, found.outcome, found.metric, difference, _p(found.p),
             least(found), _sizes(found), claim.reading, sides]
        )  # fmt: skip
    header = ["claim", "verdict", "metric", "difference (95 %)", "p (Holm)", "could be seen", "of"]
    return [*header, "at equal", "first cells - others"], lines


def verdict_line(found: Verdict) -> str:
    """A verdict with all that it rests on, in a line."""
    claim = found.claim
    difference = between(claim.metric, found.estimate, found.low, found.high)
    return (
        f"{found.outcome:12} {claim.statement}: {found.metric} {difference}"
        f" {UNITS.get(claim.metric, SHARE)[2]}, p {_p(found.p)} (Holm), could be seen"
        f" {least(found)}, {_sizes(found)}"
    )


def _sizes(found: Verdict) -> str:
    problems, seeds = found.problems, found.seeds
    return f"{problems} problem{'s' * (problems > 1)}, {seeds} seed{'s' * (seeds > 1)}"


def _p(value: float) -> str:
    if math.isnan(value):
        return "-"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def least(found: Verdict) -> str:
    """The smallest difference that could have been seen, in the metric's unit."""
    metric = found.claim.metric
    factor, digits, unit = UNITS.get(metric, SHARE)
    if math.isnan(found.least):
        return "-"
    if metric not in UNITS and found.least > 1:
        return f"none up to {factor:.0f} {unit}"
    return f"{factor * found.least:.{digits}f} {unit}"

"""What there is to report: runs, the cells that they repeat, and verdicts on claims."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from kdjax.claims import Claim
from kdjax.evaluate import EvalReport

Record = dict[str, Any]
Outcome = Literal["supported", "contradicted", "undecided"]


class Row(NamedTuple):
    """One line of the table: a trained run, or a reference (start, teacher) without metrics."""

    name: str
    report: EvalReport
    metrics: list[dict[str, Any]]
    samples: list[Record]


class Cell(NamedTuple):
    """A config of a study, or a reference: one run a seed, in the order of the study's seeds.

    weight: that of forward KL, where the cell belongs to a sweep of `mix`.
    """

    name: str
    runs: list[Row]
    weight: float | None = None


class Verdict(NamedTuple):
    """What the numbers say of a claim: the difference (more - less, in the metric's unit), its 95 %
    interval, and the outcome, which the interval and the claim's margin alone decide."""

    claim: Claim
    estimate: float
    low: float
    high: float
    outcome: Outcome

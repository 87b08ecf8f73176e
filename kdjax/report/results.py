"""Results, as they are reported: runs, the cells that they repeat, and verdicts on claims."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from kdjax.base import Sampling
from kdjax.config.claims import Claim, Metric
from kdjax.grading.eval_report import EvalReport
from kdjax.grading.intervals import Estimate, Interval
from kdjax.grading.passk import pass_by_problem

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


COMPARABLE = ("source", "samples", "sampling", "max_new_tokens", "grader")
"""What reports must share for their difference to mean anything."""


def differing(first: EvalReport, second: EvalReport) -> list[str]:
    """Which of those two reports don't share."""
    return [name for name in COMPARABLE if getattr(first, name) != getattr(second, name)]


def values_of(cell: Cell, metric: Metric) -> np.ndarray:
    """[seeds, problems], whose mean over problems is what the report of that seed says."""
    return np.array([problem_values(run, metric) for run in cell.runs])


def problem_values(run: Row, metric: Metric) -> np.ndarray:
    """A metric of each problem, in problem order.

    avg and truncated are shares in 0..1, pass is Pass@k for the largest k, length is in tokens. The
    entropy is a mean over tokens, so a problem's value is its influence on that ratio: R + (nats -
    R tokens) / (mean tokens of a problem), which has R as its mean.
    """
    report = run.report
    if metric == "avg":
        return np.array(report.correct) / report.samples
    if metric == "pass":
        return pass_by_problem(report.correct, report.samples, max(report.pass_at))

    def of_samples(name: str) -> np.ndarray:
        return np.array([s[name] for s in run.samples], float).reshape(-1, report.samples)

    if metric == "truncated":
        return of_samples("truncated").mean(axis=1)
    tokens = of_samples("tokens")
    if metric == "length":
        return tokens.mean(axis=1)
    nats, weight = (of_samples("entropy") * tokens).mean(axis=1), tokens.mean(axis=1)
    ratio = nats.sum() / weight.sum()
    return ratio + (nats - ratio * weight) / weight.mean()


def avg_at_flops(run: Row, start: Row, budget: float) -> np.ndarray:
    """Avg of each problem after so many training FLOPs: between the start (none), the evaluations
    during training and the finished student, by straight lines."""
    end = run.report
    assert end.training_flops is not None  # of a trained run
    curve = {0.0: problem_values(start, "avg")}
    for record in run.metrics:
        if "test_correct" in record:
            spent = sum(value for name, value in record.items() if name.startswith("flops_"))
            curve[spent] = np.array(record["test_correct"]) / record["test_samples"]
    curve[end.training_flops] = problem_values(run, "avg")
    spent, shares = np.array(sorted(curve)), np.array([curve[x] for x in sorted(curve)])
    return np.array([np.interp(budget, spent, share) for share in shares.T])


def at_equal_flops(cells: Sequence[Cell], start: Row) -> list[np.ndarray]:
    """Avg of each cell [seeds, problems] at the largest budget that all of them reached, by
    seed."""
    budgets = [
        min(run.report.training_flops or 0.0 for run in runs)
        for runs in zip(*(cell.runs for cell in cells), strict=True)
    ]
    return [
        np.array([avg_at_flops(r, start, b) for r, b in zip(cell.runs, budgets, strict=True)])
        for cell in cells
    ]


WARNINGS = "warnings"
"""Where a record keeps the lines that were said at it."""


def to_json(result: EvalReport) -> dict[str, Any]:
    """A report as JSON values; estimates as {mean, standard_error}, intervals as {estimate, low,
    high}, the sampling by its fields."""

    def plain(value):
        if isinstance(value, Estimate | Interval):
            return value._asdict()
        if isinstance(value, Sampling):
            return dataclasses.asdict(value)
        return (
            {str(key): plain(v) for key, v in value.items()} if isinstance(value, dict) else value
        )

    return {name: plain(value) for name, value in result._asdict().items()}


def from_json(fields: dict[str, Any]) -> EvalReport:
    """The inverse of `to_json`; what an older version left out has its default."""
    names = ("avg", "length", "truncated", "no_answer", "not_scored")
    found = {**fields, **{name: Estimate(**fields[name]) for name in names}}
    found["sampling"] = Sampling(**fields["sampling"])
    for name in ("pass_at", "majority_at"):
        if fields.get(name):
            found[name] = {int(k): Estimate(**value) for k, value in fields[name].items()}
    if fields.get("length_quantiles"):
        found["length_quantiles"] = {int(q): n for q, n in fields["length_quantiles"].items()}
    if fields.get("intervals"):
        found["intervals"] = {name: Interval(**x) for name, x in fields["intervals"].items()}
    return EvalReport(**found)

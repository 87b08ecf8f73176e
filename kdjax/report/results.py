"""Results, as they are reported: runs, the cells that they repeat, and verdicts on claims."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from math import nan
from typing import Any, Literal, NamedTuple

import numpy as np

from kdjax.base import Sampling
from kdjax.config.claims import Claim, Metric
from kdjax.grading.eval_report import EvalReport
from kdjax.grading.intervals import Bounds, Estimate, Interval
from kdjax.grading.passk import pass_by_problem

Record = dict[str, Any]
Outcome = Literal["supported", "contradicted", "undecided"]


class Row(NamedTuple):
    """One line of the table: a trained run, or a reference (start, teacher) without metrics.

    began: the run whose trained student it began as; its cost is then in this one's (`charged`).
    """

    name: str
    report: EvalReport
    metrics: list[dict[str, Any]]
    samples: list[Record]
    began: Row | None = None


class Cell(NamedTuple):
    """A config of a study, or a reference: one run a seed, in the order of the study's seeds.

    weight: that of forward KL, where the cell belongs to a sweep of `mix`.
    """

    name: str
    runs: list[Row]
    weight: float | None = None


class Verdict(NamedTuple):
    """What the numbers say of a claim: the difference (more - less, in the metric's unit), its 95 %
    interval, and the outcome, which the p-value and the claim's margin alone decide.

    - metric: with its k, such as "Pass@8".
    - p: of the difference being -margin, corrected for all claims of the study (Holm).
    - least: the smallest difference that this claim could have shown in 80 % of all cases.
    - seeds, problems: of each cell.
    """

    claim: Claim
    estimate: float
    low: float
    high: float
    outcome: Outcome
    metric: str
    p: float
    least: float
    seeds: int
    problems: int


COMPARABLE = ("source", "samples", "sampling", "max_new_tokens", "grader")
"""What reports must share for their difference to mean anything."""


def differing(first: EvalReport, second: EvalReport) -> list[str]:
    """Which of those two reports don't share."""
    return [name for name in COMPARABLE if getattr(first, name) != getattr(second, name)]


def shared_k(cells: Sequence[Cell]) -> int:
    """The k at which these cells' Pass@k is compared: the largest one of the cell that was asked
    for the smallest. Pass@k of other k is another number."""
    return min(max(run.report.pass_at) for cell in cells for run in cell.runs)


def named(metric: Metric, report: EvalReport, k: int) -> str:
    """A metric with its number of samples: Avg@8, Pass@8."""
    return {"avg": f"Avg@{report.samples}", "pass": f"Pass@{k}"}.get(metric, metric)


def bounds_of(metric: Metric, report: EvalReport) -> Bounds:
    """Between what a problem's value lies: shares, and tokens to the limit; None for nats."""
    if metric == "entropy":
        return None
    return 0.0, float(report.max_new_tokens) if metric == "length" else 1.0


def of_difference(bounds: Bounds) -> Bounds:
    """Between what the difference of two such values lies."""
    return bounds and (bounds[0] - bounds[1], bounds[1] - bounds[0])


def values_of(cell: Cell, metric: Metric, k: int = 1) -> np.ndarray:
    """[seeds, problems], whose mean over problems is what the report of that seed says."""
    return np.array([problem_values(run, metric, k) for run in cell.runs])


def problem_values(run: Row, metric: Metric, k: int = 1) -> np.ndarray:
    """A metric of each problem, in problem order; pass is Pass@k of the k that is given.

    avg, pass and truncated are shares in 0..1, length is in tokens. The entropy is a mean over
    tokens, so a problem's value is its influence on that ratio: R + (nats - R tokens) / (mean
    tokens of a problem), which has R as its mean. Its tokens are those that were scored: a stop
    token that is masked is none of them.
    """
    report = run.report
    if metric == "avg":
        return np.array(report.correct) / report.samples
    if metric == "pass":
        return pass_by_problem(report.correct, report.samples, k)

    def of_samples(name: str, otherwise: str = "") -> np.ndarray:
        values = [s[name] if name in s else s[otherwise] for s in run.samples]
        return np.array(values, float).reshape(-1, report.samples)

    if metric == "truncated":
        return of_samples("truncated").mean(axis=1)
    if metric == "length":
        return of_samples("tokens").mean(axis=1)
    tokens = of_samples("scored_tokens", "tokens")  # older versions' records have tokens alone
    nats, weight = (of_samples("entropy") * tokens).mean(axis=1), tokens.mean(axis=1)
    ratio = nats.sum() / weight.sum()
    return ratio + (nats - ratio * weight) / weight.mean()


def by_problem(result: EvalReport) -> dict[str, tuple[Metric, np.ndarray]]:
    """What a report alone says of each problem, by the metric's name with its k: its kind, and its
    values in problem order; length and truncation where the report has them by problem."""
    n = result.samples
    found: dict[str, tuple[Metric, np.ndarray]] = {
        f"Avg@{n}": ("avg", np.array(result.correct) / n)
    }
    for k in result.pass_at:
        found[f"Pass@{k}"] = ("pass", pass_by_problem(result.correct, n, k))
    if result.tokens is not None and result.cut is not None:
        found["length"] = ("length", np.array(result.tokens) / n)
        found["truncated"] = ("truncated", np.array(result.cut) / n)
    return found


def charged(run: Row, began: Row) -> Row:
    """The run with what it began as, another's trained student: that run's FLOPs and seconds are
    in its own, in the report (flops_start) and in every record of its metrics."""
    own, before = run.report, began.report
    if own.training_flops is None or before.training_flops is None:
        return run._replace(began=began)
    flops, seconds = before.training_flops, before.training_seconds or 0.0
    report = own._replace(
        training_flops=own.training_flops + flops,
        flops_by_part={**(own.flops_by_part or {}), FLOPS_START: flops},
        training_seconds=(own.training_seconds or 0.0) + seconds,
    )
    metrics = [
        {**record, FLOPS_START: flops, "seconds": record.get("seconds", 0.0) + seconds}
        for record in run.metrics
    ]
    return run._replace(report=report, metrics=metrics, began=began)


FLOPS_START = "flops_start"
"""The part of a run's FLOPs that was spent on what it began as."""


def avg_at_flops(run: Row, start: Row, budget: float) -> np.ndarray:
    """Avg of each problem after so many training FLOPs: between the start (none), the evaluations
    during training and the finished student, by straight lines. What the run began as comes before
    it on the same line."""
    curve = _by_flops(run, start)
    spent, shares = np.array(sorted(curve)), np.array([curve[x] for x in sorted(curve)])
    return np.array([np.interp(budget, spent, share) for share in shares.T])


def _by_flops(run: Row, start: Row) -> dict[float, np.ndarray]:
    end = run.report
    assert end.training_flops is not None  # of a trained run
    curve = _by_flops(run.began, start) if run.began else {0.0: problem_values(start, "avg")}
    for record in run.metrics:
        if "test_correct" in record:
            spent = sum(value for name, value in record.items() if name.startswith("flops_"))
            curve[spent] = np.array(record["test_correct"]) / record["test_samples"]
    return curve | {end.training_flops: problem_values(run, "avg")}


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
    high}, the sampling by its fields, reports at other temperatures, if there are any, likewise."""

    def plain(value):
        if isinstance(value, Estimate | Interval):
            return value._asdict()
        if isinstance(value, Sampling):
            return dataclasses.asdict(value)
        return (
            {str(key): plain(v) for key, v in value.items()} if isinstance(value, dict) else value
        )

    found = {name: plain(value) for name, value in result._asdict().items() if name != "also"}
    return found | ({"also": [to_json(other) for other in result.also]} if result.also else {})


def from_json(fields: dict[str, Any]) -> EvalReport:
    """The inverse of `to_json`; what an older version left out has its default, and null in an
    estimate or an interval is what is not known (NaN)."""
    names = ("avg", "length", "truncated", "no_answer", "not_scored")
    found = {**fields, **{name: Estimate(**_known(fields[name])) for name in names}}
    found["sampling"] = Sampling(**fields["sampling"])
    for name in ("pass_at", "majority_at"):
        if fields.get(name):
            found[name] = {int(k): Estimate(**_known(x)) for k, x in fields[name].items()}
    if fields.get("length_quantiles"):
        found["length_quantiles"] = {int(q): n for q, n in fields["length_quantiles"].items()}
    if fields.get("intervals"):
        found["intervals"] = {n: Interval(**_known(x)) for n, x in fields["intervals"].items()}
    found["also"] = tuple(from_json(other) for other in fields.get("also") or ())
    return EvalReport(**_known(found, "entropy"))


def _known(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    """The fields with NaN for null: in these of them, or in all."""
    return {n: nan if x is None and n in (names or fields) else x for n, x in fields.items()}

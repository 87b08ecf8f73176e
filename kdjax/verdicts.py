"""Claims against what was measured: differences paired by problem and seed, judged by interval."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kdjax.base import ConfigError
from kdjax.bootstrap import Interval, interval
from kdjax.claims import Claim, Metric
from kdjax.evaluate import EvalReport
from kdjax.passk import pass_by_problem
from kdjax.results import Cell, Outcome, Row, Verdict

COMPARABLE = ("source", "samples", "sampling", "max_new_tokens", "grader")
"""What reports must share for their difference to mean anything."""


def differing(first: EvalReport, second: EvalReport) -> list[str]:
    """Which of those two reports don't share."""
    return [name for name in COMPARABLE if getattr(first, name) != getattr(second, name)]


def judge(claim: Claim, cells: Sequence[Cell]) -> Verdict:
    """The verdict on a claim about some of the cells, which stand in the order of their seeds.

    supported: the whole 95 % interval of more - less is above -margin; contradicted: below it;
    otherwise undecided. Errors: ConfigError where the cells were evaluated differently.
    """
    by_name = {cell.name: cell for cell in cells}
    chosen = [by_name[name] for name in (*claim.more, *claim.less)]
    for cell in chosen[1:]:
        _check_comparable(claim, chosen[0], cell)
    values = (
        [values_of(cell, claim.metric) for cell in chosen]
        if claim.reading == "steps"
        else at_equal_flops(chosen, by_name["start"].runs[0])
    )
    more, less = values[: len(claim.more)], values[len(claim.more) :]
    found = interval(np.mean(more, axis=0) - np.mean(less, axis=0))
    return Verdict(claim, *found, outcome=_outcome(found, -claim.margin))


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


def _outcome(found: Interval, bound: float) -> Outcome:
    if found.low > bound:
        return "supported"
    return "contradicted" if found.high < bound else "undecided"


def _check_comparable(claim: Claim, first: Cell, other: Cell) -> None:
    changed = differing(first.runs[0].report, other.runs[0].report)
    if changed:
        raise ConfigError(
            f"claim {claim.name}: cells {first.name} and {other.name} were evaluated with another"
            f" {' and '.join(changed)}; give them one evaluation"
        )

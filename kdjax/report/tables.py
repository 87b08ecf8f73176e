"""Results as tables of text, which the terminal, the page and report.md show; data in, lines out.

Shares are in percent and their differences in points, entropies and KLs in nats a token, lengths in
tokens; ± is one standard error over problems, and over seeds where there are several.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from kdjax.config.claims import Metric
from kdjax.grading.eval_report import QUANTILES, EvalReport, unread
from kdjax.grading.intervals import Estimate, Interval, interval, over_problems_and_seeds
from kdjax.grading.passk import pass_by_problem
from kdjax.report.numbers import METRICS, between, optional, ranged, shown
from kdjax.report.results import (
    WARNINGS,
    Cell,
    Row,
    at_equal_flops,
    bounds_of,
    by_problem,
    differing,
    named,
    of_difference,
    shared_k,
    values_of,
)
from kdjax.runtime.console import Table

MOST_WARNINGS = 20


class Summary(NamedTuple):
    """A cell over its seeds. setting: the first run's report, for the settings that all share; k:
    that of the table's Pass@k."""

    name: str
    setting: EvalReport
    k: int
    avg: Estimate
    pass_at: dict[int, Estimate]
    length: Estimate
    truncated: Estimate
    entropy: Estimate
    forward_kl: float | None
    reverse_kl: float | None
    training_flops: float | None
    training_seconds: float | None


def summarise(cell: Cell, k: int | None = None) -> Summary:
    """Means and standard errors of a cell's runs. Without samples, one run is what its report
    says. k: that of the table's Pass@k, where it is not the cell's largest."""
    first, runs = cell.runs[0].report, cell.runs
    k = shared_k([cell]) if k is None else k

    def found(metric: Metric, alone: Estimate) -> Estimate:
        return over_problems_and_seeds(values_of(cell, metric)) if runs[0].samples else alone

    def passing(k: int) -> Estimate:
        shares = [pass_by_problem(r.report.correct, r.report.samples, k) for r in runs]
        return over_problems_and_seeds(np.array(shares))

    return Summary(
        cell.name,
        first,
        k,
        over_problems_and_seeds(values_of(cell, "avg")),
        {k: passing(k) for k in sorted({*first.pass_at, k})},
        found("length", first.length),
        found("truncated", first.truncated),
        found("entropy", Estimate(first.entropy, math.nan)),
        *(mean_of(runs, name) for name in MEANS),
    )


MEANS = ("forward_kl", "reverse_kl", "training_flops", "training_seconds")
"""Fields of a report that are not of problems."""


def mean_of(runs: Sequence[Row], name: str) -> float | None:
    """The mean over runs of a report's number, None where a run has none."""
    values = [getattr(run.report, name) for run in runs]
    return None if None in values else float(np.mean(values))


COLUMNS: tuple[tuple[str, Callable[[Summary], str]], ...] = (
    ("Avg@{n}", lambda s: shown("avg", s.avg)),
    ("Pass@{k}", lambda s: shown("pass", s.pass_at[s.k])),
    ("length", lambda s: shown("length", s.length)),
    ("truncated", lambda s: shown("truncated", s.truncated)),
    ("entropy", lambda s: shown("entropy", s.entropy)),
    ("KL(t‖s)", lambda s: optional(s.forward_kl, "{:.3f}")),
    ("KL(s‖t)", lambda s: optional(s.reverse_kl, "{:.3f}")),
    ("FLOPs", lambda s: optional(s.training_flops, "{:.2e}")),
    ("seconds", lambda s: optional(s.training_seconds, "{:.0f}")),
)


def table(rows: Sequence[Row]) -> Table:
    """`comparison` of single runs."""
    return comparison([Cell(row.name, [row]) for row in rows])


def comparison(cells: Sequence[Cell]) -> Table:
    """A line a cell; gains are paired with the first cell over the same problems."""
    k, n = shared_k(cells), _samples(cells)
    header = ["run", *(name.format(n=n, k=k) for name, _ in COLUMNS)]
    lines = [[cell.name, *(show(summarise(cell, k)) for _, show in COLUMNS)] for cell in cells]
    if len(cells) > 1:
        header.insert(2, f"gain over {cells[0].name}")
        for line, cell in zip(lines, cells, strict=True):
            line.insert(2, "" if cell is cells[0] else gain(cell, cells[0]))
    return header, lines


def _samples(cells: Sequence[Cell]) -> int | str:
    """The n of Avg@n, where all cells have one."""
    found = {cell.runs[0].report.samples for cell in cells}
    return found.pop() if len(found) == 1 else "n"


def are_comparable(cell: Cell, other: Cell) -> bool:
    """Whether both were evaluated on the same problems in the same way."""
    return not differing(cell.runs[0].report, other.runs[0].report)


def gain(cell: Cell, base: Cell) -> str:
    """Difference of Avg@k in points with its standard error, paired by problem, and by seed where
    both have as many."""
    if not are_comparable(cell, base):
        return "not comparable"
    ours, theirs = values_of(cell, "avg"), values_of(base, "avg")
    if len(ours) != len(theirs):
        theirs = theirs.mean(axis=0, keepdims=True)
    return shown("avg", over_problems_and_seeds(ours - theirs), "+")


def differences(cells: Sequence[Cell]) -> Table:
    """Each cell less the first, paired by problem and seed, with 95 % intervals."""
    k, report = shared_k(cells), cells[0].runs[0].report

    def found(cell: Cell, metric: Metric) -> Interval:
        values = values_of(cell, metric, k) - values_of(cells[0], metric, k)
        return interval(values, of_difference(bounds_of(metric, report)))

    lines = [
        [cell.name, *(between(metric, *found(cell, metric)) for metric in METRICS)]
        for cell in cells[1:]
    ]
    return ["cell", *(named(metric, report, k) for metric in METRICS)], lines


def more_samples(cells: Sequence[Cell]) -> Table:
    """Avg@n, and Pass@k and Maj@k for every k of the evaluation; a dash where there is none."""
    first = cells[0].runs[0].report
    columns: list[tuple[str, Callable[[Cell], str]]] = [
        (
            f"Avg@{_samples(cells)}",
            lambda cell: ranged("avg", interval(values_of(cell, "avg"), (0, 1))),
        )
    ]
    columns += [(f"Pass@{k}", functools.partial(_passing, k=k)) for k in first.pass_at]
    columns += [(f"Maj@{k}", functools.partial(_majority, k=k)) for k in first.pass_at if k > 1]
    lines = [[cell.name, *(show(cell) for _, show in columns)] for cell in cells]
    return ["run", *(name for name, _ in columns)], lines


def at_temperatures(cells: Sequence[Cell]) -> Table:
    """Of cells that were evaluated at several temperatures, a line for each; means over seeds."""
    k, lines = shared_k(cells), []
    header: list[str] = []
    for cell in (cell for cell in cells if cell.runs[0].report.also):
        for reports in zip(*((r.report, *r.report.also) for r in cell.runs), strict=True):
            values = [by_problem(report) for report in reports]
            shown_of = {
                name: shown(metric, over_problems_and_seeds(np.array([v[name][1] for v in values])))
                for name, (metric, _) in values[0].items()
                if metric != "pass" or name == f"Pass@{k}"
            }
            header = ["run", "sampled at", *shown_of]
            lines.append([cell.name, str(reports[0].sampling), *shown_of.values()])
    return header, lines


def _passing(cell: Cell, k: int) -> str:
    reports = [run.report for run in cell.runs]
    if any(k > report.samples for report in reports):
        return "-"
    shares = [pass_by_problem(report.correct, report.samples, k) for report in reports]
    return ranged("pass", interval(np.array(shares), (0, 1)))


def _majority(cell: Cell, k: int) -> str:
    reports = [run.report for run in cell.runs]
    found = [(report.majority_at or {}).get(k) for report in reports]
    means = [x.mean for x in found if x is not None]
    if len(means) < len(found):
        return "-"
    name = f"majority_at_{k}"
    alone = reports[0].intervals or {}
    if len(found) == 1 and name in alone:
        return ranged("avg", alone[name])
    return shown("avg", Estimate(float(np.mean(means)), math.nan))


def responses(cells: Sequence[Cell]) -> Table:
    """What became of the responses, and quantiles of their length; means over seeds."""
    lines = []
    for cell in cells:
        reports = [run.report for run in cell.runs]
        right, none, unscored = (
            float(np.mean([getattr(report, name).mean for report in reports]))
            for name in ("avg", "no_answer", "not_scored")
        )
        shares = (right, 1 - right - none - unscored, none, unscored)
        quantiles = [report.length_quantiles or {} for report in reports]
        lengths = [
            f"{np.mean([q[at] for q in quantiles]):.0f}" if all(quantiles) else "-"
            for at in QUANTILES
        ]
        lines.append([cell.name, *(f"{100 * max(x, 0.0):.1f}" for x in shares), *lengths])
    outcomes = ["correct", "wrong", "no answer", "not scored"]
    return ["run", *outcomes, *(f"length {q} %" for q in QUANTILES)], lines


def equal_readings(cells: Sequence[Cell], start: Row) -> Table:
    """Avg of the finished students, and of all at the FLOPs of the cheapest (by seed)."""
    lines = []
    for cell, equal in zip(cells, at_equal_flops(cells, start), strict=True):
        ends = [over_problems_and_seeds(x) for x in (values_of(cell, "avg"), equal)]
        flops = optional(mean_of(cell.runs, "training_flops"), "{:.2e}")
        lines.append([cell.name, flops, *(shown("avg", x) for x in ends)])
    avg = f"Avg@{cells[0].runs[0].report.samples}"
    return ["cell", "FLOPs", f"{avg}, equal steps", f"{avg}, equal FLOPs"], lines


def flops_by_part(cells: Sequence[Cell]) -> Table:
    """What the training FLOPs of each cell went to, mean over seeds."""
    counted = [(c.name, [r.report.flops_by_part or {} for r in c.runs]) for c in cells]
    parts = list(dict.fromkeys(name for _, runs in counted for run in runs for name in run))
    lines = [
        [name, *(f"{np.mean([run.get(part, 0.0) for run in runs]):.2e}" for part in parts)]
        for name, runs in counted
        if all(runs)
    ]
    said = [part.removeprefix("flops_").replace("_", " ") for part in parts]
    return ["FLOPs", *said], lines


def warned(cells: Sequence[Cell]) -> Table:
    """What was said during training, the first MOST_WARNINGS of each run, and of its responses."""
    lines = []
    for cell in cells:
        for run in cell.runs:
            said = [line for record in run.metrics for line in record.get(WARNINGS, ())]
            lines += [[cell.name, str(run.report.seed), line] for line in said[:MOST_WARNINGS]]
            if len(said) > MOST_WARNINGS:
                rest = f"and {len(said) - MOST_WARNINGS} more, in metrics.jsonl"
                lines.append([cell.name, str(run.report.seed), rest])
            if found := unread(run.report, run.samples):
                lines.append([cell.name, str(run.report.seed), found])
    return ["run", "seed", "what was said"], lines

"""A study's results as plain text: the paper's table, paired differences, both readings, verdicts.

Shares in percent in Markdown and in 0..1 in CSV and JSON; entropy in nats, lengths in tokens.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any, get_args

import numpy as np

from kdjax.bootstrap import interval, over_problems_and_seeds
from kdjax.claims import Metric
from kdjax.passk import Estimate
from kdjax.results import Cell, Row, Verdict
from kdjax.verdicts import at_equal_flops, values_of

METRICS: tuple[Metric, ...] = get_args(Metric)
UNITS = {"length": (1.0, 1, "tokens"), "entropy": (1.0, 3, "nats")}
SHARE = (100.0, 1, "points")
"""How a metric is written: factor, digits, unit of a difference. What is not listed is a share."""


def to_lines(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """The numbers of every run, and after each cell's a line over its seeds ("all"), with standard
    errors over problems, and over seeds where there are several."""
    lines = []
    for cell in cells:
        runs = [(str(run.report.seed), [run]) for run in cell.runs]
        for seed, own in [*runs, ("all", cell.runs)]:
            line: dict[str, Any] = {"cell": cell.name, "seed": seed}
            for metric in METRICS:
                found = over_problems_and_seeds(values_of(Cell(cell.name, own), metric))
                name = _title(metric, own[0])
                line |= {name: found.mean, f"{name}_standard_error": found.standard_error}
            lines.append(line | _costs(own))
    return lines


def to_csv(cells: Sequence[Cell]) -> str:
    """`to_lines` as CSV; empty where there is no value."""
    lines, text = to_lines(cells), io.StringIO()
    writer = csv.DictWriter(text, list(lines[-1]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def render_results(
    name: str, cells: Sequence[Cell], about: dict[str, Any], verdicts: Sequence[Verdict] = ()
) -> str:
    """The study as Markdown: what the page says, without its plots."""
    report = cells[0].runs[0].report
    seeds = max(len(cell.runs) for cell in cells)
    trained = [cell for cell in cells if cell.runs[0].report.training_flops is not None]
    parts = [
        f"# {name}",
        f"{report.problems} test problems ({report.source}), {report.samples} samples a problem,"
        f" {report.sampling}, at most {report.max_new_tokens} tokens. ± one standard error over"
        f" problems{' and seeds' if seeds > 1 else ''}.",
        _markdown(*_table(cells)),
    ]
    if len(trained) > 1:
        parts += [
            f"## Differences to {trained[0].name}",
            "Paired by problem and seed, with 95 % intervals (problems resampled, seeds by"
            " Student's t).",
            _markdown(*_differences(trained)),
            "## At equal steps and at equal FLOPs",
            "Avg of the finished students, and at the FLOPs of the cheapest of them (by seed,"
            " interpolated between the tests during training).",
            _markdown(*_readings(trained, cells[0].runs[0])),
        ]
    if verdicts:
        parts += ["## Verdicts", _markdown(*_verdicts(verdicts))]
    parts += ["## What made this", _markdown(["", ""], [[k, str(v)] for k, v in about.items()])]
    return "\n\n".join(parts) + "\n"


def _table(cells: Sequence[Cell]) -> tuple[list[str], list[list[str]]]:
    first = cells[0].runs[0]
    header = ["cell", *(_headed(metric, first) for metric in METRICS), "FLOPs", "seconds"]
    lines = []
    for cell in cells:
        found = [over_problems_and_seeds(values_of(cell, metric)) for metric in METRICS]
        texts = [_shown(metric, x) for metric, x in zip(METRICS, found, strict=True)]
        costs = _costs(cell.runs)
        flops, seconds = costs["training_flops"], costs["training_seconds"]
        texts.append("" if flops is None else f"{flops:.2e}")
        texts.append("" if seconds is None else f"{seconds:.0f}")
        lines.append([cell.name, *texts])
    return header, lines


def _differences(cells: Sequence[Cell]) -> tuple[list[str], list[list[str]]]:
    header = ["cell", *(_headed(metric, cells[0].runs[0]) for metric in METRICS)]
    base = {metric: values_of(cells[0], metric) for metric in METRICS}
    return header, [
        [cell.name, *(_between(m, *interval(values_of(cell, m) - base[m])) for m in METRICS)]
        for cell in cells[1:]
    ]


def _readings(cells: Sequence[Cell], start: Row) -> tuple[list[str], list[list[str]]]:
    avg = _headed("avg", cells[0].runs[0])
    lines = []
    for cell, equal in zip(cells, at_equal_flops(cells, start), strict=True):
        ends = [over_problems_and_seeds(x) for x in (values_of(cell, "avg"), equal)]
        flops = _costs(cell.runs)["training_flops"]
        lines.append([cell.name, f"{flops:.2e}", *(_shown("avg", x) for x in ends)])
    return ["cell", "FLOPs", f"{avg}, equal steps", f"{avg}, equal FLOPs"], lines


def _verdicts(verdicts: Sequence[Verdict]) -> tuple[list[str], list[list[str]]]:
    lines = []
    for claim, *numbers, outcome in verdicts:
        unit = UNITS.get(claim.metric, SHARE)[2]
        difference = f"{_between(claim.metric, *numbers)} {unit}"
        sides = " - ".join(", ".join(side) for side in (claim.more, claim.less))
        lines.append([claim.statement, sides, claim.reading, difference, outcome])
    return ["claim", "cells", "at equal", "difference (95 %)", "verdict"], lines


def _costs(runs: Sequence[Row]) -> dict[str, Any]:
    """Means over runs of what isn't of problems; None for what was not trained or not compared."""
    reports = [run.report for run in runs]
    found: dict[str, Any] = {}
    for name in ("forward_kl", "reverse_kl", "training_flops", "training_seconds"):
        values = [getattr(report, name) for report in reports]
        found[name] = None if None in values else float(np.mean(values))
    parts = [report.flops_by_part or {} for report in reports]
    return found | {name: float(np.mean([p[name] for p in parts])) for name in parts[0]}


def _title(metric: Metric, run: Row) -> str:
    report = run.report
    at = {"avg": f"avg_at_{report.samples}", "pass": f"pass_at_{max(report.pass_at)}"}
    return at.get(metric, metric)


def _headed(metric: Metric, run: Row) -> str:
    report = run.report
    named = {"avg": f"Avg@{report.samples} %", "pass": f"Pass@{max(report.pass_at)} %"}
    return named.get(metric, {"truncated": "truncated %"}.get(metric, metric))


def _shown(metric: Metric, found: Estimate) -> str:
    factor, digits, _ = UNITS.get(metric, SHARE)
    return f"{factor * found.mean:.{digits}f} ± {factor * found.standard_error:.{digits}f}"


def _between(metric: Metric, *numbers: float) -> str:
    """A difference and its interval."""
    factor, digits, _ = UNITS.get(metric, SHARE)
    middle, low, high = (f"{factor * x:+.{digits}f}" for x in numbers)
    return f"{middle} ({low} to {high})"


def _markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(text.replace('|', '/') for text in row)} |" for row in rows)

"""Results as plain text: a run's or a study's tables in Markdown, every run's numbers as CSV or
JSON.

Shares in percent in Markdown and in 0..1 in CSV and JSON; entropy in nats, lengths in tokens.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kdjax.grading.intervals import over_problems_and_seeds
from kdjax.report.numbers import METRICS
from kdjax.report.results import Cell, Row, Verdict, named, shared_k, values_of
from kdjax.report.sections import sections
from kdjax.report.tables import MEANS, at_temperatures, mean_of, table
from kdjax.runtime import processes
from kdjax.runtime.console import markdown_table, print_lines


def print_table(rows: Sequence[Row]) -> None:
    """Results side by side, also those at other temperatures, with what their errors are."""
    print_lines(*table(rows))
    others = at_temperatures([Cell(row.name, [row]) for row in rows])
    if others[1]:
        print_lines(*others)
    if processes.is_first():
        print("± one standard error over problems; entropy and KL in nats a token of own responses")


def to_lines(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """The numbers of every run, and after each cell's a line over its seeds ("all"), with standard
    errors over problems, and over seeds where there are several."""
    lines, k = [], shared_k(cells)
    for cell in cells:
        runs = [(str(run.report.seed), [run]) for run in cell.runs]
        for seed, own in [*runs, ("all", cell.runs)]:
            line: dict[str, Any] = {"cell": cell.name, "seed": seed}
            for metric in METRICS:
                found = over_problems_and_seeds(values_of(Cell(cell.name, own), metric, k))
                name = named(metric, own[0].report, k).lower().replace("@", "_at_")
                line |= {name: found.mean, f"{name}_standard_error": found.standard_error}
            lines.append(line | _costs(own))
    return lines


def to_csv(cells: Sequence[Cell]) -> str:
    """`to_lines` as CSV; empty where there is no value."""
    lines, text = to_lines(cells), io.StringIO()
    names = dict.fromkeys(name for line in lines[::-1] for name in line)
    writer = csv.DictWriter(text, list(names), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({n: "" if x != x else x for n, x in line.items()} for line in lines)  # NaN
    return text.getvalue()


def render_results(
    name: str, cells: Sequence[Cell], about: Mapping[str, Any], verdicts: Sequence[Verdict] = ()
) -> str:
    """A run or a study as Markdown: what the page says, without its plots."""
    parts = [f"# {name}"]
    for title, note, found, _ in sections(cells, verdicts):
        parts += [f"## {title}", note, markdown_table(*found)]
    parts += ["## What made this", markdown_table(["setting", "value"], about.items())]
    return "\n\n".join(parts) + "\n"


def _costs(runs: Sequence[Row]) -> dict[str, Any]:
    """Means over runs of what isn't of problems; None for what was not trained or not compared."""
    parts = [run.report.flops_by_part or {} for run in runs]
    found = {name: mean_of(runs, name) for name in MEANS}
    return found | {name: float(np.mean([p[name] for p in parts])) for name in parts[0]}

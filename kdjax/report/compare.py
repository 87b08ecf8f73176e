"""Two evaluations of the same problems: what the second has more than the first, paired by problem.

Shares in 0..1, lengths in tokens.
"""

from __future__ import annotations

from math import isnan, nan
from pathlib import Path
from typing import Any, NamedTuple

from kdjax.config.claims import Metric
from kdjax.errors import ConfigError, DataError
from kdjax.grading.eval_report import EvalReport
from kdjax.grading.intervals import Estimate, Interval, interval
from kdjax.report.numbers import between, shown
from kdjax.report.results import bounds_of, by_problem, differing, from_json, of_difference
from kdjax.runtime import files
from kdjax.runtime.console import Table
from kdjax.storage import run_folder


class Difference(NamedTuple):
    """A metric of two evaluations by its name, and the second less the first with its interval."""

    name: str
    metric: Metric
    first: float
    second: float
    difference: Interval


def compare(first: EvalReport, second: EvalReport, names: tuple[str, str]) -> list[Difference]:
    """Avg@n, Pass@k for every k of both, and, where both reports say them by problem, length and
    truncation. names: what they are called in an error.

    The intervals are over problems, and of one problem they are not known. Errors: ConfigError
    naming what differs besides the model: problems, samples, sampling, limit or verifier.
    """
    changed = differing(first, second)
    changed += ["problems"] * (len(first.correct) != len(second.correct) and not changed)
    if changed:
        said = ", ".join(
            f"{name} ({getattr(first, name)} and {getattr(second, name)})" for name in changed
        )
        raise ConfigError(
            f"{names[0]} and {names[1]} can't be compared: they differ in {said}; evaluate both in"
            " the same way"
        )
    values = [by_problem(each) for each in (first, second)]
    return [
        Difference(
            name,
            metric,
            float(a.mean()),
            float(b.mean()),
            interval((b - a)[None], of_difference(bounds_of(metric, first))),
        )
        for name, (metric, a) in values[0].items()
        if name in values[1]
        for b in [values[1][name][1]]
    ]


def read_result(path: Path) -> EvalReport:
    """The report of a run's or an evaluation's folder, or of a JSON file that kdjax evaluate wrote.

    Errors: DataError where there is none, or one without the numbers of each problem.
    """
    file = path / run_folder.EVALUATION if path.is_dir() else path
    if not file.is_file():
        raise DataError(
            f"no evaluation {file}; give a finished run, or what kdjax evaluate --out wrote"
        )
    fields = files.read_json(file)
    return as_report(fields.get("report", fields) if isinstance(fields, dict) else fields, file)


def as_report(fields: Any, file: Path) -> EvalReport:
    """The report that a file's JSON values are. Errors: DataError, as `read_result`."""
    try:
        found = from_json(fields)
        estimates = [found.avg, found.length, found.truncated, found.no_answer, found.not_scored]
        estimates += [*found.pass_at.values(), *(found.majority_at or {}).values()]
        if not all(isinstance(n, int | float) for estimate in estimates for n in estimate):
            raise ValueError("not all estimates are numbers")
        if any(isnan(estimate.mean) for estimate in estimates):
            raise ValueError("not all means are numbers")
        _check_counts(found)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise DataError(
            f"{file} is no evaluation ({type(error).__name__}: {error}); evaluate anew with kdjax"
            " evaluate --out"
        ) from error
    return found


def _check_counts(found: EvalReport) -> None:
    """Errors: ValueError or TypeError where the numbers of problems and samples are not those of an
    evaluation."""
    if min(found.problems, found.samples, found.max_new_tokens) < 1:
        raise ValueError("it has no problems, samples or tokens")
    if not all(1 <= k <= found.samples for k in found.pass_at):
        raise ValueError(f"a k of Pass@k is not in 1..{found.samples}")
    most = {"correct": 1, "cut": 1, "tokens": found.max_new_tokens}
    for name, of_each in most.items():
        counts = getattr(found, name)
        if counts is None and name != "correct":  # older versions have none
            continue
        if len(counts) != found.problems:
            raise ValueError(f"{name} has {len(counts)} of {found.problems} problems")
        if not all(type(n) is int and 0 <= n <= of_each * found.samples for n in counts):
            raise ValueError(f"a number of {name} is not in 0..{of_each * found.samples}")


def table(found: list[Difference]) -> Table:
    """A line a metric; shares in percent and their differences in points."""
    lines = [
        [d.name, *(shown(d.metric, Estimate(x, nan)) for x in (d.first, d.second)),
         between(d.metric, *d.difference)]
        for d in found
    ]  # fmt: skip
    return ["", "A", "B", "B - A (95 %)"], lines


def to_json(found: list[Difference]) -> dict[str, Any]:
    """By the metric's name: first, second, difference, low and high."""
    return {
        d.name: {
            "first": d.first,
            "second": d.second,
            "difference": d.difference.estimate,
            "low": d.difference.low,
            "high": d.difference.high,
        }
        for d in found
    }

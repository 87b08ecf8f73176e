"""Results as tables of text, which the terminal, the page and report.md show; data in, lines out.

Shares are in percent and their differences in points, entropies and KLs in nats a token, lengths in
tokens; ± is one standard error over problems, and over seeds where there are several.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple, get_args

import numpy as np

from kdjax.config.claims import Metric
from kdjax.grading.eval_report import QUANTILES, EvalReport
from kdjax.grading.intervals import Estimate, Interval, interval, over_problems_and_seeds
from kdjax.grading.passk import pass_by_problem
from kdjax.report.results import WARNINGS, Cell, Row, Verdict, at_equal_flops, differing, values_of
from kdjax.runtime.console import Table


class Section(NamedTuple):
    """A table with what a reader has to know of it."""

    title: str
    note: str
    table: Table


def sections(cells: Sequence[Cell], verdicts: Sequence[Verdict] = ()) -> list[Section]:
    """Every table that there is data for. Readings at equal cost need the start as first cell."""
    trained = [cell for cell in cells if cell.runs[0].report.training_flops is not None]
    found = [
        Section("Verdicts", VERDICTS, verdict_table(verdicts)),
        Section("Comparison", setting_of(cells), comparison(cells)),
        Section("More samples", MORE_SAMPLES, more_samples(cells)),
        Section("Responses", RESPONSES, responses(cells)),
    ]
    alike = [cell for cell in trained if are_comparable(cell, trained[0])]
    if len(alike) > 1:
        found.append(Section(f"Differences to {alike[0].name}", DIFFERENCES, differences(alike)))
        tested = all(_is_tested(run) for cell in alike for run in cell.runs)
        if tested and cells[0] not in trained and are_comparable(cells[0], alike[0]):
            readings = equal_readings(alike, cells[0].runs[0])
            found.append(Section("At equal steps and at equal FLOPs", READINGS, readings))
    found.append(Section("Training FLOPs by part", FLOPS, flops_by_part(trained)))
    found.append(Section("Warnings", WARNED, warned(cells)))
    return [section for section in found if section.table[1]]


def _is_tested(run: Row) -> bool:
    """Whether it was tested during training: from start and end alone, a reading at equal cost
    would be a straight line."""
    return any("test_correct" in record for record in run.metrics)


MORE_SAMPLES = (
    "In percent, with 95 % bootstrap intervals over problems (and seeds). Pass@k: one of k samples"
    " is right, unbiased. Maj@k: the most frequent answer of k is, in runs of k in the order drawn"
    " (of several seeds the mean alone)."
)
RESPONSES = (
    "Every response is one of the first four, in percent; a truncated one may be any of them."
    " A length of 90 %: nine of ten responses are no longer, in tokens (means over seeds)."
)
VERDICTS = (
    "The difference is the mean of the first cells less that of the others. A claim is supported"
    " where its whole 95 % interval is above 0 (or above what the claim allows to lose),"
    " contradicted where it is below, and undecided otherwise."
)
DIFFERENCES = (
    "Paired by problem and seed, with 95 % intervals (problems resampled, seeds by Student's t)."
)
READINGS = (
    "Avg of the finished students, and at the FLOPs of the cheapest of them (by seed, interpolated"
    " between the tests during training)."
)
FLOPS = "Of the models, of real tokens, mean over seeds; what a teacher computed once counts once."
WARNED = "Updates that were skipped, and each kind of warning where it was first due."
MOST_WARNINGS = 20


class Summary(NamedTuple):
    """A cell over its seeds. setting: the first run's report, for the settings that all share."""

    name: str
    setting: EvalReport
    avg: Estimate
    pass_at: dict[int, Estimate]
    length: Estimate
    truncated: Estimate
    entropy: Estimate
    forward_kl: float | None
    reverse_kl: float | None
    training_flops: float | None
    training_seconds: float | None


def summarise(cell: Cell) -> Summary:
    """Means and standard errors of a cell's runs. Without samples, one run is what its report
    says."""
    first, runs = cell.runs[0].report, cell.runs

    def found(metric: Metric, alone: Estimate) -> Estimate:
        return over_problems_and_seeds(values_of(cell, metric)) if runs[0].samples else alone

    def passing(k: int) -> Estimate:
        shares = [pass_by_problem(r.report.correct, r.report.samples, k) for r in runs]
        return over_problems_and_seeds(np.array(shares))

    return Summary(
        cell.name,
        first,
        over_problems_and_seeds(values_of(cell, "avg")),
        {k: passing(k) for k in first.pass_at},
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
    ("Pass@{k}", lambda s: shown("pass", s.pass_at[max(s.pass_at)])),
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
    base = summarise(cells[0])
    n, k = base.setting.samples, max(base.pass_at)
    header = ["run", *(name.format(n=n, k=k) for name, _ in COLUMNS)]
    lines = [[s.name, *(show(s) for _, show in COLUMNS)] for s in map(summarise, cells)]
    if len(cells) > 1:
        header.insert(2, f"gain over {base.name}")
        for line, cell in zip(lines, cells, strict=True):
            line.insert(2, "" if cell is cells[0] else gain(cell, cells[0]))
    return header, lines


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
    base = {metric: values_of(cells[0], metric) for metric in METRICS}
    lines = [
        [cell.name, *(between(m, *interval(values_of(cell, m) - base[m])) for m in METRICS)]
        for cell in cells[1:]
    ]
    return ["cell", *(_headed(metric, cells[0]) for metric in METRICS)], lines


def more_samples(cells: Sequence[Cell]) -> Table:
    """Avg@n, and Pass@k and Maj@k for every k of the evaluation; a dash where there is none."""
    first = cells[0].runs[0].report
    columns: list[tuple[str, Callable[[Cell], str]]] = [
        (f"Avg@{first.samples}", lambda cell: ranged("avg", interval(values_of(cell, "avg"))))
    ]
    columns += [(f"Pass@{k}", functools.partial(_passing, k=k)) for k in first.pass_at]
    columns += [(f"Maj@{k}", functools.partial(_majority, k=k)) for k in first.pass_at if k > 1]
    lines = [[cell.name, *(show(cell) for _, show in columns)] for cell in cells]
    return ["run", *(name for name, _ in columns)], lines


def _passing(cell: Cell, k: int) -> str:
    reports = [run.report for run in cell.runs]
    if any(k > report.samples for report in reports):
        return "-"
    shares = [pass_by_problem(report.correct, report.samples, k) for report in reports]
    return ranged("pass", interval(np.array(shares)))


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
    avg = _headed("avg", cells[0])
    return ["cell", "FLOPs", f"{avg}, equal steps", f"{avg}, equal FLOPs"], lines


def flops_by_part(cells: Sequence[Cell]) -> Table:
    """What the training FLOPs of each cell went to, mean over seeds."""
    counted = [(c.name, [r.report.flops_by_part or {} for r in c.runs]) for c in cells]
    parts = list(dict.fromkeys(name for _, runs in counted for run in runs for name in run))
    lines = [
        [name, *(f"{np.mean([run[part] for run in runs]):.2e}" for part in parts)]
        for name, runs in counted
        if all(runs)
    ]
    said = [part.removeprefix("flops_").replace("_", " ") for part in parts]
    return ["FLOPs", *said], lines


def warned(cells: Sequence[Cell]) -> Table:
    """What was said during training, the first MOST_WARNINGS of each run."""
    lines = []
    for cell in cells:
        for run in cell.runs:
            said = [line for record in run.metrics for line in record.get(WARNINGS, ())]
            lines += [[cell.name, str(run.report.seed), line] for line in said[:MOST_WARNINGS]]
            if len(said) > MOST_WARNINGS:
                rest = f"and {len(said) - MOST_WARNINGS} more, in metrics.jsonl"
                lines.append([cell.name, str(run.report.seed), rest])
    return ["run", "seed", "what was said during training"], lines


def verdict_table(verdicts: Sequence[Verdict]) -> Table:
    """What the numbers say of each claim."""
    lines = []
    for claim, *numbers, outcome in verdicts:
        difference = f"{between(claim.metric, *numbers)} {UNITS.get(claim.metric, SHARE)[2]}"
        sides = " - ".join(", ".join(side) for side in (claim.more, claim.less))
        lines.append([claim.statement, outcome, difference, claim.reading, sides])
    return ["claim", "verdict", "difference (95 %)", "at equal", "first cells - others"], lines


METRICS: tuple[Metric, ...] = get_args(Metric)
UNITS = {"length": (1.0, 1, "tokens"), "entropy": (1.0, 3, "nats")}
SHARE = (100.0, 1, "points")
"""How a metric is written: factor, digits, unit of a difference. What is not listed is a share."""


def shown(metric: Metric, found: Estimate, sign: str = "") -> str:
    """A mean and its standard error, where it is known.

    >>> shown("avg", Estimate(0.5, 0.01)), shown("entropy", Estimate(0.5, math.nan))
    ('50.0 ± 1.0', '0.500')
    """
    factor, digits, _ = UNITS.get(metric, SHARE)
    error = factor * found.standard_error
    text = f"{factor * found.mean:{sign}.{digits}f}"
    return text if math.isnan(error) else f"{text} ± {error:.{digits}f}"


def between(metric: Metric, *numbers: float) -> str:
    """A difference and its interval."""
    factor, digits, _ = UNITS.get(metric, SHARE)
    middle, low, high = (f"{factor * x:+.{digits}f}" for x in numbers)
    return f"{middle} ({low} to {high})"


def ranged(metric: Metric, found: Interval) -> str:
    """A mean and its interval.

    >>> ranged("avg", Interval(0.5, 0.25, 0.75))
    '50.0 (25.0 to 75.0)'
    """
    factor, digits, _ = UNITS.get(metric, SHARE)
    middle, low, high = (f"{factor * x:.{digits}f}" for x in found)
    return f"{middle} ({low} to {high})"


def optional(value: float | None, form: str) -> str:
    """The formatted value, or a dash where there is none."""
    return "-" if value is None else form.format(value)


def setting_of(cells: Sequence[Cell]) -> str:
    """What the numbers of a comparison are, in words."""
    report, seeds = cells[0].runs[0].report, max(len(cell.runs) for cell in cells)
    errors = "problems" if seeds == 1 else f"problems and {seeds} seeds"
    return (
        f"{report.problems} test problems ({report.source}), {report.samples} samples a problem,"
        f" {report.sampling}, at most {report.max_new_tokens} tokens, graded {report.grader}."
        f" {_ungraded(cells)} Shares in percent, lengths in"
        f" tokens, ± one standard error over {errors}; gains are paired over the same problems."
        " Entropy and both KLs are token means in nats over a model's own responses, exact over the"
        " vocabulary: KL(t‖s) is forward, KL(s‖t) reverse."
    )


def _ungraded(cells: Sequence[Cell]) -> str:
    """Why answers were not scored, over all runs; most often none was."""
    reasons: Counter[str] = Counter()
    for run in (run for cell in cells for run in cell.runs):
        reasons.update(run.report.not_scored_reasons)
    said = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    return f"Not scored: {said}." if said else "All answers were scored."


def _headed(metric: Metric, cell: Cell) -> str:
    report = cell.runs[0].report
    named = {"avg": f"Avg@{report.samples}", "pass": f"Pass@{max(report.pass_at)}"}
    return named.get(metric, metric)

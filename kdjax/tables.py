"""Results as tables: what the terminal, the page, report.md and report.csv show."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from kdjax.evaluate import EvalReport
from kdjax.passk import Estimate, over_problems
from kdjax.results import Cell, Row, Verdict


class Summary(NamedTuple):
    """A cell over its seeds; every standard error is over problems and seeds (`over_seeds`).

    share_sp: the share of right responses by seed and problem. setting: the first run's report, for
    the settings that all share.
    """

    name: str
    seeds: int
    setting: EvalReport
    share_sp: np.ndarray
    avg: Estimate
    pass_at: dict[int, Estimate]
    length: Estimate
    truncated: Estimate
    entropy: Estimate
    forward_kl: Estimate | None
    reverse_kl: Estimate | None
    training_flops: float | None
    training_seconds: float | None


def over_seeds(runs: Sequence[Estimate]) -> Estimate:
    """The mean of the runs' means. Its variance is what the choice of problems makes, which more
    seeds don't lessen (the runs' mean squared error), and what seeds make (variance / seeds).

    The sampling noise within a problem is in both, so the error is a little too large, not small.

    >>> over_seeds([Estimate(0.5, 0.3), Estimate(0.5, 0.3)])
    Estimate(mean=0.5, standard_error=0.3)
    """
    means = np.array([run.mean for run in runs])
    problems = np.mean([run.standard_error**2 for run in runs])
    return Estimate(float(means.mean()), float(np.sqrt(problems + _variance_of_mean(means))))


def _variance_of_mean(values: np.ndarray) -> float:
    """Of one value a seed; 0 for a single one, which does not show how seeds differ."""
    return float(values.var(ddof=1) / values.size) if values.size > 1 else 0.0


def summarise(cell: Cell) -> Summary:
    """Means and standard errors of a cell's runs."""
    reports = [run.report for run in cell.runs]
    first = reports[0]

    def estimate(name: str) -> Estimate:
        return over_seeds([getattr(r, name) for r in reports])

    def tokens(name: str) -> Estimate | None:
        """Of a mean over tokens, which has no error over problems."""
        values = [getattr(r, name) for r in reports]
        return None if None in values else over_seeds([Estimate(v, 0.0) for v in values])

    def mean(name: str) -> float | None:
        values = [getattr(r, name) for r in reports]
        return None if None in values else float(np.mean(values))

    entropy = tokens("entropy")
    assert entropy is not None
    return Summary(
        name=cell.name,
        seeds=len(reports),
        setting=first,
        share_sp=np.array([np.array(r.correct) / r.samples for r in reports]),
        avg=estimate("avg"),
        pass_at={k: over_seeds([r.pass_at[k] for r in reports]) for k in first.pass_at},
        length=estimate("length"),
        truncated=estimate("truncated"),
        entropy=entropy,
        forward_kl=tokens("forward_kl"),
        reverse_kl=tokens("reverse_kl"),
        training_flops=mean("training_flops"),
        training_seconds=mean("training_seconds"),
    )


COMPARABLE = ("source", "samples", "sampling", "max_new_tokens")
"""What two reports must share for their difference to mean anything."""

COLUMNS: tuple[tuple[str, Callable[[Summary], str]], ...] = (
    ("Avg@{n}", lambda s: percent(s.avg)),
    ("Pass@{k}", lambda s: percent(s.pass_at[max(s.pass_at)])),
    ("length", lambda s: plus_minus(s.length, 1)),
    ("truncated", lambda s: f"{100 * s.truncated.mean:.1f} %"),
    ("entropy", lambda s: nats(s.entropy, s.seeds)),
    ("KL(t‖s)", lambda s: nats(s.forward_kl, s.seeds)),
    ("KL(s‖t)", lambda s: nats(s.reverse_kl, s.seeds)),
    ("FLOPs", lambda s: optional(s.training_flops, "{:.2e}")),
    ("seconds", lambda s: optional(s.training_seconds, "{:.0f}")),
)


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """`comparison` of single runs."""
    return comparison([Cell(row.name, [row]) for row in rows])


def comparison(cells: Sequence[Cell]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the comparison, as text; gains are paired with the first cell."""
    summaries = [summarise(cell) for cell in cells]
    base = summaries[0]
    n, k = base.setting.samples, max(base.pass_at)
    header = ["run", *(name.format(n=n, k=k) for name, _ in COLUMNS)]
    lines = [[s.name, *(show(s) for _, show in COLUMNS)] for s in summaries]
    if len(cells) > 1:
        header.insert(2, f"gain over {base.name}")
        for line, summary in zip(lines, summaries, strict=True):
            line.insert(2, "" if summary is base else gain(summary, base))
    return header, lines


def gain(summary: Summary, base: Summary) -> str:
    """Difference of Avg@k in points; its standard error is paired over the same problems, and over
    the seeds of both."""
    if any(getattr(summary.setting, n) != getattr(base.setting, n) for n in COMPARABLE):
        return "not comparable"
    paired = over_problems(summary.share_sp.mean(axis=0) - base.share_sp.mean(axis=0))
    seeds = sum(_variance_of_mean(s.share_sp.mean(axis=1)) for s in (summary, base))
    error = np.sqrt(paired.standard_error**2 + seeds)
    return f"{100 * paired.mean:+.1f} ± {100 * error:.1f}"


def percent(estimate: Estimate) -> str:
    """A share with its standard error, in percent."""
    return plus_minus(Estimate(100 * estimate.mean, 100 * estimate.standard_error), 1)


def plus_minus(estimate: Estimate, digits: int) -> str:
    """A mean with its standard error."""
    return f"{estimate.mean:.{digits}f} ± {estimate.standard_error:.{digits}f}"


def nats(estimate: Estimate | None, seeds: int) -> str:
    """A token mean; its standard error where there are seeds to know it from."""
    if estimate is None:
        return "-"
    return plus_minus(estimate, 3) if seeds > 1 else f"{estimate.mean:.3f}"


def optional(value: float | None, form: str) -> str:
    """The formatted value, or a dash where there is none."""
    return "-" if value is None else form.format(value)


POINTS = (100, 1, "points")
UNITS = {"length": (1, 1, "tokens"), "entropy": (1, 3, "nats")}
"""(factor, digits, unit) of a claim's difference; other metrics are shares, shown in points."""


def verdict_table(verdicts: Sequence[Verdict]) -> tuple[list[str], list[list[str]]]:
    """What the numbers say of each claim."""
    lines = []
    for verdict in verdicts:
        claim, (factor, digits, unit) = verdict.claim, UNITS.get(verdict.claim.metric, POINTS)
        numbers = (verdict.estimate, verdict.low, verdict.high)
        estimate, low, high = (f"{factor * value:+.{digits}f}" for value in numbers)
        difference = f"{estimate} {unit}"
        lines.append([claim.name, verdict.outcome, difference, f"{low} to {high}", claim.statement])
    return ["claim", "outcome", "difference", "95 % interval", "statement"], lines


def markdown_table(header: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """A table in Markdown: the first column to the left, numbers to the right.

    >>> print(markdown_table(["run", "x"], [["a|b", 1]]), end="")
    | run | x |
    |---|---:|
    | a\\|b | 1 |
    """
    rows = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    rule = "|---|" + "---:|" * (len(header) - 1)
    return "\n".join([_line(header), rule, *(_line(row) for row in rows)]) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def render_markdown(
    cells: Sequence[Cell], about: Mapping[str, Any], verdicts: Sequence[Verdict] = ()
) -> str:
    """The tables of a run or of a study as Markdown."""
    parts = [setting_of(cells), markdown_table(*comparison(cells))]
    if verdicts:
        parts.append(markdown_table(*verdict_table(verdicts)))
    parts.append(markdown_table(["setting", "value"], about.items()))
    return "\n".join(parts)


def setting_of(cells: Sequence[Cell]) -> str:
    """What the numbers of a comparison are, in words."""
    report, seeds = cells[0].runs[0].report, max(len(cell.runs) for cell in cells)
    errors = "over problems" if seeds == 1 else f"over problems and {seeds} seeds"
    return (
        f"{report.problems} test problems ({report.source}), {report.samples} samples a problem,"
        f" {report.sampling}, at most {report.max_new_tokens} tokens. Shares in percent, ± one"
        f" standard error {errors}; gains are paired over the same problems. Entropy and both KLs"
        " are token means in nats over a model's own responses, exact over the vocabulary: KL(t‖s)"
        " is forward, KL(s‖t) reverse.\n"
    )


MEASURES = ("avg", "length", "truncated", "entropy", "forward_kl", "reverse_kl")


def render_csv(cells: Sequence[Cell]) -> str:
    """The comparison as numbers: a line a cell, shares as fractions, entropy and KLs in nats."""
    lines = []
    for summary in map(summarise, cells):
        estimates = {name: getattr(summary, name) for name in MEASURES}
        estimates |= {f"pass_at_{k}": value for k, value in summary.pass_at.items()}
        line: dict[str, Any] = {"run": summary.name, "seeds": summary.seeds}
        for name, value in estimates.items():
            line[name], line[f"{name}_standard_error"] = value or ("", "")
        line["training_flops"] = summary.training_flops
        line["training_seconds"] = summary.training_seconds
        lines.append(line)
    text = io.StringIO()
    writer = csv.DictWriter(text, lines[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()

"""Results as a static page: one table, plots with their axes named, samples. Data in, HTML out."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kdjax.evaluate import EvalReport
from kdjax.passk import over_problems

Record = dict[str, Any]


class Row(NamedTuple):
    """One line of the table: a trained run, or a reference (start, teacher) without metrics."""

    name: str
    report: EvalReport
    metrics: list[dict[str, float]]
    samples: list[Record]


CURVES = (
    ("loss", "trained loss (nats)"),
    ("forward_kl", "KL(teacher || student) (nats a token)"),
    ("reverse_kl", "KL(student || teacher) (nats a token)"),
    ("student_entropy", "student entropy (nats a token)"),
    ("response_length", "response length (tokens)"),
    ("gradient_norm", "gradient norm"),
)

COMPARABLE = ("source", "samples", "sampling", "max_new_tokens", "grader")
"""What two reports must share for their difference to mean anything."""

COLUMNS: tuple[tuple[str, Callable[[EvalReport], str]], ...] = (
    ("Avg@{n}", lambda r: percent(r.avg)),
    ("Pass@{n}", lambda r: percent(r.pass_at[max(r.pass_at)])),
    ("length", lambda r: f"{r.length.mean:.1f} ± {r.length.standard_error:.1f}"),
    ("truncated", lambda r: f"{100 * r.truncated.mean:.1f} %"),
    ("entropy", lambda r: f"{r.entropy:.3f}"),
    ("KL(t‖s)", lambda r: optional(r.forward_kl, "{:.3f}")),
    ("KL(s‖t)", lambda r: optional(r.reverse_kl, "{:.3f}")),
    ("FLOPs", lambda r: optional(r.training_flops, "{:.2e}")),
    ("seconds", lambda r: optional(r.training_seconds, "{:.0f}")),
)


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the comparison, as text; gains are paired with the first row."""
    base = rows[0].report
    n, k = base.samples, max(base.pass_at)
    header = ["run", *(name.format(n=n if name.startswith("Avg") else k) for name, _ in COLUMNS)]
    comparable = len(rows) > 1
    cells = []
    for row in rows:
        line = [row.name, *(show(row.report) for _, show in COLUMNS)]
        if comparable:
            line.insert(2, "" if row is rows[0] else gain(row.report, base))
        cells.append(line)
    if comparable:
        header.insert(2, f"gain over {rows[0].name}")
    return header, cells


def gain(report: EvalReport, base: EvalReport) -> str:
    """Difference of Avg@k in points, with its standard error paired over the same problems."""
    if any(getattr(report, name) != getattr(base, name) for name in COMPARABLE):
        return "not comparable"
    difference = over_problems((np.array(report.correct) - np.array(base.correct)) / report.samples)
    return f"{100 * difference.mean:+.1f} ± {100 * difference.standard_error:.1f}"


def percent(estimate) -> str:
    """A share with its standard error, in percent."""
    return f"{100 * estimate.mean:.1f} ± {100 * estimate.standard_error:.1f}"


def optional(value: float | None, form: str) -> str:
    """The formatted value, or a dash where there is none."""
    return "-" if value is None else form.format(value)


def render_page(
    title: str, rows: Sequence[Row], about: dict[str, Any], problems_shown: int = 3
) -> str:
    """The page of one run or of a study, self-contained: no script, no request, plots inline as
    SVG."""
    import jinja2

    template = (Path(__file__).parent / "templates" / "report.html").read_text()
    header, cells = table(rows)
    plots = [
        ("Accuracy against entropy", _accuracy_against_entropy(rows)),
        ("Pass@k", _pass_at_k(rows)),
    ]
    plots += [
        (label.split(" (")[0], _curve(rows, name, label))
        for name, label in CURVES
        if any(name in record for row in rows for record in row.metrics)
    ]
    return (
        jinja2.Environment(autoescape=True)
        .from_string(template)
        .render(
            title=title,
            header=header,
            cells=cells,
            report=rows[0].report,
            first=rows[0].name,
            plots=plots,
            samples=_side_by_side(rows, problems_shown),
            about=about,
        )
    )


def _side_by_side(rows: Sequence[Row], count: int) -> list[dict[str, Any]]:
    """The first sample of a few problems, spread over the set, under every run that was given the
    problem."""
    with_samples = [row for row in rows if row.samples]
    if not with_samples:
        return []
    first = [s for s in with_samples[0].samples if s["sample"] == 0]
    chosen = first[:: max(1, len(first) // count)][:count]
    shown = []
    for problem in chosen:
        answers = [
            (row.name, sample)
            for row in with_samples
            for sample in row.samples
            if sample["problem"] == problem["problem"] and sample["sample"] == 0
        ]
        shown.append({"prompt": problem["prompt"], "gold": problem["gold"], "answers": answers})
    return shown


def _accuracy_against_entropy(rows: Sequence[Row]) -> str:
    def draw(axes, colour):
        for row in rows:
            avg = row.report.avg
            axes.errorbar(
                row.report.entropy,
                100 * avg.mean,
                yerr=100 * avg.standard_error,
                fmt="o",
                capsize=3,
                label=row.name,
                color=colour[row.name],
            )
        axes.set_xlabel("entropy of own responses (nats a token)")
        axes.set_ylabel(f"Avg@{rows[0].report.samples} (%), ± 1 standard error")

    return _svg(draw, rows)


def _pass_at_k(rows: Sequence[Row]) -> str:
    def draw(axes, colour):
        for row in rows:
            ks = sorted(row.report.pass_at)
            means = np.array([row.report.pass_at[k].mean for k in ks])
            errors = np.array([row.report.pass_at[k].standard_error for k in ks])
            style = {"marker": "o", "capsize": 3, "label": row.name, "color": colour[row.name]}
            axes.errorbar(ks, 100 * means, yerr=100 * errors, **style)
        axes.set_xlabel("k (samples a problem)")
        axes.set_ylabel("Pass@k (%), ± 1 standard error")

    return _svg(draw, rows)


def _curve(rows: Sequence[Row], name: str, label: str) -> str:
    def draw(axes, colour):
        for row in rows:
            points = [(r["step"], r[name]) for r in row.metrics if name in r]
            if points:
                axes.plot(*zip(*points, strict=True), label=row.name, color=colour[row.name])
        axes.set_xlabel("training step")
        axes.set_ylabel(label)

    return _svg(draw, rows)


def _svg(draw: Callable[[Any, dict[str, str]], None], rows: Sequence[Row]) -> str:
    """An inline SVG; a run has one colour in every plot, and black is the page's text colour."""
    import matplotlib
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "kdjax",
        "font.family": "sans-serif",
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(5.2, 4.0), layout="constrained")
        axes = figure.add_subplot()
        draw(axes, {row.name: f"C{number}" for number, row in enumerate(rows)})
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside lower center", ncols=3, fontsize="small", frameon=False)
        buffer = io.StringIO()
        metadata = {"Date": None, "Creator": None}
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    svg = buffer.getvalue()
    svg = re.sub(r"#000000|\bblack\b", "currentColor", svg[svg.index("<svg") :])
    return re.sub(r"<text (?![^>]*fill)", '<text fill="currentColor" ', svg)

"""Results as a static page: verdicts, tables, figures with their numbers, samples. Data in, HTML
out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from kdjax.figure import table_of
from kdjax.plots import figures, styles
from kdjax.results import Cell, Outcome, Record, Verdict
from kdjax.svg import draw
from kdjax.tables import sections

SHADES = (0.1, 0.3, 1.0, 3.0)
"""A token's colour deepens where its log-ratio passes one of these, in nats."""


def render_page(
    title: str, cells: Sequence[Cell], about: Mapping[str, Any], verdicts: Sequence[Verdict] = ()
) -> str:
    """The page of a run or of a study, self-contained: no script, no request, figures inline as
    SVG. One run is one cell with one run."""
    import jinja2

    looks = styles(cells)
    template = (Path(__file__).parent / "templates" / "report.html").read_text()
    return (
        jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
        .from_string(template)
        .render(
            title=title,
            seeds=max(len(cell.runs) for cell in cells),
            sections=sections(cells, verdicts),
            outcomes=get_args(Outcome),
            groups={
                group: [(f, draw(f, looks), table_of(f)) for f in made]
                for group, made in figures(cells).items()
            },
            problems=side_by_side(cells),
            legend=legend(),
            shade=shade,
            about=about,
        )
    )


def side_by_side(cells: Sequence[Cell]) -> list[tuple[Record, list[tuple[str, Record]]]]:
    """(problem, each cell's answer to it) for the samples that keep their `pieces`: of each cell's
    first run."""
    answers: dict[str, list[tuple[str, Record]]] = {}
    for cell in cells:
        for sample in cell.runs[0].samples:
            if "pieces" in sample:
                answers.setdefault(sample["problem"], []).append((cell.name, sample))
    return [(found[0][1], found) for found in answers.values()]


def shade(log_ratio: float | None) -> str:
    """The class of a token's colour: p1 .. p4 where the teacher finds it likelier than the student
    does, m1 .. m4 where less likely, nothing near 0.

    >>> shade(0.05), shade(0.5), shade(-9.0), shade(None)
    ('', 'p2', 'm4', '')
    """
    passed = sum(abs(log_ratio or 0.0) > limit for limit in SHADES)
    return f"{'p' if (log_ratio or 0.0) > 0 else 'm'}{passed}" if passed else ""


def legend() -> list[tuple[str, str]]:
    """(class, what it says) of every colour, from the lowest log-ratio to the highest."""
    bounds = [*zip(SHADES, (*SHADES[1:], None), strict=True)]

    def said(sign: str, low: float, high: float | None) -> str:
        return f"beyond {sign}{low:g}" if high is None else f"{sign}{low:g} to {sign}{high:g}"

    below = [(f"m{n}", said("\N{MINUS SIGN}", *bound)) for n, bound in enumerate(bounds, 1)]
    above = [(f"p{n}", said("+", *bound)) for n, bound in enumerate(bounds, 1)]
    return [*below[::-1], ("", f"within ±{SHADES[0]:g}"), *above]

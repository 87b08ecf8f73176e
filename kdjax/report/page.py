"""Results as a static page: verdicts, tables, figures with their numbers, samples. Data in, HTML
out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from kdjax.report.draw import draw, table_of
from kdjax.report.figures import figures, styles
from kdjax.report.results import Cell, Outcome, Record, Verdict
from kdjax.report.sections import sections

SHADES = (0.1, 0.3, 1.0, 3.0)
"""A token's colour deepens where its log-ratio passes one of these, in nats."""


def render_page(
    title: str, cells: Sequence[Cell], about: Mapping[str, Any], verdicts: Sequence[Verdict] = ()
) -> str:
    """The page of a run or of a study, self-contained: no script, no request, figures inline as
    SVG. One run is one cell with one run."""
    import jinja2

    looks = styles(cells)
    template = (Path(__file__).parent / "templates" / "report.html").read_text(encoding="utf-8")
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
            outcome=outcome,
            blank=blank,
            kinds=by_outcome(cells),
            most=MOST_OF_A_KIND,
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


OUTCOMES = ("correct", "wrong", "no answer", "not scored", "truncated")
"""What a sample may have become, for a reader: truncated ones are not among the others, unless they
are right."""
MOST_OF_A_KIND, MOST_CHARACTERS = 3, 1500
"""Of each cell, how many samples of an outcome are shown, and how much of their text: its end."""


def outcome(sample: Record) -> str:
    """The one of OUTCOMES that a sample belongs to.

    >>> outcome({"correct": False, "truncated": True, "no_answer": True})
    'truncated'
    """
    if sample["correct"]:
        return "correct"
    kinds = ("truncated", "no_answer", "not_scored")
    return next((kind.replace("_", " ") for kind in kinds if sample.get(kind)), "wrong")


def by_outcome(
    cells: Sequence[Cell],
) -> list[tuple[str, int, list[tuple[str, Record, str]]]]:
    """Of each outcome that occurs: how many samples have it, and (cell, sample, the end of its
    text) of a few, of different problems where there are as many; of each cell's first run."""
    found: dict[str, list[tuple[str, Record, str]]] = {name: [] for name in OUTCOMES}
    counts = dict.fromkeys(OUTCOMES, 0)
    for cell in cells:
        own: dict[str, list[Record]] = {name: [] for name in OUTCOMES}
        for sample in cell.runs[0].samples:
            own[outcome(sample)].append(sample)
        for name, samples in own.items():
            counts[name] += len(samples)
            firsts = {sample["problem"]: sample for sample in reversed(samples)}
            chosen = [*reversed(firsts.values())][:MOST_OF_A_KIND]
            found[name] += [(cell.name, sample, _end(sample["response"])) for sample in chosen]
    return [(name, counts[name], found[name]) for name in OUTCOMES if counts[name]]


def blank(text: str) -> str:
    """What to say of a text that can't be seen.

    >>> blank("4"), blank(""), blank(" \\n ")
    ('', 'no text', '3 characters of white space alone')
    """
    if text.strip():
        return ""
    return f"{len(text)} characters of white space alone" if text else "no text"


def _end(text: str) -> str:
    cut = len(text) - MOST_CHARACTERS
    return text if cut <= 0 else f"[{cut} characters before] {text[-MOST_CHARACTERS:]}"


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

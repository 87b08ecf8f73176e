"""The report's page: every figure shows its numbers, the markup is sound, and a browser lays it out
without cuts at a phone's width and a laptop's."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest
from browser import BROWSER, measure
from synthetic import PIECES, VERDICTS, a_report, a_run, a_sample, a_study

from kdjax.grading.eval_report import unread
from kdjax.grading.intervals import Estimate, Interval
from kdjax.report import draw as draw_module
from kdjax.report.draw import COLOURS, MOST_POINTS, Figure, Series, draw, style, table_of
from kdjax.report.figures import curve, figures, styles
from kdjax.report.page import MOST_CHARACTERS, SHADES, by_outcome, legend, render_page, shade
from kdjax.report.results import Cell, Row
from kdjax.report.sections import sections
from kdjax.report.tables import (
    comparison,
    gain,
    more_samples,
    responses,
    summarise,
    table,
)

ABOUT = {"prefix": "student", "git_commit": "0123456789ab+"}
LONG = "a_cell_with_a_name_that_is_longer_than_any_line_of_a_legend_could_hold"


@pytest.fixture(scope="module")
def study() -> list[Cell]:
    cells = a_study(seeds=2)
    return [*cells[:-1], cells[-1]._replace(name=LONG)]


@pytest.fixture(scope="module")
def page(study) -> str:
    return render_page("Study <x>", study, ABOUT, VERDICTS)


def alone(report, name: str = "a") -> Cell:
    return Cell(name, [Row(name, report, [], [])])


def test_gains_are_paired():
    """The difference's error is over per-problem differences: exactly 0 for a constant gain."""
    base, better = alone(a_report([0, 1, 2])), alone(a_report([1, 2, 3]))
    assert gain(better, base) == "+25.0 ± 0.0"
    assert gain(alone(a_report([3, 1, 2])), base) == "+25.0 ± 25.0"
    assert gain(alone(a_report([1, 2, 3], source="other")), base) == "not comparable"


def test_table_has_a_cell_for_every_header():
    """One run has no gain column; several have one, empty for the first."""
    header, lines = table([Row("a", a_report([1, 2]), [], [])])
    assert len(header) == len(lines[0])
    assert "gain over a" not in header
    header, lines = table([Row(n, a_report([1, 2]), [], []) for n in "ab"])
    assert [len(line) for line in lines] == [len(header)] * 2
    assert lines[0][header.index("gain over a")] == ""
    assert lines[1][header.index("KL(s‖t)")] == "-"


def test_samples_are_told_apart_by_outcome():
    """Each sample has one outcome; a few of each are shown, of different problems first, long ones
    by their end; a truncated sample that is right is right."""
    made = [
        a_sample("a", sample=0), a_sample("a", sample=1), a_sample("b", truncated=True),
        a_sample("c", correct=False, truncated=True, no_answer=True),
        a_sample("d", correct=False, no_answer=True), a_sample("e", correct=False),
        a_sample("f", correct=False, not_scored=True, reason="<time>", response="x" * 2000 + "end"),
    ]  # fmt: skip
    made = [{**sample, "entropy": 0.5} for sample in made]
    cell = Cell("c", [Row("c", a_report([3], samples=7), [], made)])
    found = by_outcome([cell])
    counts = [("correct", 3), ("wrong", 1), ("no answer", 1), ("not scored", 1), ("truncated", 1)]
    assert [(name, count) for name, count, _ in found] == counts
    assert [(s["problem"], s["sample"]) for _, s, _ in found[0][2]] == [("a", 0), ("b", 0)]
    text = found[3][2][0][2]
    assert text.endswith("end")
    assert text.startswith("[503 characters before] x")
    assert text.count("x") == MOST_CHARACTERS - 3
    page = render_page("Run", [cell], ABOUT)
    assert "not scored: &lt;time&gt;" in page
    assert "<summary>truncated: 1</summary>" in page


def test_majorities_quantiles_and_intervals_are_shown():
    """Every k with its interval, outcomes that add up to all; a report of an older version has a
    dash for what it did not count."""
    newer = dict(
        majority_at={1: Estimate(0.5, 0.1), 2: Estimate(0.5, 0.1), 4: Estimate(0.75, 0.1)},
        intervals={"majority_at_4": Interval(0.75, 0.5, 1.0)}, no_answer=Estimate(0.125, 0.1),
        not_scored=Estimate(0.25, 0.1), length_quantiles={10: 3, 50: 5, 90: 8},
    )  # fmt: skip
    cells = [alone(a_report([1, 3], **newer)), alone(a_report([1, 3]), "old")]
    header, lines = more_samples(cells)
    assert header == ["run", "Avg@4", "Pass@1", "Pass@2", "Pass@4", "Maj@2", "Maj@4"]
    assert lines[0][1] == lines[0][2] == "50.0 (0.6 to 99.4)"
    assert lines[0][5:] == ["50.0", "75.0 (50.0 to 100.0)"]
    assert lines[1][5:] == ["-", "-"]
    header, lines = responses(cells)
    assert header[-3:] == ["length 10 %", "length 50 %", "length 90 %"]
    assert lines[0][1:] == ["50.0", "12.5", "12.5", "25.0", "3", "5", "8"]
    assert lines[1][5:] == ["-", "-", "-"]
    two = Cell("two", [cells[0].runs[0], cells[0].runs[0]._replace(report=a_report([1, 1]))])
    assert more_samples([two])[1][0][5:] == ["-", "-"]


def test_most_answers_unread_is_said():
    """Where most finished responses have no answer, the warnings name the remedy of the grader and
    the template: not where answers were read, nor of truncated ones."""
    silent = dict(correct=False, no_answer=True)
    made = [a_sample(str(n), **silent) for n in range(3)] + [a_sample("3")]
    cut = [a_sample(str(n), truncated=True, **silent) for n in range(9)]
    assert unread(a_report([1]), cut) is unread(a_report([1]), [*made[2:], *cut]) is None
    said = unread(a_report([1]), [*made, *cut])
    assert said == (
        "3 of 4 responses that ended by themselves have no answer that evaluation.grader exact"
        r" reads; ask for \boxed{} in data.prompt_template, or grade by exact_flexible, which reads"
        " other forms"
    )
    asked = unread(a_report([1], template=r"Put it into \boxed{}.", grader="math"), made)
    assert asked.endswith("that evaluation.grader math reads")
    made = [{**sample, "entropy": 0.5} for sample in made]
    cell = Cell("c", [Row("c", a_report([1]), [{"step": 1, "warnings": ["w"]}], made)])
    (warnings,) = (s for s in sections([cell]) if s.title == "Warnings")
    assert [line[:2] for line in warnings.table[1]] == [["c", "0"]] * 2
    assert [line[2] for line in warnings.table[1]] == ["w", unread(a_report([1]), made)]
    assert '<table class="sentences">' in render_page("Run", [cell], ABOUT)


def test_a_response_that_cant_be_seen_is_said():
    """White space alone, and no text at all, in both lists of samples."""
    made = [
        {**a_sample("a", [["  ", 0.1], ["\n", 0.2]], correct=False), "entropy": 0.5},
        {**a_sample("b", [], correct=False), "entropy": 0.5},
    ]
    page = render_page("Run", [Cell("c", [Row("c", a_report([0], samples=2), [], made)])], ABOUT)
    for said in ("(3 characters of white space alone)", "(no text)"):
        assert page.count(said) == 2


@pytest.mark.parametrize(
    ("label", "values", "low", "high"),
    [
        ("Avg (%)", [0.0, 100.0], 0, 100), ("Avg (%)", [0.0, 0.0], 0, 1),
        ("Avg (%)", [100.0, 100.0], 90, 100), ("loss (nats)", [0.0, 150.0], 0, 200),
        ("difference (points)", [-1.0, 1.0], -1.2, 1.2),
    ],
)  # fmt: skip
def test_axes_end_where_values_can(label, values, low, high):
    """No percent below 0 or above 100, no step or entropy below 0; what can be negative is."""
    series = Series("a", [0.0, 1.0], values, "curve")
    x_limits, y_limits = limits_of(Figure("f", "entropy (nats)", label, [series]))
    assert x_limits[0] == 0
    assert low <= y_limits[0] <= min(values)
    assert max(values) <= y_limits[1] <= high
    assert (y_limits[0] < 0) == (min(values) < 0)


def limits_of(figure: Figure) -> list[tuple[float, float]]:
    """The limits of the x and the y axis, as `draw` sets them."""
    seen = []
    dress = draw_module._dress

    def spy(axes, figure):
        dress(axes, figure)
        seen.append((axes.get_xlim(), axes.get_ylim()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draw_module, "_dress", spy)
        draw(figure, {})
    return seen[0]


def test_marks_of_long_numbers_are_few():
    """Tiny entropies: the marks on the x axis have room beside each other."""
    tiny = Series("a", [1.0e-6, 1.13e-6, 1.57e-6], [1.0, 2.0, 3.0], "scatter")
    svg = draw(Figure("f", "entropy (nats)", "Avg (%)", [tiny]), {})
    marks = [text for text in re.findall(r">([^<>\n]+)</text>", svg) if "e-06" in text]
    assert 2 <= len(marks) <= 5


def test_what_is_not_comparable_is_not_compared():
    """A cell that was evaluated on other problems has its line, and no difference to the others."""
    *cells, last = a_study(cells=3, seeds=1)
    (run,) = last.runs
    other = run._replace(report=run.report._replace(source="other", max_new_tokens=99))
    made = {s.title: s.table[1] for s in sections([*cells, last._replace(runs=[other])])}
    assert made["Comparison"][-1][2] == "not comparable"
    assert [line[0] for line in made["Differences to teacher_forward"]] == ["teacher_reverse"]
    readings = made["At equal steps and at equal FLOPs"]
    assert [line[0] for line in readings] == ["teacher_forward", "teacher_reverse"]


def test_one_run_is_what_its_report_says():
    """With samples or without, the table of a single run has the report's own means and errors."""
    run = a_run("x", 0, 0.5)
    with_samples, without = (summarise(Cell("x", [r])) for r in (run, run._replace(samples=[])))
    for name in ("avg", "length", "truncated"):
        np.testing.assert_allclose(getattr(with_samples, name), getattr(run.report, name))
        np.testing.assert_allclose(getattr(without, name), getattr(run.report, name))
    assert with_samples.entropy.mean == pytest.approx(run.report.entropy)
    assert (
        comparison([Cell("x", [run._replace(samples=[])])])[1][0][5] == f"{without.entropy[0]:.3f}"
    )
    for k, found in with_samples.pass_at.items():
        np.testing.assert_allclose(found, run.report.pass_at[k])


def test_a_curve_is_the_mean_over_seeds_and_their_range():
    """Mean, lowest and highest of the seeds at each step, by hand; what is not a number is left
    out."""
    logged = [[{"step": s, "loss": s * slope} for s in (1, 2)] for slope in (1.0, 2.0)]
    runs = [Row("c", a_report([1]), metrics, []) for metrics in logged]
    found = curve(Cell("c", runs), lambda r: r["step"], lambda r: r.get("loss"), 10)
    assert (found.x, found.y) == ([1, 2], [15, 30])
    assert found.y_range == [(10, 20), (20, 40)]
    alone = curve(Cell("c", runs[:1]), lambda r: r["step"], lambda r: r.get("loss"))
    assert alone.y_range is None
    broken = [runs[0]._replace(metrics=[{"step": 1, "loss": float("nan")}, {"step": 2}])]
    assert curve(Cell("c", broken), lambda r: r["step"], lambda r: r.get("loss")).x == []


def test_long_curves_are_thinned_to_their_end():
    """At most MOST_POINTS points, evenly spread, the last step among them."""
    metrics = [{"step": s, "loss": 1.0} for s in range(1, 1235)]
    found = curve(
        Cell("c", [Row("c", a_report([1]), metrics, [])]), lambda r: r["step"], lambda r: 1.0
    )
    assert len(found.x) <= MOST_POINTS
    assert found.x[-1] == 1234
    assert len({*np.diff(found.x)}) == 1


def points_of(svg: str) -> tuple[list[tuple[float, float]], tuple[float, ...]]:
    """(where the series' points stand, the frame of the axes), in the SVG's units."""
    root = ElementTree.fromstring(svg)
    space = "{http://www.w3.org/2000/svg}"
    frame, found = (), []
    for group in root.iter(f"{space}g"):
        for path in group.iter(f"{space}path") if group.get("class") == "frame" else ():
            corners = numbers(path.get("d"))
            frame = (*corners.min(axis=0), *corners.max(axis=0))
        if group.get("class") == "series":
            for path in group.iter(f"{space}path"):
                if path.get("clip-path"):
                    found += numbers(path.get("d")).tolist()
            for use in group.iter(f"{space}use"):
                found.append([float(use.get("x")), float(use.get("y"))])
    return found, frame


def numbers(path: str) -> np.ndarray:
    return np.array(re.findall(r"[ML] (-?[\d.]+) (-?[\d.]+)", path), float)


def test_every_figure_shows_its_points(study):
    """In every figure, points stand inside the axes, at least one a series; labels say units; the
    table behind it has as many numbers."""
    looks = styles(study)
    made = [figure for group in figures(study).values() for figure in group]
    assert len(made) == 18
    for figure in made:
        svg = draw(figure, looks)
        found, (left, top, right, bottom) = points_of(svg)
        shown = [series for series in figure.series if len(series.x)]
        assert svg.count('class="series"') == len(shown) > 0, figure.title
        assert len(found) >= len(shown)
        assert all(left <= x <= right and top <= y <= bottom for x, y in found), figure.title
        assert re.search(r"\(.+\)|step|weight", figure.x_label), figure.x_label
        assert re.search(r"\(.+\)", figure.y_label), figure.y_label
        header, lines = table_of(figure)
        assert {len(line) for line in lines} == {len(header)}
        filled = sum(text != "" for line in lines for text in line[1:])
        assert filled >= sum(len(series.x) for series in shown)


def test_a_figure_without_data_is_not_made():
    """What a run did not measure has no figure; a figure without points is refused."""
    cells = a_study(seeds=1)[:1]
    assert list(figures(cells)) == ["Accuracy and diversity"]
    empty = Figure("none", "x", "y (nats)", [Series("a", [], [], "curve")])
    with pytest.raises(ValueError, match="'none' has no point"):
        draw(empty, {})


def test_a_figures_table_has_the_numbers_that_it_shows():
    """Curves over the same steps stand side by side, with ranges; points stand one a line."""
    curves = [
        Series("a", [1, 2], [0.5, 0.25], "curve", [(0.4, 0.6), (0.25, 0.25)]),
        Series("b", [2, 3], [1.0, 2.0], "curve"),
    ]
    header, lines = table_of(Figure("f", "step", "loss (nats)", curves))
    assert header == ["step", "a", "b"]
    assert lines == [["1", "0.5 (0.4 to 0.6)", ""], ["2", "0.25", "1"], ["3", "", "2"]]
    points = Series("a", [0.5], [20.0], "scatter", [(19.0, 21.0)])
    header, lines = table_of(Figure("f", "entropy", "Avg (%)", [points]))
    assert (header, lines) == (["run", "entropy", "Avg (%)"], [["a", "0.5", "20 (19 to 21)"]])


def test_styles_tell_cells_apart(study):
    """No two of 14 names look alike, a name looks the same everywhere, references have no
    colour."""
    looks = styles(study)
    assert len({str(look) for look in looks.values()}) == len(study) == 14
    assert [looks[name].colour for name in ("start", "teacher")] == [None, None]
    assert len({str(style(n)) for n in range(5 * COLOURS)}) == 5 * COLOURS


VOID = {"meta", "br", "link", "img", "input", "hr"}


class Checker(HTMLParser):
    """Balance of tags, ids and what would make a request."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.ids: Counter[str] = Counter()
        self.used: set[str] = set()
        self.faults: list[str] = []
        self.feed(text)
        self.close()
        self.faults += [f"open: {tag}" for tag in self.open]

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        self.note(tag, attrs)

    def handle_startendtag(self, tag, attrs):
        self.note(tag, attrs)

    def note(self, tag, attrs):
        if tag in ("script", "link", "img", "iframe", "object", "base"):
            self.faults.append(tag)
        for name, value in attrs:
            self.ids.update([value] if name == "id" else [])
            self.used |= {*re.findall(r"url\(#([^)]+)\)", value or "")}
            if name in ("href", "xlink:href", "src", "action"):
                self.used.add((value or "").removeprefix("#"))
                self.faults += [] if (value or "").startswith("#") else [f"{name}={value}"]
            self.faults += [f"{name}={value}"] if name.startswith("on") else []

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"</{tag}> at {self.getpos()}")


def test_markup_is_sound(page):
    """Tags balance, ids are there once and for every use, nothing runs and nothing is asked for."""
    checked = Checker(page)
    assert checked.faults == []
    assert [name for name, times in checked.ids.items() if times > 1] == []
    assert checked.used <= {*checked.ids}
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)


def test_page_has_everything(page, study):
    """Verdicts in words, every cell in the comparison, a table behind every figure, model text as
    text; and no more than two megabytes."""
    assert "Study &lt;x&gt;" in page
    assert "&lt;b&gt;" in page
    assert ";|<b>" not in page
    for verdict in VERDICTS:
        assert f'<td class="{verdict.outcome}">{verdict.outcome}</td>' in page
        assert verdict.claim.statement in page.replace("&#39;", "'")
    assert all(f"<td>{cell.name}</td>" in page for cell in study)
    count = sum(map(len, figures(study).values()))
    assert page.count("<svg") == page.count("<figcaption>") == page.count("<details>") == count
    assert page.count('<details class="kind">') == len(by_outcome(study)) == 3
    titles = [section.title for section in sections(study, VERDICTS)]
    assert titles == [
        "Verdicts", "Comparison", "More samples", "Responses", "Differences to teacher_forward",
        "At equal steps and at equal FLOPs", "Training FLOPs by part",
    ]  # fmt: skip
    assert len(page) < 2e6


def test_tokens_are_coloured_by_their_log_ratio(page):
    """A token's class is of its log-ratio's size and sign, its title says the number; a token
    without one has neither."""
    assert '<span class="m3" title="-1.500 nats">=88</span>' in page
    assert '<span class="p4" title="+4.200 nats">;|&lt;b&gt;</span>' in page
    assert '<span class="" title="-0.020 nats">85</span>' in page
    assert "</span>né<span" in page
    assert len(legend()) == 2 * len(SHADES) + 1
    assert [shade(x) for x in (-0.2, 0.2, 1.5, None)] == ["m1", "p1", "p3", ""]
    bare = [[text, None] for text, _ in PIECES]
    run = a_run("r", 0, 0.5, pieces=bare)
    alone = render_page("Run", [Cell("r", [run])], ABOUT)
    assert 'nats">' not in alone.split("<h2>Samples token by token</h2>")[1].split("<h2>")[0]
    assert "85+3=88;|&lt;b&gt;né\n" in alone


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb (WCAG 2)."""
    parts = np.array([int(colour[n : n + 2], 16) for n in (1, 3, 5)]) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_can_be_read(page, scheme):
    """WCAG 2: text has 4.5 to 1 on all that it stands on, the marks of figures 3 to 1."""
    found = re.findall(r"--(\w+): light-dark\((#\w{6}), (#\w{6})\)", page)
    palette = {name: pair[scheme] for name, *pair in found}
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    shades = [f"{sign}{n}" for sign in "pm" for n in range(1, len(SHADES) + 1)]
    for ground in ("page", "soft", *shades):
        assert contrast(palette["ink"], palette[ground]) >= 4.5, ground
    for text in ("quiet", "good", "bad"):
        for ground in ("page", "soft"):
            assert contrast(palette[text], palette[ground]) >= 4.5, (text, ground)
    marks = [f"c{n}" for n in range(COLOURS)]
    assert len({palette[mark] for mark in marks}) == COLOURS
    for mark in marks:
        assert contrast(palette[mark], palette["page"]) >= 3, mark


needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="LEFT OUT: the page's layout, as there is no Chromium on PATH"
)


@needs_browser
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_cut_in_a_browser(page, width, tmp_path):
    """On a phone and on a laptop nothing is wider than the window, and no label of a figure is cut,
    meets another or is too small."""
    found = measure(page, width, tmp_path)
    assert found["width"] == width
    assert found["scroll"] <= width
    assert found["outside"] == found["cut"] == found["met"] == []
    assert len(found["fonts"]) > 300
    assert min(found["fonts"]) > 9


@needs_browser
def test_labels_at_the_end_of_an_axis_are_whole(tmp_path):
    """A long tick label at the very end of either axis stays within its figure."""
    ends = Series("a", [0.1915], [-1234.5], "scatter", [(-1250, -1220)], [(0.1799, 0.2038)])
    svg = draw(Figure("f", "entropy (nats)", "Avg (%)", [ends]), {})
    found = measure(f"<body><figure>{svg}</figure></body>", 390, tmp_path)
    assert found["cut"] == []
    assert len(found["fonts"]) > 8


@needs_browser
def test_the_browser_finds_what_is_broken(tmp_path):
    """What is wider than the window, a label beyond its figure and two that meet are reported."""
    svg = '<svg viewBox="0 0 100 50" width="200">{}</svg>'
    places = {"one": (1, 20), "two": (9, 20), "out": (95, 45)}
    texts = "".join(f'<text x="{x}" y="{y}">{name}</text>' for name, (x, y) in places.items())
    page = f'<body><p style="width: 500px">wide</p><figure>{svg.format(texts)}</figure></body>'
    found = measure(page, 390, tmp_path)
    assert found["scroll"] > 390
    assert found["outside"] == ["P wide"]
    assert found["met"] == [["text one", "text two"]]
    assert found["cut"] == ["text out"]

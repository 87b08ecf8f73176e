"""A figure as data, and the table of its numbers; `kdjax.report.draw` draws it."""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from html import escape
from typing import Any, Literal, NamedTuple

MOST_POINTS = 200
"""Longer series are thinned to so many points, in the drawing and in the table."""

Range = tuple[float, float]


class Series(NamedTuple):
    """Points (x, y) in the order of x; the ranges, where known, hold each point's lowest and
    highest value.

    kind: a line; steps, each value until the next; a curve, a line with markers and a band; points,
    markers with error bars, joined; scatter, not joined.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    kind: Literal["line", "steps", "curve", "points", "scatter"]
    y_range: Sequence[Range] | None = None
    x_range: Sequence[Range] | None = None


class Figure(NamedTuple):
    """What a plot shows; labels carry the units. Several series may have one name, and then one
    style.

    x_ticks: where the x axis is marked, on a scale of doublings.
    """

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    x_ticks: Sequence[float] | None = None


def table_of(figure: Figure) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the numbers that a figure shows, in its units.

    Curves over the same x: a column a series. Otherwise a line a point. Ranges stand in brackets.
    """
    shown = [series for series in figure.series if len(series.x)]
    grid = sorted({x for s in shown for x in s.x})
    if all(s.kind in ("curve", "steps") for s in shown) and len(grid) <= 2 * max(
        len(s.x) for s in shown
    ):
        held = [dict(zip(s.x, _cells(s.y, s.y_range), strict=True)) for s in shown]
        lines = [[number(x), *(column.get(x, "") for column in held)] for x in grid]
        return [figure.x_label, *(s.name for s in shown)], lines
    lines = [
        [s.name, x, y]
        for s in shown
        for x, y in zip(_cells(s.x, s.x_range), _cells(s.y, s.y_range), strict=True)
    ]
    return ["run", figure.x_label, figure.y_label], lines


def number(value: float) -> str:
    """Four significant digits.

    >>> number(12.0), number(0.123456), number(123456.0)
    ('12', '0.1235', '123456')
    """
    return f"{value:.0f}" if abs(value) >= 1e3 and abs(value) < 1e7 else f"{value:.4g}"


def _cells(values: Sequence[float], ranges: Sequence[Range] | None) -> list[str]:
    if ranges is None:
        return [number(value) for value in values]
    return [
        f"{number(value)} ({number(low)} to {number(high)})" if low < high else number(value)
        for value, (low, high) in zip(values, ranges, strict=True)
    ]


COLOURS = 12
"""The page defines --c0 .. --c11, each for light and dark (kdjax/report/templates/report.html)."""

MARKERS = "os^DvPX<>*ph"
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.3)), (0, (6, 1.5, 1.5, 1.5)), (0, (9, 3)))


class Style(NamedTuple):
    """How a name is drawn in every figure: number of its colour (None is the text's own), marker,
    dashes."""

    colour: int | None
    marker: str
    dashes: Any


def style(number: int) -> Style:
    """The style of the number-th name: marker and dashes tell apart what colour alone may not.

    >>> style(0) == style(1), style(0).colour == style(12).colour, style(0) == style(12)
    (False, True, False)
    """
    return Style(number % COLOURS, MARKERS[number % 12], DASHES[number % len(DASHES)])


def plain_style(number: int) -> Style:
    """The style of what is no trained cell: in the colour of the text."""
    return Style(None, "oD*X^svP<>ph"[number % 12], DASHES[number % len(DASHES)])


def draw(figure: Figure, styles: Mapping[str, Style]) -> str:
    """The figure as an SVG to stand inside HTML, 360 units wide; names keep their style.

    Colours are the page's variables, text is in its font and colour, ids don't clash. Errors:
    ValueError where there is no point to show.
    """
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    shown = [series for series in figure.series if len(series.x)]
    if not shown:
        raise ValueError(f"figure {figure.title!r} has no point")
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": figure.title,
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 11,
        "axes.labelsize": 11,
    }
    with matplotlib.rc_context(settings):
        below = _lines_below({s.name for s in shown})
        height = _HEIGHT + below
        canvas = Canvas(figsize=(_WIDTH / 72, height / 72))
        box = (54 / _WIDTH, (40 + below) / height, (_WIDTH - 76) / _WIDTH, (_HEIGHT - 64) / height)
        axes = canvas.add_axes(box)
        axes.patch.set_gid("frame")
        others = dict.fromkeys(series.name for series in shown if series.name not in styles)
        looks = {**styles, **{name: plain_style(n) for n, name in enumerate(others)}}
        for series in shown:
            _SHAPES[series.kind](axes, series, looks[series.name])
        _dress(axes, figure)
        _legend(canvas, axes)
        buffer = io.StringIO()
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        canvas.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    return _inline(buffer.getvalue(), figure.title)


_WIDTH, _HEIGHT, _LINE = 360, 256, 15
"""Of a figure without legend, and of a legend's line, in the SVG's units."""


def _legend(canvas, axes) -> None:
    """One entry a name, below the axes, where there are several."""
    handles = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    if len(handles) > 1:
        canvas.legend(
            handles.values(),
            [name if len(name) <= _LONGEST else name[: _LONGEST - 3] + "..." for name in handles],
            loc="lower center",
            ncols=_legend_columns(handles),
            fontsize=10,
            frameon=False,
            handlelength=2.6,
            columnspacing=1.2,
            borderpad=0,
            borderaxespad=0.4,
            labelspacing=0.35,
        )


def _lines_below(names: Collection[str]) -> float:
    """The height of the legend: the axes keep their size, however many names there are."""
    return 4 + _LINE * -(-len(names) // _legend_columns(names)) if len(names) > 1 else 0


_LONGEST = 44  # letters of a name that a line of the legend holds


def _legend_columns(names: Iterable[str]) -> int:
    return max(1, min(4, 56 // (max(map(len, names)) + 7)))


def _curve(axes, series: Series, look: Style) -> None:
    line = _line(axes, series, look)
    line.set(marker=look.marker, markersize=4, markevery=max(1, len(series.x) // 6))
    if series.y_range is not None:
        low, high = zip(*series.y_range, strict=True)
        axes.fill_between(series.x, low, high, color=line.get_color(), alpha=0.1, linewidth=0)


def _scatter(axes, series: Series, look: Style):
    drawn = axes.errorbar(
        series.x,
        series.y,
        xerr=_lengths(series.x, series.x_range),
        yerr=_lengths(series.y, series.y_range),
        fmt=look.marker,
        markersize=6,
        capsize=2.5,
        elinewidth=1,
        label=series.name,
        color=_colour(look.colour),
    )
    drawn.lines[0].set_gid("series")
    return drawn.lines[0]


def _points(axes, series: Series, look: Style) -> None:
    _scatter(axes, series, look).set_linestyle(look.dashes)


def _line(axes, series: Series, look: Style, drawstyle: str = "default"):
    (line,) = axes.plot(
        series.x,
        series.y,
        label=series.name,
        color=_colour(look.colour),
        linestyle=look.dashes,
        linewidth=1.6,
        drawstyle=drawstyle,
    )
    line.set_gid("series")
    return line


_SHAPES: dict[str, Callable] = {
    "line": _line,
    "steps": functools.partial(_line, drawstyle="steps-post"),
    "curve": _curve,
    "points": _points,
    "scatter": _scatter,
}


def _lengths(values: Sequence[float], ranges: Sequence[Range] | None):
    """Error bars as matplotlib takes them: lengths below and above."""
    if ranges is None:
        return None
    pairs = list(zip(values, ranges, strict=True))
    return [[v - low for v, (low, _) in pairs], [high - v for v, (_, high) in pairs]]


def _dress(axes, figure: Figure) -> None:
    axes.set_xlabel(figure.x_label)
    axes.set_title(figure.y_label, loc="left", fontsize=11)  # where a long one has room
    axes.grid(color=_colour(_GRID), linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(0.06)
    _within_range(axes, figure)
    axes.yaxis.set_major_formatter(lambda y, _: number(y))
    axes.xaxis.set_major_formatter(lambda x, _: number(x))
    if figure.x_ticks is not None:
        axes.set_xscale("log", base=2)
        axes.set_xticks(figure.x_ticks, [number(x) for x in figure.x_ticks])
        axes.minorticks_off()
    else:
        _thin(axes)


def _within_range(axes, figure: Figure) -> None:
    """The margins end where values do: at 0, and percents at 100, unless an error bar is beyond."""
    for way, label in (("x", figure.x_label), ("y", figure.y_label)):
        low, high = axes.dataLim.get_points()[:, "xy".index(way)]
        first, last = getattr(axes, f"get_{way}lim")()
        last = min(last, 100) if label.endswith("(%)") and high <= 100 else last
        first = max(first, 0) if low >= 0 else first
        if first < last:
            getattr(axes, f"set_{way}lim")(first, last)
    for line in axes.get_lines():
        line.set_clip_on(line.get_marker() == "None")  # a marker on the edge is whole


_LETTER = 7.5
"""The width of a tick's letter, about, in the SVG's units."""


def _thin(axes) -> None:
    """As few marks on the x axis as its numbers have room for."""
    for bins in (9, 7, 5, 4, 3, 2, 1):
        axes.locator_params(axis="x", nbins=bins)
        low, high = axes.get_xlim()
        ticks = [number(x) for x in axes.get_xticks() if low <= x <= high]
        if sum(len(tick) + 1 for tick in ticks) * _LETTER <= _WIDTH - 76:
            return


_GRID, _INK = 254, 253


def _colour(index: int | None) -> str:
    """A stand-in that matplotlib takes for a colour; `_inline` puts the page's variable there."""
    return f"#ab{_INK if index is None else index:02x}cd"


def _inline(svg: str, title: str) -> str:
    """What matplotlib wrote, at home in the page: its size, font and colours; no id but those that
    are referred to, which `svg.hashsalt` keeps apart."""
    svg = re.sub(_NOT_OURS, "", svg[svg.index("<svg") :])
    svg = re.sub(r' id="(series|frame)"', r' class="\1"', svg)
    svg = re.sub(r"#ab([0-9a-f]{2})cd", _variable, svg)
    svg = svg.replace("#000000", "currentColor").replace("<text ", '<text fill="currentColor" ')
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)


_NOT_OURS = r' id="[\w.]+_\d+"| font-family: [^;"]*;?| (?:width|height)="[\d.]+pt"'


def _variable(match: re.Match) -> str:
    index = int(match[1], 16)
    return {_GRID: "var(--line)", _INK: "currentColor"}.get(index, f"var(--c{index})")

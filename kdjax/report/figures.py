"""The length curriculum over training steps: limits, held-out entropies, what was decided."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from kdjax.grading.intervals import Estimate
from kdjax.report.draw import MOST_POINTS, Figure, Range, Series, Style, plain_style, style
from kdjax.report.results import Cell, Record
from kdjax.report.tables import summarise
from kdjax.step.gate import DECISIONS

STEP = "training step"


def curriculum_timeline(cells: Sequence[Cell]) -> list[Figure]:
    """Two figures of each cell whose gate decided something, a line a seed: the limit of the next
    rollout, and the held-out entropy beside its threshold, each measurement with the mark of its
    decision."""
    gated = [cell for cell in cells if any(map(_measured, (run.metrics for run in cell.runs)))]
    return [figure for cell in gated for figure in (_limits(cell), _entropies(cell))]


def _measured(metrics: Sequence[Record]) -> list[Record]:
    return [record for record in metrics if "gate_decision" in record]


def _limits(cell: Cell) -> Figure:
    series = []
    for run in cell.runs:
        found = [(r["step"], r["gate_length"]) for r in run.metrics if "gate_length" in r]
        steps, lengths = zip(*found, strict=True)
        series.append(Series(f"seed {run.report.seed}", steps, lengths, "steps"))
    return Figure(f"{cell.name}: length limit", STEP, "limit of a response (tokens)", series)


def _entropies(cell: Cell) -> Figure:
    records = [(run.report.seed, _measured(run.metrics)) for run in cell.runs]

    def read(name: str, found: Sequence[Record]) -> tuple[list[float], list[float]]:
        known = [r for r in found if r[name] is not None]
        return [r["step"] for r in known], [r[name] for r in known]

    lines = [
        Series(f"seed {seed}", *read("heldout_entropy", found), "line") for seed, found in records
    ]
    lines += [
        Series("threshold", *read("gate_threshold_nats", found), "line") for _, found in records
    ]
    marks = []
    for code, decision in enumerate(DECISIONS):
        made = [r for _, found in records for r in found if r["gate_decision"] == code]
        made.sort(key=lambda r: r["step"])
        marks.append(Series(decision, *read("heldout_entropy", made), "scatter"))
    title = f"{cell.name}: held-out entropy"
    return Figure(title, STEP, "held-out entropy (nats a token)", [*lines, *marks])


Reading = Callable[[Record], float | None]
"""A number of a record of metrics, None where it was not measured."""


def figures(cells: Sequence[Cell]) -> dict[str, list[Figure]]:
    """Every figure that these cells have data for, by group."""
    groups = {
        group: [f for f in make(cells) if any(series.x for series in f.series)]
        for group, make in FIGURES.items()
    }
    return {group: made for group, made in groups.items() if made}


def styles(cells: Sequence[Cell]) -> dict[str, Style]:
    """One style a cell, in every figure; references are in the colour of the text."""
    trained = [cell.name for cell in cells if cell.runs[0].metrics]
    others = [cell.name for cell in cells if not cell.runs[0].metrics]
    looks = {name: style(number) for number, name in enumerate(trained)}
    return looks | {name: plain_style(number + 1) for number, name in enumerate(others)}


def accuracy_and_diversity(cells: Sequence[Cell]) -> list[Figure]:
    """What a gain in accuracy costs in entropy, and what drawing again still finds."""
    return [accuracy_against_entropy(cells), pass_at_k(cells)]


def accuracy_against_entropy(cells: Sequence[Cell]) -> Figure:
    """Avg@k against the entropy of what the finished models say, one point a cell."""
    series = [
        _point(s.name, s.entropy.mean, s.avg, 100)._replace(x_range=[_around(s.entropy, 1)])
        for s in map(summarise, cells)
    ]
    label = "entropy of own responses (nats a token)"
    return Figure("Accuracy against entropy", label, _avg_label(cells), series)


def pass_at_k(cells: Sequence[Cell]) -> Figure:
    """Pass@k against k, one line a cell."""
    series = []
    for s in map(summarise, cells):
        found = [(k, s.pass_at[k]) for k in sorted(s.pass_at)]
        means, ranges = [100 * e.mean for _, e in found], [_around(e, 100) for _, e in found]
        series.append(Series(s.name, [k for k, _ in found], means, "points", ranges))
    ticks = sorted({k for s in series for k in s.x})
    return Figure("Pass@k", "k (samples a problem)", "Pass@k (%)", series, x_ticks=ticks)


def accuracy_at_equal_cost(cells: Sequence[Cell]) -> list[Figure]:
    """The same accuracy at equal steps and at equal FLOPs. Seconds hold compilation, and all else
    that the machine had to do."""
    trained = [cell for cell in cells if cell.runs[0].metrics]
    most = max((s.training_flops or 0.0 for s in map(summarise, trained)), default=0.0)
    factor, unit = si_unit(most)
    steps = [curve(cell, _read("step"), _read("test_avg"), 100) for cell in trained]
    compute = [curve(cell, flops_so_far, _read("test_avg"), 100, factor) for cell in trained]
    for s in map(summarise, trained):
        if s.training_flops is not None:
            compute.append(_point(s.name, factor * s.training_flops, s.avg, 100))
    label = "Avg (%)"
    return [
        Figure("Accuracy at equal steps", STEP, label, steps),
        Figure("Accuracy at equal FLOPs", f"training compute ({unit})", label, compute),
    ]


CURVES = (
    ("Trained loss", "loss", "trained loss (nats)", 1.0),
    ("Forward KL", "forward_kl", "KL(teacher ‖ student) (nats a token)", 1.0),
    ("Reverse KL", "reverse_kl", "KL(student ‖ teacher) (nats a token)", 1.0),
    ("Student entropy", "student_entropy", "entropy on training prefixes (nats a token)", 1.0),
    ("Test entropy", "test_entropy", "entropy of own responses (nats a token)", 1.0),
    ("Response length", "response_length", "length in training (tokens)", 1.0),
    ("Test length", "test_length", "length of own responses (tokens)", 1.0),
    ("Truncation", "truncated", "truncated in training (%)", 100.0),
    ("Reward", "reward", "reward of a response (1: right)", 1.0),
    ("Gradient norm", "gradient_norm", "norm of the loss's gradient (nats)", 1.0),
)
"""(title, metric, label, factor) of what is drawn over training steps."""


def training_curves(cells: Sequence[Cell]) -> list[Figure]:
    """Losses, KLs, entropy, length and truncation over training steps."""
    return [
        Figure(title, STEP, label, [curve(c, _read("step"), _read(name), factor) for c in cells])
        for title, name, label, factor in CURVES
    ]


def mixing_sweep(cells: Sequence[Cell]) -> list[Figure]:
    """Accuracy, entropy and length against the weight of forward KL, over the cells that have
    one."""
    sweep = sorted((c.weight, summarise(c)) for c in cells if c.weight is not None)
    if len(sweep) < 2:
        return []

    def against_weight(title: str, label: str, name: str, factor: float) -> Figure:
        found = [(weight, getattr(s, name)) for weight, s in sweep]
        means = [factor * e.mean for _, e in found]
        ranges = [_around(e, factor) for _, e in found]
        series = Series("sweep", [weight for weight, _ in found], means, "points", ranges)
        return Figure(f"{title} against the weight", "weight of forward KL", label, [series])

    return [
        against_weight("Accuracy", _avg_label(cells), "avg", 100),
        against_weight("Entropy", "entropy of own responses (nats a token)", "entropy", 1),
        against_weight("Length", "length of own responses (tokens)", "length", 1),
    ]


FIGURES: dict[str, Callable[[Sequence[Cell]], list[Figure]]] = {
    "Accuracy and diversity": accuracy_and_diversity,
    "Mixing sweep": mixing_sweep,
    "Cost": accuracy_at_equal_cost,
    "Curriculum": curriculum_timeline,
    "Training": training_curves,
}
"""What a page shows, group by group: add a figure here."""


def curve(cell: Cell, x: Reading, y: Reading, factor: float = 1.0, x_factor: float = 1.0) -> Series:
    """A reading over training: the mean over seeds at each step, and its range over them.

    At most MOST_POINTS points, evenly spread, the last among them.
    """
    found: dict[float, list[tuple[float, float]]] = defaultdict(list)
    for run in cell.runs:
        for record in run.metrics:
            at, value = x(record), y(record)
            if at is not None and value is not None and math.isfinite(at + value):
                found[record["step"]].append((x_factor * at, factor * value))
    points = [np.array(found[step]) for step in _thinned(sorted(found))]
    several = len(cell.runs) > 1
    return Series(
        cell.name,
        [float(p[:, 0].mean()) for p in points],
        [float(p[:, 1].mean()) for p in points],
        "curve",
        [(float(p[:, 1].min()), float(p[:, 1].max())) for p in points] if several else None,
    )


def _thinned(steps: list[float]) -> list[float]:
    every = max(1, -(-len(steps) // MOST_POINTS))
    return steps[::-every][::-1]


def flops_so_far(record: Record) -> float | None:
    """All parts together (`flops_...` of a record)."""
    parts = [value for name, value in record.items() if name.startswith("flops_")]
    return sum(parts) if parts else None


def si_unit(flops: float) -> tuple[float, str]:
    """(factor, unit) that make FLOPs a number from 1 to 1,000.

    >>> si_unit(5.2e11)
    (1e-09, 'GFLOP')
    """
    power = min(8, max(0, int(math.log10(flops) // 3))) if flops > 0 else 0
    return 10.0 ** (-3 * power), ("", "k", "M", "G", "T", "P", "E", "Z", "Y")[power] + "FLOP"


def _read(name: str) -> Reading:
    return lambda record: record.get(name)


def _point(name: str, x: float, y: Estimate, factor: float) -> Series:
    return Series(name, [x], [factor * y.mean], "scatter", [_around(y, factor)])


def _around(estimate: Estimate, factor: float) -> Range:
    """A mean and its standard error as a range; the mean alone where the error is not known."""
    error = 0.0 if math.isnan(estimate.standard_error) else estimate.standard_error
    return factor * (estimate.mean - error), factor * (estimate.mean + error)


def _avg_label(cells: Sequence[Cell]) -> str:
    return f"Avg@{cells[0].runs[0].report.samples} (%)"

"""What accuracy cost: readings at equal steps, FLOPs and time, and the FLOPs by part."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from kdjax.plots import FLOPS, Reading, curve, flops_so_far, si_unit
from kdjax.results import Cell

Table = tuple[list[str], list[list[str]]]


def equal_readings(cells: Sequence[Cell]) -> Table:
    """Avg (%) of each cell at the largest number of steps, of FLOPs and of seconds that all
    reached, interpolated between the evaluations during training; no lines where there are none."""
    header, columns = ["run"], []
    measured = [cell for cell in cells if any("test_avg" in r for r in cell.runs[0].metrics)]
    for at, said in _READINGS:
        found = [curve(cell, at, lambda r: r.get("test_avg"), 100) for cell in measured]
        if found and all(series.x for series in found):
            common = min(series.x[-1] for series in found)
            header.append(f"Avg (%) at {said(common)}")
            columns.append([f"{np.interp(common, s.x, s.y):.1f}" for s in found])
    names = [cell.name for cell in measured]
    return header, [list(line) for line in zip(names, *columns, strict=True)]


def flops_by_part(cells: Sequence[Cell]) -> Table:
    """A line a cell: the training FLOPs of each part, mean over seeds; cached teacher work counts
    once."""
    totals = []
    for cell in cells:
        ends = [[r for r in run.metrics if flops_so_far(r) is not None][-1:] for run in cell.runs]
        last = [record for end in ends for record in end]
        if last:
            means = [float(np.mean([record[name] for record in last])) for name in FLOPS]
            totals.append((cell.name, [*means, sum(means)]))
    factor, unit = si_unit(max((values[-1] for _, values in totals), default=0.0))
    parts = [name.removeprefix("flops_").replace("_", " ") for name in FLOPS]
    header = ["run", *(f"{part} ({unit})" for part in (*parts, "together"))]
    return header, [[name, *(f"{factor * v:.1f}" for v in values)] for name, values in totals]


def _said_flops(flops: float) -> str:
    factor, unit = si_unit(flops)
    return f"{factor * flops:.3g} {unit}"


_READINGS: tuple[tuple[Reading, Callable[[float], str]], ...] = (
    (lambda record: record["step"], lambda steps: f"{steps:.0f} steps"),
    (flops_so_far, _said_flops),
    (lambda record: record.get("seconds"), lambda seconds: f"{seconds:.0f} seconds"),
)

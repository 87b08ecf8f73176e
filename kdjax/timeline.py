"""The length curriculum over training steps: limits, held-out entropies, what was decided."""

from __future__ import annotations

from collections.abc import Sequence

from kdjax.figure import Figure, Series
from kdjax.gate import DECISIONS
from kdjax.results import Cell, Record

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
        return [r["step"] for r in found], [r[name] for r in found]

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

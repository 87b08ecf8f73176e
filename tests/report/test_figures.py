"""The curriculum's figures: of a run's metrics alone, with every decision marked and named."""

from __future__ import annotations

import pytest
from synthetic import a_report

from kdjax.report.draw import table_of
from kdjax.report.figures import curriculum_timeline
from kdjax.report.results import Cell, Row
from kdjax.step.gate import FALL_BACK, RISE, START, STOPPED


def record(step: int, length: int, entropy=None, decision=None) -> dict[str, float]:
    gate = {"step": step, "gate_length": length}
    if entropy is None:
        return gate
    return gate | {
        "heldout_entropy": entropy, "gate_decision": decision, "gate_threshold_nats": 0.4,
    }  # fmt: skip


METRICS = [
    record(1, 16, 0.8, START), record(2, 16), record(3, 32, 0.5, RISE), record(4, 32),
    record(5, 16, 0.1, FALL_BACK), record(7, 16, 0.6, STOPPED), record(8, 16),
]  # fmt: skip


def a_cell(metrics, seeds: int = 1) -> Cell:
    runs = [Row("c", a_report([1, 2], seed=seed), metrics, []) for seed in range(seeds)]
    return Cell("c", runs)


def test_what_is_drawn_is_what_was_logged():
    """Limits as steps, entropies and threshold where measured, a mark a decision, units said."""
    limits, entropies = curriculum_timeline([a_cell(METRICS)])
    (line,) = limits.series
    assert line.kind == "steps"
    assert list(zip(line.x, line.y, strict=True)) == [
        (1, 16), (2, 16), (3, 32), (4, 32), (5, 16), (7, 16), (8, 16),
    ]  # fmt: skip
    expected = [(1, 0.8), (3, 0.5), (5, 0.1), (7, 0.6)]
    measured, threshold, *marks = entropies.series
    assert list(zip(measured.x, measured.y, strict=True)) == expected
    assert threshold.y == [0.4] * 4
    named = ("start", "rise", "fall back", "stopped")
    shown = {s.name: (s.x[0], s.y[0]) for s in marks if s.x}
    assert shown == dict(zip(named, expected, strict=True))
    assert (limits.y_label, entropies.y_label) == (
        "limit of a response (tokens)", "held-out entropy (nats a token)",
    )  # fmt: skip
    assert ["fall back", "5", "0.1"] in table_of(entropies)[1]


def test_every_seed_has_its_line():
    """A cell of two seeds is one pair of figures, with a line a seed."""
    figures = curriculum_timeline([a_cell(METRICS, seeds=2)])
    assert len(figures) == 2
    assert [s.name for s in figures[0].series] == ["seed 0", "seed 1"]


@pytest.mark.parametrize("metrics", [[], [record(1, 16), record(2, 16)]])
def test_no_decision_no_figure(metrics):
    """A fixed horizon, and a model that was not trained, have no timeline."""
    assert curriculum_timeline([a_cell(metrics)]) == []

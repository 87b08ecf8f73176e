"""The curriculum's plot: drawn from a run's metrics alone, with every decision marked and named."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure

from kdjax.gate import DECISIONS, FALL_BACK, RISE, START, STOPPED
from kdjax.timeline import MARKERS, curriculum_timeline


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


def test_what_is_drawn_is_what_was_logged():
    """Limits as steps, entropies and threshold where measured, a mark a decision, units on axes."""
    axes = Figure().add_subplot()
    curriculum_timeline(METRICS)(axes, {})
    entropies = axes.figure.axes[1]
    (limits,) = axes.lines
    np.testing.assert_array_equal(limits.get_xydata()[:, 1], [16, 16, 32, 32, 16, 16, 16])
    assert limits.get_drawstyle() == "steps-post"
    measured, threshold = entropies.lines
    expected = [(1, 0.8), (3, 0.5), (5, 0.1), (7, 0.6)]
    np.testing.assert_array_equal(measured.get_xydata(), expected)
    np.testing.assert_array_equal(threshold.get_xydata()[:, 1], [0.4] * 4)
    marks = {c.get_label(): c.get_offsets().tolist() for c in entropies.collections}
    named = ("start", "rise", "fall back", "stopped")
    assert marks == {name: [list(at)] for name, at in zip(named, expected, strict=True)}
    for plot, highest in ((axes, 32), (entropies, 0.8)):
        assert plot.get_ylim() == (0, pytest.approx(1.1 * highest))
    labels = (axes.get_xlabel(), axes.get_ylabel(), entropies.get_ylabel())
    assert labels == (
        "training step", "response length limit (tokens)", "held-out entropy (nats a token)",
    )  # fmt: skip


@pytest.mark.parametrize("metrics", [[], [record(1, 16), record(2, 16)]])
def test_no_decision_no_plot(metrics):
    """A fixed horizon, and a model that was not trained, have no timeline."""
    assert curriculum_timeline(metrics) is None


def test_every_decision_has_a_mark_of_its_own():
    """No two decisions look alike."""
    assert list(MARKERS) == list(DECISIONS)
    assert len({*MARKERS.values()}) == len(DECISIONS)

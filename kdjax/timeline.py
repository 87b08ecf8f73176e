"""The length curriculum of a run over its steps: limits, held-out entropy, what was decided."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kdjax.gate import DECISIONS

HEADROOM = 1.1  # over the highest value
MARKERS = dict(zip(DECISIONS, ("D", "^", "o", "X", "s", "v", "."), strict=True))


def curriculum_timeline(
    metrics: Sequence[dict[str, float]],
) -> Callable[[Any, dict[str, str]], None] | None:
    """draw(axes, colours) of a run's records, or None where its gate decided nothing.

    The limit of the next rollout (tokens) is a line of steps on the left axis; the held-out entropy
    (nats a token) stands on the right one, above or under its threshold, each measurement with the
    mark of its decision. Colours are of runs, and this is a plot of one: it has its own.
    """
    measured = [record for record in metrics if "gate_decision" in record]
    if not measured:
        return None

    def draw(axes, colours: dict[str, str]) -> None:
        del colours
        limits = [(r["step"], r["gate_length"]) for r in metrics if "gate_length" in r]
        axes.step(*zip(*limits, strict=True), where="post", color="C0", label="length limit")
        axes.set_ylim(0, HEADROOM * max(length for _, length in limits))
        axes.set_xlabel("training step")
        axes.set_ylabel("response length limit (tokens)", color="C0")
        entropies = axes.twinx()
        entropies.spines[["top", "left"]].set_visible(False)
        for name, values, style in (
            ("held-out entropy", "heldout_entropy", "-"),
            ("threshold", "gate_threshold_nats", "--"),
        ):
            points = [(r["step"], r[values]) for r in measured]
            entropies.plot(*zip(*points, strict=True), style, color="C1", label=name)
        for code in sorted({int(r["gate_decision"]) for r in measured}):
            made = [r for r in measured if r["gate_decision"] == code]
            entropies.scatter(
                [r["step"] for r in made],
                [r["heldout_entropy"] for r in made],
                marker=MARKERS[DECISIONS[code]],
                color="C3",
                zorder=3,
                label=DECISIONS[code],
            )
        highest = max(r[y] for r in measured for y in ("heldout_entropy", "gate_threshold_nats"))
        entropies.set_ylim(0, HEADROOM * highest or 1.0)
        entropies.set_ylabel("held-out entropy (nats a token)", color="C1")

    return draw
